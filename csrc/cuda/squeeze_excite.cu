// The entry points of squeeze-and-excitation, by dtype.
#include <algorithm>

#include "host.h"
#include "squeeze_excite.cuh"

namespace effnet::cuda {

// Defined in squeeze_excite_launch.h.
template <class T>
struct SqueezeExciteForwardKernels;
template <class T>
struct SqueezeExciteBackwardKernels;

namespace {

const char* why_not(const SqueezeExcite& layer, int64_t least_floats, const Device& device) {
    constexpr int64_t most = int64_t(1) << 31;
    if (device.major < 8) return "the kernels need compute capability 8.0 or higher";
    if (layer.channels * std::max<int64_t>(layer.pixels, 1) >= most) return "an image has 2^31 or more elements";
    if (layer.channels * layer.reduced >= most) return "a weight has 2^31 or more elements";
    if (least_floats * int64_t(sizeof(float)) > device.max_shared_bytes) return "too many channels for shared memory";
    return nullptr;
}

bool empty(const SqueezeExcite& layer) { return layer.images * layer.pixels * layer.channels == 0; }

const char* why_not(const SqueezeExciteForward& problem, const Device& device) {
    const SqueezeExcite& layer = problem.layer;
    if ((problem.x == nullptr) == (problem.sums == nullptr)) return "either x or sums is to be given";
    if (problem.y != nullptr && (problem.x == nullptr || problem.norm != nullptr))
        return "y needs x without a normalisation";
    return why_not(layer, layer.channels + layer.reduced, device);
}

const char* why_not(const SqueezeExciteBackward& problem, const Device& device) {
    const SqueezeExcite& layer = problem.layer;
    if ((problem.x == nullptr) == (problem.sums == nullptr)) return "either x or sums is to be given";
    if ((problem.x == nullptr) != (problem.grad == nullptr)) return "grad and x go together";
    if (problem.dx != nullptr && problem.x == nullptr) return "dx needs x";
    if (problem.sums != nullptr && problem.rows != 1 && problem.rows != 5) return "sums have 1 or 5 rows";
    if (problem.partials != nullptr && problem.rows != 5) return "partials need sums with 5 rows";
    return why_not(layer, 2 * layer.channels + 3 * layer.reduced + SqueezeExciteTraits::threads, device);
}

// Plans a problem with the kernels of its dtype.
template <template <class> class Kernels, class Problem>
Plan planned(const Problem& problem, const Device& device) {
    if (empty(problem.layer)) return Plan{nullptr, 1};
    if (const char* const reason = why_not(problem, device)) return Plan{reason};
    return with_type(problem.dtype, [&](auto type) { return plan_of<Kernels<decltype(type)>>(problem, device); });
}

template <template <class> class Kernels, class Problem>
cudaError_t launched(const Problem& problem, const Plan& plan, const Device& device) {
    return with_type(problem.dtype, [&](auto type) { return run_of<Kernels<decltype(type)>>(problem, plan, device); });
}

}  // namespace

Plan plan(const SqueezeExciteForward& problem, const Device& device) {
    return planned<SqueezeExciteForwardKernels>(problem, device);
}

Plan plan(const SqueezeExciteBackward& problem, const Device& device) {
    return planned<SqueezeExciteBackwardKernels>(problem, device);
}

cudaError_t run(const SqueezeExciteForward& problem, const Plan& plan, const Device& device) {
    return empty(problem.layer) ? cudaSuccess : launched<SqueezeExciteForwardKernels>(problem, plan, device);
}

cudaError_t run(const SqueezeExciteBackward& problem, const Plan& plan, const Device& device) {
    const SqueezeExcite& layer = problem.layer;
    if (!empty(layer)) return launched<SqueezeExciteBackwardKernels>(problem, plan, device);
    cudaError_t error = clear(problem.reduce_weight_grad, layer.reduced * layer.channels, device);
    if (error == cudaSuccess) error = clear(problem.reduce_bias_grad, layer.reduced, device);
    if (error == cudaSuccess) error = clear(problem.expand_weight_grad, layer.reduced * layer.channels, device);
    if (error == cudaSuccess) error = clear(problem.expand_bias_grad, layer.channels, device);
    return error;
}

}  // namespace effnet::cuda
