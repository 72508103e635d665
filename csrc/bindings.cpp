// Unpacks tensors for the kernels and registers them as the CPU implementations of the operators, through the LibTorch
// stable ABI alone. Shapes and dtypes were checked in Python; what is checked here keeps a direct call of
// torch.ops.effnet_ops from reading out of bounds. Each function takes its operator's arguments from a Reader, in the
// order of the schema; the structures named ...Call are those of effnet_ops/ops/calls.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "reader.h"
#include "recording.h"
#include "stable.h"

namespace effnet {
namespace {

using Results = std::vector<Tensor>;
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

size_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

const cpu::Kernels& kernels_for(const Tensor& x) { return cpu::kernels(kernel_dtype(x.scalar_type())); }

size_t bytes_of(const Tensor& t) { return size_t(t.numel()) * element_size(t.scalar_type()); }

Tensor with_cheap_pages(const Tensor& t) {
    cheapen_pages(t.const_data_ptr(), bytes_of(t));
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
    const Tensor& memory() const { return memory_; }
    bool direct() const { return direct_; }
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
        const void* const data = read(p, name);
        if (p.scalar_type() == type_ && p.is_contiguous()) return data;
        kept_.push_back(torch::stable::contiguous(as_dtype(p, type_)));
        return kept_.back().const_data_ptr();
    }
    const void* operator()(const std::optional<Tensor>& p, int64_t elements, const char* name) {
        return p.has_value() ? (*this)(*p, elements, name) : nullptr;
    }

    // Where a tensor's values lie, for a kernel that takes them as they are.
    const void* read(const Tensor& p, const char* name) {
        const Recording* const recording = Recording::current();
        if (recording != nullptr && recording->keeps()) read_.push_back(p);
        return memory_of(p, name);
    }
    // Whether some value is a copy, which lives as long as this.
    bool copied() const { return !kept_.empty(); }
    // What was read while somebody records: who runs the kernel again needs its memory.
    const std::vector<Tensor>& all_read() const { return read_; }

  private:
    ScalarType type_;
    std::vector<Tensor> kept_, read_;
};

// Runs a kernel from `input`, which is x or a copy of it, to `y`, and leaves it to who records this thread's calls.
template <class Kernel>
void run(const Tensor& x, const Tensor& input, const Parameters& parameters, const Tensor& y, bool direct,
         Kernel kernel) {
    kernel(kernels_for(x), input.const_data_ptr(), y.mutable_data_ptr());
    Recording* const recording = Recording::current();
    if (recording == nullptr) return;
    if (parameters.copied() || !direct) return recording->spoil();
    recording->add({kernel_dtype(x.scalar_type()), std::move(kernel), bytes_of(y),
                    std::make_shared<std::vector<Tensor>>(parameters.all_read())},
                   input.const_data_ptr(), y.const_data_ptr(), std::make_shared<Tensor>(y));
}

// The same for an output in the layout of x.
template <class Kernel>
Results run(const Tensor& x, const Tensor& input, const Parameters& parameters, const Output& y, Kernel kernel) {
    run(x, input, parameters, y.memory(), y.direct(), std::move(kernel));
    return {y.finish()};
}

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
    // Behind the gradient of x, which is empty where nobody wants it.
    Results take(const std::optional<Output>& grad_x) const {
        Results all{grad_x ? grad_x->finish() : nothing(x_)};
        for (size_t i = 0; i < results_.size(); ++i) all.push_back(as_dtype(results_[i], types_[i]));
        return all;
    }

  private:
    Tensor x_;
    ScalarType type_;
    std::vector<Tensor> results_;
    std::vector<ScalarType> types_;
};

struct Filter {
    int64_t height, width, channels;
};

// How a window moves: padding is (top, bottom, left, right), or nothing for SAME.
struct Window {
    Ints stride, padding, dilation{1, 1};

    static Window undilated(Reader& in) {
        Window window;
        window.stride = in.numbers(), window.padding = in.numbers();
        return window;
    }
    static Window dilated(Reader& in) {
        Window window = undilated(in);
        window.dilation = in.numbers();
        return window;
    }
};

cpu::DepthwiseShape depthwise_shape(const Tensor& x, const Filter& filter, const Window& window) {
    const Ints &stride = window.stride, &padding = window.padding, &dilation = window.dilation;
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

cpu::ConvolutionShape convolution_shape(const cpu::DepthwiseShape& d, int64_t out, bool channels_last) {
    return {d.batch,    d.channels, out,        d.height,   d.width,   d.out_height, d.out_width,
            d.kernel_h, d.kernel_w, d.stride_h, d.stride_w, d.pad_top, d.pad_left,   channels_last};
}

struct DepthwiseCall {
    Tensor x, weight;
    OptionalTensor bias;
    Window window;
    Activation activation;

    explicit DepthwiseCall(Reader& in)
        : x(in.tensor()),
          weight(in.tensor()),
          bias(in.optional()),
          window(Window::dilated(in)),
          activation(activation_of(in.name())) {}

    cpu::DepthwiseShape shape() const {
        STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == 1,
                        "x must be (N, C, H, W) and weight (C, 1, kh, kw)");
        STD_TORCH_CHECK(weight.size(0) == x.size(1), "weight must have ", x.size(1), " filters, got ", weight.size(0));
        return depthwise_shape(x, Filter{weight.size(2), weight.size(3), weight.size(0)}, window);
    }
};

Results depthwise_conv2d(Reader& in) {
    const DepthwiseCall call(in);
    const Tensor& x = call.x;
    const cpu::DepthwiseShape s = call.shape();
    const cpu::Kernels& kernels = kernels_for(x);
    const Ints size{s.batch, s.channels, s.out_height, s.out_width};
    Parameters parameter(x);
    const void* const weight = parameter(call.weight, call.weight.numel(), "weight");
    const void* const bias = parameter(call.bias, s.channels, "bias");
    const Activation activation = call.activation;
    if (s.batch != 0 && kernels.depthwise_contiguous != nullptr && x.is_contiguous()) {
        const Tensor y = empty(size, x.scalar_type());
        memory_of(x, "x");
        run(x, x, parameter, y, true, [=](const cpu::Kernels& table, const void* from, void* to) {
            table.depthwise_contiguous(s, from, weight, bias, activation, to);
        });
        return {y};
    }
    const Output y(x, size);
    if (s.batch == 0) return {y.finish()};
    return run(x, nhwc(x), parameter, y, [=](const cpu::Kernels& table, const void* from, void* to) {
        table.depthwise(s, from, weight, bias, activation, to);
    });
}

Results depthwise_conv2d_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const DepthwiseCall call(in);
    const Needs needs = in.flags();
    const Tensor& x = call.x;
    const cpu::DepthwiseShape s = call.shape();
    STD_TORCH_CHECK(grad.numel() == s.batch * s.channels * s.out_height * s.out_width,
                    "grad does not have the output's size");
    STD_TORCH_CHECK(needs.size() == 3, "needs takes 3 flags, got ", needs.size());
    Gradients gradients(x);
    void* const grad_weight = gradients.add(call.weight, needs[1]);
    void* const grad_bias = gradients.add(call.bias, needs[2]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.channels, s.height, s.width});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        kernels_for(x).depthwise_backward(s, above.const_data_ptr(), input.const_data_ptr(),
                                          parameter(call.weight, call.weight.numel(), "weight"),
                                          parameter(call.bias, s.channels, "bias"), call.activation,
                                          grad_x ? grad_x->data() : nullptr, grad_weight, grad_bias);
    }
    return gradients.take(grad_x);
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

