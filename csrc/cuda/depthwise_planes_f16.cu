#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_of<PlanesForwardKernels<__half>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<PlanesForwardKernels<__half>>(const DepthwiseForward&, const Plan&, const Device&);
template Plan plan_of<PlanesBackwardKernels<__half>>(const DepthwiseBackward&, const Device&);
template cudaError_t run_of<PlanesBackwardKernels<__half>>(const DepthwiseBackward&, const Plan&, const Device&);

}  // namespace effnet::cuda
