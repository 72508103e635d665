// Barriers in shared memory that count arrivals and bytes, and the copies of boxes of tensors that they tell of.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulation {
namespace {

// What an mbarrier object holds, so that one that was overwritten is noticed.
constexpr uint64_t signature = 0x6d62617272696572;
constexpr size_t most_phases = 0xffff;

Mbarrier& find(uint64_t* barrier, const void* code) {
    access(barrier, sizeof *barrier, false, code);
    Block& block = *machine.block;
    const size_t offset = reinterpret_cast<unsigned char*>(barrier) - block.shared;
    for (Mbarrier& mbarrier : block.mbarriers)
        if (mbarrier.offset == offset && *barrier == signature) return mbarrier;
    fail("byte %zu of shared memory holds no mbarrier, or one that was overwritten", offset);
    __builtin_unreachable();
}

size_t number(const Mbarrier& mbarrier) { return &mbarrier - machine.block->mbarriers.data(); }

// Ends the open phase if everything that it waits for has come.
void complete(Mbarrier& mbarrier) {
    if (mbarrier.arrived < mbarrier.arrivals || mbarrier.asked != mbarrier.expected) return;
    mbarrier.landing.insert(mbarrier.landing.end(), mbarrier.copies.begin(), mbarrier.copies.end());
    mbarrier.copies.clear();
    if (mbarrier.open_phase >= 0) mbarrier.phases.push_back(mbarrier.open_phase);
    mbarrier.open_phase = -1;
    mbarrier.arrived = 0;
    mbarrier.expected = mbarrier.asked = 0;
    ++mbarrier.complete;
    for (Thread& thread : machine.block->threads)
        if (thread.state == State::mbarrier && thread.mbarrier == number(mbarrier)) thread.state = State::ready;
}

// f(offset in the box, address, elements inside, elements in all) for each innermost row of a box.
template <class F>
void for_rows(const BoxCopy& copy, const F& f) {
    const TensorMap& map = copy.map;
    const int64_t (&at)[4] = copy.corner.at;
    const int64_t before = std::min<int64_t>(std::max<int64_t>(-at[0], 0), map.box[0]);
    const int64_t inside = std::max<int64_t>(0, std::min<int64_t>(map.box[0], map.sizes[0] - at[0]) - before);
    size_t row = 0;
    for (int64_t n = at[3]; n < at[3] + map.box[3]; ++n)
        for (int64_t h = at[2]; h < at[2] + map.box[2]; ++h)
            for (int64_t w = at[1]; w < at[1] + map.box[1]; ++w, ++row) {
                const bool exists =
                    n >= 0 && n < map.sizes[3] && h >= 0 && h < map.sizes[2] && w >= 0 && w < map.sizes[1];
                const int64_t element = ((n * map.sizes[2] + h) * map.sizes[1] + w) * map.sizes[0] + at[0] + before;
                f((row * map.box[0] + before) * map.element_bytes, map.data + element * map.element_bytes,
                  exists ? size_t(inside * map.element_bytes) : 0);
            }
}

size_t bytes(const TensorMap& map) {
    return size_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * map.element_bytes;
}

// The phase that tells of the open phase's copies, among those of the block.
uint16_t open_phase(Mbarrier& mbarrier) {
    auto& phases = machine.block->phases;
    if (mbarrier.open_phase < 0) {
        if (phases.size() == most_phases) fail("more than %zu phases with bulk copies in one block", most_phases);
        mbarrier.open_phase = static_cast<int>(phases.size());
        phases.push_back({unsigned(number(mbarrier)), mbarrier.complete, machine.thread->number, 0});
    }
    return static_cast<uint16_t>(mbarrier.open_phase);
}

void see(Mbarrier& mbarrier) {
    Thread& thread = *machine.thread;
    thread.complete_seen.resize(machine.block->mbarriers.size());
    thread.complete_seen[number(mbarrier)] = mbarrier.complete;
    for (const unsigned phase : mbarrier.phases) {
        uint32_t& first = machine.block->phases[phase].first_seen;
        if (first == 0) first = machine.block->epoch;
    }
    mbarrier.phases.clear();
    for (const BoxCopy& copy : mbarrier.landing) {
        memset(copy.to, 0, bytes(copy.map));
        for_rows(copy, [&](size_t offset, const unsigned char* from, size_t size) {
            if (size > 0) memcpy(copy.to + offset, from, size);
        });
    }
    mbarrier.landing.clear();
}

}  // namespace

