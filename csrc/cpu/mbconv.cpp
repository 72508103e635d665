// The block for inference as replaced layers call it: its weights are folded and packed at each call.
#include "table.h"

EFFNET_NAMESPACE_BEGIN

namespace {

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

EFFNET_INSTANTIATE(mbconv_inference)

EFFNET_NAMESPACE_END
