/* The parts of a ConvNeXt, forward and backward, for processors with AVX-512: a block, that is
   x + gamma * MLP(LayerNorm(depthwise(x))), the stem, a downsampling, and the norm of a map that is emitted.

   Maps are channels_last: a pixel is a row of channels. A thread takes some hundred rows at a time from the depthwise
   convolution to the output, so that all in between stays in its cache. Products run in float32 or bfloat16, the rest in
   float32. The unit of a product's operands is a word of 32 bits: a float, or two bfloat16 that are neighbours in the
   dimension summed over; so both dtypes share all loops but for the multiply-add itself.

   Sums over all rows are taken thread by thread, rows dealt out in a fixed order: the same number of threads, the same
   bits. Called by fused.py, which sees to shapes, dtypes and memory. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 24")

enum {
    LANES = 16,
    TALL = 14,   /* rows of a product held in registers, */
    WIDE = 32,   /* and columns: two vectors */
    SIDE = 7,    /* of a depthwise kernel */
    HALO = 3,
    TAPS = 49,
    CHUNK = 384, /* columns of the hidden layer at a time */
    PAD = 64,    /* bytes after a row, lest rows a power of two long fall on the same lines of the cache */
};

typedef int32_t word;
typedef __m512 vec;

typedef struct {
    int64_t images, height, width, channels, threads, bf16;
    float eps, factor; /* the branch's, of stochastic depth */
    const float *depthwise, *depthwise_bias, *norm, *norm_bias, *linear1, *bias1, *linear2, *bias2, *gamma;
    const float *x;
    void *y, *hidden; /* depthwise convolution's output and the layer before GELU, kept for the backward pass, or null */
    float *out;
    /* of the backward pass; grad_x or grad_linear1 null: not wanted */
    const float *grad;
    float *grad_x, *grad_y, *grad_linear1, *grad_linear2, *sums;
    char *work;
} Block;

/* Where the parts of `work` lie, in bytes; of the scratch of a thread likewise. */
typedef struct {
    int64_t rows, strip; /* of a tile, and of what tiles leave for the gradients of the weights */
    int64_t line, thin, hidden_line, hidden_thin; /* bytes of a row: floats or elements, of C or CHUNK columns */
    int64_t taps, scale, linear1, linear2, linear1_back, linear2_back, panels[4], scratch, scratch_size, sums, total;
    int64_t of_sums; /* floats */
} Plan;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* ---- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vec all(float x) { return _mm512_set1_ps(x); }
INLINE vec load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void store(void *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE float sum(vec v) { return _mm512_reduce_add_ps(v); }

INLINE void add_to(float *p, vec v) { store(p, _mm512_add_ps(load(p), v)); }

/* The lanes of a mask alone are touched, zeros are loaded for the others. */
#ifndef __SANITIZE_ADDRESS__
INLINE vec load_lanes(__mmask16 mask, const void *p) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE void store_lanes(__mmask16 mask, void *p, vec v) { _mm512_mask_storeu_ps(p, mask, v); }
#else /* AddressSanitizer does not see masked instructions: there lane by lane. */
INLINE vec load_lanes(__mmask16 mask, const float *p) {
    float lanes[LANES] = {0};
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) lanes[i] = p[i];
    return load(lanes);
}
INLINE void store_lanes(__mmask16 mask, float *p, vec v) {
    float lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) p[i] = lanes[i];
}
#endif

/* `n` floats from `p`, perhaps beyond the map that p points into, where nothing is loaded: an address, since to compute
   such a pointer is undefined. */
INLINE uintptr_t address(const float *p, int64_t n) { return (uintptr_t)p + sizeof(float) * (uintptr_t)n; }

/* Elements: float or bfloat16. */
INLINE int size_of(const int bf16) { return bf16 ? 2 : 4; }

INLINE void put(const int bf16, void *row, int64_t at, vec v) {
    if (bf16)
        _mm256_storeu_si256((void *)((char *)row + 2 * at), (__m256i)_mm512_cvtneps_pbh(v));
    else
        store((float *)row + at, v);
}

/* The vectors of two times 16 neighbours. */
INLINE void put_both(const int bf16, void *row, int64_t at, vec first, vec second) {
    if (bf16)
        _mm512_storeu_si512((char *)row + 2 * at, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    else
        store((float *)row + at, first), store((float *)row + at + LANES, second);
}

INLINE vec get(const int bf16, const void *row, int64_t at) {
    if (!bf16) return load((const float *)row + at);
    __m256i narrow = _mm256_loadu_si256((const void *)((const char *)row + 2 * at));
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}

/* Of two rows of 16 bfloat16 one vector of words. */
INLINE __m512i paired(__m256i even, __m256i odd) {
    static const int16_t order[32] __attribute__((aligned(64))) = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                                   21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

INLINE __m256i narrow(vec v) { return (__m256i)_mm512_cvtneps_pbh(v); }

INLINE vec multiply_add(const int bf16, vec a, vec b, vec c) {
    return bf16 ? _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b) : _mm512_fmadd_ps(a, b, c);
}

/* ---- GELU -------------------------------------------------------------------------------------------------------- */

/* 1 - Phi and the derivative of GELU at -t, t >= 0, Phi the normal distribution function: polynomials around PIECES values
   of t, in u, how many such steps t is away; a coefficient of all pieces is a vector. Errors are below 1e-6 in float32, 7e-5 in bfloat16. */
enum { PIECES = 16, MOST_TERMS = 5 };

typedef struct {
    float tail[MOST_TERMS][PIECES], slope[MOST_TERMS][PIECES];
} Pieces;

static Pieces pieces[2] __attribute__((aligned(64))); /* of float32 and bfloat16 */

/* From there on both are 0: it lies in the last piece, a hundredth of a piece from where that begins. */
INLINE float far(const int bf16) { return bf16 ? 4.5f : 5.5f; }
INLINE float piece_width(const int bf16) { return far(bf16) / (PIECES - 1.49f); }
INLINE int tail_terms(const int bf16) { return bf16 ? 3 : MOST_TERMS; }
INLINE int slope_terms(const int bf16) { return bf16 ? 4 : MOST_TERMS; }

static double tail_at(double t) { return erfc(t / sqrt(2)) / 2; }
static double slope_at(double t) { return tail_at(t) - t * exp(-t * t / 2) / sqrt(2 * M_PI); }

/* Interpolated at the zeros of a Chebyshev polynomial, in Newton's form and from there by powers of u. */
static void interpolate(double (*f)(double), int terms, double width, float table[MOST_TERMS][PIECES]) {
    for (int i = 0; i < PIECES - 1; i++) {
        double u[MOST_TERMS], d[MOST_TERMS], power[MOST_TERMS] = {0};
        for (int j = 0; j < terms; j++) u[j] = cos(M_PI * (j + 0.5) / terms) / 2, d[j] = f((i + u[j]) * width);
        for (int n = 1; n < terms; n++)
            for (int j = terms - 1; j >= n; j--) d[j] = (d[j] - d[j - 1]) / (u[j] - u[j - n]);
        for (int n = terms - 1; n >= 0; n--) {
            for (int j = terms - 1; j > 0; j--) power[j] = power[j - 1] - u[n] * power[j];
            power[0] = d[n] - u[n] * power[0];
        }
        for (int j = 0; j < terms; j++) table[j][i] = power[j];
    }
}

/* Called once, before all else: not by the loader, which knows nothing of what the processor can do. */
void convnext_prepare(void) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        interpolate(tail_at, tail_terms(bf16), piece_width(bf16), pieces[bf16].tail);
        interpolate(slope_at, slope_terms(bf16), piece_width(bf16), pieces[bf16].slope);
    }
}

