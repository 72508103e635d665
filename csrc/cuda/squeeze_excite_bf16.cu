#include "squeeze_excite_launch.h"

namespace effnet::cuda {

template Plan plan_squeeze_excite<__nv_bfloat16>(const SqueezeExciteForward&, const Device&);
template Plan plan_squeeze_excite<__nv_bfloat16>(const SqueezeExciteBackward&, const Device&);
template cudaError_t run_squeeze_excite<__nv_bfloat16>(const SqueezeExciteForward&, const Device&);
template cudaError_t run_squeeze_excite<__nv_bfloat16>(const SqueezeExciteBackward&, const Device&);

}  // namespace effnet::cuda
