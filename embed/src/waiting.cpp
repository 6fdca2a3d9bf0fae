#include "waiting.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <poll.h>
#include <utility>

#include "failure.hpp"

namespace sdrt_internal {

Deadline::Deadline(std::uint32_t milliseconds, std::string what)
    : milliseconds_(milliseconds), what_(std::move(what)) {
  if (milliseconds != 0) {
    end_ = Clock::now() + std::chrono::milliseconds(milliseconds);
  }
}

bool Deadline::passed() const { return end_ && Clock::now() >= *end_; }

int Deadline::poll_timeout() const {
  if (!end_) {
    return -1;
  }
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*end_ - Clock::now()).count();
  return static_cast<int>(std::clamp<decltype(left)>(left, 0, INT_MAX));
}

const Deadline &Deadline::earlier(const Deadline &one, const Deadline &other) {
  if (!one.end_) {
    return other;
  }
  return other.end_ && *other.end_ < *one.end_ ? other : one;
}

void Deadline::fail() const {
  throw Failure(SDRT_TIMEOUT, what_ + " within " + std::to_string(milliseconds_) + " ms");
}

bool Patience::wait(int descriptor, short events, const Deadline &until) const {
  // poll passes over negative descriptors.
  std::array<pollfd, 3> watched = {{{descriptor, events, 0}, {cancelled, POLLIN, 0}, {closed, POLLIN, 0}}};
  while (true) {
    const int timeout = Deadline::earlier(deadline, until).poll_timeout();
    if (poll(watched.data(), watched.size(), timeout) < 0 && errno != EINTR) {
      throw system_failure("waiting failed", errno);
    }
    if (watched[1].revents != 0) {
      throw Failure(SDRT_CANCELLED, "cancelled");
    }
    if (watched[2].revents != 0) {
      throw Failure(SDRT_CLOSED, "the server was closed meanwhile: open it again");
    }
    if (watched[0].revents != 0) {
      return true;
    }
    if (deadline.passed()) {
      deadline.fail();
    }
    if (until.passed()) {
      return false;
    }
  }
}

void Patience::sleep(std::uint32_t milliseconds) const { wait(-1, 0, Deadline(milliseconds, "")); }

}  // namespace sdrt_internal
