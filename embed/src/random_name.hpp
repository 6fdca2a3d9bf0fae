// Names that nobody else has.
#ifndef SDRT_SRC_RANDOM_NAME_HPP
#define SDRT_SRC_RANDOM_NAME_HPP

#include <string>

namespace sdrt_internal {

// 32 hexadecimal digits of the system's random source. Throws Failure.
std::string random_name();

}  // namespace sdrt_internal

#endif
