"""docs/conventions.md says what the libraries that are installed do."""

from __future__ import annotations

import re
from pathlib import Path

import geffnet
import pytest
import timm
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from torch import nn

import effnet_ops

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "conventions.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+:\S+) \| (\S+) \| (\S+) \| (.+?) \|$", PAGE, flags=re.MULTILINE)
BUILD = {
    "timm": timm.create_model,
    "torchvision": torchvision.models.get_model,
    "efficientnet_pytorch": EfficientNet.from_name,
    "geffnet": geffnet.create_model,
}


def padding(conv: nn.Conv2d) -> str:
    if type(conv).__name__ == "Conv2dSame":
        return "SAME of any image"
    if type(conv).__name__ == "Conv2dStaticSamePadding":
        left, right, _, _ = conv.static_padding.padding
        return "SAME of one image size" if right == left + 1 else "other"
    half = tuple(size // 2 for size in conv.kernel_size)
    return "symmetric" if type(conv) is nn.Conv2d and conv.padding == half else "other"


def test_page_has_ten_checked_rows() -> None:
    assert len(ROWS) == 10 and {name.partition(":")[0] for name, *_ in ROWS} == set(BUILD)


@pytest.mark.parametrize(("name", "eps", "momentum", "pads"), ROWS, ids=[row[0] for row in ROWS])
def test_page_has_the_conventions_of_the_library(name: str, eps: str, momentum: str, pads: str) -> None:
    library, _, model_name = name.partition(":")
    model = BUILD[library](model_name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, round(norm.momentum, 6)) for norm in norms} == {(float(eps), float(momentum))}
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and max(module.stride) == 2]
    assert convs and {padding(conv) for conv in convs} == {pads}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_running_variance_is_unbiased_and_survives_a_large_mean(dtype: torch.dtype) -> None:
    """Mean 1000, deviation 1: fp32 has the numbers to 3e-5, and their squares to 0.03."""
    block = effnet_ops.layers.MBConv(16, 16, 1, expand_ratio=1, se_ratio=0.0, activation="none", momentum=1.0)
    block = block.to(dtype).train()
    nn.init.ones_(block.conv_dw.weight)
    x = (torch.randn(8, 16, 8, 8, dtype=torch.float64) + 1000).to(dtype)
    block(x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(block.bn1.running_var.double(), exact.var(1), rtol=1e-4, atol=0)
    assert not torch.allclose(block.bn1.running_var.double(), exact.var(1, correction=0), rtol=1e-3, atol=0)
    stock = nn.BatchNorm2d(16, momentum=1.0).to(dtype).train()
    stock(x)
    torch.testing.assert_close(block.bn1.running_var, stock.running_var, rtol=1e-3, atol=0)
