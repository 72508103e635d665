// Stored and computed precision, activations and gates with their derivatives.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include <ptx.cuh>

#include "kernels.h"

namespace effnet::cuda {

// `n` neighbouring values that are loaded and stored at once.
template <class T, int n>
struct __align__(sizeof(T) * n) Pack {
    T value[n];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Whether an error of 2^-12 in a sigmoid is lost in the rounding of what is stored.
template <class T>
inline constexpr bool coarse = false;
template <>
inline constexpr bool coarse<__nv_bfloat16> = true;

// Two neighbours at once.
template <class T>
__device__ inline Pack<T, 2> narrow(float x, float y) {
    return {narrow<T>(x), narrow<T>(y)};
}
template <>
__device__ inline Pack<__nv_bfloat16, 2> narrow<__nv_bfloat16>(float x, float y) {
    Pack<__nv_bfloat16, 2> pack;
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&pack, &pair, sizeof(pack));
    return pack;
}

template <class T, int n>
__device__ inline void widen_pack(const Pack<T, n>& pack, float (&to)[n]) {
    if constexpr (sizeof(T) == 2 && coarse<T> && n % 2 == 0) {
        // A bfloat16 is the upper half of a float.
        uint32_t pairs[n / 2], halves[n];
        memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
        for (int i = 0; i < n; ++i) halves[i] = i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u;
        memcpy(to, halves, sizeof(halves));
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) to[i] = widen(pack.value[i]);
    }
}

template <class T, int n>
__device__ inline void load(const T* from, float (&to)[n]) {
    const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(from);
    widen_pack(pack, to);
}

template <class T, int n>
__device__ inline void store(T* to, const float (&from)[n]) {
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.value[i] = narrow<T>(from[i]);
    *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// What a store of these values and a load would make of them.
template <class T, int n>
__device__ inline void round_as(const float (&from)[n], float (&to)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
        const Pack<T, 2> pair = narrow<T>(from[i], from[i + 1]);
        float rounded[2];
        widen_pack(pair, rounded);
        to[i] = rounded[0];
        to[i + 1] = rounded[1];
    }
}

// The first `count` of n neighbouring values, zeros behind them; at once where `together`, which asks for alignment.
template <class T, int n>
__device__ inline void load_some(const T* from, float (&to)[n], int count, bool together) {
    if (together) {
        load(from, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = i < count ? widen(from[i]) : 0.0f;
}

template <class T, int n>
__device__ inline void store_some(T* to, const float (&from)[n], int count, bool together) {
    if (together) {
        store(to, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (i < count) to[i] = narrow<T>(from[i]);
}

// 1 / (1 + exp(-x)). Where exp overflows the quotient is the right 0.
template <bool fast>
__device__ inline float sigmoid(float x) {
    if constexpr (fast) return fmaf(0.5f, tanh_approximate(0.5f * x), 0.5f);
    return reciprocal_approximate(1.0f + exp2_approximate(-1.4426950408889634f * x));
}

// SiLU of 2 h.
template <bool fast>
__device__ inline float silu_of_twice(float h) {
    if constexpr (fast) return fmaf(h, tanh_approximate(h), h);
    return 2.0f * h * sigmoid<fast>(2.0f * h);
}

// The normal distribution function at x, and exp(-x^2 / 2).
__device__ inline float normal_below(float x, float& e) {
    const float z = fabsf(x), t = reciprocal_approximate(fmaf(normal_scale, z, 1.0f));
    e = exp2_approximate(-0.72134752f * x * x);
    const float terms[] = EFFNET_NORMAL_TERMS;
    float p = terms[8];
#pragma unroll
    for (int i = 7; i >= 0; --i) p = fmaf(p, t, terms[i]);
    const float tail = p * t * e;
    return x < 0.0f ? tail : 1.0f - tail;
}

// GELU by tanh is x times the sigmoid of this.
__device__ inline float gelu_inner(float x) {
    return x * fmaf(float(gelu_slope * gelu_cubic), x * x, float(gelu_slope));
}

__device__ inline float hard_sigmoid(float x) { return fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); }

// Replaces all x by activation(x); one branch for all of them.
template <bool fast, int n>
__device__ inline void activate(float (&x)[n], Activation kind) {
    switch (kind) {
        case Activation::relu:
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
            break;
        case Activation::relu6:
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i] > 6.0f ? 6.0f : x[i];
            break;
        case Activation::silu:
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] = fast ? silu_of_twice<fast>(0.5f * x[i]) : x[i] * sigmoid<fast>(x[i]);
            break;
        case Activation::hardswish:
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] *= hard_sigmoid(x[i]);
            break;
        case Activation::gelu:
#pragma unroll
            for (int i = 0; i < n; ++i) {
                float e;
                x[i] *= normal_below(x[i], e);
            }
            break;
        case Activation::gelu_tanh:
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] *= sigmoid<fast>(gelu_inner(x[i]));
            break;
        case Activation::none:
            break;
    }
}

// Replaces all x by activation(x), and makes the derivatives at x; at a kink, the one that PyTorch takes.
template <bool fast, int n>
__device__ inline void differentiate(float (&x)[n], float (&derivative)[n], Activation kind) {
    switch (kind) {
        case Activation::relu:
#pragma unroll
            for (int i = 0; i < n; ++i) derivative[i] = x[i] > 0.0f ? 1.0f : 0.0f;
            break;
        case Activation::relu6:
#pragma unroll
            for (int i = 0; i < n; ++i) derivative[i] = x[i] > 0.0f && x[i] < 6.0f ? 1.0f : 0.0f;
            break;
        case Activation::silu:
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const float s = sigmoid<fast>(x[i]);
                x[i] *= s;
                derivative[i] = fmaf(x[i], 1.0f - s, s);
            }
            return;
        case Activation::hardswish:
#pragma unroll
            for (int i = 0; i < n; ++i)
                derivative[i] = x[i] <= -3.0f ? 0.0f : x[i] < 3.0f ? fmaf(x[i], 1.0f / 3.0f, 0.5f) : 1.0f;
            break;
        case Activation::gelu:
#pragma unroll
            for (int i = 0; i < n; ++i) {
                float e;
                const float below = normal_below(x[i], e);
                derivative[i] = fmaf(normal_peak * e, x[i], below);
                x[i] *= below;
            }
            return;
        case Activation::gelu_tanh:
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const float s = sigmoid<fast>(gelu_inner(x[i])), y = x[i] * s;
                // Further out the sigmoid is 0 or 1 to all digits.
                const float inside = fminf(fabsf(x[i]), 40.0f);
                derivative[i] = fmaf(y * (1.0f - s),
                                     fmaf(float(3.0 * gelu_slope * gelu_cubic), inside * inside, float(gelu_slope)), s);
                x[i] = y;
            }
            return;
        case Activation::none:
#pragma unroll
            for (int i = 0; i < n; ++i) derivative[i] = 1.0f;
            break;
    }
    activate<fast>(x, kind);
}

__device__ inline float gate_of(float x, Gate kind) {
    return kind == Gate::sigmoid ? sigmoid<false>(x) : hard_sigmoid(x);
}

__device__ inline float gate_derivative(float x, Gate kind) {
    if (kind == Gate::hard_sigmoid) return x > -3.0f && x < 3.0f ? 1.0f / 6.0f : 0.0f;
    const float s = sigmoid<false>(x);
    return s * (1.0f - s);
}

}  // namespace effnet::cuda
