// The names that one source takes when it is compiled for one instruction set. Every kernel lives in a namespace of its
// ISA, and none calls a standard-library template: the linker would keep one copy of it for all ISAs, perhaps one that
// this processor cannot run.
#pragma once

#if defined(EFFNET_ISA_AVX512_BF16)
#define EFFNET_ISA avx512_bf16
#define EFFNET_VECTOR_BYTES 64
#elif defined(EFFNET_ISA_AVX512)
#define EFFNET_ISA avx512
#define EFFNET_VECTOR_BYTES 64
#elif defined(EFFNET_ISA_AVX2)
#define EFFNET_ISA avx2
#define EFFNET_VECTOR_BYTES 32
#else
#define EFFNET_ISA baseline
#define EFFNET_VECTOR_BYTES 16
#endif

#define EFFNET_NAMESPACE_BEGIN \
    namespace effnet {         \
    namespace cpu {            \
    namespace EFFNET_ISA {
#define EFFNET_NAMESPACE_END \
    }                        \
    }                        \
    }

#define EFFNET_INLINE inline __attribute__((always_inline))
