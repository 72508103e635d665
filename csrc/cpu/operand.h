// Reading a tensor through its prologue, and writing one through its epilogue.
#pragma once

#include "activation.h"
#include "parallel.h"

EFFNET_NAMESPACE_BEGIN

// Channels that one depthwise slab or one panel of a product covers: two vectors.
template <class A>
constexpr int slab = 2 * lanes<A>;

// body(Size<N>, first, n) over `width` channels: two whole vectors at a time, which are a line of the cache and keep
// the processor busy with one while the other waits, then single ones of n values.
template <class A, class Body>
EFFNET_INLINE void for_each_vectors(int64_t width, const Body& body) {
    constexpr int L = lanes<A>;
    int64_t c = 0;
    for (; c + 2 * L <= width; c += 2 * L) body(Size<2>{}, c, L);
    for (; c < width; c += L) body(Size<1>{}, c, int(smaller(L, width - c)));
}

// A normalisation for N vectors of channels from c on, the identity where `mean` is null; only the first n values of
// each exist.
template <class A, int N>
struct NormColumns {
    Vec<A> mean[N] = {}, scale[N], shift[N] = {};
    EFFNET_INLINE NormColumns(const A* means, const A* scales, const A* shifts, int64_t c, int n) {
        for (int i = 0; i < N; ++i, c += lanes<A>) {
            scale[i] = means == nullptr ? broadcast(A(1)) : load(scales + c, n);
            if (means == nullptr) continue;
            mean[i] = load(means + c, n);
            shift[i] = load(shifts + c, n);
        }
    }
    EFFNET_INLINE Vec<A> operator()(int i, Vec<A> a) const { return (a - mean[i]) * scale[i] + shift[i]; }
};

// A tensor [pixels][channels] that is read through a prologue: activation((data - mean) * scale + shift).
template <class T>
struct Source {
    using A = Compute<T>;
    const T* data;
    const A *mean, *scale, *shift;
    Activation activation;
    int64_t channels;

    Source(const void* data, int64_t channels, const Norm& norm = {}, Activation activation = Activation::none)
        : data(static_cast<const T*>(data)),
          mean(static_cast<const A*>(norm.mean)),
          scale(static_cast<const A*>(norm.scale)),
          shift(static_cast<const A*>(norm.shift)),
          activation(activation),
          channels(channels) {}

    // Nothing to apply and nothing to convert: a product may read the memory itself.
    bool direct() const { return sizeof(T) == sizeof(A) && plain(); }
    bool plain() const { return mean == nullptr && activation == Activation::none; }

    // Channels [c, c + n) of `count` pixels, `step` values from one pixel to the next, zeros up to each pixel's next
    // whole vector.
    void stage(int64_t first, int64_t count, int64_t c, int64_t n, A* to, int64_t step) const {
        constexpr int L = lanes<A>;
        if (plain()) {
            for (int64_t p = 0; p < count; ++p) {
                const T* from = data + (first + p) * channels + c;
                for (int64_t i = 0; i < n; i += L) store(to + p * step + i, load(from + i, int(smaller(n - i, L))));
            }
            return;
        }
        for_each_vectors<A>(n, [&](auto size, int64_t i, int valid) {
            stage_vectors<size.value>(first, count, c + i, valid, to + i, step);
        });
    }

  private:
    template <int N>
    void stage_vectors(int64_t first, int64_t count, int64_t c, int n, A* to, int64_t step) const {
        constexpr int L = lanes<A>;
        const NormColumns<A, N> norm(mean, scale, shift, c, n);
        const T* from = data + first * channels + c;
        const int64_t from_step = channels;
        with_activation(activation, [&](auto kind) {
            for (int64_t p = 0; p < count; ++p, from += from_step, to += step) {
                // The next row: pixels are further apart than the processor looks ahead.
                __builtin_prefetch(from + count * from_step);
#pragma GCC unroll 2
                for (int i = 0; i < N; ++i) store(to + i * L, activate<A>(norm(i, load(from + i * L, n)), kind.value));
            }
        });
    }
};

// What happens to a convolution's result on its way to memory: activation(v + shift), plus a residual. Null pointers
// leave their step out.
template <class O>
struct Epilogue {
    using A = Compute<O>;
    O* out = nullptr;
    int64_t channels = 0;
    const A* shift = nullptr;
    Activation activation = Activation::none;
    const O* residual = nullptr;

    // Nothing to apply and nothing to convert: results may be written to memory as they are.
    bool direct() const {
        return sizeof(O) == sizeof(A) && shift == nullptr && activation == Activation::none && residual == nullptr;
    }

    // Channels [c, c + n) of `count` pixels from values [count][step].
    void operator()(int64_t first, int64_t count, int64_t c, int64_t n, const A* values, int64_t step) const {
        with_activation(activation, [&](auto kind) {
            for (int64_t i = 0; i < n; i += lanes<A>) {
                const int valid = int(smaller(n - i, lanes<A>));
                const Vec<A> shifted = shift == nullptr ? Vec<A>{} : load(shift + c + i, valid);
                const int64_t from = first * channels + c + i;
                for (int64_t p = 0; p < count; ++p) {
                    const int64_t at = from + p * channels;
                    Vec<A> v = activate<A>(load(values + p * step + i) + shifted, kind.value);
                    if (residual != nullptr) v = v + load(residual + at, valid);
                    store(out + at, v, valid);
                }
            }
        });
    }
};

// Elements that one task of an elementwise pass takes.
constexpr int64_t elementwise_grain = 16384;

// body(begin, end) over whole vectors and the ragged rest of [0, count), in parallel.
template <class Body>
inline void parallel_elements(int64_t count, const Body& body) {
    parallel(ceil_div(count, elementwise_grain), [&](int64_t begin, int64_t end) {
        body(begin * elementwise_grain, smaller(count, end * elementwise_grain));
    });
}

template <class T>
inline void widen(int64_t count, const T* from, Compute<T>* to) {
    constexpr int L = lanes<Compute<T>>;
    parallel_elements(count, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += L) {
            const int n = int(smaller(L, end - i));
            store(to + i, load(from + i, n), n);
        }
    });
}

// pre := grad * activation'(pre).
template <class T>
inline void activation_backward(int64_t count, const T* grad, Compute<T>* pre, Activation activation) {
    using A = Compute<T>;
    parallel_elements(count, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += lanes<A>) {
            const int n = int(smaller(lanes<A>, end - i));
            store(pre + i, load(grad + i, n) * activate_derivative<A>(load(pre + i, n), activation), n);
        }
    });
}

EFFNET_NAMESPACE_END
