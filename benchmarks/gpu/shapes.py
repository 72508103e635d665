"""The layers of EfficientNets as timm builds them, found by a walk on meta tensors."""

from __future__ import annotations

from typing import NamedTuple

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

RESOLUTIONS = {"efficientnet_b0": 224, "efficientnet_b2": 260, "efficientnet_b4": 380, "resnet50": 224}


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
    """Distinct layers in order; ``blocks`` are (name, input channels, side) by the path of their module, ``expanding``
    those with an expansion.
    """

    depthwise: list[Depthwise]
    products: list[Product]
    blocks: list[tuple[str, int, int]]
    expanding: list[Block]


def layers(name: str, resolution: int | None = None) -> Found:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    depthwise: dict[Depthwise, None] = {}
    products: dict[Product, None] = {}
    blocks: dict[str, tuple[str, int, int]] = {}
    expanding: dict[Block, None] = {}

    def record(path: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, InvertedResidual | DepthwiseSeparableConv):
            kernel, stride = module.conv_dw.kernel_size[0], module.conv_dw.stride[0]
            key = f"{x.shape[1]} -> {module.conv_dw.in_channels} k{kernel} s{stride} at {x.shape[2]}"
            blocks.setdefault(key, (path, x.shape[1], x.shape[2]))
            if isinstance(module, InvertedResidual):
                expanded, out = module.conv_dw.in_channels, module.conv_pwl.out_channels
                reduced = module.se.conv_reduce.out_channels
                expanding[Block(x.shape[1], expanded, out, kernel, stride, x.shape[2], reduced)] = None
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
    return Found(list(depthwise), list(products), list(blocks.values()), list(expanding))
