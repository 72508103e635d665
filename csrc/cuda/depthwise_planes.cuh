// Depthwise convolution of contiguous (N, C, H, W): forward, and one kernel for the gradients of input and weight.
//
// A plane is a channel of an image. Rows of a plane begin anywhere, but they follow each other in memory, as planes do:
// a block brings the planes of its slab of channels, or a strip of rows of its only one, into shared memory as one
// stretch in pieces of 16 bytes, and sends results back like that, whatever the width. Copies for the next item run
// while it computes one. A thread owns a few neighbouring columns of a segment of rows in one plane, with the weights
// of its channel and open sums in registers.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "depthwise.cuh"
#include "kernels.h"
#include "types.cuh"

namespace effnet::cuda {

// How a problem is cut. An item is the planes of a slab in an image, or if `strips` is not 1 a part of the only plane;
// each of `walkers` blocks a slab takes every walkers-th. Rows and columns are steps: outputs, or backward strides of
// input pixels.
struct PlanesTile {
    int slab, slabs;             // channels a block, and how many
    int groups;                  // of columns, one a thread
    int segment_rows, segments;  // what a thread walks down, and how many there are in a strip
    int strip_rows, strips;
    int items, walkers;
    int first_row, first_column;  // steps of which no pixel exists are left out
    int x_elements, y_elements;   // of shared memory that an item takes of tensors like x and like y
};

// An item: its image and its steps.
struct PlanesItem {
    int64_t image;
    int part, row, rows;

    __device__ inline PlanesItem(int item, const PlanesTile& tile, int all_rows) {
        image = item / tile.strips;
        part = item % tile.strips;
        row = part * tile.strip_rows;
        rows = min(tile.strip_rows, all_rows - row);
        row += tile.first_row;
    }
};

// The rows of a slab's planes that an item has, neighbours in memory. In shared memory they begin as far behind a
// multiple of 16 bytes as they do in the tensor.
template <class T>
struct Stretch {
    static constexpr int chunk = 16 / static_cast<int>(sizeof(T));
    int64_t begin;  // in the tensor, at a multiple of 16 bytes, `head` elements before the first row
    int head, end;  // from there to the first row, and to the end of the last
    int first, rows;

    // Rows from `from` up to `to`, as far as they exist.
    __device__ inline Stretch(int64_t plane, int planes, int from, int to, int height, int width) {
        first = min(max(from, 0), height);
        rows = max(min(to, height) - first, 0);
        const int64_t place = (plane * height + first) * width;
        head = static_cast<int>(place % chunk);
        begin = place - head;
        end = head + planes * rows * width;
    }

    // Where row 0 of a plane would begin.
    __device__ inline int origin(int plane, int width) const { return head + (plane * rows - first) * width; }

    // `elements`: of the whole tensor, behind which nothing is read.
    __device__ inline void bring(T* to, const T* from, int64_t elements) const {
        const int64_t left = elements - begin;
        const int last = left < end + chunk ? static_cast<int>(left) : end + chunk;
        for (int i = threadIdx.x * chunk; i < end; i += blockDim.x * chunk)
            copy_async_some(to + i, from + begin + i, min(last - i, chunk) * static_cast<int>(sizeof(T)));
    }

    __device__ inline void send(const T* from, T* to) const {
        for (int i = threadIdx.x * chunk; i < end; i += blockDim.x * chunk) {
            T* const target = to + begin + i;
            if (i >= head && i + chunk <= end) {
                *reinterpret_cast<Pack<T, chunk>*>(target) = *reinterpret_cast<const Pack<T, chunk>*>(from + i);
                continue;
            }
            // What shares its 16 bytes with other blocks' results.
#pragma unroll
            for (int v = 0; v < chunk; ++v)
                if (i + v >= head && i + v < end) target[v] = from[i + v];
        }
    }
};

// Which part of its block's work a thread has.
struct PlanesLane {
    int group, segment, plane, channel;  // plane: within the slab
    bool works;

