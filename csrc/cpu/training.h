// What the steps of a block's training share: sums over the batch where values are made, normalisation and its gradient
// where they are read. Ranges of pixels depend on the shape alone, and each is summed by one thread, so that results do
// not depend on the number of threads.
#pragma once

#include "batch_norm.h"
#include "packed.h"
#include "product.h"

EFFNET_NAMESPACE_BEGIN

// Pixels that pass from one product to the next while they are in cache.
constexpr int64_t pixel_block = 96;

// `count` things cut into parts of about equal size.
struct Parts {
    int64_t count, parts;
    int64_t begin(int64_t part) const { return count * part / parts; }
    int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }

    // Parts whose threads each sum a matrix of `values` numbers of their own, over `pixels` pixels in all.
    static Parts for_sums(int64_t count, int64_t pixels, int64_t values) {
        constexpr int64_t most_values = 4 << 20;
        const int64_t most = smaller(smaller(64, count), smaller(pixels / pixel_block, most_values / values));
        return {count, larger(1, most)};
    }
};

// body(first, count) over [begin, end) in blocks of at most `most`.
template <class Body>
inline void for_each_block(int64_t begin, int64_t end, int64_t most, const Body& body) {
    for (int64_t first = begin; first < end; first += most) body(first, smaller(most, end - first));
}

// The statistics of one process, [count, means, squared deviations], become those of all. Between parallel regions
// only: the thread waits for the other processes.
template <class A>
inline void share_statistics(const BatchStatistics& to, int64_t channels, double* values) {
    to.processes->reduce(to.processes->group, true, values, 1 + 2 * channels);
    *to.count = values[0];
    for (int64_t c = 0; c < channels; ++c) {
        static_cast<A*>(to.mean)[c] = A(values[1 + c]);
        static_cast<A*>(to.var)[c] = A(values[1 + channels + c] / values[0]);
    }
}

// Mean and biased variance of each channel, from parts of the pixels: mean and squared deviations of each block, merged
// in fp64 by Chan's formula, which neither cancels for |mean| >> deviation nor loses the small terms of a long sum.
template <class A>
class Moments {
  public:
    Moments(int64_t parts, int64_t channels, const BatchStatistics& to)
        : wanted(to.mean != nullptr),
          parts_(parts),
          channels_(channels),
          to_(to),
          means_(zeros<double>(wanted ? parts * channels : 0)),
          squares_(zeros<double>(wanted ? parts * channels : 0)) {}

    // `count` pixels of the channels [c, c + width), `step` values apart, join the `before` that the part has already.
    template <class T>
    void add(int64_t part, int64_t before, int64_t count, const T* values, int64_t step, int64_t c,
             int64_t width) const {
        constexpr int L = lanes<A>;
        const double total = double(before + count), weight = double(count) / total, cross = double(before) * weight;
        for (int64_t i = 0; i < width; i += L) {
            const int n = int(smaller(L, width - i));
            Vec<A> sum = {}, square = {};
            for (int64_t p = 0; p < count; ++p) sum += load(values + p * step + i, n);
            const Vec<A> mean = sum / A(count);
            for (int64_t p = 0; p < count; ++p) {
                const Vec<A> d = load(values + p * step + i, n) - mean;
                square += d * d;
            }
            A block_mean[L], block_square[L];
            store(block_mean, mean);
            store(block_square, square);
            double *const m = means_ + part * channels_ + c + i, *const q = squares_ + part * channels_ + c + i;
            for (int j = 0; j < n; ++j) {
                const double delta = double(block_mean[j]) - m[j];
                m[j] += delta * weight;
                q[j] += double(block_square[j]) + delta * delta * cross;
            }
        }
    }

