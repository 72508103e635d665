"""The layers around the blocks of a network whose blocks were replaced: what runs fused, when, and what it makes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable

import efficientnet_pytorch
import geffnet
import pytest
import timm
import torch
import torchvision
from networks import relative_difference, with_statistics
from torch import Tensor, nn

import effnet_ops
from effnet_ops import ops, replace_layers, restore_layers
from effnet_ops.surgery.around import AroundLayer

NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "timm": (
        lambda: timm.create_model("efficientnet_b0", num_classes=10),
        {"conv_stem": "convolution", "bn1": "norm", "conv_head": "convolution", "bn2": "norm", "global_pool": "pool"},
    ),
    "timm SAME": (
        lambda: timm.create_model("tf_mobilenetv3_small_075", num_classes=10),
        {
            **{"conv_stem": "convolution", "bn1": "norm", "blocks.5.0.conv": "convolution", "blocks.5.0.bn1": "norm"},
            **{"global_pool": "pool", "conv_head": "convolution"},
        },
    ),
    "torchvision": (
        lambda: torchvision.models.efficientnet_b0(num_classes=10),
        {"features.0": "conv_norm", "features.8": "conv_norm", "avgpool": "pool"},
    ),
    "torchvision MobileNetV2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=10),
        {"features.0": "conv_norm", "features.18": "conv_norm"},
    ),
    "torchvision MNASNet": (
        lambda: torchvision.models.mnasnet0_5(num_classes=10),
        {
            **{"layers.0": "convolution", "layers.1": "norm", "layers.4": "norm", "layers.6": "convolution"},
            **{"layers.7": "norm", "layers.14": "convolution", "layers.15": "norm"},
        },
    ),
    "efficientnet_pytorch": (
        lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", num_classes=10),
        {
            **{"_conv_stem": "convolution", "_bn0": "norm", "_conv_head": "convolution", "_bn1": "norm"},
            **{"_avg_pooling": "pool"},
        },
    ),
    "geffnet": (
        lambda: geffnet.create_model("efficientnet_b0", num_classes=10),
        {"conv_stem": "convolution", "bn1": "norm", "conv_head": "convolution", "bn2": "norm", "global_pool": "pool"},
    ),
}
_built: dict[str, nn.Module] = {}


def network(name: str = "timm") -> tuple[nn.Module, nn.Module]:
    """A network in evaluation mode with realistic statistics, and its stock copy."""
    if name not in _built:
        _built[name] = with_statistics(NETWORKS[name][0](), 64)
    return copy.deepcopy(_built[name]), copy.deepcopy(_built[name])


def replaced(name: str = "timm", layout: torch.memory_format = torch.channels_last) -> tuple[nn.Module, nn.Module]:
    model, stock = (m.to(memory_format=layout) for m in network(name))
    replace_layers(model)
    return model, stock


def images(layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(2, 3, 97, 128).to(memory_format=layout)


def assert_same_in_fp64(model: nn.Module, stock: nn.Module) -> None:
    """In fp32, a network amplifies the rounding of its first layers too much to tell a small mistake from it."""
    x = images().double()
    assert relative_difference(model.double()(x), stock.double()(x)) <= 1e-9


def stock_errors(stock: nn.Module, x: Tensor, exact: Tensor) -> list[float]:
    """In both memory formats: that of one run alone is a matter of luck."""
    layouts = (torch.channels_last, torch.contiguous_format)
    results = (copy.deepcopy(stock).to(memory_format=to)(x.contiguous(memory_format=to)) for to in layouts)
    return [relative_difference(y, exact) for y in results]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator of these layers was called."""
    found: Counter[str] = Counter()

    def counted(module: object, name: str) -> None:
        operator = getattr(module, name)
        function = operator.run

        def call(*args: object) -> Tensor:
            found[name] += 1
            return function(*args)

        monkeypatch.setattr(operator, "run", call)

    counted(ops.conv_norm, "conv_norm")
    counted(ops.conv_norm, "batch_norm")
    counted(ops.packed, "average_pool")
    counted(ops, "batch_norm_training")
    return found


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_network(name: str, layout: torch.memory_format, calls: Counter[str]) -> None:
    model, stock = (m.to(memory_format=layout) for m in network(name))
    report = replace_layers(model)
    expected = NETWORKS[name][1]
    assert report.around == expected and not set(expected) & {*report.replaced, *report.skipped}
    x = images(layout)
    exact = copy.deepcopy(stock).double()(x.double())
    y, theirs = model(x), stock(x)
    assert relative_difference(y, exact) <= max(2e-6, 2 * max(stock_errors(stock, x, exact)))
    kinds = Counter(expected.values())
    # The last convolution of MobileNetV3 sees one pixel. Contiguous images stay with the stock's first convolution.
    stays = sum("conv_head" in key for key in expected) if name == "timm SAME" else 0
    apart = layout is torch.contiguous_format
    convolutions = kinds["convolution"] + kinds["conv_norm"] - stays - apart
    norms = kinds["norm"] + (apart and kinds["conv_norm"] > 0)
    assert calls == Counter({"conv_norm": convolutions, "batch_norm": norms, "average_pool": kinds["pool"]})
    restore_layers(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(model(x), theirs)
    replace_layers(model)
    assert_same_in_fp64(model, stock)


def test_second_call_reports_nothing_more() -> None:
    model, _ = replaced()
    types = [type(m) for m in model.modules()]
    report = replace_layers(model)
    assert (report.replaced, report.around) == ([], {}) and "conv_stem" not in report.skipped
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)),
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), network()[0].blocks[0][0]),
    ],
)
def test_other_networks_stay(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert replace_layers(model).around == {}
    assert not any(isinstance(m, AroundLayer) for m in model.modules())


def test_network_without_a_fused_block_stays() -> None:
    model, _ = network()
    for block in model.blocks.modules():
        block.register_forward_hook(lambda *_: None)
    report = replace_layers(model)
    assert not any(kind == "block" for name, kind in report.kinds.items() if name in report.replaced)
    assert report.around == {}


def layers_and_inputs(model: nn.Module, stock: nn.Module) -> list[tuple[nn.Module, nn.Module, Tensor]]:
    """The layers around the blocks of a timm network with their stock copies and inputs that fit."""
    x = images()
    sizes = {"conv_stem": x, "bn1": torch.randn(2, 32, 49, 64), "conv_head": torch.randn(2, 320, 5, 4)}
    sizes.update(bn2=torch.randn(2, 1280, 5, 4), global_pool=torch.randn(2, 1280, 5, 4))
    last = torch.channels_last
    return [(getattr(model, n), getattr(stock, n), x.to(memory_format=last)) for n, x in sizes.items()]


def test_convolutions_and_pools_with_gradients_are_the_stocks(calls: Counter[str]) -> None:
    model, stock = replaced()
    for layer, other, x in layers_and_inputs(model, stock):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer.train()(x), other.train()(x))
        with torch.no_grad():
            assert torch.equal(layer(x), other(x))
    assert not calls


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["timm", "torchvision", "efficientnet_pytorch", "geffnet"])
def test_training(name: str, layout: torch.memory_format, calls: Counter[str]) -> None:
    """Two steps, the second with frozen normalisations: outputs, gradients and running statistics, in fp64."""
    model, stock = replaced(name, layout)
    for m in (model, stock):
        m.double().train()
    x = images(layout).double()
    for frozen in (False, True):
        results = []
        for m in (model, stock):
            m.zero_grad()
            for module in m.modules():
                if frozen and isinstance(module, nn.BatchNorm2d):
                    module.eval()
            torch.manual_seed(3)
            y = m(x)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in m.parameters())])
        largest = max(p.detach().norm() for p in results[1])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * max(theirs.norm(), 1e-3 * largest)
    for ours, theirs in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert calls == ({"batch_norm_training": 4} if layout is torch.channels_last else {})