    __device__ inline PlanesLane(const PlanesTile& tile, int first_channel, int planes) {
        group = threadIdx.x % tile.groups;
        segment = threadIdx.x / tile.groups % tile.segments;
        plane = threadIdx.x / (tile.groups * tile.segments);
        channel = first_channel + plane;
        works = plane < planes;
    }
};

__device__ inline float channel_value(const float* from, float otherwise, int64_t channel) {
    return from == nullptr ? otherwise : __ldg(from + channel);
}

// A channel of a (3, C) normalisation, or one that changes nothing.
struct ChannelNorm {
    float mean = 0.0f, scale = 1.0f, shift = 0.0f;

    __device__ inline ChannelNorm(const float* from, int channels, const PlanesLane& lane) {
        if (from == nullptr || !lane.works) return;
        mean = __ldg(from + lane.channel);
        scale = __ldg(from + channels + lane.channel);
        shift = __ldg(from + 2 * channels + lane.channel);
    }
    __device__ inline float operator()(float x) const { return fmaf(x - mean, scale, shift); }
};

template <int taps>
__device__ inline void load_taps(const float* from, const PlanesLane& lane, float (&to)[taps]) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap)
        to[tap] = lane.works ? __ldg(from + static_cast<int64_t>(lane.channel) * taps + tap) : 0.0f;
}

// Which of `n` columns from `first` on a row has, as bits: made by shifts, so that a bit is one test and not two
// comparisons again.
template <int n>
__device__ inline unsigned columns_of_row(int first, int row_width) {
    const int begin = min(max(-first, 0), n), end = min(max(row_width - first, 0), n);
    return ((1u << end) - 1) & ~((1u << begin) - 1);
}

// Those of n neighbours that are `inside`, zeros for the others, which may be no elements at all.
template <class T, int n>
__device__ inline void load_inside(const T* from, unsigned inside, float (&to)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = inside >> i & 1 ? widen(from[i]) : 0.0f;
}

// What the arguments of a kernel begin with.
struct PlanesWork {
    DepthwiseSizes size;
    PlanesTile tile;
    int64_t x_elements, y_elements;  // of the tensors
};

template <class T>
struct PlanesForwardSources : PlanesWork {
    const T* x;
};

template <class T>
struct PlanesForwardArguments : PlanesForwardSources<T>, DepthwiseForwardOperands<T> {};

// `fused`: with all that can stand in front of the convolution and behind it, else only bias, out_activation and grad.
template <class T, int kernel_, int stride_, bool fused_>
struct PlanesForwardTraits : Window<kernel_, stride_> {
    using Element = T;
    static constexpr bool fused = fused_;
    static constexpr int columns = 7;  // outputs of a row a thread: divides B0's 112, 56, 28, 14 and 7
    static constexpr int inputs = (columns - 1) * stride_ + kernel_;
    // At most so many threads a block, and so many blocks a multiprocessor: 128, 168 or 255 registers a thread.
    static constexpr int threads = 128, blocks = kernel_ == 7 ? 2 : fused_ ? 3 : 4, stages = 2;

    // With grad, results take its place; else all items' stand in one.
    static constexpr int shared_bytes(int x_elements, int y_elements, int threads, bool grad, bool sums) {
        const int elements = stages * x_elements + (grad ? stages : 1) * y_elements;
        return elements * static_cast<int>(sizeof(T)) + (sums ? 4 * threads * static_cast<int>(sizeof(float)) : 0);
    }
};

// What a thread keeps in registers.
template <class Traits>
struct PlanesForwardThread {
    using T = typename Traits::Element;
    static constexpr int columns = Traits::columns, inputs = Traits::inputs, kernel = Traits::kernel;
    static constexpr int stride = Traits::stride, open = Traits::open, before = open - 1;
    static constexpr bool fast = coarse<T>, fused = Traits::fused;

    const PlanesForwardArguments<T>& arguments;
    const PlanesLane lane;
    const ChannelNorm norm, out_norm;
    float weight[Traits::taps], bias, gate;
    ForwardSums<1> sums;

