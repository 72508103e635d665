// The backward pass of a block.
#include "convolution_training.h"
#include "mbconv_steps.h"
#include "stopwatch.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// B1 to B3: from the block's gradient to z̄, the gradient after the gate, and all that the normalisation behind the
// depthwise convolution needs to know of it.
template <class T>
class ProjectBackward {
    using A = Compute<T>;
    static constexpr int L = lanes<A>, S = slab<A>;
    // Sums of an image's pixels, by their numbers in docs/mbconv.md; those that a block without a gate needs come
    // first.
    enum Sum { slope, slope_hat, gate, slope_alone, slope_hat_alone, sums };

  public:
    ProjectBackward(const Steps<T>& steps, const T* grad, const NormVectors<A>& norm2, const A* gates,
                    const BlockGrads& grads)
        : steps_(steps),
          grad_(grad),
          grads_(grads),
          norm2_(norm2),
          norm3_(steps.norm_of(steps.block.out, steps.block.project, steps.saved.project)),
          sums3_(steps.block.out, grads.project),
          gates_(gates),
          channels_(steps.channels),
          out_(steps.block.out),
          out_step_(round_up(out_, L)),
          image_{steps.image_out,
                 larger(ceil_div(steps.image_out, 2048),
                        larger(1, smaller(ceil_div(8, larger(1, steps.shape.batch)), steps.image_out / 64)))},
          pieces_(Parts::for_sums(steps.shape.batch * image_.parts, steps.pixels_out, out_ * round_up(channels_, S))),
          totals_(steps.shape.batch * image_.parts, channels_) {
        sum_projected();
    }

    // Fills `wide`, [pixels][channels], with z̄.
    void operator()(A* wide) const {
        const NormGradient<A> norm_gradient(norm3_, steps_.saved.project, steps_.pixels_out, sums3_);
        const Weights<A> weights = Weights<A>::columns(steps_.weights(steps_.block.project), out_, channels_);
        A* const weight_gradient = static_cast<A*>(grads_.project.weight);
        const WeightSums<A> weight_sums(weight_gradient == nullptr ? 0 : pieces_.parts, out_, channels_);
        const int64_t vectors = weights.vectors(), pairs = ceil_div(vectors, 2);
        const int64_t groups = smaller(pairs, ceil_div(8, pieces_.parts));
        parallel_tasks(
            pieces_.parts * groups, [&] { return Scratch<A>(pixel_block * (out_step_ + S)); },
            [&](int64_t task, A* memory) {
                const int64_t part = task / groups, group = task % groups;
                const int64_t begin = 2 * (pairs * group / groups), end = 2 * (pairs * (group + 1) / groups);
                A *const rows = memory, *const gated = memory + pixel_block * out_step_;
                if (weight_gradient != nullptr) weight_sums.clear(part, begin * L, (end - begin) * L);
                for (int64_t piece = pieces_.begin(part); piece < pieces_.begin(part + 1); ++piece) {
                    const int64_t image = piece / image_.parts, start = image * steps_.image_out,
                                  within = piece % image_.parts;
                    for_each_block(
                        start + image_.begin(within), start + image_.begin(within + 1), pixel_block,
                        [&](int64_t first, int64_t count) {
                            norm_gradient.stage(
                                first, count,
                                [&](int64_t p, int64_t at, int n) { return load(grad_ + at, n) * drop_path(p); },
                                steps_.projected, rows, out_step_);
                            weights.multiply(
                                Left<A>::rows(rows, out_, out_step_), first, count, begin, smaller(end, vectors),
                                Finish<A>{wide, channels_, channels_, Activation::none}, [&](int64_t c, int64_t width) {
                                    walk(piece, image, first, count, c, width, wide, gated);
                                    if (weight_gradient != nullptr)
                                        weight_sums.add(part, count, rows, out_step_, gated, S, c, width);
                                });
                        });
                }
            });
        if (weight_gradient != nullptr) weight_sums.total(weight_gradient);
    }

    // ḡ, [images][channels].
    void gate_gradient(A* to) const {
        for_each_channel([&](int64_t image, int64_t c) { to[image * channels_ + c] = A(total(image, gate, c)); });
    }

