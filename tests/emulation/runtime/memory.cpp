// What a thread may touch: tensors by the byte, its block's shared memory, its own stack. And when: who touched it
// last.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulation {
namespace {

// Between two tensors, so that what runs over the end of one meets no other.
constexpr size_t guard_bytes = 1 << 20;
// Around the buffer of shared memory, where an address is still believed to be meant for it.
constexpr size_t shared_margin = 256 * 1024;

std::string code_name(uint32_t code) { return "{code:" + std::to_string(code) + "}"; }

std::string who(const Stamp& stamp) {
    const unsigned number = block_of(stamp.epoch);
    std::string text = "thread " + std::to_string(stamp.thread);
    if (number != machine.block->number) text += " of block " + std::to_string(number);
    return text + " at " + code_name(stamp.code);
}

// Whether the running thread, or one before the last barrier, has waited for a bulk copy.
bool has_landed(const Stamp& stamp) {
    const Phase& phase = machine.block->phases[stamp.thread];
    return machine.thread->complete_seen[phase.mbarrier] > phase.number ||
           (phase.first_seen != 0 && phase.first_seen < machine.block->epoch);
}

// Whether what the stamp tells of happened before what the running thread does. What lies before `floor` does not
// count.
bool ordered(const Stamp& stamp, uint32_t floor) {
    const Block& block = *machine.block;
    if (stamp.clock == by_engine && stamp.epoch >= block.first_epoch) return has_landed(stamp);
    if (stamp.epoch <= floor) return true;
    if (block_of(stamp.epoch) != block.number) return false;
    const Thread& thread = *machine.thread;
    if (stamp.epoch < block.epoch || stamp.thread == thread.number) return true;
    if (stamp.thread / warp_lanes != thread.number / warp_lanes) return false;
    return stamp.clock <= block.seen[thread.number * warp_lanes + stamp.thread % warp_lanes];
}

// What is accessed, for messages.
struct Place {
    const char* memory;
    size_t offset;
    bool shared;
};

struct Access {
    size_t size;
    bool write;
    uint32_t code;
    const char* verb() const { return write ? "written" : "read"; }
};

void report_race(const Place& place, const Access& access, const Stamp& other, bool other_wrote) {
    if ((other.clock == in_flight || other.clock == by_engine) && other_wrote)
        return fail(
            "byte %zu of %s is %s at %s before the asynchronous copy to it has landed: thread %u began it at %s",
            place.offset, place.memory, access.verb(), code_name(access.code).c_str(),
            other.clock == by_engine ? machine.block->phases[other.thread].thread : other.thread,
            code_name(other.code).c_str());
    fail("race: byte %zu of %s is %s at %s, and %s by %s, with no %s in between", place.offset, place.memory,
         access.verb(), code_name(access.code).c_str(), other_wrote ? "written" : "read", who(other).c_str(),
         block_of(other.epoch) == machine.block->number ? "barrier" : "order between blocks");
}

// Keeps two readers of which a later write that has not waited for all readers has not waited for one. Readers that
// this one has waited for are superfluous; of several in one warp, or in one other block, one will do.
void keep_reader(Cell& cell, const Stamp& mine, uint32_t floor) {
    Stamp& a = cell.readers[0];
    Stamp& b = cell.readers[1];
    if (ordered(b, floor) && (b.thread == mine.thread || !ordered(a, floor)))
        b = mine;
    else if (ordered(a, floor))
        a = mine;
    else if (block_of(a.epoch) == block_of(b.epoch) &&
             (block_of(a.epoch) != machine.block->number || a.thread / warp_lanes == b.thread / warp_lanes))
        b = mine;
}

void check(Cell* cells, const Place& place, const Access& access) {
    const Block& block = *machine.block;
    const Thread& thread = *machine.thread;
    const Stamp mine = {block.epoch, access.code, thread.clock, static_cast<uint16_t>(thread.number)};
    // Shared memory was another block's before.
    const uint32_t floor = place.shared ? std::max(machine.settled, block.first_epoch - 1) : machine.settled;
    for (size_t i = 0; i < access.size; ++i) {
        Cell& cell = cells[i];
        const Place byte = {place.memory, place.offset + i, place.shared};
        if (!access.write && (place.shared ? cell.writer.epoch < block.first_epoch : cell.writer.epoch == 0))
            fail("byte %zu of %s is read at %s before anything was written to it", byte.offset, byte.memory,
                 code_name(access.code).c_str());
        if (cell.writer.clock == in_flight && cell.writer.epoch >= block.first_epoch)
            report_race(byte, access, cell.writer, true);
        if (!ordered(cell.writer, floor)) report_race(byte, access, cell.writer, true);
        if (access.write) {
            for (const Stamp& reader : cell.readers)
                if (!ordered(reader, floor)) report_race(byte, access, reader, false);
            cell = {mine, {}};
        } else {
            keep_reader(cell, mine, floor);
        }
    }
}

const char* const shared_name = "shared memory";

void shared_access(size_t offset, const Access& access) {
    Block& block = *machine.block;
    const size_t size = machine.launch->shared_bytes;
    if (offset >= size || size - offset < access.size)
        fail("%zu bytes at byte %zd of shared memory are %s at %s; the block has %zu", access.size,
             static_cast<ssize_t>(offset), access.verb(), code_name(access.code).c_str(), size);
    check(&block.cells[offset], {shared_name, offset, true}, access);
}

Region* find_region(uintptr_t address, size_t size) {
    if (machine.last_region != nullptr && address - machine.last_region->begin < machine.last_region->size)
        return machine.last_region;
    auto after = std::upper_bound(machine.regions.begin(), machine.regions.end(), address,
                                  [](uintptr_t value, const Region& region) { return value < region.begin; });
    if (after == machine.regions.begin()) return nullptr;
    Region& region = *(after - 1);
    if (address + size > region.begin + region.size) return nullptr;
    return machine.last_region = &region;
}

// The address in words: relative to the tensor whose mapping it lies in.
std::string locate(uintptr_t address) {
    char text[320];
    for (const Region& region : machine.regions) {
        const auto mapping = reinterpret_cast<uintptr_t>(region.mapping);
        if (address < mapping || address >= mapping + region.mapping_bytes) continue;
        if (address < region.begin)
            snprintf(text, sizeof text, "%zu bytes before the beginning of %s", size_t(region.begin - address),
                     region.name.c_str());
        else if (address < region.begin + region.size)
            snprintf(text, sizeof text, "byte %zu of %s of %zu", size_t(address - region.begin), region.name.c_str(),
                     region.size);
        else
            snprintf(text, sizeof text, "%zu bytes past the end of %s, which has %zu",
                     size_t(address - region.begin - region.size), region.name.c_str(), region.size);
        return text;
    }
    if (address < 4096) {
        snprintf(text, sizeof text, "address %zu: a null pointer", size_t(address));
        return text;
    }
    snprintf(text, sizeof text, "address 0x%zx, in no tensor", size_t(address));
    return text;
}

// The tensor that holds all that is accessed; null, after a report, on the host only.
Region* tensor_at(uintptr_t address, const Access& access) {
    Region* region = find_region(address, access.size);
    if (region == nullptr || address + access.size > region->begin + region->size) {
        fail("out of bounds: %zu bytes are %s at %s: %s", access.size, access.verb(), code_name(access.code).c_str(),
             locate(address).c_str());
    } else if (region->freed) {
        fail("%zu bytes of %s are %s at %s after it was freed", access.size, region->name.c_str(), access.verb(),
             code_name(access.code).c_str());
    } else if (access.write && region->kind == Kind::input) {
        fail("byte %zu of %s, an input, is written at %s", size_t(address - region->begin), region->name.c_str(),
             code_name(access.code).c_str());
    }
    return machine.error.empty() ? region : nullptr;
}

void check_tensor(uintptr_t address, const Access& access) {
    const Region& region = *tensor_at(address, access);
    const size_t offset = address - region.begin;
    if (region.cells != nullptr) check(region.cells + offset, {region.name.c_str(), offset, false}, access);
}

bool is_own_constant(uintptr_t address, size_t size, bool write) {
    const auto arguments = reinterpret_cast<uintptr_t>(machine.launch->arguments);
    if (write) return false;
    if (address - arguments < machine.launch->argument_bytes) return true;
    return address >= machine.library_begin && address + size <= machine.library_end;
}

bool is_shared(uintptr_t address, const Block& block) {
    return block.shared != nullptr && address - (reinterpret_cast<uintptr_t>(block.shared) - shared_margin) <
                                          machine.launch->shared_bytes + 2 * shared_margin;
}

int find_library(dl_phdr_info* info, size_t, void*) {
    const auto here = reinterpret_cast<uintptr_t>(&machine);
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
        end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
    }
    if (here < begin || here >= end) return 0;
    machine.library_begin = info->dlpi_addr;
    machine.library_end = end;
    return 1;
}

