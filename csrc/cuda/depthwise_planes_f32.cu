#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_planes<float>(const DepthwiseForward&, const Device&);
template Plan plan_planes<float>(const DepthwiseBackward&, const Device&);
template cudaError_t run_planes<float>(const DepthwiseForward&, const Device&);
template cudaError_t run_planes<float>(const DepthwiseBackward&, const Device&);

}  // namespace effnet::cuda
