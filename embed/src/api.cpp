// The C functions: structures of any age in, exceptions turned into statuses on the way out.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "failure.hpp"
#include "json.hpp"
#include "result.hpp"
#include "sdrt.h"
#include "server.hpp"
#include "shared_memory.hpp"

using sdrt_internal::Failure;
using sdrt_internal::Json;

struct sdrt_models {
  struct Model {
    std::string name;
    std::int64_t created;
    std::uint32_t width, height;
  };
  std::vector<Model> models;
};

namespace {

constexpr std::size_t kMostModels = 4 << 20;  // bytes of their list

void fill_in(sdrt_error *error, const Failure &failure) {
  if (error == nullptr || error->struct_size < offsetof(sdrt_error, message) + 1) {
    return;
  }
  error->status = failure.status;
  error->http_status = failure.http_status;
  error->retry_after_s = failure.retry_after_s;
  const std::size_t room = std::min(error->struct_size, sizeof(sdrt_error)) - offsetof(sdrt_error, message);
  std::size_t length = std::min(failure.message.size(), room - 1);
  // A character is kept whole or left out.
  while (length < failure.message.size() && length > 0 && (failure.message[length] & 0xC0) == 0x80) {
    --length;
  }
  std::memcpy(error->message, failure.message.data(), length);
  error->message[length] = '\0';
}

// Runs what a function does, and says how it ended.
template <typename Work>
sdrt_status guarded(sdrt_error *error, Work work) noexcept {
  Failure failure(SDRT_OK, "");
  try {
    work();
  } catch (const Failure &thrown) {
    failure = thrown;
  } catch (const std::bad_alloc &) {
    failure = Failure(SDRT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception &thrown) {
    failure = Failure(SDRT_SYSTEM, thrown.what());
  }
  fill_in(error, failure);
  return failure.status;
}

// Copies a structure of the caller's, which may be older or newer than this library; what it lacks is zero.
template <typename Struct>
Struct read_struct(const Struct *given, const char *what, std::size_t first_size) {
  if (given == nullptr) {
    throw Failure(SDRT_INVALID_ARGUMENT, std::string(what) + " is NULL: expected a structure");
  }
  const std::size_t size = given->struct_size;
  if (size < first_size) {
    throw Failure(SDRT_INVALID_ARGUMENT, std::string(what) + ".struct_size is " + std::to_string(size) +
                                             ": expected the structure's size, " + std::to_string(sizeof(Struct)));
  }
  const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(given);
  if (size > sizeof(Struct) && std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char c) { return c != 0; })) {
    throw Failure(SDRT_INVALID_ARGUMENT,
                  std::string(what) + " has fields that this library does not know: expected zeros there, or sdrt " +
                      "newer than " SDRT_VERSION);
  }
  Struct copy = {};
  std::memcpy(&copy, bytes, std::min(size, sizeof(Struct)));
  return copy;
}

// Fills in as much of a caller's structure as it has room for.
template <typename Struct>
sdrt_status write_struct(Struct *to, Struct from) {
  if (to == nullptr || to->struct_size < sizeof(std::size_t)) {
    return SDRT_INVALID_ARGUMENT;
  }
  const std::size_t size = to->struct_size;
  from.struct_size = size;
  std::memcpy(to, &from, std::min(size, sizeof(Struct)));
  return SDRT_OK;
}

template <typename Handle>
void expect_handle(const Handle *handle, const char *what) {
  if (handle == nullptr) {
    throw Failure(SDRT_INVALID_ARGUMENT, std::string(what) + " is NULL: expected one");
  }
}

std::uint32_t small(const Json &number) {
  const double value = number.number();
  return value >= 0 && value <= 65536 ? static_cast<std::uint32_t>(value) : 0;
}

std::unique_ptr<sdrt_models> read_models(const std::string &text) {
  auto list = std::make_unique<sdrt_models>();
  const Json answer = Json::parse(text);
  for (const Json &each : answer["models"].items()) {
    const double created = each["created"].number();
    const bool known = created >= 0 && created < 1e15;
    list->models.push_back(
        {each["id"].text(), known ? static_cast<std::int64_t>(created) : 0, small(each["width"]), small(each["height"])});
  }
  if (list->models.empty()) {
    throw Failure(SDRT_PROTOCOL, "the answer lists no models: expected an sdrt server of version " SDRT_VERSION);
  }
  return list;
}

}  // namespace

const char *sdrt_version(void) { return SDRT_VERSION; }

uint32_t sdrt_api_level(void) { return SDRT_API_LEVEL; }