Tensor multiply(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                Activation activation) {
    const cpu::PointwiseShape s = pointwise_shape(x, weight);
    const Ints size{s.batch, s.out, x.size(2), x.size(3)};
    STD_TORCH_CHECK(!residual.has_value() || residual->numel() == s.batch * s.pixels * s.out,
                    "residual does not have the output's size");
    Parameters parameter(x);
    const void* const weights = parameter(weight, weight.numel(), "weight");
    const void* const shift = parameter(bias, s.out, "bias");
    if (Recording::current() != nullptr && residual.has_value()) Recording::current()->spoil();
    if (s.batch != 0 && multiplies_contiguous(x, residual, s)) {
        const Tensor y = empty(size, x.scalar_type());
        const Tensor added = residual.has_value() ? as_dtype(*residual, x.scalar_type()) : nothing(x);
        const void* const plus = residual.has_value() ? added.const_data_ptr() : nullptr;
        memory_of(x, "x");
        run(x, x, parameter, y, true, [=](const cpu::Kernels& table, const void* from, void* to) {
            table.pointwise_contiguous(s, from, weights, shift, plus, activation, to);
        });
        return y;
    }
    const Output y(x, size);
    if (s.batch == 0) return y.finish();
    const Tensor added = residual.has_value() ? like_output(*residual, x) : nothing(x);
    const void* const plus = residual.has_value() ? added.const_data_ptr() : nullptr;
    run(x, nhwc(x), parameter, y, [=](const cpu::Kernels& table, const void* from, void* to) {
        table.pointwise(s, from, weights, shift, plus, activation, to);
    });
    return y.finish();
}

Results pointwise_conv2d(Reader& in) {
    const Tensor x = in.tensor(), weight = in.tensor();
    const OptionalTensor bias = in.optional(), residual = in.optional();
    return {multiply(x, weight, bias, residual, activation_of(in.name()))};
}

Results pointwise_conv2d_backward(Reader& in) {
    const Tensor grad = in.tensor(), x = in.tensor(), weight = in.tensor();
    const OptionalTensor bias = in.optional();
    in.optional();  // a residual, which has no part in these gradients
    const std::string activation = in.name();
    const Needs needs = in.flags();
    const cpu::PointwiseShape s = pointwise_shape(x, weight);
    STD_TORCH_CHECK(grad.numel() == s.batch * s.pixels * s.out, "grad does not have the output's size");
    STD_TORCH_CHECK(needs.size() == 3, "needs takes 3 flags, got ", needs.size());
    Gradients gradients(x);
    void* const grad_weight = gradients.add(weight, needs[1]);
    void* const grad_bias = gradients.add(bias, needs[2]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.in, x.size(2), x.size(3)});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        kernels_for(x).pointwise_backward(s, above.const_data_ptr(), input.const_data_ptr(),
                                          parameter(weight, weight.numel(), "weight"), parameter(bias, s.out, "bias"),
                                          activation_of(activation), grad_x ? grad_x->data() : nullptr, grad_weight,
                                          grad_bias);
    }
    return gradients.take(grad_x);
}

// Tensors that are all there, or none.
struct SqueezeExciteCall {
    OptionalTensor reduce_weight, reduce_bias, expand_weight, expand_bias;
    Activation activation;
    Gate gate;

    static SqueezeExciteCall required(Reader& in) {
        SqueezeExciteCall call;
        call.reduce_weight = in.tensor(), call.reduce_bias = in.optional();
        call.expand_weight = in.tensor(), call.expand_bias = in.optional();
        call.read_names(in);
        return call;
    }
    static SqueezeExciteCall optional(Reader& in) {
        SqueezeExciteCall call;
        call.reduce_weight = in.optional(), call.reduce_bias = in.optional();
        call.expand_weight = in.optional(), call.expand_bias = in.optional();
        call.read_names(in);
        return call;
    }
    int64_t reduced() const { return reduce_weight.has_value() ? reduce_weight->size(0) : 0; }
    cpu::SqueezeExciteParams params(Parameters& parameter, int64_t channels) const {
        STD_TORCH_CHECK(expand_weight.has_value(), "reduce_weight comes with expand_weight");
        return {parameter(reduce_weight, channels * reduced(), "reduce_weight"),
                parameter(reduce_bias, reduced(), "reduce_bias"),
                parameter(expand_weight, channels * reduced(), "expand_weight"),
                parameter(expand_bias, channels, "expand_bias"),
                activation,
                gate};
    }

  private:
    void read_names(Reader& in) {
        const std::string first = in.name(), second = in.name();
        activation = activation_of(first), gate = gate_of(second);
    }
};

Results squeeze_excite(Reader& in) {
    const Tensor x = in.tensor();
    const auto call = SqueezeExciteCall::required(in);
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    const cpu::SqueezeExciteShape s{x.size(0), x.size(2) * x.size(3), x.size(1), call.reduced()};
    const Output y(x, {s.batch, s.channels, x.size(2), x.size(3)});
    const Tensor pooled = torch::stable::empty({s.batch, s.channels}, compute_type(x.scalar_type()));
    if (s.batch == 0) return {y.finish(), pooled};
    Parameters parameter(x);
    const Tensor input = nhwc(x);
    kernels_for(x).squeeze_excite(s, input.const_data_ptr(), call.params(parameter, s.channels), y.data(),
                                  pooled.mutable_data_ptr());
    return {y.finish(), pooled};
}

Results squeeze_excite_backward(Reader& in) {
    const Tensor grad = in.tensor(), x = in.tensor();
    const auto call = SqueezeExciteCall::required(in);
    const Tensor pooled = in.tensor();
    const Needs needs = in.flags();
    STD_TORCH_CHECK(x.dim() == 4 && grad.numel() == x.numel() && pooled.numel() == x.size(0) * x.size(1),
                    "grad must have the size of x, pooled must be (N, C)");
    STD_TORCH_CHECK(needs.size() == 5, "needs takes 5 flags, got ", needs.size());
    const cpu::SqueezeExciteShape s{x.size(0), x.size(2) * x.size(3), x.size(1), call.reduced()};
    Gradients gradients(x);
    cpu::SqueezeExciteGrads grads;
    grads.reduce_weight = gradients.add(call.reduce_weight, needs[1]);
    grads.reduce_bias = gradients.add(call.reduce_bias, needs[2]);
    grads.expand_weight = gradients.add(call.expand_weight, needs[3]);
    grads.expand_bias = gradients.add(call.expand_bias, needs[4]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, Ints{s.batch, s.channels, x.size(2), x.size(3)});
    if (s.batch != 0) {
        Parameters parameter(x);
        const Tensor input = nhwc(x), above = like_output(grad, x);
        const void* mean = parameter(pooled, s.batch * s.channels, "pooled");
        kernels_for(x).squeeze_excite_backward(s, above.const_data_ptr(), input.const_data_ptr(), mean,
                                               call.params(parameter, s.channels), grad_x ? grad_x->data() : nullptr,
                                               grads);
    }
    return gradients.take(grad_x);
}

