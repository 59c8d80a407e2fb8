// AVX512-VNNI: products with int8 activations.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // and the next: in the compiler's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include "unit.h"

namespace {

// --- activations ---

inline __m512i magnitude(__m512 v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }

// Scale of n inputs, a multiple of 32. The largest is found by its bits as an integer, where NaN is above all numbers.
inline float scale_of(const float* x, int64_t n, float* inverse) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) top = _mm512_max_epu32(top, magnitude(_mm512_loadu_ps(x + i)));
    return block_scale(_mm512_reduce_max_epu32(top), inverse);
}

inline __m512i round16(const float* x, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse));
}

// 32 values in the order of kernels.h: an 8 x 4 transposition of bytes.
inline void store_word(int8_t* dst, __m512i low, __m512i high) {
    const __m128i pairs = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m128i a = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(low), pairs);
    const __m128i b = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(high), pairs);
    _mm_store_si128((__m128i*)dst, _mm_unpacklo_epi16(a, b));
    _mm_store_si128((__m128i*)(dst + 16), _mm_unpackhi_epi16(a, b));
}

void quantize(int8_t* values, float* scale, int32_t* start, const float* x, int64_t words, int64_t group_words) {
    for (Pieces block(0, words, group_words, kBlockWords); block.next();) {
        float inverse;
        scale[block.index()] = scale_of(x + 32 * block.begin(), 32 * (block.end() - block.begin()), &inverse);
        const __m512 factor = _mm512_set1_ps(inverse);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = block.begin(); k < block.end(); k++) {
            const __m512i low = round16(x + 32 * k, factor), high = round16(x + 32 * k + 16, factor);
            store_word(values + 32 * k, low, high);
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
        }
        start[block.index()] = -_mm512_reduce_add_epi32(sum);
    }
}

// --- signs ---

inline __m512 half_to_float(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

inline __m512i broadcast(const int8_t* four) {
    int32_t v;
    memcpy(&v, four, 4);
    return _mm512_set1_epi32(v);
}

// One token. A bit that is isolated in each weight byte, as 0 or 2^b with b < 4, is the unsigned operand of vpdpbusd as
// it stands; acc[r][b] collects bits b and b + 4. Horner's rule then weighs bit b by 2^(3-b), which makes every bit 8
// and needs no shifts; starting acc[r][3] at -4 sum makes the whole 4 (2 sum over set bits - sum), so 1/4 undoes it.
void tile1(float* sums, const Quantized& x, const Tile& tile) {
    __m512 total[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) total[r] = _mm512_loadu_ps(sums + 16 * r);
    const int8_t* values = x.values + 32 * tile.first;
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        __m512i acc[4][4];
        const __m512i start = _mm512_slli_epi32(_mm512_set1_epi32(x.start[block.index()]), 2);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            acc[r][0] = acc[r][1] = acc[r][2] = _mm512_setzero_si512();
            acc[r][3] = start;
        }
        for (int64_t k = block.begin(); k < block.end(); k++, values += 32) {
            const uint32_t* words = tile.words + 64 * k;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const __m512i low = _mm512_load_si512(words + 16 * r), high = _mm512_srli_epi32(low, 4);
                _mm_prefetch((const char*)(words + tile.ahead + 16 * r), _MM_HINT_T0);
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++) {
                    const __m512i bit = _mm512_set1_epi8((char)(1 << b));
                    acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], _mm512_and_si512(low, bit), broadcast(values + 4 * b));
                    acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], _mm512_and_si512(high, bit),
                                                    broadcast(values + 4 * b + 16));
                }
            }
        }
        const __m512 factor = _mm512_set1_ps(x.scale[block.index()] * 0.25f);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m512i s = acc[r][0];
#pragma GCC unroll 3
            for (int b = 1; b < 4; b++) s = _mm512_add_epi32(_mm512_add_epi32(s, s), acc[r][b]);
            __m512 v = _mm512_cvtepi32_ps(s);
            if (tile.scale) v = _mm512_mul_ps(v, half_to_float(tile.scale + 64 * block.group() + 16 * r));
            total[r] = _mm512_fmadd_ps(v, factor, total[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) _mm512_storeu_ps(sums + 16 * r, total[r]);
}

// acc[t][s] += one word of 2 x 16 rows. Each bit is isolated once, as 0 or 2, for all tokens.
template <int T>
inline __attribute__((always_inline)) void add_word(__m512i (&acc)[T][2], const int8_t* values, int64_t value_step,
                                                    const uint32_t* words) {
    const __m512i two = _mm512_set1_epi8(2);
    const __m512i w[2] = {_mm512_load_si512(words), _mm512_load_si512(words + 16)};
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        __m512i bit[2];
#pragma GCC unroll 2
        for (int s = 0; s < 2; s++) {
            const __m512i moved = b == 0 ? _mm512_add_epi32(w[s], w[s]) : _mm512_srli_epi32(w[s], b - 1);
            bit[s] = _mm512_and_si512(b == 1 ? w[s] : moved, two);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512i q = broadcast(values + t * value_step + 4 * b);
            acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], bit[0], q);
            acc[t][1] = _mm512_dpbusd_epi32(acc[t][1], bit[1], q);
        }
    }
}

