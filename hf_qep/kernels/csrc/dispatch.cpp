// Which instruction set to use: the best that the machine has, or the one that was asked for.
#include <string.h>
#include <atomic>
#include "api.h"
#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace hfq {
namespace {

// Best first; the last is always there.
struct Available {
    Isa sets[5];
    int count = 0;
    char names[64] = "";

    Available() {
        add_machine();
        add(kScalar);
    }
    void add(const Isa& set) {
        sets[count++] = set;
        if (count > 1) strcat(names, ",");
        strcat(names, set.name);
    }
    void add(const char* name, const Isa& exact, const Int8& int8, const CodesInt8& codes) {
        add({name, exact.convert, exact.exact, &int8, exact.codes_exact, &codes});
    }
#if defined(__x86_64__)
    void add_machine() {  // __builtin_cpu_supports also asks whether the operating system saves the registers
        unsigned a, b, c, d;  // not every compiler knows F16C by name
        const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (avx512 && __builtin_cpu_supports("avx512vnni")) add("avx512vnni", kAvx512, kVnniInt8, kVnniCodes);
        if (avx512) add("avx512", kAvx512, kAvx2Int8, kAvx2Codes);
        if (avx2) add("avx2", kAvx2, kAvx2Int8, kAvx2Codes);
    }
#elif defined(__aarch64__)
    void add_machine() {
#if defined(__linux__)
        const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
        const bool dot = false;
#endif
        add("neon", kNeon, dot ? kDotInt8 : kNeonInt8, dot ? kDotCodes : kNeonCodes);
    }
#else
    void add_machine() {}
#endif
};

const Available& available() {
    static const Available* const found = new Available;  // never destroyed: a call may come at exit
    return *found;
}

std::atomic<const Isa*> in_use{nullptr};

}  // namespace

const Isa& isa() {
    const Isa* set = in_use.load(std::memory_order_acquire);
    if (!set) in_use.store(set = &available().sets[0], std::memory_order_release);
    return *set;
}

}  // namespace hfq

int hfq_abi(void) { return HFQ_ABI; }

const char* hfq_isa(void) { return hfq::isa().name; }

const char* hfq_isas(void) { return hfq::available().names; }

int hfq_set_isa(const char* name) {
    const hfq::Available& found = hfq::available();
    for (int i = 0; name && i < found.count; i++) {
        if (strcmp(found.sets[i].name, name) == 0) {
            hfq::in_use.store(&found.sets[i], std::memory_order_release);
            return 0;
        }
    }
    return HFQ_BAD_ARGUMENT;
}
