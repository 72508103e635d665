// Kernels of a few lines, each in a right version and in one with a bug that a detector has to find. All take n numbers
// and write n: out[i] = 2 * in[i ^ 1] unless they say something else.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <launch.cuh>
#include <ptx.cuh>

namespace cuda = effnet::cuda;

namespace {

constexpr int threads = 64;

struct Arguments {
    const float* in;
    float* out;
    unsigned* counter;
    int n;
    cuda::TensorMap map;  // of in, `threads` numbers a box
};

__device__ int position() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <bool broken>
__global__ void missing_barrier(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    if constexpr (!broken) __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

// The buffer is filled again while others still read it.
template <bool broken>
__global__ void reused_buffer(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        staged[threadIdx.x] = a.in[position()];
        __syncthreads();
        sum += staged[threadIdx.x ^ 1];
        if constexpr (!broken) __syncthreads();
    }
    a.out[position()] = sum;
}

template <bool broken>
__global__ void two_writers(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[broken ? threadIdx.x / 2 : threadIdx.x] = 2 * a.in[position()];
    __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

// Half of a word each: no race, unless both write all of it.
template <bool broken>
__global__ void two_halves(Arguments a) {
    __half* staged = cuda::shared_memory<__half>();
    staged[threadIdx.x] = __float2half_rn(2 * a.in[position()]);
    if constexpr (broken) *reinterpret_cast<unsigned*>(staged + (threadIdx.x & ~1)) = 0;
    __syncthreads();
    a.out[position()] = __half2float(staged[threadIdx.x ^ 1]);
}

template <bool broken>
__global__ void missing_warp_barrier(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    if constexpr (!broken) __syncwarp();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

// A shuffle brings lanes together, but orders no memory.
template <bool broken>
__global__ void shuffle_for_barrier(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = a.in[position()];
    const float same = __shfl_sync(0xffffffffu, 2.0f, 0);
    if constexpr (!broken) __syncwarp();
    a.out[position()] = same * staged[threadIdx.x ^ 1];
}

// Warps that meet among themselves only.
template <bool broken>
__global__ void warp_barrier_for_block(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    if constexpr (broken)
        __syncwarp();
    else
        __syncthreads();
    const float other = staged[(threadIdx.x + 32) % threads];
    a.out[position()] = other;
}

template <bool broken>
__global__ void read_past_the_end(Arguments a) {
    const int i = position();
    a.out[i] = 2 * a.in[broken ? i + 1 : i ^ 1];
}

template <bool broken>
__global__ void read_before_the_beginning(Arguments a) {
    const int i = position();
    a.out[i] = 2 * a.in[broken ? i - 1 : i ^ 1];
}

template <bool broken>
__global__ void write_past_the_end(Arguments a) {
    const int i = position();
    a.out[broken ? i + 3 : i] = 2 * a.in[i ^ 1];
}

template <bool broken>
__global__ void copy_past_the_end(Arguments a) {
    const int i = position();
    if (i == 0) memcpy(a.out, a.in, a.n * sizeof(float) + (broken ? 1 : 0));
}

template <bool broken>
__global__ void null_pointer(Arguments a) {
    const float* in = broken ? nullptr : a.in;
    a.out[position()] = 2 * in[position() ^ 1];
}

template <bool broken>
__global__ void write_to_input(Arguments a) {
    const int i = position();
    a.out[i] = 2 * a.in[i ^ 1];
    if (broken && i == 7) const_cast<float*>(a.in)[i] = 0;
}

template <bool broken>
__global__ void uninitialised_output(Arguments a) {
    const int i = position();
    if (!broken) a.out[i] = 0;
    a.out[i] += 2 * a.in[i ^ 1];
}

template <bool broken>
__global__ void past_shared_memory(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x + (broken ? 1 : 0)] = 2 * a.in[position() ^ 1];
    a.out[position()] = staged[threadIdx.x + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void uninitialised_shared_memory(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    if (!broken || threadIdx.x != 5) staged[threadIdx.x] = 2 * a.in[position()];
    __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void divergent_barrier(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    if (broken && threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void early_exit(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    if (broken && threadIdx.x == 40) return;
    __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void absent_lanes(Arguments a) {
    const int i = position();
    float other = a.in[i];
    if (!broken || threadIdx.x % 32 < 16) other = __shfl_xor_sync(0xffffffffu, other, 1);
    if (broken) __syncthreads();
    a.out[i] = 2 * other;
}

template <bool broken>
__global__ void inactive_source_lane(Arguments a) {
    const int i = position();
    float other = a.in[i];
    if (threadIdx.x % 32 < 16) other = __shfl_sync(0x0000ffffu, other, broken ? 16 : threadIdx.x ^ 1);
    if (threadIdx.x % 32 >= 16) other = __shfl_sync(0xffff0000u, other, threadIdx.x ^ 1);
    a.out[i] = 2 * other;
}

// Asynchronous copies of four numbers each by a quarter of the threads, in two groups.
template <int open, bool barrier>
__device__ void asynchronous(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    const int first = blockIdx.x * threads, lane = threadIdx.x;
    if (lane < 8) cuda::copy_async_16(staged + 4 * lane, a.in + first + 4 * lane, true);
    cuda::copy_async_commit();
    if (lane < 8) cuda::copy_async_16(staged + 32 + 4 * lane, a.in + first + 32 + 4 * lane, true);
    cuda::copy_async_commit();
    cuda::copy_async_wait<open>();
    if constexpr (barrier) __syncthreads();
    a.out[position()] = 2 * staged[lane ^ 1];
}
template <bool broken>
__global__ void copy_not_waited_for(Arguments a) {
    asynchronous<broken ? 1 : 0, true>(a);
}
template <bool broken>
__global__ void copy_without_barrier(Arguments a) {
    asynchronous<0, !broken>(a);
}

// A warp's 32 numbers are eight rows of 16 bytes, and each lane gets its own back as a word of a matrix.
__device__ float in_matrix(const float* staged) {
    uint32_t words[4];
    cuda::load_matrices(words, staged + threadIdx.x / 32 * 32 + threadIdx.x % 8 * 4);
    return __uint_as_float(words[0]);
}
template <bool broken>
__global__ void matrix_load_without_barrier(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x ^ 1] = 2 * a.in[position()];
    if constexpr (!broken) __syncwarp();
    a.out[position()] = in_matrix(staged);
}
template <bool broken>
__global__ void matrix_load_by_half_a_warp(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x ^ 1] = 2 * a.in[position()];
    __syncwarp();
    if (!broken || threadIdx.x % 32 < 16) a.out[position()] = in_matrix(staged);
}
template <bool broken>
__global__ void misaligned_matrix_row(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x ^ 1] = 2 * a.in[position()];
    __syncthreads();
    a.out[position()] = in_matrix(staged + (broken ? 2 : 0));
}

template <bool broken>
__global__ void copy_into_what_is_read(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    staged[threadIdx.x] = 2 * a.in[position()];
    __syncthreads();
    a.out[position()] = staged[threadIdx.x ^ 1];
    if constexpr (!broken) __syncthreads();
    if (threadIdx.x == 0) cuda::copy_async_16(staged + 60, a.in, true);
}

template <bool broken>
__global__ void copy_past_the_tensor(Arguments a) {
    float* staged = cuda::shared_memory<float>();
    const int first = position() * 4;
    cuda::copy_async_16(staged + 4 * threadIdx.x, first < a.n || broken ? a.in + first : nullptr,
                        first < a.n || broken);
    cuda::copy_async_commit();
    cuda::copy_async_wait<0>();
    __syncthreads();
    if (blockIdx.x == 0) a.out[position()] = 2 * staged[threadIdx.x ^ 1];
}

// A block's share of the input by a bulk copy, and the barrier that tells of it.
struct Bulk {
    float* const staged = cuda::shared_memory<float>();
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(staged + threads);

    __device__ void make(bool fence = true) const {
        if (threadIdx.x != 0) return;
        cuda::mbarrier_init(barrier, 1);
        if (fence) cuda::fence_mbarriers();
    }
    __device__ void ask(const cuda::TensorMap& map, int bytes = threads * sizeof(float)) const {
        if (threadIdx.x != 0) return;
        cuda::mbarrier_arrive_expect(barrier, bytes);
        cuda::copy_tensor_async(staged, &map, 0, blockIdx.x, 0, 0, barrier);
    }
};

template <bool broken>
__global__ void bulk_copy_not_waited_for(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    bulk.ask(a.map);
    if constexpr (!broken) cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void bulk_copy_of_another_phase(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    bulk.ask(a.map);
    cuda::mbarrier_wait(bulk.barrier, broken);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void bulk_copy_that_another_waits_for(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    bulk.ask(a.map);
    if (threadIdx.x == 0) cuda::mbarrier_wait(bulk.barrier, 0);
    if constexpr (!broken) __syncthreads();
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void bulk_copy_of_fewer_bytes(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    bulk.ask(a.map, (threads + broken) * sizeof(float));
    cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void bulk_copy_into_what_is_read(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        bulk.ask(a.map);
        cuda::mbarrier_wait(bulk.barrier, round);
        sum += bulk.staged[threadIdx.x ^ 1];
        if constexpr (!broken) __syncthreads();
    }
    a.out[position()] = sum;
}

template <bool broken>
__global__ void bulk_copy_left_in_flight(Arguments a) {
    const Bulk bulk;
    bulk.make();
    __syncthreads();
    bulk.ask(a.map);
    if constexpr (!broken) cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * a.in[position() ^ 1];
}

template <bool broken>
__global__ void unknown_mbarrier(Arguments a) {
    const Bulk bulk;
    bulk.make();
    if constexpr (!broken) __syncthreads();
    bulk.ask(a.map);
    cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void unfenced_mbarrier(Arguments a) {
    const Bulk bulk;
    bulk.make(!broken);
    __syncthreads();
    bulk.ask(a.map);
    cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void overwritten_mbarrier(Arguments a) {
    const Bulk bulk;
    bulk.make();
    if (threadIdx.x == 0 && broken) bulk.staged[threads] = 0;
    __syncthreads();
    bulk.ask(a.map);
    cuda::mbarrier_wait(bulk.barrier, 0);
    a.out[position()] = 2 * bulk.staged[threadIdx.x ^ 1];
}

template <bool broken>
__global__ void misaligned(Arguments a) {
    const int i = position();
    const float2 pair = *reinterpret_cast<const float2*>(a.in + (broken ? i | 1 : i & ~1) % (a.n - 1));
    a.out[i] = 2 * (i & 1 ? pair.x : pair.y);
}

template <bool broken>
__global__ void local_array(Arguments a) {
    float kept[4];
    for (int i = 0; i < 4; ++i) kept[i] = a.in[(position() & ~3) + i];
    a.out[position()] = 2 * kept[(position() & 3) + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void overflowing_offset(Arguments a) {
    // n is 128, and both offsets are zero modulo 2^32.
    const int i = position(), offset = (broken ? 1 << 25 : 0) * a.n;
    a.out[i] = 2 * a.in[(i ^ 1) + offset];
}

template <bool broken>
__global__ void blocks_write_the_same(Arguments a) {
    a.out[position()] = 2 * a.in[position() ^ 1];
    if (broken && position() == threads) a.out[5] = a.in[4] * 2;
}

template <bool broken>
__global__ void block_reads_what_another_wrote(Arguments a) {
    const int i = position();
    a.out[i] = 2 * a.in[i ^ 1];
    if (broken && i == threads) a.out[i] += a.out[0];
}

template <bool broken>
__global__ void threads_write_the_same(Arguments a) {
    a.out[broken ? position() & ~1 : position()] = 2 * a.in[position() ^ 1];
}

template <bool broken>
__global__ void stale_read(Arguments a) {
    const int i = position();
    a.out[i] = 2 * __ldg(a.in + (i ^ 1));
    if (broken) a.out[i] = __ldg(a.out + i);
}

// Every block reads what the next one wrote.
template <bool broken>
__global__ void missing_grid_barrier(Arguments a) {
    const int next = (position() + threads) % a.n;
    a.out[position()] = 2 * a.in[position() ^ 1];
    if constexpr (!broken) cuda::grid_barrier(a.counter, gridDim.x);
    const float found = a.out[next];
    cuda::grid_barrier(a.counter, gridDim.x * (broken ? 1 : 2));
    a.out[next] = found;
}

template <bool broken>
__global__ void wrong_arrivals(Arguments a) {
    a.out[position()] = 2 * a.in[position() ^ 1];
    cuda::grid_barrier(a.counter, gridDim.x);
    cuda::grid_barrier(a.counter, gridDim.x * (broken ? 1 : 2));
}

struct Planted {
    const char* name;
    cudaError_t (*run)(Arguments, dim3, int, bool);
};

template <auto right, auto broken>
cudaError_t run(Arguments a, dim3 grid, int shared_bytes, bool with_bug) {
    if (a.counter == nullptr)
        return with_bug ? cuda::launch<broken>(grid, threads, shared_bytes, nullptr, a)
                        : cuda::launch<right>(grid, threads, shared_bytes, nullptr, a);
    return with_bug ? cuda::launch_cooperative<broken>(grid, threads, shared_bytes, nullptr, a)
                    : cuda::launch_cooperative<right>(grid, threads, shared_bytes, nullptr, a);
}

#define PLANTED(NAME) {#NAME, run<NAME<false>, NAME<true>>}
const Planted all[] = {
    PLANTED(missing_barrier),
    PLANTED(reused_buffer),
    PLANTED(two_writers),
    PLANTED(two_halves),
    PLANTED(missing_warp_barrier),
    PLANTED(shuffle_for_barrier),
    PLANTED(warp_barrier_for_block),
    PLANTED(read_past_the_end),
    PLANTED(read_before_the_beginning),
    PLANTED(write_past_the_end),
    PLANTED(copy_past_the_end),
    PLANTED(null_pointer),
    PLANTED(write_to_input),
    PLANTED(uninitialised_output),
    PLANTED(past_shared_memory),
    PLANTED(uninitialised_shared_memory),
    PLANTED(divergent_barrier),
    PLANTED(early_exit),
    PLANTED(absent_lanes),
    PLANTED(inactive_source_lane),
    PLANTED(copy_not_waited_for),
    PLANTED(copy_without_barrier),
    PLANTED(matrix_load_without_barrier),
    PLANTED(matrix_load_by_half_a_warp),
    PLANTED(misaligned_matrix_row),
    PLANTED(copy_into_what_is_read),
    PLANTED(copy_past_the_tensor),
    PLANTED(bulk_copy_not_waited_for),
    PLANTED(bulk_copy_of_another_phase),
    PLANTED(bulk_copy_that_another_waits_for),
    PLANTED(bulk_copy_of_fewer_bytes),
    PLANTED(bulk_copy_into_what_is_read),
    PLANTED(bulk_copy_left_in_flight),
    PLANTED(unknown_mbarrier),
    PLANTED(unfenced_mbarrier),
    PLANTED(overwritten_mbarrier),
    PLANTED(misaligned),
    PLANTED(local_array),
    PLANTED(overflowing_offset),
    PLANTED(blocks_write_the_same),
    PLANTED(block_reads_what_another_wrote),
    PLANTED(threads_write_the_same),
    PLANTED(stale_read),
    PLANTED(missing_grid_barrier),
    PLANTED(wrong_arrivals),
};

}  // namespace

// 1 where there is no kernel of this name. A counter makes the launch cooperative.
extern "C" int planted(const char* name, bool with_bug, const float* in, float* out, unsigned* counter, int n,
                       int blocks, int shared_bytes) {
    Arguments arguments{in, out, counter, n, {}};
    if (!cuda::encode_tensor_map(arguments.map, cuda::DType::f32, in, {threads, n / threads, 1, 1}, {threads, 1, 1, 1}))
        return 1;
    for (const Planted& kernel : all)
        if (strcmp(kernel.name, name) == 0) return kernel.run(arguments, dim3(blocks), shared_bytes, with_bug);
    return 1;
}
