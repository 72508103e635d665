"""The depthwise convolution of a block on CUDA C++ kernels, for `kernels/mbconv.py`.

The functions mean what those of `kernels/depthwise.py` do, and have those of their arguments that a block gives. What
is stored for a channel or an image comes back in float32, as it does there for all dtypes but float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_ops.kernels.layout import nchw, nhwc


def _images(x: Tensor | None) -> Tensor | None:
    """The channels_last view of x (N, H, W, C)."""
    return None if x is None else nchw(x)


def _pixels(y: Tensor) -> Tensor:
    """y (N, C, H, W) as contiguous (N, H, W, C), with the strides of such where H = W = 1 or C = 1, too."""
    pixels = nhwc(y)
    _, height, width, channels = pixels.shape
    return pixels.as_strided(pixels.shape, (height * width * channels, width * channels, channels, 1))


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    norm: Tensor | None = None,
    activation: str = "none",
    bias: Tensor | None = None,
    out_norm: Tensor | None = None,
    out_activation: str = "none",
    pool: bool = False,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y, sums, partials = torch.ops.effnet_ops.cuda_depthwise_forward(
        nchw(x), weight, bias, norm, None, out_norm, None, stride[0], padding, activation, out_activation,
        pool, statistics,
    )  # fmt: skip
    return _pixels(y), sums if pool else None, partials if statistics else None


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    a: Tensor | None = None,
    a_norm: Tensor | None = None,
    a_activation: str = "none",
    coefficients: Tensor | None = None,
    gate: Tensor | None = None,
    pooled: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    needs: Sequence[bool] = (True, True, False),
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """``size`` is that of x. ``coefficients`` begins with the mean of ``a_norm``. There is no gradient of a bias."""
    like = nchw(x)
    read = norm is not None or activation != "none" or needs[1]
    dx, dw, _, sums = torch.ops.effnet_ops.cuda_depthwise_backward(
        nchw(grad), like if read else None, weight, None, _images(a), a_norm, coefficients, gate, pooled, norm,
        _images(residual), like, stride[0], padding, a_activation, activation, needs,
    )  # fmt: skip
    with_sums = needs[0] and norm is not None
    return _pixels(dx) if needs[0] else None, dw if needs[1] else None, None, sums if with_sums else None
