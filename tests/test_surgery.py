"""replace_layers and restore_layers on single blocks and layers: what is replaced, what is skipped, what survives."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import FrameType

import pytest
import timm
import torch
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding
from geffnet import efficientnet_builder as geffnet_blocks
from geffnet.conv2d_layers import Conv2dSame as GeffnetConv2dSame
from surgery_models import (
    BLOCKS,
    CHANNELS,
    assert_same_results,
    geffnet_block,
    lukemelas_block,
    timm_block,
    timm_inverted,
    torchvision_block,
)
from timm.layers import BatchNormAct2d, BlurPool2d, DropPath, FrozenBatchNormAct2d, GroupNormAct, SEModule
from timm.layers.conv2d_same import Conv2dSame
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import SqueezeExcitation, StochasticDepth

import effnet_ops
from effnet_ops import backends, replace_layers, restore_layers
from effnet_ops.surgery import replace
from effnet_ops.surgery.fused import FusedLayer

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_pytorch", "geffnet")]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, CHANNELS, 12, 12, dtype=torch.float64)


def is_fused(block: nn.Module, x: Tensor) -> bool:
    """Whether the block's own forward runs for x, told from outside: its children are not called, but for drop path."""
    children = [m for m in block.modules() if m is not block and not list(m.children())]
    children = [m for m in children if not isinstance(m, StochasticDepth | DropPath)]
    forwards = {type(m).forward.__code__ for m in children}
    calls: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        # All replaced layers share one forward.
        if event == "call" and frame.f_code in forwards and frame.f_locals.get("self") is not block:
            calls.append(frame.f_code.co_filename)

    sys.setprofile(record)
    try:
        with torch.no_grad():
            block(x)
    finally:
        sys.setprofile(None)
    return not calls