    __device__ inline PlanesForwardThread(const PlanesForwardArguments<T>& arguments, int first_channel, int planes)
        : arguments(arguments),
          lane(arguments.tile, first_channel, planes),
          norm(fused ? arguments.norm : nullptr, arguments.size.channels, lane),
          out_norm(fused ? arguments.out_norm : nullptr, arguments.size.channels, lane),
          gate(1.0f) {
        load_taps(arguments.weight, lane, weight);
        bias = lane.works ? channel_value(arguments.bias, 0.0f, lane.channel) : 0.0f;
    }

    // A row of pixels behind the prologue.
    __device__ inline void read(const T* row, unsigned inside, float (&u)[inputs]) const {
        load_inside(row, inside, u);
        if (!fused) return;
        if (arguments.norm != nullptr) {
#pragma unroll
            for (int i = 0; i < inputs; ++i) u[i] = norm(u[i]);
        }
        activate<fast>(u, arguments.activation);
        // Padding is zero behind the normalisation, not in front of it.
#pragma unroll
        for (int i = 0; i < inputs; ++i) u[i] = inside >> i & 1 ? u[i] * gate : 0.0f;
    }

    // Adds what row j of a step contributes to the open rows. Before the first row is finished and after the last one
    // has begun, that is of no use for some: to ask costs more.
    template <int j>
    __device__ inline void add(const float (&u)[inputs], float (&open_rows)[open][columns]) const {
#pragma unroll
        for (int age = open - 1; age >= 0; --age)
#pragma unroll
            for (int kw = 0; kw < kernel; ++kw)
#pragma unroll
                for (int column = 0; column < columns; ++column)
                    if (age * stride + j < kernel)
                        open_rows[age][column] = fmaf(u[column * stride + kw], weight[(age * stride + j) * kernel + kw],
                                                      open_rows[age][column]);
    }

