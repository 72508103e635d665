// Unpacks tensors for the kernels and registers them as the CPU implementations of the operators, through the LibTorch
// stable ABI alone. Shapes and dtypes were checked in Python; what is checked here keeps a direct call of
// torch.ops.effnet_ops from reading out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "stable.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace effnet {
namespace {

using cpu::Activation;
using cpu::DType;
using cpu::Gate;

DType kernel_dtype(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return DType::f32;
        case ScalarType::Double:
            return DType::f64;
        case ScalarType::BFloat16:
            return DType::bf16;
        case ScalarType::Half:
            return DType::f16;
        default:
            STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
            return DType::f32;
    }
}

ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

Activation activation_of(const std::string& name) { return activation_named<Activation>(name); }
Gate gate_of(const std::string& name) { return gate_named<Gate>(name); }

uintptr_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Memory that is touched for the first time costs more than most kernels that write it. What is free at the top of the
// heap glibc gives back to the system beyond twice the largest block that it saw freed, which a network's first outputs
// exceed at each call: let it see one of nearly 32 MiB, the largest that counts. Larger blocks always come and go, with
// pages of 2 MiB where that is asked for.
Tensor with_cheap_pages(const Tensor& t) {
#if defined(__linux__)
    constexpr uintptr_t large = uintptr_t(2) << 20, largest = uintptr_t(32) << 20;
    const uintptr_t bytes = uintptr_t(t.numel()) * element_size(t.scalar_type());
    if (bytes < large) return t;
    static const bool kept = [] {
#if defined(__GLIBC__)
        // Only a block that does not come from free memory counts.
        malloc_trim(0);
#endif
        void* volatile block = std::malloc(largest - large);
        std::free(block);
        return true;
    }();
    if (!kept || bytes < largest) return t;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t first = (begin + large - 1) / large * large, last = (begin + bytes) / large * large;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return t;
}

Tensor empty_nhwc(const Ints& size, ScalarType type) {
    return with_cheap_pages(
        torch::stable::empty(size, type, std::nullopt, std::nullopt, std::nullopt, MemoryFormat::ChannelsLast));
}

Tensor empty(const Ints& size, ScalarType type) { return with_cheap_pages(torch::stable::empty(size, type)); }

// Where a tensor's values lie: a storage that was resized to nothing leaves a tensor without memory.
const void* memory_of(const Tensor& t, const char* name) {
    const void* const data = t.const_data_ptr();
    STD_TORCH_CHECK(data != nullptr || t.numel() == 0, name, " has no memory: its storage was freed");
    return data;
}

Tensor nhwc(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "activations must be (N, C, H, W), got ", x.dim(), " axes");
    memory_of(x, "x");
    if (x.numel() == 0 || is_dense_nhwc(x)) return x;
    if (!x.is_contiguous()) return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    const Tensor to = empty_nhwc({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .transpose(x.size(0), x.size(1), x.size(2) * x.size(3), x.const_data_ptr(), to.mutable_data_ptr());
    return to;
}

// A tensor that belongs to x's output, a gradient or a residual: dense NHWC in the dtype of x.
Tensor like_output(const Tensor& t, const Tensor& x) { return nhwc(as_dtype(t, x.scalar_type())); }

Tensor nothing(const Tensor& x) { return torch::stable::empty({0}, x.scalar_type()); }

// An output in the layout of `like`, written as NHWC: `memory` is the result itself or, for a contiguous one, a tensor
// that finish() copies.
class Output {
  public:
    Output(const Tensor& like, const Ints& size) : Output(like, size, keeps_channels_last(like)) {}
    Output(const Tensor& like, const Ints& size, bool last) : size_(size), type_(like.scalar_type()) {
        const bool same_memory = size[1] == 1 || size[2] * size[3] == 1;
        direct_ = last || same_memory;
        memory_ = direct_ && !last ? empty(size, type_) : empty_nhwc(size, type_);
    }
    void* data() const { return memory_.mutable_data_ptr(); }
    Tensor finish() const {
        if (direct_ || memory_.numel() == 0) return direct_ ? memory_ : torch::stable::empty(size_, type_);
        const Tensor to = empty(size_, type_);
        cpu::kernels(kernel_dtype(type_))
            .transpose(size_[0], size_[2] * size_[3], size_[1], memory_.const_data_ptr(), to.mutable_data_ptr());
        return to;
    }

  private:
    Ints size_;
    ScalarType type_;
    Tensor memory_{nullptr};
    bool direct_;
};

// Parameters in the compute type, kept alive while the kernels read them.
class Parameters {
  public:
    explicit Parameters(const Tensor& x) : type_(compute_type(x.scalar_type())) {}

    const void* operator()(const Tensor& p, int64_t elements, const char* name) {
        STD_TORCH_CHECK(p.numel() == elements, name, " must have ", elements, " elements, got ", p.numel());
        // Asking costs less than a call through the dispatcher, of which a block would make ten.
        const void* const data = memory_of(p, name);
        if (p.scalar_type() == type_ && p.is_contiguous()) return data;
        kept_.push_back(torch::stable::contiguous(as_dtype(p, type_)));
        return kept_.back().const_data_ptr();
    }
    const void* operator()(const std::optional<Tensor>& p, int64_t elements, const char* name) {
        return p.has_value() ? (*this)(*p, elements, name) : nullptr;
    }

  private:
    ScalarType type_;
    std::vector<Tensor> kept_;
};

// Gradients of parameters: computed in the compute type, handed out in the parameter's.
class Gradients {
  public:
    explicit Gradients(const Tensor& x) : x_(x), type_(compute_type(x.scalar_type())) {}

    // Memory for the gradient of p, or null where it is not wanted; its place in the results is the order of the calls.
    void* add(const std::optional<Tensor>& p, bool needed) {
        if (!needed || !p.has_value()) {
            results_.push_back(nothing(x_));
            types_.push_back(x_.scalar_type());
            return nullptr;
        }
        const auto size = p->sizes();
        results_.push_back(torch::stable::empty(Ints(size.begin(), size.end()), type_));
        types_.push_back(p->scalar_type());
        if (x_.size(0) == 0) torch::stable::zero_(results_.back());
        return results_.back().mutable_data_ptr();
    }
    Tensor take(size_t i) const { return as_dtype(results_[i], types_[i]); }

  private:
    Tensor x_;
    ScalarType type_;
    std::vector<Tensor> results_;
    std::vector<ScalarType> types_;
};

struct Filter {
    int64_t height, width, channels;
};

cpu::DepthwiseShape depthwise_shape(const Tensor& x, const Filter& filter, const Ints& stride, const Ints& padding,
                                    const Ints& dilation) {
    STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && (padding.empty() || padding.size() == 4),
                    "stride and dilation take 2 numbers, padding 4 or none");
    STD_TORCH_CHECK(filter.height <= 64, "kernels taller than 64 are left to the reference, got ", filter.height);
    cpu::DepthwiseShape s{};
    s.batch = x.size(0), s.channels = filter.channels, s.height = x.size(2), s.width = x.size(3);
    s.kernel_h = filter.height, s.kernel_w = filter.width;
    s.stride_h = stride[0], s.stride_w = stride[1], s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    STD_TORCH_CHECK(s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0,
                    "stride and dilation must be positive");
    const auto axis = [&](int64_t size, int64_t kernel, int64_t step, int64_t gap, int first, int64_t& before) {
        const int64_t span = (kernel - 1) * gap + 1;
        int64_t total = 0;
        if (padding.empty()) {
            total = ((size + step - 1) / step - 1) * step + span - size;
            total = total > 0 ? total : 0;
            before = total / 2;
        } else {
            before = padding[first];
            total = before + padding[first + 1];
        }
        STD_TORCH_CHECK(before >= 0 && total >= before && size + total >= span,
                        "the kernel does not fit into the padded image");
        return (size + total - span) / step + 1;
    };
    s.out_height = axis(s.height, s.kernel_h, s.stride_h, s.dilation_h, 0, s.pad_top);
    s.out_width = axis(s.width, s.kernel_w, s.stride_w, s.dilation_w, 2, s.pad_left);
    // A single output has no next one; kernels may divide an image by the stride.
    if (s.out_height == 1) s.stride_h = 1;
    if (s.out_width == 1) s.stride_w = 1;
    return s;
}

