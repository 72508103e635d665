// Dense convolution in training: with the sums of its result, and its gradients. Parts of the images that are summed
// apart depend on the shape alone.
#pragma once

#include "convolution.h"
#include "training.h"

EFFNET_NAMESPACE_BEGIN

// Each image's output rows in chunks, enough of them for threads to share a batch of few images.
inline Parts output_chunks(const ConvolutionShape& s) {
    const int64_t most = smaller(s.out_height, larger(1, s.out_height * s.out_width / pixel_block));
    return {s.out_height, smaller(most, ceil_div(16, larger(1, s.batch)))};
}

// The convolution [pixels][out] of x, and its statistics, where they are wanted.
template <class T>
void convolve_dense(const ConvolutionShape& s, const void* x, const void* weight, T* to,
                    const BatchStatistics& statistics) {
    using A = Compute<T>;
    const Buffer<A> packed(Panels<A>::size(s.kernel_h * s.kernel_w * s.in, s.out));
    pack_convolution<A, A>(s, static_cast<const A*>(weight), false, nullptr, packed);
    const Panels<A> panels{packed, s.kernel_h * s.kernel_w * s.in, s.out};
    const Padded<A> zero(nullptr, s.out);
    const DenseRows<T, A> dense(s, x);
    const Parts chunks = output_chunks(s);
    const Moments<A> moments(s.batch * chunks.parts, s.out, statistics);
    const Finish<T> finish{to, s.out, s.out, Activation::none};
    parallel_tasks(
        s.batch * chunks.parts, [&] { return dense.ring(); },
        [&](int64_t task, auto& ring) {
            const int64_t image = task / chunks.parts, begin = chunks.begin(task % chunks.parts);
            const int64_t end = begin + chunks.size(task % chunks.parts);
            dense.blocks(image, begin, end, ring, [&](int64_t row, int64_t rows) {
                const int64_t first = (image * s.out_height + row) * s.out_width;
                dense.multiply(ring, row, rows, first, panels, static_cast<const A*>(zero), finish,
                               [&](int64_t c, int64_t width) {
                                   if (moments.wanted)
                                       moments.add(task, (row - begin) * s.out_width, rows * s.out_width,
                                                   static_cast<const T*>(to + first * s.out + c), s.out, c, width);
                               });
            });
        });
    moments.merge([&](int64_t part) { return chunks.size(part % chunks.parts) * s.out_width; });
}

// The gradient of the weight, [out][in][kh][kw]. stage(image, row, to, step) fills a row of the gradient of the
// convolution's result, its pixels `step` values apart with zeros behind them. Each filter row is a product of that
// with the pixels it meets.
template <class T, class Stage>
void dense_weight_gradient(const ConvolutionShape& s, const void* x, const Stage& stage, Compute<T>* to) {
    using A = Compute<T>;
    constexpr int S = slab<A>;
    const DenseRows<T, A> dense(s, x);
    const Parts chunks = output_chunks(s);
    const int64_t step = round_up(s.out, lanes<A>), run = s.kernel_w * s.in, in_run = ceil_div(run, S);
    const int64_t slabs = s.kernel_h * in_run, columns = slabs * S;
    const Parts parts = Parts::for_sums(s.batch * chunks.parts, s.batch * s.out_height * s.out_width, s.out * columns);
    const int64_t groups = smaller(slabs, ceil_div(8, parts.parts));
    const WeightSums<A> sums(parts.parts, s.out, columns);
    struct Memory {
        ImageRing<A> ring;
        Scratch<A> gradient;
    };
    parallel_tasks(
        parts.parts * groups, [&] { return Memory{dense.ring(), Scratch<A>(dense.at_once * s.out_width * step)}; },
        [&](int64_t task, Memory& own) {
            const int64_t part = task / groups, group = task % groups;
            const int64_t first = slabs * group / groups, last = slabs * (group + 1) / groups;
            sums.clear(part, first * S, (last - first) * S);
            const auto add = [&](int64_t image, int64_t row, int64_t rows) {
                for (int64_t r = 0; r < rows; ++r) stage(image, row + r, own.gradient + r * s.out_width * step, step);
                for (int64_t i = first; i < last; ++i)
                    for (int64_t r = 0; r < rows; ++r) {
                        const int64_t c = i % in_run * S;
                        sums.add(part, s.out_width, own.gradient + r * s.out_width * step, step,
                                 dense.seen(own.ring, row + r, i / in_run) + c, s.stride_w * s.in, i * S,
                                 smaller(S, run - c));
                    }
            };
            for (int64_t piece = parts.begin(part); piece < parts.begin(part + 1); ++piece) {
                const int64_t image = piece / chunks.parts, begin = chunks.begin(piece % chunks.parts);
                dense.blocks(image, begin, begin + chunks.size(piece % chunks.parts), own.ring,
                             [&](int64_t row, int64_t rows) { add(image, row, rows); });
            }
        });
    const Buffer<A> rows(s.out * columns);
    sums.total(rows);
    const int64_t taps = s.kernel_h * s.kernel_w;
    parallel(s.out, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o)
            for (int64_t ky = 0; ky < s.kernel_h; ++ky)
                for (int64_t kx = 0; kx < s.kernel_w; ++kx)
                    for (int64_t c = 0; c < s.in; ++c)
                        to[(o * s.in + c) * taps + ky * s.kernel_w + kx] =
                            rows[o * columns + ky * in_run * S + kx * s.in + c];
    });
}

