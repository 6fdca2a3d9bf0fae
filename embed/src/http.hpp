// HTTP/1.1 as a client needs it for one request and its answer (RFC 9112).
#ifndef SDRT_SRC_HTTP_HPP
#define SDRT_SRC_HTTP_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace sdrt_internal {

// Takes at most so many bytes from somewhere, and gives how many; 0 at the end.
using Source = std::function<std::size_t(void *, std::size_t)>;

class Response {
 public:
  // Reads the head. Throws Failure (protocol) if it is none, or too long.
  explicit Response(Source source);

  int status() const { return status_; }
  // By its name in small letters; empty if there is none.
  std::string header(const std::string &name) const;

  // Takes at most `size` bytes of the body; 0 at its end. Throws Failure (protocol, or connection if it is cut short).
  std::size_t read(void *data, std::size_t size);
  // Takes `size` bytes. Throws Failure (connection) if there are fewer.
  void read_all(void *data, std::size_t size);
  // Takes all that is left. Throws Failure (protocol) if that is more than `most` bytes.
  std::string rest(std::size_t most);

 private:
  enum class Form { kLength, kChunked, kUntilEnd };

  std::string line(std::size_t most);
  void read_head();
  void read_fields(std::map<std::string, std::string> *fields);
  void choose_form();
  bool next_chunk();
  std::size_t take(void *data, std::size_t size);
  bool refill();

  Source source_;
  std::array<char, 16384> buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  int status_ = 0;
  std::map<std::string, std::string> headers_;
  Form form_ = Form::kUntilEnd;
  std::uint64_t left_ = 0;  // of the body or of the present chunk
  bool in_chunks_ = false;  // whether a chunk was read already
  bool ended_ = false;
};

// A request's text. `body` is JSON; empty for a GET.
std::string request_text(const std::string &path, const std::string &host, const std::string &key,
                         const std::string &body);

}  // namespace sdrt_internal

#endif