    // A finished row behind the epilogue, to its place in shared memory, where the row of grad stands if there is one.
    __device__ inline void finish(float (&y)[columns], T* to, int made, bool first) {
        if (fused && arguments.out_norm != nullptr) {
#pragma unroll
            for (int i = 0; i < columns; ++i) y[i] = out_norm(y[i]);
        }
        if (arguments.grad == nullptr) {
            activate<fast>(y, arguments.out_activation);
        } else {
            float derivative[columns];
            differentiate<fast>(y, derivative, arguments.out_activation);
#pragma unroll
            for (int i = 0; i < columns; ++i) y[i] = i < made ? widen(to[i]) * derivative[i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < columns; ++i) {
            if (i >= made) continue;
            to[i] = narrow<T>(y[i]);
            if (!fused) continue;
            sums.pool[0] += y[i];
            // Of the values as stored, since those are what the normalisation will see.
            if (arguments.statistics != nullptr) sums.add(widen(narrow<T>(y[i])), 0, first && i == 0);
        }
    }

    // Computes this thread's part of an item.
    __device__ inline void compute(const PlanesItem& item, const T* x, const Stretch<T>& of_x, T* y,
                                   const Stretch<T>& of_y) {
        const DepthwiseSizes& size = arguments.size;
        const int skipped = lane.segment * arguments.tile.segment_rows;
        const int rows = lane.works ? min(arguments.tile.segment_rows, item.rows - skipped) : 0;
        if (rows <= 0) return;
        const int row = item.row + skipped, column = lane.group * columns, left = column * stride - size.left;
        const int made = min(columns, size.out_width - column);
        const unsigned inside = columns_of_row<inputs>(left, size.width);
        const T* const plane = x + of_x.origin(lane.plane, size.width) + left;
        T* to = y + of_y.origin(lane.plane, size.out_width) + row * size.out_width + column;
        if (fused) gate = channel_value(arguments.gate, 1.0f, item.image * size.channels + lane.channel);
        if (fused) sums.clear();
        float open_rows[open][columns];
#pragma unroll
        for (int age = 0; age < open; ++age)
#pragma unroll
            for (int i = 0; i < columns; ++i) open_rows[age][i] = bias;
        for (int step = 0; step < rows + before; ++step) {
            const int h = (row + step) * stride - size.top;
            float u[inputs];
            if (h >= 0 && h < size.height) {
                read(plane + h * size.width, inside, u);
                add<0>(u, open_rows);
            }
            // The last finished row has no use for the second, and the strip may not have it.
            if (stride == 2 && step + 1 < rows + before && h + 1 >= 0 && h + 1 < size.height) {
                read(plane + (h + 1) * size.width, inside, u);
                add<stride - 1>(u, open_rows);
            }
            if (step >= before) {
                finish(open_rows[open - 1], to, made, step == before);
                to += size.out_width;
            }
#pragma unroll
            for (int i = 0; i < columns; ++i) {
#pragma unroll
                for (int age = open - 1; age > 0; --age) open_rows[age][i] = open_rows[age - 1][i];
                open_rows[0][i] = bias;
            }
        }
    }

    // Leaves the item's sums in shared memory, [4][threads].
    __device__ inline void leave(float* shared) const {
        const float values[4] = {sums.pool[0], sums.total[0], sums.squares[0], sums.origin[0]};
#pragma unroll
        for (int i = 0; i < 4; ++i) shared[i * blockDim.x + threadIdx.x] = values[i];
    }
};

// Adds the sums of the threads that share a plane, and stores those that are wanted: plainly for the pool, and with
// distances from the first thread's first value for the statistics, merged by Chan et al. (1979). A first value is one
// of those that are summed, so no more than their number times the squares around the mean can cancel.
template <int columns>
__device__ inline void store_plane_sums(const float* sums, const PlanesTile& tile, const DepthwiseSizes& size,
                                        const PlanesItem& item, int first_channel, int planes, float* pool,
                                        float* statistics) {
    const int each = tile.groups * tile.segments, all = blockDim.x;
    const int plane = threadIdx.x, channel = first_channel + plane;
    if (plane >= planes) return;
    const float reference = sums[3 * all + plane * each];
    float sum = 0.0f, count = 0.0f, mean = 0.0f, squares = 0.0f;
    for (int i = 0; i < each; ++i) {
        const int rows = min(tile.segment_rows, item.rows - i / tile.groups * tile.segment_rows);
        const int made = min(columns, size.out_width - i % tile.groups * columns), at = plane * each + i;
        if (rows <= 0) break;
        sum += sums[at];
        const float more = static_cast<float>(rows * made), total = sums[all + at];
        const float distance = (sums[3 * all + at] - reference) + total / more - mean;
        squares += sums[2 * all + at] - total * total / more + distance * distance * (count * more / (count + more));
        count += more;
        mean = fmaf(distance, more / count, mean);
    }
    const int64_t part = item.image * tile.strips + item.part;
    if (pool != nullptr) pool[part * size.channels + channel] = sum;
    if (statistics == nullptr) return;
    float* const to = statistics + part * 3 * size.channels + channel;
    to[0] = count;
    to[size.channels] = reference + mean;
    to[2 * size.channels] = squares;
}

// y = epilogue(conv(prologue(x))). gridDim.x = slabs * walkers.
template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void depthwise_planes_forward_kernel(
    const PlanesForwardArguments<typename Traits::Element> arguments) {
    using T = typename Traits::Element;
    constexpr int stride = Traits::stride;
    const DepthwiseSizes& size = arguments.size;
    const PlanesTile& tile = arguments.tile;
    const int slab = blockIdx.x % tile.slabs, walker = blockIdx.x / tile.slabs;
    const int first_channel = slab * tile.slab, planes = min(tile.slab, size.channels - first_channel);
    PlanesForwardThread<Traits> thread(arguments, first_channel, planes);
    const bool has_grad = arguments.grad != nullptr, whole = tile.strips == 1;
    T* const x_places = shared_memory<T>();
    T* const y_places = x_places + Traits::stages * tile.x_elements;
    float* const sums = reinterpret_cast<float*>(y_places + (has_grad ? Traits::stages : 1) * tile.y_elements);
    const auto x_of = [&](const PlanesItem& item) {
        const int top = item.row * stride - size.top, bottom = top + (item.rows - 1) * stride + Traits::kernel;
        return Stretch<T>(item.image * size.channels + first_channel, planes, whole ? 0 : top,
                          whole ? size.height : bottom, size.height, size.width);
    };
    const auto y_of = [&](const PlanesItem& item) {
        return Stretch<T>(item.image * size.channels + first_channel, planes, item.row, item.row + item.rows,
                          size.out_height, size.out_width);
    };
    const auto copy = [&](int number, int slot) {
        if (number < tile.items) {
            const PlanesItem item(number, tile, size.out_height);
            x_of(item).bring(x_places + slot * tile.x_elements, arguments.x, arguments.x_elements);
            if (has_grad) y_of(item).bring(y_places + slot * tile.y_elements, arguments.grad, arguments.y_elements);
        }
        copy_async_commit();
    };
    copy(walker, 0);
    int slot = 0;
    for (int number = walker; number < tile.items; number += tile.walkers) {
        copy_async_wait<0>();
        // Everybody's copies of this item are there, and of the last one all is done.
        __syncthreads();
        copy(number + tile.walkers, 1 - slot);
        const PlanesItem item(number, tile, size.out_height);
        const Stretch<T> of_y = y_of(item);
        T* const y = y_places + (has_grad ? slot : 0) * tile.y_elements;
        thread.compute(item, x_places + slot * tile.x_elements, x_of(item), y, of_y);
        const bool summed = Traits::fused && (arguments.pool != nullptr || arguments.statistics != nullptr);
        if (summed) thread.leave(sums);
        __syncthreads();
        of_y.send(y, arguments.y);
        if (summed)
            store_plane_sums<Traits::columns>(sums, tile, size, item, first_channel, planes, arguments.pool,
                                              arguments.statistics);
        slot = 1 - slot;
    }
}

template <class T>
struct PlanesBackwardSources : PlanesWork {
    const T *grad, *a, *x;
};

// Where a walker leaves its sums, and which are wanted.
struct PlanesBackwardSums {
    float *partials, *sums;  // (walkers, rows, C): one row a tap where dw is wanted, then one for db; (walkers, 2, C)
    bool dw, db;
};

template <class T>
struct PlanesBackwardArguments : PlanesBackwardSources<T>, DepthwiseBackwardOperands<T>, PlanesBackwardSums {};

// `fused`: with all that can stand behind the convolution and in front of it.
template <class T, int kernel_, int stride_, bool fused_>
struct PlanesBackwardTraits : Window<kernel_, stride_> {
    using Base = Window<kernel_, stride_>;
    using Element = T;
    static constexpr bool fused = fused_;
    // Strides of input columns a thread, as many as there are registers for.
    static constexpr int columns = kernel_ == 7 ? 2 : kernel_ == 5 && stride_ == 2 ? 4 : 7;
    static constexpr int grads = columns + Base::reach;  // output gradients of a row that these meet
    // At most so many threads a block, and so many blocks a multiprocessor: 128, 168 or 255 registers a thread.
    // Fused 3x3 at stride 2 would have 168, which is too few for sm_100.
    static constexpr int threads = 128, stages = 2;
    static constexpr int blocks = kernel_ == 7 || (fused_ && stride_ == 2) ? 2 : (kernel_ == 3 ? 4 : 3) - fused_;
    static constexpr int values = Base::taps + 3;  // sums a thread: dw, db, and two of dx

