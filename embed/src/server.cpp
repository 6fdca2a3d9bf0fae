#include "server.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include <utility>

#include "connection.hpp"
#include "failure.hpp"
#include "json.hpp"

using sdrt_internal::Address;
using sdrt_internal::Connection;
using sdrt_internal::Deadline;
using sdrt_internal::Failure;
using sdrt_internal::Json;
using sdrt_internal::Launch;
using sdrt_internal::Patience;
using sdrt_internal::Response;
using sdrt_internal::ServerProcess;

namespace {

constexpr std::uint32_t kConnectMs = 10000;
constexpr std::uint32_t kSilenceMs = 60000;
constexpr std::uint32_t kStartMs = 600000;
constexpr std::uint32_t kLookMs = 10;
constexpr std::uint32_t kDyingMs = 2000;
constexpr std::size_t kMostError = 1 << 20;

std::uint32_t or_default(std::uint32_t given, std::uint32_t otherwise) { return given == 0 ? otherwise : given; }

std::string text_or(const char *given, const char *variable, const char *otherwise) {
  if (given != nullptr) {
    return given;
  }
  const char *const set = std::getenv(variable);
  return set != nullptr && *set != '\0' ? set : otherwise;
}

// As sdrt serve has it: what no header can hold, no server can ask for.
void check_key(const std::string &key) {
  if (!std::all_of(key.begin(), key.end(), [](char c) { return c > ' ' && c < 0x7f; })) {
    throw Failure(SDRT_INVALID_ARGUMENT, "the API key holds what no HTTP header can: expected ASCII without spaces");
  }
}

int cancel_descriptor(const sdrt_cancellation *cancellation) {
  return cancellation == nullptr ? -1 : cancellation->event.descriptor();
}

}  // namespace

namespace sdrt_internal {

Failure refusal(int status, const std::string &body, const std::string &retry_after) {
  std::string message;
  std::string code;
  try {
    const Json error = Json::parse(body)["error"];
    message = error["message"].text();
    code = error["code"].text();
  } catch (const Failure &) {
    message.clear();
  }
  if (message.empty()) {
    return Failure(SDRT_PROTOCOL,
                   "the answer has status " + std::to_string(status) + ": expected an sdrt server at this address",
                   status);
  }
  const auto meaning = [&] {
    switch (status) {
      case 401:
      case 403:
        return SDRT_UNAUTHORIZED;
      case 404:
        return SDRT_NOT_FOUND;
      case 408:
        return SDRT_TIMEOUT;
      case 429:
        return SDRT_QUEUE_FULL;
      case 503:
        return code == "out_of_memory" ? SDRT_OUT_OF_MEMORY : SDRT_UNAVAILABLE;
      default:
        return status < 500 ? SDRT_INVALID_ARGUMENT : SDRT_SERVER_ERROR;
    }
  };
  const unsigned long seconds = std::strtoul(retry_after.c_str(), nullptr, 10);
  return Failure(meaning(), message, status, static_cast<std::uint32_t>(std::min(seconds, 86400UL)));
}

}  // namespace sdrt_internal

// One call that runs.
class sdrt_server::Visit {
 public:
  explicit Visit(sdrt_server *server) : server_(server) {
    const std::lock_guard<std::mutex> lock(server->mutex_);
    if (server->closing_) {
      throw Failure(SDRT_CLOSED, "the server was closed: open it again");
    }
    ++server->visitors_;
  }
  ~Visit() {
    const std::lock_guard<std::mutex> lock(server_->mutex_);
    --server_->visitors_;
    server_->left_.notify_all();
  }
  Visit(const Visit &) = delete;
  Visit &operator=(const Visit &) = delete;

 private:
  sdrt_server *server_;
};

