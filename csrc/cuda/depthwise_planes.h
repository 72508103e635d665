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

namespace effnet::cuda {

// What the rule has to know. Rows and columns are the kernel's steps, `before` the steps that warm a segment up.
struct PlanesCut {
    int64_t batch, channels, rows, columns;
    int before, thread_columns, threads, blocks;  // of the kernel's traits
};

// Without threads where not even one row fits.
struct CutPlanes {
    PlanesTile tile;
    int threads, shared_bytes;
};

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
inline double usefulness(const PlanesCut& cut, const PlanesTile& tile, int threads) {
    const double planes = double(cut.channels) / (double(tile.slabs) * tile.slab);
    const double lanes = double(tile.slab) * tile.groups * tile.segments / threads;
    const double steps = tile.segments * (tile.segment_rows + 0.5 * cut.before);
    return planes * lanes * tile.strip_rows / steps * std::min(1.0, threads / 96.0);
}

}  // namespace detail

// places_of(rows): the places of so many steps. shared_bytes(x_elements, y_elements, threads): what a block needs.
template <class Places, class SharedBytes>
CutPlanes choose_planes(const PlanesCut& cut, int64_t most_threads, int64_t most_shared, const Places& places_of,
                        const SharedBytes& shared_bytes) {
    const int64_t groups = ceil_div(cut.columns, cut.thread_columns);
    CutPlanes best{};
    if (groups > most_threads) return best;
    double best_score = -1;
    const auto consider = [&](int64_t slab, int64_t strips) {
        CutPlanes found{};
        PlanesTile& tile = found.tile;
        tile.slab = int(slab), tile.slabs = int(ceil_div(cut.channels, slab)), tile.groups = int(groups);
        tile.strip_rows = int(ceil_div(cut.rows, strips)), tile.strips = int(ceil_div(cut.rows, tile.strip_rows));
        const int64_t shortest = std::max(4, 2 * cut.before);
        const int64_t segments =
            std::clamp<int64_t>(most_threads / (groups * slab), 1, ceil_div(tile.strip_rows, shortest));
        tile.segment_rows = int(ceil_div(tile.strip_rows, segments));
        tile.segments = int(ceil_div(tile.strip_rows, tile.segment_rows));
        found.threads = int(round_up(slab * groups * tile.segments, 32));
        places_of(tile.strip_rows).fill(tile);
        const int64_t bytes = shared_bytes(tile.x_elements, tile.y_elements, found.threads);
        if (bytes > most_shared) return false;
        found.shared_bytes = int(bytes);
        const double score = detail::usefulness(cut, tile, found.threads);
        if (score >= best_score) best = found, best_score = score;
        return true;
    };
    for (int64_t strips = 1; !consider(1, strips); ++strips)
        if (strips >= cut.rows) return best;
    if (best.tile.strips > 1) return best;
    for (int64_t slab = 2; slab <= std::min(cut.channels, most_threads / groups); ++slab) {
        const bool even = ceil_div(cut.channels, ceil_div(cut.channels, slab)) == slab;
        if (even && !consider(slab, 1)) break;
    }
    return best;
}