    // Results take the place of x. In the end, the threads' sums take the place of all.
    static constexpr int shared_bytes(int x_elements, int y_elements, int threads, bool a) {
        const int places = stages * (x_elements + (a ? 2 : 1) * y_elements) * static_cast<int>(sizeof(T));
        const int sums = values * threads * static_cast<int>(sizeof(float));
        return places > sums ? places : sums;
    }
};

// What a thread keeps in registers.
template <class Traits>
struct PlanesBackwardThread {
    using T = typename Traits::Element;
    static constexpr int columns = Traits::columns, grads = Traits::grads, reach = Traits::reach;
    static constexpr int kernel = Traits::kernel, taps = Traits::taps, stride = Traits::stride;
    static constexpr int open = Traits::open, before = open - 1;
    static constexpr bool fast = coarse<T>, fused = Traits::fused;

    const PlanesBackwardArguments<T>& arguments;
    const PlanesLane lane;
    const ChannelNorm a_norm, norm;
    float of_grad, of_a, constant;  // coefficients
    float gate, pooled;             // times that of the gradient
    float weight[taps], dw[taps], db, total, moment;
    float kept[open][grads];        // gradients of the convolution, the newest row last
    unsigned grads_inside, inside;  // which columns of the output and of the input exist

    __device__ inline PlanesBackwardThread(const PlanesBackwardArguments<T>& arguments, int first_channel, int planes)
        : arguments(arguments),
          lane(arguments.tile, first_channel, planes),
          a_norm(fused ? arguments.a_norm : nullptr, arguments.size.channels, lane),
          norm(fused ? arguments.norm : nullptr, arguments.size.channels, lane) {
        const int column = arguments.tile.first_column + lane.group * columns;
        grads_inside = columns_of_row<grads>(column - reach, arguments.size.out_width);
        inside = columns_of_row<columns * stride>(column * stride - arguments.size.left, arguments.size.width);
        load_taps(arguments.weight, lane, weight);
        db = total = moment = 0.0f;
#pragma unroll
        for (int tap = 0; tap < taps; ++tap) dw[tap] = 0.0f;
        if (!fused) return;
        const float* const of = lane.works ? arguments.coefficients : nullptr;
        of_grad = channel_value(of, 1.0f, arguments.size.channels + lane.channel);
        of_a = channel_value(of, 0.0f, 2 * arguments.size.channels + lane.channel);
        constant = channel_value(of, 0.0f, 3 * arguments.size.channels + lane.channel);
    }