cpu::DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                                    const Ints& dilation) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == 1,
                    "x must be (N, C, H, W) and weight (C, 1, kh, kw)");
    return depthwise_shape(x, Filter{weight.size(2), weight.size(3), weight.size(0)}, stride, padding, dilation);
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, const std::string& activation) {
    const cpu::DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
    STD_TORCH_CHECK(s.channels == x.size(1), "weight must have ", x.size(1), " filters, got ", s.channels);
    const cpu::Kernels& kernels = cpu::kernels(kernel_dtype(x.scalar_type()));
    const Ints size{s.batch, s.channels, s.out_height, s.out_width};
    Parameters parameter(x);
    const void *const weights = parameter(weight, weight.numel(), "weight"), *const shift =
                                                                                 parameter(bias, s.channels, "bias");
    if (s.batch != 0 && kernels.depthwise_contiguous != nullptr && x.is_contiguous()) {
        const Tensor y = empty(size, x.scalar_type());
        kernels.depthwise_contiguous(s, memory_of(x, "x"), weights, shift, activation_of(activation),
                                     y.mutable_data_ptr());
        return y;
    }
    const Output y(x, size);
    if (s.batch == 0) return y.finish();
    const Tensor input = nhwc(x);
    kernels.depthwise(s, input.const_data_ptr(), weights, shift, activation_of(activation), y.data());
    return y.finish();
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                             const std::optional<Tensor>& bias, const Ints& stride,
                                                             const Ints& padding, const Ints& dilation,
                                                             const std::string& activation, const Needs& needs) {
    const cpu::DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
    STD_TORCH_CHECK(s.channels == x.size(1), "weight must have ", x.size(1), " filters, got ", s.channels);
    STD_TORCH_CHECK(grad.numel() == s.batch * s.channels * s.out_height * s.out_width,
                    "grad does not have the output's size");
    Gradients gradients(x);
    void* const grad_weight = gradients.add(weight, needs[1]);
    void* const grad_bias = gradients.add(bias, needs[2]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.channels, s.height, s.width});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        cpu::kernels(kernel_dtype(x.scalar_type()))
            .depthwise_backward(s, above.const_data_ptr(), input.const_data_ptr(),
                                parameter(weight, weight.numel(), "weight"), parameter(bias, s.channels, "bias"),
                                activation_of(activation), grad_x ? grad_x->data() : nullptr, grad_weight, grad_bias);
    }
    return {grad_x ? grad_x->finish() : nothing(x), gradients.take(0), gradients.take(1)};
}

