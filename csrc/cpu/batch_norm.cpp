// Normalisation with constant statistics and the activation behind it, in one pass over memory.
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// Pixels [first, last), pixel by pixel: memory is read and written in its order.
template <Activation KIND, class T>
void normalise_pixels(int64_t first, int64_t last, int64_t channels, const T* from, const Compute<T>* mean,
                      const Compute<T>* scale, const Compute<T>* shift, T* to) {
    using A = Compute<T>;
    constexpr int L = lanes<A>;
    const auto normalised = [&](Vec<A> v, int64_t c) {
        return activate_as<T>((v - load(mean + c)) * load(scale + c) + load(shift + c), KIND);
    };
    const int64_t whole = channels / L * L;
    const int rest = int(channels - whole);
    for (int64_t at = first * channels; at < last * channels; at += channels) {
        for (int64_t c = 0; c < whole; c += L) store(to + at + c, normalised(load(from + at + c), c));
        if (rest != 0) store(to + at + whole, normalised(load(from + at + whole, rest), whole), rest);
    }
}

// One channel's values of an image.
template <Activation KIND, class T>
void normalise_plane(int64_t count, const T* from, Compute<T> mean, Compute<T> scale, Compute<T> shift, T* to) {
    using A = Compute<T>;
    constexpr int L = lanes<A>;
    const auto normalised = [&](Vec<A> v) { return activate_as<T>((v - mean) * scale + shift, KIND); };
    int64_t i = 0;
    for (; i + L <= count; i += L) store(to + i, normalised(load(from + i)));
    if (const int rest = int(count - i); rest != 0) store(to + i, normalised(load(from + i, rest)), rest);
}

}  // namespace

template <class T>
void batch_norm(const NormShape& s, const void* x, const ConvNorm& norm, Activation activation, void* y) {
    using A = Compute<T>;
    const NormVectors<A> vectors(s.channels, norm, norm.mean, norm.var);
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    const int64_t rows = s.batch * (s.channels_last ? s.pixels : s.channels);
    const int64_t values = s.batch * s.pixels * s.channels;
    const int64_t tasks = smaller(rows, smaller(ceil_div(values, elementwise_grain), 8 * thread_count()));
    const Padded<A> mean(vectors.mean(), s.channels), scale(vectors.scale(), s.channels),
        shift(vectors.shift(), s.channels);
    with_activation(activation, [&](auto kind) {
        parallel_tasks(
            tasks, [] { return 0; },
            [&](int64_t task, int) {
                const int64_t first = rows * task / tasks, last = rows * (task + 1) / tasks;
                if (s.channels_last)
                    return normalise_pixels<kind.value>(first, last, s.channels, from, static_cast<const A*>(mean),
                                                        static_cast<const A*>(scale), static_cast<const A*>(shift), to);
                for (int64_t row = first; row < last; ++row) {
                    const int64_t c = row % s.channels;
                    normalise_plane<kind.value>(s.pixels, from + row * s.pixels, mean[c], scale[c], shift[c],
                                                to + row * s.pixels);
                }
            });
    });
}

EFFNET_INSTANTIATE(batch_norm)

EFFNET_NAMESPACE_END
