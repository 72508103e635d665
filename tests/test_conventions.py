"""docs/conventions.md says what the libraries that are installed do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import efficientnet_pytorch
import geffnet
import pytest
import timm
import torch
import torchvision
from networks import on_meta
from torch import nn

import effnet_ops

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "conventions.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+:\S+) \| (\S+) \| (\S+) \| (.+?) \|$", PAGE, flags=re.MULTILINE)
EVEN = "SAME of even sizes"
"""TensorFlow's pads as for an even size before every stride, whatever the image."""


def smp_encoder(name: str) -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").encoders.get_encoder(name, weights=None)


def monai_model(name: str) -> nn.Module:
    return pytest.importorskip("monai.networks.nets").EfficientNetBN(name, pretrained=False)


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
    return getattr(transformers, name)(transformers.EfficientNetConfig(**sizes))


BUILD: dict[str, Callable[[str], nn.Module]] = {
    "timm": timm.create_model,
    "torchvision": torchvision.models.get_model,
    "efficientnet_pytorch": efficientnet_pytorch.EfficientNet.from_name,
    "geffnet": geffnet.create_model,
    "segmentation_models_pytorch": smp_encoder,
    "monai": monai_model,
    "transformers": transformers_model,
}
KNOWN = {name for name, *_ in ROWS} - {"transformers:EfficientNetModel"}
"""Those that `create_model` takes; segmentation_models_pytorch's ``tu-`` are timm's under timm's names."""
NAMES = [name for name in sorted(KNOWN) if ":tu-" not in name and not name.startswith("torchvision:efficientnet_v2")]


def pads_apart(module: nn.Module) -> bool:
    return isinstance(module, nn.ConstantPad2d) and module.padding[1] == module.padding[0] + 1


def padding(conv: nn.Conv2d, model: nn.Module) -> str:
    if type(conv).__name__ == "Conv2dSame":
        return "SAME of any image"
    if type(conv).__name__ == "Conv2dStaticSamePadding":
        pads = getattr(conv.static_padding, "padding", None)
        return "SAME of one image size" if pads and pads[1] == pads[0] + 1 else "other"
    half = tuple(size // 2 for size in conv.kernel_size)
    if conv.padding == half:
        return "symmetric" if type(conv) is nn.Conv2d else "other"
    return EVEN if any(map(pads_apart, model.modules())) else "other"


def test_page_has_rows_of_every_library() -> None:
    assert len(ROWS) == 16 and {name.partition(":")[0] for name, *_ in ROWS} == set(BUILD)


@pytest.mark.parametrize(("name", "eps", "momentum", "pads"), ROWS, ids=[row[0] for row in ROWS])
def test_page_has_the_conventions_of_the_library(name: str, eps: str, momentum: str, pads: str) -> None:
    library, _, model_name = name.partition(":")
    model = BUILD[library](model_name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {float(eps)}
    assert {round(norm.momentum, 6) for norm in norms} == set(map(float, momentum.split(",")))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and max(module.stride) == 2]
    assert convs and {padding(conv, model) for conv in convs} == {pads}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_we_know_what_the_page_says(name: str) -> None:
    eps, momentum, pads = next(row[1:] for row in ROWS if row[0] == name)
    known = effnet_ops.models.conventions(*name.split(":"))
    assert (known.eps, known.momentum) == (float(eps), float(momentum))
    assert known.padding == ("symmetric" if pads == "symmetric" else "same")


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("segmentation_models_pytorch:timm-tf_efficientnet_lite0", "eps 1e-5 and symmetric padding, though"),
        ("monai:efficientnet-b3", "pads every image as one of 224 pixels"),
    ],
)
def test_name_that_says_something_else_is_a_warning(name: str, remark: str) -> None:
    with pytest.warns(UserWarning, match=remark):
        model = on_meta(lambda: effnet_ops.create_model(name, num_classes=10))
    with pytest.warns(UserWarning, match=remark):
        effnet_ops.convert_state_dict(model.state_dict(), source="effnet_ops", target=name)


