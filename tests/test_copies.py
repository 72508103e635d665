"""What a copy of `optimize_for_inference` guarantees beside its numbers: the rows of docs/copies.md."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import efficientnet_pytorch
import geffnet
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import relative_difference, with_statistics
from test_optimize import Seen
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torchvision.transforms import v2

import effnet_ops
from effnet_ops import layers, optimize_for_inference
from effnet_ops.surgery import folded, folding

SIZE = 64
LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("efficientnet_b0"),
    "torchvision": torchvision.models.efficientnet_b0,
    "efficientnet_pytorch": lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0"),
    "geffnet": lambda: geffnet.create_model("efficientnet_b0"),
    "ours": lambda: effnet_ops.create_model("efficientnet_b0"),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: with_statistics(build(), SIZE) for name, build in LIBRARIES.items()}


@pytest.fixture(params=LIBRARIES)
def network(request: pytest.FixtureRequest, networks: dict[str, nn.Module]) -> nn.Module:
    return networks[request.param]


def small(**settings: Any) -> nn.Module:
    return with_statistics(timm.create_model("test_efficientnet", **settings), SIZE)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE)


def stages(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first convolution and its normalisation, whatever the library calls them."""
    modules = dict(network.named_modules())
    names = ("conv_stem", "bn1"), ("features.0.0", "features.0.1"), ("_conv_stem", "_bn0")
    conv, norm = next(pair for pair in names if pair[0] in modules)
    return modules[conv], modules[norm]