// The cut of a whole problem.
template <class Places, class SharedBytes>
CutPlanes cut_planes(const PlanesCut& cut, const Device& device, const Places& places_of,
                     const SharedBytes& shared_bytes) {
    const int64_t share = (device.max_shared_bytes + 1024) / cut.blocks - 1024, half = device.max_shared_bytes / 2;
    CutPlanes found = choose_planes(cut, cut.threads, share, places_of, shared_bytes);
    if (found.threads == 0) found = choose_planes(cut, cut.threads, half, places_of, shared_bytes);
    if (found.threads == 0) return found;
    PlanesTile& tile = found.tile;
    const auto blocks = [&] { return cut.batch * tile.strips * tile.slabs; };
    for (int threads = cut.threads / 2; threads >= 32 && blocks() < device.multiprocessors; threads /= 2) {
        const CutPlanes smaller = choose_planes(cut, threads, share * threads / cut.threads, places_of, shared_bytes);
        if (smaller.threads == 0) break;
        found = smaller;
    }
    tile.items = int(cut.batch * tile.strips);
    const int64_t by_registers = int64_t(cut.threads) * cut.blocks / found.threads;
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (found.shared_bytes + 1024);
    const int64_t resident =
        device.multiprocessors * std::max<int64_t>(1, std::min<int64_t>({by_registers, by_shared, 32}));
    const int64_t most = std::clamp<int64_t>(resident / tile.slabs, 1, tile.items);
    tile.walkers = int(ceil_div(tile.items, ceil_div(tile.items, most)));
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

// Calls f with the traits of the kernel that runs this.
template <class T, class F>
auto with_planes_traits(const DepthwiseForward& problem, const F& f) {
    const bool fused = problem.norm || problem.gate || problem.out_norm || problem.pool || problem.statistics ||
                       problem.activation != Activation::none;
    return with_window(problem.shape, [&](auto kernel, auto stride) {
        constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
        if (fused) return f(PlanesForwardTraits<T, k, s, true>());
        return f(PlanesForwardTraits<T, k, s, false>());
    });
}

template <class T, class F>
auto with_planes_traits(const DepthwiseBackward& problem, const F& f) {
    const bool fused =
        problem.a || problem.norm || problem.residual || problem.sums || problem.activation != Activation::none;
    return with_window(problem.shape, [&](auto kernel, auto stride) {
        constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
        if (fused) return f(PlanesBackwardTraits<T, k, s, true>());
        return f(PlanesBackwardTraits<T, k, s, false>());
    });
}

template <class Traits>
CutPlanes cut_forward_planes(const DepthwiseForward& problem, const Device& device) {
    using T = typename Traits::Element;
    const DepthwiseShape& shape = problem.shape;
    const PlanesCut cut{shape.batch,      shape.channels,  shape.out_height, shape.out_width,
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
    return cut_planes(cut, device, places_of, [&](int x_elements, int y_elements, int threads) {
        return Traits::shared_bytes(x_elements, y_elements, threads, problem.grad != nullptr, sums);
    });
}

template <class Traits>
CutPlanes cut_backward_planes(const DepthwiseBackward& problem, const Device& device) {
    using T = typename Traits::Element;
    const DepthwiseShape& shape = problem.shape;
    constexpr int before = Traits::open - 1;
    const BackwardSteps steps = backward_steps(shape, Traits::reach);
    const PlanesCut cut{shape.batch, shape.channels,  steps.rows,      steps.columns,
                        before,      Traits::columns, Traits::threads, Traits::blocks};
    const auto places_of = [&](int64_t rows) {
        return PlanesPlaces{rows * Traits::stride, rows + before,   shape.height,     shape.width,
                            shape.out_height,      shape.out_width, Stretch<T>::chunk};
    };
    CutPlanes found = cut_planes(cut, device, places_of, [&](int x_elements, int y_elements, int threads) {
        return Traits::shared_bytes(x_elements, y_elements, threads, problem.a != nullptr);
    });
    found.tile.first_row = steps.first_row;
    found.tile.first_column = steps.first_column;
    return found;
}

inline Plan plan_of(const CutPlanes& found, int64_t parts, int64_t elements, size_t workspace,
                    const DepthwiseShape& shape, size_t element_bytes) {
    return {parts,
            workspace,
            int64_t(found.tile.slabs) * found.tile.walkers,
            found.threads,
            found.shared_bytes,
            elements * shape.batch * shape.channels * int64_t(element_bytes),
            workspace == 0 ? 1 : 2};
}

// Its threads are 0 where rows are too wide.
template <class T>
Plan plan_planes(const DepthwiseForward& problem, const Device& device) {
    return with_planes_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        constexpr int64_t stride = Traits::stride;
        const DepthwiseShape& shape = problem.shape;
        const CutPlanes found = cut_forward_planes<Traits>(problem, device);
        const int64_t steps = found.tile.strip_rows;
        const int64_t pixels =
            shape.width *
            rows_read(found.tile, steps * stride, (steps - 1) * stride + Traits::kernel, shape.pad_top, shape.height);
        const int64_t grads = problem.grad == nullptr ? 0 : shape.out_height * shape.out_width;
        return plan_of(found, found.tile.strips, pixels + grads, 0, shape, sizeof(T));
    });
}

