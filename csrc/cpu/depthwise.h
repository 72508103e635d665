// Depthwise convolution by rows: a slab of channels of the few input rows that an output row needs lies, staged through
// its prologue and padded with zeros, in a ring that stays in cache; each staged row serves all the output rows that
// see it.
#pragma once

#include "operand.h"
#include "transpose.h"

#include <type_traits>

EFFNET_NAMESPACE_BEGIN

// The rows of the filter that see the image, for one output row: staged rows and the filter's rows that meet them.
template <class A>
struct RowPairs {
    static constexpr int most = 64;
    const A* rows[most];
    const A* weights[most];
    int count = 0;
};

// Where a row's pixels lie and where its outputs go: values from one pixel to the next, the channels, values from one
// filter tap to the next, and which pixels exist (the rest is padding, and is not read).
template <class A>
struct RowLayout {
    int64_t step, channels, weight_step;
    A* out;
    int64_t out_step;
    int64_t first_pixel = 0, last_pixel = INT64_MAX;
    const A* start = nullptr;  // what each channel's sum begins with, zero where null
};

// Outputs [first, first + N) of a row, one vector of channels: sum over row pairs and kx of row[o * stride + kx] *
// weight[kx]. EDGE: only pixels [begin, end) of those that the outputs see exist.
template <int KW, int STRIDE, int N, bool EDGE, class A>
inline void convolve_outputs(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t first, int64_t lane,
                             int64_t begin, int64_t end) {
    Vec<A> sum[N];
    const Vec<A> begun = at.start == nullptr ? Vec<A>{} : load(at.start + lane);
#pragma GCC unroll 16
    for (int o = 0; o < N; ++o) sum[o] = begun;
    for (int r = 0; r < pairs.count; ++r) {
        const A* row = pairs.rows[r] + first * STRIDE * at.step + lane;
        Vec<A> w[KW];
#pragma GCC unroll 16
        for (int kx = 0; kx < KW; ++kx) w[kx] = load(pairs.weights[r] + kx * at.weight_step + lane);
#pragma GCC unroll 64
        for (int j = 0; j < (N - 1) * STRIDE + KW; ++j) {
            if (EDGE && (j < begin || j >= end)) continue;
            const Vec<A> v = load(row + j * at.step);
#pragma GCC unroll 16
            for (int kx = 0; kx < KW; ++kx)
                if (j >= kx && (j - kx) % STRIDE == 0 && (j - kx) / STRIDE < N) sum[(j - kx) / STRIDE] += v * w[kx];
        }
    }
#pragma GCC unroll 16
    for (int o = 0; o < N; ++o) store(at.out + (first + o) * at.out_step + lane, sum[o]);
}

template <int KW, int STRIDE, int N, class A>
inline void convolve_block(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t first, int64_t lane) {
    constexpr int64_t seen = (N - 1) * STRIDE + KW;
    const int64_t begin = at.first_pixel - first * STRIDE, end = at.last_pixel - first * STRIDE;
    if (begin <= 0 && end >= seen) return convolve_outputs<KW, STRIDE, N, false>(pairs, at, first, lane, 0, seen);
    convolve_outputs<KW, STRIDE, N, true>(pairs, at, first, lane, begin, end);
}

// Blocks of outputs outside, channels inside: the pixels are walked as they lie in memory.
template <int KW, int STRIDE, class A>
inline void convolve_row_fixed(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t width) {
    const auto channels = [&](auto size, int64_t o) {
        for (int64_t lane = 0; lane < at.channels; lane += lanes<A>)
            convolve_block<KW, STRIDE, decltype(size)::value>(pairs, at, o, lane);
    };
    int64_t o = 0;
    if constexpr (EFFNET_VECTOR_BYTES == 64)
        for (; o + 14 <= width; o += 14) channels(Size<14>{}, o);
    for (; o + 7 <= width; o += 7) channels(Size<7>{}, o);
    if (o + 4 <= width) channels(Size<4>{}, o), o += 4;
    if (o + 2 <= width) channels(Size<2>{}, o), o += 2;
    for (; o < width; ++o) channels(Size<1>{}, o);
}

