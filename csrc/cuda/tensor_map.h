// What the bulk tensor copy engine has to know of a tensor, encoded on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels.h"

namespace effnet::cuda {

using TensorMap = CUtensorMap;

namespace detail {

// The driver's function, or null where it has none. It is asked for by name, so that nothing links the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        constexpr unsigned since = 12000;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, since, cudaEnableDefault, &result);
        if (error != cudaSuccess) cudaGetLastError();
        const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
    }();
    return found;
}

inline CUtensorMapDataType tensor_map_type(DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case DType::f16:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        default:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

}  // namespace detail

// Describes a contiguous tensor by its sizes, innermost first (C, W, H, N), and the box that a copy brings. False where
// the driver has no such maps or takes none of this: pixels that begin at no multiple of 16 bytes, boxes of more than
// 256 elements a side.
inline bool encode_tensor_map(TensorMap& map, DType dtype, const void* data, const int64_t (&sizes)[4],
                              const int (&box)[4]) {
    const auto encode = detail::tensor_map_encoder();
    if (encode == nullptr) return false;
    cuuint64_t extents[4], strides[3];
    cuuint32_t counts[4], steps[4];
    for (int i = 0; i < 4; ++i) extents[i] = sizes[i], counts[i] = box[i], steps[i] = 1;
    strides[0] = extents[0] * (dtype == DType::f32 ? 4 : 2);
    for (int i = 1; i < 3; ++i) strides[i] = strides[i - 1] * extents[i];
    return encode(&map, detail::tensor_map_type(dtype), 4, const_cast<void*>(data), extents, strides, counts, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace effnet::cuda
