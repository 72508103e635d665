// The block, composed of the other words. The steps F1-F5 and B1-B5 are those of docs/mbconv.md.
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// A block with its tensors typed and its normalisations prepared.
template <class T>
struct Steps {
    using A = Compute<T>;
    const Block& block;
    const DepthwiseShape& shape;
    const bool expands;
    const int64_t channels, image_in, image_out, pixels_in, pixels_out;

    explicit Steps(const Block& block)
        : block(block),
          shape(block.depthwise_shape),
          expands(block.expand.weight != nullptr),
          channels(shape.channels),
          image_in(shape.height * shape.width),
          image_out(shape.out_height * shape.out_width),
          pixels_in(shape.batch * image_in),
          pixels_out(shape.batch * image_out) {}

    static const A* weights(const ConvNorm& conv) { return static_cast<const A*>(conv.weight); }

    static NormVectors<A> norm_of(int64_t channels, const ConvNorm& conv, const BatchStatistics& batch) {
        const bool constant = batch.mean == nullptr;
        return NormVectors<A>(channels, conv, constant ? conv.mean : batch.mean, constant ? conv.var : batch.var);
    }

    SqueezeExciteShape excitation_shape() const { return {shape.batch, image_out, channels, block.reduced}; }

    Source<T> input(const void* x) const { return Source<T>({x}, block.in, image_in); }

    // activation(norm(data)) of an expanded tensor, gated where a gate is given.
    Source<T> activated(const void* data, const NormVectors<A>& norm, int64_t image_pixels, const A* gate) const {
        return Source<T>({data, norm.norm(), block.activation, gate}, channels, image_pixels);
    }

    // What the depthwise convolution reads: the expanded tensor through its normalisation, or x itself.
    Source<T> depthwise_input(const void* x, const void* expanded, const NormVectors<A>* norm) const {
        return expands ? activated(expanded, *norm, image_in, nullptr) : input(x);
    }

    void expand(const void* x, T* expanded) const {
        const Buffer<A> packed = pack(weights(block.expand), block.in, 1, channels, block.in);
        Epilogue<T> epilogue;
        epilogue.out = expanded;
        epilogue.channels = channels;
        product(pixels_in, input(x), packed, channels, epilogue);
    }
};

template <class A>
struct Sums {
    Buffer<A> own_shift, own_scale;
    A *shift, *scale;
    Sums(int64_t channels, const ConvNormGrads& grads)
        : own_shift(channels),
          own_scale(channels),
          shift(grads.beta == nullptr ? static_cast<A*>(own_shift) : static_cast<A*>(grads.beta)),
          scale(grads.gamma == nullptr ? static_cast<A*>(own_scale) : static_cast<A*>(grads.gamma)) {}
};

// Both halves of a normalisation's backward pass: d, the gradient after `x` was activated and gated, becomes the
// gradient of the convolution.
template <class T>
void norm_backward(int64_t pixels, const Source<T>& x, const NormVectors<Compute<T>>& norm, bool batch_statistics,
                   const Compute<T>* pool_gradient, Compute<T>* d, const ConvNormGrads& grads) {
    const Sums<Compute<T>> sums(x.channels, grads);
    norm_backward_reduce(pixels, x, norm, pool_gradient, d, sums.shift, sums.scale);
    norm_backward_apply(pixels, x.data, norm, batch_statistics, sums.shift, sums.scale, d);
}

// Filters [channels][taps] of a panel of channels from `c` on, to [taps][channels], times scale[channel].
template <class A>
void pack_filters(int64_t c, int64_t channels, int64_t taps, const A* weight, const A* scale, A* to) {
    const int64_t valid = smaller(panel_columns, channels - c);
    transpose(valid, taps, weight + c * taps, taps, to + c, channels);
    if (scale == nullptr) return;
    for (int64_t i = 0; i < valid; i += lanes<A>) {
        const int n = int(smaller(lanes<A>, valid - i));
        const Vec<A> factor = load(scale + c + i, n);
        for (int64_t t = 0; t < taps; ++t) {
            A* const at = to + t * channels + c + i;
            store(at, load(at, n) * factor, n);
        }
    }
}

