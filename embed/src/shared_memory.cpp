#include "shared_memory.hpp"

#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "descriptor.hpp"
#include "failure.hpp"
#include "random_name.hpp"

using sdrt_internal::Descriptor;
using sdrt_internal::Failure;
using sdrt_internal::random_name;
using sdrt_internal::system_failure;

sdrt_buffer::sdrt_buffer(std::string name, std::size_t size, pid_t owner)
    : name_(std::move(name)), size_(size), owner_(owner) {}

sdrt_buffer::~sdrt_buffer() {
  if (data_ != nullptr) {
    munmap(data_, size_);
  }
  if (owner_ == getpid()) {
    shm_unlink(name_.c_str());
  }
}

std::unique_ptr<sdrt_buffer> sdrt_buffer::create(std::size_t size) {
  if (size == 0) {
    throw Failure(SDRT_INVALID_ARGUMENT, "a buffer's size is 0: expected 1 byte or more");
  }
  const std::string name = "/sdrt-" + std::to_string(getpid()) + "-" + random_name();
  const Descriptor object(shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  if (object.get() < 0) {
    throw system_failure("no shared memory can be made", errno);
  }
  std::unique_ptr<sdrt_buffer> buffer(new sdrt_buffer(name, size, getpid()));
  // Memory that is not there would end the process when it is first touched.
  int code = 0;
  do {
    code = posix_fallocate(object.get(), 0, static_cast<off_t>(size));
  } while (code == EINTR);
  if (code != 0) {
    const bool full = code == ENOSPC || code == ENOMEM || code == EFBIG;
    throw system_failure(std::to_string(size) + " bytes of shared memory cannot be had", code,
                         full ? SDRT_OUT_OF_MEMORY : SDRT_SYSTEM);
  }
  buffer->map(object.get());
  return buffer;
}

std::unique_ptr<sdrt_buffer> sdrt_buffer::attach(const std::string &name, std::size_t size) {
  const Descriptor object(shm_open(name.c_str(), O_RDWR, 0));
  struct stat facts = {};
  if (object.get() < 0 || fstat(object.get(), &facts) < 0) {
    throw system_failure("shared memory \"" + name.substr(0, 200) + "\" cannot be opened", errno);
  }
  if (size == 0 || facts.st_size < 0 || static_cast<std::size_t>(facts.st_size) < size) {
    throw Failure(SDRT_INVALID_ARGUMENT, "a buffer's size is " + std::to_string(size) + ": expected 1 to " +
                                             std::to_string(facts.st_size) + " bytes, which \"" + name.substr(0, 200) +
                                             "\" has");
  }
  std::unique_ptr<sdrt_buffer> buffer(new sdrt_buffer(name, size, 0));
  buffer->map(object.get());
  return buffer;
}

void sdrt_buffer::map(int descriptor) {
  void *const data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (data == MAP_FAILED) {
    throw system_failure(std::to_string(size_) + " bytes of shared memory cannot be mapped", errno,
                         errno == ENOMEM ? SDRT_OUT_OF_MEMORY : SDRT_SYSTEM);
  }
  data_ = data;
}
