// AVX2: products with int8 activations by vpmaddubsw, whose pairs of products are summed as int16.
#include <immintrin.h>
#include "unit.h"

namespace {

// --- activations ---

inline __m256i maximum(__m256i v, const float* x) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x)), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epu32(v, bits);
}

// Scale of n inputs, a multiple of 32. The largest is found by its bits as an integer, where NaN is above all numbers.
inline float scale_of(const float* x, int64_t n, float* inverse) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int64_t i = 0; i < n; i += 16) {
        a = maximum(a, x + i);
        b = maximum(b, x + i + 8);
    }
    a = _mm256_max_epu32(a, b);
    __m128i top = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1));
    return block_scale((uint32_t)_mm_cvtsi128_si32(top), inverse);
}

inline __m256i round8(const float* x, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
}

inline int32_t sum_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// 32 inputs as bytes in their order; their sum is added to *sum.
inline __m256i round32(const float* x, __m256 inverse, __m256i* sum) {
    const __m256i a = round8(x, inverse), b = round8(x + 8, inverse);
    const __m256i c = round8(x + 16, inverse), d = round8(x + 24, inverse);
    *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 32 values in the order of kernels.h: an 8 x 4 transposition of bytes.
inline void store_word(int8_t* dst, __m256i in_order) {
    const __m128i pairs = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m128i a = _mm_shuffle_epi8(_mm256_castsi256_si128(in_order), pairs);
    const __m128i b = _mm_shuffle_epi8(_mm256_extracti128_si256(in_order, 1), pairs);
    _mm_store_si128((__m128i*)dst, _mm_unpacklo_epi16(a, b));
    _mm_store_si128((__m128i*)(dst + 16), _mm_unpackhi_epi16(a, b));
}

void quantize(int8_t* values, float* scale, int32_t* start, const float* x, int64_t words, int64_t group_words) {
    for (Pieces block(0, words, group_words, kBlockWords); block.next();) {
        float inverse;
        scale[block.index()] = scale_of(x + 32 * block.begin(), 32 * (block.end() - block.begin()), &inverse);
        const __m256 factor = _mm256_set1_ps(inverse);
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = block.begin(); k < block.end(); k++) {
            store_word(values + 32 * k, round32(x + 32 * k, factor, &sum));
        }
        start[block.index()] = -sum_lanes(sum);
    }
}

// --- signs ---

inline __m256 half_to_float(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline __m256i broadcast(const int8_t* four) {
    int32_t v;
    memcpy(&v, four, 4);
    return _mm256_set1_epi32(v);
}

inline __m256i load256(const uint32_t* p) { return _mm256_load_si256((const __m256i*)p); }

// sums += the block of 8 rows, whose products are summed in pairs: 2 per set bit, so that start makes them 2 sum - all.
inline void fold(float* sums, __m256i pairs, int32_t start, float factor, const uint16_t* scale) {
    const __m256i s = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(2)), _mm256_set1_epi32(start));
    __m256 v = _mm256_cvtepi32_ps(s);
    if (scale) v = _mm256_mul_ps(v, half_to_float(scale));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(v, _mm256_set1_ps(factor), _mm256_loadu_ps(sums)));
}

// One block of 8 rows. A bit that is isolated in each weight byte, as 0 or 2^b with b < 4, is the unsigned operand as
// it stands; acc[b] collects bits b and b + 4 and is shifted at the end. int16 suffices: a word adds at most
// 2 products * 2 nibbles * 8 * 128 = 4096, a block 16384.
inline __m256i block_pairs(const int8_t* values, const uint32_t* words, int64_t count, int64_t ahead) {
    __m256i acc[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) acc[b] = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k++, words += 64, values += 32) {
        _mm_prefetch((const char*)(words + ahead), _MM_HINT_T0);
        const __m256i low = load256(words), high = _mm256_srli_epi32(low, 4);
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            const __m256i bit = _mm256_set1_epi8((char)(1 << b));
            const __m256i u = _mm256_maddubs_epi16(_mm256_and_si256(low, bit), broadcast(values + 4 * b));
            const __m256i v = _mm256_maddubs_epi16(_mm256_and_si256(high, bit), broadcast(values + 4 * b + 16));
            acc[b] = _mm256_add_epi16(acc[b], _mm256_add_epi16(u, v));
        }
    }
    __m256i s = acc[0];
#pragma GCC unroll 3
    for (int b = 1; b < 4; b++) s = _mm256_add_epi16(s, _mm256_srai_epi16(acc[b], b));
    return s;
}

void tile1(float* sums, const Quantized& x, const Tile& tile) {
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        const int8_t* values = x.values + 32 * block.begin();
        const uint32_t* words = tile.words + 64 * block.begin();
        const uint16_t* scale = tile.scale ? tile.scale + 64 * block.group() : nullptr;
        for (int r = 0; r < 64; r += 8) {
            const __m256i pairs = block_pairs(values, words + r, block.end() - block.begin(), tile.ahead);
            fold(sums + r, pairs, x.start[block.index()], x.scale[block.index()], scale ? scale + r : nullptr);
        }
    }
}

