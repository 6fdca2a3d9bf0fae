// A real server, which runs at SDRT_TEST_ADDRESS with --allow-shared-memory: its pictures are those of sdrt run, however
// they come and whatever else is made meanwhile.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <future>
#include <thread>

#include "check.hpp"
#include "pictures.hpp"
#include "sdrt.hpp"

namespace {

sdrt::Server connected() { return sdrt::Server::connect(check::setting("SDRT_TEST_ADDRESS")); }

// An object of the caller's own making.
class Object {
 public:
  explicit Object(std::size_t size) : name_("/sdrt-live-" + std::to_string(getpid())) {
    const int descriptor = shm_open(name_.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(descriptor >= 0 && ftruncate(descriptor, static_cast<off_t>(size)) == 0);
    close(descriptor);
  }
  ~Object() { shm_unlink(name_.c_str()); }
  Object(const Object &) = delete;
  Object &operator=(const Object &) = delete;
  const std::string &name() const { return name_; }

 private:
  std::string name_;
};

sdrt_status status_of(const sdrt::Server &server, const sdrt::Params &params) {
  try {
    server.generate(params);
  } catch (const sdrt::Error &error) {
    return error.status();
  }
  return SDRT_OK;
}

}  // namespace

TEST(models_are_listed) {
  const std::vector<sdrt::Model> models = connected().models();
  CHECK_EQUAL(models.size(), 1u);
  CHECK_EQUAL(models[0].name, "demo");
  CHECK_EQUAL(models[0].width, 128u);
  CHECK(models[0].created.count() > 1700000000);
}

TEST(alone_and_into_any_memory) {
  const sdrt::Server server = connected();
  Expected expected = expected_pictures().at(0);
  sdrt::Params &params = expected.params;
  const std::size_t size = expected.pixels.size();
  {
    const sdrt::Result result = server.generate(params);
    CHECK(pixels_of(result[0]) == expected.pixels);
    CHECK_EQUAL(result[0].seed, *params.seed);
    CHECK(std::string(result[0].parameters).find(params.prompt + "\n") == 0);
    CHECK(std::string(result.settings()).find("\"sampler\": \"" + params.sampler + "\"") != std::string::npos);
  }
  {
    std::vector<std::uint8_t> memory(size);
    params.pixels = memory.data();
    params.pixels_size = size;
    server.generate(params);
    CHECK(std::string(memory.begin(), memory.end()) == expected.pixels);
    params.pixels = nullptr;
  }
  {
    const sdrt::Buffer buffer(size + 4096);
    params.pixels_buffer = &buffer;
    params.pixels_offset = 11;
    const sdrt::Result result = server.generate(params);
    CHECK(static_cast<const void *>(result[0].pixels) == static_cast<char *>(buffer.data()) + 11);
    CHECK(pixels_of(result[0]) == expected.pixels);
    CHECK_EQUAL(static_cast<const char *>(buffer.data())[size + 11], '\0');
  }
  {
    const Object object(size);
    const sdrt::Buffer buffer = sdrt::Buffer::attach(object.name(), size);
    params.pixels_buffer = &buffer;
    params.pixels_offset = 0;
    CHECK(pixels_of(server.generate(params)[0]) == expected.pixels);
    params.pixels_offset = 1;
    CHECK_EQUAL(status_of(server, params), SDRT_INVALID_ARGUMENT);
  }
}

TEST(all_at_once) {
  const sdrt::Server server = connected();
  std::vector<Expected> all = expected_pictures();
  std::vector<sdrt::Buffer> buffers;
  for (const Expected &each : all) {
    buffers.emplace_back(each.pixels.size());
  }
  std::vector<std::future<bool>> running;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (i % 2 == 1) {
      all[i].params.pixels_buffer = &buffers[i];
    }
    running.push_back(std::async(std::launch::async, [&server, &all, i] {
      return pixels_of(server.generate(all[i].params)[0]) == all[i].pixels;
    }));
  }
  for (std::future<bool> &each : running) {
    CHECK(each.get());
  }
}

