// A server that answers what a test tells it to, in whatever way a server should not.
#ifndef SDRT_TESTS_FAKE_SERVER_HPP
#define SDRT_TESTS_FAKE_SERVER_HPP

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

class FakeServer {
 public:
  // Called with a connection and the request that came over it; the connection is closed when it returns.
  using Handler = std::function<void(int socket, const std::string &request)>;

  explicit FakeServer(Handler handler) : handler_(std::move(handler)) {
    char folder[] = "/tmp/sdrt-test-XXXXXX";
    folder_ = mkdtemp(folder);
    path_ = folder_ + "/s";
    socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un name = {};
    name.sun_family = AF_UNIX;
    std::strcpy(name.sun_path, path_.c_str());
    if (bind(socket_, reinterpret_cast<sockaddr *>(&name), sizeof name) < 0 || listen(socket_, 64) < 0) {
      throw std::runtime_error("the fake server cannot listen");
    }
    thread_ = std::thread([this] { accept_all(); });
  }

  ~FakeServer() {
    ending_ = true;
    shutdown(socket_, SHUT_RDWR);
    thread_.join();
    for (std::thread &each : answering_) {
      each.join();
    }
    close(socket_);
    unlink(path_.c_str());
    rmdir(folder_.c_str());
  }

  const std::string &path() const { return path_; }
  // From now on requests are not read before they are answered.
  void leave_unread() { unread_ = true; }

  std::vector<std::string> requests() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }

  static bool send_all(int socket, const std::string &data, std::size_t piece = 1 << 20) {
    for (std::size_t sent = 0; sent < data.size();) {
      const ssize_t count = send(socket, data.data() + sent, std::min(piece, data.size() - sent), MSG_NOSIGNAL);
      if (count <= 0) {
        return false;
      }
      sent += static_cast<std::size_t>(count);
    }
    return true;
  }

  static std::string read_request(int socket) {
    std::string request;
    char part[4096];
    while (true) {
      const std::size_t head = request.find("\r\n\r\n");
      const std::size_t length = request.find("Content-Length: ");
      const std::size_t body = length == std::string::npos ? 0 : std::stoul(request.substr(length + 16));
      if (head != std::string::npos && request.size() >= head + 4 + body) {
        return request;
      }
      const ssize_t count = recv(socket, part, sizeof part, 0);
      if (count <= 0) {
        return request;
      }
      request.append(part, static_cast<std::size_t>(count));
    }
  }

 private:
  void accept_all() {
    while (true) {
      const int connection = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC);
      if (ending_) {
        if (connection >= 0) {
          close(connection);
        }
        return;
      }
      if (connection >= 0) {
        answering_.emplace_back([this, connection] {
          answer(connection);
          close(connection);
        });
      }
    }
  }

  void answer(int connection) {
    if (unread_) {
      handler_(connection, "");
      return;
    }
    const std::string request = read_request(connection);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      requests_.push_back(request);
    }
    handler_(connection, request);
  }

  Handler handler_;
  std::string folder_;
  std::string path_;
  int socket_;
  std::atomic<bool> ending_{false};
  std::atomic<bool> unread_{false};
  std::mutex mutex_;
  std::vector<std::string> requests_;
  std::vector<std::thread> answering_;
  std::thread thread_;
};

#endif
