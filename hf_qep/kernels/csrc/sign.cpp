// Products with tiled signs. Every row is summed in one fixed order, so results do not depend on the number of threads;
// with exact activations they do not depend on the number of tokens in a call either.
#include <string.h>
#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace hfq {
namespace {

constexpr int kMaxTokens = 8;                     // of any unit's kernel
constexpr int64_t kFairTiles = 8, kMostTiles = 64;  // that share the tables of a block of words
constexpr int64_t kQuantizedBytes = 4 << 20;      // of int8 tokens at a time: they are read again for every tile
constexpr int64_t kStreamAhead = 512;             // 2 KB, in words: one linear stream wants prefetching

struct Shape {
    const SignJob& job;
    int64_t words, group_words, tiles;
    int threads;

    explicit Shape(const SignJob& j)
        : job(j), words(ceil_div(j.x.width, 32)), group_words(j.groups == 1 ? words : j.x.width / j.groups / 32),
          tiles(j.y.tiles()), threads(useful_threads(j.threads, (double)j.y.width * j.x.width * j.tokens)) {}

    Tile tile(int64_t t, int64_t first, int64_t last, int64_t ahead) const {
        const uint16_t* scale = job.group_scale ? job.group_scale + t * job.groups * kTile : nullptr;
        return {job.tiles + t * words * kTile, scale, first, last, group_words, ahead};
    }
    double tile_bits() const { return (double)kTile * 32 * words; }
};

// A chunk is a few tokens times some tiles. For a block of words at a time it builds tables, which stay in the first
// level cache for one token and in the second for more, and takes them to all its tiles.
struct ExactProduct : Shape {
    int64_t block_words, blocks, per_block, chunk_tiles, tile_chunks, slot_floats;
    float* slots;

    ExactProduct(const SignJob& j, Carver& memory) : Shape(j) {
        const Exact& exact = *isa().exact;
        block_words = group_words < kPieceWords ? kPieceWords / group_words * group_words : kPieceWords;
        blocks = ceil_div(job.tokens, exact.max_tokens);
        per_block = ceil_div(job.tokens, blocks);  // 13 tokens are 5 + 5 + 3, not 6 + 6 + 1
        blocks = ceil_div(job.tokens, per_block);
        chunk_tiles = tiles_per_chunk();
        tile_chunks = ceil_div(tiles, chunk_tiles);
        if (threads > blocks * tile_chunks) threads = (int)(blocks * tile_chunks);
        slot_floats = 32 * block_words + per_block * (block_words * exact.word_floats + chunk_tiles * kTile);
        slots = memory.take<float>(threads * round_up(slot_floats, 16));
    }
    void run() const {
        parallel(threads, blocks * tile_chunks, [&](int slot, int64_t chunk) {
            // The tokens of the same tiles follow each other, while the weights are in a cache.
            one_chunk(slots + slot * round_up(slot_floats, 16), chunk % blocks * per_block,
                      chunk / blocks * chunk_tiles);
        });
    }
    void one_chunk(float* memory, int64_t token, int64_t first_tile) const {
        const Exact& exact = *isa().exact;
        const int64_t count = lesser(job.tokens - token, per_block);
        const int64_t end = lesser(first_tile + chunk_tiles, tiles);
        const int64_t sums_step = chunk_tiles * kTile;
        const int64_t next_tile = words * kTile, ahead = next_tile < kStreamAhead ? kStreamAhead : next_tile;
        float *x = memory, *tables = x + 32 * block_words, *sums = tables + per_block * block_words * exact.word_floats;
        memset(sums, 0, sizeof(float) * (size_t)(count * sums_step));
        for (int64_t first = 0, last; first < words; first = last) {
            last = block_end(first);
            for (int64_t t = 0; t < count; t++) {
                job.x.load(x, token + t, 32 * first, lesser(32 * last, job.x.width), 32 * (last - first));
                exact.tables(tables + t * exact.entries, x, last - first, (int)count);
            }
            for (int64_t i = first_tile; i < end; i++) {
                exact.tile(sums + (i - first_tile) * kTile, sums_step, tables, (int)count, tile(i, first, last, ahead));
            }
        }
        for (int64_t i = first_tile; i < end; i++) {
            const float* own = sums + (i - first_tile) * kTile;
            for (int64_t t = 0; t < count; t++) job.y.put(token + t, i, own + t * sums_step);
        }
    }
    // A few chunks per thread, so that nobody waits long for the last one, but not of so few tiles that tables cost.
    int64_t tiles_per_chunk() const {
        if (threads == 1) return lesser(tiles, kMostTiles);
        const int64_t share = ceil_div(tiles * blocks, threads), part = ceil_div(share, 6);
        const int64_t count = part < kFairTiles ? lesser(share, kFairTiles) : part;
        return lesser(lesser(count, kMostTiles), tiles);
    }
    // A block ends where a piece of the whole row does.
    int64_t block_end(int64_t first) const {
        const int64_t last = lesser(first + block_words, words);
        return group_words < kPieceWords ? last : lesser(last, (first / group_words + 1) * group_words);
    }
};

// Any number of tokens with int8 activations, of which as many at a time as stay in a cache.
struct Int8Product : Shape {
    int64_t block_tokens, padded = 32 * words;
    float* x;
    Quantized q;

