// The caller claims chunks like any helper and waits only for helpers that have claimed one: where a core is busy with
// something else, a job never waits for the scheduler to wake a thread that has nothing of it.
#include "pool.h"
#include <pthread.h>
#include <signal.h>
#include <atomic>
#include <new>
#include <thread>

namespace hfq {
namespace {

constexpr int64_t kMaxChunks = 1 << 17;   // of one job, exclusive
constexpr int kSpins = 2000;   // of waiting before a helper sleeps, and before the caller yields

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What there is to claim, in one word. Were the count a variable of its own, a late helper of the last job could claim
// a chunk of the next one between two writes.
struct Claim {
    static constexpr int kIndexBits = 17, kThreadBits = 9;
    static_assert(kMaxChunks == int64_t(1) << kIndexBits && kMaxThreads < 1 << kThreadBits);
    uint64_t word;

    static uint64_t make(uint32_t job, int threads, int64_t chunks) {
        return (((uint64_t)job << kThreadBits | (uint64_t)threads) << kIndexBits | (uint64_t)chunks) << kIndexBits;
    }
    static uint32_t number(uint32_t job) { return job & ((1u << (64 - kThreadBits - 2 * kIndexBits)) - 1); }
    int64_t next() const { return (int64_t)(word & (kMaxChunks - 1)); }
    int64_t chunks() const { return (int64_t)(word >> kIndexBits & (kMaxChunks - 1)); }
    int threads() const { return (int)(word >> (2 * kIndexBits) & ((1 << kThreadBits) - 1)); }
    uint32_t job() const { return (uint32_t)(word >> (2 * kIndexBits + kThreadBits)); }
};

class Pool {
public:
    bool acquire() { return !busy_.test_and_set(std::memory_order_acquire); }
    void release() { busy_.clear(std::memory_order_release); }

    // Chunks first .. first + count.
    void run(int threads, int64_t first, int64_t count, ChunkFn fn, const void* body) {
        while (helpers_ < threads - 1 && start_helper()) {}
        const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
        first_ = first;
        fn_ = fn;
        body_ = body;
        done_.store(0, std::memory_order_relaxed);
        claim_.store(Claim::make(Claim::number(job), threads, count), std::memory_order_release);
        job_.store(job);  // before the look for sleepers in notify_all
        job_.notify_all();
        take(job, 0);
        for (int spin = 0; done_.load(std::memory_order_acquire) < count; spin++) {
            if (spin < kSpins) relax();
            else std::this_thread::yield();
        }
    }

private:
    // first_, fn_ and body_ are read after a claim: before that chunk is counted the job cannot end, nor they change.
    void take(uint32_t job, int slot) {
        Claim seen{claim_.load(std::memory_order_acquire)};
        while (seen.job() == Claim::number(job) && slot < seen.threads() && seen.next() < seen.chunks()) {
            if (!claim_.compare_exchange_weak(seen.word, seen.word + 1, std::memory_order_acq_rel,
                                              std::memory_order_acquire)) {
                continue;
            }
            fn_(body_, slot, first_ + seen.next());
            done_.fetch_add(1, std::memory_order_release);
            seen.word = claim_.load(std::memory_order_acquire);
        }
    }

    void help(int slot, uint32_t seen) {
        for (;;) {
            uint32_t job;
            for (int spin = 0; (job = job_.load(std::memory_order_acquire)) == seen; spin++) {
                if (spin < kSpins) relax();
                else job_.wait(seen, std::memory_order_acquire);
            }
            seen = job;
            take(job, slot);
        }
    }

    bool start_helper() {
        sigset_t all, before;  // signals are for the threads of the program
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            const uint32_t seen = job_.load(std::memory_order_relaxed);
            std::thread([this, slot = helpers_ + 1, seen] { help(slot, seen); }).detach();
            helpers_++;
        } catch (...) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    int helpers_ = 0;
    int64_t first_ = 0;
    ChunkFn fn_ = nullptr;
    const void* body_ = nullptr;
    alignas(64) std::atomic<uint32_t> job_{0};
    alignas(64) std::atomic<uint64_t> claim_{0};
    alignas(64) std::atomic<int64_t> done_{0};
};

// Never destroyed: helpers may outlive any static object. A forked child has none of the helpers, so it starts anew.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found) return found;
    Pool* made = new (std::nothrow) Pool;
    if (!made) return nullptr;
    if (!the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) {
        delete made;
        return found;
    }
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    (void)registered;
    return made;
}

}  // namespace

thread_local Executor borrowed = nullptr;

void run_chunks(int threads, int64_t chunks, ChunkFn fn, const void* body) {
    if (borrowed) return borrowed(threads, chunks, fn, body);
    Pool* p = pool();
    if (p && p->acquire()) {
        for (int64_t first = 0; first < chunks; first += kMaxChunks - 1) {
            const int64_t left = chunks - first;
            p->run(threads, first, left < kMaxChunks ? left : kMaxChunks - 1, fn, body);
        }
        p->release();
        return;
    }
    for (int64_t c = 0; c < chunks; c++) fn(body, 0, c);
}

}  // namespace hfq
