// Squeeze-and-excitation, forward and backward, one launch each.
//
// A launch is a few phases over (images, pixels, C): sums over pixels, the two small products and the gate, the scaled
// tensor, and backward the products over images for the weights. Between phases the blocks of a team meet. A team is
// one block that takes whole images, where there are enough of them, else the whole grid, launched cooperatively.
#pragma once

#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

#include "kernels.h"
#include "types.cuh"

namespace effnet::cuda {

struct SqueezeExciteTraits {
    static constexpr int threads = 256, blocks = 3;
    static constexpr int images = 4;  // share one reading of the weights, where there are that many
    static constexpr int lanes = 8;   // threads that share a row of the expanding weight
    static constexpr int tile = 32;   // channels, reduced channels and images of a tile of the weights' gradients

    static constexpr int sums_floats(int width) { return threads * width; }
    static constexpr int forward_floats(int images, int channels, int reduced) { return images * (channels + reduced); }
    static constexpr int backward_floats(int images, int channels, int reduced) {
        return images * (2 * channels + 3 * reduced + threads);
    }
    static constexpr int weights_floats = 4 * tile * (tile + 1);
};

// The blocks that meet between phases; `counter` is null where a block is a team of its own.
struct Team {
    int rank, size;
    unsigned* counter;
    unsigned meetings;

    __device__ inline void meet() {
        if (counter == nullptr)
            __syncthreads();
        else
            grid_barrier(counter, ++meetings * gridDim.x);
    }
};

// Sums over pixels: of x through norm and activation, or of x * other.
template <class T>
struct Pool {
    const T *x, *other;
    const float* norm;
    Activation activation;
};

// How a block's threads lie over the pixels and channels of a tensor, `width` channels a thread.
template <int width>
struct Field {
    int vectors, across, rows, row, vector;

    __device__ inline explicit Field(int channels) {
        vectors = channels / width;
        across = min(vectors, static_cast<int>(blockDim.x));
        rows = blockDim.x / across;
        row = threadIdx.x / across;
        vector = threadIdx.x % across;
    }
};

// to[c] = the sum over pixels [first, last) of an image.
template <int width, class T>
__device__ inline void sum_pixels(const Pool<T>& pool, int64_t image_offset, int first, int last, int channels,
                                  float* to, float* shared) {
    const Field<width> field(channels);
    for (int begin = 0; begin < field.vectors; begin += field.across) {
        const int c = (begin + field.vector) * width;
        const bool works = field.row < field.rows && begin + field.vector < field.vectors;
        float sum[width] = {};
        if (works) {
            float mean[width], scale[width], shift[width];
            if (pool.norm != nullptr) {
#pragma unroll
                for (int v = 0; v < width; ++v) {
                    mean[v] = __ldg(pool.norm + c + v);
                    scale[v] = __ldg(pool.norm + channels + c + v);
                    shift[v] = __ldg(pool.norm + 2 * channels + c + v);
                }
            }
#pragma unroll 4
            for (int p = first + field.row; p < last; p += field.rows) {
                const int64_t at = image_offset + int64_t(p) * channels + c;
                float x[width];
                load(pool.x + at, x);
                if (pool.norm != nullptr) {
#pragma unroll
                    for (int v = 0; v < width; ++v) x[v] = fmaf(x[v] - mean[v], scale[v], shift[v]);
                    activate<coarse<T>>(x, pool.activation);
                }
                if (pool.other != nullptr) {
                    float other[width];
                    load(pool.other + at, other);
#pragma unroll
                    for (int v = 0; v < width; ++v) x[v] *= other[v];
                }
#pragma unroll
                for (int v = 0; v < width; ++v) sum[v] += x[v];
            }
#pragma unroll
            for (int v = 0; v < width; ++v) shared[(field.row * field.across + field.vector) * width + v] = sum[v];
        }
        __syncthreads();
        const int slab = min(field.across, field.vectors - begin) * width;
        for (int i = threadIdx.x; i < slab; i += blockDim.x) {
            float all = 0.0f;
            for (int row = 0; row < field.rows; ++row) all += shared[row * field.across * width + i];
            to[begin * width + i] = all;
        }
        __syncthreads();
    }
}

// y = x * gate + shift over pixels [first, last) of an image.
template <int width, class T>
__device__ inline void scale_pixels(const T* x, const float* gate, const float* shift, T* y, int64_t image_offset,
                                    int first, int last, int channels) {
    const Field<width> field(channels);
    if (field.row >= field.rows) return;
    for (int vector = field.vector; vector < field.vectors; vector += field.across) {
        const int c = vector * width;
        float by[width], more[width];
#pragma unroll
        for (int v = 0; v < width; ++v) {
            by[v] = gate[c + v];
            more[v] = shift == nullptr ? 0.0f : shift[c + v];
        }
#pragma unroll 4
        for (int p = first + field.row; p < last; p += field.rows) {
            const int64_t at = image_offset + int64_t(p) * channels + c;
            float value[width];
            load(x + at, value);
#pragma unroll
            for (int v = 0; v < width; ++v) value[v] = fmaf(value[v], by[v], more[v]);
            store(y + at, value);
        }
    }
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// sum over the parts of sums (images, parts, rows, channels) at [image][.][row][c].
__device__ inline float sum_parts(const float* sums, int64_t image, int64_t parts, int rows, int row, int channels,
                                  int c) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < parts; ++part) sum += sums[((image * parts + part) * rows + row) * channels + c];
    return sum;
}

