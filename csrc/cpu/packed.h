// Products with packed weights: out(row, :) = activation(sum over k of left(row, k) * weight(k, :) + bias) + residual.
//
// The weights lie in panels of 16 columns, [columns / 16][terms][16], whatever the instruction set: one layout serves
// every processor, and a tile takes as many neighbouring vectors of columns as fit its registers. A term is one value
// of the compute type, or, for bf16, a pair of neighbouring values, which one instruction multiplies and adds.
#pragma once

#include "activation.h"
#include "parallel.h"
#include "transpose.h"

EFFNET_NAMESPACE_BEGIN

constexpr int panel_columns = 16;

struct BFloat16Pair {
    uint16_t first, second;
};

// How products read values of the storage type T.
template <class T>
struct TermOf {
    using type = Compute<T>;
};
template <>
struct TermOf<bfloat16> {
    using type = BFloat16Pair;
};
template <class T>
using Term = typename TermOf<T>::type;

template <class E>
struct TermTraits {
    using A = E;
    static constexpr int values = 1;
};
template <>
struct TermTraits<BFloat16Pair> {
    using A = float;
    static constexpr int values = 2;
};
template <class E>
constexpr int term_values = TermTraits<E>::values;

template <class E>
inline int64_t term_count(int64_t values) {
    return ceil_div(values, term_values<E>);
}

EFFNET_INLINE Vec<float> load_terms(const float* p) { return load(p); }
EFFNET_INLINE Vec<double> load_terms(const double* p) { return load(p); }
EFFNET_INLINE U32 load_terms(const BFloat16Pair* p) {
    U32 v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

EFFNET_INLINE void store_pairs(Vec<float> first, Vec<float> second, BFloat16Pair* to) {
    const U32 pairs =
        __builtin_convertvector(narrow_bf16(first), U32) | __builtin_convertvector(narrow_bf16(second), U32) << 16;
    std::memcpy(to, &pairs, sizeof(pairs));
}

EFFNET_INLINE void multiply_add(Vec<float>& sum, float a, Vec<float> b) { sum += a * b; }
EFFNET_INLINE void multiply_add(Vec<double>& sum, double a, Vec<double> b) { sum += a * b; }
EFFNET_INLINE void multiply_add(Vec<float>& sum, BFloat16Pair a, U32 b) {
#if defined(__AVX512BF16__)
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bit_cast<int>(a)), (__m512bh)b);
#else
    sum += bit_cast<float>(uint32_t(a.first) << 16) * bit_cast<Vec<float>>(b << 16);
    sum += bit_cast<float>(uint32_t(a.second) << 16) * bit_cast<Vec<float>>(b & 0xffff0000u);
#endif
}

// Packed weights of a product.
template <class E>
struct Panels {
    const E* data;
    int64_t terms, columns;

    int64_t vectors() const { return ceil_div(columns, lanes<typename TermTraits<E>::A>); }
    // The first term of a vector of columns; the next term is panel_columns further.
    const E* vector(int64_t v) const {
        constexpr int64_t in_panel = panel_columns / lanes<typename TermTraits<E>::A>;
        return data + v / in_panel * terms * panel_columns + v % in_panel * lanes<typename TermTraits<E>::A>;
    }
    static int64_t size(int64_t depth, int64_t columns) {
        return round_up(columns, panel_columns) * term_count<E>(depth);
    }
};

// The left side of a product in segments of `terms` terms each: rows of memory `step` apart. A convolution has a
// segment for each row of its filter; a long sum is cut into runs, each summed on its own (`split`), since rounding
// errors grow with the length of a sum.
template <class E>
struct Left {
    static constexpr int most = 16;
    const E* start[most];
    int segments;
    int64_t terms, step;
    bool split;

    static Left rows(const E* from, int64_t terms, int64_t step) {
        constexpr int64_t longest = 256;
        Left left;
        left.segments = int(larger(1, ceil_div(terms, larger(longest, ceil_div(terms, most)))));
        left.terms = ceil_div(terms, left.segments);
        left.step = step;
        left.split = true;
        left.last = terms - (left.segments - 1) * left.terms;
        for (int s = 0; s < left.segments; ++s) left.start[s] = from + s * left.terms;
        return left;
    }
    int64_t last;  // terms of the last segment
};

