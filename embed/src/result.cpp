#include "result.hpp"

#include <cmath>
#include <cstring>

#include "failure.hpp"
#include "frames.hpp"
#include "json.hpp"
#include "server.hpp"
#include "shared_memory.hpp"

namespace sdrt_internal {
namespace {

constexpr const char *kPath = "/native/v1/generate";
constexpr std::uint32_t kMostImages = 10;
constexpr std::size_t kLatentBytes = 4 * sizeof(float);  // of one latent pixel
constexpr std::uint32_t kPixelsPerLatent = 8;

Failure invalid(const std::string &message) { return Failure(SDRT_INVALID_ARGUMENT, message); }

void add_text(JsonObject *object, const char *name, const char *text) {
  if (text != nullptr) {
    object->add(name, std::string(text));
  }
}

void add_count(JsonObject *object, const char *name, std::uint32_t number) {
  if (number != 0) {
    object->add(name, std::uint64_t{number});
  }
}

void add_number(JsonObject *object, const char *name, double number) {
  if (!std::isfinite(number)) {
    throw invalid(std::string(name) + " is no finite number: expected one");
  }
  if (number != 0) {
    object->add(name, number);
  }
}

void add_memory(JsonObject *object, const char *name, const sdrt_buffer &buffer, std::size_t offset,
                std::size_t size) {
  JsonObject memory;
  memory.add("key", buffer.name()).add("offset", std::uint64_t{offset}).add("byte_size", std::uint64_t{size});
  object->add_raw(name, memory.text());
}

std::uint32_t image_count(const sdrt_params &params) { return params.images == 0 ? 1 : params.images; }

void add_latents(JsonObject *object, const sdrt_params &params) {
  const sdrt_buffer &buffer = *params.latents_buffer;
  const std::size_t size = kLatentBytes * image_count(params) * (params.width / kPixelsPerLatent) *
                           (params.height / kPixelsPerLatent);
  if (size == 0) {
    throw invalid("latents are given without width and height: give both");
  }
  if (params.latents_offset > buffer.size() || size > buffer.size() - params.latents_offset) {
    throw invalid("the latents have " + std::to_string(size) + " bytes from " + std::to_string(params.latents_offset) +
                  " on: expected them within the buffer's " + std::to_string(buffer.size()));
  }
  add_memory(object, "latents", buffer, params.latents_offset, size);
}

// What can be wrong with the values the server tells; here is what it would not get to see.
void check(const sdrt_params &params) {
  if (params.prompt == nullptr) {
    throw invalid("prompt is NULL: expected a string");
  }
  if (params.images > kMostImages) {
    throw invalid("images is " + std::to_string(params.images) + ": expected 1 to " + std::to_string(kMostImages));
  }
  if (params.clip_skip < SDRT_CLIP_SKIP_NONE) {
    throw invalid("clip_skip is " + std::to_string(params.clip_skip) + ": expected 0 or more, or SDRT_CLIP_SKIP_NONE");
  }
  if (params.pixels != nullptr && params.pixels_buffer != nullptr) {
    throw invalid("pixels and pixels_buffer are given: expected one of them, or none");
  }
  if (params.pixels_buffer != nullptr && params.pixels_offset >= params.pixels_buffer->size()) {
    throw invalid("pixels_offset is " + std::to_string(params.pixels_offset) + ": expected less than the buffer's " +
                  std::to_string(params.pixels_buffer->size()) + " bytes");
  }
}

std::string request_body(const sdrt_params &params) {
  check(params);
  JsonObject object;
  object.add("prompt", std::string(params.prompt));
  add_text(&object, "negative_prompt", params.negative_prompt);
  add_text(&object, "model", params.model);
  add_text(&object, "sampler", params.sampler);
  add_text(&object, "timestep_spacing", params.timestep_spacing);
  add_count(&object, "width", params.width);
  add_count(&object, "height", params.height);
  add_count(&object, "num_inference_steps", params.steps);
  add_count(&object, "n", params.images);
  add_count(&object, "cache_interval", params.cache_interval);
  add_count(&object, "encoder_interval", params.encoder_interval);
  if (params.progress != nullptr) {
    add_count(&object, "preview_interval", params.preview_interval);
  }
  add_number(&object, "guidance_scale", params.guidance_scale);
  add_number(&object, "eta", params.eta);
  if (params.guidance_interval[0] != 0 || params.guidance_interval[1] != 0) {
    if (!std::isfinite(params.guidance_interval[0]) || !std::isfinite(params.guidance_interval[1])) {
      throw invalid("guidance_interval is not finite: expected two noise levels");
    }
    object.add_raw("guidance_interval", "[" + json_number(params.guidance_interval[0]) + "," +
                                            json_number(params.guidance_interval[1]) + "]");
  }
  if (params.has_seed != 0) {
    object.add("seed", params.seed);
  }
  if (params.clip_skip != 0) {
    const std::uint32_t layers = params.clip_skip == SDRT_CLIP_SKIP_NONE ? 0 : static_cast<std::uint32_t>(params.clip_skip);
    object.add("clip_skip", std::uint64_t{layers});
  }
  if (params.pixels_buffer != nullptr) {
    const std::size_t offset = params.pixels_offset;
    add_memory(&object, "pixels", *params.pixels_buffer, offset, params.pixels_buffer->size() - offset);
  }
  if (params.latents_buffer != nullptr) {
    add_latents(&object, params);
  }
  return object.text();
}

// Takes the frames of one answer, and tells of them.
class Receiver {
 public:
  explicit Receiver(const sdrt_params &params) : params_(params), result_(std::make_unique<sdrt_result>()) {}

