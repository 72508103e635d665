"""Parameters, multiply-adds and bytes of a network, counted from its specification without building it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import groupby
from typing import NamedTuple

import torch

from effnet_ops.checks import FLOAT_DTYPES, pair
from effnet_ops.models import EfficientNet, EfficientNetFeatures, ScaledSpec
from effnet_ops.models.spec import BlockSpec
from effnet_ops.scaling.network import Layer, block_layers, network, walk
from effnet_ops.scaling.traffic import Traffic, traffic


@dataclass(frozen=True)
class _Cost:
    """What a layer, a stage or a network costs.

    Attributes:
        parameters: learnt numbers.
        macs: multiply-adds of convolutions and the classifier for the whole batch, as torch.utils.flop_counter counts
            them (it gives FLOPs).
        activations: elements that these layers write (arXiv 2003.13678).
        weight_bytes: the parameters in memory.
        stock_bytes: activations that a forward pass in evaluation reads and writes, one operation at a time.
        fused_bytes: the same with each convolution, its normalisation and its activation in one pass, and the expanded
            tensor never in memory (docs/mbconv.md): what fused operators have to move at least, without cache.
        stock_saved_bytes, fused_saved_bytes: activations that training keeps for the backward pass.
    """

    parameters: int
    macs: int
    activations: int
    weight_bytes: int
    stock_bytes: int
    fused_bytes: int
    stock_saved_bytes: int
    fused_saved_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two a multiply-add."""
        return 2 * self.macs

    @property
    def stock_intensity(self) -> float:
        """FLOPs a byte of activations and weights, one operation at a time."""
        return self.flops / (self.stock_bytes + self.weight_bytes)

    @property
    def fused_intensity(self) -> float:
        """FLOPs a byte of activations and weights, fused."""
        return self.flops / (self.fused_bytes + self.weight_bytes)


_TOTALS = tuple(field.name for field in fields(_Cost))


@dataclass(frozen=True)
class LayerCount(_Cost):
    """One convolution or product with its normalisation.

    ``kind`` is conv, pointwise, depthwise, squeeze_excite or linear; ``name`` is timm's; shapes are (channels, height,
    width) of one image.
    """

    name: str
    stage: str
    kind: str
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]


@dataclass(frozen=True)
class StageCount(_Cost):
    """Stem, one stage, or head; ``out_shape`` (channels, height, width) of its last map, 0 ``blocks`` at the ends."""

    name: str
    blocks: int
    out_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Count(_Cost):
    """A whole network at ``resolution`` (height, width) and ``batch``, by layer and by stage."""

    name: str
    resolution: tuple[int, int]
    batch: int
    layers: tuple[LayerCount, ...]
    stages: tuple[StageCount, ...]


def count(
    spec_or_model: str | ScaledSpec | EfficientNet | EfficientNetFeatures,
    resolution: int | tuple[int, int] | None = None,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
) -> Count:
    """What a forward pass of a network costs.

    Args:
        spec_or_model: a model's name, a specification, or a model of effnet_ops.
        resolution: pixels of the image, a side or (height, width); None is the specification's.
        batch: images; multiplies MACs, activations and their bytes.
        dtype: of activations and weights, for the bytes.

    Raises ValueError for an unknown name, a resolution or batch below 1, another dtype; TypeError for another kind of
    model.
    """
    net = network(spec_or_model)
    resolution = net.spec.resolution if resolution is None else resolution
    size = pair("resolution", resolution, 1)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype!r}")
    layers = _layer_counts(tuple(walk(net, size)), batch, dtype)
    stages = tuple(_stage_count(name, tuple(rows)) for name, rows in groupby(layers, key=lambda row: row.stage))
    return Count(**_sum(layers), name=net.spec.name, resolution=size, batch=batch, layers=layers, stages=stages)


def count_block(block: BlockSpec, size: int | tuple[int, int], *, dtype: torch.dtype = torch.float32) -> StageCount:
    """What one block costs for one image whose input map has ``size`` pixels, padded by half the kernel."""
    layers = tuple(block_layers("block", "block", block, pair("size", size, 1), "symmetric"))
    return _stage_count("block", _layer_counts(layers, 1, dtype))


def _layer_counts(layers: tuple[Layer, ...], batch: int, dtype: torch.dtype) -> tuple[LayerCount, ...]:
    return tuple(_layer_count(*row, batch, dtype.itemsize) for row in zip(layers, traffic(layers), strict=True))


def _layer_count(layer: Layer, moved: Traffic, batch: int, itemsize: int) -> LayerCount:
    stock, fused, stock_saved, fused_saved = (elements * batch * itemsize for elements in moved)
    return LayerCount(
        parameters=layer.parameters,
        macs=layer.macs * batch,
        activations=layer.activations * batch,
        weight_bytes=layer.parameters * itemsize,
        stock_bytes=stock,
        fused_bytes=fused,
        stock_saved_bytes=stock_saved,
        fused_saved_bytes=fused_saved,
        name=layer.path,
        stage=layer.stage,
        kind=layer.kind,
        in_shape=(layer.in_channels, *layer.in_size),
        out_shape=(layer.out_channels, *layer.out_size),
    )


def _stage_count(name: str, rows: tuple[LayerCount, ...]) -> StageCount:
    maps = [row for row in rows if row.kind in ("conv", "pointwise")]
    # Each block has one layer that is wider than a pixel, and no other stage has blocks.
    blocks = sum(row.kind in ("depthwise", "conv") for row in rows if name != "stem")
    return StageCount(**_sum(rows), name=name, blocks=blocks, out_shape=maps[-1].out_shape)


def _sum(rows: tuple[LayerCount, ...]) -> dict[str, int]:
    return {total: sum(getattr(row, total) for row in rows) for total in _TOTALS}


class ConvolutionCost(NamedTuple):
    """Multiply-adds and weights of a k x k convolution over ``pixels`` outputs, standard and depthwise-separable.

    The separable one is a depthwise k x k and a 1x1 convolution. ``saving`` is the ratio, 1 / (1 / out_channels + 1 /
    k^2), which does not depend on the input channels or the size (Howard et al., arXiv 1704.04861).
    """

    standard_macs: int
    separable_macs: int
    standard_weights: int
    separable_weights: int

    @property
    def saving(self) -> float:
        """How many times as many multiply-adds the standard convolution takes."""
        return self.standard_macs / self.separable_macs


def convolution_cost(in_channels: int, out_channels: int, kernel_size: int, pixels: int = 1) -> ConvolutionCost:
    """A k x k convolution as it stands and separated into a depthwise and a 1x1 convolution.

    Raises ValueError for anything but positive whole numbers.
    """
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "pixels": pixels}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    standard = in_channels * out_channels * kernel_size**2
    separable = in_channels * (out_channels + kernel_size**2)
    return ConvolutionCost(standard * pixels, separable * pixels, standard, separable)
