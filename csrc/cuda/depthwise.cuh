// Depthwise convolution of (N, H, W, C): forward, and one kernel for the gradients of input and weight.
//
// A block owns a slab of channels and walks down strips of images, one vertical stride of rows a step. Rows stand in a
// ring in shared memory, into which asynchronous copies run `stages` - 1 steps ahead, also from one strip to the next:
// 16 bytes at a time by all threads, or all at once by the bulk tensor copy engine.
// A thread owns a few neighbouring channels and columns, with their weights and open sums in registers: it reads an
// element of its columns from the ring once, normalises and activates it once, and adds it to all sums that it meets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
    int first_row, first_column;  // steps of which no pixel exists are left out
    bool chunks;                  // 16 bytes are copied at a time
    bool together;                // a thread's channels are loaded and stored at once
};

struct DepthwiseSizes {
    int channels, height, width, out_height, out_width, top, left;
};

// What the arguments of a kernel begin with.
struct DepthwiseWork {
    DepthwiseSizes size;
    DepthwiseTile tile;
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
        row += tile.first_row;
        column = tile.first_column + part % tile.tiles * tile.groups * columns;
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

// A tensor that threads copy from; null where there is none.
template <class T>
struct Source {
    const T* data;
    int height, width;
};

// What a thread copies into the ring: the same channels of every so-manieth pixel of a row.
template <class T, int width, bool aligned>
struct Copier {
    const DepthwiseTile& tile;
    const int channels;
    int channel, first, step, count;  // channel within the slab; count: how many of the thread's channels exist
    int slab_channel;

    __device__ inline Copier(const DepthwiseTile& tile, int slab, int channels)
        : tile(tile), channels(channels), slab_channel(slab * tile.slab) {
        const int each = chunks() ? 16 / static_cast<int>(sizeof(T)) : width, across = tile.slab / each;
        channel = threadIdx.x % across * each;
        step = blockDim.x / across;
        first = static_cast<int>(threadIdx.x) < across * step ? threadIdx.x / across : 1 << 20;
        count = min(min(each, tile.slab - channel), channels - slab_channel - channel);
    }

    __device__ inline bool chunks() const { return aligned || tile.chunks; }

    // Copies `pixels` neighbours of a row, zeros where they lie outside the image.
    __device__ inline void row(T* to, const T* image, int row, int column, int pixels, int image_height,
                               int image_width) const {
        const bool row_inside = row >= 0 && row < image_height && count > 0;
        const unsigned end = row_inside ? image_width : 0;
        const int stride = step * channels;
        const T* from = image + ((row * image_width + column + first) * channels + slab_channel + channel);
        to += first * tile.pitch + channel;
        for (int x = column + first; x < column + pixels; x += step, from += stride, to += step * tile.pitch) {
            const bool inside = static_cast<unsigned>(x) < end;
            if (chunks()) {
                copy_async_16(to, from, inside);
                continue;
            }
#pragma unroll
            for (int v = 0; v < width; ++v)
                if (v < tile.slab - channel) to[v] = inside && v < count ? from[v] : narrow<T>(0.0f);
        }
    }
};

// Rows come into the ring by copies that each thread makes and waits for.
template <class T, int width, bool aligned, int stages>
struct ThreadCopies {
    const Copier<T, width, aligned> copier;

    __device__ inline ThreadCopies(const DepthwiseTile& tile, int slab, int channels, uint64_t*)
        : copier(tile, slab, channels) {}

    // Whether this thread takes part in copying.
    __device__ inline bool works() const { return true; }
    __device__ inline void expect(int, int) const {}

    // Copies `rows` rows of `pixels` pixels, zeros where they lie outside the image.
    template <int rows>
    __device__ inline void fetch(int, T* to, const Source<T>& from, int64_t image, int row, int column,
                                 int pixels) const {
        const T* const first = from.data + image * (int64_t(from.height) * from.width * copier.channels);
#pragma unroll
        for (int j = 0; j < rows; ++j)
            copier.row(to + j * pixels * copier.tile.pitch, first, row + j, column, pixels, from.height, from.width);
    }

    // What this step needs has been asked for.
    __device__ inline void close() const { copy_async_commit(); }
    // Until this thread's copies into a place of the ring are there, the oldest that is open.
    __device__ inline void wait(int) { copy_async_wait<stages - 2>(); }
    __device__ inline void finish() const { copy_async_wait<0>(); }
};

// Rows come into the ring by the bulk tensor copy engine, which one thread asks and a barrier a place tells of.
template <class T, int stages>
struct BulkCopies {
    uint64_t* const landed;
    const int channel;
    unsigned parity = 0;

    __device__ inline BulkCopies(const DepthwiseTile& tile, int slab, int, uint64_t* barriers)
        : landed(barriers), channel(slab * tile.slab) {
        if (works()) {
#pragma unroll
            for (int i = 0; i < stages; ++i) mbarrier_init(landed + i, 1);
            fence_mbarriers();
        }
        __syncthreads();
    }

