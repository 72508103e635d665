// How the work of squeeze-and-excitation is divided, and the launches; instantiated once a dtype, in a source of its
// own.
#pragma once

#include <algorithm>

#include "planning.h"
#include "squeeze_excite.cuh"

namespace effnet::cuda {

// The workspace holds a counter, and then what a phase leaves for the next.
inline constexpr size_t counter_bytes = 16;

struct Division {
    int64_t parts;  // of an image's pixels, or as many as the given sums have
    int images_a_block, slices;
    bool alone, cooperative;  // a block is a team; blocks meet
    int64_t blocks;
    int shared_bytes;
};

inline int images_a_block(const SqueezeExcite& layer, const Device& device, int64_t floats) {
    constexpr int64_t enough = 40 * 1024;
    return layer.images >= device.multiprocessors && floats * int64_t(sizeof(float)) <= enough
               ? SqueezeExciteTraits::images
               : 1;
}

inline int64_t resident_blocks(int shared_bytes, const Device& device) {
    // Shared memory is given out in units of 128 bytes, and takes 1 KB more for each block.
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (round_up(shared_bytes, 128) + 1024);
    return device.multiprocessors * std::min<int64_t>(SqueezeExciteTraits::blocks, std::max<int64_t>(by_shared, 1));
}

template <class T>
int width_of(const SqueezeExcite& layer) {
    constexpr int chunk = 16 / sizeof(T);
    return layer.channels % chunk == 0 ? chunk : 1;
}

// Parts of an image's pixels: enough to fill the GPU, of some pixels a thread, and few enough to be added up quickly.
inline int64_t parts_of(const SqueezeExcite& layer, int width, int64_t resident) {
    const int64_t rows =
        std::max<int64_t>(1, SqueezeExciteTraits::threads * width / std::max<int64_t>(layer.channels, 1));
    const int64_t most = std::min<int64_t>(64, ceil_div(layer.pixels, 4 * rows));
    return std::clamp<int64_t>(resident / std::max<int64_t>(layer.images, 1), 1, std::max<int64_t>(most, 1));
}

template <class T>
Division divide(const SqueezeExciteForward& problem, const Device& device) {
    const SqueezeExcite& layer = problem.layer;
    Division found{};
    found.images_a_block = images_a_block(
        layer, device,
        SqueezeExciteTraits::forward_floats(SqueezeExciteTraits::images, int(layer.channels), int(layer.reduced)));
    const int width = width_of<T>(layer);
    const auto shared = [&](bool pools) {
        const int floats =
            SqueezeExciteTraits::forward_floats(found.images_a_block, int(layer.channels), int(layer.reduced));
        return int(sizeof(float)) * std::max(floats, pools ? SqueezeExciteTraits::sums_floats(width) : 0);
    };
    found.shared_bytes = shared(problem.x != nullptr);
    const int64_t resident = resident_blocks(found.shared_bytes, device);
    const int64_t most_slices = std::min<int64_t>(8, ceil_div(layer.channels, 32));
    const auto slices = [&](int64_t blocks) {
        const int64_t items = std::max<int64_t>(1, ceil_div(layer.images, found.images_a_block));
        return int(std::clamp<int64_t>(blocks / items, 1, most_slices));
    };
    if (problem.x == nullptr) {
        found.parts = problem.parts;
        found.slices = slices(device.multiprocessors);
        found.blocks = ceil_div(layer.images, found.images_a_block) * found.slices;
        return found;
    }
    found.parts = parts_of(layer, width, resident);
    if (found.parts == 1) {
        found.alone = true;
        found.images_a_block = found.slices = 1;
        found.shared_bytes = shared(true);
        found.blocks = std::min(layer.images, resident_blocks(found.shared_bytes, device));
        return found;
    }
    found.cooperative = true;
    found.slices = slices(resident);
    found.blocks = std::min(layer.images * found.parts, resident);
    return found;
}

template <class T>
Division divide(const SqueezeExciteBackward& problem, const Device& device) {
    const SqueezeExcite& layer = problem.layer;
    const int channels = int(layer.channels), reduced = int(layer.reduced), width = width_of<T>(layer);
    Division found{};
    found.images_a_block = images_a_block(
        layer, device, SqueezeExciteTraits::backward_floats(SqueezeExciteTraits::images, channels, reduced));
    found.slices = 1;
    found.cooperative = true;
    found.shared_bytes =
        int(sizeof(float)) * std::max({SqueezeExciteTraits::backward_floats(found.images_a_block, channels, reduced),
                                       int(SqueezeExciteTraits::weights_floats),
                                       problem.x == nullptr ? 0 : SqueezeExciteTraits::sums_floats(width)});
    const int64_t resident = resident_blocks(found.shared_bytes, device);
    found.parts = problem.x == nullptr ? problem.parts : parts_of(layer, width, resident);
    const int64_t gates = ceil_div(layer.images, found.images_a_block);
    const int64_t tiles =
        ceil_div(layer.channels, SqueezeExciteTraits::tile) * ceil_div(layer.reduced, SqueezeExciteTraits::tile);
    const int64_t items = problem.x == nullptr ? 0 : layer.images * found.parts;
    found.blocks = std::min(resident, std::max({gates, tiles, items}));
    return found;
}

// Hands out pieces of the workspace behind the counter; `bytes` is what has been handed out.
struct Pieces {
    char* from;
    size_t bytes = counter_bytes;

