// The block with a dense convolution in place of expansion and depthwise convolution, for inference. Some rows of the
// expanded tensor are projected while they are in cache; with a gate, an image waits for it. Without a projection the
// block is the convolution alone.
#include "convolution.h"
#include "projection.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// E: the terms of the convolution.
template <class T, class E>
class FusedRun {
    using A = Compute<T>;
    static constexpr int L = lanes<A>;

  public:
    FusedRun(const PackedBlock& b, const void* x, void* y)
        : b_(b),
          s_(dense_shape(b.depthwise_shape, b.in)),
          image_out_(s_.out_height * s_.out_width),
          padded_(round_up(s_.out, panel_columns)),
          panels_{static_cast<const E*>(b.expand), s_.kernel_h * s_.kernel_w * term_count<E>(s_.in), s_.out},
          bias_(b.expand_bias, s_.out),
          dense_(s_, x),
          projection_(b, x, y),
          x_(static_cast<const T*>(x)),
          y_(static_cast<T*>(y)) {}

    void operator()() const {
        if (b_.project == nullptr) return convolution_alone();
        if (b_.reduced == 0) return in_one_step();
        // Whole images to the threads as far as they go round; the rest is shared.
        const int64_t threads = thread_count(), alone = s_.batch / threads * threads;
        parallel_tasks(alone, [] { return 0; }, [&](int64_t image, int) { with_gate(image, 1); });
        for (int64_t image = alone; image < s_.batch; ++image) with_gate(image, threads);
    }

  private:
    using Ring = typename DenseRows<T, E>::Ring;

    static void nothing(int64_t, int64_t) {}

    // body(image, first row, end, opened) for chunks of the rows of these images.
    template <class Open, class Body>
    void chunks(int64_t first, int64_t count, int64_t threads, const Open& open, const Body& body) const {
        const int64_t chunks = smaller(s_.out_height, 4 * ceil_div(threads, count));
        parallel_tasks(count * chunks, open, [&](int64_t task, auto& opened) {
            const int64_t chunk = task % chunks;
            body(first + task / chunks, s_.out_height * chunk / chunks, s_.out_height * (chunk + 1) / chunks, opened);
        });
    }

    void multiply(const Ring& ring, int64_t row, int64_t rows, int64_t first, const Finish<T>& finish) const {
        dense_.multiply(ring, row, rows, first, panels_, static_cast<const A*>(bias_), finish, nothing);
    }

    void convolution_alone() const {
        Finish<T> finish{y_, s_.out, s_.out, b_.activation};
        if (b_.residual) finish.residual = x_;
        finish.image_scale = static_cast<const A*>(b_.drop_path);
        finish.image_pixels = image_out_;
        chunks(
            0, s_.batch, thread_count(), [&] { return dense_.ring(); },
            [&](int64_t image, int64_t begin, int64_t end, Ring& ring) {
                dense_.blocks(image, begin, end, ring, [&](int64_t row, int64_t rows) {
                    multiply(ring, row, rows, image * image_out_ + row * s_.out_width, finish);
                });
            });
    }

    void in_one_step() const {
        struct Memory {
            Ring ring;
            Scratch<T> expanded;
        };
        chunks(
            0, s_.batch, thread_count(),
            [&] { return Memory{dense_.ring(), Scratch<T>(dense_.at_once * s_.out_width * s_.out)}; },
            [&](int64_t image, int64_t begin, int64_t end, Memory& own) {
                const Finish<T> finish{own.expanded, s_.out, s_.out, b_.activation};
                dense_.blocks(image, begin, end, own.ring, [&](int64_t row, int64_t rows) {
                    multiply(own.ring, row, rows, 0, finish);
                    projection_.rows(image * image_out_ + row * s_.out_width, rows * s_.out_width, own.expanded);
                });
            });
    }