    __device__ inline bool works() const { return threadIdx.x == 0; }
    // So many bytes will be copied to a place.
    __device__ inline void expect(int slot, int bytes) const { mbarrier_arrive_expect(landed + slot, bytes); }

    template <int>
    __device__ inline void fetch(int slot, T* to, const TensorMap& from, int64_t image, int row, int column,
                                 int) const {
        copy_tensor_async(to, &from, channel, column, row, static_cast<int>(image), landed + slot);
    }

    __device__ inline void close() const {}
    // Places are waited for in turn.
    __device__ inline void wait(int slot) {
        mbarrier_wait(landed + slot, parity);
        if (slot == stages - 1) parity ^= 1;
    }
    __device__ inline void finish() const {}
};

// The place of a step in the ring, or of what a copy brings to it, in elements: bulk copies begin at multiples of 128
// bytes.
template <class T, bool bulk>
__host__ __device__ constexpr int place_elements(int elements) {
    constexpr int granule = 128 / static_cast<int>(sizeof(T));
    return bulk ? (elements + granule - 1) / granule * granule : elements;
}

// What the barriers of a ring take in front of it.
template <bool bulk>
inline constexpr int barrier_bytes = bulk ? 128 : 0;

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

    // For silu_of_twice.
    __device__ inline void halve() {
#pragma unroll
        for (int i = 0; i < n; ++i) scale[i] *= 0.5f, shift[i] *= 0.5f;
    }

    // Subtracted first: mean * scale + shift would cancel where the mean is much larger than the deviation.
    __device__ inline float operator()(float x, int i) const { return fmaf(x - mean[i], scale[i], shift[i]); }
};

// Where the copies are: some steps ahead of the computation, also in the next strip.
struct Cursor {
    Strip strip;
    int item, step, slot;

    __device__ inline Cursor(int walker, const DepthwiseTile& tile, int columns, int all_rows)
        : strip(walker, tile, columns, all_rows), item(walker), step(0), slot(0) {}

    // To the next step, `steps` of which a strip has, and the next of `slots` places in the ring.
    __device__ inline void advance(int steps, int slots, const DepthwiseTile& tile, int columns, int all_rows) {
        slot = slot + 1 == slots ? 0 : slot + 1;
        if (++step < steps) return;
        step = 0;
        item += tile.walkers;
        strip = Strip(item, tile, columns, all_rows);
    }
};

// Which activations the code of a kernel has. What surrounds a convolution decides which kernel runs, and not its
// activation: one without code of its own is chosen once for all the values of a row, by the arguments.
struct Silu {
    static __device__ constexpr Activation of(Activation) { return Activation::silu; }
};
struct AnyActivation {
    static __device__ constexpr Activation of(Activation given) { return given; }
};

// The kinds of a kernel that are worth code of their own; `any` decides by its arguments.
enum class ForwardKind : int {
    inference,  // no prologue; bias, activation and perhaps a pool; pixels begin at multiples of 16 bytes
    training,   // normalisation and activation in front; perhaps statistics; the same
    any
};

template <class T>
struct ForwardArguments : DepthwiseWork, DepthwiseForwardOperands<T> {};

template <class Tensor>
struct ForwardSources {
    Tensor x;
};

template <class T, int kernel_, int stride_, ForwardKind kind_, class Activations_ = AnyActivation, bool bulk_ = false>
struct ForwardTraits : Window<kernel_, stride_> {
    using Base = Window<kernel_, stride_>;
    using Element = T;
    using Activations = Activations_;
    static constexpr ForwardKind kind = kind_;
    static constexpr bool bulk = bulk_;                // rows come by the bulk tensor copy engine
    static constexpr int width = kernel_ < 7 ? 2 : 1;  // channels a thread
    // Outputs of a row a thread, as many as there are registers for: 7 divides B0's 112, 56, 28, 14 and 7.
    static constexpr bool wide = kind_ != ForwardKind::any && (kernel_ == 3 || (kernel_ == 5 && stride_ == 1));
    static constexpr int columns = wide ? 7 : 4;
    static constexpr bool aligned = kind_ != ForwardKind::any;  // 16 bytes are copied at a time
    static constexpr int inputs = (columns - 1) * stride_ + kernel_;
    // Whether an activation in front is chosen by a branch, which needs all of a row's inputs at once in registers.
    static constexpr bool branches = kind_ == ForwardKind::training && !std::is_same_v<Activations_, Silu>;
    // At most so many threads a block, and so many blocks a multiprocessor: 128, 168 or 255 registers a thread.
    static constexpr bool light = kernel_ == 3 && stride_ == 1 && kind_ != ForwardKind::any && !branches;
    static constexpr bool heavy = kernel_ > 3 && (wide || kind_ == ForwardKind::any || branches);
    static constexpr int threads = light ? 256 : heavy ? 128 : 192, blocks = 2, stages = 4;

