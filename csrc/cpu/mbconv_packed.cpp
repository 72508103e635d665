// The block for inference. An image, or a few small ones, passes through two steps: expansion and depthwise convolution
// by slabs of channels, of which only a few rows exist at a time; then the projection, which gates its operand as it
// reads it. Large images without a gate need one step only.
#include "projection.h"
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// Input rows and pixels from the first to the last that an output sees.
int64_t span_h(const DepthwiseShape& s) { return (s.kernel_h - 1) * s.dilation_h + 1; }
int64_t span_w(const DepthwiseShape& s) { return (s.kernel_w - 1) * s.dilation_w + 1; }

// How step one is cut: slabs of `vectors` vectors of channels, and each image into chunks of output rows.
struct Cut {
    int vectors = 1;
    int64_t slabs = 1, chunks = 1;

    // The cut with the fewest estimated cycles, one vector being worked on in a cycle:
    //   work: products, taps and activations, of the rows and channels that are computed (neighbouring chunks share
    //   rows of the expanded tensor, and the last slab overlaps where the channels do not divide); a factor for threads
    //   that wait for the last task, and for tiles one vector wide; what the threads must fetch
    //   from each other's cache, unless a thread's rows are its own in the next step, too.
    // `together`: a task has all slabs of its rows, and no other step follows.
    Cut(const PackedBlock& b, int64_t images, int64_t lanes, int64_t element, int64_t threads, bool together) {
        const DepthwiseShape& s = b.depthwise_shape;
        const double in_pixels = double(images * s.height * s.width),
                     out_pixels = double(images * s.out_height * s.out_width);
        const double expand = b.expand == nullptr ? copy : double(b.in) + activate;
        const double convolve = load_taps * double(s.kernel_h * s.kernel_w) + activate;
        const int64_t all = ceil_div(s.channels, lanes);
        double best = 0;
        for (int w = 1; w <= smaller(3, all); ++w)
            for (int64_t n = 1; n <= 8 * threads && (n == 1 || (threads > 1 && s.out_height >= 2 * n)); ++n) {
                const int64_t count = ceil_div(all, w), tasks = images * (together ? 1 : count) * n;
                const double again = double((n - 1) * larger(0, span_h(s) - s.stride_h)) / double(s.height);
                double cycles = (in_pixels * (1 + again) * expand + out_pixels * convolve) * double(count * w);
                cycles *= double(ceil_div(tasks, threads) * threads) / double(tasks);
                cycles *= w == 1 ? 1.1 : 1;
                if (!together && images * n % threads != 0)
                    cycles += out_pixels * double(all * lanes * element) / fetched_bytes * double(threads - 1) /
                              double(threads);
                if (best == 0 || cycles < best) best = cycles, vectors = w, slabs = count, chunks = n;
            }
    }

  private:
    static constexpr double activate = 14, copy = 2, load_taps = 1.4, fetched_bytes = 4;
};

template <class T>
class PackedRun {
    using A = Compute<T>;
    using E = Term<T>;
    static constexpr int L = lanes<A>;

  public:
    PackedRun(const PackedBlock& b, const void* x, void* y)
        : b_(b),
          s_(b.depthwise_shape),
          channels_(s_.channels),
          padded_(round_up(s_.channels, panel_columns)),
          image_in_(s_.height * s_.width),
          image_out_(s_.out_height * s_.out_width),
          x_(static_cast<const T*>(x)),
          expand_bias_(b.expand == nullptr ? nullptr : b.expand_bias, channels_),
          depthwise_(b.depthwise, channels_, s_.kernel_h * s_.kernel_w),
          depthwise_bias_(b.depthwise_bias, channels_),
          projection_(b, x, y) {}

    // Whole images to the threads as far as they go round; the rest is shared.
    void operator()() const {
        const int64_t threads = thread_count(), alone = s_.batch / threads * threads;
        const int64_t image_bytes = image_out_ * channels_ * int64_t(sizeof(T));
        const int64_t group = larger(1, smaller(alone / threads, group_bytes / larger(image_bytes, 1)));
        const int64_t groups = threads == 1 ? ceil_div(alone, group) : ceil_div(alone / threads, group) * threads;
        if (groups > 0)
            parallel_tasks(
                groups, [] { return 0; },
                [&](int64_t task, int) { images(alone * task / groups, alone * (task + 1) / groups, 1); });
        if (alone < s_.batch) images(alone, s_.batch, threads);
    }

