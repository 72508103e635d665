// Shadows CUDA's header of this name: the words of device code, on fibers. docs/emulation.md says what is checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

using uint3 = emulation::Index;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

// Constants for the compiler, and for the thread that runs; the scheduler changes them between threads.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

#define EMULATION_VECTORS(TYPE, NAME, ALIGN2, ALIGN4)                \
    struct __align__(ALIGN2) NAME##2 { TYPE x, y; };                 \
    struct __align__(ALIGN4) NAME##4 { TYPE x, y, z, w; };           \
    inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; } \
    inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(int, int, 8, 16)
EMULATION_VECTORS(unsigned, uint, 8, 16)
EMULATION_VECTORS(unsigned short, ushort, 4, 8)
#undef EMULATION_VECTORS

namespace emulation {

template <class To, class From>
To reinterpret(const From& from) {
    static_assert(std::is_trivially_copyable_v<From> && std::is_trivially_copyable_v<To>);
    To to{};
    __builtin_memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
    return to;
}

template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int parameter, int width, Site site) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "what the hardware shuffles");
    return reinterpret<T>(shuffle(kind, mask, reinterpret<uint64_t>(value), parameter, width, site));
}

}  // namespace emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::warp_barrier(mask, {file, line});
}

#define EMULATION_SHUFFLE(NAME, KIND, PARAMETER)                                                                \
    template <class T>                                                                                          \
    T NAME(unsigned mask, T value, PARAMETER parameter, int width = 32, const char* file = __builtin_FILE(),    \
           int line = __builtin_LINE()) {                                                                       \
        return emulation::shuffle_value(emulation::Shuffle::KIND, mask, value, parameter, width, {file, line}); \
    }
EMULATION_SHUFFLE(__shfl_sync, from, int)
EMULATION_SHUFFLE(__shfl_up_sync, up, unsigned)
EMULATION_SHUFFLE(__shfl_down_sync, down, unsigned)
EMULATION_SHUFFLE(__shfl_xor_sync, across, int)
#undef EMULATION_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    return emulation::ballot(mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulation::ballot(mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulation::ballot(mask, predicate == 0, {file, line}) == 0;
}

template <class T>
T __ldg(const T* address) {
    emulation::read_only_access(address, sizeof(T));
    return *address;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return expf(x); }
inline float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }
inline int __float_as_int(float x) { return emulation::reinterpret<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::reinterpret<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::reinterpret<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::reinterpret<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
