// Plain C++: for machines without a unit of their own, and what the others are compared with.
#include "unit.h"

namespace {

// --- conversion ---

inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
    return float_of(sign | bits_of((float)rest * 0x1p-24f));
}

inline uint16_t float_to_half(float f) {  // to nearest even
    const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));  // a subnormal
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
}

inline uint16_t float_to_bf16(float f) {  // to nearest even
    const uint32_t bits = bits_of(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load1(const void* p, int dtype, int64_t i) {
    if (dtype == HFQ_F32) return ((const float*)p)[i];
    const uint16_t h = ((const uint16_t*)p)[i];
    return dtype == HFQ_F16 ? half_to_float(h) : float_of((uint32_t)h << 16);
}

void load(float* dst, const void* src, int dtype, const uint16_t* column, int64_t n, int64_t padded) {
    for (int64_t i = 0; i < n; i++) dst[i] = load1(src, dtype, i) * (column ? half_to_float(column[i]) : 1);
    for (int64_t i = n; i < padded; i++) dst[i] = 0;
}

void finish(void* y, int dtype, const float* sums, const uint16_t* scale, const void* bias) {
    for (int64_t i = 0; i < 64; i++) {
        const float v = sums[i] * (scale ? half_to_float(scale[i]) : 1) + (bias ? load1(bias, dtype, i) : 0);
        if (dtype == HFQ_F32) ((float*)y)[i] = v;
        else ((uint16_t*)y)[i] = dtype == HFQ_F16 ? float_to_half(v) : float_to_bf16(v);
    }
}

// --- signs: the 16 sums of 4 inputs, of which a weight nibble picks one ---

constexpr int kWordEntries = 128;
constexpr int kMaxTokens = 4;

template <class T> void sums_of_four(T* table, T a, T b, T c, T d) {
    for (int i = 0; i < 16; i++) table[i] = (i & 1 ? a : -a) + (i & 2 ? b : -b) + (i & 4 ? c : -c) + (i & 8 ? d : -d);
}

template <class T> inline T pick(const T* table, uint32_t word, int step = 16) {
    T sum = 0;
    for (int i = 0; i < 8; i++) sum += table[step * i + (word >> 4 * i & 15)];
    return sum;
}

void tables(float* table, const float* x, int64_t words, int tokens) {
    for (int64_t g = 0; g < 8 * words; g++, x += 4) sums_of_four(table + 16 * tokens * g, x[0], x[1], x[2], x[3]);
}

inline float scale_of(const Tile& tile, int64_t group, int r) {
    return tile.scale ? half_to_float(tile.scale[64 * group + r]) : 1;
}

void exact_tile(float* sums, int64_t sums_step, const float* table, int tokens, const Tile& tile) {
    for (int t = 0; t < tokens; t++) {
        const float* from = table + 16 * t;
        for (Pieces piece(tile.first, tile.last, tile.group_words, kPieceWords); piece.next();) {
            float acc[64] = {};
            for (int64_t k = piece.begin(); k < piece.end(); k++, from += kWordEntries * tokens) {
                for (int r = 0; r < 64; r++) acc[r] += pick(from, tile.words[64 * k + r], 16 * tokens);
            }
            for (int r = 0; r < 64; r++) sums[t * sums_step + r] += acc[r] * scale_of(tile, piece.group(), r);
        }
    }
}

inline float largest_bits_scale(const float* x, int64_t n, float* inverse) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        if (bits > top) top = bits;
    }
    return block_scale(top, inverse);
}

inline int8_t round1(float v) { return v == v ? (int8_t)lrintf(v) : 0; }

void quantize(int8_t* values, float* scale, int32_t* start, const float* x, int64_t words, int64_t group_words) {
    for (Pieces block(0, words, group_words, kBlockWords); block.next();) {
        float inverse;
        const int64_t begin = 32 * block.begin(), n = 32 * block.end() - begin;
        scale[block.index()] = largest_bits_scale(x + begin, n, &inverse);
        int32_t sum = 0;
        for (int64_t i = begin; i < begin + n; i++) {
            const int8_t v = round1(x[i] * inverse);
            values[i / 32 * 32 + 4 * (i % 8) + i % 32 / 8] = v;
            sum += v;
        }
        start[block.index()] = -sum;
    }
}

