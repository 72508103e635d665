// The second stage of sums over pixels: partial sums are added in a fixed order, so every run has the same result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <launch.cuh>

namespace effnet::cuda {

// out = sum over the walkers of partials (walkers, rows, C), transposed to (C, taps) and (C).
// A block adds up 32 neighbouring channels of a row, its warps every eighth walker.
inline constexpr int sum_partials_warps = 8;

__global__ __launch_bounds__(32 * sum_partials_warps) void sum_partials_kernel(const float* partials, int walkers,
                                                                               int rows, int channels, float* dw,
                                                                               int taps, float* db) {
    float* const sums = shared_memory<float>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (channels + 31) / 32;
    const int row = blockIdx.x / blocks, c = blockIdx.x % blocks * 32 + lane;
    float sum = 0.0f;
    if (c < channels)
        for (int64_t i = warp; i < walkers; i += sum_partials_warps) sum += partials[(i * rows + row) * channels + c];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || c >= channels) return;
    for (int i = 1; i < sum_partials_warps; ++i) sum += sums[i * 32 + lane];
    if (dw != nullptr && row < taps)
        dw[int64_t(c) * taps + row] = sum;
    else
        db[c] = sum;
}

}  // namespace effnet::cuda
