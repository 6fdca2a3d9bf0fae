/* A picture from C: sdrt-picture BUNDLE PROMPT OUT.ppm [SEED]
 *
 * BUNDLE is a bundle's name or folder, for which a server is started, or unix:PATH or HOST:PORT of one that runs. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sdrt.h"

static int show_step(const sdrt_progress *progress, void *user) {
  (void)user;
  if (progress->event == SDRT_STEP) {
    fprintf(stderr, "\rstep %" PRIu32 " of %" PRIu32, progress->step, progress->total);
  }
  return 0; /* anything else cancels */
}

static int save(const char *path, const sdrt_image *image) {
  FILE *const file = fopen(path, "wb");
  if (file == NULL) {
    perror(path);
    return 1;
  }
  fprintf(file, "P6\n%" PRIu32 " %" PRIu32 "\n255\n", image->width, image->height);
  const size_t written = fwrite(image->pixels, 1, image->pixels_size, file);
  if (fclose(file) != 0 || written != image->pixels_size) {
    perror(path);
    return 1;
  }
  return 0;
}

int main(int count, char **words) {
  if (count < 4 || count > 5) {
    fprintf(stderr, "usage: %s BUNDLE|unix:PATH|HOST:PORT PROMPT OUT.ppm [SEED]\n", words[0]);
    return 2;
  }
  sdrt_error error = SDRT_ERROR_INIT;
  sdrt_open_options options = sdrt_default_open_options();
  if (strchr(words[1], ':') != NULL) {
    options.address = words[1];
  } else {
    options.bundle = words[1];
  }
  sdrt_server *server = NULL;
  if (sdrt_open(&options, &server, &error) != SDRT_OK) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }

  sdrt_params params = sdrt_default_params();
  params.prompt = words[2];
  params.steps = 20;
  params.progress = show_step;
  if (count == 5) {
    params.seed = strtoull(words[4], NULL, 10);
    params.has_seed = 1;
  }
  int failed = 1;
  sdrt_result *result = NULL;
  if (sdrt_generate(server, &params, &result, &error) == SDRT_OK) {
    sdrt_image image = sdrt_default_image();
    sdrt_result_image(result, 0, &image);
    fprintf(stderr, "\n");
    failed = save(words[3], &image);
    if (!failed) {
      printf("%s (seed %" PRIu64 ")\n", words[3], image.seed);
    }
  } else {
    fprintf(stderr, "\n%s: %s\n", sdrt_status_name(error.status), error.message);
  }
  sdrt_result_free(result);
  sdrt_close(server);
  return failed;
}
