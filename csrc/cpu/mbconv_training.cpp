// The forward pass of a block in training.
#include "convolution_training.h"
#include "mbconv_steps.h"
#include "stopwatch.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// F3 and F4. With a gate an image is activated and summed, and waits in cache for its gate and the product.
template <class T>
class Project {
    using A = Compute<T>;
    static constexpr int L = lanes<A>;

  public:
    Project(const Steps<T>& steps, const NormVectors<A>& norm)
        : steps_(steps),
          norm_(norm),
          channels_(steps.channels),
          step_(round_up(channels_, L)),
          out_(steps.block.out),
          image_{steps.image_out, ceil_div(steps.image_out, pixel_block)},
          weights_(Weights<A>::rows(steps.weights(steps.block.project), channels_, out_)),
          moments_(steps.shape.batch * image_.parts, out_, steps.saved.project) {}

    void operator()() const {
        const int64_t batch = steps_.shape.batch;
        if (!steps_.gates) {
            without_gate(batch);
        } else {
            // Whole images to the threads as far as they go round; the rest is shared.
            const int64_t threads = thread_count(), alone = batch / threads * threads;
            parallel_tasks(alone, [] { return 0; }, [&](int64_t image, int) { with_gate(image); });
            for (int64_t image = alone; image < batch; ++image) with_gate(image);
        }
        moments_.merge([&](int64_t part) { return image_.size(part % image_.parts); });
    }

  private:
    // Rows [first, first + count) of an image, the operands of the product `step_` apart, to memory and to the sums.
    void multiply(int64_t image, int64_t part, const A* rows) const {
        const int64_t first = image * steps_.image_out + image_.begin(part), count = image_.size(part);
        T* const to = steps_.projected;
        const auto left = Left<A>::rows(rows, channels_, step_);
        weights_.multiply(left, first, count, 0, weights_.vectors(), Finish<T>{to, out_, out_, Activation::none},
                          [&](int64_t c, int64_t width) {
                              if (moments_.wanted)
                                  moments_.add(image * image_.parts + part, 0, count, to + first * out_ + c, out_, c,
                                               width);
                          });
    }

    void without_gate(int64_t batch) const {
        const Source<T> from = steps_.activated(steps_.convolved, norm_);
        parallel_tasks(
            batch * image_.parts, [&] { return Scratch<A>(pixel_block * step_); },
            [&](int64_t task, A* rows) {
                const int64_t image = task / image_.parts, part = task % image_.parts;
                from.stage(image * steps_.image_out + image_.begin(part), image_.size(part), 0, channels_, rows, step_);
                multiply(image, part, rows);
            });
    }

    void with_gate(int64_t image) const {
        const int64_t parts = image_.parts;
        const Scratch<A> activated(steps_.image_out * step_), sums(parts * step_);
        parallel_tasks(
            parts, [] { return 0; },
            [&](int64_t part, int) {
                activate(image, part, activated + image_.begin(part) * step_, sums + part * step_);
            });
        A* const pooled = static_cast<A*>(steps_.saved.pooled) + image * channels_;
        for (int64_t c = 0; c < channels_; ++c) {
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += double(sums[part * step_ + c]);
            pooled[c] = A(sum / double(steps_.image_out));
        }
        const Excitation<A> excitation(steps_.excitation_shape(1), steps_.block.squeeze_excite, pooled);
        const A* const gate = excitation.gate;
        parallel_tasks(
            parts, [] { return 0; },
            [&](int64_t part, int) {
                A* const rows = activated + image_.begin(part) * step_;
                for (int64_t p = 0; p < image_.size(part); ++p)
                    for (int64_t c = 0; c < channels_; c += L)
                        store(rows + p * step_ + c,
                              load(rows + p * step_ + c) * load(gate + c, int(smaller(L, channels_ - c))));
                multiply(image, part, rows);
            });
    }

