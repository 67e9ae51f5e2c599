/* Kernels of ConvNeXt, forward and backward, for processors with AVX-512: a block, that is
   x + gamma * MLP(LayerNorm(dwconv(x))), with or without GRN in the MLP, the stem, a downsampling, and the norm of an
   output; and, for necks and heads, a 3 x 3 convolution.

   Maps are channels_last: a pixel is a row of channels. A thread takes some hundred rows at a time (a tile) from the
   depthwise convolution to the output, so that everything in between stays in its cache. Matmuls run in float32 or
   bfloat16, the rest in float32. The unit of a matmul's operands, operand_t, has 32 bits: a float, or two bfloat16 that
   are neighbors in the dimension summed over. Both dtypes therefore share all loops except the multiply-add itself.

   Sums over all rows are accumulated per thread, and rows are assigned to threads in a fixed order: the same number of
   threads gives the same bits.

   avx512.py calls this file through the entry points at its end. Each kernel takes a struct, checks it, and returns an
   error code for what it cannot work with. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 24")

enum {
    LANES = 16,
    MR = 14,  /* rows of a matmul's tile that is held in registers */
    NR = 32,  /* its columns, two vectors; channels are multiples of it */
    DW_K = 7, /* side of a depthwise kernel */
    DW_PAD = 3,
    DW_TAPS = 49,
    KC_HIDDEN = 384, /* columns of the hidden layer at a time */
    ROW_PAD = 64,    /* bytes after a row: rows whose length is a power of two would share cache sets */
};

#ifndef KEPT_BYTES
#define KEPT_BYTES (24 << 20) /* of the hidden layer, that GRN's second sweep need not compute again: a cache's size */
#endif

typedef int32_t operand_t;
typedef __m512 f32x16;

/* ---- arguments --------------------------------------------------------------------------------------------------- */

/* The structs that Python fills. Each is a list of fields, I: int64_t, F: float, P: pointer to a type, from which come
   the declaration and a description that Python builds its own structure from. All begin with the version and the number
   of threads. The version changes when the meaning of a field does; it stands in avx512.py, too. */
enum { STRUCT_VERSION = 3 };

/* A block of maps images x height x width x channels.
   keep_prob_scale: factor of the branch under stochastic depth. grn_gamma, grn_beta: of global response normalization,
   null for none; grad_grn_gamma, grad_grn_beta as grad_pwconv1_weight. y, hidden: the depthwise convolution's output and the
   layer before GELU, which the forward pass saves and the backward pass reads; null: it computes them again.
   Backward: grad is that of the output; grad_x or grad_pwconv1_weight null: not needed; grad_gamma is null where gamma
   or grad_pwconv1_weight is; grad_y: scratch of the size of x; sums: gradients of pwconv1_bias, pwconv2_bias, norm_weight, norm_bias, dwconv_bias and the taps, in this order. */
#define BLOCK_FIELDS(I, F, P) \
    I(version) I(threads) I(images) I(height) I(width) I(channels) I(bf16) I(workspace_bytes) \
    F(eps) F(grn_eps) F(keep_prob_scale) \
    P(const float, dwconv_weight) P(const float, dwconv_bias) P(const float, norm_weight) P(const float, norm_bias) \
    P(const float, pwconv1_weight) P(const float, pwconv1_bias) P(const float, grn_gamma) \
    P(const float, grn_beta) P(const float, pwconv2_weight) P(const float, pwconv2_bias) P(const float, gamma) \
    P(const float, x) P(void, y) P(void, hidden) P(float, out) \
    P(const float, grad) P(float, grad_x) P(float, grad_y) P(float, grad_pwconv1_weight) P(float, grad_pwconv2_weight) \
    P(float, grad_grn_gamma) P(float, grad_grn_beta) P(float, grad_gamma) P(float, sums) P(char, workspace)

/* Stem (patch_size 4, LayerNorm after the convolution, over out_channels) or downsampling (patch_size 2, LayerNorm
   before it, over channels): patches of patch_size x patch_size pixels of x become a pixel each. height and width are
   the output's, strides are x's, in floats. weight: out_channels x size of a patch, padded with zeros to a multiple
   of NR. Backward: grad_x, with x's strides, of a downsampling only, or grad_weight null: not needed; sums: gradients
   of bias, norm_weight and norm_bias. */
#define PATCH_EMBED_FIELDS(I, F, P) \
    I(version) I(threads) I(images) I(height) I(width) I(channels) I(out_channels) I(patch_size) I(bf16) \
    I(workspace_bytes) I(stride_n) I(stride_c) I(stride_h) I(stride_w) \
    F(eps) \
    P(const float, x) P(const float, weight) P(const float, bias) P(const float, norm_weight) \
    P(const float, norm_bias) P(float, out) \
    P(const float, grad) P(float, grad_x) P(float, grad_weight) P(float, sums) P(char, workspace)

/* LayerNorm of a map (N, H, W, C) to (N, C, H, W), area = H * W. Backward: sums are the gradients of norm_weight and
   norm_bias. */
#define NORM_FIELDS(I, F, P) \
    I(version) I(threads) I(images) I(area) I(channels) I(workspace_bytes) \
    F(eps) \
    P(const float, x) P(const float, norm_weight) P(const float, norm_bias) P(float, out) \
    P(const float, grad) P(float, grad_x) P(float, sums) P(char, workspace)

/* A 3 x 3 convolution, stride and padding 1, and a ReLU if relu is 1, of maps images x height x width x channels.
   weight: out_channels x 3 x 3 x channels; bias may be null. */
#define CONV3X3_FIELDS(I, F, P) \
    I(version) I(threads) I(images) I(height) I(width) I(channels) I(out_channels) I(relu) I(workspace_bytes) \
    P(const float, x) P(const float, weight) P(const float, bias) P(float, out) P(char, workspace)

#define DECLARE_INT(NAME) int64_t NAME;
#define DECLARE_FLOAT(NAME) float NAME;
#define DECLARE_POINTER(TYPE, NAME) TYPE *NAME;
#define DECLARE(FIELDS) FIELDS(DECLARE_INT, DECLARE_FLOAT, DECLARE_POINTER)

typedef struct { DECLARE(BLOCK_FIELDS) } BlockArgs;
typedef struct { DECLARE(PATCH_EMBED_FIELDS) } PatchEmbedArgs;
typedef struct { DECLARE(NORM_FIELDS) } NormArgs;
typedef struct { DECLARE(CONV3X3_FIELDS) } Conv3x3Args;

/* A kernel of the queue and its struct. */
typedef int64_t (*Kernel)(const void *);
typedef struct {
    Kernel kernel;
    const void *args;
} KernelCall;

/* What kernels return, 0 for success; convnext_error_message has the texts. */
enum { OK, BAD_VERSION, BAD_THREADS, BAD_SIZE, BAD_CHANNELS, BAD_PATCH_SIZE, BAD_DTYPE, NULL_POINTER, MISALIGNED,
       BAD_WORKSPACE, BAD_STRIDE, BAD_RELU, N_ERRORS };

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* Where the parts of the workspace lie, in bytes from its beginning. */
typedef struct {
    int64_t rows;                          /* of a tile */
    int64_t wgrad_rows;                    /* of the tiles after which the gradients of the weights are taken */
    int64_t row_bytes_f32, row_bytes_elem; /* of a row of C columns: floats, elements */
    int64_t hidden_row_bytes_f32, hidden_row_bytes_elem; /* of a row of KC_HIDDEN columns */
    int64_t taps, scale, pwconv1, pwconv2, pwconv1_bwd, pwconv2_bwd, panels[4], sums, scratch, total;
    int64_t kept_tiles, kept_row_bytes, kept; /* tiles of an image whose hidden layer is kept, of 4 C columns */
    int64_t grn, grn_product;
    int64_t scratch_size;    /* of a thread */
    int64_t sums_per_thread; /* floats */
} Workspace;

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static int is_aligned(const void *p, uintptr_t bytes) { return (uintptr_t)p % bytes == 0; }

/* Whether each of n pointers is set; OK or an error code. */
static int64_t check_pointers(const void *const *pointers, int n) {
    for (int i = 0; i < n; i++) {
        if (!pointers[i]) return NULL_POINTER;
        if (!is_aligned(pointers[i], sizeof(float))) return MISALIGNED;
    }
    return OK;
}
#define CHECK_POINTERS(...) \
    check_pointers((const void *[]){__VA_ARGS__}, sizeof((const void *[]){__VA_ARGS__}) / sizeof(void *))

static int64_t check_struct(const void *args) {
    if (!args) return NULL_POINTER;
    return is_aligned(args, sizeof(int64_t)) ? OK : MISALIGNED;
}

static int64_t check_common(int64_t version, int64_t threads, int64_t bf16) {
    if (version != STRUCT_VERSION) return BAD_VERSION;
    if (threads < 1 || threads > 65536) return BAD_THREADS;
    return bf16 == 0 || bf16 == 1 ? OK : BAD_DTYPE;
}

/* Whether sizes are positive and their product is far from an overflow in bytes. */
static int64_t check_sizes(int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t sizes[4] = {a, b, c, d};
    int64_t product = 1;
    for (int i = 0; i < 4; i++)
        if (sizes[i] < 1 || __builtin_mul_overflow(product, sizes[i], &product)) return BAD_SIZE;
    return product < (int64_t)1 << 50 ? OK : BAD_SIZE;
}

static int64_t check_workspace(const char *workspace, int64_t bytes, int64_t needed) {
    if (!workspace) return NULL_POINTER;
    if (!is_aligned(workspace, 64)) return MISALIGNED;
    return bytes < needed ? BAD_WORKSPACE : OK;
}

#define RETURN_ON_ERROR(CHECK) \
    do { \
        int64_t error = (CHECK); \
        if (error) return error; \
    } while (0)

/* Sizes alone, which a workspace is planned from. */
static int64_t check_block_sizes(const BlockArgs *args) {
    RETURN_ON_ERROR(check_struct(args));
    RETURN_ON_ERROR(check_common(args->version, args->threads, args->bf16));
    RETURN_ON_ERROR(check_sizes(args->images, args->height, args->width, args->channels));
    return args->channels % NR || args->channels > 1 << 20 ? BAD_CHANNELS : OK;
}

static int64_t check_block(const BlockArgs *args, int backward) {
    RETURN_ON_ERROR(check_block_sizes(args));
    RETURN_ON_ERROR(CHECK_POINTERS(args->x, args->dwconv_weight, args->dwconv_bias, args->norm_weight, args->norm_bias,
                                   args->pwconv1_weight, args->pwconv1_bias, args->pwconv2_weight, args->pwconv2_bias));
    if (!args->grn_gamma != !args->grn_beta) return NULL_POINTER;
    if (!is_aligned(args->grn_gamma, 4) || !is_aligned(args->grn_beta, 4)) return MISALIGNED;
    if (!is_aligned(args->gamma, 4) || !is_aligned(args->y, 2) || !is_aligned(args->hidden, 2)) return MISALIGNED;
    if (!args->bf16 && (!is_aligned(args->y, 4) || !is_aligned(args->hidden, 4))) return MISALIGNED;
    if (!backward) return CHECK_POINTERS(args->out);
    RETURN_ON_ERROR(CHECK_POINTERS(args->grad, args->grad_y));
    if (!is_aligned(args->grad_x, 4)) return MISALIGNED;
    int has_grn_grads = args->grad_grn_gamma || args->grad_grn_beta;
    if (!args->grad_pwconv1_weight)
        return args->grad_pwconv2_weight || args->grad_gamma || has_grn_grads || args->sums ? NULL_POINTER : OK;
    if (!args->grad_gamma != !args->gamma) return NULL_POINTER;
    if (!args->grad_grn_gamma != !args->grn_gamma || !args->grad_grn_beta != !args->grn_gamma) return NULL_POINTER;
    if (!is_aligned(args->grad_grn_gamma, 4) || !is_aligned(args->grad_grn_beta, 4)) return MISALIGNED;
    if (!is_aligned(args->grad_gamma, 4)) return MISALIGNED;
    return CHECK_POINTERS(args->grad_pwconv1_weight, args->grad_pwconv2_weight, args->sums);
}

static int64_t check_patch_embed_sizes(const PatchEmbedArgs *args) {
    RETURN_ON_ERROR(check_struct(args));
    RETURN_ON_ERROR(check_common(args->version, args->threads, args->bf16));
    if (args->patch_size != 2 && args->patch_size != 4) return BAD_PATCH_SIZE;
    RETURN_ON_ERROR(check_sizes(args->images, args->height, args->width, args->out_channels));
    RETURN_ON_ERROR(check_sizes(args->images, args->height, args->width, args->channels));
    if (args->out_channels % NR || args->out_channels > 1 << 20 || args->channels > 1 << 20) return BAD_CHANNELS;
    return args->patch_size == 2 && args->channels % NR ? BAD_CHANNELS : OK;
}

static int64_t check_patch_embed(const PatchEmbedArgs *args, int backward) {
    RETURN_ON_ERROR(check_patch_embed_sizes(args));
    if (args->patch_size == 2 && args->stride_c != 1) return BAD_STRIDE;
    const int64_t strides[4] = {args->stride_n, args->stride_c, args->stride_h, args->stride_w};
    const int64_t sizes[4] = {args->images, args->channels, args->height * args->patch_size,
                              args->width * args->patch_size};
    for (int i = 0; i < 4; i++)
        if (strides[i] < 0 || (double)strides[i] * sizes[i] >= 0x1p50) return BAD_STRIDE;
    RETURN_ON_ERROR(CHECK_POINTERS(args->x, args->weight, args->bias, args->norm_weight, args->norm_bias));
    if (!backward) return CHECK_POINTERS(args->out);
    RETURN_ON_ERROR(CHECK_POINTERS(args->grad));
    if (args->patch_size == 4 && args->grad_x) return BAD_PATCH_SIZE;
    if (!is_aligned(args->grad_x, 4)) return MISALIGNED;
    if (!args->grad_weight) return args->sums ? NULL_POINTER : OK;
    return CHECK_POINTERS(args->grad_weight, args->sums);
}

