#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void pointwise(const PointwiseShape& s, const void* x, const void* weight, const void* bias, const void* residual,
               Activation activation, void* y) {
    using A = Compute<T>;
    const Buffer<A> packed = pack(static_cast<const A*>(weight), s.in, 1, s.out, s.in);
    Epilogue<T> epilogue;
    epilogue.out = static_cast<T*>(y);
    epilogue.channels = s.out;
    epilogue.shift = static_cast<const A*>(bias);
    epilogue.activation = activation;
    epilogue.residual = static_cast<const T*>(residual);
    product(s.batch * s.pixels, Source<T>({x}, s.in, s.pixels), packed, s.out, epilogue);
}

template <class T>
void pointwise_backward(const PointwiseShape& s, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation activation, void* grad_x, void* grad_weight, void* grad_bias) {
    using A = Compute<T>;
    const int64_t pixels = s.batch * s.pixels;
    const Source<T> input({x}, s.in, s.pixels);
    const A* const w = static_cast<const A*>(weight);
    const Source<T> grad_y({grad}, s.out, s.pixels);
    Buffer<A> own(grad_y.direct() && activation == Activation::none ? 0 : pixels * s.out);
    const A* g = own;
    if (activation != Activation::none) {
        // The pre-activation is recomputed: only the inputs were saved.
        const Buffer<A> packed = pack(w, s.in, 1, s.out, s.in);
        Epilogue<A> pre;
        pre.out = own;
        pre.channels = s.out;
        pre.shift = static_cast<const A*>(bias);
        product(pixels, input, packed, s.out, pre);
        activation_backward(pixels * s.out, static_cast<const T*>(grad), own, activation);
    } else if (grad_y.direct()) {
        g = static_cast<const A*>(grad);
    } else {
        widen(pixels * s.out, static_cast<const T*>(grad), static_cast<A*>(own));
    }
    if (grad_x != nullptr) {
        const Buffer<A> packed = pack(w, 1, s.in, s.in, s.out);
        Epilogue<T> epilogue;
        epilogue.out = static_cast<T*>(grad_x);
        epilogue.channels = s.in;
        product(pixels, Source<A>({g}, s.out, s.pixels), packed, s.in, epilogue);
    }
    if (grad_weight != nullptr) weight_gradient(pixels, g, s.out, input, static_cast<A*>(grad_weight));
    if (grad_bias != nullptr) column_sums(pixels, s.out, g, static_cast<A*>(grad_bias));
}

EFFNET_INSTANTIATE(pointwise)
EFFNET_INSTANTIATE(pointwise_backward)

EFFNET_NAMESPACE_END