    // β̄2 and γ̄2, with p̄ / T, [images][channels], where there is a gate.
    void norm_sums(const A* pool_gradient, const NormSums<A>& to) const {
        const Buffer<double> shift = zeros<double>(channels_), scale = zeros<double>(channels_);
        for_each_channel([&](int64_t image, int64_t c) {
            const int64_t at = image * channels_ + c;
            const double g = gates_ == nullptr ? 1 : double(gates_[at]);
            shift[c] += g * total(image, slope, c);
            scale[c] += g * total(image, slope_hat, c);
            if (gates_ == nullptr) return;
            shift[c] += double(pool_gradient[at]) * total(image, slope_alone, c);
            scale[c] += double(pool_gradient[at]) * total(image, slope_hat_alone, c);
        });
        for (int64_t c = 0; c < channels_; ++c) to.shift[c] = A(shift[c]), to.scale[c] = A(scale[c]);
    }

  private:
    template <class Body>
    void for_each_channel(const Body& body) const {
        for (int64_t image = 0; image < steps_.shape.batch; ++image)
            for (int64_t c = 0; c < channels_; ++c) body(image, c);
    }
    double total(int64_t image, Sum which, int64_t c) const {
        double sum = 0;
        for (int64_t part = 0; part < image_.parts; ++part)
            sum += double(totals_.of(image * image_.parts + part, which)[c]);
        return sum;
    }

    A drop_path(int64_t pixel) const {
        return steps_.block.drop_path == nullptr
                   ? A(1)
                   : static_cast<const A*>(steps_.block.drop_path)[pixel / steps_.image_out];
    }

    // β̄3 and γ̄3.
    void sum_projected() const {
        const Reduction reduction(steps_.pixels_out);
        const PartialSums<A, 2> partial(reduction.parts, out_);
        reduction.blocks([&](int64_t part, int64_t first, int64_t count) {
            for_each_vectors<A>(out_, [&](auto size, int64_t c, int n) {
                constexpr int N = decltype(size)::value;
                const HatColumns<A, N> norm(norm3_, c, n);
                Vec<A> shift[N] = {}, scale[N] = {};
                for (int64_t p = first; p < first + count; ++p)
#pragma GCC unroll 2
                    for (int i = 0; i < N; ++i) {
                        const int64_t at = p * out_ + c + i * L;
                        const Vec<A> t = load(grad_ + at, n) * drop_path(p);
                        shift[i] += t;
                        scale[i] += t * norm.hat(i, load(steps_.projected + at, n));
                    }
                for (int i = 0; i < N; ++i) {
                    partial.add(part, 0, c + i * L, n, shift[i]);
                    partial.add(part, 1, c + i * L, n, scale[i]);
                }
            });
        });
        partial.total(0, sums3_.shift);
        partial.total(1, sums3_.scale);
    }

    // z of a few channels of a block, and its sums with z̄.
    void walk(int64_t piece, int64_t image, int64_t first, int64_t count, int64_t c, int64_t width, const A* wide,
              A* gated) const {
        with_activation(steps_.block.activation, [&](auto kind) {
            for_each_vectors<A>(width, [&](auto size, int64_t i, int n) {
                if (gates_ == nullptr)
                    walk_vectors<size.value, kind.value, false>(piece, image, first, count, c + i, n, wide, gated + i);
                else
                    walk_vectors<size.value, kind.value, true>(piece, image, first, count, c + i, n, wide, gated + i);
            });
        });
    }