void* reserve(size_t bytes) {
    void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return room == MAP_FAILED ? nullptr : room;
}

void free_cells(Region& region) {
    if (region.cells != nullptr) munmap(region.cells, region.size * sizeof(Cell));
    region.cells = nullptr;
}

}  // namespace

void access(const void* pointer, size_t size, bool write, const void* code) {
    if (machine.thread == nullptr) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - reinterpret_cast<uintptr_t>(machine.thread->stack) < stack_bytes) return;
    ++machine.accesses;
    const Access mine = {size, write, code_offset(code)};
    if (is_shared(address, *machine.block))
        return shared_access(address - reinterpret_cast<uintptr_t>(machine.block->shared), mine);
    if (is_own_constant(address, size, write)) return;
    check_tensor(address, mine);
}

void atomic_access(const void* pointer, size_t size, const void* code) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const Region& region = *tensor_at(address, {size, true, code_offset(code)});
    if (region.cells[address - region.begin].writer.epoch == 0)
        fail("%s is read at %s before anything was written to it", region.name.c_str(),
             code_name(code_offset(code)).c_str());
}

void read_only_access(const void* pointer, size_t size) {
    if (machine.thread == nullptr) return;
    const void* code = __builtin_return_address(0);
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const Region& region = *tensor_at(address, {size, false, code_offset(code)});
    if (region.cells == nullptr) return;
    const Cell* cell = region.cells + (address - region.begin);
    for (size_t i = 0; i < size; ++i)
        if (cell[i].writer.epoch >= machine.launch_epoch)
            fail("byte %zu of %s is read through the read-only cache at %s, though %s wrote it in this launch",
                 size_t(address - region.begin + i), region.name.c_str(), code_name(code_offset(code)).c_str(),
                 who(cell[i].writer).c_str());
}

