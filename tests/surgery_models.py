"""Small blocks of every library, each as its networks build them; a replaced one compared with the stock."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import geffnet.efficientnet_builder as geffnet_blocks
import pytest
import torch
import torch.nn.functional as F
from efficientnet_pytorch.model import MBConvBlock
from efficientnet_pytorch.utils import BlockArgs, GlobalParams
from geffnet import activations as geffnet_activations
from networks import with_statistics
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3

CHANNELS = 8

timm_inverted = functools.partial(
    timm_blocks.InvertedResidual, CHANNELS, CHANNELS, exp_ratio=4, act_layer=nn.SiLU, norm_layer=nn.BatchNorm2d
)
timm_separable = functools.partial(timm_blocks.DepthwiseSeparableConv, CHANNELS, CHANNELS, act_layer=nn.SiLU)


def timm_block(**settings: Any) -> nn.Module:
    """timm's MBConv with squeeze-and-excitation, 8 channels, expanded to 32."""
    settings.setdefault("se_layer", timm_blocks.SqueezeExcite)
    return with_statistics_of(timm_inverted(**settings))


def with_biases(block: nn.Module) -> nn.Module:
    """The block with a bias in front of each normalisation."""
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is None:
            conv.bias = nn.Parameter(torch.randn(conv.out_channels).double())
    return block


def torchvision_block(stride: int = 1, drop: float = 0.0, expand: int = 4) -> nn.Module:
    config = efficientnet.MBConvConfig(expand, 3, stride, CHANNELS, CHANNELS, 1)
    return with_statistics_of(efficientnet.MBConv(config, drop, nn.BatchNorm2d))


def torchvision_fused_block() -> nn.Module:
    config = efficientnet.FusedMBConvConfig(4, 3, 1, CHANNELS, CHANNELS, 1)
    return with_statistics_of(efficientnet.FusedMBConv(config, 0.0, nn.BatchNorm2d))


def lukemelas_block(
    stride: int | list[int] = 1, expand: int = 4, kernel: int = 5, image_size: int | None = 12
) -> nn.Module:
    args = BlockArgs(1, kernel, stride, expand, CHANNELS, CHANNELS, 0.25, True)
    settings = GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)
    return with_statistics_of(MBConvBlock(args, settings, image_size=image_size))


def geffnet_block(**settings: Any) -> nn.Module:
    settings.setdefault("se_ratio", 0.25)
    settings.setdefault("act_layer", nn.SiLU)
    return with_statistics_of(geffnet_blocks.InvertedResidual(CHANNELS, CHANNELS, exp_ratio=4, **settings))


def mobilenetv3_block(activation: str, dilation: int = 1) -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(CHANNELS, 5, 32, CHANNELS, True, activation, 1, dilation, 1.0)
    return with_statistics_of(mobilenetv3.InvertedResidual(config, nn.BatchNorm2d))


def with_statistics_of(block: nn.Module) -> nn.Module:
    """The block in fp64 and evaluation mode, with BatchNorm vectors as training leaves them."""
    return with_statistics(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), block), 12)[1].double()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_block,
    "timm stride 2": lambda: timm_block(stride=2, dw_kernel_size=5),
    "timm SAME, stride 2": lambda: timm_block(stride=2, pad_type="same"),
    "timm dilated": lambda: timm_block(dilation=2),
    "timm SAME, dilated": lambda: timm_block(dilation=3, dw_kernel_size=5, pad_type="same"),
    "timm GELU": lambda: timm_block(act_layer=nn.GELU),
    "timm GELU by tanh": lambda: timm_block(act_layer="gelu_tanh"),
    "timm with biases": lambda: with_biases(timm_block()),
    "torchvision with biases, Fused-MBConv": lambda: with_biases(torchvision_fused_block()),
    "timm ReLU6 without squeeze-and-excitation": lambda: timm_block(act_layer=nn.ReLU6, se_layer=None),
    "timm MobileNetV3": lambda: timm_block(
        act_layer=nn.Hardswish,
        se_layer=functools.partial(
            timm_blocks.SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round
        ),
    ),
    "timm separable": lambda: with_statistics_of(timm_separable(se_layer=timm_blocks.SqueezeExcite)),
    "timm separable, activation at the end": lambda: with_statistics_of(timm_separable(pw_act=True, noskip=True)),
    "torchvision": torchvision_block,
    "torchvision without expansion": lambda: torchvision_block(expand=1),
    "torchvision MobileNetV2": lambda: with_statistics_of(mobilenetv2.InvertedResidual(CHANNELS, CHANNELS, 1, 4)),
    "torchvision MobileNetV3": lambda: mobilenetv3_block("HS"),
    "torchvision MobileNetV3 ReLU": lambda: mobilenetv3_block("RE"),
    "torchvision MobileNetV3, dilated": lambda: mobilenetv3_block("HS", dilation=2),
    "torchvision MNASNet": lambda: with_statistics_of(mnasnet._InvertedResidual(CHANNELS, CHANNELS, 3, 1, 4)),
    "efficientnet_pytorch": lukemelas_block,
    "efficientnet_pytorch stride 2": lambda: lukemelas_block(stride=[2], kernel=3),
    "efficientnet_pytorch stride in a list": lambda: lukemelas_block(stride=[1]),
    "efficientnet_pytorch dynamic": lambda: lukemelas_block(stride=[2], image_size=None),
    "efficientnet_pytorch without expansion": lambda: lukemelas_block(expand=1),
    "geffnet": geffnet_block,
    "geffnet MobileNetV3": lambda: geffnet_block(
        act_layer=geffnet_blocks.HardSwishMe,
        se_kwargs={"act_layer": nn.ReLU, "gate_fn": geffnet_activations.hard_sigmoid},
        stride=2,
        pad_type="same",
    ),
    "geffnet separable": lambda: with_statistics_of(
        geffnet_blocks.DepthwiseSeparableConv(CHANNELS, CHANNELS, se_ratio=0.25, act_layer=nn.SiLU)
    ),
}


def results(module: nn.Module, x: Tensor, *args: Any) -> dict[str, Tensor]:
    """Output of one forward pass in the module's mode, gradients of input and parameters, and buffers after it."""
    x = x.detach().requires_grad_()
    y = module(x, *args)
    y.square().sum().backward()
    found = {"y": y.detach(), "x.grad": x.grad}
    found.update((f"{name}.grad", p.grad) for name, p in module.named_parameters())
    found.update(module.named_buffers())
    return found


def assert_same_results(module: nn.Module, stock: nn.Module, x: Tensor, *args: Any) -> None:
    """In fp64, evaluation and training: everything that a step makes is the stock's."""
    seed = torch.initial_seed()
    for training in (False, True):
        pair = []
        for m in (module, stock):
            m = copy.deepcopy(m).train(training)
            torch.manual_seed(seed)
            with exact_hard_sigmoid():
                pair.append(results(m, x, *args))
        assert pair[0].keys() == pair[1].keys()
        for name, value in pair[1].items():
            scale = value.abs().max().clamp_min(1.0)
            assert (pair[0][name] - value).abs().max() <= 1e-10 * scale, (name, training)


@contextlib.contextmanager
def exact_hard_sigmoid() -> Iterator[None]:
    """Stock layers with the slope 1/6 in fp64: PyTorch's has float32(1/6) there, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "hardsigmoid", lambda x, inplace=False: F.relu6(x + 3) / 6)
        yield
