// plan() and run(), written once over what each operation says of its kernels.
//
// An operation's `Kernels` are for one dtype, and have
//   Element, Tile                               the dtype, and how its kernels divide the work
//   with_traits(problem, f)                     f with the traits of the kernel that runs this problem
//   cut<Traits>(problem, device)                how that kernel divides it: a Cut<Tile>
//   parts(tile)                                 of the sums that are returned
//   read_elements<Traits>(problem, tile)        of activations
//   workspace_bytes(problem, tile)
//   launches(problem, tile)
//   does_not_fit                                why cut() may find nothing
//   launch<Traits>(problem, cut, device)        from the sources that there are
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host.h"

namespace effnet::cuda {

template <class Kernels, class Problem>
Plan plan_of(const Problem& problem, const Device& device) {
    using Tile = typename Kernels::Tile;
    static_assert(std::is_trivially_copyable_v<Tile> && sizeof(Tile) <= sizeof(Plan::tile));
    return Kernels::with_traits(problem, [&](auto traits) {
        using Traits = decltype(traits);
        const Cut<Tile> cut = Kernels::template cut<Traits>(problem, device);
        if (cut.threads == 0) return Plan{Kernels::does_not_fit};
        const int64_t read = Kernels::template read_elements<Traits>(problem, cut.tile);
        Plan plan{nullptr,
                  Kernels::parts(cut.tile),
                  Kernels::workspace_bytes(problem, cut.tile),
                  cut.blocks,
                  cut.threads,
                  cut.shared_bytes,
                  read * int64_t(sizeof(typename Kernels::Element)),
                  Kernels::launches(problem, cut.tile)};
        std::memcpy(plan.tile, &cut.tile, sizeof(Tile));
        return plan;
    });
}

template <class Kernels, class Problem>
cudaError_t run_of(const Problem& problem, const Plan& plan, const Device& device) {
    using Tile = typename Kernels::Tile;
    Cut<Tile> cut{{}, plan.blocks, plan.threads, plan.shared_bytes};
    std::memcpy(&cut.tile, plan.tile, sizeof(Tile));
    return Kernels::with_traits(
        problem, [&](auto traits) { return Kernels::template launch<decltype(traits)>(problem, cut, device); });
}

}  // namespace effnet::cuda
