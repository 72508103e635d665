// Matrix products on register tiles: a panel of B (two vectors wide, packed) times a few rows of A, accumulated in
// registers.
#pragma once

#include "operand.h"

EFFNET_NAMESPACE_BEGIN

// Rows of the register tile: with two vectors a row and two of B they fill the register file, less one for the
// broadcast.
#if EFFNET_VECTOR_BYTES == 64
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif

// sum over k of a(m, k) * b(k, :) for M rows; a(m, k) is a[m * a_row + k * a_step]. Calls finish(m, first vector,
// second vector).
template <int M, class A, class Finish>
inline void register_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step,
                          const Finish& finish) {
    Vec<A> sum[M][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const Vec<A> b0 = load(b + k * b_step), b1 = load(b + k * b_step + lanes<A>);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const A s = a[m * a_row + k * a_step];
            sum[m][0] += s * b0;
            sum[m][1] += s * b1;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) finish(m, sum[m][0], sum[m][1]);
}

// The same for any number of rows; finish gets the row's number.
template <class A, class Finish>
inline void panel(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step,
                  const Finish& finish) {
    int64_t m = 0;
    const auto from = [&](int i, Vec<A> v0, Vec<A> v1) { finish(m + i, v0, v1); };
    for (; m + tile_rows <= rows; m += tile_rows)
        register_tile<tile_rows>(depth, a + m * a_row, a_row, a_step, b, b_step, from);
#if EFFNET_VECTOR_BYTES == 64
    for (; m + 8 <= rows; m += 8) register_tile<8>(depth, a + m * a_row, a_row, a_step, b, b_step, from);
#endif
    for (; m + 4 <= rows; m += 4) register_tile<4>(depth, a + m * a_row, a_row, a_step, b, b_step, from);
    for (; m + 2 <= rows; m += 2) register_tile<2>(depth, a + m * a_row, a_row, a_step, b, b_step, from);
    for (; m < rows; ++m) register_tile<1>(depth, a + m * a_row, a_row, a_step, b, b_step, from);
}

// B(k, n) = w[n * w_n + k * w_k] in panels [n / slab][depth][slab], zeros behind the last column.
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

// out(pixel, :) = epilogue(x(pixel, :) * B) for all pixels; B is packed with `depth` = x.channels.
template <class T, class Finish>
inline void product(int64_t pixels, const Source<T>& x, const Compute<T>* packed, int64_t columns,
                    const Finish& epilogue) {
    using A = Compute<T>;
    constexpr int S = slab<A>;
    const int64_t depth = x.channels, panels = ceil_div(columns, S);
    const int64_t rows = block_rows(depth, pixels), blocks = ceil_div(pixels, rows);
    const int64_t groups = smaller(panels, ceil_div(8, larger(blocks, 1)));
    parallel(blocks * groups, [&](int64_t begin, int64_t end) {
        Buffer<A> staged(x.direct() ? 0 : rows * round_up(depth, lanes<A>));
        int64_t staged_block = -1;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task / groups, group = task % groups;
            const int64_t first = block * rows, count = smaller(rows, pixels - first);
            const A* a = nullptr;
            int64_t a_row = depth;
            if (x.direct()) {
                a = reinterpret_cast<const A*>(x.data) + first * depth;
            } else {
                a_row = round_up(depth, lanes<A>);
                if (block != staged_block)
                    for (int64_t r = 0; r < count; ++r) x.stage(first + r, 0, depth, staged + r * a_row);
                staged_block = block;
                a = staged;
            }
            for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; ++p) {
                const int64_t c = p * S;
                const int n0 = int(smaller(lanes<A>, columns - c)), n1 = int(columns - c) - n0;
                panel<A>(count, depth, a, a_row, 1, packed + p * depth * S, S, [&](int64_t m, Vec<A> v0, Vec<A> v1) {
                    epilogue(first + m, c, v0, n0);
                    if (n1 > 0) epilogue(first + m, c + lanes<A>, v1, n1 < lanes<A> ? n1 : lanes<A>);
                });
            }
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
                    for (int64_t r = 0; r < count; ++r) x.stage(first + r, c0, valid, staged + r * width);
                    b = staged;
                }
                for (int64_t p = 0; p < p1 - p0; ++p)
                    panel<A>(out, count, grad + first * out, 1, out, b + p * S, direct ? in : width,
                             [&](int64_t m, Vec<A> v0, Vec<A> v1) {
                                 A* to = sum + m * padded + p * S;
                                 store(to, load(to) + v0);
                                 store(to + lanes<A>, load(to + lanes<A>) + v1);
                             });
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
