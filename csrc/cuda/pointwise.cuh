// A 1x1 convolution of gated rows, with normalisation, drop path and residual behind it: the second half of a block in
// inference.
//
// A block of threads makes 32 rows by 32 columns with each warp, or, where there are too few of these to fill the GPU,
// one such square with eight warps that share its depth and add up at the end. Operands pass through registers, where x
// is gated and the weight rounded, into one of two buffers, while the other is multiplied.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "kernels.h"
#include "product.cuh"
#include "types.cuh"

namespace effnet::cuda {

// Warps down, across, and along the depth.
template <class T, int down_, int across_, int along_>
struct ProjectTraits {
    using Element = T;
    static constexpr int down = down_, across = across_, along = along_;
    static constexpr int warps = down * across * along, threads = 32 * warps;
    // The loads of long rows need more registers than two blocks leave each other.
    static constexpr int blocks = sizeof(T) == 2 && along == 1 ? 2 : 1;
    static constexpr int rows = down * tile_side, columns = across * tile_side;
    static constexpr int depth = (along == 1 && down < 8 ? 128 : 64) / int(sizeof(T));  // of a warp
    static constexpr int whole_depth = depth * along, pitch = whole_depth + chunk<T>;
    static constexpr int chunks = whole_depth / chunk<T>;
    static constexpr int row_loads = rows * chunks / threads;
    static constexpr int column_loads = (columns * chunks + threads - 1) / threads;
    static constexpr int buffer = (rows + columns) * pitch;
    static constexpr int shared_bytes = 2 * buffer * int(sizeof(T));
    static_assert(warps == 8 && (along == 1 || (along == warps && warps * 32 * 32 * 4 <= shared_bytes)));
};

template <class T>
struct ProjectArguments {
    int pixels, channels, out_channels, rows, across;  // rows: pixels of all images; across: blocks beside each other
    const T* x;
    const float* gates;
    ProductWeight weight;
    ConstantNorm norm;
    const float* image_scale;
    const T* residual;
    T* y;
};

template <class Traits>
struct ProjectBlock {
    using T = typename Traits::Element;
    using Chunk = Pack<T, chunk<T>>;
    static constexpr int turns = Traits::threads / Traits::chunks;  // rows between two loads of a thread

    const ProjectArguments<T>& arguments;
    int row, column;  // the first of the block
    int place, k;     // of the thread's loads: row of the tile, and depth
    bool together;
    Chunk of_x[Traits::row_loads], of_weight[Traits::column_loads];

    __device__ inline ProjectBlock(const ProjectArguments<T>& all, unsigned item)
        : arguments(all),
          row(int(item / all.across) * Traits::rows),
          column(int(item % all.across) * Traits::columns),
          place(threadIdx.x / Traits::chunks),
          k(threadIdx.x % Traits::chunks * chunk<T>),
          together(all.channels % chunk<T> == 0) {}

    // Whether this thread's load of the weight is one: there may be more threads than loads.
    __device__ inline bool loads_column(int i) const {
        return Traits::columns * Traits::chunks % Traits::threads == 0 || place + i * turns < Traits::columns;
    }

    // Reads the operands from this depth on into registers.
    __device__ inline void bring(int depth) {
        const int channels = arguments.channels, here = channels - depth - k;
#pragma unroll
        for (int i = 0; i < Traits::row_loads; ++i) {
            const int r = row + place + i * turns;
            const int count = r < arguments.rows ? here : 0;
            of_x[i] = fetch(arguments.x + (count > 0 ? int64_t(r) * channels + depth + k : 0), count, together);
        }
#pragma unroll
        for (int i = 0; i < Traits::column_loads; ++i) {
            const int c = column + place + i * turns;
            const int count = c < arguments.out_channels && loads_column(i) ? here : 0;
            of_weight[i] =
                fetch_weight<T>(arguments.weight, count > 0 ? int64_t(c) * channels + depth + k : 0, count, together);
        }
    }

    // Puts them into a buffer, x through its gates.
    __device__ inline void put(T* buffer, int depth) const {
        const int here = arguments.channels - depth - k;
#pragma unroll
        for (int i = 0; i < Traits::row_loads; ++i) {
            const int r = place + i * turns;
            Chunk gated = of_x[i];
            if (arguments.gates != nullptr && row + r < arguments.rows && here > 0) {
                const int64_t image = unsigned(row + r) / unsigned(arguments.pixels);
                gate(gated, arguments.gates + image * arguments.channels + depth + k, here);
            }
            *reinterpret_cast<Chunk*>(buffer + r * Traits::pitch + k) = gated;
        }
        T* const weight = buffer + Traits::rows * Traits::pitch;
#pragma unroll
        for (int i = 0; i < Traits::column_loads; ++i) {
            const int c = place + i * turns, at = c / tile_side * tile_side + place_of(c % tile_side);
            if (!loads_column(i)) continue;
            *reinterpret_cast<Chunk*>(weight + at * Traits::pitch + k) = of_weight[i];
        }
    }

