// AVX-512 (F, BW, VL, DQ): conversion, exact sums by look-up table, exact integer codes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // and the next: in the compiler's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include "unit.h"

namespace {

// --- conversion ---

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

inline __m512 half_to_float(__mmask16 lanes, const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}

inline __m512 load16(const void* p, int dtype, int64_t i, __mmask16 lanes) {
    if (dtype == HFQ_F32) return _mm512_maskz_loadu_ps(lanes, (const float*)p + i);
    const uint16_t* h = (const uint16_t*)p + i;
    if (dtype == HFQ_F16) return half_to_float(lanes, h);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, h));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

void load(float* dst, const void* src, int dtype, const uint16_t* column, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i < n; i += 16) {
        const __mmask16 lanes = first_lanes(n - i);
        __m512 v = load16(src, dtype, i, lanes);
        if (column) v = _mm512_mul_ps(v, half_to_float(lanes, column + i));
        _mm512_mask_storeu_ps(dst + i, first_lanes(padded - i), v);
    }
    for (; i < padded; i += 16) _mm512_mask_storeu_ps(dst + i, first_lanes(padded - i), _mm512_setzero_ps());
}

inline __m256i to_bf16(__m512 v) {  // to nearest even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_set1_epi32(r, nan, 0x7fc0);
    return _mm512_cvtepi32_epi16(r);
}

void finish(void* y, int dtype, const float* sums, const uint16_t* scale, const void* bias) {
    for (int i = 0; i < 64; i += 16) {
        __m512 v = _mm512_loadu_ps(sums + i);
        if (scale) v = _mm512_mul_ps(v, half_to_float(0xffff, scale + i));
        if (bias) v = _mm512_add_ps(v, load16(bias, dtype, i, 0xffff));
        if (dtype == HFQ_F32) {
            _mm512_storeu_ps((float*)y + i, v);
        } else {
            const __m256i h = dtype == HFQ_F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
            _mm256_storeu_si256((__m256i*)((uint16_t*)y + i), h);
        }
    }
}

// --- exact sums: 16 sums of 4 inputs fill a register, and vpermps picks one for each of 16 rows by a weight nibble ---

void tables(float* table, const float* x, int64_t words, int tokens) {
    const __mmask16 plus[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // entry i has bit j set: input j counts as +
    __m512 sign[4];
    for (int j = 0; j < 4; j++) sign[j] = _mm512_mask_blend_ps(plus[j], _mm512_set1_ps(-1), _mm512_set1_ps(1));
    for (int64_t g = 0; g < 8 * words; g++, x += 4, table += 16 * tokens) {
        __m512 u = _mm512_mul_ps(_mm512_set1_ps(x[0]), sign[0]), v = _mm512_mul_ps(_mm512_set1_ps(x[1]), sign[1]);
        u = _mm512_fmadd_ps(_mm512_set1_ps(x[2]), sign[2], u);
        v = _mm512_fmadd_ps(_mm512_set1_ps(x[3]), sign[3], v);
        _mm512_store_ps(table, _mm512_add_ps(u, v));
    }
}

// acc[t][r] += 4 inputs of 16 rows r. vpermps reads only the low 4 bits of an index, so nothing needs masking.
template <int T>
inline __attribute__((always_inline)) void add_nibble(__m512 (&acc)[T][4], const float* table,
                                                      const __m512i (&index)[4]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const __m512 entries = _mm512_load_ps(table + 16 * t);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            acc[t][r] = _mm512_add_ps(acc[t][r], _mm512_permutexvar_ps(index[r], entries));
        }
    }
}

// acc[t][r] += one word of 16 rows r, for few tokens: bound by the permutes. On Zen 4 a shift takes their port, and a
// high multiply, which is as good for less than 16 bits, does not.
template <int T>
inline __attribute__((always_inline)) void add_word_few(__m512 (&acc)[T][4], const float* table,
                                                        const uint32_t* words) {
    const __m512i shift[4] = {_mm512_setzero_si512(), _mm512_set1_epi16(1 << 12), _mm512_set1_epi16(1 << 8),
                              _mm512_set1_epi16(1 << 4)};
    __m512i w[4], index[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) w[r] = _mm512_load_si512(words + 16 * r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            if (i == 4) w[r] = _mm512_srli_epi32(w[r], 16);
            index[r] = i % 4 ? _mm512_mulhi_epu16(w[r], shift[i % 4]) : w[r];
        }
        add_nibble<T>(acc, table + 16 * T * i, index);
    }
}

