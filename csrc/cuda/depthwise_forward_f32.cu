#include "depthwise_forward.h"

namespace effnet::cuda {

template Plan plan_of<ForwardKernels<float>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<ForwardKernels<float>>(const DepthwiseForward&, const Plan&, const Device&);

}  // namespace effnet::cuda
