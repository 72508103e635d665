// The entry points of depthwise convolution, by dtype.
#include "depthwise_launch.h"
#include "reduction.cuh"

namespace effnet::cuda {

const char* why_not(const DepthwiseForward& problem, const Device& device) { return why_not(problem.shape, device); }

Plan plan(const DepthwiseForward& problem, const Device& device) {
    if (problem.shape.batch == 0) return {1, 0, 0, 0, 0, 0, 0};
    return with_type(problem.dtype, [&](auto type) { return plan_forward<decltype(type)>(problem, device); });
}

cudaError_t run(const DepthwiseForward& problem, const Device& device) {
    if (problem.shape.batch == 0) return cudaSuccess;
    return with_type(problem.dtype, [&](auto type) { return run_forward<decltype(type)>(problem, device); });
}

const char* why_not(const DepthwiseBackward& problem, const Device& device) {
    // Tensors without elements may have no address.
    if (problem.shape.batch > 0 && problem.x == nullptr &&
        (problem.dw || problem.norm || problem.activation != Activation::none))
        return "x is missing";
    return why_not(problem.shape, device);
}

Plan plan(const DepthwiseBackward& problem, const Device& device) {
    if (problem.shape.batch == 0) return {1, 0, 0, 0, 0, 0, 0};
    return with_type(problem.dtype, [&](auto type) { return plan_backward<decltype(type)>(problem, device); });
}

cudaError_t run(const DepthwiseBackward& problem, const Device& device) {
    const DepthwiseShape& shape = problem.shape;
    if (shape.batch > 0)
        return with_type(problem.dtype, [&](auto type) { return run_backward<decltype(type)>(problem, device); });
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
