// NEON, the baseline of aarch64: conversion, exact sums by look-up table, exact integer codes.
#include <arm_neon.h>
#include "unit.h"

namespace {

// --- conversion ---

inline float32x4_t half_to_float(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

inline float32x4_t load4(const void* p, int dtype, int64_t i) {
    if (dtype == HFQ_F32) return vld1q_f32((const float*)p + i);
    const uint16_t* h = (const uint16_t*)p + i;
    return dtype == HFQ_F16 ? half_to_float(h) : vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h), 16));
}

inline float32x4_t scaled4(const void* src, int dtype, const uint16_t* column, int64_t i) {
    const float32x4_t v = load4(src, dtype, i);
    return column ? vmulq_f32(v, half_to_float(column + i)) : v;
}

void load(float* dst, const void* src, int dtype, const uint16_t* column, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(dst + i, scaled4(src, dtype, column, i));
    if (i < n) {  // what is left, by way of memory that may be read to its end
        alignas(16) char tail[16] = {};
        float whole[4];
        uint16_t factors[4] = {};
        const size_t size = dtype == HFQ_F32 ? 4 : 2, left = (size_t)(n - i);
        memcpy(tail, (const char*)src + size * (size_t)i, size * left);
        if (column) memcpy(factors, column + i, 2 * left);
        vst1q_f32(whole, scaled4(tail, dtype, column ? factors : nullptr, 0));
        memcpy(dst + i, whole, 4 * left);
    }
    if (padded > n) memset(dst + n, 0, 4 * (size_t)(padded - n));
}

inline uint16x4_t to_bf16(float32x4_t v) {  // to nearest even; a NaN stays one
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t r = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(v, v), r, vdupq_n_u32(0x7fc0)));
}

void finish(void* y, int dtype, const float* sums, const uint16_t* scale, const void* bias) {
    for (int i = 0; i < 64; i += 4) {
        float32x4_t v = vld1q_f32(sums + i);
        if (scale) v = vmulq_f32(v, half_to_float(scale + i));
        if (bias) v = vaddq_f32(v, load4(bias, dtype, i));
        if (dtype == HFQ_F32) vst1q_f32((float*)y + i, v);
        else vst1_u16((uint16_t*)y + i, dtype == HFQ_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : to_bf16(v));
    }
}

// --- exact sums: 16 sums of 4 inputs are 64 bytes, and tbl picks the 4 bytes of one for each of 4 rows ---

void tables(float* table, const float* x, int64_t words, int tokens) {
    const float32x4_t sign0 = {-1, 1, -1, 1}, sign1 = {-1, -1, 1, 1};
    for (int64_t g = 0; g < 8 * words; g++, x += 4, table += 16 * tokens) {
        const float32x4_t low = vfmaq_n_f32(vmulq_n_f32(sign0, x[0]), sign1, x[1]);
        const float32x4_t minus = vsubq_f32(low, vdupq_n_f32(x[2])), plus = vaddq_f32(low, vdupq_n_f32(x[2]));
        const float32x4_t last = vdupq_n_f32(x[3]);
        vst1q_f32(table, vsubq_f32(minus, last));
        vst1q_f32(table + 4, vsubq_f32(plus, last));
        vst1q_f32(table + 8, vaddq_f32(minus, last));
        vst1q_f32(table + 12, vaddq_f32(plus, last));
    }
}