@pytest.mark.parametrize("name", BLOCKS)
def test_block_computes_what_the_stock_computes(name: str, x: Tensor) -> None:
    block = BLOCKS[name]()
    stock = copy.deepcopy(block)
    report = replace_layers(block)
    assert report.replaced == [""] and report.skipped == {} and report.kinds == {"": "block"}
    assert is_fused(block, x)
    assert_same_results(block, stock, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_restore_is_bit_for_bit(name: str, x: Tensor) -> None:
    model = nn.Sequential(BLOCKS[name]())
    types, keys = [type(m) for m in model.modules()], [list(m.__dict__) for m in model.modules()]
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    before = model(x)
    replace_layers(model)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    model(x)
    restore_layers(model)
    assert [type(m) for m in model.modules()] == types
    assert [list(m.__dict__) for m in model.modules()] == keys
    assert torch.equal(model(x), before)


group_norm = functools.partial(GroupNormAct, num_groups=4)


def se_with(**settings: object) -> Callable[..., nn.Module]:
    return lambda channels, **kwargs: timm_blocks.SqueezeExcite(channels, **{**kwargs, **settings})


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    block = timm_block()
    change(block)
    return block


def set_conv(name: str, **settings: object) -> nn.Module:
    def change(block: nn.Module) -> None:
        for attribute, value in settings.items():
            setattr(getattr(block, name), attribute, value)

    return changed(change)


class OwnBlock(timm_blocks.InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def own_subclass() -> nn.Module:
    return OwnBlock(CHANNELS, CHANNELS, exp_ratio=4, act_layer=nn.SiLU)


def quantized(block: nn.Module) -> None:
    block.conv_dw.qconfig = torch.ao.quantization.default_qconfig


def shared_norm(block: nn.Module) -> None:
    block.bn2 = block.bn1


def synchronized(block: nn.Module) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(block)


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: timm_block(norm_layer=group_norm), "bn2 is GroupNormAct"),
    "SyncBatchNorm of torch": (lambda: changed(synchronized), "convert_sync_batchnorm dropped the activation"),
    "groups != C": (lambda: timm_inverted(group_size=8), "conv_dw has 4 groups for 32 channels"),
    "dilated edge residual": (
        lambda: timm_blocks.EdgeResidual(CHANNELS, CHANNELS, exp_ratio=4, dilation=2, act_layer=nn.SiLU),
        "conv_exp has dilation (2, 2)",
    ),
    "blur pool": (lambda: timm_inverted(stride=2, aa_layer=BlurPool2d), "aa is BlurPool2d"),
    "mixed depthwise": (lambda: timm_inverted(dw_kernel_size=[3, 5]), "conv_dw is MixedConv2d"),
    "mixed pointwise": (lambda: timm_inverted(exp_kernel_size=[1, 1]), "conv_pw is MixedConv2d"),
    "wide expansion": (lambda: timm_inverted(exp_kernel_size=3), "conv_pw has kernel_size (3, 3)"),
    "conditional convolution": (
        lambda: timm_blocks.CondConvResidual(CHANNELS, CHANNELS, exp_ratio=4, num_experts=2),
        "CondConvResidual chooses its weights",
    ),
    "edge residual": (
        lambda: timm_blocks.EdgeResidual(CHANNELS, CHANNELS, exp_ratio=4, act_layer=nn.Mish),
        "bn1.act is Mish",
    ),
    "activation": (lambda: timm_inverted(act_layer=nn.Mish), "bn2.act is Mish"),
    "activations that differ": (lambda: changed(lambda b: setattr(b.bn1, "act", nn.ReLU())), "activations differ"),
    "gate": (lambda: timm_block(se_layer=se_with(gate_layer=nn.Tanh)), "se.gate is Tanh"),
    "activation of squeeze-and-excitation": (
        lambda: timm_block(se_layer=se_with(force_act_layer=nn.Mish)),
        "se.act1 is Mish",
    ),
    "other attention": (lambda: timm_block(se_layer=lambda c, **_: timm.layers.EcaModule(c)), "se is EcaModule"),
    "dropout in the norm": (lambda: changed(lambda b: setattr(b.bn2, "drop", nn.Dropout2d())), "bn2.drop is Dropout2d"),
    "padding mode": (lambda: set_conv("conv_dw", padding_mode="reflect"), "padding_mode 'reflect'"),
    "hook on a child": (
        lambda: changed(lambda b: b.conv_pwl.register_forward_pre_hook(lambda *_: None)),
        "conv_pwl has a forward_pre hook",
    ),
    "backward hook on a child": (
        lambda: changed(lambda b: b.se.gate.register_full_backward_hook(lambda *_: None)),
        "se.gate has a backward hook",
    ),
    "weight_norm": (lambda: changed(lambda b: parametrizations.weight_norm(b.conv_dw)), "conv_dw has parametrized"),
    "weight_norm of old": (
        lambda: changed(lambda b: nn.utils.weight_norm(b.conv_pw)),
        "conv_pw has a forward_pre hook",
    ),
    "quantization": (lambda: changed(quantized), "conv_dw is prepared for quantization"),
    "forward of an instance": (
        lambda: changed(lambda b: setattr(b.bn1, "forward", BatchNormAct2d.forward.__get__(b.bn1))),
        "the forward of bn1",
    ),
    "a norm used twice": (lambda: changed(shared_norm), "one shared module"),
    "own subclass": (own_subclass, "is a class of your own"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_block_that_does_not_fit_is_skipped_with_the_reason(name: str, x: Tensor) -> None:
    build, reason = MISFITS[name]
    model = nn.Sequential(build()).eval().double()
    before = model(x)
    report = replace_layers(model)
    assert "0" not in report.replaced
    assert reason in report.skipped["0"]
    assert all(name.startswith("0.") for name in report.replaced)
    torch.testing.assert_close(model(x), before)
    restore_layers(model)
    assert torch.equal(model(x), before)


def test_what_does_not_fit_as_a_block_is_replaced_layer_by_layer() -> None:
    model = nn.Sequential(timm_block(dw_kernel_size=[3, 5]), timm_block(norm_layer=group_norm))
    report = replace_layers(model)
    assert report.replaced == ["0.conv_dw.0", "0.conv_dw.1", "0.se", "1.conv_dw", "1.se"]
    assert set(report.skipped) == {"0", "1"}
    assert [report.kinds[name] for name in report.replaced[1:3]] == ["depthwise", "squeeze_excite"]


def depthwise(cls: type[nn.Conv2d] = nn.Conv2d, **settings: object) -> nn.Conv2d:
    return cls(CHANNELS, CHANNELS, **{"kernel_size": 3, "groups": CHANNELS, **settings}).double()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: depthwise(padding=1),
    "stride, dilation, padding": lambda: depthwise(kernel_size=(3, 5), stride=(2, 1), dilation=(1, 2), padding=(0, 3)),
    "same": lambda: depthwise(kernel_size=4, padding="same", bias=False),
    "valid": lambda: depthwise(kernel_size=7, padding="valid"),
    "timm Conv2dSame": lambda: depthwise(Conv2dSame, stride=2),
    "geffnet Conv2dSame": lambda: depthwise(GeffnetConv2dSame, kernel_size=5, stride=2),
    "efficientnet_pytorch static": lambda: depthwise(Conv2dStaticSamePadding, stride=2, image_size=(12, 11)),
    "efficientnet_pytorch dynamic": lambda: depthwise(Conv2dDynamicSamePadding, kernel_size=5, stride=2),
    "timm SqueezeExcite": lambda: timm_blocks.SqueezeExcite(CHANNELS, act_layer=nn.SiLU),
    "timm SEModule": lambda: SEModule(CHANNELS, rd_channels=4, bias=False, gate_layer="hard_sigmoid"),
    "torchvision SqueezeExcitation": lambda: SqueezeExcitation(CHANNELS, 4),
    "geffnet SqueezeExcite": lambda: geffnet_blocks.SqueezeExcite(CHANNELS, act_layer=nn.ReLU6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_single_layer(name: str, x: Tensor) -> None:
    layer = LAYERS[name]().double()
    stock = copy.deepcopy(layer)
    report = replace_layers(layer)
    assert report.replaced == [""] and not report.skipped
    if next(layer.children(), None) is not None:
        assert is_fused(layer, x)
    assert_same_results(layer, stock, x)
    before = stock(x)
    restore_layers(layer)
    assert type(layer) is type(stock) and torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Conv2d(8, 16, 3, groups=8), "it makes 16 channels of 8"),
        (lambda: depthwise(padding=1, padding_mode="circular"), "padding_mode 'circular'"),
        (lambda: depthwise(OwnConv), "OwnConv is a subclass of Conv2d"),
        (lambda: parametrizations.weight_norm(depthwise()), "parametrized"),
        (lambda: SEModule(CHANNELS, add_maxpool=True), "it calls add"),
        (lambda: SEModule(CHANNELS, norm_layer=nn.BatchNorm2d), "bn is BatchNorm2d"),
        (lambda: SqueezeExcitation(CHANNELS, 4, scale_activation=nn.Tanh), "scale_activation is Tanh"),
        (lambda: geffnet_blocks.SqueezeExcite(CHANNELS, gate_fn=torch.tanh), "it calls tanh"),
    ],
)
def test_single_layer_that_does_not_fit(build: Callable[[], nn.Module], reason: str) -> None:
    layer = build()
    cls = type(layer)
    report = replace_layers(layer)
    assert report.replaced == [] and reason in report.skipped[""]
    assert type(layer) is cls


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 1, 3), nn.Linear(2, 2)]
)
def test_nothing_to_replace(layer: nn.Module) -> None:
    report = replace_layers(layer)
    assert (report.replaced, report.skipped) == ([], {})
    assert "nothing to replace" in str(report)


