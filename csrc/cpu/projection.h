// The last steps of a packed block: the gates of squeeze-and-excitation, and the projection, which gates its operand as
// it reads it.
#pragma once

#include "packed.h"
#include "squeeze_excite.h"

EFFNET_NAMESPACE_BEGIN

// The activated convolution of the images from `first` on.
template <class T>
struct Convolved {
    int64_t first, count, threads;
    T* values;
    Compute<T>* sums;  // [images][output rows][padded channels], of the values: the same however the work is cut
};

template <class T>
class PackedProjection {
    using A = Compute<T>;
    using E = Term<T>;
    static constexpr int L = lanes<A>;

  public:
    PackedProjection(const PackedBlock& b, const void* x, void* y)
        : b_(b),
          s_(b.depthwise_shape),
          channels_(s_.channels),
          padded_(round_up(s_.channels, panel_columns)),
          image_out_(s_.out_height * s_.out_width),
          x_(static_cast<const T*>(x)),
          y_(static_cast<T*>(y)),
          reduce_bias_(b.reduce_bias, b.reduced),
          excite_bias_(b.excite_bias, channels_),
          project_bias_(b.project_bias, b.out) {}

    // What happens to projected pixels of the images from `first` on.
    Finish<T> finish_of(int64_t first) const {
        Finish<T> finish{y_ + first * image_out_ * b_.out, b_.out, b_.out, Activation::none};
        if (b_.residual) finish.residual = x_ + first * image_out_ * b_.out;
        if (b_.drop_path != nullptr) finish.image_scale = static_cast<const A*>(b_.drop_path) + first;
        finish.image_pixels = image_out_;
        return finish;
    }

    void project(const Convolved<T>& done) const {
        multiply_blocks(done.count * image_out_, done.threads, projection(), static_cast<const A*>(project_bias_),
                        finish_of(done.first), [&](int64_t block_rows) { return Gated(*this, done, block_rows); });
    }

    // `count` pixels, the first of which is number `pixel` of all images.
    void rows(int64_t pixel, int64_t count, const T* convolved) const {
        const Panels<E> panels = projection();
        TermRows<T> terms(convolved, channels_, count);
        const auto left = Left<E>::rows(terms(0, count), panels.terms, panels.terms);
        multiply_rows(left, pixel, count, panels, 0, panels.vectors(), static_cast<const A*>(project_bias_),
                      finish_of(0));
    }

  private:
    // The gates of all images: [images][padded channels].
    void excite(const Convolved<T>& done, A* gates) const {
        const int64_t reduced = round_up(b_.reduced, panel_columns);
        const Scratch<A> hidden(done.count * reduced);
        A* const mean = gates;
        const A factor = A(1) / A(image_out_);
        for (int64_t image = 0; image < done.count; ++image)
            for (int64_t c = 0; c < padded_; c += L) {
                Vec<A> sum = {};
                for (int64_t row = 0; row < s_.out_height; ++row)
                    sum += load(done.sums + (image * s_.out_height + row) * padded_ + c);
                store(mean + image * padded_ + c, sum * factor);
            }
        const Panels<A> reduce{static_cast<const A*>(b_.reduce), channels_, b_.reduced},
            excite{static_cast<const A*>(b_.excite), b_.reduced, channels_};
        multiply_rows(Left<A>::rows(mean, channels_, padded_), 0, done.count, reduce, 0, reduce.vectors(),
                      static_cast<const A*>(reduce_bias_),
                      Finish<A>{hidden, reduced, b_.reduced, b_.squeeze_activation});
        multiply_rows(Left<A>::rows(hidden, b_.reduced, reduced), 0, done.count, excite, 0, excite.vectors(),
                      static_cast<const A*>(excite_bias_), Finish<A>{gates, padded_, padded_, Activation::none});
        for (int64_t i = 0; i < done.count * padded_; i += L) store(gates + i, gate<A>(load(gates + i), b_.gate));
    }

    // What one thread multiplies in step two: rows of what step one left, gated. Each thread computes the gates itself:
    // that is cheaper than waiting for another.
    class Gated {
      public:
        Gated(const PackedProjection& run, const Convolved<T>& done, int64_t block_rows)
            : run_(run),
              done_(done),
              gates_(run.b_.reduced == 0 ? 0 : done.count * run.padded_),
              rows_(done.values, run.channels_, block_rows, run.b_.reduced != 0) {
            if (run.b_.reduced != 0) run.excite(done, gates_);
        }
        const E* operator()(int64_t first, int64_t count) {
            if (run_.b_.reduced == 0) return rows_(first, count);
            return rows_.staged(first, count,
                                [&](int64_t row) { return gates_ + row / run_.image_out_ * run_.padded_; });
        }

      private:
        const PackedProjection& run_;
        const Convolved<T>& done_;
        const Scratch<A> gates_;
        TermRows<T> rows_;
    };

    Panels<E> projection() const { return {static_cast<const E*>(b_.project), term_count<E>(channels_), b_.out}; }

    const PackedBlock& b_;
    const DepthwiseShape& s_;
    const int64_t channels_, padded_, image_out_;
    const T* const x_;
    T* const y_;
    const Padded<A> reduce_bias_, excite_bias_, project_bias_;
};

EFFNET_NAMESPACE_END
