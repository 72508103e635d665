// Matrix products on register tiles: a panel of B (two vectors wide, packed) times a few rows of A, accumulated in
// registers.
#pragma once

#include "operand.h"
#include "transpose.h"

EFFNET_NAMESPACE_BEGIN

// Rows of the register tile: with two vectors a row and two of B they fill the register file, less one for the
// broadcast.
#if EFFNET_VECTOR_BYTES == 64
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif

// to[m][:] (+)= sum over k of a(m, k) * b(k, :) for M rows and W vectors of columns; a(m, k) is a[m * a_row + k *
// a_step].
template <int M, int W, bool ACCUMULATE, class A>
inline void register_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, A* to,
                          int64_t to_step) {
    constexpr int L = lanes<A>;
    Vec<A> sum[M][W] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec<A> column[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) column[w] = load(b + k * b_step + w * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const A s = a[m * a_row + k * a_step];
#pragma GCC unroll 2
            for (int w = 0; w < W; ++w) sum[m][w] += s * column[w];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) {
            A* at = to + m * to_step + w * L;
            store(at, ACCUMULATE ? load(at) + sum[m][w] : sum[m][w]);
        }
}

template <int W, bool ACCUMULATE, class A>
inline void panel_of(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step,
                     A* to, int64_t to_step) {
    const auto tile = [&](auto size, int64_t m) {
        register_tile<decltype(size)::value, W, ACCUMULATE>(depth, a + m * a_row, a_row, a_step, b, b_step,
                                                            to + m * to_step, to_step);
    };
    int64_t m = 0;
    for (; m + tile_rows <= rows; m += tile_rows) tile(Size<tile_rows>{}, m);
#if EFFNET_VECTOR_BYTES == 64
    if (m + 8 <= rows) tile(Size<8>{}, m), m += 8;
#endif
    if (m + 4 <= rows) tile(Size<4>{}, m), m += 4;
    if (m + 2 <= rows) tile(Size<2>{}, m), m += 2;
    if (m < rows) tile(Size<1>{}, m);
}

// Products are summed in runs of this many terms: a run of a packed panel stays in L1 while all rows pass, and the
// rounding error of a sum grows with its length.
constexpr int64_t run_length = 128;

// The same for any number of rows and up to `slab` columns, of which at least `columns` are written: whole vectors.
template <bool ACCUMULATE = false, class A>
inline void panel(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b,
                  int64_t b_step, A* to, int64_t to_step) {
    for (int64_t k = 0; k < depth; k += run_length) {
        const int64_t run = smaller(run_length, depth - k);
        const A *ak = a + k * a_step, *bk = b + k * b_step;
        const bool narrow = columns <= lanes<A>;
        if (ACCUMULATE || k > 0) {
            if (narrow)
                panel_of<1, true>(rows, run, ak, a_row, a_step, bk, b_step, to, to_step);
            else
                panel_of<2, true>(rows, run, ak, a_row, a_step, bk, b_step, to, to_step);
        } else {
            if (narrow)
                panel_of<1, false>(rows, run, ak, a_row, a_step, bk, b_step, to, to_step);
            else
                panel_of<2, false>(rows, run, ak, a_row, a_step, bk, b_step, to, to_step);
        }
    }
}

// Pixels whose results wait in L1 for their epilogue.
constexpr int64_t epilogue_rows = 4 * tile_rows;

EFFNET_NAMESPACE_END
