#include "depthwise_backward.h"

namespace effnet::cuda {

template Plan plan_of<BackwardKernels<float>>(const DepthwiseBackward&, const Device&);
template cudaError_t run_of<BackwardKernels<float>>(const DepthwiseBackward&, const Plan&, const Device&);

}  // namespace effnet::cuda
