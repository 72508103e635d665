// What the forward and the backward pass of a block in training share. The steps F1 to F5 and B1 to B5 are those of
// docs/mbconv.md.
#pragma once

#include "depthwise.h"
#include "squeeze_excite.h"
#include "training.h"

EFFNET_NAMESPACE_BEGIN

// A block with its tensors typed.
template <class T>
struct Steps {
    using A = Compute<T>;
    static constexpr int L = lanes<A>;
    // Values are stored as they are computed. Others are rounded, which near the corner of an activation decides on
    // which side they are: the expanded tensor is stored then, for as long as it is needed.
    static constexpr bool exact = sizeof(T) == sizeof(A);

    const Block& block;
    const DepthwiseShape& shape;
    const BlockSaved& saved;
    const bool expands, gates;
    const int64_t channels, image_in, image_out, pixels_in, pixels_out;
    T *const convolved, *const projected;

    Steps(const Block& block, const BlockSaved& saved)
        : block(block),
          shape(block.depthwise_shape),
          saved(saved),
          expands(block.expand.weight != nullptr),
          gates(block.reduced != 0),
          channels(shape.channels),
          image_in(shape.height * shape.width),
          image_out(shape.out_height * shape.out_width),
          pixels_in(shape.batch * image_in),
          pixels_out(shape.batch * image_out),
          convolved(static_cast<T*>(saved.convolved)),
          projected(static_cast<T*>(saved.projected)) {}

    static const A* weights(const ConvNorm& conv) { return static_cast<const A*>(conv.weight); }
    static bool is_batch(const BatchStatistics& statistics) { return statistics.mean != nullptr; }

    static NormVectors<A> norm_of(int64_t channels, const ConvNorm& conv, const BatchStatistics& batch) {
        const bool constant = !is_batch(batch);
        return NormVectors<A>(channels, conv, constant ? conv.mean : batch.mean, constant ? conv.var : batch.var);
    }

    // The expanded tensor: saved, or for as long as `own` lives, or null where it is made a few rows at a time.
    int64_t own_expanded() const { return exact || saved.expanded != nullptr ? 0 : pixels_in * channels; }
    T* expanded(const Buffer<T>& own) const {
        return saved.expanded != nullptr ? static_cast<T*>(saved.expanded) : static_cast<T*>(own);
    }

    SqueezeExciteShape excitation_shape(int64_t images) const { return {images, image_out, channels, block.reduced}; }
    Source<T> input(const void* x) const { return Source<T>(x, block.in); }

    // activation(norm(data)) of an expanded tensor.
    Source<T> activated(const void* data, const NormVectors<A>& norm) const {
        return Source<T>(data, channels, norm.norm(), block.activation);
    }

    // F1: the expanded tensor, where `expanded` is not null, and its statistics.
    void expand(const void* x, T* expanded) const {
        // Of few channels, x is less work than what it expands to. Which way is taken must not depend on what is saved.
        constexpr int64_t few = 64;
        const bool from_input = exact && block.in <= few;
        if (from_input && is_batch(saved.expand))
            InputMoments<T>(input(x), pixels_in).statistics(weights(block.expand), channels, saved.expand);
        const BatchStatistics to = from_input ? BatchStatistics{} : saved.expand;
        if (expanded != nullptr || is_batch(to)) multiply_input(x, expanded, to);
    }

    void multiply_input(const void* x, T* expanded, const BatchStatistics& to) const {
        const Weights<A> weights = Weights<A>::rows(this->weights(block.expand), block.in, channels);
        const Source<T> from = input(x);
        const Parts parts{pixels_in, larger(1, smaller(64, pixels_in / pixel_block))};
        const int64_t slabs = ceil_div(channels, slab<A>), groups = smaller(slabs, ceil_div(8, parts.parts));
        const Moments<A> moments(parts.parts, channels, to);
        struct Memory {
            StagedRows<T> rows;
            Scratch<A> values;
        };
        parallel_tasks(
            parts.parts * groups,
            [&] { return Memory{StagedRows<T>(from, pixel_block, false), Scratch<A>(pixel_block * slab<A>)}; },
            [&](int64_t task, const Memory& own) {
                const int64_t part = task / groups, group = task % groups, start = parts.begin(part);
                for_each_block(start, parts.begin(part + 1), pixel_block, [&](int64_t first, int64_t count) {
                    const auto left = Left<A>::rows(own.rows(first, count), block.in, own.rows.step());
                    for (int64_t i = slabs * group / groups; i < slabs * (group + 1) / groups; ++i) {
                        const int64_t c = i * slab<A>, width = smaller(slab<A>, channels - c);
                        weights.multiply_slab(left, count, c, width, own.values);
                        if (expanded != nullptr) store_rows(own.values, count, width, expanded + first * channels + c);
                        if (!moments.wanted) continue;
                        // Of the values as the next step reads them.
                        if constexpr (exact)
                            moments.add(part, first - start, count, static_cast<const A*>(own.values), slab<A>, c,
                                        width);
                        else
                            moments.add(part, first - start, count,
                                        static_cast<const T*>(expanded + first * channels + c), channels, c, width);
                    }
                });
            });
        moments.merge([&](int64_t part) { return parts.size(part); });
    }

