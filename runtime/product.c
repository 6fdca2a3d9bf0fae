/* Convolutions and products of matrices with weights, in bf16 on the matrix units (AMX) of x86-64 processors.
 *
 * A convolution of 3x3 is a product whose left operand is read from a copy of the input with a border of zeros: at each
 * of the nine offsets 16 pixels next to each other are the rows of a tile. The pixels of all pictures of a batch lie
 * side by side there, so that there are 16 of them in small pictures too. What is done to every number of the result (a
 * bias, the addition of another array, the product with a GELU of its other half) is done before it goes to memory.
 *
 * Weights are packed beforehand: tiles of 32 input channels and 16 outputs, two of them side by side, in the order in
 * which they are needed; of a convolution the nine offsets of 32 channels follow upon each other, for their pixels are
 * in the first cache by then.
 */

#include "kernels.h"

#include <math.h>
#include <string.h>

enum {
    TILE = 16,   /* rows of a tile, and fp32 in each of them */
    PAIRED = 32, /* bf16 in a row */
    TILE_BYTES = 1024,
    BLOCK = 2 * TILE, /* rows and outputs that are computed at once */
    LINE = 64,        /* bytes */
    /* What a thread works on has to stay in the second cache, of 2 MB: the third gives 9 bytes a cycle, memory half of
     * that, and weights are read from there again for each group of rows. */
    COPY_BYTES = 1 << 20,     /* of the input's pixels, where that leaves WANTED_ROWS of them */
    MATRIX_BYTES = 5 << 17,   /* of a matrix, in the channels that are summed at once */
    WANTED_ROWS = 512,
    LONGEST_PIXELS = 160,     /* steps of 32 channels that are summed at once, of pixels */
    LONG_PIXELS = 72,         /* the same if there are more */
    LONG_ROWS = 40,           /* the same of a matrix */
    PANELS = 4,               /* of 32 outputs, whose sums wait for the next channels */
    WORTH_A_THREAD = 1 << 21, /* products */
};

enum { DOUBLED = 2, HALVED = -2 }; /* how the picture is resized */

typedef struct {
    const uint16_t *x;        /* [batch, height, width, channels] */
    const uint8_t *weights;   /* [outputs / 32][steps][2] tiles */
    const float *bias;        /* [batch or 1, outputs] */
    const uint16_t *residual; /* as y, or none */
    uint16_t *y;              /* [batch, to_height, to_width, outputs, or half of them with GELU] */
    int64_t batch, height, width, channels, outputs, side, resize, bias_stride;
    int gated;
    int64_t to_height, to_width;  /* of the result */
    int64_t down, line;           /* lines of the copy for one of the result; pixels in one of them */
    int64_t stride;               /* bytes from one pixel, or row of a matrix, to the next */
    int64_t lines, groups, parts; /* of the result in a group, groups, and what the outputs of one are cut into */
    int64_t steps, pauses;        /* of 32 channels, and what these are cut into */
    atomic_int failed;
} job_t;

/* Where a row of a block goes: a pixel of the result, or none, and its bias. */
typedef struct {
    int64_t pixel, bias;
} row_t;

typedef struct {
    uint8_t *copy;
    const uint8_t **tiles; /* where each 16 rows of the left operand begin */
    row_t *rows;
    float *sums; /* [PANELS][blocks][32][32], or two of the last two dimensions */
    int64_t *offsets;
    /* A block that is summed and yet to be finished, which is done row by row beside the products of the next. */
    const float *done;
    const row_t *done_rows;
    int64_t done_first, done_row;
    /* The weights that come next, fetched into the second cache meanwhile; of each step so many lines by each block. */
    const uint8_t *ahead;
    int64_t ahead_each;
} space_t;

/* x times the normal distribution's integral up to x: Abramowitz and Stegun, 7.1.26, within 1.5e-7 but for the power
 * and the reciprocal, which are within 7.5e-5. */