    // A part of an image through its normalisation and activation, and the sum of each channel.
    void activate(int64_t image, int64_t part, A* to, A* sums) const {
        const int64_t first = image * steps_.image_out + image_.begin(part), count = image_.size(part);
        with_activation(steps_.block.activation, [&](auto kind) {
            for_each_vectors<A>(channels_, [&](auto size, int64_t c, int n) {
                constexpr int N = decltype(size)::value;
                const HatColumns<A, N> norm(norm_, c, n);
                const T* from = steps_.convolved + first * channels_ + c;
                A* at = to + c;
                Vec<A> sum[N] = {};
                for (int64_t p = 0; p < count; ++p, from += channels_, at += step_) {
                    // What the next columns read and write: pixels are further apart than the processor looks ahead.
                    __builtin_prefetch(from + N * L);
                    __builtin_prefetch(at + N * L, 1);
#pragma GCC unroll 2
                    for (int i = 0; i < N; ++i) {
                        const Vec<A> v = activate_as<A>(norm(i, load(from + i * L, n)), kind.value);
                        sum[i] += v;
                        store(at + i * L, v);
                    }
                }
                for (int i = 0; i < N; ++i) store(sums + c + i * L, sum[i]);
            });
        });
    }

    const Steps<T>& steps_;
    const NormVectors<A>& norm_;
    const int64_t channels_, step_, out_;
    const Parts image_;
    const Weights<A> weights_;
    const Moments<A> moments_;
};

// F5
template <class T>
void finish_block(const Steps<T>& steps, const NormVectors<Compute<T>>& norm, const T* x, T* y) {
    using A = Compute<T>;
    constexpr int L = lanes<A>;
    const int64_t out = steps.block.out;
    const A* const image_scale = static_cast<const A*>(steps.block.drop_path);
    const T* const residual = steps.block.residual ? x : nullptr;
    Reduction(steps.pixels_out).blocks([&](int64_t, int64_t first, int64_t count) {
        for (int64_t p = first; p < first + count; ++p) {
            const A factor = image_scale == nullptr ? A(1) : image_scale[p / steps.image_out];
            for (int64_t c = 0; c < out; c += L) {
                const int n = int(smaller(L, out - c));
                const int64_t at = p * out + c;
                Vec<A> v = HatColumns<A, 1>(norm, c, n)(0, load(steps.projected + at, n)) * factor;
                if (residual != nullptr) v += load(residual + at, n);
                store(y + at, v, n);
            }
        }
    });
}

}  // namespace

template <class T>
void mbconv_training(const Block& block, const void* x, void* y, const BlockSaved& saved) {
    using A = Compute<T>;
    Stopwatch watch;
    const Steps<T> steps(block, saved);
    if (block.dense) {
        convolve_dense(dense_shape(steps.shape, block.in), x, block.depthwise.weight, steps.convolved, saved.depthwise);
    } else if (!steps.expands) {
        const Source<T> from = steps.input(x);
        steps.convolve(StageStored<T>{from, steps.shape.height, steps.shape.width});
    } else {
        const Buffer<T> own(steps.own_expanded());
        T* const expanded = steps.expanded(own);
        steps.expand(x, expanded);
        watch.end(Step::F1);
        const NormVectors<A> norm1 = steps.norm_of(steps.channels, block.expand, saved.expand);
        if (expanded == nullptr) {
            const MadeRows<T> rows(steps, x);
            steps.convolve(StageMade<T>{steps, rows, norm1});
        } else {
            const Source<T> from = steps.activated(expanded, norm1);
            steps.convolve(StageStored<T>{from, steps.shape.height, steps.shape.width});
        }
    }
    watch.end(Step::F2);
    const NormVectors<A> norm2 = steps.norm_of(steps.channels, block.depthwise, saved.depthwise);
    Project<T>(steps, norm2)();
    watch.end(Step::F3_F4);
    const NormVectors<A> norm3 = steps.norm_of(block.out, block.project, saved.project);
    finish_block(steps, norm3, static_cast<const T*>(x), static_cast<T*>(y));
    watch.end(Step::F5);
}

EFFNET_INSTANTIATE(mbconv_training)

EFFNET_NAMESPACE_END