// acc[t][r] += one word of 4 rows r. The nibbles of a word are made byte offsets; those of byte B, one per row, are
// then spread over the bytes of their row.
template <int T, int B>
inline __attribute__((always_inline)) void add_byte(float32x4_t (&acc)[T][4], const float* table,
                                                    const uint8x16_t (&offset)[2][4]) {
    const uint8x16_t spread = {B,     B,     B,     B,     B + 4,  B + 4,  B + 4,  B + 4,
                               B + 8, B + 8, B + 8, B + 8, B + 12, B + 12, B + 12, B + 12};
    const uint8x16_t within = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    for (int half = 0; half < 2; half++) {
        uint8x16_t index[4];
        for (int r = 0; r < 4; r++) index[r] = vorrq_u8(vqtbl1q_u8(offset[half][r], spread), within);
        for (int t = 0; t < T; t++) {
            const uint8x16x4_t entries = vld1q_u8_x4((const uint8_t*)(table + 16 * (T * (2 * B + half) + t)));
            for (int r = 0; r < 4; r++) {
                acc[t][r] = vaddq_f32(acc[t][r], vreinterpretq_f32_u8(vqtbl4q_u8(entries, index[r])));
            }
        }
    }
    if constexpr (B < 3) add_byte<T, B + 1>(acc, table, offset);
}

template <int T>
inline void add_word(float32x4_t (&acc)[T][4], const float* table, const uint32_t* words) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    uint8x16_t offset[2][4];
    for (int r = 0; r < 4; r++) {
        const uint8x16_t w = vreinterpretq_u8_u32(vld1q_u32(words + 4 * r));
        offset[0][r] = vshlq_n_u8(vandq_u8(w, nibble), 2);
        offset[1][r] = vshlq_n_u8(vshrq_n_u8(w, 4), 2);
    }
    add_byte<T, 0>(acc, table, offset);
}

// A piece is read four times, for 16 rows each: it stays in the first level cache.
template <int T> void tile(float* sums, int64_t sums_step, const float* table, const Tile& tile) {
    for (Pieces piece(tile.first, tile.last, tile.group_words, kPieceWords); piece.next();) {
        for (int row = 0; row < 64; row += 16) {
            float32x4_t acc[T][4];
            for (int i = 0; i < 4 * T; i++) acc[i / 4][i % 4] = vdupq_n_f32(0);
            for (int64_t k = piece.begin(); k < piece.end(); k++) {
                const uint32_t* words = tile.words + 64 * k + row;
                __builtin_prefetch(words + tile.ahead);
                add_word<T>(acc, table + 128 * T * (k - tile.first), words);
            }
            for (int r = 0; r < 4; r++) {
                const int at = row + 4 * r;
                const float32x4_t one = vdupq_n_f32(1);
                const float32x4_t scale = tile.scale ? half_to_float(tile.scale + 64 * piece.group() + at) : one;
                for (int t = 0; t < T; t++) {
                    float* s = sums + t * sums_step + at;
                    vst1q_f32(s, vfmaq_f32(vld1q_f32(s), acc[t][r], scale));
                }
            }
        }
    }
}

void any_tile(float* sums, int64_t sums_step, const float* table, int tokens, const Tile& from) {
    if (tokens == 1) tile<1>(sums, sums_step, table, from);
    else tile<2>(sums, sums_step, table, from);
}

// --- integer codes ---

// 4 bits: a register holds 4 words, nibble i of word l is input 8l + i. 8 bits: the order of the inputs.
void arrange(float* dst, const float* x, int bits, int64_t blocks) {
    if (bits == 8) {
        memcpy(dst, x, sizeof(float) * (size_t)(kCodeBlock * blocks));
        return;
    }
    for (int64_t quarter = 0; quarter < 4 * blocks; quarter++, dst += 32, x += 32) {
        for (int i = 0; i < 32; i++) dst[i] = x[8 * (i % 4) + i / 4];
    }
}

template <int T> inline void add_codes(float32x4_t (&acc)[T], int32x4_t code, const float* x, int64_t x_step) {
    const float32x4_t v = vcvtq_f32_s32(code);
    for (int t = 0; t < T; t++) acc[t] = vfmaq_f32(acc[t], v, vld1q_f32(x + t * x_step));
}

