// Frames of the native protocol, as embed/PROTOCOL.md describes them.
#ifndef SDRT_SRC_FRAMES_HPP
#define SDRT_SRC_FRAMES_HPP

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "http.hpp"

namespace sdrt_internal {

constexpr char kFramesType[] = "application/vnd.sdrt.frames";

enum class FrameKind : std::uint16_t {
  kAccepted = 1,
  kStep = 2,
  kPreview = 3,
  kImage = 4,
  kDone = 5,
  kError = 6,
  kAtWork = 7,
};

struct Accepted {
  std::uint32_t images, steps, width, height, waiting;
};

struct StepDone {
  std::uint32_t step, total;
  double timestep, seconds;
};

struct Preview {
  std::uint32_t step, total, width, height;
};

struct ImageHead {
  std::uint64_t seed;
  std::uint32_t width, height, flags, text_size;
};

constexpr std::uint32_t kInMemory = 1;  // of ImageHead::flags

// Reads frame after frame: first `next`, then the parts of its payload in order, until none is left. Everything throws
// Failure: protocol for what is no such frame, and what Response throws.
class FrameReader {
 public:
  explicit FrameReader(Response *response) : response_(response) {}

  // Passes over what is left of the last frame, and over kinds that it does not know.
  FrameKind next();
  std::uint16_t image() const { return image_; }

  Accepted accepted();
  StepDone step();
  Preview preview();
  ImageHead image_head();
  std::uint32_t error_status();
  // So many bytes, or all that are left of the payload.
  std::string text(std::size_t size);
  std::string text() { return text(left_); }
  // Pixels, which have to be all that is left.
  void pixels(std::uint8_t *to, std::size_t size);
  // Throws if anything is left.
  void end() const;

 private:
  template <typename... Fields>
  void fields(Fields *...fields);

  Response *response_;
  std::size_t left_ = 0;
  std::uint16_t image_ = 0;
};

// Throws Failure (protocol) for a size that no picture has; else gives its bytes, 3 a pixel.
std::size_t picture_bytes(std::uint32_t width, std::uint32_t height);

}  // namespace sdrt_internal

#endif