typedef struct {
    __m512i piece;
    vec u, size; /* |x| */
} Place;

INLINE Place place_of(const int bf16, vec x) {
    const vec whole = all(0x1.8p23f); /* what is added to it is rounded to a whole number, which its last bits hold */
    vec size = _mm512_abs_ps(x), t = _mm512_min_ps(all(far(bf16)), size); /* of a NaN the second operand: it stays */
    vec per = all(1 / piece_width(bf16)), piece = _mm512_fmadd_ps(t, per, whole);
    return (Place){(__m512i)piece, _mm512_fmsub_ps(t, per, _mm512_sub_ps(piece, whole)), size};
}

INLINE vec polynomial(const float table[MOST_TERMS][PIECES], const int terms, Place p) {
    vec r = _mm512_permutexvar_ps(p.piece, _mm512_load_ps(table[terms - 1]));
    UNROLL for (int i = terms - 2; i >= 0; i--)
        r = _mm512_fmadd_ps(r, p.u, _mm512_permutexvar_ps(p.piece, _mm512_load_ps(table[i])));
    return r;
}

/* x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)) */
INLINE vec gelu_at(const int bf16, vec x, Place p) {
    vec tail = polynomial(pieces[bf16].tail, tail_terms(bf16), p);
    return _mm512_fnmadd_ps(p.size, tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

INLINE vec gelu(const int bf16, vec x) { return gelu_at(bf16, x, place_of(bf16, x)); }

/* Its derivative, odd about 1/2. */
INLINE vec slope_of(const int bf16, vec x, Place p) {
    vec slope = polynomial(pieces[bf16].slope, slope_terms(bf16), p);
    return _mm512_mask_sub_ps(slope, (__mmask16)~_mm512_movepi32_mask((__m512i)x), all(1), slope);
}

/* ---- products --------------------------------------------------------------------------------------------------- */

/* What becomes of a product. */
enum { STORE, ADD, BIAS, GELU, SLOPE };

typedef struct {
    int kind;
    char *to; /* rows of `line` bytes: floats of STORE, ADD and BIAS, else elements */
    int64_t line;
    const float *bias;
    /* GELU: the layer before it is kept there, or null. SLOPE: it comes from there, in floats */
    char *hidden;
    int64_t hidden_line;
    char *gelu;  /* SLOPE: GELU, in rows as `to` has */
    float *sums; /* SLOPE: of each column, added to */
} Epilogue;

/* Rows of `a` by a panel of WIDE columns: a[i][k] at i * row + k * step bytes, b[k] the next WIDE words. */
INLINE void product(const int bf16, const int rows, const char *a, int64_t row, int64_t step, const word *b, int64_t k,
                    vec acc[TALL][2]) {
    const char *a7 = rows > 7 ? a + 7 * row : a; /* two bases, so that few registers address all rows */
    UNROLL for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (; k > 0; k--, b += WIDE, a += step, a7 += step) {
        vec b0 = load(b), b1 = load(b + LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vec x = all(*(const float *)(i < 7 ? a + i * row : a7 + (i - 7) * row));
            acc[i][0] = multiply_add(bf16, x, b0, acc[i][0]);
            acc[i][1] = multiply_add(bf16, x, b1, acc[i][1]);
        }
    }
}

INLINE void finish(const int bf16, const int rows, const Epilogue *e, int64_t first, int64_t column, vec acc[TALL][2]) {
    char *to = e->to + first * e->line;
    if (e->kind <= BIAS) {
        UNROLL for (int i = 0; i < rows; i++) for (int half = 0; half < 2; half++) {
            float *p = (float *)(to + i * e->line) + column + LANES * half;
            vec v = acc[i][half];
            if (e->kind == ADD) v = _mm512_add_ps(v, load(p));
            if (e->kind == BIAS) v = _mm512_add_ps(v, load(e->bias + column + LANES * half));
            store(p, v);
        }
    } else if (e->kind == GELU) {
        vec bias[2] = {load(e->bias + column), load(e->bias + column + LANES)};
        char *hidden = e->hidden ? e->hidden + first * e->hidden_line : 0;
        UNROLL for (int i = 0; i < rows; i++) {
            vec v[2] = {_mm512_add_ps(acc[i][0], bias[0]), _mm512_add_ps(acc[i][1], bias[1])};
            if (hidden) put_both(bf16, hidden + i * e->hidden_line, column, v[0], v[1]);
            put_both(bf16, to + i * e->line, column, gelu(bf16, v[0]), gelu(bf16, v[1]));
        }
    } else {
        vec sums[2] = {load(e->sums + column), load(e->sums + column + LANES)};
        UNROLL for (int i = 0; i < rows; i++) {
            const float *hidden = (const float *)(e->hidden + (first + i) * e->hidden_line) + column;
            vec v[2] = {load(hidden), load(hidden + LANES)};
            Place p[2] = {place_of(bf16, v[0]), place_of(bf16, v[1])};
            vec activation[2] = {gelu_at(bf16, v[0], p[0]), gelu_at(bf16, v[1], p[1])};
            put_both(bf16, e->gelu + (first + i) * e->line, column, activation[0], activation[1]);
            UNROLL for (int half = 0; half < 2; half++) {
                v[half] = _mm512_mul_ps(acc[i][half], slope_of(bf16, v[half], p[half]));
                sums[half] = _mm512_add_ps(sums[half], v[half]);
            }
            put_both(bf16, to + i * e->line, column, v[0], v[1]);
        }
        store(e->sums + column, sums[0]);
        store(e->sums + column + LANES, sums[1]);
    }
}

/* A number of rows has registers of its own only where it is known to the compiler. */
#define FOR_ROWS(DO) \
    switch (rows) { \
        case 1: DO(1); case 2: DO(2); case 3: DO(3); case 4: DO(4); case 5: DO(5); case 6: DO(6); case 7: DO(7); \
        case 8: DO(8); case 9: DO(9); case 10: DO(10); case 11: DO(11); case 12: DO(12); case 13: DO(13); \
        case 14: DO(14); \
    }

#define PRODUCT(NAME, BF16) \
    __attribute__((noinline)) static void NAME(int64_t rows, const char *a, int64_t line, const word *b, int64_t k, \
                                               const Epilogue *e, int64_t first, int64_t column) { \
        vec acc[TALL][2]; \
        FOR_ROWS(BF16) \
    }
#define IN_FLOAT32(N) product(0, N, a, line, 4, b, k, acc); finish(0, N, e, first, column, acc); break
#define IN_BFLOAT16(N) product(1, N, a, line, 4, b, k, acc); finish(1, N, e, first, column, acc); break
PRODUCT(product_float32, IN_FLOAT32)
PRODUCT(product_bfloat16, IN_BFLOAT16)

/* `rows` rows of `a` by panels of `k` words, `stride` words apart. */
static void multiply(int bf16, const char *a, int64_t line, int64_t rows, const word *b, int64_t stride, int64_t k,
                     int64_t columns, const Epilogue *e) {
    int64_t parts = (rows + TALL - 1) / TALL;
    for (int64_t column = 0; column < columns; column += WIDE, b += stride)
        for (int64_t i = 0; i < parts; i++) {
            int64_t first = i * rows / parts, n = (i + 1) * rows / parts - first;
            (bf16 ? product_bfloat16 : product_float32)(n, a + first * line, line, b, k, e, first, column);
        }
}

/* The gradient of a weight, WIDE x WIDE of it: the sum over `k` rows of a panel's columns by another's; added where it
   is not the first. */
#define OUTER(NAME, BF16) \
    __attribute__((noinline)) static void NAME(const word *a, const word *b, int64_t k, float *to, int64_t line, int add) { \
        vec acc[TALL][2]; \
        Epilogue e = {add ? ADD : STORE, (char *)to, 4 * line, 0, 0, 0, 0, 0}; \
        product(BF16, 11, (const char *)a, 4, 4 * WIDE, b, k, acc), finish(BF16, 11, &e, 0, 0, acc); \
        product(BF16, 11, (const char *)(a + 11), 4, 4 * WIDE, b, k, acc), finish(BF16, 11, &e, 11, 0, acc); \
        product(BF16, 10, (const char *)(a + 22), 4, 4 * WIDE, b, k, acc), finish(BF16, 10, &e, 22, 0, acc); \
    }
OUTER(outer_float32, 0)
OUTER(outer_bfloat16, 1)

static void multiply_transposed(int bf16, const word *a, const word *b, int64_t k, float *to, int64_t line, int add) {
    (bf16 ? outer_bfloat16 : outer_float32)(a, b, k, to, line, add);
}

/* ---- operands in panels ------------------------------------------------------------------------------------------ */

/* Of four vectors the first 128 bits of each to r[0], the second to r[step] and so on. */
INLINE void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i *r, const int step) {
    __m512i low01 = _mm512_shuffle_i32x4(a, b, 0x88), high01 = _mm512_shuffle_i32x4(a, b, 0xdd);
    __m512i low23 = _mm512_shuffle_i32x4(c, d, 0x88), high23 = _mm512_shuffle_i32x4(c, d, 0xdd);
    r[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    r[step] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    r[2 * step] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    r[3 * step] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}

/* Within 128 bits: r[i] becomes word i of a, b, c, d, for each of the four lanes. */
INLINE void transpose_words(__m512i a, __m512i b, __m512i c, __m512i d, __m512i r[4]) {
    __m512i low01 = _mm512_unpacklo_epi32(a, b), high01 = _mm512_unpackhi_epi32(a, b);
    __m512i low23 = _mm512_unpacklo_epi32(c, d), high23 = _mm512_unpackhi_epi32(c, d);
    r[0] = _mm512_unpacklo_epi64(low01, low23);
    r[1] = _mm512_unpackhi_epi64(low01, low23);
    r[2] = _mm512_unpacklo_epi64(high01, high23);
    r[3] = _mm512_unpackhi_epi64(high01, high23);
}

INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 4) transpose_words(r[i], r[i + 1], r[i + 2], r[i + 3], t + i);
    UNROLL for (int i = 0; i < 4; i++) transpose_lanes(t[i], t[i + 4], t[i + 8], t[i + 12], r + i, 4);
}

