// Depthwise convolution of (N, H, W, C): forward, and one kernel for the gradients of input and weight.
//
// A block owns a slab of channels and walks down strips of images, one vertical stride of rows a step. Rows stand in a
// ring in shared memory, into which asynchronous copies run `stages` - 1 steps ahead, also from one strip to the next.
// A thread owns a few neighbouring channels and columns, with their weights and open sums in registers: it reads an
// element of its columns from the ring once, normalises and activates it once, and adds it to all sums that it meets.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "kernels.h"
#include "types.cuh"

namespace effnet::cuda {

// What a compile-time kernel and stride mean. `open`: output rows that are begun and not finished at a step, of input
// rows; a step's rows meet the output gradients of `open` rows, `reach` of them before its own.
template <int kernel_, int stride_>
struct Window {
    static constexpr int kernel = kernel_, stride = stride_, taps = kernel * kernel;
    static constexpr int open = (kernel - 1 + stride) / stride, reach = open - 1;
};

// How a problem is cut. A strip of an image is `strip_rows` steps high and `groups` * columns of a thread wide; an item
// is a strip of an image, and each of `walkers` blocks a slab takes every walkers-th.
struct DepthwiseTile {
    int slab, slabs;  // channels a block, and how many
    int vectors;      // threads side by side that share a slab
    int pitch;        // elements from one pixel to the next in shared memory
    int groups;       // of columns, one a thread
    int tiles;        // strips side by side
    int strip_rows, strips;
    int items, walkers;
    bool chunks;    // 16 bytes are copied at a time
    bool together;  // a thread's channels are loaded and stored at once
};

struct DepthwiseSizes {
    int channels, height, width, out_height, out_width, top, left;
};

// A strip: its image and the first output row (backward: step) and column.
struct Strip {
    int64_t image;
    int part, row, rows, column;

    __device__ inline Strip(int item, const DepthwiseTile& tile, int columns, int all_rows) {
        const int parts = tile.strips * tile.tiles;
        image = item / parts;
        part = item % parts;
        row = part / tile.tiles * tile.strip_rows;
        rows = min(tile.strip_rows, all_rows - row);
        column = part % tile.tiles * tile.groups * columns;
    }
};

// Which part of its block's work a thread has.
struct Lane {
    int vector, group, channel, count;  // channel: within the tensor; count: how many of its channels exist
    bool works;

    __device__ inline Lane(const DepthwiseTile& tile, int slab, int channels, int width) {
        vector = threadIdx.x % tile.vectors;
        group = threadIdx.x / tile.vectors;
        channel = slab * tile.slab + vector * width;
        const int end = min(channels, (slab + 1) * tile.slab);
        works = group < tile.groups && channel < end;
        count = works ? min(width, end - channel) : 0;
    }
};

// Copies `pixels` neighbouring pixels of a row into the ring, zeros where they lie outside the image.
template <class T, int width>
__device__ inline void copy_row(T* to, const T* image, int row, int column, int pixels, const DepthwiseTile& tile,
                                int first_channel, int channels, int image_height, int image_width) {
    const bool row_inside = row >= 0 && row < image_height;
    if (tile.chunks) {
        constexpr int each = 16 / sizeof(T);
        const int across = tile.pitch / each, step = blockDim.x / across;
        const int c = threadIdx.x % across * each;
        const bool channel_inside = row_inside && first_channel + c < channels;
        if (static_cast<int>(threadIdx.x) >= across * step) return;
        for (int p = threadIdx.x / across; p < pixels; p += step) {
            const int x = column + p;
            const bool inside = channel_inside && x >= 0 && x < image_width;
            const T* from = inside ? image + (row * image_width + x) * channels + first_channel + c : image;
            copy_async_16(to + p * tile.pitch + c, from, inside);
        }
        return;
    }
    const int step = blockDim.x / tile.vectors, c = threadIdx.x % tile.vectors * width;
    if (static_cast<int>(threadIdx.x) >= tile.vectors * step) return;
    for (int p = threadIdx.x / tile.vectors; p < pixels; p += step) {
        const int x = column + p;
        const bool inside = row_inside && x >= 0 && x < image_width;
#pragma unroll
        for (int v = 0; v < width; ++v) {
            const bool exists = inside && c + v < tile.slab && first_channel + c + v < channels;
            to[p * tile.pitch + c + v] =
                exists ? image[(row * image_width + x) * channels + first_channel + c + v] : narrow<T>(0.0f);
        }
    }
}

// Which of `n` columns from `first` on the image has, as bits.
template <int n>
__device__ inline unsigned columns_inside(int first, int image_width) {
    unsigned inside = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) inside |= static_cast<unsigned>(first + i >= 0 && first + i < image_width) << i;
    return inside;
}