    using Bulk = ForwardTraits<T, kernel_, stride_, kind_, Activations_, true>;
    using Sources = ForwardSources<std::conditional_t<bulk, TensorMap, Source<T>>>;
    using Copies = std::conditional_t<bulk, BulkCopies<T, stages>, ThreadCopies<T, width, aligned, stages>>;

    static __host__ __device__ constexpr int row_pixels(int groups) {
        return (groups * columns - 1) * stride_ + kernel_;
    }
    // From the rows of a step to those of the next.
    static __host__ __device__ constexpr int slot_elements(int groups, int pitch) {
        return place_elements<T, bulk>(stride_ * row_pixels(groups) * pitch);
    }
    static __host__ __device__ constexpr int ring_bytes(int groups, int pitch) {
        return stages * slot_elements(groups, pitch) * static_cast<int>(sizeof(T));
    }
    // The sums of a strip, 3 values a thread's channel, stand behind the ring.
    static constexpr int shared_bytes(int groups, int pitch, int slab, bool sums) {
        return barrier_bytes<bulk> + ring_bytes(groups, pitch) +
               (sums ? 3 * groups * slab * static_cast<int>(sizeof(float)) : 0);
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
    // SiLU of half its argument is an instruction less, and a normalisation can be halved.
    static constexpr bool halved = kind == ForwardKind::training && !Traits::branches;

    const ForwardArguments<T>& arguments;
    const Lane lane;
    Norm<width> norm;
    const Norm<width> out_norm;
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
        if (halved) norm.halve();
    }

