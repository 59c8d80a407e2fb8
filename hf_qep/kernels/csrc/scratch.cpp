#include "scratch.h"
#include <stdlib.h>

namespace hfq {
namespace {

constexpr size_t kPage = 4096;

struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { free(at); }
};

thread_local Memory memories[kScratchUses];

}  // namespace

void* scratch(ScratchUse use, size_t bytes) {
    Memory& memory = memories[use];
    if (bytes <= memory.size) return memory.at;
    const size_t more = memory.size + memory.size / 2;
    const size_t size = ((bytes > more ? bytes : more) + kPage - 1) & ~(kPage - 1);
    free(memory.at);
    memory.at = size < bytes ? nullptr : aligned_alloc(kPage, size);
    memory.size = memory.at ? size : 0;
    return memory.at;
}

}  // namespace hfq
