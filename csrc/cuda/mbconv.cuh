// The first half of a block in inference: the expansion as a product into a tile in shared memory, which the depthwise
// convolution reads there. The expanded tensor is never in memory.
//
// A block of threads has a tile of one image's outputs, and the pixels of x under them in shared memory, whole. It goes
// through slabs of channels: product, normalisation and activation, into the tile of u1; convolution, normalisation and
// activation, to memory; sums over the tile for the pool. Weights of the next slab arrive during the convolution.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "kernels.h"
#include "product.cuh"
#include "types.cuh"

namespace effnet::cuda {

template <class T, int kernel_, int stride_>
struct ExpandDepthwiseTraits {
    using Element = T;
    static constexpr int kernel = kernel_, stride = stride_, taps = kernel * kernel;
    static constexpr int threads = 256, warps = threads / 32;
    // Tiles in float are too large for two blocks, mostly.
    static constexpr int blocks = sizeof(T) == 2 ? 2 : 1;
    static constexpr int side = 4;  // of the patch of outputs that a thread makes of two channels
    static constexpr int reach = (side - 1) * stride + kernel;
    static constexpr int rows_of_vectors = taps + 6;
};

// How a problem is divided. Lengths are in elements, places of shared memory in bytes from its beginning, where the
// pixels of x lie.
struct ExpandTile {
    int rows, columns;          // of outputs: multiples of a patch's side
    int down, across;           // tiles of an image
    int in_rows, in_columns;    // pixels of u1 under a tile
    int slab, slabs, groups;    // channels at a time, how many of these, and blocks that share them
    int depth, pitch, u_pitch;  // of x and the weight; a row of either; a pixel of u1
    int weight, u, vectors, pool;
};

template <class T>
struct ExpandArguments {
    int channels, in_channels, height, width, out_height, out_width, pad_top, pad_left;
    ExpandTile tile;
    Activation activation;
    const T* x;
    ProductWeight expand_weight;
    ConstantNorm expand_norm;
    const float* depthwise_weight;
    ConstantNorm depthwise_norm;
    T* y;
    float* pool;
};

// The pixels of a tile: `top` and `left` may lie outside the image, [row, row_end) x [column, column_end) are inside.
struct ExpandWindow {
    int top, left, row, row_end, column, column_end;

    __device__ inline int width() const { return column_end - column; }
    __device__ inline int pixels() const { return max(row_end - row, 0) * max(width(), 0); }
};

template <class Traits>
struct ExpandBlock {
    using T = typename Traits::Element;
    const ExpandArguments<T>& arguments;
    const ExpandTile& tile;
    T *x, *weight, *u;
    float *vectors, *pool;
    int64_t image;
    int part, tile_row, tile_column;
    ExpandWindow in;

    __device__ inline ExpandBlock(const ExpandArguments<T>& all, unsigned char* shared, unsigned item)
        : arguments(all),
          tile(all.tile),
          x(reinterpret_cast<T*>(shared)),
          weight(reinterpret_cast<T*>(shared + tile.weight)),
          u(reinterpret_cast<T*>(shared + tile.u)),
          vectors(reinterpret_cast<float*>(shared + tile.vectors)),
          pool(reinterpret_cast<float*>(shared + tile.pool)) {
        const int parts = tile.down * tile.across;
        image = item / parts;
        part = int(item % parts);
        tile_row = part / tile.across * tile.rows;
        tile_column = part % tile.across * tile.columns;
        in.top = tile_row * Traits::stride - all.pad_top;
        in.left = tile_column * Traits::stride - all.pad_left;
        in.row = max(in.top, 0), in.row_end = min(in.top + tile.in_rows, all.height);
        in.column = max(in.left, 0), in.column_end = min(in.left + tile.in_columns, all.width);
    }

    // Starts to bring the pixels of x, zeros behind their last channel.
    __device__ inline void bring_x() const {
        const int chunks = tile.depth / chunk<T>, count = in.pixels() * chunks, channels = arguments.in_channels;
        const bool together = channels % chunk<T> == 0;
        const T* const from = arguments.x + image * arguments.height * arguments.width * channels;
        for (int i = threadIdx.x; i < count; i += Traits::threads) {
            const int pixel = i / chunks, c = i % chunks * chunk<T>;
            const int row = in.row + pixel / in.width(), column = in.column + pixel % in.width();
            const int here = min(max(channels - c, 0), chunk<T>);
            const T* const at = from + (row * arguments.width + column) * channels + (here == 0 ? 0 : c);
            T* const to = x + pixel * tile.pitch + c;
            if (together)
                copy_async_16(to, at, here > 0);
            else
                *reinterpret_cast<Pack<T, chunk<T>>*>(to) = fetch(at, here, false);
        }
    }

