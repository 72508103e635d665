// What the bindings see of the CUDA kernels: plain pointers, sizes and a stream. Free of PyTorch.
//
// For each operation: fill in the struct's shape and the pointers (before allocating, any non-null pointer stands for
// an optional tensor that will be there), and make one plan(). It says whether a kernel covers the problem, and how
// large what it returns has to be. Allocate, set the pointers, and hand the plan to run(). All pointers are device
// pointers, contiguous, and aligned to 16 bytes. Activations (void*) have the struct's dtype, everything else is float.
// Optional pointers may be null; outputs that are null are not wanted. run() launches on the device's stream, waits for
// nothing, and returns the first error of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../activations.h"

namespace effnet::cuda {

using effnet::Activation;
using effnet::Gate;
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// The current device, whose numbers choose tiles. max_shared_bytes: what a block may opt in to.
struct Device {
    int index, multiprocessors, major, minor, max_shared_bytes;
    cudaStream_t stream;
};

// How a problem will be launched. `why_not` is null, or the reason why no kernel covers it; then the rest is zero.
// `parts` is how many partial sums an image (depthwise forward) or the whole batch (depthwise backward) has, and
// `workspace_bytes` the size of the workspace.
struct Plan {
    const char* why_not;
    int64_t parts;
    size_t workspace_bytes;
    int64_t blocks;
    int threads, shared_bytes;
    int64_t read_bytes;  // of activations, by all blocks: halos and repeats included
    int launches;        // of one run(), clearing a counter included
    int tile[24];        // how the kernel divides the work: its own structure, see planning.h
};

// A depthwise convolution without dilation; padding below and on the right follows from the sizes.
// Activations are (batch, height, width, channels) in memory where channels_last, else (batch, channels, height,
// width).
struct DepthwiseShape {
    int64_t batch, channels, height, width, out_height, out_width;
    int kernel, stride, pad_top, pad_left;
    bool channels_last;
};

// What a forward convolution reads beside x, and what it makes. Kernels take this as it is, with their element type.
template <class Element>
struct DepthwiseForwardOperands {
    const float* weight;    // (channels, kernel * kernel)
    const float* bias;      // (channels); optional, as all below but y
    const float* norm;      // (3, channels): mean, scale, shift
    const float* gate;      // (batch, channels)
    const float* out_norm;  // (3, channels)
    const Element* grad;    // like y
    Activation activation, out_activation;
    Element* y;
    float* pool;        // (batch, parts, channels): sums of the result over the pixels of a part
    float* statistics;  // (batch * parts, 3, channels): count, mean, squares around the mean, of the stored result
};

// y = out_activation(out_norm(conv(gate * activation(norm(x))) + bias)), or, with grad, grad * out_activation'(...).
// A norm is (n - mean) * scale + shift. Padding is zero behind the prologue.
struct DepthwiseForward : DepthwiseForwardOperands<void> {
    DepthwiseShape shape;
    DType dtype;
    const void* x;
};

// What the gradients of a convolution read beside the tensors along the window, and dx. Kernels take this as it is,
// too.
template <class Element>
struct DepthwiseBackwardOperands {
    const float* weight;        // (channels, kernel * kernel)
    const float* a_norm;        // (3, channels); optional, as all below
    const float* coefficients;  // (4, channels): mean, A, B, D
    const float* gate;          // (batch, channels)
    const float* pooled;        // (batch, channels)
    const float* norm;          // (3, channels)
    const Element* residual;    // like x
    Activation a_activation, activation;
    Element* dx;  // like x
};

// Gradients of y = conv(activation(norm(x))) + bias. With a (the stored y), grad is the gradient behind normalisation,
// activation and gate, and that of y is A n + B (a - mean) + D, n = (grad * gate + pooled) * a_activation'(a_norm(a)),
// where a is centred with the mean of a_norm. dx is the gradient of norm(x), plus the residual.
struct DepthwiseBackward : DepthwiseBackwardOperands<void> {
    DepthwiseShape shape;
    DType dtype;
    const void* grad;  // like y
    const void* a;     // like y; optional, as all below
    const void* x;     // needed for dw, for activation and with norm
    float* dw;         // (channels, kernel * kernel)
    float* db;         // (channels)
    float* sums;       // (parts, 2, channels): of dx, and of dx * (x - mean)
    void* workspace;   // null where plan() says 0 bytes
};

struct SqueezeExcite {
    int64_t images, pixels, channels, reduced;
    const float* reduce_weight;  // (reduced, channels)
    const float* reduce_bias;    // (reduced); optional
    const float* expand_weight;  // (channels, reduced)
    const float* expand_bias;    // (channels); optional
    Activation activation;
    Gate gate;
};

// pooled = mean over pixels; gates = gate(expand(activation(reduce(pooled)))); y = x * gates.
// From the tensor: x is given, and is read through norm and norm_activation where norm is (then y is not wanted).
// From partials: sums is given, x and y are null.
struct SqueezeExciteForward {
    SqueezeExcite layer;
    DType dtype;
    const void* x;      // (images, pixels, channels)
    const float* norm;  // (3, channels); optional
    const float* sums;  // (images, parts, channels): sums over the pixels of a part
    int64_t parts;      // of sums
    Activation norm_activation;
    void* y;        // like x; optional, as all below
    float* pooled;  // (images, channels)
    float* gates;   // (images, channels)
    void* workspace;
};

// Gradients of the forward and of the gates' use. From the tensor: grad and x are given, dx = grad * gates +
// pooled_grad. From partials: sums (images, parts, rows, channels) are sums over pixels of z u, where u * gates is what
// was used and z its gradient; with five rows also of z s, s, z s c and s c, as kernels/pointwise.py: input_gradient
// makes them.
struct SqueezeExciteBackward {
    SqueezeExcite layer;
    DType dtype;
    const void* grad;  // (images, pixels, channels)
    const void* x;     // like grad
    const float* sums;
    int64_t parts, rows;  // of sums
    const float* pooled;  // (images, channels), as the forward made it
    void* dx;             // like x; optional, as all below
    float* reduce_weight_grad;
    float* reduce_bias_grad;
    float* expand_weight_grad;
    float* expand_bias_grad;
    float* gates;        // (images, channels)
    float* pooled_grad;  // (images, channels): gradient of the mean over pixels, divided by their number
    float* partials;     // (images, 2, channels): sums for the normalisation before the pool, where rows is 5
    void* workspace;
};

// A normalisation with constant statistics, (n - mean) / sqrt(var + eps) * gamma + beta, or without gamma the bias
// beta. All pointers are optional; mean and var go with gamma.
struct ConstantNorm {
    const float* gamma;
    const float* beta;
    const float* mean;
    const float* var;
    float eps;
};

// The weight of a 1x1 convolution, (out channels, channels), in float where wide, else in the problem's dtype.
struct ProductWeight {
    const void* data;
    bool wide;
};

// The first half of a block in inference, u2 = activation(norm2(conv(u1))), u1 = activation(norm1(expand_weight x)), of
// which u1 is in shared memory alone. `shape` is that of the convolution, channels_last. Padding is zeros of u1.
struct ExpandDepthwise {
    DepthwiseShape shape;
    int64_t in_channels;
    DType dtype;
    Activation activation;
    const void* x;  // (batch, height, width, in_channels)
    ProductWeight expand_weight;
    ConstantNorm expand_norm;
    const float* depthwise_weight;  // (channels, kernel * kernel)
    ConstantNorm depthwise_norm;
    void* y;      // (batch, out_height, out_width, channels)
    float* pool;  // (batch, parts, channels): sums of the result over the pixels of a part; optional
};

// The second half: y = norm(weight (gates * x)) * image_scale + residual.
struct GatedProject {
    int64_t images, pixels, channels, out_channels;
    DType dtype;
    const void* x;       // (images, pixels, channels)
    const float* gates;  // (images, channels); optional
    ProductWeight weight;
    ConstantNorm norm;
    const float* image_scale;  // (images); optional
    const void* residual;      // like y; optional
    void* y;                   // (images, pixels, out_channels)
};

Plan plan(const DepthwiseForward&, const Device&);
Plan plan(const DepthwiseBackward&, const Device&);
Plan plan(const SqueezeExciteForward&, const Device&);
Plan plan(const SqueezeExciteBackward&, const Device&);
Plan plan(const ExpandDepthwise&, const Device&);
Plan plan(const GatedProject&, const Device&);

// Whether contiguous activations (not channels_last) are better copied to channels_last, and results back, given their
// own plan: where only then a kernel covers them, or where the one that covers them reads more bytes, for the halos of
// strips, than copies cost.
bool wants_copies(const DepthwiseForward&, const Plan&, const Device&);
bool wants_copies(const DepthwiseBackward&, const Plan&, const Device&);

// By the problem's own plan. With an empty batch, nothing is launched and nothing but zeros for parameters' gradients
// is written.
cudaError_t run(const DepthwiseForward&, const Plan&, const Device&);
cudaError_t run(const DepthwiseBackward&, const Plan&, const Device&);
cudaError_t run(const SqueezeExciteForward&, const Plan&, const Device&);
cudaError_t run(const SqueezeExciteBackward&, const Plan&, const Device&);
cudaError_t run(const ExpandDepthwise&, const Plan&, const Device&);
cudaError_t run(const GatedProject&, const Plan&, const Device&);

}  // namespace effnet::cuda