def test_training_of_a_layer_that_the_kernel_does_not_take(calls: Counter[str]) -> None:
    model, _ = replaced()
    norm = model.bn1.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 32, 1, 1))
    assert norm(torch.randn(0, 32, 4, 4).to(memory_format=torch.channels_last)).shape == (0, 32, 4, 4)
    with pytest.raises(RuntimeError, match="32"):
        norm(torch.randn(2, 33, 4, 4).to(memory_format=torch.channels_last))
    assert not calls


@pytest.mark.parametrize("name", ["timm", "torchvision"])
@torch.no_grad()
def test_autocast(name: str, calls: Counter[str]) -> None:
    model, stock = replaced(name)
    x = images()
    exact = stock(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = model(x), stock(x)
    assert y.dtype is theirs.dtype and calls["conv_norm"] == 2
    assert relative_difference(y.float(), exact) <= max(1e-2, 2 * relative_difference(theirs.float(), exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["timm", "torchvision"])
@torch.no_grad()
def test_dtype_changed_after_replacing(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model, stock = replaced(name)
    x = images()
    model(x)
    exact = stock.double()(x.double())
    theirs, y = stock.to(dtype)(x.to(dtype)), model.to(dtype)(x.to(dtype))
    assert y.dtype is dtype and calls["conv_norm"] == 4
    floor = 1e-10 if dtype is torch.float64 else 1e-2
    assert relative_difference(y.double(), exact) <= max(floor, 2 * relative_difference(theirs.double(), exact))


@torch.no_grad()
def test_wrong_dtype_is_the_stocks_error() -> None:
    model, stock = replaced()
    for layer, other, x in layers_and_inputs(model, stock)[:4]:
        with pytest.raises(RuntimeError) as error:
            other(x.double())
        with pytest.raises(RuntimeError) as ours:
            layer(x.double())
        assert str(ours.value) == str(error.value)
    with pytest.raises(RuntimeError, match="expected input"):
        model.conv_stem(torch.randn(1, 4, 32, 32).to(memory_format=torch.channels_last))


@torch.no_grad()
def test_changed_parameters_count_at_the_next_call() -> None:
    model, stock = (m.double() for m in replaced("torchvision"))
    assert_same_in_fp64(model, stock)
    for m in (model, stock):
        conv, norm, _ = m.features[0]
        conv.weight.mul_(-1.5)
        norm.running_mean.add_(0.3)
        norm.bias = nn.Parameter(norm.bias + 1)
        norm.eps = 0.1
        m.features[8][1].running_var = m.features[8][1].running_var * 2
    assert_same_in_fp64(model, stock)


@torch.no_grad()
def test_changed_structure_counts_at_the_next_call(calls: Counter[str]) -> None:
    model, stock = (m.double() for m in replaced("torchvision"))
    assert_same_in_fp64(model, stock)
    for m in (model, stock):
        m.features[0][2] = nn.Tanh()
        m.features[8][0].bias = nn.Parameter(torch.ones(1280).double())
    calls.clear()
    assert_same_in_fp64(model, stock)
    assert calls["conv_norm"] == 0


@torch.no_grad()
def test_hooks_run() -> None:
    model, stock = replaced("torchvision")
    seen: list[str] = []
    model.features[0].register_forward_hook(lambda m, args, y: seen.append("whole"))
    model.features[0][0].register_forward_hook(lambda m, args, y: seen.append("convolution"))
    model.features[8][2].register_forward_hook(lambda m, args, y: y + 1)
    stock.features[8][2].register_forward_hook(lambda m, args, y: y + 1)
    assert_same_in_fp64(model, stock)
    assert seen == ["convolution", "whole"]
    model, stock = replaced()
    for m in (model, stock):
        m.bn1.act.register_forward_hook(lambda m, args, y: y * 2)
        m.conv_stem.register_forward_hook(lambda m, args, y: y - 1)
    assert_same_in_fp64(model, stock)


@pytest.mark.parametrize("name", ["timm", "torchvision", "efficientnet_pytorch"])
@torch.no_grad()
def test_copies(name: str) -> None:
    model, _ = replaced(name)
    x = images()
    before = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), before)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
@torch.no_grad()
def test_compiled_network_is_one_graph(name: str) -> None:
    model, _ = replaced(name)
    model = nn.Sequential(*(model.features[:2] if name == "torchvision" else (model.conv_stem, model.bn1)))
    x = images()
    expected = model(x)
    y = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
@torch.no_grad()
def test_empty_batch(name: str) -> None:
    model, _ = replaced(name)
    x = images()[:0]
    assert model(x).shape == (0, 10)
    assert model(images()).shape == (2, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_values_that_are_not_finite(value: float) -> None:
    for name in ("timm", "torchvision"):
        model, stock = replaced(name)
        stems = [nn.Sequential(m.conv_stem, m.bn1) if name == "timm" else m.features[0] for m in (model, stock)]
        x = images()
        x[0, 1, 7, 9] = value
        y, theirs = (stem(x) for stem in stems)
        torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert not y[0].isfinite().all() and y[1].isfinite().all()
        norms = [m.bn1 if name == "timm" else m.features[0][1] for m in (model, stock)]
        for norm in norms:
            norm.running_var[3] = value
        torch.testing.assert_close(*(stem(x) for stem in stems), rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_reference_backend_is_the_stock_forward(calls: Counter[str]) -> None:
    model, _ = replaced()
    with effnet_ops.use_backend("reference"):
        model(images())
    assert not calls
    model(images())
    assert calls


@torch.no_grad()
def test_normalisation_without_parameters_or_statistics(calls: Counter[str]) -> None:
    model, stock = network()
    for m in (model, stock):
        m.bn1.weight = m.bn1.bias = None
        m.bn2.running_mean = m.bn2.running_var = None
    replace_layers(model)
    assert_same_in_fp64(model, stock)
    assert calls["batch_norm"] == 1
