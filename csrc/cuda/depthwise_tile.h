// How a depthwise problem is cut into blocks: a rule of the shape and the device, on the host.
//
// A candidate for the slab is C in n equal parts, for n = 1, 2, .... As many column groups as a block has threads for
// stand beside each other. Of the candidates, that is taken which loses least to
//   threads without an output (a whole number of warps, of groups, of slabs),
//   columns that two tiles both read,
//   parts of 32-byte sectors, where a slab's share of a pixel is no multiple of them.
// Strips are as tall as leaves the GPU full: the number of strips is that with the shortest schedule, in steps of rows,
// counting the `warm_up` steps that every strip takes before its first result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "depthwise.cuh"
#include "host.h"

namespace effnet::cuda {

// What the rule has to know. `columns` and `rows` are steps of the kernel: outputs, or strides of input pixels.
struct Limits {
    int64_t batch, channels, rows, columns;
    int element_bytes, warm_up;
    int width, thread_columns, threads, blocks;  // of the kernel's traits
    int stride, halo;                            // pixels that a row of n columns reads: n * stride + halo
    int most_side;                               // of a slab and of such a row, in elements and pixels
    int first_row = 0, first_column = 0;         // number of the first step
};

// A bulk copy brings boxes of at most so many elements a side.
inline int side_limit(bool bulk) { return bulk ? 256 : std::numeric_limits<int>::max(); }

using CutTile = Cut<DepthwiseTile>;

// Pixels of an image that all strips together read, where a strip reads `rows` x `columns` from `row_step` and
// `column_step` times its number, less top and left, on.
struct Reads {
    int64_t row_step, rows, top, height, column_step, columns, left, width;

    int64_t pixels(const DepthwiseTile& tile) const {
        return along(tile.strips, row_step, rows, top, height) * along(tile.tiles, column_step, columns, left, width);
    }

