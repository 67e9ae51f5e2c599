/* Kernels of necks and heads: RoIAlign and convolutions of upsampled maps, forward and backward, and NMS.

   Compiled twice, for AVX-512 and for AVX2; head_kernels.py takes the one that the processor has. Maps are
   channels_last, so that a sample point is a contiguous vector of channels. Coordinates and overlaps are computed as in
   mmcv, operation by operation, whose limits and thresholds they decide: setup.py forbids the compiler to contract them
   to fused multiply-adds.

   Each kernel checks its struct, and returns an error code for what it cannot work with. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* ---- vectors ----------------------------------------------------------------------------------------------------- */

#ifdef __AVX512F__
typedef __m512 f32xn;
enum { LANES = 16, VECS = 8 }; /* VECS: vectors of a pixel that are added up in registers at a time */
INLINE f32xn load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, f32xn v) { _mm512_storeu_ps(p, v); }
INLINE f32xn splat(float x) { return _mm512_set1_ps(x); }
INLINE f32xn multiply_add(f32xn a, f32xn b, f32xn c) { return _mm512_fmadd_ps(a, b, c); }
INLINE f32xn mul(f32xn a, f32xn b) { return _mm512_mul_ps(a, b); }
INLINE f32xn maximum(f32xn a, f32xn b) { return _mm512_max_ps(b, a); } /* NaN of a stays one */
INLINE f32xn load_bf16(const uint16_t *p) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
#else
typedef __m256 f32xn;
enum { LANES = 8, VECS = 4 };
INLINE f32xn load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, f32xn v) { _mm256_storeu_ps(p, v); }
INLINE f32xn splat(float x) { return _mm256_set1_ps(x); }
INLINE f32xn multiply_add(f32xn a, f32xn b, f32xn c) { return _mm256_fmadd_ps(a, b, c); }
INLINE f32xn mul(f32xn a, f32xn b) { return _mm256_mul_ps(a, b); }
INLINE f32xn maximum(f32xn a, f32xn b) { return _mm256_max_ps(b, a); }
INLINE f32xn load_bf16(const uint16_t *p) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
#endif

/* ---- arguments --------------------------------------------------------------------------------------------------- */

enum { STRUCT_VERSION = 1, CHANNEL_MULTIPLE = 16 }; /* both stand in head_kernels.py, too */

/* A feature map images x height x width x channels; float, or bfloat16 for the forward pass. scale: that of RoIs'
   coordinates to the map's pixels. */
typedef struct {
    int64_t height, width;
    double scale;
    void *data;
} Level;

/* RoIAlign, average pooling. rois: (image, x1, y1, x2, y2) each; roi_levels: the level that each is taken from.
   features: n_rois x channels x out_height x out_width, or with channels_last n_rois x out_height x out_width x
   channels. Backward: features are their gradients, channels_last; the levels are written, not read. */
typedef struct {
    int64_t version, threads, images, channels, n_levels, n_rois, out_height, out_width, sampling_ratio, aligned, bf16,
        channels_last;
    const Level *levels;
    const float *rois;
    const int64_t *roi_levels;
    float *features;
} RoIAlignArgs;

/* A 3 x 3 convolution of maps that are upsampled bilinearly, images x height x width x channels, once its taps were
   applied before upsampling: levels are images x height x width x 9 x channels, the products of each pixel with the
   3 x 3 taps. Forward: sum becomes base plus their shifted, upsampled sum; with relu negative values become 0.
   Backward: sum is its gradient, base is null, and the levels are written. All in float, or all in bfloat16. */
typedef struct {
    int64_t version, threads, images, channels, height, width, n_levels, align_corners, bf16, relu;
    const Level *levels;
    const void *base;
    void *sum;
} TapSumArgs;

/* What kernels return, 0 for success; convnext_head_error_message has the texts. */
enum { OK, BAD_VERSION, BAD_THREADS, BAD_SIZE, BAD_CHANNELS, BAD_FLAG, NULL_POINTER, BAD_IMAGE, BAD_LEVEL, BAD_ROI,
       NO_MEMORY, MISALIGNED, N_ERRORS };

enum { MAX_SIDE = 1 << 24, MAX_BINS = 1 << 12, MAX_LEVELS = 1 << 12, MAX_ROIS = 1 << 30 };

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static int is_aligned(const void *p, uintptr_t bytes) { return (uintptr_t)p % bytes == 0; }

/* Whether a number of elements is so large that one of bytes might overflow. */
static int is_too_large(double a, double b, double c, double d) { return a * b * c * d >= 0x1p50; }

/* What the structs begin with. */
static int64_t check_common(int64_t version, int64_t threads, int64_t images, int64_t channels, int64_t n_levels) {
    if (version != STRUCT_VERSION) return BAD_VERSION;
    if (threads < 1 || threads > 1 << 16) return BAD_THREADS;
    if (channels < 1 || channels % CHANNEL_MULTIPLE || channels > MAX_SIDE) return BAD_CHANNELS;
    if (images < 1 || images > MAX_SIDE || n_levels < 1 || n_levels > MAX_LEVELS) return BAD_SIZE;
    return OK;
}

