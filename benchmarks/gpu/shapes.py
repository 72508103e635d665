"""The layers of EfficientNets as timm builds them, found by a walk on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import timm
import torch
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import Tensor, nn

RESOLUTIONS = {
    "efficientnet_b0": 224,
    "efficientnet_b2": 260,
    "efficientnet_b4": 380,
    "tf_efficientnetv2_b0": 224,
    "resnet50": 224,
}


class Depthwise(NamedTuple):
    channels: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} k{self.kernel} s{self.stride}"


class Product(NamedTuple):
    channels_in: int
    channels_out: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels_in}x{self.size}x{self.size} -> {self.channels_out}"


class Block(NamedTuple):
    """An MBConv block with an expansion, on square images."""

    channels_in: int
    expanded: int
    channels_out: int
    kernel: int
    stride: int
    size: int
    reduced: int

    def __str__(self) -> str:
        window = f"k{self.kernel} s{self.stride}"
        return f"{self.channels_in}x{self.size}x{self.size} -> {self.expanded} {window} -> {self.channels_out}"


class Found(NamedTuple):
    """Distinct layers in order; ``blocks`` are (path, input channels, side) of MBConv, ``fused`` of Fused-MBConv, and
    ``expanding`` MBConv with an expansion.
    """

    depthwise: list[Depthwise]
    products: list[Product]
    blocks: list[tuple[str, int, int]]
    expanding: list[Block]
    fused: list[tuple[str, int, int]]


def layers(name: str, resolution: int | None = None) -> Found:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    depthwise: dict[Depthwise, None] = {}
    products: dict[Product, None] = {}
    blocks: dict[str, tuple[str, int, int]] = {}
    expanding: dict[Block, None] = {}
    fused: dict[str, tuple[str, int, int]] = {}

    def record(path: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, InvertedResidual | DepthwiseSeparableConv):
            kernel, stride = module.conv_dw.kernel_size[0], module.conv_dw.stride[0]
            key = f"{x.shape[1]} -> {module.conv_dw.in_channels} k{kernel} s{stride} at {x.shape[2]}"
            blocks.setdefault(key, (path, x.shape[1], x.shape[2]))
            if isinstance(module, InvertedResidual):
                expanded, out = module.conv_dw.in_channels, module.conv_pwl.out_channels
                reduced = module.se.conv_reduce.out_channels
                expanding[Block(x.shape[1], expanded, out, kernel, stride, x.shape[2], reduced)] = None
        elif isinstance(module, EdgeResidual | ConvBnAct):
            convolutions = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
            made, stride = [conv.out_channels for conv in convolutions], convolutions[0].stride[0]
            fused.setdefault(f"{x.shape[1]} -> {made} s{stride} at {x.shape[2]}", (path, x.shape[1], x.shape[2]))
        elif isinstance(module, nn.Conv2d) and x.shape[2] > 1:
            if module.groups == module.in_channels > 1:
                depthwise[Depthwise(x.shape[1], module.kernel_size[0], module.stride[0], x.shape[2])] = None
            elif module.kernel_size == (1, 1):
                products[Product(x.shape[1], module.out_channels, x.shape[2])] = None

    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, path=path: record(path, m, args[0]))
    side = resolution or RESOLUTIONS[name]
    with torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return Found(list(depthwise), list(products), list(blocks.values()), list(expanding), list(fused.values()))


def whole_blocks(resolution: dict[str, int], most: int) -> Iterator[tuple[str, str, str, int, int]]:
    """(row's name, network, path, channels, side) of B0's MBConv and V2-B0's Fused-MBConv blocks, so many of each."""
    b0, v2 = "efficientnet_b0", "tf_efficientnetv2_b0"
    for path, channels, side in layers(b0, resolution[b0]).blocks[:most]:
        yield f"block {path}", b0, path, channels, side
    for path, channels, side in layers(v2, resolution[v2]).fused[:most]:
        yield f"fused block {path}", v2, path, channels, side