  private:
    static constexpr int64_t group_bytes = 512 << 10, cache_bytes = 512 << 10, row_pixels = 28;

    // Memory of one thread: a ring of input rows of one slab of channels, with the padding of the image, and a row of
    // sums.
    struct Rows {
        Scratch<A> ring, out;
        Rows(int64_t ring_size, int64_t out_size) : ring(ring_size), out(out_size) {
            std::memset(static_cast<A*>(ring), 0, size_t(ring_size) * sizeof(A));
        }
    };

    // Output rows [begin, end) of an image, of one slab of channels from c on. The ring of input rows holds what was
    // made of them before `staged`.
    struct Span {
        int64_t image, begin, end, c, staged;
        T* to;    // the first of these rows, [pixels][channels]
        A* sums;  // of the activated values, a row of channels for each of these rows; null: not wanted
    };

    // Images as terms of the expansion.
    struct Input {
        TermRows<T> rows;
        const E* terms;
        Input(const PackedRun& run, int64_t first, int64_t count)
            : rows(run.x_ + first * run.image_in_ * run.b_.in, run.b_.in, run.expands() ? count * run.image_in_ : 0),
              terms(run.expands() ? rows(0, count * run.image_in_) : nullptr) {}
    };

    bool expands() const { return b_.expand != nullptr; }
    int64_t ring_width() const { return larger(s_.pad_left + s_.width, (s_.out_width - 1) * s_.stride_w + span_w(s_)); }

    // Images [first, last), by `threads` threads.
    void images(int64_t first, int64_t last, int64_t threads) const {
        if (in_one_step()) return one_step(first, last - first, threads);
        const int64_t count = last - first, width = ring_width();
        const Cut cut(b_, count, L, sizeof(T), threads, false);
        const Scratch<T> convolved(count * image_out_ * channels_);
        const Scratch<A> sums(b_.reduced == 0 ? 0 : count * s_.out_height * padded_);
        const Convolved<T> done{first, count, threads, convolved, sums};
        const Input input(*this, first, count);
        const int64_t slab = cut.vectors * L, parts = count * cut.chunks;
        // The larger of image and weights stays in cache while the other passes by.
        const bool weights_stay = expands() && channels_ > image_in_;
        parallel_tasks(
            parts * cut.slabs, [&] { return Rows(ring_rows(cut.vectors) * width * slab, s_.out_width * slab); },
            [&](int64_t task, const Rows& rows) {
                if (b_.reduced != 0) fetch_excitation(task, ceil_div(parts * cut.slabs, threads));
                const int64_t part = weights_stay ? task % parts : task / cut.slabs;
                const int64_t image = part / cut.chunks, chunk = part % cut.chunks;
                const int64_t begin = s_.out_height * chunk / cut.chunks, row = image * s_.out_height + begin;
                const Span span{image,
                                begin,
                                s_.out_height * (chunk + 1) / cut.chunks,
                                slab_start(cut, weights_stay ? task / parts : task % cut.slabs),
                                first_row(begin),
                                convolved + row * s_.out_width * channels_,
                                b_.reduced == 0 ? nullptr : sums + row * padded_};
                convolve(cut.vectors, span, first, input.terms, width, rows.ring, rows.out);
            });
        projection_.project(done);
    }

    // Without a gate no row has to wait for others: it is projected when all its channels are convolved, and never gets
    // to memory. That pays where a row and its ring stay in cache and images are much larger than the weights, which
    // every thread reads as a whole.
    bool in_one_step() const {
        const int64_t ring = ring_rows(1) * ring_width() * padded_ * int64_t(sizeof(A));
        return b_.reduced == 0 && ring <= cache_bytes && image_out_ > 2 * (b_.in + b_.out);
    }