    // size_of(part): how many pixels it has.
    template <class SizeOf>
    void merge(const SizeOf& size_of) const {
        if (!wanted) return;
        const Buffer<double> own(to_.processes == nullptr ? 0 : 1 + 2 * channels_);
        parallel(ceil_div(channels_, block_), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) merge_channels(block * block_, size_of, own);
        });
        if (to_.processes != nullptr) share_statistics<A>(to_, channels_, own);
    }

    const bool wanted;

  private:
    static constexpr int64_t block_ = 64;

    template <class SizeOf>
    void merge_channels(int64_t first, const SizeOf& size_of, double* own) const {
        const int64_t count = smaller(block_, channels_ - first);
        double m[block_] = {}, q[block_] = {}, before = 0;
        for (int64_t part = 0; part < parts_; ++part) {
            const double size = double(size_of(part));
            if (size == 0) continue;
            const double total = before + size, weight = size / total, cross = before * weight;
            const double *const part_mean = means_ + part * channels_ + first, *const part_square =
                                                                                   squares_ + part * channels_ + first;
            for (int64_t c = 0; c < count; ++c) {
                const double delta = part_mean[c] - m[c];
                m[c] += delta * weight;
                q[c] += part_square[c] + delta * delta * cross;
            }
            before = total;
        }
        if (own != nullptr) {
            if (first == 0) own[0] = before;
            std::memcpy(own + 1 + first, m, size_t(count) * sizeof(double));
            std::memcpy(own + 1 + channels_ + first, q, size_t(count) * sizeof(double));
            return;
        }
        for (int64_t c = 0; c < count; ++c) {
            static_cast<A*>(to_.mean)[first + c] = A(m[c]);
            static_cast<A*>(to_.var)[first + c] = A(q[c] / before);
        }
    }

    int64_t parts_, channels_;
    BatchStatistics to_;
    Buffer<double> means_, squares_;
};

// Where the gradients of a normalisation's parameters go: to the caller, or to memory of their own.
template <class A>
struct NormSums {
    Buffer<A> own_shift, own_scale;
    A *shift, *scale;  // sum of t, and of t * (a - mean) * rstd
    NormSums(int64_t channels, const ConvNormGrads& grads)
        : own_shift(channels),
          own_scale(channels),
          shift(grads.beta == nullptr ? static_cast<A*>(own_shift) : static_cast<A*>(grads.beta)),
          scale(grads.gamma == nullptr ? static_cast<A*>(own_scale) : static_cast<A*>(grads.gamma)) {}
};

// The means of t and of t * (a - mean) * rstd over the values that the statistics are of. The sums, which are
// gradients, stay those of this process.
template <class A>
class NormMeans {
  public:
    NormMeans(const BatchStatistics& batch, int64_t channels, int64_t pixels, const NormSums<A>& sums)
        : channels_(channels), sums_(sums), shared_(batch.processes == nullptr ? 0 : 2 * channels), count_(pixels) {
        if (batch.processes == nullptr) return;
        for (int64_t c = 0; c < channels; ++c)
            shared_[c] = double(sums.shift[c]), shared_[channels + c] = double(sums.scale[c]);
        batch.processes->reduce(batch.processes->group, false, shared_, 2 * channels);
        count_ = *batch.count;
    }
    double shift(int64_t c) const { return (shared_ == nullptr ? double(sums_.shift[c]) : shared_[c]) / count_; }
    double scale(int64_t c) const {
        return (shared_ == nullptr ? double(sums_.scale[c]) : shared_[channels_ + c]) / count_;
    }

  private:
    int64_t channels_;
    const NormSums<A>& sums_;
    Buffer<double> shared_;
    double count_;
};

// Equation (2) of docs/mbconv.md: dL/da from t = dL/dn and a. With constant statistics it is t * scale alone.
template <class A>
class NormGradient {
  public:
    NormGradient(const NormVectors<A>& norm, const BatchStatistics& batch, int64_t pixels, const NormSums<A>& sums)
        : norm_(norm), mean_t_(zeros<A>(norm.channels)), slope_(zeros<A>(norm.channels)) {
        if (!norm.normalises || batch.mean == nullptr) return;
        const NormMeans<A> means(batch, norm.channels, pixels, sums);
        for (int64_t c = 0; c < norm.channels; ++c) {
            mean_t_[c] = A(means.shift(c));
            slope_[c] = A(double(norm.rstd()[c]) * means.scale(c));
        }
    }