// A code is stored with an offset of half its range; turning its upper bit makes it a two's complement. Sums i % 2 are
// for part i of the block.
template <int T>
inline void add_block4(float32x4_t (&acc)[2][T], const uint32_t* words, const float* x, int64_t x_step) {
    for (int quarter = 0; quarter < 4; quarter++, words += 4, x += 32) {
        const uint32x4_t w = veorq_u32(vld1q_u32(words), vdupq_n_u32(0x88888888));
        const int32x4_t up = vdupq_n_s32(4);
        int32x4_t nibbles = vreinterpretq_s32_u32(w);
        for (int i = 7; i >= 0; i--) {
            add_codes<T>(acc[i % 2], vshrq_n_s32(nibbles, 28), x + 4 * i, x_step);
            nibbles = vshlq_s32(nibbles, up);
        }
    }
}

template <int T>
inline void add_block8(float32x4_t (&acc)[2][T], const uint32_t* words, const float* x, int64_t x_step) {
    for (int i = 0; i < 8; i++, words += 4, x += 16) {
        const int8x16_t code = vreinterpretq_s8_u32(veorq_u32(vld1q_u32(words), vdupq_n_u32(0x80808080)));
        const int16x8_t low = vmovl_s8(vget_low_s8(code)), high = vmovl_high_s8(code);
        add_codes<T>(acc[0], vmovl_s16(vget_low_s16(low)), x, x_step);
        add_codes<T>(acc[1], vmovl_high_s16(low), x + 4, x_step);
        add_codes<T>(acc[0], vmovl_s16(vget_low_s16(high)), x + 8, x_step);
        add_codes<T>(acc[1], vmovl_high_s16(high), x + 12, x_step);
    }
}

template <int T, int BITS>
void code_row(float* sums, const float* x, int64_t x_step, const uint32_t* codes, const float* scale,
              const CodeRows& from) {
    constexpr int kWords = 4 * BITS;
    float32x4_t total[T];
    for (int t = 0; t < T; t++) total[t] = vdupq_n_f32(0);
    for (int64_t b = 0; b < from.blocks; b++) {
        uint32_t copy[kWords];
        const uint32_t* words = whole_block(codes + kWords * b, from.words - kWords * b, copy);
        float32x4_t acc[2][T];
        for (int t = 0; t < T; t++) acc[0][t] = acc[1][t] = vdupq_n_f32(0);
        if (BITS == 4) add_block4<T>(acc, words, x + kCodeBlock * b, x_step);
        else add_block8<T>(acc, words, x + kCodeBlock * b, x_step);
        const float factor = scale ? scale[b] : 1;
        for (int t = 0; t < T; t++) total[t] = vfmaq_n_f32(total[t], vaddq_f32(acc[0][t], acc[1][t]), factor);
    }
    for (int t = 0; t < T; t++) sums[64 * t] = vaddvq_f32(total[t]);
}

template <int T, int BITS>
void code_rows(float* sums, const float* x, int64_t x_step, int rows, const CodeRows& from) {
    for (int r = 0; r < rows; r++) {
        const float* scale = from.scale ? from.scale + r * from.blocks : nullptr;
        code_row<T, BITS>(sums + r, x, x_step, from.codes + r * from.row_words, scale, from);
    }
}

void any_code_rows(float* sums, const float* x, int64_t x_step, int tokens, int rows, const CodeRows& from) {
    constexpr decltype(&code_rows<1, 4>) kernels[2][4] = {
        {code_rows<1, 4>, code_rows<2, 4>, code_rows<3, 4>, code_rows<4, 4>},
        {code_rows<1, 8>, code_rows<2, 8>, code_rows<3, 8>, code_rows<4, 8>}};
    kernels[from.bits == 8][tokens - 1](sums, x, x_step, rows, from);
}

constexpr hfq::Convert kConvert = {load, finish};
constexpr hfq::Exact kExact = {16, 128, 2, tables, any_tile};
constexpr hfq::CodesExact kCodes = {arrange, any_code_rows};

}  // namespace

const hfq::Isa hfq::kNeon = {"neon", &kConvert, &kExact, nullptr, &kCodes, nullptr};
