#include "mbconv_launch.h"

namespace effnet::cuda {

template Plan plan_of<ExpandDepthwiseKernels<__nv_bfloat16>>(const ExpandDepthwise&, const Device&);
template cudaError_t run_of<ExpandDepthwiseKernels<__nv_bfloat16>>(const ExpandDepthwise&, const Plan&, const Device&);
template Plan plan_of<GatedProjectKernels<__nv_bfloat16>>(const GatedProject&, const Device&);
template cudaError_t run_of<GatedProjectKernels<__nv_bfloat16>>(const GatedProject&, const Plan&, const Device&);

}  // namespace effnet::cuda