template <class A>
inline void convolve_row_any(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t kernel_w, int64_t stride,
                             int64_t width) {
    for (int64_t lane = 0; lane < at.channels; lane += lanes<A>)
        for (int64_t o = 0; o < width; ++o) {
            Vec<A> sum = at.start == nullptr ? Vec<A>{} : load(at.start + lane);
            for (int64_t kx = 0; kx < kernel_w; ++kx) {
                const int64_t pixel = o * stride + kx;
                if (pixel < at.first_pixel || pixel >= at.last_pixel) continue;
                for (int r = 0; r < pairs.count; ++r)
                    sum += load(pairs.rows[r] + pixel * at.step + lane) *
                           load(pairs.weights[r] + kx * at.weight_step + lane);
            }
            store(at.out + o * at.out_step + lane, sum);
        }
}

inline bool is_fixed_filter(int64_t kernel_w, int64_t stride) {
    return (stride == 1 || stride == 2) && (kernel_w == 3 || kernel_w == 5 || kernel_w == 7);
}

template <class A>
inline void convolve_undilated_row(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t kernel_w, int64_t stride,
                                   int64_t width) {
    if (!is_fixed_filter(kernel_w, stride)) return convolve_row_any(pairs, at, kernel_w, stride, width);
    if (kernel_w == 3)
        return stride == 1 ? convolve_row_fixed<3, 1>(pairs, at, width) : convolve_row_fixed<3, 2>(pairs, at, width);
    if (kernel_w == 5)
        return stride == 1 ? convolve_row_fixed<5, 1>(pairs, at, width) : convolve_row_fixed<5, 2>(pairs, at, width);
    return stride == 1 ? convolve_row_fixed<7, 1>(pairs, at, width) : convolve_row_fixed<7, 2>(pairs, at, width);
}

// The `width` outputs of a row. Of a dilated filter, the outputs o, o + dilation, o + 2 * dilation... see every
// dilation-th pixel only: they are a row of their own, without a dilation.
template <class A>
inline void convolve_row(const RowPairs<A>& pairs, const RowLayout<A>& at, int64_t kernel_w, int64_t stride,
                         int64_t dilation, int64_t width) {
    if (dilation == 1) return convolve_undilated_row(pairs, at, kernel_w, stride, width);
    for (int64_t o = 0; o < smaller(dilation, width); ++o) {
        const int64_t pixel = o * stride;
        RowPairs<A> own = pairs;
        for (int r = 0; r < own.count; ++r) own.rows[r] += pixel * at.step;
        RowLayout<A> every = at;
        every.step *= dilation, every.out_step *= dilation, every.out += o * at.out_step;
        every.first_pixel = at.first_pixel <= pixel ? 0 : (at.first_pixel - pixel - 1) / dilation + 1;
        every.last_pixel = at.last_pixel <= pixel ? 0 : (at.last_pixel - pixel - 1) / dilation + 1;
        convolve_undilated_row(own, every, kernel_w, stride, (width - o - 1) / dilation + 1);
    }
}

// [C][kh * kw] to [slabs][kh * kw][slab], zeros behind the last channel; mirrored along kx for the input gradient.
template <class A>
inline Buffer<A> pack_depthwise(const DepthwiseShape& s, const A* weight, bool mirrored) {
    constexpr int S = slab<A>;
    const int64_t taps = s.kernel_h * s.kernel_w;
    Buffer<A> packed = zeros<A>(ceil_div(s.channels, S) * taps * S);
    for (int64_t c = 0; c < s.channels; c += S) {
        A* const to = packed + c * taps;
        transpose(smaller(S, s.channels - c), taps, weight + c * taps, taps, to, S);
        for (int64_t ky = 0; ky < s.kernel_h && mirrored; ++ky)
            for (int64_t left = 0, right = s.kernel_w - 1; left < right; ++left, --right) {
                A *const one = to + (ky * s.kernel_w + left) * S, *const other = to + (ky * s.kernel_w + right) * S;
                for (int i = 0; i < S; i += lanes<A>) {
                    const Vec<A> kept = load(one + i);
                    store(one + i, load(other + i));
                    store(other + i, kept);
                }
            }
    }
    return packed;
}

