"""optimize_for_inference: the numbers against stock models, what stays of the given model, and how the copy behaves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import efficientnet_pytorch
import geffnet
import pytest
import timm
import torch
import torchvision
from networks import photographs, relative_difference, timm_lite0, with_statistics
from surgery_models import BLOCKS, CHANNELS
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_ops
from effnet_ops import layers, optimize_for_inference, reference, replace_layers
from effnet_ops.ops import packed
from effnet_ops.surgery import folding
from effnet_ops.surgery.folded import FoldedMBConv, FoldedPool, FoldedSequence

SIZE = 64
# As in test_surgery_networks: statistics of fewer pixels amplify rounding.
STATISTICS_SIZE = 160

NETWORKS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    "timm efficientnet_b0": (49, 16, lambda: timm.create_model("efficientnet_b0")),
    "timm tf_efficientnet_b0": (49, 16, lambda: timm.create_model("tf_efficientnet_b0")),
    "timm mobilenetv2_100": (52, 17, lambda: timm.create_model("mobilenetv2_100")),
    "torchvision efficientnet_b0": (49, 16, torchvision.models.efficientnet_b0),
    "efficientnet_pytorch": (49, 16, lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0")),
    "geffnet efficientnet_b0": (49, 16, lambda: geffnet.create_model("efficientnet_b0")),
    "ours, efficientnet_b0": (49, 16, lambda: effnet_ops.create_model("efficientnet_b0")),
    "ours, tf_efficientnet_lite0": (49, 16, lambda: effnet_ops.create_model("tf_efficientnet_lite0")),
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


class Seen(TorchDispatchMode):
    """Keeps the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def norms_run(model: nn.Module, *inputs: object) -> int:
    """The normalisations that a call of the model runs by themselves."""
    with Seen() as seen:
        model(*inputs)
    return sum("batch_norm" in name for name in seen.names)


def small() -> nn.Module:
    return with_statistics(timm.create_model("test_efficientnet"), SIZE)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_error_is_at_most_twice_the_stock_models(name: str) -> None:
    count, blocks, build = NETWORKS[name]
    model = with_statistics(build(), STATISTICS_SIZE)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, SIZE, SIZE)
    y = model(x)
    exact = copy.deepcopy(model).double()(x.double())

    optimized = optimize_for_inference(model)
    report = optimized.optimization_report
    assert (len(report.folded), len(report.blocks), report.left) == (count, blocks, {})
    assert str(report) == f"{count} batch normalisations folded, {blocks} MBConv blocks fused"
    assert norms_run(optimized, x) == 0
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    allowed = [relative_difference(y, exact)]
    allowed.append(relative_difference(twin(x.to(memory_format=torch.channels_last)), exact))
    for images in (x, x.to(memory_format=torch.channels_last)):
        assert relative_difference(optimized(images), exact) <= max(2e-6, 2 * max(allowed))

    # A stock model in bfloat16 rounds after each operation, the fused one less often; both amplify that alike.
    half = optimize_for_inference(model, dtype=torch.bfloat16)
    rounded = copy.deepcopy(model).bfloat16()(x.bfloat16())
    found = half(x)
    assert found.dtype == torch.float32
    assert relative_difference(found, exact) <= max(1e-2, 2 * relative_difference(rounded, exact))
    assert half(x.bfloat16()).dtype == torch.bfloat16

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), y)


@torch.inference_mode()
def test_real_weights_on_real_photographs() -> None:
    model, x = timm_lite0(), photographs()
    before = model(x)
    assert (optimize_for_inference(model)(x) - before).abs().max() < 1e-4
    half = optimize_for_inference(model, dtype=torch.bfloat16)(x)
    assert torch.equal(half.argmax(1), before.argmax(1))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    block, x = BLOCKS[name](), torch.randn(2, CHANNELS, 12, 12, dtype=torch.float64)
    optimized = optimize_for_inference(block)
    assert optimized.optimization_report.blocks == [""] and norms_run(optimized, x) == 0
    torch.testing.assert_close(optimized(x), block(x), rtol=1e-9, atol=1e-9)


def sequence() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.GELU()),
        *(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.Tanh()),
    )


