// csrc/cuda/kernels.h with C linkage, for ctypes.
#include "kernels.h"

using namespace effnet::cuda;

#define EMULATION_BINDINGS(STRUCT)                                                               \
    extern "C" size_t sizeof_##STRUCT() { return sizeof(STRUCT); }                               \
    extern "C" void plan_##STRUCT(const STRUCT* problem, const Device* device, Plan* found) {    \
        *found = plan(*problem, *device);                                                        \
    }                                                                                            \
    extern "C" int run_##STRUCT(const STRUCT* problem, const Plan* plan, const Device* device) { \
        return run(*problem, *plan, *device);                                                    \
    }
EMULATION_BINDINGS(DepthwiseForward)
EMULATION_BINDINGS(DepthwiseBackward)
EMULATION_BINDINGS(SqueezeExciteForward)
EMULATION_BINDINGS(SqueezeExciteBackward)
EMULATION_BINDINGS(ExpandDepthwise)
EMULATION_BINDINGS(GatedProject)

#define WANTS_COPIES(STRUCT)                                                                               \
    extern "C" bool wants_copies_##STRUCT(const STRUCT* problem, const Plan* plan, const Device* device) { \
        return wants_copies(*problem, *plan, *device);                                                     \
    }
WANTS_COPIES(DepthwiseForward)
WANTS_COPIES(DepthwiseBackward)

extern "C" size_t sizeof_Device() { return sizeof(Device); }
extern "C" size_t sizeof_Plan() { return sizeof(Plan); }
