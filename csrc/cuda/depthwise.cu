// The entry points of depthwise convolution, by dtype and layout.
#include "depthwise_launch.h"
#include "reduction.cuh"

namespace effnet::cuda {

namespace {

// Elements of one image's channel, of all the activations that are read, and of those that are written.
struct Elements {
    int64_t read, written;
};

Elements elements_of(const DepthwiseForward& problem) {
    const DepthwiseShape& shape = problem.shape;
    const int64_t x = shape.height * shape.width, y = shape.out_height * shape.out_width;
    return {x + (problem.grad ? y : 0), y};
}

Elements elements_of(const DepthwiseBackward& problem) {
    const DepthwiseShape& shape = problem.shape;
    const int64_t x = shape.height * shape.width, y = shape.out_height * shape.out_width;
    return {y * (problem.a ? 2 : 1) + x * ((problem.x != nullptr) + (problem.residual != nullptr)), problem.dx ? x : 0};
}

// A copy reads and writes each activation once, beside what the kernel reads and writes then. What no kernel of either
// layout covers is not copied.
template <class Problem>
bool copies_are_better(const Problem& problem, const Plan& direct, const Device& device) {
    const DepthwiseShape& shape = problem.shape;
    if (shape.batch == 0 || why_not(shape, device) != nullptr) return false;
    const Elements elements = elements_of(problem);
    const int64_t planes = shape.batch * shape.channels, bytes = problem.dtype == DType::f32 ? 4 : 2;
    return direct.why_not != nullptr || direct.read_bytes > planes * bytes * (3 * elements.read + 2 * elements.written);
}

// Plans a problem with the kernels of its dtype and layout.
template <template <class> class Pixels, template <class> class Planes, class Problem>
Plan planned(const Problem& problem, const Device& device) {
    if (problem.shape.batch == 0) return Plan{why_not(problem.shape, device), 1};
    if (const char* const reason = why_not(problem.shape, device)) return Plan{reason};
    return with_type(problem.dtype, [&](auto type) {
        using T = decltype(type);
        return problem.shape.channels_last ? plan_of<Pixels<T>>(problem, device) : plan_of<Planes<T>>(problem, device);
    });
}

template <template <class> class Pixels, template <class> class Planes, class Problem>
cudaError_t launched(const Problem& problem, const Plan& plan, const Device& device) {
    return with_type(problem.dtype, [&](auto type) {
        using T = decltype(type);
        return problem.shape.channels_last ? run_of<Pixels<T>>(problem, plan, device)
                                           : run_of<Planes<T>>(problem, plan, device);
    });
}

}  // namespace

bool wants_copies(const DepthwiseForward& problem, const Plan& direct, const Device& device) {
    return copies_are_better(problem, direct, device);
}

bool wants_copies(const DepthwiseBackward& problem, const Plan& direct, const Device& device) {
    return copies_are_better(problem, direct, device);
}

Plan plan(const DepthwiseForward& problem, const Device& device) {
    return planned<ForwardKernels, PlanesForwardKernels>(problem, device);
}

Plan plan(const DepthwiseBackward& problem, const Device& device) {
    // Tensors without elements may have no address.
    if (problem.shape.batch > 0 && problem.x == nullptr &&
        (problem.dw || problem.norm || problem.activation != Activation::none))
        return Plan{"x is missing"};
    return planned<BackwardKernels, PlanesBackwardKernels>(problem, device);
}

cudaError_t run(const DepthwiseForward& problem, const Plan& plan, const Device& device) {
    if (problem.shape.batch == 0) return cudaSuccess;
    return launched<ForwardKernels, PlanesForwardKernels>(problem, plan, device);
}

cudaError_t run(const DepthwiseBackward& problem, const Plan& plan, const Device& device) {
    const DepthwiseShape& shape = problem.shape;
    if (shape.batch > 0) return launched<BackwardKernels, PlanesBackwardKernels>(problem, plan, device);
    cudaError_t error = clear(problem.dw, shape.channels * shape.kernel * shape.kernel, device);
    if (error == cudaSuccess) error = clear(problem.db, shape.channels, device);
    if (error == cudaSuccess) error = clear(problem.sums, 2 * shape.channels, device);
    return error;
}

cudaError_t sum_partials(const DepthwiseBackward& problem, int walkers, const Device& device) {
    const int channels = int(problem.shape.channels), rows = partial_rows(problem);
    const int taps = problem.dw == nullptr ? 0 : problem.shape.kernel * problem.shape.kernel;
    constexpr int threads = 32 * sum_partials_warps;
    return launch<sum_partials_kernel>(
        dim3(unsigned(rows * ceil_div(channels, 32))), threads, int(threads * sizeof(float)), device.stream,
        static_cast<const float*>(problem.workspace), walkers, rows, channels, problem.dw, taps, problem.db);
}

}  // namespace effnet::cuda