RELATIVES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a sequence": (0, sequence),
    "ConvNormAct": (
        0,
        lambda: nn.Sequential(layers.ConvNormAct(3, 8, 3, 2, padding="same"), layers.ConvNormAct(8, 4, 1)),
    ),
    "timm blur": (0, lambda: timm.create_model("efficientnet_blur_b0")),
    "timm V2": (0, lambda: timm.create_model("test_efficientnet_gn", norm_layer=nn.BatchNorm2d)),
    "timm MobileNetV3": (0, lambda: timm.create_model("mobilenetv3_small_050")),
    "timm MixNet": (34, lambda: timm.create_model("mixnet_s")),
    "torchvision MobileNetV3": (0, torchvision.models.mobilenet_v3_small),
    "torchvision MNASNet": (0, torchvision.models.mnasnet0_5),
    "geffnet MobileNetV3": (0, lambda: geffnet.create_model("mobilenetv3_small_100")),
    "geffnet EdgeTPU": (0, lambda: geffnet.create_model("efficientnet_es")),
    "torchvision ResNet, but for its downsampling": (17, torchvision.models.resnet18),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_and_what_is_left_of_them(name: str) -> None:
    left, build = RELATIVES[name]
    model, x = with_statistics(build(), SIZE).double(), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    optimized = optimize_for_inference(model)
    report = optimized.optimization_report
    assert norms_run(optimized, x) == left
    assert len(report.folded) == norms(model) - left
    assert {
        n for n, m in model.named_modules() if isinstance(m, _BatchNorm)
    } <= report.left.keys() | report.folded.keys()
    assert relative_difference(optimized(x), model(x)) <= 1e-9
    half = optimize_for_inference(model, dtype=torch.bfloat16)(x)
    assert half.dtype == torch.float64 and half.isfinite().all()


def hook(module: nn.Module, *_: object) -> None:
    """A hook that changes nothing; copies find it by its name."""


def test_hooks_and_training_modes_of_the_given_model_stay() -> None:
    model = small()
    replace_layers(model)
    model.train()
    model.blocks[1].eval()
    model.conv_head.register_forward_hook(hook)
    model.blocks[2][0].register_forward_pre_hook(hook)
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    optimized = optimize_for_inference(model)
    assert [type(m) for m in model.modules()] == classes and [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == gradients and all(gradients)
    assert not any(m.training for m in optimized.modules()) and not any(p.requires_grad for p in optimized.parameters())
    assert list(optimized.conv_head._forward_hooks.values()) == [hook]
    assert list(optimized.blocks[2][0]._forward_pre_hooks.values()) == [hook]
    assert optimized.optimization_report.left == {"bn2": "conv_head has a forward hook"}
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(optimized(x), model.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_copies_pickles_and_moves(dtype: torch.dtype | None) -> None:
    optimized, x = optimize_for_inference(small(), dtype=dtype), torch.randn(2, 3, SIZE, SIZE)
    y = optimized(x)
    assert y.dtype == torch.float32
    stream = io.BytesIO()
    torch.save(optimized, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized)), saved):
        assert torch.equal(twin(x), y)
        assert str(twin.optimization_report) == str(optimized.optimization_report)
    twin = optimize_for_inference(small(), dtype=dtype)
    twin.load_state_dict(optimized.state_dict())
    assert torch.equal(twin(x), y)
    moved = copy.deepcopy(optimized).double()
    assert moved(x.double()).dtype == torch.float64
    elsewhere = copy.deepcopy(optimized).to("meta")
    assert elsewhere(x.to("meta")).shape == y.shape
    with effnet_ops.use_backend("reference"):
        assert relative_difference(optimized(x), y) < (1e-5 if dtype in (None, torch.float64) else 0.1)
    assert relative_difference(moved(x.double()), y) < (1e-4 if dtype in (None, torch.float64) else 0.2)
    assert optimized.to("meta")(x.to("meta")).shape == y.shape