void prepare_shared(Block& block, size_t bytes) {
    if (block.shared_room < bytes) {
        auto* room = static_cast<unsigned char*>(reserve(bytes + 2 * shared_margin));
        if (room == nullptr) return fail("no memory for %zu bytes of shared memory", bytes);
        // No more aligned than the declaration in launch.cuh promises.
        block.shared = room + shared_margin + 128;
        block.shared_room = bytes;
    }
    if (bytes == 0) return;
    memset(block.shared, poison, bytes);
    if (block.cells.size() < bytes) block.cells.resize(bytes);
}

void issue_copy(const Copy& copy) {
    const auto to = reinterpret_cast<uintptr_t>(copy.to), from = reinterpret_cast<uintptr_t>(copy.from);
    if (to % copy.size != 0)
        fail("an asynchronous copy of %d bytes to an address that is no multiple of it, at %s", copy.size,
             code_name(copy.code).c_str());
    if (copy.read > 0 && from % copy.size != 0)
        fail("an asynchronous copy of %d bytes from an address that is no multiple of it, at %s", copy.size,
             code_name(copy.code).c_str());
    const size_t offset = to - reinterpret_cast<uintptr_t>(machine.block->shared);
    if (!is_shared(to, *machine.block))
        fail("an asynchronous copy to what is not shared memory, at %s", code_name(copy.code).c_str());
    shared_access(offset, {size_t(copy.size), true, copy.code});
    if (copy.read > 0) check_tensor(from, {size_t(copy.read), false, copy.code});
    const Stamp mine = {machine.block->epoch, copy.code, in_flight, static_cast<uint16_t>(machine.thread->number)};
    for (int i = 0; i < copy.size; ++i) {
        copy.to[i] = poison;
        machine.block->cells[offset + i].writer = mine;
    }
}

