// Vectors of the compute type, in the compiler's own vector extension: the same text is SSE, AVX2, AVX-512 or NEON
// code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

EFFNET_NAMESPACE_BEGIN

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class A>
struct VecOf {
    static constexpr int lanes = EFFNET_VECTOR_BYTES / sizeof(A);
    typedef A type __attribute__((vector_size(EFFNET_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int lanes = VecOf<A>::lanes;

typedef uint16_t U16 __attribute__((vector_size(EFFNET_VECTOR_BYTES / 2)));
typedef uint32_t U32 __attribute__((vector_size(EFFNET_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(EFFNET_VECTOR_BYTES)));

// The type that values of the storage type T are computed in.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class A>
inline Vec<A> broadcast(A value) {
    return Vec<A>{} + value;
}

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return bit_cast<float>(sign | 0x7f800000u | magnitude);
    // Scaling by 2^112 rebias the exponent and turns half's subnormals into normal floats at once.
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

inline uint16_t float_to_half(float f) {
    const uint32_t bits = bit_cast<uint32_t>(f);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
    if (!(magnitude == magnitude)) return uint16_t(sign | 0x7e00);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
    // Adding a power of two whose unit in the last place is half's makes the addition itself round to nearest even.
    const int exponent = int(bit_cast<uint32_t>(magnitude) >> 23) - 127;
    const int clamped = exponent < -14 ? -14 : exponent;
    const float anchor = bit_cast<float>(uint32_t(clamped + 13 + 127) << 23);
    const float rounded = (magnitude + anchor) - anchor;
    return uint16_t(sign | (bit_cast<uint32_t>(rounded * 0x1p-112f) >> 13));
}

inline Vec<float> widen_bf16(U16 raw) { return bit_cast<Vec<float>>(__builtin_convertvector(raw, U32) << 16); }

inline U16 narrow_bf16(Vec<float> v) {
#if defined(__AVX512BF16__)
    return bit_cast<U16>(_mm512_cvtneps_pbh((__m512)v));
#else
    const U32 bits = bit_cast<U32>(v);
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32 nan = bit_cast<U32>(v != v);
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), U16);
#endif
}

inline Vec<float> load(const float* p) {
    Vec<float> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline Vec<double> load(const double* p) {
    Vec<double> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline Vec<float> load(const bfloat16* p) {
    U16 raw;
    std::memcpy(&raw, p, sizeof(raw));
    return widen_bf16(raw);
}
inline Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> v;
    for (int i = 0; i < lanes<float>; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bfloat16* p, Vec<float> v) {
    const U16 raw = narrow_bf16(v);
    std::memcpy(p, &raw, sizeof(raw));
}
inline void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < lanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The first n lanes, zeros behind them; nothing beyond p + n is read.
template <class T>
inline Vec<Compute<T>> load(const T* p, int n) {
    if (n >= lanes<Compute<T>>) return load(p);
    T padded[lanes<Compute<T>>] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
}
template <class T>
inline void store(T* p, Vec<Compute<T>> v, int n) {
    if (n >= lanes<Compute<T>>) return store(p, v);
    T padded[lanes<Compute<T>>];
    store(padded, v);
    std::memcpy(p, padded, size_t(n) * sizeof(T));
}
#if defined(__AVX512F__)
template <>
inline Vec<float> load<float>(const float* p, int n) {
    if (n >= lanes<float>) return load(p);
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
inline void store<float>(float* p, Vec<float> v, int n) {
    if (n >= lanes<float>) return store(p, v);
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
template <>
inline Vec<float> load<bfloat16>(const bfloat16* p, int n) {
    if (n >= lanes<float>) return load(p);
    return widen_bf16((U16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
template <>
inline void store<bfloat16>(bfloat16* p, Vec<float> v, int n) {
    if (n >= lanes<float>) return store(p, v);
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow_bf16(v));
}
template <>
inline Vec<float> load<float16>(const float16* p, int n) {
    if (n >= lanes<float>) return load(p);
    return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
template <>
inline void store<float16>(float16* p, Vec<float> v, int n) {
    if (n >= lanes<float>) return store(p, v);
    const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), half);
}
#endif

template <class A>
inline Vec<A> min(Vec<A> a, Vec<A> b) {
    return a < b ? a : b;
}
template <class A>
inline Vec<A> max(Vec<A> a, Vec<A> b) {
    return a > b ? a : b;
}
// x, or the bound where x is beyond it; a NaN in x stays, which is the order of operands of the instructions, too.
template <class A>
EFFNET_INLINE Vec<A> at_least(Vec<A> x, A bound) {
    const Vec<A> b = broadcast(bound);
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_max_ps((__m512)b, (__m512)x);
#elif defined(__F16C__)
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_max_ps((__m256)b, (__m256)x);
#endif
    return b > x ? b : x;
}
template <class A>
EFFNET_INLINE Vec<A> at_most(Vec<A> x, A bound) {
    const Vec<A> b = broadcast(bound);
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_min_ps((__m512)b, (__m512)x);
#elif defined(__F16C__)
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_min_ps((__m256)b, (__m256)x);
#endif
    return b < x ? b : x;
}
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A size as a compile-time constant.
template <int N>
struct Size {
    static constexpr int value = N;
};

EFFNET_NAMESPACE_END
