"""An EfficientNet as data: the unscaled architecture, the scaling of its three axes, and the resulting blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from effnet_ops.checks import check_activation, check_gate, check_number, unknown_name
from effnet_ops.layers import check_rate, expanded_channels, squeezed_channels

BLOCKS = ("mbconv", "fused_mbconv")
PADDINGS = ("symmetric", "same")
CHANNEL_DIVISOR = 8


@dataclass(frozen=True)
class Convention:
    """What computes differently between implementations of the same network, though no weight tells.

    ``padding`` is "symmetric" (k // 2 on every side) or "same" (TensorFlow's: the odd pixel at the bottom and right).
    ``momentum`` is PyTorch's weight of the newest batch statistics; it matters in training only.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    padding: str = "symmetric"

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise unknown_name("padding", self.padding, PADDINGS)
        _check_positive("eps", self.eps)
        _check_share("momentum", self.momentum)


@dataclass(frozen=True)
class StageSpec:
    """One row of an architecture's table: blocks of one kind, of which only the first changes stride and channels.

    ``se_ratio`` is relative to a block's input channels; 0 leaves squeeze-and-excitation out.
    """

    repeats: int
    kernel_size: int
    stride: int
    expand_ratio: float
    out_channels: int
    se_ratio: float = 0.25
    block: str = "mbconv"

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise unknown_name("block", self.block, BLOCKS)
        for name in ("repeats", "kernel_size", "stride", "out_channels"):
            _check_count(name, getattr(self, name))
        check_number("expand_ratio", self.expand_ratio, 1)
        _check_share("se_ratio", self.se_ratio)


@dataclass(frozen=True)
class ArchitectureSpec:
    """A network before scaling.

    ``scale_ends=False`` keeps stem, head and the depth of the outer stages (Lite). ``round_limit`` is the share of its
    scaled channels that rounding has to leave a layer, at least: 0.9, and none, 0, in EfficientNetV2.
    """

    stages: tuple[StageSpec, ...]
    stem_channels: int = 32
    head_channels: int = 1280
    activation: str = "silu"
    gate: str = "sigmoid"
    scale_ends: bool = True
    round_limit: float = 0.9

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("an architecture needs at least one stage")
        _check_count("stem_channels", self.stem_channels)
        _check_count("head_channels", self.head_channels)
        check_activation(self.activation)
        check_gate(self.gate)
        _check_share("round_limit", self.round_limit)


@dataclass(frozen=True)
class BlockSpec:
    """One block of a scaled network; ``se_channels`` is 0 without squeeze-and-excitation.

    A Fused-MBConv block that does not expand is one convolution from ``in_channels`` to ``out_channels``.
    """

    block: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: float
    se_ratio: float

    @property
    def expanded_channels(self) -> int:
        """Channels of the depthwise convolution."""
        return expanded_channels(self.in_channels, self.expand_ratio)

    @property
    def se_channels(self) -> int:
        """Channels between the two products of squeeze-and-excitation, 0 without it."""
        return squeezed_channels(self.in_channels, self.se_ratio)

    @property
    def expands(self) -> bool:
        """Whether a 1x1 convolution comes before the depthwise one."""
        return self.expanded_channels != self.in_channels

    @property
    def residual(self) -> bool:
        """Whether the block's input is added to its output."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True)
class ScaledSpec:
    """An architecture scaled along its three axes, with what training and inference need beside it.

    Args:
        architecture: the table that is scaled.
        width: multiplies channels, rounded by `round_channels`.
        depth: multiplies the repeats of a stage, rounded up.
        resolution: pixels of the side of the image that the network is meant for; any other size works too.
        dropout: rate before the classifier. drop_path: stochastic depth's rate at the last block.
        convention: eps, momentum and padding.
        name: how the network is called in messages.
        train_resolution: pixels of the images that it was trained on at last; None is ``resolution``.
    """

    architecture: ArchitectureSpec
    width: float = 1.0
    depth: float = 1.0
    resolution: int = 224
    dropout: float = 0.2
    drop_path: float = 0.2
    convention: Convention = field(default_factory=Convention)
    name: str = "custom"
    train_resolution: int | None = None

    def __post_init__(self) -> None:
        _check_positive("width", self.width)
        _check_positive("depth", self.depth)
        _check_count("resolution", self.resolution)
        if self.train_resolution is not None:
            _check_count("train_resolution", self.train_resolution)
        check_rate("dropout", self.dropout)
        check_rate("drop_path", self.drop_path)

    @property
    def stem_channels(self) -> int:
        """Channels of the first convolution."""
        return self._end_channels(self.architecture.stem_channels)

    @property
    def head_channels(self) -> int:
        """Channels of the last convolution."""
        return self._end_channels(self.architecture.head_channels)

    def _end_channels(self, channels: int) -> int:
        return self._round(channels) if self.architecture.scale_ends else channels

    def _round(self, channels: int) -> int:
        return round_channels(channels, self.width, self.architecture.round_limit)

    def stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """The blocks of every stage, with all rounding done."""
        channels, stages = self.stem_channels, []
        last = len(self.architecture.stages) - 1
        for index, stage in enumerate(self.architecture.stages):
            fixed = not self.architecture.scale_ends and index in (0, last)
            repeats = stage.repeats if fixed else round_repeats(stage.repeats, self.depth)
            out_channels = self._round(stage.out_channels)
            blocks = []
            for repeat in range(repeats):
                blocks.append(_scaled_block(stage, channels, out_channels, stage.stride if repeat == 0 else 1))
                channels = out_channels
            stages.append(tuple(blocks))
        return tuple(stages)


def _scaled_block(stage: StageSpec, in_channels: int, out_channels: int, stride: int) -> BlockSpec:
    return BlockSpec(
        block=stage.block,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=stage.kernel_size,
        stride=stride,
        expand_ratio=stage.expand_ratio,
        se_ratio=stage.se_ratio,
    )


def round_channels(channels: int, width: float, limit: float = 0.9) -> int:
    """``channels * width`` to the nearest multiple of 8, and the next one where that would leave less than ``limit``.

    TensorFlow's round_filters (tensorflow/tpu, efficientnet_model.py), which with a limit of 0 is EfficientNetV2's
    (google/automl, efficientnetv2/effnetv2_model.py).
    """
    scaled = channels * width
    rounded = max(CHANNEL_DIVISOR, int(scaled + CHANNEL_DIVISOR / 2) // CHANNEL_DIVISOR * CHANNEL_DIVISOR)
    return rounded + CHANNEL_DIVISOR if rounded < limit * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """``repeats * depth``, rounded up (TensorFlow's round_repeats)."""
    return math.ceil(repeats * depth)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