template <class A, class O>
Epilogue<O> normalising(const NormVectors<A>& norm, O* out, Activation activation) {
    Epilogue<O> epilogue;
    epilogue.out = out;
    epilogue.channels = norm.channels;
    if (norm.normalises) {
        epilogue.mean = norm.mean();
        epilogue.scale = norm.scale();
    }
    epilogue.shift = norm.shift();
    epilogue.activation = activation;
    return epilogue;
}

}  // namespace

template <class T>
void mbconv_inference(const Block& block, const void* x, void* y) {
    using A = Compute<T>;
    using E = Term<T>;
    const DepthwiseShape& s = block.depthwise_shape;
    const int64_t channels = s.channels, taps = s.kernel_h * s.kernel_w, reduced = block.reduced;
    const bool expands = block.expand.weight != nullptr;
    const FoldedNorm<A> norm1(expands ? channels : 0, block.expand), norm2(channels, block.depthwise),
        norm3(block.out, block.project);
    const Scratch<E> expand(expands ? Panels<E>::size(block.in, channels) : 0),
        project(Panels<E>::size(channels, block.out));
    const Scratch<A> depthwise(taps * channels), reduce(Panels<A>::size(channels, reduced)),
        excite(Panels<A>::size(reduced, channels));
    const SqueezeExciteParams& se = block.squeeze_excite;
    // All that is packed, in one parallel loop: panels of each product, and slices of the depthwise filters.
    const auto panels = [](int64_t columns) { return ceil_div(columns, panel_columns); };
    const int64_t ends[] = {expands ? panels(channels) : 0, panels(block.out), panels(channels),
                            reduced == 0 ? 0 : panels(reduced), reduced == 0 ? 0 : panels(channels)};
    const auto pack_one = [&](int which, int64_t i) {
        const auto weight = [](const void* p) { return static_cast<const A*>(p); };
        if (which == 0)
            return pack_panel_of<E>(i, weight(block.expand.weight), block.in, channels, norm1.scale(),
                                    static_cast<E*>(expand));
        if (which == 1)
            return pack_panel_of<E>(i, weight(block.project.weight), channels, block.out, norm3.scale(),
                                    static_cast<E*>(project));
        if (which == 2)
            return pack_filters(i * panel_columns, channels, taps, weight(block.depthwise.weight), norm2.scale(),
                                static_cast<A*>(depthwise));
        if (which == 3)
            return pack_panel_of<A>(i, weight(se.reduce_weight), channels, reduced, weight(nullptr),
                                    static_cast<A*>(reduce));
        pack_panel_of<A>(i, weight(se.expand_weight), reduced, channels, weight(nullptr), static_cast<A*>(excite));
    };
    int64_t total = 0;
    for (int64_t end : ends) total += end;
    parallel_tasks(
        total, [] { return 0; },
        [&](int64_t task, int) {
            int which = 0;
            for (; task >= ends[which]; ++which) task -= ends[which];
            pack_one(which, task);
        });
    PackedBlock packed{s, block.in, block.out, reduced};
    if (expands) packed.expand = static_cast<E*>(expand);
    packed.expand_bias = norm1.shift();
    packed.depthwise = static_cast<A*>(depthwise);
    packed.depthwise_bias = norm2.shift();
    packed.reduce = static_cast<A*>(reduce);
    packed.reduce_bias = se.reduce_bias;
    packed.excite = static_cast<A*>(excite);
    packed.excite_bias = se.expand_bias;
    packed.project = static_cast<E*>(project);
    packed.project_bias = norm3.shift();
    packed.activation = block.activation;
    packed.squeeze_activation = se.activation;
    packed.gate = se.gate;
    packed.residual = block.residual;
    packed.drop_path = block.drop_path;
    mbconv_packed<T>(packed, x, y);
}

