// Between the C interface and the units: what to compute, cut into tiles, token blocks and chunks for the pool.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "api.h"
#include "kernels.h"

namespace hfq {

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline size_t size_of(int dtype) { return dtype == HFQ_F32 ? 4 : 2; }

struct Input {
    const void* at;              // [tokens][width]
    int dtype;
    int64_t width;
    const uint16_t* column;      // scales of the inputs, or null

    // Inputs first..last of a token as float32, scaled, and zeros up to `padded` of them.
    void load(float* dst, int64_t token, int64_t first, int64_t last, int64_t padded) const {
        const char* src = (const char*)at + size_of(dtype) * (size_t)(token * width + first);
        isa().convert->load(dst, src, dtype, column ? column + first : nullptr, last - first, padded);
    }
};

struct Output {
    void* at;                    // [tokens][width]
    int dtype;
    int64_t width;
    const uint16_t* scale;       // of the rows, or null
    const void* bias;            // or null

    int64_t tiles() const { return ceil_div(width, kTile); }
    // 64 sums of one token, scaled by the rows' scales, or by `own` scales where there are none.
    void put(int64_t token, int64_t tile, const float* sums, const uint16_t* own = nullptr) const;
};

// Threads that pay for a product of so many bits of packed weights times tokens, and units of work in a chunk of it.
int useful_threads(int threads, double bits);
int64_t units_per_chunk(int64_t units, double bits_per_unit, int threads);

struct SignJob {
    Output y;                    // y.scale is null with group scales
    Input x;
    const uint32_t* tiles;
    const uint16_t* group_scale; // [tiles][groups][64], or null: one group
    int64_t tokens, groups;
    int activation, threads;
};
size_t sign_scratch(const SignJob& job);              // bytes that run_sign needs
void run_sign(const SignJob& job, void* memory);

struct CodeJob {
    Output y;
    Input x;
    const uint32_t* words;
    int64_t row_words, tokens, groups;
    int bits, activation, threads;
};
size_t code_scratch(const CodeJob& job);
void run_codes(const CodeJob& job, void* memory);

}  // namespace hfq