// A ring of staged rows [capacity][width][slab]; row number i lives in slot i % capacity.
template <class A>
class RowRing {
  public:
    RowRing(int64_t capacity, int64_t width)
        : capacity_(capacity), width_(width), rows_(zeros<A>(capacity * width * slab<A>)) {}
    A* row(int64_t i) const { return rows_ + i % capacity_ * width_ * slab<A>; }

  private:
    int64_t capacity_, width_;
    Buffer<A> rows_;
};

// Output rows are cut into chunks where images and slabs alone are too few for all threads; a chunk stages its halo
// rows again.
inline int64_t row_chunks(int64_t images_and_slabs, int64_t rows) {
    return larger(1, smaller(rows / 4, ceil_div(8, larger(images_and_slabs, 1))));
}

// A row that a kernel has made, among the rows [first, last) of an image that one task makes in order; `part` numbers
// these ranges in the batch.
struct MadeRow {
    int64_t image, row, part, first, last;
};

// Convolves every (image, slab): stage(image, row, first channel, channels, to) fills [width][slab] values of an input
// row, finish(made row, first channel, channels, values) takes [out_width][slab] results.
template <class A, class Stage, class Finish>
inline void depthwise_rows(const DepthwiseShape& s, const A* weight, const Stage& stage, const Finish& finish) {
    constexpr int S = slab<A>;
    const int64_t slabs = ceil_div(s.channels, S), chunks = row_chunks(s.batch * slabs, s.out_height);
    const int64_t span_h = (s.kernel_h - 1) * s.dilation_h + 1, span_w = (s.kernel_w - 1) * s.dilation_w + 1;
    const int64_t width = larger(s.pad_left + s.width, (s.out_width - 1) * s.stride_w + span_w);
    const Buffer<A> packed = pack_depthwise(s, weight, false);
    parallel(s.batch * slabs * chunks, [&](int64_t begin, int64_t end) {
        const RowRing<A> ring(span_h, width);
        const Buffer<A> out(s.out_width * S);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / (slabs * chunks), slab_index = task / chunks % slabs, chunk = task % chunks;
            const int64_t c = slab_index * S, n = smaller(S, s.channels - c);
            const int64_t begin_row = s.out_height * chunk / chunks, end_row = s.out_height * (chunk + 1) / chunks;
            int64_t staged = -1;
            for (int64_t oy = begin_row; oy < end_row; ++oy) {
                RowPairs<A> pairs;
                const int64_t top = oy * s.stride_h - s.pad_top;
                staged = larger(staged, top - 1);
                for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
                    const int64_t iy = top + ky * s.dilation_h;
                    if (iy < 0 || iy >= s.height) continue;
                    // With a dilation the rows between two taps are needed by later output rows, so all are staged in
                    // order.
                    while (staged < iy) {
                        ++staged;
                        stage(image, staged, c, n, ring.row(staged) + s.pad_left * S);
                    }
                    pairs.rows[pairs.count] = ring.row(iy);
                    pairs.weights[pairs.count++] = packed + (slab_index * s.kernel_h + ky) * s.kernel_w * S;
                }
                convolve_row<A>(pairs, {S, n, S, out, S}, s.kernel_w, s.stride_w, s.dilation_w, s.out_width);
                finish(MadeRow{image, oy, image * chunks + chunk, begin_row, end_row}, c, n, static_cast<A*>(out));
            }
        }
    });
}

// Stages rows of a stored tensor, [images][height][width][channels], through its prologue.
template <class T>
struct StageStored {
    const Source<T>& x;
    int64_t height, width;
    void operator()(int64_t image, int64_t row, int64_t c, int64_t n, Compute<T>* to) const {
        x.stage((image * height + row) * width, width, c, n, to, slab<Compute<T>>);
    }
};

