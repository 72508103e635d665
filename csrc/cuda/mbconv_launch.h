// How both halves of a block are divided, and their launches; instantiated once a dtype, in a source of its own.
//
// The cost of a division is counted in cycles of a multiprocessor (docs/cuda.md, "The block"): of several that fit,
// that is taken whose blocks, in whole waves, take the fewest.
#pragma once

#include <algorithm>
#include <cmath>

#include "mbconv.cuh"
#include "planning.h"
#include "pointwise.cuh"

namespace effnet::cuda {

// What a multiprocessor does in a cycle, as counts of the model: multiply-adds of a product in T, instructions of
// lanes, bytes from the second-level cache and from memory.
template <class T>
inline constexpr double products_a_cycle = sizeof(T) == 2 ? 800 : 100;
inline constexpr double lanes_a_cycle = 128, cache_bytes_a_cycle = 24, memory_bytes_a_cycle = 16;
// Until a block's first copy has landed, and between two barriers.
inline constexpr double cycles_to_begin = 1500, cycles_a_slab = 800;

// Blocks of a kernel on a multiprocessor, by shared memory: see resident_blocks of squeeze-and-excitation.
inline int64_t resident(int64_t shared_bytes, int most, const Device& device) {
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (round_up(shared_bytes, 128) + 1024);
    return std::clamp<int64_t>(by_shared, 1, most);
}

inline double waves(int64_t blocks, int64_t at_once) { return double(ceil_div(blocks, at_once)); }

// Pixels of the image that the tiles along one side read together, and the most that one reads.
struct TileReads {
    int64_t all = 0, most = 0;

    TileReads(int tiles, int64_t step, int64_t length, int64_t before, int64_t size) {
        for (int i = 0; i < tiles; ++i) {
            const int64_t first = i * step - before;
            const int64_t here = std::max<int64_t>(0, std::min(first + length, size) - std::max<int64_t>(first, 0));
            all += here;
            most = std::max(most, here);
        }
    }
};

template <class Traits>
TileReads rows_read(const DepthwiseShape& shape, const ExpandTile& tile) {
    return {tile.down, int64_t(tile.rows) * Traits::stride, tile.in_rows, shape.pad_top, shape.height};
}

template <class Traits>
TileReads columns_read(const DepthwiseShape& shape, const ExpandTile& tile) {
    return {tile.across, int64_t(tile.columns) * Traits::stride, tile.in_columns, shape.pad_left, shape.width};
}

template <class T>
struct ExpandDepthwiseKernels {
    using Element = T;
    using Tile = ExpandTile;
    static constexpr const char* does_not_fit = "x has too many channels for a tile in shared memory";

    template <class F>
    static auto with_traits(const ExpandDepthwise& problem, const F& f) {
        const bool one = problem.shape.stride == 1;
        if (problem.shape.kernel == 3)
            return one ? f(ExpandDepthwiseTraits<T, 3, 1>()) : f(ExpandDepthwiseTraits<T, 3, 2>());
        return one ? f(ExpandDepthwiseTraits<T, 5, 1>()) : f(ExpandDepthwiseTraits<T, 5, 2>());
    }

    // The tile of this many patches and channels, and the shared memory that it takes.
    template <class Traits>
    static int64_t lay_out(const ExpandDepthwise& problem, ExpandTile& tile) {
        const DepthwiseShape& shape = problem.shape;
        tile.down = int(ceil_div(shape.out_height, tile.rows)),
        tile.across = int(ceil_div(shape.out_width, tile.columns));
        tile.in_rows = (tile.rows - 1) * Traits::stride + Traits::kernel;
        tile.in_columns = (tile.columns - 1) * Traits::stride + Traits::kernel;
        tile.slabs = int(ceil_div(shape.channels, tile.slab));
        tile.depth = int(round_up(problem.in_channels, depth_step<T>));
        tile.pitch = tile.depth + chunk<T>;
        tile.u_pitch = tile.slab + 8;
        const int64_t pixels = rows_read<Traits>(shape, tile).most * columns_read<Traits>(shape, tile).most;
        const auto beside = [](int64_t place, int64_t bytes) { return place + round_up(bytes, 16); };
        const int64_t weight = beside(0, pixels * tile.pitch * sizeof(T));
        const int64_t u = beside(weight, int64_t(tile.slab) * tile.pitch * sizeof(T));
        const int64_t vectors = beside(u, int64_t(tile.in_rows) * tile.in_columns * tile.u_pitch * sizeof(T));
        const int64_t pool = beside(vectors, int64_t(2) * Traits::rows_of_vectors * tile.slab * sizeof(float));
        const int64_t end = pool + (problem.pool == nullptr ? 0 : 2 * Traits::threads * sizeof(float));
        if (end < int64_t(1) << 30)
            tile.weight = int(weight), tile.u = int(u), tile.vectors = int(vectors), tile.pool = int(pool);
        return end;
    }

