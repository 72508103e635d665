// What one core can do at best, to hold the kernels against: a loop of nothing but multiply-adds for each instruction
// set.
#pragma once

#include <cstdint>

#define EFFNET_DECLARE_CALIBRATION(isa)                 \
    namespace effnet {                                  \
    namespace cpu {                                     \
    namespace isa {                                     \
    int64_t multiply_adds_float32(int64_t iterations);  \
    int64_t multiply_adds_bfloat16(int64_t iterations); \
    }                                                   \
    }                                                   \
    }
