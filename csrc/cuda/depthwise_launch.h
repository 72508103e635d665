// What the launches of depthwise forward and backward share, on the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "depthwise.cuh"
#include "depthwise_tile.h"

namespace effnet::cuda {

inline const char* why_not(const DepthwiseShape& shape, const Device& device) {
    if (device.major < 8) return "the kernels need compute capability 8.0 or higher";
    if (shape.kernel != 3 && shape.kernel != 5 && shape.kernel != 7) return "kernels are 3x3, 5x5 or 7x7";
    if (shape.stride != 1 && shape.stride != 2) return "strides are 1 or 2";
    constexpr int64_t most = int64_t(1) << 31;
    const int64_t bordered_rows = std::max(shape.height, shape.out_height * shape.stride) + 2 * shape.kernel;
    const int64_t bordered_columns = std::max(shape.width, shape.out_width * shape.stride) + 64 * shape.kernel;
    if (shape.channels >= most / 64 || bordered_rows * bordered_columns * std::max<int64_t>(shape.channels, 8) >= most)
        return "an image has 2^31 or more elements";
    if (shape.batch * shape.out_height * shape.out_width >= most) return "the batch has 2^31 or more pixels";
    return nullptr;
}

inline DepthwiseSizes sizes_of(const DepthwiseShape& shape) {
    return {int(shape.channels),  int(shape.height),  int(shape.width),   int(shape.out_height),
            int(shape.out_width), int(shape.pad_top), int(shape.pad_left)};
}

// Whether every pixel begins at a multiple of 16 bytes.
template <class T>
bool in_chunks(const DepthwiseShape& shape) {
    return shape.channels % (16 / sizeof(T)) == 0;
}

// From this compute capability on, times ten, there are bulk copies. They are the default wherever pixels begin at
// multiples of 16 bytes: they take less time and fewer instructions an output (docs/cuda.md).
inline constexpr int bulk_copies_since = 90;

template <class Traits>
bool wants_bulk_copies(const Device& device) {
    return Traits::aligned && 10 * device.major + device.minor >= bulk_copies_since;
}

// Describes a (batch, height, width, C) tensor of which a copy brings rows x pixels of a block's channels. False where
// that cannot be.
inline bool map_pixels(TensorMap& map, DType dtype, const void* data, int64_t batch, int64_t height, int64_t width,
                       int64_t channels, const DepthwiseTile& tile, int pixels, int rows) {
    return encode_tensor_map(map, dtype, data, {channels, width, height, batch}, {tile.slab, pixels, rows, 1});
}

// The operands of a problem as a kernel of this element type takes them.
template <class T, template <class> class Operands>
Operands<T> typed(const Operands<void>& untyped) {
    Operands<T> made;
    static_assert(std::is_trivially_copyable_v<Operands<T>> && sizeof(made) == sizeof(untyped));
    std::memcpy(&made, &untyped, sizeof(made));
    return made;
}

template <class T>
Source<T> source(const void* data, int64_t height, int64_t width) {
    return {static_cast<const T*>(data), int(height), int(width)};
}

// Calls f with the kernel size and stride as types.
template <class F>
auto with_window(const DepthwiseShape& shape, const F& f) {
    const auto with_stride = [&](auto kernel) {
        if (shape.stride == 1) return f(kernel, std::integral_constant<int, 1>());
        return f(kernel, std::integral_constant<int, 2>());
    };
    if (shape.kernel == 3) return with_stride(std::integral_constant<int, 3>());
    if (shape.kernel == 5) return with_stride(std::integral_constant<int, 5>());
    return with_stride(std::integral_constant<int, 7>());
}

// Calls f with the activations of a kernel.
template <class F>
auto with_activations(bool silu, const F& f) {
    return silu ? f(Silu()) : f(AnyActivation());
}

// What planning.h asks of an operation's kernels: for channels_last activations, each in a header of its own, and for
// contiguous ones.
template <class T>
struct ForwardKernels;
template <class T>
struct BackwardKernels;
template <class T>
struct PlanesForwardKernels;
template <class T>
struct PlanesBackwardKernels;

// Launches a depthwise kernel.
template <auto kernel, class Tile, class... A>
cudaError_t launch_cut(const Cut<Tile>& cut, const Device& device, const A&... arguments) {
    return launch<kernel>(dim3(unsigned(cut.blocks)), cut.threads, cut.shared_bytes, device.stream, arguments...);
}

// Launches the kernel of these traits for channels_last activations: on maps of its tensors, where bulk copies are
// wanted and can be had, or else on the tensors.
template <class Kernels, class Traits, class Problem, class Arguments>
cudaError_t launch_from_sources(const Problem& problem, const CutTile& cut, const Device& device,
                                const Arguments& arguments) {
    if constexpr (Traits::aligned) {
        using Bulk = typename Traits::Bulk;
        typename Bulk::Sources maps{};
        if (wants_bulk_copies<Traits>(device) && compiled_for<Kernels::template kernel<Bulk>>(bulk_copies_since) &&
            Kernels::template map<Bulk>(maps, problem, cut.tile))
            return launch_cut<Kernels::template kernel<Bulk>>(cut, device, arguments, maps);
    }
    const typename Traits::Sources sources = Kernels::template sources<Traits>(problem);
    return launch_cut<Kernels::template kernel<Traits>>(cut, device, arguments, sources);
}

// The steps, of a stride each, of a backward walk over an image: they begin with that of the first pixel, and go on
// until every output has been read.
struct BackwardSteps {
    int first_row, first_column;
    int64_t rows, columns;
};

inline BackwardSteps backward_steps(const DepthwiseShape& shape, int reach) {
    const int first_row = std::min(shape.pad_top / shape.stride, reach);
    const int first_column = std::min(shape.pad_left / shape.stride, reach);
    return {first_row, first_column,
            std::max(ceil_div(shape.height + shape.pad_top, shape.stride), shape.out_height) - first_row,
            std::max(ceil_div(shape.width + shape.pad_left, shape.stride), shape.out_width) - first_column};
}

// Rows of a walker's partial sums.
inline int partial_rows(const DepthwiseBackward& problem) {
    return (problem.dw ? problem.shape.kernel * problem.shape.kernel : 0) + (problem.db ? 1 : 0);
}

// Adds up dw and db over the walkers.
cudaError_t sum_partials(const DepthwiseBackward&, int walkers, const Device&);

// What kernels of all dtypes and layouts have in common, forward and backward.
template <class Tile_>
struct DepthwiseForwardSums {
    using Tile = Tile_;
    static size_t workspace_bytes(const DepthwiseForward&, const Tile&) { return 0; }
    static int launches(const DepthwiseForward&, const Tile&) { return 1; }
};

template <class Tile_>
struct DepthwiseBackwardSums {
    using Tile = Tile_;
    static int64_t parts(const Tile& tile) { return tile.walkers; }
    static size_t workspace_bytes(const DepthwiseBackward& problem, const Tile& tile) {
        return sizeof(float) * tile.walkers * partial_rows(problem) * problem.shape.channels;
    }
    static int launches(const DepthwiseBackward& problem, const Tile&) { return partial_rows(problem) == 0 ? 1 : 2; }
    // What follows a launch that had this error.
    static cudaError_t finish(cudaError_t error, const DepthwiseBackward& problem, const Tile& tile,
                              const Device& device) {
        return error != cudaSuccess || partial_rows(problem) == 0 ? error : sum_partials(problem, tile.walkers, device);
    }
};

}  // namespace effnet::cuda
