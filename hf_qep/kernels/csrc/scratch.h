// Working memory of a call.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace hfq {

enum ScratchUse { kForCall, kForMiddle, kScratchUses };  // a factored product runs two calls around its middle

// At least `bytes`, aligned to a page, of the calling thread and for one use; null if there is no memory. Contents are
// lost at the next request for the same use.
void* scratch(ScratchUse use, size_t bytes);

// Cuts a piece of memory into arrays that start on cache lines of their own. Without memory it only counts.
class Carver {
public:
    explicit Carver(void* base = nullptr) : base_((char*)base) {}
    template <class T> T* take(int64_t count) {
        T* p = base_ ? (T*)(base_ + used_) : nullptr;
        used_ += ((size_t)count * sizeof(T) + 63) & ~(size_t)63;
        return p;
    }
    size_t used() const { return used_; }

private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace hfq