    void one_step(int64_t first, int64_t count, int64_t threads) const {
        const int64_t width = ring_width();
        const Cut cut(b_, count, L, sizeof(T), threads, true);
        const Input input(*this, first, count);
        const int64_t slab = cut.vectors * L, ring = ring_rows(cut.vectors) * width * slab;
        const int64_t at_once = smaller(s_.out_height, ceil_div(row_pixels, s_.out_width));
        struct Memory {
            Rows rows;
            Scratch<T> convolved;
        };
        parallel_tasks(
            count * cut.chunks,
            [&] {
                return Memory{{cut.slabs * ring, s_.out_width * slab}, Scratch<T>(at_once * s_.out_width * channels_)};
            },
            [&](int64_t task, const Memory& own) {
                const int64_t image = task / cut.chunks, chunk = task % cut.chunks;
                const int64_t last = s_.out_height * (chunk + 1) / cut.chunks;
                int64_t staged = first_row(s_.out_height * chunk / cut.chunks);
                for (int64_t row = s_.out_height * chunk / cut.chunks; row < last; row += at_once) {
                    const int64_t end = smaller(last, row + at_once);
                    int64_t next = staged;
                    for (int64_t i = 0; i < cut.slabs; ++i)
                        next =
                            convolve(cut.vectors, {image, row, end, slab_start(cut, i), staged, own.convolved, nullptr},
                                     first, input.terms, width, own.rows.ring + i * ring, own.rows.out);
                    staged = next;
                    projection_.rows((first + image) * image_out_ + row * s_.out_width, (end - row) * s_.out_width,
                                     own.convolved);
                }
            });
    }

    // The last slab overlaps the one before it where the channels do not divide.
    int64_t slab_start(const Cut& cut, int64_t slab) const {
        return smaller(slab * cut.vectors, ceil_div(channels_, L) - cut.vectors) * L;
    }
    // The first input row that an output row needs.
    int64_t first_row(int64_t output_row) const { return larger(0, output_row * s_.stride_h - s_.pad_top); }

    // Every thread will want the whole weights of the gate: a share of them for each of its `tasks` tasks.
    void fetch_excitation(int64_t task, int64_t tasks) const {
        const int64_t lines = padded_ * b_.reduced * int64_t(sizeof(A)) / 64, share = task % tasks;
        for (int64_t at = lines * share / tasks * 64; at < lines * (share + 1) / tasks * 64; at += 64) {
            __builtin_prefetch(static_cast<const char*>(b_.reduce) + at, 0, 2);
            __builtin_prefetch(static_cast<const char*>(b_.excite) + at, 0, 2);
        }
    }

    // Rows that are expanded at a time: as many as one tile has room for.
    int64_t rows_at_once(int vectors) const {
        const int64_t height = vectors == 3 ? tile_height<3> : vectors == 2 ? tile_height<2> : tile_height<1>;
        return b_.expand == nullptr ? 1 : larger(1, smaller(height / s_.width, s_.height));
    }
    int64_t ring_rows(int vectors) const { return span_h(s_) + rows_at_once(vectors) - 1; }

    // Returns the input row that follows those in the ring.
    int64_t convolve(int vectors, const Span& span, int64_t first_image, const E* input, int64_t width, A* ring,
                     A* out) const {
        if (vectors == 1) return convolve<1>(span, first_image, input, width, ring, out);
        if (vectors == 2) return convolve<2>(span, first_image, input, width, ring, out);
        return convolve<3>(span, first_image, input, width, ring, out);
    }

    template <int W>
    int64_t convolve(const Span& span, int64_t first_image, const E* input, int64_t width, A* ring, A* out) const {
        constexpr int64_t S = W * L;
        const int64_t c = span.c, capacity = ring_rows(W), at_once = rows_at_once(W);
        const auto slot = [&](int64_t row) { return ring + row % capacity * width * S + s_.pad_left * S; };
        int64_t staged = span.staged;
        for (int64_t oy = span.begin; oy < span.end; ++oy) {
            const int64_t top = oy * s_.stride_h - s_.pad_top, bottom = smaller(s_.height, top + span_h(s_));
            for (; staged < bottom; staged += at_once)
                make_rows<W>(span.image * s_.height, staged, smaller(at_once, s_.height - staged), first_image, c,
                             input, slot);
            RowPairs<A> pairs;
            for (int64_t ky = 0; ky < s_.kernel_h; ++ky) {
                const int64_t iy = top + ky * s_.dilation_h;
                if (iy < 0 || iy >= bottom) continue;
                pairs.rows[pairs.count] = slot(iy) - s_.pad_left * S;
                pairs.weights[pairs.count++] = depthwise_ + ky * s_.kernel_w * padded_ + c;
            }
            RowLayout<A> at{S, S, padded_, out, S};
            at.start = depthwise_bias_ + c;
            convolve_row<A>(pairs, at, s_.kernel_w, s_.stride_w, s_.dilation_w, s_.out_width);
            const int64_t row = oy - span.begin;
            finish_row<W>(out, c, span.to + row * s_.out_width * channels_ + c,
                          span.sums == nullptr ? nullptr : span.sums + row * padded_ + c);
        }
        return staged;
    }

