// The C interface: checks of the arguments, working memory, and what all products share.
#include "driver.h"
#include <string.h>
#include "pool.h"
#include "scratch.h"

namespace hfq {
namespace {

constexpr double kThreadBits = 4 << 20;   // less is done sooner than a helper wakes
constexpr double kChunkBits = 512 << 10;  // 64 KB of weights: long against a claim, short against a wait
constexpr int64_t kMiddleTokens = 256;    // of a factored product at a time
constexpr int64_t kMaxSize = int64_t(1) << 31;

bool size_ok(int64_t n) { return n >= 1 && n < kMaxSize; }

bool common_ok(const void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t in, int activation,
               int threads) {
    return y && x && dtype >= HFQ_F32 && dtype <= HFQ_BF16 && tokens >= 0 && tokens < kMaxSize && size_ok(out) &&
           size_ok(in) && (activation == HFQ_EXACT || activation == HFQ_INT8) && threads >= 1;
}

bool tiles_ok(const uint32_t* tiles) { return tiles && (uintptr_t)tiles % 64 == 0; }

bool groups_ok(int64_t in, int64_t groups, int64_t multiple) {
    return groups == 1 || (groups > 1 && groups <= in && in % groups == 0 && in / groups % multiple == 0);
}

void move_tokens(Input& x, Output& y, int64_t tokens) {
    x.at = (const char*)x.at + size_of(x.dtype) * (size_t)(tokens * x.width);
    y.at = (char*)y.at + size_of(y.dtype) * (size_t)(tokens * y.width);
}

// Both stages of a factored product for some of the tokens.
struct Stages {
    SignJob right, left;

    void set_tokens(int64_t tokens) { right.tokens = left.tokens = tokens; }
    size_t scratch_bytes() const {
        const size_t a = sign_scratch(right), b = sign_scratch(left);
        return a > b ? a : b;
    }
};

int run_stages(Stages& stages, int64_t tokens) {
    const int64_t most = lesser(tokens, kMiddleTokens), rest = tokens % most;
    float* middle = (float*)scratch(kForMiddle, sizeof(float) * (size_t)(most * stages.left.x.width));
    stages.set_tokens(most);
    size_t bytes = stages.scratch_bytes();
    if (rest) {
        stages.set_tokens(rest);
        const size_t again = stages.scratch_bytes();
        bytes = again > bytes ? again : bytes;
    }
    void* memory = scratch(kForCall, bytes);
    if (!middle || !memory) return HFQ_NO_MEMORY;
    for (int64_t t = 0; t < tokens; t += most) {
        stages.set_tokens(tokens - t < most ? rest : most);
        stages.right.y.at = middle;
        stages.left.x.at = middle;
        run_sign(stages.right, memory);
        run_sign(stages.left, memory);
        move_tokens(stages.right.x, stages.left.y, most);
    }
    return 0;
}

}  // namespace

int useful_threads(int threads, double bits) {
    if (bits < kThreadBits) return 1;
    return threads < kMaxThreads ? threads : kMaxThreads;
}

int64_t units_per_chunk(int64_t units, double bits_per_unit, int threads) {
    if (threads == 1) return units;
    const double enough = kChunkBits / bits_per_unit;
    return enough < 1 ? 1 : (int64_t)enough;
}

void Output::put(int64_t token, int64_t tile, const float* sums, const uint16_t* own) const {
    const Convert& convert = *isa().convert;
    const size_t size = size_of(dtype);
    const int64_t row = tile * kTile, rows = lesser(width - row, kTile);
    char* to = (char*)at + size * (size_t)(token * width + row);
    const uint16_t* factors = scale ? scale + row : own;
    const char* add = bias ? (const char*)bias + size * (size_t)row : nullptr;
    if (rows == kTile) {
        convert.finish(to, dtype, sums, factors, add);
        return;
    }
    alignas(64) char whole[kTile * 4], whole_bias[kTile * 4] = {};
    uint16_t whole_scale[kTile] = {};
    if (factors) memcpy(whole_scale, factors, 2 * (size_t)rows);
    if (add) memcpy(whole_bias, add, size * (size_t)rows);
    convert.finish(whole, dtype, sums, factors ? whole_scale : nullptr, add ? whole_bias : nullptr);
    memcpy(to, whole, size * (size_t)rows);
}

}  // namespace hfq

using namespace hfq;

int hfq_sign_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t in, const uint32_t* tiles,
                    const uint16_t* row_scale, int64_t groups, const uint16_t* column_scale, const void* bias,
                    int activation, int threads) {
    if (!common_ok(y, x, dtype, tokens, out, in, activation, threads) || !tiles_ok(tiles) || !row_scale ||
        !groups_ok(in, groups, 32)) {
        return HFQ_BAD_ARGUMENT;
    }
    if (tokens == 0) return 0;
    const SignJob job = {{y, dtype, out, groups == 1 ? row_scale : nullptr, bias}, {x, dtype, in, column_scale}, tiles,
                         groups == 1 ? nullptr : row_scale, tokens, groups, activation, threads};
    void* memory = scratch(kForCall, sign_scratch(job));
    if (!memory) return HFQ_NO_MEMORY;
    run_sign(job, memory);
    return 0;
}

int hfq_factored_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t rank, int64_t in,
                        const uint32_t* left, const uint32_t* right, const uint16_t* row, const uint16_t* middle,
                        const uint16_t* column, const void* bias, int activation, int threads) {
    if (!common_ok(y, x, dtype, tokens, out, in, activation, threads) || !size_ok(rank) || !tiles_ok(left) ||
        !tiles_ok(right) || !row || !middle || !column) {
        return HFQ_BAD_ARGUMENT;
    }
    if (tokens == 0) return 0;
    Stages stages = {{{nullptr, HFQ_F32, rank, middle, nullptr}, {x, dtype, in, column}, right, nullptr, 0, 1,
                      activation, threads},
                     {{y, dtype, out, row, bias}, {nullptr, HFQ_F32, rank, nullptr}, left, nullptr, 0, 1, activation,
                      threads}};
    return run_stages(stages, tokens);
}

int hfq_integer_linear(void* y, const void* x, int dtype, int64_t tokens, int64_t out, int64_t in,
                       const uint32_t* words, int64_t row_words, int bits, int64_t groups, const void* bias,
                       int activation, int threads) {
    if (!common_ok(y, x, dtype, tokens, out, in, activation, threads) || !words || (bits != 4 && bits != 8) ||
        !groups_ok(in, groups, 1) || row_words < ceil_div(groups, 2) + ceil_div(in * bits, 32)) {
        return HFQ_BAD_ARGUMENT;
    }
    if (tokens == 0) return 0;
    const CodeJob job = {{y, dtype, out, nullptr, bias}, {x, dtype, in, nullptr}, words, row_words, tokens, groups,
                         bits, activation, threads};
    void* memory = scratch(kForCall, code_scratch(job));
    if (!memory) return HFQ_NO_MEMORY;
    run_codes(job, memory);
    return 0;
}
