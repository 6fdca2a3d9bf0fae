#include "connection.hpp"

#include <cerrno>
#include <cstring>
#include <memory>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "failure.hpp"

namespace sdrt_internal {
namespace {

struct FreeAddresses {
  void operator()(addrinfo *list) const { freeaddrinfo(list); }
};

std::unique_ptr<addrinfo, FreeAddresses> resolve(const Address &address) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo *found = nullptr;
  const int code = getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found);
  if (code != 0) {
    const std::string why = code == EAI_SYSTEM ? describe_errno(errno) : gai_strerror(code);
    throw Failure(SDRT_CONNECTION, address.host + " cannot be found (" + why + "): expected a host's name or address");
  }
  return std::unique_ptr<addrinfo, FreeAddresses>(found);
}

}  // namespace

Connection::Connection(const Address &address, std::uint32_t connect_ms, std::uint32_t silence_ms,
                       const Patience &patience)
    : silence_ms_(silence_ms), patience_(patience) {
  const Deadline until(connect_ms, address.text() + " did not accept a connection");
  if (!address.path.empty()) {
    sockaddr_un name = {};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, address.path.c_str(), address.path.size() + 1);
    try {
      connect_to(AF_UNIX, &name, sizeof name, until);
    } catch (Failure &failure) {
      failure.message.insert(0, address.text() + " cannot be reached: ");
      throw;
    }
    return;
  }
  const auto found = resolve(address);
  for (const addrinfo *each = found.get(); each != nullptr; each = each->ai_next) {
    try {
      connect_to(each->ai_family, each->ai_addr, each->ai_addrlen, until);
      break;
    } catch (Failure &failure) {
      // A name may have several addresses, and the server listen at one of them.
      if (failure.status != SDRT_CONNECTION || each->ai_next == nullptr) {
        failure.message.insert(0, address.text() + " cannot be reached: ");
        throw;
      }
    }
  }
  const int yes = 1;
  setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

void Connection::connect_to(int family, const void *address, unsigned length, const Deadline &until) {
  socket_ = Descriptor(socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket_.get() < 0) {
    throw system_failure("no socket can be made", errno);
  }
  while (connect(socket_.get(), static_cast<const sockaddr *>(address), length) < 0) {
    if (errno == EINPROGRESS || errno == EINTR) {
      // It goes on by itself, and its end makes the socket writable.
      if (!patience_.wait(socket_.get(), POLLOUT, until)) {
        until.fail();
      }
      int code = 0;
      socklen_t size = sizeof code;
      getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &code, &size);
      if (code != 0) {
        throw Failure(SDRT_CONNECTION, describe_errno(code));
      }
      return;
    }
    if (errno != EAGAIN) {
      throw Failure(SDRT_CONNECTION, describe_errno(errno));
    }
    // A Unix socket whose queue is full, and nothing tells when it is not.
    if (until.passed()) {
      until.fail();
    }
    patience_.sleep(2);
  }
}

Deadline Connection::silence() const { return Deadline(silence_ms_, "the server said nothing"); }

bool Connection::send(const std::string &data) {
  std::size_t sent = 0;
  while (sent < data.size()) {
    const ssize_t count = ::send(socket_.get(), data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (count >= 0) {
      sent += static_cast<std::size_t>(count);
    } else if (errno == EPIPE || errno == ECONNRESET) {
      return false;  // it may have answered all the same
    } else if (errno == EAGAIN) {
      const Deadline until = silence();
      if (!patience_.wait(socket_.get(), POLLOUT, until)) {
        until.fail();
      }
    } else if (errno != EINTR) {
      throw system_failure("the connection broke", errno, SDRT_CONNECTION);
    }
  }
  return true;
}

std::size_t Connection::receive(void *data, std::size_t size) {
  while (true) {
    // Also where there is something to read: whoever cancels is not to wait for a talkative server's pause.
    const Deadline until = silence();
    if (!patience_.wait(socket_.get(), POLLIN, until)) {
      until.fail();
    }
    const ssize_t count = recv(socket_.get(), data, size, 0);
    if (count >= 0) {
      return static_cast<std::size_t>(count);
    }
    if (errno != EAGAIN && errno != EINTR) {
      throw system_failure("the connection broke", errno, SDRT_CONNECTION);
    }
  }
}

}  // namespace sdrt_internal
