#include "depthwise_backward.h"

namespace effnet::cuda {

template Plan plan_backward<__half>(const DepthwiseBackward&, const Device&);
template cudaError_t run_backward<__half>(const DepthwiseBackward&, const Device&);

}  // namespace effnet::cuda
