#include "random_name.hpp"

#include <array>
#include <cerrno>
#include <sys/random.h>

#include "failure.hpp"

namespace sdrt_internal {

std::string random_name() {
  std::array<unsigned char, 16> bytes;
  // Of so few bytes the call gives all or none.
  while (getrandom(bytes.data(), bytes.size(), 0) < 0) {
    if (errno != EINTR) {
      throw system_failure("no random numbers can be had", errno);
    }
  }
  std::string name;
  for (const unsigned char byte : bytes) {
    name += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  }
  return name;
}

}  // namespace sdrt_internal
