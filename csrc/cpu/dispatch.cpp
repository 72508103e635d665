// Which instruction set runs, and the clock of the steps in training. This file is compiled once, for the baseline.
#include <atomic>
#include <chrono>
#include <cstring>

#include "kernels.h"
#include "step_times.h"

namespace effnet {
namespace cpu {

namespace baseline {
extern const Kernels table[4];
}
#if defined(EFFNET_BUILT_AVX2)
namespace avx2 {
extern const Kernels table[4];
}
#endif
#if defined(EFFNET_BUILT_AVX512)
namespace avx512 {
extern const Kernels table[4];
}
#endif
#if defined(EFFNET_BUILT_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels table[4];
}
#endif

namespace {

#if defined(EFFNET_BUILT_AVX2)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(EFFNET_BUILT_AVX512)
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa built[] = {
    {"baseline", true, baseline::table},
#if defined(EFFNET_BUILT_AVX2)
    {"avx2", has_avx2(), avx2::table},
#endif
#if defined(EFFNET_BUILT_AVX512)
    {"avx512", has_avx512(), avx512::table},
#endif
#if defined(EFFNET_BUILT_AVX512_BF16)
    {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512_bf16::table},
#endif
};
constexpr int built_count = sizeof(built) / sizeof(built[0]);

const Isa* best() {
    const Isa* found = built;
    for (const Isa& isa : built)
        if (isa.supported) found = &isa;
    return found;
}

const Isa* chosen = best();
ParallelFor run_parallel = [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    body(0, count, context);
};
ThreadCount count_threads = [] { return int64_t(1); };
Reduce run_reduce = nullptr;
std::atomic<StepTimes*> step_times{nullptr};

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void set_threads(ParallelFor run, ThreadCount count) {
    run_parallel = run;
    count_threads = count;
}
ParallelFor parallel_for() { return run_parallel; }
int64_t thread_count() { return count_threads(); }

void set_reduce(Reduce reduce) { run_reduce = reduce; }
Reduce reduce_over_processes() { return run_reduce; }

void set_step_times(StepTimes* to) { step_times = to; }
double begin_step() { return step_times.load(std::memory_order_relaxed) == nullptr ? -1 : seconds_now(); }
double end_step(Step step, double start) {
    const double now = seconds_now();
    if (StepTimes* const to = step_times.load()) {
        to->seconds[int(step)] += now - start;
        ++to->calls[int(step)];
    }
    return now;
}

const Kernels& kernels(DType dtype) { return chosen->table[static_cast<int>(dtype)]; }

const Isa* isas(int* count) {
    *count = built_count;
    return built;
}

const Isa& current_isa() { return *chosen; }

bool set_isa(const char* name) {
    for (const Isa& isa : built)
        if (isa.supported && std::strcmp(isa.name, name) == 0) {
            chosen = &isa;
            return true;
        }
    return false;
}

}  // namespace cpu
}  // namespace effnet
