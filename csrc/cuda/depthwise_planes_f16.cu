#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_planes<__half>(const DepthwiseForward&, const Device&);
template Plan plan_planes<__half>(const DepthwiseBackward&, const Device&);
template cudaError_t run_planes<__half>(const DepthwiseForward&, const Device&);
template cudaError_t run_planes<__half>(const DepthwiseBackward&, const Device&);

}  // namespace effnet::cuda