/* Panel `at` of a weight, columns x k, summed over its rows' own dimension. */
static void pack_rows(int bf16, const float *weight, int64_t k, int64_t at, word *to) {
    int64_t words = bf16 ? k / 2 : k;
    vec seen = _mm512_setzero_ps(); /* one after the other they come from memory twice as fast as row beside row */
    weight += at * WIDE * k, to += at * words * WIDE;
    for (int64_t i = 0; i < WIDE * k; i += LANES) seen = _mm512_or_ps(seen, load(weight + i));
    __asm__ volatile("" : : "v"(seen));
    for (int64_t w = 0; w < words; w += LANES)
        for (int half = 0; half < WIDE; half += LANES) {
            __m512i r[16];
            const float *from = weight + half * k + (bf16 ? 2 * w : w);
            UNROLL for (int i = 0; i < 16; i++)
                r[i] = bf16 ? (__m512i)_mm512_cvtne2ps_pbh(load(from + i * k + LANES), load(from + i * k))
                            : (__m512i)load(from + i * k);
            transpose(r);
            UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (w + i) * WIDE + half, r[i]);
        }
}

/* Of all panels of a weight, k x columns, summed over its rows, the words at `w`. */
static void pack_columns(int bf16, const float *weight, int64_t k, int64_t columns, int64_t w, word *to) {
    int64_t words = bf16 ? k / 2 : k;
    const float *from = weight + (bf16 ? 2 * w : w) * columns;
    for (int64_t c = 0; c < columns; c += LANES, from += LANES) {
        __m512i v = bf16 ? paired(narrow(load(from)), narrow(load(from + columns))) : (__m512i)load(from);
        _mm512_storeu_si512(to + (c / WIDE * words + w) * WIDE + c % WIDE, v);
    }
}

/* Rows of elements as panels, summed over rows, `stride` words apart; of an odd number of rows the last has a partner of
   zeros. */
static void to_panels(int bf16, const char *rows, int64_t line, int64_t n, int64_t columns, word *to, int64_t stride) {
    for (int64_t column = 0; column < columns; column += WIDE, to += stride)
        for (int64_t i = 0; i < n; i += 1 + bf16)
            for (int half = 0; half < WIDE; half += LANES) {
                const char *from = rows + i * line + size_of(bf16) * (column + half);
                if (!bf16) {
                    store(to + i * WIDE + half, load(from));
                    continue;
                }
                __m256i odd = i + 1 < n ? _mm256_loadu_si256((const void *)(from + line)) : _mm256_setzero_si256();
                __m512i pairs = paired(_mm256_loadu_si256((const void *)from), odd);
                _mm512_storeu_si512(to + i / 2 * WIDE + half, pairs);
            }
}

/* ---- depthwise convolution --------------------------------------------------------------------------------------- */

/* Lanes of a pixel's vector: all inside the row of the map, none outside. */
INLINE __mmask16 inside(int64_t x, int64_t width) { return (uint64_t)x < (uint64_t)width ? 0xffff : 0; }

/* Pixels x to x + n - 1 of row h of an image, 16 channels of them; the first `count` are stored, `line` bytes apart. */
INLINE void convolve(const int n, const Block *b, const float *image, int64_t h, int64_t x, const float *taps, vec start,
                     const float *add, int64_t count, char *to, int64_t line) {
    int64_t c = b->channels;
    __mmask16 there[22];
    vec acc[16], tap[SIDE];
    UNROLL for (int i = 0; i < n + 2 * HALO; i++) there[i] = inside(x + i - HALO, b->width);
    UNROLL for (int j = 0; j < n; j++) acc[j] = start;
    for (int64_t v = most(0, HALO - h); v < least(SIDE, b->height + HALO - h); v++) {
        uintptr_t row = address(image, ((h + v - HALO) * b->width + x - HALO) * c);
        UNROLL for (int u = 0; u < SIDE; u++) tap[u] = load(taps + (v * SIDE + u) * c);
        UNROLL for (int i = 0; i < n + 2 * HALO; i++, row += sizeof(float) * c) {
            vec in = load_lanes(there[i], (const float *)row);
            UNROLL for (int u = 0; u < SIDE; u++)
                if (i - u >= 0 && i - u < n) acc[i - u] = _mm512_fmadd_ps(in, tap[u], acc[i - u]);
        }
    }
    UNROLL for (int j = 0; j < n; j++)
        if (j < count) store(to + j * line, add ? _mm512_add_ps(acc[j], load(add + j * c)) : acc[j]);
}

