#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
constexpr Kernels kernels_of(decltype(Kernels::pointwise_contiguous) contiguous) {
    return {transpose_images<T>, depthwise<T>,          depthwise_backward<T>, pointwise<T>,
            contiguous,          pointwise_backward<T>, squeeze_excite<T>,     squeeze_excite_backward<T>,
            mbconv_inference<T>, mbconv_training<T>,    mbconv_backward<T>};
}

extern const Kernels table[4];
const Kernels table[4] = {kernels_of<float>(pointwise_contiguous<float>),
                          kernels_of<double>(pointwise_contiguous<double>), kernels_of<bfloat16>(nullptr),
                          kernels_of<float16>(nullptr)};

EFFNET_NAMESPACE_END