static int64_t check_levels(const Level *levels, int64_t n, int64_t images, int64_t channels, uintptr_t element) {
    if (!levels) return NULL_POINTER;
    if (!is_aligned(levels, sizeof(int64_t))) return MISALIGNED;
    for (int64_t i = 0; i < n; i++) {
        if (levels[i].height < 1 || levels[i].height > MAX_SIDE) return BAD_SIZE;
        if (levels[i].width < 1 || levels[i].width > MAX_SIDE) return BAD_SIZE;
        if (is_too_large(images, levels[i].height, levels[i].width, channels)) return BAD_SIZE;
        if (!levels[i].data) return NULL_POINTER;
        if (!is_aligned(levels[i].data, element)) return MISALIGNED;
    }
    return OK;
}

/* ---- RoIAlign ---------------------------------------------------------------------------------------------------- */

/* A RoI in the pixels of its map, with its grid of sample points per bin. */
typedef struct {
    int64_t image;
    const Level *level;
    float x, y, bin_width, bin_height;
    int64_t grid_width, grid_height;
} RoI;

static int64_t read_roi(const RoIAlignArgs *args, int64_t i, RoI *roi) {
    const float *b = args->rois + 5 * i;
    int64_t level = args->roi_levels[i];
    if (level < 0 || level >= args->n_levels) return BAD_LEVEL;
    if (!(b[0] >= 0 && b[0] < (float)args->images)) return BAD_IMAGE;
    roi->image = (int64_t)b[0];
    roi->level = args->levels + level;
    float scale = (float)roi->level->scale, offset = args->aligned ? 0.5f : 0.0f;
    roi->x = b[1] * scale - offset;
    roi->y = b[2] * scale - offset;
    float right = b[3] * scale - offset, bottom = b[4] * scale - offset;
    float width = right - roi->x, height = bottom - roi->y;
    if (!args->aligned) {
        width = width < 1.0f ? 1.0f : width;
        height = height < 1.0f ? 1.0f : height;
    }
    if (!(width >= 0 && height >= 0)) return BAD_ROI; /* NaN too */
    float limit = (float)MAX_SIDE;
    if (!(fabsf(roi->x) < limit && fabsf(roi->y) < limit && width < limit && height < limit)) return BAD_ROI;
    roi->bin_width = width / (float)args->out_width;
    roi->bin_height = height / (float)args->out_height;
    int64_t ratio = args->sampling_ratio;
    roi->grid_width = ratio > 0 ? ratio : (int64_t)ceilf(width / (float)args->out_width);
    roi->grid_height = ratio > 0 ? ratio : (int64_t)ceilf(height / (float)args->out_height);
    return OK;
}

/* A row or column of the map and its weight in a bin. The average of bilinear samples on a grid is separable: that of a
   bin is the sum over its rows and columns of the product of their weights. */
typedef struct {
    int32_t index;
    float weight;
} Tap;

/* Taps of bin i are taps[begin[i]] to taps[begin[i + 1]]. Each index is there at most once in a bin. */
typedef struct {
    int32_t *begin;
    Tap *taps;
} Axis;

INLINE int32_t add_tap(Tap *taps, int32_t first, int32_t n, int32_t index, float weight) {
    for (int32_t i = n - 1; i >= first && i >= n - 2; i--)
        if (taps[i].index == index) {
            taps[i].weight += weight;
            return n;
        }
    taps[n] = (Tap){index, weight};
    return n + 1;
}

static void fill_axis(const Axis *axis, float start, float bin, int64_t grid, int64_t bins, int64_t size, float scale) {
    int32_t n = 0;
    for (int64_t b = 0; b < bins; b++) {
        int32_t first = axis->begin[b] = n;
        for (int64_t i = 0; i < grid; i++) {
            float coord = start + (float)b * bin + ((float)i + .5f) * bin / (float)grid;
            if (coord < -1.0f || coord > (float)size) continue;
            if (coord <= 0) coord = 0;
            int32_t low = (int32_t)coord;
            if (low >= size - 1) {
                n = add_tap(axis->taps, first, n, (int32_t)size - 1, scale);
                continue;
            }
            float fraction = coord - (float)low;
            n = add_tap(axis->taps, first, n, low, (1.0f - fraction) * scale);
            if (fraction > 0) n = add_tap(axis->taps, first, n, low + 1, fraction * scale);
        }
    }
    axis->begin[bins] = n;
}

/* Memory of a thread: the taps of both axes, and the features of a RoI, channels_last. */
typedef struct {
    int64_t axis_bytes[2], features_bytes, total;
} Scratch;

INLINE int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }

