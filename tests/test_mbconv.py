"""MBConv against the fp64 reference in training and evaluation: outputs, gradients, layouts and precisions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import MBCONV, MBConvCase
from helpers import (
    HALF,
    LAYOUTS,
    Tensors,
    check,
    is_activation,
    mbconv_bounds,
    mbconv_function,
    mbconv_groups,
    mbconv_tensors,
    names,
    normal,
    relative_error,
    run,
)
from torch import nn

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, SqueezeExciteParams

pytestmark = pytest.mark.usefixtures("poison")
by_case = pytest.mark.parametrize("case", MBCONV, ids=names(MBCONV))
by_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
CASES = {case.name: case for case in MBCONV}


@by_case
@by_mode
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(case: MBConvCase, training: bool, layout: str) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case), torch.float32, layout)


@by_case
@by_mode
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_precisions(case: MBConvCase, training: bool, dtype: torch.dtype) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case), dtype, **mbconv_bounds(case, dtype))


@by_case
@by_mode
def test_reference_backend(case: MBConvCase, training: bool) -> None:
    with effnet_ops.use_backend("reference"):
        check(mbconv_function(case, training), mbconv_tensors(case), torch.float32)


@by_mode
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_parameters(dtype: torch.dtype, training: bool, backend: str) -> None:
    case = CASES["residual"]
    check(
        mbconv_function(case, training),
        mbconv_tensors(case),
        dtype,
        parameter_dtype=dtype,
        **mbconv_bounds(case, dtype),
    )


@by_case
def test_inference_equals_evaluation_with_gradients(case: MBConvCase, backend: str) -> None:
    """Without anything to differentiate another operator runs; the result is the same up to rounding."""
    function, tensors = mbconv_function(case, False), mbconv_tensors(case)
    expected, _ = run(function, tensors)
    assert relative_error(function(tensors), expected) <= 1e-13


class StockBlock(nn.Module):
    """An MBConv block as everybody writes it."""

    def __init__(self, stride: int, kernel: int, bias: bool = False) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(8, 24, 1, bias=bias), nn.BatchNorm2d(24, eps=1e-3)
        self.depthwise = nn.Conv2d(24, 24, kernel, stride, kernel // 2, groups=24, bias=bias)
        self.bn2 = nn.BatchNorm2d(24, eps=1e-4)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 2, 1), nn.SiLU(), nn.Conv2d(2, 24, 1), nn.Sigmoid()
        )
        self.project, self.bn3 = nn.Conv2d(24, 8, 1, bias=bias), nn.BatchNorm2d(8, eps=1e-5)
        self.residual = stride == 1
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.weight, 0.3, 2.0)
            nn.init.normal_(norm.bias, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.3, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.bn1(self.expand(x)))
        h = nn.functional.silu(self.bn2(self.depthwise(h)))
        h = self.bn3(self.project(h * self.se(h)))
        return x + h if self.residual else h


def fused(block: StockBlock, x: torch.Tensor) -> torch.Tensor:
    """The parameters of the stock block through `effnet_ops.mbconv`."""

    def conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvNormParams:
        buffers = (norm.running_mean, norm.running_var, norm.eps, norm.momentum, norm.num_batches_tracked)
        return ConvNormParams(conv.weight, conv.bias, BatchNormParams(norm.weight, norm.bias, *buffers))

    reduce, expand = block.se[1], block.se[3]
    return effnet_ops.mbconv(
        x,
        conv(block.expand, block.bn1),
        conv(block.depthwise, block.bn2),
        SqueezeExciteParams(reduce.weight, reduce.bias, expand.weight, expand.bias),
        conv(block.project, block.bn3),
        stride=block.depthwise.stride,
        padding=block.depthwise.padding,
        residual=block.residual,
        training=block.training,
    )


@by_mode
@pytest.mark.parametrize(("stride", "kernel", "bias"), [(1, 5, False), (2, 3, False), (1, 3, True)])
def test_equals_stock_modules(stride: int, kernel: int, bias: bool, training: bool, backend: str) -> None:
    """Output, every gradient and every buffer of a block made of torch.nn modules, in fp64."""
    stock = StockBlock(stride, kernel, bias).double().train(training)
    ours = StockBlock(stride, kernel, bias).double().train(training)
    ours.load_state_dict(stock.state_dict())
    x = normal(3, 8, 9, 7)
    expected, out = stock(x), fused(ours, x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad)
    assert relative_error(out, expected) <= 1e-12
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        # In front of a normalisation by the batch, a bias has the gradient 0 but for rounding.
        floor = 1.0 if training and not name.startswith("bn") else 0.0
        assert relative_error(p.grad, q.grad, floor) <= 1e-11, name
    for (name, p), q in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("recompute", ["always", "never"])
@pytest.mark.parametrize("input", ["far from zero", "cancelled"])
def test_statistics_that_cancel(input: str, recompute: str) -> None:
    """No further from fp64 than twice the stock modules, where mean >> deviation, or the expansion nearly cancels x.

    The statistics of a narrow block's expansion come from the covariance of x, in which such a sum loses digits.
    """
    blocks = [StockBlock(1, 3).train() for _ in range(3)]
    x = torch.randn(4, 8, 12, 12)
    with torch.no_grad():
        if input == "far from zero":
            x += 300
        else:
            x = x[:, :1] + 1e-3 * x
            blocks[0].expand.weight -= blocks[0].expand.weight.mean(1, keepdim=True)
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
    stock, ours, exact = blocks[0], blocks[1], blocks[2].double()
    grad = torch.randn_like(stock(x))

    def results(block: StockBlock, function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaf = x.to(block.expand.weight.dtype).requires_grad_()
        with effnet_ops.set_recompute(recompute):
            out = function(leaf)
        found = torch.autograd.grad(out, [leaf, *block.parameters()], grad.to(leaf.dtype))
        return [out.detach(), *found]

    true = results(exact, exact)
    median = sorted(value.norm().item() for value in true[1:])[len(true) // 2]
    for of_stock, of_ours, value in zip(results(stock, stock), results(ours, partial(fused, ours)), true, strict=True):
        floor = 1e-3 * median
        assert relative_error(of_ours, value, floor) <= 2 * relative_error(of_stock, value, floor) + 1e-6


def test_drop_path_rate_is_drawn_per_image(backend: str) -> None:
    """Each image keeps its branch, divided by the keep probability, or loses it; both happen in a large batch."""
    case = MBConvCase("", (64, 8, 1, 1), 8, None, None, residual=True, norm="folded")
    tensors = mbconv_tensors(case)
    groups = mbconv_groups(case, tensors)
    x = tensors["x"]
    branch = effnet_ops.mbconv(x, **groups, **case.config, training=True) - x
    dropped = effnet_ops.mbconv(x, **groups, **case.config, drop_path=0.25, training=True) - x
    ratio = ((dropped * branch).sum((1, 2, 3)) / branch.square().sum((1, 2, 3))).float()
    kept = ratio > 0.5
    assert torch.allclose(ratio, torch.where(kept, 4 / 3, 0.0), atol=1e-5)
    assert 16 < kept.sum() < 64
    evaluated = effnet_ops.mbconv(x, **groups, **case.config, drop_path=0.25, training=False)
    assert relative_error(evaluated - x, branch) <= 1e-12


@by_mode
@pytest.mark.parametrize("frozen", ["norms", "all_but_x", "all_but_se", "x_and_expand"])
def test_frozen_parameters(frozen: str, training: bool, backend: str) -> None:
    """Whatever subset of the inputs needs a gradient gets the same one as when all do; the rest gets none."""
    case = CASES["residual"]
    tensors = mbconv_tensors(case)
    function = mbconv_function(case, training)
    _, expected = run(function, tensors)

    def needs(name: str) -> bool:
        if frozen == "norms":
            return "gamma" not in name and "beta" not in name
        if frozen == "all_but_x":
            return name == "x"
        if frozen == "all_but_se":
            return name.startswith(("reduce_", "expand_"))
        return not is_activation(name) and not name.startswith("expand.")

    leaves: Tensors = {
        name: value if value is None else value.clone().requires_grad_(name in expected and needs(name))
        for name, value in tensors.items()
    }
    function(leaves).sum().backward()
    for name, exact in expected.items():
        grad = leaves[name].grad
        if needs(name):
            assert relative_error(grad, exact, 1e-6) <= 1e-10, name
        else:
            assert grad is None, name
