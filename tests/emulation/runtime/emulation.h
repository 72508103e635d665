// What the emulated headers ask of the runtime: threads and what they wait for, shared memory, asynchronous copies.
// Device code reaches all of this through include/; docs/emulation.md explains the model.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
    unsigned x, y, z;
};

// Where in the source a thread waits.
struct Site {
    const char* file;
    int line;
};

struct Launch {
    const void* kernel;
    void (*body)(void*);  // calls the kernel with the arguments
    void* arguments;
    size_t argument_bytes;
    Index grid, block;
    size_t shared_bytes;
    bool cooperative;
};

// Runs all blocks. False where a detector has spoken, now or in an earlier launch: error() says what it said.
bool launch(const Launch& launch);

void* shared_memory();

void block_barrier(Site site);
// All threads of all blocks of a cooperative launch.
void grid_barrier(unsigned* counter, unsigned arrivals, Site site);

// What the lanes of `mask` do together. The last one to arrive calls `act` with every lane's `data`, null for lanes
// that take no part.
struct Collective {
    const char* name;
    void (*act)(void* const* data, unsigned mask);
};
void collective(const Collective& what, unsigned mask, void* data, Site site);
// The same for __syncwarp, which also orders memory.
void warp_barrier(unsigned mask, Site site);

enum class Shuffle { from, up, down, across };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int parameter, int width, Site site);
// One bit for each lane of the mask whose predicate holds.
unsigned ballot(unsigned mask, bool predicate, Site site);

enum class Format { bf16, f16 };
// c += a * b by the fragments of mma.sync.m16n8k16.row.col: two numbers a word, the one in front in the lower half.
void matrix_product(Format format, const uint32_t* a, const uint32_t* b, float* c, Site site);
// Hands out `matrices` 8 x 8 matrices of two-byte numbers as ldmatrix does. Lane 8 m + r brings row r of matrix m.
void matrix_load(const uint32_t* row, uint32_t* to, Site site);

// Lands at wait_copies. Reads `read` bytes, and fills up to `size` with zeros.
void copy_async(void* shared, const void* global, int size, int read);
void commit_copies();
void wait_copies(int open);

// A tensor of four dimensions, the innermost first, and the box that a bulk copy brings of it.
struct TensorMap {
    const unsigned char* data;
    int64_t sizes[4];
    int box[4];
    int element_bytes;
};
// By the rules of cuTensorMapEncodeTiled, and unless a test says that there are no maps.
bool can_be_mapped(const TensorMap& map);

// mbarrier objects in shared memory. The copy engine knows those that the thread that made them has fenced.
void make_mbarrier(uint64_t* barrier, unsigned arrivals);
void fence_mbarriers();
void arrive_at_mbarrier(uint64_t* barrier, unsigned bytes);
void wait_at_mbarrier(uint64_t* barrier, unsigned parity, Site site);
// Lands when somebody has waited for the barrier's phase. Elements outside the tensor are zero.
struct Corner {
    int64_t at[4];
};
void copy_box(void* shared, const TensorMap& map, const Corner& corner, uint64_t* barrier);

// A read through the cache that does not see what this launch writes.
void read_only_access(const void* address, size_t size);
// The host writes, between launches.
bool fill(void* address, int value, size_t size);

// A detector's report; does not return inside a kernel.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
