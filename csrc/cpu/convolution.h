// Dense convolution by rows: a few input rows of an image lie in a ring that stays in cache, with the padding around
// them. The pixels that one filter row sees are neighbours there, so an output row is a product with a segment for each
// filter row, and no matrix is built.
#pragma once

#include "packed.h"

EFFNET_NAMESPACE_BEGIN

// The dense convolution of a Fused-MBConv.
inline ConvolutionShape dense_shape(const DepthwiseShape& s, int64_t in) {
    return {s.batch,    in,         s.channels, s.height,   s.width,   s.out_height, s.out_width,
            s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.pad_top, s.pad_left,   true};
}

// Rows of an image, `width` pixels of `step` values each, the first `left` of which are padding; and a row of zeros for
// those above and below the image.
template <class E>
class ImageRing {
  public:
    ImageRing(int64_t rows, int64_t width, int64_t step, int64_t left, int64_t height)
        : rows_(rows), size_(width * step), left_(left * step), height_(height), memory_((rows + 1) * size_ + beyond_) {
        std::memset(static_cast<void*>(static_cast<E*>(memory_)), 0, size_t((rows + 1) * size_ + beyond_) * sizeof(E));
    }
    // The rows of another image, or of another part, from `row` on.
    void start(int64_t row) { next_ = larger(0, row); }
    // make(row, to) for all rows before `end` that are not there yet; they take the place of the oldest.
    template <class Make>
    void fill(int64_t end, const Make& make) {
        for (; next_ < smaller(end, height_); ++next_) make(next_, slot(next_) + left_);
    }
    // A row from its padding on.
    const E* operator()(int64_t row) const {
        return row >= 0 && row < height_ ? slot(row) : static_cast<E*>(memory_) + rows_ * size_;
    }

  private:
    // Whole slabs of columns may be read where the last pixels begin.
    static constexpr int64_t beyond_ = 2 * panel_columns;
    E* slot(int64_t row) const { return memory_ + row % rows_ * size_; }

    const int64_t rows_, size_, left_, height_;
    int64_t next_ = 0;
    const Scratch<E> memory_;
};

// The left side of a convolution's product.
template <class E>
inline Left<E> filter_rows(int64_t rows, int64_t terms, int64_t step) {
    constexpr int64_t longest = 256;
    Left<E> left;
    left.segments = int(rows);
    left.terms = left.last = terms;
    left.step = step;
    left.split = rows * terms > longest;
    return left;
}

// A convolution of x, some output rows at a time.
template <class T, class E>
class DenseRows {
    using A = Compute<T>;
    static constexpr int L = lanes<A>;

  public:
    using Ring = ImageRing<E>;

    DenseRows(const ConvolutionShape& s, const void* x)
        : s_(s),
          x_(static_cast<const T*>(x)),
          step_(term_count<E>(s.in)),
          at_once(smaller(larger(1, s.out_height), ceil_div(row_pixels_, larger(1, s.out_width)))) {}

    Ring ring() const {
        return Ring((at_once - 1) * s_.stride_h + s_.kernel_h,
                    larger(s_.pad_left + s_.width, (s_.out_width - 1) * s_.stride_w + s_.kernel_w), step_, s_.pad_left,
                    s_.height);
    }

    // body(row, rows) for the output rows [begin, end) of an image, at most `at_once` of them at a time, while the ring
    // has what they read.
    template <class Body>
    void blocks(int64_t image, int64_t begin, int64_t end, Ring& ring, const Body& body) const {
        ring.start(begin * s_.stride_h - s_.pad_top);
        for (int64_t row = begin; row < end; row += at_once) {
            const int64_t rows = smaller(at_once, end - row);
            ring.fill(top(row + rows - 1) + s_.kernel_h,
                      [&](int64_t input_row, E* to) { stage(image, input_row, to); });
            body(row, rows);
        }
    }

