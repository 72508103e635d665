"""The cases that every backend is tested on, one table a word: the shapes and settings at which kernels go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effnet_ops import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


@dataclass(frozen=True)
class DepthwiseCase:
    """``shape`` is x's (N, C, H, W); the rest as `effnet_ops.depthwise_conv2d` takes it."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | str | tuple[int, ...] = 1
    dilation: int | tuple[int, int] = 1
    activation: str = "silu"
    bias: bool = True

    @property
    def config(self) -> dict[str, Any]:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, activation=self.activation)


@dataclass(frozen=True)
class PointwiseCase:
    """``shape`` is x's; ``out`` the number of output channels."""

    name: str
    shape: tuple[int, int, int, int]
    out: int
    activation: str = "silu"
    bias: bool = True
    residual: bool = False


@dataclass(frozen=True)
class SqueezeExciteCase:
    """``shape`` is x's; ``reduced`` the width of the bottleneck."""

    name: str
    shape: tuple[int, int, int, int]
    reduced: int
    activation: str = "silu"
    gate: str = "sigmoid"
    bias: bool = True


@dataclass(frozen=True)
class MBConvCase:
    """``shape`` is x's; ``expanded`` and ``reduced`` are None where the block has no expansion or no SE.

    ``norm``: "batch" normalises in training and uses constants in evaluation, "affine_free" the same without gamma and
    beta, "folded" has none, but biases. ``drop_path`` is a scale per image. ``trained`` takes statistics as trained
    networks have them.
    """

    name: str
    shape: tuple[int, int, int, int]
    out: int
    expanded: int | None
    reduced: int | None
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | str | tuple[int, ...] = "same"
    activation: str = "silu"
    se_activation: str | None = None
    gate: str = "sigmoid"
    residual: bool = False
    drop_path: bool = False
    norm: str = "batch"
    eps: float = 1e-3
    trained: bool = False
    dilation: int | tuple[int, int] = 1

    @property
    def config(self) -> dict[str, Any]:
        return dict(
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            dilation=self.dilation,
        )


DEPTHWISE = [
    DepthwiseCase("3x3", (2, 16, 9, 11)),
    DepthwiseCase("3x3_stride2", (2, 32, 10, 8), stride=2),
    DepthwiseCase("3x3_stride2_odd", (2, 24, 15, 17), stride=2),
    DepthwiseCase("3x3_stride2_same_even", (2, 24, 14, 12), stride=2, padding="same"),
    DepthwiseCase("3x3_stride2_same_odd", (1, 24, 17, 15), stride=2, padding="same"),
    DepthwiseCase("5x5", (2, 40, 9, 13), kernel=(5, 5), padding=2),
    DepthwiseCase("5x5_stride2_same_even", (2, 16, 12, 14), kernel=(5, 5), stride=2, padding="same"),
    DepthwiseCase("5x5_stride2_odd", (2, 56, 17, 9), kernel=(5, 5), stride=2, padding=2),
    DepthwiseCase("7x7", (1, 16, 12, 10), kernel=(7, 7), padding=3),
    DepthwiseCase("7x7_stride2", (1, 8, 13, 15), kernel=(7, 7), stride=2, padding="same"),
    DepthwiseCase("1x1_kernel", (2, 8, 5, 6), kernel=(1, 1), padding=0),
    DepthwiseCase("3x5_kernel", (2, 8, 8, 9), kernel=(3, 5), padding=(1, 2)),
    DepthwiseCase("1x7_kernel_stride_2x1", (2, 12, 9, 12), kernel=(1, 7), stride=(2, 1), padding=(0, 3)),
    DepthwiseCase("2x4_kernel", (2, 8, 7, 9), kernel=(2, 4), padding="same"),
    DepthwiseCase("stride_1x2", (1, 20, 8, 11), stride=(1, 2), padding="same"),
    DepthwiseCase("stride3", (2, 8, 11, 13), stride=3),
    DepthwiseCase("dilation2", (2, 16, 11, 9), dilation=2, padding=2),
    DepthwiseCase("dilation_3x1_stride2_same", (1, 8, 13, 14), dilation=(3, 1), stride=2, padding="same"),
    DepthwiseCase("asymmetric_padding", (2, 16, 8, 9), kernel=(5, 5), padding=(0, 3, 1, 2)),
    DepthwiseCase("padding_wider_than_kernel", (1, 8, 4, 5), padding=4),
    DepthwiseCase("no_padding", (2, 8, 7, 8), kernel=(5, 5), padding=0, bias=False),
    DepthwiseCase("one_pixel", (3, 16, 1, 1)),
    DepthwiseCase("one_pixel_5x5_stride2", (3, 16, 1, 1), kernel=(5, 5), stride=2, padding="same"),
    DepthwiseCase("one_row", (2, 16, 1, 9), kernel=(5, 5), padding=2),
    DepthwiseCase("one_column", (2, 16, 9, 1)),
    DepthwiseCase("kernel_larger_than_image", (2, 8, 2, 3), kernel=(7, 7), padding=3),
    DepthwiseCase("one_channel", (2, 1, 7, 6)),
    DepthwiseCase("channels_3", (2, 3, 7, 6)),
    DepthwiseCase("channels_13", (2, 13, 7, 6), kernel=(5, 5), padding=2),
    DepthwiseCase("channels_67", (1, 67, 6, 5), stride=2),
    DepthwiseCase("empty_batch", (0, 8, 6, 5)),
    *(DepthwiseCase(f"activation_{name}", (1, 16, 8, 7), activation=name) for name in ACTIVATIONS if name != "silu"),
    DepthwiseCase("wide_image", (1, 8, 5, 70)),
    DepthwiseCase("large", (1, 48, 56, 56), kernel=(5, 5), padding="same"),
]

