// Squeeze-and-excitation: the average pool, the two small products, the gate, and their gradients.
#pragma once

#include "operand.h"

EFFNET_NAMESPACE_BEGIN

// out[image][c] = factor * sum over the image's pixels of sum_of(first pixel, count, c, n), which sums a block of
// pixels in registers. Parts of an image are summed apart, so that a single image keeps all threads busy; their number
// depends on the shape alone.
template <class A, class SumOf>
inline void image_sums(int64_t batch, int64_t pixels, int64_t channels, A factor, A* out, const SumOf& sum_of) {
    constexpr int64_t block = 16;
    const int64_t parts = larger(ceil_div(pixels, 512), smaller(ceil_div(8, larger(batch, 1)), pixels / (4 * block)));
    const Buffer<A> partial = zeros<A>(batch * parts * channels);
    parallel(batch * parts, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / parts * pixels, last = image + pixels * (task % parts + 1) / parts;
            A* const to = partial + task * channels;
            for (int64_t first = image + pixels * (task % parts) / parts; first < last; first += block)
                for (int64_t c = 0; c < channels; c += lanes<A>) {
                    const int n = int(smaller(lanes<A>, channels - c));
                    store(to + c, load(to + c, n) + sum_of(first, smaller(block, last - first), c, n), n);
                }
        }
    });
    for (int64_t image = 0; image < batch; ++image)
        for (int64_t c = 0; c < channels; ++c) {
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += double(partial[(image * parts + part) * channels + c]);
            out[image * channels + c] = A(sum * double(factor));
        }
}

// pooled[image][c] = mean over the image of x.
template <class T>
inline void pool(int64_t batch, int64_t pixels, int64_t channels, const T* x, Compute<T>* pooled) {
    using A = Compute<T>;
    image_sums<A>(batch, pixels, channels, A(1) / A(pixels), pooled,
                  [&](int64_t first, int64_t count, int64_t c, int n) {
                      Vec<A> sum = {};
                      for (int64_t p = first; p < first + count; ++p) sum += load(x + p * channels + c, n);
                      return sum;
                  });
}

template <class A>
inline A horizontal_sum(Vec<A> v) {
    A sum = 0;
    for (int i = 0; i < lanes<A>; ++i) sum += v[i];
    return sum;
}

template <class A>
inline A dot(const A* a, const A* b, int64_t count) {
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; i += lanes<A>) {
        const int n = int(smaller(lanes<A>, count - i));
        sum += load(a + i, n) * load(b + i, n);
    }
    return horizontal_sum<A>(sum);
}

// to += factor * from.
template <class A>
inline void add_scaled(int64_t count, A factor, const A* from, A* to) {
    for (int64_t i = 0; i < count; i += lanes<A>) {
        const int n = int(smaller(lanes<A>, count - i));
        store(to + i, load(to + i, n) + factor * load(from + i, n), n);
    }
}

// The values between pool and gate, kept for the gradients.
template <class A>
struct Excitation {
    Buffer<A> hidden_pre, hidden, gate_pre, gate;

    Excitation(const SqueezeExciteShape& s, const SqueezeExciteParams& params, const A* pooled)
        : hidden_pre(s.batch * s.reduced),
          hidden(s.batch * s.reduced),
          gate_pre(s.batch * s.channels),
          gate(s.batch * s.channels) {
        const A *rw = static_cast<const A*>(params.reduce_weight), *rb = static_cast<const A*>(params.reduce_bias);
        const A *ew = static_cast<const A*>(params.expand_weight), *eb = static_cast<const A*>(params.expand_bias);
        const int64_t C = s.channels, R = s.reduced;
        parallel(s.batch, [&](int64_t begin, int64_t end) {
            for (int64_t image = begin; image < end; ++image) {
                A *pre = hidden_pre + image * R, *h = hidden + image * R, *g_pre = gate_pre + image * C,
                  *g = gate + image * C;
                for (int64_t r = 0; r < R; ++r)
                    pre[r] = dot(rw + r * C, pooled + image * C, C) + (rb == nullptr ? A(0) : rb[r]);
                for (int64_t r = 0; r < R; r += lanes<A>) {
                    const int n = int(smaller(lanes<A>, R - r));
                    store(h + r, activate<A>(load(pre + r, n), params.activation), n);
                }
                for (int64_t c = 0; c < C; ++c) g_pre[c] = dot<A>(ew + c * R, h, R) + (eb == nullptr ? A(0) : eb[c]);
                for (int64_t c = 0; c < C; c += lanes<A>) {
                    const int n = int(smaller(lanes<A>, C - c));
                    store(g + c, effnet::cpu::EFFNET_ISA::gate<A>(load(g_pre + c, n), params.gate), n);
                }
            }
        });
    }
};

// From the gate's gradient [image][channel]: the pooled values' gradient, divided by `pixels` (which makes it the
// gradient of each pixel), and the parameters'. gate_gradient is overwritten with the gradient before the gate
// function.
template <class A>
inline void excitation_backward(const SqueezeExciteShape& s, const SqueezeExciteParams& params, const A* pooled,
                                const Excitation<A>& forward, A* gate_gradient, A* pool_gradient,
                                const SqueezeExciteGrads& grads) {
    const A *rw = static_cast<const A*>(params.reduce_weight), *ew = static_cast<const A*>(params.expand_weight);
    const int64_t C = s.channels, R = s.reduced;
    const Buffer<A> hidden_gradient = zeros<A>(s.batch * R);
    parallel(s.batch, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
            A *dg = gate_gradient + image * C, *dh = hidden_gradient + image * R, *dp = pool_gradient + image * C;
            for (int64_t c = 0; c < C; c += lanes<A>) {
                const int n = int(smaller(lanes<A>, C - c));
                const Vec<A> pre = load(forward.gate_pre + image * C + c, n), g = load(forward.gate + image * C + c, n);
                store(dg + c, load(dg + c, n) * gate_derivative<A>(pre, g, params.gate), n);
            }
            for (int64_t c = 0; c < C; ++c) add_scaled(R, dg[c], ew + c * R, dh);
            for (int64_t r = 0; r < R; r += lanes<A>) {
                const int n = int(smaller(lanes<A>, R - r));
                const Vec<A> pre = load(forward.hidden_pre + image * R + r, n);
                store(dh + r, load(dh + r, n) * activate_derivative<A>(pre, params.activation), n);
            }
            std::memset(dp, 0, size_t(C) * sizeof(A));
            for (int64_t r = 0; r < R; ++r) add_scaled(C, dh[r] / A(s.pixels), rw + r * C, dp);
        }
    });
    // rows x columns outer products, summed over the images in order
    const auto outer = [&](int64_t rows, int64_t columns, const A* left, const A* right, void* weight, void* bias) {
        parallel(rows, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                A* const w = weight == nullptr ? nullptr : static_cast<A*>(weight) + i * columns;
                if (w != nullptr) std::memset(w, 0, size_t(columns) * sizeof(A));
                A sum = 0;
                for (int64_t image = 0; image < s.batch; ++image) {
                    sum += left[image * rows + i];
                    if (w != nullptr) add_scaled(columns, left[image * rows + i], right + image * columns, w);
                }
                if (bias != nullptr) static_cast<A*>(bias)[i] = sum;
            }
        });
    };
    outer(C, R, gate_gradient, forward.hidden, grads.expand_weight, grads.expand_bias);
    outer(R, C, hidden_gradient, pooled, grads.reduce_weight, grads.reduce_bias);
}

EFFNET_NAMESPACE_END
