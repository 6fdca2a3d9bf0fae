/* sdrt: pictures from prompts, for C and C++ programs.
 *
 * The library is a client of `sdrt serve`. It connects to a server that runs already, or it starts one of its own on
 * a private Unix socket and ends it again. No Python comes into the caller's process.
 *
 * Threads. Every function may be called from any thread at any time, and several threads may use one handle at once,
 * with the one exception that is common: what is freed or closed must not be used any more, by any thread. sdrt_close
 * is kinder than that: calls that run at that moment end with SDRT_CLOSED before it returns.
 *
 * Structures begin with their own size, which the functions sdrt_default_...() and the macro SDRT_ERROR_INIT fill in.
 * They may grow at the end, and a zero in a field means that it is left to the library; so a program that was compiled
 * with an older header works with a newer library. One compiled with a newer header works with an older library as
 * long as it leaves fields alone that the library does not know; otherwise it is told so.
 *
 * Errors. Functions that can fail return a status. Those that take an `error` fill it in if it is not NULL: on
 * success with SDRT_OK and an empty text. Nothing is kept in global or thread-local variables.
 *
 * Strings are UTF-8 and end with a NUL. Those given to the library are read during the call and not kept.
 *
 * Signals. The library installs no handler, sends no SIGPIPE and goes on after EINTR. sdrt_cancel alone may be called
 * from a handler. Handles are not for the child of a fork, but for being freed there, which leaves the parent's alone.
 */
#ifndef SDRT_H
#define SDRT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#error "sdrt is a library for Linux"
#elif defined(__GNUC__)
#define SDRT_API __attribute__((visibility("default")))
#else
#define SDRT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Counts what is added to this header. */
#define SDRT_API_LEVEL 1

/* What became of a call. Later versions may add to it. */
typedef enum sdrt_status {
  SDRT_OK = 0,
  SDRT_INVALID_ARGUMENT = 1, /* a parameter makes no sense, here or to the server; the message says which */
  SDRT_NOT_FOUND = 2,        /* there is no such model, or no sdrt server behind the address */
  SDRT_UNAUTHORIZED = 3,     /* the key is missing or wrong, or the server is not called by that name */
  SDRT_QUEUE_FULL = 4,       /* the server has no place for it: try again after retry_after_s */
  SDRT_UNAVAILABLE = 5,      /* the server loads or is about to end: try again after retry_after_s */
  SDRT_OUT_OF_MEMORY = 6,    /* here, or on the server's machine or GPU */
  SDRT_SERVER_ERROR = 7,     /* the server failed */
  SDRT_CANCELLED = 8,        /* by sdrt_cancel, or by the progress function */
  SDRT_TIMEOUT = 9,          /* it took longer than allowed */
  SDRT_CONNECTION = 10,      /* the server cannot be reached, or the connection broke */
  SDRT_PROTOCOL = 11,        /* the answer is none of an sdrt server, or of one too old or too new */
  SDRT_START_FAILED = 12,    /* a server could not be started, for want of the program or the bundle, say */
  SDRT_SERVER_DIED = 13,     /* the server that the library had started has ended: open another */
  SDRT_CLOSED = 14,          /* sdrt_close was called meanwhile */
  SDRT_SYSTEM = 15           /* the operating system refused something */
} sdrt_status;

/* What went wrong. */
typedef struct sdrt_error {
  size_t struct_size;
  sdrt_status status;
  int32_t http_status;    /* of the server's answer; 0 if there was none */
  uint32_t retry_after_s; /* when to try again; 0 if nobody knows */
  char message[1020];     /* one line: what was found, what was expected, what to do; never NULL, cut if need be */
} sdrt_error;

/* sdrt_error error = SDRT_ERROR_INIT; */
#define SDRT_ERROR_INIT {sizeof(sdrt_error), SDRT_OK, 0, 0, {0}}

typedef struct sdrt_server sdrt_server;             /* a server, near or far */
typedef struct sdrt_models sdrt_models;             /* what it can make pictures with */
typedef struct sdrt_result sdrt_result;             /* pictures, and how they were made */
typedef struct sdrt_cancellation sdrt_cancellation; /* a way to stop calls from another thread */
typedef struct sdrt_buffer sdrt_buffer;             /* memory that is shared with the server */

