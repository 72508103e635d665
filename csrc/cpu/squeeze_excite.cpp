#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// A range of pixels cut at image boundaries: body(image, first pixel, count).
template <class Body>
inline void for_each_image(int64_t first, int64_t count, int64_t image_pixels, const Body& body) {
    for (int64_t image = first / image_pixels; count > 0; ++image) {
        const int64_t here = smaller(count, (image + 1) * image_pixels - first);
        body(image, first, here);
        first += here;
        count -= here;
    }
}

// to = from * scale[image][channel] + shift[image][channel]; shift may be null.
template <class T>
void scale_and_shift(const SqueezeExciteShape& s, const T* from, const Compute<T>* scale, const Compute<T>* shift,
                     T* to) {
    using A = Compute<T>;
    const int64_t pixels = s.batch * s.pixels, rows = 32;
    parallel(ceil_div(pixels, rows), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * rows;
        for_each_image(first, smaller(pixels, end * rows) - first, s.pixels,
                       [&](int64_t image, int64_t p0, int64_t count) {
                           const A *factor = scale + image * s.channels,
                                   *term = shift == nullptr ? nullptr : shift + image * s.channels;
                           for (int64_t at = p0 * s.channels; at < (p0 + count) * s.channels; at += s.channels)
                               for (int64_t c = 0; c < s.channels; c += lanes<A>) {
                                   const int n = int(smaller(lanes<A>, s.channels - c));
                                   Vec<A> v = load(from + at + c, n) * load(factor + c, n);
                                   if (term != nullptr) v = v + load(term + c, n);
                                   store(to + at + c, v, n);
                               }
                       });
    });
}

}  // namespace

template <class T>
void squeeze_excite(const SqueezeExciteShape& s, const void* x, const SqueezeExciteParams& params, void* y,
                    void* pooled) {
    using A = Compute<T>;
    A* const mean = static_cast<A*>(pooled);
    pool(s.batch, s.pixels, s.channels, static_cast<const T*>(x), mean);
    const Excitation<A> excitation(s, params, mean);
    scale_and_shift(s, static_cast<const T*>(x), static_cast<const A*>(excitation.gate), static_cast<const A*>(nullptr),
                    static_cast<T*>(y));
}

template <class T>
void squeeze_excite_backward(const SqueezeExciteShape& s, const void* grad, const void* x, const void* pooled,
                             const SqueezeExciteParams& params, void* grad_x, const SqueezeExciteGrads& grads) {
    using A = Compute<T>;
    const A* const mean = static_cast<const A*>(pooled);
    const T *const g = static_cast<const T*>(grad), *const from = static_cast<const T*>(x);
    const Excitation<A> excitation(s, params, mean);
    const Buffer<A> gate_gradient(s.batch * s.channels), pool_gradient(s.batch * s.channels);
    image_sums<A>(s.batch, s.pixels, s.channels, A(1), gate_gradient,
                  [&](int64_t first, int64_t count, int64_t c, int n) {
                      Vec<A> sum = {};
                      for (int64_t at = first * s.channels + c; count > 0; --count, at += s.channels)
                          sum += load(from + at, n) * load(g + at, n);
                      return sum;
                  });
    excitation_backward<A>(s, params, mean, excitation, gate_gradient, pool_gradient, grads);
    if (grad_x == nullptr) return;
    scale_and_shift(s, g, static_cast<const A*>(excitation.gate), static_cast<const A*>(pool_gradient),
                    static_cast<T*>(grad_x));
}

// Channels go to the threads by the same shares as the columns of the product before, which left them in its cache.
template <class T>
void average_pool(int64_t images, int64_t pixels, int64_t channels, const void* x, void* y) {
    using A = Compute<T>;
    constexpr int64_t L = lanes<A>, run = 64;
    const int64_t vectors = ceil_div(channels, L),
                  parts = smaller(vectors, ceil_div(thread_count(), larger(images, 1)));
    parallel_tasks(
        images * parts, [] { return 0; },
        [&](int64_t task, int) {
            const int64_t image = task / parts, part = task % parts;
            const T* const from = static_cast<const T*>(x) + image * pixels * channels;
            T* const to = static_cast<T*>(y) + image * channels;
            for (int64_t c = vectors * part / parts * L; c < smaller(channels, vectors * (part + 1) / parts * L);
                 c += L) {
                const int n = int(smaller(L, channels - c));
                // Runs are summed apart: rounding errors grow with the length of a sum.
                Vec<A> total = {};
                for (int64_t first = 0; first < pixels; first += run) {
                    Vec<A> sum = {};
                    for (int64_t p = first; p < smaller(pixels, first + run); ++p)
                        sum += load(from + p * channels + c, n);
                    total += sum;
                }
                store(to + c, total / A(pixels), n);
            }
        });
}

EFFNET_INSTANTIATE(average_pool)
EFFNET_INSTANTIATE(squeeze_excite)
EFFNET_INSTANTIATE(squeeze_excite_backward)

EFFNET_NAMESPACE_END
