// Unpacks tensors for the CUDA kernels and registers them, through the LibTorch stable ABI alone. The operators that
// are defined here by name are internal (effnet_ops/ops/cuda): one for each kernel, with all that it can carry.
//
// With EFFNET_EMULATED this file is compiled for the emulation of tests/, where the kernels take tensors of the CPU.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../stable.h"
#include "kernels.h"

#if defined(EFFNET_EMULATED)
#define EFFNET_DISPATCH_KEY CPU
extern "C" void emulation_reset(uint64_t seed, int multiprocessors, size_t shared_limit, uint64_t first, uint64_t last);
extern "C" const char* emulation_error();
extern "C" void emulation_adopt(const char* name, const void* pointer, size_t bytes, int kind);
#else
#define EFFNET_DISPATCH_KEY CUDA
#endif

namespace effnet {
namespace {

using cuda::Activation;
using cuda::DType;
using cuda::Gate;
using Optional = std::optional<Tensor>;

DType kernel_dtype(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::f32;
        case ScalarType::BFloat16:
            return DType::bf16;
        case ScalarType::Half:
            return DType::f16;
        default:
            STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 or float16");
            return DType::f32;
    }
}

Activation activation_of(const std::string& name) { return activation_named<Activation>(name); }
Gate gate_of(const std::string& name) { return gate_named<Gate>(name); }

#if defined(EFFNET_EMULATED)

// An H200 with few multiprocessors, so that grids are small. Each call begins with an empty memory.
class Here {
  public:
    explicit Here(const Tensor&) : device{0, 4, 9, 0, 227 * 1024, nullptr} {
        emulation_reset(0, device.multiprocessors, device.max_shared_bytes, 0, UINT64_MAX);
    }
    const cuda::Device device;
};

void hand_over(const Tensor& t, const char* name, bool output) {
    emulation_adopt(name, t.const_data_ptr(), t.numel() * t.element_size(), output ? 1 : 0);
}

const char* reason(cudaError_t) { return emulation_error(); }

#else

void hand_over(const Tensor&, const char*, bool) {}

const char* reason(cudaError_t error) { return cudaGetErrorString(error); }

struct Limits {
    int multiprocessors, major, minor, max_shared_bytes;
};

Limits limits_of(int index) {
    static std::mutex mutex;
    static std::map<int, Limits> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(index);
    if (found != known.end()) return found->second;
    const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
        STD_TORCH_CHECK(error == cudaSuccess, "cuda:", index, " gives no attributes: ", cudaGetErrorString(error));
        return value;
    };
    const Limits limits{ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrComputeCapabilityMajor),
                        ask(cudaDevAttrComputeCapabilityMinor), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    return known.emplace(index, limits).first->second;
}

cudaStream_t current_stream(int index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return static_cast<cudaStream_t>(stream);
}

// Makes the device of x current for as long as this lives.
class Here {
  public:
    explicit Here(const Tensor& x) : guard_(x.get_device_index()), device(of(x.get_device_index())) {}

  private:
    static cuda::Device of(int index) {
        const Limits l = limits_of(index);
        return {index, l.multiprocessors, l.major, l.minor, l.max_shared_bytes, current_stream(index)};
    }
    torch::stable::accelerator::DeviceGuard guard_;

  public:
    const cuda::Device device;
};

#endif

Tensor empty(const Tensor& like, const Ints& size, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
    const Tensor made = torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt, format);
    hand_over(made, "a result", true);
    return made;
}

Tensor nothing(const Tensor& x, ScalarType type) { return empty(x, {0}, type); }
Tensor nothing(const Tensor& x) { return nothing(x, x.scalar_type()); }

