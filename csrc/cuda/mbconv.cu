// The entry points of both halves of a block, by dtype.
#include <algorithm>

#include "host.h"

namespace effnet::cuda {

// Defined in mbconv_launch.h.
template <class T>
struct ExpandDepthwiseKernels;
template <class T>
struct GatedProjectKernels;

namespace {

constexpr int64_t most = int64_t(1) << 31;

const char* why_not(const ExpandDepthwise& problem, const Device& device) {
    const DepthwiseShape& shape = problem.shape;
    if (device.major < 8) return "the kernels need compute capability 8.0 or higher";
    if (shape.kernel != 3 && shape.kernel != 5) return "kernels are 3x3 or 5x5";
    if (shape.stride != 1 && shape.stride != 2) return "strides are 1 or 2";
    if (!shape.channels_last) return "activations are channels_last";
    // A tile hangs over by less than 128 pixels.
    const int64_t rows = std::max(shape.height, shape.out_height * shape.stride) + shape.pad_top + 128;
    const int64_t columns = std::max(shape.width, shape.out_width * shape.stride) + shape.pad_left + 128;
    if (rows * columns * std::max<int64_t>(problem.in_channels, 8) >= most) return "an image has 2^31 or more elements";
    if (shape.batch * shape.out_height * shape.out_width * ((shape.channels + 31) / 32) >= most)
        return "the batch has 2^31 or more pixels";
    if (shape.channels >= most / 64) return "there are too many channels";
    return nullptr;
}

const char* why_not(const GatedProject& problem, const Device& device) {
    if (device.major < 8) return "the kernels need compute capability 8.0 or higher";
    if (problem.images * problem.pixels >= most / 2) return "the batch has 2^30 or more pixels";
    if (problem.channels >= most / 64 || problem.out_channels >= most / 64) return "there are too many channels";
    return nullptr;
}

bool empty(const ExpandDepthwise& problem) { return problem.shape.batch == 0; }
bool empty(const GatedProject& problem) { return problem.images * problem.pixels * problem.out_channels == 0; }

// Plans a problem with the kernels of its dtype.
template <template <class> class Kernels, class Problem>
Plan planned(const Problem& problem, const Device& device) {
    if (const char* const reason = why_not(problem, device)) return Plan{reason};
    if (empty(problem)) return Plan{nullptr, 1};
    return with_type(problem.dtype, [&](auto type) { return plan_of<Kernels<decltype(type)>>(problem, device); });
}

template <template <class> class Kernels, class Problem>
cudaError_t launched(const Problem& problem, const Plan& plan, const Device& device) {
    if (empty(problem)) return cudaSuccess;
    return with_type(problem.dtype, [&](auto type) { return run_of<Kernels<decltype(type)>>(problem, plan, device); });
}

}  // namespace

Plan plan(const ExpandDepthwise& problem, const Device& device) {
    return planned<ExpandDepthwiseKernels>(problem, device);
}

Plan plan(const GatedProject& problem, const Device& device) { return planned<GatedProjectKernels>(problem, device); }

cudaError_t run(const ExpandDepthwise& problem, const Plan& plan, const Device& device) {
    return launched<ExpandDepthwiseKernels>(problem, plan, device);
}

cudaError_t run(const GatedProject& problem, const Plan& plan, const Device& device) {
    return launched<GatedProjectKernels>(problem, plan, device);
}

}  // namespace effnet::cuda