// to[m][:] = start[:] + left(first + m, :) * W vectors of columns, for M rows. Meanwhile a vector of columns that will
// be needed next comes into the cache, from `ahead`: a network's weights come from far away, each once an image. CLAMP:
// results are cut off at 0 and at `most`.
template <int M, int W, bool CLAMP, class E, class A>
__attribute__((noinline)) void multiply_tile(const Left<E>& left, int64_t first, const E* const* columns,
                                             const E* ahead, const A* start, A* to, int64_t to_step, A most) {
    constexpr int L = lanes<A>;
    const E* b[W];
    Vec<A> sum[M][W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
        b[w] = columns[w];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m][w] = load(start + w * L);
    }
    bool stored = false;
    for (int s = 0; s < left.segments; ++s) {
        const E* a = left.start[s] + first * left.step;
        const int64_t step = left.step, terms = s + 1 < left.segments ? left.terms : left.last;
        for (int64_t k = 0; k < terms; ++k) {
            decltype(load_terms(b[0])) right[W];
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) right[w] = load_terms(b[w] + k * panel_columns);
            __builtin_prefetch(ahead + k * panel_columns);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                for (int w = 0; w < W; ++w) multiply_add(sum[m][w], a[m * step + k], right[w]);
        }
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) b[w] += terms * panel_columns;
        ahead += terms * panel_columns;
        const bool last = s + 1 == left.segments;
        if (!left.split && !last) continue;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) {
                A* const at = to + m * to_step + w * L;
                Vec<A> total = stored ? load(at) + sum[m][w] : sum[m][w];
                if constexpr (CLAMP)
                    if (last) total = at_most(at_least(total, A(0)), most);
                store(at, total);
                sum[m][w] = Vec<A>{};
            }
        stored = true;
    }
}

// Rows of a tile that is W vectors wide: sums, a vector of each column and a broadcast value fill the registers.
template <int W>
constexpr int tile_height = W == 8                      ? 1
                            : EFFNET_VECTOR_BYTES == 64 ? (W == 3 ? 9 : 14)
                                                        : (W == 3   ? 4
                                                           : W == 2 ? 6
                                                                    : 12);

template <int W, class E, class A>
struct Multiply {
    const Left<E>& left;
    const E *columns[W], *ahead[W];
    const A* start;

    Multiply(const Left<E>& left, const Panels<E>& panels, int64_t vector, const A* bias)
        : left(left), start(bias + vector * lanes<A>) {
        for (int w = 0; w < W; ++w) {
            columns[w] = panels.vector(vector + w);
            ahead[w] = panels.vector(smaller(vector + W + w, panels.vectors() - 1));
        }
    }

    // body(first row, rows, columns to fetch ahead) for tiles of equal height, but for one row.
    template <class Body>
    void each_tile(int64_t count, const Body& body) const {
        const int64_t tiles = ceil_div(count, tile_height<W>);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = count * t / tiles;
            body(row, count * (t + 1) / tiles - row, ahead[smaller(t, W - 1)]);
        }
    }

    void operator()(int64_t first, int64_t count, A* to, int64_t to_step) const {
        each_tile(count, [&](int64_t row, int64_t rows, const E* next) {
            tile<tile_height<W>>(rows, first + row, next, to + row * to_step, to_step);
        });
    }

    template <int M, bool CLAMP = false>
    void tile(int64_t rows, int64_t first, const E* next, A* to, int64_t to_step, A most = 0) const {
        if constexpr (M > 1)
            if (rows < M) return tile<M - 1, CLAMP>(rows, first, next, to, to_step, most);
        multiply_tile<M, W, CLAMP>(left, first, columns, next, start, to, to_step, most);
    }
};

// body(Size<W>, first vector) over all vectors: pairs, and one triple where their number is odd. A single row takes
// more columns at a time, since the sums of one tile must outnumber the steps of an addition.
template <class Body>
inline void for_each_column_tile(int64_t begin, int64_t end, bool single_row, const Body& body) {
    int64_t v = begin;
    for (; single_row && v + 8 <= end; v += 8) body(Size<8>{}, v);
    for (; v + 4 <= end || v + 2 == end; v += 2) body(Size<2>{}, v);
    if (v + 3 == end) body(Size<3>{}, v);
    if (v + 1 == end) body(Size<1>{}, v);
}

// What happens to a row of results on its way to memory; the sums hold the bias already.
template <class O>
struct Finish {
    using A = Compute<O>;
    O* out;
    int64_t step, columns;
    Activation activation;
    const O* residual = nullptr;
    const A* image_scale = nullptr;
    int64_t image_pixels = 1;

    // Nothing to do, and nothing to convert, for these columns.
    bool direct(int64_t column, int64_t width) const {
        return sizeof(O) == sizeof(A) && activation == Activation::none && residual == nullptr &&
               image_scale == nullptr && column + width <= columns;
    }

