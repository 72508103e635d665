"""Every depthwise convolution of EfficientNet-B0 to B7."""

from __future__ import annotations

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from cases import DepthwiseCase
from helpers import check, lay_out, normal, relative_error

import effnet_ops

# (expansion, kernel, stride, output channels, layers) of the seven stages of B0, and (width, depth, resolution) of the
# family: Tan and Le, arXiv 1905.11946, and tensorflow/tpu efficientnet_builder.py.
STAGES = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]
FAMILY = [
    (1.0, 1.0, 224),
    (1.0, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 300),
    (1.4, 1.8, 380),
    (1.6, 2.2, 456),
    (1.8, 2.6, 528),
    (2.0, 3.1, 600),
]
Shape = tuple[int, int, int, int]


def rounded(channels: int, width: float) -> int:
    """The nearest multiple of 8 that loses at most a tenth."""
    nearest = max(8, int(channels * width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels * width else nearest


def depthwise_shapes() -> list[Shape]:
    """(channels, input height = width, kernel, stride), each once."""
    shapes = set()
    for width, depth, resolution in FAMILY:
        size, channels = ceil(resolution / 2), rounded(32, width)
        for expansion, kernel, first_stride, base, repeats in STAGES:
            for layer in range(ceil(repeats * depth)):
                stride = first_stride if layer == 0 else 1
                shapes.add((channels * expansion, size, kernel, stride))
                size, channels = ceil(size / stride), rounded(base, width)
    return sorted(shapes)


SHAPES = depthwise_shapes()
LARGEST = 12
"""Sizes above are cropped to 11 or 12, by parity: more of the same rows would only take longer."""
FULL = [(32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 5, 2), (672, 14, 5, 2), (1152, 7, 5, 1), (240, 75, 5, 2)]


def test_there_are_110() -> None:
    assert len(SHAPES) == 110
    assert len({(channels, kernel, stride) for channels, _, kernel, stride in SHAPES}) == 75
    assert max(channels for channels, *_ in SHAPES) == 3840


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "C{}_{}_k{}_s{}".format(*shape))
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_every_shape(shape: Shape, padding: str) -> None:
    channels, size, kernel, stride = shape
    size = size if size <= LARGEST else LARGEST - (LARGEST - size) % 2
    case = DepthwiseCase(
        "", (1, channels, size, size), (kernel, kernel), stride, "same" if padding == "same" else kernel // 2
    )
    tensors = {"x": normal(*case.shape), "weight": normal(channels, 1, kernel, kernel), "bias": None}
    check(lambda t: effnet_ops.depthwise_conv2d(t["x"], t["weight"], **case.config), tensors, torch.float32)


@pytest.mark.usefixtures("two_threads", "poison")
@pytest.mark.parametrize("shape", FULL, ids=lambda shape: "C{}_{}_k{}_s{}".format(*shape))
def test_full_size(shape: Shape) -> None:
    channels, size, kernel, stride = shape
    x = lay_out(normal(2, channels, size, size).float(), "channels_last").requires_grad_()
    weight = normal(channels, 1, kernel, kernel).float().requires_grad_()
    out = effnet_ops.depthwise_conv2d(x, weight, stride=stride, padding=kernel // 2)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, weight), grad)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_weight, None, stride, kernel // 2, groups=channels)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    assert relative_error(out, exact) <= 2e-6
    assert relative_error(grads[0], exact_grads[0]) <= 2e-5
    assert relative_error(grads[1], exact_grads[1]) <= 2e-5
