// Activations, gates and their derivatives on vectors, chosen at run time: the branch is the same for a whole tensor
// and predicts well.
#pragma once

#include "kernels.h"
#include "vec.h"

EFFNET_NAMESPACE_BEGIN

// exp(x) for x <= 0 in fp32: x = n ln 2 + r, |r| <= ln 2 / 2, and 2^n times a polynomial of degree 6 in r (minimax: its
// own error is 3e-9). Relative error below 1.5e-7 where the result is a normal number, within a unit of the subnormal ones
// below; NaN stays NaN.
EFFNET_INLINE Vec<float> exp_negative(Vec<float> x) {
    constexpr float low = -104.0f, log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#if defined(__AVX512F__)
    // max gives its second operand where one is NaN.
    const Vec<float> t = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
    const Vec<float> n =
        (Vec<float>)_mm512_roundscale_ps((__m512)(t * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits.
    const Vec<float> magic = broadcast(12582912.0f);
    const Vec<float> t = x < low ? broadcast(low) : x;
    const Vec<float> shifted = t * log2e + magic, n = shifted - magic;
#endif
    const Vec<float> r = n * -ln2_low + (n * -ln2_high + t);
    Vec<float> p = broadcast(1.381453269e-3f);
    p = p * r + 8.368745067e-3f;
    p = p * r + 4.166839094e-2f;
    p = p * r + 1.666652040e-1f;
    p = p * r + 4.999999343e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors: neither is subnormal where the result is.
    const I32 whole = bit_cast<I32>(shifted) - bit_cast<I32>(magic), half = whole >> 1;
    return p * bit_cast<Vec<float>>((half + 127) << 23) * bit_cast<Vec<float>>((whole - half + 127) << 23);
#endif
}

EFFNET_INLINE Vec<double> exp_negative(Vec<double> x) {
    Vec<double> y;
    for (int i = 0; i < lanes<double>; ++i) y[i] = ::exp(x[i]);
    return y;
}

EFFNET_INLINE Vec<float> minus_magnitude(Vec<float> x) { return bit_cast<Vec<float>>(bit_cast<U32>(x) | 0x80000000u); }
EFFNET_INLINE Vec<double> minus_magnitude(Vec<double> x) { return x > Vec<double>{} ? -x : x; }

// Both forms take exp of -|x| alone, which never overflows: relative error below 2e-7, for results that are subnormal, too.
template <class A>
EFFNET_INLINE Vec<A> sigmoid(Vec<A> x) {
    const Vec<A> e = exp_negative(minus_magnitude(x));
    return (x < Vec<A>{} ? e : broadcast(A(1))) / (e + A(1));
}

// x or x e, whichever is larger, is the numerator: e <= 1. Both are NaN for x = NaN, and x e is for x = -inf, as in
// PyTorch.
template <class A>
EFFNET_INLINE Vec<A> silu(Vec<A> x) {
    const Vec<A> e = exp_negative(minus_magnitude(x)), scaled = x * e;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == sizeof(float)) {
        const __m512 larger = _mm512_max_ps((__m512)x, (__m512)scaled);
        return (Vec<A>)larger / (e + A(1));
    }
#endif
    return (x > scaled ? x : scaled) / (e + A(1));
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
            return silu<A>(x);
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
