#include "table.h"
#include "transpose.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void depthwise(const DepthwiseShape& s, const void* x, const void* weight, const void* bias, Activation activation,
               void* y) {
    using A = Compute<T>;
    Epilogue<T> epilogue;
    epilogue.out = static_cast<T*>(y);
    epilogue.channels = s.channels;
    epilogue.shift = static_cast<const A*>(bias);
    epilogue.activation = activation;
    depthwise_forward(s, Source<T>(x, s.channels), static_cast<const A*>(weight), epilogue);
}

namespace {

// The geometry of one contiguous image plane: padded, and split into stride_h x stride_w phases, the pixels that one
// residue of the strides picks. In a phase, a filter tap is a constant shift, so that the outputs are sums of shifted
// vectors whatever the plane's width.
struct Phases {
    const DepthwiseShape& s;
    int64_t width, size, outputs;

    explicit Phases(const DepthwiseShape& s) : s(s) {
        const int64_t high =
            larger(s.pad_top + s.height, (s.out_height - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1);
        const int64_t wide =
            larger(s.pad_left + s.width, (s.out_width - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1);
        width = ceil_div(wide, s.stride_w);
        // Whole pairs of vectors are computed: they read and write a little beyond the last pixel.
        outputs = round_up(s.out_height * width, 2 * lanes<float>);
        size = ceil_div(high, s.stride_h) * width + 8 * lanes<float> + width;
    }
    int64_t count() const { return s.stride_h * s.stride_w; }

    // Where padded pixel (y, x) lies.
    int64_t at(int64_t y, int64_t x) const {
        return (y % s.stride_h * s.stride_w + x % s.stride_w) * size + y / s.stride_h * width + x / s.stride_w;
    }
};

template <class T>
void stage_plane(const Phases& phases, const T* plane, T* to) {
    const DepthwiseShape& s = phases.s;
    for (int64_t y = 0; y < s.height; ++y) {
        const T* row = plane + y * s.width;
        const auto phase = [&](int64_t x) { return to + phases.at(y + s.pad_top, x + s.pad_left); };
        if (s.stride_w == 1) {
            std::memcpy(phase(0), row, size_t(s.width) * sizeof(T));
        } else if (s.stride_w == 2) {
            split_pairs(s.width, row, phase(0), phase(1));
        } else {
            for (int64_t x = 0; x < s.width; ++x) *phase(x) = row[x];
        }
    }
}

// to[i] = sum over taps of weight[tap] * staged[shift[tap] + i] for N vectors of outputs.
template <int N, class T>
inline void convolve_vectors(int64_t taps, const T* weight, const int64_t* shifts, const T* staged, T* to) {
    constexpr int L = lanes<T>;
    Vec<T> sum[N] = {};
    for (int64_t t = 0; t < taps; ++t) {
        const T* from = staged + shifts[t];
        const T w = weight[t];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) sum[v] += w * load(from + v * L);
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(to + v * L, sum[v]);
}

template <class T>
void convolve_plane(int64_t outputs, int64_t taps, const T* weight, const int64_t* shifts, const T* staged, T* to) {
    constexpr int L = lanes<T>;
    int64_t i = 0;
    for (; i + 8 * L <= outputs; i += 8 * L) convolve_vectors<8>(taps, weight, shifts, staged + i, to + i);
    for (; i + 4 * L <= outputs; i += 4 * L) convolve_vectors<4>(taps, weight, shifts, staged + i, to + i);
    for (; i < outputs; i += 2 * L) convolve_vectors<2>(taps, weight, shifts, staged + i, to + i);
}

}  // namespace

template <class T>
void depthwise_contiguous(const DepthwiseShape& s, const void* x, const void* weight, const void* bias,
                          Activation activation, void* y) {
    const Phases phases(s);
    const int64_t taps = s.kernel_h * s.kernel_w, plane_in = s.height * s.width, plane_out = s.out_height * s.out_width;
    const Buffer<int64_t> shifts(taps);
    for (int64_t t = 0; t < taps; ++t)
        shifts[t] = phases.at(t / s.kernel_w * s.dilation_h, t % s.kernel_w * s.dilation_w);
    const T *const w = static_cast<const T*>(weight), *const b = static_cast<const T*>(bias);
    parallel(s.batch * s.channels, [&](int64_t begin, int64_t end) {
        const Buffer<T> staged = zeros<T>(phases.count() * phases.size), values(phases.outputs);
        for (int64_t plane = begin; plane < end; ++plane) {
            const int64_t c = plane % s.channels;
            stage_plane(phases, static_cast<const T*>(x) + plane * plane_in, static_cast<T*>(staged));
            convolve_plane<T>(phases.outputs, taps, w + c * taps, shifts, staged, values);
            T* const to = static_cast<T*>(y) + plane * plane_out;
            const T shift = b == nullptr ? T(0) : b[c];
            with_activation(activation, [&](auto kind) {
                for (int64_t oy = 0; oy < s.out_height; ++oy)
                    for (int64_t i = 0; i < s.out_width; i += lanes<T>) {
                        const int n = int(smaller(lanes<T>, s.out_width - i));
                        store(to + oy * s.out_width + i,
                              activate<T>(load(values + oy * phases.width + i, n) + shift, kind.value), n);
                    }
            });
        }
    });
}

template <class T>
void depthwise_backward(const DepthwiseShape& s, const void* grad, const void* x, const void* weight, const void* bias,
                        Activation activation, void* grad_x, void* grad_weight, void* grad_bias) {
    using A = Compute<T>;
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    const Source<T> input(x, s.channels), grad_y(grad, s.channels);
    const A* const w = static_cast<const A*>(weight);
    Buffer<A> own(grad_y.direct() && activation == Activation::none ? 0 : pixels * s.channels);
    const A* g = own;
    if (activation != Activation::none) {
        // The pre-activation is recomputed: only the inputs were saved.
        Epilogue<A> pre;
        pre.out = own;
        pre.channels = s.channels;
        pre.shift = static_cast<const A*>(bias);
        depthwise_forward(s, input, w, pre);
        activation_backward(pixels * s.channels, static_cast<const T*>(grad), own, activation);
    } else if (grad_y.direct()) {
        g = static_cast<const A*>(grad);
    } else {
        widen(pixels * s.channels, static_cast<const T*>(grad), static_cast<A*>(own));
    }
    if (grad_x != nullptr || grad_weight != nullptr)
        depthwise_gradients_stored(s, g, input, w, static_cast<T*>(grad_x), static_cast<A*>(grad_weight));
    if (grad_bias != nullptr) column_sums(pixels, s.channels, g, static_cast<A*>(grad_bias));
}

EFFNET_INSTANTIATE(depthwise)
EFFNET_INSTANTIATE(depthwise_backward)
template decltype(depthwise_contiguous<float>) depthwise_contiguous<float>;
template decltype(depthwise_contiguous<double>) depthwise_contiguous<double>;

EFFNET_NAMESPACE_END