static Scratch plan_scratch(const RoIAlignArgs *args) {
    int64_t sides[2] = {0, 0}, bins[2] = {args->out_height, args->out_width};
    for (int64_t i = 0; i < args->n_levels; i++) {
        sides[0] = max_i64(sides[0], args->levels[i].height);
        sides[1] = max_i64(sides[1], args->levels[i].width);
    }
    Scratch s = {{0, 0}, 0, 0};
    for (int i = 0; i < 2; i++)
        s.axis_bytes[i] = round_up((bins[i] + 1) * sizeof(int32_t)) + round_up(bins[i] * sides[i] * sizeof(Tap));
    s.features_bytes = round_up(bins[0] * bins[1] * args->channels * sizeof(float));
    s.total = s.axis_bytes[0] + s.axis_bytes[1] + s.features_bytes;
    return s;
}

static void fill_axes(const RoIAlignArgs *args, const Scratch *plan, char *scratch, const RoI *roi, Axis *y, Axis *x) {
    char *parts[2] = {scratch, scratch + plan->axis_bytes[0]};
    int64_t bins[2] = {args->out_height, args->out_width};
    Axis *axes[2] = {y, x};
    for (int i = 0; i < 2; i++) {
        axes[i]->begin = (int32_t *)parts[i];
        axes[i]->taps = (Tap *)(parts[i] + round_up((bins[i] + 1) * sizeof(int32_t)));
    }
    float inv_count = 1.0f / (float)max_i64(roi->grid_height * roi->grid_width, 1);
    fill_axis(y, roi->y, roi->bin_height, roi->grid_height, args->out_height, roi->level->height, inv_count);
    fill_axis(x, roi->x, roi->bin_width, roi->grid_width, args->out_width, roi->level->width, 1.0f);
}

/* `n` vectors of channels of a bin. */
INLINE void pool(int bf16, int n, const char *map, int64_t width, int64_t channels, const Tap *y, int32_t ny,
                 const Tap *x, int32_t nx, float *out) {
    f32xn sums[VECS];
    int64_t bytes = channels * (bf16 ? 2 : 4);
    for (int v = 0; v < n; v++) sums[v] = splat(0);
    for (int32_t i = 0; i < ny; i++) {
        f32xn row[VECS], weight = splat(y[i].weight);
        for (int v = 0; v < n; v++) row[v] = splat(0);
        for (int32_t k = 0; k < nx; k++) {
            const char *pixel = map + (y[i].index * width + x[k].index) * bytes;
            f32xn w = splat(x[k].weight);
            for (int v = 0; v < n; v++)
                row[v] = multiply_add(w, bf16 ? load_bf16((const uint16_t *)pixel + v * LANES)
                                     : load((const float *)pixel + v * LANES), row[v]);
        }
        for (int v = 0; v < n; v++) sums[v] = multiply_add(weight, row[v], sums[v]);
    }
    for (int v = 0; v < n; v++) store(out + v * LANES, sums[v]);
}

INLINE void pool_roi(int bf16, const RoIAlignArgs *args, const RoI *roi, const Axis *y, const Axis *x, float *out) {
    int64_t c = args->channels, size = bf16 ? 2 : 4, width = roi->level->width;
    const char *map = (const char *)roi->level->data + roi->image * roi->level->height * width * c * size;
    for (int64_t i = 0; i < args->out_height; i++)
        for (int64_t j = 0; j < args->out_width; j++, out += c) {
            const Tap *ty = y->taps + y->begin[i], *tx = x->taps + x->begin[j];
            int32_t ny = y->begin[i + 1] - y->begin[i], nx = x->begin[j + 1] - x->begin[j];
            int64_t k = 0;
            for (; k + VECS * LANES <= c; k += VECS * LANES)
                pool(bf16, VECS, map + k * size, width, c, ty, ny, tx, nx, out + k);
            for (; k < c; k += LANES) pool(bf16, 1, map + k * size, width, c, ty, ny, tx, nx, out + k);
        }
}

/* (area, channels) -> (channels, area), some channels at a time, whose lines stay in the nearest cache. */
static void transpose(const float *src, int64_t area, int64_t channels, float *dst) {
    for (int64_t c = 0; c < channels; c += CHANNEL_MULTIPLE)
        for (int64_t k = c; k < c + CHANNEL_MULTIPLE; k++)
            for (int64_t i = 0; i < area; i++) dst[k * area + i] = src[i * channels + k];
}

