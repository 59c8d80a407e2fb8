// Products with int8 activations for NEON, in terms of the unit's `dot` and `dot_lane`.
#pragma once
#include "unit.h"

namespace {

// --- activations ---

// Scale of n inputs, a multiple of 32. The largest is found by its bits as an integer, where NaN is above all numbers.
inline float scale_of(const float* x, int64_t n, float* inverse) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += 4) top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
    return block_scale(vmaxvq_u32(top), inverse);
}

// 16 inputs as bytes in their order.
inline int8x16_t round16(const float* x, float inverse) {
    const auto round4 = [=](const float* p) { return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p), inverse))); };
    const int16x8_t low = vcombine_s16(round4(x), round4(x + 4)), high = vcombine_s16(round4(x + 8), round4(x + 12));
    return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

// 32 values in the order of kernels.h: an 8 x 4 transposition of bytes.
inline void store_word(int8_t* dst, int8x16_t low, int8x16_t high) {
    const uint8x16_t pairs = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
    const uint16x8_t a = vreinterpretq_u16_s8(vqtbl1q_s8(low, pairs));
    const uint16x8_t b = vreinterpretq_u16_s8(vqtbl1q_s8(high, pairs));
    vst1q_s8(dst, vreinterpretq_s8_u16(vzip1q_u16(a, b)));
    vst1q_s8(dst + 16, vreinterpretq_s8_u16(vzip2q_u16(a, b)));
}

void quantize(int8_t* values, float* scale, int32_t* start, const float* x, int64_t words, int64_t group_words) {
    for (Pieces block(0, words, group_words, kBlockWords); block.next();) {
        float inverse;
        scale[block.index()] = scale_of(x + 32 * block.begin(), 32 * (block.end() - block.begin()), &inverse);
        int32_t sum = 0;
        for (int64_t k = block.begin(); k < block.end(); k++) {
            const int8x16_t low = round16(x + 32 * k, inverse), high = round16(x + 32 * k + 16, inverse);
            store_word(values + 32 * k, low, high);
            sum += vaddlvq_s8(low) + vaddlvq_s8(high);
        }
        start[block.index()] = -sum;
    }
}

// --- signs ---

inline float32x4_t half_to_float(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

inline int8x16_t isolate(uint32x4_t w, int bit) {
    return vreinterpretq_s8_u8(vandq_u8(vreinterpretq_u8_u32(w), vdupq_n_u8((uint8_t)(1 << bit))));
}

inline void fold(float* sums, int32x4_t acc, float factor, const uint16_t* scale) {
    float32x4_t v = vcvtq_f32_s32(acc);
    if (scale) v = vmulq_f32(v, half_to_float(scale));
    vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), v, factor));
}

// acc[b] += bits b and b + 4 of each byte, as 0 or 2^b.
inline void add_word(int32x4_t (&acc)[4], uint32x4_t w, int8x16_t low, int8x16_t high) {
    const uint32x4_t v = vshrq_n_u32(w, 4);
    acc[0] = dot_lane<0>(dot_lane<0>(acc[0], isolate(w, 0), low), isolate(v, 0), high);
    acc[1] = dot_lane<1>(dot_lane<1>(acc[1], isolate(w, 1), low), isolate(v, 1), high);
    acc[2] = dot_lane<2>(dot_lane<2>(acc[2], isolate(w, 2), low), isolate(v, 2), high);
    acc[3] = dot_lane<3>(dot_lane<3>(acc[3], isolate(w, 3), low), isolate(v, 3), high);
}

// One token, 16 rows at a time. Horner's rule weighs bit b by 2^(3-b), which makes every bit 8 and needs no shifts;
// starting acc[r][3] at -4 sum makes the whole 4 (2 sum over set bits - sum), so 1/4 undoes it.
void tile1(float* sums, const Quantized& x, const Tile& tile) {
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        const uint16_t* scale = tile.scale ? tile.scale + 64 * block.group() : nullptr;
        for (int row = 0; row < 64; row += 16) {
            int32x4_t acc[4][4];
            for (int r = 0; r < 4; r++) {
                acc[r][0] = acc[r][1] = acc[r][2] = vdupq_n_s32(0);
                acc[r][3] = vdupq_n_s32(4 * x.start[block.index()]);
            }
            for (int64_t k = block.begin(); k < block.end(); k++) {
                const uint32_t* words = tile.words + 64 * k + row;
                const int8x16_t low = vld1q_s8(x.values + 32 * k), high = vld1q_s8(x.values + 32 * k + 16);
                __builtin_prefetch(words + tile.ahead);
                for (int r = 0; r < 4; r++) add_word(acc[r], vld1q_u32(words + 4 * r), low, high);
            }
            for (int r = 0; r < 4; r++) {
                int32x4_t s = acc[r][0];
                for (int b = 1; b < 4; b++) s = vaddq_s32(vaddq_s32(s, s), acc[r][b]);
                fold(sums + row + 4 * r, s, x.scale[block.index()] * 0.25f, scale ? scale + row + 4 * r : nullptr);
            }
        }
    }
}