    template <int N, Activation KIND, bool GATED>
    void walk_vectors(int64_t piece, int64_t image, int64_t first, int64_t count, int64_t c, int n, const A* wide,
                      A* gated) const {
        const HatColumns<A, N> norm(norm2_, c, n);
        const T* from = steps_.convolved + first * channels_ + c;
        const A* z = wide + first * channels_ + c;
        const int64_t step = channels_;
        Vec<A> g[N], sum[N][sums] = {};
        for (int i = 0; i < N; ++i) g[i] = GATED ? load(gates_ + image * channels_ + c + i * L, n) : Vec<A>{};
        for (int64_t p = 0; p < count; ++p, from += step, z += step, gated += S) {
            // What the next columns read and write: pixels are further apart than the processor looks ahead.
            __builtin_prefetch(from + N * L);
            __builtin_prefetch(z + N * L, 1);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const Vec<A> a = load(from + i * L, n), hat = norm.hat(i, a), t = load(z + i * L, n);
                const Activated<A> u = activate_with_slope<A>(norm(i, a), KIND);
                const Vec<A> ts = t * u.slope;
                sum[i][slope] += ts;
                sum[i][slope_hat] += ts * hat;
                if constexpr (GATED) {
                    sum[i][gate] += t * u.value;
                    sum[i][slope_alone] += u.slope;
                    sum[i][slope_hat_alone] += u.slope * hat;
                    store(gated + i * L, u.value * g[i]);
                } else {
                    store(gated + i * L, u.value);
                }
            }
        }
        for (int i = 0; i < N; ++i)
            for (int which = 0; which < (GATED ? int(sums) : int(gate)); ++which)
                totals_.add(piece, which, c + i * L, n, sum[i][which]);
    }

    const Steps<T>& steps_;
    const T* const grad_;
    const BlockGrads& grads_;
    const NormVectors<A>& norm2_;
    const NormVectors<A> norm3_;
    const NormSums<A> sums3_;
    const A* const gates_;
    const int64_t channels_, out_, out_step_;
    const Parts image_;   // the pixels of an image in pieces
    const Parts pieces_;  // the pieces of all images in parts
    const PartialSums<A, sums> totals_;
};

template <class A>
void add_to(double* to, Vec<A> v, int n) {
    A values[lanes<A>];
    store(values, v);
    for (int i = 0; i < n; ++i) to[i] += double(values[i]);
}

// B4 of a block that expands: n̄1 from ā2, with its sums. The expanded tensor is read, or, where `expanded` is null,
// made again.
template <class T, class StageGradient>
void expanded_gradient(const Steps<T>& steps, const StageGradient& stage_gradient, const void* x, const T* expanded,
                       const NormVectors<Compute<T>>& norm, const NormSums<Compute<T>>& sums,
                       Compute<T>* filter_gradient, Compute<T>* to) {
    using A = Compute<T>;
    constexpr int L = lanes<A>, S = slab<A>;
    const DepthwiseShape& s = steps.shape;
    const int64_t channels = steps.channels, width = s.width;
    const PartialSums<double, 2> partial(gradient_parts(s, ceil_div(channels, S)), channels);
    const MadeRows<T> rows(steps, x);
    const auto pixel = [&](int64_t image, int64_t row) { return (image * s.height + row) * width; };
    // Values [pixels][step] become their activations, slopes and normalised values.
    const auto activate_row = [&](const auto* from, int64_t step, int64_t c, int64_t n, A* values, A* slopes) {
        with_activation(steps.block.activation, [&](auto kind) {
            for_each_vectors<A>(n, [&](auto size, int64_t i, int valid) {
                constexpr int N = decltype(size)::value;
                const HatColumns<A, N> columns(norm, c + i, valid);
                const auto* at = from + i;
                A *value = values + i, *slope = slopes + i, *hat = slope + width * S;
                for (int64_t p = 0; p < width; ++p, at += step, value += S, slope += S, hat += S) {
                    // The next row: pixels are further apart than the processor looks ahead.
                    __builtin_prefetch(at + width * step);
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j) {
                        const Vec<A> a = load(at + j * L, valid);
                        const Activated<A> u = activate_with_slope<A>(columns(j, a), kind.value);
                        store(value + j * L, u.value);
                        store(slope + j * L, u.slope);
                        store(hat + j * L, columns.hat(j, a));
                    }
                }
            });
        });
    };
    const auto stage_input = [&](int64_t image, int64_t row, int64_t c, int64_t n, A* values, A* slopes) {
        if (expanded != nullptr)
            return activate_row(expanded + pixel(image, row) * channels + c, channels, c, n, values, slopes);
        rows(image, row, c, n, values);
        activate_row(static_cast<const A*>(values), S, c, n, values, slopes);
    };
    const auto emit = [&](const MadeRow& made, int64_t c, int64_t n, const A* values, const A* slopes) {
        const A* const hats = slopes + width * S;
        for_each_vectors<A>(n, [&](auto size, int64_t i, int valid) {
            constexpr int N = decltype(size)::value;
            const int64_t at = pixel(made.image, made.row) * channels + c + i;
            Vec<A> shift[N] = {}, scale[N] = {};
            for (int64_t p = 0; p < width; ++p) {
                __builtin_prefetch(to + at + (p + width) * channels, 1);
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) {
                    const int64_t from = p * S + i + j * L;
                    const Vec<A> t = load(values + from) * load(slopes + from);
                    shift[j] += t;
                    scale[j] += t * load(hats + from);
                    store(to + at + p * channels + j * L, t, valid);
                }
            }
            for (int j = 0; j < N; ++j) {
                add_to<A>(partial.of(made.part, 0) + c + i + j * L, shift[j], valid);
                add_to<A>(partial.of(made.part, 1) + c + i + j * L, scale[j], valid);
            }
        });
    };
    depthwise_gradients<2>(s, steps.weights(steps.block.depthwise), stage_gradient, stage_input, true, emit,
                           filter_gradient);
    const Buffer<double> totals(channels);
    for (int which = 0; which < 2; ++which) {
        partial.total(which, totals);
        for (int64_t c = 0; c < channels; ++c) (which == 0 ? sums.shift : sums.scale)[c] = A(totals[c]);
    }
}

