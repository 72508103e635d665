"""What the operators launch for the blocks of EfficientNets, recorded on meta tensors."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from ahead_of_time import Launch, recorded
from torch import Tensor
from triton.runtime.jit import JITFunction

from effnet_ops import kernels
from effnet_ops.checks import resolve_padding
from effnet_ops.kernels import depthwise
from effnet_ops.models import model_spec
from effnet_ops.models.spec import BlockSpec
from effnet_ops.ops import triton
from effnet_ops.ops._library import OPERATORS
from effnet_ops.ops.calls import ConvNorm, SqueezeExcite
from effnet_ops.ops.fused_mbconv import FusedMBConvCall
from effnet_ops.ops.mbconv import MBConvCall

RESOLUTION = {"b0": 224, "b4": 380, "b7": 600}


def all_kernels() -> set[str]:
    """The names of everything in kernels/ that can be launched."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{file.name}") for file in pkgutil.iter_modules(kernels.__path__)
    ]
    functions = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in functions if "_kernel" in name}


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    last = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=last)


def blocks(name: str) -> list[tuple[BlockSpec, int]]:
    """The distinct blocks of a network with the sides of their input, TensorFlow's padding."""
    side, found = (RESOLUTION[name] + 1) // 2, {}
    for block in (block for stage in model_spec(f"efficientnet_{name}").stages() for block in stage):
        found[block, side] = None
        side = -(-side // block.stride)
    return list(found)


def implementation(name: str) -> Callable[..., Any]:
    """An operator on Triton kernels, as a function of its arguments."""
    return OPERATORS[name].unpacking(triton.implementation(name))


def _convolution(batch_statistics: bool, *weight: int) -> ConvNorm:
    vectors = [meta(weight[0]) for _ in range(4)]
    statistics = (None, None) if batch_statistics else vectors[2:]
    return ConvNorm(meta(*weight), *vectors[:2], *statistics, 1e-3)


def arguments(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, batch_statistics: bool) -> list[object]:
    wide, se = block.expanded_channels, block.se_channels
    convolution = functools.partial(_convolution, batch_statistics)
    x = meta(batch, block.in_channels, side, side, dtype=dtype)
    expand = convolution(wide, block.in_channels, 1, 1) if block.expands else None
    layer = meta(se, wide, 1, 1), meta(se), meta(wide, se, 1, 1), meta(wide)
    squeeze = SqueezeExcite(*layer, "silu", "sigmoid") if se else None
    depthwise = convolution(wide, 1, block.kernel_size, block.kernel_size)
    residual = block.stride == 1 and block.in_channels == block.out_channels
    drop_path = meta(batch) if residual and batch_statistics else None
    project = convolution(block.out_channels, wide, 1, 1)
    call = MBConvCall(
        x, expand, depthwise, squeeze, project, drop_path, (block.stride,) * 2, (), (1, 1), residual, "silu"
    )
    return list(OPERATORS["mbconv_inference"].signature.flatten(call))


def fused_blocks(name: str, side: int) -> list[tuple[BlockSpec, int]]:
    """The distinct Fused-MBConv blocks of a network for images of this side, with the sides of their input."""
    side, found = (side + 1) // 2, {}
    for block in (block for stage in model_spec(name).stages() for block in stage):
        if block.block == "fused_mbconv":
            found[block, side] = None
        side = -(-side // block.stride)
    return list(found)


def fused_step(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    """A Fused-MBConv block: inference, and a training step, forward and backward."""
    with recorded(architecture) as launches:
        implementation("fused_mbconv_inference")(*fused_arguments(block, batch, side, dtype, False))
        given = fused_arguments(block, batch, side, dtype, True)
        y, *saved = implementation("fused_mbconv_training")(*given, True)
        implementation("fused_mbconv_backward")(y, *given, *saved, [True] * 11)
    return launches


def fused_arguments(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, training: bool) -> list[object]:
    wide = block.expanded_channels if block.expands else block.out_channels
    expand = _convolution(training, wide, block.in_channels, *[block.kernel_size] * 2)
    project = _convolution(training, block.out_channels, wide, 1, 1) if block.expands else None
    residual = block.stride == 1 and block.in_channels == block.out_channels
    drop_path = meta(batch) if residual and training else None
    x = meta(batch, block.in_channels, side, side, dtype=dtype)
    call = FusedMBConvCall(x, expand, None, project, drop_path, (block.stride,) * 2, (), residual, "silu")
    return list(OPERATORS["fused_mbconv_inference"].signature.flatten(call))


def inference(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    with recorded(architecture) as launches:
        implementation("mbconv_inference")(*arguments(block, batch, side, dtype, False))
    return launches


def training(
    block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str, batch_statistics: bool = True
) -> list[Launch]:
    """A step, forward and backward; without the batch's statistics, one with frozen normalisations."""
    given = arguments(block, batch, side, dtype, batch_statistics)
    with recorded(architecture) as launches:
        y, *saved = implementation("mbconv_training")(*given, False)
        implementation("mbconv_backward")(y, *given, *saved, [True] * 14)
    return launches


def single_layers(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    """The block's depthwise convolution, squeeze-and-excitation and products as operators of their own, both ways."""
    wide, kernel, stride = block.expanded_channels, block.kernel_size, [block.stride] * 2
    x, small = (meta(batch, channels, side, side, dtype=dtype) for channels in (wide, block.in_channels))
    with recorded(architecture) as launches:
        given = [x, meta(wide, 1, kernel, kernel), meta(wide), stride, [], [1, 1], "silu"]
        y = implementation("depthwise_conv2d")(*given)
        implementation("depthwise_conv2d_backward")(y, *given, [True] * 3)

        se = block.se_channels or 8
        given = [meta(se, wide, 1, 1), meta(se), meta(wide, se, 1, 1), meta(wide), "silu", "sigmoid"]
        y, pooled = implementation("squeeze_excite")(x, *given)
        implementation("squeeze_excite_backward")(y, x, *given, pooled, [True] * 5)

        given = [small, meta(wide, block.in_channels, 1, 1), meta(wide)]
        y = implementation("pointwise_conv2d")(*given, None, "silu")
        implementation("pointwise_conv2d_backward")(y, *given, None, "silu", [True] * 3)
        given = [x, meta(block.in_channels, wide, 1, 1), None]
        y = implementation("pointwise_conv2d")(*given, small, "none")
        implementation("pointwise_conv2d_backward")(y, *given, None, "none", [True] * 3)
    return launches


def windows(kernel: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    """A depthwise convolution of 144 channels at 56 x 56, SAME: plain both ways, and as a block in training has it."""
    channels, side, pair = 144, 56, (dilation, dilation)
    out, f32 = -(-side // stride), torch.float32

    def vectors(*size: int) -> Tensor:
        return torch.empty(size, dtype=f32, device="meta")

    x, y = (torch.empty(256, n, n, channels, dtype=dtype, device="meta") for n in (side, out))
    weight, norm, of_image = meta(channels, 1, *kernel), vectors(3, channels), vectors(256, channels)
    padding = resolve_padding((), (side, side), kernel, (stride, stride), pair)
    window = {"stride": (stride, stride), "padding": padding, "dilation": pair}
    with recorded(architecture) as launches:
        depthwise.forward(x, weight, **window, bias=vectors(channels), out_activation="silu")
        depthwise.backward(y, x, weight, **window, size=(side, side), bias=vectors(channels), needs=(True,) * 3)
        depthwise.forward(x, weight, **window, norm=norm, activation="silu", statistics=True)
        depthwise.backward(
            y, x, weight, **window, size=(side, side), a=y, a_norm=norm, a_activation="silu",
            coefficients=vectors(4, channels), gate=of_image, pooled=of_image, norm=norm, activation="silu",
        )  # fmt: skip
    return launches
