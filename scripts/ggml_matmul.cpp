// ggml's matrix product, timed line by line: the llama.cpp peer of `bench_speed.py kernels`, built by peer_llamacpp.py.
//
//   make ID TYPE OUT IN BATCH BYTES  ->  ok BITS_PER_WEIGHT COPIES plain|repacked, or: no REASON
//   run ID CALLS THREADS             ->  ok SECONDS
//   drop ID                          ->  ok 0
//
// TYPE is ggml's own name (q1_0, tq1_0, q4_0, bf16, ...). `make` holds as many copies of the weight as fill BYTES, each
// with a graph of one product; `run` goes on to the next copy with every call, so the weights come from memory. Weights
// are repacked where ggml has a repacked form, as llama.cpp does when it loads a file. Rounding the activations is part
// of a call.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <strings.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int QUANTISED_ROWS = 16;  // repeated over the whole matrix: only the time counts

struct Product {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_context* weights_context = nullptr;
    ggml_context* context = nullptr;
    ggml_backend_buffer_t weights_buffer = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<ggml_tensor*> weights;
    std::vector<ggml_cgraph*> graphs;
    size_t next = 0;
    bool repacked = false;

    ~Product() {
        if (weights_buffer) ggml_backend_buffer_free(weights_buffer);
        if (buffer) ggml_backend_buffer_free(buffer);
        if (weights_context) ggml_free(weights_context);
        if (context) ggml_free(context);
        ggml_backend_free(backend);
    }
};

ggml_type type_called(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char* known = ggml_type_name(static_cast<ggml_type>(i));
        if (known && strcasecmp(known, name.c_str()) == 0) return static_cast<ggml_type>(i);
    }
    throw std::runtime_error("this ggml has no type " + name);
}

ggml_backend_buffer_type_t repacking(ggml_backend_t backend) {
    const auto device = ggml_backend_get_device(backend);
    const auto found = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                         "ggml_backend_dev_get_extra_bufts");
    if (!found) return nullptr;
    ggml_backend_buffer_type_t* list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(found)(device);
    for (; list && *list; list++)
        if (strstr(ggml_backend_buft_name(*list), "REPACK")) return *list;
    return nullptr;
}

std::vector<char> random_weight(ggml_type type, int64_t out, int64_t in, std::mt19937& random) {
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> values(QUANTISED_ROWS * in), importance(in, 1.0f);
    for (float& v : values) v = normal(random);
    const size_t row = ggml_row_size(type, in);
    std::vector<char> rows(row * QUANTISED_ROWS), all(row * out);
    if (type == GGML_TYPE_F32) memcpy(rows.data(), values.data(), rows.size());
    else ggml_quantize_chunk(type, values.data(), rows.data(), 0, QUANTISED_ROWS, in, importance.data());
    for (int64_t r = 0; r < out; r++) memcpy(&all[r * row], &rows[r % QUANTISED_ROWS * row], row);
    return all;
}

void allocate(Product& p, ggml_type type, int64_t out, int64_t in, size_t copies) {
    ggml_init_params parameters = {ggml_tensor_overhead() * (copies + 8), nullptr, true};
    for (const auto kind : {repacking(p.backend), ggml_backend_cpu_buffer_type()}) {
        if (!kind) continue;
        p.weights_context = ggml_init(parameters);
        p.weights.clear();
        for (size_t i = 0; i < copies; i++) p.weights.push_back(ggml_new_tensor_2d(p.weights_context, type, in, out));
        p.weights_buffer = ggml_backend_alloc_ctx_tensors_from_buft(p.weights_context, kind);
        const bool plain = kind == ggml_backend_cpu_buffer_type();
        if (p.weights_buffer && (plain || p.weights[0]->extra)) {  // without `extra` it has no repacked form
            p.repacked = !plain;
            return;
        }
        if (p.weights_buffer) ggml_backend_buffer_free(p.weights_buffer);
        ggml_free(p.weights_context);
        p.weights_buffer = nullptr;
        p.weights_context = nullptr;
    }
    throw std::runtime_error("out of memory");
}

std::unique_ptr<Product> make(ggml_type type, int64_t out, int64_t in, int64_t batch, double bytes) {
    if (in % ggml_blck_size(type)) throw std::runtime_error("the width is no multiple of its block");
    auto p = std::make_unique<Product>();
    const size_t size = ggml_row_size(type, in) * out;
    const size_t copies = std::max<size_t>(1, static_cast<size_t>((bytes + size - 1) / size));
    allocate(*p, type, out, in, copies);
    std::mt19937 random(1);
    const std::vector<char> values = random_weight(type, out, in, random);
    for (ggml_tensor* w : p->weights) ggml_backend_tensor_set(w, values.data(), 0, size);
    const size_t graph = ggml_graph_overhead_custom(8, false) + ggml_tensor_overhead();
    p->context = ggml_init({graph * copies + ggml_tensor_overhead() * 8, nullptr, true});
    ggml_tensor* x = ggml_new_tensor_2d(p->context, GGML_TYPE_F32, in, batch);
    for (ggml_tensor* w : p->weights) {
        p->graphs.push_back(ggml_new_graph_custom(p->context, 8, false));
        ggml_build_forward_expand(p->graphs.back(), ggml_mul_mat(p->context, w, x));
    }
    p->buffer = ggml_backend_alloc_ctx_tensors(p->context, p->backend);
    if (!p->buffer) throw std::runtime_error("out of memory");
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<float> inputs(in * batch);
    for (float& v : inputs) v = normal(random);
    ggml_backend_tensor_set(x, inputs.data(), 0, inputs.size() * sizeof(float));
    return p;
}

double run(Product& p, int64_t calls, int threads) {
    ggml_backend_cpu_set_n_threads(p.backend, threads);
    const auto began = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; i++, p.next = (p.next + 1) % p.graphs.size())
        if (ggml_backend_graph_compute(p.backend, p.graphs[p.next]) != GGML_STATUS_SUCCESS)
            throw std::runtime_error("ggml failed");
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

std::string answer(const std::string& line, std::map<std::string, std::unique_ptr<Product>>& products) {
    std::istringstream words(line);
    std::ostringstream said;
    std::string verb, id, type;
    words >> verb >> id;
    if (verb == "make") {
        int64_t out = 0, in = 0, batch = 0;
        double bytes = 0;
        if (!(words >> type >> out >> in >> batch >> bytes)) throw std::runtime_error("bad line: " + line);
        const ggml_type kind = type_called(type);
        Product& p = *(products[id] = make(kind, out, in, batch, bytes));
        said << "ok " << 8.0 * ggml_row_size(kind, in) / in << ' ' << p.graphs.size() << ' '
             << (p.repacked ? "repacked" : "plain");
    } else if (verb == "run") {
        int64_t calls = 0;
        int threads = 0;
        if (!(words >> calls >> threads) || !products.count(id)) throw std::runtime_error("bad line: " + line);
        said.precision(9);
        said << "ok " << run(*products[id], calls, threads);
    } else if (verb == "drop") {
        products.erase(id);
        said << "ok 0";
    } else {
        throw std::runtime_error("bad line: " + line);
    }
    return said.str();
}

}  // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    std::map<std::string, std::unique_ptr<Product>> products;
    for (std::string line; std::getline(std::cin, line);) {
        try {
            std::cout << answer(line, products) << std::endl;
        } catch (const std::exception& error) {
            std::cout << "no " << error.what() << std::endl;
        }
    }
}