static int64_t check_norm(const NormArgs *args, int backward) {
    RETURN_ON_ERROR(check_struct(args));
    RETURN_ON_ERROR(check_common(args->version, args->threads, 0));
    RETURN_ON_ERROR(check_sizes(args->images, args->area, args->channels, 1));
    if (args->channels % NR || args->channels > 1 << 20) return BAD_CHANNELS;
    RETURN_ON_ERROR(CHECK_POINTERS(args->x, args->norm_weight, args->norm_bias));
    return backward ? CHECK_POINTERS(args->grad, args->grad_x, args->sums) : CHECK_POINTERS(args->out);
}

static int64_t check_conv3x3_sizes(const Conv3x3Args *args) {
    RETURN_ON_ERROR(check_struct(args));
    RETURN_ON_ERROR(check_common(args->version, args->threads, 0));
    RETURN_ON_ERROR(check_sizes(args->images, args->height, args->width, args->channels));
    RETURN_ON_ERROR(check_sizes(args->images, args->height, args->width, args->out_channels));
    if (args->channels % NR || args->channels > 1 << 20) return BAD_CHANNELS;
    if (args->out_channels % NR || args->out_channels > 1 << 20) return BAD_CHANNELS;
    return args->relu == 0 || args->relu == 1 ? OK : BAD_RELU;
}

static int64_t check_conv3x3(const Conv3x3Args *args) {
    RETURN_ON_ERROR(check_conv3x3_sizes(args));
    if (!is_aligned(args->bias, 4)) return MISALIGNED;
    return CHECK_POINTERS(args->x, args->weight, args->out);
}

/* ---- vectors ----------------------------------------------------------------------------------------------------- */

INLINE f32x16 splat(float x) { return _mm512_set1_ps(x); }
INLINE f32x16 load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void store(void *p, f32x16 v) { _mm512_storeu_ps(p, v); }
INLINE float sum(f32x16 v) { return _mm512_reduce_add_ps(v); }

INLINE void add_to(float *p, f32x16 v) { store(p, _mm512_add_ps(load(p), v)); }

/* Touch only the lanes of a mask; the others are loaded as zeros. */
#ifndef __SANITIZE_ADDRESS__
INLINE f32x16 load_lanes(__mmask16 mask, const void *p) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE void store_lanes(__mmask16 mask, void *p, f32x16 v) { _mm512_mask_storeu_ps(p, mask, v); }
#else /* AddressSanitizer does not see masked instructions: for it, lane by lane. */
INLINE f32x16 load_lanes(__mmask16 mask, const float *p) {
    float lanes[LANES] = {0};
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) lanes[i] = p[i];
    return load(lanes);
}
INLINE void store_lanes(__mmask16 mask, float *p, f32x16 v) {
    float lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) p[i] = lanes[i];
}
#endif

/* The address of p[n]. It may lie outside the map that p points into, where nothing is loaded: to compute such a
   pointer would be undefined behavior. */
INLINE uintptr_t address(const float *p, int64_t n) { return (uintptr_t)p + sizeof(float) * (uintptr_t)n; }

/* Bytes of an element: float or bfloat16. */
INLINE int size_of(const int bf16) { return bf16 ? 2 : 4; }

INLINE void store_elems(const int bf16, void *row, int64_t offset, f32x16 v) {
    if (bf16)
        _mm256_storeu_si256((void *)((char *)row + 2 * offset), (__m256i)_mm512_cvtneps_pbh(v));
    else
        store((float *)row + offset, v);
}

