// Blocks, threads as fibers, and everything that threads wait for.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "state.h"

// Read by device code as constants, which is what they are as long as one thread runs.
emulation::Index threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
extern "C" void emulation_swap(void** from, void* to);
asm(R"(
.text
.globl emulation_swap
.hidden emulation_swap
.type emulation_swap, @function
emulation_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_swap, .-emulation_swap
)");
void emulation::Fiber::swap(Fiber& from, Fiber& to) { emulation_swap(&from.stack_pointer, to.stack_pointer); }
#endif

namespace emulation {

Machine machine;

namespace {

unsigned volume(const Index& size) { return size.x * size.y * size.z; }

Index coordinates(uint64_t number, const Index& size) {
    return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
            static_cast<unsigned>(number / size.x / size.y)};
}

std::string describe(const Thread& thread) {
    char text[256];
    const char* waits_at[] = {"could run", "waits at __syncthreads", "waits at a grid barrier",
                              "waits at",  "waits at an mbarrier",   "has exited"};
    int used = snprintf(text, sizeof text, "thread %u %s", thread.number, waits_at[static_cast<int>(thread.state)]);
    if (thread.state == State::collective)
        used += snprintf(text + used, sizeof text - used, " %s(0x%08x)", thread.collective->name, thread.mask);
    if (thread.state == State::mbarrier)
        used += snprintf(text + used, sizeof text - used, "%s",
                         describe_mbarrier(machine.block->mbarriers[thread.mbarrier]).c_str());
    if (thread.state != State::exited && thread.site.file != nullptr)
        snprintf(text + used, sizeof text - used, " (%s:%d)", thread.site.file, thread.site.line);
    return text;
}

bool waits_like(const Thread& a, const Thread& b) {
    return a.state == b.state &&
           (a.state == State::exited || (a.site.line == b.site.line && a.site.file == b.site.file)) &&
           (a.state != State::mbarrier || a.mbarrier == b.mbarrier) &&
           (a.state != State::collective || (a.mask == b.mask && a.collective == b.collective));
}

// Ranges of threads that wait for the same, a few of them.
std::string describe_all(const Block& block) {
    std::string text;
    const auto& threads = block.threads;
    int ranges = 0;
    for (size_t first = 0; first < threads.size();) {
        size_t last = first;
        while (last + 1 < threads.size() && waits_like(threads[first], threads[last + 1])) ++last;
        if (++ranges > 6) return text + "\n  ...";
        text += "\n  " + describe(threads[first]);
        if (last > first) text += ", and so do all up to thread " + std::to_string(threads[last].number);
        first = last + 1;
    }
    return text;
}

// The lanes of the mask that exist and have not exited; those take no part, and nobody waits for them.
unsigned present(const Block& block, unsigned warp, unsigned mask) {
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        const unsigned number = warp * warp_lanes + lane;
        if (mask >> lane & 1 && number < block.threads.size() && block.threads[number].state != State::exited)
            lanes |= 1u << lane;
    }
    return lanes;
}

// Whether all lanes of the mask wait for the same operation with the same mask.
bool complete(const Block& block, unsigned warp, unsigned lanes, unsigned mask) {
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const Thread& thread = block.threads[warp * warp_lanes + lane];
        if (thread.state != State::collective || thread.mask != mask) return false;
    }
    return true;
}

void nothing(void* const*, unsigned) {}
const Collective synchronisation = {"__syncwarp", nothing};

// Joins what the lanes know of each other, so that what each did before happened before what any does next.
void join_clocks(Block& block, unsigned warp, unsigned mask) {
    block.seen_is_clean = false;
    uint16_t joined[warp_lanes] = {};
    auto row = [&](unsigned lane) { return &block.seen[(warp * warp_lanes + lane) * warp_lanes]; };
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        if (!(mask >> lane & 1) || warp * warp_lanes + lane >= block.threads.size()) continue;
        Thread& thread = block.threads[warp * warp_lanes + lane];
        row(lane)[lane] = thread.clock++;
        for (unsigned other = 0; other < warp_lanes; ++other) joined[other] = std::max(joined[other], row(lane)[other]);
    }
    for (unsigned lane = 0; lane < warp_lanes; ++lane)
        if (mask >> lane & 1 && warp * warp_lanes + lane < block.threads.size())
            std::copy(joined, joined + warp_lanes, row(lane));
}