    // finish(...) of these rows, the first pixel of which has number `first` there, a few columns at a time; then
    // done(first column, columns).
    template <class O, class Done>
    void multiply(const Ring& ring, int64_t row, int64_t rows, int64_t first, const Panels<E>& panels, const A* bias,
                  const Finish<O>& finish, const Done& done) const {
        for_each_column_tile(0, panels.vectors(), false, [&](auto size, int64_t v) {
            for (int64_t r = 0; r < rows; ++r)
                multiply_rows(left(ring, row + r), first + r * s_.out_width, s_.out_width, panels, v, v + size.value,
                              bias, finish);
            done(v * L, smaller(size.value * L, panels.columns - v * L));
        });
    }

    // The first input row that an output row sees, and where in the ring its pixels are that filter row `ky` meets.
    int64_t top(int64_t row) const { return row * s_.stride_h - s_.pad_top; }
    const E* seen(const Ring& ring, int64_t row, int64_t ky) const { return ring(top(row) + ky); }

  private:
    // Weights are read again for each block of rows.
    static constexpr int64_t row_pixels_ = 64;

    Left<E> left(const Ring& ring, int64_t row) const {
        Left<E> left = filter_rows<E>(s_.kernel_h, s_.kernel_w * step_, s_.stride_w * step_);
        for (int64_t ky = 0; ky < s_.kernel_h; ++ky) left.start[ky] = seen(ring, row, ky);
        return left;
    }

    // A row of an image as [width][channels] terms.
    void stage(int64_t image, int64_t row, E* to) const {
        const int64_t values = s_.width * s_.in;
        const T* const from = x_ + image * s_.height * values;
        if constexpr (term_values<E> == 2) {
            std::memcpy(static_cast<void*>(to), from + row * values, size_t(values) * sizeof(T));
        } else if (s_.channels_last) {
            for (int64_t i = 0; i < values; i += L) {
                const int n = int(smaller(L, values - i));
                store(to + i, load(from + row * values + i, n), n);
            }
        } else {
            for (int64_t c = 0; c < s_.in; ++c) stage_plane(from + (c * s_.height + row) * s_.width, to + c);
        }
    }
    void stage_plane(const T* from, A* to) const {
        for (int64_t x = 0; x < s_.width; x += L) {
            const int n = int(smaller(L, s_.width - x));
            const Vec<A> v = load(from + x, n);
            for (int i = 0; i < n; ++i) to[(x + i) * s_.in] = v[i];
        }
    }

    const ConvolutionShape& s_;
    const T* const x_;
    const int64_t step_;

  public:
    const int64_t at_once;
};

// body(whether the weights lie in pairs, as a type) for weights that may: pairs of neighbouring channels.
template <class T, class Body>
inline void with_terms(bool pairs, const Body& body) {
    if constexpr (term_values<Term<T>> == 2)
        if (pairs) return body(Term<T>{});
    body(Compute<T>{});
}

// A weight [out][in][kh][kw] or, where `weight_rows`, [out][kh][kw][in], times scale[out], to panels.
template <class E, class A>
inline void pack_convolution(const ConvolutionShape& s, const A* weight, bool weight_rows, const A* scale, E* to) {
    const int64_t taps = s.kernel_h * s.kernel_w, terms = taps * s.in, panels = ceil_div(s.out, panel_columns);
    const auto pack = [&](int64_t panel, A* rows) {
        const int64_t c = panel * panel_columns, columns = smaller(panel_columns, s.out - c);
        const A* from = weight + c * terms;
        if (!weight_rows && taps > 1) {
            for (int64_t o = 0; o < columns; ++o) transpose(s.in, taps, from + o * terms, taps, rows + o * terms, s.in);
            from = rows;
        }
        pack_panel(from, terms, columns, scale == nullptr ? nullptr : scale + c, to + c * term_count<E>(terms));
    };
    // So few weights that one thread packs them sooner than two agree to.
    constexpr int64_t few = 16384;
    const int64_t tasks = s.out * terms <= few ? 1 : panels;
    parallel_tasks(
        tasks, [&] { return Scratch<A>(panel_columns * terms); },
        [&](int64_t task, A* rows) {
            for (int64_t panel = panels * task / tasks; panel < panels * (task + 1) / tasks; ++panel) pack(panel, rows);
        });
}

EFFNET_NAMESPACE_END