/* `rows` pixels from the `first` on, of `map` by `taps` (TAPS x C), plus `bias` and `add` where they are not null. */
static void depthwise(const Block *b, const float *map, const float *taps, const float *bias, const float *add,
                      int64_t first, int64_t rows, char *to, int64_t line) {
    int64_t c = b->channels, area = b->height * b->width, run;
    for (int64_t p = 0; p < rows; p += run) {
        int64_t at = first + p, h = at % area / b->width, x = at % b->width;
        const float *image = map + at / area * area * c;
        run = least(rows - p, b->width - x);
        for (int64_t k = 0; k < c; k += LANES) {
            vec start = bias ? load(bias + k) : _mm512_setzero_ps();
            for (int64_t q = 0, left; (left = run - q) > 0; q += left > 8 ? 16 : 8) {
                char *here = to + (p + q) * line + 4 * k;
                const float *more = add ? add + (at + q) * c + k : 0;
                if (left > 8)
                    convolve(16, b, image + k, h, x + q, taps + k, start, more, left, here, line);
                else
                    convolve(8, b, image + k, h, x + q, taps + k, start, more, left, here, line);
            }
        }
    }
}

/* Gradients of the taps of 16 channels from row h of an image, added to `sums`, TAPS x C. */
static void tap_gradients(const Block *b, const float *image, const float *grad, int64_t h, float *sums) {
    int64_t c = b->channels, line = sizeof(float) * c;
    for (int64_t v = most(0, HALO - h); v < least(SIDE, b->height + HALO - h); v++) {
        uintptr_t row = address(image, ((h + v - HALO) * b->width - HALO) * c), g_row = address(grad, h * b->width * c);
        vec acc[SIDE];
        UNROLL for (int u = 0; u < SIDE; u++) acc[u] = load(sums + (v * SIDE + u) * c);
        for (int64_t x = 0; x < b->width; x += 8, row += 8 * line, g_row += 8 * line) {
            vec g[8];
            UNROLL for (int j = 0; j < 8; j++)
                g[j] = load_lanes(inside(x + j, b->width), (const float *)(g_row + j * line));
            UNROLL for (int i = 0; i < 8 + 2 * HALO; i++) {
                vec in = load_lanes(inside(x + i - HALO, b->width), (const float *)(row + i * line));
                UNROLL for (int u = 0; u < SIDE; u++)
                    if (i - u >= 0 && i - u < 8) acc[u] = _mm512_fmadd_ps(in, g[i - u], acc[u]);
            }
        }
        UNROLL for (int u = 0; u < SIDE; u++) store(sums + (v * SIDE + u) * c, acc[u]);
    }
}

/* What all threads have summed up. */
static void add_threads(const float *sums, int64_t n, float *to) {
#pragma omp for
    for (int64_t i = 0; i < n; i++) {
        to[i] = 0;
        for (int64_t t = 0; t < omp_get_num_threads(); t++) to[i] += sums[t * n + i];
    }
}

/* ---- rows --------------------------------------------------------------------------------------------------------- */

typedef struct {
    float mean, scale;
} Moments;

INLINE Moments moments(const float *row, int64_t c, float eps) {
    vec total = _mm512_setzero_ps(), squares = total;
    for (int64_t k = 0; k < c; k += LANES) total = _mm512_add_ps(total, load(row + k));
    float mean = sum(total) / c;
    for (int64_t k = 0; k < c; k += LANES) {
        vec d = _mm512_sub_ps(load(row + k), all(mean));
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    return (Moments){mean, 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(sum(squares) / c + eps)))};
}

/* LayerNorm of a row of floats, to elements. */
INLINE void normalise(const int bf16, const float *row, int64_t c, Moments m, const float *weight, const float *bias,
                      void *to) {
    for (int64_t k = 0; k < c; k += LANES) {
        vec v = _mm512_mul_ps(_mm512_sub_ps(load(row + k), all(m.mean)), all(m.scale));
        put(bf16, to, k, _mm512_fmadd_ps(v, load(weight + k), load(bias + k)));
    }
}

/* From the gradient of its output that of its input, to `to`; sums of the gradients of weight, bias and input, or null. */
static void normalise_backward(const float *y, const float *grad, int64_t c, Moments m, const float *weight, float *to,
                               float *of_weight, float *of_bias, float *of_y) {
    vec mean = all(m.mean), scale = all(m.scale), total = _mm512_setzero_ps(), product = total;
    for (int64_t k = 0; k < c; k += LANES) {
        vec n = _mm512_mul_ps(_mm512_sub_ps(load(y + k), mean), scale), g = load(grad + k);
        if (of_weight) add_to(of_weight + k, _mm512_mul_ps(g, n)), add_to(of_bias + k, g);
        g = _mm512_mul_ps(g, load(weight + k));
        total = _mm512_add_ps(total, g);
        product = _mm512_fmadd_ps(g, n, product);
    }
    total = all(sum(total) / c), product = all(sum(product) / c);
    for (int64_t k = 0; k < c; k += LANES) {
        vec n = _mm512_mul_ps(_mm512_sub_ps(load(y + k), mean), scale);
        vec g = _mm512_sub_ps(_mm512_mul_ps(load(grad + k), load(weight + k)), total);
        g = _mm512_mul_ps(_mm512_fnmadd_ps(n, product, g), scale);
        if (of_y) add_to(of_y + k, g);
        store(to + k, g);
    }
}

/* That of a block, of rows. */
static void normalise_rows(const Block *b, const Plan *plan, const char *y, int64_t rows, char *to, Moments *of_rows) {
    for (int64_t i = 0; i < rows; i++, y += plan->line, to += plan->thin) {
        Moments m = moments((const float *)y, b->channels, b->eps);
        if (of_rows) of_rows[i] = m;
        normalise(b->bf16, (const float *)y, b->channels, m, b->norm, b->norm_bias, to);
    }
}

/* ---- plan of the memory ------------------------------------------------------------------------------------------- */

static int64_t place(int64_t *end, int64_t bytes) {
    int64_t at = *end;
    *end += up(bytes, 64);
    return at;
}

static Plan plan_of(const Block *b, int backward) {
    Plan p = {0};
    int64_t c = b->channels, size = size_of(b->bf16), m = b->images * b->height * b->width, end = 0;
    int64_t target = backward ? (c <= 192 ? 128 : 64) : (c <= 768 ? 112 : 56), round = target * b->threads;
    int64_t even = (m + round - 1) / round * b->threads; /* as many tiles for each thread */
    p.rows = most(2, up((m + even - 1) / even, 2));
    p.strip = up(least(most(8 * round, 1024), m), p.rows);
    p.line = 4 * c + PAD, p.thin = size * c + PAD, p.hidden_line = 4 * CHUNK + PAD, p.hidden_thin = size * CHUNK + PAD;
    p.taps = place(&end, 2 * 4 * TAPS * c);
    p.scale = place(&end, 4 * c);
    p.linear1 = place(&end, size * 4 * c * c);
    p.linear2 = place(&end, backward ? 0 : size * 4 * c * c);
    p.of_sums = (4 + 4 + TAPS) * c;
    if (backward) {
        p.linear1_back = place(&end, size * 4 * c * c);
        p.linear2_back = place(&end, size * 4 * c * c);
        for (int i = 0; i < 4 && b->grad_linear1; i++) p.panels[i] = place(&end, size * (i < 2 ? c : 4 * c) * p.strip);
        p.sums = place(&end, 4 * p.of_sums * b->threads);
        p.scratch_size = p.rows * (2 * p.line + 2 * p.thin + p.hidden_line + 2 * p.hidden_thin + sizeof(Moments)) + 64;
    } else {
        p.scratch_size = p.rows * (p.line + p.thin + p.hidden_thin);
    }
    p.scratch_size = up(p.scratch_size, 4096) + 64; /* threads' scratch not on the same lines of the cache */
    p.scratch = place(&end, p.scratch_size * b->threads);
    p.total = end;
    return p;
}