// Without a prologue nothing needs staging: rows are read where they lie, all channels at once.
template <class A, class O>
inline void depthwise_in_place(const DepthwiseShape& s, const A* x, const A* weight, const Epilogue<O>& epilogue) {
    const int64_t channels = s.channels, taps = s.kernel_h * s.kernel_w;
    const Buffer<A> packed(taps * channels);
    transpose(channels, taps, weight, taps, static_cast<A*>(packed), channels);
    parallel(s.batch * s.out_height, [&](int64_t begin, int64_t end) {
        const Buffer<A> scratch(s.out_width * channels);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t image = row / s.out_height, top = row % s.out_height * s.stride_h - s.pad_top;
            const int64_t first = row * s.out_width;
            RowPairs<A> pairs;
            for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
                const int64_t iy = top + ky * s.dilation_h;
                if (iy < 0 || iy >= s.height) continue;
                pairs.rows[pairs.count] = x + ((image * s.height + iy) * s.width - s.pad_left) * channels;
                pairs.weights[pairs.count++] = packed + ky * s.kernel_w * channels;
            }
            RowLayout<A> at{channels, channels, channels, scratch, channels, s.pad_left, s.pad_left + s.width};
            if constexpr (sizeof(O) == sizeof(A)) {
                if (epilogue.direct()) at.out = epilogue.out + first * channels;
            }
            convolve_row<A>(pairs, at, s.kernel_w, s.stride_w, s.dilation_w, s.out_width);
            if (at.out == scratch) epilogue(first, s.out_width, 0, channels, scratch, channels);
        }
    });
}

template <class T, class O>
inline void depthwise_forward(const DepthwiseShape& s, const Source<T>& x, const Compute<T>* weight,
                              const Epilogue<O>& epilogue) {
    using A = Compute<T>;
    const bool in_place = x.direct() && s.channels % lanes<A> == 0 && is_fixed_filter(s.kernel_w, s.stride_w);
    if (in_place) return depthwise_in_place(s, reinterpret_cast<const A*>(x.data), weight, epilogue);
    depthwise_rows<A>(s, weight, StageStored<T>{x, s.height, s.width},
                      [&](const MadeRow& made, int64_t c, int64_t n, const A* values) {
                          epilogue((made.image * s.out_height + made.row) * s.out_width, s.out_width, c, n, values,
                                   slab<A>);
                      });
}

// sum[kx] += sum over o of grad[o] * row[o * stride + kx * dilation], one filter row, all channels of a slab.
template <int KW, int STRIDE, class Dilation, class A>
inline void filter_row_fixed(const A* grad, const A* row, Dilation dilation, int64_t width, A* sum) {
    constexpr int S = slab<A>;
    for (int lane = 0; lane < S; lane += lanes<A>) {
        Vec<A> even[KW] = {}, odd[KW] = {};
        int64_t o = 0;
        for (; o + 2 <= width; o += 2) {
            const Vec<A> g0 = load(grad + o * S + lane), g1 = load(grad + (o + 1) * S + lane);
#pragma GCC unroll 16
            for (int kx = 0; kx < KW; ++kx) {
                even[kx] += g0 * load(row + (o * STRIDE + kx * dilation) * S + lane);
                odd[kx] += g1 * load(row + ((o + 1) * STRIDE + kx * dilation) * S + lane);
            }
        }
#pragma GCC unroll 16
        for (int kx = 0; kx < KW; ++kx) {
            if (o < width) even[kx] += load(grad + o * S + lane) * load(row + (o * STRIDE + kx * dilation) * S + lane);
            store(sum + kx * S + lane, load(sum + kx * S + lane) + (even[kx] + odd[kx]));
        }
    }
}

template <class A>
inline void filter_row(const A* grad, const A* row, int64_t kernel_w, int64_t stride, int64_t dilation, int64_t width,
                       A* sum) {
    constexpr int S = slab<A>;
    if ((kernel_w == 3 || kernel_w == 5) && (stride == 1 || stride == 2)) {
        const auto fixed = [&](auto gap) {
            if (kernel_w == 3)
                return stride == 1 ? filter_row_fixed<3, 1>(grad, row, gap, width, sum)
                                   : filter_row_fixed<3, 2>(grad, row, gap, width, sum);
            return stride == 1 ? filter_row_fixed<5, 1>(grad, row, gap, width, sum)
                               : filter_row_fixed<5, 2>(grad, row, gap, width, sum);
        };
        return dilation == 1 ? fixed(std::integral_constant<int64_t, 1>{}) : fixed(dilation);
    }
    for (int lane = 0; lane < S; lane += lanes<A>)
        for (int64_t kx = 0; kx < kernel_w; ++kx) {
            Vec<A> v = {};
            for (int64_t o = 0; o < width; ++o)
                v += load(grad + o * S + lane) * load(row + (o * stride + kx * dilation) * S + lane);
            store(sum + kx * S + lane, load(sum + kx * S + lane) + v);
        }
}

