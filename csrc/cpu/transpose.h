// Transposition of matrices by register blocks: packs weights, and turns NCHW into NHWC and back.
#pragma once

#include "parallel.h"

EFFNET_NAMESPACE_BEGIN

// Elements by their size alone: a transposition moves bits.
template <size_t BYTES>
struct IntegerOf;
template <>
struct IntegerOf<2> {
    typedef uint16_t type;
};
template <>
struct IntegerOf<4> {
    typedef uint32_t type;
};
template <>
struct IntegerOf<8> {
    typedef uint64_t type;
};

template <class U>
inline Vec<U> load_bits(const U* p, int n) {
    Vec<U> v = {};
    if (n >= lanes<U>)
        std::memcpy(&v, p, sizeof(v));
    else
        std::memcpy(&v, p, size_t(n) * sizeof(U));
    return v;
}

template <class U>
inline void store_bits(U* p, Vec<U> v, int n) {
    if (n >= lanes<U>)
        std::memcpy(p, &v, sizeof(v));
    else
        std::memcpy(p, &v, size_t(n) * sizeof(U));
}

// rows[i][j] becomes rows[j][i] for a square of L x L: log2(L) rounds of interleaving row i with row i + L / 2.
template <class U>
inline void transpose_square(Vec<U> (&rows)[lanes<U>]) {
    constexpr int L = lanes<U>;
#if defined(__GNUC__) && !defined(__clang__)
    Vec<U> low, high;
    for (int i = 0; i < L; ++i) {
        low[i] = U(i / 2 + (i % 2) * L);
        high[i] = U(L / 2 + i / 2 + (i % 2) * L);
    }
#pragma GCC unroll 8
    for (int round = 1; round < L; round *= 2) {
        Vec<U> next[L];
#pragma GCC unroll 32
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
        }
#pragma GCC unroll 32
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
#else
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < i; ++j) {
            const U kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
#endif
}

// The values at even and at odd positions of a row of `count`.
template <class T>
inline void split_pairs(int64_t count, const T* row, T* even, T* odd) {
    int64_t i = 0;
#if defined(__GNUC__) && !defined(__clang__)
    constexpr int L = lanes<T>;
    using U = typename IntegerOf<sizeof(T)>::type;
    Vec<U> evens, odds;
    for (int j = 0; j < L; ++j) {
        evens[j] = U(2 * j);
        odds[j] = U(2 * j + 1);
    }
    for (; 2 * (i + L) <= count; i += L) {
        const Vec<T> a = load(row + 2 * i), b = load(row + 2 * i + L);
        store(even + i, __builtin_shuffle(a, b, evens));
        store(odd + i, __builtin_shuffle(a, b, odds));
    }
#endif
    for (; 2 * i < count; ++i) {
        even[i] = row[2 * i];
        if (2 * i + 1 < count) odd[i] = row[2 * i + 1];
    }
}

template <class U>
inline void transpose_bits(int64_t rows, int64_t columns, const U* from, int64_t from_step, U* to, int64_t to_step,
                           int64_t ahead) {
    constexpr int L = lanes<U>;
    for (int64_t i = 0; i < rows; i += L)
        for (int64_t j = 0; j < columns; j += L) {
            const int m = int(smaller(L, rows - i)), n = int(smaller(L, columns - j));
            const U* const corner = from + i * from_step + j;
            U* const target = to + j * to_step + i;
            Vec<U> block[L];
            if (m == L && n == L) {
#pragma GCC unroll 32
                for (int r = 0; r < L; ++r) {
                    std::memcpy(&block[r], corner + r * from_step, sizeof(block[r]));
                    // So many rows at once are more than the processor follows by itself.
                    __builtin_prefetch(corner + r * from_step + ahead, 0, 2);
                }
                transpose_square<U>(block);
#pragma GCC unroll 32
                for (int r = 0; r < L; ++r) std::memcpy(target + r * to_step, &block[r], sizeof(block[r]));
                continue;
            }
            for (int r = 0; r < L; ++r) block[r] = r < m ? load_bits(corner + r * from_step, n) : Vec<U>{};
            transpose_square<U>(block);
            for (int r = 0; r < n; ++r) store_bits(target + r * to_step, block[r], m);
        }
}

// to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns. Meanwhile what lies `ahead` of it is
// fetched.
template <class T>
inline void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_step, T* to, int64_t to_step,
                      int64_t ahead = 256 / int64_t(sizeof(T))) {
    using U = typename IntegerOf<sizeof(T)>::type;
    transpose_bits(rows, columns, reinterpret_cast<const U*>(from), from_step, reinterpret_cast<U*>(to), to_step,
                   ahead);
}

// Each image's [rows][columns] to [columns][rows]: NCHW to NHWC with rows = channels, and back with rows = pixels.
template <class T>
inline void transpose_each(int64_t images, int64_t rows, int64_t columns, const T* from, T* to) {
    // Pieces of the longer side, so that the lines written by one piece stay in L1 until they are full.
    const int64_t piece = 128, pieces = ceil_div(columns, piece);
    parallel(images * pieces, [=](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / pieces * rows * columns, first = task % pieces * piece;
            transpose(rows, smaller(piece, columns - first), from + image + first, columns, to + image + first * rows,
                      rows);
        }
    });
}

EFFNET_NAMESPACE_END
