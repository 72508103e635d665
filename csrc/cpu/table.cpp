#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
constexpr Kernels kernels_of() {
    return {depthwise<T>,          depthwise_backward<T>, pointwise<T>,
            pointwise_backward<T>, squeeze_excite<T>,     squeeze_excite_backward<T>,
            mbconv_inference<T>,   mbconv_training<T>,    mbconv_backward<T>};
}

extern const Kernels table[4];
const Kernels table[4] = {kernels_of<float>(), kernels_of<double>(), kernels_of<bfloat16>(), kernels_of<float16>()};

EFFNET_NAMESPACE_END