def test_unbatched_image_runs_the_stock_convolution() -> None:
    conv = depthwise()
    image = torch.randn(CHANNELS, 12, 12, dtype=torch.float64)
    before = conv(image)
    replace_layers(conv)
    assert torch.equal(conv(image), before)


@pytest.mark.parametrize("wrong", [None, "efficientnet_b0", {}, nn.Conv2d])
def test_a_model_must_be_a_module(wrong: object) -> None:
    for function in (replace_layers, restore_layers):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function(wrong)


def test_second_call_changes_nothing(x: Tensor) -> None:
    model = nn.Sequential(timm_block(), depthwise(padding=1))
    replace_layers(model)
    types, before = [type(m) for m in model.modules()], model(x)
    report = replace_layers(model)
    assert report.replaced == [] and set(report.skipped) == {"0", "1"}
    assert "fused already" in report.skipped["0"]
    assert [type(m) for m in model.modules()] == types
    model.append(depthwise())
    assert replace_layers(model).replaced == ["2"]
    restore_layers(model)
    restore_layers(model)
    assert not any(isinstance(m, FusedLayer) for m in model.modules())
    torch.testing.assert_close(model[:2](x), before)


def test_own_layers_are_left_alone() -> None:
    model = nn.Sequential(effnet_ops.layers.SqueezeExcite(CHANNELS, 4), effnet_ops.layers.DepthwiseConv2d(CHANNELS, 3))
    types = [type(m) for m in model.modules()]
    report = replace_layers(model)
    assert report.replaced == [] and "effnet_ops.layers.SqueezeExcite" in report.skipped["0"]
    assert report.kinds == {"0": "squeeze_excite", "1": "depthwise"}
    assert [type(m) for m in model.modules()] == types


