// C interface of the processor kernels. Everything else in this folder is behind it.
//
// Matrices of signs come tiled ("T64"): words[ceil(out/64)][ceil(in/32)][64], uint32, 64-byte aligned, where bit j of
// word (t, k, r) is the sign of W[64t + r][32k + j], 1 = +1. Rows beyond `out` are zero words, inputs beyond `in` zero
// bits.
// Scales are float16. Activations, outputs and biases share one dtype; sums are float32.
//
// Every function returns 0, or HFQ_BAD_ARGUMENT or HFQ_NO_MEMORY and has then written nothing.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HFQ_ABI 1
#define HFQ_BAD_ARGUMENT 1
#define HFQ_NO_MEMORY 2

enum { HFQ_F32 = 0, HFQ_F16 = 1, HFQ_BF16 = 2 };   // dtypes
enum { HFQ_EXACT = 0, HFQ_INT8 = 1 };              // activations: float32, or int8, a scale per token and 128 inputs

#define HFQ_API __attribute__((visibility("default")))

// Version of this interface; the caller refuses a library that answers another.
HFQ_API int hfq_abi(void);
// Name of the instruction set in use: "avx512vnni", "avx512", "avx2", "neon", "scalar".
HFQ_API const char* hfq_isa(void);
// Take another one; 0 if this machine has it and it was built. Not thread safe: for start-up and tests.
HFQ_API int hfq_set_isa(const char* name);
// Comma separated names that this machine can run, best first.
HFQ_API const char* hfq_isas(void);

// y[t][o] = sum_g row_scale[o, g] sum_{i in g} sign[o][i] (column_scale[i] x[t][i]) + bias[o]
// groups = 1: row_scale[out]. groups > 1: row_scale tiled as [ceil(out/64)][groups][64], in / groups a multiple of 32.
// column_scale[in] and bias[out] may be null. x is [tokens][in], y is [tokens][out], both dense.
HFQ_API int hfq_sign_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t in,
                            const uint32_t* tiles, const uint16_t* row_scale, int64_t groups,
                            const uint16_t* column_scale, const void* bias, int activation, int threads);

// y = row o (S_left (middle o (S_right (column o x)))) + bias, without leaving the library in between.
// left is tiled for (out, rank), right for (rank, in).
HFQ_API int hfq_factored_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t rank,
                                int64_t in, const uint32_t* left, const uint32_t* right, const uint16_t* row,
                                const uint16_t* middle, const uint16_t* column, const void* bias, int activation,
                                int threads);

// y[t][o] = sum_g scale[o, g] sum_{i in g} code[o][i] x[t][i] + bias[o], codes of 4 or 8 bits stored as in the file:
// per row ceil(groups/2) words of float16 scales, then ceil(in bits/32) words of (code + 2^(bits-1)), lowest first.
// row_words is the number of words from one row to the next.
HFQ_API int hfq_integer_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t in,
                               const uint32_t* words, int64_t row_words, int bits, int64_t groups, const void* bias,
                               int activation, int threads);

#ifdef __cplusplus
}
#endif