    // Columns [column, column + width) of `count` rows.
    void operator()(int64_t first, int64_t count, int64_t column, int64_t width, const A* values,
                    int64_t values_step) const {
        with_activation(activation, [&](auto kind) {
            for (int64_t i = 0; i < width && column + i < columns; i += lanes<A>) {
                const int n = int(smaller(lanes<A>, columns - column - i));
                const int64_t at = first * step + column + i;
                if (residual != nullptr || image_scale != nullptr) {
                    scale_and_add<kind.value>(first, count, at, n, values + i, values_step);
                    continue;
                }
                // Copies, since a store could change a member for all that the compiler knows.
                const A* from = values + i;
                O* to = out + at;
                const int64_t from_step = values_step, to_step = step;
                if (n == lanes<A>) {
                    for (int64_t r = 0; r < count; ++r, from += from_step, to += to_step)
                        store(to, activate_as<O>(load(from), kind.value));
                } else {
                    for (int64_t r = 0; r < count; ++r, from += from_step, to += to_step)
                        store(to, activate_as<O>(load(from), kind.value), n);
                }
            }
        });
    }

  private:
    template <Activation KIND>
    void scale_and_add(int64_t first, int64_t count, int64_t at, int n, const A* values, int64_t values_step) const {
        for (int64_t r = 0; r < count; ++r) {
            Vec<A> v = activate_as<O>(load(values + r * values_step), KIND);
            if (image_scale != nullptr) v *= image_scale[(first + r) / image_pixels];
            if (residual != nullptr) v += load(residual + at + r * step, n);
            store(out + at + r * step, v, n);
        }
    }
};

// Rows [first, first + count) times the vectors [begin, end) of columns. `left` counts rows from `first`.
template <class E, class A, class O>
inline void multiply_rows(const Left<E>& left, int64_t first, int64_t count, const Panels<E>& panels, int64_t begin,
                          int64_t end, const A* bias, const Finish<O>& finish) {
    constexpr int L = lanes<A>;
    for_each_column_tile(begin, end, count == 1, [&](auto size, int64_t v) {
        constexpr int W = decltype(size)::value;
        const Multiply<W, E, A> multiply(left, panels, v, bias);
        if constexpr (sizeof(O) == sizeof(A))
            if (finish.direct(v * L, W * L))
                return multiply(0, count, finish.out + first * finish.step + v * L, finish.step);
        constexpr int height = tile_height<W>;
        alignas(64) A values[height * W * L];
        multiply.each_tile(count, [&](int64_t row, int64_t rows, const E* next) {
            multiply.template tile<height>(rows, row, next, values, W * L);
            finish(first + row, rows, v * L, W * L, values, W * L);
        });
    });
}

// A vector of `count` values with room for whole panels behind it; zeros where it is null.
template <class A>
class Padded {
  public:
    Padded(const void* from, int64_t count, int64_t rows = 1)
        : own_(from != nullptr && count % panel_columns == 0 ? 0 : rows * round_up(count, panel_columns)),
          data_(static_cast<const A*>(from)) {
        if (from != nullptr && count % panel_columns == 0) return;
        const int64_t step = round_up(count, panel_columns);
        std::memset(static_cast<A*>(own_), 0, size_t(rows * step) * sizeof(A));
        for (int64_t r = 0; r < rows && from != nullptr; ++r)
            std::memcpy(own_ + r * step, data_ + r * count, size_t(count) * sizeof(A));
        data_ = own_;
    }
    operator const A*() const { return data_; }

  private:
    Scratch<A> own_;
    const A* data_;
};

// Pixels of a tensor as terms of a product: memory itself where it can be read as it is, else a block of rows at a
// time, copied by the thread that multiplies them.
template <class T>
class TermRows {
    using A = Compute<T>;
    using E = Term<T>;

  public:
    // `gated`: every block is copied, by staged().
    TermRows(const T* from, int64_t channels, int64_t block_rows, bool gated = false)
        : from_(from),
          channels_(channels),
          terms_(term_count<E>(channels)),
          own_(is_direct(channels) && !gated ? 0 : block_rows * terms_) {}

    static bool is_direct(int64_t channels) {
        return sizeof(T) == sizeof(E) || (term_values<E> == 2 && channels % 2 == 0);
    }

    const E* operator()(int64_t first, int64_t count) {
        if (is_direct(channels_)) return reinterpret_cast<const E*>(from_ + first * channels_);
        return staged(first, count, [](int64_t) { return static_cast<const A*>(nullptr); });
    }

