// Bytes to and from a server, over TCP or a Unix socket.
#ifndef SDRT_SRC_CONNECTION_HPP
#define SDRT_SRC_CONNECTION_HPP

#include <cstddef>
#include <cstdint>
#include <string>

#include "address.hpp"
#include "descriptor.hpp"
#include "waiting.hpp"

namespace sdrt_internal {

class Connection {
 public:
  // Connects. Throws Failure: connection, or a timeout after `connect_ms` (0: never), or what `patience` throws, which
  // has to outlive the connection.
  Connection(const Address &address, std::uint32_t connect_ms, std::uint32_t silence_ms, const Patience &patience);

  // Sends everything; tells whether the other side took it, or has closed the connection before that.
  bool send(const std::string &data);

  // Waits for bytes and takes at most `size` of them; 0 at the end of the stream. Throws Failure, of the connection
  // too where it breaks or says nothing for `silence_ms`.
  std::size_t receive(void *data, std::size_t size);

 private:
  void connect_to(int family, const void *address, unsigned length, const Deadline &until);
  Deadline silence() const;

  Descriptor socket_;
  std::uint32_t silence_ms_;
  const Patience &patience_;
};

}  // namespace sdrt_internal

#endif