/* Two vectors that are neighbors in memory. */
INLINE void store_elems2(const int bf16, void *row, int64_t offset, f32x16 first, f32x16 second) {
    if (bf16)
        _mm512_storeu_si512((char *)row + 2 * offset, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    else
        store((float *)row + offset, first), store((float *)row + offset + LANES, second);
}

INLINE f32x16 load_elems(const int bf16, const void *row, int64_t offset) {
    if (!bf16) return load((const float *)row + offset);
    __m256i narrow = _mm256_loadu_si256((const void *)((const char *)row + 2 * offset));
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}

/* Two rows of 16 bfloat16 as one vector of operands. */
INLINE __m512i interleave_bf16(__m256i even, __m256i odd) {
        static const int16_t order[32] __attribute__((aligned(64))) = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                                   21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

INLINE __m256i to_bf16(f32x16 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

INLINE f32x16 multiply_add(const int bf16, f32x16 a, f32x16 b, f32x16 c) {
    return bf16 ? _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b) : _mm512_fmadd_ps(a, b, c);
}

/* ---- GELU -------------------------------------------------------------------------------------------------------- */

/* GELU(x) = x Phi(x), with Phi the normal distribution function, from a table for t = |x|: upper_tail is 1 - Phi(t),
   grad the derivative of GELU at -t. In each of N_SEGMENTS segments they are polynomials in u, the distance of t from
   the middle of the segment in widths of one. A vector holds one coefficient for all segments. Absolute errors are
   below 1e-6 in float32 and 7e-5 in bfloat16. */
enum { N_SEGMENTS = 16, MAX_TERMS = 5 };

typedef struct {
    float upper_tail[MAX_TERMS][N_SEGMENTS], grad[MAX_TERMS][N_SEGMENTS];
} GeluTable;

static GeluTable gelu_table[2] __attribute__((aligned(64))); /* for float32 and bfloat16 */

/* Cut-off of the table. For t >= cutoff both polynomials are zero: the last segment of the table stays
   zero-initialized, and the width of a segment is chosen so that cutoff / width = 14.51 rounds to it. */
INLINE float gelu_cutoff(const int bf16) { return bf16 ? 4.5f : 5.5f; }
INLINE float segment_width(const int bf16) { return gelu_cutoff(bf16) / (N_SEGMENTS - 1.49f); }
INLINE int upper_tail_terms(const int bf16) { return bf16 ? 3 : MAX_TERMS; }
INLINE int gelu_grad_terms(const int bf16) { return bf16 ? 4 : MAX_TERMS; }

static double upper_tail_f64(double t) { return erfc(t / sqrt(2)) / 2; }
static double gelu_grad_f64(double t) { return upper_tail_f64(t) - t * exp(-t * t / 2) / sqrt(2 * M_PI); }

/* Fill all segments but the last: interpolate f at the zeros of a Chebyshev polynomial in Newton's form, and convert to
   powers of u. */
static void interpolate(double (*f)(double), int terms, double width, float table[MAX_TERMS][N_SEGMENTS]) {
    for (int i = 0; i < N_SEGMENTS - 1; i++) {
        double u[MAX_TERMS], d[MAX_TERMS], power[MAX_TERMS] = {0};
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

/* To be called once, before any kernel. No constructor does it, because the loader does not check the processor. */
void convnext_init_tables(void) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        interpolate(upper_tail_f64, upper_tail_terms(bf16), segment_width(bf16), gelu_table[bf16].upper_tail);
        interpolate(gelu_grad_f64, gelu_grad_terms(bf16), segment_width(bf16), gelu_table[bf16].grad);
    }
}

typedef struct {
    __m512i index;
    f32x16 u, magnitude; /* |x| */
} Segment;

INLINE Segment segment_of(const int bf16, f32x16 x) {
    /* Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits: the permute index. */
    const f32x16 round_bias = splat(0x1.8p23f), per_width = splat(1 / segment_width(bf16));
    f32x16 magnitude = _mm512_abs_ps(x);
    f32x16 t =
        _mm512_min_ps(splat(gelu_cutoff(bf16)), magnitude); /* min returns its second operand for NaN: it stays */
    f32x16 index = _mm512_fmadd_ps(t, per_width, round_bias);
    f32x16 u = _mm512_fmsub_ps(t, per_width, _mm512_sub_ps(index, round_bias));
    return (Segment){(__m512i)index, u, magnitude};
}

INLINE f32x16 polynomial(const float table[MAX_TERMS][N_SEGMENTS], const int terms, Segment p) {
    f32x16 r = _mm512_permutexvar_ps(p.index, _mm512_load_ps(table[terms - 1]));
    UNROLL for (int i = terms - 2; i >= 0; i--)
        r = _mm512_fmadd_ps(r, p.u, _mm512_permutexvar_ps(p.index, _mm512_load_ps(table[i])));
    return r;
}

/* x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)) */
INLINE f32x16 gelu_at(const int bf16, f32x16 x, Segment p) {
    f32x16 upper_tail = polynomial(gelu_table[bf16].upper_tail, upper_tail_terms(bf16), p);
    return _mm512_fnmadd_ps(p.magnitude, upper_tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

INLINE f32x16 gelu(const int bf16, f32x16 x) { return gelu_at(bf16, x, segment_of(bf16, x)); }

/* The derivative of GELU; grad(x) + grad(-x) = 1. */
INLINE f32x16 gelu_grad_at(const int bf16, f32x16 x, Segment p) {
    f32x16 grad = polynomial(gelu_table[bf16].grad, gelu_grad_terms(bf16), p);
    return _mm512_mask_sub_ps(grad, (__mmask16)~_mm512_movepi32_mask((__m512i)x), splat(1), grad);
}

/* ---- matmuls ----------------------------------------------------------------------------------------------------- */

/* What an epilogue does with the result of a matmul. */
enum { STORE, ADD, BIAS, GELU, GELU_GRAD, GRN_GRAD };

typedef struct {
    int kind;
    char *to; /* rows of `row_bytes` bytes: floats for STORE, ADD and BIAS, else elements */
    int64_t row_bytes;
    const float *bias;
    /* GELU: where to save its input, or null. GELU_GRAD, GRN_GRAD: its input, in floats */
    char *hidden;
    int64_t hidden_row_bytes;
    char *gelu;  /* GELU_GRAD: where to store GELU, with rows as in `to` */
    float *sums; /* GELU: sums of squares of columns, added to, or null. GELU_GRAD, GRN_GRAD: sums of columns */
    /* GRN_GRAD: the gradient of GELU's output is factor * result + correction * output */
    const float *factor, *correction;
} Epilogue;

/* Rows of `a` times a panel of NR columns: a[i][k] is at i * row + k * step bytes, b[k] at k * NR operands. */
INLINE void microkernel(const int bf16, const int rows, const char *a, int64_t row, int64_t step, const operand_t *b,
                        int64_t k, f32x16 acc[MR][2]) {
    const char *a7 = rows > 7 ? a + 7 * row : a; /* a second base: with two, few registers address all rows */
    UNROLL for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (; k > 0; k--, b += NR, a += step, a7 += step) {
        f32x16 b0 = load(b), b1 = load(b + LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            f32x16 x = splat(*(const float *)(i < 7 ? a + i * row : a7 + (i - 7) * row));
            acc[i][0] = multiply_add(bf16, x, b0, acc[i][0]);
            acc[i][1] = multiply_add(bf16, x, b1, acc[i][1]);
        }
    }
}

/* GELU of rows plus bias, with or without the sums of its squares. */
INLINE void gelu_epilogue(const int bf16, const int rows, const int with_squares, const Epilogue *e, int64_t first,
                          int64_t column, f32x16 acc[MR][2]) {
    f32x16 bias[2] = {load(e->bias + column), load(e->bias + column + LANES)};
    char *to = e->to + first * e->row_bytes, *hidden = e->hidden ? e->hidden + first * e->hidden_row_bytes : 0;
    f32x16 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    UNROLL for (int i = 0; i < rows; i++) {
        f32x16 v[2] = {_mm512_add_ps(acc[i][0], bias[0]), _mm512_add_ps(acc[i][1], bias[1])};
        if (hidden) store_elems2(bf16, hidden + i * e->hidden_row_bytes, column, v[0], v[1]);
        f32x16 activation[2] = {gelu(bf16, v[0]), gelu(bf16, v[1])};
        store_elems2(bf16, to + i * e->row_bytes, column, activation[0], activation[1]);
        for (int half = 0; with_squares && half < 2; half++)
            squares[half] = _mm512_fmadd_ps(activation[half], activation[half], squares[half]);
    }
    if (with_squares) add_to(e->sums + column, squares[0]), add_to(e->sums + column + LANES, squares[1]);
}

INLINE void epilogue(const int bf16, const int rows, const Epilogue *e, int64_t first, int64_t column,
                     f32x16 acc[MR][2]) {
    char *to = e->to + first * e->row_bytes;
    if (e->kind <= BIAS) {
        UNROLL for (int i = 0; i < rows; i++)
            for (int half = 0; half < 2; half++) {
                float *p = (float *)(to + i * e->row_bytes) + column + LANES * half;
                f32x16 v = acc[i][half];
                if (e->kind == ADD) v = _mm512_add_ps(v, load(p));
                if (e->kind == BIAS) v = _mm512_add_ps(v, load(e->bias + column + LANES * half));
                store(p, v);
            }
    } else if (e->kind == GELU && e->sums) {
        gelu_epilogue(bf16, rows, 1, e, first, column, acc);
    } else if (e->kind == GELU) {
        gelu_epilogue(bf16, rows, 0, e, first, column, acc);
    } else if (e->kind == GRN_GRAD) {
        f32x16 sums[2] = {load(e->sums + column), load(e->sums + column + LANES)};
        f32x16 factor[2] = {load(e->factor + column), load(e->factor + column + LANES)};
        f32x16 correction[2] = {load(e->correction + column), load(e->correction + column + LANES)};
        UNROLL for (int i = 0; i < rows; i++) {
            const float *hidden = (const float *)(e->hidden + (first + i) * e->hidden_row_bytes) + column;
            f32x16 v[2] = {load(hidden), load(hidden + LANES)};
            UNROLL for (int half = 0; half < 2; half++) {
                Segment p = segment_of(bf16, v[half]);
                f32x16 grad = _mm512_mul_ps(gelu_at(bf16, v[half], p), correction[half]);
                grad = _mm512_fmadd_ps(acc[i][half], factor[half], grad);
                v[half] = _mm512_mul_ps(grad, gelu_grad_at(bf16, v[half], p));
                sums[half] = _mm512_add_ps(sums[half], v[half]);
            }
            store_elems2(bf16, to + i * e->row_bytes, column, v[0], v[1]);
        }
        store(e->sums + column, sums[0]);
        store(e->sums + column + LANES, sums[1]);
    } else {
        f32x16 sums[2] = {load(e->sums + column), load(e->sums + column + LANES)};
        UNROLL for (int i = 0; i < rows; i++) {
            const float *hidden = (const float *)(e->hidden + (first + i) * e->hidden_row_bytes) + column;
            f32x16 v[2] = {load(hidden), load(hidden + LANES)};
            Segment p[2] = {segment_of(bf16, v[0]), segment_of(bf16, v[1])};
            f32x16 activation[2] = {gelu_at(bf16, v[0], p[0]), gelu_at(bf16, v[1], p[1])};
            store_elems2(bf16, e->gelu + (first + i) * e->row_bytes, column, activation[0], activation[1]);
            UNROLL for (int half = 0; half < 2; half++) {
                v[half] = _mm512_mul_ps(acc[i][half], gelu_grad_at(bf16, v[half], p[half]));
                sums[half] = _mm512_add_ps(sums[half], v[half]);
            }
            store_elems2(bf16, to + i * e->row_bytes, column, v[0], v[1]);
        }
        store(e->sums + column, sums[0]);
        store(e->sums + column + LANES, sums[1]);
    }
}

/* The compiler keeps `acc` in registers only if it knows the number of rows. */
#define FOR_ROWS(DO) \
    switch (rows) { \
        case 1: DO(1); case 2: DO(2); case 3: DO(3); case 4: DO(4); case 5: DO(5); case 6: DO(6); case 7: DO(7); \
        case 8: DO(8); case 9: DO(9); case 10: DO(10); case 11: DO(11); case 12: DO(12); case 13: DO(13); \
        case 14: DO(14); \
    }

#define GEMM_TILE(NAME, BF16) \
    __attribute__((noinline)) static void NAME(int64_t rows, const char *a, int64_t row_bytes, const operand_t *b, \
                                               int64_t k, const Epilogue *e, int64_t first, int64_t column) { \
        f32x16 acc[MR][2]; \
        FOR_ROWS(BF16) \
    }
#define DO_F32(N) microkernel(0, N, a, row_bytes, 4, b, k, acc); epilogue(0, N, e, first, column, acc); break
#define DO_BF16(N) microkernel(1, N, a, row_bytes, 4, b, k, acc); epilogue(1, N, e, first, column, acc); break
GEMM_TILE(gemm_tile_f32, DO_F32)
GEMM_TILE(gemm_tile_bf16, DO_BF16)

/* `rows` rows of `a` times panels of `k` x NR operands, `stride` operands apart. */
static void gemm(int bf16, const char *a, int64_t row_bytes, int64_t rows, const operand_t *b, int64_t stride,
                 int64_t k, int64_t columns, const Epilogue *e) {
    int64_t parts = (rows + MR - 1) / MR;
    for (int64_t column = 0; column < columns; column += NR, b += stride)
        for (int64_t i = 0; i < parts; i++) {
            int64_t first = i * rows / parts, n = (i + 1) * rows / parts - first;
            (bf16 ? gemm_tile_bf16 : gemm_tile_f32)(n, a + first * row_bytes, row_bytes, b, k, e, first, column);
        }
}

/* NR x NR of the gradient of a weight, a^T b: a sum over `k` rows of two panels, with `add` on top of what is there. */
#define WGRAD(NAME, BF16) \
    __attribute__((noinline)) static void NAME(const operand_t *a, const operand_t *b, int64_t k, float *to, \
                                               int64_t row_bytes, int add) { \
        f32x16 acc[MR][2]; \
        Epilogue e = {add ? ADD : STORE, (char *)to, 4 * row_bytes, 0, 0, 0, 0, 0}; \
        microkernel(BF16, 11, (const char *)a, 4, 4 * NR, b, k, acc), epilogue(BF16, 11, &e, 0, 0, acc); \
        microkernel(BF16, 11, (const char *)(a + 11), 4, 4 * NR, b, k, acc), epilogue(BF16, 11, &e, 11, 0, acc); \
        microkernel(BF16, 10, (const char *)(a + 22), 4, 4 * NR, b, k, acc), epilogue(BF16, 10, &e, 22, 0, acc); \
    }
WGRAD(wgrad_tile_f32, 0)
WGRAD(wgrad_tile_bf16, 1)

static void gemm_tn(int bf16, const operand_t *a, const operand_t *b, int64_t k, float *to, int64_t row_bytes,
                    int add) {
    (bf16 ? wgrad_tile_bf16 : wgrad_tile_f32)(a, b, k, to, row_bytes, add);
}

/* ---- packing of operands ----------------------------------------------------------------------------------------- */

/* r[0] becomes the first 128 bits of each of the four vectors, r[step] the second, and so on. */
INLINE void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i *r, const int step) {
    __m512i low01 = _mm512_shuffle_i32x4(a, b, 0x88), high01 = _mm512_shuffle_i32x4(a, b, 0xdd);
    __m512i low23 = _mm512_shuffle_i32x4(c, d, 0x88), high23 = _mm512_shuffle_i32x4(c, d, 0xdd);
    r[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    r[step] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    r[2 * step] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    r[3 * step] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}

/* Within each 128 bits, r[i] becomes operand i of a, b, c, d. */
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

/* Panel number `panel` of a weight, columns x k, for sums over k; `factor` scales what each k contributes. */
INLINE void pack_scaled_b_nt(const int scaled, int bf16, const float *weight, const float *factor, int64_t k,
                             int64_t panel, operand_t *to) {
    int64_t words = bf16 ? k / 2 : k;
    f32x16 any = _mm512_setzero_ps(); /* read in order first: memory is twice as fast then as row beside row */
    weight += panel * NR * k, to += panel * words * NR;
    for (int64_t i = 0; i < NR * k; i += LANES) any = _mm512_or_ps(any, load(weight + i));
    __asm__ volatile("" : : "v"(any));
    for (int64_t w = 0; w < words; w += LANES)
        for (int half = 0; half < NR; half += LANES) {
            __m512i r[16];
            const float *from = weight + half * k + (bf16 ? 2 * w : w);
            const float *f = factor + (bf16 ? 2 * w : w);
            UNROLL for (int i = 0; i < 16; i++) {
                f32x16 low = load(from + i * k), high = bf16 ? load(from + i * k + LANES) : low;
                if (scaled) low = _mm512_mul_ps(low, load(f)), high = bf16 ? _mm512_mul_ps(high, load(f + LANES)) : low;
                r[i] = bf16 ? (__m512i)_mm512_cvtne2ps_pbh(high, low) : (__m512i)low;
            }
            transpose(r);
            UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (w + i) * NR + half, r[i]);
        }
}

static void pack_b_nt(int bf16, const float *weight, int64_t k, int64_t panel, operand_t *to) {
    pack_scaled_b_nt(0, bf16, weight, weight, k, panel, to);
}

/* Operands `w` of all panels of a weight, k x columns, for sums over k. */
static void pack_b_nn(int bf16, const float *weight, int64_t k, int64_t columns, int64_t w, operand_t *to) {
    int64_t words = bf16 ? k / 2 : k;
    const float *from = weight + (bf16 ? 2 * w : w) * columns;
    for (int64_t c = 0; c < columns; c += LANES, from += LANES) {
        __m512i v = bf16 ? interleave_bf16(to_bf16(load(from)), to_bf16(load(from + columns))) : (__m512i)load(from);
        _mm512_storeu_si512(to + (c / NR * words + w) * NR + c % NR, v);
    }
}

/* Rows of elements as panels, `stride` operands apart, for sums over rows. In bfloat16 zeros complete an odd number of
   rows. */
static void pack_a(int bf16, const char *rows, int64_t row_bytes, int64_t n, int64_t columns, operand_t *to,
                   int64_t stride) {
    for (int64_t column = 0; column < columns; column += NR, to += stride)
        for (int64_t i = 0; i < n; i += 1 + bf16)
            for (int half = 0; half < NR; half += LANES) {
                const char *from = rows + i * row_bytes + size_of(bf16) * (column + half);
                if (!bf16) {
                    store(to + i * NR + half, load(from));
                    continue;
                }
                __m256i odd = i + 1 < n ? _mm256_loadu_si256((const void *)(from + row_bytes)) : _mm256_setzero_si256();
                __m512i pairs = interleave_bf16(_mm256_loadu_si256((const void *)from), odd);
                _mm512_storeu_si512(to + i / 2 * NR + half, pairs);
            }
}

/* ---- depthwise convolution --------------------------------------------------------------------------------------- */

/* All lanes for a pixel inside the row of the map, none for one outside. */
INLINE __mmask16 lane_mask(int64_t x, int64_t width) { return (uint64_t)x < (uint64_t)width ? 0xffff : 0; }

/* Pixels x to x + n - 1 of row h of an image, 16 channels; the first `count` are stored, `row_bytes` bytes apart. */
INLINE void dwconv_run(const int n, const BlockArgs *args, const float *image, int64_t h, int64_t x, const float *taps,
                       f32x16 start, const float *add, int64_t count, char *to, int64_t row_bytes) {
    int64_t c = args->channels;
    __mmask16 mask[22];
    f32x16 acc[16], tap[DW_K];
    UNROLL for (int i = 0; i < n + 2 * DW_PAD; i++) mask[i] = lane_mask(x + i - DW_PAD, args->width);
    UNROLL for (int j = 0; j < n; j++) acc[j] = start;
    for (int64_t v = max_i64(0, DW_PAD - h); v < min_i64(DW_K, args->height + DW_PAD - h); v++) {
        uintptr_t row = address(image, ((h + v - DW_PAD) * args->width + x - DW_PAD) * c);
        UNROLL for (int u = 0; u < DW_K; u++) tap[u] = load(taps + (v * DW_K + u) * c);
        UNROLL for (int i = 0; i < n + 2 * DW_PAD; i++, row += sizeof(float) * c) {
            f32x16 in = load_lanes(mask[i], (const float *)row);
            UNROLL for (int u = 0; u < DW_K; u++)
                if (i - u >= 0 && i - u < n) acc[i - u] = _mm512_fmadd_ps(in, tap[u], acc[i - u]);
        }
    }
    UNROLL for (int j = 0; j < n; j++)
        if (j < count) store(to + j * row_bytes, add ? _mm512_add_ps(acc[j], load(add + j * c)) : acc[j]);
}

/* `rows` pixels from number `first` on: `map` convolved with `taps` (DW_TAPS x C), plus `bias` and `add` unless these
   are null. */
static void dwconv(const BlockArgs *args, const float *map, const float *taps, const float *bias, const float *add,
                   int64_t first, int64_t rows, char *to, int64_t row_bytes) {
    int64_t c = args->channels, area = args->height * args->width, run;
    for (int64_t p = 0; p < rows; p += run) {
        int64_t pixel = first + p, h = pixel % area / args->width, x = pixel % args->width;
        const float *image = map + pixel / area * area * c;
        run = min_i64(rows - p, args->width - x);
        for (int64_t k = 0; k < c; k += LANES) {
            f32x16 start = bias ? load(bias + k) : _mm512_setzero_ps();
            for (int64_t q = 0, remaining; (remaining = run - q) > 0; q += remaining > 8 ? 16 : 8) {
                char *dest = to + (p + q) * row_bytes + 4 * k;
                const float *addend = add ? add + (pixel + q) * c + k : 0;
                if (remaining > 8)
                    dwconv_run(16, args, image + k, h, x + q, taps + k, start, addend, remaining, dest, row_bytes);
                else
                    dwconv_run(8, args, image + k, h, x + q, taps + k, start, addend, remaining, dest, row_bytes);
            }
        }
    }
}

/* Add to `sums` (DW_TAPS x C) the gradients of the taps of 16 channels from row h of an image. */
static void dwconv_wgrad(const BlockArgs *args, const float *image, const float *grad, int64_t h, float *sums) {
    int64_t c = args->channels, row_bytes = sizeof(float) * c;
    for (int64_t v = max_i64(0, DW_PAD - h); v < min_i64(DW_K, args->height + DW_PAD - h); v++) {
        uintptr_t row = address(image, ((h + v - DW_PAD) * args->width - DW_PAD) * c),
                  g_row = address(grad, h * args->width * c);
        f32x16 acc[DW_K];
        UNROLL for (int u = 0; u < DW_K; u++) acc[u] = load(sums + (v * DW_K + u) * c);
        for (int64_t x = 0; x < args->width; x += 8, row += 8 * row_bytes, g_row += 8 * row_bytes) {
            f32x16 g[8];
            UNROLL for (int j = 0; j < 8; j++)
                g[j] = load_lanes(lane_mask(x + j, args->width), (const float *)(g_row + j * row_bytes));
            UNROLL for (int i = 0; i < 8 + 2 * DW_PAD; i++) {
                f32x16 in = load_lanes(lane_mask(x + i - DW_PAD, args->width), (const float *)(row + i * row_bytes));
                UNROLL for (int u = 0; u < DW_K; u++)
                    if (i - u >= 0 && i - u < 8) acc[u] = _mm512_fmadd_ps(in, g[i - u], acc[u]);
            }
        }
        UNROLL for (int u = 0; u < DW_K; u++) store(sums + (v * DW_K + u) * c, acc[u]);
    }
}

/* Add the sums of all threads, `n` floats each. */
static void reduce_threads(const float *sums, int64_t n, float *to) {
#pragma omp for
    for (int64_t i = 0; i < n; i++) {
        to[i] = 0;
        for (int64_t t = 0; t < omp_get_num_threads(); t++) to[i] += sums[t * n + i];
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

typedef struct {
    float mean, scale;
} RowStats;

INLINE RowStats row_stats(const float *row, int64_t c, float eps) {
    f32x16 total = _mm512_setzero_ps(), squares = total;
    for (int64_t k = 0; k < c; k += LANES) total = _mm512_add_ps(total, load(row + k));
    float mean = sum(total) / c;
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 d = _mm512_sub_ps(load(row + k), splat(mean));
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    return (RowStats){mean, 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(sum(squares) / c + eps)))};
}

/* LayerNorm of a row of floats, stored as elements. */
INLINE void layer_norm(const int bf16, const float *row, int64_t c, RowStats m, const float *weight, const float *bias,
                       void *to) {
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 v = _mm512_mul_ps(_mm512_sub_ps(load(row + k), splat(m.mean)), splat(m.scale));
        store_elems(bf16, to, k, _mm512_fmadd_ps(v, load(weight + k), load(bias + k)));
    }
}

/* Store the gradient of LayerNorm's input from that of its output; add to the sums of the gradients of weight, bias and
   input, unless null. */
static void layer_norm_bwd(const float *y, const float *grad, int64_t c, RowStats m, const float *weight, float *to,
                           float *grad_weight_sum, float *grad_bias_sum, float *grad_y_sum) {
    f32x16 mean = splat(m.mean), scale = splat(m.scale), total = _mm512_setzero_ps(), product = total;
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 n = _mm512_mul_ps(_mm512_sub_ps(load(y + k), mean), scale), g = load(grad + k);
        if (grad_weight_sum) add_to(grad_weight_sum + k, _mm512_mul_ps(g, n)), add_to(grad_bias_sum + k, g);
        g = _mm512_mul_ps(g, load(weight + k));
        total = _mm512_add_ps(total, g);
        product = _mm512_fmadd_ps(g, n, product);
    }
    total = splat(sum(total) / c), product = splat(sum(product) / c);
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 n = _mm512_mul_ps(_mm512_sub_ps(load(y + k), mean), scale);
        f32x16 g = _mm512_sub_ps(_mm512_mul_ps(load(grad + k), load(weight + k)), total);
        g = _mm512_mul_ps(_mm512_fnmadd_ps(n, product, g), scale);
        if (grad_y_sum) add_to(grad_y_sum + k, g);
        store(to + k, g);
    }
}

