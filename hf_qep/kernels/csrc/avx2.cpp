// AVX2 with FMA and F16C: conversion, exact sums by look-up table, exact integer codes.
#include <immintrin.h>
#include "unit.h"

namespace {

// --- conversion ---

inline __m256 half_to_float(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline __m256 load8(const void* p, int dtype, int64_t i) {
    if (dtype == HFQ_F32) return _mm256_loadu_ps((const float*)p + i);
    const uint16_t* h = (const uint16_t*)p + i;
    if (dtype == HFQ_F16) return half_to_float(h);
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)h));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline __m256 scaled8(const void* src, int dtype, const uint16_t* column, int64_t i) {
    const __m256 v = load8(src, dtype, i);
    return column ? _mm256_mul_ps(v, half_to_float(column + i)) : v;
}

void load(float* dst, const void* src, int dtype, const uint16_t* column, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, scaled8(src, dtype, column, i));
    if (i < n) {  // what is left, by way of memory that may be read to its end
        alignas(32) char tail[32] = {};
        alignas(32) float whole[8];
        uint16_t factors[8] = {};
        const size_t size = dtype == HFQ_F32 ? 4 : 2, left = (size_t)(n - i);
        memcpy(tail, (const char*)src + size * (size_t)i, size * left);
        if (column) memcpy(factors, column + i, 2 * left);
        _mm256_store_ps(whole, scaled8(tail, dtype, column ? factors : nullptr, 0));
        memcpy(dst + i, whole, 4 * left);
    }
    if (padded > n) memset(dst + n, 0, 4 * (size_t)(padded - n));
}

inline __m128i to_bf16(__m256 v) {  // to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

void finish(void* y, int dtype, const float* sums, const uint16_t* scale, const void* bias) {
    for (int i = 0; i < 64; i += 8) {
        __m256 v = _mm256_loadu_ps(sums + i);
        if (scale) v = _mm256_mul_ps(v, half_to_float(scale + i));
        if (bias) v = _mm256_add_ps(v, load8(bias, dtype, i));
        if (dtype == HFQ_F32) {
            _mm256_storeu_ps((float*)y + i, v);
        } else {
            const __m128i h = dtype == HFQ_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
            _mm_storeu_si128((__m128i*)((uint16_t*)y + i), h);
        }
    }
}

// --- exact sums: vpermps reads 3 bits of an index, so a word is ten groups of 3 inputs and one of 2 ---

constexpr int kGroups = 11, kWordFloats = 8 * kGroups;
constexpr int64_t kVisit = 8;   // words of a half tile before the other half: the tile stays one linear stream

void tables(float* table, const float* x, int64_t words, int tokens) {
    const __m256 sign[3] = {_mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1),
                            _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1)};
    for (int64_t k = 0; k < words; k++, x += 32) {
        for (int g = 0; g < kGroups; g++, table += 8 * tokens) {
            __m256 v = _mm256_mul_ps(_mm256_set1_ps(x[3 * g]), sign[0]);
            v = _mm256_fmadd_ps(_mm256_set1_ps(x[3 * g + 1]), sign[1], v);
            if (g < kGroups - 1) v = _mm256_fmadd_ps(_mm256_set1_ps(x[3 * g + 2]), sign[2], v);
            _mm256_store_ps(table, v);
        }
    }
}

// acc[t][r] += one word of 8 rows r.
template <int T>
inline __attribute__((always_inline)) void add_word(__m256 (&acc)[T][4], const float* table,
                                                    const uint32_t* words) {
#pragma GCC unroll 11
    for (int i = 0; i < kGroups; i++) {
        __m256 entries[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) entries[t] = _mm256_load_ps(table + 8 * (T * i + t));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i index = _mm256_srli_epi32(_mm256_load_si256((const __m256i*)(words + 8 * r)), 3 * i);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                acc[t][r] = _mm256_add_ps(acc[t][r], _mm256_permutevar8x32_ps(entries[t], index));
            }
        }
    }
}

// Adds words first..last of 32 rows to the sums of their piece.
template <int T>
void half_tile(float* sums, const float* table, const Tile& tile, int64_t first, int64_t last, int64_t row) {
    __m256 acc[T][4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) acc[t][r] = _mm256_load_ps(sums + 64 * t + row + 8 * r);
    }
    for (int64_t k = first; k < last; k++, table += kWordFloats * T) {
        const uint32_t* words = tile.words + 64 * k + row;
        _mm_prefetch((const char*)(words + tile.ahead), _MM_HINT_T0);
        _mm_prefetch((const char*)(words + tile.ahead + 16), _MM_HINT_T0);
        add_word<T>(acc, table, words);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) _mm256_store_ps(sums + 64 * t + row + 8 * r, acc[t][r]);
    }
}