def test_block_that_appears_twice_is_replaced_once(x: Tensor) -> None:
    block = timm_block()
    model = nn.Sequential(block, block)
    stock = copy.deepcopy(model)
    assert replace_layers(model).replaced == ["0"]
    assert_same_results(model, stock, x)


def test_child_that_is_also_used_elsewhere(x: Tensor) -> None:
    block = timm_block()
    model = nn.ModuleDict({"alone": block.conv_dw, "block": block})
    before = block(x)
    assert replace_layers(model).replaced == ["alone", "block"]
    assert is_fused(block, x)
    torch.testing.assert_close(block(x), before)
    restore_layers(model)
    assert torch.equal(block(x), before)


def test_failure_half_way_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    class WithSlots(replace.LAYERS[nn.Conv2d]):
        __slots__ = ("other_layout",)
        stock = nn.Conv2d

    monkeypatch.setitem(replace.LAYERS, nn.Conv2d, WithSlots)
    model = nn.Sequential(timm_block(), depthwise())
    types = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="layout"):
        replace_layers(model)
    assert [type(m) for m in model.modules()] == types


def test_report_reads_well() -> None:
    model = nn.Sequential(
        *(timm_block() for _ in range(3)), *(timm_inverted(se_layer=SEModule, act_layer=nn.Mish) for _ in range(6))
    )
    lines = str(replace_layers(model)).splitlines()
    assert lines[0] == (
        "3 of 9 MBConv blocks, 6 of 6 depthwise convolutions, 0 of 6 squeeze-and-excitation layers replaced"
    )
    assert "skipped 3, 4, 5, 6 and 2 more: bn2.act is Mish" in lines[1]
    assert "[" not in str(lines[0])


# What can happen to a model after its layers were replaced: the fused forward must notice.


def later_hook(block: nn.Module) -> None:
    block.conv_pwl.register_forward_hook(lambda module, args, out: out * 2)


def later_parametrization(block: nn.Module) -> None:
    torch.manual_seed(0)
    parametrizations.weight_norm(block.conv_dw)
    block.conv_dw.parametrizations.weight.original0.data.mul_(3)


def later_frozen_norm(block: nn.Module) -> None:
    norm = FrozenBatchNormAct2d(32, act_layer=nn.SiLU).double()
    norm.running_var.fill_(3.0)
    block.bn2 = norm


