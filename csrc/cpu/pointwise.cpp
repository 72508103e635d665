#include "table.h"
#include "training.h"

EFFNET_NAMESPACE_BEGIN

// The product with its sides exchanged: the weights are the rows, and a panel of neighbouring pixels the columns, so
// that neither needs packing and the result is contiguous.
template <class T>
void pointwise_contiguous(const PointwiseShape& s, const void* x, const void* weight, const void* bias,
                          const void* residual, Activation activation, void* y) {
    constexpr int S = slab<T>;
    const T *const w = static_cast<const T*>(weight), *const b = static_cast<const T*>(bias);
    const int64_t panels = ceil_div(s.pixels, S);
    const bool bare = b == nullptr && residual == nullptr && activation == Activation::none;
    parallel(s.batch * panels, [&](int64_t begin, int64_t end) {
        const Buffer<T> columns(s.in * S), rows(epilogue_rows * S);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / panels, first = task % panels * S, n = smaller(S, s.pixels - first);
            const T* from = static_cast<const T*>(x) + image * s.in * s.pixels + first;
            for (int64_t k = 0; k < s.in; ++k)
                for (int64_t i = 0; i < n; i += lanes<T>)
                    store(columns + k * S + i, load(from + k * s.pixels + i, int(smaller(n - i, lanes<T>))));
            const int64_t at = image * s.out * s.pixels + first;
            T* const to = static_cast<T*>(y) + at;
            if (bare && n % lanes<T> == 0) {
                panel<false, T>(s.out, n, s.in, w, s.in, 1, columns, S, to, s.pixels);
                continue;
            }
            for (int64_t m = 0; m < s.out; m += epilogue_rows) {
                const int64_t count = smaller(epilogue_rows, s.out - m);
                panel<false, T>(count, n, s.in, w + m * s.in, s.in, 1, columns, S, rows, S);
                for (int64_t r = m; r < m + count; ++r)
                    for (int64_t i = 0; i < n; i += lanes<T>) {
                        const int valid = int(smaller(n - i, lanes<T>));
                        Vec<T> v = load(rows + (r - m) * S + i) + (b == nullptr ? T(0) : b[r]);
                        v = activate<T>(v, activation);
                        if (residual != nullptr)
                            v = v + load(static_cast<const T*>(residual) + at + r * s.pixels + i, valid);
                        store(to + r * s.pixels + i, v, valid);
                    }
            }
        }
    });
}

template <class T>
void pointwise_packed(const PointwiseShape& s, const void* x, const void* weight, const void* bias,
                      const void* residual, Activation activation, void* y) {
    using A = Compute<T>;
    using E = Term<T>;
    const Panels<E> panels{static_cast<const E*>(weight), term_count<E>(s.in), s.out};
    const Padded<A> shift(bias, s.out);
    const Finish<T> finish{static_cast<T*>(y), s.out, s.out, activation, static_cast<const T*>(residual)};
    multiply_blocks(s.batch * s.pixels, thread_count(), panels, static_cast<const A*>(shift), finish,
                    [&](int64_t block_rows) { return TermRows<T>(static_cast<const T*>(x), s.in, block_rows); });
}

template <class T>
void pointwise(const PointwiseShape& s, const void* x, const void* weight, const void* bias, const void* residual,
               Activation activation, void* y) {
    using E = Term<T>;
    const Scratch<E> packed(Panels<E>::size(s.in, s.out));
    pack_panels<E, Compute<T>>(static_cast<const Compute<T>*>(weight), s.in, s.out, nullptr, packed);
    pointwise_packed<T>(s, x, static_cast<E*>(packed), bias, residual, activation, y);
}

template <class T>
void pointwise_norm(const PointwiseShape& s, const void* x, const ConvNorm& norm, Activation activation, void* y) {
    using A = Compute<T>;
    using E = Term<T>;
    const FoldedNorm<A> folded(s.out, norm);
    const Scratch<E> packed(Panels<E>::size(s.in, s.out));
    pack_panels<E, A>(static_cast<const A*>(norm.weight), s.in, s.out, folded.scale(), packed);
    pointwise_packed<T>(s, x, static_cast<E*>(packed), folded.shift(), nullptr, activation, y);
}

template <class T>
void pointwise_backward(const PointwiseShape& s, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation activation, void* grad_x, void* grad_weight, void* grad_bias) {
    using A = Compute<T>;
    const int64_t pixels = s.batch * s.pixels;
    const Source<T> input(x, s.in), grad_y(grad, s.out);
    const A* const w = static_cast<const A*>(weight);
    Buffer<A> own(grad_y.direct() && activation == Activation::none ? 0 : pixels * s.out);
    const A* g = own;
    if (activation != Activation::none) {
        // The pre-activation is recomputed: only the inputs were saved.
        const Weights<A> weights = Weights<A>::rows(w, s.in, s.out);
        if (bias != nullptr) std::memcpy(weights.bias(), bias, size_t(s.out) * sizeof(A));
        weights.multiply(input, pixels, Finish<A>{own, s.out, s.out, Activation::none});
        activation_backward(pixels * s.out, static_cast<const T*>(grad), own, activation);
    } else if (grad_y.direct()) {
        g = static_cast<const A*>(grad);
    } else {
        widen(pixels * s.out, static_cast<const T*>(grad), static_cast<A*>(own));
    }
    if (grad_x != nullptr)
        Weights<A>::columns(w, s.out, s.in)
            .multiply(Source<A>(g, s.out), pixels, Finish<T>{static_cast<T*>(grad_x), s.in, s.in, Activation::none});
    if (grad_weight != nullptr) weight_gradient(pixels, g, s.out, input, static_cast<A*>(grad_weight));
    if (grad_bias != nullptr) column_sums(pixels, s.out, g, static_cast<A*>(grad_bias));
}

EFFNET_INSTANTIATE(pointwise)
EFFNET_INSTANTIATE(pointwise_packed)
EFFNET_INSTANTIATE(pointwise_norm)
EFFNET_INSTANTIATE(pointwise_backward)
template decltype(pointwise_contiguous<float>) pointwise_contiguous<float>;
template decltype(pointwise_contiguous<double>) pointwise_contiguous<double>;

EFFNET_NAMESPACE_END
