"""replace_layers on whole networks: the measure is the stock fp32 model's own error against the same model in fp64.

The stock model's own error is the worse one of its two memory formats. In fp32, single elements come to lie on another
side of an activation's corner, in ours and in stock's alike, and gradients jump: there two of three draws of weights
and images decide, and a gradient may be 15 % off. In fp64 a step that is left out or done twice cannot hide behind
rounding, so each draw has to be right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import efficientnet_pytorch
import geffnet
import pytest
import timm
import torch
import torchvision
from networks import photographs, timm_lite0, with_statistics
from torch import Tensor, nn

import effnet_ops
from effnet_ops import replace_layers, restore_layers

SIZE = 64
# Statistics of fewer pixels are so far from those of another batch that evaluation amplifies rounding a thousand times.
STATISTICS_SIZE = 160

NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "timm efficientnet_b0": (16, lambda: timm.create_model("efficientnet_b0")),
    "timm tf_efficientnet_b0": (16, lambda: timm.create_model("tf_efficientnet_b0")),
    "torchvision efficientnet_b0": (16, lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0)),
    "efficientnet_pytorch efficientnet-b0": (16, lambda: lukemelas("efficientnet-b0")),
    "geffnet efficientnet_b0": (16, lambda: geffnet.create_model("efficientnet_b0")),
    "timm efficientnet_b3": (26, lambda: timm.create_model("efficientnet_b3")),
    "torchvision efficientnet_b3": (26, lambda: torchvision.models.efficientnet_b3(stochastic_depth_prob=0.0)),
    "efficientnet_pytorch efficientnet-b3": (26, lambda: lukemelas("efficientnet-b3")),
    "timm tf_efficientnet_lite0": (16, lambda: timm.create_model("tf_efficientnet_lite0")),
    "timm mobilenetv3_small_050": (11, lambda: timm.create_model("mobilenetv3_small_050")),
    "torchvision mobilenet_v2": (17, torchvision.models.mobilenet_v2),
    "torchvision mobilenet_v3_small": (11, torchvision.models.mobilenet_v3_small),
    "geffnet efficientnet_lite0": (16, lambda: geffnet.create_model("efficientnet_lite0")),
}
CORNERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid)
DRAWS = 3


def lukemelas(name: str) -> nn.Module:
    return efficientnet_pytorch.EfficientNet.from_name(name, drop_connect_rate=0.0)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Step(NamedTuple):
    """What a model makes of one batch: outputs and gradients in both modes, and the buffers after a training step."""

    evaluation: Tensor
    evaluation_gradients: dict[str, Tensor]
    training: Tensor
    training_gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(model: nn.Module, x: Tensor, grad: Tensor) -> Step:
    found: list[Tensor | dict[str, Tensor]] = []
    for training in (False, True):
        model.train(training).zero_grad(set_to_none=True)
        y = model(x)
        y.backward(grad)
        found += [y.detach().double(), {name: p.grad.double() for name, p in model.named_parameters()}]
    return Step(*found, {name: buffer.double() for name, buffer in model.named_buffers()})


def stock_steps(stock: nn.Module, x: Tensor, grad: Tensor) -> list[Step]:
    """In both memory formats: the worst parameter of one run alone is a matter of luck."""
    twin = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    return [step(stock, x, grad), step(twin, x.to(memory_format=torch.channels_last), grad)]


def output_error(y: Tensor, exact: Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def gradient_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The worst parameter's, against its own norm, or a hundredth of the typical one where that vanishes."""
    floor = 1e-2 * torch.stack([g.norm() for g in exact.values()]).median()
    return max(((gradients[name] - g).norm() / g.norm().clamp_min(floor)).item() for name, g in exact.items())


def errors(found: Step, exact: Step) -> dict[str, float]:
    return {
        "evaluation": output_error(found.evaluation, exact.evaluation),
        "training": output_error(found.training, exact.training),
        "gradients in evaluation": gradient_error(found.evaluation_gradients, exact.evaluation_gradients),
        "gradients in training": gradient_error(found.training_gradients, exact.training_gradients),
    }


def has_corners(model: nn.Module) -> bool:
    return any(isinstance(module, CORNERS) for module in model.modules())


def assert_equal_in_fp64(exact: nn.Module, truth: Step, allowed: dict[str, float], x: Tensor, grad: Tensor) -> None:
    """The replaced model in fp64 against the stock one, whose errors in fp32 are ``allowed``."""
    replace_layers(exact)
    # The gradient of PyTorch's hard sigmoid has a sixth in single precision, in fp64, too.
    single = 1e-6 if any("ardsigmoid" in type(module).__name__.lower() for module in exact.modules()) else 0.0
    for key, error in errors(step(exact, x, grad), truth).items():
        assert error < 1e-9 + 1e-7 * allowed[key] + single, (key, error)