    template <int N>
    struct Columns {
        Vec<A> mean[N], scale[N], mean_t[N], slope[N];
        EFFNET_INLINE Vec<A> operator()(int i, Vec<A> t, Vec<A> a) const {
            return (t - mean_t[i] - (a - mean[i]) * slope[i]) * scale[i];
        }
    };
    // N vectors of channels from c on; only the first n values of each exist.
    template <int N>
    EFFNET_INLINE Columns<N> columns(int64_t c, int n) const {
        Columns<N> made;
        for (int i = 0; i < N; ++i, c += lanes<A>) {
            made.mean[i] = load(norm_.mean() + c, n);
            made.scale[i] = load(norm_.scale() + c, n);
            made.mean_t[i] = load(mean_t_ + c, n);
            made.slope[i] = load(slope_ + c, n);
        }
        return made;
    }

    // dL/da of `count` pixels from `first` on, `step` values apart; t_of(pixel, at, n) is t at value number `at`.
    template <class T, class Gradient>
    void stage(int64_t first, int64_t count, const Gradient& t_of, const T* a, A* to, int64_t step) const {
        const int64_t channels = norm_.channels;
        for_each_vectors<A>(channels, [&](auto size, int64_t c, int n) {
            constexpr int N = decltype(size)::value;
            const auto gradient = columns<N>(c, n);
            for (int64_t p = 0; p < count; ++p) {
                // The next columns: pixels are further apart than the processor looks ahead.
                __builtin_prefetch(a + (first + p) * channels + c + N * lanes<A>);
#pragma GCC unroll 2
                for (int i = 0; i < N; ++i) {
                    const int64_t vector = c + i * lanes<A>, at = (first + p) * channels + vector;
                    store(to + p * step + vector, gradient(i, t_of(first + p, at, n), load(a + at, n)));
                }
            }
        });
    }

  private:
    const NormVectors<A>& norm_;
    Buffer<A> mean_t_, slope_;
};

// With the normalised value before gamma and beta, too.
template <class A, int N>
struct HatColumns : NormColumns<A, N> {
    Vec<A> rstd[N];
    EFFNET_INLINE HatColumns(const NormVectors<A>& norm, int64_t c, int n)
        : NormColumns<A, N>(norm.mean(), norm.scale(), norm.shift(), c, n) {
        for (int i = 0; i < N; ++i) rstd[i] = load(norm.rstd() + c + i * lanes<A>, n);
    }
    EFFNET_INLINE Vec<A> hat(int i, Vec<A> a) const { return (a - this->mean[i]) * rstd[i]; }
};

// Rows of the gradient of what a normalisation and its activation read: dL/da from `above`, dL/du times a factor of the
// image, its gate and what the gate's pool adds, where there are such.
template <class T, class G>
struct StageGradient {
    using A = Compute<T>;
    Activation activation;
    int64_t height, width;  // of an image of a
    const T* a;
    const G* above;
    const NormVectors<A>& norm;
    const NormGradient<A>& norm_gradient;
    const A *gates, *pool_gradient;  // [images][channels]
    const A* image_scale = nullptr;

    // Channels [c, c + n) of a row, `step` values from one pixel to the next, zeros up to whole vectors.
    void operator()(int64_t image, int64_t row, int64_t c, int64_t n, A* to, int64_t step) const {
        with_activation(activation, [&](auto kind) {
            for_each_vectors<A>(n, [&](auto size, int64_t i, int valid) {
                vectors<size.value, kind.value>(image, row, c + i, valid, to + i, step);
            });
        });
    }

  private:
    template <int N, Activation KIND>
    void vectors(int64_t image, int64_t row, int64_t c, int n, A* to, int64_t to_step) const {
        constexpr int L = lanes<A>;
        const HatColumns<A, N> columns(norm, c, n);
        const auto gradient = norm_gradient.template columns<N>(c, n);
        const int64_t step = norm.channels, pixels = width, at = (image * height + row) * pixels * step + c;
        Vec<A> g[N], pool[N];
        for (int i = 0; i < N; ++i) {
            const int64_t gate = image * step + c + i * L;
            g[i] = gates == nullptr ? broadcast(A(1)) : load(gates + gate, n);
            if (image_scale != nullptr) g[i] *= image_scale[image];
            pool[i] = gates == nullptr ? Vec<A>{} : load(pool_gradient + gate, n);
        }
        const T* from = a + at;
        const G* z = above + at;
        const int64_t ahead = pixels * step;
        for (int64_t p = 0; p < pixels; ++p, from += step, z += step, to += to_step) {
            __builtin_prefetch(from + ahead);
            __builtin_prefetch(z + ahead);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const Vec<A> v = load(from + i * L, n);
                const Activated<A> u = activate_with_slope<A>(columns(i, v), KIND);
                store(to + i * L, gradient(i, (load(z + i * L, n) * g[i] + pool[i]) * u.slope, v));
            }
        }
    }
};

