#include "failure.hpp"

#include <system_error>

namespace sdrt_internal {

std::string describe_errno(int number) { return std::system_category().message(number); }

Failure system_failure(const std::string &what, int number, sdrt_status status) {
  return Failure(status, what + " (" + describe_errno(number) + ")");
}

}  // namespace sdrt_internal
