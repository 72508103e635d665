// A dense convolution, its normalisation and activation in training. What is kept is x and what the normalisation
// reads.
//   forward    a = K * x with its statistics, then y = activation(norm(a)) in one walk
//   backward   the normalisation's sums in one walk, then K's gradient and that of x, each from the gradient of a,
//              which is made again where they read it
// And the normalisation and activation alone, behind a convolution that somebody else computes: a is x then.
#include "convolution_training.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// A pointwise convolution sees no rows: several short ones are one, which tiles of pixels divide better.
DenseLayer with_long_rows(DenseLayer layer) {
    ConvolutionShape& s = layer.shape;
    const bool pointwise = s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && s.height == s.out_height &&
                           s.width == s.out_width && s.channels_last;
    if (!pointwise) return layer;
    int64_t rows = larger(1, smaller(s.height, pixel_block / larger(1, s.width)));
    while (s.height % rows != 0) --rows;
    s.height /= rows, s.out_height /= rows, s.width *= rows, s.out_width *= rows;
    return layer;
}

template <class A>
NormVectors<A> norm_of(int64_t channels, const ConvNorm& norm, const BatchStatistics& batch) {
    const bool constant = batch.mean == nullptr;
    return NormVectors<A>(channels, norm, constant ? norm.mean : batch.mean, constant ? norm.var : batch.var);
}

int64_t pixels_of(const ConvolutionShape& s) { return s.batch * s.out_height * s.out_width; }

// The factor of each image that drop path sets.
template <class A>
class ImageScale {
  public:
    ImageScale() : scale_(nullptr), pixels_(1) {}
    explicit ImageScale(const DenseLayer& layer)
        : scale_(static_cast<const A*>(layer.drop_path)), pixels_(layer.shape.out_height * layer.shape.out_width) {}
    A operator()(int64_t pixel) const { return scale_ == nullptr ? A(1) : scale_[pixel / pixels_]; }
    const A* each() const { return scale_; }

  private:
    const A* scale_;
    int64_t pixels_;
};

// Channels whose pixels one task walks: a block of them stays in L1.
constexpr int64_t channel_group = 128;

// body(size, part, first pixel, count, c, n) for each block of a part's pixels and `size` vectors of channels from c
// on, of each of which n values exist; those of a part and a channel run in order on one thread.
template <class A, class Body>
void walk(const Reduction& reduction, int64_t channels, const Body& body) {
    const int64_t groups = ceil_div(channels, channel_group);
    parallel(reduction.parts * groups, [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task) {
            const int64_t part = task / groups, end = reduction.begin(part + 1), c = task % groups * channel_group;
            for (int64_t first = reduction.begin(part); first < end; first += reduction_block)
                for_each_vectors<A>(smaller(channel_group, channels - c), [&](auto size, int64_t i, int n) {
                    body(size, part, first, smaller(reduction_block, end - first), c + i, n);
                });
        }
    });
}

template <class T>
void finish(const Reduction& reduction, const NormVectors<Compute<T>>& norm, Activation activation, const T* a,
            const ImageScale<Compute<T>>& factor, const T* residual, T* y) {
    using A = Compute<T>;
    const int64_t channels = norm.channels;
    with_activation(activation, [&](auto kind) {
        walk<A>(reduction, channels, [&](auto size, int64_t, int64_t first, int64_t count, int64_t c, int n) {
            constexpr int N = decltype(size)::value;
            const HatColumns<A, N> columns(norm, c, n);
            for (int64_t p = first; p < first + count; ++p)
#pragma GCC unroll 2
                for (int i = 0; i < N; ++i) {
                    const int64_t at = p * channels + c + i * lanes<A>;
                    Vec<A> v = activate_as<T>(columns(i, load(a + at, n)), kind.value);
                    if (factor.each() != nullptr) v *= factor(p);
                    if (residual != nullptr) v += load(residual + at, n);
                    store(y + at, v, n);
                }
        });
    });
}

// The sums over the batch that the gradient of the normalisation needs, which are the gradients of its parameters.
template <class T>
void norm_sums(const Reduction& reduction, const NormVectors<Compute<T>>& norm, Activation activation, const T* grad,
               const T* a, const ImageScale<Compute<T>>& factor, const NormSums<Compute<T>>& to) {
    using A = Compute<T>;
    const int64_t channels = norm.channels;
    const PartialSums<A, 2> partial(reduction.parts, channels);
    with_activation(activation, [&](auto kind) {
        walk<A>(reduction, channels, [&](auto size, int64_t part, int64_t first, int64_t count, int64_t c, int n) {
            constexpr int N = decltype(size)::value;
            const HatColumns<A, N> columns(norm, c, n);
            Vec<A> shift[N] = {}, scale[N] = {};
            for (int64_t p = first; p < first + count; ++p)
#pragma GCC unroll 2
                for (int i = 0; i < N; ++i) {
                    const int64_t at = p * channels + c + i * lanes<A>;
                    const Vec<A> v = load(a + at, n);
                    const Activated<A> u = activate_with_slope<A>(columns(i, v), kind.value);
                    const Vec<A> t = load(grad + at, n) * factor(p) * u.slope;
                    shift[i] += t;
                    scale[i] += t * columns.hat(i, v);
                }
            for (int i = 0; i < N; ++i) {
                partial.add(part, 0, c + i * lanes<A>, n, shift[i]);
                partial.add(part, 1, c + i * lanes<A>, n, scale[i]);
            }
        });
    });
    partial.total(0, to.shift);
    partial.total(1, to.scale);
}

