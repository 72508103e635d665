// Shadows csrc/cuda/tensor_map.h: a tensor map in plain words.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace effnet::cuda {

using TensorMap = emulation::TensorMap;

inline bool encode_tensor_map(TensorMap& map, DType dtype, const void* data, const int64_t (&sizes)[4],
                              const int (&box)[4]) {
    map.data = static_cast<const unsigned char*>(data);
    map.element_bytes = dtype == DType::f32 ? 4 : 2;
    for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i], map.box[i] = box[i];
    return emulation::can_be_mapped(map);
}

}  // namespace effnet::cuda