template <int n>
inline constexpr unsigned all_columns = (1u << n) - 1;

// `pixels` neighbours of a row in the ring.
template <int pixels, class T, int n>
__device__ inline void load_pixels(const T* row, int pitch, float (&to)[n]) {
    constexpr int width = n / pixels;
#pragma unroll
    for (int i = 0; i < pixels; ++i) {
        float pixel[width];
        load(row + i * pitch, pixel);
#pragma unroll
        for (int v = 0; v < width; ++v) to[i * width + v] = pixel[v];
    }
}

template <int taps, int width>
__device__ inline void load_weights(const float* from, const Lane& lane, float (&to)[taps][width]) {
#pragma unroll
    for (int v = 0; v < width; ++v)
#pragma unroll
        for (int tap = 0; tap < taps; ++tap)
            to[tap][v] = v < lane.count ? __ldg(from + (lane.channel + v) * taps + tap) : 0.0f;
}

// One row of a (rows, C) tensor of values a channel, or a default where there is no such tensor.
template <int n>
__device__ inline void load_vector(const float* from, float otherwise, const Lane& lane, float (&to)[n]) {
#pragma unroll
    for (int v = 0; v < n; ++v) to[v] = from != nullptr && v < lane.count ? __ldg(from + lane.channel + v) : otherwise;
}

// The rows of a (3, C) normalisation, or those that change nothing.
template <int n>
struct Norm {
    float mean[n], scale[n], shift[n];

    __device__ inline Norm(const float* from, int channels, const Lane& lane) {
        load_vector(from, 0.0f, lane, mean);
        load_vector(from == nullptr ? from : from + channels, 1.0f, lane, scale);
        load_vector(from == nullptr ? from : from + 2 * channels, 0.0f, lane, shift);
    }

    // Subtracted first: mean * scale + shift would cancel where the mean is much larger than the deviation.
    __device__ inline float operator()(float x, int i) const { return fmaf(x - mean[i], scale[i], shift[i]); }
};

// What the steps of all strips that a block walks are copied by: runs ahead of the computation.
struct Cursor {
    int item, step, slot;

    // To the next step, `steps` of which an item has, and the next of `slots` places in the ring.
    __device__ inline void advance(int steps, int walkers, int slots) {
        slot = slot + 1 == slots ? 0 : slot + 1;
        if (++step < steps) return;
        step = 0;
        item += walkers;
    }
};

// The kinds of a kernel that are worth code of their own; `any` decides by its arguments.
enum class ForwardKind : int {
    inference,  // no prologue; bias, SiLU and perhaps a pool
    training,   // normalisation and SiLU in front; perhaps statistics
    any
};

template <class T>
struct ForwardArguments {
    DepthwiseSizes size;
    DepthwiseTile tile;
    const T* x;
    const float *weight, *bias, *norm, *gate, *out_norm;
    const T* grad;
    Activation activation, out_activation;
    T* y;
    float *pool, *statistics;
};