    float* take(int64_t floats) {
        float* piece = from == nullptr ? nullptr : reinterpret_cast<float*>(from + bytes);
        bytes += round_up(floats * int64_t(sizeof(float)), 16);
        return piece;
    }
    float* take_unless(float* given, int64_t floats) { return given != nullptr ? given : take(floats); }
};

template <class T>
SqueezeExciteForwardArguments<T> arguments_of(const SqueezeExciteForward& problem, const Division& division,
                                              Pieces& pieces) {
    const SqueezeExcite& layer = problem.layer;
    SqueezeExciteForwardArguments<T> arguments{};
    arguments.gate = {layer, problem.sums, division.parts, division.slices, problem.pooled, problem.gates};
    arguments.pool = {static_cast<const T*>(problem.x), nullptr, problem.norm, problem.norm_activation};
    arguments.images_a_block = division.images_a_block;
    arguments.alone = division.alone;
    if (problem.x == nullptr) return arguments;
    arguments.gate.sums = arguments.sums = pieces.take(layer.images * division.parts * layer.channels);
    arguments.y = static_cast<T*>(problem.y);
    if (problem.y != nullptr) arguments.gate.gates = pieces.take_unless(problem.gates, layer.images * layer.channels);
    if (division.cooperative) arguments.counter = reinterpret_cast<unsigned*>(pieces.from);
    return arguments;
}

template <class T>
SqueezeExciteBackwardArguments<T> arguments_of(const SqueezeExciteBackward& problem, const Division& division,
                                               Pieces& pieces) {
    const SqueezeExcite& layer = problem.layer;
    const int64_t of_channels = layer.images * layer.channels, of_reduced = layer.images * layer.reduced;
    SqueezeExciteBackwardArguments<T> arguments{};
    arguments.pool = {static_cast<const T*>(problem.grad), static_cast<const T*>(problem.x), nullptr, Activation::none};
    arguments.weights = {problem.reduce_weight_grad, problem.reduce_bias_grad, problem.expand_weight_grad,
                         problem.expand_bias_grad};
    arguments.dx = static_cast<T*>(problem.dx);
    arguments.images_a_block = division.images_a_block;
    arguments.counter = reinterpret_cast<unsigned*>(pieces.from);
    if (problem.x != nullptr) arguments.sums = pieces.take(of_channels * division.parts);
    float *const expanded_grad = pieces.take(of_channels), *const reduced_grad = pieces.take(of_reduced);
    float* const hidden = pieces.take(of_reduced);
    arguments.gate = {layer,
                      problem.x == nullptr ? problem.sums : arguments.sums,
                      division.parts,
                      problem.x == nullptr ? int(problem.rows) : 1,
                      problem.pooled,
                      expanded_grad,
                      reduced_grad,
                      hidden,
                      pieces.take_unless(problem.gates, of_channels),
                      pieces.take_unless(problem.pooled_grad, of_channels),
                      problem.partials};
    return arguments;
}

// How often the tensors are read.
inline int readings(const SqueezeExciteForward& problem) {
    return problem.x == nullptr ? 0 : problem.y == nullptr ? 1 : 2;
}
inline int readings(const SqueezeExciteBackward& problem) {
    return problem.x == nullptr ? 0 : problem.dx == nullptr ? 2 : 3;
}

// Whether channels are read 16 bytes at a time.
template <bool chunks_>
struct SqueezeExciteChunks {
    static constexpr bool chunks = chunks_;
};

// What both directions have in common.
template <class T>
struct SqueezeExciteKernels {
    using Element = T;
    using Tile = Division;
    static constexpr const char* does_not_fit = "too many channels for shared memory";

