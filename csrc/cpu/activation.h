// Activations, gates and their derivatives on vectors, chosen at run time: the branch is the same for a whole tensor
// and predicts well.
#pragma once

#include "kernels.h"
#include "vec.h"

EFFNET_NAMESPACE_BEGIN

#if defined(__AVX512F__)
// x with its magnitude cut off at 89. NaN becomes a number.
EFFNET_INLINE Vec<float> within_exp(Vec<float> x) {
    constexpr int smaller_magnitude_with_sign_of_first = 2;
    return (Vec<float>)_mm512_range_ps((__m512)x, _mm512_set1_ps(89.0f), smaller_magnitude_with_sign_of_first);
}
#endif

// exp(-x) in fp32, for a sum with 1: -x = n ln 2 + r and 2^n times a polynomial in r. Relative error below 1.5e-7 for
// |x| < 87; infinite below -89 and nothing beside 1 above 87.
EFFNET_INLINE Vec<float> exp_minus(Vec<float> x) {
    constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#if defined(__AVX512F__)
    const Vec<float> t = within_exp(x);
    // n in sixteenths, whose fractions have a table: a polynomial of degree 3 is enough. 1.5 * 2^19: adding it rounds
    // to sixteenths, and leaves their number in the low mantissa bits.
    alignas(64) static const float fractions[16] = {
        1.0f,         1.044273782f, 1.090507733f, 1.138788635f, 1.189207115f, 1.241857812f, 1.296839555f, 1.354255547f,
        1.414213562f, 1.476826146f, 1.542210825f, 1.610490332f, 1.681792831f, 1.756252160f, 1.834008086f, 1.915206561f};
    const Vec<float> magic = broadcast(786432.0f), shifted = t * -log2e + magic, n = shifted - magic;
    const Vec<float> r = n * ln2_low + (n * ln2_high + t);  // with its sign turned
    Vec<float> p = r * -0.16666667f + 0.5f;
    p = (p * r - 1.0f) * r;
    const Vec<float> fraction =
        (Vec<float>)_mm512_permutexvar_ps(bit_cast<__m512i>(shifted), _mm512_load_ps(fractions));
    return (Vec<float>)_mm512_scalef_ps((__m512)(fraction * p + fraction), (__m512)n);
#else
    // |r| <= ln 2 / 2 and degree 6 (minimax: its own error is 3e-9), twice the polynomial and half of 2^n, since 2^128
    // is not a float. Adding 1.5 * 2^23 + 126 rounds to an integer, and leaves the exponent field of 2^(n - 1) in the
    // lowest bits: 0 to 254.
    const Vec<float> t = at_most(at_least(x, -89.0f), 87.0f);
    const Vec<float> magic = broadcast(12583038.0f), shifted = t * -log2e + magic, n = shifted - magic;
    const Vec<float> r = n * ln2_low + (n * ln2_high + t);  // with its sign turned
    Vec<float> p = broadcast(2.762906538e-3f);
    p = p * r - 1.673749013e-2f;
    p = p * r + 8.333678188e-2f;
    p = p * r - 3.333304080e-1f;
    p = p * r + 9.999998686e-1f;
    p = p * r - 2.0f;
    p = p * r + 2.0f;
    return p * bit_cast<Vec<float>>(bit_cast<U32>(shifted) << 23);
#endif
}

EFFNET_INLINE Vec<double> exp_minus(Vec<double> x) {
    Vec<double> y;
    for (int i = 0; i < lanes<double>; ++i) y[i] = ::exp(-x[i]);
    return y;
}

// Relative error in fp32 below 2e-7, or at most two units in the last place, for x > -88.7; results below that, smaller
// than 3e-37, are zero.
template <class A>
EFFNET_INLINE Vec<A> sigmoid(Vec<A> x) {
    const Vec<A> y = A(1) / (exp_minus(x) + A(1));
#if defined(__AVX512F__)
    return x == x ? y : x;
#else
    return y;
#endif
}

// The same bounds. Minus infinity gives NaN, as in PyTorch.
template <class A>
EFFNET_INLINE Vec<A> silu(Vec<A> x) {
    return x / (exp_minus(x) + A(1));
}

// The standard normal distribution: its distribution function and its density at x.
template <class A>
struct Normal {
    Vec<A> below, density;
};

// Error of `below` in fp32: relative below 8e-7 for x > -5, and 4e-6 down to -12.9, where it is 2e-38.
EFFNET_INLINE Normal<float> normal(Vec<float> x) {
    const Vec<float> z = x < Vec<float>{} ? -x : x, e = exp_minus(z * z * 0.5f), t = 1.0f / (z * normal_scale + 1.0f);
    constexpr float terms[] = EFFNET_NORMAL_TERMS;
    Vec<float> p = broadcast(terms[8]);
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) p = p * t + terms[i];
    const Vec<float> tail = p * t * e;
    return {x < Vec<float>{} ? tail : 1.0f - tail, e * normal_peak};
}

