// sdrt for C++17: sdrt.h with objects that free themselves and errors that are thrown.
//
//   sdrt::Server server = sdrt::Server::start("demo");
//   sdrt::Params params;
//   params.prompt = "a red star";
//   sdrt::Result result = server.generate(params);
//   const sdrt::Image image = result[0];  // its pixels are RGB, 8 bits each
//
// Everything is in this header, over the C functions alone, so that the library's own C++ never meets the caller's.
// Objects may be used by several threads at once, as sdrt.h says; moving and destroying them is for one thread.
#ifndef SDRT_HPP
#define SDRT_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sdrt.h"

namespace sdrt {

// What every function here throws.
class Error : public std::runtime_error {
 public:
  explicit Error(const sdrt_error &error)
      : std::runtime_error(error.message),
        status_(error.status),
        http_status_(error.http_status),
        retry_after_(error.retry_after_s) {}

  sdrt_status status() const noexcept { return status_; }
  // 0 if the server sent none.
  int http_status() const noexcept { return http_status_; }
  // 0 if nobody knows.
  std::chrono::seconds retry_after() const noexcept { return std::chrono::seconds(retry_after_); }

 private:
  sdrt_status status_;
  int http_status_;
  std::uint32_t retry_after_;
};

namespace detail {

template <auto Free>
struct Deleter {
  template <typename Handle>
  void operator()(Handle *handle) const noexcept {
    Free(handle);
  }
};

template <typename Handle, auto Free>
using Owned = std::unique_ptr<Handle, Deleter<Free>>;

// Calls a C function that fills in an error, and throws that.
template <typename Function, typename... Arguments>
void call(Function function, Arguments... arguments) {
  sdrt_error error = SDRT_ERROR_INIT;
  if (function(arguments..., &error) != SDRT_OK) {
    throw Error(error);
  }
}

inline const char *or_null(const std::string &text) { return text.empty() ? nullptr : text.c_str(); }

// Milliseconds, of which 0 would mean something else.
inline std::uint32_t milliseconds(const std::optional<std::chrono::milliseconds> &time) {
  if (!time) {
    return 0;
  }
  const auto count = time->count();
  return count < 1 ? 1 : count > 0xFFFFFFFF ? 0xFFFFFFFF : static_cast<std::uint32_t>(count);
}

}  // namespace detail

// A way to stop calls from another thread; it has to outlive them.
class Cancellation {
 public:
  Cancellation() {
    sdrt_cancellation *made = nullptr;
    detail::call(sdrt_cancellation_create, &made);
    handle_.reset(made);
  }
  // Also in signal handlers, and any number of times.
  void cancel() const noexcept { sdrt_cancel(handle_.get()); }
  sdrt_cancellation *get() const noexcept { return handle_.get(); }

 private:
  detail::Owned<sdrt_cancellation, sdrt_cancellation_free> handle_;
};

// Shared memory into which a server of this machine puts pixels, and out of which it takes latents.
class Buffer {
 public:
  explicit Buffer(std::size_t size) {
    sdrt_buffer *made = nullptr;
    detail::call(sdrt_buffer_create, size, &made);
    handle_.reset(made);
  }
  // Of an object that shm_open has made.
  static Buffer attach(const std::string &name, std::size_t size) {
    sdrt_buffer *made = nullptr;
    detail::call(sdrt_buffer_attach, name.c_str(), size, &made);
    return Buffer(Handle(made));
  }
  void *data() const noexcept { return sdrt_buffer_data(handle_.get()); }
  std::size_t size() const noexcept { return sdrt_buffer_size(handle_.get()); }
  sdrt_buffer *get() const noexcept { return handle_.get(); }

 private:
  using Handle = detail::Owned<sdrt_buffer, sdrt_buffer_free>;
  explicit Buffer(Handle made) : handle_(std::move(made)) {}

