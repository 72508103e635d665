// The activations and the gates, once for the kernels of the CPU and of CUDA. Their names and their order are those of
// effnet_ops/reference/activation.py; and what both compute in the same way.
#pragma once

#define EFFNET_ACTIVATIONS(X) X(none) X(relu) X(relu6) X(silu) X(hardswish) X(gelu) X(gelu_tanh)
#define EFFNET_GATES(X) X(sigmoid) X(hard_sigmoid)

namespace effnet {

#define EFFNET_ENUMERATOR(name) name,
enum class Activation : int { EFFNET_ACTIVATIONS(EFFNET_ENUMERATOR) };
enum class Gate : int { EFFNET_GATES(EFFNET_ENUMERATOR) };
#undef EFFNET_ENUMERATOR

// The normal distribution function at -z, z >= 0, is exp(-z^2 / 2) (c[0] t + c[1] t^2 + ... + c[8] t^9) with
// t = 1 / (1 + normal_scale z): a minimax fit, relative error 2.2e-8, of the form of Hastings (Abramowitz and Stegun
// 26.2.17), which keeps its precision in the tail.
constexpr float normal_scale = 0.26f;
#define EFFNET_NORMAL_TERMS                                             \
    {0.10376126f,  0.10298021f, 0.10328543f,  0.05004685f, 0.16322080f, \
     -0.15420710f, 0.25431853f, -0.15418967f, 0.03078367f}
constexpr float normal_peak = 0.39894228f;  // 1 / sqrt(2 pi), the density at 0
// GELU by tanh is x sigmoid(gelu_slope (x + gelu_cubic x^3)): 2 sqrt(2 / pi), and the constant of arXiv 1606.08415.
constexpr double gelu_slope = 1.5957691216057308, gelu_cubic = 0.044715;

}  // namespace effnet