def draw(name: str) -> str:
    """Why one draw of weights, statistics and images has a larger error in fp32 than it may have, or ""."""
    blocks, build = NETWORKS[name]
    model = without_dropout(with_statistics(build(), STATISTICS_SIZE))
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    twin, keys = copy.deepcopy(exact), list(model.state_dict())
    report = replace_layers(model)
    assert (len(report.replaced), report.skipped) == (blocks, {})
    assert set(report.kinds.values()) == {"block"}
    assert str(report) == f"{blocks} of {blocks} MBConv blocks replaced"
    assert list(model.state_dict()) == keys

    x, grad = torch.randn(4, 3, SIZE, SIZE), torch.randn(4, 1000)
    truth = step(exact, x.double(), grad.double())
    ours, theirs = step(model, x, grad), stock_steps(stock, x, grad)
    mine, pairs = errors(ours, truth), [errors(found, truth) for found in theirs]
    allowed = {key: max(found[key] for found in pairs) for key in mine}
    assert_equal_in_fp64(twin, truth, allowed, x.double(), grad.double())
    for key, buffer in truth.buffers.items():
        bound = 2 * max(output_error(found.buffers[key], buffer) for found in theirs) + 1e-6
        assert output_error(ours.buffers[key], buffer) <= bound, key

    restore_layers(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model.eval()(x), stock.eval()(x))

    def bound(key: str) -> float:
        # Below the tolerance of a single operator there is nothing that a network has amplified.
        gradients = key.startswith("gradients")
        jump = 0.15 if gradients and has_corners(stock) else 0.0
        return max(2e-5 if gradients else 2e-6, 2 * allowed[key], jump)

    over = [f"{key}: {error:.1e}, stock {allowed[key]:.1e}" for key, error in mine.items() if error > bound(key)]
    return ", ".join(over)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("b3") else []) for name in NETWORKS]
)
def test_error_is_at_most_twice_the_stock_models(name: str) -> None:
    problems = [draw(name)]
    if has_corners(NETWORKS[name][1]()):
        while problems[0] and len(problems) < DRAWS:
            problems.append(draw(name))
    assert sum(map(bool, problems)) <= len(problems) / 2, problems


