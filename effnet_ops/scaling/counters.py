"""Parameters, multiply-adds and activations of a network, counted from its specification without building it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from effnet_ops.checks import pair
from effnet_ops.models import EfficientNet, EfficientNetFeatures, ScaledSpec
from effnet_ops.scaling.network import Layer, network, walk


@dataclass(frozen=True)
class _Cost:
    """``parameters`` are learnt numbers. ``macs`` are the multiply-adds of convolutions and of the classifier for the
    whole batch, as torch.utils.flop_counter counts them (it gives FLOPs). ``activations`` are the elements that these
    layers write (arXiv 2003.13678).
    """

    parameters: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two a multiply-add."""
        return 2 * self.macs


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
) -> Count:
    """What a forward pass of a network costs.

    Args:
        spec_or_model: a model's name, a specification, or a model of effnet_ops.
        resolution: pixels of the image, a side or (height, width); None is the specification's.
        batch: images; multiplies MACs and activations.

    Raises ValueError for an unknown name, a resolution or batch below 1; TypeError for another kind of model.
    """
    net = network(spec_or_model)
    resolution = net.spec.resolution if resolution is None else resolution
    size = pair("resolution", resolution, 1)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
    layers = tuple(_layer_count(layer, batch) for layer in walk(net, size))
    stages = tuple(_stage_count(name, tuple(rows)) for name, rows in groupby(layers, key=lambda row: row.stage))
    return Count(*_sum(layers), net.spec.name, size, batch, layers, stages)


def _layer_count(layer: Layer, batch: int) -> LayerCount:
    return LayerCount(
        parameters=layer.parameters,
        macs=layer.macs * batch,
        activations=layer.activations * batch,
        name=layer.path,
        stage=layer.stage,
        kind=layer.kind,
        in_shape=(layer.in_channels, *layer.in_size),
        out_shape=(layer.out_channels, *layer.out_size),
    )


def _stage_count(name: str, rows: tuple[LayerCount, ...]) -> StageCount:
    maps = [row for row in rows if row.kind in ("conv", "pointwise")]
    blocks = sum(row.kind == "depthwise" for row in rows)
    return StageCount(*_sum(rows), name, blocks, maps[-1].out_shape)


def _sum(rows: tuple[LayerCount, ...]) -> tuple[int, int, int]:
    return sum(row.parameters for row in rows), sum(row.macs for row in rows), sum(row.activations for row in rows)