// The geometry of the input gradient's rows: the output gradient is staged with stride_w - 1 zeros between its pixels,
// so that each row of the input gradient is a stride-1 convolution with the mirrored filter.
struct GradientRows {
    int64_t span_w, width, offset;
    explicit GradientRows(const DepthwiseShape& s)
        : span_w((s.kernel_w - 1) * s.dilation_w + 1), width(s.width + span_w - 1), offset(span_w - 1 - s.pad_left) {}
};

// Row iy of the input gradient from the rings of staged output-gradient rows.
template <class A>
inline void input_gradient_row(const DepthwiseShape& s, const GradientRows& geometry, const RowRing<A>& grads,
                               const A* mirrored, int64_t iy, A* out) {
    RowPairs<A> pairs;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t scaled = iy + s.pad_top - ky * s.dilation_h;
        if (scaled < 0 || scaled % s.stride_h != 0 || scaled / s.stride_h >= s.out_height) continue;
        pairs.rows[pairs.count] = grads.row(scaled / s.stride_h);
        pairs.weights[pairs.count++] = mirrored + ky * s.kernel_w * slab<A>;
    }
    convolve_row<A>(pairs, {slab<A>, slab<A>, slab<A>, out, slab<A>}, s.kernel_w, 1, s.dilation_w, s.width);
}

// Parts of the batch whose filter gradients are summed on their own.
inline int64_t gradient_parts(const DepthwiseShape& s, int64_t slabs) {
    return smaller(larger(s.batch, 1), ceil_div(16, slabs));
}

