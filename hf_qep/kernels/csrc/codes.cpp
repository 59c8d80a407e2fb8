// Products with integer codes. A chunk is some units of 64 rows times a block of tokens; each row is summed in one
// fixed order, so results do not depend on the number of threads.
#include <string.h>
#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace hfq {
namespace {

constexpr int64_t kTokens = 4;                  // of a unit's kernel
constexpr int64_t kBlockBytes = 512 << 10;      // of activations at a time: they are read again for each unit

struct Rows {
    const CodeJob& job;
    int64_t scale_words, code_words, units, block_tokens;
    int threads;

    explicit Rows(const CodeJob& j)
        : job(j), scale_words(ceil_div(j.groups, 2)), code_words(ceil_div(j.x.width * j.bits, 32)), units(j.y.tiles()),
          threads(useful_threads(j.threads, (double)j.y.width * j.x.width * j.bits * j.tokens)) {
        block_tokens = lesser(round_up(ceil_div(kBlockBytes, 4 * j.x.width), kTokens), j.tokens);
    }
    const uint32_t* row(int64_t r) const { return job.words + r * job.row_words; }
    int64_t rows_of(int64_t unit) const {
        return lesser(job.y.width - unit * kTile, kTile);
    }
    // The scales at the head of a row; they are little-endian float16, so their address will do.
    const uint16_t* scales(int64_t r) const { return (const uint16_t*)row(r); }

    // prepare(token, count), then unit(slot, unit, token, count) for all units, for each block of tokens.
    template <class Prepare, class Unit> void run(const Prepare& prepare, const Unit& unit) const {
        for (int64_t token = 0; token < job.tokens; token += block_tokens) {
            const int64_t count = lesser(job.tokens - token, block_tokens);
            prepare(token, count);
            const int64_t step = units_per_chunk(units, 32.0 * kTile * code_words * count, threads);
            parallel(threads, ceil_div(units, step), [&](int slot, int64_t chunk) {
                const int64_t end = lesser((chunk + 1) * step, units);
                for (int64_t u = chunk * step; u < end; u++) unit(slot, u, token, count);
            });
        }
    }
};

// One scale per row, or groups of whole blocks: the kernels of the instruction set.
struct Blocks : Rows {
    int64_t blocks = ceil_div(job.x.width, kCodeBlock), padded = blocks * kCodeBlock;
    float *x = nullptr, *plain, *row_scales;
    Quantized q = {nullptr, nullptr, nullptr, padded, blocks};

    Blocks(const CodeJob& j, Carver& memory) : Rows(j) {
        plain = memory.take<float>(padded);
        if (j.activation == HFQ_EXACT) {
            x = memory.take<float>(block_tokens * padded);
        } else {
            q.values = memory.take<int8_t>(block_tokens * padded);
            q.scale = memory.take<float>(block_tokens * blocks);
            q.start = memory.take<int32_t>(block_tokens * blocks);
        }
        row_scales = memory.take<float>(j.groups == 1 ? 0 : threads * kTile * blocks);
    }
    static bool suits(const CodeJob& j) { return j.groups == 1 || j.x.width / j.groups % kCodeBlock == 0; }