cpu::PointwiseShape pointwise_shape(const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.numel() == weight.size(0) * x.size(1),
                    "x must be (N, Cin, H, W) and weight (Cout, Cin, 1, 1)");
    return {x.size(0), x.size(2) * x.size(3), x.size(1), weight.size(0)};
}

// Contiguous images are multiplied as they are where their pixels fill most lanes of the last vectors.
bool multiplies_contiguous(const Tensor& x, const std::optional<Tensor>& residual, const cpu::PointwiseShape& s) {
    const int64_t filled = (s.pixels + 31) / 32 * 32;
    return s.pixels * 4 >= filled * 3 && x.is_contiguous() && (!residual.has_value() || residual->is_contiguous()) &&
           cpu::kernels(kernel_dtype(x.scalar_type())).pointwise_contiguous != nullptr;
}

Tensor pointwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const std::string& activation) {
    const cpu::PointwiseShape s = pointwise_shape(x, weight);
    const cpu::Kernels& kernels = cpu::kernels(kernel_dtype(x.scalar_type()));
    const Ints size{s.batch, s.out, x.size(2), x.size(3)};
    STD_TORCH_CHECK(!residual.has_value() || residual->numel() == s.batch * s.pixels * s.out,
                    "residual does not have the output's size");
    Parameters parameter(x);
    const void *const weights = parameter(weight, weight.numel(), "weight"), *const shift =
                                                                                 parameter(bias, s.out, "bias");
    if (s.batch != 0 && multiplies_contiguous(x, residual, s)) {
        const Tensor y = empty(size, x.scalar_type());
        const Tensor added = residual.has_value() ? as_dtype(*residual, x.scalar_type()) : nothing(x);
        kernels.pointwise_contiguous(s, memory_of(x, "x"), weights, shift,
                                     residual.has_value() ? added.const_data_ptr() : nullptr, activation_of(activation),
                                     y.mutable_data_ptr());
        return y;
    }
    const Output y(x, size);
    if (s.batch == 0) return y.finish();
    const Tensor input = nhwc(x), added = residual.has_value() ? like_output(*residual, x) : nothing(x);
    kernels.pointwise(s, input.const_data_ptr(), weights, shift,
                      residual.has_value() ? added.const_data_ptr() : nullptr, activation_of(activation), y.data());
    return y.finish();
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                             const std::optional<Tensor>& bias,
                                                             const std::string& activation, const Needs& needs) {
    const cpu::PointwiseShape s = pointwise_shape(x, weight);
    STD_TORCH_CHECK(grad.numel() == s.batch * s.pixels * s.out, "grad does not have the output's size");
    Gradients gradients(x);
    void* const grad_weight = gradients.add(weight, needs[1]);
    void* const grad_bias = gradients.add(bias, needs[2]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.in, x.size(2), x.size(3)});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        cpu::kernels(kernel_dtype(x.scalar_type()))
            .pointwise_backward(s, above.const_data_ptr(), input.const_data_ptr(),
                                parameter(weight, weight.numel(), "weight"), parameter(bias, s.out, "bias"),
                                activation_of(activation), grad_x ? grad_x->data() : nullptr, grad_weight, grad_bias);
    }
    return {grad_x ? grad_x->finish() : nothing(x), gradients.take(0), gradients.take(1)};
}

cpu::SqueezeExciteParams squeeze_excite_params(Parameters& parameter, int64_t channels, int64_t reduced,
                                               const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                                               const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
                                               const std::string& activation, const std::string& gate) {
    return {parameter(reduce_weight, channels * reduced, "reduce_weight"),
            parameter(reduce_bias, reduced, "reduce_bias"),
            parameter(expand_weight, channels * reduced, "expand_weight"),
            parameter(expand_bias, channels, "expand_bias"),
            activation_of(activation),
            gate_of(gate)};
}

std::tuple<Tensor, Tensor> squeeze_excite(const Tensor& x, const Tensor& reduce_weight,
                                          const std::optional<Tensor>& reduce_bias, const Tensor& expand_weight,
                                          const std::optional<Tensor>& expand_bias, const std::string& activation,
                                          const std::string& gate) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    const cpu::SqueezeExciteShape s{x.size(0), x.size(2) * x.size(3), x.size(1), reduce_weight.size(0)};
    const Output y(x, {s.batch, s.channels, x.size(2), x.size(3)});
    const Tensor pooled = torch::stable::empty({s.batch, s.channels}, compute_type(x.scalar_type()));
    if (s.batch == 0) return {y.finish(), pooled};
    Parameters parameter(x);
    const Tensor input = nhwc(x);
    const auto params = squeeze_excite_params(parameter, s.channels, s.reduced, reduce_weight, reduce_bias,
                                              expand_weight, expand_bias, activation, gate);
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .squeeze_excite(s, input.const_data_ptr(), params, y.data(), pooled.mutable_data_ptr());
    return {y.finish(), pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& reduce_weight,
    const std::optional<Tensor>& reduce_bias, const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
    const std::string& activation, const std::string& gate, const Needs& needs) {
    STD_TORCH_CHECK(x.dim() == 4 && grad.numel() == x.numel() && pooled.numel() == x.size(0) * x.size(1),
                    "grad must have the size of x, pooled must be (N, C)");
    const cpu::SqueezeExciteShape s{x.size(0), x.size(2) * x.size(3), x.size(1), reduce_weight.size(0)};
    Gradients gradients(x);
    cpu::SqueezeExciteGrads grads;
    grads.reduce_weight = gradients.add(reduce_weight, needs[1]);
    grads.reduce_bias = gradients.add(reduce_bias, needs[2]);
    grads.expand_weight = gradients.add(expand_weight, needs[3]);
    grads.expand_bias = gradients.add(expand_bias, needs[4]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.channels, x.size(2), x.size(3)});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        const void* mean = parameter(pooled, s.batch * s.channels, "pooled");
        const auto params = squeeze_excite_params(parameter, s.channels, s.reduced, reduce_weight, reduce_bias,
                                                  expand_weight, expand_bias, activation, gate);
        cpu::kernels(kernel_dtype(x.scalar_type()))
            .squeeze_excite_backward(s, above.const_data_ptr(), input.const_data_ptr(), mean, params,
                                     grad_x ? grad_x->data() : nullptr, grads);
    }
    return {grad_x ? grad_x->finish() : nothing(x), gradients.take(0), gradients.take(1), gradients.take(2),
            gradients.take(3)};
}