bool can_be_mapped(const TensorMap& map) {
    if (!machine.has_tensor_maps || reinterpret_cast<uintptr_t>(map.data) % 16 != 0) return false;
    if (map.sizes[0] * map.element_bytes % 16 != 0 || map.box[0] * map.element_bytes % 16 != 0) return false;
    for (int i = 0; i < 4; ++i)
        if (map.box[i] < 1 || map.box[i] > 256 || map.sizes[i] < 1 || map.sizes[i] > int64_t{1} << 32) return false;
    return true;
}

void make_mbarrier(uint64_t* barrier, unsigned arrivals) {
    const void* code = __builtin_return_address(0);
    access(barrier, sizeof *barrier, true, code);
    Block& block = *machine.block;
    const size_t offset = reinterpret_cast<unsigned char*>(barrier) - block.shared;
    if (reinterpret_cast<uintptr_t>(barrier) % sizeof *barrier != 0)
        fail("an mbarrier at byte %zu of shared memory, which is no multiple of 8", offset);
    *barrier = signature;
    block.mbarriers.push_back({offset, machine.thread->number, arrivals, false, 0, 0, 0, 0, -1, {}, {}, {}});
    for (Thread& thread : block.threads) thread.complete_seen.resize(block.mbarriers.size());
}

void fence_mbarriers() {
    for (Mbarrier& mbarrier : machine.block->mbarriers)
        if (mbarrier.maker == machine.thread->number) mbarrier.fenced = true;
}

void arrive_at_mbarrier(uint64_t* barrier, unsigned bytes) {
    Mbarrier& mbarrier = find(barrier, __builtin_return_address(0));
    if (mbarrier.arrived == mbarrier.arrivals)
        fail("one arrival more than the %u that %s waits for", mbarrier.arrivals, describe_mbarrier(mbarrier).c_str());
    ++mbarrier.arrived;
    mbarrier.expected += bytes;
    complete(mbarrier);
}

void wait_at_mbarrier(uint64_t* barrier, unsigned parity, Site site) {
    if (skipped(site)) return;
    const size_t waits_for = number(find(barrier, __builtin_return_address(0)));
    Thread& thread = *machine.thread;
    while ((machine.block->mbarriers[waits_for].complete & 1) == parity) {
        thread.site = site;
        thread.mbarrier = waits_for;
        thread.state = State::mbarrier;
        to_scheduler();
    }
    see(machine.block->mbarriers[waits_for]);
}

void copy_box(void* shared, const TensorMap& map, const Corner& corner, uint64_t* barrier) {
    const void* code = __builtin_return_address(0);
    Mbarrier& mbarrier = find(barrier, code);
    if (!mbarrier.fenced) fail("the copy engine does not know the barrier: nobody has fenced it");
    const BoxCopy copy = {static_cast<unsigned char*>(shared), map, corner};
    const size_t size = bytes(map);
    if (reinterpret_cast<uintptr_t>(shared) % 128 != 0)
        fail("a bulk copy to byte %zu of shared memory, which is no multiple of 128",
             size_t(copy.to - machine.block->shared));
    access(shared, size, true, code);
    for_rows(copy, [&](size_t, const unsigned char* from, size_t inside) {
        if (inside > 0) access(from, inside, false, code);
    });
    const Stamp stamp = {machine.block->epoch, code_offset(code), by_engine, open_phase(mbarrier)};
    Cell* cells = &machine.block->cells[copy.to - machine.block->shared];
    for (size_t i = 0; i < size; ++i) cells[i].writer = stamp;
    memset(shared, poison, size);
    mbarrier.copies.push_back(copy);
    mbarrier.asked += size;
    complete(mbarrier);
}

std::string describe_mbarrier(const Mbarrier& mbarrier) {
    char text[160];
    snprintf(text, sizeof text, " at byte %zu with %u of %u arrivals, and %zu bytes copied of %zu expected",
             mbarrier.offset, mbarrier.arrived, mbarrier.arrivals, mbarrier.asked, mbarrier.expected);
    return text;
}

void check_mbarriers(const Block& block) {
    for (const Mbarrier& mbarrier : block.mbarriers)
        if (!mbarrier.copies.empty() || !mbarrier.landing.empty())
            fail("the block ends while a bulk copy is in flight that the mbarrier at byte %zu tells of",
                 mbarrier.offset);
}

}  // namespace emulation
