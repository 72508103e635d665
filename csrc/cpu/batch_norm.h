// What a normalisation does to a channel, and sums over pixels in two stages, whose ranges depend on the shape alone,
// so that results do not depend on the number of threads.
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

// Sums of each channel that parts of the pixels form on their own: [parts][K][channels], added up in fp64.
template <class A, int K>
class PartialSums {
  public:
    PartialSums(int64_t parts, int64_t channels)
        : parts_(parts), channels_(channels), sums_(zeros<A>(parts * K * channels)) {}

    A* of(int64_t part, int which) const { return sums_ + (part * K + which) * channels_; }
    void add(int64_t part, int which, int64_t c, int n, Vec<A> sum) const {
        A* const to = of(part, which) + c;
        store(to, load(to, n) + sum, n);
    }
    void total(int which, A* to) const {
        const Buffer<double> sums = zeros<double>(channels_);
        for (int64_t part = 0; part < parts_; ++part)
            for (int64_t c = 0; c < channels_; ++c) sums[c] += double(of(part, which)[c]);
        for (int64_t c = 0; c < channels_; ++c) to[c] = A(sums[c]);
    }

  private:
    int64_t parts_, channels_;
    Buffer<A> sums_;
};

template <class A>
inline void column_sums(int64_t pixels, int64_t channels, const A* x, A* out) {
    const Reduction reduction(pixels);
    const PartialSums<A, 1> partial(reduction.parts, channels);
    reduction.blocks([&](int64_t part, int64_t first, int64_t count) {
        for (int64_t c = 0; c < channels; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, channels - c));
            Vec<A> sum = {};
            for (int64_t p = first; p < first + count; ++p) sum += load(x + p * channels + c, n);
            partial.add(part, 0, c, n, sum);
        }
    });
    partial.total(0, out);
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

EFFNET_NAMESPACE_END