    // Reads a row of the convolution's gradient: through gate, activation and normalisation where there is a.
    __device__ inline void read(const T* grad_row, const T* a_row) {
        float (&g)[grads] = kept[open - 1];
        load_inside(grad_row, grads_inside, g);
        if (!fused || arguments.a == nullptr) return;
        float a[grads], n[grads], derivative[grads];
        load_inside(a_row, grads_inside, a);
#pragma unroll
        for (int i = 0; i < grads; ++i) {
            a[i] -= a_norm.mean;
            n[i] = fmaf(a[i], a_norm.scale, a_norm.shift);
        }
        differentiate<fast>(n, derivative, arguments.a_norm != nullptr ? arguments.a_activation : Activation::none);
        // Padding has no gradient, but the constants of a normalisation's.
#pragma unroll
        for (int i = 0; i < grads; ++i)
            g[i] = grads_inside >> i & 1 ? fmaf(fmaf(g[i], gate, pooled), derivative[i], fmaf(of_a, a[i], constant))
                                         : 0.0f;
    }

    // Makes room for a row of gradients, and zeros there.
    __device__ inline void shift() {
#pragma unroll
        for (int i = 0; i < grads; ++i) {
#pragma unroll
            for (int age = 0; age < open - 1; ++age) kept[age][i] = kept[age + 1][i];
            kept[open - 1][i] = 0.0f;
        }
    }

    // Adds what is this thread's own of the newest row to the bias' gradient; the first group, which no thread is on
    // the left of, also has those columns that lie before its own.
    __device__ inline void add_bias() {
#pragma unroll
        for (int i = 0; i < grads; ++i)
            if (i >= reach || lane.group == 0) db += kept[open - 1][i];
    }

