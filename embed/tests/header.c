/* The header in C99, and the layout that programs were compiled with: a field may be added at the end and nothing moves.
 * The offsets are those of 64-bit machines. */
#include "sdrt.h"

#include <stdio.h>

#define AT(structure, field, offset) \
  if (offsetof(structure, field) != (offset)) return fail(#structure "." #field, offsetof(structure, field))

static int fail(const char *what, size_t found) {
  printf("%s is at %zu\n", what, found);
  return 1;
}

int main(void) {
  if (sizeof(void *) == 8) {
    AT(sdrt_error, message, 20);
    AT(sdrt_open_options, connect_timeout_ms, 32);
    AT(sdrt_open_options, program, 40);
    AT(sdrt_open_options, start_timeout_ms, 56);
    AT(sdrt_open_options, cancellation, 80);
    AT(sdrt_model, height, 28);
    AT(sdrt_progress, timestep, 32);
    AT(sdrt_progress, seed, 56);
    AT(sdrt_progress, pixels_size, 72);
    AT(sdrt_params, width, 48);
    AT(sdrt_params, guidance_scale, 64);
    AT(sdrt_params, seed, 96);
    AT(sdrt_params, preview_interval, 116);
    AT(sdrt_params, cancellation, 136);
    AT(sdrt_params, pixels, 152);
    AT(sdrt_params, latents_offset, 192);
    AT(sdrt_image, seed, 16);
    AT(sdrt_image, parameters, 40);
  }
  sdrt_error error = SDRT_ERROR_INIT;
  sdrt_open_options options = sdrt_default_open_options();
  sdrt_server *server = NULL;
  if (sdrt_open(&options, &server, &error) != SDRT_INVALID_ARGUMENT || server != NULL) {
    return 1;
  }
  if (strcmp(sdrt_status_name((sdrt_status)99), "unknown") != 0) {
    return 1; /* of a later version */
  }
  printf("%s %s: %s\n", sdrt_version(), sdrt_status_name(error.status), error.message);
  return 0;
}
