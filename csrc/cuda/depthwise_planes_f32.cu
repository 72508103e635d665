#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_of<PlanesForwardKernels<float>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<PlanesForwardKernels<float>>(const DepthwiseForward&, const Plan&, const Device&);
template Plan plan_of<PlanesBackwardKernels<float>>(const DepthwiseBackward&, const Device&);
template cudaError_t run_of<PlanesBackwardKernels<float>>(const DepthwiseBackward&, const Plan&, const Device&);

}  // namespace effnet::cuda
