// Pictures that sdrt run has made, against which those of the library are held: a line each in a file, with tabs
// between the path of the pixels, prompt, negative prompt, seed, steps, guidance scale, sampler, width and height.
#ifndef SDRT_TESTS_PICTURES_HPP
#define SDRT_TESTS_PICTURES_HPP

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "check.hpp"
#include "sdrt.hpp"

struct Expected {
  sdrt::Params params;
  std::string pixels;
};

inline std::string content_of(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw check::Failed(path + " cannot be read");
  }
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline std::vector<Expected> expected_pictures() {
  std::istringstream lines(content_of(check::setting("SDRT_TEST_PICTURES")));
  std::vector<Expected> found;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    const auto next = [&fields] {
      std::string field;
      std::getline(fields, field, '\t');
      return field;
    };
    Expected expected;
    expected.pixels = content_of(next());
    expected.params.prompt = next();
    expected.params.negative_prompt = next();
    expected.params.seed = std::stoull(next());
    expected.params.steps = static_cast<std::uint32_t>(std::stoul(next()));
    expected.params.guidance_scale = std::stod(next());
    expected.params.sampler = next();
    expected.params.width = static_cast<std::uint32_t>(std::stoul(next()));
    expected.params.height = static_cast<std::uint32_t>(std::stoul(next()));
    found.push_back(expected);
  }
  return found;
}

inline std::string pixels_of(const sdrt::Image &image) {
  return std::string(image.pixels, image.pixels + image.pixels_size);
}

#endif