def later_convolution(block: nn.Module) -> None:
    torch.manual_seed(0)
    block.conv_pwl = nn.Conv2d(32, CHANNELS, 3, padding=1).double()


def later_forward(block: nn.Module) -> None:
    conv = block.conv_dw
    conv.forward = lambda x: type(conv).forward(conv, x) * 3


def later_strides(block: nn.Module) -> None:
    variance = block.bn2.running_var
    variance.data = variance.data.as_strided(variance.shape, (0,))


LATER: dict[str, Callable[[nn.Module], object]] = {
    "hook on a child": later_hook,
    "activation": lambda b: setattr(b.bn2, "act", nn.GELU()),
    "SyncBatchNorm of timm": timm.layers.convert_sync_batchnorm,
    "SyncBatchNorm of torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "frozen norm": later_frozen_norm,
    "parametrization": later_parametrization,
    "pruning": lambda b: prune.l1_unstructured(b.conv_dw, "weight", 0.5),
    "stride": lambda b: (setattr(b.conv_dw, "stride", (2, 2)), setattr(b, "has_skip", False)),
    "no residual": lambda b: setattr(b, "has_skip", False),
    "padding": lambda b: (setattr(b.conv_dw, "padding", (0, 2)), setattr(b, "has_skip", False)),
    "dilation": lambda b: (setattr(b.conv_dw, "dilation", (2, 2)), setattr(b.conv_dw, "padding", (2, 2))),
    "another convolution": later_convolution,
    "no squeeze-and-excitation": lambda b: setattr(b, "se", nn.Identity()),
    "forward of an instance": later_forward,
    "eps": lambda b: setattr(b.bn3, "eps", 1.0),
    "a new parameter": lambda b: setattr(b.conv_dw, "weight", nn.Parameter(torch.ones(32, 1, 3, 3).double())),
    "statistics": lambda b: b.bn1.running_mean.add_(1.0),
    "weights written through .data": lambda b: b.conv_dw.weight.data.mul_(2),
    "weights transposed in place": lambda b: setattr(b.conv_dw.weight, "data", b.conv_dw.weight.data.transpose(2, 3)),
    "statistics as another view": later_strides,
    "bias": lambda b: setattr(b.conv_pw, "bias", nn.Parameter(torch.arange(32.0).double() / 32)),
    "bias of the projection": lambda b: setattr(b.conv_pwl, "bias", nn.Parameter(torch.ones(CHANNELS).double())),
    "loaded weights": lambda b: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", LATER)
def test_change_after_replacement(name: str, gradients: bool, x: Tensor) -> None:
    block = timm_block()
    replace_layers(block)
    stock = copy.deepcopy(block)
    restore_layers(stock)
    with torch.set_grad_enabled(gradients):
        before = block(x)
        for module in (block, stock):
            LATER[name](module)
        after = stock.eval()(x)
        unchanged = before.shape == after.shape and torch.allclose(before, after, rtol=1e-3)
        assert unchanged == (name == "SyncBatchNorm of timm")
        torch.testing.assert_close(block.eval()(x), after)


def test_inference_notices_another_dtype_size_and_backend(x: Tensor) -> None:
    block = timm_block()
    replace_layers(block)
    with torch.no_grad():
        wanted = block(x)
        torch.testing.assert_close(block(x[:2, :, 3:]), restored(block)(x[:2, :, 3:]))
        torch.testing.assert_close(block.float()(x.float()), wanted.float())
        with pytest.raises(TypeError, match=r"weight must be torch\.float64"):
            block(x)
        with effnet_ops.use_backend("reference"):
            assert not torch.equal(block(x.float()), wanted.float())
        with pytest.raises(ValueError, match=r"expand\.weight must have shape"):
            block(x.float()[:, 1:])


def restored(block: nn.Module) -> nn.Module:
    stock = copy.deepcopy(block)
    restore_layers(stock)
    return stock


def test_removed_hook_lets_the_block_run_fused_again(x: Tensor) -> None:
    block = timm_block()
    replace_layers(block)
    assert is_fused(block, x)
    seen: list[torch.Size] = []
    handle = block.conv_dw.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert not is_fused(block, x) and len(seen) == 1
    handle.remove()
    assert is_fused(block, x) and len(seen) == 1


@pytest.mark.parametrize("norm", ["bn1", "bn2", "bn3"])
def test_norms_in_different_modes(norm: str, x: Tensor) -> None:
    block = timm_block()
    stock = copy.deepcopy(block)
    replace_layers(block)
    for module in (block, stock):
        module.train()
        getattr(module, norm).eval()
    assert torch.equal(block(x), stock(x))
    assert torch.equal(block.bn1.running_mean, stock.bn1.running_mean)


def test_frozen_norms_in_a_training_block(x: Tensor) -> None:
    block = timm_block(drop_path_rate=0.5)
    stock = copy.deepcopy(block)
    replace_layers(block)
    outputs = []
    for module in (block, stock):
        module.train()
        for norm in (module.bn1, module.bn2, module.bn3):
            norm.eval()
        torch.manual_seed(3)
        outputs.append(module(x))
        assert module.bn1.num_batches_tracked == 0
    torch.testing.assert_close(*outputs)


def norm_settings(block: nn.Module, **settings: object) -> nn.Module:
    for name in ("bn1", "bn2", "bn3"):
        old = getattr(block, name)
        new = BatchNormAct2d(old.num_features, act_layer=nn.SiLU, apply_act=name != "bn3", **settings)
        setattr(block, name, new.double())
    return block


@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.3}],
    ids=str,
)
def test_norm_settings(settings: dict[str, object], x: Tensor) -> None:
    block = norm_settings(timm_block(), **settings)
    stock = copy.deepcopy(block)
    assert replace_layers(block).replaced == [""]
    for _ in range(2):
        assert_same_results(block, stock, x)
        block.train()(x), stock.train()(x)


