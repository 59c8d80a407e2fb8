// Products with integer codes and exact activations, the same for both widths of x86. A unit includes it behind its
// Vector with zeros(), all(), multiply_add() and sum_lanes(), and its add_block().
#pragma once

namespace {

// R rows and T tokens at once, with so many sums of A parts that additions do not wait for each other.
template <int T, int R, int BITS>
void code_rows(float* sums, const float* x, int64_t x_step, const uint32_t* codes, const float* scale,
               const CodeRows& from) {
    constexpr int kWords = 4 * BITS, A = R * T >= 4 ? 1 : 4 / (R * T);
    Vector total[R][T], acc[R][A][T];
    for (int r = 0; r < R; r++) {
        for (int t = 0; t < T; t++) total[r][t] = zeros();
    }
    const auto clear = [&](int r) {
#pragma GCC unroll 16
        for (int i = 0; i < A * T; i++) acc[r][i / T][i % T] = zeros();
    };
    const auto collect = [&](int r, Vector factor) {
#pragma GCC unroll 16
        for (int i = 0; i < A * T; i++) {
            total[r][i % T] = multiply_add(acc[r][i / T][i % T], factor, total[r][i % T]);
        }
    };
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) clear(r);
    for (int64_t b = 0; b < from.blocks; b++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            uint32_t copy[kWords];
            const uint32_t* words = whole_block(codes + r * from.row_words + kWords * b, from.words - kWords * b, copy);
            add_block<T, A, BITS>(acc[r], words, x + kCodeBlock * b, x_step);
            if (scale) {
                collect(r, all(scale[r * from.blocks + b]));
                clear(r);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        collect(r, all(1));
        for (int t = 0; t < T; t++) sums[64 * t + r] = sum_lanes(total[r][t]);
    }
}

template <int T, int BITS>
void all_code_rows(float* sums, const float* x, int64_t x_step, int rows, const CodeRows& from) {
    constexpr int R = T <= 2 ? 1 : 2;  // one linear stream where memory is the limit
    int r = 0;
    const auto scale = [&] { return from.scale ? from.scale + r * from.blocks : nullptr; };
    for (; r + R <= rows; r += R) {
        code_rows<T, R, BITS>(sums + r, x, x_step, from.codes + r * from.row_words, scale(), from);
    }
    for (; r < rows; r++) code_rows<T, 1, BITS>(sums + r, x, x_step, from.codes + r * from.row_words, scale(), from);
}

void any_code_rows(float* sums, const float* x, int64_t x_step, int tokens, int rows, const CodeRows& from) {
    constexpr decltype(&all_code_rows<1, 4>) kernels[2][4] = {
        {all_code_rows<1, 4>, all_code_rows<2, 4>, all_code_rows<3, 4>, all_code_rows<4, 4>},
        {all_code_rows<1, 8>, all_code_rows<2, 8>, all_code_rows<3, 8>, all_code_rows<4, 8>}};
    kernels[from.bits == 8][tokens - 1](sums, x, x_step, rows, from);
}

}  // namespace
