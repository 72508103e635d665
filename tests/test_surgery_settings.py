"""Replaced layers read what the stock forward reads: settings of any form, and the methods that their classes have now.

The numbers in the names are those of issue 15.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from surgery_models import BLOCKS, CHANNELS
from test_surgery import is_fused
from timm.layers import BatchNormAct2d
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torchvision.models import efficientnet as torchvision_efficientnet
from torchvision.ops import SqueezeExcitation

from effnet_ops import layers, replace_layers, restore_layers

BLOCK_NAMES = ("timm", "torchvision", "efficientnet_pytorch", "geffnet")
RESIDUALS = ("has_skip", "has_residual", "use_res_connect", "id_skip")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, CHANNELS, 12, 11, dtype=torch.float64)


def depthwise(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 5, "groups": CHANNELS, **settings}).double()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": depthwise,
    "Conv2d same": lambda: depthwise(kernel_size=4, padding="same"),
    "Conv2d valid": lambda: depthwise(padding="valid"),
    **{name: BLOCKS[name] for name in BLOCK_NAMES},
}


def depthwise_part(module: nn.Module) -> nn.Conv2d:
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)


SETTINGS: dict[str, dict[str, Any]] = {
    "stride 1": dict(stride=1),
    "stride in a list": dict(stride=[2, 2]),
    "one stride in a list": dict(stride=[2]),
    "stride of NumPy": dict(stride=np.int64(2)),
    "strides of NumPy": dict(stride=(np.int64(2), np.int32(1))),
    "padding 2": dict(padding=2),
    "padding in a list": dict(padding=[0, 2]),
    "padding of NumPy": dict(padding=np.int64(1)),
    "padding valid": dict(padding="valid"),
    "padding same": dict(padding="same"),
    "dilation 2": dict(dilation=2),
    "dilation in a list": dict(dilation=[1, 2]),
    "dilation and padding same": dict(dilation=(2, 2), padding="same"),
    "groups of NumPy": dict(groups=np.int64(0)),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_items_21_and_26_settings(name: str, setting: str, before: bool, x: Tensor) -> None:
    module = MODULES[name]()
    stock = copy.deepcopy(module)
    if not before:
        replace_layers(module)
        module(x)
    for m in (module, stock):
        conv = depthwise_part(m)
        for attribute, value in SETTINGS[setting].items():
            setattr(conv, attribute, np.int64(conv.groups) if attribute == "groups" else value)
        for attribute in set(RESIDUALS) & set(vars(m)):
            setattr(m, attribute, False)
    if before:
        replace_layers(module)
    try:
        expected = stock(x)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error)):
            module(x)
        return
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-10)
    if name not in ("Conv2d", "Conv2d same", "Conv2d valid") and "dilation" not in setting:
        assert is_fused(module, x)


@pytest.mark.parametrize("padding", ["same", 1])
@torch.no_grad()
def test_item_21_padding_of_another_weight(padding: Any, x: Tensor) -> None:
    conv = depthwise(kernel_size=3, padding=padding)
    stock = copy.deepcopy(conv)
    replace_layers(conv)
    conv(x)
    for module in (conv, stock):
        module.weight = nn.Parameter(torch.ones(CHANNELS, 1, 5, 7, dtype=torch.float64))
    torch.testing.assert_close(conv(x), stock(x))


@torch.no_grad()
def test_item_26_a_list_that_is_written_into(x: Tensor) -> None:
    block = BLOCKS["efficientnet_pytorch stride 2"]()
    assert isinstance(block._depthwise_conv.stride, list)
    stock = copy.deepcopy(block)
    replace_layers(block)
    for module in (block, stock):
        module(x)
        module._depthwise_conv.stride[0] = 1
    torch.testing.assert_close(block(x), stock(x))
    assert is_fused(block, x)


@torch.no_grad()
def test_item_26_an_array_that_is_written_into(x: Tensor) -> None:
    conv = depthwise()
    replace_layers(conv)
    conv.dilation = np.array([1, 1])
    for dilation in (1, 2):
        conv.dilation[:] = dilation
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, dilation=dilation, groups=CHANNELS))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@torch.no_grad()
def test_item_26_bounds_of_an_activation(before: bool, x: Tensor) -> None:
    block = BLOCKS["timm ReLU6 without squeeze-and-excitation"]()
    stock = copy.deepcopy(block)
    if not before:
        replace_layers(block)
        block(x)
    for module in (block, stock):
        module.bn2.act.max_val = 1.0
    if before:
        assert "bn2.act is ReLU6 from 0.0 to 1.0" in replace_layers(block).skipped[""]
    torch.testing.assert_close(block(x), stock(x))


@pytest.mark.parametrize("size", [[1, 1], (1, np.int64(1)), [1], [2, 2]], ids=str)
@torch.no_grad()
def test_item_26_size_of_a_pool(size: Any, x: Tensor) -> None:
    block = BLOCKS["torchvision"]()
    stock = copy.deepcopy(block)
    replace_layers(block)
    block(x)
    for module in (block, stock):
        module.block[2].avgpool.output_size = size
    if isinstance(size, list) and size != [1, 1]:
        for module in (block, stock):
            with pytest.raises(RuntimeError):
                module(x)
    else:
        torch.testing.assert_close(block(x), stock(x))
        assert is_fused(block, x)


@torch.no_grad()
def test_item_26_own_layers(x: Tensor) -> None:
    block = layers.MBConv(CHANNELS, CHANNELS, 5).double().eval()
    expected = block(x)
    for value in (1, [1], [1, 1], np.int64(1), (np.int64(1), np.int32(1))):
        for conv in (block.conv_pw, block.conv_dw, block.conv_pwl):
            conv.stride = conv.dilation = value
        torch.testing.assert_close(block(x), expected)
    for padding in ([2], [2, 2], np.int64(2), [np.int64(2)] * 4):
        block.conv_pw.padding, block.conv_pwl.padding, block.conv_dw.padding = 0, [0, 0], padding
        torch.testing.assert_close(block(x), expected)
    layer = layers.PaddedConv2d(CHANNELS, 4, 3, padding="same").double()
    expected = layer(x)
    layer.stride, layer.dilation, layer.padding = 1, [1, 1], np.int64(1)
    torch.testing.assert_close(layer(x), expected)


# Methods of classes


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Tensor:
        return function(self, *args, **keywords) * 2

    return forward


PATCHES: dict[str, tuple[str, type[nn.Module], str]] = {
    "block of timm": ("timm", timm_blocks.InvertedResidual, "forward"),
    "block of torchvision": ("torchvision", torchvision_efficientnet.MBConv, "forward"),
    "block of efficientnet_pytorch": ("efficientnet_pytorch", type(BLOCKS["efficientnet_pytorch"]()), "forward"),
    "block of geffnet": ("geffnet", type(BLOCKS["geffnet"]()), "forward"),
    "squeeze-and-excitation of timm": ("timm", timm_blocks.SqueezeExcite, "forward"),
    "squeeze-and-excitation of torchvision": ("torchvision", SqueezeExcitation, "forward"),
    "normalisation of timm": ("timm", BatchNormAct2d, "forward"),
    "normalisation": ("torchvision", nn.BatchNorm2d, "forward"),
    "base of normalisations": ("torchvision", nn.modules.batchnorm._BatchNorm, "forward"),
    "convolution": ("geffnet", nn.Conv2d, "forward"),
    "convolution's own function": ("torchvision", nn.Conv2d, "_conv_forward"),
    "activation": ("torchvision", nn.SiLU, "forward"),
    "gate": ("torchvision", nn.Sigmoid, "forward"),
    "convolution of efficientnet_pytorch": (
        "efficientnet_pytorch",
        type(BLOCKS["efficientnet_pytorch"]()._depthwise_conv),
        "forward",
    ),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_item_21_patched_class(
    patch: str, gradients: bool, before: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cls, method = PATCHES[patch]
    block = BLOCKS[name]()
    stock = copy.deepcopy(block)
    with torch.set_grad_enabled(gradients), monkeypatch.context() as context:
        if not before:
            replace_layers(block)
            unpatched = block(x)
        context.setattr(cls, method, doubled(getattr(cls, method)))
        if before:
            report = replace_layers(block)
            assert "" not in report.replaced and f"the {method} of " in report.skipped[""]
        torch.testing.assert_close(block(x), stock(x))
        if before:
            return
        assert not torch.allclose(block(x), unpatched)
        context.undo()
        assert torch.equal(block(x), unpatched) and is_fused(block, x)


@torch.no_grad()
def test_item_21_patched_convolution_of_a_single_layer(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = depthwise()
    replace_layers(conv)
    before = conv(x)
    with monkeypatch.context() as context:
        context.setattr(nn.Conv2d, "forward", doubled(nn.Conv2d.forward))
        torch.testing.assert_close(conv(x), before * 2)
        conv.bias = None
        restored = copy.deepcopy(conv)
        restore_layers(restored)
        torch.testing.assert_close(conv(x), restored(x))


@torch.no_grad()
def test_item_21_convolution_patched_on_the_instance(x: Tensor) -> None:
    """Circular padding is patched in this way: the module's forward stays what it was."""

    def circular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, groups=weight.shape[0])

    block = BLOCKS["timm"]()
    stock = copy.deepcopy(block)
    replace_layers(block)
    block(x)
    for module in (block, stock):
        module.conv_dw._conv_forward = circular
    assert torch.equal(block(x), stock(x))
    own = layers.MBConv(CHANNELS, CHANNELS).double().eval()
    own.conv_pw._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 2)
    doubled_weight = copy.deepcopy(own)
    del doubled_weight.conv_pw._conv_forward
    doubled_weight.conv_pw.weight.mul_(2)
    torch.testing.assert_close(own(x), doubled_weight(x))


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.BatchNorm2d, layers.SqueezeExcite, layers.DepthwiseConv2d])
@torch.no_grad()
def test_item_21_own_layers(cls: type[nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    block = layers.MBConv(CHANNELS, CHANNELS).double().eval()
    before = block(x)
    calls: Counter[str] = Counter()
    forward = cls.forward

    def counted(self: nn.Module, *args: Tensor) -> Tensor:
        calls[type(self).__name__] += 1
        return forward(self, *args)

    monkeypatch.setattr(cls, "forward", counted)
    torch.testing.assert_close(block(x), before)
    assert calls[cls.__name__] == sum(type(module) is cls for module in block.modules())


@torch.no_grad()
def test_item_21_own_pointwise_layer(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers.ConvNormAct(CHANNELS, 4, 1, activation="none").double().eval()
    before = layer(x)
    monkeypatch.setattr(nn.Conv2d, "forward", doubled(nn.Conv2d.forward))
    torch.testing.assert_close(layer(x), before * 2)
