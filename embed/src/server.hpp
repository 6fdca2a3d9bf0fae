// A server as the library's callers hold it: where it is, how it is asked, and who is asking.
#ifndef SDRT_SRC_SERVER_HPP
#define SDRT_SRC_SERVER_HPP

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <sys/types.h>

#include "address.hpp"
#include "descriptor.hpp"
#include "failure.hpp"
#include "http.hpp"
#include "sdrt.h"
#include "server_process.hpp"
#include "waiting.hpp"

struct sdrt_server {
 public:
  // Opens it. Throws sdrt_internal::Failure.
  explicit sdrt_server(const sdrt_open_options &options);
  // Stops the calls that run and waits until they have returned; then ends a server of its own.
  ~sdrt_server();
  sdrt_server(const sdrt_server &) = delete;
  sdrt_server &operator=(const sdrt_server &) = delete;

  pid_t process_id() const { return process_ == nullptr ? 0 : process_->id(); }

  // Asks, and lets `read` take an answer of status 200. `body` is JSON; empty for a GET. Throws Failure: what the
  // server refused, as its own status has it, and what `read` throws.
  void ask(const std::string &path, const std::string &body, const sdrt_cancellation *cancellation,
           std::uint32_t timeout_ms, const std::function<void(sdrt_internal::Response *)> &read);

 private:
  class Visit;

  void ask_once(const std::string &path, const std::string &body, const sdrt_internal::Patience &patience,
                const std::function<void(sdrt_internal::Response *)> &read);
  void wait_until_ready(const sdrt_internal::Patience &patience);
  void check_address(const sdrt_internal::Patience &patience);

  const pid_t owner_;
  sdrt_internal::Address address_;
  std::string key_;
  std::uint32_t connect_ms_;
  std::uint32_t silence_ms_;
  sdrt_internal::Event closing_event_;
  std::mutex mutex_;
  std::condition_variable left_;
  int visitors_ = 0;
  bool closing_ = false;
  std::unique_ptr<sdrt_internal::ServerProcess> process_;
};

struct sdrt_cancellation {
  sdrt_internal::Event event;
};

namespace sdrt_internal {

// What a refusal means: its status of HTTP, and the body or frame that tells why.
Failure refusal(int status, const std::string &body, const std::string &retry_after);

}  // namespace sdrt_internal

#endif