def test_weights_are_packed_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they are as the functions take them; there and back again they are the same."""
    optimized, x = optimize_for_inference(small()), torch.randn(2, 3, SIZE, SIZE)
    moved, y, before = copy.deepcopy(optimized), optimized(x), optimized.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(folding, "_on_cpu", lambda weight: False)
        moved.to(torch.float32)
        values = [module.value() for module in moved.modules() if isinstance(module, FoldedMBConv)]
        mbconv = next(value for value in values if isinstance(value, folding.Block))
        fused = next(value for value in values if isinstance(value, folding.FusedBlock))
        assert mbconv._call.depthwise.weight.shape[:2] == (len(mbconv._call.depthwise.bias), 1)
        assert fused._call.expand.weight.shape[:2] == (len(fused._call.expand.bias), fused.channels)
        with effnet_ops.use_backend("reference"):
            assert relative_difference(moved(x), y) < 1e-5
    moved.to(torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in moved.state_dict().items())
    assert torch.equal(moved(x), y)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 1, 0, 0)])
def test_first_convolution_of_other_devices(padding: tuple[int, int, int, int]) -> None:
    x, weight, bias = torch.randn(2, 3, 9, 11), torch.randn(8, 3, 3, 3), torch.randn(8)
    expected = reference.convolution(x, weight, bias, (2, 2), padding, "silu")
    found = folding._library_convolution(x, weight, bias, (2, 2), padding, "silu")
    assert relative_difference(found, expected) < 1e-6 and found.is_contiguous(memory_format=torch.channels_last)
    half = folding._library_convolution(x.bfloat16(), weight, bias, (2, 2), padding, "silu")
    assert half.dtype == torch.bfloat16 and relative_difference(half, expected) < 2e-2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layout_of_parameters_does_not_matter(dtype: torch.dtype | None) -> None:
    optimized, x = optimize_for_inference(small(), dtype=dtype), torch.randn(2, 3, SIZE, SIZE)
    y = optimized(x)
    assert torch.equal(optimized.to(memory_format=torch.channels_last)(x), y)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.global_pool, "pool", nn.AdaptiveMaxPool2d(1)),
        lambda model: (
            setattr(model.global_pool, "flatten", nn.Flatten(2)),
            setattr(model, "classifier", nn.Identity()),
        ),
        lambda model: setattr(model.global_pool, "flatten", nn.Flatten(1, 3)),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_other_pools(change: Callable[[nn.Module], object], later: bool) -> None:
    """Before the copy is made, or in the copy after its first calls."""
    model, x = small(), torch.randn(2, 3, SIZE, SIZE)
    optimized = optimize_for_inference(model)
    if later:
        optimized(x), optimized(x)
        change(optimized)
        change(model)
    else:
        change(model)
        optimized = optimize_for_inference(model)
        optimized(x)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_class_of_a_block_that_changes_later() -> None:
    optimized, x = optimize_for_inference(small()), torch.randn(2, 3, SIZE, SIZE)
    y = optimized(x), optimized(x)

    block = next(module for module in optimized.modules() if isinstance(module, FoldedMBConv))
    cls = type(block)
    block.__class__ = type("Doubled", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})
    assert relative_difference(optimized(x), y[0]) > 1e-2


@torch.no_grad()
def test_views_and_tangents_of_an_input() -> None:
    """What is no plain memory is taken for what it means, after the first call too."""
    model, x = small(), torch.randn(2, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    optimized = optimize_for_inference(model)
    optimized(x), optimized(x)
    torch.testing.assert_close(optimized(torch._neg_view(x)), model(-x), rtol=1e-3, atol=1e-4)
    tangent = torch.randn_like(x)
    found, expected = (torch.func.jvp(network, (x,), (tangent,))[1] for network in (optimized, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", [None, [1.0], torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)], ids=str)
def test_input_must_be_floating_point(wrong: object) -> None:
    with pytest.raises(TypeError, match="x must be a tensor of floating-point numbers, got"):
        optimize_for_inference(small(), dtype=torch.bfloat16)(wrong)


def test_script_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile Folded"):
        torch.jit.script(optimize_for_inference(small()))


def test_methods_and_feature_maps_keep_working() -> None:
    model, x = small(), torch.randn(2, 3, SIZE, SIZE)
    optimized, half = optimize_for_inference(model), optimize_for_inference(model, dtype=torch.bfloat16)
    torch.testing.assert_close(optimized.forward_features(x), model.forward_features(x), rtol=1e-3, atol=1e-4)
    assert half.forward_features(x).dtype == torch.bfloat16
    for location, left in (("bottleneck", 0), ("expansion", 1)):
        settings = {"features_only": True, "feature_location": location}
        backbone = with_statistics(timm.create_model("test_efficientnet", **settings), SIZE)
        optimized = optimize_for_inference(backbone)
        assert (norms_run(optimized, x) > 0) == left
        for found, expected in zip(optimized(x), backbone(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    own = with_statistics(effnet_ops.create_model("efficientnet_b0", features_only=True), SIZE)
    half = optimize_for_inference(own, dtype=torch.bfloat16)
    assert norms_run(half, x) == 0 and {feature.dtype for feature in half(x)} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["test_efficientnet", "efficientnet_b0"])
def test_compiles_to_one_graph(name: str, dtype: torch.dtype | None) -> None:
    """Its quick sister is test_copies.py::test_compiles_after_a_call."""
    model = with_statistics(timm.create_model(name), SIZE)
    optimized, x = optimize_for_inference(model, dtype=dtype), torch.randn(1, 3, SIZE, SIZE)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
        found, expected = compiled(x), optimized(x)
    assert found.dtype == expected.dtype
    if dtype is None:
        assert relative_difference(found, expected) < 1e-4
    else:
        # The graph rounds its first layer elsewhere; the network makes of five elements a quarter of its output.
        exact = copy.deepcopy(model).double()(x.double())
        assert relative_difference(found, exact) < 2 * relative_difference(expected, exact)


def test_folded_fused_mbconv_unpacked() -> None:
    """What runs on a GPU: the public function on the folded weights, without those of the CPU's kernels."""
    optimized = optimize_for_inference(with_statistics(timm.create_model("efficientnet_es"), SIZE))
    made = [module.make() for module in optimized.modules() if isinstance(module, FoldedMBConv)]
    blocks = [block for block in made if isinstance(block, folding.FusedBlock)]
    assert len(blocks) == 7
    for block in blocks:
        x = torch.randn(2, block.channels, 9, 8)
        with torch.no_grad():
            assert relative_difference(block._run_plain(x), block(x)) < 1e-5


