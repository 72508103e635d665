#include "mbconv_launch.h"

namespace effnet::cuda {

template Plan plan_of<ExpandDepthwiseKernels<float>>(const ExpandDepthwise&, const Device&);
template cudaError_t run_of<ExpandDepthwiseKernels<float>>(const ExpandDepthwise&, const Plan&, const Device&);
template Plan plan_of<GatedProjectKernels<float>>(const GatedProject&, const Device&);
template cudaError_t run_of<GatedProjectKernels<float>>(const GatedProject&, const Plan&, const Device&);

}  // namespace effnet::cuda