/* The library's version, such as "0.1.0". */
SDRT_API const char *sdrt_version(void);

/* The SDRT_API_LEVEL that the library was compiled with. */
SDRT_API uint32_t sdrt_api_level(void);

/* A status in words, such as "queue full"; never NULL. */
SDRT_API const char *sdrt_status_name(sdrt_status status);

/* ---- A server ------------------------------------------------------------------------------------------------ */

/* Called with each line that a server of the library's own writes to its standard error, without the newline, from a
 * thread of the library's. It must not call sdrt_close on that server. */
typedef void (*sdrt_log_fn)(const char *line, void *user);

typedef struct sdrt_open_options {
  size_t struct_size;
  /* One of these two, and not both. */
  const char *address; /* "127.0.0.1:7860", "[::1]:7860", "http://host:port", "/path/of.sock" or "unix:/path/of.sock" */
  const char *bundle;  /* a bundle's name or folder: a server is started that has it alone */
  const char *api_key; /* by default SDRT_API_KEY of the environment, if it is set */

  uint32_t connect_timeout_ms; /* by default 10,000 */
  uint32_t silence_timeout_ms; /* a server that says nothing for so long is taken to hang; by default 60,000 */

  /* For a server of the library's own. */
  const char *program;          /* by default SDRT_PROGRAM of the environment, else sdrt, found on PATH */
  const char *const *arguments; /* further options of `sdrt serve`, such as "--at-once", "8", and a NULL at the end */
  uint32_t start_timeout_ms;    /* until it is ready, by default 600,000: engines may have to be compiled */
  uint32_t reserved;            /* zero */
  sdrt_log_fn log;              /* or NULL */
  void *log_user;

  sdrt_cancellation *cancellation; /* stops the opening; or NULL */
} sdrt_open_options;

static inline sdrt_open_options sdrt_default_open_options(void) {
  sdrt_open_options options;
  memset(&options, 0, sizeof options);
  options.struct_size = sizeof options;
  return options;
}

/* Opens a server and waits until it is ready.
 *
 * With `address` one round trip finds out whether a server answers there; it may still be loading its models, and
 * what is asked of it then ends with SDRT_UNAVAILABLE. With `bundle` a process is started that has none of this
 * process's descriptors, default signal handling and a process group of its own; it ends with this process whatever
 * becomes of it. `*server` is the caller's, to be closed with sdrt_close; NULL unless SDRT_OK is returned. */
SDRT_API sdrt_status sdrt_open(const sdrt_open_options *options, sdrt_server **server, sdrt_error *error);

/* Closes a server. Calls that use it in other threads end with SDRT_CLOSED; then a server of the library's own is
 * ended, by force if it has not ended after ten seconds. NULL is allowed. What it gave stays valid. Not to be called
 * from a progress or log function. */
SDRT_API void sdrt_close(sdrt_server *server);

/* The process id of a server of the library's own; 0 for others. */
SDRT_API int64_t sdrt_server_process(const sdrt_server *server);

/* ---- Models -------------------------------------------------------------------------------------------------- */

typedef struct sdrt_model {
  size_t struct_size;
  const char *name;   /* valid as long as the list */
  int64_t created;    /* seconds since 1970 */
  uint32_t width;     /* in pixels, of a picture for which none is asked */
  uint32_t height;
} sdrt_model;

static inline sdrt_model sdrt_default_model(void) {
  sdrt_model model;
  memset(&model, 0, sizeof model);
  model.struct_size = sizeof model;
  return model;
}

/* Lists the server's models; the first is what requests get that name none. `*models` is the caller's, to be freed
 * with sdrt_models_free; NULL unless SDRT_OK is returned. */
SDRT_API sdrt_status sdrt_list_models(sdrt_server *server, sdrt_models **models, sdrt_error *error);

/* How many there are; 0 for NULL. */
SDRT_API size_t sdrt_models_count(const sdrt_models *models);

/* Fills in one of them. Returns SDRT_INVALID_ARGUMENT if there is no such one. */
SDRT_API sdrt_status sdrt_models_get(const sdrt_models *models, size_t index, sdrt_model *model);