    template <class Problem, class F>
    static auto with_traits(const Problem& problem, const F& f) {
        if (width_of<T>(problem.layer) == 1) return f(SqueezeExciteChunks<false>());
        return f(SqueezeExciteChunks<true>());
    }

    template <class Traits, class Problem>
    static Cut<Division> cut(const Problem& problem, const Device& device) {
        const Division found = divide<T>(problem, device);
        return {found, found.blocks, SqueezeExciteTraits::threads, found.shared_bytes};
    }

    static int64_t parts(const Division& division) { return division.parts; }

    template <class Traits, class Problem>
    static int64_t read_elements(const Problem& problem, const Division&) {
        const SqueezeExcite& layer = problem.layer;
        return layer.images * layer.pixels * layer.channels * readings(problem);
    }

    template <class Problem>
    static size_t workspace_bytes(const Problem& problem, const Division& division) {
        Pieces pieces{nullptr};
        arguments_of<T>(problem, division, pieces);
        return pieces.bytes;
    }

    template <class Problem>
    static int launches(const Problem&, const Division& division) {
        return division.cooperative ? 2 : 1;
    }

    // The blocks of a cooperative launch count their meetings from zero.
    template <auto kernel, class Problem>
    static cudaError_t launch_team(const Problem& problem, const Cut<Division>& cut, const Device& device) {
        Pieces pieces{static_cast<char*>(problem.workspace)};
        const auto arguments = arguments_of<T>(problem, cut.tile, pieces);
        const dim3 grid(unsigned(cut.blocks));
        if (!cut.tile.cooperative)
            return effnet::cuda::launch<kernel>(grid, cut.threads, cut.shared_bytes, device.stream, arguments);
        const cudaError_t error = cudaMemsetAsync(arguments.counter, 0, counter_bytes, device.stream);
        if (error != cudaSuccess) return error;
        return launch_cooperative<kernel>(grid, cut.threads, cut.shared_bytes, device.stream, arguments);
    }
};

template <class T>
struct SqueezeExciteForwardKernels : SqueezeExciteKernels<T> {
    template <class Traits>
    static cudaError_t launch(const SqueezeExciteForward& problem, const Cut<Division>& cut, const Device& device) {
        constexpr auto kernel = &squeeze_excite_forward_kernel<T, Traits::chunks>;
        return SqueezeExciteKernels<T>::template launch_team<kernel>(problem, cut, device);
    }
};

template <class T>
struct SqueezeExciteBackwardKernels : SqueezeExciteKernels<T> {
    template <class Traits>
    static cudaError_t launch(const SqueezeExciteBackward& problem, const Cut<Division>& cut, const Device& device) {
        constexpr auto kernel = &squeeze_excite_backward_kernel<T, Traits::chunks>;
        return SqueezeExciteKernels<T>::template launch_team<kernel>(problem, cut, device);
    }
};

}  // namespace effnet::cuda