// Slices of larger tensors can begin anywhere, and kernels read 16 bytes at a time.
Tensor aligned(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

// Tensors as the kernels read them, kept alive until the launch.
class Operands {
  public:
    explicit Operands(const Tensor& x) : x_(x) {}

    // An activation (N, C, H, W) of this size in the dtype of x, dense, with its channels innermost or not.
    const void* activation(const Tensor& t, const Ints& size, bool channels_last, const char* name) {
        check_device(t, name);
        STD_TORCH_CHECK(t.dim() == 4 && std::equal(size.begin(), size.end(), t.sizes().begin()), name,
                        " does not have the size that belongs to x");
        Tensor dense = as_dtype(t, x_.scalar_type());
        if (!(channels_last ? is_dense_nhwc(dense) : dense.is_contiguous()))
            dense =
                torch::stable::contiguous(dense, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
        return keep(aligned(dense), name).const_data_ptr();
    }
    const void* activation(const Optional& t, const Ints& size, bool channels_last, const char* name) {
        return t.has_value() ? activation(*t, size, channels_last, name) : nullptr;
    }

    // Parameters, statistics and gates: fp32.
    const float* vector(const Tensor& t, int64_t elements, const char* name) {
        check_device(t, name);
        STD_TORCH_CHECK(t.numel() == elements, name, " must have ", elements, " elements, got ", t.numel());
        const Tensor dense = torch::stable::contiguous(as_dtype(t, ScalarType::Float));
        return static_cast<const float*>(keep(aligned(dense), name).const_data_ptr());
    }
    const float* vector(const Optional& t, int64_t elements, const char* name) {
        return t.has_value() ? vector(*t, elements, name) : nullptr;
    }

    // The weight of a product: in float or in the dtype of x.
    cuda::ProductWeight product_weight(const Tensor& t, int64_t elements, const char* name) {
        check_device(t, name);
        STD_TORCH_CHECK(t.numel() == elements, name, " must have ", elements, " elements, got ", t.numel());
        const bool narrow = t.scalar_type() == x_.scalar_type();
        const Tensor dense = torch::stable::contiguous(narrow ? t : as_dtype(t, ScalarType::Float));
        const void* const data = keep(aligned(dense), name).const_data_ptr();
        return {data, !narrow || t.scalar_type() == ScalarType::Float};
    }

    void* workspace(size_t bytes) {
        if (bytes == 0) return nullptr;
        return keep(empty(x_, {int64_t(bytes)}, ScalarType::Byte), "workspace").mutable_data_ptr();
    }

  private:
    void check_device(const Tensor& t, const char* name) const {
        STD_TORCH_CHECK(t.device() == x_.device(), name, " is not on the device of x");
    }
    const Tensor& keep(Tensor t, const char* name) {
        hand_over(t, name, false);
        kept_.push_back(std::move(t));
        return kept_.back();
    }

    Tensor x_;
    std::vector<Tensor> kept_;
};

// A result in the layout that belongs to x. The kernel writes it as NHWC or, if not channels_last, as NCHW; where that
// is not the result's layout, finish() copies.
class Output {
  public:
    Output(const Tensor& x, const Ints& size, bool channels_last) : x_(x), size_(size) {
        const bool last = keeps_channels_last(x), same_memory = size[1] == 1 || size[2] * size[3] == 1;
        direct_ = same_memory || last == channels_last;
        const bool as_last = direct_ ? last : channels_last;
        memory_ = empty(x, size, x.scalar_type(), as_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    }
    void* data() const { return memory_.mutable_data_ptr(); }
    Tensor finish() const {
        if (direct_) return memory_;
        const auto format = keeps_channels_last(x_) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
        return memory_.numel() == 0 ? empty(x_, size_, x_.scalar_type(), format)
                                    : torch::stable::contiguous(memory_, format);
    }

  private:
    Tensor x_;
    Ints size_;
    Tensor memory_{nullptr};
    bool direct_;
};

// The gradient of a parameter: fp32 in the kernel, handed out in the parameter's dtype.
class Gradient {
  public:
    Gradient(const Tensor& x, const Optional& parameter, bool needed)
        : result_(nothing(x)), type_(x.scalar_type()), wanted_(needed && parameter.has_value()) {
        if (!wanted_) return;
        const auto size = parameter->sizes();
        result_ = empty(x, Ints(size.begin(), size.end()), ScalarType::Float);
        type_ = parameter->scalar_type();
    }
    float* data() const { return wanted_ ? static_cast<float*>(result_.mutable_data_ptr()) : nullptr; }
    Tensor take() const { return as_dtype(result_, type_); }

  private:
    Tensor result_;
    ScalarType type_;
    bool wanted_;
};

float* floats(const Tensor& t) { return t.numel() == 0 ? nullptr : static_cast<float*>(t.mutable_data_ptr()); }

// Stands for an optional tensor that is not allocated yet.
float* const later = reinterpret_cast<float*>(uintptr_t{16});

// A plan, which is an error where no kernel covers its problem.
const cuda::Plan& covered(const cuda::Plan& plan, const char* name) {
    STD_TORCH_CHECK(plan.why_not == nullptr, name, ": ", plan.why_not);
    return plan;
}

// The plan of a depthwise problem in the better layout, which the problem has from then on.
template <class Problem>
cuda::Plan plan_in_better_layout(Problem& problem, const cuda::Device& device) {
    const cuda::Plan plan = cuda::plan(problem, device);
    if (problem.shape.channels_last || !cuda::wants_copies(problem, plan, device)) return plan;
    problem.shape.channels_last = true;
    return cuda::plan(problem, device);
}

template <class Problem>
void launch(const Problem& problem, const cuda::Plan& plan, const cuda::Device& device, const char* name) {
    const cudaError_t error = cuda::run(problem, plan, device);
    STD_TORCH_CHECK(error == cudaSuccess, "launching ", name, " on cuda:", device.index, " failed: ", reason(error));
}

template <class Problem>
void launch_with_workspace(Problem& problem, Operands& operands, const cuda::Device& device, const char* name) {
    const cuda::Plan plan = covered(cuda::plan(problem, device), name);
    problem.workspace = operands.workspace(plan.workspace_bytes);
    launch(problem, plan, device, name);
}

// padding: top, bottom, left, right.
cuda::DepthwiseShape depthwise_shape(const Ints& size, const Tensor& weight, int64_t stride, const Ints& padding,
                                     bool channels_last) {
    STD_TORCH_CHECK(size.size() == 4, "x must be (N, C, H, W)");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == size[1] && weight.size(1) == 1, "weight must be (", size[1],
                    ", 1, k, k)");
    STD_TORCH_CHECK(weight.size(2) == weight.size(3) && weight.size(2) < 64, "kernels must be square and small");
    STD_TORCH_CHECK(padding.size() == 4 && stride > 0 && stride < 64, "padding takes 4 numbers, stride one");
    const auto axis = [&](int64_t length, int first) {
        const int64_t before = padding[first], after = padding[first + 1];
        STD_TORCH_CHECK(before >= 0 && after >= 0 && length + before + after >= weight.size(2) && before <= INT32_MAX,
                        "the kernel does not fit into the padded image");
        return (length + before + after - weight.size(2)) / stride + 1;
    };
    return {size[0],
            size[1],
            size[2],
            size[3],
            axis(size[2], 0),
            axis(size[3], 2),
            int(weight.size(2)),
            int(stride),
            int(padding[0]),
            int(padding[2]),
            channels_last};
}

Ints input_size(const cuda::DepthwiseShape& s) { return {s.batch, s.channels, s.height, s.width}; }
Ints output_size(const cuda::DepthwiseShape& s) { return {s.batch, s.channels, s.out_height, s.out_width}; }
Ints sizes_of(const Tensor& x) { return Ints(x.sizes().begin(), x.sizes().end()); }

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Whether a depthwise kernel should see x as NHWC: results that are to be NCHW are written so, if the kernels can. What
// is both at once has its channels together where there are several.
bool is_better_nhwc(const Tensor& x) { return keeps_channels_last(x) || (x.size(1) > 1 && is_dense_nhwc(x)); }

Three depthwise_forward(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& norm,
                        const Optional& gate, const Optional& out_norm, const Optional& grad, int64_t stride,
                        const Ints& padding, const std::string& activation, const std::string& out_activation,
                        bool pool, bool statistics) {
    const Here here(x);
    cuda::DepthwiseForward p{};
    p.dtype = kernel_dtype(x);
    p.activation = activation_of(activation), p.out_activation = activation_of(out_activation);
    p.shape = depthwise_shape(sizes_of(x), weight, stride, padding, is_better_nhwc(x));
    p.norm = norm.has_value() ? later : nullptr, p.gate = gate.has_value() ? later : nullptr;
    p.out_norm = out_norm.has_value() ? later : nullptr, p.grad = grad.has_value() ? later : nullptr;
    p.bias = bias.has_value() ? later : nullptr;
    p.pool = pool ? later : nullptr, p.statistics = statistics ? later : nullptr;
    const cuda::Plan plan = covered(plan_in_better_layout(p, here.device), "depthwise_forward");

    const cuda::DepthwiseShape& s = p.shape;
    const Output y(x, output_size(s), s.channels_last);
    const int64_t parts = s.batch == 0 ? 0 : plan.parts;
    const Tensor sums = pool ? empty(x, {s.batch, parts, s.channels}, ScalarType::Float) : nothing(x);
    const Tensor partials = statistics ? empty(x, {s.batch * parts, 3, s.channels}, ScalarType::Float) : nothing(x);
    if (s.batch == 0) return {y.finish(), sums, partials};

    Operands operands(x);
    p.x = operands.activation(x, input_size(s), s.channels_last, "x");
    p.weight = operands.vector(weight, weight.numel(), "weight");
    p.bias = operands.vector(bias, s.channels, "bias");
    p.norm = operands.vector(norm, 3 * s.channels, "norm");
    p.gate = operands.vector(gate, s.batch * s.channels, "gate");
    p.out_norm = operands.vector(out_norm, 3 * s.channels, "out_norm");
    p.grad = operands.activation(grad, output_size(s), s.channels_last, "grad");
    p.y = y.data(), p.pool = floats(sums), p.statistics = floats(partials);
    launch(p, plan, here.device, "depthwise_forward");
    return {y.finish(), sums, partials};
}

Four depthwise_backward(const Tensor& grad, const Optional& x, const Tensor& weight, const Optional& bias,
                        const Optional& a, const Optional& a_norm, const Optional& coefficients, const Optional& gate,
                        const Optional& pooled, const Optional& norm, const Optional& residual, const Tensor& like,
                        int64_t stride, const Ints& padding, const std::string& a_activation,
                        const std::string& activation, const Needs& needs) {
    STD_TORCH_CHECK(needs.size() == 3, "needs takes 3 flags, got ", needs.size());
    STD_TORCH_CHECK(x.has_value() || (!needs[1] && !norm.has_value() && activation == "none"),
                    "x is needed for the gradient of weight, and behind a normalisation or an activation");
    const Here here(grad);
    const auto present = [](const Optional& t) { return t.has_value() ? later : nullptr; };
    cuda::DepthwiseBackward p{};
    p.dtype = kernel_dtype(grad);
    p.a_activation = activation_of(a_activation), p.activation = activation_of(activation);
    p.shape = depthwise_shape(sizes_of(like), weight, stride, padding, is_better_nhwc(like));
    p.a = present(a), p.x = present(x), p.a_norm = present(a_norm), p.coefficients = present(coefficients);
    p.gate = present(gate), p.pooled = present(pooled), p.norm = present(norm), p.residual = present(residual);
    const bool wants_sums = needs[0] && norm.has_value();
    p.dx = needs[0] ? later : nullptr, p.dw = needs[1] ? later : nullptr;
    p.db = needs[2] && bias.has_value() ? later : nullptr, p.sums = wants_sums ? later : nullptr;
    const cuda::Plan plan = covered(plan_in_better_layout(p, here.device), "depthwise_backward");

    const cuda::DepthwiseShape& s = p.shape;
    const Gradient dw(grad, weight, needs[1]), db(grad, bias, needs[2]);
    std::optional<Output> dx;
    if (needs[0]) dx.emplace(like, input_size(s), s.channels_last);
    const int64_t parts = s.batch == 0 ? 0 : plan.parts;
    const Tensor sums = wants_sums ? empty(grad, {parts, 2, s.channels}, ScalarType::Float) : nothing(grad);

    Operands operands(grad);
    const bool last = s.channels_last;
    p.grad = operands.activation(grad, output_size(s), last, "grad");
    p.a = operands.activation(a, output_size(s), last, "a");
    p.x = operands.activation(x, input_size(s), last, "x");
    p.residual = operands.activation(residual, input_size(s), last, "residual");
    p.weight = operands.vector(weight, weight.numel(), "weight");
    p.a_norm = operands.vector(a_norm, 3 * s.channels, "a_norm");
    p.coefficients = operands.vector(coefficients, 4 * s.channels, "coefficients");
    p.gate = operands.vector(gate, s.batch * s.channels, "gate");
    p.pooled = operands.vector(pooled, s.batch * s.channels, "pooled");
    p.norm = operands.vector(norm, 3 * s.channels, "norm");
    p.dx = dx ? dx->data() : nullptr, p.dw = dw.data(), p.db = db.data(), p.sums = floats(sums);
    p.workspace = operands.workspace(plan.workspace_bytes);
    launch(p, plan, here.device, "depthwise_backward");
    return {dx ? dx->finish() : nothing(grad), dw.take(), db.take(), sums};
}

cuda::SqueezeExcite squeeze_excite_layer(Operands& operands, int64_t images, int64_t pixels, int64_t channels,
                                         const Tensor& reduce_weight, const Optional& reduce_bias,
                                         const Tensor& expand_weight, const Optional& expand_bias,
                                         const std::string& activation, const std::string& gate) {
    const int64_t reduced = reduce_weight.size(0);
    return {images,
            pixels,
            channels,
            reduced,
            operands.vector(reduce_weight, reduced * channels, "reduce_weight"),
            operands.vector(reduce_bias, reduced, "reduce_bias"),
            operands.vector(expand_weight, channels * reduced, "expand_weight"),
            operands.vector(expand_bias, channels, "expand_bias"),
            activation_of(activation),
            gate_of(gate)};
}

// From the tensor. Without `scale` there is no y, and x may be read through a normalisation.
Three squeeze_excite_forward(const Tensor& x, const Optional& norm, const Tensor& reduce_weight,
                             const Optional& reduce_bias, const Tensor& expand_weight, const Optional& expand_bias,
                             const std::string& norm_activation, const std::string& activation, const std::string& gate,
                             bool scale) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
    const Here here(x);
    const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    const Tensor pooled = empty(x, {images, channels}, ScalarType::Float);
    const Tensor gates = empty(x, {images, channels}, ScalarType::Float);
    std::optional<Output> y;
    if (scale) y.emplace(x, sizes_of(x), true);
    if (images != 0) {
        Operands operands(x);
        cuda::SqueezeExciteForward p{};
        p.layer = squeeze_excite_layer(operands, images, pixels, channels, reduce_weight, reduce_bias, expand_weight,
                                       expand_bias, activation, gate);
        p.dtype = kernel_dtype(x);
        p.x = operands.activation(x, sizes_of(x), true, "x");
        p.norm = operands.vector(norm, 3 * channels, "norm");
        p.norm_activation = activation_of(norm_activation);
        p.y = y ? y->data() : nullptr, p.pooled = floats(pooled), p.gates = floats(gates);
        launch_with_workspace(p, operands, here.device, "squeeze_excite_forward");
    }
    return {y ? y->finish() : nothing(x), pooled, gates};
}

// From sums over the pixels of parts, (images, parts, C).
std::tuple<Tensor, Tensor> gates_forward(const Tensor& sums, int64_t pixels, const Tensor& reduce_weight,
                                         const Optional& reduce_bias, const Tensor& expand_weight,
                                         const Optional& expand_bias, const std::string& activation,
                                         const std::string& gate) {
    STD_TORCH_CHECK(sums.dim() == 3, "sums must be (images, parts, C)");
    const Here here(sums);
    const int64_t images = sums.size(0), channels = sums.size(2);
    const Tensor pooled = empty(sums, {images, channels}, ScalarType::Float);
    const Tensor gates = empty(sums, {images, channels}, ScalarType::Float);
    if (images != 0) {
        Operands operands(sums);
        cuda::SqueezeExciteForward p{};
        p.layer = squeeze_excite_layer(operands, images, pixels, channels, reduce_weight, reduce_bias, expand_weight,
                                       expand_bias, activation, gate);
        p.sums = operands.vector(sums, sums.numel(), "sums"), p.parts = sums.size(1);
        p.pooled = floats(pooled), p.gates = floats(gates);
        launch_with_workspace(p, operands, here.device, "squeeze_excite_forward");
    }
    return {pooled, gates};
}

// The gradients of the four parameters, in order.
struct LayerGradients {
    LayerGradients(const Tensor& x, const Tensor& reduce_weight, const Optional& reduce_bias,
                   const Tensor& expand_weight, const Optional& expand_bias, const Needs& needs, size_t first)
        : all{Gradient(x, reduce_weight, needs[first]), Gradient(x, reduce_bias, needs[first + 1]),
              Gradient(x, expand_weight, needs[first + 2]), Gradient(x, expand_bias, needs[first + 3])} {}
    void fill(cuda::SqueezeExciteBackward& p) const {
        p.reduce_weight_grad = all[0].data(), p.reduce_bias_grad = all[1].data();
        p.expand_weight_grad = all[2].data(), p.expand_bias_grad = all[3].data();
    }
    const Gradient all[4];
};

Five squeeze_excite_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& reduce_weight,
                             const Optional& reduce_bias, const Tensor& expand_weight, const Optional& expand_bias,
                             const std::string& activation, const std::string& gate, const Needs& needs) {
    STD_TORCH_CHECK(x.dim() == 4 && needs.size() == 5, "x must be (N, C, H, W), needs takes 5 flags");
    const Here here(x);
    const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    const LayerGradients gradients(x, reduce_weight, reduce_bias, expand_weight, expand_bias, needs, 1);
    std::optional<Output> dx;
    if (needs[0]) dx.emplace(x, sizes_of(x), true);
    Operands operands(x);
    cuda::SqueezeExciteBackward p{};
    p.layer = squeeze_excite_layer(operands, images, pixels, channels, reduce_weight, reduce_bias, expand_weight,
                                   expand_bias, activation, gate);
    p.dtype = kernel_dtype(x);
    p.grad = operands.activation(grad, sizes_of(x), true, "grad");
    p.x = operands.activation(x, sizes_of(x), true, "x");
    p.pooled = operands.vector(pooled, images * channels, "pooled");
    p.dx = dx ? dx->data() : nullptr;
    gradients.fill(p);
    launch_with_workspace(p, operands, here.device, "squeeze_excite_backward");
    const auto& g = gradients.all;
    return {dx ? dx->finish() : nothing(x), g[0].take(), g[1].take(), g[2].take(), g[3].take()};
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// From sums (images, parts, rows, C): the gradients of the parameters, the gates, the gradient of the mean over pixels
// divided by their number, and with five rows the sums (images, 2, C) that the normalisation before needs.
Seven gates_backward(const Tensor& sums, int64_t pixels, const Tensor& pooled, const Tensor& reduce_weight,
                     const Optional& reduce_bias, const Tensor& expand_weight, const Optional& expand_bias,
                     const std::string& activation, const std::string& gate, const Needs& needs) {
    STD_TORCH_CHECK(sums.dim() == 4 && (sums.size(2) == 1 || sums.size(2) == 5),
                    "sums must be (images, parts, 1 or 5, C)");
    STD_TORCH_CHECK(needs.size() == 4, "needs takes 4 flags, got ", needs.size());
    const Here here(sums);
    const int64_t images = sums.size(0), rows = sums.size(2), channels = sums.size(3);
    const LayerGradients gradients(sums, reduce_weight, reduce_bias, expand_weight, expand_bias, needs, 0);
    const Tensor gates = empty(sums, {images, channels}, ScalarType::Float);
    const Tensor pooled_grad = empty(sums, {images, channels}, ScalarType::Float);
    const Tensor partials = rows == 5 ? empty(sums, {images, 2, channels}, ScalarType::Float) : nothing(sums);
    Operands operands(sums);
    cuda::SqueezeExciteBackward p{};
    p.layer = squeeze_excite_layer(operands, images, pixels, channels, reduce_weight, reduce_bias, expand_weight,
                                   expand_bias, activation, gate);
    p.sums = operands.vector(sums, sums.numel(), "sums"), p.parts = sums.size(1), p.rows = rows;
    p.pooled = operands.vector(pooled, images * channels, "pooled");
    p.gates = floats(gates), p.pooled_grad = floats(pooled_grad), p.partials = floats(partials);
    gradients.fill(p);
    launch_with_workspace(p, operands, here.device, "squeeze_excite_backward");
    const auto& g = gradients.all;
    return {g[0].take(), g[1].take(), g[2].take(), g[3].take(), gates, pooled_grad, partials};
}

// The tensors of a normalisation with constant statistics, or of a bias.
struct Constants {
    const Optional &gamma, &beta, &mean, &var;
    double eps;

    cuda::ConstantNorm as_floats(Operands& operands, int64_t channels, const char* name) const {
        STD_TORCH_CHECK(gamma.has_value() == (mean.has_value() && var.has_value()), name,
                        ": gamma, mean and var go together");
        return {operands.vector(gamma, channels, name), operands.vector(beta, channels, name),
                operands.vector(mean, channels, name), operands.vector(var, channels, name), float(eps)};
    }
};

// A block's expansion and convolution without pointers.
cuda::ExpandDepthwise expand_depthwise_problem(const Tensor& x, const Tensor& expand_weight,
                                               const Tensor& depthwise_weight, int64_t stride, const Ints& padding,
                                               bool pool) {
    STD_TORCH_CHECK(x.dim() == 4 && expand_weight.dim() == 4 && expand_weight.size(1) == x.size(1),
                    "x must be (N, Cin, H, W) and expand_weight (C, Cin, 1, 1)");
    cuda::ExpandDepthwise p{};
    p.dtype = kernel_dtype(x), p.in_channels = x.size(1);
    Ints expanded = sizes_of(x);
    expanded[1] = expand_weight.size(0);
    p.shape = depthwise_shape(expanded, depthwise_weight, stride, padding, true);
    p.pool = pool ? later : nullptr;
    return p;
}

bool expand_depthwise_fits(const Tensor& x, const Tensor& expand_weight, const Tensor& depthwise_weight, int64_t stride,
                           const Ints& padding, bool pool) {
    const Here here(x);
    const auto problem = expand_depthwise_problem(x, expand_weight, depthwise_weight, stride, padding, pool);
    return cuda::plan(problem, here.device).why_not == nullptr;
}

using Two = std::tuple<Tensor, Tensor>;

// y (N, C, Ho, Wo), channels_last, and sums (N, parts, C) of it if pool.
Two expand_depthwise(const Tensor& x, const Tensor& expand_weight, const Optional& expand_gamma,
                     const Optional& expand_beta, const Optional& expand_mean, const Optional& expand_var,
                     double expand_eps, const Tensor& depthwise_weight, const Optional& depthwise_gamma,
                     const Optional& depthwise_beta, const Optional& depthwise_mean, const Optional& depthwise_var,
                     double depthwise_eps, int64_t stride, const Ints& padding, const std::string& activation,
                     bool pool) {
    const Here here(x);
    cuda::ExpandDepthwise p = expand_depthwise_problem(x, expand_weight, depthwise_weight, stride, padding, pool);
    p.activation = activation_of(activation);
    const cuda::Plan plan = covered(cuda::plan(p, here.device), "expand_depthwise");
    const cuda::DepthwiseShape& s = p.shape;
    const Tensor y = empty(x, output_size(s), x.scalar_type(), MemoryFormat::ChannelsLast);
    const int64_t parts = s.batch == 0 ? 0 : plan.parts;
    const Tensor sums = pool ? empty(x, {s.batch, parts, s.channels}, ScalarType::Float) : nothing(x);
    if (s.batch == 0) return {y, sums};

    Operands operands(x);
    p.x = operands.activation(x, sizes_of(x), true, "x");
    p.expand_weight = operands.product_weight(expand_weight, s.channels * p.in_channels, "expand_weight");
    p.depthwise_weight = operands.vector(depthwise_weight, depthwise_weight.numel(), "depthwise_weight");
    const Constants expand{expand_gamma, expand_beta, expand_mean, expand_var, expand_eps};
    const Constants depthwise{depthwise_gamma, depthwise_beta, depthwise_mean, depthwise_var, depthwise_eps};
    p.expand_norm = expand.as_floats(operands, s.channels, "expand's normalisation");
    p.depthwise_norm = depthwise.as_floats(operands, s.channels, "depthwise's normalisation");
    p.y = y.mutable_data_ptr(), p.pool = floats(sums);
    launch(p, plan, here.device, "expand_depthwise");
    return {y, sums};
}

// (N, Cout, H, W), channels_last.
Tensor gated_project(const Tensor& x, const Optional& gates, const Tensor& weight, const Optional& gamma,
                     const Optional& beta, const Optional& mean, const Optional& var, double eps,
                     const Optional& image_scale, const Optional& residual) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1),
                    "x must be (N, C, H, W) and weight (Cout, C, 1, 1)");
    const Here here(x);
    cuda::GatedProject p{};
    p.dtype = kernel_dtype(x);
    p.images = x.size(0), p.pixels = x.size(2) * x.size(3), p.channels = x.size(1), p.out_channels = weight.size(0);
    p.residual = residual.has_value() ? later : nullptr;
    const cuda::Plan plan = covered(cuda::plan(p, here.device), "gated_project");
    const Ints size{x.size(0), p.out_channels, x.size(2), x.size(3)};
    const Tensor y = empty(x, size, x.scalar_type(), MemoryFormat::ChannelsLast);
    if (y.numel() == 0) return y;

    Operands operands(x);
    p.x = operands.activation(x, sizes_of(x), true, "x");
    p.gates = operands.vector(gates, p.images * p.channels, "gates");
    p.weight = operands.product_weight(weight, p.out_channels * p.channels, "weight");
    const Constants norm{gamma, beta, mean, var, eps};
    p.norm = norm.as_floats(operands, p.out_channels, "the normalisation");
    p.image_scale = operands.vector(image_scale, p.images, "image_scale");
    p.residual = operands.activation(residual, size, true, "residual");
    p.y = y.mutable_data_ptr();
    launch(p, plan, here.device, "gated_project");
    return y;
}

}  // namespace
}  // namespace effnet

