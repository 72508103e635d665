// Activations, gates and their derivatives on vectors, chosen at run time: the branch is the same for a whole tensor
// and predicts well.
#pragma once

#include "kernels.h"
#include "vec.h"

EFFNET_NAMESPACE_BEGIN

// exp in fp32: x = n ln 2 + r, |r| <= ln 2 / 2, a minimax polynomial in r (Cephes expf), scaled by 2^n. Relative error
// below 2e-7 (tested over the whole range); infinite above 88.7228, zero below -87.3365, NaN stays NaN.
EFFNET_INLINE Vec<float> exp(Vec<float> x) {
    const Vec<float> magic =
        broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const Vec<float> low = broadcast(-87.33654f), high = broadcast(88.722839f);
    Vec<float> t = x < low ? low : x;
    t = t > high ? high : t;
    const Vec<float> shifted = t * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = n * -0.693359375f + t;
    r = n * 2.12194440e-4f + r;
    Vec<float> p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n in two factors, since n = 128 is a value of the range and 2^128 is not.
    const I32 whole = bit_cast<I32>(shifted) - bit_cast<I32>(magic);
    const I32 half = whole >> 1;
    p = p * bit_cast<Vec<float>>((half + 127) << 23) * bit_cast<Vec<float>>((whole - half + 127) << 23);
    p = x > high ? broadcast(INFINITY) : p;
    return x < low ? broadcast(0.0f) : p;
}

inline Vec<double> exp(Vec<double> x) {
    Vec<double> y;
    for (int i = 0; i < lanes<double>; ++i) y[i] = ::exp(x[i]);
    return y;
}

template <class A>
EFFNET_INLINE Vec<A> sigmoid(Vec<A> x) {
    return A(1) / (exp(-x) + A(1));
}

// A comparison with NaN is false, so each of these selects keeps a NaN in x.
template <class A>
EFFNET_INLINE Vec<A> clamp(Vec<A> x, A low, A high) {
    const Vec<A> a = broadcast(low), b = broadcast(high);
    x = x < a ? a : x;
    return x > b ? b : x;
}

template <class A>
EFFNET_INLINE Vec<A> activate(Vec<A> x, Activation kind) {
    switch (kind) {
        case Activation::none:
            return x;
        case Activation::relu:
            return x < Vec<A>{} ? Vec<A>{} : x;
        case Activation::relu6:
            return clamp<A>(x, 0, 6);
        case Activation::silu:
            return x / (exp(-x) + A(1));
        case Activation::hardswish:
            return x * clamp<A>(x + A(3), 0, 6) / A(6);
    }
    return x;
}

// d activate(x) / dx, with PyTorch's choice of subgradient at the corners.
template <class A>
EFFNET_INLINE Vec<A> activate_derivative(Vec<A> x, Activation kind) {
    const Vec<A> zero = {}, one = broadcast(A(1));
    switch (kind) {
        case Activation::none:
            return one;
        case Activation::relu:
            return x <= zero ? zero : one;
        case Activation::relu6:
            return (x <= zero) | (x >= broadcast(A(6))) ? zero : one;
        case Activation::silu: {
            const Vec<A> s = sigmoid<A>(x);
            return s * (x * (A(1) - s) + A(1));
        }
        case Activation::hardswish: {
            const Vec<A> middle = x / A(3) + A(0.5);
            return x <= broadcast(A(-3)) ? zero : (x < broadcast(A(3)) ? middle : one);
        }
    }
    return one;
}

template <class A>
inline Vec<A> gate(Vec<A> x, Gate kind) {
    return kind == Gate::sigmoid ? sigmoid<A>(x) : clamp<A>(x + A(3), 0, 6) / A(6);
}

// d gate / dx from x and y = gate(x).
template <class A>
inline Vec<A> gate_derivative(Vec<A> x, Vec<A> y, Gate kind) {
    if (kind == Gate::sigmoid) return y * (A(1) - y);
    const Vec<A> inside = broadcast(A(1) / A(6));
    return (x > broadcast(A(-3))) & (x < broadcast(A(3))) ? inside : Vec<A>{};
}

// body(constant) with the activation as a compile-time constant, constant.value: the loops inside hold no branch.
template <Activation KIND>
struct ActivationConstant {
    static constexpr Activation value = KIND;
};

template <class Body>
inline void with_activation(Activation kind, const Body& body) {
    switch (kind) {
        case Activation::none:
            return body(ActivationConstant<Activation::none>{});
        case Activation::relu:
            return body(ActivationConstant<Activation::relu>{});
        case Activation::relu6:
            return body(ActivationConstant<Activation::relu6>{});
        case Activation::silu:
            return body(ActivationConstant<Activation::silu>{});
        case Activation::hardswish:
            return body(ActivationConstant<Activation::hardswish>{});
    }
}

EFFNET_NAMESPACE_END