  void read(Response *response) {
    if (response->header("content-type") != kFramesType) {
      throw Failure(SDRT_PROTOCOL, "the answer is not of the type " + std::string(kFramesType) +
                                       ": expected an sdrt server of version " SDRT_VERSION);
    }
    FrameReader frames(response);
    if (frames.next() != FrameKind::kAccepted) {
      throw unexpected("no word of acceptance");
    }
    accept(&frames);
    for (FrameKind kind = frames.next(); kind != FrameKind::kDone; kind = frames.next()) {
      take(kind, &frames);
    }
    for (const sdrt_result::Picture &picture : result_->pictures) {
      if (!picture.finished) {
        throw unexpected("fewer pictures than were asked for");
      }
    }
    result_->settings = frames.text();
  }

  std::unique_ptr<sdrt_result> result() { return std::move(result_); }

 private:
  static Failure unexpected(const std::string &found) {
    return Failure(SDRT_PROTOCOL, "the server sent " + found + ": expected frames as its own protocol has them");
  }

  sdrt_progress event(sdrt_event what, std::uint32_t image) const {
    sdrt_progress progress = {};
    progress.struct_size = sizeof progress;
    progress.event = what;
    progress.image = image;
    progress.count = static_cast<std::uint32_t>(result_->pictures.size());
    return progress;
  }

  void tell(const sdrt_progress &progress) const {
    if (params_.progress != nullptr && params_.progress(&progress, params_.progress_user) != 0) {
      throw Failure(SDRT_CANCELLED, "cancelled by the progress function");
    }
  }

