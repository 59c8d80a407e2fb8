// A pool of threads that helps a caller with the chunks of one job.
#pragma once
#include <stdint.h>

namespace hfq {

constexpr int kMaxThreads = 256;

using ChunkFn = void (*)(const void* body, int slot, int64_t chunk);

// Runs body(slot, chunk) for each chunk, on at most `threads` threads: the caller is slot 0, helpers 1 .. threads - 1,
// and a slot runs one chunk at a time. Which slot runs a chunk is up to chance. While another caller has the pool, this
// one does all its chunks itself. threads <= kMaxThreads.
void run_chunks(int threads, int64_t chunks, ChunkFn fn, const void* body);

// What the calling thread takes in place of the pool, if anything; same contract.
using Executor = void (*)(int threads, int64_t chunks, ChunkFn fn, const void* body);
extern thread_local Executor borrowed;

template <class Body> void parallel(int threads, int64_t chunks, const Body& body) {
    if (threads <= 1 || chunks <= 1) {
        for (int64_t c = 0; c < chunks; c++) body(0, c);
        return;
    }
    const int useful = chunks < threads ? (int)chunks : threads;
    run_chunks(useful, chunks, [](const void* b, int slot, int64_t c) { (*(const Body*)b)(slot, c); }, &body);
}

}  // namespace hfq