def later_hook(block: nn.Module, calls: list[str]) -> None:
    block.register_forward_hook(lambda *_: calls.append("hook"))


def later_forward(block: nn.Module, calls: list[str]) -> None:
    block.forward = lambda x: calls.append("forward") or type(block).forward(block, x)


LATER: dict[str, Callable[[nn.Module, nn.Module, list[str]], object]] = {
    "hook": lambda stage, block, calls: later_hook(block, calls),
    "pre hook on the stage": lambda stage, block, calls: stage.register_forward_pre_hook(
        lambda *_: calls.append("pre")
    ),
    "forward of an instance": lambda stage, block, calls: later_forward(block, calls),
    "another activation": lambda stage, block, calls: setattr(block.bn2, "act", nn.ReLU()),
    "no residual": lambda stage, block, calls: setattr(block, "has_skip", False),
    "another module": lambda stage, block, calls: setattr(stage, "1", nn.Identity()),
    "a block more": lambda stage, block, calls: stage.append(copy.deepcopy(block)),
    "new weights": lambda stage, block, calls: setattr(block.bn2, "bias", nn.Parameter(block.bn2.bias + 1)),
    "weights changed in place": lambda stage, block, calls: block.bn3.bias.data.add_(1),
    "weights elsewhere": lambda stage, block, calls: setattr(block.bn3.bias, "data", block.bn3.bias + 1),
    "one block in fp64": lambda stage, block, calls: block.double(),
    "one block in bf16": lambda stage, block, calls: block.set_activations(torch.bfloat16),
}


@pytest.mark.parametrize("name", LATER)
def test_blocks_in_one_call_notice_what_changed(name: str) -> None:
    model = with_statistics(timm.create_model("efficientnet_b0"), SIZE)
    optimized, x = optimize_for_inference(model), torch.randn(2, 3, SIZE, SIZE)
    assert isinstance(optimized.blocks, FoldedSequence) and type(optimized.blocks[0]) is nn.Sequential
    with torch.inference_mode():
        before = optimized(x)
        calls: list[str] = []
        stage = optimized.blocks[3]
        LATER[name](stage, stage[1], calls)
        one_by_one = copy.deepcopy(optimized)
        for module in list(one_by_one.modules()):
            if isinstance(module, FoldedSequence):
                module.__class__ = nn.Sequential
        calls.clear()
        found, heard = optimized(x), list(calls)
        assert torch.equal(found, one_by_one(x))
    listens = name in ("hook", "pre hook on the stage", "forward of an instance")
    assert bool(heard) == listens and torch.equal(found, before) == listens


