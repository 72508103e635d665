#include "depthwise_forward.h"

namespace effnet::cuda {

template Plan plan_of<ForwardKernels<__nv_bfloat16>>(const DepthwiseForward&, const Device&);
template cudaError_t run_of<ForwardKernels<__nv_bfloat16>>(const DepthwiseForward&, const Plan&, const Device&);

}  // namespace effnet::cuda