template <class T>
void mbconv_training(const Block& block, const void* x, void* y, const BlockSaved& saved) {
    using A = Compute<T>;
    const Steps<T> steps(block);
    const int64_t channels = steps.channels;
    T *const convolved = static_cast<T*>(saved.convolved), *const projected = static_cast<T*>(saved.projected);
    const auto statistics = [](int64_t pixels, int64_t count, const T* values, const BatchStatistics& to) {
        if (to.mean != nullptr)
            channel_statistics(pixels, count, values, static_cast<A*>(to.mean), static_cast<A*>(to.var));
    };

    // F1, F2: the expanded tensor lives until the depthwise convolution has read it, or longer where it is saved.
    {
        Buffer<T> own(steps.expands && saved.expanded == nullptr ? steps.pixels_in * channels : 0);
        T* const expanded = saved.expanded == nullptr ? static_cast<T*>(own) : static_cast<T*>(saved.expanded);
        if (steps.expands) {
            steps.expand(x, expanded);
            statistics(steps.pixels_in, channels, expanded, saved.expand);
        }
        const NormVectors<A> norm1 = steps.expands ? steps.norm_of(channels, block.expand, saved.expand)
                                                   : NormVectors<A>(0, {}, nullptr, nullptr);
        Epilogue<T> epilogue;
        epilogue.out = convolved;
        epilogue.channels = channels;
        depthwise_forward(steps.shape, steps.depthwise_input(x, expanded, &norm1), steps.weights(block.depthwise),
                          epilogue);
    }
    statistics(steps.pixels_out, channels, convolved, saved.depthwise);
    const NormVectors<A> norm2 = steps.norm_of(channels, block.depthwise, saved.depthwise);

    // F3
    Buffer<A> gate;
    if (block.reduced != 0) {
        A* const pooled = static_cast<A*>(saved.pooled);
        pool(steps.shape.batch, steps.image_out, steps.activated(convolved, norm2, steps.image_out, nullptr), pooled);
        Excitation<A> excitation(steps.excitation_shape(), block.squeeze_excite, pooled);
        gate.swap(excitation.gate);
    }

    // F4
    {
        const Buffer<A> packed = pack(steps.weights(block.project), channels, 1, block.out, channels);
        Epilogue<T> epilogue;
        epilogue.out = projected;
        epilogue.channels = block.out;
        product(steps.pixels_out, steps.activated(convolved, norm2, steps.image_out, gate), packed, block.out,
                epilogue);
    }
    statistics(steps.pixels_out, block.out, projected, saved.project);

    // F5
    const NormVectors<A> norm3 = steps.norm_of(block.out, block.project, saved.project);
    Epilogue<T> epilogue = normalising<A, T>(norm3, static_cast<T*>(y), Activation::none);
    epilogue.image_pixels = steps.image_out;
    epilogue.image_scale = static_cast<const A*>(block.drop_path);
    epilogue.residual = block.residual ? static_cast<const T*>(x) : nullptr;
    Reduction(steps.pixels_out).blocks([&](int64_t, int64_t first, int64_t count) {
        epilogue.stored(first, count, projected + first * block.out);
    });
}

