#include "calibration.h"

#include "vec.h"

EFFNET_NAMESPACE_BEGIN

namespace {

// Independent sums: at least latency times instructions a cycle, and no more than fit into registers.
constexpr int chains = EFFNET_VECTOR_BYTES == 64 ? 24 : 12;

void keep(const Vec<float>* sums) {
    Vec<float> total = sums[0];
    for (int i = 1; i < chains; ++i) total += sums[i];
    volatile float sink = total[0];
    (void)sink;
}

}  // namespace

// Runs `iterations` rounds and returns the floating-point operations in them, a multiply-add being two.
int64_t multiply_adds_float32(int64_t iterations) {
    const Vec<float> factor = broadcast(0.999f), term = broadcast(0.001f);
    Vec<float> sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = broadcast(float(i));
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
        for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
    }
    keep(sums);
    return iterations * chains * lanes<float> * 2;
}

// The same with dot products of bfloat16 pairs added to float32; 0 where the instruction set has none.
int64_t multiply_adds_bfloat16(int64_t iterations) {
#if defined(__AVX512BF16__)
    const __m512bh factor = bit_cast<__m512bh>(_mm512_set1_epi16(0x3a80));
    Vec<float> sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = broadcast(float(i));
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
        for (int i = 0; i < chains; ++i) sums[i] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[i], factor, factor);
    }
    keep(sums);
    return iterations * chains * lanes<float> * 4;
#else
    (void)iterations;
    return 0;
#endif
}

EFFNET_NAMESPACE_END