    __device__ inline void gate(Chunk& x, const float* gates, int count) const {
        float value[chunk<T>];
        widen_pack(x, value);
#pragma unroll
        for (int i = 0; i < chunk<T>; i += 4) {
            float by[4];
            load_some(gates + i, by, count - i, together);
#pragma unroll
            for (int j = 0; j < 4; ++j) value[i + j] *= by[j];
        }
        store(x.value, value);
    }

    // The normalisation of the eight channels from c on.
    __device__ inline void norms(int c, Affine (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            to[i] = c + i < arguments.out_channels ? affine_of(arguments.norm, c + i) : Affine{};
    }

    // One row of a square: eight neighbouring results.
    __device__ inline void finish(float (&value)[8], int r, int c, const Affine (&norm)[8]) const {
        const int channels = arguments.out_channels, count = channels - c;
        if (r >= arguments.rows || count <= 0) return;
        const bool at_once = channels % 8 == 0;
        const int64_t at = int64_t(r) * channels + c;
        float scale = 1.0f;
        if (arguments.image_scale != nullptr)
            scale = __ldg(arguments.image_scale + unsigned(r) / unsigned(arguments.pixels));
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = norm[i](value[i]) * scale;
#pragma unroll
        for (int part = 0; part < 8; part += chunk<T>) {
            float some[chunk<T>];
#pragma unroll
            for (int i = 0; i < chunk<T>; ++i) some[i] = value[part + i];
            if (arguments.residual != nullptr) {
                float more[chunk<T>];
                load_some(arguments.residual + at + part, more, count - part, at_once);
#pragma unroll
                for (int i = 0; i < chunk<T>; ++i) some[i] += more[i];
            }
            store_some(arguments.y + at + part, some, count - part, at_once);
        }
    }
};

// Adds up the sums of all warps, which have the same rows and columns; the first four finish a quarter each.
template <class Traits>
__device__ inline void finish_together(const ProjectBlock<Traits>& block, const Sums& sums, float* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 32; ++i) shared[(warp * 32 + i) * 32 + lane] = sums.value[i / 16][i / 4 % 4][i % 4];
    __syncthreads();
    if (warp >= 4) return;
    const int m = warp / 2, h = warp % 2, c = block.column + Sums::channel();
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value[i] = 0.0f;
        for (int w = 0; w < Traits::warps; ++w)
            value[i] += shared[(w * 32 + m * 16 + i / 2 * 4 + h * 2 + i % 2) * 32 + lane];
    }
    Affine norm[8];
    block.norms(c, norm);
    block.finish(value, block.row + Sums::row_of(m, h), c, norm);
}

template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void gated_project_kernel(
    const ProjectArguments<typename Traits::Element> arguments) {
    using T = typename Traits::Element;
    T* const shared = shared_memory<T>();
    ProjectBlock<Traits> block(arguments, blockIdx.x);
    const int warp = threadIdx.x / 32, channels = arguments.channels;
    const int down = warp / (Traits::across * Traits::along) * tile_side;
    const int across = warp / Traits::along % Traits::across * tile_side, along = warp % Traits::along * Traits::depth;
    Sums sums{};
    block.bring(0);
    block.put(shared, 0);
    __syncthreads();
    for (int depth = 0, turn = 0; depth < channels; depth += Traits::whole_depth, ++turn) {
        const int next = depth + Traits::whole_depth;
        if (next < channels) block.bring(next);
        const T* const buffer = shared + turn % 2 * Traits::buffer;
        if (depth + along < channels)
            multiply(sums, buffer + down * Traits::pitch + along, tile_side,
                     buffer + (Traits::rows + across) * Traits::pitch + along, Traits::pitch, Traits::depth);
        if (next < channels) block.put(shared + (turn + 1) % 2 * Traits::buffer, next);
        __syncthreads();
    }
    if constexpr (Traits::along == 1) {
        const int c = block.column + across + Sums::channel();
        Affine norm[8];
        block.norms(c, norm);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float value[8];
                sums.row(m, h, value);
                block.finish(value, block.row + down + Sums::row_of(m, h), c, norm);
            }
    } else {
        finish_together(block, sums, shared_memory<float>());
    }
}

}  // namespace effnet::cuda