    // Row j of a stride: its pixels in shared memory, which dx replaces. Each meets the gradients of its window: dx
    // gathers them times the weights, dw times the pixel.
    template <int j>
    __device__ inline void meet(T* row, const T* residual) {
        constexpr int pixels = columns * stride;
        float u[pixels], centred[pixels], derivative[pixels];
        load_inside(row, arguments.x == nullptr ? 0 : inside, u);
        if (fused) {
#pragma unroll
            for (int b = 0; b < pixels; ++b) {
                centred[b] = u[b] - norm.mean;
                u[b] = norm(u[b]);
            }
            differentiate<fast>(u, derivative, arguments.activation);
            // Padding is zero behind the normalisation, not in front of it.
#pragma unroll
            for (int b = 0; b < pixels; ++b) u[b] = inside >> b & 1 ? u[b] : 0.0f;
        }
#pragma unroll
        for (int b = 0; b < pixels; ++b) {
            float dx = 0.0f;
#pragma unroll
            for (int tap = 0; tap < taps; ++tap) {
                const int kh = tap / kernel, kw = tap % kernel;
                if (kh % stride != j || (b + kernel * stride - kw) % stride != 0) continue;
                const float g = kept[open - 1 - kh / stride][(b - kw + kernel * stride) / stride - kernel + reach];
                dx = fmaf(g, weight[tap], dx);
                dw[tap] = fmaf(g, u[b], dw[tap]);
            }
            if (!(inside >> b & 1)) continue;
            if (fused) {
                dx *= derivative[b];
                if (arguments.residual != nullptr) dx += widen(residual[b]);
                total += dx;
                moment = fmaf(dx, centred[b], moment);
            }
            row[b] = narrow<T>(dx);
        }
    }

    // Computes this thread's part of an item; dx stands in the place of x.
    __device__ inline void compute(const PlanesItem& item, const T* grad, const T* a, const Stretch<T>& of_grad_rows,
                                   T* x, const Stretch<T>& of_x) {
        const DepthwiseSizes& size = arguments.size;
        const PlanesTile& tile = arguments.tile;
        const int skipped = lane.segment * tile.segment_rows;
        const int rows = lane.works ? min(tile.segment_rows, item.rows - skipped) : 0;
        if (rows <= 0) return;
        const int first = item.row + skipped, column = tile.first_column + lane.group * columns;
        const int grad_plane = of_grad_rows.origin(lane.plane, size.out_width) + column - reach;
        const int x_plane = of_x.origin(lane.plane, size.width) + column * stride - size.left;
        if (fused) {
            const int64_t of_image = item.image * size.channels + lane.channel;
            gate = channel_value(arguments.gate, 1.0f, of_image) * of_grad;
            pooled = channel_value(arguments.pooled, 0.0f, of_image) * of_grad;
        }
#pragma unroll
        for (int age = 0; age < open; ++age)
#pragma unroll
            for (int i = 0; i < grads; ++i) kept[age][i] = 0.0f;
        for (int step = 0; step < rows + before; ++step) {
            const int row = first + step - before, h = row * stride - size.top;
            shift();
            if (row >= 0 && row < size.out_height) {
                read(grad + grad_plane + row * size.out_width, a + grad_plane + row * size.out_width);
                if (arguments.db && (step >= before || first == tile.first_row)) add_bias();
            }
            if (step < before) continue;
            const int at = x_plane + h * size.width;
            const T* const residual = arguments.residual + of_x.begin;
            if (h >= 0 && h < size.height) meet<0>(x + at, residual + at);
            if (stride == 2 && h + 1 >= 0 && h + 1 < size.height)
                meet<stride - 1>(x + at + size.width, residual + at + size.width);
        }
    }

