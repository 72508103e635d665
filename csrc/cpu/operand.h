// Reading a tensor through its prologue, and writing one through its epilogue.
#pragma once

#include "activation.h"
#include "parallel.h"

EFFNET_NAMESPACE_BEGIN

// Channels that one depthwise slab or one panel of a product covers: two vectors.
template <class A>
constexpr int slab = 2 * lanes<A>;

// A typed Operand: the value at (pixel, channel) is activation((data - mean) * scale + shift) * gate[image of the
// pixel].
template <class T>
struct Source {
    using A = Compute<T>;
    const T* data;
    const A *mean, *scale, *shift, *gate;
    Activation activation;
    int64_t channels, image_pixels;

    Source(const Operand& from, int64_t channels, int64_t image_pixels)
        : data(static_cast<const T*>(from.data)),
          mean(static_cast<const A*>(from.norm.mean)),
          scale(static_cast<const A*>(from.norm.scale)),
          shift(static_cast<const A*>(from.norm.shift)),
          gate(static_cast<const A*>(from.gate)),
          activation(from.activation),
          channels(channels),
          image_pixels(image_pixels) {}

    // Nothing to apply and nothing to convert: a product may read the memory itself.
    bool direct() const { return sizeof(T) == sizeof(A) && plain(); }
    bool plain() const { return mean == nullptr && gate == nullptr && activation == Activation::none; }

    Vec<A> normalised(int64_t pixel, int64_t c, int n) const {
        const Vec<A> v = load(data + pixel * channels + c, n);
        return mean == nullptr ? v : (v - load(mean + c, n)) * load(scale + c, n) + load(shift + c, n);
    }

    // Channels [c, c + n) of a pixel, zeros up to the next whole vector.
    void stage(int64_t pixel, int64_t c, int64_t n, A* to) const {
        constexpr int L = lanes<A>;
        const T* from = data + pixel * channels;
        if (plain()) {
            for (int64_t i = 0; i < n; i += L) store(to + i, load(from + c + i, int(smaller(n - i, L))));
            return;
        }
        const A* image_gate = gate == nullptr ? nullptr : gate + pixel / image_pixels * channels;
        for (int64_t i = 0; i < n; i += L) {
            const int m = int(smaller(n - i, L));
            Vec<A> v = activate<A>(normalised(pixel, c + i, m), activation);
            if (image_gate != nullptr) v = v * load(image_gate + c + i, m);
            store(to + i, v);
        }
    }
};

// What happens to a convolution's result on its way to memory: activation((v - mean) * scale + shift), times the
// image's scale, plus a residual. Null pointers leave their step out.
template <class O>
struct Epilogue {
    using A = Compute<O>;
    O* out = nullptr;
    int64_t channels = 0, image_pixels = 1;
    const A *mean = nullptr, *scale = nullptr, *shift = nullptr;
    Activation activation = Activation::none;
    const A* image_scale = nullptr;
    const O* residual = nullptr;

    Vec<A> apply(Vec<A> v, int64_t c, int n) const {
        if (mean != nullptr) v = (v - load(mean + c, n)) * load(scale + c, n);
        if (shift != nullptr) v = v + load(shift + c, n);
        return activate<A>(v, activation);
    }

    void operator()(int64_t pixel, int64_t c, Vec<A> v, int n) const {
        v = apply(v, c, n);
        if (image_scale != nullptr) v = v * image_scale[pixel / image_pixels];
        if (residual != nullptr) v = v + load(residual + pixel * channels + c, n);
        store(out + pixel * channels + c, v, n);
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

// to += from.
template <class T>
inline void add(int64_t count, const T* from, T* to) {
    constexpr int L = lanes<Compute<T>>;
    parallel_elements(count, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += L) {
            const int n = int(smaller(L, end - i));
            store(to + i, load(to + i, n) + load(from + i, n), n);
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
