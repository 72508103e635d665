// The activations and the gates, once for the kernels of the CPU and of CUDA. Their names and their order are those of
// effnet_ops/reference/activation.py.
#pragma once

#define EFFNET_ACTIVATIONS(X) X(none) X(relu) X(relu6) X(silu) X(hardswish)
#define EFFNET_GATES(X) X(sigmoid) X(hard_sigmoid)

namespace effnet {

#define EFFNET_ENUMERATOR(name) name,
enum class Activation : int { EFFNET_ACTIVATIONS(EFFNET_ENUMERATOR) };
enum class Gate : int { EFFNET_GATES(EFFNET_ENUMERATOR) };
#undef EFFNET_ENUMERATOR

}  // namespace effnet
