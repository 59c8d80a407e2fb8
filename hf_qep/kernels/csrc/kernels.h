// What an instruction set provides, and what the driver hands to it: tables of functions, chosen at run time.
//
// A unit is compiled with flags of its own, so nothing with external linkage may be shared between units but data: the
// linker keeps one copy of an inline function, and that copy may hold instructions that the machine lacks. Headers for
// units put everything into an unnamed namespace, and units call no templates of the standard library.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace hfq {

constexpr int64_t kTile = 64;         // rows of a tile
constexpr int64_t kBlockWords = 4;    // words of signs, at most, that share one scale of int8 activations
constexpr int64_t kPieceWords = 16;   // words of signs, at most, in one running float32 sum
constexpr int64_t kCodeBlock = 128;   // inputs in a block of integer codes

struct Convert {
    // dst[i] = float(src[i]) * column[i], zero for n <= i < padded; column may be null, padded - n < 128.
    void (*load)(float* dst, const void* src, int dtype, const uint16_t* column, int64_t n, int64_t padded);
    // y[r] = sums[r] * scale[r] + bias[r] for the 64 rows of a tile; scale and bias may be null.
    void (*finish)(void* y, int dtype, const float* sums, const uint16_t* scale, const void* bias);
};

// Words first..last of one tile of signs. A sum over a piece (words that share a scale) is scaled and added on.
struct Tile {
    const uint32_t* words;     // [words of a row][64], from word 0
    const uint16_t* scale;     // [groups][64], or null: 1
    int64_t first, last;
    int64_t group_words;
    int64_t ahead;             // distance to prefetch, in uint32: what will be read next
};

// Float activations as tables: the sums of all combinations of signs of a few inputs, picked by bits of a weight word.
// Tables of several tokens are interleaved, [groups of inputs][tokens][entries], so that a kernel reads one stream.
struct Exact {
    int64_t entries;           // of one group of inputs
    int64_t word_floats;       // of table per token and word of 32 inputs
    int max_tokens;            // per call of `tile`
    // One token among `tokens`: from one group to the next are tokens * entries floats.
    void (*tables)(float* table, const float* x, int64_t words, int tokens);
    // sums[t * sums_step + row] += the tile's product; the tables start at word tile.first.
    void (*tile)(float* sums, int64_t sums_step, const float* tables, int tokens, const Tile& tile);
};

// int8 activations: x = scale * value, one scale per block of kBlockWords words; blocks begin anew with each group.
// Order in a word: values[32k + 4b + j] = input 32k + 8j + b, so that dword b serves bit b of the four weight bytes.
// A block with a NaN or an infinity has a NaN for its scale: every sum with it is NaN, and its values do not matter.
struct Quantized {
    int8_t* values;            // token t at t * value_step
    float* scale;              // token t at t * block_step
    int32_t* start;            // of a block's sum: undoes that weights are stored as 0 and 1, or without a sign
    int64_t value_step, block_step;
};

struct Int8 {
    int max_tokens;
    // start = -sum of the values of a block.
    void (*quantize)(int8_t* values, float* scale, int32_t* start, const float* x, int64_t words, int64_t group_words);
    void (*tile)(float* sums, int64_t sums_step, const Quantized& x, int tokens, const Tile& tile);
};

// Rows of integer codes, in blocks of 128 inputs of which the last may be cut short.
struct CodeRows {
    const uint32_t* codes;     // of the first row, any alignment
    const float* scale;        // [rows][blocks], or null: 1
    int64_t row_words;         // from one row to the next
    int64_t words;             // of codes in a row
    int64_t blocks;
    int bits;
};

struct CodesExact {
    // The order in which `rows` reads x: any, within a block.
    void (*arrange)(float* dst, const float* x, int bits, int64_t blocks);
    // sums[t * 64 + r] for up to 4 tokens and 64 rows.
    void (*rows)(float* sums, const float* x, int64_t x_step, int tokens, int rows, const CodeRows& from);
};

struct CodesInt8 {
    // One scale per block; start = -2^(bits-1) * sum of the values.
    void (*quantize)(int8_t* values, float* scale, int32_t* start, const float* x, int bits, int64_t blocks);
    void (*rows)(float* sums, const Quantized& x, int tokens, int rows, const CodeRows& from);
};

struct Isa {
    const char* name;
    const Convert* convert;
    const Exact* exact;
    const Int8* int8;
    const CodesExact* codes_exact;
    const CodesInt8* codes_int8;
};

// Exact products and int8 products live in units of their own; an Isa without int8 members takes them from another.
extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512;
extern const Int8 kAvx2Int8, kVnniInt8;
extern const CodesInt8 kAvx2Codes, kVnniCodes;
#elif defined(__aarch64__)
extern const Isa kNeon;
extern const Int8 kNeonInt8, kDotInt8;
extern const CodesInt8 kNeonCodes, kDotCodes;
#endif

const Isa& isa();                // in use

}  // namespace hfq
