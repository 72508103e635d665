// Chooses, cuts and launches the kernels for contiguous activations; instantiated once a dtype, in a source of its own.
//
// An item of a block is the whole planes of as many channels as its threads and its share of shared memory have room
// for, or else a strip of one plane. Of the numbers of channels, that is taken which loses least: to threads without
// work, to rows that two segments of a strip both read, to channels that the last slab lacks. Blocks are smaller where
// there would not be one for each multiprocessor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "depthwise_launch.h"
#include "depthwise_planes.cuh"
#include "planning.h"

namespace effnet::cuda {

// What the rule has to know. Rows and columns are the kernel's steps, `before` the steps that warm a segment up.
struct PlanesLimits {
    int64_t batch, channels, rows, columns;
    int before, thread_columns, threads, blocks;  // of the kernel's traits
};

// Without threads where not even one row fits.
using CutPlanes = Cut<PlanesTile>;

// The places that an item of `slab` channels and `rows` steps takes; `whole` planes have all of their rows.
struct PlanesPlaces {
    int64_t x_rows, y_rows;  // where not whole, for so many steps
    int64_t height, width, out_height, out_width, chunk;

    void fill(PlanesTile& tile) const {
        const bool whole = tile.strips == 1;
        // A stretch begins up to chunk - 1 elements behind a multiple of 16 bytes. What is much too large stays an int.
        const auto elements = [&](int64_t rows, int64_t columns) {
            return int(std::min<int64_t>(round_up(tile.slab * rows * columns + chunk - 1, chunk), 1 << 24));
        };
        tile.x_elements = elements(whole ? height : std::min(x_rows, height), width);
        tile.y_elements = elements(whole ? out_height : std::min(y_rows, out_height), out_width);
    }
};

namespace detail {

// The part of what a block's threads could do that is of use.
inline double usefulness(const PlanesLimits& limits, const PlanesTile& tile, int threads) {
    const double planes = double(limits.channels) / (double(tile.slabs) * tile.slab);
    const double lanes = double(tile.slab) * tile.groups * tile.segments / threads;
    const double steps = tile.segments * (tile.segment_rows + 0.5 * limits.before);
    return planes * lanes * tile.strip_rows / steps * std::min(1.0, threads / 96.0);
}

}  // namespace detail

// places_of(rows): the places of so many steps. shared_bytes(x_elements, y_elements, threads): what a block needs.
template <class Places, class SharedBytes>
CutPlanes choose_planes(const PlanesLimits& limits, int64_t most_threads, int64_t most_shared, const Places& places_of,
                        const SharedBytes& shared_bytes) {
    const int64_t groups = ceil_div(limits.columns, limits.thread_columns);
    CutPlanes best{};
    if (groups > most_threads) return best;
    double best_score = -1;
    const auto consider = [&](int64_t slab, int64_t strips) {
        CutPlanes found{};
        PlanesTile& tile = found.tile;
        tile.slab = int(slab), tile.slabs = int(ceil_div(limits.channels, slab)), tile.groups = int(groups);
        tile.strip_rows = int(ceil_div(limits.rows, strips)), tile.strips = int(ceil_div(limits.rows, tile.strip_rows));
        const int64_t shortest = std::max(4, 2 * limits.before);
        const int64_t segments =
            std::clamp<int64_t>(most_threads / (groups * slab), 1, ceil_div(tile.strip_rows, shortest));
        tile.segment_rows = int(ceil_div(tile.strip_rows, segments));
        tile.segments = int(ceil_div(tile.strip_rows, tile.segment_rows));
        found.threads = int(round_up(slab * groups * tile.segments, 32));
        places_of(tile.strip_rows).fill(tile);
        const int64_t bytes = shared_bytes(tile.x_elements, tile.y_elements, found.threads);
        if (bytes > most_shared) return false;
        found.shared_bytes = int(bytes);
        const double score = detail::usefulness(limits, tile, found.threads);
        if (score >= best_score) best = found, best_score = score;
        return true;
    };
    for (int64_t strips = 1; !consider(1, strips); ++strips)
        if (strips >= limits.rows) return best;
    if (best.tile.strips > 1) return best;
    for (int64_t slab = 2; slab <= std::min(limits.channels, most_threads / groups); ++slab) {
        const bool even = ceil_div(limits.channels, ceil_div(limits.channels, slab)) == slab;
        if (even && !consider(slab, 1)) break;
    }
    return best;
}

// The cut of a whole problem.
template <class Places, class SharedBytes>
CutPlanes cut_planes(const PlanesLimits& limits, const Device& device, const Places& places_of,
                     const SharedBytes& shared_bytes) {
    const int64_t share = (device.max_shared_bytes + 1024) / limits.blocks - 1024, half = device.max_shared_bytes / 2;
    CutPlanes found = choose_planes(limits, limits.threads, share, places_of, shared_bytes);
    if (found.threads == 0) found = choose_planes(limits, limits.threads, half, places_of, shared_bytes);
    if (found.threads == 0) return found;
    PlanesTile& tile = found.tile;
    const auto blocks = [&] { return limits.batch * tile.strips * tile.slabs; };
    for (int threads = limits.threads / 2; threads >= 32 && blocks() < device.multiprocessors; threads /= 2) {
        const CutPlanes smaller =
            choose_planes(limits, threads, share * threads / limits.threads, places_of, shared_bytes);
        if (smaller.threads == 0) break;
        found = smaller;
    }
    tile.items = int(limits.batch * tile.strips);
    const int64_t by_registers = int64_t(limits.threads) * limits.blocks / found.threads;
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (found.shared_bytes + 1024);
    const int64_t resident =
        device.multiprocessors * std::max<int64_t>(1, std::min<int64_t>({by_registers, by_shared, 32}));
    const int64_t most = std::clamp<int64_t>(resident / tile.slabs, 1, tile.items);
    tile.walkers = int(ceil_div(tile.items, ceil_div(tile.items, most)));
    found.blocks = int64_t(tile.slabs) * tile.walkers;
    return found;
}

// Rows of a plane that all strips together read: each `rows` of them from `step` times its number, less `before`, on.
inline int64_t rows_read(const PlanesTile& tile, int64_t step, int64_t rows, int64_t before, int64_t height) {
    if (tile.strips == 1) return height;
    int64_t sum = 0;
    for (int64_t i = 0; i < tile.strips; ++i) {
        const int64_t first = i * step - before;
        sum += std::max<int64_t>(0, std::min(first + rows, height) - std::max<int64_t>(first, 0));
    }
    return sum;
}

inline PlanesWork work_of(const DepthwiseShape& shape, const PlanesTile& tile) {
    const int64_t planes = shape.batch * shape.channels;
    return {sizes_of(shape), tile, planes * shape.height * shape.width, planes * shape.out_height * shape.out_width};
}

inline constexpr const char* row_is_too_wide = "a row of contiguous images is too wide";

template <class T>
struct PlanesForwardKernels : DepthwiseForwardSums<PlanesTile> {
    using Element = T;
    static constexpr const char* does_not_fit = row_is_too_wide;