// Lets the lanes that wait with `thread` go on if all have come.
bool finish_collective(Block& block, const Thread& thread) {
    const unsigned warp = thread.number / warp_lanes;
    const unsigned lanes = present(block, warp, thread.mask);
    if (!complete(block, warp, lanes, thread.mask)) return false;
    const Collective& what = *thread.collective;
    void* all[warp_lanes] = {};
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        Thread& other = block.threads[warp * warp_lanes + lane];
        if (!waits_like(other, thread))
            fail("lanes of one warp meet in different places:\n  %s\n  %s", describe(other).c_str(),
                 describe(thread).c_str());
        all[lane] = other.data;
    }
    what.act(all, lanes);
    if (&what == &synchronisation) join_clocks(block, warp, lanes);
    for (unsigned lane = 0; lane < warp_lanes; ++lane)
        if (lanes >> lane & 1) block.threads[warp * warp_lanes + lane].state = State::ready;
    return true;
}

void thread_body() {
    machine.launch->body(machine.launch->arguments);
    Thread& thread = *machine.thread;
    thread.state = State::exited;
    if (++machine.block->exited == machine.block->threads.size()) check_mbarriers(*machine.block);
    // Lanes that have exited are not waited for.
    const unsigned warp = thread.number / warp_lanes;
    for (Thread& other : machine.block->threads)
        if (other.number / warp_lanes == warp && other.state == State::collective)
            finish_collective(*machine.block, other);
    to_scheduler();
}

unsigned char* stack(size_t number) {
    static std::vector<unsigned char*> stacks;
    while (stacks.size() <= number) {
        void* room =
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) {
            perror("no memory for the stack of an emulated thread");
            abort();
        }
        // What runs over the end must not run into the stack of another thread.
        mprotect(room, 4096, PROT_NONE);
        stacks.push_back(static_cast<unsigned char*>(room));
    }
    return stacks[number];
}

void begin_block(Block& block, uint64_t number, size_t first_stack) {
    const Launch& launch = *machine.launch;
    const unsigned threads = volume(launch.block);
    block.number = number;
    block.index = coordinates(number, launch.grid);
    block.threads.resize(threads);
    block.waiting = block.exited = block.grid_arrivals = 0;
    block.seen.assign(threads * warp_lanes, 0);
    next_epoch(block);
    block.first_epoch = block.epoch;
    prepare_shared(block, launch.shared_bytes);
    block.mbarriers.clear();
    block.phases.clear();
    for (unsigned i = 0; i < threads; ++i) {
        Thread& thread = block.threads[i];
        thread.stack = stack(first_stack + i);
        thread.fiber.prepare(thread.stack, stack_bytes, thread_body);
        thread.number = i;
        thread.index = coordinates(i, launch.block);
        thread.state = State::ready;
        thread.site = {nullptr, 0};
        thread.issued.clear();
        thread.groups.clear();
        thread.complete_seen.clear();
    }
}

void resume(Block& block, Thread& thread) {
    machine.block = &block;
    machine.thread = &thread;
    blockIdx = block.index;
    threadIdx = thread.index;
    Fiber::swap(machine.scheduler, thread.fiber);
    machine.thread = nullptr;
    machine.block = nullptr;
}

void report_stall(std::vector<Block>& blocks, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        Block& block = blocks[i];
        if (block.exited == block.threads.size()) continue;
        machine.block = &block;
        fail("%s; nobody can go on:%s",
             block.exited > 0 ? "threads have exited while others wait" : "threads wait for each other",
             describe_all(block).c_str());
        machine.block = nullptr;
        return;
    }
}