// reduced[i][r] = reduce_weight[r] . pooled[i] + bias; a warp takes one r at a time. Shared: pooled (images, C).
template <int images>
__device__ inline void reduce(const SqueezeExcite& layer, const float* pooled, float* reduced) {
    const int channels = int(layer.channels), width = int(layer.reduced), lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < width; r += blockDim.x / 32) {
        float sum[images] = {};
        for (int c = lane; c < channels; c += 32) {
            const float weight = __ldg(layer.reduce_weight + int64_t(r) * channels + c);
#pragma unroll
            for (int i = 0; i < images; ++i) sum[i] = fmaf(weight, pooled[i * channels + c], sum[i]);
        }
        const float bias = layer.reduce_bias == nullptr ? 0.0f : __ldg(layer.reduce_bias + r);
#pragma unroll
        for (int i = 0; i < images; ++i) {
            const float all = sum_of_warp(sum[i]);
            if (lane == 0) reduced[i * width + r] = all + bias;
        }
    }
}

// f(c, q) for channels [first, last), q[i] = expand_weight[c] . hidden[i] + bias; some lanes share a row of the weight,
// so that what a warp reads at once are whole sectors. Shared: hidden (images, R).
template <int images, class F>
__device__ inline void expand(const SqueezeExcite& layer, const float* hidden, int first, int last, const F& f) {
    constexpr int lanes = SqueezeExciteTraits::lanes;
    const int width = int(layer.reduced), lane = threadIdx.x % lanes, step = blockDim.x / lanes;
    const int rounds = (last - first + step - 1) / step;
    for (int round = 0; round < rounds; ++round) {
        const int c = first + round * step + threadIdx.x / lanes;
        float sum[images] = {};
        if (c < last)
            for (int r = lane; r < width; r += lanes) {
                const float weight = __ldg(layer.expand_weight + int64_t(c) * width + r);
#pragma unroll
                for (int i = 0; i < images; ++i) sum[i] = fmaf(weight, hidden[i * width + r], sum[i]);
            }
#pragma unroll
        for (int i = 0; i < images; ++i)
#pragma unroll
            for (int distance = lanes / 2; distance > 0; distance /= 2)
                sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
        if (c < last && lane == 0) {
            const float bias = layer.expand_bias == nullptr ? 0.0f : __ldg(layer.expand_bias + c);
#pragma unroll
            for (int i = 0; i < images; ++i) sum[i] += bias;
            f(c, sum);
        }
    }
}

struct GateForward {
    SqueezeExcite layer;
    const float* sums;  // (images, parts, C)
    int64_t parts;
    int slices;
    float *pooled, *gates;
};

// Pooled and gates of `images` images from `first` on, those channels of the gates that are in the slice. Each slice
// reduces again, so that a single image is more than one block.
template <int images>
__device__ inline void gate_forward(const GateForward& work, int64_t first, int slice, float* shared) {
    const SqueezeExcite& layer = work.layer;
    const int channels = int(layer.channels), width = int(layer.reduced);
    float *const pooled = shared, *const hidden = shared + images * channels;
    for (int at = threadIdx.x; at < images * channels; at += blockDim.x) {
        const int64_t image = first + at / channels;
        const int c = at % channels;
        const bool exists = image < layer.images;
        pooled[at] = exists ? sum_parts(work.sums, image, work.parts, 1, 0, channels, c) / layer.pixels : 0.0f;
        if (exists && slice == 0 && work.pooled != nullptr) work.pooled[image * channels + c] = pooled[at];
    }
    __syncthreads();
    reduce<images>(layer, pooled, hidden);
    __syncthreads();
    for (int at = threadIdx.x; at < images * width; at += blockDim.x) {
        float value[1] = {hidden[at]};
        activate<false>(value, layer.activation);
        hidden[at] = value[0];
    }
    __syncthreads();
    if (work.gates != nullptr) {
        const int share = (channels + work.slices - 1) / work.slices;
        const int begin = min(channels, slice * share), end = min(channels, begin + share);
        expand<images>(layer, hidden, begin, end, [&](int c, const float (&q)[images]) {
#pragma unroll
            for (int i = 0; i < images; ++i)
                if (first + i < layer.images) work.gates[(first + i) * channels + c] = gate_of(q[i], layer.gate);
        });
    }
    __syncthreads();
}