template <class T, int kernel_, int stride_, ForwardKind kind_>
struct ForwardTraits : Window<kernel_, stride_> {
    using Base = Window<kernel_, stride_>;
    using Element = T;
    static constexpr ForwardKind kind = kind_;
    static constexpr int width = kernel_ < 7 ? 2 : 1;  // channels a thread
    static constexpr int columns = 7;                  // outputs of a row a thread: divides B0's 112, 56, 28, 14 and 7
    static constexpr int inputs = (columns - 1) * stride_ + kernel_;
    static constexpr int threads = kernel_ == 3 ? 256 : 128, blocks = kernel_ == 3 ? 2 : 3, stages = 4;

    static __host__ __device__ constexpr int row_pixels(int groups) {
        return (groups * columns - 1) * stride_ + kernel_;
    }
    static __host__ __device__ constexpr int ring_bytes(int groups, int pitch) {
        return stages * stride_ * row_pixels(groups) * pitch * static_cast<int>(sizeof(T));
    }
    // The sums of a strip, 3 values a thread's channel, stand behind the ring.
    static constexpr int shared_bytes(int groups, int pitch, int slab, bool sums) {
        return ring_bytes(groups, pitch) + (sums ? 3 * groups * slab * static_cast<int>(sizeof(float)) : 0);
    }
};

// Sums of what a thread stores: plainly, and around its first value, since plain squares would cancel.
template <int width>
struct ForwardSums {
    float pool[width], total[width], squares[width], origin[width];

    __device__ inline void clear() {
#pragma unroll
        for (int v = 0; v < width; ++v) pool[v] = total[v] = squares[v] = origin[v] = 0.0f;
    }

    __device__ inline void add(float stored, int v, bool first) {
        if (first) origin[v] = stored;
        const float distance = stored - origin[v];
        total[v] += distance;
        squares[v] = fmaf(distance, distance, squares[v]);
    }
};

// Adds the threads' plain sums over the groups, and stores one a channel.
__device__ inline void store_pool(const float* sums, float* to, const DepthwiseTile& tile, int first, int channels) {
    for (int c = threadIdx.x; c < tile.slab && first + c < channels; c += blockDim.x) {
        float sum = 0.0f;
        for (int g = 0; g < tile.groups; ++g) sum += sums[g * tile.slab + c];
        to[first + c] = sum;
    }
}

// Merges sums around the threads' own first values into count, mean and squares around the mean (Chan et al., 1979).
// A first value is one of the n that are summed, so the squares around it are at most n times those around the mean: no
// more than that can cancel.
template <int columns>
__device__ inline void store_statistics(const float* sums, float* to, const DepthwiseTile& tile, int first,
                                        const DepthwiseSizes& size, const Strip& strip) {
    const int plane = tile.groups * tile.slab;
    for (int c = threadIdx.x; c < tile.slab && first + c < size.channels; c += blockDim.x) {
        const auto count = [&](int g) {
            return strip.rows * max(0, min(columns, size.out_width - strip.column - g * columns));
        };
        int number = 0;
        float middle = 0.0f;
        for (int g = 0; g < tile.groups; ++g) {
            number += count(g);
            middle = fmaf(sums[2 * plane + g * tile.slab + c], count(g), middle);
        }
        const float inverse = 1.0f / max(number, 1);
        middle *= inverse;
        // Means are compared as distances from a value among them, which has fewer digits to lose than they have.
        const auto offset = [&](int g) {
            const int i = g * tile.slab + c;
            return (sums[2 * plane + i] - middle) + sums[i] / max(count(g), 1);
        };
        float offset_mean = 0.0f;
        for (int g = 0; g < tile.groups; ++g) offset_mean = fmaf(offset(g), count(g), offset_mean);
        offset_mean *= inverse;
        float squares = 0.0f;
        for (int g = 0; g < tile.groups; ++g) {
            if (count(g) == 0) continue;
            const float total = sums[g * tile.slab + c], distance = offset(g) - offset_mean;
            squares += sums[plane + g * tile.slab + c] - total * total / count(g) + count(g) * distance * distance;
        }
        to[first + c] = number;
        to[size.channels + first + c] = middle + offset_mean;
        to[2 * size.channels + first + c] = squares;
    }
}

