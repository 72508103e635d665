// Transposition of matrices by register blocks: packs weights, and turns NCHW into NHWC and back.
#pragma once

#include "vec.h"

EFFNET_NAMESPACE_BEGIN

#if defined(__GNUC__) && !defined(__clang__)
typedef int64_t I64 __attribute__((vector_size(EFFNET_VECTOR_BYTES)));
template <class A>
struct MaskOf {
    typedef I32 type;
};
template <>
struct MaskOf<double> {
    typedef I64 type;
};

// rows[i][j] becomes rows[j][i] for a square of L x L: log2(L) rounds of interleaving row i with row i + L / 2.
template <class A>
inline void transpose_square(Vec<A> (&rows)[lanes<A>]) {
    constexpr int L = lanes<A>;
    typename MaskOf<A>::type low, high;
    for (int i = 0; i < L; ++i) {
        low[i] = i / 2 + (i % 2) * L;
        high[i] = L / 2 + i / 2 + (i % 2) * L;
    }
#pragma GCC unroll 8
    for (int round = 1; round < L; round *= 2) {
        Vec<A> next[L];
#pragma GCC unroll 16
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
}
#else
template <class A>
inline void transpose_square(Vec<A> (&rows)[lanes<A>]) {
    constexpr int L = lanes<A>;
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < i; ++j) {
            const A kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
}
#endif

// to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns.
template <class A>
inline void transpose(int64_t rows, int64_t columns, const A* from, int64_t from_step, A* to, int64_t to_step) {
    constexpr int L = lanes<A>;
    for (int64_t i = 0; i < rows; i += L)
        for (int64_t j = 0; j < columns; j += L) {
            const int m = int(smaller(L, rows - i)), n = int(smaller(L, columns - j));
            Vec<A> block[L];
            for (int r = 0; r < L; ++r) block[r] = r < m ? load(from + (i + r) * from_step + j, n) : Vec<A>{};
            transpose_square<A>(block);
            for (int r = 0; r < n; ++r) store(to + (j + r) * to_step + i, block[r], m);
        }
}

EFFNET_NAMESPACE_END