template <class T>
struct SqueezeExciteForwardArguments {
    GateForward gate;
    Pool<T> pool;
    float* sums;  // the same as gate.sums where this launch makes them
    T* y;
    unsigned* counter;
    int images_a_block;  // 1 or SqueezeExciteTraits::images
    bool alone;          // a block is a team, and takes whole images
};

template <class T, bool chunks>
__global__ __launch_bounds__(
    SqueezeExciteTraits::threads,
    SqueezeExciteTraits::blocks) void squeeze_excite_forward_kernel(const SqueezeExciteForwardArguments<T> arguments) {
    constexpr int width = chunks ? 16 / sizeof(T) : 1;
    const GateForward& gate = arguments.gate;
    const SqueezeExcite& layer = gate.layer;
    float* const shared = shared_memory<float>();
    const int channels = int(layer.channels), pixels = int(layer.pixels), parts = int(gate.parts);
    const bool alone = arguments.alone;
    Team team{alone ? 0 : int(blockIdx.x), alone ? 1 : int(gridDim.x), arguments.counter, 0};
    const int64_t at_once = alone ? 1 : layer.images;
    for (int64_t image = alone ? blockIdx.x : 0; image < layer.images; image += alone ? gridDim.x : layer.images) {
        const auto for_parts = [&](const auto& f) {
            for (int64_t item = team.rank; item < at_once * parts; item += team.size) {
                const int64_t i = image + item / parts, part = item % parts;
                f(i, i * pixels * channels, int(part * pixels / parts), int((part + 1) * pixels / parts),
                  i * parts + part);
            }
        };
        if (arguments.pool.x != nullptr) {
            for_parts([&](int64_t, int64_t offset, int first, int last, int64_t place) {
                sum_pixels<width>(arguments.pool, offset, first, last, channels, arguments.sums + place * channels,
                                  shared);
            });
            team.meet();
        }
        const int64_t each = arguments.images_a_block, chunked = (at_once + each - 1) / each;
        for (int64_t item = team.rank; item < chunked * gate.slices; item += team.size) {
            const int64_t first = image + item / gate.slices * each;
            if (each == 1)
                gate_forward<1>(gate, first, int(item % gate.slices), shared);
            else
                gate_forward<SqueezeExciteTraits::images>(gate, first, int(item % gate.slices), shared);
        }
        if (arguments.y == nullptr) continue;
        team.meet();
        for_parts([&](int64_t i, int64_t offset, int first, int last, int64_t) {
            scale_pixels<width>(arguments.pool.x, gate.gates + i * channels, static_cast<const float*>(nullptr),
                                arguments.y, offset, first, last, channels);
        });
    }
}

struct GateBackward {
    SqueezeExcite layer;
    const float* sums;  // (images, parts, rows, C)
    int64_t parts;
    int rows;
    const float* pooled;
    float *expanded_grad, *reduced_grad, *hidden;  // (images, C), (images, R), (images, R)
    float *gates, *pooled_grad, *partials;
};

// hidden_grad[i][r] = sum over c of expand_weight[c][r] * expanded_grad[i][c]. Shared: expanded_grad (images, C).
template <int images>
__device__ inline void expand_backward(const SqueezeExcite& layer, const float* expanded_grad, float* hidden_grad,
                                       float* scratch) {
    const int channels = int(layer.channels), width = int(layer.reduced);
    const int across = min(width, static_cast<int>(blockDim.x)), groups = blockDim.x / across;
    const int group = threadIdx.x / across;
    for (int begin = 0; begin < width; begin += across) {
        const int r = begin + threadIdx.x % across;
        float sum[images] = {};
        if (group < groups && r < width)
            for (int c = group; c < channels; c += groups) {
                const float weight = __ldg(layer.expand_weight + int64_t(c) * width + r);
#pragma unroll
                for (int i = 0; i < images; ++i) sum[i] = fmaf(weight, expanded_grad[i * channels + c], sum[i]);
            }
#pragma unroll
        for (int i = 0; i < images; ++i) scratch[i * blockDim.x + threadIdx.x] = sum[i];
        __syncthreads();
        const int here = min(across, width - begin);
        for (int at = threadIdx.x; at < images * here; at += blockDim.x) {
            float all = 0.0f;
            for (int g = 0; g < groups; ++g) all += scratch[at / here * blockDim.x + g * across + at % here];
            hidden_grad[at / here * width + begin + at % here] = all;
        }
        __syncthreads();
    }
}

