#include "frames.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "failure.hpp"

namespace sdrt_internal {
namespace {

constexpr std::size_t kLongestText = 1 << 20;
constexpr std::size_t kLargestPicture = std::size_t{1} << 30;

Failure malformed(const std::string &found) {
  return Failure(SDRT_PROTOCOL, "the server sent " + found + ": expected frames that this version of sdrt knows");
}

// Numbers are little-endian on the wire, and in memory whatever the machine has.
template <typename Number>
Number little_endian(const std::uint8_t *bytes) {
  std::uint64_t bits = 0;
  for (std::size_t i = sizeof(Number); i-- > 0;) {
    bits = bits << 8 | bytes[i];
  }
  Number number;
  if constexpr (sizeof(Number) == 8) {
    std::memcpy(&number, &bits, 8);
  } else {
    number = static_cast<Number>(bits);
  }
  return number;
}

template <typename Number>
void read_number(Response *response, Number *number) {
  std::array<std::uint8_t, sizeof(Number)> bytes;
  response->read_all(bytes.data(), bytes.size());
  *number = little_endian<Number>(bytes.data());
}

}  // namespace

std::size_t picture_bytes(std::uint32_t width, std::uint32_t height) {
  if (width == 0 || height == 0 || width > 65536 || height > 65536 ||
      std::size_t{width} * height > kLargestPicture / 3) {
    throw malformed("a picture of " + std::to_string(width) + "x" + std::to_string(height) + " pixels");
  }
  return std::size_t{width} * height * 3;
}

FrameKind FrameReader::next() {
  while (true) {
    std::array<char, 4096> unread;
    while (left_ > 0) {
      const std::size_t count = std::min(left_, unread.size());
      response_->read_all(unread.data(), count);
      left_ -= count;
    }
    std::uint32_t length = 0;
    std::uint16_t kind = 0;
    read_number(response_, &length);
    read_number(response_, &kind);
    read_number(response_, &image_);
    left_ = length;
    if (kind >= static_cast<std::uint16_t>(FrameKind::kAccepted) &&
        kind <= static_cast<std::uint16_t>(FrameKind::kAtWork)) {
      return static_cast<FrameKind>(kind);
    }
  }
}

template <typename... Fields>
void FrameReader::fields(Fields *...fields) {
  constexpr std::size_t size = (sizeof(Fields) + ...);
  if (left_ < size) {
    throw malformed("a frame that is too short");
  }
  (read_number(response_, fields), ...);
  left_ -= size;
}

Accepted FrameReader::accepted() {
  Accepted found = {};
  fields(&found.images, &found.steps, &found.width, &found.height, &found.waiting);
  return found;
}

StepDone FrameReader::step() {
  StepDone found = {};
  fields(&found.step, &found.total, &found.timestep, &found.seconds);
  return found;
}

Preview FrameReader::preview() {
  Preview found = {};
  fields(&found.step, &found.total, &found.width, &found.height);
  return found;
}

ImageHead FrameReader::image_head() {
  ImageHead found = {};
  fields(&found.seed, &found.width, &found.height, &found.flags, &found.text_size);
  return found;
}

std::uint32_t FrameReader::error_status() {
  std::uint32_t status = 0;
  fields(&status);
  return status;
}

std::string FrameReader::text(std::size_t size) {
  if (size > left_ || size > kLongestText) {
    throw malformed("a text of " + std::to_string(size) + " bytes");
  }
  std::string found(size, '\0');
  response_->read_all(&found[0], size);
  left_ -= size;
  return found;
}

void FrameReader::pixels(std::uint8_t *to, std::size_t size) {
  if (size != left_) {
    throw malformed(std::to_string(left_) + " bytes of pixels instead of " + std::to_string(size));
  }
  response_->read_all(to, size);
  left_ = 0;
}

void FrameReader::end() const {
  if (left_ != 0) {
    throw malformed("a frame that is too long");
  }
}

}  // namespace sdrt_internal