def close(found: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    assert found.shape == expected.shape and relative_difference(found, expected) < bound


class Wrapper(nn.Module):
    """A model of a user around a network of a library."""

    def __init__(self, body: nn.Module, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body, self.run = body, run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def assert_same(model: nn.Module, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> nn.Module:
    """The copy gives what the model gives, three times; returns it."""
    optimized = optimize_for_inference(model, dtype=dtype)
    with torch.no_grad():
        expected = model(*args, **kwargs)
        for _ in range(3):
            found = optimized(*args, **kwargs)
            assert found.dtype == expected.dtype
            close(found, expected, 1e-4 if dtype in (None, torch.float32, torch.float64) else 0.2)
    return optimized


@torch.no_grad()
def test_attributes_parameters_and_submodules_stay(network: nn.Module) -> None:
    """Items 1 and 25: names, classes, shapes, dtypes and values of everything that the model has."""
    optimized, x = optimize_for_inference(network), images()
    optimized(x)
    for (name, stock), (other, copied) in zip(network.named_modules(), optimized.named_modules(), strict=True):
        assert name == other and isinstance(copied, type(stock))
        for attribute in ("stride", "kernel_size", "padding", "in_features", "eps", "num_features"):
            assert getattr(copied, attribute, None) == getattr(stock, attribute, None)
    found, expected = optimized.state_dict(), network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    assert {name: p.shape for name, p in optimized.named_parameters()} == {
        name: p.shape for name, p in network.named_parameters()
    }
    assert all(type(value) is Tensor for value in found.values())


@pytest.mark.parametrize(
    "read",
    [
        lambda net, x: net.body(x) @ net.fc.weight.T,
        lambda net, x: F.linear(net.body(x), net.fc.weight, net.fc.bias),
        lambda net, x: net.body(x) * net.fc.weight[3],
        lambda net, x: net.encoder(net.body(x)[:, None]),
        lambda net, x: F.conv2d(net.body.forward_features(x), net.fc.weight[:, :, None, None]),
    ],
    ids=["product", "linear", "class activation", "transformer", "convolution"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_item_1_a_linear_that_somebody_reads(read: Callable[..., Tensor], dtype: torch.dtype | None) -> None:
    encoder = nn.TransformerEncoderLayer(256, 4, 64, batch_first=True)
    model = Wrapper(small(num_classes=0), read, fc=nn.Linear(256, 100), encoder=encoder).eval()
    assert_same(model, images(), dtype=dtype)


@torch.no_grad()
def test_item_2_a_forward_replaced_on_an_instance() -> None:
    model = nn.Sequential(layers.MBConv(8, 8), layers.MBConv(8, 8)).eval()
    block, x = model[1], torch.randn(2, 8, 9, 9)
    block.forward = lambda x: type(block).forward(block, x) * 3
    assert_same(model, x)
    optimized = optimize_for_inference(model[0])
    optimized(x)
    optimized.forward = lambda x: x + 1
    assert torch.equal(optimized(x), x + 1)


class Preprocessed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1))
        self.register_buffer("grid", torch.arange(1000) + 0.5)
        self.body = small()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body((x - self.mean) / self.std), self.grid


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_item_3_buffers_of_no_layer_keep_their_values(dtype: torch.dtype) -> None:
    model, x = Preprocessed().eval(), torch.rand(2, 3, SIZE, SIZE) * 255
    optimized = optimize_for_inference(model, dtype=dtype)
    logits, grid = optimized(x)
    assert torch.equal(optimized.mean.double(), model.mean.double())
    assert torch.equal(grid, model.grid) and logits.dtype == torch.float32
    assert relative_difference(logits, model(x)[0]) < 0.15


@torch.no_grad()
@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: net.net[:2](x),
        lambda net, x: net.net[1](net.net[0](x)),
        lambda net, x: net.net[0](x),
        lambda net, x: net.net[:1](x) * 2,
        lambda net, x: [x := layer(x) for layer in net.net][-1],
        lambda net, x: [x := layer(x) for layer in net.net.children()][1],
        lambda net, x: net.net[3:](net.net[:3](x)),
        lambda net, x: nn.Sequential(*net.net[:2])(x),
    ],
)
def test_item_4_a_sequence_that_somebody_slices_or_walks(run: Callable[..., Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    net = with_statistics(net, 16)
    model = Wrapper(nn.Identity(), run, net=net).eval()
    optimized = assert_same(model, torch.randn(2, 3, 16, 16))
    optimized.net(torch.randn(2, 3, 16, 16))
    close(optimized.net[:2](torch.ones(1, 3, 9, 9)), net[:2](torch.ones(1, 3, 9, 9)))


Pair = namedtuple("Pair", "image scale")


@dataclasses.dataclass(frozen=True)
class Batch:
    image: Tensor
    scale: Tensor


class Output(OrderedDict):
    """As the model outputs of transformers: a dictionary and attributes at once."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


NESTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dictionary": lambda x, s: {"image": x, "scale": s},
    "list": lambda x, s: [x, s],
    "tuple": lambda x, s: (x, (s,)),
    "named tuple": Pair,
    "dataclass": Batch,
    "model output": lambda x, s: Output(image=x, scale=s),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


@torch.no_grad()
@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_item_5_nests_come_back_in_the_callers_dtype(name: str, dtype: torch.dtype) -> None:
    nest = NESTS[name]

    def run(net: nn.Module, given: Any) -> Any:
        x, scale = tensors(given)
        return nest(net.body(x) * scale, scale)

    model = Wrapper(small(), run)
    given = nest(images(), torch.ones(2, 1))
    found = optimize_for_inference(model, dtype=dtype)(given)
    assert type(found) is type(given) and [t.dtype for t in tensors(found)] == [torch.float32] * 2
    assert relative_difference(tensors(found)[0], tensors(model(given))[0]) < 0.2
    assert [t.dtype for t in tensors(given)] == [torch.float32] * 2


@torch.no_grad()
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_item_6_set_swish(networks: dict[str, nn.Module], memory_efficient: bool) -> None:
    model, x = networks["efficientnet_pytorch"], images()
    optimized = optimize_for_inference(model)
    optimized(x)
    optimized.set_swish(memory_efficient)
    close(optimized(x), model(x))
    close(optimized.extract_features(x), model.extract_features(x))
    assert norms_run(optimized, x) == 0


def norms_run(model: nn.Module, x: Tensor) -> int:
    with Seen() as seen, torch.no_grad():
        model(x)
    return sum("batch_norm" in name for name in seen.names)


@torch.no_grad()
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_item_7_a_model_that_is_half_already(network: nn.Module, half: torch.dtype) -> None:
    model, x = copy.deepcopy(network).to(half), images()
    optimized = optimize_for_inference(model)
    y = optimized(x.to(half))
    assert y.dtype == half
    exact = network(x)
    assert relative_difference(y, exact) <= max(1e-2, 2 * relative_difference(model(x.to(half)), exact))


class Frozen(nn.Module):
    """The usual way to freeze normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.body.bn1.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_item_8_train_that_returns_nothing() -> None:
    model = Frozen()
    model.eval()
    optimized = assert_same(model, images())
    with pytest.raises(RuntimeError, match="cannot train"):
        optimized.train()
    optimized.eval()


@torch.no_grad()
def test_item_9_the_layout_is_the_models(network: nn.Module) -> None:
    """Contiguous images give contiguous maps and channels_last ones channels_last, as in the model."""
    features = "extract_features" if hasattr(network, "extract_features") else "forward_features"
    features = features if hasattr(network, features) else "features"
    optimized = optimize_for_inference(network)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images().contiguous(memory_format=layout)
        y = getattr(optimized, features)(x)
        assert y.is_contiguous(memory_format=layout)
        conv, norm = stages(optimized)
        assert norm(conv(x)).is_contiguous(memory_format=layout)
    model = Wrapper(network, lambda net, x: getattr(net.body, features)(x).view(2, -1, 4).mean(2))
    assert_same(model, images())


class Second(nn.Module):
    """A second input that meets a layer, a bare parameter or the network's own features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = small(num_classes=0), kind
        self.layer = {
            "lstm": lambda: nn.LSTM(5, 256, batch_first=True),
            "gru": lambda: nn.GRU(5, 256, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(256, 4, batch_first=True),
            "bilinear": lambda: nn.Bilinear(256, 256, 7),
        }.get(kind, nn.Identity)()
        self.bare = nn.Parameter(torch.randn(256, 5) / 16)

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        h = self.body(x)
        if self.kind in ("lstm", "gru"):
            return h + self.layer(second)[0][:, -1]
        if self.kind == "attention":
            return self.layer(second, second, second)[0][:, 0] + h
        if self.kind == "bilinear":
            return self.layer(h, second)
        return second @ self.bare if self.kind == "bare" else h @ second.T


SECONDS = {"lstm": (2, 4, 5), "gru": (2, 4, 5), "attention": (2, 3, 256), "bilinear": (2, 256), "bare": (2, 256)}


@pytest.mark.parametrize("kind", [*SECONDS, "features"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_item_10_a_second_input(kind: str, dtype: torch.dtype) -> None:
    model = Second(kind).eval()
    second = torch.randn(SECONDS.get(kind, (2, 256))) / 8
    x = images()
    found, expected = optimize_for_inference(model, dtype=dtype)(x, second), model(x, second)
    assert found.dtype == torch.float32 and relative_difference(found, expected) < 0.2
    named = optimize_for_inference(model, dtype=dtype)(x=x, second=second)
    assert torch.equal(found, named)


def test_item_11_function_transforms(network: nn.Module) -> None:
    model = copy.deepcopy(network).double()
    if hasattr(model, "set_swish"):
        # Its other swish is a torch.autograd.Function that no transform takes.
        model.set_swish(memory_efficient=False)
    optimized, x = optimize_for_inference(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        optimized(x)
    tolerance = {"rtol": 1e-6, "atol": 1e-8}

    def logit(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda image: net(image[None])[0, :3].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(logit(optimized)))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, :3].square().sum(), leaf)
    torch.testing.assert_close(per_sample, expected, **tolerance)
    mapped = torch.func.vmap(lambda image: optimized(image[None])[0])(x)
    torch.testing.assert_close(mapped, optimized(x), **tolerance)
    tangent = torch.randn_like(x)
    found = torch.func.jvp(lambda v: optimized(v), (x,), (tangent,))[1]
    torch.testing.assert_close(found, torch.func.jvp(lambda v: model(v), (x,), (tangent,))[1], **tolerance)


def test_item_11_jacobians_and_second_derivatives_of_a_block() -> None:
    for block in (layers.MBConv(4, 4, expand_ratio=2), timm_block()):
        model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), block), 8)[1].double().eval().requires_grad_(False)
        optimized, x = optimize_for_inference(model), torch.randn(1, 4, 3, 3, dtype=torch.float64)
        for transform in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
            found, expected = (transform(lambda v, net=net: net(v).square().sum())(x) for net in (optimized, model))
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def timm_block() -> nn.Module:
    return timm.models._efficientnet_blocks.InvertedResidual(4, 4, exp_ratio=2, act_layer=nn.SiLU)


def test_item_11_stacked_copies() -> None:
    model = small()
    copies, x = [optimize_for_inference(model), optimize_for_inference(small())], images()
    params, buffers = torch.func.stack_module_state(copies)
    base = copy.deepcopy(copies[0])

    def run(p: dict, b: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,))

    found = torch.func.vmap(run, (0, 0, None))(params, buffers, x)
    close(found, torch.stack([c(x) for c in copies]))


def test_item_12_second_derivatives(networks: dict[str, nn.Module]) -> None:
    for name in ("ours", "timm"):
        model = copy.deepcopy(networks[name]).double().requires_grad_(False)
        found = []
        for net in (optimize_for_inference(model), model):
            with effnet_ops.use_backend("reference"):
                x = torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32).requires_grad_()
            if net is model and name == "ours":
                with effnet_ops.use_backend("reference"):
                    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            else:
                (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), x)[0])
        assert relative_difference(*found) < 1e-6


def test_item_15_distributed_data_parallel() -> None:
    model, x = small(), images()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimized = optimize_for_inference(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(optimized, type(model)) and optimized.optimization_report.blocks
    close(optimized(x), model(x))


@torch.no_grad()
def test_item_16_hooks_set_later_see_what_the_model_shows(network: nn.Module) -> None:
    """Better than the value behind the activation: the layer runs its stock form while somebody listens."""
    optimized, x, heard = optimize_for_inference(network), images(), []
    optimized(x)
    for net in (optimized, network):
        handles = [part.register_forward_hook(lambda m, args, y: heard.append(y)) for part in stages(net)]
        net(x)
        for handle in handles:
            handle.remove()
    assert len(heard) == 4
    for found, expected in zip(heard[:2], heard[2:], strict=True):
        close(found, expected)
    assert norms_run(optimized, x) == 0


@torch.no_grad()
def test_item_22_a_module_that_is_used_twice() -> None:
    stage = nn.Sequential(layers.MBConv(8, 8), layers.MBConv(8, 8))
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(stage, stage), stage, stage[0]), 16)
    assert_same(model, torch.randn(2, 3, 16, 16))
    network = small()
    last = network.blocks[-1][-1]
    network.blocks.append(nn.Sequential(nn.Conv2d(last.bn3.num_features, 8, 1), stage, stage))
    network.conv_head = nn.Conv2d(8, network.conv_head.out_channels, 1)
    assert_same(network.eval(), images())


@torch.no_grad()
def test_item_23_somebody_else_calls_the_parts(network: nn.Module) -> None:
    """Early fusion of depth: something is added between a network's first convolution and its normalisation."""

    def run(net: nn.Module, x: Tensor, depth: Tensor) -> Tensor:
        conv, norm = stages(net.body)
        return norm(conv(x) + net.depth(depth)).relu().mean((2, 3)) + net.body(x).mean()

    depth = nn.Conv2d(1, 32, 3, 2, 1)
    optimized = assert_same(Wrapper(network, run, depth=depth), images(), torch.randn(2, 1, SIZE, SIZE))
    assert norms_run(optimized.body, images()) == 0


@torch.no_grad()
@pytest.mark.parametrize("later", [False, True])
def test_item_23_a_method_that_is_patched(later: bool) -> None:
    def patch(net: nn.Module) -> None:
        def forward_features(self: nn.Module, x: Tensor) -> Tensor:
            h = self.bn1(self.conv_stem(x) * 2 + 1)
            return self.bn2(self.conv_head(self.blocks(h)) - 1)

        net.forward_features = forward_features.__get__(net)

    model, x = small(), images()
    if later:
        optimized = optimize_for_inference(model)
        optimized(x)
        patch(optimized)
        patch(model)
        close(optimized(x), model(x))
    else:
        patch(model)
        assert_same(model, x)


@torch.no_grad()
@pytest.mark.parametrize("later", [False, True])
def test_item_23_a_class_that_is_patched(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images()
    block = type(model.blocks[3][0])
    optimized = optimize_for_inference(model)
    optimized(x)
    stock, features = block.forward, type(model).forward_features
    if later:
        monkeypatch.setattr(block, "forward", lambda self, x: stock(self, x) * 2)

    def patched(self: nn.Module, x: Tensor) -> Tensor:
        return features(self, x) + self.bn1(self.conv_stem(x)).mean()

    monkeypatch.setattr(type(model), "forward_features", patched)
    if not later:
        optimized = optimize_for_inference(model)
    close(optimized(x), model(x))


class Quantized(nn.Module):
    """A layer with int8 weights and a scale."""

    def __init__(self, inputs: int, outputs: int, parameter: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8))
        scale = torch.rand(outputs, 1) / 1000
        if parameter:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * self.scale)


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_item_24_integer_weights(parameter: bool, dtype: torch.dtype) -> None:
    model = Wrapper(small(num_classes=0), lambda net, x: net.head(net.body(x)), head=Quantized(256, 9, parameter))
    assert_same(model, images(), dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_item_24_integer_images_give_the_models_dtype(dtype: torch.dtype) -> None:
    model = Wrapper(small(), lambda net, x: net.body(x.float() / 255))
    x = torch.randint(0, 255, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    found = optimize_for_inference(model, dtype=dtype)(x)
    assert found.dtype == torch.float32 and relative_difference(found, model(x)) < 0.2


@torch.no_grad()
def test_item_25_a_folded_layer_is_still_the_users(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    block = next(
        m
        for m in model.modules()
        if "block" in type(m).__name__.lower() or "MBConv" in type(m).__name__ or "Separable" in type(m).__name__
    )
    block.gain, block.tag = nn.Parameter(torch.ones(3)), "first"
    block.register_buffer("seen", torch.zeros(2))
    tags = []
    block.register_forward_hook(remember)
    optimized = optimize_for_inference(model)
    folded = dict(optimized.named_modules())[dict((m, n) for n, m in model.named_modules())[block]]
    optimized(images())
    assert (
        folded.tag == "first"
        and folded.gain.shape == (3,)
        and folded.seen.shape == (2,)
        and folded.heard == ["first"] * 1
    )
    assert isinstance(folded, type(block)) and tags == []


def remember(block: nn.Module, args: tuple, y: Tensor) -> None:
    block.__dict__.setdefault("heard", []).append(block.tag)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_item_25_arguments_have_their_names(dtype: torch.dtype | None) -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        h = net.body.blocks(input=net.body.bn1(x=net.body.conv_stem(input=x)))
        h = net.body.blocks[3][0](
            x=net.body.blocks[2](input=net.body.blocks[1](net.body.blocks[0](net.body.bn1(net.body.conv_stem(x)))))
        )
        return net.fc(input=h.mean((2, 3)))

    model = Wrapper(small(), run, fc=nn.Linear(48, 5))
    model.fc = nn.Linear(model.body.blocks[3][0].bn3.num_features, 5)
    assert_same(model.eval(), images(), dtype=dtype)
    block = optimize_for_inference(layers.MBConv(8, 8).eval(), dtype=dtype)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(block(x=x), block(x))


def test_item_27_a_refused_train_changes_nothing(network: nn.Module) -> None:
    model = Wrapper(network, lambda net, x: net.drop(net.body(x)), drop=nn.Dropout(0.5)).eval()
    optimized, x = optimize_for_inference(model), images()
    optimized.drop.train()
    before = [module.training for module in optimized.modules()]
    for module in (
        optimized,
        optimized.body,
        copy.deepcopy(optimized),
        pickle.loads(pickle.dumps(optimize_for_inference(network))),
    ):
        with pytest.raises(RuntimeError, match="cannot train"):
            module.train()
    assert [module.training for module in optimized.modules()] == before
    optimized.eval()
    assert torch.equal(optimized(x), optimized(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_item_27_pruned_and_weight_normed_layers(dtype: torch.dtype | None) -> None:
    model = small()
    prune.l1_unstructured(model.conv_stem, "weight", 0.4)
    prune.l1_unstructured(model.blocks[3][0].conv_pwl, "weight", 0.3)
    parametrizations.weight_norm(model.classifier)
    parametrizations.weight_norm(model.blocks[2][0].conv_exp)
    torch.nn.utils.weight_norm(model.conv_head)
    assert_same(model, images(), dtype=dtype)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda net: net.conv_head.weight.mul_(1.5),
    "data": lambda net: net.conv_head.weight.data.mul_(1.5),
    "data of a bias": lambda net: net.blocks[3][0].bn3.bias.data.add_(1),
    "other data": lambda net: setattr(net.conv_stem.weight, "data", net.conv_stem.weight * 1.5),
    "another parameter": lambda net: setattr(net.conv_stem, "weight", nn.Parameter(net.conv_stem.weight * 1.5)),
    "numpy": lambda net: net.classifier.weight.numpy().__imul__(1.5),
    "statistics": lambda net: net.bn1.running_mean.add_(1),
    "state dict": lambda net: net.load_state_dict(
        {k: v * 1.1 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    ),
    "assigned state dict": lambda net: net.load_state_dict(
        {k: v * 1.1 if v.is_floating_point() else v for k, v in net.state_dict().items()}, assign=True
    ),
    "eps": lambda net: setattr(net.bn1, "eps", 1.0),
    "stride": lambda net: setattr(net.conv_stem, "stride", (1, 1)),
    "dtype": lambda net: net.double().float(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRITES)
def test_weights_that_change_are_noticed(name: str) -> None:
    model, x = small().requires_grad_(False), images()
    optimized = optimize_for_inference(model)
    for _ in range(2):
        optimized(x)
        WRITES[name](optimized)
        WRITES[name](model)
        close(optimized(x), model(x))


@torch.no_grad()
def test_memory_that_somebody_keeps_is_read_anew() -> None:
    model, x = small().requires_grad_(False), images()
    optimized = optimize_for_inference(model)
    kept = [(net.conv_head.weight.data, net.classifier.weight.numpy()) for net in (optimized, model)]
    for _ in range(3):
        for weight, array in kept:
            weight.mul_(1.2)
            array *= 1.1
        close(optimized(x), model(x))


def test_gradients_of_weights_that_ask_for_them() -> None:
    model, x = small(), images()
    optimized = optimize_for_inference(model)
    optimized(x)
    for net in (optimized, model):
        net.requires_grad_(False)
        net.classifier.requires_grad_()
        net.conv_head.requires_grad_()
        net(x).square().mean().backward()
    for found, expected in zip(optimized.parameters(), model.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None:
            close(found.grad, expected.grad)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = small(), images()
        optimized = optimize_for_inference(model)
        close(optimized(x), model(x))
        optimized.classifier.weight.mul_(2)
        model.classifier.weight.mul_(2)
        close(optimized(x), model(x))


def test_compiles_after_a_call() -> None:
    model, x = small(), images()
    optimized = optimize_for_inference(model)
    with torch.no_grad():
        expected = optimized(x)
        torch._dynamo.reset()
        found = torch.compile(optimized, backend="aot_eager", fullgraph=True)(x)
    close(found, expected)


def test_exports_and_traces(network: nn.Module) -> None:
    optimized, x = optimize_for_inference(network), images()
    with torch.no_grad():
        expected = optimized(x)
        close(torch.export.export(optimized, (x,)).module()(x), expected)
        close(torch.jit.trace(optimized, x, check_trace=False)(x), expected)


def _stem(activation: nn.Module) -> nn.Sequential:
    first = (nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), activation)
    return nn.Sequential(*first, nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1)).eval()


SETTINGS: dict[str, Callable[[nn.Sequential], object]] = {
    "one number": lambda net: setattr(net[0], "stride", 1),
    "a list": lambda net: setattr(net[0], "stride", [2, 2]),
    "NumPy's": lambda net: setattr(net[0], "dilation", np.int64(2)),
    "of an activation": lambda net: setattr(net[2], "max_val", 0.5),
    "of a pool": lambda net: setattr(net[5], "output_size", [1, 1]),
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_item_26_settings_in_any_form(setting: str, later: bool) -> None:
    """Written before the copy is made, or to model and copy afterwards."""
    model, x = _stem(nn.ReLU6()), torch.randn(2, 3, 20, 20)
    if not later:
        SETTINGS[setting](model)
    fast = effnet_ops.optimize_for_inference(model)
    if later:
        fast(x)
        SETTINGS[setting](model)
        SETTINGS[setting](fast)
    assert relative_difference(fast(x).detach(), model(x).detach()) < 1e-6


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_item_21_patched_class_of_a_block(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = timm.create_model("efficientnet_b0").eval(), torch.randn(2, 3, 64, 64)
    block = type(model.blocks[1][1])
    forward = block.forward
    fast = effnet_ops.optimize_for_inference(model) if later else None
    if later:
        fast(x)
    monkeypatch.setattr(block, "forward", lambda self, x: 1.5 * forward(self, x))
    fast = fast or effnet_ops.optimize_for_inference(model)
    assert relative_difference(fast(x).detach(), model(x).detach()) < 1e-5


VIEW_WRITES: dict[str, Callable[[nn.Module], object]] = {
    "detach().numpy()": lambda net: np.multiply(w := net.conv_head.weight.detach().numpy(), 0.5, out=w),
    "state_dict()": lambda net: net.state_dict()["conv_head.weight"].data.mul_(0.5),
    "view().data": lambda net: net.conv_head.weight.view(-1).data.mul_(0.5),
    "[..].data": lambda net: net.conv_head.weight[:100].data.zero_(),
    "BatchNorm's": lambda net: np.multiply(w := net.bn2.weight.detach().numpy(), 0.5, out=w),
}


@pytest.mark.parametrize("write", VIEW_WRITES)
def test_weights_that_change_through_a_view_are_noticed(write: str) -> None:
    model, x = timm.create_model("efficientnet_b0").eval(), images()
    fast = optimize_for_inference(model)
    before = fast(x)
    for net in (model, fast):
        with torch.no_grad():
            VIEW_WRITES[write](net)
    assert relative_difference(fast(x).detach(), model(x).detach()) < 1e-5
    assert relative_difference(fast(x).detach(), before.detach()) > 1e-3


def test_reading_weights_costs_one_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed is not packed again at the next calls, unless somebody asks for the weights."""
    fast, x = optimize_for_inference(timm.create_model("efficientnet_b0").eval()), images()
    made: list[object] = []
    pack = folding.packing.pack
    monkeypatch.setattr(folding.packing, "pack", lambda rows: made.append(rows) or pack(rows))
    with torch.no_grad():
        fast(x)
        assert made
        for asked in (False, True, False):
            made.clear()
            if asked:
                fast.conv_head.weight.detach()
            fast(x)
            assert bool(made) is asked
            made.clear()
            fast(x)
            assert not made


def test_global_hooks_see_every_layer() -> None:
    model = timm.create_model("efficientnet_b0").eval()
    fast, x, names = optimize_for_inference(model), images(), []
    fast(x)
    with register_module_forward_hook(lambda module, args, y: 0.9 * y if isinstance(module, nn.BatchNorm2d) else None):
        assert relative_difference(fast(x).detach(), model(x).detach()) < 1e-5
    with register_module_forward_hook(lambda module, args, y: names.append(isinstance(module, nn.BatchNorm2d))):
        fast(x)
    assert sum(names) == 49
    assert relative_difference(fast(x).detach(), model(x).detach()) < 1e-5


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_drop_path_that_is_switched_to_training(library: str) -> None:
    if library == "timm":
        model = timm.create_model("efficientnet_b0", drop_path_rate=0.5).eval()
    else:
        model = torchvision.models.efficientnet_b0(stochastic_depth_prob=0.5).eval()
    fast, x = optimize_for_inference(model), images()
    fast(x)
    for module in fast.modules():
        if type(module).__name__.removeprefix("Folded") in ("DropPath", "StochasticDepth"):
            module.train()
    assert not torch.equal(fast(x), fast(x))


def test_saved_copy_runs_in_a_new_process(network: nn.Module, tmp_path: Path) -> None:
    fast, x = optimize_for_inference(network), images()
    torch.save({"copy": fast, "x": x, "y": fast(x).detach()}, tmp_path / "copy.pt")
    program = (
        "import sys, torch, effnet_ops\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.allclose(saved['copy'](saved['x']), saved['y'], rtol=1e-4, atol=1e-4)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "copy.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("build", [torchvision.models.efficientnet_b0, torchvision.models.resnet18])
def test_fx_takes_folded_layers_for_leaves(build: Callable[[], nn.Module]) -> None:
    model, x = build().eval(), images()
    traced = torch.fx.symbolic_trace(optimize_for_inference(model))
    assert relative_difference(traced(x).detach(), model(x).detach()) < 1e-5


def tiny() -> nn.Module:
    """A network of nothing but MBConv blocks."""
    return with_statistics(timm.create_model("tinynet_e"), SIZE)


def whole(optimized: nn.Module) -> list[int]:
    """How many kernels each prepared call of the whole network runs."""
    kept = optimized.__dict__[folded._WHOLE][0]
    return [] if kept is None or kept.value is None else [len(call) for call in kept.value.calls._calls.values()]


@torch.no_grad()
def test_a_network_is_one_call(network: nn.Module) -> None:
    """From the first convolution to the classifier, in both layouts: 16 blocks, stem, head, pool, classifier.

    That of efficientnet_pytorch has one swish for all, which it runs by itself.
    """
    optimized, x = optimize_for_inference(network), images()
    for given in (x, x.contiguous(memory_format=torch.channels_last), -x):
        expected = network(given)
        for _ in range(3):
            close(optimized(given), expected)
    assert whole(optimized) == ([] if isinstance(network, efficientnet_pytorch.EfficientNet) else [20, 20])


class Noisy(nn.Module):
    """A layer of somebody's, which does something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_a_network_with_a_layer_of_somebody_is_not_one_call(called: bool) -> None:
    model, x = tiny(), images()
    optimized = optimize_for_inference(model)
    if called:
        optimized(x), optimized(x)
        assert len(whole(optimized)) == 1
    for net in (model, optimized):
        net.global_pool = nn.Sequential(net.global_pool, Noisy())
    for _ in range(4):
        close(optimized(x), model(x))
    assert whole(optimized) == []


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.reset_classifier(7),
        lambda net: net.classifier.bias.add_(1),
        lambda net: net.blocks[0][0].bn1.running_mean.add_(1),
        lambda net: setattr(net.blocks[0][0].bn1, "eps", 0.5),
        lambda net: setattr(net, "forward_head", lambda x, pre_logits=False: x.mean((2, 3))),
        lambda net: setattr(net, "classifier", nn.Identity()),
        lambda net: net.classifier.register_forward_hook(lambda module, args, y: y + 1),
        lambda net: setattr(net.global_pool.pool, "output_size", 2),
    ],
)
def test_what_changes_in_a_network_of_one_call_is_noticed(change: Callable[[nn.Module], Any]) -> None:
    model, x = tiny(), images()
    optimized = optimize_for_inference(model)
    for _ in range(2):
        optimized(x)
    assert len(whole(optimized)) == 1
    for net in (model, optimized):
        torch.manual_seed(3)
        change(net)
        net.eval()
    if model.global_pool.pool.output_size == 2:
        with pytest.raises(RuntimeError):
            model(x)
        with pytest.raises(RuntimeError):
            optimized(x)
        return
    for _ in range(3):
        close(optimized(x), model(x))


@torch.no_grad()
def test_maps_of_a_network_inside_another_keep_its_layout() -> None:
    """A prepared call gives what the container around it expects."""
    model = nn.Sequential(timm.create_model("test_efficientnet", num_classes=0, global_pool="").eval(), nn.Identity())
    optimized, x = optimize_for_inference(model), images()
    for _ in range(3):
        y = optimized(x)
        close(y, model(x))
        assert y.stride() == model(x).stride()


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.Mish, nn.LeakyReLU, nn.GELU, nn.Hardtanh])
@pytest.mark.parametrize("inplace", [False, True])
def test_another_activation_runs_at_each_call(activation: type[nn.Module], inplace: bool) -> None:
    """Also one that writes in place between two kernels, which changes no address."""
    model, x = tiny(), images()
    settings = {} if activation is nn.GELU else {"inplace": inplace}
    model.bn2.act = activation(**settings)
    optimized = optimize_for_inference(model)
    for given in (x, -x, x):
        close(optimized(given), model(given))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_another_dtype_is_one_call(dtype: torch.dtype) -> None:
    """Hooks cast what goes in and what comes out."""
    model, x = tiny(), images()
    optimized = optimize_for_inference(model, dtype=dtype)
    results = [optimized(x) for _ in range(4)]
    assert len(whole(optimized)) == 1
    for y in results:
        assert y.dtype is torch.float32
        close(y, results[0], 1e-5 if dtype is torch.float64 else 2e-2)
    close(results[0], model(x), 1e-4 if dtype is torch.float64 else 0.2)
    half = optimized(x.to(dtype))
    assert half.dtype is dtype and len(whole(optimized)) == 1
    with pytest.raises(TypeError, match="floating-point"):
        optimized(torch.ones(2, 3, SIZE, SIZE, dtype=torch.uint8))


@torch.no_grad()
def test_integer_images_that_the_network_itself_converts() -> None:
    model = torchvision.models.mobilenet_v3_small()
    model.features[0] = nn.Sequential(v2.ToDtype(torch.float32, scale=True), model.features[0])
    model.eval()
    optimized, x = optimize_for_inference(model, dtype=torch.bfloat16), torch.randint(0, 256, (2, 3, SIZE, SIZE)).byte()
    for _ in range(4):
        close(optimized(x), model(x), 0.2)
