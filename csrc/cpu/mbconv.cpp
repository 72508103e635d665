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

// Rows of the expanded tensor, made when the depthwise convolution asks for them: they never reach memory.
template <class A>
struct StageExpanded {
    const DepthwiseShape& shape;
    const A* x;
    int64_t in;
    const A* packed;
    const Epilogue<A>& finish;

    void operator()(int64_t image, int64_t row, int64_t c, int64_t n, A* to) const {
        const A* pixels = x + (image * shape.height + row) * shape.width * in;
        panel(shape.width, n, in, pixels, in, 1, packed + c * in, slab<A>, to, slab<A>);
        finish.in_place(shape.width, c, n, to, slab<A>);
    }
};

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
    const Steps<T> steps(block);
    const DepthwiseShape& shape = steps.shape;
    const NormVectors<A> norm2(steps.channels, block.depthwise, block.depthwise.mean, block.depthwise.var);
    const NormVectors<A> norm3(block.out, block.project, block.project.mean, block.project.var);
    const Buffer<T> convolved(steps.pixels_out * steps.channels);
    const Epilogue<T> activate_convolved = normalising<A, T>(norm2, convolved, block.activation);
    const Source<T> input = steps.input(x);
    if (steps.expands) {
        const NormVectors<A> norm1(steps.channels, block.expand, block.expand.mean, block.expand.var);
        const Buffer<A> packed = pack(steps.weights(block.expand), block.in, 1, steps.channels, block.in);
        const Buffer<A> wide(input.direct() ? 0 : steps.pixels_in * block.in);
        if (!input.direct()) widen(steps.pixels_in * block.in, static_cast<const T*>(x), static_cast<A*>(wide));
        const Epilogue<A> activate_expanded = normalising<A, A>(norm1, nullptr, block.activation);
        const StageExpanded<A> stage{shape, input.direct() ? static_cast<const A*>(x) : wide, block.in, packed,
                                     activate_expanded};
        depthwise_rows<A>(shape, steps.weights(block.depthwise), stage,
                          [&](int64_t image, int64_t row, int64_t c, int64_t n, const A* values) {
                              activate_convolved((image * shape.out_height + row) * shape.out_width, shape.out_width, c,
                                                 n, values, slab<A>);
                          });
    } else {
        depthwise_forward(shape, input, steps.weights(block.depthwise), activate_convolved);
    }
    Operand gated{convolved};
    const Buffer<A> pooled(block.reduced == 0 ? 0 : shape.batch * steps.channels);
    Buffer<A> gate;
    if (block.reduced != 0) {
        pool(shape.batch, steps.image_out, Source<T>(gated, steps.channels, steps.image_out), static_cast<A*>(pooled));
        Excitation<A> excitation(steps.excitation_shape(), block.squeeze_excite, pooled);
        gate.swap(excitation.gate);
        gated.gate = gate;
    }
    const Buffer<A> packed = pack(steps.weights(block.project), steps.channels, 1, block.out, steps.channels);
    Epilogue<T> epilogue = normalising<A, T>(norm3, static_cast<T*>(y), Activation::none);
    epilogue.image_pixels = steps.image_out;
    epilogue.image_scale = static_cast<const A*>(block.drop_path);
    epilogue.residual = block.residual ? static_cast<const T*>(x) : nullptr;
    product(steps.pixels_out, Source<T>(gated, steps.channels, steps.image_out), packed, block.out, epilogue);
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