// T tokens, 16 rows. Each bit is isolated once, as 0 or 1, for all tokens; a word adds at most 8 * 2 * 128 = 2048.
template <int T>
void block_rows(float* sums, int64_t sums_step, const Quantized& x, const Tile& tile, const Pieces& block, int row) {
    const __m256i one = _mm256_set1_epi8(1);
    __m256i acc[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
    for (int64_t k = block.begin(); k < block.end(); k++) {
        const uint32_t* words = tile.words + 64 * k + row;
        const __m256i w[2] = {load256(words), load256(words + 8)};
#pragma GCC unroll 8
        for (int b = 0; b < 8; b++) {
            const __m256i bit[2] = {_mm256_and_si256(_mm256_srli_epi32(w[0], b), one),
                                    _mm256_and_si256(_mm256_srli_epi32(w[1], b), one)};
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i q = broadcast(x.values + t * x.value_step + 32 * k + 4 * b);
                acc[t][0] = _mm256_add_epi16(acc[t][0], _mm256_maddubs_epi16(bit[0], q));
                acc[t][1] = _mm256_add_epi16(acc[t][1], _mm256_maddubs_epi16(bit[1], q));
            }
        }
    }
    const uint16_t* scale = tile.scale ? tile.scale + 64 * block.group() + row : nullptr;
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        const int64_t at = t * x.block_step + block.index();
        float* to = sums + t * sums_step + row;
        fold(to, acc[t][0], x.start[at], x.scale[at], scale);
        fold(to + 8, acc[t][1], x.start[at], x.scale[at], scale ? scale + 8 : nullptr);
    }
}

template <int T>
void tile(float* sums, int64_t sums_step, const Quantized& x, const Tile& tile) {
    for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
        for (int row = 0; row < 64; row += 16) block_rows<T>(sums, sums_step, x, tile, block, row);
    }
}

void any_tile(float* sums, int64_t sums_step, const Quantized& x, int tokens, const Tile& from) {
    constexpr decltype(&tile<2>) kernels[] = {tile<2>, tile<3>, tile<4>};
    if (tokens == 1) tile1(sums, x, from);
    else kernels[tokens - 2](sums, sums_step, x, from);
}

// --- integer codes ---

// 4 bits: the 64 even inputs of a block, then the 64 odd ones, as the nibbles of the bytes are; 8 bits: as they come,
// and without a start, because their sign is handled by vpsignb.
void quantize_codes(int8_t* values, float* scale, int32_t* start, const float* x, int bits, int64_t blocks) {
    const __m256i low = _mm256_set1_epi16(0xff);
    for (int64_t b = 0; b < blocks; b++, x += kCodeBlock, values += kCodeBlock) {
        float inverse;
        scale[b] = scale_of(x, kCodeBlock, &inverse);
        const __m256 factor = _mm256_set1_ps(inverse);
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = 0; i < kCodeBlock; i += 64) {
            __m256i u = round32(x + i, factor, &sum), v = round32(x + i + 32, factor, &sum);
            int64_t first = i, second = i + 32;
            if (bits == 4) {
                const __m256i even = _mm256_packus_epi16(_mm256_and_si256(u, low), _mm256_and_si256(v, low));
                v = _mm256_packus_epi16(_mm256_srli_epi16(u, 8), _mm256_srli_epi16(v, 8));
                u = _mm256_permute4x64_epi64(even, 0xd8);
                v = _mm256_permute4x64_epi64(v, 0xd8);
                first = i / 2, second = 64 + i / 2;
            }
            _mm256_store_si256((__m256i*)(values + first), u);
            _mm256_store_si256((__m256i*)(values + second), v);
        }
        start[b] = bits == 4 ? -8 * sum_lanes(sum) : 0;
    }
}

// Products of a block of codes of one row and the values of one token, as int32 lanes.
template <int BITS>
inline __attribute__((always_inline)) __m256i block_product(const uint32_t* words, const int8_t* q) {
    const __m256i* from = (const __m256i*)words;
    __m256i pairs = _mm256_setzero_si256(), sum = pairs;
#pragma GCC unroll 4
    for (int i = 0; i < BITS / 2; i++) {
        const __m256i stored = _mm256_loadu_si256(from + i);
        if (BITS == 4) {  // at most 15 * 128 * 2 products * 4 = 15360
            const __m256i nibble = _mm256_set1_epi8(15), even = _mm256_and_si256(stored, nibble);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(stored, 4), nibble);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(even, ((const __m256i*)q)[i]));
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(odd, ((const __m256i*)q)[2 + i]));
        } else {          // |code| * (value with the code's sign) is at most 128 * 127 * 2 = 32512
            const __m256i code = _mm256_xor_si256(stored, _mm256_set1_epi8((char)0x80));
            const __m256i product = _mm256_maddubs_epi16(_mm256_abs_epi8(code),
                                                         _mm256_sign_epi8(((const __m256i*)q)[i], code));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(product, _mm256_set1_epi16(1)));
        }
    }
    return BITS == 4 ? _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) : sum;
}

inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int T, int BITS>
void code_row(float* sums, const Quantized& x, const uint32_t* codes, const float* scale, const CodeRows& from) {
    constexpr int kWords = 4 * BITS;
    __m256 total[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t] = _mm256_setzero_ps();
    for (int64_t b = 0; b < from.blocks; b++) {
        uint32_t copy[kWords];
        const uint32_t* words = whole_block(codes + kWords * b, from.words - kWords * b, copy);
        const float row_scale = scale ? scale[b] : 1;
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = t * x.block_step + b;
            const __m256i start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(x.start[at]));
            const __m256i s = block_product<BITS>(words, x.values + t * x.value_step + kCodeBlock * b);
            const __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(s, start)), _mm256_set1_ps(row_scale));
            total[t] = _mm256_fmadd_ps(v, _mm256_set1_ps(x.scale[at]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) sums[64 * t] = sum_lanes(total[t]);
}

}  // namespace

#include "int8_codes.h"

const hfq::Int8 hfq::kAvx2Int8 = {4, quantize, any_tile};
const hfq::CodesInt8 hfq::kAvx2Codes = {quantize_codes, any_code_rows};