void land_copy(const Copy& copy) {
    for (int i = 0; i < copy.size; ++i) copy.to[i] = i < copy.read ? copy.from[i] : 0;
    Cell* cells = &machine.block->cells[copy.to - machine.block->shared];
    const Stamp mine = {machine.block->epoch, copy.code, machine.thread->clock,
                        static_cast<uint16_t>(machine.thread->number)};
    for (int i = 0; i < copy.size; ++i) cells[i].writer = mine;
}

bool fill(void* pointer, int value, size_t size) {
    if (size == 0) return true;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const Region* region = tensor_at(address, {size, true, code_offset(__builtin_return_address(0))});
    if (region == nullptr) return false;
    memset(pointer, value, size);
    for (size_t i = 0; i < size; ++i)
        region->cells[address - region->begin + i].writer.epoch = std::max(machine.epoch, 1u);
    return true;
}

void release_regions() {
    for (Region& region : machine.regions) {
        free_cells(region);
        munmap(region.mapping, region.mapping_bytes);
    }
    machine.regions.clear();
    machine.last_region = nullptr;
}

}  // namespace emulation

using namespace emulation;

// Room for a tensor with guard zones on both sides, `misalignment` bytes behind a multiple of 256. Null without memory.
extern "C" void* emulation_allocate(const char* name, size_t bytes, size_t misalignment, int kind) {
    const size_t mapping_bytes = (bytes + misalignment + 2 * guard_bytes + 4095) / 4096 * 4096;
    void* mapping = reserve(mapping_bytes);
    if (mapping == nullptr) return nullptr;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapping) + guard_bytes + misalignment;
    Cell* cells = nullptr;
    if (Kind(kind) != Kind::input && bytes > 0) {
        cells = static_cast<Cell*>(reserve(bytes * sizeof(Cell)));
        if (cells == nullptr) {
            munmap(mapping, mapping_bytes);
            return nullptr;
        }
    }
    if (cells != nullptr && Kind(kind) == Kind::inout)
        for (size_t i = 0; i < bytes; ++i) cells[i].writer.epoch = std::max(machine.epoch, 1u);
    machine.epoch = std::max(machine.epoch, 1u);
    machine.settled = machine.epoch;
    auto place = std::upper_bound(machine.regions.begin(), machine.regions.end(), begin,
                                  [](uintptr_t value, const Region& region) { return value < region.begin; });
    machine.regions.insert(place, {name, begin, bytes, Kind(kind), false, cells, mapping, mapping_bytes});
    machine.last_region = nullptr;
    return reinterpret_cast<void*>(begin);
}

// From now on an access is an error that names the tensor; its memory goes back at the next emulation_reset.
extern "C" void emulation_free(const void* pointer) {
    for (Region& region : machine.regions)
        if (region.begin == reinterpret_cast<uintptr_t>(pointer)) region.freed = true;
}

// Breaks kernels until the next reset: barriers in this line of files whose path ends so do nothing, waits leave more
// groups of copies open than they should, or tensors cannot be mapped.
extern "C" void emulation_break(const char* file, int line, int late_groups, bool without_tensor_maps) {
    if (line > 0) machine.skipped.push_back({file, line});
    machine.late_groups = late_groups;
    machine.has_tensor_maps = !without_tensor_maps;
}

// Forgets all tensors and reports. With a seed other than 0 blocks and threads run in a random order.
extern "C" void emulation_reset(uint64_t seed, int multiprocessors, size_t shared_limit, uint64_t first_block,
                                uint64_t last_block) {
    dl_iterate_phdr(find_library, nullptr);
    release_regions();
    machine.error.clear();
    machine.random.seed(seed);
    machine.shuffled = seed != 0;
    machine.multiprocessors = multiprocessors;
    machine.shared_limit = shared_limit;
    machine.first_block = first_block;
    machine.last_block = last_block;
    machine.accesses = 0;
    machine.launched.clear();
    machine.skipped.clear();
    machine.late_groups = 0;
    machine.has_tensor_maps = true;
}

// The last report with {code:offset} for addresses in this library, or an empty string.
extern "C" const char* emulation_error() { return machine.error.c_str(); }
extern "C" uint64_t emulation_accesses() { return machine.accesses; }
extern "C" uint64_t emulation_launches() { return machine.launched.size(); }
extern "C" uint64_t emulation_kernel(uint64_t launch) { return machine.launched.at(launch); }
