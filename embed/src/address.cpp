#include "address.hpp"

#include <algorithm>
#include <cstddef>
#include <sys/un.h>

#include "failure.hpp"

namespace sdrt_internal {
namespace {

constexpr const char *kUsualPort = "7860";
constexpr std::size_t kLongestPath = sizeof(sockaddr_un::sun_path) - 1;

[[noreturn]] void refuse(const std::string &text, const std::string &expected) {
  throw Failure(SDRT_INVALID_ARGUMENT, "address is \"" + text.substr(0, 200) + "\": expected " + expected);
}

bool starts_with(const std::string &text, const std::string &prefix) { return text.compare(0, prefix.size(), prefix) == 0; }

bool is_port(const std::string &text) {
  const bool digits = std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  return digits && !text.empty() && text.size() <= 5 && std::stoi(text) >= 1 && std::stoi(text) <= 65535;
}

bool is_host(const std::string &text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f && c != '/'; });
}

}  // namespace

std::string Address::host_header() const {
  if (!path.empty()) {
    return "sdrt";
  }
  return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + port;
}

std::string Address::text() const { return path.empty() ? host_header() : path; }

Address parse_address(const std::string &text) {
  if (starts_with(text, "unix:") || starts_with(text, "/")) {
    const std::string path = starts_with(text, "/") ? text : text.substr(5);
    if (path.empty() || path.size() > kLongestPath) {
      refuse(text, "a Unix socket's path of 1 to " + std::to_string(kLongestPath) + " bytes");
    }
    return {path, "", ""};
  }
  std::string rest = starts_with(text, "http://") ? text.substr(7) : text;
  if (!rest.empty() && rest.back() == '/') {
    rest.pop_back();
  }
  std::string host;
  std::string port = kUsualPort;
  std::size_t colon = rest.rfind(':');
  if (starts_with(rest, "[")) {
    const std::size_t bracket = rest.find(']');
    host = bracket == std::string::npos ? "" : rest.substr(1, bracket - 1);
    colon = bracket == std::string::npos || bracket + 1 == rest.size() ? std::string::npos : bracket + 1;
    if (colon != std::string::npos && rest[colon] != ':') {
      host.clear();
    }
  } else {
    host = rest.substr(0, colon);
    if (host.find(':') != std::string::npos) {
      refuse(text, "an IPv6 address in brackets, such as [::1]:7860");
    }
  }
  if (colon != std::string::npos) {
    port = rest.substr(colon + 1);
  }
  if (!is_host(host) || !is_port(port)) {
    refuse(text, "host:port, such as 127.0.0.1:7860, or the path of a Unix socket, such as /run/sdrt.sock");
  }
  return {"", host, port};
}

}  // namespace sdrt_internal