INLINE __m512 gelu(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps((float)M_SQRT1_2)), one = _mm512_set1_ps(1);
    const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    const __m512 falling = exp2_of(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-(float)M_LOG2E)));
    const __m512 beyond = _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_mul_ps(_mm512_mul_ps(sum, t), falling));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_mov_ps(_mm512_sub_ps(one, beyond), negative, beyond));
}

/* Finish a row of the block that is summed. */
INLINE void finish_row(const job_t *job, space_t *space, const int gated) {
    const int64_t m = space->done_row++, first = space->done_first;
    const row_t row = space->done_rows[m];
    if (row.pixel < 0) return;
    const float *sums = space->done + m * BLOCK, *bias = job->bias + row.bias + first;
    const int64_t at = gated ? row.pixel * (job->outputs / 2) + first / 2 : row.pixel * job->outputs + first;
    __m512 left = _mm512_add_ps(_mm512_load_ps(sums), _mm512_loadu_ps(bias));
    __m512 right = _mm512_add_ps(_mm512_load_ps(sums + TILE), _mm512_loadu_ps(bias + TILE));
    if (gated) {
        left = _mm512_mul_ps(left, gelu(right));
        _mm256_storeu_si256((void *)(job->y + at), (__m256i)_mm512_cvtneps_pbh(left));
        return;
    }
    if (job->residual) {
        left = _mm512_add_ps(left, load_bf16(job->residual + at));
        right = _mm512_add_ps(right, load_bf16(job->residual + at + TILE));
    }
    _mm512_storeu_si512(job->y + at, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

/* A block of 32 rows and 32 outputs over `count` steps, added to the sums or in their place. */
INLINE void multiply(const job_t *job, space_t *space, float *sums, int64_t block, int64_t from, int64_t count,
                     const uint8_t *weights, int add, const int gated) {
    const uint8_t *upper = space->tiles[2 * block], *lower = space->tiles[2 * block + 1];
    const int64_t *offsets = space->offsets + from, stride = job->stride;
    const int64_t rows = (BLOCK + count - 1) / count;
    const uint8_t *ahead = space->ahead + block * space->ahead_each * LINE;
    const int64_t ahead_each = block * space->ahead_each < 2 * TILE_BYTES / LINE ? space->ahead_each : 0;
    if (add) {
        _tile_loadd(0, sums, BLOCK * 4);
        _tile_loadd(1, sums + TILE, BLOCK * 4);
        _tile_loadd(2, sums + TILE * BLOCK, BLOCK * 4);
        _tile_loadd(3, sums + TILE * BLOCK + TILE, BLOCK * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < count; s++, weights += 2 * TILE_BYTES) {
        _tile_loadd(4, upper + offsets[s], stride);
        _tile_loadd(6, weights, LINE);
        _tile_loadd(7, weights + TILE_BYTES, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + offsets[s], stride);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int64_t i = 0; i < rows && space->done_row < BLOCK; i++) finish_row(job, space, gated);
        for (int64_t i = 0; i < ahead_each; i++) _mm_prefetch((const char *)ahead + i * LINE, _MM_HINT_T1);
        ahead += 2 * TILE_BYTES;
    }
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(1, sums + TILE, BLOCK * 4);
    _tile_stored(2, sums + TILE * BLOCK, BLOCK * 4);
    _tile_stored(3, sums + TILE * BLOCK + TILE, BLOCK * 4);
}

/* Copy a pixel of each picture: [batch][channels], with zeros for those beyond the border. */
INLINE uint8_t *copy_pixel(const job_t *job, uint8_t *copy, int64_t y, int64_t x) {
    const int twice = job->resize == DOUBLED; /* as high and as wide, that is */
    const int inside = y >= 0 && y < job->height << twice && x >= 0 && x < job->width << twice;
    for (int64_t b = 0; b < job->batch; b++, copy += job->stride) {
        const int64_t pixel = (b * job->height + (y >> twice)) * job->width + (x >> twice);
        const uint8_t *from = (const uint8_t *)(job->x + pixel * job->channels);
        for (int64_t i = 0; i < job->channels * 2; i += LINE)
            _mm512_store_si512(copy + i, inside ? _mm512_loadu_si512(from + i) : _mm512_setzero_si512());
    }
    return copy;
}

/* Copy what a group is computed from: lines of [line][batch][channels], first to last with a border. Where only every
 * second pixel is computed, those with an even number in their line come before the others, so that pixels for the
 * same offset lie beside each other. */
TARGET static void copy_lines(const job_t *job, uint8_t *copy, int64_t first, int64_t lines) {
    const int64_t step = job->down, begin = step * first - 1;
    for (int64_t y = begin; y < begin + step * (lines - 1) + 3; y++)
        for (int64_t parity = 0; parity < step; parity++)
            for (int64_t x = parity; x < job->line; x += step) copy = copy_pixel(job, copy, y, x - 1);
}

/* Find the tiles of a group of a convolution, and where their rows go; no tile has rows of two lines. */
TARGET static int64_t lay_out_lines(const job_t *job, const space_t *space, int64_t first, int64_t lines) {
    const int64_t row = job->to_width * job->batch;
    int64_t count = 0;
    for (int64_t y = 0; y < lines; y++)
        for (int64_t e = 0; e < row; e += TILE, count++) {
            space->tiles[count] = space->copy + (job->down * y * job->line * job->batch + e) * job->stride;
            for (int64_t i = 0; i < TILE; i++) {
                const int64_t x = (e + i) / job->batch, b = (e + i) % job->batch;
                const int64_t pixel = e + i < row ? (b * job->to_height + first + y) * job->to_width + x : -1;
                space->rows[count * TILE + i] = (row_t){pixel, b * job->bias_stride};
            }
        }
    return count;
}

/* Steps to a pixel's neighbour at an offset of 0 to 2 down and to the right, from the one above and to the left. */
static int64_t neighbour(const job_t *job, int64_t down, int64_t right) {
    const int64_t beside = job->down == 1 ? right : right % 2 * ((job->line + 1) / 2) + right / 2;
    return (down * job->line + beside) * job->batch;
}

/* The same for rows of a matrix, which are read where they are, but for the last 16 if there are fewer. */
TARGET static int64_t lay_out_rows(const job_t *job, const space_t *space, int64_t first, int64_t lines) {
    const int64_t pixels = job->height * job->width, all = job->batch * pixels;
    int64_t count = 0;
    for (int64_t at = first; at < first + lines && at < all; at += TILE, count++) {
        space->tiles[count] = (const uint8_t *)(job->x + at * job->channels);
        if (at + TILE > all) {
            memset(space->copy, 0, (size_t)(TILE * job->stride));
            memcpy(space->copy, space->tiles[count], (size_t)((all - at) * job->stride));
            space->tiles[count] = space->copy;
        }
        for (int64_t i = 0; i < TILE; i++) {
            const int64_t pixel = at + i < all ? at + i : -1;
            space->rows[count * TILE + i] = (row_t){pixel, (at + i) / pixels * job->bias_stride};
        }
    }
    return count;
}

INLINE void work_in(const job_t *job, space_t *space, int index, int threads, const int gated) {
    const int64_t panels = job->outputs / BLOCK;
    int64_t tiles = 0, laid_out = -1;
    space->done_row = BLOCK;
    /* The same thread has the same rows each time, and what it wrote of them last may still be in its cache. */
    const int64_t units = job->groups * job->parts;
    for (int64_t unit = units * index / threads; unit < units * (index + 1) / threads; unit++) {
        const int64_t group = unit / job->parts, part = unit % job->parts, first = group * job->lines;
        if (laid_out != group) {
            /* What is not finished has its rows in the same place. */
            while (space->done_row < BLOCK) finish_row(job, space, gated);
            if (job->side == 1) {
                tiles = lay_out_rows(job, space, first, job->lines);
            } else {
                const int64_t left = job->to_height - first, lines = left < job->lines ? left : job->lines;
                copy_lines(job, space->copy, first, lines);
                tiles = lay_out_lines(job, space, first, lines);
            }
            if (tiles % 2) {
                space->tiles[tiles] = space->tiles[tiles - 1];
                for (int64_t i = 0; i < TILE; i++) space->rows[tiles * TILE + i].pixel = -1;
            }
            laid_out = group;
        }
        const int64_t blocks = (tiles + 1) / 2, pauses = job->pauses;
        const int64_t begin = panels * part / job->parts, end = panels * (part + 1) / job->parts;
        for (int64_t set = begin; set < end; set += PANELS)
            for (int64_t p = 0; p < pauses; p++)
                for (int64_t n = set; n < set + PANELS && n < end; n++) {
                    const int64_t from = job->steps * p / pauses, to = job->steps * (p + 1) / pauses;
                    const uint8_t *weights = job->weights + (n * job->steps + from) * 2 * TILE_BYTES;
                    /* What comes next, or what is beyond the end, which does no harm. */
                    const int64_t n_after = n + 1 < set + PANELS && n + 1 < end ? n + 1 : p + 1 < pauses ? set : n + 1;
                    const int64_t p_after = n_after == n + 1 && n + 1 < set + PANELS ? p : p + 1 < pauses ? p + 1 : 0;
                    space->ahead =
                        job->weights + (n_after * job->steps + job->steps * p_after / pauses) * 2 * TILE_BYTES;
                    space->ahead_each = n_after == panels ? 0 : (2 * TILE_BYTES / LINE + blocks - 1) / blocks;
                    for (int64_t b = 0; b < blocks; b++) {
                        float *sums = space->sums + (pauses > 1 ? (n - set) * blocks + b : b % 2) * BLOCK * BLOCK;
                        multiply(job, space, sums, b, from, to - from, weights, p > 0, gated);
                        if (p + 1 < pauses) continue;
                        while (space->done_row < BLOCK) finish_row(job, space, gated);
                        space->done = sums;
                        space->done_rows = space->rows + b * BLOCK;
                        space->done_first = n * BLOCK;
                        space->done_row = 0;
                    }
                }
    }
    while (space->done_row < BLOCK) finish_row(job, space, gated);
}

TARGET static void work(void *given, int index, int threads) {
    job_t *job = given;
    const int matrix = job->side == 1;
    const int64_t in_line = (job->to_width * job->batch + TILE - 1) / TILE;
    const int64_t tiles = matrix ? job->lines / TILE : job->lines * in_line;
    const int64_t blocks = (tiles + 1) / 2;
    const int64_t copied = matrix ? TILE : (job->down * (job->lines - 1) + 3) * job->line * job->batch + TILE;
    space_t space;
    struct {
        void **part;
        int64_t bytes;
    } parts[] = {
        {(void **)&space.copy, copied * job->stride},
        {(void **)&space.sums, (job->pauses > 1 ? PANELS * blocks : 2) * BLOCK * BLOCK * 4},
        {(void **)&space.tiles, 2 * blocks * (int64_t)sizeof *space.tiles},
        {(void **)&space.rows, BLOCK * blocks * (int64_t)sizeof *space.rows},
        {(void **)&space.offsets, job->steps * (int64_t)sizeof *space.offsets},
    };
    enum { COUNT = sizeof parts / sizeof *parts };
    int64_t bytes = 0;
    for (int i = 0; i < COUNT; i++) bytes += parts[i].bytes = (parts[i].bytes + LINE - 1) / LINE * LINE;
    char *memory = memory_of_thread((size_t)bytes);
    if (!memory) {
        atomic_store(&job->failed, 1);
        return;
    }
    char *at = memory;
    for (int i = 0; i < COUNT; at += parts[i++].bytes) *parts[i].part = at;
    for (int64_t s = 0; s < job->steps; s++) {
        const int64_t taps = job->side * job->side, y = s % taps / job->side, x = s % taps % job->side;
        space.offsets[s] = s / taps * LINE + (matrix ? 0 : neighbour(job, y, x) * job->stride);
    }
    configure_tiles();
    if (job->gated)
        work_in(job, &space, index, threads, 1);
    else
        work_in(job, &space, index, threads, 0);
    _tile_release();
}

/* Convolve x [batch, height, width, channels] with weights of `side` times `side`, 1 or 3, and a border of zeros; or,
 * with a side of 1, multiply as many rows as there are pixels. `resize` is 1, 2 where x is first twice as high and
 * wide, each pixel of it four times, or -2 where only every second pixel is computed both ways; those two are for a
 * side of 3. The result gets a bias [`biases` = batch or 1, outputs] and, if there is one and it is not gated, a
 * residual of the same shape. With `gated`, 16 values and 16 gates take turns among the outputs, and the result is
 * values * gelu(gates), half as many. All but the bias are bf16, numbers of channels and outputs multiples of 32, x
 * and weights aligned to 64 bytes for speed alone, and weights packed by sdrt_pack. Up to `threads` threads, the
 * caller among them. 0, or -1 for want of memory. */
int sdrt_product(const uint16_t *x, const uint8_t *weights, const float *bias, const uint16_t *residual, uint16_t *y,
                 int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t side,
                 int64_t resize, int64_t biases, int gated, int threads) {
    job_t job = {.x = x, .weights = weights, .bias = bias, .residual = residual, .y = y, .batch = batch,
                 .height = height, .width = width, .channels = channels, .outputs = outputs, .side = side,
                 .resize = resize, .bias_stride = biases > 1 ? outputs : 0, .gated = gated};
    job.to_height = resize == DOUBLED ? 2 * height : resize == HALVED ? (height + 1) / 2 : height;
    job.to_width = resize == DOUBLED ? 2 * width : resize == HALVED ? (width + 1) / 2 : width;
    job.down = resize == HALVED ? 2 : 1;
    job.line = job.down * (job.to_width - 1) + 3;
    job.steps = side * side * channels / PAIRED;
    const int64_t pixels = batch * job.to_height * job.to_width;
    const int64_t worth = pixels * channels * side * side * outputs / WORTH_A_THREAD + 1;
    if (threads > worth) threads = (int)worth;
    const int64_t across = job.to_width * batch, all = side == 1 ? pixels : job.to_height;
    int64_t least; /* lines in a group */
    if (side == 1) {
        job.pauses = (job.steps + LONG_ROWS - 1) / LONG_ROWS;
        job.stride = channels * 2;
        job.lines = MATRIX_BYTES * job.pauses / job.stride / BLOCK * BLOCK;
        least = WANTED_ROWS / 4;
    } else {
        job.pauses = job.steps <= LONGEST_PIXELS ? 1 : (job.steps + LONG_PIXELS - 1) / LONG_PIXELS;
        job.stride = (channels * 2 / LINE | 1) * LINE; /* an odd number of lines, so that pixels use all of the cache */
        job.lines = COPY_BYTES / (job.down * job.line * batch * job.stride) - 2;
        const int64_t wanted = (WANTED_ROWS + across - 1) / across;
        if (job.lines < wanted) job.lines = wanted;
        least = (WANTED_ROWS / 4 + across - 1) / across;
    }
    /* As many groups as there are threads, or a multiple, unless they become too small. */
    const int64_t each = (all + threads - 1) / threads, rounds = (each + job.lines - 1) / job.lines;
    const int64_t even = (all + rounds * threads - 1) / (rounds * threads);
    if (even < job.lines) job.lines = even < least ? least : even;
    if (side == 1) job.lines = (job.lines + BLOCK - 1) / BLOCK * BLOCK;
    if (side != 1 && job.lines > all) job.lines = all;
    job.groups = (all + job.lines - 1) / job.lines;
    job.parts = job.groups >= threads ? 1 : threads;
    if (job.parts > outputs / BLOCK) job.parts = outputs / BLOCK;
    run_on_threads(work, &job, threads);
    return atomic_load(&job.failed) ? -1 : 0;
}
