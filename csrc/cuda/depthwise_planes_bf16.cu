#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_of<PlanesForwardKernels<__nv_bfloat16>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<PlanesForwardKernels<__nv_bfloat16>>(const DepthwiseForward&, const Plan&, const Device&);
template Plan plan_of<PlanesBackwardKernels<__nv_bfloat16>>(const DepthwiseBackward&, const Device&);
template cudaError_t run_of<PlanesBackwardKernels<__nv_bfloat16>>(const DepthwiseBackward&, const Plan&, const Device&);

}  // namespace effnet::cuda