  private:
    static int64_t along(int count, int64_t step, int64_t length, int64_t before, int64_t size) {
        int64_t sum = 0;
        for (int i = 0; i < count; ++i) {
            const int64_t first = i * step - before;
            sum += std::max<int64_t>(0, std::min(first + length, size) - std::max<int64_t>(first, 0));
        }
        return sum;
    }
};

namespace detail {

inline double usefulness(const Limits& limits, const DepthwiseTile& tile, int threads) {
    const double pixels = tile.groups * limits.thread_columns * limits.stride, bytes = tile.slab * limits.element_bytes;
    const double threads_used = double(limits.channels) / limits.width *
                                (double(limits.columns) / limits.thread_columns) /
                                (double(tile.slabs) * tile.tiles * threads);
    const double columns_once = tile.tiles == 1 ? 1.0 : pixels / (pixels + limits.halo);
    const double sectors = tile.slabs == 1 || tile.slab * limits.element_bytes % 32 == 0 ? 1.0 : bytes / (bytes + 32);
    const double bursts = tile.slabs == 1 || bytes >= 128 ? 1.0 : bytes >= 64 ? 0.95 : 0.8;
    // Threads that a multiprocessor's registers have room for, and those of whole blocks; a block of one warp has none
    // to hide its barriers behind.
    const double room = limits.threads * limits.blocks;
    const double resident = int(room) / threads * threads / room * (threads < 64 ? 0.95 : 1.0);
    return threads_used * columns_once * sectors * bursts * resident;
}

}  // namespace detail

// shared_bytes(groups, pitch, slab): what a block of a candidate needs.
template <class SharedBytes>
CutTile choose_tile(const Limits& limits, int most_threads, bool chunks, const Device& device,
                    const SharedBytes& shared_bytes) {
    const int64_t all_vectors = ceil_div(limits.channels, limits.width), chunk = 16 / limits.element_bytes;
    const int64_t granule = chunks ? std::max<int64_t>(chunk / limits.width, 1) : 1;
    const int64_t all_groups = ceil_div(limits.columns, limits.thread_columns);
    CutTile best{};
    double best_score = -1;
    for (int64_t n = 1, last = 0; n <= ceil_div(all_vectors, granule); ++n) {
        const int64_t vectors = round_up(ceil_div(all_vectors, n), granule);
        if (vectors > most_threads || vectors * limits.width > limits.most_side || vectors == last) continue;
        last = vectors;
        CutTile found{};
        DepthwiseTile& tile = found.tile;
        tile.chunks = chunks;
        tile.first_row = limits.first_row;
        tile.first_column = limits.first_column;
        tile.together = limits.channels % limits.width == 0;
        tile.vectors = int(vectors);
        tile.slab = int(vectors * limits.width);
        tile.slabs = int(ceil_div(all_vectors, vectors));
        tile.pitch = int(round_up(tile.slab, chunk));
        const int64_t in_row = (limits.most_side - limits.halo) / (limits.thread_columns * limits.stride);
        for (int64_t most = std::min({all_groups, most_threads / vectors, in_row});; --most) {
            tile.tiles = int(ceil_div(all_groups, most));
            tile.groups = int(ceil_div(all_groups, tile.tiles));
            found.threads = int(round_up(vectors * tile.groups, 32));
            found.shared_bytes = shared_bytes(tile.groups, tile.pitch, tile.slab);
            if (most == 1 || found.shared_bytes <= device.max_shared_bytes / 2) break;
        }
        if (found.shared_bytes > device.max_shared_bytes) continue;
        const double score = detail::usefulness(limits, tile, found.threads);
        if (score > best_score * 1.02) best = found, best_score = score;
    }
    return best;
}

// How many blocks of a tile are on the GPU at once.
inline int64_t resident_blocks(const Limits& limits, const CutTile& found, const Device& device) {
    const int64_t by_registers = int64_t(limits.threads) * limits.blocks / found.threads;
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (found.shared_bytes + 1024);
    return device.multiprocessors * std::max<int64_t>(1, std::min<int64_t>({by_registers, by_shared, 32}));
}

// The shortest strip that is worth its warm-up; where there is little to do, all multiprocessors are worth more.
inline int64_t shortest_strip(const Limits& limits, const CutTile& found, const Device& device) {
    const int64_t tall = std::max(4, 2 * limits.warm_up), strips = ceil_div(limits.rows, tall);
    const bool enough = limits.batch * found.tile.tiles * found.tile.slabs * strips >= 2 * device.multiprocessors;
    return std::min<int64_t>(limits.rows, enough ? tall : 2);
}

inline void choose_strips(const Limits& limits, CutTile& found, const Device& device) {
    DepthwiseTile& tile = found.tile;
    const int64_t resident = resident_blocks(limits, found, device);
    const int64_t shortest = shortest_strip(limits, found, device);
    double best = -1;
    for (int64_t strips = 1; strips <= ceil_div(limits.rows, shortest); ++strips) {
        const int64_t rows = ceil_div(limits.rows, strips),
                      items = limits.batch * tile.tiles * ceil_div(limits.rows, rows);
        const int64_t blocks = items * tile.slabs;
        // A GPU that is not full gives each block more of itself, but hides less of its latency.
        const double share = 0.5 + 0.5 * double(round_up(blocks, device.multiprocessors)) / resident;
        const double rounds = blocks > resident ? double(ceil_div(blocks, resident)) : std::min(share, 1.0);
        const double time = rounds * double(rows + limits.warm_up);
        if (best >= 0 && time >= best * 0.98) continue;
        best = time;
        tile.strip_rows = int(rows);
        tile.strips = int(ceil_div(limits.rows, rows));
    }
    tile.items = int(limits.batch * tile.tiles * tile.strips);
    const int64_t most = std::min<int64_t>(tile.items, std::max<int64_t>(1, resident / tile.slabs));
    tile.walkers = int(ceil_div(tile.items, ceil_div(tile.items, std::max<int64_t>(most, 1))));
}

// The cut of a whole problem: blocks are smaller where there would not be one for each multiprocessor.
template <class SharedBytes>
CutTile cut_problem(const Limits& limits, bool chunks, const Device& device, const SharedBytes& shared_bytes) {
    CutTile found;
    for (int threads = limits.threads;; threads /= 2) {
        const CutTile smaller = choose_tile(limits, threads, chunks, device, shared_bytes);
        if (threads < limits.threads && smaller.threads == 0) break;
        found = smaller;
        const int64_t strips = ceil_div(limits.rows, shortest_strip(limits, found, device));
        if (threads <= 64 || limits.batch * found.tile.tiles * found.tile.slabs * strips >= device.multiprocessors)
            break;
    }
    choose_strips(limits, found, device);
    found.blocks = int64_t(found.tile.slabs) * found.tile.walkers;
    return found;
}

}  // namespace effnet::cuda