// The gradient of what the normalisation reads.
template <class T>
void norm_input_gradient(const Reduction& reduction, const NormVectors<Compute<T>>& norm, Activation activation,
                         const NormGradient<Compute<T>>& norm_gradient, const T* grad, const T* a, T* to) {
    using A = Compute<T>;
    const int64_t channels = norm.channels;
    with_activation(activation, [&](auto kind) {
        walk<A>(reduction, channels, [&](auto size, int64_t, int64_t first, int64_t count, int64_t c, int n) {
            constexpr int N = decltype(size)::value;
            const HatColumns<A, N> columns(norm, c, n);
            const auto gradient = norm_gradient.template columns<N>(c, n);
            for (int64_t p = first; p < first + count; ++p)
#pragma GCC unroll 2
                for (int i = 0; i < N; ++i) {
                    const int64_t at = p * channels + c + i * lanes<A>;
                    const Vec<A> v = load(a + at, n);
                    const Activated<A> u = activate_with_slope<A>(columns(i, v), kind.value);
                    store(to + at, gradient(i, load(grad + at, n) * u.slope, v), n);
                }
        });
    });
}

}  // namespace

template <class T>
void conv_norm_training(const DenseLayer& given, const void* x, void* y, void* convolved,
                        const BatchStatistics& statistics) {
    using A = Compute<T>;
    const DenseLayer layer = with_long_rows(given);
    const Buffer<T> own(convolved == nullptr ? pixels_of(layer.shape) * layer.shape.out : 0);
    T* const a = convolved == nullptr ? static_cast<T*>(own) : static_cast<T*>(convolved);
    convolve_dense(layer.shape, x, layer.conv.weight, a, statistics);
    const NormVectors<A> norm = norm_of<A>(layer.shape.out, layer.conv, statistics);
    const ImageScale<A> factor(layer);
    const T* const residual = layer.residual ? static_cast<const T*>(x) : nullptr;
    finish<T>(Reduction(pixels_of(layer.shape)), norm, layer.activation, a, factor, residual, static_cast<T*>(y));
}

template <class T>
void conv_norm_backward(const DenseLayer& given, const void* grad, const void* x, const void* convolved,
                        const BatchStatistics& statistics, void* grad_x, const ConvNormGrads& grads) {
    using A = Compute<T>;
    const DenseLayer layer = with_long_rows(given);
    const ConvolutionShape& s = layer.shape;
    const Buffer<T> again(convolved == nullptr ? pixels_of(s) * s.out : 0);
    if (convolved == nullptr) convolve_dense<T>(s, x, layer.conv.weight, again, {});
    const T* const above = static_cast<const T*>(grad);
    const T* const a = convolved == nullptr ? static_cast<T*>(again) : static_cast<const T*>(convolved);
    const NormVectors<A> norm = norm_of<A>(layer.shape.out, layer.conv, statistics);
    const NormSums<A> sums(s.out, grads);
    const ImageScale<A> factor(layer);
    const bool batch = statistics.mean != nullptr;
    if (batch || grads.gamma != nullptr || grads.beta != nullptr)
        norm_sums<T>(Reduction(pixels_of(s)), norm, layer.activation, above, a, factor, sums);
    const NormGradient<A> norm_gradient(norm, statistics, pixels_of(s), sums);
    const StageGradient<T, T> gradient{layer.activation, s.out_height, s.out_width,  a, above, norm, norm_gradient,
                                       nullptr,          nullptr,      factor.each()};
    dense_gradients<T>(s, layer.conv.weight, gradient, x, layer.residual ? above : nullptr, grads.weight, grad_x);
}

template <class T>
void norm_training(const NormShape& s, const void* x, const ConvNorm& given, Activation activation, void* y,
                   const BatchStatistics& statistics) {
    using A = Compute<T>;
    const T* const a = static_cast<const T*>(x);
    const Reduction reduction(s.batch * s.pixels);
    const Moments<A> moments(reduction.parts, s.channels, statistics);
    if (moments.wanted)
        walk<A>(reduction, s.channels, [&](auto size, int64_t part, int64_t first, int64_t count, int64_t c, int n) {
            moments.add(part, first - reduction.begin(part), count, a + first * s.channels + c, s.channels, c,
                        (size.value - 1) * lanes<A> + n);
        });
    moments.merge([&](int64_t part) { return reduction.begin(part + 1) - reduction.begin(part); });
    const NormVectors<A> norm = norm_of<A>(s.channels, given, statistics);
    finish<T>(reduction, norm, activation, a, ImageScale<A>(), nullptr, static_cast<T*>(y));
}

template <class T>
void norm_backward(const NormShape& s, const void* grad, const void* x, const ConvNorm& given, Activation activation,
                   const BatchStatistics& statistics, void* grad_x, const ConvNormGrads& grads) {
    using A = Compute<T>;
    const T *const above = static_cast<const T*>(grad), *const a = static_cast<const T*>(x);
    const Reduction reduction(s.batch * s.pixels);
    const NormVectors<A> norm = norm_of<A>(s.channels, given, statistics);
    const NormSums<A> sums(s.channels, grads);
    if ((statistics.mean != nullptr && grad_x != nullptr) || grads.gamma != nullptr || grads.beta != nullptr)
        norm_sums<T>(reduction, norm, activation, above, a, ImageScale<A>(), sums);
    if (grad_x == nullptr) return;
    const NormGradient<A> norm_gradient(norm, statistics, reduction.pixels, sums);
    norm_input_gradient<T>(reduction, norm, activation, norm_gradient, above, a, static_cast<T*>(grad_x));
}

EFFNET_INSTANTIATE(conv_norm_training)
EFFNET_INSTANTIATE(conv_norm_backward)
EFFNET_INSTANTIATE(norm_training)
EFFNET_INSTANTIATE(norm_backward)

EFFNET_NAMESPACE_END
