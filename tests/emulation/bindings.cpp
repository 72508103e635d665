// csrc/cuda/kernels.h with C linkage, for ctypes.
#include "kernels.h"

using namespace effnet::cuda;

#define EMULATION_BINDINGS(STRUCT)                                                            \
    extern "C" size_t sizeof_##STRUCT() { return sizeof(STRUCT); }                            \
    extern "C" const char* why_not_##STRUCT(const STRUCT* problem, const Device* device) {    \
        return why_not(*problem, *device);                                                    \
    }                                                                                         \
    extern "C" void plan_##STRUCT(const STRUCT* problem, const Device* device, Plan* found) { \
        *found = plan(*problem, *device);                                                     \
    }                                                                                         \
    extern "C" int run_##STRUCT(const STRUCT* problem, const Device* device) { return run(*problem, *device); }
EMULATION_BINDINGS(DepthwiseForward)
EMULATION_BINDINGS(DepthwiseBackward)
EMULATION_BINDINGS(SqueezeExciteForward)
EMULATION_BINDINGS(SqueezeExciteBackward)

extern "C" bool wants_copies_DepthwiseForward(const DepthwiseForward* problem, const Device* device) {
    return wants_copies(*problem, *device);
}
extern "C" bool wants_copies_DepthwiseBackward(const DepthwiseBackward* problem, const Device* device) {
    return wants_copies(*problem, *device);
}

extern "C" size_t sizeof_Device() { return sizeof(Device); }
extern "C" size_t sizeof_Plan() { return sizeof(Plan); }
