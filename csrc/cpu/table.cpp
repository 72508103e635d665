#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
constexpr Kernels kernels_of() {
    Kernels kernels{};
    kernels.transpose = transpose_images<T>;
    kernels.depthwise = depthwise<T>;
    kernels.depthwise_backward = depthwise_backward<T>;
    kernels.pointwise = pointwise<T>;
    kernels.pointwise_packed = pointwise_packed<T>;
    kernels.convolution_packed = convolution_packed<T>;
    kernels.convolution_norm = convolution_norm<T>;
    kernels.pointwise_norm = pointwise_norm<T>;
    kernels.batch_norm = batch_norm<T>;
    kernels.pointwise_backward = pointwise_backward<T>;
    kernels.average_pool = average_pool<T>;
    kernels.squeeze_excite = squeeze_excite<T>;
    kernels.squeeze_excite_backward = squeeze_excite_backward<T>;
    kernels.mbconv_inference = mbconv_inference<T>;
    kernels.mbconv_packed = mbconv_packed<T>;
    kernels.fused_mbconv_inference = fused_mbconv_inference<T>;
    kernels.fused_mbconv_packed = fused_mbconv_packed<T>;
    kernels.sequence = sequence<T>;
    kernels.mbconv_training = mbconv_training<T>;
    kernels.mbconv_backward = mbconv_backward<T>;
    kernels.norm_training = norm_training<T>;
    kernels.norm_backward = norm_backward<T>;
    kernels.conv_norm_training = conv_norm_training<T>;
    kernels.conv_norm_backward = conv_norm_backward<T>;
    kernels.fused_mbconv_training = fused_mbconv_training<T>;
    kernels.fused_mbconv_backward = fused_mbconv_backward<T>;
    if constexpr (sizeof(T) == sizeof(Compute<T>)) {
        kernels.depthwise_contiguous = depthwise_contiguous<T>;
        kernels.pointwise_contiguous = pointwise_contiguous<T>;
    }
    return kernels;
}

extern const Kernels table[4];
const Kernels table[4] = {kernels_of<float>(), kernels_of<double>(), kernels_of<bfloat16>(), kernels_of<float16>()};

EFFNET_NAMESPACE_END
