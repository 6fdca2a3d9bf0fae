// Pictures, and making them.
#ifndef SDRT_SRC_RESULT_HPP
#define SDRT_SRC_RESULT_HPP

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sdrt.h"

struct sdrt_result {
  struct Picture {
    bool finished = false;
    std::uint64_t seed = 0;
    std::uint8_t *pixels = nullptr;
    std::string parameters;
  };

  std::uint32_t width = 0;
  std::uint32_t height = 0;
  std::size_t picture_size = 0;  // bytes of one
  std::vector<Picture> pictures;
  std::string settings;
  std::unique_ptr<std::uint8_t[]> own;  // pixels, unless they are the caller's
};

namespace sdrt_internal {

// Asks for pictures and waits for them. Throws Failure.
std::unique_ptr<sdrt_result> generate(sdrt_server *server, const sdrt_params &params);

}  // namespace sdrt_internal

#endif
