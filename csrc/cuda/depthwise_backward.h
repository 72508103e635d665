// Chooses and launches a backward kernel; instantiated once a dtype, in a source of its own.
#pragma once

#include "depthwise_launch.h"
#include "planning.h"

namespace effnet::cuda {

// Which kind of kernel runs this: by what is there, not by the activations.
inline BackwardKind kind_of(const DepthwiseBackward& problem) {
    if (!problem.x) return BackwardKind::any;
    if (!problem.a && !problem.norm && problem.activation == Activation::none) return BackwardKind::plain;
    const bool between_norms = problem.a && problem.a_norm && problem.coefficients && problem.norm;
    return between_norms && problem.dx && !problem.db && !problem.residual ? BackwardKind::fused : BackwardKind::any;
}

template <class T>
struct BackwardKernels : DepthwiseBackwardSums<DepthwiseTile> {
    using Element = T;
    static constexpr const char* does_not_fit = "no tile fits shared memory";

    template <class Traits>
    static constexpr auto kernel = &depthwise_backward_kernel<Traits>;

    template <class F>
    static auto with_traits(const DepthwiseBackward& problem, const F& f) {
        const bool silu = problem.a_activation == Activation::silu && problem.activation == Activation::silu;
        return with_window(problem.shape, [&](auto kernel, auto stride) {
            constexpr int k = decltype(kernel)::value, s = decltype(stride)::value;
            if constexpr (k < 7) {
                const BackwardKind kind = in_chunks<T>(problem.shape) ? kind_of(problem) : BackwardKind::any;
                if (kind == BackwardKind::plain) return f(BackwardTraits<T, k, s, BackwardKind::plain>());
                if (kind == BackwardKind::fused)
                    return with_activations(
                        silu, [&](auto of) { return f(BackwardTraits<T, k, s, BackwardKind::fused, decltype(of)>()); });
            }
            return f(BackwardTraits<T, k, s, BackwardKind::any>());
        });
    }

    template <class Traits>
    static CutTile cut(const DepthwiseBackward& problem, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const BackwardSteps steps = backward_steps(shape, Traits::reach);
        const bool bulk = wants_bulk_copies<Traits>(device);
        const Limits limits{shape.batch,      shape.channels, steps.rows,       steps.columns,   int(sizeof(T)),
                            Traits::open - 1, Traits::width,  Traits::columns,  Traits::threads, Traits::blocks,
                            Traits::stride,   Traits::reach,  side_limit(bulk), steps.first_row, steps.first_column};
        const bool a = problem.a != nullptr, x = problem.x != nullptr;
        return cut_problem(limits, in_chunks<T>(shape), device, [&](int groups, int pitch, int slab) {
            return bulk ? Traits::Bulk::shared_bytes(groups, pitch, slab, a, x)
                        : Traits::shared_bytes(groups, pitch, slab, a, x);
        });
    }

    template <class Traits>
    static int64_t read_elements(const DepthwiseBackward& problem, const DepthwiseTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int64_t stride = Traits::stride, before = Traits::open - 1, reach = Traits::reach;
        const int64_t columns = int64_t(tile.groups) * Traits::columns;
        const int64_t top = shape.pad_top - tile.first_row * stride, left = shape.pad_left - tile.first_column * stride;
        const Reads grads{tile.strip_rows, tile.strip_rows + before, before - tile.first_row,   shape.out_height,
                          columns,         columns + reach,          reach - tile.first_column, shape.out_width};
        const Reads pixels{tile.strip_rows * stride, tile.strip_rows * stride, top,  shape.height,
                           columns * stride,         columns * stride,         left, shape.width};
        const int64_t read = grads.pixels(tile) * (problem.a == nullptr ? 1 : 2) +
                             pixels.pixels(tile) * ((problem.x != nullptr) + (problem.residual != nullptr));
        return read * shape.batch * shape.channels;
    }

    template <class Traits>
    static typename Traits::Sources sources(const DepthwiseBackward& problem) {
        const DepthwiseShape& shape = problem.shape;
        return {source<T>(problem.grad, shape.out_height, shape.out_width),
                source<T>(problem.a, shape.out_height, shape.out_width),
                source<T>(problem.x, shape.height, shape.width)};
    }

    template <class Bulk>
    static bool map(typename Bulk::Sources& maps, const DepthwiseBackward& problem, const DepthwiseTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        const auto map_grad = [&](TensorMap& map, const void* data) {
            return map_pixels(map, problem.dtype, data, shape.batch, shape.out_height, shape.out_width, shape.channels,
                              tile, Bulk::grad_pixels(tile.groups), 1);
        };
        return map_grad(maps.grad, problem.grad) && (problem.a == nullptr || map_grad(maps.a, problem.a)) &&
               map_pixels(maps.x, problem.dtype, problem.x, shape.batch, shape.height, shape.width, shape.channels,
                          tile, Bulk::row_pixels(tile.groups), Bulk::stride);
    }

    template <class Traits>
    static cudaError_t launch(const DepthwiseBackward& problem, const CutTile& cut, const Device& device) {
        const BackwardSums sums{static_cast<float*>(problem.workspace),
                                problem.sums,
                                problem.a != nullptr,
                                problem.x != nullptr,
                                problem.dw != nullptr,
                                problem.db != nullptr};
        const BackwardArguments<T> arguments{{sizes_of(problem.shape), cut.tile}, typed<T>(problem), sums};
        const cudaError_t error = launch_from_sources<BackwardKernels, Traits>(problem, cut, device, arguments);
        return BackwardKernels::finish(error, problem, cut.tile, device);
    }
};

}  // namespace effnet::cuda
