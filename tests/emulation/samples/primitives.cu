// What device code is made of, one thing a kernel, for comparison with what it should be.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <launch.cuh>
#include <ptx.cuh>

namespace cuda = effnet::cuda;

namespace {

template <class T>
__global__ void shuffles(const T* in, T* out, int lane, int delta, int width) {
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = __shfl_sync(0xffffffffu, in[i], lane, width);
    out[n + i] = __shfl_up_sync(0xffffffffu, in[i], delta, width);
    out[2 * n + i] = __shfl_down_sync(0xffffffffu, in[i], delta, width);
    out[3 * n + i] = __shfl_xor_sync(0xffffffffu, in[i], delta, width);
}

__global__ void votes(const int* in, unsigned* out) {
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = __ballot_sync(0xffffffffu, in[i]);
    out[n + i] = __any_sync(0xffffffffu, in[i]);
    out[2 * n + i] = __all_sync(0xffffffffu, in[i]);
}

// c (16, 8) += a (16, 16) b (16, 8), by fragments that the caller has laid out.
template <class T>
__global__ void product_of_fragments(const uint4* a, const uint2* b, float4* c) {
    const uint4 mine = a[threadIdx.x];
    const uint32_t a_words[4] = {mine.x, mine.y, mine.z, mine.w}, b_words[2] = {b[threadIdx.x].x, b[threadIdx.x].y};
    float sums[4] = {c[threadIdx.x].x, c[threadIdx.x].y, c[threadIdx.x].z, c[threadIdx.x].w};
    cuda::mma_m16n8k16<T>(sums, a_words, b_words);
    c[threadIdx.x] = {sums[0], sums[1], sums[2], sums[3]};
}

// The same from matrices in shared memory, whose rows are loaded as the fragments need them; c is by rows.
template <class T>
__global__ void product_of_tiles(const T* a, const T* b, float* c) {
    T* tile_a = cuda::shared_memory<T>();
    T* tile_b = tile_a + 16 * 16;
    const int lane = threadIdx.x;
    for (int i = lane; i < 16 * 16; i += 32) tile_a[i] = a[i];
    for (int i = lane; i < 16 * 8; i += 32) tile_b[i % 8 * 16 + i / 8] = b[i];
    __syncwarp();
    uint32_t a_words[4], b_words[4];
    cuda::load_matrices(a_words, tile_a + lane % 16 * 16 + lane / 16 * 8);
    cuda::load_matrices(b_words, tile_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    const uint32_t first[2] = {b_words[0], b_words[1]};
    float sums[4] = {};
    cuda::mma_m16n8k16<T>(sums, a_words, first);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sums[i];
}

}  // namespace

extern "C" int shuffle_floats(const float* in, float* out, int threads, int lane, int delta, int width) {
    return cuda::launch<shuffles<float>>(dim3(1), threads, 0, nullptr, in, out, lane, delta, width);
}
extern "C" int shuffle_longs(const int64_t* in, int64_t* out, int threads, int lane, int delta, int width) {
    return cuda::launch<shuffles<int64_t>>(dim3(1), threads, 0, nullptr, in, out, lane, delta, width);
}
extern "C" int count_votes(const int* in, unsigned* out, int threads) {
    return cuda::launch<votes>(dim3(1), threads, 0, nullptr, in, out);
}
extern "C" int multiply_fragments(bool half, const uint4* a, const uint2* b, float4* c) {
    return half ? cuda::launch<product_of_fragments<__half>>(dim3(1), 32, 0, nullptr, a, b, c)
                : cuda::launch<product_of_fragments<__nv_bfloat16>>(dim3(1), 32, 0, nullptr, a, b, c);
}
extern "C" int multiply_tiles(bool half, const void* a, const void* b, float* c) {
    constexpr int bytes = (16 * 16 + 16 * 8) * 2;
    return half ? cuda::launch<product_of_tiles<__half>>(dim3(1), 32, bytes, nullptr, static_cast<const __half*>(a),
                                                         static_cast<const __half*>(b), c)
                : cuda::launch<product_of_tiles<__nv_bfloat16>>(dim3(1), 32, bytes, nullptr,
                                                                static_cast<const __nv_bfloat16*>(a),
                                                                static_cast<const __nv_bfloat16*>(b), c);
}

extern "C" void round_to(bool half, const float* in, uint16_t* out, int n) {
    for (int i = 0; i < n; ++i) out[i] = half ? __float2half_rn(in[i]).bits : __float2bfloat16_rn(in[i]).bits;
}
extern "C" void widen_from(bool half, const uint16_t* in, float* out, int n) {
    for (int i = 0; i < n; ++i) out[i] = half ? __half2float({in[i]}) : __bfloat162float({in[i]});
}
extern "C" void approximate(const float* in, float* out, int n) {
    for (int i = 0; i < n; ++i) {
        out[i] = cuda::tanh_approximate(in[i]);
        out[n + i] = cuda::exp2_approximate(in[i]);
        out[2 * n + i] = cuda::reciprocal_approximate(in[i]);
        out[3 * n + i] = fmaf(in[i], in[i], -1.0f);
    }
}
