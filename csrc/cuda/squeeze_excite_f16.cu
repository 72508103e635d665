#include "squeeze_excite_launch.h"

namespace effnet::cuda {

template Plan plan_of<SqueezeExciteForwardKernels<__half>>(const SqueezeExciteForward&, const Device&);
template cudaError_t run_of<SqueezeExciteForwardKernels<__half>>(const SqueezeExciteForward&, const Plan&,
                                                                 const Device&);
template Plan plan_of<SqueezeExciteBackwardKernels<__half>>(const SqueezeExciteBackward&, const Device&);
template cudaError_t run_of<SqueezeExciteBackwardKernels<__half>>(const SqueezeExciteBackward&, const Plan&,
                                                                  const Device&);

}  // namespace effnet::cuda