/* Bytes that `work` is to hold. */
int64_t convnext_forward_work(const Block *b) { return plan_of(b, 0).total; }
int64_t convnext_backward_work(const Block *b) { return plan_of(b, 1).total; }

/* The taps, TAPS x C, as the forward pass and then as the backward pass wants them, and the branch's scale. */
static void prepare(const Block *b, const Plan *plan) {
    int64_t c = b->channels;
    float *taps = (float *)(b->work + plan->taps), *scale = (float *)(b->work + plan->scale);
#pragma omp for nowait
    for (int64_t k = 0; k < c; k++) {
        for (int t = 0; t < TAPS; t++)
            taps[t * c + k] = taps[(TAPS + TAPS - 1 - t) * c + k] = b->depthwise[k * TAPS + t];
        scale[k] = b->gamma ? b->factor * b->gamma[k] : b->factor;
    }
}

/* ---- forward ------------------------------------------------------------------------------------------------------ */

static void forward_tile(const Block *b, const Plan *plan, char *scratch, int64_t first, int64_t rows) {
    int bf16 = b->bf16;
    int64_t c = b->channels, size = size_of(bf16), words = bf16 ? c / 2 : c, all_words = 4 * words;
    char *y = scratch, *n = y + plan->rows * plan->line, *h = n + plan->rows * plan->thin;
    const float *scale = (const float *)(b->work + plan->scale);
    const word *linear1 = (const word *)(b->work + plan->linear1), *linear2 = (const word *)(b->work + plan->linear2);
    depthwise(b, b->x, (const float *)(b->work + plan->taps), b->depthwise_bias, 0, first, rows, y, plan->line);
    for (int64_t i = 0; b->y && i < rows; i++)
        for (int64_t k = 0; k < c; k += LANES)
            put(bf16, (char *)b->y + (first + i) * c * size, k, load(y + i * plan->line + 4 * k));
    normalise_rows(b, plan, y, rows, n, 0);
    for (int64_t column = 0; column < 4 * c; column += CHUNK) { /* y is done with: the branch grows in its place */
        int64_t columns = least(CHUNK, 4 * c - column), k = bf16 ? columns / 2 : columns;
        char *hidden = b->hidden ? (char *)b->hidden + (first * 4 * c + column) * size : 0;
        Epilogue gelu = {GELU, h, plan->hidden_thin, b->bias1 + column, hidden, 4 * c * size, 0, 0};
        Epilogue branch = {column ? ADD : STORE, y, plan->line, 0, 0, 0, 0, 0};
        multiply(bf16, n, plan->thin, rows, linear1 + column * words, words * WIDE, words, columns, &gelu);
        const word *part = linear2 + (bf16 ? column / 2 : column) * WIDE;
        multiply(bf16, h, plan->hidden_thin, rows, part, all_words * WIDE, k, c, &branch);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < c; k += LANES) {
            vec v = _mm512_add_ps(load(y + i * plan->line + 4 * k), load(b->bias2 + k));
            int64_t at = (first + i) * c + k;
            store(b->out + at, _mm512_fmadd_ps(v, load(scale + k), load(b->x + at)));
        }
}

void convnext_forward(const void *arguments) {
    const Block *b = arguments;
    Plan p = plan_of(b, 0);
    const Plan *plan = &p;
    int64_t c = b->channels, m = b->images * b->height * b->width;
#pragma omp parallel num_threads((int)b->threads)
    {
        char *scratch = b->work + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        prepare(b, plan);
#pragma omp for nowait
        for (int64_t i = 0; i < 4 * c / WIDE; i++)
            pack_rows(b->bf16, b->linear1, c, i, (word *)(b->work + plan->linear1));
#pragma omp for
        for (int64_t i = 0; i < c / WIDE; i++)
            pack_rows(b->bf16, b->linear2, 4 * c, i, (word *)(b->work + plan->linear2));
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < m; first += plan->rows)
            forward_tile(b, plan, scratch, first, least(plan->rows, m - first));
    }
}

/* ---- backward ----------------------------------------------------------------------------------------------------- */

/* Sums over all rows, of a thread: gradients of parameters in this order. */
typedef struct {
    float *bias1, *bias2, *norm, *norm_bias, *depthwise_bias, *taps;
} Sums;

INLINE Sums sums_at(float *p, int64_t c) { return (Sums){p, p + 4 * c, p + 5 * c, p + 6 * c, p + 7 * c, p + 8 * c}; }

/* Rows of the gradient of the output: times the branch's scale as elements, as they are as panels, and their sum. */
static void take_gradient(const Block *b, const Plan *plan, int64_t first, int64_t rows, char *scaled, word *panels,
                          int64_t stride, float *sums) {
    int bf16 = b->bf16;
    int64_t c = b->channels;
    const float *scale = (const float *)(b->work + plan->scale);
    for (int64_t i = 0; i < rows; i += 1 + bf16)
        for (int64_t k = 0; k < c; k += LANES) {
            const float *from = b->grad + (first + i) * c + k;
            char *to = scaled + i * plan->thin;
            vec g = load(from), odd = _mm512_setzero_ps();
            put(bf16, to, k, _mm512_mul_ps(g, load(scale + k)));
            if (bf16 && i + 1 < rows) {
                odd = load(from + c);
                put(bf16, to + plan->thin, k, _mm512_mul_ps(odd, load(scale + k)));
            }
            if (!panels) continue;
            add_to(sums + k, _mm512_add_ps(g, odd));
            word *p = panels + k / WIDE * stride + (bf16 ? i / 2 : i) * WIDE + k % WIDE;
            _mm512_storeu_si512(p, bf16 ? paired(narrow(g), narrow(odd)) : (__m512i)g);
        }
}

/* From the gradient of the output of `rows` rows that of the depthwise convolution's, and the operands of the gradients of
   both weights; `at`: rows of the strip before them. */
