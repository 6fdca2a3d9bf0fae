// JSON (RFC 8259): what a server answers is read, and what it is asked is written.
#ifndef SDRT_SRC_JSON_HPP
#define SDRT_SRC_JSON_HPP

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sdrt_internal {

class Json {
 public:
  enum class Kind { kNull, kBoolean, kNumber, kString, kArray, kObject };

  // Throws Failure (protocol) if the text is no JSON, or nested beyond all measure.
  static Json parse(const std::string &text);

  Kind kind() const { return kind_; }
  // Of an object; null if there is no such member, or if this is no object.
  const Json &operator[](const std::string &name) const;
  const std::vector<Json> &items() const { return items_; }
  // What is of another kind is empty, or zero.
  const std::string &text() const { return text_; }
  double number() const { return number_; }

 private:
  friend class JsonReader;

  Kind kind_ = Kind::kNull;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

// Writes one object, member by member.
class JsonObject {
 public:
  JsonObject &add(const char *name, const std::string &text);
  JsonObject &add(const char *name, std::uint64_t number);
  JsonObject &add(const char *name, double number);  // finite
  JsonObject &add_raw(const char *name, const std::string &json);
  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string members_;
};

// Writes a number so that it is read back as the same, in whatever locale.
std::string json_number(double number);

}  // namespace sdrt_internal

#endif
