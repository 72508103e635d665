// Batch statistics and the backward pass of normalisation + activation (+ gate), each one walk over memory with a
// two-stage reduction whose ranges depend on the shape alone, so that results do not depend on the number of threads.
#pragma once

#include "operand.h"

EFFNET_NAMESPACE_BEGIN

// Pixels whose sums are formed in registers before they join the totals: bounds the rounding error of long sums too.
constexpr int64_t reduction_block = 32;

struct Reduction {
    int64_t pixels, parts;
    explicit Reduction(int64_t pixels) : pixels(pixels), parts(larger(1, smaller(64, pixels / 256))) {}
    int64_t begin(int64_t part) const { return pixels * part / parts; }

    // body(part, first pixel, count) for each block of each part; the blocks of one part run in order on one thread.
    template <class Body>
    void blocks(const Body& body) const {
        parallel(parts, [&](int64_t from, int64_t to) {
            for (int64_t part = from; part < to; ++part)
                for (int64_t first = begin(part); first < begin(part + 1); first += reduction_block)
                    body(part, first, smaller(reduction_block, begin(part + 1) - first));
        });
    }
};

// out[c] = sum over parts of partial[part][c].
template <class A>
inline void sum_parts(int64_t parts, int64_t channels, const A* partial, A* out) {
    const Buffer<double> sums = zeros<double>(channels);
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t c = 0; c < channels; ++c) sums[c] += double(partial[part * channels + c]);
    for (int64_t c = 0; c < channels; ++c) out[c] = A(sums[c]);
}

template <class A>
inline void column_sums(int64_t pixels, int64_t channels, const A* x, A* out) {
    const Reduction reduction(pixels);
    const Buffer<A> partial = zeros<A>(reduction.parts * channels);
    reduction.blocks([&](int64_t part, int64_t first, int64_t count) {
        for (int64_t c = 0; c < channels; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, channels - c));
            Vec<A> sum = {};
            for (int64_t p = first; p < first + count; ++p) sum += load(x + p * channels + c, n);
            A* to = partial + part * channels + c;
            store(to, load(to, n) + sum, n);
        }
    });
    sum_parts<A>(reduction.parts, channels, partial, out);
}

// Mean and biased variance of each channel: mean and squared deviation of each block, merged in fp64 by Chan's formula,
// which neither cancels for |mean| >> deviation nor loses the small terms of a long sum.
template <class T>
inline void channel_statistics(int64_t pixels, int64_t channels, const T* x, Compute<T>* mean, Compute<T>* var) {
    using A = Compute<T>;
    const Reduction reduction(pixels);
    const Buffer<double> means = zeros<double>(reduction.parts * channels),
                         squares = zeros<double>(reduction.parts * channels);
    reduction.blocks([&](int64_t part, int64_t first, int64_t count) {
        const double before = double(first - reduction.begin(part)), total = before + double(count);
        for (int64_t c = 0; c < channels; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, channels - c));
            Vec<A> sum = {}, square = {};
            for (int64_t p = first; p < first + count; ++p) sum += load(x + p * channels + c, n);
            const Vec<A> block_mean = sum / A(count);
            for (int64_t p = first; p < first + count; ++p) {
                const Vec<A> d = load(x + p * channels + c, n) - block_mean;
                square += d * d;
            }
            double* m = means + part * channels + c;
            double* q = squares + part * channels + c;
            for (int i = 0; i < n; ++i) {
                const double delta = double(block_mean[i]) - m[i];
                m[i] += delta * double(count) / total;
                q[i] += double(square[i]) + delta * delta * before * double(count) / total;
            }
        }
    });
    for (int64_t c = 0; c < channels; ++c) {
        double m = 0, q = 0, before = 0;
        for (int64_t part = 0; part < reduction.parts; ++part) {
            const double count = double(reduction.begin(part + 1) - reduction.begin(part)), total = before + count;
            const double delta = means[part * channels + c] - m;
            m += delta * count / total;
            q += squares[part * channels + c] + delta * delta * before * count / total;
            before = total;
        }
        mean[c] = A(m);
        var[c] = A(q / double(pixels));
    }
}

// The vectors of one normalisation. Without one (gamma null) they are the identity with beta as the shift.
template <class A>
class NormVectors {
  public:
    NormVectors(int64_t channels, const ConvNorm& conv, const void* mean, const void* var)
        : channels(channels),
          normalises(conv.gamma != nullptr),
          mean_(channels),
          rstd_(channels),
          scale_(channels),
          shift_(channels) {
        const A *gamma = static_cast<const A*>(conv.gamma), *beta = static_cast<const A*>(conv.beta);
        for (int64_t c = 0; c < channels; ++c) {
            mean_[c] = normalises ? static_cast<const A*>(mean)[c] : A(0);
            // In fp64 and rounded once: an error here is the same for a whole channel and does not average out.
            const double rstd = normalises ? 1 / ::sqrt(double(static_cast<const A*>(var)[c]) + conv.eps) : 1;
            rstd_[c] = A(rstd);
            scale_[c] = normalises ? A(double(gamma[c]) * rstd) : A(1);
            shift_[c] = beta == nullptr ? A(0) : beta[c];
        }
    }
    Norm norm() const { return {static_cast<A*>(mean_), static_cast<A*>(scale_), static_cast<A*>(shift_)}; }
    const A* mean() const { return mean_; }
    const A* rstd() const { return rstd_; }
    const A* scale() const { return scale_; }
    const A* shift() const { return shift_; }

