#include "depthwise_forward.h"

namespace effnet::cuda {

template Plan plan_of<ForwardKernels<__half>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<ForwardKernels<__half>>(const DepthwiseForward&, const Plan&, const Device&);

}  // namespace effnet::cuda
