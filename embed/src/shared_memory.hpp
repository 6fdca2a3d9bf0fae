// POSIX shared memory, mapped here and known to a server by its name.
#ifndef SDRT_SRC_SHARED_MEMORY_HPP
#define SDRT_SRC_SHARED_MEMORY_HPP

#include <cstddef>
#include <memory>
#include <string>
#include <sys/types.h>

#include "sdrt.h"

struct sdrt_buffer {
 public:
  // Throws Failure.
  static std::unique_ptr<sdrt_buffer> create(std::size_t size);
  static std::unique_ptr<sdrt_buffer> attach(const std::string &name, std::size_t size);

  sdrt_buffer(const sdrt_buffer &) = delete;
  sdrt_buffer &operator=(const sdrt_buffer &) = delete;
  ~sdrt_buffer();

  void *data() const { return data_; }
  std::size_t size() const { return size_; }
  const std::string &name() const { return name_; }

 private:
  sdrt_buffer(std::string name, std::size_t size, pid_t owner);
  void map(int descriptor);

  std::string name_;
  std::size_t size_;
  pid_t owner_;  // the process with whose buffer the object goes, not one that it has forked; 0 for none
  void *data_ = nullptr;
};

#endif
