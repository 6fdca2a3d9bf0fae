// A small HTTP service in C++ that draws: sdrt-service BUNDLE|unix:PATH|HOST:PORT [PORT]
//
//   curl 'http://127.0.0.1:8080/picture?prompt=a%20red%20star&steps=20&seed=42' -o star.bmp
//
// A thread answers each connection, so that pictures that are asked for at once are made at once. Whoever goes away is
// not worked for any further: the progress function looks after the connection.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <thread>

#include "sdrt.hpp"

namespace {

constexpr std::size_t kLongestHead = 8192;
constexpr int kPatienceS = 10;
constexpr int kMostConnections = 64;
constexpr int kLookMs = 200;  // after which a signal is seen at the latest
std::atomic<int> connections{0};

struct BadRequest : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- HTTP, as little of it as does ----

// One request's line, up to the first empty one; empty if nothing sensible comes.
std::string read_head(int socket) {
  std::string head;
  std::array<char, 1024> part;
  while (head.size() < kLongestHead) {
    const ssize_t count = recv(socket, part.data(), part.size(), 0);
    if (count <= 0) {
      break;
    }
    head.append(part.data(), static_cast<std::size_t>(count));
    if (head.find("\r\n\r\n") != std::string::npos) {
      return head.substr(0, head.find("\r\n"));
    }
  }
  return "";
}

void send_all(int socket, const std::string &data) {
  for (std::size_t sent = 0; sent < data.size();) {
    const ssize_t count = send(socket, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (count <= 0) {
      return;
    }
    sent += static_cast<std::size_t>(count);
  }
}

void answer(int socket, const std::string &status, const std::string &type, const std::string &body,
            const std::string &more = "") {
  send_all(socket, "HTTP/1.1 " + status + "\r\nContent-Type: " + type + "\r\nContent-Length: " +
                       std::to_string(body.size()) + "\r\nConnection: close\r\n" + more + "\r\n" + body);
}

bool has_gone(int socket) {
  pollfd watched = {socket, POLLRDHUP, 0};
  return poll(&watched, 1, 0) > 0;
}

int hex(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

std::string decoded(const std::string &text) {
  std::string found;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%') {
      const int high = i + 2 < text.size() ? hex(text[i + 1]) : -1;
      const int low = i + 2 < text.size() ? hex(text[i + 2]) : -1;
      if (high < 0 || low < 0 || (high == 0 && low == 0)) {
        throw BadRequest("the query has a % without two digits: expected %20 for a space");
      }
      found.push_back(static_cast<char>(high * 16 + low));
      i += 2;
    } else {
      found.push_back(text[i] == '+' ? ' ' : text[i]);
    }
  }
  return found;
}

std::map<std::string, std::string> fields_of(const std::string &query) {
  std::map<std::string, std::string> fields;
  for (std::size_t begin = 0; begin < query.size();) {
    const std::size_t end = std::min(query.find('&', begin), query.size());
    const std::string pair = query.substr(begin, end - begin);
    const std::size_t equals = std::min(pair.find('='), pair.size());
    fields[decoded(pair.substr(0, equals))] = decoded(pair.substr(std::min(equals + 1, pair.size())));
    begin = end + 1;
  }
  return fields;
}

template <typename Number>
Number number(const std::string &name, const std::string &text) {
  Number value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size()) {
    throw BadRequest(name + " is '" + text + "': expected a number");
  }
  return value;
}

// ---- pictures ----

sdrt::Params params_of(const std::string &query) {
  sdrt::Params params;
  for (const auto &[name, value] : fields_of(query)) {
    if (name == "prompt") {
      params.prompt = value;
    } else if (name == "negative_prompt") {
      params.negative_prompt = value;
    } else if (name == "steps") {
      params.steps = number<std::uint32_t>(name, value);
    } else if (name == "seed") {
      params.seed = number<std::uint64_t>(name, value);
    } else if (name == "scale") {
      params.guidance_scale = number<double>(name, value);
    } else {
      throw BadRequest("'" + name + "' is no field: expected prompt, negative_prompt, steps, seed or scale");
    }
  }
  return params;
}