using OptionalTensor = std::optional<Tensor>;

// The arguments that every mbconv operator shares, in the order of the schema.
#define EFFNET_BLOCK_ARGUMENTS                                                                                       \
    const Tensor &x, const OptionalTensor &expand_weight, const OptionalTensor &expand_gamma,                        \
        const OptionalTensor &expand_beta, const OptionalTensor &expand_mean, const OptionalTensor &expand_var,      \
        const Tensor &depthwise_weight, const OptionalTensor &depthwise_gamma, const OptionalTensor &depthwise_beta, \
        const OptionalTensor &depthwise_mean, const OptionalTensor &depthwise_var,                                   \
        const OptionalTensor &se_reduce_weight, const OptionalTensor &se_reduce_bias,                                \
        const OptionalTensor &se_expand_weight, const OptionalTensor &se_expand_bias, const Tensor &project_weight,  \
        const OptionalTensor &project_gamma, const OptionalTensor &project_beta, const OptionalTensor &project_mean, \
        const OptionalTensor &project_var, const OptionalTensor &drop_path, const std::vector<double>&eps,           \
        const Ints &stride, const Ints &padding, bool residual, const std::string &activation,                       \
        const std::string &se_activation, const std::string &gate
#define EFFNET_BLOCK_VALUES                                                                                     \
    x, expand_weight, expand_gamma, expand_beta, expand_mean, expand_var, depthwise_weight, depthwise_gamma,    \
        depthwise_beta, depthwise_mean, depthwise_var, se_reduce_weight, se_reduce_bias, se_expand_weight,      \
        se_expand_bias, project_weight, project_gamma, project_beta, project_mean, project_var, drop_path, eps, \
        stride, padding, residual, activation, se_activation, gate

// The block as the kernels take it, and what keeps its memory alive.
struct BlockArguments {
    Parameters parameter;
    cpu::Block block{};
    Tensor input;

    explicit BlockArguments(EFFNET_BLOCK_ARGUMENTS) : parameter(x), input(nhwc(x)) {
        STD_TORCH_CHECK(eps.size() == 3, "eps takes 3 numbers, got ", eps.size());
        const cpu::DepthwiseShape s = depthwise_shape(x, depthwise_weight, stride, padding, {1, 1});
        block.depthwise_shape = s;
        block.in = x.size(1), block.out = project_weight.size(0);
        STD_TORCH_CHECK(expand_weight.has_value() || s.channels == block.in, "depthwise_weight must have ", block.in,
                        " filters, got ", s.channels);
        if (expand_weight.has_value())
            block.expand = conv(*expand_weight, s.channels * block.in, s.channels, expand_gamma, expand_beta,
                                expand_mean, expand_var, eps[0]);
        block.depthwise = conv(depthwise_weight, depthwise_weight.numel(), s.channels, depthwise_gamma, depthwise_beta,
                               depthwise_mean, depthwise_var, eps[1]);
        block.project = conv(project_weight, block.out * s.channels, block.out, project_gamma, project_beta,
                             project_mean, project_var, eps[2]);
        if (se_reduce_weight.has_value()) {
            STD_TORCH_CHECK(se_expand_weight.has_value(), "se_reduce_weight comes with se_expand_weight");
            block.reduced = se_reduce_weight->size(0);
            block.squeeze_excite =
                squeeze_excite_params(parameter, s.channels, block.reduced, *se_reduce_weight, se_reduce_bias,
                                      *se_expand_weight, se_expand_bias, se_activation, gate);
        }
        STD_TORCH_CHECK(!residual || (block.in == block.out && s.height == s.out_height && s.width == s.out_width),
                        "residual needs an output of the input's size");
        block.residual = residual;
        block.drop_path = parameter(drop_path, s.batch, "drop_path");
        block.activation = activation_of(activation);
    }

    const cpu::DepthwiseShape& shape() const { return block.depthwise_shape; }

  private:
    cpu::ConvNorm conv(const Tensor& weight, int64_t elements, int64_t channels, const OptionalTensor& gamma,
                       const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var, double eps) {
        STD_TORCH_CHECK(mean.has_value() == var.has_value(), "a normalisation has a mean and a variance, or neither");
        return {parameter(weight, elements, "weight"), parameter(gamma, channels, "gamma"),
                parameter(beta, channels, "beta"),     parameter(mean, channels, "mean"),
                parameter(var, channels, "var"),       eps};
    }
};