// B5 of a saved tensor: both products read ā1 where it is made.
template <class T>
void expand_backward_stored(const Steps<T>& steps, const void* grad, const void* x, const T* expanded,
                            const Compute<T>* activated_gradient, const NormGradient<Compute<T>>& norm_gradient,
                            const BlockGrads& grads) {
    using A = Compute<T>;
    constexpr int L = lanes<A>, S = slab<A>;
    const int64_t channels = steps.channels, step = round_up(channels, L), in = steps.block.in;
    const Weights<A> weights = Weights<A>::columns(steps.weights(steps.block.expand), channels, in);
    const Source<T> from = steps.input(x);
    A* const weight_gradient = static_cast<A*>(grads.expand.weight);
    T* const grad_x = static_cast<T*>(grads.x);
    const Parts parts = Parts::for_sums(steps.pixels_in, steps.pixels_in, channels * round_up(in, S));
    const WeightSums<A> weight_sums(weight_gradient == nullptr ? 0 : parts.parts, channels, in);
    Finish<T> finish{grad_x, in, in, Activation::none};
    if (steps.block.residual) finish.residual = static_cast<const T*>(grad);
    // A block of ā1 takes half of L2.
    const int64_t rows = larger(12, smaller(pixel_block, (192 << 10) / (step * int64_t(sizeof(A))) / 12 * 12));
    struct Memory {
        Scratch<A> gradient;
        StagedRows<T> input;
    };
    parallel_tasks(
        parts.parts, [&] { return Memory{Scratch<A>(rows * step), StagedRows<T>(from, rows, true)}; },
        [&](int64_t part, const Memory& own) {
            if (weight_gradient != nullptr) weight_sums.clear(part, 0, round_up(in, S));
            for_each_block(parts.begin(part), parts.begin(part + 1), rows, [&](int64_t first, int64_t count) {
                norm_gradient.stage(
                    first, count,
                    [&](int64_t, int64_t at, int n) {
                        __builtin_prefetch(activated_gradient + at + S);
                        return load(activated_gradient + at, n);
                    },
                    expanded, own.gradient, step);
                if (grad_x != nullptr)
                    weights.multiply(Left<A>::rows(own.gradient, channels, step), first, count, finish);
                if (weight_gradient == nullptr) return;
                const A* const right = own.input(first, count);
                for (int64_t c = 0; c < in; c += S)
                    weight_sums.add(part, count, own.gradient, step, right + c, own.input.step(), c,
                                    smaller(S, in - c));
            });
        });
    if (weight_gradient != nullptr) weight_sums.total(weight_gradient);
}

// B5 without the expanded tensor. ā1 is linear in n̄1 and x, so that both products of n̄1 and two of x are enough:
//   x̄ = (n̄1 - mean_t) W̃ - (x - mean) M,       W̃ = scale W1,  M = W1ᵀ (slope W̃)
//   W̄1 = scale (Σ n̄1 xᵀ - mean_t Σ xᵀ - slope W1 Σ (x - mean) (x - mean)ᵀ)
template <class T>
class MadeExpandBackward {
    using A = Compute<T>;
    static constexpr int L = lanes<A>, S = slab<A>;

