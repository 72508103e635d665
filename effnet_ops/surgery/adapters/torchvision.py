"""torchvision's blocks and layers: EfficientNet, MobileNetV2, MobileNetV3, MNASNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation, StochasticDepth

from effnet_ops.surgery.around import AROUND, NETWORKS, AroundConvNorm
from effnet_ops.surgery.drop_path import bernoulli_scale
from effnet_ops.surgery.fused import (
    SEQUENCES,
    UNSUPPORTED,
    BlockPlan,
    FusedLayer,
    NotFusable,
    Part,
    SqueezeExcitePlan,
    Stage,
    block_plan,
    described_squeeze_excite,
    fuses,
    gate_name,
    is_average,
    squeeze_excite_plan,
    stock_class,
)
from effnet_ops.surgery.generic import FusedSqueezeExcite

SEQUENCES.add(Conv2dNormActivation)
UNSUPPORTED[efficientnet.FusedMBConv] = "FusedMBConv is not fused as a block"
NETWORKS.update((efficientnet.EfficientNet, mnasnet.MNASNet, mobilenetv2.MobileNetV2, mobilenetv3.MobileNetV3))


@fuses(Conv2dNormActivation, AROUND)
class AroundConv2dNormActivation(AroundConvNorm, Conv2dNormActivation):
    """The convolutions around the blocks, each with its normalisation and activation."""


@fuses(SqueezeExcitation)
class FusedSqueezeExcitation(FusedSqueezeExcite, SqueezeExcitation):
    """torchvision.ops.SqueezeExcitation."""

    @classmethod
    def describe(cls, module: nn.Module) -> SqueezeExcitePlan:
        if not is_average(module.avgpool):
            raise NotFusable("avgpool is not the average over the image")
        parts = (Part(name, getattr(module, name)) for name in ("fc1", "activation", "fc2"))
        return squeeze_excite_plan(*parts, gate_name(Part("scale_activation", module.scale_activation)))


def _flatten(part: Part) -> Iterator[Part]:
    """The layers that a nest of nn.Sequential calls one after the other, with their names."""
    if type(part.module) not in SEQUENCES:
        yield part
        return
    for name, child in part.module.named_children():
        yield from _flatten(Part(f"{part.name}.{name}", child))


def _stages(layers: list[Part]) -> Iterator[Stage | Part]:
    """The layers as stages (convolution, normalisation, activation if there is one) and what is none, in order."""
    index = 0
    while index < len(layers):
        part, norm, activation = (*layers[index:], None, None)[:3]
        index += 1
        if not isinstance(part.module, nn.Conv2d):
            yield part
            continue
        if norm is None or isinstance(norm.module, nn.Conv2d):
            raise NotFusable(f"{part.name} has no normalisation")
        layer = stock_class(activation.module) if activation is not None else nn.Conv2d
        has_activation = not issubclass(layer, (nn.Conv2d, SqueezeExcitation))
        index += 2 if has_activation else 1
        yield Stage(part, norm, activation if has_activation else None)


def _describe_layers(container: Part, *, residual: bool) -> BlockPlan:
    found = list(_stages(list(_flatten(container))))
    squeeze_excite = None
    if len(found) >= 3 and isinstance(found[-2], Part):
        squeeze_excite = described_squeeze_excite(found.pop(-2))
    if not 2 <= len(found) <= 3 or not all(isinstance(stage, Stage) for stage in found):
        raise NotFusable(f"{container.name} is not [expand,] depthwise, [squeeze-and-excitation,] project")
    *expand, depthwise, project = found
    return block_plan(expand[0] if expand else None, depthwise, squeeze_excite, project, residual=residual)


class _FusedBlock(FusedLayer):
    kind = "block"
    container: ClassVar[str]
    """The child that holds the layers; the first of ``attributes`` says whether the block has a residual."""

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        layers = Part(cls.container, getattr(module, cls.container))
        return _describe_layers(layers, residual=getattr(module, cls.attributes[0]))

    def run(self, x: Tensor) -> Tensor | None:
        """The block's output for x, or None where only the stock forward is right."""
        plan: BlockPlan | None = self.plan(x)
        if plan is None or plan.mixed():
            return None
        return plan.run(x, self.drop_path_scale(x) if plan.residual else None)

    def drop_path_scale(self, x: Tensor) -> Tensor | None:
        """The scale (N,) per image of the branch; None in the libraries' blocks that have no drop path."""
        return None


@fuses(efficientnet.MBConv)
class FusedMBConv(_FusedBlock, efficientnet.MBConv):
    """EfficientNet's block."""

    attributes = ("use_res_connect",)
    container = "block"

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        drop = module.stochastic_depth
        if type(drop) is not StochasticDepth or drop.mode not in ("row", "batch") or not 0.0 <= drop.p <= 1.0:
            raise NotFusable(f"stochastic_depth is {drop}")
        return super().describe(module)

    def drop_path_scale(self, x: Tensor) -> Tensor | None:
        drop = self.stochastic_depth
        if not drop.training or drop.p == 0.0:
            return None
        return bernoulli_scale(x, 1.0 - drop.p, per_image=drop.mode == "row")


@fuses(mobilenetv2.InvertedResidual)
class FusedMobileNetV2Block(_FusedBlock, mobilenetv2.InvertedResidual):
    """MobileNetV2's block."""

    attributes = ("use_res_connect",)
    container = "conv"


@fuses(mobilenetv3.InvertedResidual)
class FusedMobileNetV3Block(_FusedBlock, mobilenetv3.InvertedResidual):
    """MobileNetV3's block."""

    attributes = ("use_res_connect",)
    container = "block"


@fuses(mnasnet._InvertedResidual)
class FusedMNASNetBlock(_FusedBlock, mnasnet._InvertedResidual):
    """MNASNet's block."""

    attributes = ("apply_residual",)
    container = "layers"