/* The LayerNorm of a block for several rows; `stats` may be null. */
static void layer_norm_rows(const BlockArgs *args, const Workspace *plan, const char *y, int64_t rows, char *to,
                            RowStats *stats) {
    for (int64_t i = 0; i < rows; i++, y += plan->row_bytes_f32, to += plan->row_bytes_elem) {
        RowStats m = row_stats((const float *)y, args->channels, args->eps);
        if (stats) stats[i] = m;
        layer_norm(args->bf16, (const float *)y, args->channels, m, args->norm_weight, args->norm_bias, to);
    }
}

/* ---- workspace --------------------------------------------------------------------------------------------------- */

static int64_t reserve(int64_t *end, int64_t bytes) {
    int64_t offset = *end;
    *end += round_up(bytes, 64);
    return offset;
}

INLINE int64_t grn_floats(int64_t c) { return 5 * 4 * c + c; } /* of a Grn, without the squares */

static Workspace plan_workspace(const BlockArgs *args, int backward) {
    Workspace p = {0};
    int64_t c = args->channels, size = size_of(args->bf16), end = 0;
    int64_t m = (args->grn_gamma ? 1 : args->images) * args->height * args->width; /* rows that tiles share */
    int64_t target = backward ? (c <= 192 ? 128 : 64) : (c <= 768 ? 112 : 56), round = target * args->threads;
    int64_t even = (m + round - 1) / round * args->threads; /* so that each thread gets the same number of tiles */
    p.rows = max_i64(2, round_up((m + even - 1) / even, 2));
    p.wgrad_rows = round_up(min_i64(max_i64(8 * round, 1024), m), p.rows);
    p.row_bytes_f32 = 4 * c + ROW_PAD, p.row_bytes_elem = size * c + ROW_PAD,
    p.hidden_row_bytes_f32 = 4 * KC_HIDDEN + ROW_PAD, p.hidden_row_bytes_elem = size * KC_HIDDEN + ROW_PAD;
    p.taps = reserve(&end, 2 * 4 * DW_TAPS * c);
    p.scale = reserve(&end, 4 * c);
    p.pwconv1 = reserve(&end, size * 4 * c * c);
    p.pwconv2 = reserve(&end, backward ? 0 : size * 4 * c * c);
    p.sums_per_thread = (4 + 4 + DW_TAPS) * c;
    if (backward) {
        p.pwconv1_bwd = reserve(&end, size * 4 * c * c);
        p.pwconv2_bwd = reserve(&end, size * 4 * c * c);
        for (int i = 0; i < 4; i++) /* with GRN the gradient of x takes the product of panels 1 and 3, too */
            if (args->grad_pwconv1_weight || (args->grn_gamma && i % 2))
                p.panels[i] = reserve(&end, size * (i < 2 ? c : 4 * c) * p.wgrad_rows);
        p.sums = reserve(&end, 4 * p.sums_per_thread * args->threads);
        p.scratch_size = p.rows * (2 * p.row_bytes_f32 + 2 * p.row_bytes_elem + p.hidden_row_bytes_f32 +
                                   2 * p.hidden_row_bytes_elem + sizeof(RowStats)) +
                         64;
    } else {
        p.scratch_size = p.rows * (p.row_bytes_f32 + p.row_bytes_elem + p.hidden_row_bytes_elem);
    }
    p.scratch_size = round_up(p.scratch_size, 4096) + 64; /* the scratch of threads should not share cache sets */
    p.scratch = reserve(&end, p.scratch_size * args->threads);
    if (args->grn_gamma) {
        p.grn = reserve(&end, 4 * (grn_floats(c) + 4 * c * args->threads));
        p.grn_product = reserve(&end, backward ? 4 * 4 * c * c : 0);
        p.kept_row_bytes = size * 4 * c + ROW_PAD;
        int64_t tiles = (m + p.rows - 1) / p.rows;
        p.kept_tiles = backward && args->hidden ? 0 : min_i64(tiles, KEPT_BYTES / (p.rows * p.kept_row_bytes));
        p.kept = reserve(&end, p.kept_tiles * p.rows * p.kept_row_bytes);
    }
    p.total = end;
    return p;
}

/* The taps as DW_TAPS x C, for the forward pass and then flipped for the backward pass, and the scale of the branch. */
static void transpose_taps(const BlockArgs *args, const Workspace *plan) {
    int64_t c = args->channels;
    float *taps = (float *)(args->workspace + plan->taps), *scale = (float *)(args->workspace + plan->scale);
#pragma omp for nowait
    for (int64_t k = 0; k < c; k++) {
        for (int t = 0; t < DW_TAPS; t++)
            taps[t * c + k] = taps[(DW_TAPS + DW_TAPS - 1 - t) * c + k] = args->dwconv_weight[k * DW_TAPS + t];
        scale[k] = args->gamma ? args->keep_prob_scale * args->gamma[k] : args->keep_prob_scale;
    }
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* The depthwise convolution of a tile, saved where that is wanted, and its LayerNorm. */
static void normalize_tile(const BlockArgs *args, const Workspace *plan, int64_t first, int64_t rows, char *y,
                           char *n) {
    int bf16 = args->bf16;
    int64_t c = args->channels, size = size_of(bf16);
    dwconv(args, args->x, (const float *)(args->workspace + plan->taps), args->dwconv_bias, 0, first, rows, y,
           plan->row_bytes_f32);
    for (int64_t i = 0; args->y && i < rows; i++)
        for (int64_t k = 0; k < c; k += LANES)
            store_elems(bf16, (char *)args->y + (first + i) * c * size, k, load(y + i * plan->row_bytes_f32 + 4 * k));
    layer_norm_rows(args, plan, y, rows, n, 0);
}

/* Where to save the layer before GELU of a tile, from a column on; null where it is not saved. */
INLINE char *saved_hidden(const BlockArgs *args, int64_t first, int64_t column) {
    return args->hidden ? (char *)args->hidden + (first * 4 * args->channels + column) * size_of(args->bf16) : 0;
}

/* Columns of the hidden layer, from the LayerNorm's output. */
static void hidden_gemm(const BlockArgs *args, const Workspace *plan, const char *n, int64_t rows, int64_t column,
                        int64_t columns, const Epilogue *e) {
    int64_t words = args->bf16 ? args->channels / 2 : args->channels;
    const operand_t *pwconv1 = (const operand_t *)(args->workspace + plan->pwconv1);
    gemm(args->bf16, n, plan->row_bytes_elem, rows, pwconv1 + column * words, words * NR, words, columns, e);
}

/* What columns of the hidden layer contribute to the branch, which accumulates in y. */
static void branch_gemm(const BlockArgs *args, const Workspace *plan, const char *h, int64_t row_bytes, int64_t rows,
                        int64_t column, int64_t columns, char *y) {
    int64_t k = args->bf16 ? columns / 2 : columns, first = args->bf16 ? column / 2 : column;
    int64_t words = args->bf16 ? 2 * args->channels : 4 * args->channels;
    const operand_t *part = (const operand_t *)(args->workspace + plan->pwconv2) + first * NR;
    Epilogue e = {column ? ADD : STORE, y, plan->row_bytes_f32, 0, 0, 0, 0, 0};
    gemm(args->bf16, h, row_bytes, rows, part, words * NR, k, args->channels, &e);
}

/* The output of a tile, from its branch before bias and scale. */
static void add_shortcut(const BlockArgs *args, const Workspace *plan, const char *y, const float *bias, int64_t first,
                         int64_t rows) {
    int64_t c = args->channels;
    const float *scale = (const float *)(args->workspace + plan->scale);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < c; k += LANES) {
            f32x16 v = _mm512_add_ps(load(y + i * plan->row_bytes_f32 + 4 * k), load(bias + k));
            int64_t offset = (first + i) * c + k;
            store(args->out + offset, _mm512_fmadd_ps(v, load(scale + k), load(args->x + offset)));
        }
}

static void forward_tile(const BlockArgs *args, const Workspace *plan, char *scratch, int64_t first, int64_t rows) {
    int64_t c = args->channels;
    char *y = scratch, *n = y + plan->rows * plan->row_bytes_f32, *h = n + plan->rows * plan->row_bytes_elem;
    normalize_tile(args, plan, first, rows, y, n);
    for (int64_t column = 0; column < 4 * c;
         column += KC_HIDDEN) { /* y is no longer needed: the branch accumulates in its place */
        int64_t columns = min_i64(KC_HIDDEN, 4 * c - column);
        Epilogue gelu = {GELU, h, plan->hidden_row_bytes_elem, args->pwconv1_bias + column,
                         saved_hidden(args, first, column), 4 * c * size_of(args->bf16), 0, 0};
        hidden_gemm(args, plan, n, rows, column, columns, &gelu);
        branch_gemm(args, plan, h, plan->hidden_row_bytes_elem, rows, column, columns, y);
    }
    add_shortcut(args, plan, y, args->pwconv2_bias, first, rows);
}

/* ---- global response normalization ------------------------------------------------------------------------------- */

/* GRN of the hidden layer h is h * factor + beta with factor = 1 + gamma * norm / (mean + eps), where norm is that of a
   channel over the pixels of an image, and mean the mean over the channels. So an image takes two sweeps over its tiles:
   the first sums squares, the second computes the branch with factor in pwconv2's weight and beta in its bias. Of the
   first tiles the hidden layer is kept in between, of the others computed again. */
typedef struct {
    float *norm, *factor, *correction, *product, *grad_gamma; /* of 4 C channels; the last three: backward */
    float *bias;    /* pwconv2's, with what beta adds */
    float *squares; /* 4 C sums of each thread */
    float inverse_mean; /* 1 / (mean + eps) */
} Grn;

static Grn grn_of(const BlockArgs *args, const Workspace *plan) {
    float *p = (float *)(args->workspace + plan->grn);
    int64_t hidden = 4 * args->channels;
    return (Grn){p, p + hidden, p + 2 * hidden, p + 3 * hidden, p + 4 * hidden, p + 5 * hidden,
                 p + grn_floats(args->channels), 0};
}

/* Norms of the channels, and the factors that follow from them. Every thread computes the mean for itself. */
static void grn_factors(const BlockArgs *args, Grn *grn) {
    int64_t hidden = 4 * args->channels;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; j++) {
        float squares = 0;
        for (int64_t t = 0; t < omp_get_num_threads(); t++) squares += grn->squares[t * hidden + j];
        grn->norm[j] = sqrtf(squares);
    }
    double total = 0;
    for (int64_t j = 0; j < hidden; j++) total += grn->norm[j];
    grn->inverse_mean = 1 / ((float)(total / hidden) + args->grn_eps);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; j++)
        grn->factor[j] = 1 + args->grn_gamma[j] * grn->norm[j] * grn->inverse_mean;
}

INLINE void gelu_columns(const int bf16, const char *hidden, int64_t hidden_row_bytes, int64_t rows, int64_t columns,
                         char *to, int64_t row_bytes, float *squares) {
    for (int64_t j = 0; j < columns; j += LANES) {
        f32x16 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; i++) {
            f32x16 v = gelu(bf16, load_elems(bf16, hidden + i * hidden_row_bytes, j));
            store_elems(bf16, to + i * row_bytes, j, v);
            total = _mm512_fmadd_ps(v, v, total);
        }
        if (squares) add_to(squares + j, total);
    }
}

/* GELU of columns of the saved layer before it; adds to the sums of squares, unless null. */
static void gelu_rows(int bf16, const char *hidden, int64_t hidden_row_bytes, int64_t rows, int64_t columns, char *to,
                      int64_t row_bytes, float *squares) {
    if (bf16)
        gelu_columns(1, hidden, hidden_row_bytes, rows, columns, to, row_bytes, squares);
    else
        gelu_columns(0, hidden, hidden_row_bytes, rows, columns, to, row_bytes, squares);
}

