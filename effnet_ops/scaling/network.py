"""The convolutions and products of a network in order, with their shapes: what every analysis walks over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.models import EfficientNet, EfficientNetFeatures, ScaledSpec, model_spec
from effnet_ops.models.spec import BlockSpec

NETWORKS = (EfficientNet, EfficientNetFeatures)


class Layer(NamedTuple):
    """One convolution (or the classifier, a product on one pixel) with the normalisation that follows it.

    ``stage`` is "stem", "stage 1" ..., "head". ``path`` is timm's name. ``on_path`` is False for
    squeeze-and-excitation, which sees a pooled image. ``residual``: the block's input is added to the layer's output.
    """

    stage: str
    path: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    groups: int
    bias: bool
    norm: bool
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    on_path: bool = True
    residual: bool = False

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        weights = self.out_channels * self.in_channels // self.groups * self.kernel_size**2
        return weights + self.out_channels * (self.bias + 2 * self.norm)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.activations * self.in_channels // self.groups * self.kernel_size**2

    @property
    def activations(self) -> int:
        """Elements that the layer writes for one image."""
        return self.out_channels * math.prod(self.out_size)


class Network(NamedTuple):
    """A specification with the ends that a model may change; ``num_classes`` None is a backbone without a head."""

    spec: ScaledSpec
    in_chans: int = 3
    num_classes: int | None = 1000


def network(spec_or_model: str | ScaledSpec | EfficientNet | EfficientNetFeatures) -> Network:
    """What to analyse, from a model's name, a specification or a model of effnet_ops.

    Raises ValueError for an unknown name, TypeError for anything else.
    """
    if isinstance(spec_or_model, str):
        return Network(model_spec(spec_or_model))
    if isinstance(spec_or_model, ScaledSpec):
        return Network(spec_or_model)
    if isinstance(spec_or_model, NETWORKS):
        return Network(spec_or_model.spec, spec_or_model.in_chans, getattr(spec_or_model, "num_classes", None))
    raise TypeError(
        f"expected a model's name, a ScaledSpec or an effnet_ops EfficientNet, got {type(spec_or_model).__name__}"
    )


def walk(net: Network, resolution: int | tuple[int, int]) -> Iterator[Layer]:
    """The layers of ``net`` for an image of ``resolution`` pixels (a side, or height and width), in order."""
    spec = net.spec
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    padding, stem = spec.convention.padding, spec.stem_channels
    out = conv_size(size, 3, 2, padding)
    yield Layer("stem", "conv_stem", "conv", net.in_chans, stem, 3, 2, 1, False, True, size, out)
    size = out
    for stage, blocks in enumerate(spec.stages()):
        for index, block in enumerate(blocks):
            yield from block_layers(f"stage {stage + 1}", f"blocks.{stage}.{index}", block, size, padding)
            size = conv_size(size, block.kernel_size, block.stride, padding)
    if net.num_classes is None:
        return
    head = spec.head_channels
    yield _pointwise("head", "conv_head", blocks[-1].out_channels, head, size)
    if net.num_classes:
        yield Layer("head", "classifier", "linear", head, net.num_classes, 1, 1, 1, True, False, (1, 1), (1, 1))


def block_layers(stage: str, path: str, block: BlockSpec, size: tuple[int, int], padding: str) -> Iterator[Layer]:
    """The layers of one block for an input map of ``size`` (height, width)."""
    out = conv_size(size, block.kernel_size, block.stride, padding)
    wide, k = block.expanded_channels, block.kernel_size
    if block.block == "fused_mbconv":
        yield from _fused_layers(stage, path, block, size, out)
        return
    if block.expands:
        yield _pointwise(stage, f"{path}.conv_pw", block.in_channels, wide, size)
    yield Layer(stage, f"{path}.conv_dw", "depthwise", wide, wide, k, block.stride, wide, False, True, size, out)
    yield from _gate(stage, path, wide, block.se_channels)
    project = "conv_pwl" if block.expands else "conv_pw"
    yield _pointwise(stage, f"{path}.{project}", wide, block.out_channels, out)._replace(residual=block.residual)


def _fused_layers(
    stage: str, path: str, block: BlockSpec, size: tuple[int, int], out: tuple[int, int]
) -> Iterator[Layer]:
    wide = block.expanded_channels if block.expands else block.out_channels
    name = f"{path}.conv_exp" if block.expands else f"{path}.conv"
    shape = block.in_channels, wide, block.kernel_size, block.stride
    dense = Layer(stage, name, "conv", *shape, 1, False, True, size, out)
    yield dense if block.expands else dense._replace(residual=block.residual)
    yield from _gate(stage, path, wide, block.se_channels)
    if block.expands:
        project = _pointwise(stage, f"{path}.conv_pwl", wide, block.out_channels, out)
        yield project._replace(residual=block.residual)


def _gate(stage: str, path: str, wide: int, squeezed: int) -> Iterator[Layer]:
    for name, channels in (("conv_reduce", (wide, squeezed)), ("conv_expand", (squeezed, wide))) if squeezed else ():
        path_in = f"{path}.se.{name}"
        yield Layer(stage, path_in, "squeeze_excite", *channels, 1, 1, 1, True, False, (1, 1), (1, 1), False)


def _pointwise(stage: str, path: str, in_channels: int, out_channels: int, size: tuple[int, int]) -> Layer:
    return Layer(stage, path, "pointwise", in_channels, out_channels, 1, 1, 1, False, True, size, size)


def conv_size(size: tuple[int, int], kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Height and width behind a convolution padded "symmetric" (half the kernel) or "same" (TensorFlow's)."""
    sides = () if padding == "same" else (kernel // 2,) * 4
    resolved = resolve_padding(sides, size, (kernel,) * 2, (stride,) * 2, (1, 1))
    return output_size(size, (kernel,) * 2, (stride,) * 2, resolved, (1, 1))