    Int8Product(const SignJob& j, Carver& memory) : Shape(j) {
        q.value_step = round_up(padded, 64);
        q.block_step = words / group_words * ceil_div(group_words, kBlockWords);
        const int64_t most = round_up(ceil_div(kQuantizedBytes, q.value_step), isa().int8->max_tokens);
        block_tokens = lesser(most, job.tokens);
        q.values = memory.take<int8_t>(block_tokens * q.value_step);
        q.scale = memory.take<float>(block_tokens * q.block_step);
        q.start = memory.take<int32_t>(block_tokens * q.block_step);
        x = memory.take<float>(threads * padded);
    }
    Quantized from(int64_t t) const {
        return {q.values + t * q.value_step, q.scale + t * q.block_step, q.start + t * q.block_step, q.value_step,
                q.block_step};
    }
    void run() const {
        for (int64_t token = 0; token < job.tokens; token += block_tokens) {
            const int64_t count = lesser(job.tokens - token, block_tokens);
            quantize(token, count);
            const int64_t step = units_per_chunk(tiles, tile_bits() * count, threads);
            parallel(threads, ceil_div(tiles, step), [&](int, int64_t chunk) {
                const int64_t end = lesser((chunk + 1) * step, tiles);
                for (int64_t i = chunk * step; i < end; i++) one_tile(i, token, count);
            });
        }
    }
    void quantize(int64_t token, int64_t count) const {
        const int64_t step = units_per_chunk(count, 8.0 * padded, threads);
        parallel(threads, ceil_div(count, step), [&](int slot, int64_t chunk) {
            const int64_t end = lesser((chunk + 1) * step, count);
            for (int64_t t = chunk * step; t < end; t++) {
                float* own = x + slot * padded;
                job.x.load(own, token + t, 0, job.x.width, padded);
                const Quantized to = from(t);
                isa().int8->quantize(to.values, to.scale, to.start, own, words, group_words);
            }
        });
    }
    void one_tile(int64_t i, int64_t token, int64_t count) const {
        const Int8& int8 = *isa().int8;
        const Tile from_tile = tile(i, 0, words, kStreamAhead);
        for (int64_t t = 0; t < count; t += int8.max_tokens) {
            alignas(64) float sums[kMaxTokens * kTile] = {};
            const int64_t some = lesser(count - t, int8.max_tokens);
            int8.tile(sums, kTile, from(t), (int)some, from_tile);
            for (int64_t s = 0; s < some; s++) job.y.put(token + t + s, i, sums + s * kTile);
        }
    }
};

template <class Use> void with_strategy(const SignJob& job, Carver& memory, const Use& use) {
    if (job.activation == HFQ_INT8) use(Int8Product(job, memory));
    else use(ExactProduct(job, memory));
}

}  // namespace

size_t sign_scratch(const SignJob& job) {
    Carver counted;
    with_strategy(job, counted, [](const auto&) {});
    return counted.used();
}

void run_sign(const SignJob& job, void* memory) {
    Carver carver(memory);
    with_strategy(job, carver, [](const auto& product) { product.run(); });
}

}  // namespace hfq