def test_norm_that_stops_tracking(x: Tensor) -> None:
    block = timm_block()
    stock = copy.deepcopy(block)
    replace_layers(block)
    for module in (block, stock):
        for norm in (module.bn1, module.bn2, module.bn3):
            norm.track_running_stats = False
    assert_same_results(block, stock, x)


def test_frozen_parameters(x: Tensor) -> None:
    block = timm_block().train()
    for name, p in block.named_parameters():
        p.requires_grad_("conv_pwl" in name or "bn2" in name)
    stock = copy.deepcopy(block)
    replace_layers(block)
    for module in (block, stock):
        module(x).square().sum().backward()
    for (name, p), expected in zip(block.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (expected.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected.grad, msg=name)


def test_statistics_are_collected_without_gradients(x: Tensor) -> None:
    block = timm_block().train()
    stock = copy.deepcopy(block)
    replace_layers(block)
    with torch.no_grad():
        torch.testing.assert_close(block(x), stock(x))
    for (name, buffer), expected in zip(block.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(block.eval()(x), stock.eval()(x))


def test_hooks_on_the_block_itself(x: Tensor) -> None:
    block = timm_block()
    calls: list[str] = []
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    replace_layers(block)
    block.register_forward_hook(lambda *_: calls.append("after"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    block(x.requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    assert is_fused(block, x)


def test_parametrized_single_layer_can_be_restored(x: Tensor) -> None:
    conv = depthwise(padding=1)
    replace_layers(conv)
    parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.data.mul_(2)
    fused = conv(x)
    restore_layers(conv)
    assert not isinstance(conv, FusedLayer)
    torch.testing.assert_close(conv(x), fused)
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is nn.Conv2d


def test_class_on_top_of_several_replaced_modules(x: Tensor) -> None:
    """FSDP makes one subclass for all modules of a class."""
    model = nn.Sequential(timm_block(), timm_block())
    before = model(x)
    replace_layers(model)
    on_top = type("Sharded", (type(model[0]),), {})
    for block in model:
        block.__class__ = on_top
    torch.testing.assert_close(model(x), before)
    restore_layers(model)
    assert torch.equal(model(x), before)
    assert not any(isinstance(block, FusedLayer) or "_effnet_ops_plan" in block.__dict__ for block in model)


# Copies


def saved_and_loaded(block: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": saved_and_loaded,
    "EMA": lambda block: timm.utils.ModelEmaV3(block).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["timm", "torchvision", "efficientnet_pytorch", "geffnet"])
def test_copy_is_fused_and_independent(how: str, name: str, x: Tensor) -> None:
    block = BLOCKS[name]()
    replace_layers(block)
    before = block(x)
    twin = COPIES[how](block)
    assert type(twin) is type(block) and is_fused(twin, x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    assert torch.equal(twin(x), before)


def test_data_parallel_replica_uses_its_own_children(x: Tensor) -> None:
    block = timm_block()
    replace_layers(block)
    before = block(x)
    replica = block._replicate_for_data_parallel()
    for name, child in list(block.named_children()):
        setattr(replica, name, copy.deepcopy(child))
    for p in replica.bn3.parameters():
        p.data.zero_()
    assert torch.equal(replica(x), x)
    assert torch.equal(block(x), before)


def test_replaced_model_is_freed(x: Tensor) -> None:
    block = timm_block()
    replace_layers(block)
    hook_of_the_model = functools.partial(lambda model, *_: None, block)
    block.conv_dw.register_forward_hook(hook_of_the_model)
    block(x)
    reference = weakref.ref(block)
    del block, hook_of_the_model
    gc.collect()
    assert reference() is None


def test_optimizer_goes_on(x: Tensor) -> None:
    block = timm_block().train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    block(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(block)
    momenta = {id(p): state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
    replace_layers(block)
    assert {id(p): state["momentum_buffer"] for p, state in optimizer.state.items()}.keys() == momenta.keys()
    block(x).square().sum().backward()
    twin(x).square().sum().backward()
    optimizer.step()
    for p, stock in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, stock.grad)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.9 * momenta[id(p)] + p.grad)


# Drop path


def always_row(block: nn.Module, mode: str) -> nn.Module:
    block.stochastic_depth = StochasticDepth(0.5, mode)
    return block


DROPPING: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...]]] = {
    "timm": (lambda: timm_block(drop_path_rate=0.5), ()),
    "torchvision row": (lambda: torchvision_block(drop=0.3), ()),
    "torchvision batch": (lambda: always_row(torchvision_block(), "batch"), ()),
    "efficientnet_pytorch": (lukemelas_block, (0.4,)),
    "geffnet": (lambda: geffnet_block(drop_connect_rate=0.5), ()),
}


@pytest.mark.parametrize("name", DROPPING)
def test_equal_seeds_drop_equal_images(name: str, x: Tensor) -> None:
    build, args = DROPPING[name]
    block = build()
    stock = copy.deepcopy(block)
    replace_layers(block)
    assert is_fused(block, x)
    assert_same_results(block, stock, x, *args)
    torch.manual_seed(1)
    dropped = (block.train()(x, *args) - x).abs().amax((1, 2, 3)) < 1e-6
    torch.manual_seed(1)
    assert torch.equal(dropped, (stock.train()(x, *args) - x).abs().amax((1, 2, 3)) < 1e-6)


def test_drop_path_is_drawn_in_the_precision_of_autocast(x: Tensor) -> None:
    block, x = lukemelas_block().train().float(), x.float()
    stock = copy.deepcopy(block)
    replace_layers(block)
    outputs = []
    for module in (block, stock):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(x, 0.5).float())
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.1)


# Transformations of PyTorch


@pytest.mark.parametrize("name", ["timm", "torchvision", *SLOWER])
def test_compile_without_graph_break(name: str, x: Tensor) -> None:
    block = BLOCKS[name]()
    replace_layers(block)
    stock = copy.deepcopy(block)
    restore_layers(stock)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stock(x))
    block.train(), stock.train()
    compiled(x).square().sum().backward()
    stock(x).square().sum().backward()
    for p, expected in zip(block.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
    for (key, buffer), expected in zip(block.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=key)


def test_export_keeps_the_operators_and_a_dynamic_size() -> None:
    block = timm_block(stride=2, pad_type="same")
    replace_layers(block)
    x = torch.randn(2, CHANNELS, 12, 14, dtype=torch.float64)
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(block, (x,), dynamic_shapes=(sizes,))
    operators = any("effnet_ops" in str(node.target) for node in program.graph.nodes)
    assert operators == (backends.select(x) != "reference")
    larger = torch.randn(2, CHANNELS, 17, 21, dtype=torch.float64)
    torch.testing.assert_close(program.module()(larger), block(larger))


def test_tracing_sees_the_stock_forward(x: Tensor) -> None:
    block = torchvision_block()
    replace_layers(block)
    traced = torch.jit.trace(block, x)
    assert "effnet_ops::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), block(x))
    graph = torch.fx.symbolic_trace(block)
    torch.testing.assert_close(graph(x), block(x))
    for compiled in (traced, graph):
        report = replace_layers(nn.Sequential(compiled))
        assert report.replaced == [] and "compiled" in report.skipped["0"]


def test_script_says_what_to_do() -> None:
    block = timm_block()
    replace_layers(block)
    with pytest.raises(RuntimeError, match="restore_layers"):
        torch.jit.script(nn.Sequential(block))


def test_function_transforms_run_the_stock_forward(x: Tensor) -> None:
    block = timm_block()
    stock = copy.deepcopy(block)
    replace_layers(block)
    stacked = torch.stack((x, x + 1))
    torch.testing.assert_close(torch.vmap(block)(stacked), torch.vmap(stock)(stacked))
    _, tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(stock, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)


def test_functional_call_with_other_parameters(x: Tensor) -> None:
    block = timm_block()
    stock = copy.deepcopy(block)
    replace_layers(block)
    doubled = {name: p * 2 for name, p in block.named_parameters()}
    expected = torch.func.functional_call(stock, doubled, x)
    torch.testing.assert_close(torch.func.functional_call(block, doubled, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, x: Tensor) -> None:
    block, x = timm_block().float(), x.float()
    stock = copy.deepcopy(block)
    replace_layers(block)
    with torch.autocast("cpu", dtype):
        automatic = block(x)
    assert automatic.dtype == dtype
    expected = stock(x)
    bound = 2e-2 * expected.abs().max()
    assert (automatic.float() - expected).abs().max() < bound
    assert (block.to(dtype)(x.to(dtype)).float() - expected).abs().max() < bound


# Without the libraries


def test_works_without_any_of_the_libraries() -> None:
    program = """
import sys
libraries = ("timm", "torchvision", "efficientnet_pytorch", "geffnet")
for library in libraries:
    sys.modules[library] = None
import torch, effnet_ops
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8))
x = torch.randn(1, 8, 5, 5)
before = model(x)
assert effnet_ops.replace_layers(model).replaced == ["0"]
torch.testing.assert_close(model(x), before)
effnet_ops.restore_layers(model)
assert torch.equal(model(x), before)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_library_that_changed_its_names_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "effnet_ops.surgery.adapters.geffnet", raising=False)
    monkeypatch.delattr(geffnet_blocks, "CondConvResidual")
    block = nn.Sequential(geffnet_block(act_layer=nn.Mish))
    report = replace_layers(block)
    assert "act2 is Mish" in report.skipped["0"]
    assert "this version of geffnet is not supported" in report.skipped["0"]
    assert report.replaced == ["0.conv_dw"]
