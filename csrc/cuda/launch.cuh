// Launches, and the one buffer of shared memory.
#pragma once

#include <cuda_runtime.h>

namespace effnet::cuda {

// The block's dynamic shared memory, from its beginning.
template <class T>
__device__ inline T* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared_memory_bytes[];
    return reinterpret_cast<T*>(shared_memory_bytes);
}

namespace detail {

// The error, which must not be found by whoever asks for the last one next.
inline cudaError_t taken(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

// Lets blocks of this kernel have as much shared memory as there is on the current device: one value, whatever other
// threads are about to launch.
template <auto kernel>
cudaError_t allow_all_shared_memory() {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    return taken(error);
}

template <auto kernel, class... A>
cudaError_t launch(bool cooperative, dim3 grid, int threads, int shared_bytes, cudaStream_t stream, A... args) {
    constexpr int without_asking = 48 * 1024;
    if (shared_bytes > without_asking) {
        const cudaError_t error = allow_all_shared_memory<kernel>();
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return taken(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace detail

// Whether the code that this device would run was compiled for compute capability version / 10 or later: PTX for older
// devices runs on newer ones, too.
template <auto kernel>
bool compiled_for(int version) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = detail::taken(cudaFuncGetAttributes(&attributes, kernel));
    return error == cudaSuccess && attributes.ptxVersion >= version;
}

// Launches kernel<<<grid, threads, shared_bytes, stream>>>(args...) and returns the launch's error.
template <auto kernel, class... A>
cudaError_t launch(dim3 grid, int threads, int shared_bytes, cudaStream_t stream, A... args) {
    return detail::launch<kernel>(false, grid, threads, shared_bytes, stream, args...);
}

// The same with all blocks resident, so that they may wait for each other in grid_barrier.
template <auto kernel, class... A>
cudaError_t launch_cooperative(dim3 grid, int threads, int shared_bytes, cudaStream_t stream, A... args) {
    return detail::launch<kernel>(true, grid, threads, shared_bytes, stream, args...);
}

}  // namespace effnet::cuda