// acc[t][r] += bit B of one word of 4 rows r, as 0 or 2, and the bits above it.
template <int T, int B>
inline __attribute__((always_inline)) void add_bits(int32x4_t (&acc)[T][2], const uint32x4_t (&w)[2],
                                                    const int8x16_t (&x)[T][2]) {
    int8x16_t bit[2];
    for (int r = 0; r < 2; r++) {
        if constexpr (B == 0) bit[r] = isolate(vaddq_u32(w[r], w[r]), 1);
        else if constexpr (B == 1) bit[r] = isolate(w[r], 1);
        else bit[r] = isolate(vshrq_n_u32(w[r], B - 1), 1);
    }
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < 2; r++) acc[t][r] = dot_lane<B % 4>(acc[t][r], bit[r], x[t][B / 4]);
    }
    if constexpr (B < 7) add_bits<T, B + 1>(acc, w, x);
}

// T tokens: each bit is isolated once for all.
template <int T>
void block_rows(float* sums, int64_t sums_step, const Quantized& x, const Tile& tile, const Pieces& block, int row) {
    int32x4_t acc[T][2];
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = vdupq_n_s32(x.start[t * x.block_step + block.index()]);
    for (int64_t k = block.begin(); k < block.end(); k++) {
        const uint32_t* words = tile.words + 64 * k + row;
        const uint32x4_t w[2] = {vld1q_u32(words), vld1q_u32(words + 4)};
        int8x16_t values[T][2];
        for (int t = 0; t < T; t++) {
            values[t][0] = vld1q_s8(x.values + t * x.value_step + 32 * k);
            values[t][1] = vld1q_s8(x.values + t * x.value_step + 32 * k + 16);
        }
        add_bits<T, 0>(acc, w, values);
    }
    const uint16_t* scale = tile.scale ? tile.scale + 64 * block.group() + row : nullptr;
    for (int t = 0; t < T; t++) {
        const float factor = x.scale[t * x.block_step + block.index()];
        fold(sums + t * sums_step + row, acc[t][0], factor, scale);
        fold(sums + t * sums_step + row + 4, acc[t][1], factor, scale ? scale + 4 : nullptr);
    }
}

template <int T> void tile(float* sums, int64_t sums_step, const Quantized& x, const Tile& tile) {
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        for (int row = 0; row < 64; row += 8) block_rows<T>(sums, sums_step, x, tile, block, row);
    }
}

void any_tile(float* sums, int64_t sums_step, const Quantized& x, int tokens, const Tile& from) {
    constexpr decltype(&tile<2>) kernels[] = {tile<2>, tile<3>, tile<4>};
    if (tokens == 1) tile1(sums, x, from);
    else kernels[tokens - 2](sums, sums_step, x, from);
}

// --- integer codes, which get their sign back before the product: no start ---

// 4 bits: the 64 even inputs of a block, then the 64 odd ones, as the nibbles of the bytes are; 8 bits: as they come.
void quantize_codes(int8_t* values, float* scale, int32_t* start, const float* x, int bits, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++, x += kCodeBlock, values += kCodeBlock) {
        float inverse;
        scale[b] = scale_of(x, kCodeBlock, &inverse);
        start[b] = 0;
        for (int64_t i = 0; i < kCodeBlock; i += 32) {
            const int8x16_t low = round16(x + i, inverse), high = round16(x + i + 16, inverse);
            vst1q_s8(values + (bits == 4 ? i / 2 : i), bits == 4 ? vuzp1q_s8(low, high) : low);
            vst1q_s8(values + (bits == 4 ? 64 + i / 2 : i + 16), bits == 4 ? vuzp2q_s8(low, high) : high);
        }
    }
}

// acc[t] += the products of 16 bytes of stored codes, part i of a block.
template <int T, int BITS>
inline void add_part(int32x4_t (&acc)[T], uint8x16_t stored, const int8_t* values, int64_t value_step, int i) {
    if (BITS == 8) {
        const int8x16_t code = vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80)));
        for (int t = 0; t < T; t++) acc[t] = dot(acc[t], code, vld1q_s8(values + t * value_step + 16 * i));
        return;
    }
    const int8x16_t eight = vdupq_n_s8(8);
    const int8x16_t even = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(stored, vdupq_n_u8(15))), eight);
    const int8x16_t odd = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(stored, 4)), eight);
    for (int t = 0; t < T; t++) {
        const int8_t* q = values + t * value_step + 16 * i;
        acc[t] = dot(dot(acc[t], even, vld1q_s8(q)), odd, vld1q_s8(q + 64));
    }
}

template <int T, int BITS>
void code_row(float* sums, const Quantized& x, const uint32_t* codes, const float* scale, const CodeRows& from) {
    constexpr int kWords = 4 * BITS;
    float32x4_t total[T];
    for (int t = 0; t < T; t++) total[t] = vdupq_n_f32(0);
    for (int64_t b = 0; b < from.blocks; b++) {
        uint32_t copy[kWords];
        const uint32_t* words = whole_block(codes + kWords * b, from.words - kWords * b, copy);
        int32x4_t acc[T];
        for (int t = 0; t < T; t++) acc[t] = vdupq_n_s32(0);
        for (int i = 0; i < BITS; i++) {
            const uint8x16_t stored = vreinterpretq_u8_u32(vld1q_u32(words + 4 * i));
            add_part<T, BITS>(acc, stored, x.values + kCodeBlock * b, x.value_step, i);
        }
        const float row_scale = scale ? scale[b] : 1;
        for (int t = 0; t < T; t++) {
            const float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(acc[t]), row_scale);
            total[t] = vfmaq_n_f32(total[t], v, x.scale[t * x.block_step + b]);
        }
    }
    for (int t = 0; t < T; t++) sums[64 * t] = vaddvq_f32(total[t]);
}

}  // namespace

#include "int8_codes.h"