const char *sdrt_status_name(sdrt_status status) {
  switch (status) {
    case SDRT_OK:
      return "ok";
    case SDRT_INVALID_ARGUMENT:
      return "invalid argument";
    case SDRT_NOT_FOUND:
      return "not found";
    case SDRT_UNAUTHORIZED:
      return "unauthorized";
    case SDRT_QUEUE_FULL:
      return "queue full";
    case SDRT_UNAVAILABLE:
      return "unavailable";
    case SDRT_OUT_OF_MEMORY:
      return "out of memory";
    case SDRT_SERVER_ERROR:
      return "server error";
    case SDRT_CANCELLED:
      return "cancelled";
    case SDRT_TIMEOUT:
      return "timeout";
    case SDRT_CONNECTION:
      return "connection";
    case SDRT_PROTOCOL:
      return "protocol";
    case SDRT_START_FAILED:
      return "start failed";
    case SDRT_SERVER_DIED:
      return "server died";
    case SDRT_CLOSED:
      return "closed";
    case SDRT_SYSTEM:
      return "system";
  }
  return "unknown";
}

sdrt_status sdrt_open(const sdrt_open_options *options, sdrt_server **server, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(server, "server");
    *server = nullptr;
    *server = new sdrt_server(read_struct(options, "options", sizeof(sdrt_open_options)));
  });
}

void sdrt_close(sdrt_server *server) { delete server; }

int64_t sdrt_server_process(const sdrt_server *server) { return server == nullptr ? 0 : server->process_id(); }

sdrt_status sdrt_list_models(sdrt_server *server, sdrt_models **models, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(models, "models");
    *models = nullptr;
    expect_handle(server, "server");
    std::string text;
    server->ask("/native/v1/models", "", nullptr, 0,
                [&](sdrt_internal::Response *response) { text = response->rest(kMostModels); });
    *models = read_models(text).release();
  });
}

size_t sdrt_models_count(const sdrt_models *models) { return models == nullptr ? 0 : models->models.size(); }

sdrt_status sdrt_models_get(const sdrt_models *models, size_t index, sdrt_model *model) {
  if (index >= sdrt_models_count(models)) {
    return SDRT_INVALID_ARGUMENT;
  }
  const sdrt_models::Model &found = models->models[index];
  return write_struct(model, sdrt_model{0, found.name.c_str(), found.created, found.width, found.height});
}

void sdrt_models_free(sdrt_models *models) { delete models; }

sdrt_status sdrt_cancellation_create(sdrt_cancellation **cancellation, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(cancellation, "cancellation");
    *cancellation = nullptr;
    *cancellation = new sdrt_cancellation();
  });
}

void sdrt_cancel(sdrt_cancellation *cancellation) {
  if (cancellation != nullptr) {
    cancellation->event.fire();
  }
}

void sdrt_cancellation_free(sdrt_cancellation *cancellation) { delete cancellation; }

sdrt_status sdrt_buffer_create(size_t size, sdrt_buffer **buffer, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(buffer, "buffer");
    *buffer = nullptr;
    *buffer = sdrt_buffer::create(size).release();
  });
}

sdrt_status sdrt_buffer_attach(const char *name, size_t size, sdrt_buffer **buffer, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(buffer, "buffer");
    *buffer = nullptr;
    expect_handle(name, "name");
    *buffer = sdrt_buffer::attach(name, size).release();
  });
}

void *sdrt_buffer_data(const sdrt_buffer *buffer) { return buffer == nullptr ? nullptr : buffer->data(); }

size_t sdrt_buffer_size(const sdrt_buffer *buffer) { return buffer == nullptr ? 0 : buffer->size(); }

void sdrt_buffer_free(sdrt_buffer *buffer) { delete buffer; }

sdrt_status sdrt_generate(sdrt_server *server, const sdrt_params *params, sdrt_result **result, sdrt_error *error) {
  return guarded(error, [&] {
    expect_handle(result, "result");
    *result = nullptr;
    expect_handle(server, "server");
    *result = sdrt_internal::generate(server, read_struct(params, "params", sizeof(sdrt_params))).release();
  });
}

size_t sdrt_result_count(const sdrt_result *result) { return result == nullptr ? 0 : result->pictures.size(); }

sdrt_status sdrt_result_image(const sdrt_result *result, size_t index, sdrt_image *image) {
  if (index >= sdrt_result_count(result)) {
    return SDRT_INVALID_ARGUMENT;
  }
  const sdrt_result::Picture &found = result->pictures[index];
  return write_struct(image, sdrt_image{0, result->width, result->height, found.seed, found.pixels,
                                        result->picture_size, found.parameters.c_str()});
}

const char *sdrt_result_settings(const sdrt_result *result) {
  return result == nullptr ? "" : result->settings.c_str();
}

void sdrt_result_free(sdrt_result *result) { delete result; }