/* Where the hidden layer of a tile is kept between the sweeps, null where it is not; `tile` counts within the image. */
INLINE char *kept_hidden(const BlockArgs *args, const Workspace *plan, int64_t tile) {
    return tile < plan->kept_tiles ? args->workspace + plan->kept + tile * plan->rows * plan->kept_row_bytes : 0;
}

/* First sweep: sums of squares. Where the hidden layer is not kept, the output holds what it is computed from. */
static void grn_squares_tile(const BlockArgs *args, const Workspace *plan, char *scratch, int64_t first, int64_t rows,
                             char *kept, float *squares) {
    int64_t c = args->channels, size = size_of(args->bf16);
    char *y = scratch, *n = y + plan->rows * plan->row_bytes_f32, *h = n + plan->rows * plan->row_bytes_elem;
    normalize_tile(args, plan, first, rows, y, n);
    for (int64_t i = 0; !kept && !args->hidden && i < rows; i++)
        memcpy(args->out + (first + i) * c, n + i * plan->row_bytes_elem, size * c);
    for (int64_t column = 0; column < 4 * c; column += KC_HIDDEN) {
        int64_t columns = min_i64(KC_HIDDEN, 4 * c - column);
        Epilogue e = {GELU,
                      kept ? kept + column * size : h,
                      kept ? plan->kept_row_bytes : plan->hidden_row_bytes_elem,
                      args->pwconv1_bias + column,
                      saved_hidden(args, first, column),
                      4 * c * size,
                      0,
                      squares + column};
        hidden_gemm(args, plan, n, rows, column, columns, &e);
    }
}

/* Second sweep: the output. */
static void grn_output_tile(const BlockArgs *args, const Workspace *plan, char *scratch, int64_t first, int64_t rows,
                            const char *kept, const float *bias) {
    int bf16 = args->bf16;
    int64_t c = args->channels, size = size_of(bf16);
    char *y = scratch, *n = y + plan->rows * plan->row_bytes_f32, *h = n + plan->rows * plan->row_bytes_elem;
    for (int64_t i = 0; !kept && !args->hidden && i < rows; i++)
        memcpy(n + i * plan->row_bytes_elem, args->out + (first + i) * c, size * c);
    for (int64_t column = 0; column < 4 * c; column += KC_HIDDEN) {
        int64_t columns = min_i64(KC_HIDDEN, 4 * c - column);
        if (kept) {
            branch_gemm(args, plan, kept + column * size, plan->kept_row_bytes, rows, column, columns, y);
            continue;
        }
        Epilogue e = {GELU, h, plan->hidden_row_bytes_elem, args->pwconv1_bias + column, 0, 0, 0, 0};
        if (args->hidden)
            gelu_rows(bf16, saved_hidden(args, first, column), 4 * c * size, rows, columns, h,
                      plan->hidden_row_bytes_elem, 0);
        else
            hidden_gemm(args, plan, n, rows, column, columns, &e);
        branch_gemm(args, plan, h, plan->hidden_row_bytes_elem, rows, column, columns, y);
    }
    add_shortcut(args, plan, y, bias, first, rows);
}

/* All threads: the images one after the other. */
static void grn_forward(const BlockArgs *args, const Workspace *plan, char *scratch) {
    int64_t c = args->channels, area = args->height * args->width;
    Grn grn = grn_of(args, plan);
    float *squares = grn.squares + omp_get_thread_num() * 4 * c;
#pragma omp for
    for (int64_t k = 0; k < c; k++) {
        f32x16 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < 4 * c; j += LANES)
            total = _mm512_fmadd_ps(load(args->pwconv2_weight + k * 4 * c + j), load(args->grn_beta + j), total);
        grn.bias[k] = args->pwconv2_bias[k] + sum(total);
    }
    for (int64_t start = 0; start < args->images * area; start += area) {
        memset(squares, 0, 4 * 4 * c);
        /* In a fixed order: which thread sums up what, and whose cache has the tile in the second sweep. */
#pragma omp for schedule(static, 1)
        for (int64_t first = 0; first < area; first += plan->rows)
            grn_squares_tile(args, plan, scratch, start + first, min_i64(plan->rows, area - first),
                             kept_hidden(args, plan, first / plan->rows), squares);
        grn_factors(args, &grn);
#pragma omp for
        for (int64_t i = 0; i < c / NR; i++)
            pack_scaled_b_nt(1, args->bf16, args->pwconv2_weight, grn.factor, 4 * c, i,
                             (operand_t *)(args->workspace + plan->pwconv2));
#pragma omp for schedule(static, 1)
        for (int64_t first = 0; first < area; first += plan->rows)
            grn_output_tile(args, plan, scratch, start + first, min_i64(plan->rows, area - first),
                            kept_hidden(args, plan, first / plan->rows), grn.bias);
    }
}

int64_t convnext_block(const void *pointer) {
    const BlockArgs *args = pointer;
    RETURN_ON_ERROR(check_block(args, 0));
    Workspace p = plan_workspace(args, 0);
    const Workspace *plan = &p;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, p.total));
    int64_t c = args->channels, m = args->images * args->height * args->width;
#pragma omp parallel num_threads((int)args->threads)
    {
        char *scratch = args->workspace + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        transpose_taps(args, plan);
#pragma omp for nowait
        for (int64_t i = 0; i < 4 * c / NR; i++)
            pack_b_nt(args->bf16, args->pwconv1_weight, c, i, (operand_t *)(args->workspace + plan->pwconv1));
        if (args->grn_gamma) {
            grn_forward(args, plan, scratch);
        } else {
#pragma omp for
            for (int64_t i = 0; i < c / NR; i++)
                pack_b_nt(args->bf16, args->pwconv2_weight, 4 * c, i, (operand_t *)(args->workspace + plan->pwconv2));
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < m; first += plan->rows)
                forward_tile(args, plan, scratch, first, min_i64(plan->rows, m - first));
        }
    }
    return OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* Sums over the rows of a thread: gradients of parameters, in this order. */
typedef struct {
    float *pwconv1_bias, *pwconv2_bias, *norm, *norm_bias, *depthwise_bias, *taps;
} Sums;

INLINE Sums thread_sums(float *p, int64_t c) {
    return (Sums){p, p + 4 * c, p + 5 * c, p + 6 * c, p + 7 * c, p + 8 * c};
}

/* Rows of the gradient of the output: scaled as elements, unscaled as panels, and their sum. */
static void pack_grad_out(const BlockArgs *args, const Workspace *plan, int64_t first, int64_t rows, char *scaled,
                          operand_t *panels, int64_t stride, float *sums) {
    int bf16 = args->bf16;
    int64_t c = args->channels;
    const float *scale = (const float *)(args->workspace + plan->scale);
    for (int64_t i = 0; i < rows; i += 1 + bf16)
        for (int64_t k = 0; k < c; k += LANES) {
            const float *from = args->grad + (first + i) * c + k;
            char *to = scaled + i * plan->row_bytes_elem;
            f32x16 g = load(from), odd = _mm512_setzero_ps();
            store_elems(bf16, to, k, _mm512_mul_ps(g, load(scale + k)));
            if (bf16 && i + 1 < rows) {
                odd = load(from + c);
                store_elems(bf16, to + plan->row_bytes_elem, k, _mm512_mul_ps(odd, load(scale + k)));
            }
            if (!panels) continue;
            add_to(sums + k, _mm512_add_ps(g, odd));
            operand_t *p = panels + k / NR * stride + (bf16 ? i / 2 : i) * NR + k % NR;
            _mm512_storeu_si512(p, bf16 ? interleave_bf16(to_bf16(g), to_bf16(odd)) : (__m512i)g);
        }
}

/* Rows of the depthwise convolution's output, which grad_y holds between the two sweeps of GRN. */
static void restore_y(const BlockArgs *args, const Workspace *plan, int64_t first, int64_t rows, int is_in_grad_y,
                      char *y) {
    int64_t c = args->channels;
    const float *taps = (const float *)(args->workspace + plan->taps);
    if (!args->y && !is_in_grad_y) {
        dwconv(args, args->x, taps, args->dwconv_bias, 0, first, rows, y, plan->row_bytes_f32);
        return;
    }
    int bf16 = args->y && args->bf16;
    const char *from = args->y ? args->y : args->grad_y;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < c; k += LANES)
            store(y + i * plan->row_bytes_f32 + 4 * k, load_elems(bf16, from, (first + i) * c + k));
}

/* First sweep of GRN: sums of squares, and the operands of the product of the output's gradient and the hidden layer. */
static void grn_product_tile(const BlockArgs *args, const Workspace *plan, char *scratch, int64_t first, int64_t rows,
                             int64_t strip_row, char *kept, float *squares, Sums s) {
    int bf16 = args->bf16;
    int64_t c = args->channels, size = size_of(bf16);
    int64_t stride = (bf16 ? plan->wgrad_rows / 2 : plan->wgrad_rows) * NR,
            offset = (bf16 ? strip_row / 2 : strip_row) * NR;
    char *y = scratch, *n = y + plan->rows * plan->row_bytes_f32, *g = n + plan->rows * plan->row_bytes_elem,
         *h = g + plan->rows * plan->row_bytes_elem;
    operand_t *grad_panels = (operand_t *)(args->workspace + plan->panels[1]) + offset,
              *panels = (operand_t *)(args->workspace + plan->panels[3]) + offset;
    pack_grad_out(args, plan, first, rows, g, grad_panels, stride, s.pwconv2_bias);
    if (!args->y || !args->hidden) restore_y(args, plan, first, rows, 0, y);
    for (int64_t i = 0; !args->y && i < rows; i++)
        memcpy(args->grad_y + (first + i) * c, y + i * plan->row_bytes_f32, 4 * c);
    if (!args->hidden) layer_norm_rows(args, plan, y, rows, n, 0);
    for (int64_t column = 0; column < 4 * c; column += KC_HIDDEN) {
        int64_t columns = min_i64(KC_HIDDEN, 4 * c - column);
        Epilogue e = {GELU,
                      h,
                      plan->hidden_row_bytes_elem,
                      args->pwconv1_bias + column,
                      kept ? kept + column * size : 0,
                      plan->kept_row_bytes,
                      0,
                      squares + column};
        if (args->hidden)
            gelu_rows(bf16, saved_hidden(args, first, column), 4 * c * size, rows, columns, h,
                      plan->hidden_row_bytes_elem, squares + column);
        else
            hidden_gemm(args, plan, n, rows, column, columns, &e);
        pack_a(bf16, h, plan->hidden_row_bytes_elem, rows, columns, panels + column / NR * stride, stride);
    }
}

/* The gradient of the depthwise convolution's output for `rows` rows, and the operands of the weights' gradients;
   `strip_row`: number of rows before them in these operands. With GRN, second sweep: `kept` is where the first has kept
   the layer before GELU, or null. */
