// Every instruction that C++ has no word for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include <tensor_map.h>

namespace effnet::cuda {

namespace detail {

__device__ inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Bulk copies and their barriers exist from sm_90 on; older code that comes to one stops.
__device__ inline void only_since_sm_90() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    __trap();
    __builtin_unreachable();
#endif
}

}  // namespace detail

// Copies 16 bytes from global to shared memory behind the thread's back; zeros where not inside, and then reads
// nothing.
__device__ inline void copy_async_16(void* shared, const void* global, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
}

// Copies the first `bytes` of 16 in the same way, and zeros behind them.
__device__ inline void copy_async_some(void* shared, const void* global, int bytes) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of this thread's copies; it may be empty.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest `open` groups of this thread have landed.
template <int open>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

// A barrier in shared memory, whose phase is complete when `arrivals` threads have arrived and all bytes that they
// expect have been copied. One thread makes barriers, then fences them, and others know them behind a __syncthreads.
__device__ inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
    detail::only_since_sm_90();
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

// Shows the copy engine the barriers that this thread has made.
__device__ inline void fence_mbarriers() {
    detail::only_since_sm_90();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and adds to the bytes that the phase waits for.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
    detail::only_since_sm_90();
    const unsigned at = detail::shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete; the first one has parity 0. What was copied is then seen by this
// thread, and by all behind the next __syncthreads.
__device__ inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    detail::only_since_sm_90();
    const unsigned at = detail::shared_address(barrier);
    unsigned complete;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(complete)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (!complete);
}

// The copy engine fetches the map's box from these coordinates on, zeros where the tensor ends, and tells the barrier.
// `shared` is a multiple of 128; the map lies among the kernel's parameters.
__device__ inline void copy_tensor_async(void* shared, const TensorMap* map, int c, int w, int h, int n,
                                         uint64_t* barrier) {
    detail::only_since_sm_90();
    const unsigned to = detail::shared_address(shared), told = detail::shared_address(barrier);
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], [%6];" ::"r"(to),
        "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(told)
        : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8) by a warp, with T of two bytes and sums in float; docs/emulation.md shows who
// holds what.
template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
            "%2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of two-byte numbers from shared memory, as a warp's fragments. Lane 8 m + r gives the address of
// row r of matrix m, a multiple of 16.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
}

// One call of the special-function unit, with a relative error of 2^-11.
__device__ inline float tanh_approximate(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x, with an error of 2 units in the last place.
__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, with an error of 1 unit in the last place.
__device__ inline float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// All blocks of a cooperative launch meet, and see what the others wrote before. The counter lies in global memory and
// is zero at launch; `arrivals` is gridDim.x times the number of this meeting, counted from one.
__device__ inline void grid_barrier(unsigned* counter, unsigned arrivals) {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned seen;
        asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(seen) : "l"(counter) : "memory");
        // An acquiring load empties the multiprocessor's cache, which other blocks still use: once is enough.
        do asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        while (seen < arrivals);
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncthreads();
}

}  // namespace effnet::cuda
