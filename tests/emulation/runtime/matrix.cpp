// Products of small matrices that a warp computes together, and the loads that bring their operands.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "state.h"

namespace emulation {
namespace {

struct Product {
    Format format;
    const uint32_t *a, *b;
    float* c;
};

double number(Format format, uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    return format == Format::bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

void gather(void* const* data, double (&a)[16][16], double (&b)[16][8]) {
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = *static_cast<const Product*>(data[lane]);
        const int group = lane / 4, place = lane % 4;
        for (int word = 0; word < 4; ++word)
            for (int half = 0; half < 2; ++half)
                a[group + 8 * (word % 2)][2 * place + half + 8 * (word / 2)] = number(mine.format, mine.a[word], half);
        for (int word = 0; word < 2; ++word)
            for (int half = 0; half < 2; ++half)
                b[2 * place + half + 8 * word][group] = number(mine.format, mine.b[word], half);
    }
}

// Sums have more digits than the hardware's, and are rounded once.
void multiply(void* const* data, unsigned mask) {
    if (mask != 0xffffffffu) fail("a matrix product needs all 32 lanes; 0x%08x take part", mask);
    double a[16][16], b[16][8];
    gather(data, a, b);
    for (int lane = 0; lane < 32; ++lane) {
        float* c = static_cast<const Product*>(data[lane])->c;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = c[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            c[i] = static_cast<float>(sum);
        }
    }
}
const Collective product = {"a matrix product", multiply};

struct Load {
    const uint32_t* row;
    uint32_t* to;
};

void hand_out(void* const* data, unsigned mask) {
    if (mask != 0xffffffffu) fail("a matrix load needs all 32 lanes; 0x%08x take part", mask);
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m)
            static_cast<const Load*>(data[lane])->to[m] =
                static_cast<const Load*>(data[8 * m + lane / 4])->row[lane % 4];
}
const Collective load = {"a matrix load", hand_out};

}  // namespace

void matrix_product(Format format, const uint32_t* a, const uint32_t* b, float* c, Site site) {
    Product mine = {format, a, b, c};
    collective(product, 0xffffffffu, &mine, site);
}

void matrix_load(const uint32_t* row, uint32_t* to, Site site) {
    Load mine = {row, to};
    collective(load, 0xffffffffu, &mine, site);
}

}  // namespace emulation