// Runs `count` blocks side by side until all their threads have exited.
void run_blocks(size_t count) {
    std::vector<std::pair<unsigned, unsigned>> order;
    for (unsigned i = 0; i < count; ++i)
        for (unsigned j = 0; j < machine.blocks[i].threads.size(); ++j) order.push_back({i, j});
    size_t exited = 0;
    while (exited < order.size()) {
        if (machine.shuffled) std::shuffle(order.begin(), order.end(), machine.random);
        bool progress = false;
        for (const auto& [i, j] : order) {
            Block& block = machine.blocks[i];
            if (block.threads[j].state != State::ready) continue;
            progress = true;
            resume(block, block.threads[j]);
            if (machine.aborted) return;
            exited += block.threads[j].state == State::exited;
        }
        if (!progress) return report_stall(machine.blocks, count);
    }
}

bool within_limits(const Launch& launch) {
    const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    if (threads == 0 || threads > most_threads || blocks == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 ||
        launch.grid.z > 65535)
        fail("a grid of %u x %u x %u blocks of %u x %u x %u threads cannot be launched", launch.grid.x, launch.grid.y,
             launch.grid.z, launch.block.x, launch.block.y, launch.block.z);
    else if (launch.shared_bytes > machine.shared_limit)
        fail("%zu bytes of shared memory a block; the device has %zu", launch.shared_bytes, machine.shared_limit);
    else if (launch.cooperative) {
        // A multiprocessor keeps 1 KiB of shared memory a block for itself.
        const uint64_t by_shared = (machine.shared_limit + 1024) / (launch.shared_bytes + 1024);
        const uint64_t resident = machine.multiprocessors * std::min<uint64_t>({2048 / threads, by_shared, 32});
        if (blocks > resident)
            fail("%zu blocks of a cooperative launch, of which %zu can be resident", size_t(blocks), size_t(resident));
    }
    return machine.error.empty();
}

void run_grid(const Launch& launch) {
    const uint64_t total = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    const uint64_t first = launch.cooperative ? 0 : std::min(machine.first_block, total);
    const uint64_t last = launch.cooperative ? total : std::min(machine.last_block, total);
    std::vector<uint64_t> order(last - first);
    std::iota(order.begin(), order.end(), first);
    if (machine.shuffled) std::shuffle(order.begin(), order.end(), machine.random);
    const size_t together = launch.cooperative ? order.size() : 1;
    if (machine.blocks.size() < together) machine.blocks.resize(together);
    const size_t threads = volume(launch.block);
    for (size_t i = 0; i < order.size() && !machine.aborted; i += together) {
        for (size_t j = 0; j < together; ++j) begin_block(machine.blocks[j], order[i + j], j * threads);
        run_blocks(together);
    }
}

void check_one_site(const Block& block, const char* what) {
    for (const Thread& thread : block.threads)
        if (!waits_like(thread, block.threads[0]))
            return fail("%s in divergent code:%s", what, describe_all(block).c_str());
}

void finish_grid_barrier() {
    machine.settled = machine.epoch;
    for (size_t i = 0; i < volume(machine.launch->grid); ++i) {
        Block& block = machine.blocks[i];
        block.waiting = 0;
        next_epoch(block);
        for (Thread& thread : block.threads) thread.state = State::ready;
    }
}

}  // namespace

void to_scheduler() { Fiber::swap(machine.thread->fiber, machine.scheduler); }

bool skipped(Site site) {
    const std::string file = site.file;
    for (const auto& [name, line] : machine.skipped)
        if (site.line == line && file.size() >= name.size() &&
            file.compare(file.size() - name.size(), name.size(), name) == 0)
            return true;
    return false;
}