// A convolution and the normalisation behind it: without gamma there is none, and beta is the convolution's bias.
struct ConvNormCall {
    OptionalTensor weight, gamma, beta, mean, var;
    double eps;

    static ConvNormCall required(Reader& in) { return ConvNormCall(in.tensor(), in); }
    static ConvNormCall optional(Reader& in) { return ConvNormCall(in.optional(), in); }

    bool uses_batch() const { return gamma.has_value() && !mean.has_value(); }
    cpu::ConvNorm params(Parameters& parameter, int64_t elements, int64_t channels) const {
        STD_TORCH_CHECK(mean.has_value() == var.has_value(), "a normalisation has a mean and a variance, or neither");
        return {parameter(weight, elements, "weight"), parameter(gamma, channels, "gamma"),
                parameter(beta, channels, "beta"),     parameter(mean, channels, "mean"),
                parameter(var, channels, "var"),       eps};
    }

  private:
    ConvNormCall(OptionalTensor first, Reader& in)
        : weight(std::move(first)),
          gamma(in.optional()),
          beta(in.optional()),
          mean(in.optional()),
          var(in.optional()),
          eps(in.real()) {}
};

struct MBConvCall {
    Tensor x;
    ConvNormCall expand, depthwise;
    SqueezeExciteCall squeeze_excite;
    ConvNormCall project;
    OptionalTensor drop_path;
    Window window;
    bool residual;
    Activation activation;

    explicit MBConvCall(Reader& in)
        : x(in.tensor()),
          expand(ConvNormCall::optional(in)),
          depthwise(ConvNormCall::required(in)),
          squeeze_excite(SqueezeExciteCall::optional(in)),
          project(ConvNormCall::required(in)),
          drop_path(in.optional()),
          window(Window::dilated(in)),
          residual(in.flag()),
          activation(activation_of(in.name())) {}
};

void check_residual(bool residual, const cpu::DepthwiseShape& s, int64_t in, int64_t out) {
    STD_TORCH_CHECK(!residual || (in == out && s.height == s.out_height && s.width == s.out_width),
                    "residual needs an output of the input's size");
}

void check_dense(const Tensor& x, const Ints& kernel) {
    STD_TORCH_CHECK(x.dim() == 4 && kernel.size() == 2, "x must be (N, C, H, W), kernel takes 2 numbers");
    STD_TORCH_CHECK(kernel[0] <= 16, "dense kernels taller than 16 are left to the reference, got ", kernel[0]);
}

// The block as the kernels take it, and what keeps its memory alive.
struct UnpackedBlock {
    Parameters parameter;
    cpu::Block block{};
    Tensor input;

    explicit UnpackedBlock(const MBConvCall& call) : parameter(call.x), input(nhwc(call.x)) {
        const Tensor &x = call.x, &depthwise = *call.depthwise.weight, &project = *call.project.weight;
        STD_TORCH_CHECK(depthwise.dim() == 4 && depthwise.size(1) == 1, "depthwise_weight must be (C, 1, kh, kw)");
        const cpu::DepthwiseShape s =
            depthwise_shape(x, Filter{depthwise.size(2), depthwise.size(3), depthwise.size(0)}, call.window);
        block.depthwise_shape = s;
        block.in = x.size(1), block.out = project.size(0);
        STD_TORCH_CHECK(call.expand.weight.has_value() || s.channels == block.in, "depthwise_weight must have ",
                        block.in, " filters, got ", s.channels);
        if (call.expand.weight.has_value())
            block.expand = call.expand.params(parameter, s.channels * block.in, s.channels);
        block.depthwise = call.depthwise.params(parameter, depthwise.numel(), s.channels);
        block.project = call.project.params(parameter, block.out * s.channels, block.out);
        block.reduced = call.squeeze_excite.reduced();
        if (block.reduced != 0) block.squeeze_excite = call.squeeze_excite.params(parameter, s.channels);
        check_residual(call.residual, s, block.in, block.out);
        block.residual = call.residual;
        block.drop_path = parameter(call.drop_path, s.batch, "drop_path");
        block.activation = call.activation;
    }

    const cpu::DepthwiseShape& shape() const { return block.depthwise_shape; }
    Ints output_size() const { return {shape().batch, block.out, shape().out_height, shape().out_width}; }
};

// Weights that effnet_ops.packing packed: (panels, terms, 16), or (panels, terms, 16, 2) for bf16.
const void* panels(Parameters& parameter, const Tensor& packed, const Tensor& x, bool products_in_storage,
                   int64_t depth, int64_t columns, const char* name) {
    const bool pairs = products_in_storage && x.scalar_type() == ScalarType::BFloat16;
    const ScalarType type = pairs ? ScalarType::BFloat16 : compute_type(x.scalar_type());
    const int64_t terms = pairs ? (depth + 1) / 2 : depth, count = (columns + 15) / 16;
    STD_TORCH_CHECK(packed.scalar_type() == type && packed.is_contiguous() && packed.dim() == (pairs ? 4 : 3) &&
                        packed.size(0) == count && packed.size(1) == terms && packed.size(2) == 16 &&
                        (!pairs || packed.size(3) == 2),
                    name, " is not packed for ", depth, " by ", columns, " values and the dtype of x");
    return parameter.read(packed, name);
}

// Whether a dense convolution's weights are packed in pairs, which are of neighbouring channels then.
bool in_pairs(const Tensor& packed, const Tensor& x) {
    const bool pairs = packed.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(!pairs || x.size(1) % 2 == 0, "pairs of bfloat16 need an even number of channels, got ", x.size(1));
    return pairs;
}

// A convolution with its normalisation folded in; the weight is packed.
struct PackedConv {
    OptionalTensor weight, bias;

    static PackedConv required(Reader& in) { return {in.tensor(), in.tensor()}; }
    static PackedConv optional(Reader& in) { return {in.optional(), in.optional()}; }
};

void unpack_gate(const PackedConv& reduce, const PackedConv& excite, const Tensor& x, int64_t channels,
                 Parameters& parameter, cpu::PackedBlock& block) {
    if (reduce.weight.has_value()) {
        STD_TORCH_CHECK(reduce.bias.has_value() && excite.weight.has_value() && excite.bias.has_value(),
                        "squeeze-and-excitation takes two weights and two biases");
        block.reduced = reduce.bias->numel();
        block.reduce = panels(parameter, *reduce.weight, x, false, channels, block.reduced, "reduce_weight");
        block.reduce_bias = parameter(*reduce.bias, block.reduced, "reduce_bias");
        block.excite = panels(parameter, *excite.weight, x, false, block.reduced, channels, "excite_weight");
        block.excite_bias = parameter(*excite.bias, channels, "excite_bias");
    }
}

struct PackedBlockCall {
    Tensor x;
    PackedConv expand, depthwise, reduce, excite, project;
    Window window;
    bool residual;
    Activation activation, squeeze_activation;
    Gate gate;

