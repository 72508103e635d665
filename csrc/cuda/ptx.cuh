// Every instruction that C++ has no word for.
#pragma once

#include <cuda_runtime.h>

namespace effnet::cuda {

// Copies 16 bytes from global to shared memory behind the thread's back; zeros where not inside, and then reads
// nothing.
__device__ inline void copy_async_16(void* shared, const void* global, bool inside) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
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
        do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        while (seen < arrivals);
    }
    __syncthreads();
}

}  // namespace effnet::cuda