static int64_t check_roi_align(const RoIAlignArgs *args) {
    if (!args) return NULL_POINTER;
    if (!is_aligned(args, sizeof(int64_t))) return MISALIGNED;
    int64_t error = check_common(args->version, args->threads, args->images, args->channels, args->n_levels);
    if (error) return error;
    if (args->n_rois < 0 || args->n_rois > MAX_ROIS) return BAD_SIZE;
    if (args->sampling_ratio < 0 || args->sampling_ratio > MAX_BINS) return BAD_SIZE;
    if (args->out_height < 1 || args->out_height > MAX_BINS) return BAD_SIZE;
    if (args->out_width < 1 || args->out_width > MAX_BINS) return BAD_SIZE;
    double features = (double)args->out_height * args->out_width * args->channels;
    if (is_too_large(features, args->n_rois, 1, 1) || is_too_large(features, args->threads, 1, 1)) return BAD_SIZE;
    if (args->aligned >> 1 || args->bf16 >> 1 || args->channels_last >> 1) return BAD_FLAG;
    error = check_levels(args->levels, args->n_levels, args->images, args->channels, args->bf16 ? 2 : 4);
    if (error) return error;
    for (int64_t i = 0; i < args->n_levels; i++) {
        const Level *level = args->levels + i;
        if (level->height * level->width > INT32_MAX || !(level->scale > 0)) return BAD_SIZE;
        if (level->height * args->out_height > INT32_MAX || level->width * args->out_width > INT32_MAX) return BAD_SIZE;
    }
    if (args->n_rois && (!args->rois || !args->roi_levels || !args->features)) return NULL_POINTER;
    if (!is_aligned(args->rois, 4) || !is_aligned(args->roi_levels, 8) || !is_aligned(args->features, 4))
        return MISALIGNED;
    RoI roi;
    for (int64_t i = 0; i < args->n_rois; i++) {
        error = read_roi(args, i, &roi);
        if (error) return error;
    }
    return OK;
}

int64_t convnext_roi_align(const RoIAlignArgs *args) {
    int64_t error = check_roi_align(args);
    if (error) return error;
    Scratch plan = plan_scratch(args);
    char *scratch = aligned_alloc(64, args->threads * plan.total);
    if (!scratch) return NO_MEMORY;
    int64_t area = args->out_height * args->out_width, numel = area * args->channels;
#pragma omp parallel num_threads((int)args->threads)
    {
        char *buffer = scratch + omp_get_thread_num() * plan.total;
        float *rows = (float *)(buffer + plan.axis_bytes[0] + plan.axis_bytes[1]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < args->n_rois; i++) {
            RoI roi;
            Axis y, x;
            float *out = args->features + i * numel;
            read_roi(args, i, &roi);
            fill_axes(args, &plan, buffer, &roi, &y, &x);
            if (args->bf16)
                pool_roi(1, args, &roi, &y, &x, args->channels_last ? out : rows);
            else
                pool_roi(0, args, &roi, &y, &x, args->channels_last ? out : rows);
            if (!args->channels_last) transpose(rows, area, args->channels, out);
        }
    }
    free(scratch);
    return OK;
}

enum { BAND_ROWS = 8 }; /* rows of a map that a thread takes at a time: no two threads write to one pixel */

INLINE int64_t n_bands(const Level *level) { return (level->height + BAND_ROWS - 1) / BAND_ROWS; }

/* Add the gradient of a bin, times the weight of a row, to that row. */
INLINE void scatter_add(int n, const float *grad, float weight, const Tap *x, int32_t nx, int64_t channels,
                        float *row) {
    f32xn g[VECS], w = splat(weight);
    for (int v = 0; v < n; v++) g[v] = mul(w, load(grad + v * LANES));
    for (int32_t k = 0; k < nx; k++) {
        float *pixel = row + x[k].index * channels;
        f32xn wx = splat(x[k].weight);
        for (int v = 0; v < n; v++) store(pixel + v * LANES, multiply_add(wx, g[v], load(pixel + v * LANES)));
    }
}

static void scatter_add_roi(const RoIAlignArgs *args, int64_t i, const RoI *roi, const Axis *y, const Axis *x,
                            int64_t first, int64_t last) {
    int64_t c = args->channels, width = roi->level->width;
    float *map = (float *)roi->level->data + roi->image * roi->level->height * width * c;
    for (int64_t h = 0; h < args->out_height; h++)
        for (const Tap *t = y->taps + y->begin[h]; t < y->taps + y->begin[h + 1]; t++) {
            if (t->index < first || t->index >= last) continue;
            float *row = map + t->index * width * c;
            for (int64_t w = 0; w < args->out_width; w++) {
                const float *grad = args->features + ((i * args->out_height + h) * args->out_width + w) * c;
                const Tap *tx = x->taps + x->begin[w];
                int32_t nx = x->begin[w + 1] - x->begin[w];
                int64_t k = 0;
                for (; k + VECS * LANES <= c; k += VECS * LANES)
                    scatter_add(VECS, grad + k, t->weight, tx, nx, c, row + k);
                for (; k < c; k += LANES) scatter_add(1, grad + k, t->weight, tx, nx, c, row + k);
            }
        }
}

