#include "http.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "failure.hpp"

namespace sdrt_internal {
namespace {

constexpr std::size_t kLongestLine = 16384;
constexpr std::size_t kMostHeaders = 200;
constexpr int kMostInterim = 10;
constexpr std::uint64_t kMostBody = std::uint64_t{1} << 50;

Failure malformed(const std::string &found) {
  return Failure(SDRT_PROTOCOL, "the answer is no HTTP/1.1 (" + found + "): expected an sdrt server at this address");
}

Failure cut_short() { return Failure(SDRT_CONNECTION, "the connection ended in the middle of an answer"); }

std::string lower(std::string text) {
  for (char &c : text) {
    c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  }
  return text;
}

std::string trimmed(const std::string &text) {
  const std::size_t first = text.find_first_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// Reads digits of base 10 or 16 alone, and no number beyond all measure.
std::uint64_t number(const std::string &text, unsigned base, const char *what) {
  std::uint64_t value = 0;
  for (const char c : lower(text)) {
    const unsigned digit = c >= '0' && c <= '9' ? static_cast<unsigned>(c - '0')
                           : c >= 'a' && c <= 'f' ? static_cast<unsigned>(c - 'a') + 10
                                                  : base;
    if (digit >= base) {
      throw malformed(what);
    }
    value = value * base + digit;
    if (value > kMostBody) {
      throw malformed(what);
    }
  }
  if (text.empty()) {
    throw malformed(what);
  }
  return value;
}

}  // namespace

Response::Response(Source source) : source_(std::move(source)) {
  for (int interim = 0;; ++interim) {
    read_head();
    if (status_ >= 200) {
      break;
    }
    if (interim == kMostInterim) {
      throw malformed("nothing but interim answers");
    }
  }
  choose_form();
}

std::string Response::header(const std::string &name) const {
  const auto found = headers_.find(name);
  return found == headers_.end() ? "" : found->second;
}

void Response::read_head() {
  const std::string first = line(kLongestLine);
  const bool plain = first.size() >= 12 && first.compare(0, 7, "HTTP/1.") == 0 && first[8] == ' ';
  if (!plain || (first.size() > 12 && first[12] != ' ')) {
    throw malformed("a status line is missing");
  }
  status_ = static_cast<int>(number(first.substr(9, 3), 10, "the status is no number"));
  if (status_ < 100 || status_ > 599) {
    throw malformed("a status of " + std::to_string(status_));
  }
  headers_.clear();
  read_fields(&headers_);
}

void Response::read_fields(std::map<std::string, std::string> *fields) {
  for (std::size_t count = 0;; ++count) {
    const std::string field = line(kLongestLine);
    if (field.empty()) {
      return;
    }
    const std::size_t colon = field.find(':');
    if (colon == std::string::npos || colon == 0 || count == kMostHeaders) {
      throw malformed("a header field is none, or there are too many");
    }
    if (fields != nullptr) {
      (*fields)[lower(field.substr(0, colon))] = trimmed(field.substr(colon + 1));
    }
  }
}

void Response::choose_form() {
  const std::string coding = lower(header("transfer-encoding"));
  const std::string length = header("content-length");
  if (coding == "chunked") {
    form_ = Form::kChunked;
  } else if (!coding.empty()) {
    throw malformed("a transfer encoding that nobody asked for");
  } else if (!length.empty()) {
    form_ = Form::kLength;
    left_ = number(length, 10, "the length is no number");
  }
  if (status_ == 204 || status_ == 304) {
    ended_ = true;
  }
}

bool Response::refill() {
  begin_ = 0;
  end_ = source_(buffer_.data(), buffer_.size());
  return end_ != 0;
}

std::string Response::line(std::size_t most) {
  std::string found;
  while (true) {
    if (begin_ == end_ && !refill()) {
      throw cut_short();
    }
    const char *const from = buffer_.data() + begin_;
    const char *const newline = std::find(from, static_cast<const char *>(buffer_.data() + end_), '\n');
    const std::size_t count = static_cast<std::size_t>(newline - from);
    found.append(from, count);
    begin_ += count;
    if (found.size() > most) {
      throw malformed("a line that does not end");
    }
    if (begin_ != end_) {
      ++begin_;
      if (!found.empty() && found.back() == '\r') {
        found.pop_back();
      }
      return found;
    }
  }
}

bool Response::next_chunk() {
  if (in_chunks_ && !line(2).empty()) {
    throw malformed("a chunk is longer than it says");
  }
  in_chunks_ = true;
  std::string size = line(kLongestLine);
  left_ = number(trimmed(size.substr(0, size.find(';'))), 16, "a chunk's size is no number");
  if (left_ == 0) {
    read_fields(nullptr);
    ended_ = true;
  }
  return !ended_;
}

std::size_t Response::take(void *data, std::size_t size) {
  if (begin_ != end_) {
    const std::size_t count = std::min(size, end_ - begin_);
    std::memcpy(data, buffer_.data() + begin_, count);
    begin_ += count;
    return count;
  }
  if (size >= buffer_.size()) {
    return source_(data, size);  // pixels, straight to where they belong
  }
  return refill() ? take(data, size) : 0;
}

std::size_t Response::read(void *data, std::size_t size) {
  if (ended_ || size == 0) {
    return 0;
  }
  if (form_ == Form::kUntilEnd) {
    const std::size_t count = take(data, size);
    ended_ = count == 0;
    return count;
  }
  if (left_ == 0 && (form_ == Form::kLength || !next_chunk())) {
    ended_ = true;
    return 0;
  }
  const std::size_t count = take(data, static_cast<std::size_t>(std::min<std::uint64_t>(size, left_)));
  if (count == 0) {
    throw cut_short();
  }
  left_ -= count;
  return count;
}

void Response::read_all(void *data, std::size_t size) {
  char *to = static_cast<char *>(data);
  while (size > 0) {
    const std::size_t count = read(to, size);
    if (count == 0) {
      throw cut_short();
    }
    to += count;
    size -= count;
  }
}

std::string Response::rest(std::size_t most) {
  std::string body;
  std::array<char, 4096> part;
  while (const std::size_t count = read(part.data(), part.size())) {
    body.append(part.data(), count);
    if (body.size() > most) {
      throw Failure(SDRT_PROTOCOL, "the answer is too long: expected at most " + std::to_string(most) + " bytes");
    }
  }
  return body;
}

std::string request_text(const std::string &path, const std::string &host, const std::string &key,
                         const std::string &body) {
  std::string text = (body.empty() ? "GET " : "POST ") + path + " HTTP/1.1\r\nHost: " + host + "\r\n";
  text += "User-Agent: sdrt-embed/" SDRT_VERSION "\r\nConnection: close\r\n";
  if (!key.empty()) {
    text += "Authorization: Bearer " + key + "\r\n";
  }
  if (!body.empty()) {
    text += "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
  }
  return text + "\r\n" + body;
}

}  // namespace sdrt_internal