def in_one_call() -> nn.Module:
    optimized = optimize_for_inference(with_statistics(timm.create_model("mobilenetv2_050"), SIZE))
    assert isinstance(optimized.blocks, FoldedSequence)
    return optimized


def test_blocks_in_one_call_are_seen_by_who_looks() -> None:
    optimized = in_one_call()
    x, name = torch.randn(2, 3, SIZE, SIZE), "effnet_ops::mbconv_packed"
    with torch.inference_mode():
        expected = optimized(x)
        assert torch.equal(optimized(x), expected)
        with torch.profiler.profile() as profile:
            assert torch.equal(optimized(x), expected)
        with Seen() as mode:
            assert torch.equal(optimized(x), expected)
    assert name in {event.key for event in profile.key_averages()} & set(mode.names)


def test_blocks_in_one_call_survive_a_move_to_shared_memory() -> None:
    optimized, x = in_one_call(), torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = optimized(x)
        assert torch.equal(optimized(x), expected)
        for parameter in optimized.parameters():
            parameter.untyped_storage().share_memory_()
        assert torch.equal(optimized(x), expected)


def test_inputs_of_another_dtype_stay_right() -> None:
    """An input that the packed weights do not fit runs the reference, at every call."""
    optimized, x = in_one_call(), torch.randn(2, 3, SIZE, SIZE).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = optimized(x.float())
        for _ in range(3):
            assert relative_difference(optimized(x).float(), expected) < 0.2


def test_input_sizes_alternate() -> None:
    optimized = in_one_call()
    inputs = [torch.randn(1 + i % 3, 3, SIZE + 2 * i, SIZE) for i in range(12)]
    with torch.inference_mode():
        first = [optimized(x) for x in inputs]
        assert all(torch.equal(optimized(x), y) for _ in range(2) for x, y in zip(inputs, first, strict=True))


@pytest.mark.parametrize(
    ("pool", "kernel"),
    [
        (SelectAdaptivePool2d(pool_type="avg", flatten=True), True),
        (nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()), True),
        (SelectAdaptivePool2d(pool_type="max", flatten=True), False),
        (SelectAdaptivePool2d(pool_type="avgmax", flatten=True), False),
        (nn.Sequential(SelectAdaptivePool2d(pool_type="avg"), nn.Flatten()), True),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AvgPool2d(2), nn.Flatten()), False),
    ],
    ids=["timm", "torch", "maximum", "both", "not flat", "four pixels"],
)
def test_pools(pool: nn.Module, kernel: bool) -> None:
    model, x = small(), torch.randn(2, 3, SIZE, SIZE)
    model.global_pool = pool
    optimized = optimize_for_inference(model)
    assert any(isinstance(module, FoldedPool) for module in optimized.modules()) == kernel
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-3, atol=1e-4)