// Rows from the bottom, blue first, each padded to four bytes.
std::string bmp(const sdrt::Image &image) {
  const std::uint32_t row = (image.width * 3 + 3) / 4 * 4;
  const std::uint32_t size = 54 + row * image.height;
  const std::uint32_t fields[] = {size, 0, 54, 40, image.width, image.height, 1 | 24 << 16, 0, size - 54, 0, 0, 0, 0};
  std::string file = "BM";
  for (const std::uint32_t field : fields) {
    for (int shift = 0; shift < 32; shift += 8) {
      file.push_back(static_cast<char>(field >> shift & 0xFF));
    }
  }
  file.resize(size, '\0');
  for (std::uint32_t y = 0; y < image.height; ++y) {
    const std::uint8_t *from = image.pixels + std::size_t{image.height - 1 - y} * image.width * 3;
    char *to = &file[54 + std::size_t{y} * row];
    for (std::uint32_t x = 0; x < image.width; ++x, from += 3, to += 3) {
      to[0] = static_cast<char>(from[2]);
      to[1] = static_cast<char>(from[1]);
      to[2] = static_cast<char>(from[0]);
    }
  }
  return file;
}

void draw(const sdrt::Server &server, int socket, const std::string &query) {
  sdrt::Params params = params_of(query);
  params.progress = [socket](const sdrt_progress &) { return !has_gone(socket); };
  const sdrt::Result result = server.generate(params);
  answer(socket, "200 OK", "image/bmp", bmp(result[0]), "X-Seed: " + std::to_string(result[0].seed) + "\r\n");
}

std::string status_for(const sdrt::Error &error) {
  switch (error.status()) {
    case SDRT_INVALID_ARGUMENT:
      return "400 Bad Request";
    case SDRT_QUEUE_FULL:
    case SDRT_UNAVAILABLE:
      return "503 Service Unavailable";
    default:
      return "500 Internal Server Error";
  }
}

void serve(const sdrt::Server &server, int socket) {
  const std::string line = read_head(socket);
  const std::string path = line.substr(0, line.rfind(' '));
  try {
    if (path.compare(0, 13, "GET /picture?") == 0) {
      draw(server, socket, path.substr(13));
    } else {
      answer(socket, "404 Not Found", "text/plain", "expected GET /picture?prompt=...\n");
    }
  } catch (const sdrt::Error &error) {
    if (error.status() != SDRT_CANCELLED) {
      answer(socket, status_for(error), "text/plain", std::string(error.what()) + "\n");
    }
  } catch (const BadRequest &error) {
    answer(socket, "400 Bad Request", "text/plain", std::string(error.what()) + "\n");
  }
  close(socket);
  --connections;
}

int listen_on(std::uint16_t port) {
  const int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto *const name = reinterpret_cast<sockaddr *>(&address);
  if (bind(listening, name, size) < 0 || listen(listening, 64) < 0 || getsockname(listening, name, &size) < 0) {
    return -1;
  }
  std::printf("listening on http://127.0.0.1:%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  return listening;
}

volatile std::sig_atomic_t told_to_end = 0;

}  // namespace

int main(int count, char **words) {
  if (count < 2 || count > 3) {
    std::fprintf(stderr, "usage: %s BUNDLE|unix:PATH|HOST:PORT [PORT]\n", words[0]);
    return 2;
  }
  struct sigaction end = {};
  end.sa_handler = [](int) { told_to_end = 1; };
  sigaction(SIGTERM, &end, nullptr);
  sigaction(SIGINT, &end, nullptr);
  try {
    const std::string where = words[1];
    const bool runs = where.find(':') != std::string::npos;
    const sdrt::Server server = runs ? sdrt::Server::connect(where) : sdrt::Server::start(where);
    const int listening = listen_on(count == 3 ? number<std::uint16_t>("port", words[2]) : 8080);
    if (listening < 0) {
      std::perror("cannot listen");
      return 1;
    }
    pollfd watched = {listening, POLLIN, 0};
    while (told_to_end == 0) {
      if (poll(&watched, 1, kLookMs) <= 0) {
        continue;
      }
      const int socket = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
      if (socket < 0) {
        continue;
      }
      const timeval patience = {kPatienceS, 0};
      setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
      if (++connections > kMostConnections) {
        answer(socket, "503 Service Unavailable", "text/plain", "too many connections: try again later\n");
        close(socket);
        --connections;
        continue;
      }
      std::thread(serve, std::cref(server), socket).detach();
    }
    close(listening);
    while (connections > 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));  // who was accepted is answered
    }
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
