// What the host sides share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"

namespace effnet::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// f(T()) for the type that a dtype stands for.
template <class F>
auto with_type(DType dtype, const F& f) {
    switch (dtype) {
        case DType::bf16:
            return f(__nv_bfloat16());
        case DType::f16:
            return f(__half());
        default:
            return f(float());
    }
}

// How a kernel divides a problem, and with how many threads and how much shared memory a block. Without threads where
// it cannot.
template <class Tile_>
struct Cut {
    using Tile = Tile_;
    Tile tile;
    int64_t blocks;
    int threads, shared_bytes;
};

// plan() and run() of an operation for one dtype and layout, by what its Kernels say: see planning.h.
template <class Kernels, class Problem>
Plan plan_of(const Problem& problem, const Device& device);
template <class Kernels, class Problem>
cudaError_t run_of(const Problem& problem, const Plan& plan, const Device& device);

// Zeros for an optional output.
inline cudaError_t clear(float* values, int64_t count, const Device& device) {
    return values == nullptr ? cudaSuccess : cudaMemsetAsync(values, 0, sizeof(float) * count, device.stream);
}

}  // namespace effnet::cuda
