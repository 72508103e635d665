// Shadows csrc/cuda/ptx.cuh: what each instruction does, and what its user must not rely on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <tensor_map.h>

namespace effnet::cuda {

inline void copy_async_16(void* shared, const void* global, bool inside) {
    emulation::copy_async(shared, global, 16, inside ? 16 : 0);
}

inline void copy_async_some(void* shared, const void* global, int bytes) {
    emulation::copy_async(shared, global, 16, bytes);
}

inline void copy_async_commit() { emulation::commit_copies(); }

template <int open>
void copy_async_wait() {
    emulation::wait_copies(open);
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) { emulation::make_mbarrier(barrier, arrivals); }

inline void fence_mbarriers() { emulation::fence_mbarriers(); }

inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) { emulation::arrive_at_mbarrier(barrier, bytes); }

inline void mbarrier_wait(uint64_t* barrier, unsigned parity, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
    emulation::wait_at_mbarrier(barrier, parity, {file, line});
}

inline void copy_tensor_async(void* shared, const TensorMap* map, int c, int w, int h, int n, uint64_t* barrier) {
    emulation::copy_box(shared, *map, {{c, w, h, n}}, barrier);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    constexpr bool half = std::is_same_v<T, __half>;
    static_assert(half || std::is_same_v<T, __nv_bfloat16>, "two bytes");
    emulation::matrix_product(half ? emulation::Format::f16 : emulation::Format::bf16, a, b, c, {file, line});
}

inline void load_matrices(uint32_t (&to)[4], const void* row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
    const uint4 values = *static_cast<const uint4*>(row);
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    emulation::matrix_load(words, to, {file, line});
}

// About as coarse as the instruction.
inline float tanh_approximate(float x) {
    const float y = tanhf(x);
    return __uint_as_float((__float_as_uint(y) + 0x800u) & ~0xfffu);
}

namespace detail {

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace detail

inline float exp2_approximate(float x) { return detail::flushed(exp2f(detail::flushed(x))); }

inline float reciprocal_approximate(float x) { return detail::flushed(1.0f / detail::flushed(x)); }

inline void grid_barrier(unsigned* counter, unsigned arrivals, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
    emulation::grid_barrier(counter, arrivals, {file, line});
}

}  // namespace effnet::cuda
