#!/usr/bin/env bash
# On a CPU, torch 2.14.1's avg_pool2d over a whole image is 30 times less exact in float32 than mean or adaptive_avg_pool2d.
#
# Guess: the three spellings of squeeze-and-excitation's squeeze are the same average, and agree to rounding, 1e-7.
# Seen (32 channels of 112x112, uniform numbers): "mean 6e-08, adaptive_avg_pool2d 6e-08, avg_pool2d 2e-06". mean adds up by
# halves; avg_pool2d adds 12,544 numbers into one float, in both layouts. So a model that is written with it is off by more
# than whole stock EfficientNets usually are. In bfloat16 and float16 all three add in float32, and agree.
. "$(dirname "$0")/install" torch==2.14.1 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import numpy
import torch
import torch.nn.functional as F

torch.manual_seed(0)
image = torch.rand(1, 32, 112, 112)
SPELLINGS = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, x.shape[2:]),
}


def errors(x: torch.Tensor) -> dict[str, float]:
    exact = x.double().mean((2, 3), keepdim=True)
    return {name: ((f(x).double() - exact).norm() / exact.norm()).item() for name, f in SPELLINGS.items()}


for layout in (torch.contiguous_format, torch.channels_last):
    found = errors(image.contiguous(memory_format=layout))
    print(layout, ", ".join(f"{name} {error:.0e}" for name, error in found.items()))
    assert max(found["mean"], found["adaptive_avg_pool2d"]) < 1e-7 < 1e-6 < found["avg_pool2d"], found
one_by_one = numpy.add.accumulate(image.flatten(2).numpy(), axis=2, dtype=numpy.float32)[..., -1] / numpy.float32(112 * 112)
assert numpy.array_equal(F.avg_pool2d(image, 112).flatten(1).numpy(), one_by_one)
half = errors(image.bfloat16())
print(torch.bfloat16, ", ".join(f"{name} {error:.1e}" for name, error in half.items()))
assert len(set(half.values())) == 1, half
PYTHON