/* Frees a list. NULL is allowed. */
SDRT_API void sdrt_models_free(sdrt_models *models);

/* ---- Cancelling ---------------------------------------------------------------------------------------------- */

/* Makes a way to stop calls: named in their parameters, and fired with sdrt_cancel. `*cancellation` is the caller's,
 * to be freed with sdrt_cancellation_free when no call uses it any more. */
SDRT_API sdrt_status sdrt_cancellation_create(sdrt_cancellation **cancellation, sdrt_error *error);

/* Stops every call that uses it, now and later; they end with SDRT_CANCELLED, and the server's work for them stops
 * within one step. May be called from any thread and from signal handlers, any number of times. NULL is allowed. */
SDRT_API void sdrt_cancel(sdrt_cancellation *cancellation);

/* Frees it. NULL is allowed. */
SDRT_API void sdrt_cancellation_free(sdrt_cancellation *cancellation);

/* ---- Shared memory ------------------------------------------------------------------------------------------- */

/* Makes a POSIX shared memory object of so many bytes, zeros, that is this user's alone, and maps it. A server on the
 * same machine and of the same user that was started with --allow-shared-memory, as the library's own are, writes
 * pictures there and reads latents from there. `*buffer` is the caller's, to be freed with sdrt_buffer_free. */
SDRT_API sdrt_status sdrt_buffer_create(size_t size, sdrt_buffer **buffer, sdrt_error *error);

/* Maps a POSIX shared memory object that the caller has made with shm_open; `name` is its name, such as "/pixels". It
 * has to be as large as `size` at least, and to stay so. The object itself is left to the caller. */
SDRT_API sdrt_status sdrt_buffer_attach(const char *name, size_t size, sdrt_buffer **buffer, sdrt_error *error);

/* Its first byte, as mapped here, and its size. Valid until it is freed. */
SDRT_API void *sdrt_buffer_data(const sdrt_buffer *buffer);
SDRT_API size_t sdrt_buffer_size(const sdrt_buffer *buffer);

/* Unmaps the memory, and removes the object if sdrt_buffer_create has made it. Results whose pixels lie in it must not
 * be read any more. NULL is allowed. */
SDRT_API void sdrt_buffer_free(sdrt_buffer *buffer);

/* ---- Pictures ------------------------------------------------------------------------------------------------ */

typedef enum sdrt_event {
  SDRT_ACCEPTED = 1, /* the server will make it; width, height, total (steps), count (pictures) and waiting are known */
  SDRT_STEP = 2,     /* a step of a picture is done; step, total, timestep and seconds are known */
  SDRT_PREVIEW = 3,  /* the picture as the model takes it to become; step, total, width, height and pixels are known */
  SDRT_IMAGE = 4     /* a picture is finished; width, height, seed and pixels are known */
} sdrt_event;

/* What a progress function is told. Fields that are not known are zero. */
typedef struct sdrt_progress {
  size_t struct_size; /* of the library's structure: fields beyond it are not there */
  sdrt_event event;
  uint32_t image;  /* which of the pictures, from 0 */
  uint32_t count;  /* of pictures */
  uint32_t step;   /* steps done, from 1 */
  uint32_t total;  /* steps there will be */
  uint32_t waiting; /* pictures that waited when these were accepted */
  double timestep; /* what the network was given */
  double seconds;  /* that the step took */
  uint32_t width;
  uint32_t height;
  uint64_t seed;
  const uint8_t *pixels; /* RGB, 8 bits each, rows from the top, without gaps; valid during the call alone */
  size_t pixels_size;
} sdrt_progress;

/* Called from sdrt_generate, in the thread that called it. Return 0 to go on; anything else cancels. It must not throw
 * or jump out. */
typedef int (*sdrt_progress_fn)(const sdrt_progress *progress, void *user);

/* For sdrt_params.clip_skip: no layer is left out, even if the bundle was built otherwise. */
#define SDRT_CLIP_SKIP_NONE (-1)

