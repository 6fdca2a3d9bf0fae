// Where a server is.
#ifndef SDRT_SRC_ADDRESS_HPP
#define SDRT_SRC_ADDRESS_HPP

#include <string>

namespace sdrt_internal {

struct Address {
  std::string path;  // of a Unix socket; empty for TCP
  std::string host;  // a name or an address, without brackets
  std::string port;

  // As a Host header has it, and as people read it.
  std::string host_header() const;
  std::string text() const;
};

// Throws Failure (invalid argument) for what is no address.
Address parse_address(const std::string &text);

}  // namespace sdrt_internal

#endif