    // Starts to bring the weight of the channels of a slab, zeros for those that there are not.
    __device__ inline void bring_weight(int first) const {
        const int chunks = tile.depth / chunk<T>, count = tile.slab * chunks, channels = arguments.in_channels;
        const bool together = channels % chunk<T> == 0;
        const ProductWeight& from = arguments.expand_weight;
        for (int i = threadIdx.x; i < count; i += Traits::threads) {
            const int row = i / chunks, k = i % chunks * chunk<T>, c = first + row;
            const int here = c < arguments.channels ? min(max(channels - k, 0), chunk<T>) : 0;
            const int64_t at = here == 0 ? 0 : int64_t(c) * channels + k;
            T* const to = weight + (row / tile_side * tile_side + place_of(row % tile_side)) * tile.pitch + k;
            if (together && !from.wide)
                copy_async_16(to, static_cast<const T*>(from.data) + at, here > 0);
            else
                *reinterpret_cast<Pack<T, chunk<T>>*>(to) = fetch_weight<T>(from, at, here, together);
        }
    }

    // The vectors of a slab, by rows: the taps, and both normalisations.
    __device__ inline void bring_vectors(int first, float* to) const {
        const int channels = arguments.channels;
        for (int i = threadIdx.x; i < tile.slab * Traits::taps; i += Traits::threads) {
            const int c = i / Traits::taps, tap = i % Traits::taps;
            to[tap * tile.slab + c] =
                first + c < channels ? __ldg(arguments.depthwise_weight + int64_t(first) * Traits::taps + i) : 0.0f;
        }
        for (int i = threadIdx.x; i < 2 * tile.slab; i += Traits::threads) {
            const bool second = i >= tile.slab;
            const int c = second ? i - tile.slab : i;
            Affine affine{};
            if (first + c < channels)
                affine = affine_of(second ? arguments.depthwise_norm : arguments.expand_norm, first + c);
            float* const at = to + (Traits::taps + (second ? 3 : 0)) * tile.slab + c;
            at[0] = affine.mean, at[tile.slab] = affine.scale, at[2 * tile.slab] = affine.shift;
        }
    }

    // Pixels of u1 outside the image are zeros, for all slabs.
    __device__ inline void clear_border() const {
        const int chunks = tile.slab / chunk<T>, count = tile.in_rows * tile.in_columns * chunks;
        for (int i = threadIdx.x; i < count; i += Traits::threads) {
            const int pixel = i / chunks;
            const int row = in.top + pixel / tile.in_columns, column = in.left + pixel % tile.in_columns;
            if (row >= in.row && row < in.row_end && column >= in.column && column < in.column_end) continue;
            const float zeros[chunk<T>] = {};
            store(u + pixel * tile.u_pitch + i % chunks * chunk<T>, zeros);
        }
    }

    // u1 of `count` channels, inside the image.
    __device__ inline void expand(int count, const float* norm) const {
        const int pixels = in.pixels(), across = (count + tile_side - 1) / tile_side;
        const int items = (pixels + tile_side - 1) / tile_side * across;
        for (int item = threadIdx.x / 32; item < items; item += Traits::warps) {
            const int first = item / across * tile_side, c = item % across * tile_side;
            Sums sums{};
            multiply(sums, x + first * tile.pitch, pixels - first, weight + c * tile.pitch, tile.pitch, tile.depth);
            const float* const at = norm + c + Sums::channel();
            float mean[8], scale[8], shift[8];
            load_eight(at, mean);
            load_eight(at + tile.slab, scale);
            load_eight(at + 2 * tile.slab, shift);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int pixel = first + Sums::row_of(m, h);
                    float value[8];
                    sums.row(m, h, value);
#pragma unroll
                    for (int i = 0; i < 8; ++i) value[i] = fmaf(value[i] - mean[i], scale[i], shift[i]);
                    activate<coarse<T>>(value, arguments.activation);
                    if (pixel >= pixels) continue;
                    const int row = in.row - in.top + pixel / in.width();
                    const int column = in.column - in.left + pixel % in.width();
                    store_eight(u + (row * tile.in_columns + column) * tile.u_pitch + c + Sums::channel(), value);
                }
        }
    }