EFFNET_INLINE Normal<double> normal(Vec<double> x) {
    constexpr double half_root = 0.70710678118654752, peak = 0.39894228040143268;
    Normal<double> y;
    for (int i = 0; i < lanes<double>; ++i) {
        y.below[i] = 0.5 * ::erfc(-x[i] * half_root);
        y.density[i] = peak * ::exp(-0.5 * x[i] * x[i]);
    }
    return y;
}

// d gelu / dx. The density is 0 to all digits where its factor is cut off, and no product overflows.
template <class A>
EFFNET_INLINE Vec<A> gelu_slope_at(Vec<A> x, const Normal<A>& at) {
    return at_most(at_least(x, A(-40)), A(40)) * at.density + at.below;
}

// GELU by tanh is x times the sigmoid of this.
template <class A>
EFFNET_INLINE Vec<A> gelu_inner(Vec<A> x) {
    return x * (x * x * A(gelu_slope * gelu_cubic) + A(gelu_slope));
}

template <class A>
EFFNET_INLINE Vec<A> clamp(Vec<A> x, A low, A high) {
    return at_most(at_least(x, low), high);
}

template <class A>
EFFNET_INLINE Vec<A> activate(Vec<A> x, Activation kind) {
    switch (kind) {
        case Activation::none:
            return x;
        case Activation::relu:
            return at_least(x, A(0));
        case Activation::relu6:
            return clamp<A>(x, 0, 6);
        case Activation::silu:
            return silu<A>(x);
        case Activation::hardswish:
            return x * clamp<A>(x + A(3), 0, 6) / A(6);
        case Activation::gelu:
            return x * normal(x).below;
        case Activation::gelu_tanh:
            return x / (exp_minus(gelu_inner<A>(x)) + A(1));
    }
    return x;
}

#if defined(__AVX512F__)
// SiLU to 2^-11, for results that are rounded to bf16 (2^-9): exp to the first degree between the sixteenths, and the
// processor's reciprocal as it is.
EFFNET_INLINE Vec<float> silu_for_bf16(Vec<float> x) {
    alignas(64) static const float fractions[16] = {
        1.0f,         1.044273782f, 1.090507733f, 1.138788635f, 1.189207115f, 1.241857812f, 1.296839555f, 1.354255547f,
        1.414213562f, 1.476826146f, 1.542210825f, 1.610490332f, 1.681792831f, 1.756252160f, 1.834008086f, 1.915206561f};
    const Vec<float> t = within_exp(x), magic = broadcast(786432.0f);
    const Vec<float> shifted = t * -1.44269504f + magic, n = shifted - magic, r = n * 0.693147181f + t;
    const Vec<float> fraction =
        (Vec<float>)_mm512_permutexvar_ps(bit_cast<__m512i>(shifted), _mm512_load_ps(fractions));
    const Vec<float> e = (Vec<float>)_mm512_scalef_ps((__m512)(fraction * -r + fraction), (__m512)n);
    return x * (Vec<float>)_mm512_rcp14_ps((__m512)(e + 1.0f));
}
#endif

template <class O>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

// activate() to the precision of results in the storage type O.
template <class O>
EFFNET_INLINE Vec<Compute<O>> activate_as(Vec<Compute<O>> x, Activation kind) {
#if defined(__AVX512F__)
    if constexpr (is_bfloat16<O>)
        if (kind == Activation::silu) return silu_for_bf16(x);
#endif
    return activate<Compute<O>>(x, kind);
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
        case Activation::gelu:
            return gelu_slope_at<A>(x, normal(x));
        case Activation::gelu_tanh: {
            // Further out the sigmoid is 0 or 1 to all digits.
            const Vec<A> s = sigmoid<A>(gelu_inner<A>(x)), inside = at_most(at_least(x, A(-40)), A(40));
            const Vec<A> inner_slope = inside * inside * A(3 * gelu_slope * gelu_cubic) + A(gelu_slope);
            return s * (inside * (A(1) - s) * inner_slope + A(1));
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

template <class A>
struct Activated {
    Vec<A> value, slope;
};

// activate(x) and its derivative, which share what is expensive.
template <class A>
EFFNET_INLINE Activated<A> activate_with_slope(Vec<A> x, Activation kind) {
    if (kind == Activation::gelu) {
        const Normal<A> at = normal(x);
        return {x * at.below, gelu_slope_at<A>(x, at)};
    }
    if (kind != Activation::silu) return {activate<A>(x, kind), activate_derivative<A>(x, kind)};
    const Vec<A> s = sigmoid<A>(x), value = x * s;
    return {value, s + value * (A(1) - s)};
}

// body(constant) with the activation as a compile-time constant, constant.value: the loops inside hold no branch.
template <Activation KIND>
struct ActivationConstant {
    static constexpr Activation value = KIND;
};

template <class Body>
inline void with_activation(Activation kind, const Body& body) {
    switch (kind) {
#define EFFNET_CASE(name)  \
    case Activation::name: \
        return body(ActivationConstant<Activation::name>{});
        EFFNET_ACTIVATIONS(EFFNET_CASE)
#undef EFFNET_CASE
    }
}

EFFNET_NAMESPACE_END