static void backward_tile(const BlockArgs *args, const Workspace *plan, char *scratch, int64_t first, int64_t rows,
                          int64_t strip_row, Sums s, const Grn *grn, const char *kept) {
    int bf16 = args->bf16, needs_wgrad = args->grad_pwconv1_weight != 0;
    int64_t c = args->channels, size = size_of(bf16), words = bf16 ? c / 2 : c, hidden_words = 4 * words;
    int64_t stride = (bf16 ? plan->wgrad_rows / 2 : plan->wgrad_rows) * NR,
            offset = (bf16 ? strip_row / 2 : strip_row) * NR;
    char *y = scratch, *n_grad = y + plan->rows * plan->row_bytes_f32, *n = n_grad + plan->rows * plan->row_bytes_f32;
    char *g = n + plan->rows * plan->row_bytes_elem, *a = g + plan->rows * plan->row_bytes_elem,
         *h = a + plan->rows * plan->hidden_row_bytes_f32;
    char *a_grad = h + plan->rows * plan->hidden_row_bytes_elem;
    RowStats *stats = (RowStats *)(a_grad + plan->rows * plan->hidden_row_bytes_elem);
    const operand_t *pwconv1_bwd = (const operand_t *)(args->workspace + plan->pwconv1_bwd);
    const operand_t *pwconv2_bwd = (const operand_t *)(args->workspace + plan->pwconv2_bwd);
    operand_t *panels[4] = {0};
    for (int i = 0; i < 4 && needs_wgrad; i++) panels[i] = (operand_t *)(args->workspace + plan->panels[i]) + offset;

    restore_y(args, plan, first, rows, grn != 0, y);
    layer_norm_rows(args, plan, y, rows, n, stats);
    if (needs_wgrad) pack_a(bf16, n, plan->row_bytes_elem, rows, c, panels[0], stride);
    pack_grad_out(args, plan, first, rows, g, grn ? 0 : panels[1], stride, s.pwconv2_bias);
    for (int64_t column = 0; column < 4 * c; column += KC_HIDDEN) {
        int64_t columns = min_i64(KC_HIDDEN, 4 * c - column), k = bf16 ? columns / 2 : columns;
        const char *hidden = kept ? kept + column * size : saved_hidden(args, first, column);
        if (hidden) {
            for (int64_t i = 0; i < rows; i++, hidden += kept ? plan->kept_row_bytes : 4 * c * size)
                for (int64_t j = 0; j < columns; j += LANES)
                    store(a + i * plan->hidden_row_bytes_f32 + 4 * j, load_elems(bf16, hidden, j));
        } else {
            Epilogue e = {BIAS, a, plan->hidden_row_bytes_f32, args->pwconv1_bias + column, 0, 0, 0, 0};
            hidden_gemm(args, plan, n, rows, column, columns, &e);
        }
        Epilogue grad = {grn ? GRN_GRAD : GELU_GRAD,
                         a_grad,
                         plan->hidden_row_bytes_elem,
                         0,
                         a,
                         plan->hidden_row_bytes_f32,
                         h,
                         s.pwconv1_bias + column,
                         grn ? grn->factor + column : 0,
                         grn ? grn->correction + column : 0};
        gemm(bf16, g, plan->row_bytes_elem, rows, pwconv2_bwd + column * words, words * NR, words, columns, &grad);
        Epilogue e = {column ? ADD : STORE, n_grad, plan->row_bytes_f32, 0, 0, 0, 0, 0};
        const operand_t *part = pwconv1_bwd + (bf16 ? column / 2 : column) * NR;
        gemm(bf16, a_grad, plan->hidden_row_bytes_elem, rows, part, hidden_words * NR, k, c, &e);
        if (needs_wgrad) {
            pack_a(bf16, a_grad, plan->hidden_row_bytes_elem, rows, columns, panels[2] + column / NR * stride, stride);
            if (!grn)
                pack_a(bf16, h, plan->hidden_row_bytes_elem, rows, columns, panels[3] + column / NR * stride, stride);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        layer_norm_bwd((float *)(y + i * plan->row_bytes_f32), (float *)(n_grad + i * plan->row_bytes_f32), c, stats[i],
                       args->norm_weight, args->grad_y + (first + i) * c, s.norm, s.norm_bias, s.depthwise_bias);
}

/* The gradients of pwconv1's and pwconv2's weights, unless null, of NR hidden channels from `rows` rows. */
static void linear_wgrad(const BlockArgs *args, const Workspace *plan, int64_t panel, int64_t rows, float *grad1,
                         float *grad2, int add) {
    int64_t c = args->channels, words = args->bf16 ? (rows + 1) / 2 : rows;
    int64_t stride = (args->bf16 ? plan->wgrad_rows / 2 : plan->wgrad_rows) * NR;
    const operand_t *panels[4];
    for (int i = 0; i < 4; i++)
        panels[i] = (const operand_t *)(args->workspace + plan->panels[i]) + (i < 2 ? 0 : panel * stride);
    for (int64_t k = 0; k < c / NR; k++) {
        if (grad1) gemm_tn(args->bf16, panels[2], panels[0] + k * stride, words, grad1 + (panel * c + k) * NR, c, add);
        if (grad2)
            gemm_tn(args->bf16, panels[1] + k * stride, panels[3], words, grad2 + (4 * k * c + panel) * NR, 4 * c, add);
    }
}

/* What the branch's scale makes of the gradients of pwconv2, which so far are those of a branch without one: the
   gradient of gamma, and theirs, channel by channel. */
static void scale_branch_grads(const BlockArgs *args, const Workspace *plan) {
    int64_t c = args->channels;
    const float *scale = (const float *)(args->workspace + plan->scale);
    float *grad_bias = args->sums + 4 * c;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c; i++) {
        const float *weight = args->pwconv2_weight + i * 4 * c;
        float *grad = args->grad_pwconv2_weight + i * 4 * c;
        f32x16 product[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t j = 0; j < 4 * c; j += 2 * LANES)
            for (int half = 0; half < 2; half++) {
                f32x16 g = load(grad + j + LANES * half);
                if (args->grn_beta) g = _mm512_fmadd_ps(load(args->grn_beta + j + LANES * half), splat(grad_bias[i]), g);
                product[half] = _mm512_fmadd_ps(g, load(weight + j + LANES * half), product[half]);
                store(grad + j + LANES * half, _mm512_mul_ps(g, splat(scale[i])));
            }
        if (args->grad_gamma) {
            float total = sum(_mm512_add_ps(product[0], product[1])) + grad_bias[i] * args->pwconv2_bias[i];
            args->grad_gamma[i] = args->keep_prob_scale * total;
        }
        grad_bias[i] *= scale[i];
    }
}

/* Of an image, from `sums`, C x 4 C, the gradient of pwconv2's weight as without GRN: what it contributes to the
   gradients of that weight and of gamma, and how the gradient of the hidden layer follows from that of GRN's output. */
static void grn_gradients(const BlockArgs *args, const Workspace *plan, const float *sums, int is_first, Grn *grn) {
    int64_t c = args->channels, hidden = 4 * c;
    const float *scale = (const float *)(args->workspace + plan->scale);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; j += LANES) {
        f32x16 product = _mm512_setzero_ps(), factor = load(grn->factor + j);
        for (int64_t k = 0; k < c; k++) {
            f32x16 g = load(sums + k * hidden + j);
            product = _mm512_fmadd_ps(_mm512_mul_ps(g, splat(scale[k])), load(args->pwconv2_weight + k * hidden + j),
                                      product);
            if (!args->grad_pwconv2_weight) continue;
            float *to = args->grad_pwconv2_weight + k * hidden + j;
            store(to, _mm512_fmadd_ps(g, factor, is_first ? _mm512_setzero_ps() : load(to)));
        }
        store(grn->product + j, product);
        f32x16 gamma = _mm512_mul_ps(product, _mm512_mul_ps(load(grn->norm + j), splat(grn->inverse_mean)));
        store(grn->grad_gamma + j, is_first ? gamma : _mm512_add_ps(gamma, load(grn->grad_gamma + j)));
    }
    double total = 0;
    for (int64_t j = 0; j < hidden; j++) total += args->grn_gamma[j] * grn->product[j] * grn->norm[j];
    float mean = (float)(total / hidden) * grn->inverse_mean;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; j++) {
        float grad_norm = (args->grn_gamma[j] * grn->product[j] - mean) * grn->inverse_mean;
        grn->correction[j] = grn->norm[j] > 0 ? grad_norm / grn->norm[j] : 0; /* torch's norm has no slope at zero */
    }
}

/* Gradients of GRN's parameters, once those of pwconv2 are scaled. */
static void grn_param_grads(const BlockArgs *args, const Grn *grn) {
    int64_t c = args->channels, hidden = 4 * c;
    const float *grad_bias = args->sums + hidden;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < hidden; j += LANES) {
        f32x16 total = _mm512_setzero_ps();
        for (int64_t k = 0; k < c; k++)
            total = _mm512_fmadd_ps(load(args->pwconv2_weight + k * hidden + j), splat(grad_bias[k]), total);
        store(args->grad_grn_beta + j, total);
        store(args->grad_grn_gamma + j, load(grn->grad_gamma + j));
    }
}

/* All threads: gradients of the depthwise convolution's output and of the Linears' weights, image by image. */
static void grn_backward(const BlockArgs *args, const Workspace *plan, char *scratch, Sums s, Grn *grn) {
    int64_t c = args->channels, area = args->height * args->width;
    float *squares = grn->squares + omp_get_thread_num() * 4 * c;
    float *product = (float *)(args->workspace + plan->grn_product);
    for (int64_t base = 0; base < args->images * area; base += area) {
        memset(squares, 0, 4 * 4 * c);
        for (int64_t start = 0; start < area; start += plan->wgrad_rows) {
            int64_t end = min_i64(start + plan->wgrad_rows, area);
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += plan->rows)
                grn_product_tile(args, plan, scratch, base + first, min_i64(plan->rows, end - first), first - start,
                                 kept_hidden(args, plan, first / plan->rows), squares, s);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < 4 * c / NR; i++) linear_wgrad(args, plan, i, end - start, 0, product, start > 0);
        }
        grn_factors(args, grn);
        grn_gradients(args, plan, product, base == 0, grn);
        for (int64_t start = 0; start < area; start += plan->wgrad_rows) {
            int64_t end = min_i64(start + plan->wgrad_rows, area);
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += plan->rows)
                backward_tile(args, plan, scratch, base + first, min_i64(plan->rows, end - first), first - start, s,
                              grn, kept_hidden(args, plan, first / plan->rows));
            if (!args->grad_pwconv1_weight) continue;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < 4 * c / NR; i++)
                linear_wgrad(args, plan, i, end - start, args->grad_pwconv1_weight, 0, base + start > 0);
        }
    }
}

int64_t convnext_block_backward(const void *pointer) {
    const BlockArgs *args = pointer;
    RETURN_ON_ERROR(check_block(args, 1));
    Workspace p = plan_workspace(args, 1);
    const Workspace *plan = &p;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, p.total));
    int64_t c = args->channels, m = args->images * args->height * args->width, n_rows = args->images * args->height;
    float *all_sums = (float *)(args->workspace + plan->sums);
#pragma omp parallel num_threads((int)args->threads)
    {
        char *scratch = args->workspace + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        float *own_sums = all_sums + omp_get_thread_num() * plan->sums_per_thread;
        Sums s = thread_sums(own_sums, c);
        memset(own_sums, 0, 4 * plan->sums_per_thread);
        if (!args->grad_pwconv1_weight) s.norm = s.norm_bias = s.depthwise_bias = 0;
        transpose_taps(args, plan);
        if (!args->hidden) {
#pragma omp for nowait
            for (int64_t i = 0; i < 4 * c / NR; i++)
                pack_b_nt(args->bf16, args->pwconv1_weight, c, i, (operand_t *)(args->workspace + plan->pwconv1));
        }
#pragma omp for nowait
        for (int64_t i = 0; i < (args->bf16 ? c / 2 : c); i++)
            pack_b_nn(args->bf16, args->pwconv2_weight, c, 4 * c, i,
                      (operand_t *)(args->workspace + plan->pwconv2_bwd));
#pragma omp for
        for (int64_t i = 0; i < 4 * (args->bf16 ? c / 2 : c); i++)
            pack_b_nn(args->bf16, args->pwconv1_weight, 4 * c, c, i,
                      (operand_t *)(args->workspace + plan->pwconv1_bwd));
        Grn grn = grn_of(args, plan);
        if (args->grn_gamma) grn_backward(args, plan, scratch, s, &grn);
        for (int64_t start = 0; !args->grn_gamma && start < m; start += plan->wgrad_rows) {
            int64_t end = min_i64(start + plan->wgrad_rows, m);
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += plan->rows)
                backward_tile(args, plan, scratch, first, min_i64(plan->rows, end - first), first - start, s, 0, 0);
            if (!args->grad_pwconv1_weight) continue;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < 4 * c / NR; i++)
                linear_wgrad(args, plan, i, end - start, args->grad_pwconv1_weight, args->grad_pwconv2_weight,
                             start > 0);
        }
        if (args->grad_x) {
            const float *taps = (const float *)(args->workspace + plan->taps) + DW_TAPS * c;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t first = 0; first < m; first += plan->rows)
                dwconv(args, args->grad_y, taps, 0, args->grad, first, min_i64(plan->rows, m - first),
                       (char *)(args->grad_x + first * c), 4 * c);
        }
        if (args->grad_pwconv1_weight) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n_rows; row++) {
                int64_t image = row / args->height * args->height * args->width * c;
                for (int64_t k = 0; k < c; k += LANES)
                    dwconv_wgrad(args, args->x + image + k, args->grad_y + image + k, row % args->height, s.taps + k);
            }
            reduce_threads(all_sums, plan->sums_per_thread, args->sums);
            scale_branch_grads(args, plan);
            if (args->grn_gamma) grn_param_grads(args, &grn);
        }
    }
    return OK;
}

/* ---- stem, downsampling, output norm ----------------------------------------------------------------------------- */

enum { PATCH_ROWS = 56 };

typedef struct {
    int64_t size, words; /* of a patch: elements, operands */
    int64_t wgrad_rows;  /* of the tiles after which the gradient of the weight is taken */
    int64_t patch_row_bytes_elem, patch_row_bytes_f32; /* of a patch */
    int64_t out_row_bytes_elem, out_row_bytes_f32;     /* of a row of the output */
    int64_t weight, weight_bwd, patches, grads, sums, scratch, total;
    int64_t scratch_size;    /* of a thread */
    int64_t sums_per_thread; /* floats */
} PatchWorkspace;

static PatchWorkspace plan_patch_workspace(const PatchEmbedArgs *args, int backward) {
    PatchWorkspace p = {0};
    int64_t size = size_of(args->bf16), end = 0;
    p.size = round_up(args->channels * args->patch_size * args->patch_size,
                      2 * LANES); /* a multiple of what pack_b_nt takes */
    p.words = args->bf16 ? p.size / 2 : p.size;
    p.wgrad_rows = round_up(
        min_i64(max_i64(4 * PATCH_ROWS * args->threads, 512), args->images * args->height * args->width), PATCH_ROWS);
    p.patch_row_bytes_elem = size * p.size + ROW_PAD, p.out_row_bytes_elem = size * args->out_channels + ROW_PAD;
    p.out_row_bytes_f32 = 4 * args->out_channels + ROW_PAD, p.patch_row_bytes_f32 = 4 * p.size + ROW_PAD;
    p.weight = reserve(&end, size * p.size * args->out_channels);
    p.scratch_size = PATCH_ROWS * (p.patch_row_bytes_elem + p.out_row_bytes_f32);
    if (backward) {
        p.weight_bwd = reserve(&end, size * p.size * args->out_channels);
        p.patches = reserve(&end, size * p.size * p.wgrad_rows);
        p.grads = reserve(&end, size * args->out_channels * p.wgrad_rows);
        p.sums_per_thread = args->out_channels + 2 * (args->patch_size == 2 ? args->channels : args->out_channels);
        p.sums = reserve(&end, 4 * p.sums_per_thread * args->threads);
        p.scratch_size += PATCH_ROWS * (p.out_row_bytes_elem + p.patch_row_bytes_f32) + 4 * 4 * args->channels;
    }
    p.scratch_size = round_up(p.scratch_size, 4096) + 64;
    p.scratch = reserve(&end, p.scratch_size * args->threads);
    p.total = end;
    return p;
}

/* Floats from the beginning of x to the corner of patch number `patch`. */
INLINE int64_t patch_offset(const PatchEmbedArgs *args, int64_t patch) {
    int64_t h = patch / args->width % args->height, image = patch / (args->width * args->height);
    return image * args->stride_n + args->patch_size * (h * args->stride_h + patch % args->width * args->stride_w);
}

/* A patch of the stem as a row, in the order of the weight: channel by channel, whose 4 x 4 pixels are a vector. */
static void im2col(const PatchEmbedArgs *args, const PatchWorkspace *plan, const float *corner, char *to) {
    for (int64_t c = 0; c < args->channels; c++) {
        float pixels[LANES];
        for (int i = 0; i < LANES; i++)
            pixels[i] = corner[c * args->stride_c + i / 4 * args->stride_h + i % 4 * args->stride_w];
        store_elems(args->bf16, to, LANES * c, load(pixels));
    }
    for (int64_t k = LANES * args->channels; k < plan->size; k += LANES)
        store_elems(args->bf16, to, k, _mm512_setzero_ps());
}