// Step B3 of docs/mbconv.md for `images` images from `first` on, but for the sums over images that the weights need.
template <int images>
__device__ inline void gate_backward(const GateBackward& work, int64_t first, float* shared) {
    const SqueezeExcite& layer = work.layer;
    const int channels = int(layer.channels), width = int(layer.reduced);
    float *const pooled = shared, *const expanded_grad = pooled + images * channels;
    float *const reduced = expanded_grad + images * channels, *const hidden = reduced + images * width;
    float *const hidden_grad = hidden + images * width, *const scratch = hidden_grad + images * width;
    for (int at = threadIdx.x; at < images * channels; at += blockDim.x) {
        const bool exists = first + at / channels < layer.images;
        pooled[at] = exists ? work.pooled[first * channels + at] : 0.0f;
    }
    __syncthreads();
    reduce<images>(layer, pooled, reduced);
    __syncthreads();
    for (int at = threadIdx.x; at < images * width; at += blockDim.x) {
        float value[1] = {reduced[at]}, derivative[1];
        differentiate<false>(value, derivative, layer.activation);
        hidden[at] = value[0];
        reduced[at] = derivative[0];
        if (first + at / width < layer.images) work.hidden[first * width + at] = value[0];
    }
    __syncthreads();
    expand<images>(layer, hidden, 0, channels, [&](int c, const float (&q)[images]) {
#pragma unroll
        for (int i = 0; i < images; ++i) {
            const int64_t image = first + i;
            float grad = 0.0f;
            if (image < layer.images) {
                const float sum = sum_parts(work.sums, image, work.parts, work.rows, 0, channels, c);
                grad = sum * gate_derivative(q[i], layer.gate);
                work.expanded_grad[image * channels + c] = grad;
                work.gates[image * channels + c] = gate_of(q[i], layer.gate);
            }
            expanded_grad[i * channels + c] = grad;
        }
    });
    __syncthreads();
    expand_backward<images>(layer, expanded_grad, hidden_grad, scratch);
    for (int at = threadIdx.x; at < images * width; at += blockDim.x) {
        reduced[at] *= hidden_grad[at];
        if (first + at / width < layer.images) work.reduced_grad[first * width + at] = reduced[at];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        float sum[images] = {};
        for (int r = 0; r < width; ++r) {
            const float weight = __ldg(layer.reduce_weight + int64_t(r) * channels + c);
#pragma unroll
            for (int i = 0; i < images; ++i) sum[i] = fmaf(weight, reduced[i * width + r], sum[i]);
        }
#pragma unroll
        for (int i = 0; i < images; ++i) {
            const int64_t image = first + i;
            if (image >= layer.images) continue;
            const float pooled_grad = sum[i] / layer.pixels;
            work.pooled_grad[image * channels + c] = pooled_grad;
            if (work.partials == nullptr) continue;
            const float gate = work.gates[image * channels + c];
            const auto of = [&](int row) {
                return sum_parts(work.sums, image, work.parts, work.rows, row, channels, c);
            };
            work.partials[2 * image * channels + c] = fmaf(gate, of(1), pooled_grad * of(2));
            work.partials[(2 * image + 1) * channels + c] = fmaf(gate, of(3), pooled_grad * of(4));
        }
    }
    __syncthreads();
}

struct WeightGradients {
    float *reduce_weight, *reduce_bias, *expand_weight, *expand_bias;
};