// The first three of the pictures differ in their seeds alone, each being one more than that before.
TEST(several_in_one_call) {
  const sdrt::Server server = connected();
  const std::vector<Expected> all = expected_pictures();
  sdrt::Params params = all.at(0).params;
  params.images = 3;
  const sdrt::Buffer buffer(3 * all[0].pixels.size());
  for (const bool shared : {false, true}) {
    params.pixels_buffer = shared ? &buffer : nullptr;
    std::atomic<int> finished{0};
    params.progress = [&](const sdrt_progress &progress) {
      CHECK_EQUAL(progress.count, 3u);
      if (progress.event == SDRT_IMAGE) {
        ++finished;
        CHECK(std::string(progress.pixels, progress.pixels + progress.pixels_size) == all[progress.image].pixels);
      }
      return true;
    };
    const sdrt::Result result = server.generate(params);
    CHECK_EQUAL(result.size(), 3u);
    CHECK_EQUAL(finished, 3);
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK_EQUAL(result[i].seed, *params.seed + i);
      CHECK(pixels_of(result[i]) == all[i].pixels);
    }
  }
}

TEST(progress_and_previews) {
  const sdrt::Server server = connected();
  Expected expected = expected_pictures().at(0);
  std::uint32_t total = 0;
  std::uint32_t steps = 0;
  std::uint32_t previews = 0;
  expected.params.preview_interval = 1;
  expected.params.progress = [&](const sdrt_progress &progress) {
    switch (progress.event) {
      case SDRT_ACCEPTED:
        total = progress.total;
        break;
      case SDRT_STEP:
        CHECK_EQUAL(progress.step, ++steps);
        CHECK(progress.seconds > 0 && progress.timestep >= 0);
        break;
      case SDRT_PREVIEW:
        ++previews;
        CHECK_EQUAL(progress.pixels_size, expected.pixels.size());
        CHECK(std::memcmp(progress.pixels, expected.pixels.data(), progress.pixels_size) != 0);
        break;
      case SDRT_IMAGE:
        CHECK_EQUAL(steps, total);
        break;
    }
    return true;
  };
  CHECK(pixels_of(server.generate(expected.params)[0]) == expected.pixels);
  CHECK(total >= expected.params.steps);
  CHECK(previews >= 1 && previews < total);
}

TEST(cancelled_in_the_middle) {
  const sdrt::Server server = connected();
  sdrt::Params params;
  params.prompt = "a star";
  params.steps = 1000;
  params.sampler = "ddim";
  sdrt::Cancellation cancellation;
  params.cancellation = &cancellation;
  std::promise<void> begun;
  params.progress = [&](const sdrt_progress &progress) {
    if (progress.event == SDRT_STEP && progress.step == 2) {
      begun.set_value();
    }
    return true;
  };
  auto running = std::async(std::launch::async, [&] { return status_of(server, params); });
  begun.get_future().wait();
  cancellation.cancel();
  CHECK_EQUAL(running.get(), SDRT_CANCELLED);
  Expected expected = expected_pictures().at(0);
  CHECK(pixels_of(server.generate(expected.params)[0]) == expected.pixels);
}

TEST(latents_from_shared_memory) {
  const sdrt::Server server = connected();
  const std::string latents = content_of(check::setting("SDRT_TEST_LATENTS"));
  const sdrt::Buffer buffer(latents.size() + 64);
  std::memcpy(static_cast<char *>(buffer.data()) + 64, latents.data(), latents.size());
  Expected expected = expected_pictures().at(0);
  sdrt::Params &params = expected.params;
  params.latents_buffer = &buffer;
  params.latents_offset = 64;
  params.images = 3;
  params.seed = 5;  // which is of no account now
  const sdrt::Result result = server.generate(params);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(pixels_of(result[i]) == expected_pictures().at(i).pixels);
  }
  std::memset(buffer.data(), 0xFF, buffer.size());
  CHECK_EQUAL(status_of(server, params), SDRT_INVALID_ARGUMENT);
}

TEST(refusals) {
  const sdrt::Server server = connected();
  const auto with = [&](auto change) {
    sdrt::Params params;
    params.prompt = "a star";
    params.steps = 1;
    change(&params);
    return status_of(server, params);
  };
  CHECK_EQUAL(with([](sdrt::Params *p) { p->model = "dall-e-3"; }), SDRT_NOT_FOUND);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->sampler = "dpm++"; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->width = 100; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->width = p->height = 8192; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->steps = 2000; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->prompt = "\xFF"; }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->prompt.assign(40000, 'x'); }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->prompt.assign(2000000, 'x'); }), SDRT_INVALID_ARGUMENT);
  CHECK_EQUAL(with([](sdrt::Params *p) { p->guidance_scale = -1; }), SDRT_INVALID_ARGUMENT);
}

int main(int count, char **words) { return check::run_all(count, words); }