class SavedBytes:
    """Counts what autograd keeps for the backward pass: storages once each, those of parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        self._excluded = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self._storages[storage.data_ptr()] = storage
        return tensor

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    counter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return counter.total()


@pytest.mark.skipif(bool(effnet_ops.available_backends()["cpu"]), reason="the reference keeps what PyTorch keeps")
def test_training_keeps_few_activations() -> None:
    model = timm.create_model("efficientnet_b0").train()
    x = torch.randn(2, 3, 224, 224)
    eager = saved_bytes(model, x)
    replace_layers(model)
    with effnet_ops.set_recompute("always"):
        recomputed = saved_bytes(model, x)
    with effnet_ops.set_recompute("never"):
        kept = saved_bytes(model, x)
    assert recomputed <= 0.6 * eager
    assert recomputed < kept < eager
    assert recomputed <= saved_bytes(model, x) <= kept


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    return timm_lite0()


@torch.no_grad()
def test_real_weights_on_real_photographs(lite0: nn.Module) -> None:
    model, x = copy.deepcopy(lite0), photographs()
    before = lite0(x)
    labels = torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    found = [labels[i] for i in before.argmax(1)]
    assert {"tiger cat", "espresso", "tripod", "missile", "palace", "daisy"} <= set(found), found
    assert len(replace_layers(model).replaced) == 16
    for images in (x, x.to(memory_format=torch.channels_last)):
        assert (model(images) - before).abs().max() < 1e-4
    restore_layers(model)
    assert torch.equal(model(x), before)


def test_hooked_features_of_timm() -> None:
    settings = {"features_only": True, "feature_location": "expansion", "out_indices": (1, 2, 3)}
    model = timm.create_model("efficientnet_b0", **settings).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        before = model(x)
        report = replace_layers(model)
        features = model(x)
    kinds = [report.kinds[name] for name in report.replaced]
    assert 0 < kinds.count("block") < 16
    assert all("hook" in reason for reason in report.skipped.values())
    assert [f.shape for f in features] == [f.shape for f in before]
    for feature, expected in zip(features, before, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-3)
    block = model.blocks[2][0]
    assert block.feature_info("expansion") == {"module": "conv_pwl", "hook_type": "forward_pre", "num_chs": 144}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_checkpointing_updates_statistics_once(memory_format: torch.memory_format) -> None:
    model = timm.create_model("efficientnet_b0", drop_path_rate=0.2).train().to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, SIZE, SIZE).to(memory_format=memory_format)
    replace_layers(model), replace_layers(twin)
    model.set_grad_checkpointing()
    for m in (model, twin):
        torch.manual_seed(0)
        m(x).square().mean().backward()
    assert model.blocks[3][1].bn2.num_batches_tracked == 1
    for (name, buffer), expected in zip(model.blocks.named_buffers(), twin.blocks.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    for (name, p), expected in zip(model.blocks.named_parameters(), twin.blocks.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_moving_average_of_a_replaced_model() -> None:
    model = timm.create_model("test_efficientnet").train()
    replace_layers(model)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(average.module.state_dict())
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    average.update(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average.module.state_dict()[name], (before[name] + value) / 2)
    restored = copy.deepcopy(average.module)
    restore_layers(restored)
    assert not any("effnet_ops" in type(m).__module__ for m in restored.modules())
    assert any("effnet_ops" in type(m).__module__ for m in average.module.modules())


def test_compiled_network() -> None:
    model = with_statistics(timm.create_model("test_efficientnet"), SIZE)
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        before = model(x)
        replace_layers(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(dtype: torch.dtype) -> None:
    model = with_statistics(timm.create_model("efficientnet_b0"), SIZE)
    model.train()
    stock = copy.deepcopy(model)
    replace_layers(model)
    x = torch.randn(4, 3, SIZE, SIZE)
    losses = []
    for m in (model, stock):
        with torch.autocast("cpu", dtype):
            loss = m(x).float().square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "summary", "reasons"),
    [
        (
            lambda: timm.create_model("mixnet_s"),
            "1 of 11 MBConv blocks, 42 of 42 depthwise convolutions, 13 of 13 squeeze-and-excitation layers replaced",
            {"MixedConv2d"},
        ),
        (
            lambda: timm.create_model("efficientnet_b0_g8_gn"),
            "0 of 15 MBConv blocks, 16 of 16 squeeze-and-excitation layers replaced",
            {"groups"},
        ),
        (
            lambda: timm.create_model("efficientnet_blur_b0"),
            "12 of 16 MBConv blocks, 4 of 4 depthwise convolutions, 4 of 4 squeeze-and-excitation layers replaced",
            {"BlurPool2d"},
        ),
        (lambda: timm.create_model("lcnet_050"), "13 of 13 MBConv blocks replaced", set()),
        (lambda: timm.create_model("tinynet_e"), "10 of 10 MBConv blocks replaced", set()),
        (lambda: timm.create_model("fbnetc_100"), "21 of 21 MBConv blocks replaced", set()),
        (
            lambda: timm.create_model("hgnetv2_b0"),
            "0 of 3 MBConv blocks, 12 of 12 depthwise convolutions replaced",
            {"calls cat"},
        ),
        (lambda: timm.create_model("tf_efficientnet_cc_b0_4e"), "MBConv blocks", {"CondConvResidual", "weights"}),
        (lambda: geffnet.create_model("mobilenetv3_large_100"), "15 of 15 MBConv blocks replaced", set()),
        (lambda: torchvision.models.efficientnet_v2_s(), "40 of 40 MBConv blocks replaced", set()),
        (lambda: timm.create_model("tf_efficientnetv2_b0"), "21 of 21 MBConv blocks replaced", set()),
        (lambda: torchvision.models.mobilenet_v2(), "17 of 17 MBConv blocks replaced", set()),
    ],
)
def test_what_is_replaced_in_relatives(build: Callable[[], nn.Module], summary: str, reasons: set[str]) -> None:
    with torch.device("meta"):
        model = build()
    report = replace_layers(model)
    assert summary in str(report).splitlines()[0]
    assert all(any(part in reason for part in reasons) for reason in report.skipped.values())
    assert bool(report.skipped) == bool(reasons)


def test_own_model_is_fused_already() -> None:
    model = effnet_ops.create_model("efficientnet_b0")
    types = [type(m) for m in model.modules()]
    report = replace_layers(model)
    assert report.replaced == []
    assert list(report.kinds.values()).count("block") == 16
    assert [type(m) for m in model.modules()] == types
