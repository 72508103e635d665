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
struct Cut {
    int64_t batch, channels, rows, columns;
    int element_bytes, warm_up;
    int width, thread_columns, threads, blocks;  // of the kernel's traits
    int stride, halo;                            // pixels that a row of n columns reads: n * stride + halo
    int most_side;                               // of a slab and of such a row, in elements and pixels
    int first_row = 0, first_column = 0;         // number of the first step
};

// A bulk copy brings boxes of at most so many elements a side.
inline int side_limit(bool bulk) { return bulk ? 256 : std::numeric_limits<int>::max(); }

struct CutTile {
    DepthwiseTile tile;
    int threads, shared_bytes;
};

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

inline double usefulness(const Cut& cut, const DepthwiseTile& tile, int threads) {
    const double pixels = tile.groups * cut.thread_columns * cut.stride, bytes = tile.slab * cut.element_bytes;
    const double threads_used = double(cut.channels) / cut.width * (double(cut.columns) / cut.thread_columns) /
                                (double(tile.slabs) * tile.tiles * threads);
    const double columns_once = tile.tiles == 1 ? 1.0 : pixels / (pixels + cut.halo);
    const double sectors = tile.slabs == 1 || tile.slab * cut.element_bytes % 32 == 0 ? 1.0 : bytes / (bytes + 32);
    const double bursts = tile.slabs == 1 || bytes >= 128 ? 1.0 : bytes >= 64 ? 0.95 : 0.8;
    // Threads that a multiprocessor's registers have room for, and those of whole blocks; a block of one warp has none
    // to hide its barriers behind.
    const double room = cut.threads * cut.blocks;
    const double resident = int(room) / threads * threads / room * (threads < 64 ? 0.95 : 1.0);
    return threads_used * columns_once * sectors * bursts * resident;
}

}  // namespace detail

// shared_bytes(groups, pitch, slab): what a block of a candidate needs.
template <class SharedBytes>
CutTile choose_tile(const Cut& cut, int most_threads, bool chunks, const Device& device,
                    const SharedBytes& shared_bytes) {
    const int64_t all_vectors = ceil_div(cut.channels, cut.width), chunk = 16 / cut.element_bytes;
    const int64_t granule = chunks ? std::max<int64_t>(chunk / cut.width, 1) : 1;
    const int64_t all_groups = ceil_div(cut.columns, cut.thread_columns);
    CutTile best{};
    double best_score = -1;
    for (int64_t n = 1, last = 0; n <= ceil_div(all_vectors, granule); ++n) {
        const int64_t vectors = round_up(ceil_div(all_vectors, n), granule);
        if (vectors > most_threads || vectors * cut.width > cut.most_side || vectors == last) continue;
        last = vectors;
        CutTile found{};
        DepthwiseTile& tile = found.tile;
        tile.chunks = chunks;
        tile.first_row = cut.first_row;
        tile.first_column = cut.first_column;
        tile.together = cut.channels % cut.width == 0;
        tile.vectors = int(vectors);
        tile.slab = int(vectors * cut.width);
        tile.slabs = int(ceil_div(all_vectors, vectors));
        tile.pitch = int(round_up(tile.slab, chunk));
        const int64_t in_row = (cut.most_side - cut.halo) / (cut.thread_columns * cut.stride);
        for (int64_t most = std::min({all_groups, most_threads / vectors, in_row});; --most) {
            tile.tiles = int(ceil_div(all_groups, most));
            tile.groups = int(ceil_div(all_groups, tile.tiles));
            found.threads = int(round_up(vectors * tile.groups, 32));
            found.shared_bytes = shared_bytes(tile.groups, tile.pitch, tile.slab);
            if (most == 1 || found.shared_bytes <= device.max_shared_bytes / 2) break;
        }
        if (found.shared_bytes > device.max_shared_bytes) continue;
        const double score = detail::usefulness(cut, tile, found.threads);
        if (score > best_score * 1.02) best = found, best_score = score;
    }
    return best;
}

// How many blocks of a tile are on the GPU at once.
inline int64_t resident_blocks(const Cut& cut, const CutTile& found, const Device& device) {
    const int64_t by_registers = int64_t(cut.threads) * cut.blocks / found.threads;
    const int64_t by_shared = (device.max_shared_bytes + 1024) / (found.shared_bytes + 1024);
    return device.multiprocessors * std::max<int64_t>(1, std::min<int64_t>({by_registers, by_shared, 32}));
}

// The shortest strip that is worth its warm-up; where there is little to do, all multiprocessors are worth more.
inline int64_t shortest_strip(const Cut& cut, const CutTile& found, const Device& device) {
    const int64_t tall = std::max(4, 2 * cut.warm_up), strips = ceil_div(cut.rows, tall);
    const bool enough = cut.batch * found.tile.tiles * found.tile.slabs * strips >= 2 * device.multiprocessors;
    return std::min<int64_t>(cut.rows, enough ? tall : 2);
}

inline void choose_strips(const Cut& cut, CutTile& found, const Device& device) {
    DepthwiseTile& tile = found.tile;
    const int64_t resident = resident_blocks(cut, found, device);
    const int64_t shortest = shortest_strip(cut, found, device);
    double best = -1;
    for (int64_t strips = 1; strips <= ceil_div(cut.rows, shortest); ++strips) {
        const int64_t rows = ceil_div(cut.rows, strips), items = cut.batch * tile.tiles * ceil_div(cut.rows, rows);
        const int64_t blocks = items * tile.slabs;
        // A GPU that is not full gives each block more of itself, but hides less of its latency.
        const double share = 0.5 + 0.5 * double(round_up(blocks, device.multiprocessors)) / resident;
        const double rounds = blocks > resident ? double(ceil_div(blocks, resident)) : std::min(share, 1.0);
        const double time = rounds * double(rows + cut.warm_up);
        if (best >= 0 && time >= best * 0.98) continue;
        best = time;
        tile.strip_rows = int(rows);
        tile.strips = int(ceil_div(cut.rows, rows));
    }
    tile.items = int(cut.batch * tile.tiles * tile.strips);
    const int64_t most = std::min<int64_t>(tile.items, std::max<int64_t>(1, resident / tile.slabs));
    tile.walkers = int(ceil_div(tile.items, ceil_div(tile.items, std::max<int64_t>(most, 1))));
}

// The cut of a whole problem: blocks are smaller where there would not be one for each multiprocessor.
template <class SharedBytes>
CutTile cut_problem(const Cut& cut, bool chunks, const Device& device, const SharedBytes& shared_bytes) {
    CutTile found;
    for (int threads = cut.threads;; threads /= 2) {
        const CutTile smaller = choose_tile(cut, threads, chunks, device, shared_bytes);
        if (threads < cut.threads && smaller.threads == 0) break;
        found = smaller;
        const int64_t strips = ceil_div(cut.rows, shortest_strip(cut, found, device));
        if (threads <= 64 || cut.batch * found.tile.tiles * found.tile.slabs * strips >= device.multiprocessors) break;
    }
    choose_strips(cut, found, device);
    return found;
}

}  // namespace effnet::cuda
