// What goes wrong, on its way to the caller.
#ifndef SDRT_SRC_FAILURE_HPP
#define SDRT_SRC_FAILURE_HPP

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "sdrt.h"

namespace sdrt_internal {

struct Failure : std::exception {
  Failure(sdrt_status failed_as, std::string text, int http = 0, std::uint32_t retry = 0)
      : status(failed_as), message(std::move(text)), http_status(http), retry_after_s(retry) {}

  const char *what() const noexcept override { return message.c_str(); }

  sdrt_status status;
  std::string message;
  int http_status;
  std::uint32_t retry_after_s;
};

// "what (why)" of a system call that left its number in errno.
Failure system_failure(const std::string &what, int number, sdrt_status status = SDRT_SYSTEM);

// What an error number means, whatever the thread's locale or library makes of strerror_r.
std::string describe_errno(int number);

}  // namespace sdrt_internal

#endif