// Rows of a tensor as an operand of a product: memory itself where it can be read as it is, else a staged copy.
template <class T>
class StagedRows {
    using A = Compute<T>;

  public:
    // `whole`: pixels must begin `step()` values apart, and be followed by values up to whole vectors.
    StagedRows(const Source<T>& x, int64_t most, bool whole)
        : x_(x),
          direct_(x.direct() && (!whole || x.channels % lanes<A> == 0)),
          step_(direct_ ? x.channels : round_up(x.channels, lanes<A>)),
          own_(direct_ ? 0 : most * step_) {}

    const A* operator()(int64_t first, int64_t count) const {
        if (direct_) return reinterpret_cast<const A*>(x_.data) + first * x_.channels;
        x_.stage(first, count, 0, x_.channels, own_, step_);
        return own_;
    }
    int64_t step() const { return step_; }

  private:
    const Source<T>& x_;
    bool direct_;
    int64_t step_;
    Scratch<A> own_;
};

// Weights of a product in panels, and its bias, zeros unless one is set.
template <class A>
class Weights {
  public:
    // [columns][depth] in memory.
    static Weights rows(const A* weight, int64_t depth, int64_t columns) {
        Weights made(depth, columns);
        pack_panels<A, A>(weight, depth, columns, nullptr, made.data_);
        return made;
    }
    // [depth][columns] in memory.
    static Weights columns(const A* weight, int64_t depth, int64_t columns) {
        Weights made(depth, columns);
        A* const to = made.data_;
        parallel_tasks(
            ceil_div(columns, panel_columns), [] { return 0; },
            [=](int64_t panel, int) {
                const int64_t c = panel * panel_columns, valid = smaller(panel_columns, columns - c);
                A* const at = to + c * depth;
                if (valid < panel_columns) std::memset(at, 0, size_t(depth) * panel_columns * sizeof(A));
                for (int64_t k = 0; k < depth; ++k)
                    std::memcpy(at + k * panel_columns, weight + k * columns + c, size_t(valid) * sizeof(A));
            });
        return made;
    }

    // finish(...) of `count` pixels times the vectors [begin, end) of columns, then done(first column, columns): a few
    // columns at a time, so that what they have become is still in cache. `left` counts rows from `first`.
    template <class O, class Done>
    void multiply(const Left<A>& left, int64_t first, int64_t count, int64_t begin, int64_t end,
                  const Finish<O>& finish, const Done& done) const {
        for (int64_t v = begin; v < end; v += 2) {
            const int64_t last = smaller(end, v + 2), c = v * lanes<A>;
            multiply_rows(left, first, count, panels_, v, last, static_cast<const A*>(bias_), finish);
            done(c, smaller(last * lanes<A>, panels_.columns) - c);
        }
    }
    template <class O>
    void multiply(const Left<A>& left, int64_t first, int64_t count, const Finish<O>& finish) const {
        multiply_rows(left, first, count, panels_, 0, vectors(), static_cast<const A*>(bias_), finish);
    }
    // All pixels of a tensor, in parallel.
    template <class T, class O>
    void multiply(const Source<T>& x, int64_t pixels, const Finish<O>& finish) const {
        const Parts parts{pixels, larger(1, ceil_div(pixels, pixel_block))};
        const int64_t pairs = ceil_div(vectors(), 2), groups = smaller(pairs, ceil_div(8, parts.parts));
        parallel_tasks(
            parts.parts * groups, [&] { return StagedRows<T>(x, pixel_block, false); },
            [&](int64_t task, const StagedRows<T>& rows) {
                const int64_t part = task / groups, group = task % groups, first = parts.begin(part);
                const auto left = Left<A>::rows(rows(first, parts.size(part)), x.channels, rows.step());
                multiply_rows(left, first, parts.size(part), panels_, 2 * (pairs * group / groups),
                              smaller(vectors(), 2 * (pairs * (group + 1) / groups)), static_cast<const A*>(bias_),
                              finish);
            });
    }
    // `count` rows times the columns [c, c + width), at most a slab and from a whole vector on, to [count][slab].
    void multiply_slab(const Left<A>& left, int64_t count, int64_t c, int64_t width, A* to) const {
        const A* const bias = bias_;
        if (width > lanes<A>)
            Multiply<2, A, A>(left, panels_, c / lanes<A>, bias)(0, count, to, slab<A>);
        else
            Multiply<1, A, A>(left, panels_, c / lanes<A>, bias)(0, count, to, slab<A>);
    }
    int64_t vectors() const { return panels_.vectors(); }
    A* bias() const { return bias_; }

