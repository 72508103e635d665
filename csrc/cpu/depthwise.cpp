#include "table.h"
#include "transpose.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void depthwise(const DepthwiseShape& s, const void* x, const void* weight, const void* bias, Activation activation,
               void* y) {
    using A = Compute<T>;
    Epilogue<T> epilogue;
    epilogue.out = static_cast<T*>(y);
    epilogue.channels = s.channels;
    epilogue.shift = static_cast<const A*>(bias);
    epilogue.activation = activation;
    depthwise_forward(s, Source<T>({x}, s.channels, s.height * s.width), static_cast<const A*>(weight), epilogue);
}

// Rows of a slab are turned to channels-last as they are staged, and back as they leave: no tensor is converted as a
// whole.
template <class T>
void depthwise_contiguous(const DepthwiseShape& s, const void* x, const void* weight, const void* bias,
                          Activation activation, void* y) {
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    const int64_t plane_in = s.height * s.width, plane_out = s.out_height * s.out_width;
    Epilogue<T> epilogue;
    epilogue.shift = static_cast<const T*>(bias);
    epilogue.activation = activation;
    const bool bare = epilogue.direct();
    depthwise_rows<T>(
        s, static_cast<const T*>(weight),
        [=](int64_t image, int64_t row, int64_t c, int64_t n, T* staged) {
            transpose(n, s.width, from + (image * s.channels + c) * plane_in + row * s.width, plane_in, staged,
                      slab<T>);
        },
        [=](int64_t image, int64_t row, int64_t c, int64_t n, T* values) {
            if (!bare) epilogue.in_place(s.out_width, c, n, values, slab<T>);
            transpose(s.out_width, n, values, slab<T>, to + (image * s.channels + c) * plane_out + row * s.out_width,
                      plane_out);
        });
}

template <class T>
void depthwise_backward(const DepthwiseShape& s, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation activation, void* grad_x, void* grad_weight, void* grad_bias) {
    using A = Compute<T>;
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    const Source<T> input({x}, s.channels, s.height * s.width), grad_y({grad}, s.channels, 1);
    const A* const w = static_cast<const A*>(weight);
    Buffer<A> own(grad_y.direct() && activation == Activation::none ? 0 : pixels * s.channels);
    const A* g = own;
    if (activation != Activation::none) {
        // The pre-activation is recomputed: only the inputs were saved.
        Epilogue<A> pre;
        pre.out = own;
        pre.channels = s.channels;
        pre.shift = static_cast<const A*>(bias);
        depthwise_forward(s, input, w, pre);
        activation_backward(pixels * s.channels, static_cast<const T*>(grad), own, activation);
    } else if (grad_y.direct()) {
        g = static_cast<const A*>(grad);
    } else {
        widen(pixels * s.channels, static_cast<const T*>(grad), static_cast<A*>(own));
    }
    if (grad_x != nullptr || grad_weight != nullptr)
        depthwise_gradients(s, g, input, w, static_cast<T*>(grad_x), static_cast<A*>(grad_weight));
    if (grad_bias != nullptr) column_sums(pixels, s.channels, g, static_cast<A*>(grad_bias));
}

EFFNET_INSTANTIATE(depthwise)
EFFNET_INSTANTIATE(depthwise_backward)
template decltype(depthwise_contiguous<float>) depthwise_contiguous<float>;
template decltype(depthwise_contiguous<double>) depthwise_contiguous<double>;

EFFNET_NAMESPACE_END
