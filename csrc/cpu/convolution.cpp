// Dense convolution of an image with few channels, such as a network's first layer: the pixels that one filter row sees
// are neighbours in memory, so the convolution is a product with a segment for each filter row and no matrix is built.
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// Row `row` of an image as [width][channels] in the compute type.
template <class T>
void stage_image_row(const ConvolutionShape& s, const T* image, int64_t row, Compute<T>* to) {
    using A = Compute<T>;
    const int64_t values = s.width * s.in;
    if (s.channels_last) {
        const T* from = image + row * values;
        for (int64_t i = 0; i < values; i += lanes<A>) {
            const int n = int(smaller(lanes<A>, values - i));
            store(to + i, load(from + i, n), n);
        }
        return;
    }
    for (int64_t c = 0; c < s.in; ++c) {
        const T* from = image + (c * s.height + row) * s.width;
        for (int64_t x = 0; x < s.width; x += lanes<A>) {
            const int n = int(smaller(lanes<A>, s.width - x));
            const Vec<A> v = load(from + x, n);
            for (int i = 0; i < n; ++i) to[(x + i) * s.in + c] = v[i];
        }
    }
}

}  // namespace

template <class T>
void convolution_packed(const ConvolutionShape& s, const void* x, const void* weight, const void* bias,
                        Activation activation, void* y) {
    using A = Compute<T>;
    const Panels<A> panels{static_cast<const A*>(weight), s.kernel_h * s.kernel_w * s.in, s.out};
    const Padded<A> shift(bias, s.out);
    const Finish<T> finish{static_cast<T*>(y), s.out, s.out, activation};
    const int64_t width = larger(s.pad_left + s.width, (s.out_width - 1) * s.stride_w + s.kernel_w);
    const int64_t chunks = smaller(s.out_height, 4 * ceil_div(thread_count(), s.batch));
    struct Ring {
        Scratch<A> rows;  // the last one stays zero: padding above and below the image
        explicit Ring(int64_t size) : rows(size) { std::memset(static_cast<A*>(rows), 0, size_t(size) * sizeof(A)); }
    };
    parallel_tasks(
        s.batch * chunks, [&] { return Ring((s.kernel_h + 1) * width * s.in); },
        [&](int64_t task, const Ring& ring) {
            const int64_t image = task / chunks, chunk = task % chunks;
            const int64_t begin = s.out_height * chunk / chunks, end = s.out_height * (chunk + 1) / chunks;
            const auto slot = [&](int64_t i) { return ring.rows + i * width * s.in; };
            int64_t staged = larger(0, begin * s.stride_h - s.pad_top);
            for (int64_t oy = begin; oy < end; ++oy) {
                Left<A> left;
                left.segments = int(s.kernel_h);
                left.terms = left.last = s.kernel_w * s.in;
                left.step = s.stride_w * s.in;
                left.split = false;
                for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
                    const int64_t iy = oy * s.stride_h - s.pad_top + ky;
                    const bool inside = iy >= 0 && iy < s.height;
                    if (inside && iy >= staged) {
                        const T* const from = static_cast<const T*>(x) + image * s.height * s.width * s.in;
                        stage_image_row(s, from, iy, slot(iy % s.kernel_h) + s.pad_left * s.in);
                        staged = iy + 1;
                    }
                    left.start[ky] = slot(inside ? iy % s.kernel_h : s.kernel_h);
                }
                multiply_rows(left, (image * s.out_height + oy) * s.out_width, s.out_width, panels, 0, panels.vectors(),
                              static_cast<const A*>(shift), finish);
            }
        });
}

// So few weights that one thread packs them sooner than two agree to.
template <class T>
void convolution_norm(const ConvolutionShape& s, const void* x, const ConvNorm& norm, bool weight_rows,
                      Activation activation, void* y) {
    using A = Compute<T>;
    const int64_t taps = s.kernel_h * s.kernel_w, terms = taps * s.in;
    const FoldedNorm<A> folded(s.out, norm);
    const Scratch<A> rows(weight_rows ? 0 : s.out * terms), packed(Panels<A>::size(terms, s.out));
    const A* weight = static_cast<const A*>(norm.weight);
    if (!weight_rows) {
        for (int64_t o = 0; o < s.out; ++o) transpose(s.in, taps, weight + o * terms, taps, rows + o * terms, s.in);
        weight = rows;
    }
    for (int64_t panel = 0; panel < ceil_div(s.out, panel_columns); ++panel)
        pack_panel_of<A>(panel, weight, terms, s.out, folded.scale(), static_cast<A*>(packed));
    convolution_packed<T>(s, x, static_cast<A*>(packed), folded.shift(), activation, y);
}

EFFNET_INSTANTIATE(convolution_packed)
EFFNET_INSTANTIATE(convolution_norm)

EFFNET_NAMESPACE_END
