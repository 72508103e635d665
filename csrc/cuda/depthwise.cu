// The entry points of depthwise convolution, by dtype.
#include "depthwise_launch.h"

namespace effnet::cuda {

const char* why_not(const DepthwiseForward& problem, const Device& device) { return why_not(problem.shape, device); }

Plan plan(const DepthwiseForward& problem, const Device& device) {
    if (problem.shape.batch == 0) return {1, 0, 0, 0, 0};
    return with_type(problem.dtype, [&](auto type) { return plan_forward<decltype(type)>(problem, device); });
}

cudaError_t run(const DepthwiseForward& problem, const Device& device) {
    if (problem.shape.batch == 0) return cudaSuccess;
    return with_type(problem.dtype, [&](auto type) { return run_forward<decltype(type)>(problem, device); });
}

}  // namespace effnet::cuda
