"""The modules: equal to timm's blocks, and right where the fused block would not be."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite as TimmSqueezeExcite
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effnet_ops import functional, layers, reference

BLOCKS = {
    "expanding residual": dict(in_channels=16, out_channels=16, kernel_size=3),
    "stride 2, 5x5": dict(in_channels=16, out_channels=24, kernel_size=5, stride=2),
    "same padding": dict(in_channels=16, out_channels=24, kernel_size=5, stride=2, padding="same"),
    "no expansion": dict(in_channels=24, out_channels=16, kernel_size=3, expand_ratio=1),
    "no expansion, residual": dict(in_channels=16, out_channels=16, kernel_size=3, expand_ratio=1),
    "lite": dict(in_channels=16, out_channels=16, kernel_size=3, se_ratio=0.0, activation="relu6"),
}
TIMM_ACTIVATIONS = {"silu": nn.SiLU, "relu6": nn.ReLU6}


def block(name: str, **changes) -> layers.MBConv:
    """A block with statistics as training leaves them, in fp64."""
    module = layers.MBConv(**{**BLOCKS[name], **changes}).double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with_statistics(norm)
    return module


@torch.no_grad()
def with_statistics(norm: nn.BatchNorm2d) -> None:
    if norm.affine:
        norm.weight.uniform_(0.3, 1.5)
        norm.bias.normal_(0.0, 0.3)
    if norm.track_running_stats:
        norm.running_mean.normal_(0.0, 0.3)
        norm.running_var.uniform_(0.3, 2.0)


def timm_block(name: str) -> nn.Module:
    config = BLOCKS[name]
    channels = config["in_channels"]
    squeezed = int(channels * config.get("se_ratio", 0.25))
    arguments = dict(
        in_chs=channels,
        out_chs=config["out_channels"],
        dw_kernel_size=config["kernel_size"],
        stride=config.get("stride", 1),
        pad_type=config.get("padding", ""),
        act_layer=TIMM_ACTIVATIONS[config.get("activation", "silu")],
        se_layer=functools.partial(TimmSqueezeExcite, rd_channels=squeezed) if squeezed else None,
    )
    if config.get("expand_ratio") == 1:
        return DepthwiseSeparableConv(**arguments).double()
    return InvertedResidual(exp_ratio=6, **arguments).double()


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and every gradient and buffer by name, for a gradient of fixed random numbers."""
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    wanted = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y, list(wanted.values()), grad)
    return y.detach(), {**dict(zip(wanted, found, strict=True)), **dict(module.named_buffers())}