  public:
    MadeExpandBackward(const Steps<T>& steps, const void* x, const NormVectors<A>& norm, const NormSums<A>& sums)
        : channels_(steps.channels),
          in_(steps.block.in),
          steps_(steps),
          x_(steps.input(x)),
          moments_(x_, steps.pixels_in),
          weight_(steps.weights(steps.block.expand)),
          scaled_(channels_ * in_),
          mean_t_(zeros<double>(channels_)),
          slope_(zeros<double>(channels_)),
          scale_(norm.scale()),
          shared_mean_(steps.saved.expand.processes == nullptr ? nullptr : norm.mean()) {
        for (int64_t c = 0; c < channels_; ++c)
            for (int64_t j = 0; j < in_; ++j) scaled_[c * in_ + j] = scale_[c] * weight_[c * in_ + j];
        if (!norm.normalises || !steps.is_batch(steps.saved.expand)) return;
        const NormMeans<A> means(steps.saved.expand, channels_, steps.pixels_in, sums);
        for (int64_t c = 0; c < channels_; ++c) {
            mean_t_[c] = means.shift(c);
            slope_[c] = double(norm.rstd()[c]) * means.scale(c);
        }
    }

    // `gradient` is n̄1; `residual`, the gradient of the block, joins x̄ where there is a residual.
    void operator()(const A* gradient, const T* residual, T* grad_x, A* weight_gradient) const {
        const Weights<A> scaled = Weights<A>::columns(scaled_, channels_, in_), correction = correction_of_x();
        const Parts parts = Parts::for_sums(steps_.pixels_in, steps_.pixels_in, channels_ * round_up(in_, S));
        const WeightSums<A> weight_sums(weight_gradient == nullptr ? 0 : parts.parts, channels_, in_);
        struct Memory {
            StagedRows<T> input;
            Scratch<A> sums;
        };
        parallel_tasks(
            parts.parts, [&] { return Memory{StagedRows<T>(x_, pixel_block, true), Scratch<A>(pixel_block * in_)}; },
            [&](int64_t part, const Memory& own) {
                if (weight_gradient != nullptr) weight_sums.clear(part, 0, round_up(in_, S));
                for_each_block(
                    parts.begin(part), parts.begin(part + 1), pixel_block, [&](int64_t first, int64_t count) {
                        const A *const rows = own.input(first, count), *const left = gradient + first * channels_;
                        if (grad_x != nullptr) {
                            Finish<A> finish{own.sums, in_, in_, Activation::none};
                            correction.multiply(Left<A>::rows(rows, in_, own.input.step()), 0, count, finish);
                            finish.residual = own.sums;
                            scaled.multiply(Left<A>::rows(left, channels_, channels_), 0, count, finish);
                            const int64_t at = first * in_;
                            store_sum(count * in_, own.sums, residual == nullptr ? nullptr : residual + at,
                                      grad_x + at);
                        }
                        for (int64_t c = 0; c < in_ && weight_gradient != nullptr; c += S)
                            weight_sums.add(part, count, left, channels_, rows + c, own.input.step(), c,
                                            smaller(S, in_ - c));
                    });
            });
        if (weight_gradient == nullptr) return;
        weight_sums.total(weight_gradient);
        correct(weight_gradient);
    }