/* Whether the sample points of a RoI may touch rows from `first` to before `last`. */
static int may_overlap(const RoIAlignArgs *args, const RoI *roi, int64_t first, int64_t last) {
    int64_t height = roi->level->height;
    int64_t top = (int64_t)floorf(roi->y) - 1, bottom = (int64_t)ceilf(roi->y + roi->bin_height * args->out_height) + 1;
    top = min_i64(max_i64(top, 0), height - 1);
    bottom = min_i64(max_i64(bottom, 0), height - 1);
    return bottom >= first && top < last;
}

int64_t convnext_roi_align_backward(const RoIAlignArgs *args) {
    int64_t error = check_roi_align(args);
    if (error) return error;
    if (args->bf16 || !args->channels_last) return BAD_FLAG;
    Scratch plan = plan_scratch(args);
    int64_t tasks = 0;
    for (int64_t l = 0; l < args->n_levels; l++) tasks += args->images * n_bands(args->levels + l);
    char *scratch = aligned_alloc(64, args->threads * plan.total);
    if (!scratch) return NO_MEMORY;
#pragma omp parallel num_threads((int)args->threads)
    {
        char *buffer = scratch + omp_get_thread_num() * plan.total;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tasks; t++) {
            int64_t task = t, l = 0, bands;
            for (;; l++) {
                bands = n_bands(args->levels + l);
                if (task < args->images * bands) break;
                task -= args->images * bands;
            }
            const Level *level = args->levels + l;
            int64_t image = task / bands, first = task % bands * BAND_ROWS;
            int64_t last = min_i64(first + BAND_ROWS, level->height), row = level->width * args->channels;
            float *band = (float *)level->data + (image * level->height + first) * row;
            memset(band, 0, (last - first) * row * sizeof(float));
            for (int64_t i = 0; i < args->n_rois; i++) {
                RoI roi;
                Axis y, x;
                if (args->roi_levels[i] != l) continue;
                read_roi(args, i, &roi);
                if (roi.image != image || !may_overlap(args, &roi, first, last)) continue;
                fill_axes(args, &plan, buffer, &roi, &y, &x);
                scatter_add_roi(args, i, &roi, &y, &x, first, last);
            }
        }
    }
    free(scratch);
    return OK;
}

/* ---- convolutions of upsampled maps ------------------------------------------------------------------------------ */

enum { CONV_K = 3, C_BLOCK = 64, ROW_BLOCK = 8 }; /* channels and rows that a thread takes at a time */

/* For an output position and a tap, the two positions of the level that the tap's position lies between, and their
   weights; weights of 0 beyond the border. */
typedef struct {
    int32_t low, high;
    float low_weight, high_weight;
} Source;

/* `out_size` x CONV_K sources, as torch interpolates. */
static void fill_sources(Source *sources, int64_t out_size, int64_t in_size, int64_t align_corners) {
    float scale = (float)in_size / (float)out_size;
    if (align_corners) scale = out_size > 1 ? (float)(in_size - 1) / (float)(out_size - 1) : 0.0f;
    for (int64_t i = 0; i < out_size; i++)
        for (int64_t k = 0; k < CONV_K; k++) {
            int64_t pos = i + k - 1;
            Source *s = sources + i * CONV_K + k;
            *s = (Source){0, 0, 0.0f, 0.0f};
            if (pos < 0 || pos >= out_size) continue;
            float source = align_corners ? scale * (float)pos : scale * ((float)pos + 0.5f) - 0.5f;
            source = source < 0 ? 0 : source;
            s->low = (int32_t)min_i64((int64_t)source, in_size - 1);
            s->high = (int32_t)min_i64(s->low + 1, in_size - 1);
            s->high_weight = source - (float)s->low;
            s->low_weight = 1.0f - s->high_weight;
        }
}

INLINE f32xn load_elem(int bf16, const void *p, int64_t i) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE void store_elem(int bf16, void *p, int64_t i, f32xn v) {
    if (!bf16) {
        store((float *)p + i, v);
        return;
    }
    float values[LANES];
    uint32_t bits[LANES];
    store(values, v);
    memcpy(bits, values, sizeof(bits));
    for (int k = 0; k < LANES; k++) { /* to nearest, ties to even; NaN stays one */
        uint32_t b = bits[k], rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        ((uint16_t *)p)[i + k] = (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? b >> 16 | 64 : rounded);
    }
}

static int64_t check_tap_sum(const TapSumArgs *args) {
    if (!args) return NULL_POINTER;
    if (!is_aligned(args, sizeof(int64_t))) return MISALIGNED;
    int64_t error = check_common(args->version, args->threads, args->images, args->channels, args->n_levels);
    if (error) return error;
    if (args->height < 1 || args->height > MAX_SIDE || args->width < 1 || args->width > MAX_SIDE) return BAD_SIZE;
    if (is_too_large(args->images, args->height, args->width, args->channels)) return BAD_SIZE;
    if (args->align_corners >> 1 || args->bf16 >> 1 || args->relu >> 1) return BAD_FLAG;
    if (!args->sum) return NULL_POINTER;
    uintptr_t element = args->bf16 ? 2 : 4;
    if (!is_aligned(args->sum, element) || !is_aligned(args->base, element)) return MISALIGNED;
    return check_levels(args->levels, args->n_levels, args->images, CONV_K * CONV_K * args->channels, element);
}