/* A patch of 2 x 2 pixels as a row, each pixel normalized, in the order of the weight: the four pixels of a channel
   side by side. */
static void im2col_layer_norm(const PatchEmbedArgs *args, const float *corner, char *to) {
    const float *pixel[4] = {corner, corner + args->stride_w, corner + args->stride_h,
                             corner + args->stride_h + args->stride_w};
    RowStats m[4];
    for (int i = 0; i < 4; i++) m[i] = row_stats(pixel[i], args->channels, args->eps);
    for (int64_t k = 0; k < args->channels; k += LANES) {
        __m512i v[4], words[4];
        f32x16 weight = load(args->norm_weight + k), bias = load(args->norm_bias + k);
        UNROLL for (int i = 0; i < 4; i++) {
            f32x16 n = _mm512_mul_ps(_mm512_sub_ps(load(pixel[i] + k), splat(m[i].mean)), splat(m[i].scale));
            v[i] = (__m512i)_mm512_fmadd_ps(n, weight, bias);
        }
        transpose_words(v[0], v[1], v[2], v[3], words);
        transpose_lanes(words[0], words[1], words[2], words[3], v, 1);
        UNROLL for (int i = 0; i < 4; i++) store_elems(args->bf16, to, 4 * k + LANES * i, (f32x16)v[i]);
    }
}

static void im2col_rows(const PatchEmbedArgs *args, const PatchWorkspace *plan, int64_t first, int64_t rows, char *to) {
    for (int64_t i = 0; i < rows; i++, to += plan->patch_row_bytes_elem) {
        const float *corner = args->x + patch_offset(args, first + i);
        args->patch_size == 2 ? im2col_layer_norm(args, corner, to) : im2col(args, plan, corner, to);
    }
}

/* The Linear of patches, stored as floats. */
static void patch_gemm(const PatchEmbedArgs *args, const PatchWorkspace *plan, const char *patches, int64_t rows,
                       char *to) {
    Epilogue e = {BIAS, to, plan->out_row_bytes_f32, args->bias, 0, 0, 0, 0};
    gemm(args->bf16, patches, plan->patch_row_bytes_elem, rows, (const operand_t *)(args->workspace + plan->weight),
         plan->words * NR, plan->words, args->out_channels, &e);
}

static void patch_embed_tile(const PatchEmbedArgs *args, const PatchWorkspace *plan, char *scratch, int64_t first,
                             int64_t rows) {
    char *out = scratch + PATCH_ROWS * plan->patch_row_bytes_elem;
    im2col_rows(args, plan, first, rows, scratch);
    patch_gemm(args, plan, scratch, rows, out);
    for (int64_t i = 0; i < rows; i++) {
        const float *row = (const float *)(out + i * plan->out_row_bytes_f32);
        float *to = args->out + (first + i) * args->out_channels;
        if (args->patch_size == 2)
            memcpy(to, row, 4 * args->out_channels);
        else
            layer_norm(0, row, args->out_channels, row_stats(row, args->out_channels, args->eps), args->norm_weight,
                       args->norm_bias, to);
    }
}

int64_t convnext_patch_embed(const void *pointer) {
    const PatchEmbedArgs *args = pointer;
    RETURN_ON_ERROR(check_patch_embed(args, 0));
    PatchWorkspace p = plan_patch_workspace(args, 0);
    const PatchWorkspace *plan = &p;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, p.total));
    int64_t m = args->images * args->height * args->width;
#pragma omp parallel num_threads((int)args->threads)
    {
        char *scratch = args->workspace + plan->scratch + omp_get_thread_num() * plan->scratch_size;
#pragma omp for
        for (int64_t i = 0; i < args->out_channels / NR; i++)
            pack_b_nt(args->bf16, args->weight, plan->size, i, (operand_t *)(args->workspace + plan->weight));
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < m; first += PATCH_ROWS)
            patch_embed_tile(args, plan, scratch, first, min_i64(PATCH_ROWS, m - first));
    }
    return OK;
}

/* The gradient of a patch, in the order of the weight, back to its 2 x 2 pixels. */
static void col2im_layer_norm_bwd(const PatchEmbedArgs *args, const float *grad, int64_t corner, float *pixels,
                                  float *grad_norm, float *grad_norm_bias) {
    int64_t c = args->channels, offset[4] = {corner, corner + args->stride_w, corner + args->stride_h,
                                             corner + args->stride_h + args->stride_w};
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i v[4], words[4];
        UNROLL for (int i = 0; i < 4; i++) v[i] = (__m512i)load(grad + 4 * k + LANES * i);
        transpose_lanes(v[0], v[1], v[2], v[3], words, 1);
        transpose_words(words[0], words[1], words[2], words[3], v);
        UNROLL for (int i = 0; i < 4; i++) store(pixels + i * c + k, (f32x16)v[i]);
    }
    for (int i = 0; i < 4; i++)
        layer_norm_bwd(args->x + offset[i], pixels + i * c, c, row_stats(args->x + offset[i], c, args->eps),
                       args->norm_weight, args->grad_x + offset[i], grad_norm, grad_norm_bias, 0);
}

static void patch_embed_backward_tile(const PatchEmbedArgs *args, const PatchWorkspace *plan, char *scratch,
                                      int64_t first, int64_t rows, int64_t strip_row, float *sums) {
    int bf16 = args->bf16, needs_wgrad = args->grad_weight != 0;
    int64_t n = args->out_channels, stride = (bf16 ? plan->wgrad_rows / 2 : plan->wgrad_rows) * NR;
    int64_t offset = (bf16 ? strip_row / 2 : strip_row) * NR;
    char *y = scratch + PATCH_ROWS * plan->patch_row_bytes_elem, *g = y + PATCH_ROWS * plan->out_row_bytes_f32;
    char *grad_patches = g + PATCH_ROWS * plan->out_row_bytes_elem;
    float *pixels = (float *)(grad_patches + PATCH_ROWS * plan->patch_row_bytes_f32);
    float *grad_norm = needs_wgrad ? sums + n : 0,
          *grad_norm_bias = needs_wgrad ? grad_norm + (plan->sums_per_thread - n) / 2 : 0;

    im2col_rows(args, plan, first, rows, scratch);
    if (args->patch_size != 2) patch_gemm(args, plan, scratch, rows, y);
    for (int64_t i = 0; i < rows; i++) {
        const float *grad = args->grad + (first + i) * n;
        float *row = (float *)(y + i * plan->out_row_bytes_f32);
        if (args->patch_size != 2) {
            layer_norm_bwd(row, grad, n, row_stats(row, n, args->eps), args->norm_weight, row, grad_norm,
                           grad_norm_bias, 0);
            grad = row;
        }
        for (int64_t k = 0; k < n; k += LANES) {
            add_to(sums + k, load(grad + k));
            store_elems(bf16, g + i * plan->out_row_bytes_elem, k, load(grad + k));
        }
    }
    if (needs_wgrad) {
        pack_a(bf16, scratch, plan->patch_row_bytes_elem, rows, plan->size,
               (operand_t *)(args->workspace + plan->patches) + offset, stride);
        pack_a(bf16, g, plan->out_row_bytes_elem, rows, n, (operand_t *)(args->workspace + plan->grads) + offset,
               stride);
    }
    if (!args->grad_x) return;
    Epilogue e = {STORE, grad_patches, plan->patch_row_bytes_f32, 0, 0, 0, 0, 0};
    int64_t words = bf16 ? n / 2 : n;
    gemm(bf16, g, plan->out_row_bytes_elem, rows, (const operand_t *)(args->workspace + plan->weight_bwd), words * NR,
         words, plan->size, &e);
    for (int64_t i = 0; i < rows; i++)
        col2im_layer_norm_bwd(args, (const float *)(grad_patches + i * plan->patch_row_bytes_f32),
                              patch_offset(args, first + i), pixels, grad_norm, grad_norm_bias);
}

int64_t convnext_patch_embed_backward(const void *pointer) {
    const PatchEmbedArgs *args = pointer;
    RETURN_ON_ERROR(check_patch_embed(args, 1));
    PatchWorkspace p = plan_patch_workspace(args, 1);
    const PatchWorkspace *plan = &p;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, p.total));
    int64_t m = args->images * args->height * args->width,
            stride = (args->bf16 ? plan->wgrad_rows / 2 : plan->wgrad_rows) * NR;
    float *all_sums = (float *)(args->workspace + plan->sums);
    const operand_t *patches = (const operand_t *)(args->workspace + plan->patches),
                    *grads = (const operand_t *)(args->workspace + plan->grads);
#pragma omp parallel num_threads((int)args->threads)
    {
        char *scratch = args->workspace + plan->scratch + omp_get_thread_num() * plan->scratch_size;
        float *own_sums = all_sums + omp_get_thread_num() * plan->sums_per_thread;
        memset(own_sums, 0, 4 * plan->sums_per_thread);
        if (args->patch_size != 2) {
#pragma omp for nowait
            for (int64_t i = 0; i < args->out_channels / NR; i++)
                pack_b_nt(args->bf16, args->weight, plan->size, i, (operand_t *)(args->workspace + plan->weight));
        }
#pragma omp for
        for (int64_t i = 0; i < (!args->grad_x ? 0 : args->bf16 ? args->out_channels / 2 : args->out_channels); i++)
            pack_b_nn(args->bf16, args->weight, args->out_channels, plan->size, i,
                      (operand_t *)(args->workspace + plan->weight_bwd));
        for (int64_t start = 0; start < m; start += plan->wgrad_rows) {
            int64_t end = min_i64(start + plan->wgrad_rows, m),
                    words = args->bf16 ? (end - start + 1) / 2 : end - start;
#pragma omp for schedule(static, 1)
            for (int64_t first = start; first < end; first += PATCH_ROWS)
                patch_embed_backward_tile(args, plan, scratch, first, min_i64(PATCH_ROWS, end - first), first - start,
                                          own_sums);
            if (!args->grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < plan->size / NR; i++)
                for (int64_t k = 0; k < args->out_channels / NR; k++)
                    gemm_tn(args->bf16, grads + k * stride, patches + i * stride, words,
                            args->grad_weight + k * NR * plan->size + i * NR, plan->size, start > 0);
        }
        if (args->grad_weight) reduce_threads(all_sums, plan->sums_per_thread, args->sums);
    }
    return OK;
}

/* 16 pixels, of which `rows` exist. */
static void norm_nchw_tile(const NormArgs *args, int64_t image, int64_t first, int rows) {
    int64_t c = args->channels;
    const float *x = args->x + (image * args->area + first) * c;
    RowStats m[LANES];
    for (int i = 0; i < rows; i++) m[i] = row_stats(x + i * c, c, args->eps);
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i r[LANES];
        f32x16 weight = load(args->norm_weight + k), bias = load(args->norm_bias + k);
        for (int i = 0; i < LANES; i++) {
            int j = i < rows ? i : 0;
            f32x16 n = _mm512_mul_ps(_mm512_sub_ps(load(x + j * c + k), splat(m[j].mean)), splat(m[j].scale));
            r[i] = (__m512i)_mm512_fmadd_ps(n, weight, bias);
        }
        transpose(r);
        float *to = args->out + (image * c + k) * args->area + first;
        for (int i = 0; i < LANES; i++) store_lanes((1u << rows) - 1, to + i * args->area, (f32x16)r[i]);
    }
}

int64_t convnext_norm_nchw(const void *pointer) {
    const NormArgs *args = pointer;
    RETURN_ON_ERROR(check_norm(args, 0));
    int64_t tiles = (args->area + LANES - 1) / LANES;
#pragma omp parallel for num_threads((int)args->threads) schedule(static)
    for (int64_t t = 0; t < args->images * tiles; t++) {
        int64_t first = t % tiles * LANES;
        norm_nchw_tile(args, t / tiles, first, (int)min_i64(LANES, args->area - first));
    }
    return OK;
}

static void norm_nchw_backward_tile(const NormArgs *args, int64_t image, int64_t first, int rows, float *scratch,
                                    float *sums) {
    int64_t c = args->channels, offset = (image * args->area + first) * c;
    for (int64_t k = 0; k < c; k += LANES) {
        __m512i r[LANES];
        const float *from = args->grad + (image * c + k) * args->area + first;
        for (int i = 0; i < LANES; i++) r[i] = (__m512i)load_lanes((1u << rows) - 1, from + i * args->area);
        transpose(r);
        for (int i = 0; i < LANES; i++) store(scratch + i * c + k, (f32x16)r[i]);
    }
    for (int i = 0; i < rows; i++)
        layer_norm_bwd(args->x + offset + i * c, scratch + i * c, c, row_stats(args->x + offset + i * c, c, args->eps),
                       args->norm_weight, args->grad_x + offset + i * c, sums, sums + c, 0);
}

/* For each thread the gradient of 16 pixels, and sums. */
static int64_t norm_workspace_bytes(const NormArgs *args) { return args->threads * 4 * (LANES + 2) * args->channels; }

int64_t convnext_norm_nchw_backward(const void *pointer) {
    const NormArgs *args = pointer;
    RETURN_ON_ERROR(check_norm(args, 1));
    int64_t c = args->channels, tiles = (args->area + LANES - 1) / LANES;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, norm_workspace_bytes(args)));
    float *work = (float *)args->workspace, *all_sums = work + args->threads * LANES * c;
#pragma omp parallel num_threads((int)args->threads)
    {
        float *scratch = work + omp_get_thread_num() * LANES * c, *sums = all_sums + omp_get_thread_num() * 2 * c;
        memset(sums, 0, 4 * 2 * c);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < args->images * tiles; t++) {
            int64_t first = t % tiles * LANES;
            norm_nchw_backward_tile(args, t / tiles, first, (int)min_i64(LANES, args->area - first), scratch, sums);
        }
        reduce_threads(all_sums, 2 * c, args->sums);
    }
    return OK;
}

