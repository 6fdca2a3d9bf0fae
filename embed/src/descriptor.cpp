#include "descriptor.hpp"

#include <cerrno>
#include <sys/eventfd.h>
#include <unistd.h>

#include "failure.hpp"

namespace sdrt_internal {

void Descriptor::reset() noexcept {
  if (number_ >= 0) {
    const int before = errno;
    close(std::exchange(number_, -1));  // Linux has freed it even after EINTR
    errno = before;
  }
}

Event::Event() : descriptor_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (descriptor_.get() < 0) {
    throw system_failure("no event descriptor can be made", errno);
  }
}

void Event::fire() const noexcept {
  const int before = errno;
  const std::uint64_t one = 1;
  // It can fail for one reason alone: that it was fired very often already.
  [[maybe_unused]] const ssize_t written = write(descriptor_.get(), &one, sizeof one);
  errno = before;
}

}  // namespace sdrt_internal