void int8_tile(float* sums, int64_t sums_step, const Quantized& x, int tokens, const Tile& tile) {
    for (int t = 0; t < tokens; t++) {
        for (Pieces block(tile.first, tile.last, tile.group_words, kBlockWords); block.next();) {
            int32_t table[kBlockWords * kWordEntries], acc[64] = {};
            for (int64_t k = block.begin(); k < block.end(); k++) {
                const int8_t* q = x.values + t * x.value_step + 32 * k;
                int32_t* to = table + kWordEntries * (k - block.begin());
                for (int g = 0; g < 8; g++) {  // inputs 4g .. 4g + 3
                    const int8_t* p = q + 16 * (g % 2) + g / 2;
                    sums_of_four<int32_t>(to + 16 * g, p[0], p[4], p[8], p[12]);
                }
                for (int r = 0; r < 64; r++) acc[r] += pick(to, tile.words[64 * k + r]);
            }
            const float factor = x.scale[t * x.block_step + block.index()];
            for (int r = 0; r < 64; r++) {
                sums[t * sums_step + r] += (float)acc[r] * scale_of(tile, block.group(), r) * factor;
            }
        }
    }
}

// --- integer codes ---

inline int code_at(const uint32_t* codes, int bits, int64_t i) {
    const int64_t each = 32 / bits;
    return (int)(codes[i / each] >> bits * (i % each) & ((1u << bits) - 1)) - (1 << (bits - 1));
}

void arrange(float* dst, const float* x, int, int64_t blocks) {
    memcpy(dst, x, sizeof(float) * (size_t)(kCodeBlock * blocks));
}

void quantize_codes(int8_t* values, float* scale, int32_t* start, const float* x, int, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++, x += kCodeBlock, values += kCodeBlock) {
        float inverse;
        scale[b] = largest_bits_scale(x, kCodeBlock, &inverse);
        for (int64_t i = 0; i < kCodeBlock; i++) values[i] = round1(x[i] * inverse);
        start[b] = 0;  // codes get their sign back one by one here
    }
}

// Sum over the blocks of each row of scale times block(row codes, inputs begin .. end, block, token).
template <class Block>
void code_rows(float* sums, int tokens, int rows, const CodeRows& from, const Block& block) {
    const int64_t inputs = from.words * 32 / from.bits;
    for (int r = 0; r < rows; r++) {
        for (int t = 0; t < tokens; t++) {
            float sum = 0;
            for (int64_t b = 0; b < from.blocks; b++) {
                const float scale = from.scale ? from.scale[r * from.blocks + b] : 1;
                sum += scale * block(from.codes + r * from.row_words, kCodeBlock * b,
                                     lesser(kCodeBlock * (b + 1), inputs), b, t);
            }
            sums[64 * t + r] = sum;
        }
    }
}

void exact_rows(float* sums, const float* x, int64_t x_step, int tokens, int rows, const CodeRows& from) {
    code_rows(sums, tokens, rows, from, [&](const uint32_t* codes, int64_t begin, int64_t end, int64_t, int t) {
        float sum = 0;
        for (int64_t i = begin; i < end; i++) sum += (float)code_at(codes, from.bits, i) * x[t * x_step + i];
        return sum;
    });
}

void int8_rows(float* sums, const Quantized& x, int tokens, int rows, const CodeRows& from) {
    code_rows(sums, tokens, rows, from, [&](const uint32_t* codes, int64_t begin, int64_t end, int64_t b, int t) {
        int32_t sum = 0;
        for (int64_t i = begin; i < end; i++) sum += code_at(codes, from.bits, i) * x.values[t * x.value_step + i];
        return (float)sum * x.scale[t * x.block_step + b];
    });
}

constexpr hfq::Convert kConvert = {load, finish};
constexpr hfq::Exact kExact = {16, kWordEntries, kMaxTokens, tables, exact_tile};
constexpr hfq::Int8 kInt8 = {kMaxTokens, quantize, int8_tile};
constexpr hfq::CodesExact kCodesExact = {arrange, exact_rows};
constexpr hfq::CodesInt8 kCodesInt8 = {quantize_codes, int8_rows};

}  // namespace

const hfq::Isa hfq::kScalar = {"scalar", &kConvert, &kExact, &kInt8, &kCodesExact, &kCodesInt8};
