// Shadows CUDA's header of this name: what host code of the kernels uses of it.
#pragma once

#include <cstddef>

#include "../runtime/emulation.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "an emulated launch failed";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
    return emulation::fill(pointer, value, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}