/* Sources of all levels, rows before columns: those of level i begin at i * (height + width) * CONV_K. */
static Source *all_sources(const TapSumArgs *args) {
    int64_t n = (args->height + args->width) * CONV_K;
    Source *sources = malloc(args->n_levels * n * sizeof(Source));
    for (int64_t i = 0; sources && i < args->n_levels; i++) {
        fill_sources(sources + i * n, args->height, args->levels[i].height, args->align_corners);
        fill_sources(sources + i * n + args->height * CONV_K, args->width, args->levels[i].width, args->align_corners);
    }
    return sources;
}

/* `n` vectors: the products of a level, summed over the rows that an output row takes. columns: width x CONV_K x
   C_BLOCK. */
INLINE void sum_rows(int bf16, int n, const Level *level, int64_t image, const Source *rows, int64_t channels,
                     int64_t c, float *columns) {
    int64_t pixel = CONV_K * CONV_K * channels, size = bf16 ? 2 : 4;
    for (int64_t x = 0; x < level->width; x++)
        for (int64_t kx = 0; kx < CONV_K; kx++) {
            f32xn sums[C_BLOCK / LANES];
            for (int v = 0; v < n; v++) sums[v] = splat(0);
            for (int64_t ky = 0; ky < CONV_K; ky++) {
                const Source *s = rows + ky;
                int64_t offset = (ky * CONV_K + kx) * channels + c;
                const char *low = (const char *)level->data +
                                  (((image * level->height + s->low) * level->width + x) * pixel + offset) * size;
                const char *high = low + (s->high - s->low) * level->width * pixel * size;
                f32xn a = splat(s->low_weight), b = splat(s->high_weight);
                for (int v = 0; v < n; v++) {
                    sums[v] = multiply_add(a, load_elem(bf16, low, v * LANES), sums[v]);
                    sums[v] = multiply_add(b, load_elem(bf16, high, v * LANES), sums[v]);
                }
            }
            for (int v = 0; v < n; v++) store(columns + (x * CONV_K + kx) * C_BLOCK + v * LANES, sums[v]);
        }
}

/* `n` vectors of an output row. columns: those of all levels, one after the other. */
INLINE void sum_columns(int bf16, int n, const TapSumArgs *args, const Source *sources, const float *columns,
                        int64_t row, int64_t c) {
    int64_t per_level = (args->height + args->width) * CONV_K;
    for (int64_t x = 0; x < args->width; x++) {
        int64_t offset = (row * args->width + x) * args->channels + c;
        f32xn sums[C_BLOCK / LANES], zero = splat(0);
        for (int v = 0; v < n; v++) sums[v] = load_elem(bf16, args->base, offset + v * LANES);
        const float *level_columns = columns;
        for (int64_t i = 0; i < args->n_levels; i++) {
            for (int64_t kx = 0; kx < CONV_K; kx++) {
                const Source *s = sources + i * per_level + (args->height + x) * CONV_K + kx;
                const float *low = level_columns + (s->low * CONV_K + kx) * C_BLOCK;
                const float *high = level_columns + (s->high * CONV_K + kx) * C_BLOCK;
                f32xn a = splat(s->low_weight), b = splat(s->high_weight);
                for (int v = 0; v < n; v++) {
                    sums[v] = multiply_add(a, load(low + v * LANES), sums[v]);
                    sums[v] = multiply_add(b, load(high + v * LANES), sums[v]);
                }
            }
            level_columns += args->levels[i].width * CONV_K * C_BLOCK;
        }
        for (int v = 0; v < n; v++) {
            if (args->relu) sums[v] = maximum(sums[v], zero);
            store_elem(bf16, args->sum, offset + v * LANES, sums[v]);
        }
    }
}

INLINE void tap_sum_block(int bf16, int n, const TapSumArgs *args, const Source *sources, float *columns, int64_t row,
                          int64_t c) {
    int64_t image = row / args->height, per_level = (args->height + args->width) * CONV_K;
    float *level_columns = columns;
    for (int64_t i = 0; i < args->n_levels; i++) {
        const Source *rows = sources + i * per_level + row % args->height * CONV_K;
        sum_rows(bf16, n, args->levels + i, image, rows, args->channels, c, level_columns);
        level_columns += args->levels[i].width * CONV_K * C_BLOCK;
    }
    sum_columns(bf16, n, args, sources, columns, row, c);
}