#define EFFNET_EXPORT extern "C" __attribute__((visibility("default")))

// What no operator has to do with, and needs no GPU: for `effnet-ops info`, and for the model by which
// benchmarks/gpu/choice.py compares backends.

#if !defined(EFFNET_EMULATED)
EFFNET_EXPORT const char* effnet_cuda_toolkit() { return EFFNET_CUDA_TOOLKIT; }
EFFNET_EXPORT const char* effnet_cuda_architectures() { return EFFNET_CUDA_ARCHITECTURES; }
#endif

namespace {

struct PlanRequest {
    int dtype, multiprocessors, major, minor, max_shared_bytes;
    effnet::cuda::Device device() const { return {0, multiprocessors, major, minor, max_shared_bytes, nullptr}; }
};

template <class Problem>
void answer(const Problem& problem, const PlanRequest& request, int64_t* found) {
    const effnet::cuda::Plan plan = effnet::cuda::plan(problem, request.device());
    found[0] = plan.read_bytes, found[1] = plan.launches, found[2] = plan.blocks;
    found[3] = int64_t(plan.workspace_bytes);
}

void* present() { return effnet::later; }

}  // namespace

// For a plain depthwise convolution or both its gradients: the activations' bytes that are read, launches, blocks, and
// bytes of workspace. size: batch, channels, height, width, out_height, out_width, kernel, stride, top, left.
EFFNET_EXPORT void effnet_cuda_depthwise_plan(const PlanRequest* request, const int64_t* size, bool backward,
                                              int64_t* found) {
    using namespace effnet::cuda;
    const DepthwiseShape shape{size[0],      size[1],      size[2],      size[3],      size[4], size[5],
                               int(size[6]), int(size[7]), int(size[8]), int(size[9]), true};
    if (backward) {
        DepthwiseBackward p{};
        p.shape = shape, p.dtype = DType(request->dtype), p.x = present(), p.dx = present();
        p.dw = static_cast<float*>(present());
        return answer(p, *request, found);
    }
    DepthwiseForward p{};
    p.shape = shape, p.dtype = DType(request->dtype);
    answer(p, *request, found);
}

