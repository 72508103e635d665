"""How much of the image one element of a feature map depends on: by geometry, and by gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from effnet_ops.models import EfficientNet, EfficientNetFeatures, ScaledSpec, create_model
from effnet_ops.scaling.network import network, walk


@dataclass(frozen=True)
class LayerReceptiveField:
    """After one layer: ``size`` pixels of the image on a side, ``stride`` pixels between neighbours.

    ``sees_all`` is True from the first squeeze-and-excitation on: its gate depends on every pixel of the image.
    """

    name: str
    stage: str
    size: int
    stride: int
    sees_all: bool


@dataclass(frozen=True)
class StageReceptiveField:
    """After the last layer of a stage; fields as `LayerReceptiveField`."""

    name: str
    size: int
    stride: int
    sees_all: bool


@dataclass(frozen=True)
class ReceptiveField:
    """Theoretical receptive field of the convolution path: by stage (the stem, then the stages of blocks), by layer."""

    stages: tuple[StageReceptiveField, ...]
    layers: tuple[LayerReceptiveField, ...]

    @property
    def size(self) -> int:
        """Pixels on a side after the last block."""
        return self.stages[-1].size


@dataclass(frozen=True)
class EffectiveField:
    """Where the gradient of one central element behind a block (or the stem) lies.

    ``size`` is the side of the smallest centred square that holds ``share`` of the gradient's absolute values, in
    pixels; ``outside`` is the share beyond the theoretical field, which only gates can put there (with symmetric
    padding; SAME padding moves the field by some pixels).
    """

    name: str
    stage: str
    size: int
    theoretical: int
    share: float
    outside: float


def receptive_field(spec_or_model: str | ScaledSpec | EfficientNet | EfficientNetFeatures) -> ReceptiveField:
    """The receptive field of a network's stages: r grows by (k - 1) times the stride so far at each k x k convolution.

    ``spec_or_model`` as in `count`. Padding does not matter; the field of an element near the border is cut off there.
    """
    net = network(spec_or_model)
    size, stride, sees_all = 1, 1, False
    layers = []
    for layer in walk(net, net.spec.resolution):
        if layer.stage == "head":
            break
        if layer.on_path:
            size += (layer.kernel_size - 1) * stride
            stride *= layer.stride
        else:
            sees_all = True
        layers.append(LayerReceptiveField(layer.path, layer.stage, size, stride, sees_all))
    stages = []
    for name, rows in groupby(layers, key=lambda layer: layer.stage):
        *_, last = rows
        stages.append(StageReceptiveField(name, last.size, last.stride, last.sees_all))
    return ReceptiveField(tuple(stages), tuple(layers))


def effective_receptive_field(
    spec_or_model: str | ScaledSpec | EfficientNet | EfficientNetFeatures,
    resolution: int | None = None,
    *,
    gates: bool = True,
    share: float = 0.9,
    draws: int = 4,
    seed: int = 0,
) -> tuple[EffectiveField, ...]:
    """Where the gradient behind the stem and each block comes from (Luo et al., arXiv 1701.04128), block by block.

    The gradient is that of a central element, summed over channels with random signs, for images of noise; absolute
    values are averaged over ``draws`` of images and, for a name or specification, of fresh weights. A model keeps its
    weights. Evaluation mode.

    Args:
        spec_or_model: as in `count`.
        resolution: a side of the image in pixels; None is the specification's. The border cuts off larger fields.
        gates: False leaves squeeze-and-excitation out, whose gates see the whole image; not for a model.
        share: of the gradient that the given square holds.

    Raises ValueError for a share outside (0, 1), for draws below 1, and for a model without its gates.
    """
    net = network(spec_or_model)
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must lie in (0, 1), got {share!r}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1, got {draws!r}")
    given = None if isinstance(spec_or_model, str | ScaledSpec) else spec_or_model
    spec = net.spec
    if not gates:
        if given is not None:
            raise ValueError("the gates of a model cannot be left out: pass its specification")
        stages = tuple(replace(stage, se_ratio=0.0) for stage in spec.architecture.stages)
        spec = replace(spec, architecture=replace(spec.architecture, stages=stages))
    side = spec.resolution if resolution is None else resolution
    sums: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draws):
            model = given if given is not None else create_model(spec, features_only=True)
            for name, gradient in _gradients(model, side, net.in_chans).items():
                sums[name] = sums.get(name, 0.0) + gradient
    return tuple(_effective(spec, name, gradient, share) for name, gradient in sums.items())


def _gradients(model: EfficientNet | EfficientNetFeatures, side: int, channels: int) -> dict[str, Tensor]:
    """|gradient| (side, side) of a central element behind the stem and each block."""
    training = model.training
    like = model.conv_stem.weight
    x = torch.randn(1, channels, side, side, device=like.device, dtype=like.dtype, requires_grad=True)
    gradients = {}
    try:
        model.eval()
        y = model.forward_stem(x)
        outputs = {"stem": y}
        for index, stage in enumerate(model.blocks):
            for position, block in enumerate(stage):
                outputs[f"blocks.{index}.{position}"] = y = block(y)
        for name, output in outputs.items():
            middle = output.shape[-1] // 2
            signs = torch.randint_like(output[0, :, 0, 0], 2) * 2 - 1
            (gradient,) = torch.autograd.grad((output[0, :, middle, middle] * signs).sum(), x, retain_graph=True)
            gradients[name] = gradient[0].abs().sum(0).double()
    finally:
        model.train(training)
    return gradients


def _effective(spec: ScaledSpec, name: str, gradient: Tensor, share: float) -> EffectiveField:
    layers = receptive_field(spec).layers
    field = layers[0] if name == "stem" else next(f for f in reversed(layers) if f.name.startswith(f"{name}."))
    center = _center(field, gradient.shape[0])
    positions = torch.arange(gradient.shape[0], dtype=torch.float64)
    distance = (positions - center).abs()
    rings = torch.maximum(distance[:, None], distance[None, :])
    total = gradient.sum()
    order = rings.flatten().argsort()
    reached = gradient.flatten()[order].cumsum(0)
    radius = rings.flatten()[order][torch.searchsorted(reached, share * total).clamp_max(len(order) - 1)]
    outside = (gradient[rings > (field.size - 1) / 2 + 0.5].sum() / total).item()
    size = min(int(2 * radius.item()) + 1, gradient.shape[0])
    return EffectiveField(name, field.stage, size, field.size, share, outside)


def _center(field: LayerReceptiveField, side: int) -> float:
    """The image's row in the middle of what the central element sees, for symmetric padding at even strides."""
    index = -(-side // field.stride) // 2
    return index * field.stride
