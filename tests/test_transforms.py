"""torch.func, second derivatives and traces: functions, own layers, own models and replaced ones do what stock ones do.

The numbers in the names are those of issue 15.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import relative_difference, with_statistics
from surgery_models import BLOCKS, CHANNELS
from torch import Tensor, fx, nn
from torch.autograd.functional import hessian as hessian_by_backward
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, stack_module_state, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import effnet_ops
from effnet_ops import layers, replace_layers
from effnet_ops.models import ArchitectureSpec, ScaledSpec, StageSpec

STAGES = (StageSpec(1, 3, 1, 1, 8), StageSpec(2, 5, 2, 4, 16))
SPEC = ScaledSpec(ArchitectureSpec(STAGES, stem_channels=8, head_channels=16))


class Functions(nn.Module):
    """The four public functions one after the other, as somebody's own module calls them."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"depthwise": (CHANNELS, 1, 3, 3), "bias": (CHANNELS,), "pointwise": (6, CHANNELS, 1, 1)}
        shapes |= {"reduce": (3, 6, 1, 1), "excite": (6, 3, 1, 1), "inner": (6, 1, 3, 3), "project": (6, 6, 1, 1)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))

    def forward(self, x: Tensor) -> Tensor:
        h = effnet_ops.depthwise_conv2d(x, self.depthwise, self.bias, stride=2, padding="same", activation="silu")
        h = effnet_ops.pointwise_conv2d(h, self.pointwise, activation="silu")
        h = effnet_ops.squeeze_excite(h, self.reduce, None, self.excite, None)
        groups = (None, effnet_ops.ConvNormParams(self.inner), None, effnet_ops.ConvNormParams(self.project))
        return effnet_ops.mbconv(h, *groups, stride=1, padding=1, residual=True, training=False)


class ByReference(nn.Module):
    """The same module in plain PyTorch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)

    @effnet_ops.use_backend("reference")
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def own_model(**keywords: object) -> nn.Module:
    settings = {"num_classes": 3, "drop_rate": 0.0, "drop_path_rate": 0.0, **keywords}
    return with_statistics(effnet_ops.create_model(SPEC, **settings), 32)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "functions": Functions,
    "DepthwiseConv2d": lambda: layers.DepthwiseConv2d(CHANNELS, 3, 2, "same", activation="silu"),
    "PaddedConv2d": lambda: layers.PaddedConv2d(CHANNELS, 4, 3, 2, "same"),
    "ConvNormAct": lambda: layers.ConvNormAct(CHANNELS, 6, 1),
    "SqueezeExcite": lambda: layers.SqueezeExcite(CHANNELS, 4),
    "MBConv": lambda: layers.MBConv(CHANNELS, CHANNELS),
    "own model": own_model,
    **{f"replaced {name}": BLOCKS[name] for name in ("timm", "torchvision", "geffnet")},
    "replaced efficientnet_pytorch": lambda: without_own_gradients(BLOCKS["efficientnet_pytorch"]()),
}


def without_own_gradients(block: nn.Module) -> nn.Module:
    """The library's own Swish is an autograd function, which torch.func does not take."""
    block.set_swish(memory_efficient=False)
    return block


