// Chooses and launches a forward kernel; instantiated once a dtype, in a source of its own.
#pragma once

#include "depthwise_launch.h"

namespace effnet::cuda {

// Which kind of kernel runs this: by what is there, not by the activations.
inline ForwardKind kind_of(const DepthwiseForward& problem) {
    if (problem.gate || problem.out_norm || problem.grad) return ForwardKind::any;
    const bool plain_input = !problem.norm && problem.activation == Activation::none;
    const bool plain_output = !problem.bias && !problem.pool && problem.out_activation == Activation::none;
    if (plain_input && !problem.statistics) return ForwardKind::inference;
    return problem.norm && plain_output ? ForwardKind::training : ForwardKind::any;
}

// Calls f with the traits of the kernel that runs this.
template <class T, class F>
auto with_forward_traits(const DepthwiseForward& problem, const F& f) {
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
CutTile cut_forward(const DepthwiseForward& problem, const Device& device) {
    using T = typename Traits::Element;
    const DepthwiseShape& shape = problem.shape;
    const bool bulk = wants_bulk_copies<Traits>(device);
    const Cut cut{shape.batch,     shape.channels,   shape.out_height, shape.out_width,
                  int(sizeof(T)),  Traits::open - 1, Traits::width,    Traits::columns,
                  Traits::threads, Traits::blocks,   Traits::stride,   Traits::kernel - Traits::stride,
                  side_limit(bulk)};
    const bool sums = problem.pool != nullptr || problem.statistics != nullptr;
    return cut_problem(cut, in_chunks<T>(shape), device, [&](int groups, int pitch, int slab) {
        return bulk ? Traits::Bulk::shared_bytes(groups, pitch, slab, sums)
                    : Traits::shared_bytes(groups, pitch, slab, sums);
    });
}

template <class T>
Plan plan_forward(const DepthwiseForward& problem, const Device& device) {
    return with_forward_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        const CutTile found = cut_forward<Traits>(problem, device);
        const DepthwiseTile& tile = found.tile;
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
        const int64_t read_bytes = (reads.pixels(tile) + grads) * shape.batch * shape.channels * int64_t(sizeof(T));
        return Plan{int64_t(tile.strips) * tile.tiles,
                    0,
                    int64_t(tile.slabs) * tile.walkers,
                    found.threads,
                    found.shared_bytes,
                    read_bytes,
                    1};
    });
}

template <class Traits>
cudaError_t launch_forward(const DepthwiseForward& problem, const CutTile& found, const Device& device,
                           const typename Traits::Sources& sources) {
    using T = typename Traits::Element;
    const ForwardArguments<T> arguments{sizes_of(problem.shape),
                                        found.tile,
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
    return launch<depthwise_forward_kernel<Traits>>(dim3(found.tile.slabs * found.tile.walkers), found.threads,
                                                    found.shared_bytes, device.stream, arguments, sources);
}

template <class T>
cudaError_t run_forward(const DepthwiseForward& problem, const Device& device) {
    return with_forward_traits<T>(problem, [&](auto traits) {
        using Traits = decltype(traits);
        const CutTile found = cut_forward<Traits>(problem, device);
        const DepthwiseShape& shape = problem.shape;
        if constexpr (Traits::aligned) {
            using Bulk = typename Traits::Bulk;
            typename Bulk::Sources maps;
            if (wants_bulk_copies<Traits>(device) && compiled_for<depthwise_forward_kernel<Bulk>>(bulk_copies_since) &&
                map_pixels(maps.x, problem.dtype, problem.x, shape.batch, shape.height, shape.width, shape.channels,
                           found.tile, Traits::row_pixels(found.tile.groups), Traits::stride))
                return launch_forward<Bulk>(problem, found, device, maps);
        }
        return launch_forward<Traits>(problem, found, device, {source<T>(problem.x, shape.height, shape.width)});
    });
}

}  // namespace effnet::cuda
