#include "recording.h"

#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace effnet {
namespace {

thread_local Recording* innermost = nullptr;

}  // namespace

// Memory that is touched for the first time costs more than most kernels that write it. What is free at the top of the
// heap glibc gives back to the system beyond twice the largest block that it saw freed, which a network's first outputs
// exceed at each call: let it see one of nearly 32 MiB, the largest that counts. Larger blocks always come and go, with
// pages of 2 MiB where that is asked for.
void cheapen_pages(const void* data, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t large = uintptr_t(2) << 20, largest = uintptr_t(32) << 20;
    if (bytes < large) return;
    static const bool kept = [] {
#if defined(__GLIBC__)
        // Only a block that does not come from free memory counts.
        malloc_trim(0);
#endif
        void* volatile block = std::malloc(largest - large);
        std::free(block);
        return true;
    }();
    if (!kept || bytes < largest) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + large - 1) / large * large, last = (begin + bytes) / large * large;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Recording* Recording::current() { return innermost; }

Recording::Recording(bool keep) : outer_(innermost), keeps_(keep || (outer_ != nullptr && outer_->keeps_)) {
    innermost = this;
}

Recording::~Recording() {
    if (open_ && innermost == this) innermost = outer_;
}

void Recording::add(Step step, const void* x, const void* y, std::shared_ptr<void> memory) {
    if (!entries_.empty()) {
        spoiled_ = spoiled_ || entries_.back().y != x;
        entries_.back().memory.reset();
    }
    entries_.push_back({std::move(step), x, y, std::move(memory)});
}

std::vector<Step> Recording::finish(const void* x, const void* y) {
    if (!open_ || innermost != this) return {};
    open_ = false;
    innermost = outer_;
    if (outer_ != nullptr) {
        if (spoiled_) outer_->spoil();
        for (const Entry& entry : entries_) outer_->add(entry.step, entry.x, entry.y, entry.memory);
    }
    std::vector<Step> steps;
    if (spoiled_ || entries_.empty() || entries_.front().x != x || entries_.back().y != y) return steps;
    for (Entry& entry : entries_) steps.push_back(std::move(entry.step));
    return steps;
}

void run_steps(const std::vector<Step>& steps, const void* x, void* y) {
    cheapen_pages(y, steps.back().bytes);
    if (steps.size() == 1) return steps[0].run(cpu::kernels(steps[0].dtype), x, y);
    std::vector<cpu::Link> links;
    for (const Step& step : steps)
        links.push_back({[](const void* context, const void* from, void* to) {
                             const Step& step = *static_cast<const Step*>(context);
                             step.run(cpu::kernels(step.dtype), from, to);
                         },
                         &step, int64_t(step.bytes)});
    cpu::kernels(steps[0].dtype).sequence(links.data(), int64_t(links.size()), x, y);
}

}  // namespace effnet
