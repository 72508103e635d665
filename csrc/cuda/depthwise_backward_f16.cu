#include "depthwise_backward.h"

namespace effnet::cuda {

template Plan plan_of<BackwardKernels<__half>>(const DepthwiseBackward&, const Device&);
template cudaError_t run_of<BackwardKernels<__half>>(const DepthwiseBackward&, const Plan&, const Device&);

}  // namespace effnet::cuda