  Handle handle_;
};

// As sdrt_open_options; what is left empty is left to the library.
struct Options {
  std::string api_key;
  std::optional<std::chrono::milliseconds> connect_timeout;
  std::optional<std::chrono::milliseconds> silence_timeout;
  // For a server of the library's own.
  std::string program;
  std::vector<std::string> arguments;
  std::optional<std::chrono::milliseconds> start_timeout;
  sdrt_log_fn log = nullptr;
  void *log_user = nullptr;
  const Cancellation *cancellation = nullptr;
};

struct Model {
  std::string name;
  std::chrono::seconds created;  // since 1970
  std::uint32_t width;
  std::uint32_t height;
};

// As sdrt_params; what is left empty is left to the library and the server.
struct Params {
  std::string prompt;
  std::string negative_prompt;
  std::string model;
  std::string sampler;
  std::string timestep_spacing;
  std::uint32_t width = 0;
  std::uint32_t height = 0;
  std::uint32_t steps = 0;
  std::uint32_t images = 1;
  std::optional<double> guidance_scale;
  std::optional<std::pair<double, double>> guidance_interval;
  double eta = 0;
  std::optional<std::uint64_t> seed;
  std::optional<std::uint32_t> clip_skip;
  std::uint32_t cache_interval = 0;
  std::uint32_t encoder_interval = 0;
  std::uint32_t preview_interval = 0;
  // Returns whether to go on; called in the thread that generates. What it throws comes out of generate.
  std::function<bool(const sdrt_progress &)> progress;
  const Cancellation *cancellation = nullptr;
  std::optional<std::chrono::milliseconds> timeout;
  // Memory for the pixels, of the caller's own or shared; it has to outlive the result.
  void *pixels = nullptr;
  std::size_t pixels_size = 0;
  const Buffer *pixels_buffer = nullptr;
  std::size_t pixels_offset = 0;
  const Buffer *latents_buffer = nullptr;
  std::size_t latents_offset = 0;
};

// A view of one picture: valid as long as its result, and the memory that was given for its pixels.
struct Image {
  std::uint32_t width;
  std::uint32_t height;
  std::uint64_t seed;
  const std::uint8_t *pixels;  // RGB, rows from the top, without gaps
  std::size_t pixels_size;
  const char *parameters;  // how it was made, as Stable Diffusion web UI writes it
};

class Result {
 public:
  std::size_t size() const noexcept { return sdrt_result_count(handle_.get()); }
  Image operator[](std::size_t index) const {
    sdrt_image image = sdrt_default_image();
    if (sdrt_result_image(handle_.get(), index, &image) != SDRT_OK) {
      throw std::out_of_range("a result has no picture " + std::to_string(index));
    }
    return {image.width, image.height, image.seed, image.pixels, image.pixels_size, image.parameters};
  }
  // A JSON object.
  const char *settings() const noexcept { return sdrt_result_settings(handle_.get()); }

 private:
  friend class Server;
  explicit Result(sdrt_result *made) : handle_(made) {}

  detail::Owned<sdrt_result, sdrt_result_free> handle_;
};

class Server {
 public:
  // To a server that runs, such as "127.0.0.1:7860" or "/run/sdrt.sock".
  static Server connect(const std::string &address, const Options &options = {}) {
    return open(address.c_str(), nullptr, options);
  }
  // Starts a server that has a bundle, by its name or folder, and ends it with this object.
  static Server start(const std::string &bundle, const Options &options = {}) {
    return open(nullptr, bundle.c_str(), options);
  }

  std::vector<Model> models() const {
    sdrt_models *made = nullptr;
    detail::call(sdrt_list_models, handle_.get(), &made);
    const detail::Owned<sdrt_models, sdrt_models_free> list(made);
    std::vector<Model> found;
    sdrt_model model = sdrt_default_model();
    for (std::size_t index = 0; sdrt_models_get(made, index, &model) == SDRT_OK; ++index) {
      found.push_back({model.name, std::chrono::seconds(model.created), model.width, model.height});
    }
    return found;
  }

  Result generate(const Params &params) const {
    Watcher watcher{params.progress, nullptr};
    sdrt_params given = translated(params);
    if (params.progress) {
      given.progress = &Watcher::tell;
      given.progress_user = &watcher;
    }
    sdrt_result *made = nullptr;
    sdrt_error error = SDRT_ERROR_INIT;
    const sdrt_status status = sdrt_generate(handle_.get(), &given, &made, &error);
    if (watcher.thrown) {
      std::rethrow_exception(watcher.thrown);
    }
    if (status != SDRT_OK) {
      throw Error(error);
    }
    return Result(made);
  }