    explicit PackedBlockCall(Reader& in)
        : x(in.tensor()),
          expand(PackedConv::optional(in)),
          depthwise(PackedConv::required(in)),
          reduce(PackedConv::optional(in)),
          excite(PackedConv::optional(in)),
          project(PackedConv::required(in)),
          window(Window::dilated(in)),
          residual(in.flag()) {
        const std::string first = in.name(), second = in.name(), third = in.name();
        activation = activation_of(first), squeeze_activation = activation_of(second), gate = gate_of(third);
    }
};

// The block as the kernels take it.
cpu::PackedBlock unpack(const PackedBlockCall& call, Parameters& parameter) {
    const Tensor &x = call.x, &depthwise = *call.depthwise.weight;
    STD_TORCH_CHECK(x.dim() == 4 && depthwise.dim() == 3, "x must be (N, C, H, W), depthwise_weight (kh, kw, C)");
    cpu::PackedBlock block{};
    const int64_t channels = depthwise.size(2);
    block.depthwise_shape = depthwise_shape(x, Filter{depthwise.size(0), depthwise.size(1), channels}, call.window);
    const cpu::DepthwiseShape& s = block.depthwise_shape;
    block.in = x.size(1), block.out = call.project.bias->numel();
    if (call.expand.weight.has_value()) {
        STD_TORCH_CHECK(call.expand.bias.has_value(), "expand_weight needs expand_bias");
        block.expand = panels(parameter, *call.expand.weight, x, true, block.in, channels, "expand_weight");
        block.expand_bias = parameter(*call.expand.bias, channels, "expand_bias");
    } else {
        STD_TORCH_CHECK(channels == block.in, "depthwise_weight must have ", block.in, " channels, got ", channels);
    }
    block.depthwise = parameter(depthwise, s.kernel_h * s.kernel_w * channels, "depthwise_weight");
    block.depthwise_bias = parameter(*call.depthwise.bias, channels, "depthwise_bias");
    unpack_gate(call.reduce, call.excite, x, channels, parameter, block);
    block.project = panels(parameter, *call.project.weight, x, true, channels, block.out, "project_weight");
    block.project_bias = parameter(*call.project.bias, block.out, "project_bias");
    check_residual(call.residual, s, block.in, block.out);
    block.residual = call.residual;
    block.activation = call.activation;
    block.squeeze_activation = call.squeeze_activation;
    block.gate = call.gate;
    return block;
}

Results mbconv_packed(Reader& in) {
    const PackedBlockCall call(in);
    const Tensor& x = call.x;
    Parameters parameter(x);
    const cpu::PackedBlock block = unpack(call, parameter);
    const cpu::DepthwiseShape& s = block.depthwise_shape;
    const Output y(x, {s.batch, block.out, s.out_height, s.out_width});
    if (s.batch == 0) return {y.finish()};
    return run(x, nhwc(x), parameter, y, [block](const cpu::Kernels& table, const void* from, void* to) {
        table.mbconv_packed(block, from, to);
    });
}

struct FusedPackedCall {
    Tensor x;
    PackedConv expand, reduce, excite, project;
    Ints kernel;
    Window window;
    bool residual;
    Activation activation, squeeze_activation;
    Gate gate;

    explicit FusedPackedCall(Reader& in)
        : x(in.tensor()),
          expand(PackedConv::required(in)),
          reduce(PackedConv::optional(in)),
          excite(PackedConv::optional(in)),
          project(PackedConv::optional(in)),
          kernel(in.numbers()),
          window(Window::undilated(in)),
          residual(in.flag()) {
        const std::string first = in.name(), second = in.name(), third = in.name();
        activation = activation_of(first), squeeze_activation = activation_of(second), gate = gate_of(third);
    }
};

cpu::PackedBlock unpack(const FusedPackedCall& call, Parameters& parameter) {
    const Tensor& x = call.x;
    check_dense(x, call.kernel);
    cpu::PackedBlock block{};
    const int64_t channels = call.expand.bias->numel();
    block.depthwise_shape = depthwise_shape(x, Filter{call.kernel[0], call.kernel[1], channels}, call.window);
    const cpu::DepthwiseShape& s = block.depthwise_shape;
    block.in = x.size(1);
    block.pairs = in_pairs(*call.expand.weight, x);
    block.expand = panels(parameter, *call.expand.weight, x, block.pairs, s.kernel_h * s.kernel_w * block.in, channels,
                          "expand_weight");
    block.expand_bias = parameter(*call.expand.bias, channels, "expand_bias");
    unpack_gate(call.reduce, call.excite, x, channels, parameter, block);
    STD_TORCH_CHECK(block.reduced == 0 || call.project.weight.has_value(),
                    "squeeze-and-excitation without a projection is left to the reference");
    block.out = channels;
    if (call.project.weight.has_value()) {
        STD_TORCH_CHECK(call.project.bias.has_value(), "project_weight needs project_bias");
        block.out = call.project.bias->numel();
        block.project = panels(parameter, *call.project.weight, x, true, channels, block.out, "project_weight");
        block.project_bias = parameter(*call.project.bias, block.out, "project_bias");
    }
    check_residual(call.residual, s, block.in, block.out);
    block.residual = call.residual;
    block.activation = call.activation;
    block.squeeze_activation = call.squeeze_activation;
    block.gate = call.gate;
    return block;
}

Results fused_mbconv_packed(Reader& in) {
    const FusedPackedCall call(in);
    const Tensor& x = call.x;
    Parameters parameter(x);
    const cpu::PackedBlock block = unpack(call, parameter);
    const cpu::DepthwiseShape& s = block.depthwise_shape;
    const Output y(x, {s.batch, block.out, s.out_height, s.out_width});
    if (s.batch == 0) return {y.finish()};
    return run(x, nhwc(x), parameter, y, [block](const cpu::Kernels& table, const void* from, void* to) {
        table.fused_mbconv_packed(block, from, to);
    });
}

Results average_pool(Reader& in) {
    const Tensor x = in.tensor();
    const bool keepdim = in.flag();
    STD_TORCH_CHECK(x.dim() == 4 && x.size(2) * x.size(3) > 0, "x must be (N, C, H, W) with at least one pixel");
    const int64_t images = x.size(0), pixels = x.size(2) * x.size(3), channels = x.size(1);
    const Tensor y =
        torch::stable::empty(keepdim ? Ints{images, channels, 1, 1} : Ints{images, channels}, x.scalar_type());
    run(x, nhwc(x), Parameters(x), y, true, [=](const cpu::Kernels& table, const void* from, void* to) {
        table.average_pool(images, pixels, channels, from, to);
    });
    return {y};
}

Results pointwise_packed(Reader& in) {
    const Tensor x = in.tensor(), weight = in.tensor(), bias = in.tensor();
    const Activation activation = activation_of(in.name());
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    const cpu::PointwiseShape s{x.size(0), x.size(2) * x.size(3), x.size(1), bias.numel()};
    Parameters parameter(x);
    const void* const weights = panels(parameter, weight, x, true, s.in, s.out, "weight");
    const Output y(x, {s.batch, s.out, x.size(2), x.size(3)});
    if (s.batch == 0) return {y.finish()};
    const void* const shift = parameter(bias, s.out, "bias");
    return run(x, nhwc(x), parameter, y, [=](const cpu::Kernels& table, const void* from, void* to) {
        table.pointwise_packed(s, from, weights, shift, nullptr, activation, to);
    });
}