// Along one axis of the input, the pixels that meet the filter's taps number `phase`, phase + stride, ...: those
// `first`, first + stride, ... The first of them meets the output's pixel `output` with its first tap, the one before
// with the next.
struct Phase {
    int64_t taps, first, count, output;

    Phase(int64_t phase, int64_t kernel, int64_t stride, int64_t padding, int64_t size)
        : taps(phase < kernel ? ceil_div(kernel - phase, stride) : 0),
          first((phase - padding % stride + stride) % stride),
          count(larger(0, ceil_div(size - first, stride))),
          output((first + padding - phase) / stride) {}
};

// The gradient of x: a convolution of the result's gradient with the filter turned round, of a part of its taps for
// each phase of the stride.
template <class T, class Stage>
class DenseInputGradient {
    using A = Compute<T>;

  public:
    // `weight` is [out][in][kh][kw]; `stage` as for dense_weight_gradient.
    DenseInputGradient(const ConvolutionShape& s, const A* weight, const Stage& stage)
        : s_(s),
          stage_(stage),
          step_(round_up(s.out, lanes<A>)),
          padded_in_(round_up(s.in, panel_columns)),
          left_(ceil_div(s.kernel_w, s.stride_w) - 1),
          packed_(s.kernel_h * s.kernel_w * step_ * padded_in_),
          bias_(nullptr, s.in) {
        parallel_tasks(padded_in_ / panel_columns, [] { return 0; }, [&](int64_t panel, int) { pack(panel, weight); });
    }

    // `residual`, where it is not null, is added.
    void operator()(const T* residual, T* to) const {
        const Parts chunks{s_.height, smaller(s_.height, ceil_div(16, larger(1, s_.batch)))};
        const int64_t width = left_ + larger(s_.out_width, (s_.width - 1 + s_.pad_left) / s_.stride_w + 1);
        parallel_tasks(
            s_.batch * chunks.parts,
            [&] { return ImageRing<A>(ceil_div(s_.kernel_h, s_.stride_h) + 1, width, step_, left_, s_.out_height); },
            [&](int64_t task, ImageRing<A>& ring) {
                const int64_t image = task / chunks.parts, chunk = task % chunks.parts, begin = chunks.begin(chunk);
                ring.start((begin + s_.pad_top) / s_.stride_h - (ceil_div(s_.kernel_h, s_.stride_h) - 1));
                for (int64_t row = begin; row < begin + chunks.size(chunk); ++row) {
                    ring.fill((row + s_.pad_top) / s_.stride_h + 1,
                              [&](int64_t from, A* at) { stage_(image, from, at, step_); });
                    const int64_t at = (image * s_.height + row) * s_.width * s_.in;
                    input_row(ring, row, residual == nullptr ? nullptr : residual + at, to + at);
                }
            });
    }

  private:
    Phase vertical(int64_t phase) const { return {phase, s_.kernel_h, s_.stride_h, s_.pad_top, s_.height}; }
    Phase horizontal(int64_t phase) const { return {phase, s_.kernel_w, s_.stride_w, s_.pad_left, s_.width}; }