    void run() const {
        Rows::run([&](int64_t token, int64_t count) { prepare(token, count); },
                  [&](int slot, int64_t unit, int64_t token, int64_t count) { one_unit(slot, unit, token, count); });
    }
    Quantized from(int64_t t) const {
        return {q.values + t * padded, q.scale + t * blocks, q.start + t * blocks, padded, blocks};
    }
    void prepare(int64_t token, int64_t count) const {
        for (int64_t t = 0; t < count; t++) {
            job.x.load(plain, token + t, 0, job.x.width, padded);
            if (job.activation == HFQ_EXACT) {
                isa().codes_exact->arrange(x + t * padded, plain, job.bits, blocks);
            } else {
                const Quantized to = from(t);
                isa().codes_int8->quantize(to.values, to.scale, to.start, plain, job.bits, blocks);
            }
        }
    }
    void one_unit(int slot, int64_t unit, int64_t token, int64_t count) const {
        const int64_t first = unit * kTile, rows = rows_of(unit);
        uint16_t own[kTile] = {};
        float* scale = job.groups == 1 ? nullptr : row_scales + slot * kTile * blocks;
        for (int64_t r = 0; r < rows; r++) {
            __builtin_prefetch(row(first + kTile + r));  // scales of the next unit, which no stream leads to
            if (scale) spread(scale + r * blocks, scales(first + r));
            else own[r] = *scales(first + r);
        }
        const CodeRows from_rows = {row(first) + scale_words, scale, job.row_words, code_words, blocks, job.bits};
        for (int64_t t = 0; t < count; t += kTokens) {
            alignas(64) float sums[kTokens * kTile];
            const int64_t some = lesser(count - t, kTokens);
            if (job.activation == HFQ_EXACT) {
                isa().codes_exact->rows(sums, x + t * padded, padded, (int)some, (int)rows, from_rows);
            } else {
                isa().codes_int8->rows(sums, from(t), (int)some, (int)rows, from_rows);
            }
            for (int64_t s = 0; s < some; s++) job.y.put(token + t + s, unit, sums + s * kTile, scale ? nullptr : own);
        }
    }
    // One scale per block out of one per group. Backwards, because both share their memory.
    void spread(float* dst, const uint16_t* groups) const {
        const int64_t each = blocks / job.groups;
        isa().convert->load(dst, groups, HFQ_F16, nullptr, job.groups, job.groups);
        if (each == 1) return;
        for (int64_t b = blocks; b-- > 0;) dst[b] = dst[b / each];
    }
};

// Groups of any other size: rows are written out as float32 first, and activations are exact in either mode.
struct AnyGroups : Rows {
    static constexpr int64_t kLanes = 16;
    int64_t padded = round_up(job.x.width, kLanes), slot_floats;
    float *x, *slots;

    AnyGroups(const CodeJob& j, Carver& memory) : Rows(j) {
        slot_floats = padded + round_up(j.groups, kLanes) + block_tokens * kTile;
        x = memory.take<float>(block_tokens * padded);
        slots = memory.take<float>(threads * slot_floats);
    }
    void run() const {
        Rows::run([&](int64_t token, int64_t count) { prepare(token, count); },
                  [&](int slot, int64_t unit, int64_t token, int64_t count) { one_unit(slot, unit, token, count); });
    }
    void prepare(int64_t token, int64_t count) const {
        for (int64_t t = 0; t < count; t++) job.x.load(x + t * padded, token + t, 0, job.x.width, padded);
    }
    void one_unit(int slot, int64_t unit, int64_t token, int64_t count) const {
        float *row = slots + slot * slot_floats, *scale = row + padded, *sums = scale + round_up(job.groups, kLanes);
        for (int64_t r = 0; r < rows_of(unit); r++) {
            write_out(row, scale, unit * kTile + r);
            for (int64_t t = 0; t < count; t++) sums[t * kTile + r] = dot(row, x + t * padded);
        }
        for (int64_t t = 0; t < count; t++) job.y.put(token + t, unit, sums + t * kTile);
    }
    void write_out(float* dst, float* group_scale, int64_t r) const {
        isa().convert->load(group_scale, scales(r), HFQ_F16, nullptr, job.groups, job.groups);
        const uint8_t* bytes = (const uint8_t*)(row(r) + scale_words);
        const int64_t size = job.x.width / job.groups;
        for (int64_t g = 0, i = 0; g < job.groups; g++) {
            for (const int64_t end = i + size; i < end; i++) {
                const int code = job.bits == 8 ? bytes[i] - 128 : (bytes[i / 2] >> 4 * (i % 2) & 15) - 8;
                dst[i] = group_scale[g] * (float)code;
            }
        }
        for (int64_t i = job.x.width; i < padded; i++) dst[i] = 0;
    }
    float dot(const float* a, const float* b) const {
        float lanes[kLanes] = {};
        for (int64_t i = 0; i < padded; i += kLanes) {
            for (int64_t l = 0; l < kLanes; l++) lanes[l] += a[i + l] * b[i + l];
        }
        for (int64_t half = kLanes / 2; half; half /= 2) {
            for (int64_t l = 0; l < half; l++) lanes[l] += lanes[l + half];
        }
        return lanes[0];
    }
};

template <class Use> void with_strategy(const CodeJob& job, Carver& memory, const Use& use) {
    if (Blocks::suits(job)) use(Blocks(job, memory));
    else use(AnyGroups(job, memory));
}

}  // namespace

size_t code_scratch(const CodeJob& job) {
    Carver counted;
    with_strategy(job, counted, [](const auto&) {});
    return counted.used();
}

void run_codes(const CodeJob& job, void* memory) {
    Carver carver(memory);
    with_strategy(job, carver, [](const auto& product) { product.run(); });
}

}  // namespace hfq