  void accept(FrameReader *frames) {
    const Accepted accepted = frames->accepted();
    frames->end();
    if (accepted.images != image_count(params_)) {
      throw unexpected("another number of pictures than was asked for");
    }
    sdrt_result &result = *result_;
    result.width = accepted.width;
    result.height = accepted.height;
    result.picture_size = picture_bytes(accepted.width, accepted.height);
    result.pictures.resize(accepted.images);
    const std::size_t size = result.picture_size * accepted.images;
    std::uint8_t *pixels = static_cast<std::uint8_t *>(params_.pixels);
    if (params_.pixels_buffer != nullptr) {
      if (size > params_.pixels_buffer->size() - params_.pixels_offset) {
        throw unexpected("pictures that are larger than the buffer for them");
      }
      pixels = static_cast<std::uint8_t *>(params_.pixels_buffer->data()) + params_.pixels_offset;
    } else if (pixels == nullptr) {
      result.own.reset(new std::uint8_t[size]);
      pixels = result.own.get();
    } else if (params_.pixels_size < size) {
      throw invalid("pixels_size is " + std::to_string(params_.pixels_size) + ": expected at least " +
                    std::to_string(size));
    }
    for (sdrt_result::Picture &picture : result.pictures) {
      picture.pixels = pixels;
      pixels += result.picture_size;
    }
    sdrt_progress progress = event(SDRT_ACCEPTED, 0);
    progress.total = accepted.steps;
    progress.waiting = accepted.waiting;
    progress.width = accepted.width;
    progress.height = accepted.height;
    tell(progress);
  }

  void take(FrameKind kind, FrameReader *frames) {
    if (frames->image() >= result_->pictures.size()) {
      throw unexpected("a picture that was not asked for");
    }
    switch (kind) {
      case FrameKind::kStep:
        take_step(frames);
        break;
      case FrameKind::kPreview:
        take_preview(frames);
        break;
      case FrameKind::kImage:
        take_image(frames);
        break;
      case FrameKind::kError: {
        const int status = static_cast<int>(frames->error_status());
        throw refusal(status, frames->text(), "");
      }
      case FrameKind::kAtWork:
        break;
      default:
        throw unexpected("frames in another order");
    }
  }

  void take_step(FrameReader *frames) const {
    const StepDone step = frames->step();
    frames->end();
    sdrt_progress progress = event(SDRT_STEP, frames->image());
    progress.step = step.step;
    progress.total = step.total;
    progress.timestep = step.timestep;
    progress.seconds = step.seconds;
    tell(progress);
  }

  void take_preview(FrameReader *frames) {
    const Preview preview = frames->preview();
    preview_.resize(picture_bytes(preview.width, preview.height));
    frames->pixels(preview_.data(), preview_.size());
    sdrt_progress progress = event(SDRT_PREVIEW, frames->image());
    progress.step = preview.step;
    progress.total = preview.total;
    progress.width = preview.width;
    progress.height = preview.height;
    progress.pixels = preview_.data();
    progress.pixels_size = preview_.size();
    tell(progress);
  }

  void take_image(FrameReader *frames) {
    sdrt_result::Picture &picture = result_->pictures[frames->image()];
    const ImageHead head = frames->image_head();
    const bool in_memory = (head.flags & kInMemory) != 0;
    if (picture.finished || head.width != result_->width || head.height != result_->height ||
        in_memory != (params_.pixels_buffer != nullptr)) {
      throw unexpected("another picture than was asked for");
    }
    picture.parameters = frames->text(head.text_size);
    if (!in_memory) {
      frames->pixels(picture.pixels, result_->picture_size);
    }
    frames->end();
    picture.seed = head.seed;
    picture.finished = true;
    sdrt_progress progress = event(SDRT_IMAGE, frames->image());
    progress.width = head.width;
    progress.height = head.height;
    progress.seed = head.seed;
    progress.pixels = picture.pixels;
    progress.pixels_size = result_->picture_size;
    tell(progress);
  }

  const sdrt_params &params_;
  std::unique_ptr<sdrt_result> result_;
  std::vector<std::uint8_t> preview_;
};

}  // namespace

std::unique_ptr<sdrt_result> generate(sdrt_server *server, const sdrt_params &params) {
  const std::string body = request_body(params);
  Receiver receiver(params);
  server->ask(kPath, body, params.cancellation, params.timeout_ms, [&](Response *response) { receiver.read(response); });
  return receiver.result();
}

}  // namespace sdrt_internal
