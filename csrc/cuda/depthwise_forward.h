// Chooses and launches a forward kernel; instantiated once a dtype, in a source of its own.
#pragma once

#include "depthwise_launch.h"
#include "planning.h"

namespace effnet::cuda {

// Which kind of kernel runs this: by what is there, not by the activations.
inline ForwardKind kind_of(const DepthwiseForward& problem) {
    if (problem.gate || problem.out_norm || problem.grad) return ForwardKind::any;
    const bool plain_input = !problem.norm && problem.activation == Activation::none;
    const bool plain_output = !problem.bias && !problem.pool && problem.out_activation == Activation::none;
    if (plain_input && !problem.statistics) return ForwardKind::inference;
    return problem.norm && plain_output ? ForwardKind::training : ForwardKind::any;
}

template <class T>
struct ForwardKernels : DepthwiseForwardSums<DepthwiseTile> {
    using Element = T;
    static constexpr const char* does_not_fit = "no tile fits shared memory";

    template <class Traits>
    static constexpr auto kernel = &depthwise_forward_kernel<Traits>;

    template <class F>
    static auto with_traits(const DepthwiseForward& problem, const F& f) {
        return with_window(problem.shape, [&](auto kernel, auto stride) {
            constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
            if constexpr (k < 7) {
                const ForwardKind kind = in_chunks<T>(problem.shape) ? kind_of(problem) : ForwardKind::any;
                if (kind == ForwardKind::inference)
                    return with_activations(problem.out_activation == Activation::silu, [&](auto of) {
                        return f(ForwardTraits<T, k, s, ForwardKind::inference, decltype(of)>());
                    });
                if (kind == ForwardKind::training)
                    return with_activations(problem.activation == Activation::silu, [&](auto of) {
                        return f(ForwardTraits<T, k, s, ForwardKind::training, decltype(of)>());
                    });
            }
            return f(ForwardTraits<T, k, s, ForwardKind::any>());
        });
    }

    template <class Traits>
    static CutTile cut(const DepthwiseForward& problem, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const bool bulk = wants_bulk_copies<Traits>(device);
        const Limits limits{shape.batch,     shape.channels,   shape.out_height, shape.out_width,
                            int(sizeof(T)),  Traits::open - 1, Traits::width,    Traits::columns,
                            Traits::threads, Traits::blocks,   Traits::stride,   Traits::kernel - Traits::stride,
                            side_limit(bulk)};
        const bool sums = problem.pool != nullptr || problem.statistics != nullptr;
        return cut_problem(limits, in_chunks<T>(shape), device, [&](int groups, int pitch, int slab) {
            return bulk ? Traits::Bulk::shared_bytes(groups, pitch, slab, sums)
                        : Traits::shared_bytes(groups, pitch, slab, sums);
        });
    }

    static int64_t parts(const DepthwiseTile& tile) { return int64_t(tile.strips) * tile.tiles; }

    template <class Traits>
    static int64_t read_elements(const DepthwiseForward& problem, const DepthwiseTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int64_t stride = Traits::stride;
        const Reads reads{tile.strip_rows * stride,
                          (tile.strip_rows + Traits::open - 1) * stride,
                          shape.pad_top,
                          shape.height,
                          tile.groups * Traits::columns * stride,
                          Traits::row_pixels(tile.groups),
                          shape.pad_left,
                          shape.width};
        const int64_t grads = problem.grad == nullptr ? 0 : shape.out_height * shape.out_width;
        return (reads.pixels(tile) + grads) * shape.batch * shape.channels;
    }

    template <class Traits>
    static typename Traits::Sources sources(const DepthwiseForward& problem) {
        return {source<T>(problem.x, problem.shape.height, problem.shape.width)};
    }

    template <class Bulk>
    static bool map(typename Bulk::Sources& maps, const DepthwiseForward& problem, const DepthwiseTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        return map_pixels(maps.x, problem.dtype, problem.x, shape.batch, shape.height, shape.width, shape.channels,
                          tile, Bulk::row_pixels(tile.groups), Bulk::stride);
    }

    template <class Traits>
    static cudaError_t launch(const DepthwiseForward& problem, const CutTile& cut, const Device& device) {
        const ForwardArguments<T> arguments{{sizes_of(problem.shape), cut.tile}, typed<T>(problem)};
        return launch_from_sources<ForwardKernels, Traits>(problem, cut, device, arguments);
    }
};

}  // namespace effnet::cuda