// What a thread keeps in registers.
template <class Traits>
struct ForwardThread {
    using T = typename Traits::Element;
    static constexpr int width = Traits::width, columns = Traits::columns, stride = Traits::stride, open = Traits::open;
    static constexpr int inputs = Traits::inputs, kernel = Traits::kernel;
    static constexpr bool fast = coarse<T>;
    static constexpr ForwardKind kind = Traits::kind;

    const ForwardArguments<T>& arguments;
    const Lane lane;
    const Norm<width> norm, out_norm;
    float weight[Traits::taps][width], bias[width], gate[width];
    float carry[open - 1][columns * width];  // sums of the output rows that are begun
    ForwardSums<width> sums;
    unsigned inside;  // which input columns the image has
    int made;         // how many output columns exist
    int64_t offset;   // of the strip's first row, in the output

    __device__ inline ForwardThread(const ForwardArguments<T>& arguments, int slab)
        : arguments(arguments),
          lane(arguments.tile, slab, arguments.size.channels, width),
          norm(kind == ForwardKind::inference ? nullptr : arguments.norm, arguments.size.channels, lane),
          out_norm(kind == ForwardKind::any ? arguments.out_norm : nullptr, arguments.size.channels, lane) {
        load_vector(kind == ForwardKind::training ? nullptr : arguments.bias, 0.0f, lane, bias);
        load_weights<Traits::taps>(arguments.weight, lane, weight);
    }

    __device__ inline void begin(const Strip& strip) {
        const DepthwiseSizes& size = arguments.size;
        const int column = strip.column + lane.group * columns, left = column * stride - size.left;
        made = lane.works ? max(0, min(columns, size.out_width - column)) : 0;
        inside = columns_inside<inputs>(left, size.width);
        offset = ((strip.image * size.out_height + strip.row) * size.out_width + column) * size.channels + lane.channel;
        if (kind == ForwardKind::any && arguments.gate != nullptr)
            load_vector(arguments.gate + strip.image * size.channels, 1.0f, lane, gate);
#pragma unroll
        for (int age = 0; age < open - 1; ++age)
#pragma unroll
            for (int i = 0; i < columns * width; ++i) carry[age][i] = 0.0f;
        sums.clear();
    }

    // The pixels of a row in the ring, behind the prologue.
    __device__ inline void read(const T* row, float (&u)[inputs * width]) const {
        load_pixels<inputs>(row, arguments.tile.pitch, u);
        if (kind == ForwardKind::inference) return;
        const bool normalised = kind == ForwardKind::training || arguments.norm != nullptr;
        if (normalised) {
#pragma unroll
            for (int i = 0; i < inputs * width; ++i) u[i] = norm(u[i], i % width);
        }
        activate<fast>(u, kind == ForwardKind::training ? Activation::silu : arguments.activation);
        if (kind == ForwardKind::any && arguments.gate != nullptr) {
#pragma unroll
            for (int i = 0; i < inputs * width; ++i) u[i] *= gate[i % width];
        }
        // Padding is zero behind the normalisation, not in front of it.
        if (normalised && inside != all_columns<inputs>) {
#pragma unroll
            for (int i = 0; i < inputs * width; ++i) u[i] = inside >> (i / width) & 1 ? u[i] : 0.0f;
        }
    }