  private:
    // -M, with a bias that takes the means in.
    Weights<A> correction_of_x() const {
        const Buffer<A> matrix(in_ * in_);
        const Buffer<double> rows = zeros<double>(in_ * in_), bias = zeros<double>(in_);
        parallel(in_, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                double* const row = rows + k * in_;
                for (int64_t c = 0; c < channels_; ++c) {
                    const double factor = double(weight_[c * in_ + k]) * slope_[c];
                    for (int64_t j = 0; j < in_; ++j) row[j] += factor * double(scaled_[c * in_ + j]);
                }
                for (int64_t j = 0; j < in_; ++j) matrix[k * in_ + j] = A(-row[j]);
            }
        });
        // The mean of x that all processes have is not known, but what W1 makes of it.
        if (shared_mean_ == nullptr)
            for (int64_t k = 0; k < in_; ++k)
                for (int64_t j = 0; j < in_; ++j) bias[j] += moments_.mean()[k] * rows[k * in_ + j];
        else
            for (int64_t c = 0; c < channels_; ++c)
                for (int64_t j = 0; j < in_; ++j)
                    bias[j] += double(shared_mean_[c]) * slope_[c] * double(scaled_[c * in_ + j]);
        for (int64_t c = 0; c < channels_; ++c)
            for (int64_t j = 0; j < in_; ++j) bias[j] -= mean_t_[c] * double(scaled_[c * in_ + j]);
        Weights<A> made = Weights<A>::columns(matrix, in_, in_);
        for (int64_t j = 0; j < in_; ++j) made.bias()[j] = A(bias[j]);
        return made;
    }

    void correct(A* weight_gradient) const {
        parallel(channels_, [&](int64_t begin, int64_t end) {
            const Buffer<double> deviations(in_);
            for (int64_t c = begin; c < end; ++c) {
                for (int64_t j = 0; j < in_; ++j) deviations[j] = 0;
                for (int64_t k = 0; k < in_; ++k)
                    for (int64_t j = 0; j < in_; ++j)
                        deviations[j] += double(weight_[c * in_ + k]) * moments_.products(k)[j];
                if (shared_mean_ != nullptr) {
                    // Deviations are from the mean of all processes, the products from that of this one.
                    double offset = -double(shared_mean_[c]);
                    for (int64_t k = 0; k < in_; ++k) offset += double(weight_[c * in_ + k]) * moments_.mean()[k];
                    offset *= double(steps_.pixels_in);
                    for (int64_t j = 0; j < in_; ++j) deviations[j] += offset * moments_.mean()[j];
                }
                for (int64_t j = 0; j < in_; ++j) {
                    const double sum = mean_t_[c] * moments_.mean()[j] * double(steps_.pixels_in);
                    A& at = weight_gradient[c * in_ + j];
                    at = A(double(scale_[c]) * (double(at) - sum - slope_[c] * deviations[j]));
                }
            }
        });
    }

    // to = sums (+ residual).
    static void store_sum(int64_t count, const A* sums, const T* residual, T* to) {
        for (int64_t i = 0; i < count; i += L) {
            const int n = int(smaller(L, count - i));
            Vec<A> v = load(sums + i, n);
            if (residual != nullptr) v += load(residual + i, n);
            store(to + i, v, n);
        }
    }

    const int64_t channels_, in_;
    const Steps<T>& steps_;
    const Source<T> x_;
    const InputMoments<T> moments_;
    const A* const weight_;
    const Buffer<A> scaled_;
    const Buffer<double> mean_t_, slope_;
    const A *const scale_, *const shared_mean_;  // of a1; null where one process has all values
};

// Whether some gradient is wanted beside those of the last normalisation.
bool passes_projection(const BlockGrads& grads) {
    const SqueezeExciteGrads& gate = grads.squeeze_excite;
    const void* const all[] = {grads.x,
                               grads.project.weight,
                               grads.expand.weight,
                               grads.expand.gamma,
                               grads.expand.beta,
                               grads.depthwise.weight,
                               grads.depthwise.gamma,
                               grads.depthwise.beta,
                               gate.reduce_weight,
                               gate.reduce_bias,
                               gate.expand_weight,
                               gate.expand_bias};
    for (const void* wanted : all)
        if (wanted != nullptr) return true;
    return false;
}

}  // namespace

