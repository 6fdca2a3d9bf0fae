#include "json.hpp"

#include <charconv>
#include <cmath>
#include <cstring>

#include "failure.hpp"

namespace sdrt_internal {

namespace {

constexpr int kDeepest = 64;
constexpr std::uint32_t kReplacement = 0xFFFD;

void append_utf8(std::string *text, std::uint32_t code) {
  const auto put = [text](std::uint32_t byte) { text->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | (code >> 6));
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3F));
    put(0x80 | ((code >> 6) & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(const std::string &text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json whole() {
    Json found = value(0);
    skip_space();
    if (at_ != end_) {
      fail();
    }
    return found;
  }

 private:
  [[noreturn]] static void fail() {
    throw Failure(SDRT_PROTOCOL, "the answer is no JSON: expected an sdrt server at this address");
  }

  void skip_space() {
    while (at_ != end_ && std::strchr(" \t\r\n", *at_) != nullptr && *at_ != '\0') {
      ++at_;
    }
  }

  char peek() const { return at_ == end_ ? '\0' : *at_; }

  void expect(char wanted) {
    if (at_ == end_ || *at_++ != wanted) {
      fail();
    }
  }

  void expect(const char *word) {
    for (; *word != '\0'; ++word) {
      expect(*word);
    }
  }

  Json value(int depth) {
    if (depth > kDeepest) {
      fail();
    }
    skip_space();
    Json found;
    switch (peek()) {
      case '{':
        found.kind_ = Json::Kind::kObject;
        list('}', [&] {
          skip_space();
          std::string name = string();
          skip_space();
          expect(':');
          found.members_.emplace_back(std::move(name), value(depth + 1));
        });
        break;
      case '[':
        found.kind_ = Json::Kind::kArray;
        list(']', [&] { found.items_.push_back(value(depth + 1)); });
        break;
      case '"':
        found.kind_ = Json::Kind::kString;
        found.text_ = string();
        break;
      case 't':
      case 'f':
        found.kind_ = Json::Kind::kBoolean;
        found.number_ = peek() == 't' ? 1 : 0;
        expect(peek() == 't' ? "true" : "false");
        break;
      case 'n':
        expect("null");
        break;
      default:
        found.kind_ = Json::Kind::kNumber;
        found.number_ = number();
    }
    return found;
  }

  template <typename Item>
  void list(char last, Item item) {
    ++at_;
    skip_space();
    if (peek() == last) {
      ++at_;
      return;
    }
    while (true) {
      item();
      skip_space();
      if (peek() == last) {
        ++at_;
        return;
      }
      expect(',');
    }
  }

  double number() {
    const char first = peek();
    if (first != '-' && (first < '0' || first > '9')) {
      fail();
    }
    double found = 0;
    const auto [next, code] = std::from_chars(at_, end_, found);
    if (code != std::errc() || !std::isfinite(found)) {
      fail();
    }
    at_ = next;
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (peek() != '"') {
      if (at_ == end_ || static_cast<unsigned char>(*at_) < 0x20) {
        fail();
      }
      if (*at_ == '\\') {
        ++at_;
        escape(&found);
      } else {
        found.push_back(*at_++);
      }
    }
    ++at_;
    return found;
  }

  void escape(std::string *found) {
    static constexpr char kEscapes[] = "\"\\/bfnrt";
    static constexpr char kMeant[] = "\"\\/\b\f\n\r\t";
    if (peek() == 'u') {
      ++at_;
      append_utf8(found, code_point());
      return;
    }
    const char *const known = peek() == '\0' ? nullptr : std::strchr(kEscapes, *at_);
    if (known == nullptr) {
      fail();
    }
    found->push_back(kMeant[known - kEscapes]);
    ++at_;
  }

  // Half a surrogate pair, which a server may quote from a prompt, stands for no text and is replaced.
  std::uint32_t code_point() {
    const std::uint32_t code = hex4();
    if (code < 0xD800 || code > 0xDFFF) {
      return code;
    }
    if (code > 0xDBFF || end_ - at_ < 6 || at_[0] != '\\' || at_[1] != 'u') {
      return kReplacement;
    }
    const char *const before = at_;
    at_ += 2;
    const std::uint32_t low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) {
      at_ = before;
      return kReplacement;
    }
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    const char *const end = at_ + 4;
    if (end_ - at_ < 4) {
      fail();
    }
    const auto [next, problem] = std::from_chars(at_, end, code, 16);
    if (problem != std::errc() || next != end) {
      fail();
    }
    at_ = next;
    return code;
  }

  const char *at_;
  const char *end_;
};

Json Json::parse(const std::string &text) { return JsonReader(text).whole(); }

const Json &Json::operator[](const std::string &name) const {
  static const Json kNothing;
  for (const auto &[key, value] : members_) {
    if (key == name) {
      return value;
    }
  }
  return kNothing;
}

std::string json_number(double number) {
  char digits[32];
  const auto [end, code] = std::to_chars(digits, digits + sizeof digits, number);
  return code == std::errc() ? std::string(digits, end) : "0";
}

static std::string quoted(const std::string &text) {
  std::string found = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20) {
      static constexpr char kHex[] = "0123456789abcdef";
      found += {'\\', 'u', '0', '0', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      if (c == '"' || c == '\\') {
        found.push_back('\\');
      }
      found.push_back(c);
    }
  }
  return found + "\"";
}

JsonObject &JsonObject::add_raw(const char *name, const std::string &json) {
  members_ += (members_.empty() ? "" : ",") + quoted(name) + ":" + json;
  return *this;
}

JsonObject &JsonObject::add(const char *name, const std::string &text) { return add_raw(name, quoted(text)); }

JsonObject &JsonObject::add(const char *name, std::uint64_t number) { return add_raw(name, std::to_string(number)); }

JsonObject &JsonObject::add(const char *name, double number) { return add_raw(name, json_number(number)); }

}  // namespace sdrt_internal