    // Adds what row j of a step contributes to the open rows.
    template <int j>
    __device__ inline void add(const float (&u)[inputs * width], float (&open_rows)[open][columns * width]) const {
#pragma unroll
        for (int i = 0; i < inputs; ++i)
#pragma unroll
            for (int age = open - 1; age >= 0; --age)
#pragma unroll
                for (int column = 0; column < columns; ++column) {
                    const int kh = age * stride + j, kw = i - column * stride;
                    if (kh >= kernel || kw < 0 || kw >= kernel) continue;
#pragma unroll
                    for (int v = 0; v < width; ++v) {
                        float& sum = open_rows[age][column * width + v];
                        sum = fmaf(u[i * width + v], weight[kh * kernel + kw][v], sum);
                    }
                }
    }

    // A finished output row behind the epilogue.
    __device__ inline void finish(float (&y)[columns * width], int row) const {
        if (kind != ForwardKind::training) {
#pragma unroll
            for (int i = 0; i < columns * width; ++i) y[i] += bias[i % width];
        }
        if (kind == ForwardKind::inference) activate<fast>(y, Activation::silu);
        if (kind != ForwardKind::any) return;
        if (arguments.out_norm != nullptr) {
#pragma unroll
            for (int i = 0; i < columns * width; ++i) y[i] = out_norm(y[i], i % width);
        }
        if (arguments.grad == nullptr) {
            activate<fast>(y, arguments.out_activation);
            return;
        }
        float derivative[columns * width];
        differentiate<fast>(y, derivative, arguments.out_activation);
#pragma unroll
        for (int column = 0; column < columns; ++column) {
            if (column >= made) continue;
            float grad[width];
            load_some(arguments.grad + at(row, column), grad, lane.count, arguments.tile.together);
#pragma unroll
            for (int v = 0; v < width; ++v) y[column * width + v] = grad[v] * derivative[column * width + v];
        }
    }

    __device__ inline int64_t at(int row, int column) const {
        return offset + (row * arguments.size.out_width + column) * arguments.size.channels;
    }

    __device__ inline void put(const float (&y)[columns * width], int row) {
#pragma unroll
        for (int column = 0; column < columns; ++column) {
            if (column >= made) continue;
            float stored[width];
#pragma unroll
            for (int v = 0; v < width; ++v) stored[v] = y[column * width + v];
            store_some(arguments.y + at(row, column), stored, lane.count, arguments.tile.together);
            if (kind != ForwardKind::training && arguments.pool != nullptr) {
#pragma unroll
                for (int v = 0; v < width; ++v) sums.pool[v] += stored[v];
            }
            if (kind != ForwardKind::inference && arguments.statistics != nullptr) {
                // Of the values as stored, since those are what the normalisation will see.
#pragma unroll
                for (int v = 0; v < width; ++v) sums.add(widen(narrow<T>(stored[v])), v, row == 0 && column == 0);
            }
        }
    }

    // A step: `rows` are its rows in the ring, `h` the number of the first in the image, `row` that of the output row
    // in the strip which it completes, negative while there is none.
    __device__ inline void step(const T* rows, int row_elements, int h, int row) {
        float open_rows[open][columns * width];
#pragma unroll
        for (int i = 0; i < columns * width; ++i) open_rows[0][i] = 0.0f;
#pragma unroll
        for (int age = 1; age < open; ++age)
#pragma unroll
            for (int i = 0; i < columns * width; ++i) open_rows[age][i] = carry[age - 1][i];
        float u[inputs * width];
        if (h >= 0 && h < arguments.size.height) {
            read(rows, u);
            add<0>(u, open_rows);
        }
        if (stride == 2 && h + 1 >= 0 && h + 1 < arguments.size.height) {
            read(rows + row_elements, u);
            add<1>(u, open_rows);
        }
#pragma unroll
        for (int age = 0; age < open - 1; ++age)
#pragma unroll
            for (int i = 0; i < columns * width; ++i) carry[age][i] = open_rows[age][i];
        if (row < 0) return;
        finish(open_rows[open - 1], row);
        put(open_rows[open - 1], row);
    }