def assert_same(module: nn.Module, expected: nn.Module, x: Tensor, rtol: float = 1e-9) -> None:
    y, values = run(module, x)
    y_expected, values_expected = run(expected, x)
    torch.testing.assert_close(y, y_expected, rtol=rtol, atol=1e-10)
    assert values.keys() == values_expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(
            value, values_expected[name], rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def stepwise(module: layers.MBConv) -> layers.MBConv:
    """A copy that runs child by child."""
    twin = copy.deepcopy(module)
    twin.forward = lambda x: twin._run_children(x, None)
    return twin


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused functions that were called, by name."""
    names: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*args, **keywords):
            names.append(name)
            return function(*args, **keywords)

        return call

    for name in ("mbconv", "depthwise_conv2d", "pointwise_conv2d", "squeeze_excite"):
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    return names


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_mbconv_equals_timm(name: str, training: bool, calls: list[str]) -> None:
    ours, theirs = block(name), timm_block(name)
    theirs.load_state_dict(ours.state_dict())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(3, BLOCKS[name]["in_channels"], 9, 8, dtype=torch.float64)
    assert_same(ours.train(training), theirs.train(training), x)
    assert calls == ["mbconv"]


def test_frozen_normalisation_keeps_its_statistics(calls: list[str]) -> None:
    ours = block("expanding residual").train()
    for norm in (ours.bn1, ours.bn2, ours.bn3):
        norm.eval()
    before = {name: value.clone() for name, value in ours.named_buffers()}
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    y, values = run(ours, x)
    assert calls == ["mbconv"]
    assert all(torch.equal(value, values[name]) for name, value in before.items())
    torch.testing.assert_close(y, ours.eval()(x))


def test_partly_frozen_normalisation_runs_the_children(calls: list[str]) -> None:
    ours = block("expanding residual").train()
    ours.bn2.eval()
    before = ours.bn2.running_mean.clone(), ours.bn1.running_mean.clone()
    ours(torch.randn(2, 16, 6, 6, dtype=torch.float64))
    assert "mbconv" not in calls
    assert torch.equal(ours.bn2.running_mean, before[0]) and not torch.equal(ours.bn1.running_mean, before[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "norm",
    [dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(momentum=0.3, eps=1e-2)],
    ids=str,
)
def test_unusual_normalisation_is_fused_and_right(norm: dict, training: bool, calls: list[str]) -> None:
    ours = block("expanding residual")
    for name in ("bn1", "bn2", "bn3"):
        size = getattr(ours, name).num_features
        setattr(ours, name, nn.BatchNorm2d(size, **norm).double())
        with_statistics(getattr(ours, name))
    ours.train(training)
    twin = stepwise(ours)
    for _ in range(2):
        x = torch.randn(3, 16, 6, 5, dtype=torch.float64)
        calls.clear()
        ours(x)
        assert calls == ["mbconv"]
        twin(x)
    assert_same(ours, twin, x)


def test_statistics_that_are_no_longer_tracked_are_used_in_evaluation_only() -> None:
    ours = block("expanding residual")
    for norm in (ours.bn1, ours.bn2, ours.bn3):
        norm.track_running_stats = False
    for training in (True, False):
        twin = stepwise(ours.train(training))
        assert_same(ours, twin, torch.randn(3, 16, 6, 5, dtype=torch.float64))


def _hook(module: layers.MBConv) -> None:
    module.conv_pwl.register_forward_pre_hook(lambda child, args: (args[0] * 2,))


def _parametrize(module: layers.MBConv) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    parametrize.register_parametrization(module.conv_pw, "weight", Double())


def _patch(module: layers.MBConv) -> None:
    forward = module.bn2.forward
    module.bn2.forward = lambda h: forward(h) * 3


def _group_norm(module: layers.MBConv) -> None:
    module.bn2 = nn.GroupNorm(4, module.bn2.num_features).double()


def _dilate(module: layers.MBConv) -> None:
    module.conv_dw.dilation, module.conv_dw.padding = (2, 2), (2, 2)


def _bias(module: layers.MBConv) -> None:
    module.conv_pwl.bias = nn.Parameter(torch.randn(module.conv_pwl.out_channels, dtype=torch.float64))


def _se_hook(module: layers.MBConv) -> None:
    module.se.conv_reduce.register_forward_hook(lambda child, args, out: out * 2)


def _se_module(module: layers.MBConv) -> None:
    module.se = nn.Tanh()


def _backward_hook(module: layers.MBConv) -> None:
    module.bn3.register_full_backward_hook(lambda child, grad_in, grad_out: (grad_in[0] * 2,))


@pytest.mark.parametrize(
    "change", [_hook, _parametrize, _patch, _group_norm, _dilate, _bias, _se_hook, _se_module, _backward_hook]
)
def test_changed_children_are_run_one_by_one(change: Callable, calls: list[str]) -> None:
    ours = block("expanding residual").eval()
    x = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    untouched = run(ours, x)
    change(ours)
    calls.clear()
    y, values = run(ours, x)
    assert "mbconv" not in calls
    ours.forward = lambda x: ours._run_children(x, None)
    expected, expected_values = run(ours, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(values["x"], expected_values["x"])
    assert not (torch.allclose(y, untouched[0]) and torch.allclose(values["x"], untouched[1]["x"]))


def test_sync_batch_norm_keeps_the_activation() -> None:
    ours = block("expanding residual").eval()
    x = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    expected = ours(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


def test_folded_block_is_fused(calls: list[str]) -> None:
    ours = block("expanding residual").eval()
    x = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    expected = ours(x)
    for conv, norm in (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")):
        module, bn = getattr(ours, conv), getattr(ours, norm)
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        module.bias = nn.Parameter(bn.bias - bn.running_mean * scale)
        module.weight = nn.Parameter(module.weight * scale[:, None, None, None])
        setattr(ours, norm, nn.Identity())
    calls.clear()
    torch.testing.assert_close(ours(x), expected)
    assert calls == ["mbconv"]


@pytest.mark.parametrize("frozen", [False, True])
def test_drop_path_drops_whole_images_in_training_only(frozen: bool) -> None:
    ours = block("expanding residual", drop_path_rate=0.4)
    x = torch.randn(400, 16, 2, 2, dtype=torch.float64)
    ours.eval()
    branch = ours(x) - x
    torch.testing.assert_close(ours(x), stepwise(ours)(x))
    ours.train()
    if frozen:
        for norm in (ours.bn1, ours.bn2, ours.bn3):
            norm.eval()
    with torch.no_grad():
        y = ours(x)
    kept = (y - x).flatten(1).abs().amax(1) > 0
    assert 0.5 < kept.double().mean() < 0.7  # 0.6 expected, standard deviation 0.024
    if frozen:
        torch.testing.assert_close((y - x)[kept], branch[kept] / 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_drop_path_of_a_block_that_runs_its_children_is_rounded_once(dtype: torch.dtype) -> None:
    """1 / (1 - 0.0125) is 1.01266, and 1.01563 in bfloat16."""
    block, seen = layers.MBConv(8, 8, 3, drop_path_rate=0.0125).to(dtype).train(), []
    block.bn3.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(4, 8, 5, 5, dtype=dtype)
    torch.manual_seed(0)
    y = block(x)
    torch.manual_seed(0)
    scale = reference.drop_path_scale(x, 0.0125)
    assert scale.max() > 1.012 and scale.dtype == torch.float32
    assert torch.equal(y, (seen[0] * scale.view(-1, 1, 1, 1)).to(dtype) + x)


def test_drop_path_is_ignored_without_a_residual() -> None:
    ours = block("no expansion", drop_path_rate=0.9).train()
    twin = stepwise(ours)
    x = torch.randn(4, 24, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), twin(x))


@pytest.mark.parametrize("padding", [1, "same", (0, 1), (2, 0, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_conv_is_a_conv(padding, stride: int) -> None:
    ours = layers.DepthwiseConv2d(6, 3, stride, padding, bias=True, activation="silu")
    assert isinstance(ours, nn.Conv2d) and ours.weight.shape == (6, 1, 3, 3) and ours.bias.shape == (6,)
    x = torch.randn(2, 6, 8, 9)
    if padding == "same":
        stock = Conv2dSame(6, 6, 3, stride, groups=6)
    else:
        sides = padding if isinstance(padding, tuple) else (padding, padding)
        sides = (sides[0], sides[0], sides[1], sides[1]) if len(sides) == 2 else sides
        pad = nn.ZeroPad2d((sides[2], sides[3], sides[0], sides[1]))
        stock = nn.Sequential(pad, nn.Conv2d(6, 6, 3, stride, groups=6))
    (stock if padding == "same" else stock[1]).load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), nn.functional.silu(stock(x)))
    assert "activation=silu" in repr(ours)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, None), (3, 2, "same"), (1, 1, None), (1, 2, None)])
def test_conv_norm_act(kernel: int, stride: int, padding, training: bool, calls: list[str]) -> None:
    ours = layers.ConvNormAct(5, 8, kernel, stride, padding=padding, activation="relu6").double().train(training)
    with_statistics(ours.bn1)
    conv = Conv2dSame if padding == "same" else nn.Conv2d
    stock_conv = conv(5, 8, kernel, stride, padding=0 if padding == "same" else kernel // 2, bias=False)
    stock = nn.Sequential(stock_conv, nn.BatchNorm2d(8), nn.ReLU6()).double().train(training)
    stock[0].load_state_dict(ours.conv.state_dict())
    stock[1].load_state_dict(ours.bn1.state_dict())
    x = torch.randn(3, 5, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours.bn1.running_var, stock[1].running_var)
    assert calls == (["pointwise_conv2d"] if (kernel, stride) == (1, 1) else [])


def test_squeeze_excite_equals_timm(calls: list[str]) -> None:
    ours, theirs = layers.SqueezeExcite(12, 3), TimmSqueezeExcite(12, rd_channels=3, act_layer=nn.SiLU)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert calls == ["squeeze_excite"]
    ours.conv_expand.register_forward_hook(lambda child, args, out: out - 100.0)
    assert ours(x).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (lambda: layers.MBConv(8, 8, activation="swish"), "'swish'"),
        (lambda: layers.MBConv(8, 8, gate="sigmiod"), "did you mean 'sigmoid'"),
        (lambda: layers.MBConv(8, 8, drop_path_rate=1.0), "drop_path_rate"),
        (lambda: layers.MBConv(8, 8, stride=0), "stride"),
        (lambda: layers.MBConv(8, 8, padding="valid"), "'valid'"),
        (lambda: layers.MBConv(-1, 3), "in_channels must be a whole number of at least 1, got -1"),
        (lambda: layers.MBConv(8, 2.5), "out_channels must be a whole number"),
        (lambda: layers.MBConv(8, 8, expand_ratio=0), "expand_ratio must leave a channel of 8, got 0"),
        (lambda: layers.MBConv(8, 8, expand_ratio=float("nan")), "expand_ratio must be a number of at least 0"),
        (lambda: layers.MBConv(8, 8, expand_ratio="6"), "expand_ratio must be a number"),
        (lambda: layers.MBConv(8, 8, se_ratio=-2), "se_ratio must be a number of at least 0, got -2"),
        (lambda: layers.MBConv(8, 8, se_ratio=None), "se_ratio must be a number"),
        (lambda: layers.DepthwiseConv2d(0, 3), "channels must be a whole number of at least 1, got 0"),
        (lambda: layers.DepthwiseConv2d(8, 0), "kernel_size"),
        (lambda: layers.DepthwiseConv2d(8, 3, padding=-1), "padding"),
        (lambda: layers.ConvNormAct(8, 8, 3, activation="mish"), "'mish'"),
        (lambda: layers.ConvNormAct(3, 0, 3), "out_channels must be"),
        (lambda: layers.ConvNormAct(3, 8, 3, stride=None), "stride must be an int"),
        (lambda: layers.PaddedConv2d(0, 8, 3), "in_channels must be"),
        (lambda: layers.SqueezeExcite(0, 1), "channels must be"),
        (lambda: layers.SqueezeExcite(8, 0), "squeezed must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(build: Callable, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        build()


def test_channels_and_ratios_may_be_numpys() -> None:
    ours = layers.MBConv(np.int64(8), np.int32(8), expand_ratio=np.float32(2), se_ratio=np.float64(0.5))
    assert ours.conv_pw.out_channels == 16 and ours.se.conv_reduce.out_channels == 4
    assert type(ours.conv_pw.in_channels) is int
