#include "depthwise_forward.h"

namespace effnet::cuda {

template Plan plan_forward<__half>(const DepthwiseForward&, const Device&);
template cudaError_t run_forward<__half>(const DepthwiseForward&, const Device&);

}  // namespace effnet::cuda