def test_weights_of_a_name_that_lies_are_no_model_of_that_name() -> None:
    name = "segmentation_models_pytorch:timm-tf_efficientnet_lite0"
    with pytest.warns(UserWarning, match="though its name says tf_"):
        model = on_meta(lambda: effnet_ops.create_model(name))
    with (
        pytest.raises(ValueError, match=r"has eps 1e-05 but timm:tf_efficientnet_lite0 has 0\.001"),
        pytest.warns(UserWarning, match="though its name says tf_"),
    ):
        effnet_ops.convert_state_dict(model.state_dict(), source=name, target="timm:tf_efficientnet_lite0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("monai:efficientnet-b0", "monai:efficientnet-b3", "segmentation_models_pytorch:efficientnet-b0"),
        *("segmentation_models_pytorch:timm-efficientnet-b0", "segmentation_models_pytorch:timm-tf_efficientnet_lite0"),
    ],
)
def test_weights_of_the_library_convert(name: str) -> None:
    """Encoders of segmentation_models_pytorch have no classifier."""
    library, _, model_name = name.partition(":")
    stock = on_meta(lambda: BUILD[library](model_name)).state_dict()
    ours = on_meta(lambda: effnet_ops.create_model(name)).state_dict()
    converted = effnet_ops.convert_state_dict(stock, source=name, target="effnet_ops")
    assert {key for key in ours if key not in converted} <= {"classifier.weight", "classifier.bias"}
    assert all(ours[key].shape == value.shape for key, value in converted.items())
    back = effnet_ops.convert_state_dict(converted, source="effnet_ops", target=name)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in stock.items()}


def test_weights_that_are_no_state_dict_are_refused() -> None:
    model = on_meta(lambda: effnet_ops.create_model("mindcv:efficientnet_b0"))
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {1e-5}
    with pytest.raises(ValueError, match="source 'mindcv': mindcv has no state dict of PyTorch"):
        effnet_ops.convert_state_dict(model.state_dict(), source="mindcv", target="timm")


VALUES = (999.0, 1000.0, 1000.0, 1001.0) * 4
"""float16 has them exactly, bfloat16 has not. Their sum of squares about the mean is 8, of which PyTorch takes 1/15."""

DIALECTS: dict[str, Callable[[], nn.Module]] = {
    "effnet_ops": lambda: effnet_ops.create_model("efficientnet_b0"),
    "timm": lambda: timm.create_model("efficientnet_b0"),
    "timm, TensorFlow": lambda: timm.create_model("tf_efficientnet_b0"),
    "torchvision": torchvision.models.efficientnet_b0,
    "efficientnet_pytorch": lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0"),
    "geffnet": lambda: geffnet.create_model("efficientnet_b0"),
}


def first_two_blocks(dialect: str) -> list[nn.Module]:
    """Behind a depthwise convolution and behind an expansion that change nothing, the first normalisation."""
    model = DIALECTS[dialect]()
    if dialect == "effnet_ops":
        blocks = [module for module in model.modules() if isinstance(module, effnet_ops.layers.MBConv)][:2]
    else:
        blocks = [model.get_submodule(name) for name in effnet_ops.replace_layers(model).replaced[:2]]
    for block in blocks:
        weight = next(module for module in block.modules() if isinstance(module, nn.Conv2d)).weight
        nn.init.zeros_(weight)
        for channel in range(len(weight)):
            weight.data[channel, channel % weight.shape[1], weight.shape[2] // 2, weight.shape[3] // 2] = 1
    return blocks


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("dtype", "autocast", "atol"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 1e-6),
        (torch.float16, False, 5e-4),
        (torch.float32, True, 1e-6),
    ],
    ids=["float64", "float32", "float16", "autocast to float16"],
)
def test_running_variance_of_a_large_mean(
    dtype: torch.dtype, autocast: bool, atol: float, dialect: str, backend: str
) -> None:
    """0.9 + 0.1 * 8/15 = 0.953; the biased variance, 8/16, gives 0.950. A float16 near 1 has steps of 0.0005."""
    if backend == "cpu" and effnet_ops.available_backends()["cpu"]:
        pytest.skip("the C++ part is not built")
    for block in first_two_blocks(dialect):
        norm = next(module for module in block.modules() if isinstance(module, nn.BatchNorm2d))
        conv = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
        norm.momentum = 0.1
        channels = conv.in_channels
        x = torch.tensor(VALUES).reshape(4, 1, 2, 2).expand(4, channels, 2, 2).contiguous()
        with effnet_ops.use_backend(backend), torch.autocast("cpu", torch.float16, enabled=autocast):
            block.to(dtype).train()(x.to(dtype))
        expected = torch.full((norm.num_features,), 0.9 + 0.1 * 8 / 15, dtype=torch.float64)
        torch.testing.assert_close(norm.running_var.double(), expected, rtol=0, atol=atol)


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
