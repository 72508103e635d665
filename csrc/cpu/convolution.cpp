// Dense convolution with packed weights, and with a module's.
#include "convolution.h"

#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void convolution_packed(const ConvolutionShape& s, const void* x, const void* weight, const void* bias,
                        Activation activation, void* y) {
    using A = Compute<T>;
    const Padded<A> shift(bias, s.out);
    const Finish<T> finish{static_cast<T*>(y), s.out, s.out, activation};
    const int64_t chunks = smaller(s.out_height, 4 * ceil_div(thread_count(), s.batch));
    with_terms<T>(s.pairs, [&](auto term) {
        using E = decltype(term);
        const Panels<E> panels{static_cast<const E*>(weight), s.kernel_h * s.kernel_w * term_count<E>(s.in), s.out};
        const DenseRows<T, E> dense(s, x);
        parallel_tasks(
            s.batch * chunks, [&] { return dense.ring(); },
            [&](int64_t task, auto& ring) {
                const int64_t image = task / chunks, chunk = task % chunks;
                dense.blocks(image, s.out_height * chunk / chunks, s.out_height * (chunk + 1) / chunks, ring,
                             [&](int64_t row, int64_t rows) {
                                 dense.multiply(ring, row, rows, (image * s.out_height + row) * s.out_width, panels,
                                                static_cast<const A*>(shift), finish, [](int64_t, int64_t) {});
                             });
            });
    });
}

template <class T>
void convolution_norm(const ConvolutionShape& s, const void* x, const ConvNorm& norm, bool weight_rows,
                      Activation activation, void* y) {
    using A = Compute<T>;
    const FoldedNorm<A> folded(s.out, norm);
    const Scratch<A> packed(Panels<A>::size(s.kernel_h * s.kernel_w * s.in, s.out));
    pack_convolution<A>(s, static_cast<const A*>(norm.weight), weight_rows, folded.scale(), static_cast<A*>(packed));
    convolution_packed<T>(s, x, static_cast<A*>(packed), folded.shift(), activation, y);
}

EFFNET_INSTANTIATE(convolution_packed)
EFFNET_INSTANTIATE(convolution_norm)

EFFNET_NAMESPACE_END
