// Products of tiles in shared memory, on tensor cores or by multiply-adds, and what follows a product.
//
// A warp makes 32 rows by 32 columns. a and b are stored by rows of `pitch` elements, an odd number of 16 bytes, so
// that eight rows at the same place lie in all 32 banks. b has a row an output channel, in the order of place_of(), by
// which a lane's results are eight neighbouring channels of four rows: 16 bytes of two-byte numbers.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "kernels.h"
#include "types.cuh"

namespace effnet::cuda {

inline constexpr int tile_side = 32;

// Elements of 16 bytes.
template <class T>
inline constexpr int chunk = 16 / int(sizeof(T));

// The depth that a product takes at a time.
template <class T>
inline constexpr int depth_step = 32 / int(sizeof(T));

// Which row of b has this of 32 channels.
__device__ inline int place_of(int channel) { return 8 * (channel % 8 / 2) + 2 * (channel / 8) + channel % 2; }

// A lane's part of 32 x 32 sums: [m][n][2 h + i] belongs to row_of(m, h) and to channel 8 (lane % 4) + 2 n + i.
struct Sums {
    float value[2][4][4];

    __device__ inline static int row_of(int m, int h) { return 16 * m + 8 * h + threadIdx.x % 32 / 4; }
    __device__ inline static int channel() { return threadIdx.x % 4 * 8; }

    // The eight neighbouring channels of a row.
    __device__ inline void row(int m, int h, float (&to)[8]) const {
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) to[2 * n + i] = value[m][n][2 * h + i];
    }
};

// sums += a b^T over `depth` columns, a multiple of depth_step, of 32 rows of each; the rows of a from `rows` on repeat
// the last one.
template <class T>
__device__ inline void multiply(Sums& sums, const T* a, int rows, const T* b, int pitch, int depth) {
    const int lane = threadIdx.x % 32;
    const T *from_a[2], *from_b[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        from_a[m] = a + min(16 * m + lane % 16, rows - 1) * pitch + lane / 16 * 8;
        from_b[m] = b + (16 * m + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
    }
#pragma unroll 2
    for (int k = 0; k < depth; k += depth_step<T>) {
        uint32_t of_a[2][4], of_b[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            load_matrices(of_a[m], from_a[m] + k);
            load_matrices(of_b[m], from_b[m] + k);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint32_t words[2] = {of_b[n / 2][n % 2 * 2], of_b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_m16n8k16<T>(sums.value[m][n], of_a[m], words);
        }
    }
}

// Tensor cores would round to ten bits.
template <>
__device__ inline void multiply<float>(Sums& sums, const float* a, int rows, const float* b, int pitch, int depth) {
    const float *from_a[2][2], *from_b = b + threadIdx.x % 4 * 2 * pitch;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) from_a[m][h] = a + min(Sums::row_of(m, h), rows - 1) * pitch;
    // More turns at once would not fit into registers.
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
        float of_a[2][2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) load(from_a[m][h] + k, of_a[m][h]);
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float of_b[4];
                load(from_b + (8 * n + i) * pitch + k, of_b);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            sums.value[m][n][2 * h + i] = fmaf(of_a[m][h][j], of_b[j], sums.value[m][n][2 * h + i]);
            }
    }
}

// Eight neighbours, in 16 bytes at a time.
__device__ inline void load_eight(const float* from, float (&to)[8]) {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
        float four[4];
        load(from + half, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[half + i] = four[i];
    }
}

template <class T>
__device__ inline void store_eight(T* to, const float (&from)[8]) {
#pragma unroll
    for (int part = 0; part < 8; part += chunk<T>) {
        float some[chunk<T>];
#pragma unroll
        for (int i = 0; i < chunk<T>; ++i) some[i] = from[part + i];
        store(to + part, some);
    }
}

// Up to 16 bytes of neighbouring numbers; at once where `together`, which asks for alignment.
template <class T>
__device__ inline Pack<T, chunk<T>> fetch(const T* from, int count, bool together) {
    Pack<T, chunk<T>> pack;
    if (together && count >= chunk<T>) {
        pack = *reinterpret_cast<const Pack<T, chunk<T>>*>(from);
    } else {
#pragma unroll
        for (int i = 0; i < chunk<T>; ++i) pack.value[i] = i < count ? from[i] : narrow<T>(0.0f);
    }
    return pack;
}

// The same of a weight, from element `at` on, rounded to T where it is wide.
template <class T>
__device__ inline Pack<T, chunk<T>> fetch_weight(const ProductWeight& weight, int64_t at, int count, bool together) {
    if (!weight.wide) return fetch(static_cast<const T*>(weight.data) + at, count, together);
    const float* const from = static_cast<const float*>(weight.data) + at;
    Pack<T, chunk<T>> pack;
    if (together && count >= chunk<T>) {
#pragma unroll
        for (int i = 0; i < chunk<T>; i += 4) {
            float four[4];
            load(from + i, four);
#pragma unroll
            for (int j = 0; j < 4; ++j) pack.value[i + j] = narrow<T>(four[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < chunk<T>; ++i) pack.value[i] = narrow<T>(i < count ? from[i] : 0.0f);
    }
    return pack;
}

// n of a channel becomes (n - mean) * scale + shift.
struct Affine {
    float mean, scale, shift;

    __device__ inline float operator()(float n) const { return fmaf(n - mean, scale, shift); }
};

__device__ inline Affine affine_of(const ConstantNorm& norm, int c) {
    const float shift = norm.beta == nullptr ? 0.0f : __ldg(norm.beta + c);
    if (norm.gamma == nullptr) return {0.0f, 1.0f, shift};
    return {__ldg(norm.mean + c), __ldg(norm.gamma + c) / sqrtf(__ldg(norm.var + c) + norm.eps), shift};
}

}  // namespace effnet::cuda
