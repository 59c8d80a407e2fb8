// The kernels as torch operators, over the stable ABI (torch >= 2.10): no C++ symbol of torch and none of Python, so
// one build serves every Python and every later torch. Schemas are defined in kernels/native.py, fakes and gradients too.
#include "api.h"
#include "pool.h"

#include <atomic>
#include <optional>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

int dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return HFQ_F32;
        case ScalarType::Half: return HFQ_F16;
        case ScalarType::BFloat16: return HFQ_BF16;
        default: STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16"); return -1;
    }
}

void check_packed(const Tensor& t, ScalarType type, const char* what) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), what);
}

const uint16_t* scales(const Tensor& t, int64_t count) {
    check_packed(t, ScalarType::Half, "scales must be contiguous float16");
    STD_TORCH_CHECK(t.numel() == count, "a scale has the wrong number of values");
    return static_cast<const uint16_t*>(t.const_data_ptr());
}

const uint32_t* tiles_of(const Tensor& t, int64_t rows, int64_t columns) {
    check_packed(t, ScalarType::Int, "signs must be contiguous int32");
    const bool fits = t.dim() == 3 && t.size(0) == (rows + 63) / 64 && t.size(1) == (columns + 31) / 32;
    STD_TORCH_CHECK(fits && t.size(2) == 64, "signs must be tiled as (ceil(rows/64), ceil(columns/32), 64)");
    const void* data = t.const_data_ptr();
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, "tiles must be aligned to 64 bytes");
    return static_cast<const uint32_t*>(data);
}

const void* bias_of(const Optional& bias, const Tensor& x, int64_t out) {
    if (!bias.has_value()) return nullptr;
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->is_contiguous() && bias->numel() == out,
                    "bias must be contiguous, of the dtype of x, one value per output");
    return bias->const_data_ptr();
}

// Through the C function: torch's dispatcher would take a microsecond more than the smallest product.
Tensor output_for(const Tensor& x, int64_t out) {
    constexpr int64_t kMost = 8;
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims >= 1 && dims <= kMost, "x must have 1 to 8 dimensions");
    int64_t sizes[kMost], strides[kMost];
    for (int64_t d = dims - 1, step = 1; d >= 0; d--) {
        sizes[d] = d == dims - 1 ? out : x.size(d);
        strides[d] = step;
        step *= sizes[d];
    }
    int32_t dtype;
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

void check_done(int status) {
    STD_TORCH_CHECK(status != HFQ_NO_MEMORY, "out of memory in a packed product");
    STD_TORCH_CHECK(status == 0, "a packed product was given sizes that do not fit");
}

// Chunks on torch's own threads. After a parallel region those spin for a while, waiting for the next one, and helpers
// of the pool would share the cores with them: a token of a 1B model took 1.8 times as long on two threads. The price
// is that of every parallel product of torch: it ends when the last thread was scheduled, also where a core is busy.
void on_threads_of_torch(int threads, int64_t chunks, hfq::ChunkFn fn, const void* body) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t slot = first; slot < last; slot++) {
            for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) fn(body, (int)slot, c);
        }
    });
}

struct Borrow {
    Borrow() { hfq::borrowed = on_threads_of_torch; }
    ~Borrow() { hfq::borrowed = nullptr; }
};

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

int64_t tokens_of(const Tensor& x, int64_t in) { return in == 0 ? 0 : x.numel() / in; }

Tensor sign_linear(const Tensor& given, const Tensor& tiles, const Tensor& row_scale, const Optional& column_scale,
                   const Optional& bias, int64_t out, int64_t activation) {
    const Tensor x = dense(given);
    const int64_t in = x.size(x.dim() - 1), groups = row_scale.dim() == 3 ? row_scale.size(1) : 1;
    const uint16_t* rows = scales(row_scale, groups > 1 || row_scale.dim() == 3 ? (out + 63) / 64 * groups * 64 : out);
    const uint16_t* columns = column_scale.has_value() ? scales(*column_scale, in) : nullptr;
    Tensor y = output_for(x, out);
    const Borrow borrow;
    check_done(hfq_sign_linear(y.data_ptr(), x.const_data_ptr(), dtype_of(x), tokens_of(x, in), out, in,
                               tiles_of(tiles, out, in), rows, groups, columns, bias_of(bias, x, out),
                               static_cast<int>(activation), threads()));
    return y;
}

Tensor factored_linear(const Tensor& given, const Tensor& left, const Tensor& right, const Tensor& row,
                       const Tensor& middle, const Tensor& column, const Optional& bias, int64_t activation) {
    const Tensor x = dense(given);
    const int64_t in = x.size(x.dim() - 1), out = row.numel(), rank = middle.numel();
    Tensor y = output_for(x, out);
    const Borrow borrow;
    check_done(hfq_factored_linear(y.data_ptr(), x.const_data_ptr(), dtype_of(x), tokens_of(x, in), out, rank, in,
                                   tiles_of(left, out, rank), tiles_of(right, rank, in), scales(row, out),
                                   scales(middle, rank), scales(column, in), bias_of(bias, x, out),
                                   static_cast<int>(activation), threads()));
    return y;
}

Tensor integer_linear(const Tensor& given, const Tensor& words, const Optional& bias, int64_t bits, int64_t groups,
                      int64_t activation) {
    const Tensor x = dense(given);
    const int64_t in = x.size(x.dim() - 1), out = words.size(0), width = words.size(1);
    check_packed(words, ScalarType::Int, "codes must be contiguous int32");
    STD_TORCH_CHECK(width == (groups + 1) / 2 + (in * bits + 31) / 32, "codes do not fit the width of x");
    Tensor y = output_for(x, out);
    const Borrow borrow;
    check_done(hfq_integer_linear(y.data_ptr(), x.const_data_ptr(), dtype_of(x), tokens_of(x, in), out, in,
                                  static_cast<const uint32_t*>(words.const_data_ptr()), width, static_cast<int>(bits),
                                  groups, bias_of(bias, x, out), static_cast<int>(activation), threads()));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_qep, CPU, m) {
    m.impl("sign_linear", TORCH_BOX(&sign_linear));
    m.impl("factored_linear", TORCH_BOX(&factored_linear));
    m.impl("integer_linear", TORCH_BOX(&integer_linear));
}