    // Rows of the depthwise convolution's input, [row, row + count) of an image: expanded and activated, or copied.
    template <int W, class Slot>
    void make_rows(int64_t image_row, int64_t row, int64_t count, int64_t first_image, int64_t c, const E* input,
                   const Slot& slot) const {
        constexpr int64_t S = W * L;
        const int64_t pixel = (image_row + row) * s_.width;
        if (b_.expand == nullptr) {
            const T* from = x_ + (first_image * image_in_ + pixel) * channels_ + c;
            for (int w = 0; w < W; ++w) {
                const int n = int(smaller(L, channels_ - c - w * L));
                A* const to = slot(row) + w * L;
                const int64_t pixels = s_.width, step = channels_;
                for (int64_t p = 0; p < pixels; ++p) store(to + p * S, load(from + p * step + w * L, n));
            }
            return;
        }
        const int64_t terms = term_count<E>(b_.in);
        const Panels<E> panels{static_cast<const E*>(b_.expand), terms, padded_};
        const auto left = Left<E>::rows(input + pixel * terms, terms, terms);
        const Multiply<W, E, A> multiply(left, panels, c / L, expand_bias_);
        constexpr int height = tile_height<W>;
        const bool clamps = b_.activation == Activation::relu || b_.activation == Activation::relu6;
        if (clamps && count == 1) {
            const A most = b_.activation == Activation::relu6 ? A(6) : A(HUGE_VAL);
            return multiply.each_tile(s_.width, [&](int64_t first, int64_t pixels, const E* next) {
                multiply.template tile<height, true>(pixels, first, next, slot(row) + first * S, S, most);
            });
        }
        alignas(64) A values[height * S];
        multiply.each_tile(count * s_.width, [&](int64_t first, int64_t pixels, const E* next) {
            multiply.template tile<height>(pixels, first, next, values, S);
            for (int64_t done = 0; done < pixels;) {
                const int64_t at = first + done, x = at % s_.width, run = smaller(pixels - done, s_.width - x);
                activate_run(values + done * S, slot(row + at / s_.width) + x * S, run * S);
                done += run;
            }
        });
    }

    void activate_run(const A* from, A* to, int64_t count) const {
        with_activation(b_.activation, [&](auto kind) {
            for (int64_t i = 0; i < count; i += L) store(to + i, activate_as<T>(load(from + i), kind.value));
        });
    }

    // A row of results from channel c on, activated, to memory; the sums of each channel, where they are wanted.
    template <int W>
    void finish_row(const A* values, int64_t c, T* to, A* sums) const {
        const int64_t pixels = s_.out_width, step = channels_;
        with_activation(b_.activation, [&](auto kind) {
            for (int w = 0; w < W; ++w) {
                const int n = int(smaller(L, step - c - w * L));
                const A* from = values + w * L;
                T* at = to + w * L;
                Vec<A> total = {};
                const auto finish = [&](int width) {
                    for (int64_t p = 0; p < pixels; ++p, from += W * L, at += step) {
                        const Vec<A> v = activate_as<T>(load(from), kind.value);
                        total += v;
                        store(at, v, width);
                    }
                };
                n == L ? finish(L) : finish(n);
                if (sums != nullptr) store(sums + w * L, total);
            }
        });
    }

    const PackedBlock& b_;
    const DepthwiseShape& s_;
    const int64_t channels_, padded_, image_in_, image_out_;
    const T* const x_;
    const Padded<A> expand_bias_, depthwise_, depthwise_bias_;
    const PackedProjection<T> projection_;
};

}  // namespace

template <class T>
void mbconv_packed(const PackedBlock& block, const void* x, void* y) {
    PackedRun<T>(block, x, y)();
}

template <class T>
void sequence(const Link* links, int64_t count, const void* x, void* y) {
    int64_t most[2] = {0, 0};
    for (int64_t i = 0; i + 1 < count; ++i) most[i % 2] = larger(most[i % 2], links[i].bytes);
    const Scratch<char> even(most[0]), odd(most[1]);
    const void* from = x;
    for (int64_t i = 0; i < count; ++i) {
        void* const to = i + 1 == count ? y : static_cast<char*>(i % 2 == 0 ? even : odd);
        links[i].call(links[i].context, from, to);
        from = to;
    }
}

EFFNET_INSTANTIATE(mbconv_packed)
EFFNET_INSTANTIATE(sequence)

EFFNET_NAMESPACE_END
