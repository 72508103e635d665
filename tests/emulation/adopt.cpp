// Tensors of PyTorch in the emulated GPU's memory: what the bindings hand to the kernels, and nothing else, may be
// used.
#include <sys/mman.h>

#include <algorithm>

#include "runtime/state.h"

using namespace emulation;

// kind: 0 input, 1 output, 2 both. A tensor that is handed over twice keeps its first kind.
extern "C" void emulation_adopt(const char* name, const void* pointer, size_t bytes, int kind) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    const auto place = std::lower_bound(machine.regions.begin(), machine.regions.end(), begin,
                                        [](const Region& region, uintptr_t value) { return region.begin < value; });
    if (bytes == 0 || (place != machine.regions.end() && place->begin == begin)) return;
    Cell* cells = nullptr;
    if (Kind(kind) != Kind::input)
        cells = static_cast<Cell*>(
            mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    machine.epoch = std::max(machine.epoch, 1u);
    machine.settled = machine.epoch;
    machine.regions.insert(place, {name, begin, bytes, Kind(kind), false, cells, nullptr, 0});
    machine.last_region = nullptr;
}