    // The patch that begins at this row and column of the tile, of the two channels at `from` and on.
    __device__ inline void convolve(int row, int column, const T* from, const float (&taps)[Traits::taps][2],
                                    const Affine (&norm)[2], int c, float (&sums)[2]) const {
        constexpr int side = Traits::side, stride = Traits::stride, kernel = Traits::kernel;
        float result[side][side][2] = {};
        const T* at = from + (row * stride * tile.in_columns + column * stride) * tile.u_pitch;
#pragma unroll
        for (int i = 0; i < Traits::reach; ++i, at += tile.in_columns * tile.u_pitch) {
            float in_row[Traits::reach][2];
#pragma unroll
            for (int j = 0; j < Traits::reach; ++j) load(at + j * tile.u_pitch, in_row[j]);
#pragma unroll
            for (int r = 0; r < side; ++r) {
                const int tap_row = i - r * stride;
                if (tap_row < 0 || tap_row >= kernel) continue;
#pragma unroll
                for (int s = 0; s < side; ++s)
#pragma unroll
                    for (int j = 0; j < kernel; ++j)
#pragma unroll
                        for (int v = 0; v < 2; ++v)
                            result[r][s][v] =
                                fmaf(taps[tap_row * kernel + j][v], in_row[s * stride + j][v], result[r][s][v]);
            }
        }
        const int channels = arguments.channels;
        const bool both = channels % 2 == 0;
#pragma unroll
        for (int r = 0; r < side; ++r) {
            const int out_row = tile_row + row + r;
            float value[2 * side];
#pragma unroll
            for (int i = 0; i < 2 * side; ++i) value[i] = norm[i % 2](result[r][i / 2][i % 2]);
            activate<coarse<T>>(value, arguments.activation);
#pragma unroll
            for (int s = 0; s < side; ++s) {
                const int out_column = tile_column + column + s;
                if (out_row >= arguments.out_height || out_column >= arguments.out_width) continue;
                const float pair[2] = {value[2 * s], value[2 * s + 1]};
                const int64_t pixel = (image * arguments.out_height + out_row) * arguments.out_width + out_column;
                store_some(arguments.y + pixel * channels + c, pair, min(channels - c, 2), both);
                sums[0] += pair[0];
                sums[1] += pair[1];
            }
        }
    }

    // The results of a slab, and their sums over the tile.
    __device__ inline void convolve(int first, int count, const float* rows) const {
        const int pairs = tile.slab / 2, pair = threadIdx.x % pairs, begin = threadIdx.x / pairs;
        const int step = Traits::threads / pairs, across = tile.columns / Traits::side;
        const int patches = tile.rows / Traits::side * across;
        float sums[2] = {};
        if (2 * pair < count) {
            float taps[Traits::taps][2], norms[6][2];
#pragma unroll
            for (int i = 0; i < Traits::taps; ++i) load(rows + i * tile.slab + 2 * pair, taps[i]);
#pragma unroll
            for (int i = 0; i < 3; ++i) load(rows + (Traits::taps + 3 + i) * tile.slab + 2 * pair, norms[i]);
            const Affine norm[2] = {{norms[0][0], norms[1][0], norms[2][0]}, {norms[0][1], norms[1][1], norms[2][1]}};
            for (int patch = begin; patch < patches; patch += step)
                convolve(patch / across * Traits::side, patch % across * Traits::side, u + 2 * pair, taps, norm,
                         first + 2 * pair, sums);
        }
        if (arguments.pool == nullptr) return;
        store(pool + begin * tile.slab + 2 * pair, sums);
        __syncthreads();
        float* const to = arguments.pool + (image * tile.down * tile.across + part) * arguments.channels + first;
        for (int c = threadIdx.x; c < count; c += Traits::threads) {
            float sum = 0.0f;
            for (int i = 0; i < step; ++i) sum += pool[i * tile.slab + c];
            to[c] = sum;
        }
    }
};

template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void expand_depthwise_kernel(
    const ExpandArguments<typename Traits::Element> arguments) {
    const ExpandTile& tile = arguments.tile;
    const ExpandBlock<Traits> block(arguments, shared_memory<unsigned char>(), blockIdx.x / tile.groups);
    const int group = blockIdx.x % tile.groups;
    const auto vectors = [&](int turn) { return block.vectors + turn % 2 * Traits::rows_of_vectors * tile.slab; };
    const auto bring = [&](int slab, int turn) {
        block.bring_weight(slab * tile.slab);
        block.bring_vectors(slab * tile.slab, vectors(turn));
        copy_async_commit();
    };
    block.bring_x();
    bring(group, 0);
    block.clear_border();
    for (int slab = group, turn = 0; slab < tile.slabs; slab += tile.groups, ++turn) {
        const int first = slab * tile.slab, count = min(tile.slab, arguments.channels - first);
        copy_async_wait<0>();
        __syncthreads();
        block.expand(count, vectors(turn) + Traits::taps * tile.slab);
        __syncthreads();
        if (slab + tile.groups < tile.slabs) bring(slab + tile.groups, turn + 1);
        block.convolve(first, count, vectors(turn));
    }
}

}  // namespace effnet::cuda