def subject(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module in fp64 and evaluation mode, the same in plain PyTorch, and an input."""
    module = MODULES[name]().double().eval()
    channels = 3 if name == "own model" else CHANNELS
    x = torch.randn(3, channels, *((16, 16) if name == "own model" else (6, 5)), dtype=torch.float64)
    plain = copy.deepcopy(module) if name.startswith("replaced") else ByReference(module)
    if name.startswith("replaced"):
        assert replace_layers(module).replaced == [""]
    return module, plain, x


@pytest.mark.parametrize("name", MODULES)
def test_item_11_per_sample_gradients(name: str) -> None:
    module, plain, x = subject(name)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(module, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))({k: p.detach() for k, p in module.named_parameters()}, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(plain(image[None]).square().sum(), list(plain.parameters()))
        for (key, values), value in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(values[i], value, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MODULES)
def test_item_11_jacobian_and_hessian(name: str) -> None:
    module, plain, x = subject(name)
    x = x[:1, :, :3, :3]
    torch.testing.assert_close(jacfwd(module)(x), jacobian(plain, x), rtol=1e-8, atol=1e-10)
    expected = hessian_by_backward(lambda x: plain(x).square().sum(), x)
    torch.testing.assert_close(hessian(lambda x: module(x).square().sum())(x), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(vmap(lambda x: module(x[None])[0])(x), plain(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["MBConv", "own model", "replaced timm"])
def test_item_11_ensemble(name: str, training: bool) -> None:
    modules = [subject(name)[0].train(training) for _ in range(2)]
    x = subject(name)[2]
    parameters, buffers = stack_module_state(modules)
    template = copy.deepcopy(modules[0]).to("meta")
    found = vmap(lambda p, b, x: functional_call(template, (p, b), (x,)), in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(found, torch.stack([module(x) for module in modules]))
    for key, values in buffers.items():
        torch.testing.assert_close(values, torch.stack([module.get_buffer(key) for module in modules]), msg=key)


def test_item_11_drop_path_is_drawn_for_each_sample() -> None:
    block = layers.MBConv(CHANNELS, CHANNELS, drop_path_rate=0.5).train()
    torch.func.replace_all_batch_norm_modules_(block)
    x = torch.randn(1, CHANNELS, 6, 5).expand(64, 2, CHANNELS, 6, 5)
    kept = (vmap(block, randomness="different")(x) - x).abs().amax((2, 3, 4)) > 0
    assert 0.25 < kept.double().mean() < 0.75
    kept = (vmap(block, randomness="same")(x) - x).abs().amax((2, 3, 4)) > 0
    assert (kept == kept[0]).all()


@pytest.mark.parametrize("name", ["functions", "MBConv"])
def test_item_11_compiled(name: str) -> None:
    module, _, x = subject(name)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(module, parameters, (image[None],)).square().sum()

    transformed = vmap(grad(loss), in_dims=(None, 0))
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    torch._dynamo.reset()
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(parameters, x)
    for key, value in transformed(parameters, x).items():
        torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_item_12_gradient_penalty(name: str, training: bool) -> None:
    """Second derivatives by backward, of parameters and input, as a critic or a Hessian-vector product needs them."""
    module, plain, x = subject(name)
    penalties, gradients = [], []
    for m in (module.train(training), plain.train(training)):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        penalty = first.square().sum()
        penalties.append(penalty.detach())
        gradients.append(torch.autograd.grad(penalty, [leaf, *m.parameters()], allow_unused=True))
    torch.testing.assert_close(*penalties)
    scale = max(g.abs().max() for g in gradients[1] if g is not None)
    for found, expected in zip(*gradients, strict=True):
        expected = torch.zeros(()) if expected is None else expected
        assert ((torch.zeros(()) if found is None else found) - expected).abs().max() <= 1e-9 * scale


def test_item_12_first_gradient_stays_the_fused_one() -> None:
    block, x = layers.MBConv(CHANNELS, CHANNELS).train(), torch.randn(2, CHANNELS, 6, 5)
    wanted = list(block.parameters())
    (fused, graph) = (torch.autograd.grad(block(x).sum(), wanted, create_graph=c) for c in (False, True))
    assert all(map(torch.equal, fused, graph))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_item_13_trace(name: str, gradients: bool) -> None:
    """With the check that torch.jit.trace makes by default, in no_grad; and for another batch."""
    module, plain, x = subject(name)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(module, x)
    larger = torch.cat([x, x + 1])
    torch.testing.assert_close(traced(larger), plain(larger))
    torch.testing.assert_close(*(jacobian(m, x[:1]) for m in (traced, plain)), rtol=1e-8, atol=1e-10)


def nodes(graph: fx.GraphModule, kind: str) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == kind]


@pytest.mark.parametrize("name", [name for name in MODULES if "efficientnet_pytorch" not in name])
def test_item_14_symbolic_trace(name: str) -> None:
    module, plain, x = subject(name)
    graph = fx.symbolic_trace(module)
    torch.testing.assert_close(graph(x), plain(x))
    model = nn.Sequential(nn.Identity(), module)
    graph = fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), plain(x))
    if type(module).__module__ == "effnet_ops.layers":
        assert nodes(graph, "call_module") == ["0", "1"] and nodes(graph, "call_function") == []


class Doubled(layers.MBConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Named(layers.MBConv):
    """A class of somebody's own that computes nothing else."""


def patched_on_the_instance(block: nn.Module) -> nn.Module:
    forward = block.forward
    block.forward = lambda x: forward(x) * 2
    return block


def hooked(block: nn.Module) -> nn.Module:
    block.register_forward_hook(lambda module, args, y: y * 2)
    block.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return block


@pytest.mark.parametrize(
    ("build", "leaf"),
    [
        (lambda: Named(CHANNELS, CHANNELS), True),
        (lambda: Doubled(CHANNELS, CHANNELS), False),
        (lambda: patched_on_the_instance(layers.MBConv(CHANNELS, CHANNELS)), False),
        (lambda: hooked(layers.MBConv(CHANNELS, CHANNELS)), False),
        (lambda: hooked(layers.SqueezeExcite(CHANNELS, 4)), False),
        (lambda: hooked(layers.DepthwiseConv2d(CHANNELS, 3, 2, "same")), False),
        (lambda: hooked(layers.PaddedConv2d(CHANNELS, 4, 3, 2, "same")), False),
    ],
)
def test_item_14_what_surrounds_a_layer_runs_once(build: Callable[[], nn.Module], leaf: bool) -> None:
    model = nn.Sequential(build()).double().eval()
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)
    graph = fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    assert (nodes(graph, "call_module") == ["0"]) is leaf


