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

// B(k, n) = w[n * w_n + k * w_k], where one of the two steps is 1, in panels [n / slab][depth][slab], zeros behind the
// last column.
template <class A>
inline Buffer<A> pack(const A* w, int64_t w_n, int64_t w_k, int64_t columns, int64_t depth) {
    constexpr int S = slab<A>;
    const int64_t panels = ceil_div(columns, S);
    Buffer<A> packed(panels * depth * S);
    A* const to = packed;
    parallel(panels, [=](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t valid = smaller(S, columns - p * S);
            A* panel_to = to + p * depth * S;
            if (valid < S) std::memset(panel_to, 0, size_t(depth) * S * sizeof(A));
            if (w_n == 1) {
                for (int64_t k = 0; k < depth; ++k)
                    std::memcpy(panel_to + k * S, w + p * S + k * w_k, size_t(valid) * sizeof(A));
                continue;
            }
            // Blocks of a cache line in k keep both the rows read and the lines written in L1.
            for (int64_t k0 = 0; k0 < depth; k0 += 16)
                for (int64_t n = 0; n < valid; ++n)
                    for (int64_t k = k0; k < smaller(k0 + 16, depth); ++k)
                        panel_to[k * S + n] = w[(p * S + n) * w_n + k * w_k];
        }
    });
    return packed;
}

// Rows of x that one task stages at a time: a multiple of the register tile whose staged copy stays in L2.
inline int64_t block_rows(int64_t depth, int64_t rows) {
    const int64_t fit = larger(1, 32768 / larger(depth, 1) / tile_rows) * tile_rows;
    const int64_t balanced = round_up(ceil_div(rows, 8), tile_rows);
    return smaller(smaller(fit, 8 * tile_rows), larger(balanced, tile_rows));
}

// Pixels whose results wait in L1 for their epilogue.
constexpr int64_t epilogue_rows = 4 * tile_rows;

// One panel of `count` rows of A, through the epilogue to pixels [first, first + count).
template <class A, class O>
inline void product_panel(int64_t first, int64_t count, int64_t depth, const A* a, int64_t a_row, const A* packed,
                          int64_t c, int64_t n, const Epilogue<O>& epilogue) {
    constexpr int S = slab<A>;
    if constexpr (sizeof(O) == sizeof(A)) {
        if (epilogue.direct() && n % lanes<A> == 0) {
            panel(count, n, depth, a, a_row, 1, packed, S, epilogue.out + first * epilogue.channels + c,
                  epilogue.channels);
            return;
        }
    }
    alignas(64) A tile[epilogue_rows * S];
    for (int64_t m = 0; m < count; m += epilogue_rows) {
        const int64_t rows = smaller(epilogue_rows, count - m);
        panel(rows, n, depth, a + m * a_row, a_row, 1, packed, S, tile, S);
        epilogue(first + m, rows, c, n, tile, S);
    }
}

// out(pixel, :) = epilogue(x(pixel, :) * B) for all pixels; B is packed with `depth` = x.channels.
template <class T, class O>
inline void product(int64_t pixels, const Source<T>& x, const Compute<T>* packed, int64_t columns,
                    const Epilogue<O>& epilogue) {
    using A = Compute<T>;
    constexpr int S = slab<A>;
    const int64_t depth = x.channels, panels = ceil_div(columns, S);
    const int64_t rows = block_rows(depth, pixels), blocks = ceil_div(pixels, rows);
    const int64_t groups = smaller(panels, ceil_div(8, larger(blocks, 1)));
    parallel(blocks * groups, [&](int64_t begin, int64_t end) {
        const int64_t a_row = x.direct() ? depth : round_up(depth, lanes<A>);
        const Buffer<A> staged(x.direct() ? 0 : rows * a_row);
        int64_t staged_block = -1;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task / groups, group = task % groups;
            const int64_t first = block * rows, count = smaller(rows, pixels - first);
            const A* a = staged;
            if (x.direct()) {
                a = reinterpret_cast<const A*>(x.data) + first * depth;
            } else if (block != staged_block) {
                x.stage(first, count, 0, depth, staged, a_row);
                staged_block = block;
            }
            for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; ++p)
                product_panel(first, count, depth, a, a_row, packed + p * depth * S, p * S, smaller(S, columns - p * S),
                              epilogue);
        }
    });
}

// grad_weight[n][k] = sum over pixels of grad[pixel][n] * x(pixel, k), in two stages: partial sums over fixed ranges of
// pixels (so that the result does not depend on the number of threads), then their sum.
template <class T>
inline void weight_gradient(int64_t pixels, const Compute<T>* grad, int64_t out, const Source<T>& x,
                            Compute<T>* grad_weight) {
    using A = Compute<T>;
    constexpr int S = slab<A>;
    const int64_t in = x.channels, panels = ceil_div(in, S), padded = panels * S;
    const int64_t parts = larger(1, smaller(8, pixels / 1024));
    const int64_t groups = smaller(panels, larger(ceil_div(panels, 8), ceil_div(8, parts)));
    const int64_t step = 128;
    Buffer<A> partial = zeros<A>(parts * out * padded);
    parallel(parts * groups, [&](int64_t begin, int64_t end) {
        Buffer<A> staged(step * ceil_div(panels, groups) * S);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t part = task / groups, group = task % groups;
            const int64_t p0 = panels * group / groups, p1 = panels * (group + 1) / groups;
            const int64_t c0 = p0 * S, width = (p1 - p0) * S, valid = smaller(width, in - c0);
            const bool direct = x.direct() && valid == width;
            if (valid < width) std::memset(staged, 0, size_t(step * width) * sizeof(A));
            A* sum = partial + part * out * padded + c0;
            for (int64_t first = pixels * part / parts; first < pixels * (part + 1) / parts; first += step) {
                const int64_t count = smaller(step, pixels * (part + 1) / parts - first);
                const A* b = reinterpret_cast<const A*>(x.data) + first * in + c0;
                if (!direct) {
                    x.stage(first, count, c0, valid, staged, width);
                    b = staged;
                }
                for (int64_t p = 0; p < p1 - p0; ++p)
                    panel<true>(out, smaller(S, valid - p * S), count, grad + first * out, 1, out, b + p * S,
                                direct ? in : width, sum + p * S, padded);
            }
        }
    });
    parallel(out, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            for (int64_t k = 0; k < in; ++k) {
                A sum = 0;
                for (int64_t part = 0; part < parts; ++part) sum += partial[(part * out + n) * padded + k];
                grad_weight[n * in + k] = sum;
            }
    });
}

EFFNET_NAMESPACE_END