// The same of squeeze-and-excitation from the tensor. size: images, pixels, channels, reduced.
EFFNET_EXPORT void effnet_cuda_squeeze_excite_plan(const PlanRequest* request, const int64_t* size, bool backward,
                                                   int64_t* found) {
    using namespace effnet::cuda;
    SqueezeExcite layer{};
    layer.images = size[0], layer.pixels = size[1], layer.channels = size[2], layer.reduced = size[3];
    if (backward) {
        SqueezeExciteBackward p{};
        p.layer = layer, p.dtype = DType(request->dtype);
        p.grad = p.x = p.dx = present();
        p.reduce_weight_grad = p.reduce_bias_grad = p.expand_weight_grad = p.expand_bias_grad =
            static_cast<float*>(present());
        return answer(p, *request, found);
    }
    SqueezeExciteForward p{};
    p.layer = layer, p.dtype = DType(request->dtype), p.x = p.y = present(), p.pooled = static_cast<float*>(present());
    answer(p, *request, found);
}

// The same of both halves of a block, with a gate. size: batch, in_channels, channels, out_channels, height, width,
// out_height, out_width, kernel, stride, top, left. found: four of each half.
EFFNET_EXPORT void effnet_cuda_mbconv_plan(const PlanRequest* request, const int64_t* size, bool residual,
                                           int64_t* found) {
    using namespace effnet::cuda;
    ExpandDepthwise first{};
    first.shape = {size[0],      size[2],      size[4],       size[5],       size[6], size[7],
                   int(size[8]), int(size[9]), int(size[10]), int(size[11]), true};
    first.in_channels = size[1], first.dtype = DType(request->dtype), first.pool = effnet::later;
    answer(first, *request, found);
    GatedProject second{};
    second.images = size[0], second.pixels = size[6] * size[7], second.channels = size[2];
    second.out_channels = size[3], second.dtype = first.dtype, second.residual = residual ? present() : nullptr;
    answer(second, *request, found + 4);
}

STABLE_TORCH_LIBRARY_IMPL(effnet_ops, EFFNET_DISPATCH_KEY, m) {
    m.impl("cuda_depthwise_forward", TORCH_BOX(&effnet::depthwise_forward));
    m.impl("cuda_depthwise_backward", TORCH_BOX(&effnet::depthwise_backward));
    m.impl("cuda_squeeze_excite_forward", TORCH_BOX(&effnet::squeeze_excite_forward));
    m.impl("cuda_squeeze_excite_backward", TORCH_BOX(&effnet::squeeze_excite_backward));
    m.impl("cuda_gates_forward", TORCH_BOX(&effnet::gates_forward));
    m.impl("cuda_gates_backward", TORCH_BOX(&effnet::gates_backward));
    m.impl("cuda_expand_depthwise_fits", TORCH_BOX(&effnet::expand_depthwise_fits));
    m.impl("cuda_expand_depthwise", TORCH_BOX(&effnet::expand_depthwise));
    m.impl("cuda_gated_project", TORCH_BOX(&effnet::gated_project));
}
