// Fused-MBConv in training: the steps of MBConv from F2 on, with a dense convolution in F2 and B4.
#include "convolution_training.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void fused_mbconv_training(const Block& block, const void* x, void* y, const BlockSaved& saved) {
    const DepthwiseShape& s = block.depthwise_shape;
    const Buffer<T> own(saved.convolved == nullptr ? s.batch * s.out_height * s.out_width * s.channels : 0);
    BlockSaved made = saved;
    if (made.convolved == nullptr) made.convolved = static_cast<T*>(own);
    mbconv_training<T>(block, x, y, made);
}

template <class T>
void fused_mbconv_backward(const Block& block, const void* grad, const void* x, const BlockSaved& saved,
                           const BlockGrads& grads) {
    if (saved.convolved != nullptr) return mbconv_backward<T>(block, grad, x, saved, grads);
    const DepthwiseShape& s = block.depthwise_shape;
    const Buffer<T> again(s.batch * s.out_height * s.out_width * s.channels);
    convolve_dense<T>(dense_shape(s, block.in), x, block.depthwise.weight, again, {});
    BlockSaved made = saved;
    made.convolved = static_cast<T*>(again);
    mbconv_backward<T>(block, grad, x, made, grads);
}

EFFNET_INSTANTIATE(fused_mbconv_training)
EFFNET_INSTANTIATE(fused_mbconv_backward)

EFFNET_NAMESPACE_END