// Weights that effnet_ops.packing packed: (panels, terms, 16), or (panels, terms, 16, 2) for bf16.
const void* panels(const Tensor& packed, const Tensor& x, bool products_in_storage, int64_t depth, int64_t columns,
                   const char* name) {
    const bool pairs = products_in_storage && x.scalar_type() == ScalarType::BFloat16;
    const ScalarType type = pairs ? ScalarType::BFloat16 : compute_type(x.scalar_type());
    const int64_t terms = pairs ? (depth + 1) / 2 : depth, count = (columns + 15) / 16;
    STD_TORCH_CHECK(packed.scalar_type() == type && packed.is_contiguous() && packed.dim() == (pairs ? 4 : 3) &&
                        packed.size(0) == count && packed.size(1) == terms && packed.size(2) == 16 &&
                        (!pairs || packed.size(3) == 2),
                    name, " is not packed for ", depth, " by ", columns, " values and the dtype of x");
    return memory_of(packed, name);
}

// The tensors of a block with packed weights; null pointers where it has no expansion or no gate.
struct PackedTensors {
    const Tensor *expand_weight, *expand_bias, *depthwise_weight, *depthwise_bias, *reduce_weight, *reduce_bias,
        *excite_weight, *excite_bias, *project_weight, *project_bias;
};

struct PackedConfig {
    Ints stride, padding;
    bool residual;
    Activation activation, squeeze_activation;
    Gate gate;
};

Tensor run_packed(const Tensor& x, const PackedTensors& t, const PackedConfig& config) {
    STD_TORCH_CHECK(x.dim() == 4 && t.depthwise_weight->dim() == 3,
                    "x must be (N, C, H, W), depthwise_weight (kh, kw, C)");
    cpu::PackedBlock block{};
    const int64_t channels = t.depthwise_weight->size(2);
    block.depthwise_shape =
        depthwise_shape(x, Filter{t.depthwise_weight->size(0), t.depthwise_weight->size(1), channels}, config.stride,
                        config.padding, {1, 1});
    const cpu::DepthwiseShape& s = block.depthwise_shape;
    block.in = x.size(1), block.out = t.project_bias->numel();
    Parameters parameter(x);
    if (t.expand_weight != nullptr) {
        STD_TORCH_CHECK(t.expand_bias != nullptr, "expand_weight needs expand_bias");
        block.expand = panels(*t.expand_weight, x, true, block.in, channels, "expand_weight");
        block.expand_bias = parameter(*t.expand_bias, channels, "expand_bias");
    } else {
        STD_TORCH_CHECK(channels == block.in, "depthwise_weight must have ", block.in, " channels, got ", channels);
    }
    block.depthwise = parameter(*t.depthwise_weight, s.kernel_h * s.kernel_w * channels, "depthwise_weight");
    block.depthwise_bias = parameter(*t.depthwise_bias, channels, "depthwise_bias");
    if (t.reduce_weight != nullptr) {
        STD_TORCH_CHECK(t.reduce_bias != nullptr && t.excite_weight != nullptr && t.excite_bias != nullptr,
                        "squeeze-and-excitation takes two weights and two biases");
        block.reduced = t.reduce_bias->numel();
        block.reduce = panels(*t.reduce_weight, x, false, channels, block.reduced, "reduce_weight");
        block.reduce_bias = parameter(*t.reduce_bias, block.reduced, "reduce_bias");
        block.excite = panels(*t.excite_weight, x, false, block.reduced, channels, "excite_weight");
        block.excite_bias = parameter(*t.excite_bias, channels, "excite_bias");
    }
    block.project = panels(*t.project_weight, x, true, channels, block.out, "project_weight");
    block.project_bias = parameter(*t.project_bias, block.out, "project_bias");
    STD_TORCH_CHECK(!config.residual || (block.in == block.out && s.height == s.out_height && s.width == s.out_width),
                    "residual needs an output of the input's size");
    block.residual = config.residual;
    block.activation = config.activation;
    block.squeeze_activation = config.squeeze_activation;
    block.gate = config.gate;
    const Output y(x, {s.batch, block.out, s.out_height, s.out_width});
    if (s.batch == 0) return y.finish();
    const Tensor input = nhwc(x);
    cpu::kernels(kernel_dtype(x.scalar_type())).mbconv_packed(block, input.const_data_ptr(), y.data());
    return y.finish();
}

Tensor mbconv_packed(const Tensor& x, const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                     const Tensor& depthwise_weight, const Tensor& depthwise_bias, const OptionalTensor& reduce_weight,
                     const OptionalTensor& reduce_bias, const OptionalTensor& excite_weight,
                     const OptionalTensor& excite_bias, const Tensor& project_weight, const Tensor& project_bias,
                     const Ints& stride, const Ints& padding, bool residual, const std::string& activation,
                     const std::string& squeeze_activation, const std::string& gate) {
    const auto address = [](const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; };
    return run_packed(
        x,
        {address(expand_weight), address(expand_bias), &depthwise_weight, &depthwise_bias, address(reduce_weight),
         address(reduce_bias), address(excite_weight), address(excite_bias), &project_weight, &project_bias},
        {stride, padding, residual, activation_of(activation), activation_of(squeeze_activation), gate_of(gate)});
}

