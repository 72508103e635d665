// The kernels of one instruction set, as templates over the storage type; each is defined in the file of its word.
#pragma once

#include "batch_norm.h"
#include "depthwise.h"
#include "packed.h"
#include "product.h"
#include "squeeze_excite.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void transpose_images(int64_t images, int64_t rows, int64_t columns, const void* from, void* to);
template <class T>
void depthwise(const DepthwiseShape&, const void* x, const void* weight, const void* bias, Activation, void* y);
template <class T>
void depthwise_contiguous(const DepthwiseShape&, const void* x, const void* weight, const void* bias, Activation,
                          void* y);
template <class T>
void depthwise_backward(const DepthwiseShape&, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation, void* grad_x, void* grad_weight, void* grad_bias);
template <class T>
void pointwise(const PointwiseShape&, const void* x, const void* weight, const void* bias, const void* residual,
               Activation, void* y);
template <class T>
void pointwise_packed(const PointwiseShape&, const void* x, const void* weight, const void* bias, const void* residual,
                      Activation, void* y);
template <class T>
void convolution_packed(const ConvolutionShape&, const void* x, const void* weight, const void* bias, Activation,
                        void* y);
template <class T>
void convolution_norm(const ConvolutionShape&, const void* x, const ConvNorm&, bool weight_rows, Activation, void* y);
template <class T>
void pointwise_norm(const PointwiseShape&, const void* x, const ConvNorm&, Activation, void* y);
template <class T>
void batch_norm(const NormShape&, const void* x, const ConvNorm&, Activation, void* y);
template <class T>
void pointwise_contiguous(const PointwiseShape&, const void* x, const void* weight, const void* bias,
                          const void* residual, Activation, void* y);
template <class T>
void pointwise_backward(const PointwiseShape&, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation, void* grad_x, void* grad_weight, void* grad_bias);
template <class T>
void average_pool(int64_t images, int64_t pixels, int64_t channels, const void* x, void* y);
template <class T>
void squeeze_excite(const SqueezeExciteShape&, const void* x, const SqueezeExciteParams&, void* y, void* pooled);
template <class T>
void squeeze_excite_backward(const SqueezeExciteShape&, const void* grad, const void* x, const void* pooled,
                             const SqueezeExciteParams&, void* grad_x, const SqueezeExciteGrads&);
template <class T>
void mbconv_inference(const Block&, const void* x, void* y);
template <class T>
void mbconv_packed(const PackedBlock&, const void* x, void* y);
template <class T>
void fused_mbconv_inference(const Block&, const void* x, void* y);
template <class T>
void fused_mbconv_packed(const PackedBlock&, const void* x, void* y);
template <class T>
void sequence(const Link* links, int64_t count, const void* x, void* y);
template <class T>
void mbconv_training(const Block&, const void* x, void* y, const BlockSaved&);
template <class T>
void mbconv_backward(const Block&, const void* grad, const void* x, const BlockSaved&, const BlockGrads&);
template <class T>
void conv_norm_training(const DenseLayer&, const void* x, void* y, void* convolved, const BatchStatistics&);
template <class T>
void conv_norm_backward(const DenseLayer&, const void* grad, const void* x, const void* convolved,
                        const BatchStatistics&, void* grad_x, const ConvNormGrads&);
template <class T>
void norm_training(const NormShape&, const void* x, const ConvNorm&, Activation, void* y, const BatchStatistics&);
template <class T>
void norm_backward(const NormShape&, const void* grad, const void* x, const ConvNorm&, Activation,
                   const BatchStatistics&, void* grad_x, const ConvNormGrads&);
template <class T>
void fused_mbconv_training(const Block&, const void* x, void* y, const BlockSaved&);
template <class T>
void fused_mbconv_backward(const Block&, const void* grad, const void* x, const BlockSaved&, const BlockGrads&);

EFFNET_NAMESPACE_END

#define EFFNET_INSTANTIATE(function)                          \
    template decltype(function<float>) function<float>;       \
    template decltype(function<double>) function<double>;     \
    template decltype(function<bfloat16>) function<bfloat16>; \
    template decltype(function<float16>) function<float16>;