sdrt_server::sdrt_server(const sdrt_open_options &options)
    : owner_(getpid()),
      key_(text_or(options.api_key, "SDRT_API_KEY", "")),
      connect_ms_(or_default(options.connect_timeout_ms, kConnectMs)),
      silence_ms_(or_default(options.silence_timeout_ms, kSilenceMs)) {
  if ((options.address == nullptr) == (options.bundle == nullptr)) {
    throw Failure(SDRT_INVALID_ARGUMENT, "expected an address or a bundle, and not both");
  }
  check_key(key_);
  Patience patience;
  patience.cancelled = cancel_descriptor(options.cancellation);
  if (options.address != nullptr) {
    address_ = sdrt_internal::parse_address(options.address);
    check_address(patience);
    return;
  }
  Launch launch;
  launch.program = text_or(options.program, "SDRT_PROGRAM", "sdrt");
  launch.bundle = options.bundle;
  for (const char *const *each = options.arguments; each != nullptr && *each != nullptr; ++each) {
    launch.arguments.emplace_back(*each);
  }
  launch.key = key_;
  launch.log = options.log;
  launch.log_user = options.log_user;
  process_ = std::make_unique<ServerProcess>(launch);
  address_.path = process_->socket_path();
  patience.deadline = Deadline(or_default(options.start_timeout_ms, kStartMs), "the server was not ready");
  wait_until_ready(patience);
}

sdrt_server::~sdrt_server() {
  if (getpid() != owner_) {
    return;  // in a fork of the owner nobody is left that could be waited for
  }
  std::unique_lock<std::mutex> lock(mutex_);
  closing_ = true;
  closing_event_.fire();
  left_.wait(lock, [this] { return visitors_ == 0; });
}

void sdrt_server::check_address(const Patience &patience) {
  try {
    ask_once("/native/v1/models", "", patience, [](Response *) {});
  } catch (Failure &failure) {
    if (failure.status == SDRT_NOT_FOUND) {
      failure.message = "the server does not know the native protocol: expected sdrt serve of version " SDRT_VERSION;
    }
    throw;
  }
}

void sdrt_server::wait_until_ready(const Patience &patience) {
  while (true) {
    try {
      ask_once("/readyz", "", patience, [](Response *) {});
      return;
    } catch (const Failure &failure) {
      // Before it listens, and while it loads, which may keep it from answering at all.
      const bool silent = failure.status == SDRT_TIMEOUT && !patience.deadline.passed();
      if (failure.status != SDRT_CONNECTION && failure.http_status != 503 && !silent) {
        throw;
      }
    }
    if (process_->has_ended(0)) {
      throw Failure(SDRT_START_FAILED, "the server could not start: " + process_->obituary());
    }
    patience.sleep(kLookMs);
  }
}

void sdrt_server::ask(const std::string &path, const std::string &body, const sdrt_cancellation *cancellation,
                      std::uint32_t timeout_ms, const std::function<void(Response *)> &read) {
  const Visit visit(this);
  Patience patience;
  patience.cancelled = cancel_descriptor(cancellation);
  patience.closed = closing_event_.descriptor();
  patience.deadline = Deadline(timeout_ms, "it was not done");
  try {
    ask_once(path, body, patience, read);
  } catch (const Failure &failure) {
    // Its sockets are gone a moment before its number is.
    if (failure.status == SDRT_CONNECTION && process_ != nullptr && process_->has_ended(kDyingMs)) {
      throw Failure(SDRT_SERVER_DIED, "the server died: " + process_->obituary() + ": open another");
    }
    throw;
  }
}

void sdrt_server::ask_once(const std::string &path, const std::string &body, const Patience &patience,
                           const std::function<void(Response *)> &read) {
  Connection connection(address_, connect_ms_, silence_ms_, patience);
  // A server that refuses may do so, and close the connection, before it has read all; then there is an answer.
  connection.send(sdrt_internal::request_text(path, address_.host_header(), key_, body));
  Response response([&](void *data, std::size_t size) { return connection.receive(data, size); });
  if (response.status() != 200) {
    throw sdrt_internal::refusal(response.status(), response.rest(kMostError), response.header("retry-after"));
  }
  read(&response);
}