bool launch(const Launch& launch) {
    if (!machine.error.empty()) return false;
    machine.launched.push_back(code_offset(launch.kernel));
    machine.launch = &launch;
    machine.aborted = false;
    machine.grid_barriers = 0;
    machine.settled = machine.epoch;
    machine.launch_epoch = machine.epoch + 1;
    machine.epoch_blocks.clear();
    gridDim = launch.grid;
    blockDim = launch.block;
    if (within_limits(launch)) run_grid(launch);
    machine.launch = nullptr;
    machine.settled = machine.epoch;
    return machine.error.empty();
}

void next_epoch(Block& block) {
    block.epoch = ++machine.epoch;
    machine.epoch_blocks.push_back(block.number);
    for (Thread& thread : block.threads) thread.clock = 1;
    if (!block.seen_is_clean) std::fill(block.seen.begin(), block.seen.end(), 0);
    block.seen_is_clean = true;
}

unsigned block_of(uint32_t epoch) { return machine.epoch_blocks[epoch - machine.launch_epoch]; }

uint32_t code_offset(const void* code) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - machine.library_begin);
}

void* shared_memory() { return machine.block->shared; }

void block_barrier(Site site) {
    if (skipped(site)) return;
    Block& block = *machine.block;
    machine.thread->site = site;
    machine.thread->state = State::block_barrier;
    if (++block.waiting < block.threads.size()) return to_scheduler();
    check_one_site(block, "__syncthreads");
    block.waiting = 0;
    next_epoch(block);
    for (Thread& thread : block.threads) thread.state = State::ready;
}

void grid_barrier(unsigned* counter, unsigned arrivals, Site site) {
    if (skipped(site)) return;
    Block& block = *machine.block;
    const size_t blocks = volume(machine.launch->grid);
    if (!machine.launch->cooperative)
        fail("a grid barrier in a launch that is not cooperative (%s:%d)", site.file, site.line);
    machine.thread->site = site;
    machine.thread->state = State::grid_barrier;
    if (machine.thread->number == 0) block.grid_arrivals = arrivals;
    if (++block.waiting < block.threads.size()) return to_scheduler();
    check_one_site(block, "a grid barrier");
    atomic_access(counter, sizeof *counter, __builtin_return_address(0));
    const unsigned met = machine.grid_barriers * blocks;
    if (block.grid_arrivals != met + blocks)
        fail("grid barrier %u of %zu blocks waits for %u arrivals instead of %zu (%s:%d)", machine.grid_barriers + 1,
             blocks, block.grid_arrivals, met + blocks, site.file, site.line);
    if (*counter < met || *counter >= met + blocks)
        fail("the counter of grid barrier %u was %u and not zero at the launch (%s:%d)", machine.grid_barriers + 1,
             *counter, site.file, site.line);
    if (++*counter < met + blocks) return to_scheduler();
    ++machine.grid_barriers;
    finish_grid_barrier();
}

void collective(const Collective& what, unsigned mask, void* data, Site site) {
    Block& block = *machine.block;
    Thread& thread = *machine.thread;
    if (!(mask >> thread.number % warp_lanes & 1))
        fail("%s(0x%08x) does not name its own lane %u (%s:%d)", what.name, mask, thread.number % warp_lanes, site.file,
             site.line);
    thread.site = site;
    thread.state = State::collective;
    thread.collective = &what;
    thread.mask = mask;
    thread.data = data;
    if (!finish_collective(block, thread)) to_scheduler();
}

void warp_barrier(unsigned mask, Site site) {
    if (!skipped(site)) collective(synchronisation, mask, nullptr, site);
}

