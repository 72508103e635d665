// Matrix products of a warp, for kernels that will want them: no kernel of csrc/cuda has any yet. docs/emulation.md
// shows the fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace effnet::cuda {

// c += a * b: mma.sync.aligned.m16n8k16.row.col with T of __half or __nv_bfloat16, and sums in float.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    constexpr bool half = std::is_same_v<T, __half>;
    static_assert(half || std::is_same_v<T, __nv_bfloat16>, "two bytes");
    emulation::matrix_product(half ? emulation::Format::f16 : emulation::Format::bf16, a, b, c, {file, line});
}

// ldmatrix.sync.aligned.m8n8.x{1,2,4}.shared.b16, with .trans where transposed. Lane 8 m + r gives the address of row r
// of matrix m in shared memory, a multiple of 16; the other lanes' addresses are not looked at.
template <bool transposed, int matrices>
void load_matrices(uint32_t (&to)[matrices], const void* row, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    static_assert(matrices == 1 || matrices == 2 || matrices == 4, "what there is an instruction for");
    uint4 values{};
    if (threadIdx.x % 32 < 8 * matrices) values = *static_cast<const uint4*>(row);
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    emulation::matrix_load(words, to, matrices, transposed, {file, line});
}

}  // namespace effnet::cuda
