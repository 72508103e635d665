#include "squeeze_excite_launch.h"

namespace effnet::cuda {

template Plan plan_squeeze_excite<float>(const SqueezeExciteForward&, const Device&);
template Plan plan_squeeze_excite<float>(const SqueezeExciteBackward&, const Device&);
template cudaError_t run_squeeze_excite<float>(const SqueezeExciteForward&, const Device&);
template cudaError_t run_squeeze_excite<float>(const SqueezeExciteBackward&, const Device&);

}  // namespace effnet::cuda