static void backward_tile(const Block *b, const Plan *plan, char *scratch, int64_t first, int64_t rows, int64_t at,
                          Sums s) {
    int bf16 = b->bf16, of_weights = b->grad_linear1 != 0;
    int64_t c = b->channels, size = size_of(bf16), words = bf16 ? c / 2 : c, all_words = 4 * words;
    int64_t stride = (bf16 ? plan->strip / 2 : plan->strip) * WIDE, offset = (bf16 ? at / 2 : at) * WIDE;
    char *y = scratch, *n_grad = y + plan->rows * plan->line, *n = n_grad + plan->rows * plan->line;
    char *g = n + plan->rows * plan->thin, *a = g + plan->rows * plan->thin, *h = a + plan->rows * plan->hidden_line;
    char *a_grad = h + plan->rows * plan->hidden_thin;
    Moments *of_rows = (Moments *)(a_grad + plan->rows * plan->hidden_thin);
    const word *linear1 = (const word *)(b->work + plan->linear1);
    const word *linear1_back = (const word *)(b->work + plan->linear1_back);
    const word *linear2_back = (const word *)(b->work + plan->linear2_back);
    word *panels[4] = {0};
    for (int i = 0; i < 4 && of_weights; i++) panels[i] = (word *)(b->work + plan->panels[i]) + offset;

    if (b->y) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < c; k += LANES)
                store(y + i * plan->line + 4 * k, get(bf16, (const char *)b->y + (first + i) * c * size, k));
    } else {
        depthwise(b, b->x, (const float *)(b->work + plan->taps), b->depthwise_bias, 0, first, rows, y, plan->line);
    }
    normalise_rows(b, plan, y, rows, n, of_rows);
    if (of_weights) to_panels(bf16, n, plan->thin, rows, c, panels[0], stride);
    take_gradient(b, plan, first, rows, g, panels[1], stride, s.bias2);
    for (int64_t column = 0; column < 4 * c; column += CHUNK) {
        int64_t columns = least(CHUNK, 4 * c - column), k = bf16 ? columns / 2 : columns;
        if (b->hidden) {
            const char *hidden = (const char *)b->hidden + first * 4 * c * size;
            for (int64_t i = 0; i < rows; i++, hidden += 4 * c * size)
                for (int64_t j = 0; j < columns; j += LANES)
                    store(a + i * plan->hidden_line + 4 * j, get(bf16, hidden, column + j));
        } else {
            Epilogue e = {BIAS, a, plan->hidden_line, b->bias1 + column, 0, 0, 0, 0};
            multiply(bf16, n, plan->thin, rows, linear1 + column * words, words * WIDE, words, columns, &e);
        }
        Epilogue slope = {SLOPE, a_grad, plan->hidden_thin, 0, a, plan->hidden_line, h, s.bias1 + column};
        multiply(bf16, g, plan->thin, rows, linear2_back + column * words, words * WIDE, words, columns, &slope);
        Epilogue e = {column ? ADD : STORE, n_grad, plan->line, 0, 0, 0, 0, 0};
        const word *part = linear1_back + (bf16 ? column / 2 : column) * WIDE;
        multiply(bf16, a_grad, plan->hidden_thin, rows, part, all_words * WIDE, k, c, &e);
        if (of_weights) {
            to_panels(bf16, a_grad, plan->hidden_thin, rows, columns, panels[2] + column / WIDE * stride, stride);
            to_panels(bf16, h, plan->hidden_thin, rows, columns, panels[3] + column / WIDE * stride, stride);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        normalise_backward((float *)(y + i * plan->line), (float *)(n_grad + i * plan->line), c, of_rows[i], b->norm,
                           b->grad_y + (first + i) * c, s.norm, s.norm_bias, s.depthwise_bias);
}

/* Of a strip of `rows` rows the gradients of WIDE hidden channels' weights. */
static void weight_gradients(const Block *b, const Plan *plan, int64_t panel, int64_t rows, int add) {
    int64_t c = b->channels, words = b->bf16 ? (rows + 1) / 2 : rows;
    int64_t stride = (b->bf16 ? plan->strip / 2 : plan->strip) * WIDE;
    const word *panels[4];
    for (int i = 0; i < 4; i++) panels[i] = (const word *)(b->work + plan->panels[i]) + (i < 2 ? 0 : panel * stride);
    for (int64_t k = 0; k < c / WIDE; k++) {
        float *to1 = b->grad_linear1 + panel * WIDE * c + k * WIDE;
        float *to2 = b->grad_linear2 + k * WIDE * 4 * c + panel * WIDE;
        multiply_transposed(b->bf16, panels[2], panels[0] + k * stride, words, to1, c, add);
        multiply_transposed(b->bf16, panels[1] + k * stride, panels[3], words, to2, 4 * c, add);
    }
}

void convnext_backward(const void *arguments) {
    const Block *b = arguments;
    Plan p = plan_of(b, 1);
    const Plan *plan = &p;
    int64_t c = b->channels, m = b->images * b->height * b->width, lines = b->images * b->height;
    float *of_threads = (float *)(b->work + plan->sums);
#pragma omp parallel num_threads((int)b->threads)
    {
        char *scratch = b->work + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        float *of_thread = of_threads + omp_get_thread_num() * plan->of_sums;
        Sums s = sums_at(of_thread, c);
        memset(of_thread, 0, 4 * plan->of_sums);
        if (!b->grad_linear1) s.norm = s.norm_bias = s.depthwise_bias = 0;
        prepare(b, plan);
        if (!b->hidden) {
#pragma omp for nowait
            for (int64_t i = 0; i < 4 * c / WIDE; i++)
                pack_rows(b->bf16, b->linear1, c, i, (word *)(b->work + plan->linear1));
        }
#pragma omp for nowait
        for (int64_t i = 0; i < (b->bf16 ? c / 2 : c); i++)
            pack_columns(b->bf16, b->linear2, c, 4 * c, i, (word *)(b->work + plan->linear2_back));
#pragma omp for
        for (int64_t i = 0; i < 4 * (b->bf16 ? c / 2 : c); i++)
            pack_columns(b->bf16, b->linear1, 4 * c, c, i, (word *)(b->work + plan->linear1_back));
        for (int64_t start = 0; start < m; start += plan->strip) {
            int64_t end = least(start + plan->strip, m);
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += plan->rows)
                backward_tile(b, plan, scratch, first, least(plan->rows, end - first), first - start, s);
            if (!b->grad_linear1) continue;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < 4 * c / WIDE; i++) weight_gradients(b, plan, i, end - start, start > 0);
        }
        if (b->grad_x) {
            const float *taps = (const float *)(b->work + plan->taps) + TAPS * c;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t first = 0; first < m; first += plan->rows)
                depthwise(b, b->grad_y, taps, 0, b->grad, first, least(plan->rows, m - first),
                          (char *)(b->grad_x + first * c), 4 * c);
        }
        if (b->grad_linear1) {
#pragma omp for schedule(static)
            for (int64_t line = 0; line < lines; line++) {
                int64_t image = line / b->height * b->height * b->width * c;
                for (int64_t k = 0; k < c; k += LANES)
                    tap_gradients(b, b->x + image + k, b->grad_y + image + k, line % b->height, s.taps + k);
            }
            add_threads(of_threads, plan->of_sums, b->sums);
        }
    }
}

/* ---- between stages ------------------------------------------------------------------------------------------------ */

/* Patches of side x side pixels of a map become a pixel each by a Linear: the stem, whose LayerNorm comes after, and the
   downsampling, whose LayerNorm comes before and goes over the input's channels. Sizes are the output's. */
typedef struct {
    int64_t images, height, width, channels, outputs, side, threads, bf16;
    int64_t of_image, of_channel, of_row, of_pixel; /* floats from one to the next in x */
    float eps;
    const float *x, *weight, *bias, *norm, *norm_bias; /* weight: outputs x size of a patch, zeros at the end */
    float *out;
    /* of the backward pass; grad_x (as x, and only of the downsampling) or grad_weight null: not wanted */
    const float *grad;
    float *grad_x, *grad_weight, *sums; /* sums: gradients of bias, norm and norm_bias */
    char *work;
} Patches;

enum { PATCH_ROWS = 56 };

typedef struct {
    int64_t size, words, strip;               /* of a patch, in elements and words; rows */
    int64_t patch_line, line, float_line, wide_line; /* bytes of a row: patch; outputs; outputs, patch in floats */
    int64_t weight, weight_back, patches, grads, sums, of_sums, scratch, scratch_size, total;
} PatchPlan;