def test_inputs_have_gradients() -> None:
    model, x = small().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    found = torch.autograd.grad(optimize_for_inference(model)(x).square().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype | None) -> None:
    """Packing was the choice of a precision; also of what needs gradients, which the reference computes."""
    optimized = optimize_for_inference(with_statistics(timm.create_model("tinynet_e"), SIZE), dtype=dtype)
    x = torch.randn(2, 3, SIZE, SIZE)
    found = []
    for automatic in (None, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", automatic, enabled=automatic is not None):
            with torch.no_grad():
                y = optimized(x)
            leaf = x.clone().requires_grad_()
            differentiated = optimized(leaf)
        assert y.dtype is differentiated.dtype is torch.float32
        differentiated.square().sum().backward()
        found.append((y, differentiated.detach(), leaf.grad))
    for plain, *cast in zip(*found, strict=True):
        assert all(torch.equal(plain, value) for value in cast)


@torch.no_grad()
@pytest.mark.parametrize("automatic", [torch.bfloat16, torch.float16])
def test_packed_layers_behind_stock_ones_in_autocast(automatic: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They convert what does not fit their weights instead of running the reference on it; float16 fits float32's."""
    model, x = timm.create_model("test_efficientnet"), torch.randn(2, 3, SIZE, SIZE)
    first = model.blocks[0][0]
    # No kernel of ours reflects.
    first.conv = nn.Conv2d(first.conv.in_channels, first.conv.out_channels, 3, 1, 1, bias=False, padding_mode="reflect")
    optimized = optimize_for_inference(with_statistics(model, SIZE))
    folded = [module for module in optimized.modules() if isinstance(module, FoldedMBConv)]
    dtypes: list[torch.dtype] = []
    for module in folded:
        module.register_forward_hook(lambda module, args, y: dtypes.append(y.dtype))
    for call in (packed.PackedBlockCall, packed.FusedPackedCall, packed.PackedPointwiseCall):
        monkeypatch.delattr(call, "reference")
    with torch.autocast("cpu", automatic):
        expected, y = model(x), optimized(x)
    wanted = torch.float32 if automatic is torch.bfloat16 else automatic
    assert folded and dtypes == [wanted] * len(folded)
    exact = copy.deepcopy(model).double()(x.double())
    assert relative_difference(y, exact) <= 1.5 * relative_difference(expected, exact)


@torch.no_grad()
@pytest.mark.parametrize("automatic", [torch.bfloat16, torch.float16])
def test_replaced_models_follow_autocast(automatic: torch.dtype) -> None:
    model, x = with_statistics(timm.create_model("tinynet_e"), SIZE), torch.randn(2, 3, SIZE, SIZE)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", automatic):
        stock = model(x)
        assert not replace_layers(model).skipped
        y = model(x)
    assert y.dtype is stock.dtype is automatic
    assert relative_difference(y, exact) <= 2 * relative_difference(stock, exact)


def test_training_is_an_error_and_optimizing_again_is_none() -> None:
    optimized, x = optimize_for_inference(small()), torch.randn(1, 3, SIZE, SIZE)
    y = optimized(x)
    with pytest.raises(RuntimeError, match="cannot train"):
        optimized.train()
    assert torch.equal(optimized.eval()(x), y)
    assert torch.equal(optimize_for_inference(optimized)(x), y)
    with pytest.raises(RuntimeError, match="cannot train"):
        optimize_for_inference(sequence()).train()


def test_normalisation_without_weights_and_dead_channels() -> None:
    norm = nn.BatchNorm2d(8, eps=1e-3, affine=False).eval()
    norm.running_mean.normal_()
    norm.running_var[:4] = torch.tensor([0.0, 1e-7, 30.0, 566.0])
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    optimized = optimize_for_inference(model)
    assert norms_run(optimized, x) == 0
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-12, atol=1e-10)


def test_what_must_not_be_folded_is_left() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 3), shared),
        *(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        *(nn.Conv2d(4, 4, 1, dtype=torch.float32), nn.ReLU(), nn.BatchNorm2d(4)),
    ).eval()
    optimized, x = optimize_for_inference(model), torch.randn(2, 3, 8, 8)
    assert optimized.optimization_report.folded == {}
    assert list(optimized.optimization_report.left) == ["1", "3", "5", "8"]
    assert torch.equal(optimized(x), model(x))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        optimize_for_inference({})
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype or None, got 'bfloat16'"):
        optimize_for_inference(nn.Identity(), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"got torch.int8"):
        optimize_for_inference(nn.Identity(), dtype=torch.int8)
    with pytest.raises(ValueError, match="TorchScript"):
        optimize_for_inference(torch.jit.trace(nn.ReLU(), torch.ones(1)))


def test_dictionaries_and_lists_come_back_in_the_callers_dtype() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = sequence()

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.stem(x)
            return {"maps": [y, (y,)], "index": y.flatten(1).argmax(1), "name": "stem"}

    found = optimize_for_inference(Heads(), dtype=torch.float16)(torch.randn(1, 3, 8, 8))
    assert found["maps"][0].dtype == found["maps"][1][0].dtype == torch.float32
    assert found["index"].dtype == torch.int64 and found["name"] == "stem"
