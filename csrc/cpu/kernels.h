// What the CPU kernels offer to the bindings: plain pointers and sizes, one table of functions per instruction set and
// dtype.
//
// Activation tensors are dense NHWC in the storage type T (f32, f64, bf16, f16). Parameters, statistics and parameter
// gradients are in the compute type A (double for f64, float otherwise). Pointers are untyped here, since T and A are
// chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activations.h"

namespace effnet {
namespace cpu {

using effnet::Activation;
using effnet::Gate;
enum class DType : int { f32, f64, bf16, f16 };

// Runs body(begin, end, context) over [0, count) on the caller's thread pool.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);
using ThreadCount = int64_t (*)();
void set_threads(ParallelFor run, ThreadCount count);
ParallelFor parallel_for();
int64_t thread_count();

// Makes the values of one process those of all processes of a group, in place, and throws where that fails. Of
// `statistics`, [count, means, squared deviations], the result is of all the values together; others are added up.
using Reduce = void (*)(const char* group, bool statistics, double* values, int64_t count);
void set_reduce(Reduce reduce);
Reduce reduce_over_processes();

// Normalisation of one convolution's output: (a - mean) * scale + shift, per channel; no normalisation where mean is
// null.
struct Norm {
    const void* mean = nullptr;
    const void* scale = nullptr;  // gamma / sqrt(var + eps)
    const void* shift = nullptr;  // beta
};

struct DepthwiseShape {
    int64_t batch, channels, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
};

// [batch][pixels][in] times [out][in] transposed.
struct PointwiseShape {
    int64_t batch, pixels, in, out;
};

// A dense convolution with at most 16 filter rows; its input is NHWC or, where not channels_last, NCHW.
struct ConvolutionShape {
    int64_t batch, in, out, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
    bool channels_last;
    bool pairs = false;  // packed weights are pairs of bf16: x is bf16 and NHWC, its channels are an even number
};

struct NormShape {
    int64_t batch, pixels, channels;
    bool channels_last;
};

struct SqueezeExciteShape {
    int64_t batch, pixels, channels, reduced;
};

struct SqueezeExciteParams {
    const void* reduce_weight = nullptr;  // [reduced][channels]
    const void* reduce_bias = nullptr;
    const void* expand_weight = nullptr;  // [channels][reduced]
    const void* expand_bias = nullptr;
    Activation activation = Activation::silu;
    Gate gate = Gate::sigmoid;
};

// A null pointer is a gradient that nobody wants.
struct SqueezeExciteGrads {
    void* reduce_weight = nullptr;
    void* reduce_bias = nullptr;
    void* expand_weight = nullptr;
    void* expand_bias = nullptr;
};

// One convolution of a block with its normalisation. gamma null: no normalisation, y = conv + beta. mean null: batch
// statistics.
struct ConvNorm {
    const void* weight = nullptr;
    const void* gamma = nullptr;
    const void* beta = nullptr;
    const void* mean = nullptr;
    const void* var = nullptr;
    double eps = 0;
};

struct ConvNormGrads {
    void* weight = nullptr;
    void* gamma = nullptr;
    void* beta = nullptr;
};

// Processes whose batches a normalisation takes as one.
struct Processes {
    const char* group;
    Reduce reduce;
};

struct BatchStatistics {
    void* mean = nullptr;
    void* var = nullptr;                   // biased
    const Processes* processes = nullptr;  // null: the statistics are those of this process
    double* count = nullptr;               // how many values of a channel all processes have
};

struct Block {
    DepthwiseShape depthwise_shape;  // its channels are the expanded ones
    int64_t in, out, reduced;        // reduced = 0: no squeeze-and-excitation
    ConvNorm expand, depthwise, project;
    SqueezeExciteParams squeeze_excite;
    bool residual;
    const void* drop_path = nullptr;  // [batch], compute type
    Activation activation;
    // Fused-MBConv: `depthwise` is a dense convolution from `in` channels, [channels][in][kh][kw], and nothing is
    // expanded before it.
    bool dense = false;
};

// What training keeps for the backward pass; all pre-normalisation values are [pixels][channels] in T.
struct BlockSaved {
    void* expanded = nullptr;  // null: recomputed in backward
    void* convolved = nullptr;
    void* projected = nullptr;
    BatchStatistics expand, depthwise, project;
    void* pooled = nullptr;  // [batch][channels]
};

struct BlockGrads {
    void* x = nullptr;
    ConvNormGrads expand, depthwise, project;
    SqueezeExciteGrads squeeze_excite;
};

// A block for inference, its normalisations folded and its products packed (see packed.h). Biases may be null. In a
// Fused-MBConv `expand` is the dense convolution, there is no other, and `project` may be null: y is the activated
// convolution then.
struct PackedBlock {
    DepthwiseShape depthwise_shape;                              // its channels are the expanded ones
    int64_t in, out, reduced;                                    // reduced = 0: no squeeze-and-excitation
    const void *expand = nullptr, *expand_bias = nullptr;        // panels, null: no expansion
    const void *depthwise = nullptr, *depthwise_bias = nullptr;  // [taps][channels], compute type
    const void *reduce = nullptr, *reduce_bias = nullptr;        // panels in the compute type
    const void *excite = nullptr, *excite_bias = nullptr;
    const void *project = nullptr, *project_bias = nullptr;  // panels
    Activation activation, squeeze_activation;
    Gate gate;
    bool residual;
    const void* drop_path = nullptr;  // [batch], compute type
    bool pairs = false;               // a dense convolution's weights are packed in pairs (ConvolutionShape)
};

// A dense convolution, its normalisation and activation, in training: y = drop_path * activation(norm(conv(x))) + x.
struct DenseLayer {
    ConvolutionShape shape;
    ConvNorm conv;  // its weight is [out][in][kh][kw]
    Activation activation;
    bool residual = false;
    const void* drop_path = nullptr;  // [batch], compute type
};

// A kernel in a sequence: call(context, x, y), whose y takes so many bytes.
struct Link {
    void (*call)(const void* context, const void* x, void* y);
    const void* context;
    int64_t bytes;
};

struct Kernels {
    // [images][rows][columns] to [images][columns][rows]: NCHW to NHWC and back.
    void (*transpose)(int64_t images, int64_t rows, int64_t columns, const void* from, void* to);
    void (*depthwise)(const DepthwiseShape&, const void* x, const void* weight, const void* bias, Activation, void* y);
    // The same on contiguous (NCHW) tensors; null for the dtypes that have no such kernel.
    void (*depthwise_contiguous)(const DepthwiseShape&, const void* x, const void* weight, const void* bias, Activation,
                                 void* y);
    void (*depthwise_backward)(const DepthwiseShape&, const void* grad, const void* x, const void* weight,
                               const void* bias, Activation, void* grad_x, void* grad_weight, void* grad_bias);
    void (*pointwise)(const PointwiseShape&, const void* x, const void* weight, const void* bias, const void* residual,
                      Activation, void* y);
    // The same with packed weights (see packed.h).
    void (*pointwise_packed)(const PointwiseShape&, const void* x, const void* weight, const void* bias,
                             const void* residual, Activation, void* y);
    void (*convolution_packed)(const ConvolutionShape&, const void* x, const void* weight, const void* bias, Activation,
                               void* y);
    // The same on contiguous (NCHW) tensors; null for the dtypes that have no such kernel.
    void (*pointwise_contiguous)(const PointwiseShape&, const void* x, const void* weight, const void* bias,
                                 const void* residual, Activation, void* y);
    // A convolution with its weights as a module has them, [out][in][kh][kw] or, where `weight_rows`,
    // [out][kh][kw][in], and its normalisation by constant statistics, if there is one.
    void (*convolution_norm)(const ConvolutionShape&, const void* x, const ConvNorm&, bool weight_rows, Activation,
                             void* y);
    void (*pointwise_norm)(const PointwiseShape&, const void* x, const ConvNorm&, Activation, void* y);
    // activation(norm(x)) with constant statistics; there is no weight.
    void (*batch_norm)(const NormShape&, const void* x, const ConvNorm&, Activation, void* y);
    void (*pointwise_backward)(const PointwiseShape&, const void* grad, const void* x, const void* weight,
                               const void* bias, Activation, void* grad_x, void* grad_weight, void* grad_bias);
    // The mean over each image's pixels: [images][channels].
    void (*average_pool)(int64_t images, int64_t pixels, int64_t channels, const void* x, void* y);
    void (*squeeze_excite)(const SqueezeExciteShape&, const void* x, const SqueezeExciteParams&, void* y, void* pooled);
    void (*squeeze_excite_backward)(const SqueezeExciteShape&, const void* grad, const void* x, const void* pooled,
                                    const SqueezeExciteParams&, void* grad_x, const SqueezeExciteGrads&);
    void (*mbconv_inference)(const Block&, const void* x, void* y);
    void (*mbconv_packed)(const PackedBlock&, const void* x, void* y);
    void (*fused_mbconv_inference)(const Block&, const void* x, void* y);
    void (*fused_mbconv_packed)(const PackedBlock&, const void* x, void* y);
    // Kernels one after the other; the tensors between them are scratch memory.
    void (*sequence)(const Link* links, int64_t count, const void* x, void* y);
    void (*mbconv_training)(const Block&, const void* x, void* y, const BlockSaved&);
    void (*mbconv_backward)(const Block&, const void* grad, const void* x, const BlockSaved&, const BlockGrads&);
    // `convolved` is what the normalisation reads, [pixels][out], null: made again in the backward pass. The statistics
    // are of the batch, or null.
    void (*conv_norm_training)(const DenseLayer&, const void* x, void* y, void* convolved, const BatchStatistics&);
    void (*conv_norm_backward)(const DenseLayer&, const void* grad, const void* x, const void* convolved,
                               const BatchStatistics&, void* grad_x, const ConvNormGrads&);
    // activation(norm(x)) in training; x is [pixels][channels], and the statistics are of the batch, or null.
    void (*norm_training)(const NormShape&, const void* x, const ConvNorm&, Activation, void* y,
                          const BatchStatistics&);
    void (*norm_backward)(const NormShape&, const void* grad, const void* x, const ConvNorm&, Activation,
                          const BatchStatistics&, void* grad_x, const ConvNormGrads&);
    // The same for a block that is dense and has a projection.
    void (*fused_mbconv_training)(const Block&, const void* x, void* y, const BlockSaved&);
    void (*fused_mbconv_backward)(const Block&, const void* grad, const void* x, const BlockSaved&, const BlockGrads&);
};

// The table of the instruction set in use: the best one that was built and that this processor has, until set_isa says
// otherwise.
const Kernels& kernels(DType dtype);

struct Isa {
    const char* name;
    bool supported;
    const Kernels* table;  // by DType
};
// The instruction sets that were built, worst first.
const Isa* isas(int* count);
const Isa& current_isa();
// False where the name is unknown or the processor lacks the instructions.
bool set_isa(const char* name);

}  // namespace cpu
}  // namespace effnet
