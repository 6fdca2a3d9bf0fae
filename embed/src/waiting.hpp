// Waiting for descriptors: until a time, and not longer than somebody wants the result.
#ifndef SDRT_SRC_WAITING_HPP
#define SDRT_SRC_WAITING_HPP

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace sdrt_internal {

using Clock = std::chrono::steady_clock;

// A time by which something has to be done, and what it is that takes too long then.
class Deadline {
 public:
  Deadline() = default;  // never
  // Of 0 milliseconds: never.
  Deadline(std::uint32_t milliseconds, std::string what);

  bool passed() const;
  // For poll: milliseconds that are left, rounded up; -1 for ever.
  int poll_timeout() const;
  // The one that comes first.
  static const Deadline &earlier(const Deadline &one, const Deadline &other);
  [[noreturn]] void fail() const;

 private:
  std::optional<Clock::time_point> end_;
  std::uint32_t milliseconds_ = 0;
  std::string what_;
};

// Who may stop a call: descriptors that become readable then, or -1, and the call's own deadline.
struct Patience {
  int cancelled = -1;
  int closed = -1;
  Deadline deadline;

  // Returns once `descriptor` has one of the events (POLLIN, POLLOUT), an error or a hang-up, or when `until` has
  // passed, and tells whether it has. Throws Failure if the call is to be stopped.
  bool wait(int descriptor, short events, const Deadline &until) const;
  // Lets time pass. Throws likewise.
  void sleep(std::uint32_t milliseconds) const;
};

}  // namespace sdrt_internal

#endif