// Blocks one after the other. `blocks` has 13 numbers for each: whether it has an expansion and a gate, the stride,
// whether padding is given (else SAME) and its four sides, the residual, then activation, the gate's activation and the
// gate as places in their enumerations.
Tensor mbconv_sequence_packed(const Tensor& x, const std::vector<Tensor>& tensors, const Ints& blocks) {
    constexpr int64_t numbers = 13, activations = 5, gates = 2;
    STD_TORCH_CHECK(!blocks.empty() && blocks.size() % numbers == 0, "blocks takes ", numbers,
                    " numbers for each block, got ", blocks.size());
    size_t next = 0;
    const auto take = [&](bool has) -> const Tensor* {
        if (!has) return nullptr;
        STD_TORCH_CHECK(next < tensors.size(), "the blocks need more tensors than the ", tensors.size(), " given");
        return &tensors[next++];
    };
    Tensor y = x;
    for (auto b = blocks.begin(); b != blocks.end(); b += numbers) {
        const auto place = [&](int at, int64_t count) {
            STD_TORCH_CHECK(b[at] >= 0 && b[at] < count, "number ", at, " of a block is ", b[at], ", of ", count);
            return int(b[at]);
        };
        const bool expands = b[0] != 0, gated = b[1] != 0;
        // In the order of mbconv_packed: braces evaluate from left to right.
        const PackedTensors t{take(expands), take(expands), take(true),  take(true), take(gated),
                              take(gated),   take(gated),   take(gated), take(true), take(true)};
        y = run_packed(
            y, t,
            {Ints(b + 2, b + 4), b[4] != 0 ? Ints(b + 5, b + 9) : Ints{}, b[9] != 0, Activation(place(10, activations)),
             Activation(place(11, activations)), Gate(place(12, gates))});
    }
    STD_TORCH_CHECK(next == tensors.size(), "the blocks need ", next, " tensors, got ", tensors.size());
    return y;
}

Tensor average_pool(const Tensor& x, bool keepdim) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(2) * x.size(3) > 0, "x must be (N, C, H, W) with at least one pixel");
    const Ints size{x.size(0), x.size(1), 1, 1};
    const Tensor y = torch::stable::empty(Ints(size.begin(), size.end() - (keepdim ? 0 : 2)), x.scalar_type());
    const Tensor input = nhwc(x);
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .average_pool(x.size(0), x.size(2) * x.size(3), x.size(1), input.const_data_ptr(), y.mutable_data_ptr());
    return y;
}

Tensor pointwise_packed(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    const cpu::PointwiseShape s{x.size(0), x.size(2) * x.size(3), x.size(1), bias.numel()};
    const void* const weights = panels(weight, x, true, s.in, s.out, "weight");
    const Output y(x, {s.batch, s.out, x.size(2), x.size(3)});
    if (s.batch == 0) return y.finish();
    Parameters parameter(x);
    const Tensor input = nhwc(x);
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .pointwise_packed(s, input.const_data_ptr(), weights, parameter(bias, s.out, "bias"), nullptr,
                          activation_of(activation), y.data());
    return y.finish();
}

// The output is channels_last, whatever the input: what follows a network's first layer wants that.
Tensor convolution_packed(const Tensor& x, const Tensor& weight, const Tensor& bias, const Ints& kernel,
                          const Ints& stride, const Ints& padding, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4 && kernel.size() == 2, "x must be (N, C, H, W), kernel takes 2 numbers");
    STD_TORCH_CHECK(kernel[0] <= 16, "kernels taller than 16 are not packed, got ", kernel[0]);
    const cpu::DepthwiseShape d = depthwise_shape(x, Filter{kernel[0], kernel[1], x.size(1)}, stride, padding, {1, 1});
    const cpu::ConvolutionShape s{d.batch,      d.channels,  bias.numel(), d.height,          d.width,
                                  d.out_height, d.out_width, d.kernel_h,   d.kernel_w,        d.stride_h,
                                  d.stride_w,   d.pad_top,   d.pad_left,   !x.is_contiguous()};
    const void* const weights = panels(weight, x, false, s.kernel_h * s.kernel_w * s.in, s.out, "weight");
    const Tensor y = empty_nhwc({s.batch, s.out, s.out_height, s.out_width}, x.scalar_type());
    if (s.batch == 0) return y;
    Parameters parameter(x);
    const Tensor input = s.channels_last ? nhwc(x) : x;
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .convolution_packed(s, memory_of(input, "x"), weights, parameter(bias, s.out, "bias"),
                            activation_of(activation), y.mutable_data_ptr());
    return y;
}

cpu::ConvNorm norm_arguments(Parameters& parameter, int64_t channels, const OptionalTensor& gamma,
                             const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                             double eps) {
    STD_TORCH_CHECK(gamma.has_value() == mean.has_value() && gamma.has_value() == var.has_value(),
                    "a normalisation has gamma, a mean and a variance, or none of them");
    return {nullptr,
            parameter(gamma, channels, "gamma"),
            parameter(beta, channels, "beta"),
            parameter(mean, channels, "mean"),
            parameter(var, channels, "var"),
            eps};
}

Tensor batch_norm_inference(const Tensor& x, const Tensor& gamma, const OptionalTensor& beta, const Tensor& mean,
                            const Tensor& var, double eps, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    Parameters parameter(x);
    const cpu::ConvNorm norm = norm_arguments(parameter, x.size(1), gamma, beta, mean, var, eps);
    const bool last = keeps_channels_last(x);
    const Ints size{x.size(0), x.size(1), x.size(2), x.size(3)};
    const Tensor y = last ? empty_nhwc(size, x.scalar_type()) : empty(size, x.scalar_type());
    if (x.numel() == 0) return y;
    const Tensor input = last ? nhwc(x) : torch::stable::contiguous(x);
    const int64_t pixels = size[2] * size[3];
    cpu::kernels(kernel_dtype(x.scalar_type()))
        .batch_norm({size[0], pixels, size[1], last || pixels == 1}, input.const_data_ptr(), norm,
                    activation_of(activation), y.mutable_data_ptr());
    return y;
}

