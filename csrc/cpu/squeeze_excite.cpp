#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void squeeze_excite(const SqueezeExciteShape& s, const void* x, const SqueezeExciteParams& params, void* y,
                    void* pooled) {
    using A = Compute<T>;
    A* const mean = static_cast<A*>(pooled);
    pool(s.batch, s.pixels, Source<T>({x}, s.channels, s.pixels), mean);
    const Excitation<A> excitation(s, params, mean);
    Operand gated{x};
    gated.gate = excitation.gate;
    const Source<T> source(gated, s.channels, s.pixels);
    parallel_slabs<A>(s.batch, s.channels, [&](int64_t image, int64_t c0, int64_t width) {
        A values[slab<A>];
        for (int64_t p = image * s.pixels; p < (image + 1) * s.pixels; ++p) {
            source.stage(p, c0, width, values);
            for (int64_t i = 0; i < width; i += lanes<A>)
                store(static_cast<T*>(y) + p * s.channels + c0 + i, load(values + i),
                      int(smaller(width - i, lanes<A>)));
        }
    });
}

template <class T>
void squeeze_excite_backward(const SqueezeExciteShape& s, const void* grad, const void* x, const void* pooled,
                             const SqueezeExciteParams& params, void* grad_x, const SqueezeExciteGrads& grads) {
    using A = Compute<T>;
    const A* const mean = static_cast<const A*>(pooled);
    const T* const g = static_cast<const T*>(grad);
    const T* const in = static_cast<const T*>(x);
    const Excitation<A> excitation(s, params, mean);
    const Buffer<A> gate_gradient(s.batch * s.channels), pool_gradient(s.batch * s.channels);
    image_sums<A>(s.batch, s.pixels, s.channels, A(1), gate_gradient, [&](int64_t p, int64_t c, int n) {
        return load(g + p * s.channels + c, n) * load(in + p * s.channels + c, n);
    });
    excitation_backward<A>(s, params, mean, excitation, gate_gradient, pool_gradient, grads);
    if (grad_x == nullptr) return;
    parallel_slabs<A>(s.batch, s.channels, [&](int64_t image, int64_t c0, int64_t width) {
        for (int64_t c = c0; c < c0 + width; c += lanes<A>) {
            const int n = int(smaller(lanes<A>, c0 + width - c));
            const Vec<A> gate = load(excitation.gate + image * s.channels + c, n);
            const Vec<A> pool = load(pool_gradient + image * s.channels + c, n);
            for (int64_t p = image * s.pixels; p < (image + 1) * s.pixels; ++p)
                store(static_cast<T*>(grad_x) + p * s.channels + c, load(g + p * s.channels + c, n) * gate + pool, n);
        }
    });
}

EFFNET_INSTANTIATE(squeeze_excite)
EFFNET_INSTANTIATE(squeeze_excite_backward)

EFFNET_NAMESPACE_END