    template <class F>
    static auto with_traits(const DepthwiseForward& problem, const F& f) {
        const bool fused = problem.norm || problem.gate || problem.out_norm || problem.pool || problem.statistics ||
                           problem.activation != Activation::none;
        return with_window(problem.shape, [&](auto kernel, auto stride) {
            constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
            if (fused) return f(PlanesForwardTraits<T, k, s, true>());
            return f(PlanesForwardTraits<T, k, s, false>());
        });
    }

    template <class Traits>
    static CutPlanes cut(const DepthwiseForward& problem, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const PlanesLimits limits{shape.batch,      shape.channels,  shape.out_height, shape.out_width,
                                  Traits::open - 1, Traits::columns, Traits::threads,  Traits::blocks};
        const auto places_of = [&](int64_t rows) {
            return PlanesPlaces{(rows - 1) * Traits::stride + Traits::kernel,
                                rows,
                                shape.height,
                                shape.width,
                                shape.out_height,
                                shape.out_width,
                                Stretch<T>::chunk};
        };
        const bool sums = problem.pool != nullptr || problem.statistics != nullptr;
        return cut_planes(limits, device, places_of, [&](int x_elements, int y_elements, int threads) {
            return Traits::shared_bytes(x_elements, y_elements, threads, problem.grad != nullptr, sums);
        });
    }