static PatchPlan patch_plan_of(const Patches *b, int backward) {
    PatchPlan p = {0};
    int64_t size = size_of(b->bf16), end = 0;
    p.size = up(b->channels * b->side * b->side, 2 * LANES); /* a multiple of what `pack_rows` takes */
    p.words = b->bf16 ? p.size / 2 : p.size;
    p.strip = up(least(most(4 * PATCH_ROWS * b->threads, 512), b->images * b->height * b->width), PATCH_ROWS);
    p.patch_line = size * p.size + PAD, p.line = size * b->outputs + PAD;
    p.float_line = 4 * b->outputs + PAD, p.wide_line = 4 * p.size + PAD;
    p.weight = place(&end, size * p.size * b->outputs);
    p.scratch_size = PATCH_ROWS * (p.patch_line + p.float_line);
    if (backward) {
        p.weight_back = place(&end, size * p.size * b->outputs);
        p.patches = place(&end, size * p.size * p.strip);
        p.grads = place(&end, size * b->outputs * p.strip);
        p.of_sums = b->outputs + 2 * (b->side == 2 ? b->channels : b->outputs);
        p.sums = place(&end, 4 * p.of_sums * b->threads);
        p.scratch_size += PATCH_ROWS * (p.line + p.wide_line) + 4 * 4 * b->channels;
    }
    p.scratch_size = up(p.scratch_size, 4096) + 64;
    p.scratch = place(&end, p.scratch_size * b->threads);
    p.total = end;
    return p;
}

int64_t convnext_patches_work(const Patches *b) { return patch_plan_of(b, 0).total; }
int64_t convnext_patches_backward_work(const Patches *b) { return patch_plan_of(b, 1).total; }

/* Floats from the beginning of x to the corner of a patch. */
INLINE int64_t corner_of(const Patches *b, int64_t at) {
    int64_t h = at / b->width % b->height, image = at / (b->width * b->height);
    return image * b->of_image + b->side * (h * b->of_row + at % b->width * b->of_pixel);
}

/* Of the stem: as they lie in the weight, channel by channel, of which the 4 x 4 pixels are a vector. */
static void gather(const Patches *b, const PatchPlan *plan, const float *corner, char *to) {
    for (int64_t c = 0; c < b->channels; c++) {
        float pixels[LANES];
        for (int i = 0; i < LANES; i++) pixels[i] = corner[c * b->of_channel + i / 4 * b->of_row + i % 4 * b->of_pixel];
        put(b->bf16, to, LANES * c, load(pixels));
    }
    for (int64_t k = LANES * b->channels; k < plan->size; k += LANES) put(b->bf16, to, k, _mm512_setzero_ps());
}

/* Of 2 x 2 pixels, each normalised: the four of a channel side by side, as they lie in the weight. */
static void gather_normalised(const Patches *b, const float *corner, char *to) {
    const float *pixel[4] = {corner, corner + b->of_pixel, corner + b->of_row, corner + b->of_row + b->of_pixel};
    Moments m[4];
    for (int i = 0; i < 4; i++) m[i] = moments(pixel[i], b->channels, b->eps);
    for (int64_t k = 0; k < b->channels; k += LANES) {
        __m512i v[4], words[4];
        vec weight = load(b->norm + k), bias = load(b->norm_bias + k);
        UNROLL for (int i = 0; i < 4; i++) {
            vec n = _mm512_mul_ps(_mm512_sub_ps(load(pixel[i] + k), all(m[i].mean)), all(m[i].scale));
            v[i] = (__m512i)_mm512_fmadd_ps(n, weight, bias);
        }
        transpose_words(v[0], v[1], v[2], v[3], words);
        transpose_lanes(words[0], words[1], words[2], words[3], v, 1);
        UNROLL for (int i = 0; i < 4; i++) put(b->bf16, to, 4 * k + LANES * i, (vec)v[i]);
    }
}

static void gather_rows(const Patches *b, const PatchPlan *plan, int64_t first, int64_t rows, char *to) {
    for (int64_t i = 0; i < rows; i++, to += plan->patch_line) {
        const float *corner = b->x + corner_of(b, first + i);
        b->side == 2 ? gather_normalised(b, corner, to) : gather(b, plan, corner, to);
    }
}

/* The Linear of gathered rows, to floats. */
static void project(const Patches *b, const PatchPlan *plan, const char *patches, int64_t rows, char *to) {
    Epilogue e = {BIAS, to, plan->float_line, b->bias, 0, 0, 0, 0};
    multiply(b->bf16, patches, plan->patch_line, rows, (const word *)(b->work + plan->weight), plan->words * WIDE,
             plan->words, b->outputs, &e);
}

static void patches_tile(const Patches *b, const PatchPlan *plan, char *scratch, int64_t first, int64_t rows) {
    char *out = scratch + PATCH_ROWS * plan->patch_line;
    gather_rows(b, plan, first, rows, scratch);
    project(b, plan, scratch, rows, out);
    for (int64_t i = 0; i < rows; i++) {
        const float *row = (const float *)(out + i * plan->float_line);
        float *to = b->out + (first + i) * b->outputs;
        if (b->side == 2)
            memcpy(to, row, 4 * b->outputs);
        else
            normalise(0, row, b->outputs, moments(row, b->outputs, b->eps), b->norm, b->norm_bias, to);
    }
}

void convnext_patches(const void *arguments) {
    const Patches *b = arguments;
    PatchPlan p = patch_plan_of(b, 0);
    const PatchPlan *plan = &p;
    int64_t m = b->images * b->height * b->width;
#pragma omp parallel num_threads((int)b->threads)
    {
        char *scratch = b->work + plan->scratch + omp_get_thread_num() * plan->scratch_size;
#pragma omp for
        for (int64_t i = 0; i < b->outputs / WIDE; i++)
            pack_rows(b->bf16, b->weight, plan->size, i, (word *)(b->work + plan->weight));
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < m; first += PATCH_ROWS)
            patches_tile(b, plan, scratch, first, least(PATCH_ROWS, m - first));
    }
}

/* The gradient of a patch, as it lies in the weight, back to its 2 x 2 pixels. */
static void scatter_normalised(const Patches *b, const float *grad, int64_t corner, float *pixels, float *of_norm,
                               float *of_norm_bias) {
    int64_t c = b->channels, at[4] = {corner, corner + b->of_pixel, corner + b->of_row, corner + b->of_row + b->of_pixel};
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i v[4], words[4];
        UNROLL for (int i = 0; i < 4; i++) v[i] = (__m512i)load(grad + 4 * k + LANES * i);
        transpose_lanes(v[0], v[1], v[2], v[3], words, 1);
        transpose_words(words[0], words[1], words[2], words[3], v);
        UNROLL for (int i = 0; i < 4; i++) store(pixels + i * c + k, (vec)v[i]);
    }
    for (int i = 0; i < 4; i++)
        normalise_backward(b->x + at[i], pixels + i * c, c, moments(b->x + at[i], c, b->eps), b->norm,
                           b->grad_x + at[i], of_norm, of_norm_bias, 0);
}