    __device__ inline bool together() const { return Traits::aligned || arguments.tile.together; }

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
            for (int i = 0; i < columns * width; ++i)
                carry[age][i] = kind == ForwardKind::training ? 0.0f : bias[i % width];
        sums.clear();
    }

    // The pixels of a row in the ring, behind the prologue.
    __device__ inline void read(const T* row, bool row_inside, float (&u)[inputs * width]) const {
        load_pixels<inputs>(row, arguments.tile.pitch, u);
        if (kind == ForwardKind::training) {
#pragma unroll
            for (int i = 0; i < inputs * width; ++i) {
                const float n = norm(u[i], i % width);
                u[i] = halved ? silu_of_twice<fast>(n) : n;
            }
            if (!halved) activate<fast>(u, arguments.activation);
        }
        if (kind == ForwardKind::any) {
            if (arguments.norm != nullptr) {
#pragma unroll
                for (int i = 0; i < inputs * width; ++i) u[i] = norm(u[i], i % width);
            }
            activate<fast>(u, arguments.activation);
            if (arguments.gate != nullptr) {
#pragma unroll
                for (int i = 0; i < inputs * width; ++i) u[i] *= gate[i % width];
            }
        }
        // Padding is zero behind the normalisation, not in front of it.
        const unsigned exist = row_inside ? inside : 0;
        if (kind != ForwardKind::inference && exist != all_columns<inputs>) {
#pragma unroll
            for (int i = 0; i < inputs * width; ++i) u[i] = exist >> (i / width) & 1 ? u[i] : 0.0f;
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
    __device__ inline void finish(float (&y)[columns * width], int64_t at) const {
        if (kind == ForwardKind::inference) activate<fast>(y, Traits::Activations::of(arguments.out_activation));
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
            load_some(arguments.grad + at + column * arguments.size.channels, grad, lane.count, together());
#pragma unroll
            for (int v = 0; v < width; ++v) y[column * width + v] = grad[v] * derivative[column * width + v];
        }
    }

    // Stores the first `count` columns of a row.
    __device__ inline void put(const float (&y)[columns * width], int count, T* to) const {
#pragma unroll
        for (int column = 0; column < columns; ++column) {
            float stored[width];
#pragma unroll
            for (int v = 0; v < width; ++v) stored[v] = y[column * width + v];
            if (column < count) store_some(to + column * arguments.size.channels, stored, lane.count, together());
        }
    }

    __device__ inline void add_to_sums(const float (&y)[columns * width], bool first_row) {
        if (kind != ForwardKind::training && arguments.pool != nullptr) {
#pragma unroll
            for (int i = 0; i < columns * width; ++i)
                if (i / width < made) sums.pool[i % width] += y[i];
        }
        if (kind != ForwardKind::inference && arguments.statistics != nullptr) {
            // Of the values as stored, since those are what the normalisation will see.
            float stored[columns * width];
            round_as<T>(y, stored);
#pragma unroll
            for (int i = 0; i < columns * width; ++i)
                if (i / width < made) sums.add(stored[i], i % width, first_row && i < width);
        }
    }

    // A step: `rows` are its rows in the ring, `h` the number of the first in the image, `row` that of the output row
    // in the strip which it completes, negative while there is none.
    __device__ inline void step(const T* rows, int row_elements, int h, int row) {
        const DepthwiseSizes& size = arguments.size;
        float open_rows[open][columns * width], u[inputs * width];
#pragma unroll
        for (int i = 0; i < columns * width; ++i) {
            open_rows[0][i] = kind == ForwardKind::training ? 0.0f : bias[i % width];
#pragma unroll
            for (int age = 1; age < open; ++age) open_rows[age][i] = carry[age - 1][i];
        }
        read(rows, h >= 0 && h < size.height, u);
        add<0>(u, open_rows);
        if (stride == 2) {
            read(rows + row_elements, h + 1 >= 0 && h + 1 < size.height, u);
            add<stride - 1>(u, open_rows);
        }
#pragma unroll
        for (int i = 0; i < columns * width; ++i)
#pragma unroll
            for (int age = 0; age < open - 1; ++age) carry[age][i] = open_rows[age][i];
        if (row >= 0) complete(open_rows[open - 1], row);
    }

    __device__ inline void complete(float (&y)[columns * width], int row) {
        const int64_t at = offset + row * arguments.size.out_width * arguments.size.channels;
        finish(y, at);
        // Most threads have all of their columns, and need not ask for each.
        if (Traits::aligned && made == columns)
            put(y, columns, arguments.y + at);
        else
            put(y, made, arguments.y + at);
        add_to_sums(y, row == 0);
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
    const ForwardArguments<typename Traits::Element> arguments,
    const __grid_constant__ typename Traits::Sources sources) {
    using T = typename Traits::Element;
    constexpr int stride = Traits::stride, before = Traits::open - 1, stages = Traits::stages;
    const DepthwiseSizes& size = arguments.size;
    const DepthwiseTile& tile = arguments.tile;
    // Blocks that run side by side share pixels, and so the cache lines that two slabs have in common.
    const int slab = blockIdx.x % tile.slabs, walker = blockIdx.x / tile.slabs, first_channel = slab * tile.slab;
    ForwardThread<Traits> thread(arguments, slab);
    const Lane& lane = thread.lane;

    const int row_pixels = Traits::row_pixels(tile.groups), row_elements = row_pixels * tile.pitch;
    const int slot_elements = Traits::slot_elements(tile.groups, tile.pitch);
    unsigned char* const shared = shared_memory<unsigned char>() + barrier_bytes<Traits::bulk>;
    T* const ring = reinterpret_cast<T*>(shared);
    float* const sums = reinterpret_cast<float*>(shared + Traits::ring_bytes(tile.groups, tile.pitch));
    const T* const mine = ring + lane.group * Traits::columns * stride * tile.pitch + lane.vector * Traits::width;
    typename Traits::Copies copies(tile, slab, size.channels, shared_memory<uint64_t>());
    const int steps = tile.strip_rows + before;
    Cursor ahead(walker, tile, Traits::columns, size.out_height);
    const auto copy = [&] {
        if (!copies.works()) return;
        if (ahead.item < tile.items) {
            copies.expect(ahead.slot, stride * row_elements * static_cast<int>(sizeof(T)));
            copies.template fetch<stride>(ahead.slot, ring + ahead.slot * slot_elements, sources.x, ahead.strip.image,
                                          (ahead.strip.row + ahead.step) * stride - size.top,
                                          ahead.strip.column * stride - size.left, row_pixels);
        }
        copies.close();
        ahead.advance(steps, stages, tile, Traits::columns, size.out_height);
    };
    for (int i = 0; i < stages - 1; ++i) copy();
    int slot = 0;
    // Waits for a step's rows, sends for those of a later one, and returns where this thread's begin.
    const auto next = [&] {
        copies.wait(slot);
        // Everybody's copies of this step are there, and the slot that is filled next has been read by all.
        __syncthreads();
        copy();
        const T* const rows = mine + slot * slot_elements;
        slot = slot + 1 == stages ? 0 : slot + 1;
        return rows;
    };
    for (int item = walker; item < tile.items; item += tile.walkers) {
        const Strip strip(item, tile, Traits::columns, size.out_height);
        thread.begin(strip);
        const int first_h = strip.row * stride - size.top;
        const int last = thread.made > 0 ? strip.rows + before : 0;  // this thread's steps
        for (int step = 0; step < steps; ++step) {
            const T* const rows = next();
            const int h = first_h + step * stride;
            // Rows above the image leave the sums as they began.
            if (step < last && (h + stride > 0 || step >= before)) thread.step(rows, row_elements, h, step - before);
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

enum class BackwardKind : int {
    plain,  // gradients of a convolution alone; pixels begin at multiples of 16 bytes
    fused,  // between two normalisations with activations: a, coefficients, perhaps gate and pooled; norm; dx, no db;
            // the same
    any
};

// Where a walker leaves its sums, and what there is.
struct BackwardSums {
    float *partials, *sums;  // (walkers, rows, C): one row a tap where dw is wanted, then one for db; (walkers, 2, C)
    bool a, x, dw, db;       // which there are, and which are wanted
};

template <class T>
struct BackwardArguments : DepthwiseWork, DepthwiseBackwardOperands<T>, BackwardSums {};

template <class Tensor>
struct BackwardSources {
    Tensor grad, a, x;
};

template <class T, int kernel_, int stride_, BackwardKind kind_, class Activations_ = AnyActivation, bool bulk_ = false>
struct BackwardTraits : Window<kernel_, stride_> {
    using Base = Window<kernel_, stride_>;
    using Element = T;
    using Activations = Activations_;
    static constexpr BackwardKind kind = kind_;
    static constexpr bool bulk = bulk_;                          // rows come by the bulk tensor copy engine
    static constexpr bool aligned = kind_ != BackwardKind::any;  // 16 bytes are copied at a time
    static constexpr int width = kernel_ == 3 ? 2 : 1;           // channels a thread
    // Strides of input columns a thread, as many as there are registers for.
    static constexpr int columns = kernel_ == 7 ? stride_ : kind_ == BackwardKind::any || stride_ == 2 ? 4 : 7;
    static constexpr int grads = columns + Base::reach;  // output gradients of a row that these meet
    // At most so many threads a block, and so many blocks a multiprocessor: 168 or 255 registers a thread.
    static constexpr bool heavy = kind_ == BackwardKind::any ||
                                  (kind_ == BackwardKind::fused && (stride_ == 1 || sizeof(T) == 4)) ||
                                  (kernel_ == 5 && stride_ == 1);
    static constexpr int threads = heavy ? 128 : 192, blocks = 2, stages = 4;
    static constexpr int values = Base::taps + 3;  // sums a thread's channel: dw, db, and two of dx

    using Bulk = BackwardTraits<T, kernel_, stride_, kind_, Activations_, true>;
    using Sources = BackwardSources<std::conditional_t<bulk, TensorMap, Source<T>>>;
    using Copies = std::conditional_t<bulk, BulkCopies<T, stages>, ThreadCopies<T, width, aligned, stages>>;

    static __host__ __device__ constexpr int grad_pixels(int groups) { return groups * columns + Base::reach; }
    static __host__ __device__ constexpr int row_pixels(int groups) { return groups * columns * stride_; }
    // A place in the ring: a row of gradients, one of a, and the rows of x of one stride.
    static __host__ __device__ constexpr int grad_elements(int groups, int pitch) {
        return place_elements<T, bulk>(grad_pixels(groups) * pitch);
    }
    static __host__ __device__ constexpr int slot_elements(int groups, int pitch, bool a, bool x) {
        return grad_elements(groups, pitch) * (a ? 2 : 1) +
               (x ? place_elements<T, bulk>(row_pixels(groups) * stride_ * pitch) : 0);
    }
    // In the end, the threads' sums take the ring's place.
    static constexpr int shared_bytes(int groups, int pitch, int slab, bool a, bool x) {
        const int ring = stages * slot_elements(groups, pitch, a, x) * static_cast<int>(sizeof(T));
        const int sums = values * groups * slab * static_cast<int>(sizeof(float));
        return barrier_bytes<bulk> + (ring > sums ? ring : sums);
    }
};

// What a thread keeps in registers.
template <class Traits>
struct BackwardThread {
    using T = typename Traits::Element;
    static constexpr int width = Traits::width, columns = Traits::columns, stride = Traits::stride, open = Traits::open;
    static constexpr int grads = Traits::grads, reach = Traits::reach, kernel = Traits::kernel, taps = Traits::taps;
    static constexpr bool fast = coarse<T>;
    static constexpr BackwardKind kind = Traits::kind;

    const BackwardArguments<T>& arguments;
    const Lane lane;
    Norm<width> a_norm;
    const Norm<width> norm;
    float of_a[width], constant[width], weight[taps][width];
    float gate[width], pooled[width];  // times the coefficient of the gradient
    float kept[open][grads * width];   // gradients of the convolution, the newest row last
    float dw[taps][width], db[width], total[width], moment[width];
    unsigned grads_inside, inside;  // which columns of the output and of the input exist
    unsigned stored;                // and of the input's gradient, in the plain kernel
    int64_t offset;                 // of the strip's first pixel, in x
    int steps;                      // how many it has; less than the first where there is nothing to do

    __device__ inline BackwardThread(const BackwardArguments<T>& arguments, int slab)
        : arguments(arguments),
          lane(arguments.tile, slab, arguments.size.channels, width),
          a_norm(nullptr, 0, lane),
          norm(kind == BackwardKind::plain ? nullptr : arguments.norm, arguments.size.channels, lane) {
        if (kernel < 7) load_behind();
        load_weights<taps>(arguments.weight, lane, weight);
#pragma unroll
        for (int v = 0; v < width; ++v) {
            db[v] = total[v] = moment[v] = 0.0f;
#pragma unroll
            for (int tap = 0; tap < taps; ++tap) dw[tap][v] = 0.0f;
        }
    }

    // The vectors behind the convolution. The largest kernel has no registers to keep them from step to step.
    __device__ inline void load_behind() {
        const int channels = arguments.size.channels;
        a_norm = Norm<width>(kind == BackwardKind::plain ? nullptr : arguments.a_norm, channels, lane);
        const float* of = kind == BackwardKind::plain ? nullptr : arguments.coefficients;
        load_vector(of == nullptr ? of : of + 2 * channels, 0.0f, lane, of_a);
        load_vector(of == nullptr ? of : of + 3 * channels, 0.0f, lane, constant);
    }

    __device__ inline bool together() const { return Traits::aligned || arguments.tile.together; }
    __device__ inline bool has_a() const {
        return kind == BackwardKind::fused || (kind == BackwardKind::any && arguments.a);
    }
    __device__ inline bool has_x() const { return kind != BackwardKind::any || arguments.x; }

    __device__ inline void begin(const Strip& strip) {
        const DepthwiseSizes& size = arguments.size;
        const int step = strip.column + lane.group * columns, left = step * stride - size.left;
        steps = lane.works ? strip.rows : -reach;
        grads_inside = columns_inside<grads>(step - reach, size.out_width);
        inside = columns_inside<columns * stride>(left, size.width);
        stored = arguments.dx == nullptr ? 0 : inside;
        offset = ((strip.image * size.height + strip.row * stride - size.top) * size.width + left) * size.channels +
                 lane.channel;
        if (kind == BackwardKind::plain) return;
        const int64_t image = strip.image * size.channels;
        load_vector(arguments.gate == nullptr ? nullptr : arguments.gate + image, 1.0f, lane, gate);
        load_vector(arguments.pooled == nullptr ? nullptr : arguments.pooled + image, 0.0f, lane, pooled);
        float of_grad[width];
        const float* of = arguments.coefficients == nullptr ? nullptr : arguments.coefficients + size.channels;
        load_vector(of, 1.0f, lane, of_grad);
#pragma unroll
        for (int v = 0; v < width; ++v) gate[v] *= of_grad[v], pooled[v] *= of_grad[v];
    }

    // Reads the gradient of the convolution's row `out_row`: through gate, activation and normalisation where there is
    // a.
    __device__ inline void read(const T* grad_row, const T* a_row, int out_row) {
        float (&g)[grads * width] = kept[open - 1];
        const int pitch = arguments.tile.pitch;
        load_pixels<grads>(grad_row, pitch, g);
        if (!has_a()) return;
        if (kernel == 7) load_behind();
#pragma unroll
        for (int i = 0; i < grads; ++i) {
            float a[width], n[width], derivative[width];
            load(a_row + i * pitch, a);
#pragma unroll
            for (int v = 0; v < width; ++v) {
                a[v] -= a_norm.mean[v];
                n[v] = fmaf(a[v], a_norm.scale[v], a_norm.shift[v]);
            }
            if (kind == BackwardKind::fused || arguments.a_norm != nullptr) {
                differentiate<fast>(n, derivative, Traits::Activations::of(arguments.a_activation));
            } else {
#pragma unroll
                for (int v = 0; v < width; ++v) derivative[v] = 1.0f;
            }
#pragma unroll
            for (int v = 0; v < width; ++v) {
                float& grad = g[i * width + v];
                grad = fmaf(fmaf(grad, gate[v], pooled[v]), derivative[v], fmaf(of_a[v], a[v], constant[v]));
            }
        }
        // Padding has no gradient, but the constants of a normalisation's.
        const unsigned exist = out_row >= 0 && out_row < arguments.size.out_height ? grads_inside : 0;
        if (exist != all_columns<grads>) {
#pragma unroll
            for (int i = 0; i < grads * width; ++i) g[i] = exist >> (i / width) & 1 ? g[i] : 0.0f;
        }
    }

    // Adds what is this thread's own of the newest row to the bias' gradient; the first one, which no thread is on the
    // left of, also has those columns that lie before its own.
    __device__ inline void add_bias(bool leads) {
#pragma unroll
        for (int i = 0; i < grads * width; ++i)
            if (i >= reach * width || leads) db[i % width] += kept[open - 1][i];
    }

    // Row j of a stride: `row` are its pixels in the ring, `at` where it begins in the image. Each meets the gradients
    // of its window: dx gathers them times the weights, dw times the pixel.
    template <int j>
    __device__ inline void meet(const T* row, int64_t at) {
        const DepthwiseSizes& size = arguments.size;
#pragma unroll
        for (int b = 0; b < columns * stride; ++b) {
            const bool exists = inside >> b & 1;
            float centred[width], n[width], u[width], derivative[width], dx[width];
            if (has_x()) {
                load(row + b * arguments.tile.pitch, u);
            } else {
#pragma unroll
                for (int v = 0; v < width; ++v) u[v] = 0.0f;
            }
#pragma unroll
            for (int v = 0; v < width; ++v) {
                centred[v] = kind == BackwardKind::plain ? u[v] : u[v] - norm.mean[v];
                n[v] = kind == BackwardKind::plain ? u[v] : fmaf(centred[v], norm.scale[v], norm.shift[v]);
                u[v] = n[v];
                dx[v] = 0.0f;
            }
            if (kind != BackwardKind::plain) {
                differentiate<fast>(u, derivative, Traits::Activations::of(arguments.activation));
                // Padding is zero behind the normalisation, not in front of it.
#pragma unroll
                for (int v = 0; v < width; ++v) u[v] = exists ? u[v] : 0.0f;
            }
#pragma unroll
            for (int tap = 0; tap < taps; ++tap) {
                const int kh = tap / kernel, kw = tap % kernel;
                if (kh % stride != j || (b + kernel * stride - kw) % stride != 0) continue;
                const int column = (b - kw + kernel * stride) / stride - kernel + reach;
#pragma unroll
                for (int v = 0; v < width; ++v) {
                    const float g = kept[open - 1 - kh / stride][column * width + v];
                    dx[v] = fmaf(g, weight[tap][v], dx[v]);
                    dw[tap][v] = fmaf(g, u[v], dw[tap][v]);
                }
            }
            if (kind != BackwardKind::plain) {
#pragma unroll
                for (int v = 0; v < width; ++v) dx[v] *= derivative[v];
            }
            if (kind == BackwardKind::any && arguments.residual != nullptr && exists) {
                float residual[width];
                load_some(arguments.residual + at + b * size.channels, residual, lane.count, together());
#pragma unroll
                for (int v = 0; v < width; ++v) dx[v] += residual[v];
            }
            if (stored >> b & 1) store_some(arguments.dx + at + b * size.channels, dx, lane.count, together());
            if (kind != BackwardKind::plain) {
#pragma unroll
                for (int v = 0; v < width; ++v) {
                    const float counted = exists ? dx[v] : 0.0f;
                    total[v] += counted;
                    moment[v] = fmaf(counted, centred[v], moment[v]);
                }
            }
        }
    }

    // Makes room for the next row of gradients.
    __device__ inline void shift() {
#pragma unroll
        for (int age = 0; age < open - 1; ++age)
#pragma unroll
            for (int i = 0; i < grads * width; ++i) kept[age][i] = kept[age + 1][i];
    }

    // Leaves all sums in shared memory, [values][groups][slab].
    __device__ inline void leave(float* shared) const {
        const DepthwiseTile& tile = arguments.tile;
        const int plane = tile.groups * tile.slab;
#pragma unroll
        for (int v = 0; v < width; ++v) {
            if (v >= lane.count) continue;
            float* const to = shared + lane.group * tile.slab + lane.vector * width + v;
#pragma unroll
            for (int tap = 0; tap < taps; ++tap) to[tap * plane] = dw[tap][v];
            to[taps * plane] = db[v];
            to[(taps + 1) * plane] = total[v];
            to[(taps + 2) * plane] = moment[v];
        }
    }
};

// Adds the threads' sums over the groups, and stores those that are wanted.
template <int taps>
__device__ inline void store_sums(const float* sums, float* partials, float* of_dx, bool dw, bool db,
                                  const DepthwiseTile& tile, int first, int channels) {
    for (int i = threadIdx.x; i < (taps + 3) * tile.slab; i += blockDim.x) {
        const int value = i / tile.slab, c = i % tile.slab;
        if (first + c >= channels) continue;
        float sum = 0.0f;
        for (int g = 0; g < tile.groups; ++g) sum += sums[(value * tile.groups + g) * tile.slab + c];
        if (value > taps) {
            if (of_dx != nullptr) of_dx[(value - taps - 1) * channels + first + c] = sum;
        } else if (value == taps ? db : dw) {
            partials[(dw ? value : 0) * channels + first + c] = sum;
        }
    }
}

// Gradients of input, weight and bias. gridDim.x = slabs * walkers. Outputs that lie in padding alone have no pixel,
// but their share of the bias: steps go on until they are read.
template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void depthwise_backward_kernel(
    const BackwardArguments<typename Traits::Element> arguments,
    const __grid_constant__ typename Traits::Sources sources) {
    using T = typename Traits::Element;
    constexpr int stride = Traits::stride, before = Traits::open - 1, stages = Traits::stages;
    constexpr int columns = Traits::columns, width = Traits::width;
    const DepthwiseSizes& size = arguments.size;
    const DepthwiseTile& tile = arguments.tile;
    // Blocks that run side by side share pixels, and so the cache lines that two slabs have in common.
    const int slab = blockIdx.x % tile.slabs, walker = blockIdx.x / tile.slabs, first_channel = slab * tile.slab;
    BackwardThread<Traits> thread(arguments, slab);
    const Lane& lane = thread.lane;

    const bool has_a = thread.has_a(), has_x = thread.has_x();
    const int grad_pixels = Traits::grad_pixels(tile.groups), row_pixels = Traits::row_pixels(tile.groups);
    const int slot_elements = Traits::slot_elements(tile.groups, tile.pitch, has_a, has_x);
    const int a_at = Traits::grad_elements(tile.groups, tile.pitch), x_at = a_at * (has_a ? 2 : 1);
    const int row_elements = row_pixels * tile.pitch;
    const int all_rows = max((size.height + size.top + stride - 1) / stride, size.out_height) - tile.first_row;
    T* const ring = reinterpret_cast<T*>(shared_memory<unsigned char>() + barrier_bytes<Traits::bulk>);
    typename Traits::Copies copies(tile, slab, size.channels, shared_memory<uint64_t>());
    const int steps = tile.strip_rows + before;
    Cursor ahead(walker, tile, columns, all_rows);
    const auto copy = [&] {
        if (!copies.works()) return;
        if (ahead.item < tile.items) {
            T* const to = ring + ahead.slot * slot_elements;
            const int out_row = ahead.strip.row + ahead.step - before, column = ahead.strip.column;
            const int64_t image = ahead.strip.image;
            const bool fetches_x = has_x && ahead.step >= before;
            const int pixels = grad_pixels * (has_a ? 2 : 1) + (fetches_x ? stride * row_pixels : 0);
            copies.expect(ahead.slot, pixels * tile.pitch * static_cast<int>(sizeof(T)));
            copies.template fetch<1>(ahead.slot, to, sources.grad, image, out_row, column - Traits::reach, grad_pixels);
            if (has_a)
                copies.template fetch<1>(ahead.slot, to + a_at, sources.a, image, out_row, column - Traits::reach,
                                         grad_pixels);
            if (fetches_x)
                copies.template fetch<stride>(ahead.slot, to + x_at, sources.x, image, out_row * stride - size.top,
                                              column * stride - size.left, row_pixels);
        }
        copies.close();
        ahead.advance(steps, stages, tile, columns, all_rows);
    };
    for (int i = 0; i < stages - 1; ++i) copy();
    int slot = 0;
    for (int item = walker; item < tile.items; item += tile.walkers) {
        const Strip strip(item, tile, columns, all_rows);
        thread.begin(strip);
        for (int step = 0; step < steps; ++step) {
            copies.wait(slot);
            // Everybody's copies of this step are there, and the slot that is filled next has been read by all.
            __syncthreads();
            copy();
            const T* const mine = ring + slot * slot_elements + lane.group * columns * tile.pitch + lane.vector * width;
            slot = slot + 1 == stages ? 0 : slot + 1;
            if (step - before >= thread.steps) continue;
            const int row = step - before;
            thread.read(mine, mine + a_at, strip.row + row);
            if (Traits::kind != BackwardKind::fused && arguments.db && (row >= 0 || strip.row == tile.first_row))
                thread.add_bias(lane.group == 0 && strip.column == tile.first_column);
            if (row >= 0) {
                const T* const pixels = mine + x_at + lane.group * columns * (stride - 1) * tile.pitch;
                const int h = (strip.row + row) * stride - size.top;
                const int64_t at = thread.offset + row * stride * size.width * size.channels;
                if (h >= 0 && h < size.height) thread.template meet<0>(pixels, at);
                if (stride == 2 && h + 1 >= 0 && h + 1 < size.height)
                    thread.template meet<1>(pixels + row_elements, at + size.width * size.channels);
            }
            thread.shift();
        }
    }
    // Copies of steps that nobody asked for are empty, but the ring is still being read.
    copies.finish();
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(ring);
    thread.leave(sums);
    __syncthreads();
    const int rows = (arguments.dw ? Traits::taps : 0) + (arguments.db ? 1 : 0);
    store_sums<Traits::taps>(sums, arguments.partials + int64_t(walker) * rows * size.channels,
                             arguments.sums == nullptr ? nullptr : arguments.sums + int64_t(walker) * 2 * size.channels,
                             arguments.dw, arguments.db, tile, first_channel, size.channels);
}

}  // namespace effnet::cuda
