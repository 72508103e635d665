#include "depthwise_planes.h"

namespace effnet::cuda {

template Plan plan_planes<__nv_bfloat16>(const DepthwiseForward&, const Device&);
template Plan plan_planes<__nv_bfloat16>(const DepthwiseBackward&, const Device&);
template cudaError_t run_planes<__nv_bfloat16>(const DepthwiseForward&, const Device&);
template cudaError_t run_planes<__nv_bfloat16>(const DepthwiseBackward&, const Device&);

}  // namespace effnet::cuda