    // Cycles until all blocks are done.
    template <class Traits>
    static double cost(const ExpandDepthwise& problem, const ExpandTile& tile, int64_t shared_bytes,
                       const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const TileReads rows = rows_read<Traits>(shape, tile), columns = columns_read<Traits>(shape, tile);
        const double parts = double(tile.down) * tile.across;
        const double pixels = double(rows.all) * columns.all / parts, slabs = double(tile.slabs) / tile.groups;
        // A warp takes whole squares, and eight warps take turns.
        const double squares = std::ceil(pixels / tile_side) * (tile.slab / tile_side);
        const double product = std::max(squares, double(Traits::warps)) * tile_side * tile_side;
        const double patches = double(tile.rows / Traits::side) * (tile.columns / Traits::side);
        const double turns = std::ceil(patches * (tile.slab / 2) / Traits::threads) * Traits::threads;
        constexpr double a_patch =
            2.0 * Traits::side * Traits::side * (Traits::taps + 10) + 3.0 * Traits::reach * Traits::reach;
        const double work =
            product * tile.depth / products_a_cycle<T> + product * 14 / lanes_a_cycle + turns * a_patch / lanes_a_cycle;
        const double outputs = double(shape.out_height) * shape.out_width / parts * tile.slab;
        const double bytes =
            (pixels * tile.depth / slabs + double(tile.slab) * tile.depth) * sizeof(T) / cache_bytes_a_cycle +
            outputs * sizeof(T) / memory_bytes_a_cycle;
        const int64_t together = resident(shared_bytes, Traits::blocks, device);
        // Blocks beside each other share a multiprocessor's units, and compute while others wait.
        const double alone = work + bytes + cycles_a_slab;
        const double slab = together == 1 ? alone : std::max({together * work, together * bytes, alone});
        const int64_t blocks = shape.batch * tile.down * tile.across * tile.groups;
        return waves(blocks, together * device.multiprocessors) * (std::ceil(slabs) * slab + cycles_to_begin);
    }

    template <class Traits>
    static Cut<ExpandTile> cut(const ExpandDepthwise& problem, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        constexpr int side = Traits::side, most = 64;
        Cut<ExpandTile> best{};
        double least = 0;
        const auto sides = [](int64_t length) { return int(std::min<int64_t>(round_up(length, side), most)); };
        for (int slab : {32, 64, 128})
            for (int rows = side; rows <= sides(shape.out_height); rows += side)
                for (int columns = side; columns <= sides(shape.out_width); columns += side) {
                    ExpandTile tile{};
                    tile.rows = rows, tile.columns = columns, tile.slab = slab;
                    const int64_t bytes = lay_out<Traits>(problem, tile);
                    if (bytes > device.max_shared_bytes) continue;
                    for (tile.groups = 1; tile.groups <= tile.slabs; tile.groups *= 2) {
                        const double found = cost<Traits>(problem, tile, bytes, device);
                        if (best.threads != 0 && found >= least) continue;
                        least = found;
                        best = {tile, shape.batch * tile.down * tile.across * tile.groups, Traits::threads, int(bytes)};
                    }
                }
        return best;
    }

    static int64_t parts(const ExpandTile& tile) { return int64_t(tile.down) * tile.across; }
    static size_t workspace_bytes(const ExpandDepthwise&, const ExpandTile&) { return 0; }
    static int launches(const ExpandDepthwise&, const ExpandTile&) { return 1; }

    template <class Traits>
    static int64_t read_elements(const ExpandDepthwise& problem, const ExpandTile& tile) {
        const int64_t pixels =
            rows_read<Traits>(problem.shape, tile).all * columns_read<Traits>(problem.shape, tile).all;
        return problem.shape.batch * pixels * problem.in_channels * tile.groups;
    }