// The same for many tokens, whose sums fill the registers: words are read again for each nibble, and the loop stays
// one, because the compiler mixes the steps of an unrolled one until sums spill, at half the speed.
template <int T>
inline __attribute__((always_inline)) void add_word_many(__m512 (&acc)[T][4], const float* table,
                                                         const uint32_t* words) {
#pragma GCC unroll 1
    for (int i = 0; i < 8; i++) {
        __m512i index[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            index[r] = _mm512_srlv_epi32(_mm512_load_si512(words + 16 * r), _mm512_set1_epi32(4 * i));
        }
        add_nibble<T>(acc, table + 16 * T * i, index);
    }
}

template <int T>
void tile(float* sums, int64_t sums_step, const float* table, const Tile& tile) {
    for (Pieces piece(tile.first, tile.last, tile.group_words, kPieceWords); piece.next();) {
        __m512 acc[T][4];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) acc[t][r] = _mm512_setzero_ps();
        }
        for (int64_t k = piece.begin(); k < piece.end(); k++, table += 128 * T) {
            const uint32_t* words = tile.words + 64 * k;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) _mm_prefetch((const char*)(words + tile.ahead + 16 * r), _MM_HINT_T0);
            if (T <= 2) add_word_few<T>(acc, table, words);
            else add_word_many<T>(acc, table, words);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m512 one = _mm512_set1_ps(1);
            const __m512 scale = tile.scale ? half_to_float(0xffff, tile.scale + 64 * piece.group() + 16 * r) : one;
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                float* s = sums + t * sums_step + 16 * r;
                _mm512_storeu_ps(s, _mm512_fmadd_ps(acc[t][r], scale, _mm512_loadu_ps(s)));
            }
        }
    }
}

void any_tile(float* sums, int64_t sums_step, const float* table, int tokens, const Tile& from) {
    constexpr decltype(&tile<1>) kernels[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
    kernels[tokens - 1](sums, sums_step, table, from);
}

// --- integer codes ---

// 4 bits: a register of 16 words holds a block, nibble i of word l is input 8l + i. 8 bits: the order of the inputs.
void arrange(float* dst, const float* x, int bits, int64_t blocks) {
    if (bits == 8) {
        memcpy(dst, x, sizeof(float) * (size_t)(kCodeBlock * blocks));
        return;
    }
    const __m512i eights = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(8));
    for (int64_t i = 0; i < 8 * blocks; i++) {
        _mm512_store_ps(dst + 16 * i, _mm512_i32gather_ps(eights, x + 128 * (i / 8) + i % 8, 4));
    }
}

template <int T>
inline __attribute__((always_inline)) void add_codes(__m512 (&acc)[T], __m512 code, const float* x, int64_t x_step) {
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[t] = _mm512_fmadd_ps(code, _mm512_load_ps(x + t * x_step), acc[t]);
}

// Sums i % A are for vector i of the block.
template <int T, int A, int BITS>
inline __attribute__((always_inline)) void add_block(__m512 (&acc)[A][T], const uint32_t* words, const float* x,
                                                     int64_t x_step) {
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    __m512i w = _mm512_loadu_si512(words);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 code;
        if (BITS == 4) {  // see add_word_few
            if (i == 4) w = _mm512_srli_epi32(w, 16);
            const __m512i moved = _mm512_mulhi_epu16(w, _mm512_set1_epi16((short)(1 << (16 - 4 * (i % 4)))));
            code = _mm512_permutexvar_ps(i % 4 ? moved : w, values);
        } else {          // a code is stored with an offset of 128: turning the upper bit makes it a two's complement
            const __m128i stored = _mm_loadu_si128((const __m128i*)(words + 4 * i));
            code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(stored, _mm_set1_epi8((char)0x80))));
        }
        add_codes<T>(acc[i % A], code, x + 16 * i, x_step);
    }
}

using Vector = __m512;
inline Vector zeros() { return _mm512_setzero_ps(); }
inline Vector all(float v) { return _mm512_set1_ps(v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_lanes(Vector v) { return _mm512_reduce_add_ps(v); }

}  // namespace

#include "exact_codes.h"

namespace {

constexpr hfq::Convert kConvert = {load, finish};
constexpr hfq::Exact kExact = {16, 128, 6, tables, any_tile};
constexpr hfq::CodesExact kCodes = {arrange, any_code_rows};

}  // namespace

const hfq::Isa hfq::kAvx512 = {"avx512", &kConvert, &kExact, nullptr, &kCodes, nullptr};