    // Every row times gate_of(row), padded to whole panels, where it is not null.
    template <class GateOf>
    const E* staged(int64_t first, int64_t count, const GateOf& gate_of) {
        if (staged_ == first) return own_;
        staged_ = first;
        for (int64_t r = 0; r < count; ++r) {
            const T* const from = from_ + (first + r) * channels_;
            const A* const gate = gate_of(first + r);
            E* const to = own_ + r * terms_;
            for (int64_t c = 0; c < channels_; c += lanes<A>) {
                const int n = int(smaller(lanes<A>, channels_ - c));
                Vec<A> v = load(from + c, n);
                if (gate != nullptr) v *= load(gate + c);
                // An odd channel has a zero beside it.
                if constexpr (term_values<E> == 2)
                    store(reinterpret_cast<bfloat16*>(to) + c, v, int(round_up(n, 2)));
                else
                    store(to + c, v, n);
            }
        }
        return own_;
    }

  private:
    const T* from_;
    int64_t channels_, terms_, staged_ = -1;
    const Scratch<E> own_;
};

// All rows of a product, by up to `threads` threads. open(rows of the largest block) makes what gives a thread its
// rows: opened(first, count).
template <class E, class A, class O, class Open>
inline void multiply_blocks(int64_t rows, int64_t threads, const Panels<E>& panels, const A* bias,
                            const Finish<O>& finish, const Open& open) {
    // A block and the weights that meet it share L2; tiles are up to 14 rows high.
    constexpr int64_t block_bytes = 256 << 10;
    const int64_t fit = larger(14, smaller(112, block_bytes / (panels.terms * int64_t(sizeof(E)))));
    const int64_t vectors = panels.vectors();
    int64_t blocks = ceil_div(rows, fit), groups = 1;
    if (blocks < threads)
        groups = smaller(ceil_div(threads, blocks), vectors);
    else
        blocks = smaller(rows, round_up(blocks, threads));
    parallel_tasks(
        blocks * groups, [&] { return open(ceil_div(rows, blocks)); },
        [&](int64_t task, auto& left_rows) {
            const int64_t block = task / groups, group = task % groups;
            const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
            const auto left = Left<E>::rows(left_rows(first, count), panels.terms, panels.terms);
            multiply_rows(left, first, count, panels, vectors * group / groups, vectors * (group + 1) / groups, bias,
                          finish);
        });
}

// [columns][depth] in memory to panels, each column times scale[column] where a scale is given.
template <class A>
inline void pack_panel(const A* weight, int64_t depth, int64_t valid, const A* scale, A* to) {
    constexpr int L = lanes<A>;
    if (valid < panel_columns) std::memset(to, 0, size_t(depth) * panel_columns * sizeof(A));
    // The next panel comes into the cache meanwhile.
    transpose(valid, depth, weight, depth, to, panel_columns, panel_columns * depth);
    if (scale == nullptr) return;
    Vec<A> factor[panel_columns / L];
    for (int i = 0; i < panel_columns; i += L) factor[i / L] = load(scale + i, int(larger(0, smaller(L, valid - i))));
    for (int64_t k = 0; k < depth; ++k)
        for (int i = 0; i < panel_columns; i += L)
            store(to + k * panel_columns + i, load(to + k * panel_columns + i) * factor[i / L]);
}

// The same in pairs of bf16, zeros behind an odd depth.
inline void pack_panel(const float* weight, int64_t depth, int64_t valid, const float* scale, BFloat16Pair* to) {
    constexpr int64_t step = 32;
    alignas(64) float wide[step * panel_columns];
    for (int64_t k = 0; k < depth; k += step) {
        const int64_t run = smaller(step, depth - k);
        std::memset(wide, 0, sizeof(wide));
        transpose(valid, run, weight + k, depth, wide, panel_columns, panel_columns * depth);
        for (int64_t i = 0; i < term_count<BFloat16Pair>(run); ++i) {
            const float *even = wide + 2 * i * panel_columns, *odd = even + panel_columns;
            for (int n = 0; n < panel_columns; n += lanes<float>) {
                const int here = int(smaller(lanes<float>, larger(0, valid - n)));
                const Vec<float> factor = scale == nullptr ? broadcast(1.0f) : load(scale + n, here);
                store_pairs(load(even + n) * factor, load(odd + n) * factor, to + (k / 2 + i) * panel_columns + n);
            }
        }
    }
}

// One panel of a weight [columns][depth].
template <class E, class A>
inline void pack_panel_of(int64_t panel, const A* weight, int64_t depth, int64_t columns, const A* scale, E* to) {
    const int64_t c = panel * panel_columns;
    pack_panel(weight + c * depth, depth, smaller(panel_columns, columns - c), scale == nullptr ? nullptr : scale + c,
               to + c * term_count<E>(depth));
}

template <class E, class A>
inline void pack_panels(const A* weight, int64_t depth, int64_t columns, const A* scale, E* to) {
    parallel_tasks(
        ceil_div(columns, panel_columns), [] { return 0; },
        [=](int64_t panel, int) { pack_panel_of(panel, weight, depth, columns, scale, to); });
}

EFFNET_NAMESPACE_END