template <int T>
void half_tile(float* sums, int64_t sums_step, const Quantized& x, const Tile& tile, int64_t row) {
    __m512 total[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        total[t][0] = _mm512_loadu_ps(sums + t * sums_step);
        total[t][1] = _mm512_loadu_ps(sums + t * sums_step + 16);
    }
    const int8_t* values = x.values + 32 * tile.first;
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        __m512i acc[T][2];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            acc[t][0] = acc[t][1] = _mm512_set1_epi32(x.start[t * x.block_step + block.index()]);
        }
        for (int64_t k = block.begin(); k < block.end(); k++, values += 32) {
            const uint32_t* words = tile.words + 64 * k + row;
            _mm_prefetch((const char*)(words + tile.ahead), _MM_HINT_T0);
            _mm_prefetch((const char*)(words + tile.ahead + 16), _MM_HINT_T0);
            add_word<T>(acc, values, x.value_step, words);
        }
        __m512 scale[2];
        if (tile.scale) {
            scale[0] = half_to_float(tile.scale + 64 * block.group() + row);
            scale[1] = half_to_float(tile.scale + 64 * block.group() + row + 16);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512 factor = _mm512_set1_ps(x.scale[t * x.block_step + block.index()]);
#pragma GCC unroll 2
            for (int s = 0; s < 2; s++) {
                __m512 v = _mm512_cvtepi32_ps(acc[t][s]);
                if (tile.scale) v = _mm512_mul_ps(v, scale[s]);
                total[t][s] = _mm512_fmadd_ps(v, factor, total[t][s]);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        _mm512_storeu_ps(sums + t * sums_step, total[t][0]);
        _mm512_storeu_ps(sums + t * sums_step + 16, total[t][1]);
    }
}

template <int T>
void tile(float* sums, int64_t sums_step, const Quantized& x, const Tile& from) {
    half_tile<T>(sums, sums_step, x, from, 0);
    half_tile<T>(sums + 32, sums_step, x, from, 32);
}

void any_tile(float* sums, int64_t sums_step, const Quantized& x, int tokens, const Tile& from) {
    constexpr decltype(&tile<2>) kernels[] = {tile<2>, tile<3>, tile<4>};
    if (tokens == 1) tile1(sums, x, from);
    else kernels[tokens - 2](sums, sums_step, x, from);
}

// --- integer codes ---

// 4 bits: the 64 even inputs of a block, then the 64 odd ones, as the nibbles of the bytes are; 8 bits: as they come.
void quantize_codes(int8_t* values, float* scale, int32_t* start, const float* x, int bits, int64_t blocks) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int64_t b = 0; b < blocks; b++, x += kCodeBlock, values += kCodeBlock) {
        float inverse;
        scale[b] = scale_of(x, kCodeBlock, &inverse);
        const __m512 factor = _mm512_set1_ps(inverse);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < kCodeBlock; i += 32) {
            __m512i u = round16(x + i, factor), v = round16(x + i + 16, factor);
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(u, v));
            int64_t first = i, second = i + 16;
            if (bits == 4) {
                const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                const __m512i evens = _mm512_permutex2var_epi32(u, even, v);
                v = _mm512_permutex2var_epi32(u, odd, v);
                u = evens;
                first = i / 2, second = 64 + i / 2;
            }
            _mm_store_si128((__m128i*)(values + first), _mm512_cvtepi32_epi8(u));
            _mm_store_si128((__m128i*)(values + second), _mm512_cvtepi32_epi8(v));
        }
        start[b] = -(1 << (bits - 1)) * _mm512_reduce_add_epi32(sum);
    }
}

// One row: memory is the limit, and likes one linear stream. The stored codes have no sign: start, in one lane of the
// sum, gives it back.
template <int T, int BITS>
void code_row(float* sums, const Quantized& x, const uint32_t* codes, const float* scale, const CodeRows& from) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const auto lanes = [](int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); };
    __m512 total[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < from.blocks; b++) {
        const uint32_t* words = codes + 4 * BITS * b;
        const int64_t have = from.words - 4 * BITS * b;
        for (int i = 0; i < 4 * BITS; i += 16) _mm_prefetch((const char*)(words + kCodesAhead + i), _MM_HINT_T0);
        __m512i u = _mm512_maskz_loadu_epi32(lanes(have), words), v;
        if (BITS == 4) {
            v = _mm512_and_si512(_mm512_srli_epi32(u, 4), nibble);
            u = _mm512_and_si512(u, nibble);
        } else {
            v = _mm512_maskz_loadu_epi32(lanes(have - 16), words + 16);
        }
        const __m512 row_scale = _mm512_set1_ps(scale ? scale[b] : 1);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int8_t* q = x.values + t * x.value_step + kCodeBlock * b;
            __m512i acc = _mm512_zextsi128_si512(_mm_cvtsi32_si128(x.start[t * x.block_step + b]));
            acc = _mm512_dpbusd_epi32(acc, u, _mm512_load_si512(q));
            acc = _mm512_dpbusd_epi32(acc, v, _mm512_load_si512(q + 64));
            const __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), row_scale);
            total[t] = _mm512_fmadd_ps(s, _mm512_set1_ps(x.scale[t * x.block_step + b]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) sums[64 * t] = _mm512_reduce_add_ps(total[t]);
}

}  // namespace

#include "int8_codes.h"

const hfq::Int8 hfq::kVnniInt8 = {4, quantize, any_tile};
const hfq::CodesInt8 hfq::kVnniCodes = {quantize_codes, any_code_rows};