// The output is channels_last, whatever the input: what follows a network's first layer wants that.
Results convolution_packed(Reader& in) {
    const Tensor x = in.tensor(), weight = in.tensor(), bias = in.tensor();
    const Ints kernel = in.numbers();
    const Window window = Window::undilated(in);
    const Activation activation = activation_of(in.name());
    check_dense(x, kernel);
    const cpu::DepthwiseShape d = depthwise_shape(x, Filter{kernel[0], kernel[1], x.size(1)}, window);
    cpu::ConvolutionShape s = convolution_shape(d, bias.numel(), !x.is_contiguous());
    s.pairs = in_pairs(weight, x);
    s.channels_last |= s.pairs;
    Parameters parameter(x);
    const void* const weights = panels(parameter, weight, x, s.pairs, s.kernel_h * s.kernel_w * s.in, s.out, "weight");
    const Tensor y = empty_nhwc({s.batch, s.out, s.out_height, s.out_width}, x.scalar_type());
    if (s.batch == 0) return {y};
    const void* const shift = parameter(bias, s.out, "bias");
    memory_of(x, "x");
    run(x, s.channels_last ? nhwc(x) : x, parameter, y, true,
        [=](const cpu::Kernels& table, const void* from, void* to) {
            table.convolution_packed(s, from, weights, shift, activation, to);
        });
    return {y};
}

// A normalisation and the activation behind it; without a mean and a variance they are those of the batch.
struct NormCall {
    Tensor x, gamma;
    OptionalTensor beta, mean, var;
    double eps;
    Activation activation;

    // `constant`: the schema requires a mean and a variance.
    NormCall(Reader& in, bool constant)
        : x(in.tensor()),
          gamma(in.tensor()),
          beta(in.optional()),
          mean(constant ? in.tensor() : in.optional()),
          var(constant ? in.tensor() : in.optional()),
          eps(in.real()),
          activation(activation_of(in.name())) {}

    bool uses_batch() const { return !mean.has_value(); }
    cpu::ConvNorm params(Parameters& parameter) const {
        STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
        STD_TORCH_CHECK(mean.has_value() == var.has_value(), "a normalisation has a mean and a variance, or neither");
        const int64_t channels = x.size(1);
        return {nullptr,
                parameter(gamma, channels, "gamma"),
                parameter(beta, channels, "beta"),
                parameter(mean, channels, "mean"),
                parameter(var, channels, "var"),
                eps};
    }
    Ints size() const { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }
    cpu::NormShape shape(bool channels_last) const {
        const int64_t pixels = x.size(2) * x.size(3);
        return {x.size(0), pixels, x.size(1), channels_last || pixels == 1};
    }
};

Results batch_norm_inference(Reader& in) {
    const NormCall call(in, true);
    const Tensor& x = call.x;
    Parameters parameter(x);
    const cpu::ConvNorm norm = call.params(parameter);
    const bool last = keeps_channels_last(x);
    const Tensor y = last ? empty_nhwc(call.size(), x.scalar_type()) : empty(call.size(), x.scalar_type());
    if (x.numel() == 0) return {y};
    const cpu::NormShape s = call.shape(last);
    run(x, last ? nhwc(x) : torch::stable::contiguous(x), parameter, y, true,
        [s, norm, activation = call.activation](const cpu::Kernels& table, const void* from, void* to) {
            table.batch_norm(s, from, norm, activation, to);
        });
    return {y};
}

Results batch_norm_training(Reader& in) {
    const NormCall call(in, false);
    const Tensor& x = call.x;
    Parameters parameter(x);
    const cpu::ConvNorm norm = call.params(parameter);
    const auto vector = [&] {
        Tensor v = torch::stable::empty({call.uses_batch() ? x.size(1) : 0}, compute_type(x.scalar_type()));
        return x.numel() == 0 ? torch::stable::fill_(v, 0.0) : v;
    };
    const Tensor mean = vector(), var = vector();
    const Output y(x, call.size());
    if (x.numel() != 0) {
        cpu::BatchStatistics statistics;
        if (call.uses_batch()) statistics = {mean.mutable_data_ptr(), var.mutable_data_ptr()};
        const Tensor input = nhwc(x);
        kernels_for(x).norm_training(call.shape(true), input.const_data_ptr(), norm, call.activation, y.data(),
                                     statistics);
    }
    return {y.finish(), mean, var};
}

Results batch_norm_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const NormCall call(in, false);
    const Tensor mean = in.tensor(), var = in.tensor();
    const Needs needs = in.flags();
    const Tensor& x = call.x;
    Parameters parameter(x);
    const cpu::ConvNorm norm = call.params(parameter);
    STD_TORCH_CHECK(needs.size() == 3, "needs takes 3 flags, got ", needs.size());
    STD_TORCH_CHECK(grad.numel() == x.numel(), "grad does not have the output's size");
    cpu::BatchStatistics statistics;
    if (call.uses_batch())
        // Read only.
        statistics = {const_cast<void*>(parameter(mean, x.size(1), "mean_used")),
                      const_cast<void*>(parameter(var, x.size(1), "var_used"))};
    Gradients gradients(x);
    cpu::ConvNormGrads grads;
    grads.gamma = gradients.add(call.gamma, needs[1]);
    grads.beta = gradients.add(call.beta, needs[2]);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(x, call.size());
    if (x.numel() != 0) {
        const Tensor above = like_output(grad, x), input = nhwc(x);
        kernels_for(x).norm_backward(call.shape(true), above.const_data_ptr(), input.const_data_ptr(), norm,
                                     call.activation, statistics, grad_x ? grad_x->data() : nullptr, grads);
    }
    return gradients.take(grad_x);
}