  private:
    Weights(int64_t depth, int64_t columns)
        : data_(Panels<A>::size(depth, columns)),
          bias_(zeros<A>(round_up(columns, panel_columns))),
          panels_{data_, depth, columns} {}
    Buffer<A> data_, bias_;
    Panels<A> panels_;
};

// The gradient of a product's weights, [rows][columns]: each part of the pixels has sums of its own.
template <class A>
class WeightSums {
  public:
    WeightSums(int64_t parts, int64_t rows, int64_t columns)
        : parts_(parts),
          rows_(rows),
          columns_(columns),
          step_(round_up(columns, slab<A>)),
          sums_(parts * rows * step_) {}

    // The columns [c, c + width) of a part begin at zero.
    void clear(int64_t part, int64_t c, int64_t width) const {
        for (int64_t r = 0; r < rows_; ++r)
            std::memset(sums_ + (part * rows_ + r) * step_ + c, 0, size_t(smaller(width, step_ - c)) * sizeof(A));
    }
    // += left[pixel][rows] times right[pixel][c, c + width), width at most a slab.
    void add(int64_t part, int64_t count, const A* left, int64_t left_step, const A* right, int64_t right_step,
             int64_t c, int64_t width) const {
        panel<true>(rows_, width, count, left, 1, left_step, right, right_step, sums_ + part * rows_ * step_ + c,
                    step_);
    }
    void total(A* to) const {
        parallel(rows_, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r)
                for (int64_t c = 0; c < columns_; c += lanes<A>) {
                    Vec<A> sum = {};
                    for (int64_t part = 0; part < parts_; ++part) sum += load(sums_ + (part * rows_ + r) * step_ + c);
                    store(to + r * columns_ + c, sum, int(smaller(lanes<A>, columns_ - c)));
                }
        });
    }

  private:
    int64_t parts_, rows_, columns_, step_;
    Buffer<A> sums_;
};

// The gradient of the weights [rows][x.channels] of a product, from the gradient of its result, [pixels][rows].
template <class T>
inline void weight_gradient(int64_t pixels, const Compute<T>* grad, int64_t rows, const Source<T>& x, Compute<T>* to) {
    using A = Compute<T>;
    constexpr int S = slab<A>;
    const int64_t in = x.channels, slabs = ceil_div(in, S);
    const Parts parts = Parts::for_sums(pixels, pixels, rows * slabs * S);
    const int64_t groups = smaller(slabs, ceil_div(8, parts.parts));
    const WeightSums<A> sums(parts.parts, rows, in);
    parallel_tasks(
        parts.parts * groups, [&] { return StagedRows<T>(x, pixel_block, true); },
        [&](int64_t task, const StagedRows<T>& values) {
            const int64_t part = task / groups, group = task % groups;
            const int64_t begin = slabs * group / groups * S, end = slabs * (group + 1) / groups * S;
            sums.clear(part, begin, end - begin);
            for_each_block(parts.begin(part), parts.begin(part + 1), pixel_block, [&](int64_t first, int64_t count) {
                const A* const right = values(first, count);
                for (int64_t c = begin; c < smaller(end, in); c += S)
                    sums.add(part, count, grad + first * rows, rows, right + c, values.step(), c, smaller(S, in - c));
            });
        });
    sums.total(to);
}

// Mean of each channel and sums of products of deviations from it, in fp64: what the statistics of any linear map of x
// follow from, however close it comes to cancelling x.
template <class T>
class InputMoments {
    using A = Compute<T>;

