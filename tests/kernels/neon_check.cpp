// Compares the NEON units with plain C++ through the C interface; run under an emulator by test_csrc.py. Prints what
// differs and returns 1.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <random>
#include <vector>
#include "api.h"

namespace {

std::mt19937 generator(1);
int failures = 0;

std::vector<uint8_t> activations(int64_t count, int dtype) {
    std::normal_distribution<float> normal;
    std::vector<uint8_t> bytes((size_t)count * (dtype == HFQ_F32 ? 4 : 2));
    for (int64_t i = 0; i < count; i++) {
        const float v = normal(generator);
        uint32_t bits;
        memcpy(&bits, &v, 4);
        const uint16_t half = dtype == HFQ_BF16 ? (uint16_t)(bits >> 16) : (uint16_t)(0x3000 + generator() % 0x0fff);
        if (dtype == HFQ_F32) memcpy(&bytes[(size_t)i * 4], &v, 4);
        else memcpy(&bytes[(size_t)i * 2], &half, 2);
    }
    return bytes;
}

std::vector<uint16_t> scales(int64_t count) {  // 0.5 .. 2
    std::vector<uint16_t> half((size_t)count);
    for (auto& h : half) h = (uint16_t)(0x3800 + generator() % 0x0800);
    return half;
}

uint32_t* random_words(int64_t count) {
    uint32_t* words = (uint32_t*)aligned_alloc(64, (size_t)(count * 4 + 63) / 64 * 64);
    for (int64_t i = 0; i < count; i++) words[i] = (uint32_t)generator();
    return words;
}

double value(const std::vector<uint8_t>& y, int dtype, size_t i) {
    if (dtype == HFQ_F32) {
        float f;
        memcpy(&f, &y[4 * i], 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, &y[2 * i], 2);
    if (dtype == HFQ_F16) {
        __fp16 f;
        memcpy(&f, &h, 2);
        return f;
    }
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// call(y) under both instruction sets.
template <class Call>
void compare(const char* what, int64_t tokens, int64_t out, int64_t in, int dtype, const Call& call) {
    std::vector<uint8_t> y[2];
    const char* names[2] = {"scalar", "neon"};
    for (int i = 0; i < 2; i++) {
        y[i].resize((size_t)(tokens * out) * (dtype == HFQ_F32 ? 4 : 2));
        if (hfq_set_isa(names[i]) || call(y[i].data())) {
            printf("%s: %s refused\n", what, names[i]);
            failures = 1;
            return;
        }
    }
    double difference = 0, length = 0;
    for (size_t i = 0; i < (size_t)(tokens * out); i++) {
        const double a = value(y[0], dtype, i), b = value(y[1], dtype, i);
        difference += (a - b) * (a - b);
        length += a * a;
    }
    const double error = sqrt(difference / length), limit = dtype == HFQ_F32 ? 2e-6 : dtype == HFQ_F16 ? 2e-4 : 2e-3;
    if (error <= limit) return;
    printf("%s %ld x %ld x %ld dtype %d: %.2e\n", what, (long)tokens, (long)out, (long)in, dtype, error);
    failures = 1;
}

void check_signs(int64_t tokens, int64_t out, int64_t in, int64_t groups, int dtype, int activation, int threads) {
    const int64_t tiles = (out + 63) / 64, words = (in + 31) / 32;
    const auto x = activations(tokens * in, dtype), bias = activations(out, dtype);
    const auto row = scales(tiles * 64 * groups), column = scales(in);
    uint32_t* w = random_words(tiles * words * 64);
    compare("signs", tokens, out, in, dtype, [&](void* y) {
        return hfq_sign_linear(y, x.data(), dtype, tokens, out, in, w, row.data(), groups, column.data(), bias.data(),
                               activation, threads);
    });
    free(w);
}

void check_codes(int64_t tokens, int64_t out, int64_t in, int bits, int64_t groups, int dtype, int activation) {
    const int64_t row_words = (groups + 1) / 2 + (in * bits + 31) / 32;
    const auto x = activations(tokens * in, dtype), bias = activations(out, dtype);
    const auto scale = scales(2 * ((groups + 1) / 2));
    uint32_t* w = random_words(out * row_words);
    for (int64_t r = 0; r < out; r++) memcpy(w + r * row_words, scale.data(), 2 * scale.size());
    compare("codes", tokens, out, in, dtype, [&](void* y) {
        return hfq_integer_linear(y, x.data(), dtype, tokens, out, in, w, row_words, bits, groups, bias.data(),
                                  activation, 1);
    });
    free(w);
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{1, 1, 1}, {1, 65, 172}, {2, 64, 33}, {3, 130, 1000}, {5, 63, 2080}, {9, 70, 96}};
    for (int activation : {HFQ_EXACT, HFQ_INT8}) {
        for (const auto& s : shapes) {
            for (int dtype : {HFQ_F32, HFQ_F16, HFQ_BF16}) {
                check_signs(s[0], s[1], s[2], 1, dtype, activation, 1);
                for (int bits : {4, 8}) check_codes(s[0], s[1], s[2], bits, 1, dtype, activation);
            }
        }
        for (int64_t tokens : {1, 2, 4, 7}) {
            check_signs(tokens, 130, 32 * 6, 6, HFQ_F32, activation, 1);
            check_signs(tokens, 65, 160 * 3, 3, HFQ_F32, activation, 1);
            check_signs(tokens, 1100, 4096, 32, HFQ_F32, activation, 2);
            for (int bits : {4, 8}) check_codes(tokens, 70, 768, bits, 3, HFQ_F32, activation);
        }
    }
    return failures;
}