namespace {

struct Exchange {
    uint64_t value, result;
    Shuffle kind;
    int parameter, width;
    Site site;
};

// The lane that `lane` reads from, by the rules of the PTX instruction shfl.sync.
unsigned source_lane(const Exchange& exchange, unsigned lane) {
    const unsigned width = exchange.width, first = lane & ~(width - 1), last = first + width - 1;
    const int parameter = exchange.parameter;
    switch (exchange.kind) {
        case Shuffle::from:
            return first + (parameter & (width - 1));
        case Shuffle::up:
            return static_cast<int>(lane) - parameter < static_cast<int>(first) ? lane : lane - parameter;
        case Shuffle::down:
            return lane + parameter > last ? lane : lane + parameter;
        default:
            return (lane ^ parameter) > last ? lane : lane ^ parameter;
    }
}

void exchange_values(void* const* data, unsigned mask) {
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        auto* mine = static_cast<Exchange*>(data[lane]);
        if (mine == nullptr) continue;
        const unsigned source = source_lane(*mine, lane);
        if (!(mask >> source & 1))
            fail("lane %u shuffles a value from lane %u, which takes no part (%s:%d)", lane, source, mine->site.file,
                 mine->site.line);
        mine->result = static_cast<Exchange*>(data[source])->value;
    }
}
const Collective exchange = {"a shuffle", exchange_values};

void count_votes(void* const* data, unsigned) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < warp_lanes; ++lane)
        if (data[lane] != nullptr && *static_cast<unsigned*>(data[lane])) votes |= 1u << lane;
    for (unsigned lane = 0; lane < warp_lanes; ++lane)
        if (data[lane] != nullptr) *static_cast<unsigned*>(data[lane]) = votes;
}
const Collective vote = {"a vote", count_votes};

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int parameter, int width, Site site) {
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
        fail("the width of a shuffle is %d, no power of two up to 32 (%s:%d)", width, site.file, site.line);
    Exchange data = {value, 0, kind, parameter, width, site};
    collective(exchange, mask, &data, site);
    return data.result;
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
    unsigned data = predicate;
    collective(vote, mask, &data, site);
    return data;
}

void copy_async(void* shared, const void* global, int size, int read) {
    const Copy copy = {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), size, read,
                       code_offset(__builtin_return_address(0))};
    issue_copy(copy);
    machine.thread->issued.push_back(copy);
}

void commit_copies() {
    Thread& thread = *machine.thread;
    thread.groups.push_back(std::move(thread.issued));
    thread.issued.clear();
}

void wait_copies(int open) {
    auto& groups = machine.thread->groups;
    const size_t keep = std::min<size_t>(open + machine.late_groups, groups.size());
    for (size_t i = 0; i + keep < groups.size(); ++i)
        for (const Copy& copy : groups[i]) land_copy(copy);
    groups.erase(groups.begin(), groups.end() - keep);
}

namespace {

// Return addresses on the running thread's stack, the innermost first.
std::string backtrace() {
    std::string text;
    const auto begin = reinterpret_cast<uintptr_t>(machine.thread->stack);
    auto* frame = static_cast<void**>(__builtin_frame_address(0));
    while (reinterpret_cast<uintptr_t>(frame) - begin < stack_bytes && text.size() < 400) {
        if (frame[1] != nullptr) text += (text.empty() ? "" : " ") + std::to_string(code_offset(frame[1]));
        frame = static_cast<void**>(frame[0]);
    }
    return text;
}

}  // namespace

void fail(const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (machine.error.empty()) {
        std::string where;
        if (machine.launch != nullptr)
            where = "\n  in {kernel:" + std::to_string(code_offset(machine.launch->kernel)) + "}";
        if (machine.block != nullptr) {
            const Index& index = machine.block->index;
            where += ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
                     std::to_string(index.z) + ")";
        }
        if (machine.thread != nullptr) {
            const Index& index = machine.thread->index;
            where += ", thread (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
                     std::to_string(index.z) + ")";
            where += "{stack:" + backtrace() + "}";
        }
        machine.error = text + where;
    }
    machine.aborted = true;
    // The thread is left where it stands: nothing on its stack owns anything.
    if (machine.thread != nullptr) to_scheduler();
}

}  // namespace emulation
