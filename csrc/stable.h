// What the bindings of the CPU and of the CUDA kernels share: tensors' layouts and dtypes, and the names of activations
// and gates, through the LibTorch stable ABI alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "activations.h"

namespace effnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Needs = std::vector<bool>;

template <class Activation>
Activation activation_named(const std::string& name) {
#define EFFNET_IF_NAMED(known) \
    if (name == #known) return Activation::known;
    EFFNET_ACTIVATIONS(EFFNET_IF_NAMED)
#undef EFFNET_IF_NAMED
    STD_TORCH_CHECK(false, "unknown activation '", name, "'");
    return Activation::none;
}

template <class Gate>
Gate gate_named(const std::string& name) {
#define EFFNET_IF_NAMED(known) \
    if (name == #known) return Gate::known;
    EFFNET_GATES(EFFNET_IF_NAMED)
#undef EFFNET_IF_NAMED
    STD_TORCH_CHECK(false, "unknown gate '", name, "'");
    return Gate::sigmoid;
}

// Axes of size 1 have no stride that matters.
inline bool is_dense_nhwc(const Tensor& x) {
    const auto size = x.sizes(), stride = x.strides();
    const int64_t wanted[4] = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
    for (int axis = 0; axis < 4; ++axis)
        if (size[axis] != 1 && stride[axis] != wanted[axis]) return false;
    return true;
}

// Output keeps the input's layout: channels_last where the channels of x are innermost and x is not contiguous at the
// same time.
inline bool keeps_channels_last(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous(); }

inline Tensor as_dtype(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

}  // namespace effnet