int64_t convnext_tap_sum(const TapSumArgs *args) {
    int64_t error = check_tap_sum(args);
    if (error) return error;
    if (!args->base) return NULL_POINTER;
    int64_t columns = 0, rows = args->images * args->height, groups = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    for (int64_t i = 0; i < args->n_levels; i++) columns += args->levels[i].width * CONV_K * C_BLOCK;
    Source *sources = all_sources(args);
    float *scratch = aligned_alloc(64, args->threads * columns * sizeof(float));
    if (!sources || !scratch) {
        free(sources);
        free(scratch);
        return NO_MEMORY;
    }
    int64_t c_blocks = (args->channels + C_BLOCK - 1) / C_BLOCK;
#pragma omp parallel for num_threads((int)args->threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < groups * c_blocks; t++) {
        float *buffer = scratch + omp_get_thread_num() * columns;
        int64_t first = t / c_blocks * ROW_BLOCK, c = t % c_blocks * C_BLOCK;
        int64_t channels = min_i64(C_BLOCK, args->channels - c);
        for (int64_t row = first; row < min_i64(first + ROW_BLOCK, rows); row++) {
            int64_t k = 0;
            if (channels == C_BLOCK && args->bf16)
                tap_sum_block(1, C_BLOCK / LANES, args, sources, buffer, row, c);
            else if (channels == C_BLOCK)
                tap_sum_block(0, C_BLOCK / LANES, args, sources, buffer, row, c);
            else
                for (; k < channels; k += LANES) tap_sum_block((int)args->bf16, 1, args, sources, buffer, row, c + k);
        }
    }
    free(sources);
    free(scratch);
    return OK;
}

/* The weight that an output position and a tap give to a position of the level. */
INLINE float weight_of(const Source *s, int64_t index) {
    return (s->low == index ? s->low_weight : 0.0f) + (s->high == index ? s->high_weight : 0.0f);
}

/* Gradients of the products of a row of a level, `n` vectors of channels. sums: width x 9 x C_BLOCK. columns: the
   gradient of an output row, summed over the columns that a pixel of the level is a source of, width x CONV_K x
   C_BLOCK. */
INLINE void tap_sum_backward_block(int bf16, int n, const TapSumArgs *args, int64_t i, const Source *sources,
                                   float *sums, float *columns, int64_t image, int64_t row, int64_t c) {
    const Level *level = args->levels + i;
    const Source *rows = sources + i * (args->height + args->width) * CONV_K, *xs = rows + args->height * CONV_K;
    int64_t pixel = CONV_K * CONV_K * args->channels, size = bf16 ? 2 : 4;
    memset(sums, 0, level->width * CONV_K * CONV_K * C_BLOCK * sizeof(float));
    for (int64_t y = 0; y < args->height; y++) {
        float weights[CONV_K];
        int is_source = 0;
        for (int64_t ky = 0; ky < CONV_K; ky++)
            is_source |= (weights[ky] = weight_of(rows + y * CONV_K + ky, row)) != 0;
        if (!is_source) continue;
        memset(columns, 0, level->width * CONV_K * C_BLOCK * sizeof(float));
        for (int64_t x = 0; x < args->width; x++) {
            f32xn g[C_BLOCK / LANES];
            int64_t offset = ((image * args->height + y) * args->width + x) * args->channels + c;
            for (int v = 0; v < n; v++) g[v] = load_elem(bf16, args->sum, offset + v * LANES);
            for (int64_t kx = 0; kx < CONV_K; kx++) {
                const Source *s = xs + x * CONV_K + kx;
                float *low = columns + (s->low * CONV_K + kx) * C_BLOCK;
                float *high = columns + (s->high * CONV_K + kx) * C_BLOCK;
                f32xn a = splat(s->low_weight), b = splat(s->high_weight);
                for (int v = 0; v < n; v++) {
                    store(low + v * LANES, multiply_add(a, g[v], load(low + v * LANES)));
                    store(high + v * LANES, multiply_add(b, g[v], load(high + v * LANES)));
                }
            }
        }
        for (int64_t x = 0; x < level->width; x++)
            for (int64_t kx = 0; kx < CONV_K; kx++) {
                const float *src = columns + (x * CONV_K + kx) * C_BLOCK;
                for (int64_t ky = 0; ky < CONV_K; ky++) {
                    if (weights[ky] == 0) continue;
                    float *dst = sums + ((x * CONV_K + ky) * CONV_K + kx) * C_BLOCK;
                    f32xn w = splat(weights[ky]);
                    for (int v = 0; v < n; v++)
                        store(dst + v * LANES, multiply_add(w, load(src + v * LANES), load(dst + v * LANES)));
                }
            }
    }
    char *out = (char *)level->data + ((image * level->height + row) * level->width * pixel + c) * size;
    for (int64_t k = 0; k < level->width * CONV_K * CONV_K; k++)
        for (int v = 0; v < n; v++)
            store_elem(bf16, out, k * args->channels + v * LANES, load(sums + k * C_BLOCK + v * LANES));
}