typedef struct sdrt_params {
  size_t struct_size;
  const char *prompt; /* what the picture shall show; it has to be given */
  const char *negative_prompt;
  const char *model;   /* by default the server's first */
  const char *sampler; /* such as "euler"; by default the model's own */
  const char *timestep_spacing; /* "leading", "trailing" or "linspace"; by default the sampler's own */
  uint32_t width;               /* in pixels, a multiple of 8; by default the model's own, as height */
  uint32_t height;
  uint32_t steps;  /* by default 50 */
  uint32_t images; /* 1 by default, 10 at most; the server makes them at once where it can */
  double guidance_scale;       /* by default 7.5; 1 or less turns guidance off */
  double guidance_interval[2]; /* approximate: noise levels (sigma) between which there is guidance */
  double eta;                  /* share of ancestral noise of ddim */
  uint64_t seed;               /* of the first picture, if has_seed; the next one's is one more */
  int32_t has_seed;            /* without it the server draws one, which the result tells */
  int32_t clip_skip;           /* last layers of the text encoder to leave out; by default what the bundle says */
  uint32_t cache_interval;     /* approximate: the whole U-Net in every so many steps */
  uint32_t preview_interval;   /* a preview after each so many steps, for the progress function; none by default.
                                  Each costs a decoding; those that come faster than they are read are left out. */
  sdrt_progress_fn progress;
  void *progress_user;
  sdrt_cancellation *cancellation; /* or NULL */
  uint32_t timeout_ms;             /* for all of it; none by default */
  uint32_t encoder_interval;       /* approximate: the encoder in every so many of the steps that run the whole U-Net */

  /* Where the pixels go: one picture after the other, width * height * 3 bytes each. By default the result owns them.
   * They come as they are finished, so what is there after an error is not to be used. */
  void *pixels; /* memory of the caller's, which has to outlive the result's use */
  size_t pixels_size;
  sdrt_buffer *pixels_buffer; /* or shared memory, in which the server itself puts them */
  size_t pixels_offset;       /* from its beginning */

  /* Unit gaussians to start from instead of those of the seed, if there is a buffer: float32 of shape (images, 4,
   * height / 8, width / 8), with width and height given. */
  const sdrt_buffer *latents_buffer;
  size_t latents_offset; /* from its beginning */
} sdrt_params;

static inline sdrt_params sdrt_default_params(void) {
  sdrt_params params;
  memset(&params, 0, sizeof params);
  params.struct_size = sizeof params;
  return params;
}

/* One picture of a result. */
typedef struct sdrt_image {
  size_t struct_size;
  uint32_t width; /* in pixels */
  uint32_t height;
  uint64_t seed;         /* makes the same picture again */
  const uint8_t *pixels; /* RGB, 8 bits each, rows from the top, without gaps: of the result, or where they were asked */
  size_t pixels_size;
  const char *parameters; /* how it was made, as Stable Diffusion web UI writes it into PNGs; of the result */
} sdrt_image;

static inline sdrt_image sdrt_default_image(void) {
  sdrt_image image;
  memset(&image, 0, sizeof image);
  image.struct_size = sizeof image;
  return image;
}

/* Makes pictures, and returns when they are finished or something goes wrong. The pixels are those of the PNG that
 * `sdrt run` writes with the same bundle, backend, seed and settings, whatever else the server has to do. Calls from
 * several threads share the model's steps where that changes no bit. `*result` is the caller's, to be freed with
 * sdrt_result_free; NULL unless SDRT_OK is returned. */
SDRT_API sdrt_status sdrt_generate(sdrt_server *server, const sdrt_params *params, sdrt_result **result,
                                   sdrt_error *error);

/* How many pictures there are; 0 for NULL. */
SDRT_API size_t sdrt_result_count(const sdrt_result *result);

/* Fills in one of them. Returns SDRT_INVALID_ARGUMENT if there is no such one. */
SDRT_API sdrt_status sdrt_result_image(const sdrt_result *result, size_t index, sdrt_image *image);

/* The settings as a JSON object: model, sampler, num_inference_steps, guidance_scale, width, height, seeds, tokens (of
 * the prompts; the model reads 75), seconds, and phases with the seconds of queue, prepare, denoise and decode of each
 * picture. Valid as long as the result; "" for NULL. */
SDRT_API const char *sdrt_result_settings(const sdrt_result *result);

/* Frees a result. NULL is allowed. */
SDRT_API void sdrt_result_free(sdrt_result *result);

#ifdef __cplusplus
}
#endif

#endif