template <class T>
void mbconv_backward(const Block& block, const void* grad, const void* x, const BlockSaved& saved,
                     const BlockGrads& grads) {
    using A = Compute<T>;
    const Steps<T> steps(block);
    const DepthwiseShape& shape = steps.shape;
    const int64_t channels = steps.channels, out = block.out;
    const auto is_batch = [](const BatchStatistics& statistics) { return statistics.mean != nullptr; };

    // B1
    Buffer<A> projected_gradient(steps.pixels_out * out);
    Epilogue<A> scaled;
    scaled.out = projected_gradient;
    scaled.channels = out;
    scaled.image_pixels = steps.image_out;
    scaled.image_scale = static_cast<const A*>(block.drop_path);
    Reduction(steps.pixels_out).blocks([&](int64_t, int64_t first, int64_t count) {
        scaled.stored(first, count, static_cast<const T*>(grad) + first * out);
    });
    const NormVectors<A> norm3 = steps.norm_of(out, block.project, saved.project);
    norm_backward(steps.pixels_out, Source<T>({saved.projected}, out, steps.image_out), norm3, is_batch(saved.project),
                  static_cast<const A*>(nullptr), static_cast<A*>(projected_gradient), grads.project);

    // B2
    const NormVectors<A> norm2 = steps.norm_of(channels, block.depthwise, saved.depthwise);
    const SqueezeExciteShape excitation_shape = steps.excitation_shape();
    const Excitation<A> excitation(block.reduced == 0 ? SqueezeExciteShape{} : excitation_shape, block.squeeze_excite,
                                   static_cast<const A*>(saved.pooled));
    const A* const gates = block.reduced == 0 ? nullptr : static_cast<const A*>(excitation.gate);
    const Source<T> gated = steps.activated(saved.convolved, norm2, steps.image_out, gates);
    if (grads.project.weight != nullptr)
        weight_gradient(steps.pixels_out, static_cast<const A*>(projected_gradient), out, gated,
                        static_cast<A*>(grads.project.weight));
    Buffer<A> wide_gradient(steps.pixels_out * channels);
    {
        const Buffer<A> packed = pack(steps.weights(block.project), 1, channels, channels, out);
        Epilogue<A> epilogue;
        epilogue.out = wide_gradient;
        epilogue.channels = channels;
        product(steps.pixels_out, Source<A>({projected_gradient}, out, steps.image_out), packed, channels, epilogue);
    }

    // B3
    const int64_t gate_values = block.reduced == 0 ? 0 : shape.batch * channels;
    const Buffer<A> gate_gradient(gate_values), pool_gradient(gate_values);
    if (block.reduced != 0) {
        image_sums<A>(shape.batch, steps.image_out, channels, A(1), gate_gradient,
                      [&](int64_t first, int64_t count, int64_t c, int n) {
                          return gated.activated_sum(
                              first, count, c, n, [&](int64_t p) { return load(wide_gradient + p * channels + c, n); });
                      });
        excitation_backward<A>(excitation_shape, block.squeeze_excite, static_cast<const A*>(saved.pooled), excitation,
                               gate_gradient, pool_gradient, grads.squeeze_excite);
    }
    norm_backward(steps.pixels_out, gated, norm2, is_batch(saved.depthwise), static_cast<const A*>(pool_gradient),
                  static_cast<A*>(wide_gradient), grads.depthwise);

    // B4
    A* const filter_gradient = static_cast<A*>(grads.depthwise.weight);
    if (!steps.expands) {
        T* const grad_x = static_cast<T*>(grads.x);
        depthwise_gradients(shape, static_cast<const A*>(wide_gradient), steps.input(x), steps.weights(block.depthwise),
                            grad_x, filter_gradient);
        if (block.residual && grad_x != nullptr) add(steps.pixels_in * block.in, static_cast<const T*>(grad), grad_x);
        return;
    }
    Buffer<T> own(saved.expanded == nullptr ? steps.pixels_in * channels : 0);
    T* const expanded = saved.expanded == nullptr ? static_cast<T*>(own) : static_cast<T*>(saved.expanded);
    if (saved.expanded == nullptr) steps.expand(x, expanded);
    const NormVectors<A> norm1 = steps.norm_of(channels, block.expand, saved.expand);
    const Source<T> activated = steps.activated(expanded, norm1, steps.image_in, nullptr);
    Buffer<A> expanded_gradient(steps.pixels_in * channels);
    depthwise_gradients(shape, static_cast<const A*>(wide_gradient), activated, steps.weights(block.depthwise),
                        static_cast<A*>(expanded_gradient), filter_gradient);
    norm_backward(steps.pixels_in, activated, norm1, is_batch(saved.expand), static_cast<const A*>(nullptr),
                  static_cast<A*>(expanded_gradient), grads.expand);

    // B5
    if (grads.expand.weight != nullptr)
        weight_gradient(steps.pixels_in, static_cast<const A*>(expanded_gradient), channels, steps.input(x),
                        static_cast<A*>(grads.expand.weight));
    if (grads.x == nullptr) return;
    const Buffer<A> packed = pack(steps.weights(block.expand), 1, block.in, block.in, channels);
    Epilogue<T> epilogue;
    epilogue.out = static_cast<T*>(grads.x);
    epilogue.channels = block.in;
    epilogue.residual = block.residual ? static_cast<const T*>(grad) : nullptr;
    product(steps.pixels_in, Source<A>({expanded_gradient}, channels, steps.image_in), packed, block.in, epilogue);
}

EFFNET_INSTANTIATE(mbconv_inference)
EFFNET_INSTANTIATE(mbconv_training)
EFFNET_INSTANTIATE(mbconv_backward)

EFFNET_NAMESPACE_END