// A convolution is pointwise, or has few channels and filter rows. Its output is channels_last where x or the weight
// is, as PyTorch's is.
Results conv_norm_inference(Reader& in) {
    const Tensor x = in.tensor();
    const auto call = ConvNormCall::required(in);
    const Window window = Window::undilated(in);
    const Activation activation = activation_of(in.name());
    const Tensor& weight = *call.weight;
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1),
                    "x must be (N, Cin, H, W) and weight (Cout, Cin, kh, kw)");
    STD_TORCH_CHECK(weight.size(2) <= 16, "kernels taller than 16 are not covered, got ", weight.size(2));
    STD_TORCH_CHECK(call.gamma.has_value() == call.mean.has_value() && call.gamma.has_value() == call.var.has_value(),
                    "a normalisation has gamma, a mean and a variance, or none of them");
    const cpu::DepthwiseShape d = depthwise_shape(x, Filter{weight.size(2), weight.size(3), x.size(1)}, window);
    const int64_t out = weight.size(0);
    const bool pointwise =
        d.kernel_h * d.kernel_w * d.stride_h * d.stride_w == 1 && d.out_height == d.height && d.out_width == d.width;
    if (pointwise && !call.gamma.has_value()) return {multiply(x, weight, call.beta, std::nullopt, activation)};
    const Output y(x, {d.batch, out, d.out_height, d.out_width},
                   keeps_channels_last(x) || (!pointwise && keeps_channels_last(weight)));
    if (d.batch == 0) return {y.finish()};
    Parameters parameter(x);
    const bool weight_rows = weight.scalar_type() == compute_type(x.scalar_type()) && is_dense_nhwc(weight);
    ConvNormCall rest = call;
    if (weight_rows) rest.weight = std::nullopt;
    cpu::ConvNorm norm = rest.params(parameter, weight.numel(), out);
    if (weight_rows) norm.weight = parameter.read(weight, "weight");
    if (pointwise) {
        const cpu::PointwiseShape s{d.batch, d.height * d.width, d.channels, out};
        return run(x, nhwc(x), parameter, y, [=](const cpu::Kernels& table, const void* from, void* to) {
            table.pointwise_norm(s, from, norm, activation, to);
        });
    }
    memory_of(x, "x");
    const cpu::ConvolutionShape s = convolution_shape(d, out, !x.is_contiguous());
    return run(x, s.channels_last ? nhwc(x) : x, parameter, y,
               [=](const cpu::Kernels& table, const void* from, void* to) {
                   table.convolution_norm(s, from, norm, weight_rows, activation, to);
               });
}

Results mbconv_inference(Reader& in) {
    const MBConvCall call(in);
    const UnpackedBlock unpacked(call);
    STD_TORCH_CHECK(!call.expand.uses_batch() && !call.depthwise.uses_batch() && !call.project.uses_batch(),
                    "mbconv_inference needs running statistics for every normalisation");
    const Output y(call.x, unpacked.output_size());
    if (call.x.size(0) == 0) return {y.finish()};
    // It belongs to these images.
    if (call.drop_path.has_value() && Recording::current() != nullptr) Recording::current()->spoil();
    return run(call.x, unpacked.input, unpacked.parameter, y,
               [block = unpacked.block](const cpu::Kernels& table, const void* from, void* to) {
                   table.mbconv_inference(block, from, to);
               });
}

// The tensors that training hands from forward to backward, in the order of the schema.
struct Stages {
    Tensor expanded, convolved, projected, expand_mean, expand_var, depthwise_mean, depthwise_var, project_mean,
        project_var, pooled;

    static Stages read(Reader& in) {
        // Braces evaluate from left to right.
        return {in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.tensor(),
                in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.tensor()};
    }
    Results behind(const Tensor& y) const {
        return {y,          expanded,       convolved,     projected,    expand_mean,
                expand_var, depthwise_mean, depthwise_var, project_mean, project_var,
                pooled};
    }
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

// The process group whose batches are one batch to the normalisations of a block, and how many values of a channel all
// its processes have behind each of them.
struct SharedStatistics {
    std::string group;
    Tensor counts;
    cpu::Processes processes;

    // For a forward pass, whose kernels fill the counts.
    SharedStatistics(std::string name, int64_t norms)
        : SharedStatistics(std::move(name),
                           torch::stable::fill_(torch::stable::empty({norms}, ScalarType::Double), 0.0), norms) {}
    SharedStatistics(std::string name, Tensor numbers, int64_t norms)
        : group(std::move(name)), counts(std::move(numbers)) {
        STD_TORCH_CHECK(counts.numel() == norms && counts.scalar_type() == ScalarType::Double, "counts must have ",
                        norms, " numbers in float64");
        processes = {group.c_str(), cpu::reduce_over_processes()};
        STD_TORCH_CHECK(processes.reduce != nullptr, "process groups are PyTorch's in Python: import effnet_ops there");
    }
    SharedStatistics(const SharedStatistics&) = delete;
    SharedStatistics& operator=(const SharedStatistics&) = delete;

    void apply(std::initializer_list<cpu::BatchStatistics*> norms) const {
        double* count = static_cast<double*>(counts.mutable_data_ptr());
        for (cpu::BatchStatistics* to : norms) to->processes = &processes, to->count = count++;
    }
};

// `shared` is null where the statistics are those of this process alone.
Results run_training(const MBConvCall& call, bool save_expanded, const SharedStatistics* shared) {
    const UnpackedBlock unpacked(call);
    const cpu::Block& block = unpacked.block;
    const cpu::DepthwiseShape& s = unpacked.shape();
    const ScalarType type = call.x.scalar_type(), wide = compute_type(type);
    const auto channels_last = [&](int64_t channels, int64_t height, int64_t width) {
        return empty_nhwc({s.batch, channels, height, width}, type);
    };
    const auto vector = [&](const ConvNormCall& conv, int64_t channels) {
        Tensor v = torch::stable::empty({conv.uses_batch() ? channels : 0}, wide);
        return s.batch == 0 ? torch::stable::fill_(v, 0.0) : v;
    };
    const bool saves = call.expand.weight.has_value() && save_expanded;
    const Stages stages{
        saves ? channels_last(s.channels, s.height, s.width) : nothing(call.x),
        channels_last(s.channels, s.out_height, s.out_width),
        channels_last(block.out, s.out_height, s.out_width),
        vector(call.expand, s.channels),
        vector(call.expand, s.channels),
        vector(call.depthwise, s.channels),
        vector(call.depthwise, s.channels),
        vector(call.project, block.out),
        vector(call.project, block.out),
        torch::stable::empty(block.reduced != 0 ? Ints{s.batch, s.channels} : Ints{0}, wide),
    };
    const Output y(call.x, unpacked.output_size());
    if (s.batch != 0) {
        cpu::BlockSaved saved = stages.saved();
        if (shared != nullptr) shared->apply({&saved.expand, &saved.depthwise, &saved.project});
        kernels_for(call.x).mbconv_training(block, unpacked.input.const_data_ptr(), y.data(), saved);
    }
    return stages.behind(y.finish());
}

Results mbconv_training(Reader& in) {
    const MBConvCall call(in);
    const bool save_expanded = in.flag();
    return run_training(call, save_expanded, nullptr);
}

// Every process must take part in each reduction: a process without images calls the reference, which does.
Results mbconv_sync_training(Reader& in) {
    const MBConvCall call(in);
    const bool save_expanded = in.flag();
    std::string group = in.name();
    STD_TORCH_CHECK(call.x.size(0) != 0, "x has no images");
    const SharedStatistics shared(std::move(group), 3);
    Results results = run_training(call, save_expanded, &shared);
    results.push_back(shared.counts);
    return results;
}

Results run_backward(const Tensor& grad, const MBConvCall& call, Stages& stages, const Needs& needs,
                     const SharedStatistics* shared) {
    const UnpackedBlock unpacked(call);
    const cpu::Block& block = unpacked.block;
    const cpu::DepthwiseShape& s = unpacked.shape();
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    STD_TORCH_CHECK(needs.size() == 14, "needs takes 14 flags, got ", needs.size());
    STD_TORCH_CHECK(grad.numel() == pixels * block.out && stages.convolved.numel() == pixels * s.channels &&
                        stages.projected.numel() == pixels * block.out,
                    "grad, convolved and projected must have the sizes that mbconv_training gave them");
    Gradients gradients(call.x);
    int next = 1;
    const auto add = [&](const OptionalTensor& p) { return gradients.add(p, needs[next++]); };
    const auto add_conv = [&](const ConvNormCall& conv) -> cpu::ConvNormGrads {
        return {add(conv.weight), add(conv.gamma), add(conv.beta)};
    };
    // In the order of the schema, which is that of the flags.
    cpu::BlockGrads grads;
    grads.expand = add_conv(call.expand);
    grads.depthwise = add_conv(call.depthwise);
    const SqueezeExciteCall& gate = call.squeeze_excite;
    grads.squeeze_excite = {add(gate.reduce_weight), add(gate.reduce_bias), add(gate.expand_weight),
                            add(gate.expand_bias)};
    grads.project = add_conv(call.project);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(call.x, Ints{s.batch, block.in, s.height, s.width});
    if (s.batch != 0) {
        const Tensor above = like_output(grad, call.x);
        if (stages.expanded.numel() != 0) stages.expanded = nhwc(stages.expanded);
        stages.convolved = nhwc(stages.convolved), stages.projected = nhwc(stages.projected);
        grads.x = grad_x ? grad_x->data() : nullptr;
        cpu::BlockSaved saved = stages.saved();
        if (shared != nullptr) shared->apply({&saved.expand, &saved.depthwise, &saved.project});
        kernels_for(call.x).mbconv_backward(block, above.const_data_ptr(), unpacked.input.const_data_ptr(), saved,
                                            grads);
    }
    return gradients.take(grad_x);
}

// Without `project` the block is one convolution with its normalisation and activation.
struct FusedCall {
    Tensor x;
    ConvNormCall expand;
    SqueezeExciteCall squeeze_excite;
    ConvNormCall project;
    OptionalTensor drop_path;
    Window window;
    bool residual;
    Activation activation;