  public:
    InputMoments(const Source<T>& x, int64_t pixels)
        : pixels_(pixels), channels_(x.channels), mean_(x.channels), products_(x.channels * x.channels) {
        // Deviations from a pivot, and a one whose products are their sums.
        const Buffer<double> pivot = first_mean(x, pixels);
        const int64_t columns = channels_ + 1, step = round_up(columns, slab<double>);
        const Parts parts = Parts::for_sums(pixels, pixels, columns * step);
        const WeightSums<double> sums(parts.parts, columns, columns);
        struct Memory {
            StagedRows<T> rows;
            Scratch<double> deviations;
        };
        parallel_tasks(
            parts.parts,
            [&] { return Memory{StagedRows<T>(x, pixel_block, false), Scratch<double>(pixel_block * step)}; },
            [&](int64_t part, const Memory& own) {
                double* const deviations = own.deviations;
                std::memset(deviations, 0, size_t(pixel_block * step) * sizeof(double));
                sums.clear(part, 0, step);
                for_each_block(parts.begin(part), parts.begin(part + 1), pixel_block,
                               [&](int64_t first, int64_t count) {
                                   const A* const rows = own.rows(first, count);
                                   for (int64_t p = 0; p < count; ++p) {
                                       double* const to = deviations + p * step;
                                       const A* const from = rows + p * own.rows.step();
                                       for (int64_t c = 0; c < channels_; ++c) to[c] = double(from[c]) - pivot[c];
                                       to[channels_] = 1;
                                   }
                                   for (int64_t c = 0; c < columns; c += slab<double>)
                                       sums.add(part, count, deviations, step, deviations + c, step, c,
                                                smaller(slab<double>, columns - c));
                               });
            });
        const Buffer<double> totals(columns * columns);
        sums.total(totals);
        const double* const deviation = totals + channels_ * columns;
        for (int64_t j = 0; j < channels_; ++j) mean_[j] = pivot[j] + deviation[j] / double(pixels);
        for (int64_t k = 0; k < channels_; ++k)
            for (int64_t j = 0; j < channels_; ++j)
                products_[k * channels_ + j] = totals[k * columns + j] - deviation[k] * deviation[j] / double(pixels);
    }

    const double* mean() const { return mean_; }
    // Sum over the pixels of (x[k] - mean[k]) * (x[j] - mean[j]), for all j.
    const double* products(int64_t k) const { return products_ + k * channels_; }

    // Mean and biased variance of each row of weight [rows][channels] times x.
    void statistics(const A* weight, int64_t rows, const BatchStatistics& to) const {
        const Buffer<double> own(to.processes == nullptr ? 0 : 1 + 2 * rows);
        parallel(rows, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                const A* const w = weight + r * channels_;
                double mean = 0, square = 0;
                for (int64_t k = 0; k < channels_; ++k) {
                    double inner = 0;
                    for (int64_t j = 0; j < channels_; ++j) inner += double(w[j]) * products(k)[j];
                    mean += double(w[k]) * mean_[k];
                    square += double(w[k]) * inner;
                }
                square = square > 0 ? square : 0;
                if (own != nullptr) {
                    own[1 + r] = mean, own[1 + rows + r] = square;
                    continue;
                }
                static_cast<A*>(to.mean)[r] = A(mean);
                static_cast<A*>(to.var)[r] = A(square / double(pixels_));
            }
        });
        if (to.processes == nullptr) return;
        own[0] = double(pixels_);
        share_statistics<A>(to, rows, own);
    }

  private:
    // Of the first few pixels: near enough to every value for fp64.
    static Buffer<double> first_mean(const Source<T>& x, int64_t pixels) {
        const int64_t count = smaller(16, pixels);
        const StagedRows<T> rows(x, count, false);
        const A* const from = rows(0, count);
        Buffer<double> mean = zeros<double>(x.channels);
        for (int64_t p = 0; p < count; ++p)
            for (int64_t c = 0; c < x.channels; ++c) mean[c] += double(from[p * rows.step() + c]) / double(count);
        return mean;
    }

    int64_t pixels_, channels_;
    Buffer<double> mean_, products_;
};

EFFNET_NAMESPACE_END