template <class T>
Plan plan_planes(const DepthwiseBackward& problem, const Device& device) {
    return with_planes_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        constexpr int64_t stride = Traits::stride, before = Traits::open - 1;
        const DepthwiseShape& shape = problem.shape;
        const CutPlanes found = cut_backward_planes<Traits>(problem, device);
        const PlanesTile& tile = found.tile;
        const int64_t steps = tile.strip_rows;
        const int64_t grads =
            shape.out_width * rows_read(tile, steps, steps + before, before - tile.first_row, shape.out_height);
        const int64_t pixels = shape.width * rows_read(tile, steps * stride, steps * stride,
                                                       shape.pad_top - tile.first_row * stride, shape.height);
        const int64_t elements =
            grads * (problem.a == nullptr ? 1 : 2) + pixels * ((problem.x != nullptr) + (problem.residual != nullptr));
        const size_t workspace = sizeof(float) * tile.walkers * partial_rows(problem) * shape.channels;
        return plan_of(found, tile.walkers, elements, workspace, shape, sizeof(T));
    });
}

template <class T>
cudaError_t run_planes(const DepthwiseForward& problem, const Device& device) {
    return with_planes_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        const DepthwiseShape& shape = problem.shape;
        const CutPlanes found = cut_forward_planes<Traits>(problem, device);
        const PlanesForwardArguments<T> arguments{sizes_of(shape),
                                                  found.tile,
                                                  shape.batch * shape.channels * shape.height * shape.width,
                                                  shape.batch * shape.channels * shape.out_height * shape.out_width,
                                                  static_cast<const T*>(problem.x),
                                                  problem.weight,
                                                  problem.bias,
                                                  problem.norm,
                                                  problem.gate,
                                                  problem.out_norm,
                                                  static_cast<const T*>(problem.grad),
                                                  problem.activation,
                                                  problem.out_activation,
                                                  static_cast<T*>(problem.y),
                                                  problem.pool,
                                                  problem.statistics};
        return launch<depthwise_planes_forward_kernel<Traits>>(
            dim3(found.tile.slabs * found.tile.walkers), found.threads, found.shared_bytes, device.stream, arguments);
    });
}

template <class T>
cudaError_t run_planes(const DepthwiseBackward& problem, const Device& device) {
    return with_planes_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        const DepthwiseShape& shape = problem.shape;
        const CutPlanes found = cut_backward_planes<Traits>(problem, device);
        const PlanesBackwardArguments<T> arguments{sizes_of(shape),
                                                   found.tile,
                                                   shape.batch * shape.channels * shape.height * shape.width,
                                                   shape.batch * shape.channels * shape.out_height * shape.out_width,
                                                   static_cast<const T*>(problem.grad),
                                                   static_cast<const T*>(problem.a),
                                                   static_cast<const T*>(problem.x),
                                                   problem.weight,
                                                   problem.a_norm,
                                                   problem.coefficients,
                                                   problem.gate,
                                                   problem.pooled,
                                                   problem.norm,
                                                   static_cast<const T*>(problem.residual),
                                                   problem.a_activation,
                                                   problem.activation,
                                                   static_cast<T*>(problem.dx),
                                                   static_cast<float*>(problem.workspace),
                                                   problem.sums,
                                                   problem.dw != nullptr,
                                                   problem.db != nullptr};
        const cudaError_t error = launch<depthwise_planes_backward_kernel<Traits>>(
            dim3(found.tile.slabs * found.tile.walkers), found.threads, found.shared_bytes, device.stream, arguments);
        if (error != cudaSuccess || partial_rows(problem) == 0) return error;
        return sum_partials(problem, found.tile.walkers, device);
    });
}

}  // namespace effnet::cuda