    explicit FusedCall(Reader& in)
        : x(in.tensor()),
          expand(ConvNormCall::required(in)),
          squeeze_excite(SqueezeExciteCall::optional(in)),
          project(ConvNormCall::optional(in)),
          drop_path(in.optional()),
          window(Window::undilated(in)),
          residual(in.flag()),
          activation(activation_of(in.name())) {}

    bool uses_batch() const { return expand.uses_batch() || project.uses_batch(); }
};

// The block as the kernels take it: a block whose middle convolution is dense, or a layer.
struct UnpackedFused {
    Parameters parameter;
    cpu::Block block{};
    bool projects;
    Tensor input;

    explicit UnpackedFused(const FusedCall& call)
        : parameter(call.x), projects(call.project.weight.has_value()), input(nhwc(call.x)) {
        const Tensor &x = call.x, &weight = *call.expand.weight;
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "expand_weight must be (C, ", x.size(1),
                        ", kh, kw)");
        check_dense(x, {weight.size(2), weight.size(3)});
        const cpu::DepthwiseShape s =
            depthwise_shape(x, Filter{weight.size(2), weight.size(3), weight.size(0)}, call.window);
        block.dense = true;
        block.depthwise_shape = s;
        block.in = x.size(1), block.out = projects ? call.project.weight->size(0) : s.channels;
        block.depthwise = call.expand.params(parameter, weight.numel(), s.channels);
        if (projects) block.project = call.project.params(parameter, block.out * s.channels, block.out);
        block.reduced = call.squeeze_excite.reduced();
        STD_TORCH_CHECK(block.reduced == 0 || projects,
                        "squeeze-and-excitation without a projection is left to the reference");
        if (block.reduced != 0) block.squeeze_excite = call.squeeze_excite.params(parameter, s.channels);
        check_residual(call.residual, s, block.in, block.out);
        block.residual = call.residual;
        block.drop_path = parameter(call.drop_path, s.batch, "drop_path");
        block.activation = call.activation;
    }

    const cpu::DepthwiseShape& shape() const { return block.depthwise_shape; }
    Ints output_size() const { return {shape().batch, block.out, shape().out_height, shape().out_width}; }
    cpu::DenseLayer layer() const {
        cpu::ConvolutionShape s = convolution_shape(shape(), shape().channels, true);
        s.in = block.in;
        return {s, block.depthwise, block.activation, block.residual, block.drop_path};
    }
};

// The tensors that its training hands from forward to backward, in the order of the schema.
struct FusedStages {
    Tensor expanded, projected, expand_mean, expand_var, project_mean, project_var, pooled;

    static FusedStages read(Reader& in) {
        // Braces evaluate from left to right.
        return {in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.tensor()};
    }
    Results behind(const Tensor& y) const {
        return {y, expanded, projected, expand_mean, expand_var, project_mean, project_var, pooled};
    }
    cpu::BlockSaved saved() const {
        const auto data = [](const Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr(); };
        cpu::BlockSaved to;
        to.convolved = data(expanded), to.projected = data(projected);
        to.depthwise = {data(expand_mean), data(expand_var)};
        to.project = {data(project_mean), data(project_var)};
        to.pooled = data(pooled);
        return to;
    }
};

Results fused_mbconv_inference(Reader& in) {
    const FusedCall call(in);
    const UnpackedFused unpacked(call);
    STD_TORCH_CHECK(!call.uses_batch(), "fused_mbconv_inference needs running statistics for every normalisation");
    const Output y(call.x, unpacked.output_size());
    if (call.x.size(0) == 0) return {y.finish()};
    // It belongs to these images.
    if (call.drop_path.has_value() && Recording::current() != nullptr) Recording::current()->spoil();
    return run(call.x, unpacked.input, unpacked.parameter, y,
               [block = unpacked.block](const cpu::Kernels& table, const void* from, void* to) {
                   table.fused_mbconv_inference(block, from, to);
               });
}

// `shared` is null where the statistics are those of this process alone.
Results run_fused_training(const FusedCall& call, bool save_expanded, const SharedStatistics* shared) {
    const UnpackedFused unpacked(call);
    const cpu::Block& block = unpacked.block;
    const cpu::DepthwiseShape& s = unpacked.shape();
    const ScalarType type = call.x.scalar_type(), wide = compute_type(type);
    const auto stage = [&](bool made, int64_t channels) {
        return made ? empty_nhwc({s.batch, channels, s.out_height, s.out_width}, type) : nothing(call.x);
    };
    const auto vector = [&](const ConvNormCall& conv, int64_t channels) {
        Tensor v = torch::stable::empty({conv.uses_batch() ? channels : 0}, wide);
        return s.batch == 0 ? torch::stable::fill_(v, 0.0) : v;
    };
    const FusedStages stages{
        stage(save_expanded, s.channels),
        stage(unpacked.projects, block.out),
        vector(call.expand, s.channels),
        vector(call.expand, s.channels),
        vector(call.project, block.out),
        vector(call.project, block.out),
        torch::stable::empty(block.reduced != 0 ? Ints{s.batch, s.channels} : Ints{0}, wide),
    };
    const Output y(call.x, unpacked.output_size());
    if (s.batch == 0) return stages.behind(y.finish());
    const cpu::Kernels& kernels = kernels_for(call.x);
    const void* const x = unpacked.input.const_data_ptr();
    cpu::BlockSaved saved = stages.saved();
    if (shared != nullptr) shared->apply({&saved.depthwise, &saved.project});
    if (unpacked.projects)
        kernels.fused_mbconv_training(block, x, y.data(), saved);
    else
        kernels.conv_norm_training(unpacked.layer(), x, y.data(), saved.convolved, saved.depthwise);
    return stages.behind(y.finish());
}