// The gradients of both weights in a tile of channels and reduced channels, and of the biases: products over the
// images.
__device__ inline void weight_gradients(const GateBackward& work, const WeightGradients& to, int tile_c, int tile_r,
                                        float* shared) {
    constexpr int tile = SqueezeExciteTraits::tile, pitch = tile + 1, warps = SqueezeExciteTraits::threads / 32;
    constexpr int each = tile / warps;
    const int channels = int(work.layer.channels), width = int(work.layer.reduced);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = tile_c * tile + lane;
    float *const expanded_grad = shared, *const pooled = shared + tile * pitch;
    float *const hidden = pooled + tile * pitch, *const reduced_grad = hidden + tile * pitch;
    float expand_sum[each] = {}, reduce_sum[each] = {}, expand_bias = 0.0f, reduce_bias = 0.0f;
    for (int64_t first = 0; first < work.layer.images; first += tile) {
        for (int i = warp; i < tile; i += warps) {
            const int64_t image = first + i;
            const int r = tile_r * tile + lane;
            const bool has_c = image < work.layer.images && c < channels,
                       has_r = image < work.layer.images && r < width;
            expanded_grad[i * pitch + lane] = has_c ? work.expanded_grad[image * channels + c] : 0.0f;
            pooled[i * pitch + lane] = has_c ? work.pooled[image * channels + c] : 0.0f;
            hidden[i * pitch + lane] = has_r ? work.hidden[image * width + r] : 0.0f;
            reduced_grad[i * pitch + lane] = has_r ? work.reduced_grad[image * width + r] : 0.0f;
        }
        __syncthreads();
        for (int i = 0; i < tile; ++i) {
            const float grad = expanded_grad[i * pitch + lane], mean = pooled[i * pitch + lane];
#pragma unroll
            for (int j = 0; j < each; ++j) {
                expand_sum[j] = fmaf(grad, hidden[i * pitch + warp * each + j], expand_sum[j]);
                reduce_sum[j] = fmaf(mean, reduced_grad[i * pitch + warp * each + j], reduce_sum[j]);
            }
            if (warp == 0) {
                expand_bias += grad;
                reduce_bias += reduced_grad[i * pitch + lane];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
        const int r = tile_r * tile + warp * each + j;
        if (c >= channels || r >= width) continue;
        if (to.expand_weight != nullptr) to.expand_weight[int64_t(c) * width + r] = expand_sum[j];
        if (to.reduce_weight != nullptr) to.reduce_weight[int64_t(r) * channels + c] = reduce_sum[j];
    }
    if (warp != 0) return;
    if (to.expand_bias != nullptr && tile_r == 0 && c < channels) to.expand_bias[c] = expand_bias;
    const int r = tile_r * tile + lane;
    if (to.reduce_bias != nullptr && tile_c == 0 && r < width) to.reduce_bias[r] = reduce_bias;
}

template <class T>
struct SqueezeExciteBackwardArguments {
    GateBackward gate;
    Pool<T> pool;
    float* sums;
    T* dx;
    WeightGradients weights;
    unsigned* counter;
    int images_a_block;
};

template <class T, bool chunks>
__global__
__launch_bounds__(SqueezeExciteTraits::threads, SqueezeExciteTraits::blocks) void squeeze_excite_backward_kernel(
    const SqueezeExciteBackwardArguments<T> arguments) {
    constexpr int width = chunks ? 16 / sizeof(T) : 1, tile = SqueezeExciteTraits::tile;
    const GateBackward& gate = arguments.gate;
    const SqueezeExcite& layer = gate.layer;
    float* const shared = shared_memory<float>();
    const int channels = int(layer.channels), pixels = int(layer.pixels), parts = int(gate.parts);
    Team team{int(blockIdx.x), int(gridDim.x), arguments.counter, 0};
    const auto for_parts = [&](const auto& f) {
        for (int64_t item = team.rank; item < layer.images * parts; item += team.size) {
            const int64_t image = item / parts, part = item % parts;
            f(image, image * pixels * channels, int(part * pixels / parts), int((part + 1) * pixels / parts), item);
        }
    };
    if (arguments.pool.x != nullptr) {
        for_parts([&](int64_t, int64_t offset, int first, int last, int64_t place) {
            sum_pixels<width>(arguments.pool, offset, first, last, channels, arguments.sums + place * channels, shared);
        });
        team.meet();
    }
    const int64_t each = arguments.images_a_block, chunked = (layer.images + each - 1) / each;
    for (int64_t item = team.rank; item < chunked; item += team.size) {
        if (each == 1)
            gate_backward<1>(gate, item, shared);
        else
            gate_backward<SqueezeExciteTraits::images>(gate, item * each, shared);
    }
    team.meet();
    const WeightGradients& to = arguments.weights;
    if (to.reduce_weight != nullptr || to.reduce_bias != nullptr || to.expand_weight != nullptr ||
        to.expand_bias != nullptr) {
        const int across = (int(layer.reduced) + tile - 1) / tile, items = (channels + tile - 1) / tile * across;
        for (int item = team.rank; item < items; item += team.size)
            weight_gradients(gate, to, item / across, item % across, shared);
    }
    if (arguments.dx == nullptr) return;
    for_parts([&](int64_t image, int64_t offset, int first, int last, int64_t) {
        scale_pixels<width>(arguments.pool.x, gate.gates + image * channels, gate.pooled_grad + image * channels,
                            arguments.dx, offset, first, last, channels);
    });
}

}  // namespace effnet::cuda