  private:
    void store_rows(const A* values, int64_t count, int64_t width, T* to) const {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t i = 0; i < width; i += L)
                store(to + p * channels + i, load(values + p * slab<A> + i), int(smaller(L, width - i)));
    }

  public:
    // F2
    template <class Stage>
    void convolve(const Stage& stage) const {
        const int64_t slabs = ceil_div(channels, slab<A>), chunks = row_chunks(shape.batch * slabs, shape.out_height);
        const int64_t rows_at_once = ceil_div(pixel_block, shape.out_width), width = shape.out_width;
        const Moments<A> moments(shape.batch * chunks, channels, saved.depthwise);
        Epilogue<T> epilogue;
        epilogue.out = convolved;
        epilogue.channels = channels;
        depthwise_rows<A>(
            shape, weights(block.depthwise), stage, [&](const MadeRow& made, int64_t c, int64_t n, const A* values) {
                const int64_t row = made.image * shape.out_height + made.row, done = made.row - made.first;
                epilogue(row * width, width, c, n, values, slab<A>);
                if (!moments.wanted || ((done + 1) % rows_at_once != 0 && made.row + 1 != made.last)) return;
                const int64_t rows = done % rows_at_once + 1, first = row + 1 - rows;
                moments.add(made.part, (done + 1 - rows) * width, rows * width,
                            convolved + first * width * channels + c, channels, c, n);
            });
        moments.merge([&](int64_t part) {
            const int64_t chunk = part % chunks;
            return (shape.out_height * (chunk + 1) / chunks - shape.out_height * chunk / chunks) * width;
        });
    }
};

// Rows of the expanded tensor, a slab of channels at a time, made from x where they are read: it is never in memory.
template <class T>
class MadeRows {
    using A = Compute<T>;

  public:
    MadeRows(const Steps<T>& steps, const void* x)
        : steps_(steps),
          x_(steps.input(x)),
          weights_(Weights<A>::rows(steps.weights(steps.block.expand), steps.block.in, steps.channels)) {}

    void operator()(int64_t image, int64_t row, int64_t c, int64_t n, A* to) const {
        const int64_t width = steps_.shape.width;
        const StagedRows<T> rows(x_, width, false);
        const A* const from = rows((image * steps_.shape.height + row) * width, width);
        weights_.multiply_slab(Left<A>::rows(from, steps_.block.in, rows.step()), width, c, n, to);
    }

  private:
    const Steps<T>& steps_;
    const Source<T> x_;
    const Weights<A> weights_;
};

// The same through their normalisation and activation.
template <class T>
struct StageMade {
    using A = Compute<T>;
    const Steps<T>& steps;
    const MadeRows<T>& rows;
    const NormVectors<A>& norm;

    void operator()(int64_t image, int64_t row, int64_t c, int64_t n, A* to) const {
        constexpr int L = lanes<A>, S = slab<A>;
        rows(image, row, c, n, to);
        with_activation(steps.block.activation, [&](auto kind) {
            for_each_vectors<A>(n, [&](auto size, int64_t i, int valid) {
                constexpr int N = decltype(size)::value;
                const NormColumns<A, N> columns(norm.mean(), norm.scale(), norm.shift(), c + i, valid);
                A* at = to + i;
                for (int64_t p = 0; p < steps.shape.width; ++p, at += S)
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        store(at + j * L, activate<A>(columns(j, load(at + j * L)), kind.value));
            });
        });
    }
};

EFFNET_NAMESPACE_END