  // Of a server of the library's own; 0 for others.
  std::int64_t process() const noexcept { return sdrt_server_process(handle_.get()); }
  sdrt_server *get() const noexcept { return handle_.get(); }
  // As sdrt_close; calls in other threads end with SDRT_CLOSED.
  void close() noexcept { handle_.reset(); }

 private:
  // Between the C function and the C++ one, through which no exception may fly.
  struct Watcher {
    const std::function<bool(const sdrt_progress &)> &progress;
    std::exception_ptr thrown;

    static int tell(const sdrt_progress *progress, void *user) noexcept {
      auto *const self = static_cast<Watcher *>(user);
      try {
        return self->progress(*progress) ? 0 : 1;
      } catch (...) {
        self->thrown = std::current_exception();
        return 1;
      }
    }
  };

  explicit Server(sdrt_server *made) : handle_(made) {}

  static Server open(const char *address, const char *bundle, const Options &options) {
    std::vector<const char *> arguments;
    for (const std::string &each : options.arguments) {
      arguments.push_back(each.c_str());
    }
    arguments.push_back(nullptr);
    sdrt_open_options given = sdrt_default_open_options();
    given.address = address;
    given.bundle = bundle;
    given.api_key = detail::or_null(options.api_key);
    given.connect_timeout_ms = detail::milliseconds(options.connect_timeout);
    given.silence_timeout_ms = detail::milliseconds(options.silence_timeout);
    given.program = detail::or_null(options.program);
    given.arguments = arguments.data();
    given.start_timeout_ms = detail::milliseconds(options.start_timeout);
    given.log = options.log;
    given.log_user = options.log_user;
    given.cancellation = options.cancellation == nullptr ? nullptr : options.cancellation->get();
    sdrt_server *made = nullptr;
    detail::call(sdrt_open, static_cast<const sdrt_open_options *>(&given), &made);
    return Server(made);
  }

  static sdrt_params translated(const Params &params) {
    sdrt_params given = sdrt_default_params();
    given.prompt = params.prompt.c_str();
    given.negative_prompt = detail::or_null(params.negative_prompt);
    given.model = detail::or_null(params.model);
    given.sampler = detail::or_null(params.sampler);
    given.timestep_spacing = detail::or_null(params.timestep_spacing);
    given.width = params.width;
    given.height = params.height;
    given.steps = params.steps;
    given.images = params.images;
    if (params.guidance_scale) {
      // Of the scales that turn guidance off, 0 would mean the default.
      given.guidance_scale = *params.guidance_scale == 0 ? 1 : *params.guidance_scale;
    }
    if (params.guidance_interval) {
      given.guidance_interval[0] = params.guidance_interval->first;
      given.guidance_interval[1] = params.guidance_interval->second;
    }
    given.eta = params.eta;
    given.has_seed = params.seed ? 1 : 0;
    given.seed = params.seed.value_or(0);
    if (params.clip_skip) {
      given.clip_skip = *params.clip_skip == 0 ? SDRT_CLIP_SKIP_NONE : static_cast<std::int32_t>(*params.clip_skip);
    }
    given.cache_interval = params.cache_interval;
    given.encoder_interval = params.encoder_interval;
    given.preview_interval = params.preview_interval;
    given.cancellation = params.cancellation == nullptr ? nullptr : params.cancellation->get();
    given.timeout_ms = detail::milliseconds(params.timeout);
    given.pixels = params.pixels;
    given.pixels_size = params.pixels_size;
    given.pixels_buffer = params.pixels_buffer == nullptr ? nullptr : params.pixels_buffer->get();
    given.pixels_offset = params.pixels_offset;
    given.latents_buffer = params.latents_buffer == nullptr ? nullptr : params.latents_buffer->get();
    given.latents_offset = params.latents_offset;
    return given;
  }

  detail::Owned<sdrt_server, sdrt_close> handle_;
};

}  // namespace sdrt

#endif
