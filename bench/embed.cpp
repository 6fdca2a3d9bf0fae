// A picture for each line on standard input, which says "memory" or "shared" for where the pixels go: bench/embed.py
// drives it, and reads when what came, by CLOCK_MONOTONIC. The server is the library's own.
//
//   embed PROMPT SIDE STEPS OPTION...    the options being those of sdrt serve
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "sdrt.hpp"

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint32_t sum(const sdrt::Image &image) {
  std::uint32_t total = 0;
  for (std::size_t i = 0; i < image.pixels_size; ++i) {
    total = total * 31 + image.pixels[i];
  }
  return total;
}

}  // namespace

int main(int count, char **words) {
  if (count < 4) {
    return 2;
  }
  try {
    sdrt::Options options;
    options.arguments.assign(words + 4, words + count);
    const sdrt::Server server = sdrt::Server::start("demo", options);
    sdrt::Params params;
    params.prompt = words[1];
    params.width = params.height = static_cast<std::uint32_t>(std::stoul(words[2]));
    params.steps = static_cast<std::uint32_t>(std::stoul(words[3]));
    params.seed = 42;
    const std::size_t size = std::size_t{params.width} * params.height * 3;
    std::vector<std::uint8_t> memory(size);
    const sdrt::Buffer buffer(size);
    double first = 0;
    double first_took = 0;
    double last = 0;
    params.progress = [&](const sdrt_progress &progress) {
      if (progress.event == SDRT_STEP) {
        last = now();
        if (progress.step == 1) {
          first = last;
          first_took = progress.seconds;
        }
      }
      return true;
    };
    for (std::string line; std::getline(std::cin, line);) {
      const bool shared = line == "shared";
      params.pixels_buffer = shared ? &buffer : nullptr;
      params.pixels = shared ? nullptr : memory.data();
      params.pixels_size = shared ? 0 : size;
      const double called = now();
      const sdrt::Result result = server.generate(params);
      const double returned = now();
      std::printf("{\"called\": %.9f, \"first\": %.9f, \"first_took\": %.9f, \"last\": %.9f, ", called, first, first_took,
                  last);
      std::printf("\"returned\": %.9f, \"sum\": %u, \"settings\": %s}\n", returned, sum(result[0]), result.settings());
      std::fflush(stdout);
    }
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