template <int T>
void tile(float* sums, int64_t sums_step, const float* table, const Tile& tile) {
    for (Pieces piece(tile.first, tile.last, tile.group_words, kPieceWords); piece.next();) {
        alignas(32) float own[64 * T] = {};
        for (int64_t k = piece.begin(); k < piece.end(); k += kVisit) {
            const int64_t end = lesser(k + kVisit, piece.end());
            const float* from = table + (k - tile.first) * kWordFloats * T;
            half_tile<T>(own, from, tile, k, end, 0);
            half_tile<T>(own, from, tile, k, end, 32);
        }
        for (int r = 0; r < 64; r += 8) {
            const __m256 one = _mm256_set1_ps(1);
            const __m256 scale = tile.scale ? half_to_float(tile.scale + 64 * piece.group() + r) : one;
            for (int t = 0; t < T; t++) {
                float* s = sums + t * sums_step + r;
                _mm256_storeu_ps(s, _mm256_fmadd_ps(_mm256_load_ps(own + 64 * t + r), scale, _mm256_loadu_ps(s)));
            }
        }
    }
}

void any_tile(float* sums, int64_t sums_step, const float* table, int tokens, const Tile& from) {
    constexpr decltype(&tile<1>) kernels[] = {tile<1>, tile<2>, tile<3>};
    kernels[tokens - 1](sums, sums_step, table, from);
}

// --- integer codes ---

// 4 bits: a register of 8 words is half a block, nibble i of word l is input 8l + i. 8 bits: the order of the inputs.
void arrange(float* dst, const float* x, int bits, int64_t blocks) {
    if (bits == 8) {
        memcpy(dst, x, sizeof(float) * (size_t)(kCodeBlock * blocks));
        return;
    }
    for (int64_t half = 0; half < 2 * blocks; half++, dst += 64, x += 64) {
        for (int i = 0; i < 8; i++) {
            for (int l = 0; l < 8; l++) dst[8 * i + l] = x[8 * l + i];
        }
    }
}

template <int T>
inline __attribute__((always_inline)) void add_codes(__m256 (&acc)[T], __m256i code, const float* x, int64_t x_step) {
    const __m256 v = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[t] = _mm256_fmadd_ps(v, _mm256_load_ps(x + t * x_step), acc[t]);
}

// A code is stored with an offset of half its range; turning its upper bit makes it a two's complement.
// Sums i % A are for vector i of the block.
template <int T, int A, int BITS>
inline __attribute__((always_inline)) void add_block(__m256 (&acc)[A][T], const uint32_t* words, const float* x,
                                                     int64_t x_step) {
    if (BITS == 4) {
        for (int half = 0; half < 2; half++, words += 8, x += 64) {
            const __m256i stored = _mm256_loadu_si256((const __m256i*)words);
            const __m256i w = _mm256_xor_si256(stored, _mm256_set1_epi8((char)0x88));
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                add_codes<T>(acc[i % A], _mm256_srai_epi32(_mm256_slli_epi32(w, 28 - 4 * i), 28), x + 8 * i, x_step);
            }
        }
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < 16; i++) {
            const __m128i stored = _mm_loadl_epi64((const __m128i*)(words + 2 * i));
            const __m128i w = _mm_xor_si128(stored, _mm_set1_epi8((char)0x80));
            add_codes<T>(acc[i % A], _mm256_cvtepi8_epi32(w), x + 8 * i, x_step);
        }
    }
}

inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

using Vector = __m256;
inline Vector zeros() { return _mm256_setzero_ps(); }
inline Vector all(float v) { return _mm256_set1_ps(v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

}  // namespace

#include "exact_codes.h"

namespace {

constexpr hfq::Convert kConvert = {load, finish};
constexpr hfq::Exact kExact = {8, kWordFloats, 3, tables, any_tile};
constexpr hfq::CodesExact kCodes = {arrange, any_code_rows};

}  // namespace

const hfq::Isa hfq::kAvx2 = {"avx2", &kConvert, &kExact, nullptr, &kCodes, nullptr};