static void patches_backward_tile(const Patches *b, const PatchPlan *plan, char *scratch, int64_t first, int64_t rows,
                                  int64_t at, float *sums) {
    int bf16 = b->bf16, of_weights = b->grad_weight != 0;
    int64_t n = b->outputs, stride = (bf16 ? plan->strip / 2 : plan->strip) * WIDE;
    int64_t offset = (bf16 ? at / 2 : at) * WIDE;
    char *y = scratch + PATCH_ROWS * plan->patch_line, *g = y + PATCH_ROWS * plan->float_line;
    char *wide = g + PATCH_ROWS * plan->line;
    float *pixels = (float *)(wide + PATCH_ROWS * plan->wide_line);
    float *of_norm = of_weights ? sums + n : 0, *of_norm_bias = of_weights ? of_norm + (plan->of_sums - n) / 2 : 0;

    gather_rows(b, plan, first, rows, scratch);
    if (b->side != 2) project(b, plan, scratch, rows, y);
    for (int64_t i = 0; i < rows; i++) {
        const float *grad = b->grad + (first + i) * n;
        float *row = (float *)(y + i * plan->float_line);
        if (b->side != 2) {
            normalise_backward(row, grad, n, moments(row, n, b->eps), b->norm, row, of_norm, of_norm_bias, 0);
            grad = row;
        }
        for (int64_t k = 0; k < n; k += LANES) {
            add_to(sums + k, load(grad + k));
            put(bf16, g + i * plan->line, k, load(grad + k));
        }
    }
    if (of_weights) {
        to_panels(bf16, scratch, plan->patch_line, rows, plan->size, (word *)(b->work + plan->patches) + offset, stride);
        to_panels(bf16, g, plan->line, rows, n, (word *)(b->work + plan->grads) + offset, stride);
    }
    if (!b->grad_x) return;
    Epilogue e = {STORE, wide, plan->wide_line, 0, 0, 0, 0, 0};
    int64_t words = bf16 ? n / 2 : n;
    multiply(bf16, g, plan->line, rows, (const word *)(b->work + plan->weight_back), words * WIDE, words, plan->size, &e);
    for (int64_t i = 0; i < rows; i++)
        scatter_normalised(b, (const float *)(wide + i * plan->wide_line), corner_of(b, first + i), pixels, of_norm,
                           of_norm_bias);
}

void convnext_patches_backward(const void *arguments) {
    const Patches *b = arguments;
    PatchPlan p = patch_plan_of(b, 1);
    const PatchPlan *plan = &p;
    int64_t m = b->images * b->height * b->width, stride = (b->bf16 ? plan->strip / 2 : plan->strip) * WIDE;
    float *of_threads = (float *)(b->work + plan->sums);
    const word *patches = (const word *)(b->work + plan->patches), *grads = (const word *)(b->work + plan->grads);
#pragma omp parallel num_threads((int)b->threads)
    {
        char *scratch = b->work + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        float *of_thread = of_threads + omp_get_thread_num() * plan->of_sums;
        memset(of_thread, 0, 4 * plan->of_sums);
        if (b->side != 2) {
#pragma omp for nowait
            for (int64_t i = 0; i < b->outputs / WIDE; i++)
                pack_rows(b->bf16, b->weight, plan->size, i, (word *)(b->work + plan->weight));
        }
#pragma omp for
        for (int64_t i = 0; i < (!b->grad_x ? 0 : b->bf16 ? b->outputs / 2 : b->outputs); i++)
            pack_columns(b->bf16, b->weight, b->outputs, plan->size, i, (word *)(b->work + plan->weight_back));
        for (int64_t start = 0; start < m; start += plan->strip) {
            int64_t end = least(start + plan->strip, m), words = b->bf16 ? (end - start + 1) / 2 : end - start;
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += PATCH_ROWS)
                patches_backward_tile(b, plan, scratch, first, least(PATCH_ROWS, end - first), first - start, of_thread);
            if (!b->grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < plan->size / WIDE; i++)
                for (int64_t k = 0; k < b->outputs / WIDE; k++)
                    multiply_transposed(b->bf16, grads + k * stride, patches + i * stride, words,
                                        b->grad_weight + k * WIDE * plan->size + i * WIDE, plan->size, start > 0);
        }
        if (b->grad_weight) add_threads(of_threads, plan->of_sums, b->sums);
    }
}

/* LayerNorm of a map, N x H x W x C, to N x C x H x W. */
typedef struct {
    int64_t images, area, channels, threads;
    float eps;
    const float *x, *norm, *norm_bias;
    float *out;
    /* of the backward pass; sums: gradients of the norm's weight and bias */
    const float *grad;
    float *grad_x, *sums;
    char *work;
} Output;

/* 16 pixels, of which `rows` are there. */
static void output_tile(const Output *b, int64_t image, int64_t first, int rows) {
    int64_t c = b->channels;
    const float *x = b->x + (image * b->area + first) * c;
    Moments m[LANES];
    for (int i = 0; i < rows; i++) m[i] = moments(x + i * c, c, b->eps);
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i r[LANES];
        vec weight = load(b->norm + k), bias = load(b->norm_bias + k);
        for (int i = 0; i < LANES; i++) {
            int j = i < rows ? i : 0;
            vec n = _mm512_mul_ps(_mm512_sub_ps(load(x + j * c + k), all(m[j].mean)), all(m[j].scale));
            r[i] = (__m512i)_mm512_fmadd_ps(n, weight, bias);
        }
        transpose(r);
        float *to = b->out + (image * c + k) * b->area + first;
        for (int i = 0; i < LANES; i++) store_lanes((1u << rows) - 1, to + i * b->area, (vec)r[i]);
    }
}

void convnext_output(const void *arguments) {
    const Output *b = arguments;
    int64_t tiles = (b->area + LANES - 1) / LANES;
#pragma omp parallel for num_threads((int)b->threads) schedule(static)
    for (int64_t t = 0; t < b->images * tiles; t++) {
        int64_t first = t % tiles * LANES;
        output_tile(b, t / tiles, first, (int)least(LANES, b->area - first));
    }
}

static void output_backward_tile(const Output *b, int64_t image, int64_t first, int rows, float *scratch, float *sums) {
    int64_t c = b->channels, at = (image * b->area + first) * c;
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i r[LANES];
        const float *from = b->grad + (image * c + k) * b->area + first;
        for (int i = 0; i < LANES; i++) r[i] = (__m512i)load_lanes((1u << rows) - 1, from + i * b->area);
        transpose(r);
        for (int i = 0; i < LANES; i++) store(scratch + i * c + k, (vec)r[i]);
    }
    for (int i = 0; i < rows; i++)
        normalise_backward(b->x + at + i * c, scratch + i * c, c, moments(b->x + at + i * c, c, b->eps), b->norm,
                           b->grad_x + at + i * c, sums, sums + c, 0);
}

/* Of a thread: the gradient of 16 pixels, and sums. */
int64_t convnext_output_backward_work(const Output *b) { return b->threads * 4 * (LANES + 2) * b->channels; }

void convnext_output_backward(const void *arguments) {
    const Output *b = arguments;
    int64_t c = b->channels, tiles = (b->area + LANES - 1) / LANES;
    float *work = (float *)b->work, *of_threads = work + b->threads * LANES * c;
#pragma omp parallel num_threads((int)b->threads)
    {
        float *scratch = work + omp_get_thread_num() * LANES * c, *sums = of_threads + omp_get_thread_num() * 2 * c;
        memset(sums, 0, 4 * 2 * c);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < b->images * tiles; t++) {
            int64_t first = t % tiles * LANES;
            output_backward_tile(b, t / tiles, first, (int)least(LANES, b->area - first), scratch, sums);
        }
        add_threads(of_threads, 2 * c, b->sums);
    }
}

/* ---- the door ----------------------------------------------------------------------------------------------------- */

typedef struct {
    void (*kernel)(const void *);
    const void *arguments;
} Call;

void convnext_run(const Call *calls, int64_t n) {
    for (int64_t i = 0; i < n; i++) calls[i].kernel(calls[i].arguments);
}

/* Of which source these are the kernels. */
const char *convnext_source(void) { return SOURCE; }