template <class T>
void mbconv_backward(const Block& block, const void* grad, const void* x, const BlockSaved& saved,
                     const BlockGrads& grads) {
    using A = Compute<T>;
    Stopwatch watch;
    const Steps<T> steps(block, saved);
    const int64_t channels = steps.channels, gate_values = steps.gates ? steps.shape.batch * channels : 0;
    const SqueezeExciteShape excitation_shape = steps.excitation_shape(steps.gates ? steps.shape.batch : 0);
    const A* const pooled = static_cast<const A*>(saved.pooled);
    const Excitation<A> excitation(excitation_shape, block.squeeze_excite, pooled);
    const A* const gates = steps.gates ? static_cast<const A*>(excitation.gate) : nullptr;

    // B1 to B3
    const NormVectors<A> norm2 = steps.norm_of(channels, block.depthwise, saved.depthwise);
    const ProjectBackward<T> project(steps, static_cast<const T*>(grad), norm2, gates, grads);
    if (!passes_projection(grads)) return;
    const Buffer<A> wide(steps.pixels_out * channels), gate_gradient(gate_values), pool_gradient(gate_values);
    project(wide);
    watch.end(Step::B1_B2);
    if (steps.gates) {
        project.gate_gradient(gate_gradient);
        excitation_backward<A>(excitation_shape, block.squeeze_excite, pooled, excitation, gate_gradient, pool_gradient,
                               grads.squeeze_excite);
    }
    const NormSums<A> sums2(channels, grads.depthwise);
    project.norm_sums(pool_gradient, sums2);
    watch.end(Step::B3);

    // B4
    const NormGradient<A> gradient2(norm2, saved.depthwise, steps.pixels_out, sums2);
    const StageGradient<T, A> gradient_of_row{
        block.activation, steps.shape.out_height, steps.shape.out_width, steps.convolved, wide, norm2, gradient2, gates,
        pool_gradient};
    if (block.dense) {
        dense_gradients<T>(dense_shape(steps.shape, block.in), block.depthwise.weight, gradient_of_row, x,
                           block.residual ? static_cast<const T*>(grad) : nullptr, grads.depthwise.weight, grads.x);
        return watch.end(Step::B4);
    }
    const auto stage_gradient = [&](int64_t image, int64_t row, int64_t c, int64_t n, A* to) {
        gradient_of_row(image, row, c, n, to, slab<A>);
    };
    A* const filter_gradient = static_cast<A*>(grads.depthwise.weight);
    if (!steps.expands) {
        const Source<T> input = steps.input(x);
        const StageStored<T> stage_input{input, steps.shape.height, steps.shape.width};
        Epilogue<T> epilogue;
        epilogue.out = static_cast<T*>(grads.x);
        epilogue.channels = channels;
        if (block.residual) epilogue.residual = static_cast<const T*>(grad);
        depthwise_gradients<0>(
            steps.shape, steps.weights(block.depthwise), stage_gradient,
            [&](int64_t image, int64_t row, int64_t c, int64_t n, A* to, A*) { stage_input(image, row, c, n, to); },
            grads.x != nullptr,
            [&](const MadeRow& made, int64_t c, int64_t n, const A* values, const A*) {
                epilogue((made.image * steps.shape.height + made.row) * steps.shape.width, steps.shape.width, c, n,
                         values, slab<A>);
            },
            filter_gradient);
        return watch.end(Step::B4);
    }
    const Buffer<T> own(steps.own_expanded());
    T* const expanded = steps.expanded(own);
    if (expanded != nullptr && saved.expanded == nullptr) steps.multiply_input(x, expanded, {});
    const NormVectors<A> norm1 = steps.norm_of(channels, block.expand, saved.expand);
    const NormSums<A> sums1(channels, grads.expand);
    const Buffer<A> activated_gradient(steps.pixels_in * channels);
    expanded_gradient(steps, stage_gradient, x, static_cast<const T*>(expanded), norm1, sums1, filter_gradient,
                      static_cast<A*>(activated_gradient));
    watch.end(Step::B4);

    // B5
    if (grads.expand.weight == nullptr && grads.x == nullptr) return;
    if (expanded == nullptr) {
        MadeExpandBackward<T>(steps, x, norm1, sums1)(activated_gradient,
                                                      block.residual ? static_cast<const T*>(grad) : nullptr,
                                                      static_cast<T*>(grads.x), static_cast<A*>(grads.expand.weight));
    } else {
        const NormGradient<A> gradient1(norm1, saved.expand, steps.pixels_in, sums1);
        expand_backward_stored(steps, grad, x, static_cast<const T*>(expanded),
                               static_cast<const A*>(activated_gradient), gradient1, grads);
    }
    watch.end(Step::B5);
}

EFFNET_INSTANTIATE(mbconv_backward)

EFFNET_NAMESPACE_END
