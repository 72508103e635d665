// Shadows csrc/cuda/launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <tuple>

namespace effnet::cuda {

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::shared_memory());
}

namespace detail {

template <auto kernel, class... A>
cudaError_t launch(bool cooperative, dim3 grid, int threads, int shared_bytes, A... args) {
    std::tuple<A...> arguments(args...);
    emulation::Launch launch{};
    launch.kernel = reinterpret_cast<const void*>(kernel);
    launch.body = [](void* all) { std::apply(kernel, *static_cast<std::tuple<A...>*>(all)); };
    launch.arguments = &arguments;
    launch.argument_bytes = sizeof arguments;
    launch.grid = {grid.x, grid.y, grid.z};
    launch.block = {static_cast<unsigned>(threads), 1, 1};
    launch.shared_bytes = shared_bytes;
    launch.cooperative = cooperative;
    return emulation::launch(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace detail

template <auto kernel>
bool compiled_for(int) {
    return true;
}

template <auto kernel, class... A>
cudaError_t launch(dim3 grid, int threads, int shared_bytes, cudaStream_t, A... args) {
    return detail::launch<kernel>(false, grid, threads, shared_bytes, args...);
}

template <auto kernel, class... A>
cudaError_t launch_cooperative(dim3 grid, int threads, int shared_bytes, cudaStream_t, A... args) {
    return detail::launch<kernel>(true, grid, threads, shared_bytes, args...);
}

}  // namespace effnet::cuda
