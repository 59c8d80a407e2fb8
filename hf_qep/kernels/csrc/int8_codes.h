// Rows of integer codes times int8 activations: a unit includes it behind its code_row().
#pragma once

namespace {

template <int T, int BITS>
void code_rows(float* sums, const Quantized& x, int rows, const CodeRows& from) {
    for (int r = 0; r < rows; r++) {
        const float* scale = from.scale ? from.scale + r * from.blocks : nullptr;
        code_row<T, BITS>(sums + r, x, from.codes + r * from.row_words, scale, from);
    }
}

void any_code_rows(float* sums, const Quantized& x, int tokens, int rows, const CodeRows& from) {
    constexpr decltype(&code_rows<1, 4>) kernels[2][4] = {
        {code_rows<1, 4>, code_rows<2, 4>, code_rows<3, 4>, code_rows<4, 4>},
        {code_rows<1, 8>, code_rows<2, 8>, code_rows<3, 8>, code_rows<4, 8>}};
    kernels[from.bits == 8][tokens - 1](sums, x, rows, from);
}

}  // namespace