    template <class Traits>
    static cudaError_t launch(const ExpandDepthwise& problem, const Cut<ExpandTile>& cut, const Device& device) {
        const DepthwiseShape& shape = problem.shape;
        const ExpandArguments<T> arguments{int(shape.channels),
                                           int(problem.in_channels),
                                           int(shape.height),
                                           int(shape.width),
                                           int(shape.out_height),
                                           int(shape.out_width),
                                           shape.pad_top,
                                           shape.pad_left,
                                           cut.tile,
                                           problem.activation,
                                           static_cast<const T*>(problem.x),
                                           problem.expand_weight,
                                           problem.expand_norm,
                                           problem.depthwise_weight,
                                           problem.depthwise_norm,
                                           static_cast<T*>(problem.y),
                                           problem.pool};
        return effnet::cuda::launch<&expand_depthwise_kernel<Traits>>(dim3(unsigned(cut.blocks)), cut.threads,
                                                                      cut.shared_bytes, device.stream, arguments);
    }
};

// What a block makes.
struct ProjectTile {
    int rows, columns;
};

template <class T>
struct GatedProjectKernels {
    using Element = T;
    using Tile = ProjectTile;
    static constexpr const char* does_not_fit = "no tile fits shared memory";
    using Tall = ProjectTraits<T, 8, 1, 1>;
    using Square = ProjectTraits<T, 4, 2, 1>;
    using Wide = ProjectTraits<T, 2, 4, 1>;
    using Deep = ProjectTraits<T, 1, 1, 8>;

    template <class Traits>
    static int64_t blocks_of(const GatedProject& problem) {
        return ceil_div(problem.images * problem.pixels, Traits::rows) *
               ceil_div(problem.out_channels, Traits::columns);
    }

    // Cycles: a block reads its rows and columns through the second-level cache, and computes meanwhile.
    template <class Traits>
    static double cost(const GatedProject& problem, const Device& device) {
        const double steps = double(ceil_div(problem.channels, Traits::whole_depth));
        // Blocks beside each other read the same rows: one of them from memory, the others from the cache.
        const double first = 1.0 / ceil_div(problem.out_channels, Traits::columns);
        const double elements = Traits::rows * (first / memory_bytes_a_cycle + (1 - first) / cache_bytes_a_cycle) +
                                Traits::columns / cache_bytes_a_cycle;
        const double bytes = elements * Traits::whole_depth * sizeof(T);
        const double work = double(Traits::warps) * tile_side * tile_side * Traits::depth / products_a_cycle<T>;
        const int64_t together = resident(Traits::shared_bytes, Traits::blocks, device);
        const double step = std::max({together * bytes, together * work, cycles_a_slab});
        const double written = double(Traits::rows) * Traits::columns * sizeof(T) / memory_bytes_a_cycle;
        return waves(blocks_of<Traits>(problem), together * device.multiprocessors) *
               (steps * step + together * written + cycles_to_begin);
    }

    // The device is not known here, so the choice is for one like an A100 or H100, and results are the same on all.
    template <class F>
    static auto with_traits(const GatedProject& problem, const F& f) {
        constexpr Device usual{0, 128, 8, 0, 163 * 1024, nullptr};
        const double tall = cost<Tall>(problem, usual), deep = cost<Deep>(problem, usual);
        // Multiply-adds in float take longer than what they read, whatever the tile.
        if constexpr (sizeof(T) == 2) {
            const double square = cost<Square>(problem, usual), wide = cost<Wide>(problem, usual);
            if (square < std::min({tall, wide, deep})) return f(Square());
            if (wide < std::min(tall, deep)) return f(Wide());
        }
        return deep < tall ? f(Deep()) : f(Tall());
    }

    template <class Traits>
    static Cut<ProjectTile> cut(const GatedProject& problem, const Device& device) {
        if (Traits::shared_bytes > device.max_shared_bytes) return {};
        return {{Traits::rows, Traits::columns}, blocks_of<Traits>(problem), Traits::threads, Traits::shared_bytes};
    }

    static int64_t parts(const ProjectTile&) { return 1; }
    static size_t workspace_bytes(const GatedProject&, const ProjectTile&) { return 0; }
    static int launches(const GatedProject&, const ProjectTile&) { return 1; }

    template <class Traits>
    static int64_t read_elements(const GatedProject& problem, const ProjectTile&) {
        const int64_t rows = problem.images * problem.pixels;
        const int64_t again = ceil_div(problem.out_channels, Traits::columns);
        return rows * problem.channels * again + (problem.residual == nullptr ? 0 : rows * problem.out_channels);
    }

    template <class Traits>
    static cudaError_t launch(const GatedProject& problem, const Cut<ProjectTile>& cut, const Device& device) {
        const ProjectArguments<T> arguments{int(problem.pixels),
                                            int(problem.channels),
                                            int(problem.out_channels),
                                            int(problem.images * problem.pixels),
                                            int(ceil_div(problem.out_channels, Traits::columns)),
                                            static_cast<const T*>(problem.x),
                                            problem.gates,
                                            problem.weight,
                                            problem.norm,
                                            problem.image_scale,
                                            static_cast<const T*>(problem.residual),
                                            static_cast<T*>(problem.y)};
        return effnet::cuda::launch<&gated_project_kernel<Traits>>(dim3(unsigned(cut.blocks)), cut.threads,
                                                                   cut.shared_bytes, device.stream, arguments);
    }
};

}  // namespace effnet::cuda