Results fused_mbconv_training(Reader& in) {
    const FusedCall call(in);
    const bool save_expanded = in.flag();
    return run_fused_training(call, save_expanded, nullptr);
}

Results fused_mbconv_sync_training(Reader& in) {
    const FusedCall call(in);
    const bool save_expanded = in.flag();
    std::string group = in.name();
    STD_TORCH_CHECK(call.x.size(0) != 0, "x has no images");
    const SharedStatistics shared(std::move(group), 2);
    Results results = run_fused_training(call, save_expanded, &shared);
    results.push_back(shared.counts);
    return results;
}

Results run_fused_backward(const Tensor& grad, const FusedCall& call, FusedStages& stages, const Needs& needs,
                           const SharedStatistics* shared) {
    const UnpackedFused unpacked(call);
    const cpu::Block& block = unpacked.block;
    const cpu::DepthwiseShape& s = unpacked.shape();
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    STD_TORCH_CHECK(needs.size() == 11, "needs takes 11 flags, got ", needs.size());
    STD_TORCH_CHECK(grad.numel() == pixels * block.out &&
                        (stages.expanded.numel() == 0 || stages.expanded.numel() == pixels * s.channels) &&
                        stages.projected.numel() == (unpacked.projects ? pixels * block.out : 0),
                    "grad, expanded and projected must have the sizes that fused_mbconv_training gave them");
    Gradients gradients(call.x);
    int next = 1;
    const auto add = [&](const OptionalTensor& p) { return gradients.add(p, needs[next++]); };
    const auto add_conv = [&](const ConvNormCall& conv) -> cpu::ConvNormGrads {
        return {add(conv.weight), add(conv.gamma), add(conv.beta)};
    };
    // In the order of the schema, which is that of the flags.
    cpu::BlockGrads grads;
    grads.depthwise = add_conv(call.expand);
    const SqueezeExciteCall& gate = call.squeeze_excite;
    grads.squeeze_excite = {add(gate.reduce_weight), add(gate.reduce_bias), add(gate.expand_weight),
                            add(gate.expand_bias)};
    grads.project = add_conv(call.project);
    std::optional<Output> grad_x;
    if (needs[0]) grad_x.emplace(call.x, Ints{s.batch, block.in, s.height, s.width});
    if (s.batch != 0) {
        const Tensor above = like_output(grad, call.x);
        if (stages.expanded.numel() != 0) stages.expanded = nhwc(stages.expanded);
        if (unpacked.projects) stages.projected = nhwc(stages.projected);
        const cpu::Kernels& kernels = kernels_for(call.x);
        const void *const x = unpacked.input.const_data_ptr(), *const from = above.const_data_ptr();
        cpu::BlockSaved saved = stages.saved();
        if (shared != nullptr) shared->apply({&saved.depthwise, &saved.project});
        grads.x = grad_x ? grad_x->data() : nullptr;
        if (unpacked.projects)
            kernels.fused_mbconv_backward(block, from, x, saved, grads);
        else
            kernels.conv_norm_backward(unpacked.layer(), from, x, saved.convolved, saved.depthwise, grads.x,
                                       grads.depthwise);
    }
    return gradients.take(grad_x);
}

Results fused_mbconv_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const FusedCall call(in);
    FusedStages stages = FusedStages::read(in);
    const Needs needs = in.flags();
    return run_fused_backward(grad, call, stages, needs, nullptr);
}

Results fused_mbconv_sync_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const FusedCall call(in);
    FusedStages stages = FusedStages::read(in);
    Tensor counts = in.tensor();
    std::string group = in.name();
    const Needs needs = in.flags();
    const SharedStatistics shared(std::move(group), std::move(counts), 2);
    return run_fused_backward(grad, call, stages, needs, &shared);
}

Results mbconv_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const MBConvCall call(in);
    Stages stages = Stages::read(in);
    const Needs needs = in.flags();
    return run_backward(grad, call, stages, needs, nullptr);
}

Results mbconv_sync_backward(Reader& in) {
    const Tensor grad = in.tensor();
    const MBConvCall call(in);
    Stages stages = Stages::read(in);
    Tensor counts = in.tensor();
    std::string group = in.name();
    const Needs needs = in.flags();
    const SharedStatistics shared(std::move(group), std::move(counts), 3);
    return run_backward(grad, call, stages, needs, &shared);
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
    m.impl("depthwise_conv2d", &effnet::boxed<effnet::depthwise_conv2d>);
    m.impl("depthwise_conv2d_backward", &effnet::boxed<effnet::depthwise_conv2d_backward>);
    m.impl("pointwise_conv2d", &effnet::boxed<effnet::pointwise_conv2d>);
    m.impl("pointwise_conv2d_backward", &effnet::boxed<effnet::pointwise_conv2d_backward>);
    m.impl("squeeze_excite", &effnet::boxed<effnet::squeeze_excite>);
    m.impl("squeeze_excite_backward", &effnet::boxed<effnet::squeeze_excite_backward>);
    m.impl("mbconv_inference", &effnet::boxed<effnet::mbconv_inference>);
    m.impl("mbconv_packed", &effnet::boxed<effnet::mbconv_packed>);
    m.impl("fused_mbconv_inference", &effnet::boxed<effnet::fused_mbconv_inference>);
    m.impl("fused_mbconv_packed", &effnet::boxed<effnet::fused_mbconv_packed>);
    m.impl("average_pool", &effnet::boxed<effnet::average_pool>);
    m.impl("pointwise_packed", &effnet::boxed<effnet::pointwise_packed>);
    m.impl("convolution_packed", &effnet::boxed<effnet::convolution_packed>);
    m.impl("batch_norm_inference", &effnet::boxed<effnet::batch_norm_inference>);
    m.impl("batch_norm_training", &effnet::boxed<effnet::batch_norm_training>);
    m.impl("batch_norm_backward", &effnet::boxed<effnet::batch_norm_backward>);
    m.impl("conv_norm_inference", &effnet::boxed<effnet::conv_norm_inference>);
    m.impl("mbconv_training", &effnet::boxed<effnet::mbconv_training>);
    m.impl("mbconv_backward", &effnet::boxed<effnet::mbconv_backward>);
    m.impl("fused_mbconv_training", &effnet::boxed<effnet::fused_mbconv_training>);
    m.impl("fused_mbconv_backward", &effnet::boxed<effnet::fused_mbconv_backward>);
    m.impl("fused_mbconv_sync_training", &effnet::boxed<effnet::fused_mbconv_sync_training>);
    m.impl("fused_mbconv_sync_backward", &effnet::boxed<effnet::fused_mbconv_sync_backward>);
    m.impl("mbconv_sync_training", &effnet::boxed<effnet::mbconv_sync_training>);
    m.impl("mbconv_sync_backward", &effnet::boxed<effnet::mbconv_sync_backward>);
}
