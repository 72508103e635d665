// The machine that is emulated, as the parts of the runtime share it.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace emulation {

constexpr unsigned warp_lanes = 32;
constexpr unsigned most_threads = 1024;
constexpr size_t stack_bytes = 64 * 1024;
constexpr unsigned char poison = 0xff;  // NaN in float, __half and __nv_bfloat16

// Who touched a byte, and when: an epoch is what lies between two barriers of one block and has a number of its own in
// the whole session; the clock counts a thread's warp barriers within it. `code` is where, from the library's start.
struct Stamp {
    uint32_t epoch = 0;
    uint32_t code = 0;
    uint16_t clock = 0;
    uint16_t thread = 0;
};

// Of the readers since the last write, two are kept: enough to find one that another thread has not waited for.
struct Cell {
    Stamp writer;
    Stamp readers[2];
};

constexpr uint16_t in_flight = 0xffff;  // the clock of a byte that an asynchronous copy has not reached yet
// The clock of a byte that a bulk copy brings; the stamp's thread is the number of the phase that tells of it, among
// those of the block.
constexpr uint16_t by_engine = 0xfffe;

enum class State : uint8_t { ready, block_barrier, grid_barrier, collective, mbarrier, exited };

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int size, read;
    uint32_t code;
};

struct BoxCopy {
    unsigned char* to;
    TensorMap map;
    Corner corner;
};

// Of an mbarrier object. `first_seen`: the epoch in which the first thread waited for it, 0 before.
struct Phase {
    unsigned mbarrier, number;
    unsigned thread;  // that asked for the phase's first copy
    uint32_t first_seen;
};

struct Mbarrier {
    size_t offset;  // in shared memory
    unsigned maker, arrivals;
    bool fenced;
    unsigned complete;  // phases
    unsigned arrived;
    size_t expected, asked;        // bytes, in the phase that is open
    int open_phase;                // its number among the block's, or -1 before its first copy
    std::vector<BoxCopy> copies;   // of the open phase
    std::vector<BoxCopy> landing;  // of phases that are complete and have not been waited for
    std::vector<unsigned> phases;  // of the block, of those that are complete, where they have copies
};

struct Thread {
    Fiber fiber;
    unsigned char* stack;
    unsigned number;
    Index index;
    State state;
    Site site;
    uint16_t clock;
    unsigned mask;
    const Collective* collective;
    void* data;
    std::vector<Copy> issued;
    std::vector<std::vector<Copy>> groups;
    size_t mbarrier;                      // that it waits at
    std::vector<unsigned> complete_seen;  // [mbarrier]: how many phases it knows to be complete
};

struct Block {
    unsigned number;  // in the grid, x first
    Index index;
    uint32_t epoch, first_epoch;
    std::vector<Thread> threads;
    unsigned waiting, exited;
    unsigned grid_arrivals;
    unsigned char* shared = nullptr;
    size_t shared_room = 0;
    std::vector<Cell> cells;
    std::vector<uint16_t> seen;  // [thread][lane of its warp]: the lane's clock at their last common barrier
    bool seen_is_clean = false;
    std::vector<Mbarrier> mbarriers;
    std::vector<Phase> phases;
};

// Whether a kernel may write a tensor, and whether it may read it before it has been written.
enum class Kind : int { input = 0, output = 1, inout = 2 };

struct Region {
    std::string name;
    uintptr_t begin;
    size_t size;
    Kind kind;
    bool freed;
    Cell* cells;  // null for inputs
    void* mapping;
    size_t mapping_bytes;
};

struct Machine {
    // What a test chooses.
    std::mt19937_64 random;
    bool shuffled = false;
    int multiprocessors = 4;
    size_t shared_limit = 227 * 1024;
    uint64_t first_block = 0, last_block = UINT64_MAX;
    std::vector<std::pair<std::string, int>> skipped;  // barriers of these lines do nothing: would anybody notice?
    bool has_tensor_maps = true;
    int late_groups = 0;  // how many more groups of copies stay open than a wait allows

    Fiber scheduler;
    std::vector<Block> blocks;
    Block* block = nullptr;    // of the thread that runs
    Thread* thread = nullptr;  // null on the host
    const Launch* launch = nullptr;
    uint32_t epoch = 0;
    uint32_t launch_epoch = 0;
    uint32_t settled = 0;                // everything up to this epoch happened before
    std::vector<unsigned> epoch_blocks;  // from launch_epoch on, the block that each epoch belongs to
    unsigned grid_barriers = 0;
    bool aborted = false;
    std::string error;

    std::vector<Region> regions;  // by address
    Region* last_region = nullptr;
    uintptr_t library_begin = 0, library_end = 0;
    uint64_t accesses = 0;
    std::vector<uint32_t> launched;  // the kernel of each launch, by its place in the library
};

extern Machine machine;

uint32_t code_offset(const void* code);
unsigned block_of(uint32_t epoch);
void next_epoch(Block& block);

void access(const void* address, size_t size, bool write, const void* code);
void atomic_access(const void* address, size_t size, const void* code);
void prepare_shared(Block& block, size_t bytes);
void issue_copy(const Copy& copy);
void land_copy(const Copy& copy);
void release_regions();
void to_scheduler();
bool skipped(Site site);
std::string describe_mbarrier(const Mbarrier& mbarrier);
// What an ending block leaves in flight would land in another's shared memory.
void check_mbarriers(const Block& block);

}  // namespace emulation