// A convolution is pointwise, or has few channels and filter rows. Its output is channels_last where x or the weight
// is, as PyTorch's is.
Tensor conv_norm_inference(const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
                           const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                           double eps, const Ints& stride, const Ints& padding, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1),
                    "x must be (N, Cin, H, W) and weight (Cout, Cin, kh, kw)");
    STD_TORCH_CHECK(weight.size(2) <= 16, "kernels taller than 16 are not covered, got ", weight.size(2));
    const cpu::DepthwiseShape d =
        depthwise_shape(x, Filter{weight.size(2), weight.size(3), x.size(1)}, stride, padding, {1, 1});
    const int64_t out = weight.size(0);
    const bool pointwise =
        d.kernel_h * d.kernel_w * d.stride_h * d.stride_w == 1 && d.out_height == d.height && d.out_width == d.width;
    if (pointwise && !gamma.has_value()) return pointwise_conv2d(x, weight, beta, std::nullopt, activation);
    const Output y(x, {d.batch, out, d.out_height, d.out_width},
                   keeps_channels_last(x) || (!pointwise && keeps_channels_last(weight)));
    if (d.batch == 0) return y.finish();
    Parameters parameter(x);
    cpu::ConvNorm norm = norm_arguments(parameter, out, gamma, beta, mean, var, eps);
    const bool weight_rows = weight.scalar_type() == compute_type(x.scalar_type()) && is_dense_nhwc(weight);
    norm.weight = weight_rows ? memory_of(weight, "weight") : parameter(weight, weight.numel(), "weight");
    const cpu::Kernels& kernels = cpu::kernels(kernel_dtype(x.scalar_type()));
    if (pointwise) {
        const Tensor input = nhwc(x);
        kernels.pointwise_norm({d.batch, d.height * d.width, d.channels, out}, input.const_data_ptr(), norm,
                               activation_of(activation), y.data());
        return y.finish();
    }
    const bool channels_last = !x.is_contiguous();
    const Tensor input = channels_last ? nhwc(x) : x;
    kernels.convolution_norm({d.batch, d.channels, out, d.height, d.width, d.out_height, d.out_width, d.kernel_h,
                              d.kernel_w, d.stride_h, d.stride_w, d.pad_top, d.pad_left, channels_last},
                             memory_of(input, "x"), norm, weight_rows, activation_of(activation), y.data());
    return y.finish();
}

const cpu::Kernels& kernels_for(const Tensor& x) { return cpu::kernels(kernel_dtype(x.scalar_type())); }

Tensor mbconv_inference(EFFNET_BLOCK_ARGUMENTS) {
    const BlockArguments arguments(EFFNET_BLOCK_VALUES);
    const cpu::DepthwiseShape& s = arguments.shape();
    STD_TORCH_CHECK((!expand_gamma.has_value() || expand_mean.has_value()) &&
                        (!depthwise_gamma.has_value() || depthwise_mean.has_value()) &&
                        (!project_gamma.has_value() || project_mean.has_value()),
                    "mbconv_inference needs running statistics for every normalisation");
    const Output y(x, {s.batch, arguments.block.out, s.out_height, s.out_width});
    if (s.batch != 0) kernels_for(x).mbconv_inference(arguments.block, arguments.input.const_data_ptr(), y.data());
    return y.finish();
}

// The tensors that training hands from forward to backward, in the order of the schema.
struct Stages {
    Tensor expanded, convolved, projected, expand_mean, expand_var, depthwise_mean, depthwise_var, project_mean,
        project_var, pooled;

    cpu::BlockSaved saved() const {
        const auto data = [](const Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr(); };
        cpu::BlockSaved to;
        to.expanded = data(expanded), to.convolved = data(convolved), to.projected = data(projected);
        to.expand = {data(expand_mean), data(expand_var)};
        to.depthwise = {data(depthwise_mean), data(depthwise_var)};
        to.project = {data(project_mean), data(project_var)};
        to.pooled = data(pooled);
        return to;
    }
};

using TrainingResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TrainingResult mbconv_training(EFFNET_BLOCK_ARGUMENTS, bool save_expanded) {
    const BlockArguments arguments(EFFNET_BLOCK_VALUES);
    const cpu::Block& block = arguments.block;
    const cpu::DepthwiseShape& s = arguments.shape();
    const ScalarType type = x.scalar_type();
    const auto channels_last = [&](int64_t channels, int64_t height, int64_t width) {
        return empty_nhwc({s.batch, channels, height, width}, type);
    };
    const auto vector = [&](const OptionalTensor& gamma, const OptionalTensor& mean, int64_t channels) {
        const Tensor v =
            torch::stable::empty({gamma.has_value() && !mean.has_value() ? channels : 0}, compute_type(type));
        return s.batch == 0 ? torch::stable::fill_(const_cast<Tensor&>(v), 0.0) : v;
    };
    const bool expands = expand_weight.has_value();
    const Stages stages{
        expands && save_expanded ? channels_last(s.channels, s.height, s.width) : nothing(x),
        channels_last(s.channels, s.out_height, s.out_width),
        channels_last(block.out, s.out_height, s.out_width),
        vector(expand_gamma, expand_mean, s.channels),
        vector(expand_gamma, expand_mean, s.channels),
        vector(depthwise_gamma, depthwise_mean, s.channels),
        vector(depthwise_gamma, depthwise_mean, s.channels),
        vector(project_gamma, project_mean, block.out),
        vector(project_gamma, project_mean, block.out),
        block.reduced != 0 ? torch::stable::empty({s.batch, s.channels}, compute_type(type))
                           : torch::stable::empty({0}, compute_type(type)),
    };
    const Output y(x, {s.batch, block.out, s.out_height, s.out_width});
    if (s.batch != 0) kernels_for(x).mbconv_training(block, arguments.input.const_data_ptr(), y.data(), stages.saved());
    return {y.finish(),          stages.expanded,    stages.convolved,      stages.projected,
            stages.expand_mean,  stages.expand_var,  stages.depthwise_mean, stages.depthwise_var,
            stages.project_mean, stages.project_var, stages.pooled};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor>;

BackwardResult mbconv_backward(const Tensor& grad, EFFNET_BLOCK_ARGUMENTS, const Tensor& expanded,
                               const Tensor& convolved, const Tensor& projected, const Tensor& mean1,
                               const Tensor& var1, const Tensor& mean2, const Tensor& var2, const Tensor& mean3,
                               const Tensor& var3, const Tensor& pooled, const Needs& needs) {
    const BlockArguments arguments(EFFNET_BLOCK_VALUES);
    const cpu::Block& block = arguments.block;
    const cpu::DepthwiseShape& s = arguments.shape();
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    STD_TORCH_CHECK(needs.size() == 14, "needs takes 14 flags, got ", needs.size());
    STD_TORCH_CHECK(grad.numel() == pixels * block.out && convolved.numel() == pixels * s.channels &&
                        projected.numel() == pixels * block.out,
                    "grad, convolved and projected must have the sizes that mbconv_training gave them");
    const OptionalTensor parameters[] = {expand_weight,    expand_gamma,   expand_beta,      depthwise_weight,
                                         depthwise_gamma,  depthwise_beta, se_reduce_weight, se_reduce_bias,
                                         se_expand_weight, se_expand_bias, project_weight,   project_gamma,
                                         project_beta};
    Gradients gradients(x);
    void* to[13];
    for (int i = 0; i < 13; ++i) to[i] = gradients.add(parameters[i], needs[i + 1]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, block.in, s.height, s.width});
    if (s.batch != 0) {
        const Tensor above = like_output(grad, x);
        const Stages stages{expanded.numel() == 0 ? expanded : nhwc(expanded),
                            nhwc(convolved),
                            nhwc(projected),
                            mean1,
                            var1,
                            mean2,
                            var2,
                            mean3,
                            var3,
                            pooled};
        cpu::BlockGrads grads;
        grads.x = grad_x ? grad_x->data() : nullptr;
        grads.expand = {to[0], to[1], to[2]};
        grads.depthwise = {to[3], to[4], to[5]};
        grads.squeeze_excite = {to[6], to[7], to[8], to[9]};
        grads.project = {to[10], to[11], to[12]};
        kernels_for(x).mbconv_backward(block, above.const_data_ptr(), arguments.input.const_data_ptr(), stages.saved(),
                                       grads);
    }
    const auto take = [&](size_t i) { return gradients.take(i); };
    return {grad_x ? grad_x->finish() : nothing(x),
            take(0),
            take(1),
            take(2),
            take(3),
            take(4),
            take(5),
            take(6),
            take(7),
            take(8),
            take(9),
            take(10),
            take(11),
            take(12)};
}

const bool threads_are_torch_threads = [] {
    cpu::set_threads([](int64_t count, void (*body)(int64_t, int64_t, void*),
                        void* context) { TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context)); },
                     [] { return int64_t(torch::stable::get_num_threads()); });
    return true;
}();

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(effnet_ops, CPU, m) {
    m.impl("depthwise_conv2d", TORCH_BOX(&effnet::depthwise_conv2d));
    m.impl("depthwise_conv2d_backward", TORCH_BOX(&effnet::depthwise_conv2d_backward));
    m.impl("pointwise_conv2d", TORCH_BOX(&effnet::pointwise_conv2d));
    m.impl("pointwise_conv2d_backward", TORCH_BOX(&effnet::pointwise_conv2d_backward));
    m.impl("squeeze_excite", TORCH_BOX(&effnet::squeeze_excite));
    m.impl("squeeze_excite_backward", TORCH_BOX(&effnet::squeeze_excite_backward));
    m.impl("mbconv_inference", TORCH_BOX(&effnet::mbconv_inference));
    m.impl("mbconv_packed", TORCH_BOX(&effnet::mbconv_packed));
    m.impl("mbconv_sequence_packed", TORCH_BOX(&effnet::mbconv_sequence_packed));
    m.impl("average_pool", TORCH_BOX(&effnet::average_pool));
    m.impl("pointwise_packed", TORCH_BOX(&effnet::pointwise_packed));
    m.impl("convolution_packed", TORCH_BOX(&effnet::convolution_packed));
    m.impl("batch_norm_inference", TORCH_BOX(&effnet::batch_norm_inference));
    m.impl("conv_norm_inference", TORCH_BOX(&effnet::conv_norm_inference));
    m.impl("mbconv_training", TORCH_BOX(&effnet::mbconv_training));
    m.impl("mbconv_backward", TORCH_BOX(&effnet::mbconv_backward));
}