/* ---- 3 x 3 convolution ------------------------------------------------------------------------------------------- */

/* Winograd's algorithm, F(2 x 2, 3 x 3) of Lavin and Gray, 2016 (arXiv:1509.09308). Of a tile of 2 x 2 pixels, the 4 x 4
   around it and the taps are transformed, so that 16 matmuls do instead of 36. Its rounding errors are those of a sum in
   another order. */

enum {
    CONV_TAPS = 9,
    N_PRODUCTS = 16,          /* of a tile */
    WINOGRAD_BYTES = 4 << 20, /* of a thread's tiles: a share of the last cache, the weights take another */
};

/* Where the parts of the workspace lie, and the number of tiles that a thread takes at a time. */
typedef struct {
    int64_t rows, row_bytes, out_row_bytes, weight, scratch, scratch_size, total;
} Conv3x3Workspace;

static Conv3x3Workspace plan_conv3x3(const Conv3x3Args *args) {
    Conv3x3Workspace p = {0};
    int64_t end = 0;
    p.row_bytes = 4 * args->channels + ROW_PAD;
    p.out_row_bytes = 4 * args->out_channels + ROW_PAD;
    p.rows = WINOGRAD_BYTES / (N_PRODUCTS * (p.row_bytes + p.out_row_bytes));
    p.rows = min_i64(max_i64(p.rows / MR, 1), 8) * MR;
    p.weight = reserve(&end, N_PRODUCTS * args->channels * args->out_channels * 4);
    p.scratch_size = round_up(N_PRODUCTS * p.rows * (p.row_bytes + p.out_row_bytes), 64);
    p.scratch = reserve(&end, args->threads * p.scratch_size);
    p.total = end;
    return p;
}

/* G g G^T of 16 channels, whose taps are `channels` apart. */
INLINE void transform_taps(const float *taps, int64_t channels, f32x16 u[N_PRODUCTS]) {
    f32x16 half = splat(.5f), g[3][3], t[4][3];
    UNROLL for (int i = 0; i < CONV_TAPS; i++) g[i / 3][i % 3] = load(taps + i * channels);
    UNROLL for (int j = 0; j < 3; j++) {
        f32x16 outer = _mm512_mul_ps(half, _mm512_add_ps(g[0][j], g[2][j])), inner = _mm512_mul_ps(half, g[1][j]);
        t[0][j] = g[0][j], t[3][j] = g[2][j];
        t[1][j] = _mm512_add_ps(outer, inner), t[2][j] = _mm512_sub_ps(outer, inner);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        f32x16 outer = _mm512_mul_ps(half, _mm512_add_ps(t[i][0], t[i][2])), inner = _mm512_mul_ps(half, t[i][1]);
        u[4 * i] = t[i][0], u[4 * i + 3] = t[i][2];
        u[4 * i + 1] = _mm512_add_ps(outer, inner), u[4 * i + 2] = _mm512_sub_ps(outer, inner);
    }
}

/* Panel number `panel` of the 16 matrices of the transformed weight. */
static void pack_winograd_weight(const Conv3x3Args *args, int64_t panel, operand_t *to) {
    float rows[N_PRODUCTS][LANES][LANES] __attribute__((aligned(64)));
    int64_t c = args->channels;
    for (int64_t k = 0; k < c; k += LANES)
        for (int half = 0; half < NR; half += LANES) {
            for (int i = 0; i < LANES; i++) {
                f32x16 u[N_PRODUCTS];
                transform_taps(args->weight + (panel * NR + half + i) * CONV_TAPS * c + k, c, u);
                UNROLL for (int p = 0; p < N_PRODUCTS; p++) store(rows[p][i], u[p]);
            }
            for (int p = 0; p < N_PRODUCTS; p++) {
                __m512i r[LANES];
                UNROLL for (int i = 0; i < LANES; i++) r[i] = (__m512i)load(rows[p][i]);
                transpose(r);
                operand_t *at = to + p * c * args->out_channels + (panel * c + k) * NR + half;
                UNROLL for (int i = 0; i < LANES; i++) _mm512_storeu_si512(at + i * NR, r[i]);
            }
        }
}

/* The upper left pixel of a Winograd tile. */
typedef struct {
    int64_t image, y, x;
} Corner;

INLINE int64_t winograd_tiles(const Conv3x3Args *args) {
    return args->images * ((args->height + 1) / 2) * ((args->width + 1) / 2);
}

INLINE Corner corner_of(const Conv3x3Args *args, int64_t tile) {
    int64_t ny = (args->height + 1) / 2, nx = (args->width + 1) / 2;
    return (Corner){tile / (ny * nx), tile / nx % ny * 2, tile % nx * 2};
}

/* B^T d B of the 4 x 4 pixels around a tile, a row of each of 16 matrices. */
static void winograd_input(const Conv3x3Args *args, Corner at, char *to, int64_t matrix_bytes) {
    int64_t c = args->channels;
    const float *image = args->x + at.image * args->height * args->width * c;
    __mmask16 mask[4][4];
    uintptr_t row[4];
    for (int i = 0; i < 4; i++) {
        int64_t y = at.y + i - 1;
        row[i] = address(image, (y * args->width + at.x - 1) * c);
        for (int j = 0; j < 4; j++) mask[i][j] = lane_mask(y, args->height) & lane_mask(at.x + j - 1, args->width);
    }
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 t[4][4];
        UNROLL for (int j = 0; j < 4; j++) {
            f32x16 d[4];
            UNROLL for (int i = 0; i < 4; i++)
                d[i] = load_lanes(mask[i][j], (const float *)(row[i] + sizeof(float) * (j * c + k)));
            t[0][j] = _mm512_sub_ps(d[0], d[2]), t[1][j] = _mm512_add_ps(d[1], d[2]);
            t[2][j] = _mm512_sub_ps(d[2], d[1]), t[3][j] = _mm512_sub_ps(d[1], d[3]);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            char *row_to = to + 4 * i * matrix_bytes + 4 * k;
            store(row_to, _mm512_sub_ps(t[i][0], t[i][2]));
            store(row_to + matrix_bytes, _mm512_add_ps(t[i][1], t[i][2]));
            store(row_to + 2 * matrix_bytes, _mm512_sub_ps(t[i][2], t[i][1]));
            store(row_to + 3 * matrix_bytes, _mm512_sub_ps(t[i][1], t[i][3]));
        }
    }
}

/* A^T m A, and bias and ReLU: the pixels of a tile that lie in the map. */
static void winograd_output(const Conv3x3Args *args, Corner at, const char *from, int64_t matrix_bytes) {
    int64_t c = args->out_channels, line = args->width * c;
    float *out = args->out + (at.image * args->height + at.y) * line + at.x * c;
    int height = at.y + 1 < args->height ? 2 : 1, has_right = at.x + 1 < args->width;
    f32x16 minimum = splat(args->relu ? 0 : -INFINITY);
    for (int64_t k = 0; k < c; k += LANES) {
        f32x16 t[2][4], bias = args->bias ? load(args->bias + k) : _mm512_setzero_ps();
        UNROLL for (int j = 0; j < 4; j++) {
            f32x16 m[4];
            UNROLL for (int i = 0; i < 4; i++) m[i] = load(from + (4 * i + j) * matrix_bytes + 4 * k);
            t[0][j] = _mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]);
            t[1][j] = _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]);
        }
        for (int i = 0; i < height; i++) {
            f32x16 left = _mm512_add_ps(_mm512_add_ps(t[i][0], t[i][1]), _mm512_add_ps(t[i][2], bias));
            f32x16 right = _mm512_sub_ps(_mm512_sub_ps(t[i][1], t[i][2]), _mm512_sub_ps(t[i][3], bias));
            store(out + i * line + k, _mm512_max_ps(minimum, left));
            if (has_right) store(out + i * line + c + k, _mm512_max_ps(minimum, right));
        }
    }
}

static void winograd_tile(const Conv3x3Args *args, const Conv3x3Workspace *plan, char *scratch, int64_t first,
                          int64_t n) {
    int64_t in_bytes = plan->rows * plan->row_bytes, out_bytes = plan->rows * plan->out_row_bytes;
    int64_t c = args->channels, matrix = c * args->out_channels;
    char *products = scratch + N_PRODUCTS * in_bytes;
    const operand_t *b = (const operand_t *)(args->workspace + plan->weight);
    for (int64_t i = 0; i < n; i++)
        winograd_input(args, corner_of(args, first + i), scratch + i * plan->row_bytes, in_bytes);
    for (int64_t p = 0; p < N_PRODUCTS; p++) {
        Epilogue e = {STORE, products + p * out_bytes, plan->out_row_bytes, 0, 0, 0, 0, 0};
        gemm(0, scratch + p * in_bytes, plan->row_bytes, n, b + p * matrix, c * NR, c, args->out_channels, &e);
    }
    for (int64_t i = 0; i < n; i++)
        winograd_output(args, corner_of(args, first + i), products + i * plan->out_row_bytes, out_bytes);
}

int64_t convnext_conv3x3(const void *pointer) {
    const Conv3x3Args *args = pointer;
    RETURN_ON_ERROR(check_conv3x3(args));
    Conv3x3Workspace p = plan_conv3x3(args);
    const Conv3x3Workspace *plan = &p;
    RETURN_ON_ERROR(check_workspace(args->workspace, args->workspace_bytes, p.total));
    operand_t *weight = (operand_t *)(args->workspace + p.weight);
#pragma omp parallel num_threads((int)args->threads)
    {
        char *scratch = args->workspace + p.scratch + omp_get_thread_num() * p.scratch_size;
#pragma omp for
        for (int64_t i = 0; i < args->out_channels / NR; i++)
            pack_winograd_weight(args, i, weight);
        int64_t tiles = winograd_tiles(args);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tiles; first += p.rows)
            winograd_tile(args, plan, scratch, first, min_i64(p.rows, tiles - first));
    }
    return OK;
}

/* ---- entry points ------------------------------------------------------------------------------------------------ */

/* Bytes that the workspace of a kernel has to hold, or an error code with a minus. */
int64_t convnext_block_workspace(const BlockArgs *args) {
    int64_t error = check_block_sizes(args);
    return error ? -error : plan_workspace(args, 0).total;
}
int64_t convnext_block_backward_workspace(const BlockArgs *args) {
    int64_t error = check_block_sizes(args);
    return error ? -error : plan_workspace(args, 1).total;
}
int64_t convnext_patch_embed_workspace(const PatchEmbedArgs *args) {
    int64_t error = check_patch_embed_sizes(args);
    return error ? -error : plan_patch_workspace(args, 0).total;
}
int64_t convnext_patch_embed_backward_workspace(const PatchEmbedArgs *args) {
    int64_t error = check_patch_embed_sizes(args);
    return error ? -error : plan_patch_workspace(args, 1).total;
}
int64_t convnext_norm_nchw_backward_workspace(const NormArgs *args) {
    int64_t error = check_norm(args, 1);
    return error ? -error : norm_workspace_bytes(args);
}
int64_t convnext_conv3x3_workspace(const Conv3x3Args *args) {
    int64_t error = check_conv3x3_sizes(args);
    return error ? -error : plan_conv3x3(args).total;
}

/* Run kernels one after the other. Returns 0, or 256 times the index of the kernel that failed plus its error code. */
int64_t convnext_run_queue(const KernelCall *calls, int64_t n) {
    RETURN_ON_ERROR(check_struct(calls));
    if (n < 0) return BAD_SIZE;
    for (int64_t i = 0; i < n; i++) {
        int64_t error = calls[i].kernel ? calls[i].kernel(calls[i].args) : NULL_POINTER;
        if (error) return 256 * i + error;
    }
    return OK;
}

const char *convnext_error_message(int64_t code) {
    static const char *const messages[N_ERRORS] = {
        "success",
        "the struct has another version",
        "the number of threads is not positive",
        "a size is not positive, or too large",
        "the number of channels is not a multiple of 32",
        "the patch size is not 2 or 4",
        "bf16 is not 0 or 1",
        "a pointer is null that must not be, or set without its companion",
        "a pointer is misaligned",
        "the workspace is too small",
        "the strides are not those of channels_last, or negative, or too large",
        "relu is not 0 or 1",
    };
    return code >= 0 && code < N_ERRORS ? messages[code] : "unknown error";
}

/* The structs for Python: name and fields in order, each with its kind (i int64, f float, p pointer). */
#define DESCRIBE_INT(NAME) " i:" #NAME
#define DESCRIBE_FLOAT(NAME) " f:" #NAME
#define DESCRIBE_POINTER(TYPE, NAME) " p:" #NAME
#define DESCRIBE(FIELDS) FIELDS(DESCRIBE_INT, DESCRIBE_FLOAT, DESCRIBE_POINTER)

static const struct {
    const char *description;
    int64_t size;
} structs[] = {
    {"BlockArgs" DESCRIBE(BLOCK_FIELDS), sizeof(BlockArgs)},
    {"PatchEmbedArgs" DESCRIBE(PATCH_EMBED_FIELDS), sizeof(PatchEmbedArgs)},
    {"NormArgs" DESCRIBE(NORM_FIELDS), sizeof(NormArgs)},
    {"Conv3x3Args" DESCRIBE(CONV3X3_FIELDS), sizeof(Conv3x3Args)},
    {"KernelCall p:kernel p:args", sizeof(KernelCall)},
};
enum { N_STRUCTS = sizeof(structs) / sizeof(structs[0]) };

const char *convnext_describe_struct(int64_t i) { return i >= 0 && i < N_STRUCTS ? structs[i].description : ""; }
int64_t convnext_struct_size(int64_t i) { return i >= 0 && i < N_STRUCTS ? structs[i].size : -1; }

/* Hash of the source that was compiled, see setup.py. */
const char *convnext_source(void) { return SOURCE; }