POINTWISE = [
    PointwiseCase("square", (2, 16, 7, 9), 16),
    PointwiseCase("widen", (2, 16, 8, 8), 96),
    PointwiseCase("narrow", (2, 96, 5, 7), 24),
    PointwiseCase("residual", (2, 24, 7, 7), 24, "none", residual=True),
    PointwiseCase("residual_after_activation", (2, 24, 5, 6), 32, "relu", residual=True),
    PointwiseCase("no_bias", (2, 40, 6, 5), 40, bias=False),
    PointwiseCase("odd_channels", (2, 13, 5, 7), 19),
    PointwiseCase("one_channel_in", (2, 1, 5, 7), 8),
    PointwiseCase("one_channel_out", (2, 8, 5, 7), 1),
    PointwiseCase("one_pixel", (3, 32, 1, 1), 20),
    PointwiseCase("one_row", (1, 24, 1, 13), 16),
    PointwiseCase("deep", (1, 320, 4, 3), 136),
    PointwiseCase("large", (2, 32, 28, 28), 144),
    PointwiseCase("empty_batch", (0, 8, 6, 5), 16, residual=True),
    *(PointwiseCase(f"activation_{name}", (1, 24, 6, 7), 24, name) for name in ACTIVATIONS if name != "silu"),
]

SQUEEZE_EXCITE = [
    SqueezeExciteCase("plain", (2, 32, 9, 7), 8),
    SqueezeExciteCase("hard_gate", (2, 40, 6, 5), 10, "relu", "hard_sigmoid"),
    SqueezeExciteCase("no_bias", (2, 24, 5, 5), 6, bias=False),
    SqueezeExciteCase("odd_channels", (3, 13, 5, 7), 3),
    SqueezeExciteCase("one_reduced", (2, 16, 4, 6), 1),
    SqueezeExciteCase("one_channel", (2, 1, 6, 5), 2),
    SqueezeExciteCase("one_pixel", (3, 24, 1, 1), 6),
    SqueezeExciteCase("wide", (1, 480, 7, 7), 20),
    SqueezeExciteCase("large", (2, 96, 28, 28), 4),
    SqueezeExciteCase("empty_batch", (0, 8, 6, 5), 2),
    *(SqueezeExciteCase(f"activation_{name}", (2, 16, 6, 7), 5, name) for name in ACTIVATIONS if name != "silu"),
]

MBCONV = [
    MBConvCase("b0_style", (2, 16, 9, 8), 24, 96, 4, stride=2),
    MBConvCase("residual", (3, 24, 7, 9), 24, 144, 6, kernel=(5, 5), residual=True, drop_path=True),
    MBConvCase("no_expansion", (2, 32, 8, 7), 16, None, 8),
    MBConvCase("no_expansion_residual", (2, 16, 8, 7), 16, None, 4, residual=True),
    MBConvCase("lite", (2, 16, 8, 8), 16, 96, None, activation="relu6", residual=True),
    MBConvCase("lite_no_expansion", (2, 32, 8, 6), 16, None, None, activation="relu6"),
    MBConvCase("symmetric_5x5_stride2_odd", (2, 24, 15, 9), 40, 144, 6, kernel=(5, 5), stride=2, padding=2),
    MBConvCase("same_5x5_stride2_odd", (2, 24, 9, 15), 40, 144, 6, kernel=(5, 5), stride=2),
    MBConvCase("odd_channels", (2, 13, 7, 6), 13, 37, 3, residual=True),
    MBConvCase(
        "mobilenet_v3", (2, 16, 8, 8), 24, 64, 16, activation="hardswish", se_activation="relu", gate="hard_sigmoid"
    ),
    MBConvCase("linear", (4, 8, 7, 6), 8, 24, 4, activation="none", residual=True),
    MBConvCase("drop_path_without_residual", (3, 8, 6, 5), 16, 24, 2, drop_path=True),
    MBConvCase("affine_free", (2, 8, 6, 6), 8, 24, 2, norm="affine_free", residual=True),
    MBConvCase("folded", (2, 16, 9, 8), 16, 96, 4, norm="folded", residual=True),
    MBConvCase("folded_lite", (2, 16, 9, 8), 24, 96, None, norm="folded", activation="relu6", stride=2),
    MBConvCase("folded_no_expansion", (2, 32, 8, 7), 16, None, 8, norm="folded"),
    MBConvCase("more_than_64_channels_in", (2, 80, 5, 6), 80, 160, 20, residual=True),
    MBConvCase("one_pixel", (5, 16, 1, 1), 16, 48, 4, kernel=(5, 5), residual=True),
    MBConvCase("large", (2, 24, 28, 28), 24, 144, 6, kernel=(5, 5), residual=True),
    MBConvCase("trained", (4, 24, 9, 10), 24, 144, 6, residual=True, drop_path=True, trained=True),
    MBConvCase("trained_stride2", (4, 16, 10, 9), 24, 96, 4, stride=2, kernel=(5, 5), trained=True),
    MBConvCase("trained_lite", (4, 16, 9, 8), 16, 96, None, activation="relu6", residual=True, trained=True),
    MBConvCase("trained_small_eps", (4, 32, 9, 8), 16, None, 8, eps=1e-5, trained=True),
    MBConvCase("empty_batch", (0, 16, 6, 5), 16, 48, 4, residual=True),
    MBConvCase("dilated", (2, 16, 10, 9), 16, 72, 4, residual=True, dilation=2),
    MBConvCase("dilated_lite", (2, 16, 15, 17), 24, 40, None, (5, 5), (2, 1), activation="relu6", dilation=(2, 3)),
]