int64_t convnext_tap_sum_backward(const TapSumArgs *args) {
    int64_t error = check_tap_sum(args);
    if (error) return error;
    if (args->relu) return BAD_FLAG;
    int64_t columns = 0, tasks = 0, c_blocks = (args->channels + C_BLOCK - 1) / C_BLOCK;
    for (int64_t i = 0; i < args->n_levels; i++) {
        columns = max_i64(columns, args->levels[i].width * CONV_K * C_BLOCK);
        tasks += args->images * args->levels[i].height * c_blocks;
    }
    int64_t thread_floats = columns * (1 + CONV_K);
    Source *sources = all_sources(args);
    float *scratch = aligned_alloc(64, args->threads * thread_floats * sizeof(float));
    if (!sources || !scratch) {
        free(sources);
        free(scratch);
        return NO_MEMORY;
    }
#pragma omp parallel for num_threads((int)args->threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++) {
        float *buffer = scratch + omp_get_thread_num() * thread_floats;
        int64_t task = t, i = 0;
        for (; task >= args->images * args->levels[i].height * c_blocks; i++)
            task -= args->images * args->levels[i].height * c_blocks;
        int64_t image = task / c_blocks / args->levels[i].height, row = task / c_blocks % args->levels[i].height;
        int64_t c = task % c_blocks * C_BLOCK, channels = min_i64(C_BLOCK, args->channels - c);
        if (channels == C_BLOCK && args->bf16)
            tap_sum_backward_block(1, C_BLOCK / LANES, args, i, sources, buffer + columns, buffer, image, row, c);
        else if (channels == C_BLOCK)
            tap_sum_backward_block(0, C_BLOCK / LANES, args, i, sources, buffer + columns, buffer, image, row, c);
        else
            for (int64_t k = c; k < c + channels; k += LANES)
                tap_sum_backward_block((int)args->bf16, 1, args, i, sources, buffer + columns, buffer, image, row, k);
    }
    free(sources);
    free(scratch);
    return OK;
}

/* ---- NMS --------------------------------------------------------------------------------------------------------- */

/* Greedy NMS of n boxes in the order of their scores. coords: x1, y1, x2 and y2, n of each; keep: 1 for each box that
   stays. offset: what the width of a box has beyond x2 - x1. */
int64_t convnext_nms(int64_t n, const float *coords, float threshold, float offset, int32_t *restrict keep) {
    if (n < 0 || n > MAX_ROIS) return BAD_SIZE;
    if (n && (!coords || !keep)) return NULL_POINTER;
    if (!is_aligned(coords, 4) || !is_aligned(keep, 4)) return MISALIGNED;
    const float *restrict x1 = coords, *restrict y1 = x1 + n, *restrict x2 = y1 + n, *restrict y2 = x2 + n;
    float *restrict areas = malloc((n + 1) * sizeof(float));
    if (!areas) return NO_MEMORY;
    for (int64_t i = 0; i < n; i++) {
        areas[i] = (x2[i] - x1[i] + offset) * (y2[i] - y1[i] + offset);
        keep[i] = 1;
    }
    for (int64_t i = 0; i < n; i++) {
        if (!keep[i]) continue;
        float left = x1[i], top = y1[i], right = x2[i], bottom = y2[i], area = areas[i];
        for (int64_t j = i + 1; j < n; j++) {
            float xx1 = left < x1[j] ? x1[j] : left, yy1 = top < y1[j] ? y1[j] : top;
            float xx2 = x2[j] < right ? x2[j] : right, yy2 = y2[j] < bottom ? y2[j] : bottom;
            float w = xx2 - xx1 + offset, h = yy2 - yy1 + offset;
            w = 0.0f < w ? w : 0.0f;
            h = 0.0f < h ? h : 0.0f;
            float overlap = w * h;
            keep[j] &= !(overlap / (area + areas[j] - overlap) > threshold);
        }
    }
    free(areas);
    return OK;
}

/* ---- entry points ------------------------------------------------------------------------------------------------ */

const char *convnext_head_error_message(int64_t code) {
    static const char *const messages[N_ERRORS] = {
        "success",
        "the struct has another version",
        "the number of threads is not positive, or too large",
        "a size is not positive, or too large",
        "the number of channels is not a multiple of 16",
        "a flag is not 0 or 1, or not for the backward pass",
        "a pointer is null",
        "the image index of a RoI is out of range",
        "the level index of a RoI is out of range",
        "a RoI has a negative size, or coordinates that are not finite or too large",
        "out of memory",
        "a pointer is misaligned",
    };
    return code >= 0 && code < N_ERRORS ? messages[code] : "unknown error";
}

int64_t convnext_head_struct_size(int64_t i) {
    static const int64_t sizes[] = {sizeof(Level), sizeof(RoIAlignArgs), sizeof(TapSumArgs)};
    return i >= 0 && i < 3 ? sizes[i] : -1;
}

/* Hash of the source that was compiled, see setup.py. */
const char *convnext_head_source(void) { return SOURCE; }