    // The panels of a pair of phases, which lie one after the other: together they have all taps.
    A* panels_of(int64_t phase_y, int64_t phase_x) const {
        int64_t taps = 0;
        for (int64_t y = 0; y < s_.stride_h; ++y)
            for (int64_t x = 0; x < s_.stride_w && (y < phase_y || (y == phase_y && x < phase_x)); ++x)
                taps += vertical(y).taps * horizontal(x).taps;
        return packed_ + taps * step_ * padded_in_;
    }

    void pack(int64_t panel, const A* weight) const {
        const int64_t c = panel * panel_columns, valid = smaller(panel_columns, s_.in - c);
        const int64_t taps = s_.kernel_h * s_.kernel_w;
        for (int64_t phase_y = 0; phase_y < s_.stride_h; ++phase_y)
            for (int64_t phase_x = 0; phase_x < s_.stride_w; ++phase_x) {
                const int64_t ny = vertical(phase_y).taps, nx = horizontal(phase_x).taps;
                A* to = panels_of(phase_y, phase_x) + ny * nx * step_ * c;
                std::memset(to, 0, size_t(ny * nx * step_ * panel_columns) * sizeof(A));
                for (int64_t y = 0; y < ny; ++y)
                    for (int64_t x = nx - 1; x >= 0; --x, to += step_ * panel_columns) {
                        const A* const from =
                            weight + (phase_y + y * s_.stride_h) * s_.kernel_w + phase_x + x * s_.stride_w;
                        for (int64_t o = 0; o < s_.out; ++o)
                            for (int64_t i = 0; i < valid; ++i)
                                to[o * panel_columns + i] = from[(o * s_.in + c + i) * taps];
                    }
            }
    }

    void input_row(const ImageRing<A>& ring, int64_t row, const T* residual, T* to) const {
        const int64_t phase_y = (row + s_.pad_top) % s_.stride_h, output = (row + s_.pad_top) / s_.stride_h;
        const int64_t ny = vertical(phase_y).taps;
        for (int64_t phase_x = 0; phase_x < s_.stride_w; ++phase_x) {
            const Phase x = horizontal(phase_x);
            Finish<T> finish{to + x.first * s_.in, s_.stride_w * s_.in, s_.in, Activation::none};
            if (residual != nullptr) finish.residual = residual + x.first * s_.in;
            if (ny * x.taps == 0) {
                no_taps(x.count, finish);
                continue;
            }
            Left<A> left = filter_rows<A>(ny, x.taps * step_, step_);
            for (int64_t y = 0; y < ny; ++y)
                left.start[y] = ring(output - y) + (left_ + x.output - (x.taps - 1)) * step_;
            const Panels<A> panels{panels_of(phase_y, phase_x), ny * x.taps * step_, s_.in};
            multiply_rows(left, 0, x.count, panels, 0, panels.vectors(), static_cast<const A*>(bias_), finish);
        }
    }

    // No output reads these pixels.
    void no_taps(int64_t count, const Finish<T>& finish) const {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t c = 0; c < s_.in; c += lanes<A>) finish(p, 1, c, lanes<A>, bias_ + c, 0);
    }

    const ConvolutionShape& s_;
    const Stage& stage_;
    const int64_t step_, padded_in_, left_;
    const Buffer<A> packed_;
    const Padded<A> bias_;
};

// Both gradients, those that are not null. `gradient` is a StageGradient, `residual` is added to grad_x.
template <class T, class Gradient>
void dense_gradients(const ConvolutionShape& s, const void* weight, const Gradient& gradient, const void* x,
                     const T* residual, void* grad_weight, void* grad_x) {
    using A = Compute<T>;
    const auto stage = [&](int64_t image, int64_t row, A* to, int64_t step) {
        gradient(image, row, 0, s.out, to, step);
    };
    if (grad_weight != nullptr) dense_weight_gradient<T>(s, x, stage, static_cast<A*>(grad_weight));
    if (grad_x != nullptr)
        DenseInputGradient<T, decltype(stage)>(s, static_cast<const A*>(weight), stage)(residual,
                                                                                        static_cast<T*>(grad_x));
}

EFFNET_NAMESPACE_END