    // Leaves the strip's sums of pool or statistics in shared memory, [3][groups][slab].
    __device__ inline void leave(const float (&values)[width], float* shared, int which) const {
        const DepthwiseTile& tile = arguments.tile;
#pragma unroll
        for (int v = 0; v < width; ++v)
            if (v < lane.count)
                shared[(which * tile.groups + lane.group) * tile.slab + lane.vector * width + v] = values[v];
    }
};

// y = epilogue(conv(prologue(x))). gridDim.x = slabs * walkers.
template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void depthwise_forward_kernel(
    const ForwardArguments<typename Traits::Element> arguments) {
    using T = typename Traits::Element;
    constexpr int stride = Traits::stride, before = Traits::open - 1, stages = Traits::stages;
    const DepthwiseSizes& size = arguments.size;
    const DepthwiseTile& tile = arguments.tile;
    // Blocks that run side by side share pixels, and so the cache lines that two slabs have in common.
    const int slab = blockIdx.x % tile.slabs, walker = blockIdx.x / tile.slabs, first_channel = slab * tile.slab;
    ForwardThread<Traits> thread(arguments, slab);
    const Lane& lane = thread.lane;

    const int row_pixels = Traits::row_pixels(tile.groups), row_elements = row_pixels * tile.pitch;
    T* const ring = shared_memory<T>();
    float* const sums =
        reinterpret_cast<float*>(shared_memory<unsigned char>() + Traits::ring_bytes(tile.groups, tile.pitch));
    const T* const mine = ring + lane.group * Traits::columns * stride * tile.pitch + lane.vector * Traits::width;
    const auto copy = [&](const Cursor& cursor) {
        if (cursor.item < tile.items) {
            const Strip strip(cursor.item, tile, Traits::columns, size.out_height);
            const T* image = arguments.x + strip.image * size.height * size.width * size.channels;
            const int h = (strip.row + cursor.step) * stride - size.top, w = strip.column * stride - size.left;
            for (int j = 0; j < stride; ++j)
                copy_row<T, Traits::width>(ring + (cursor.slot * stride + j) * row_elements, image, h + j, w,
                                           row_pixels, tile, first_channel, size.channels, size.height, size.width);
        }
        copy_async_commit();
    };
    const int steps = tile.strip_rows + before;
    Cursor ahead{walker, 0, 0};
    for (int i = 0; i < stages - 1; ++i) {
        copy(ahead);
        ahead.advance(steps, tile.walkers, stages);
    }
    int slot = 0;
    for (int item = walker; item < tile.items; item += tile.walkers) {
        const Strip strip(item, tile, Traits::columns, size.out_height);
        thread.begin(strip);
        for (int step = 0; step < steps; ++step) {
            copy_async_wait<stages - 2>();
            // Everybody's copies of this step are there, and the slot that is filled next has been read by all.
            __syncthreads();
            copy(ahead);
            ahead.advance(steps, tile.walkers, stages);
            if (thread.made > 0 && step - before < strip.rows)
                thread.step(mine + slot * stride * row_elements, row_elements, (strip.row + step) * stride - size.top,
                            step - before);
            slot = slot + 1 == stages ? 0 : slot + 1;
        }
        const int64_t part = strip.image * tile.strips * tile.tiles + strip.part;
        if (arguments.pool != nullptr) {
            thread.leave(thread.sums.pool, sums, 0);
            __syncthreads();
            store_pool(sums, arguments.pool + part * size.channels, tile, first_channel, size.channels);
            __syncthreads();
        }
        if (arguments.statistics != nullptr) {
            thread.leave(thread.sums.total, sums, 0);
            thread.leave(thread.sums.squares, sums, 1);
            thread.leave(thread.sums.origin, sums, 2);
            __syncthreads();
            store_statistics<Traits::columns>(sums, arguments.statistics + part * 3 * size.channels, tile,
                                              first_channel, size, strip);
            __syncthreads();
        }
    }
}

}  // namespace effnet::cuda