    // Leaves all sums in shared memory, [values][threads].
    __device__ inline void leave(float* shared) const {
        float* const to = shared + threadIdx.x;
        const int all = blockDim.x;
#pragma unroll
        for (int tap = 0; tap < taps; ++tap) to[tap * all] = dw[tap];
        to[taps * all] = db;
        to[(taps + 1) * all] = total;
        to[(taps + 2) * all] = moment;
    }
};

// Gradients of input, weight and bias. gridDim.x = slabs * walkers. Outputs that lie in padding alone have no pixel,
// but their share of the bias: steps go on until they are read.
template <class Traits>
__global__ __launch_bounds__(Traits::threads, Traits::blocks) void depthwise_planes_backward_kernel(
    const PlanesBackwardArguments<typename Traits::Element> arguments) {
    using T = typename Traits::Element;
    constexpr int stride = Traits::stride, before = Traits::open - 1, taps = Traits::taps;
    const DepthwiseSizes& size = arguments.size;
    const PlanesTile& tile = arguments.tile;
    const int slab = blockIdx.x % tile.slabs, walker = blockIdx.x / tile.slabs;
    const int first_channel = slab * tile.slab, planes = min(tile.slab, size.channels - first_channel);
    PlanesBackwardThread<Traits> thread(arguments, first_channel, planes);
    const bool has_a = Traits::fused && arguments.a != nullptr, whole = tile.strips == 1;
    const int all_rows = max((size.height + size.top + stride - 1) / stride, size.out_height) - tile.first_row;
    const int a_at = tile.y_elements, x_at = (has_a ? 2 : 1) * tile.y_elements;
    T* const places = shared_memory<T>();
    const auto place = [&](int slot) { return places + slot * (x_at + tile.x_elements); };
    const auto grads_of = [&](const PlanesItem& item) {
        return Stretch<T>(item.image * size.channels + first_channel, planes, whole ? 0 : item.row - before,
                          whole ? size.out_height : item.row + item.rows, size.out_height, size.out_width);
    };
    const auto x_of = [&](const PlanesItem& item) {
        const int top = item.row * stride - size.top;
        return Stretch<T>(item.image * size.channels + first_channel, planes, whole ? 0 : top,
                          whole ? size.height : top + item.rows * stride, size.height, size.width);
    };
    const auto copy = [&](int number, int slot) {
        if (number < tile.items) {
            const PlanesItem item(number, tile, all_rows);
            const Stretch<T> of_grad = grads_of(item);
            T* const to = place(slot);
            of_grad.bring(to, arguments.grad, arguments.y_elements);
            if (has_a) of_grad.bring(to + a_at, arguments.a, arguments.y_elements);
            if (arguments.x != nullptr) x_of(item).bring(to + x_at, arguments.x, arguments.x_elements);
        }
        copy_async_commit();
    };
    copy(walker, 0);
    int slot = 0;
    for (int number = walker; number < tile.items; number += tile.walkers) {
        copy_async_wait<0>();
        // Everybody's copies of this item are there, and of the last one all is done.
        __syncthreads();
        copy(number + tile.walkers, 1 - slot);
        const PlanesItem item(number, tile, all_rows);
        const Stretch<T> of_x = x_of(item);
        T* const mine = place(slot);
        thread.compute(item, mine, mine + a_at, grads_of(item), mine + x_at, of_x);
        __syncthreads();
        if (arguments.dx != nullptr) of_x.send(mine + x_at, arguments.dx);
        slot = 1 - slot;
    }
    // The last results are still being sent.
    __syncthreads();
    float* const sums = shared_memory<float>();
    thread.leave(sums);
    __syncthreads();
    const int each = tile.groups * tile.segments, rows = (arguments.dw ? taps : 0) + (arguments.db ? 1 : 0);
    float* const partials = arguments.partials + int64_t(walker) * rows * size.channels;
    for (int i = threadIdx.x; i < Traits::values * planes; i += blockDim.x) {
        const int value = i / planes, plane = i % planes, channel = first_channel + plane;
        float sum = 0.0f;
        for (int j = 0; j < each; ++j) sum += sums[value * blockDim.x + plane * each + j];
        if (value > taps) {
            if (arguments.sums != nullptr)
                arguments.sums[(int64_t(walker) * 2 + value - taps - 1) * size.channels + channel] = sum;
        } else if (value == taps ? arguments.db : arguments.dw) {
            partials[(arguments.dw ? value : 0) * size.channels + channel] = sum;
        }
    }
}

}  // namespace effnet::cuda