    const int64_t channels;
    const bool normalises;

  private:
    Buffer<A> mean_, rstd_, scale_, shift_;
};

// A normalisation with constant statistics as a scale of the weights before it and a shift.
template <class A>
class FoldedNorm {
  public:
    FoldedNorm(int64_t channels, const ConvNorm& conv)
        : normalises_(conv.gamma != nullptr), scale_(normalises_ ? channels : 0), shift_(channels) {
        const NormVectors<A> norm(channels, conv, conv.mean, conv.var);
        for (int64_t c = 0; c < channels; ++c) {
            if (normalises_) scale_[c] = norm.scale()[c];
            shift_[c] = A(double(norm.shift()[c]) - double(norm.mean()[c]) * double(norm.scale()[c]));
        }
    }
    const A* scale() const { return normalises_ ? static_cast<A*>(scale_) : nullptr; }
    const A* shift() const { return shift_; }

  private:
    bool normalises_;
    Scratch<A> scale_, shift_;
};

// First half of the backward pass of y = activation(norm(x)) * gate, pooled: d holds dL/dy and becomes
//   t = (d * gate + pool_gradient) * activation'(norm(x)),
// with sum_shift = sum of t and sum_scale = sum of t * (x - mean) * rstd, the gradients of beta and gamma.
// pool_gradient is [image][channel].
template <class T>
inline void norm_backward_reduce(int64_t pixels, const Source<T>& x, const NormVectors<Compute<T>>& norm,
                                 const Compute<T>* pool_gradient, Compute<T>* d, Compute<T>* sum_shift,
                                 Compute<T>* sum_scale) {
    using A = Compute<T>;
    const int64_t channels = x.channels;
    const Reduction reduction(pixels);
    const Buffer<A> shifts = zeros<A>(reduction.parts * channels), scales = zeros<A>(reduction.parts * channels);
    reduction.blocks([&](int64_t part, int64_t first, int64_t count) {
        for (int64_t c = 0; c < channels; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, channels - c));
            const Vec<A> mean = load(norm.mean() + c, n), rstd = load(norm.rstd() + c, n);
            const Vec<A> scale = load(norm.scale() + c, n), shift = load(norm.shift() + c, n);
            Vec<A> shift_sum = {}, scale_sum = {};
            for_each_image(first, count, x.image_pixels, [&](int64_t image, int64_t begin, int64_t pixels_here) {
                const int64_t in_image = image * channels + c;
                const Vec<A> gate = x.gate == nullptr ? broadcast(A(1)) : load(x.gate + in_image, n);
                const Vec<A> pool = pool_gradient == nullptr ? Vec<A>{} : load(pool_gradient + in_image, n);
                with_activation(x.activation, [&](auto kind) {
                    for (int64_t p = begin; p < begin + pixels_here; ++p) {
                        const Vec<A> centred = load(x.data + p * channels + c, n) - mean;
                        A* at = d + p * channels + c;
                        const Vec<A> t =
                            (load(at, n) * gate + pool) * activate_derivative<A>(centred * scale + shift, kind.value);
                        store(at, t, n);
                        shift_sum += t;
                        scale_sum += t * (centred * rstd);
                    }
                });
            });
            A* to_shift = shifts + part * channels + c;
            A* to_scale = scales + part * channels + c;
            store(to_shift, load(to_shift, n) + shift_sum, n);
            store(to_scale, load(to_scale, n) + scale_sum, n);
        }
    });
    sum_parts<A>(reduction.parts, channels, shifts, sum_shift);
    sum_parts<A>(reduction.parts, channels, scales, sum_scale);
}

// Second half: t becomes dL/dx = scale * (t - mean(t) - xhat * mean(t * xhat)) with batch statistics, scale * t with
// constant ones.
template <class T>
inline void norm_backward_apply(int64_t pixels, const T* x, const NormVectors<Compute<T>>& norm, bool batch_statistics,
                                const Compute<T>* sum_shift, const Compute<T>* sum_scale, Compute<T>* t) {
    using A = Compute<T>;
    if (!norm.normalises) return;
    const int64_t channels = norm.channels;
    Reduction(pixels).blocks([&](int64_t, int64_t first, int64_t count) {
        for (int64_t c = 0; c < channels; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, channels - c));
            const Vec<A> mean = load(norm.mean() + c, n), scale = load(norm.scale() + c, n),
                         rstd = load(norm.rstd() + c, n);
            const Vec<A> mean_t = load(sum_shift + c, n) / A(pixels), slope = rstd * load(sum_scale + c, n) / A(pixels);
            for (int64_t p = first; p < first + count; ++p) {
                A* at = t + p * channels + c;
                Vec<A> v = load(at, n);
                if (batch_statistics) v = v - mean_t - (load(x + p * channels + c, n) - mean) * slope;
                store(at, v * scale, n);
            }
        }
    });
}

EFFNET_NAMESPACE_END