def test_item_14_functions_are_nodes() -> None:
    graph = fx.symbolic_trace(Functions())
    functions = [effnet_ops.depthwise_conv2d, effnet_ops.pointwise_conv2d, effnet_ops.squeeze_excite, effnet_ops.mbconv]
    assert [target for target in nodes(graph, "call_function") if target in functions] == functions


def test_item_14_graph_of_an_own_model_trains() -> None:
    model = own_model(drop_path_rate=0.2).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    graph = fx.symbolic_trace(model.train())
    assert [name for name in nodes(graph, "call_module") if name.count(".") == 2] == [
        "blocks.0.0",
        "blocks.1.0",
        "blocks.1.1",
    ]
    found = []
    for m in (copy.deepcopy(graph), copy.deepcopy(model)):
        torch.manual_seed(0)
        m(x).square().sum().backward()
        found.append({**{k: p.grad for k, p in m.named_parameters()}, **dict(m.named_buffers())})
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, msg=lambda m, key=key: f"{key}: {m}")


def test_item_14_feature_extractor() -> None:
    model = own_model().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names = ["conv_stem", "blocks.0", "blocks.1.0", "conv_head", "bn2", "classifier"]
    seen: dict[str, Tensor] = {}
    twin = copy.deepcopy(model)
    for name in names:
        twin.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: seen.update({name: y}))
    twin(x)
    extractor = create_feature_extractor(model, names)
    found = extractor(x)
    assert list(found) == names
    for name in names:
        assert relative_difference(found[name], seen[name]) < 1e-12
    found["conv_head"].sum().backward()
    assert extractor.get_parameter("blocks.0.0.conv_dw.weight").grad is not None
    features = create_feature_extractor(effnet_ops.create_model(SPEC, features_only=True).double(), ["blocks.1"])
    assert features(x)["blocks.1"].shape == (2, 16, 8, 8)
