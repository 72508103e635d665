"""How much of the image one element of a feature map depends on, along the convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from effnet_ops.models import EfficientNet, EfficientNetFeatures, ScaledSpec
from effnet_ops.scaling.network import network, walk


@dataclass(frozen=True)
class StageReceptiveField:
    """After the last layer of a stage: ``size`` pixels of the image on a side, ``stride`` pixels between neighbours.

    ``sees_all`` is True from the first squeeze-and-excitation on: its gate depends on every pixel of the image.
    """

    name: str
    size: int
    stride: int
    sees_all: bool


@dataclass(frozen=True)
class ReceptiveField:
    """Theoretical receptive field of the convolution path, by stage: the stem and then the stages of blocks."""

    stages: tuple[StageReceptiveField, ...]

    @property
    def size(self) -> int:
        """Pixels on a side after the last block."""
        return self.stages[-1].size


def receptive_field(spec_or_model: str | ScaledSpec | EfficientNet | EfficientNetFeatures) -> ReceptiveField:
    """The receptive field of a network's stages: r grows by (k - 1) times the stride so far at each k x k convolution.

    ``spec_or_model`` as in `count`. Padding does not matter; the field of an element near the border is cut off there.
    """
    net = network(spec_or_model)
    size, stride, sees_all = 1, 1, False
    stages = []
    layers = (layer for layer in walk(net, net.spec.resolution) if layer.stage != "head")
    for name, rows in groupby(layers, key=lambda layer: layer.stage):
        for layer in rows:
            if layer.on_path:
                size += (layer.kernel_size - 1) * stride
                stride *= layer.stride
            else:
                sees_all = True
        stages.append(StageReceptiveField(name, size, stride, sees_all))
    return ReceptiveField(tuple(stages))