// Input and filter gradient in one walk over the rows. stage_gradient(image, row, c, n, to) fills a row of the output's
// gradient, stage_input(image, row, c, n, to, slopes) a row of the input; emit(made row, c, n, values, slopes) takes
// rows of the input's gradient, and what stage_input left in `slopes` for them, Slopes values for each pixel and
// channel of a row (zero: nothing is kept). Either result may be unwanted: no `grad_x`, or a null grad_weight.
template <int Slopes, class A, class StageGradient, class StageInput, class Emit>
inline void depthwise_gradients(const DepthwiseShape& s, const A* weight, const StageGradient& stage_gradient,
                                const StageInput& stage_input, bool grad_x, const Emit& emit, A* grad_weight) {
    constexpr int S = slab<A>;
    const int64_t slabs = ceil_div(s.channels, S), taps = s.kernel_h * s.kernel_w;
    const int64_t parts = gradient_parts(s, slabs), span_h = (s.kernel_h - 1) * s.dilation_h + 1;
    const GradientRows geometry(s);
    const int64_t width = larger(s.pad_left + s.width, (s.out_width - 1) * s.stride_w + geometry.span_w);
    const Buffer<A> mirrored = pack_depthwise(s, weight, true);
    const Buffer<A> partial = zeros<A>(parts * slabs * taps * S);
    // The staged row can serve the filter gradient too where its pixels are neighbours and all inside.
    const bool contiguous = s.stride_w == 1 && geometry.offset >= 0 && geometry.offset + s.out_width <= geometry.width;
    const bool inputs_wanted = Slopes > 0 || grad_weight != nullptr;
    parallel(parts * slabs, [&](int64_t begin, int64_t end) {
        const int64_t kept = larger(span_h, s.stride_h);
        const RowRing<A> inputs(kept, width), slopes(Slopes > 0 ? kept : 0, Slopes * s.width),
            grads((span_h - 1) / s.stride_h + 2, geometry.width);
        const Buffer<A> dense(s.out_width * S), out(s.width * S);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t part = task / slabs, slab_index = task % slabs, c = slab_index * S,
                          n = smaller(S, s.channels - c);
            if (n < S) std::memset(dense, 0, size_t(s.out_width * S) * sizeof(A));
            A* filter = partial + task * taps * S;
            for (int64_t image = s.batch * part / parts; image < s.batch * (part + 1) / parts; ++image) {
                int64_t staged = -1, emitted = 0;
                const auto stage_until = [&](int64_t row) {
                    while (staged < row) {
                        ++staged;
                        stage_input(image, staged, c, n, inputs.row(staged) + s.pad_left * S,
                                    Slopes > 0 ? slopes.row(staged) : nullptr);
                    }
                };
                const auto emit_until = [&](int64_t end_row) {
                    for (; emitted < end_row; ++emitted) {
                        if (Slopes > 0) stage_until(emitted);
                        input_gradient_row<A>(s, geometry, grads, mirrored + slab_index * taps * S, emitted, out);
                        emit(MadeRow{image, emitted, part, 0, s.height}, c, n, static_cast<A*>(out),
                             Slopes > 0 ? slopes.row(emitted) : nullptr);
                    }
                };
                for (int64_t oy = 0; oy < s.out_height; ++oy) {
                    A* const row = grads.row(oy);
                    A* const values = contiguous ? row + geometry.offset * S : static_cast<A*>(dense);
                    stage_gradient(image, oy, c, n, values);
                    for (int64_t o = 0; o < s.out_width && !contiguous; ++o) {
                        const int64_t at = o * s.stride_w + geometry.offset;
                        if (at >= 0 && at < geometry.width) std::memcpy(row + at * S, values + o * S, S * sizeof(A));
                    }
                    const int64_t top = oy * s.stride_h - s.pad_top;
                    if (Slopes == 0) staged = larger(staged, top - 1);
                    for (int64_t ky = 0; ky < s.kernel_h && inputs_wanted; ++ky) {
                        const int64_t iy = top + ky * s.dilation_h;
                        if (iy < 0 || iy >= s.height) continue;
                        stage_until(iy);
                        if (grad_weight != nullptr)
                            filter_row<A>(values, inputs.row(iy), s.kernel_w, s.stride_w, s.dilation_w, s.out_width,
                                          filter + ky * s.kernel_w * S);
                    }
                    if (!grad_x) continue;
                    const bool last = oy + 1 == s.out_height;
                    emit_until(last ? s.height : smaller(s.height, (oy + 1) * s.stride_h - s.pad_top));
                }
            }
        }
    });
    if (grad_weight == nullptr) return;
    const int64_t size = slabs * taps * S;
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < size; i += lanes<A>)
            store(partial + i, load(partial + i) + load(partial + part * size + i));
    for (int64_t c = 0; c < s.channels; c += S)
        transpose(taps, smaller(S, s.channels - c), partial + c * taps, S, grad_weight + c * taps, taps);
}

// The same of stored tensors: `grad` is [batch][out pixels][channels]; either result may be unwanted (null).
template <class T, class O>
inline void depthwise_gradients_stored(const DepthwiseShape& s, const Compute<T>* grad, const Source<T>& x,
                                       const Compute<T>* weight, O* grad_x, Compute<T>* grad_weight) {
    using A = Compute<T>;
    const Source<A> grad_rows(grad, s.channels);
    const StageStored<A> stage_gradient{grad_rows, s.out_height, s.out_width};
    const StageStored<T> stage_input{x, s.height, s.width};
    Epilogue<O> epilogue;
    epilogue.out = grad_x;
    epilogue.channels = s.channels;
    depthwise_gradients<0>(
        s, weight, stage_gradient,
        [&](int64_t image, int64_t row, int64_t c, int64_t n, A* to, A*) { stage_input(image, row, c, n, to); },
        grad_x != nullptr,
        [&](const MadeRow& made, int64_t c, int64_t n, const A* values, const A*) {
            epilogue((made.image * s.height + made.row) * s.width, s.width, c, n, values, slab<A>);
        },
        grad_weight);
}

EFFNET_NAMESPACE_END