    static int64_t parts(const PlanesTile& tile) { return tile.strips; }

    template <class Traits>
    static int64_t read_elements(const DepthwiseForward& problem, const PlanesTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int64_t stride = Traits::stride;
        const int64_t steps = tile.strip_rows, rows = (steps - 1) * stride + Traits::kernel;
        const int64_t pixels = shape.width * rows_read(tile, steps * stride, rows, shape.pad_top, shape.height);
        const int64_t grads = problem.grad == nullptr ? 0 : shape.out_height * shape.out_width;
        return (pixels + grads) * shape.batch * shape.channels;
    }

    template <class Traits>
    static cudaError_t launch(const DepthwiseForward& problem, const CutPlanes& cut, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const PlanesForwardArguments<T> arguments{{work_of(shape, cut.tile), static_cast<const T*>(problem.x)},
                                                  typed<T>(problem)};
        return launch_cut<depthwise_planes_forward_kernel<Traits>>(cut, device, arguments);
    }
};

template <class T>
struct PlanesBackwardKernels : DepthwiseBackwardSums<PlanesTile> {
    using Element = T;
    static constexpr const char* does_not_fit = row_is_too_wide;

    template <class F>
    static auto with_traits(const DepthwiseBackward& problem, const F& f) {
        const bool fused =
            problem.a || problem.norm || problem.residual || problem.sums || problem.activation != Activation::none;
        return with_window(problem.shape, [&](auto kernel, auto stride) {
            constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
            if (fused) return f(PlanesBackwardTraits<T, k, s, true>());
            return f(PlanesBackwardTraits<T, k, s, false>());
        });
    }

    template <class Traits>
    static CutPlanes cut(const DepthwiseBackward& problem, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int before = Traits::open - 1;
        const BackwardSteps steps = backward_steps(shape, Traits::reach);
        const PlanesLimits limits{shape.batch, shape.channels,  steps.rows,      steps.columns,
                                  before,      Traits::columns, Traits::threads, Traits::blocks};
        const auto places_of = [&](int64_t rows) {
            return PlanesPlaces{rows * Traits::stride, rows + before,   shape.height,     shape.width,
                                shape.out_height,      shape.out_width, Stretch<T>::chunk};
        };
        CutPlanes found = cut_planes(limits, device, places_of, [&](int x_elements, int y_elements, int threads) {
            return Traits::shared_bytes(x_elements, y_elements, threads, problem.a != nullptr);
        });
        found.tile.first_row = steps.first_row;
        found.tile.first_column = steps.first_column;
        return found;
    }

    template <class Traits>
    static int64_t read_elements(const DepthwiseBackward& problem, const PlanesTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int64_t stride = Traits::stride, before = Traits::open - 1;
        const int64_t steps = tile.strip_rows, top = shape.pad_top - tile.first_row * stride;
        const int64_t grads =
            shape.out_width * rows_read(tile, steps, steps + before, before - tile.first_row, shape.out_height);
        const int64_t pixels = shape.width * rows_read(tile, steps * stride, steps * stride, top, shape.height);
        const int64_t read =
            grads * (problem.a == nullptr ? 1 : 2) + pixels * ((problem.x != nullptr) + (problem.residual != nullptr));
        return read * shape.batch * shape.channels;
    }

    template <class Traits>
    static cudaError_t launch(const DepthwiseBackward& problem, const CutPlanes& cut, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const PlanesBackwardSources<T> sources{work_of(shape, cut.tile), static_cast<const T*>(problem.grad),
                                               static_cast<const T*>(problem.a), static_cast<const T*>(problem.x)};
        const PlanesBackwardSums sums{static_cast<float*>(problem.workspace), problem.sums, problem.dw != nullptr,
                                      problem.db != nullptr};
        const PlanesBackwardArguments<T> arguments{sources, typed<T>(problem), sums};
        const cudaError_t error = launch_cut<depthwise_planes_backward_kernel<Traits>>(cut, device, arguments);
        return PlanesBackwardKernels::finish(error, problem, cut.tile, device);
    }
};

}  // namespace effnet::cuda
