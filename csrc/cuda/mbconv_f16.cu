#include "mbconv_launch.h"

namespace effnet::cuda {

template Plan plan_of<ExpandDepthwiseKernels<__half>>(const ExpandDepthwise&, const Device&);
template cudaError_t run_of<ExpandDepthwiseKernels<__half>>(const ExpandDepthwise&, const Plan&, const Device&);
template Plan plan_of<GatedProjectKernels<__half>>(const GatedProject&, const Device&);
template cudaError_t run_of<GatedProjectKernels<__half>>(const GatedProject&, const Plan&, const Device&);

}  // namespace effnet::cuda