    void with_gate(int64_t image, int64_t threads) const {
        const Scratch<T> expanded(image_out_ * s_.out);
        const Scratch<A> sums(s_.out_height * padded_);
        const Finish<T> finish{expanded, s_.out, s_.out, b_.activation};
        chunks(
            image, 1, threads, [&] { return dense_.ring(); },
            [&](int64_t, int64_t begin, int64_t end, Ring& ring) {
                dense_.blocks(image, begin, end, ring, [&](int64_t row, int64_t rows) {
                    multiply(ring, row, rows, row * s_.out_width, finish);
                    for (int64_t r = row; r < row + rows; ++r)
                        sum_row(expanded + r * s_.out_width * s_.out, sums + r * padded_);
                });
            });
        projection_.project({image, 1, threads, expanded, sums});
    }

    void sum_row(const T* values, A* to) const {
        for (int64_t c = 0; c < padded_; c += L) {
            const int n = int(larger(0, smaller(L, s_.out - c)));
            Vec<A> sum = {};
            for (int64_t p = 0; p < s_.out_width; ++p) sum += load(values + p * s_.out + c, n);
            store(to + c, sum);
        }
    }

    const PackedBlock& b_;
    const ConvolutionShape s_;
    const int64_t image_out_, padded_;
    const Panels<E> panels_;
    const Padded<A> bias_;
    const DenseRows<T, E> dense_;
    const PackedProjection<T> projection_;
    const T* const x_;
    T* const y_;
};

}  // namespace

template <class T>
void fused_mbconv_packed(const PackedBlock& block, const void* x, void* y) {
    with_terms<T>(block.pairs, [&](auto term) { FusedRun<T, decltype(term)>(block, x, y)(); });
}

template <class T>
void fused_mbconv_inference(const Block& block, const void* x, void* y) {
    using A = Compute<T>;
    using E = Term<T>;
    const DepthwiseShape& s = block.depthwise_shape;
    const int64_t channels = s.channels, reduced = block.reduced;
    const bool projects = block.project.weight != nullptr, pairs = term_values<E> == 2 && block.in % 2 == 0;
    const FoldedNorm<A> norm1(channels, block.depthwise), norm2(projects ? block.out : 0, block.project);
    const Scratch<E> project(projects ? Panels<E>::size(channels, block.out) : 0);
    const Scratch<A> reduce(Panels<A>::size(channels, reduced)), excite(Panels<A>::size(reduced, channels));
    const SqueezeExciteParams& se = block.squeeze_excite;
    const auto weight = [](const void* p) { return static_cast<const A*>(p); };
    if (projects)
        pack_panels(weight(block.project.weight), channels, block.out, norm2.scale(), static_cast<E*>(project));
    if (reduced != 0) {
        pack_panels(weight(se.reduce_weight), channels, reduced, weight(nullptr), static_cast<A*>(reduce));
        pack_panels(weight(se.expand_weight), reduced, channels, weight(nullptr), static_cast<A*>(excite));
    }
    PackedBlock packed{s, block.in, block.out, reduced};
    packed.pairs = pairs;
    packed.expand_bias = norm1.shift();
    packed.reduce = static_cast<A*>(reduce);
    packed.reduce_bias = se.reduce_bias;
    packed.excite = static_cast<A*>(excite);
    packed.excite_bias = se.expand_bias;
    if (projects) packed.project = static_cast<E*>(project);
    packed.project_bias = norm2.shift();
    packed.activation = block.activation;
    packed.squeeze_activation = se.activation;
    packed.gate = se.gate;
    packed.residual = block.residual;
    packed.drop_path = block.drop_path;
    with_terms<T>(pairs, [&](auto term) {
        using Dense = decltype(term);
        const ConvolutionShape dense = dense_shape(s, block.in);
        const Scratch<Dense> expand(Panels<Dense>::size(dense.kernel_h * dense.kernel_w * dense.in, channels));
        pack_convolution(dense, weight(block.depthwise.weight), false, norm1.scale(), static_cast<Dense*>(expand));
        packed.expand = static_cast<Dense*>(expand);
        FusedRun<T, Dense>(packed, x, y)();
    });
}

EFFNET_INSTANTIATE(fused_mbconv_packed)
EFFNET_INSTANTIATE(fused_mbconv_inference)

EFFNET_NAMESPACE_END
