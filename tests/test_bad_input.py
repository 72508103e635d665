"""Input that does not fit is refused with an error that names the culprit, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import normal
from torch import Tensor

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, SqueezeExciteParams

X = torch.zeros(2, 8, 6, 5)
WEIGHT = torch.zeros(8, 1, 3, 3)


def depthwise(x: Any = X, weight: Any = WEIGHT, bias: Any = None, **keywords: Any) -> Tensor:
    return effnet_ops.depthwise_conv2d(x, weight, bias, **keywords)


def pointwise(x: Any = X, weight: Any = None, bias: Any = None, **keywords: Any) -> Tensor:
    return effnet_ops.pointwise_conv2d(x, torch.zeros(4, 8, 1, 1) if weight is None else weight, bias, **keywords)


def excite(x: Any = X, rw: Any = None, rb: Any = None, ew: Any = None, eb: Any = None, **keywords: Any) -> Tensor:
    reduce_weight = torch.zeros(2, 8, 1, 1) if rw is None else rw
    expand_weight = torch.zeros(8, 2, 1, 1) if ew is None else ew
    return effnet_ops.squeeze_excite(x, reduce_weight, rb, expand_weight, eb, **keywords)


def norm(channels: int = 8, **fields: Any) -> BatchNormParams:
    ones = [torch.ones(channels) for _ in range(4)]
    return BatchNormParams(*ones, num_batches_tracked=torch.tensor(0))._replace(**fields)


SETTINGS: dict[str, Any] = dict(stride=1, padding=1, residual=True, training=True)


def block(x: Any = X, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = dict(
        expand=ConvNormParams(torch.zeros(16, 8, 1, 1), None, norm(16)),
        depthwise=ConvNormParams(torch.zeros(16, 1, 3, 3), None, norm(16)),
        squeeze_excite=None,
        project=ConvNormParams(torch.zeros(8, 16, 1, 1), None, norm(8)),
    )
    return effnet_ops.mbconv(x, **(arguments | SETTINGS | changes))


def fused(x: Any = X, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = dict(
        expand=ConvNormParams(torch.zeros(16, 8, 3, 3), None, norm(16)),
        squeeze_excite=None,
        project=ConvNormParams(torch.zeros(8, 16, 1, 1), None, norm(8)),
    )
    return effnet_ops.fused_mbconv(x, **(arguments | SETTINGS | changes))


def narrow_se() -> SqueezeExciteParams:
    return SqueezeExciteParams(torch.zeros(2, 8, 1, 1), None, torch.zeros(8, 2, 1, 1), None)


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: depthwise("x"), TypeError, "x must be a tensor, got str"),
    (lambda: depthwise(X[0]), ValueError, "x must be (N, C, H, W), got shape (8, 6, 5)"),
    (lambda: depthwise(X[None]), ValueError, "got shape (1, 2, 8, 6, 5)"),
    (lambda: depthwise(X.long()), TypeError, "got torch.int64"),
    (lambda: depthwise(X.to(torch.complex64)), TypeError, "got torch.complex64"),
    (lambda: depthwise(X.bool()), TypeError, "got torch.bool"),
    (lambda: depthwise(weight=WEIGHT[:7]), ValueError, "(7, 1, 3, 3)"),
    (lambda: depthwise(weight=torch.zeros(8, 2, 3, 3)), ValueError, "weight must have shape (any, 1, any, any)"),
    (lambda: depthwise(weight=WEIGHT[0]), ValueError, "weight must have shape"),
    (lambda: depthwise(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (lambda: depthwise(weight=WEIGHT.double()), TypeError, "weight must be torch.float32"),
    (lambda: depthwise(weight=WEIGHT.half()), TypeError, "got torch.float16"),
    (lambda: depthwise(X.half(), WEIGHT.bfloat16()), TypeError, "weight must be torch.float16 or torch.float32"),
    (lambda: depthwise(X.half(), WEIGHT.double()), TypeError, "got torch.float64"),
    (lambda: depthwise(weight=WEIGHT.to("meta")), ValueError, "weight is on meta, but x is on cpu"),
    (lambda: depthwise(bias=torch.zeros(7)), ValueError, "bias must have shape (8), got (7,)"),
    (lambda: depthwise(bias=torch.zeros(8, 1)), ValueError, "bias must have shape"),
    (lambda: depthwise(bias=torch.zeros(8).double()), TypeError, "bias must be torch.float32"),
    (lambda: depthwise(stride=0), ValueError, "stride must be at least 1, got 0"),
    (lambda: depthwise(stride=-1), ValueError, "stride must be at least 1, got -1"),
    (lambda: depthwise(stride=(1, 0)), ValueError, "stride must be at least 1, got (1, 0)"),
    (lambda: depthwise(stride=(1, 1, 1)), ValueError, "stride must be an int or a pair"),
    (lambda: depthwise(stride=(1.0, 1.0)), ValueError, "stride must be an int or a pair"),
    (lambda: depthwise(stride=1.5), ValueError, "stride must be an int or a pair of ints, got 1.5"),
    (lambda: depthwise(stride=None), ValueError, "stride must be an int or a pair of ints, got None"),
    (lambda: depthwise(stride="11"), ValueError, "stride must be an int or a pair of ints, got '11'"),
    (lambda: depthwise(stride=torch.tensor(1)), ValueError, "stride must be an int or a pair of ints, got tensor(1)"),
    (lambda: depthwise(stride=np.float64(1)), ValueError, "stride must be an int or a pair of ints, got"),
    (lambda: depthwise(stride=2**64), ValueError, "stride must be at most 2147483647, got 18446744073709551616"),
    (lambda: depthwise(dilation=0), ValueError, "dilation must be at least 1"),
    (lambda: depthwise(dilation=(1, 2**31)), ValueError, "dilation must be at most 2147483647, got (1, 2147483648)"),
    (lambda: depthwise(padding=-1), ValueError, "padding must not be negative, got -1"),
    (lambda: depthwise(padding=None), ValueError, "padding must be an int, a pair, (top, bottom, left, right) or"),
    (lambda: depthwise(padding=0.5), ValueError, 'or "same", got 0.5'),
    (lambda: depthwise(padding=2**64), ValueError, "padding must be at most 2147483647, got 18446744073709551616"),
    (lambda: depthwise(padding=(1, 2, 3)), ValueError, "padding must be an int, a pair"),
    (lambda: depthwise(padding="sam"), ValueError, "unknown padding 'sam'; did you mean 'same'"),
    (lambda: depthwise(weight=torch.zeros(8, 1, 7, 7)), ValueError, "does not fit into x of shape (2, 8, 6, 5)"),
    (lambda: depthwise(dilation=3), ValueError, "does not fit"),
    (lambda: depthwise(torch.zeros(2, 8, 0, 5)), ValueError, "does not fit"),
    (lambda: depthwise(activation="slu"), ValueError, "unknown activation 'slu'; did you mean 'silu'"),
    (lambda: depthwise(activation="ReLU6"), ValueError, "did you mean 'relu6'"),
    (lambda: depthwise(activation=["silu"]), ValueError, "unknown activation ['silu']; did you mean 'silu'"),
    (lambda: depthwise(activation=None), ValueError, "unknown activation None"),
    (lambda: pointwise(X[0]), ValueError, "x must be (N, C, H, W)"),
    (lambda: pointwise(X.int()), TypeError, "got torch.int32"),
    (lambda: pointwise(weight=torch.zeros(4, 7, 1, 1)), ValueError, "weight must have shape (any, 8, 1, 1)"),
    (lambda: pointwise(weight=torch.zeros(4, 8, 3, 3)), ValueError, "weight must have shape (any, 8, 1, 1)"),
    (lambda: pointwise(weight=torch.zeros(0, 8, 1, 1)), ValueError, "must have no empty axis"),
    (lambda: pointwise(bias=torch.zeros(8)), ValueError, "bias must have shape (4)"),
    (lambda: pointwise(residual=X), ValueError, "residual must have shape (2, 4, 6, 5)"),
    (lambda: pointwise(residual=torch.zeros(2, 4, 6, 5).half()), TypeError, "residual must be torch.float32"),
    (lambda: pointwise(X.half(), residual=torch.zeros(2, 4, 6, 5)), TypeError, "residual must be torch.float16"),
    (lambda: pointwise(activation="hardswitch"), ValueError, "did you mean 'hardswish'"),
    (lambda: excite(X[0]), ValueError, "x must be (N, C, H, W)"),
    (lambda: excite(torch.zeros(2, 8, 0, 3)), ValueError, "no empty axis"),
    (lambda: excite(rw=torch.zeros(2, 7, 1, 1)), ValueError, "reduce_weight must have shape (any, 8, 1, 1)"),
    (lambda: excite(rw=torch.zeros(0, 8, 1, 1)), ValueError, "reduce_weight (0, 8, 1, 1)"),
    (lambda: excite(rb=torch.zeros(3)), ValueError, "reduce_bias must have shape (2)"),
    (lambda: excite(ew=torch.zeros(8, 3, 1, 1)), ValueError, "expand_weight must have shape (8, 2, 1, 1)"),
    (lambda: excite(eb=torch.zeros(2)), ValueError, "expand_bias must have shape (8)"),
    (lambda: excite(eb=torch.zeros(8, dtype=torch.float64)), TypeError, "expand_bias must be torch.float32"),
    (lambda: excite(gate="sigmid"), ValueError, "unknown gate 'sigmid'; did you mean 'sigmoid'"),
    (lambda: excite(gate=["sigmoid"]), ValueError, "unknown gate ['sigmoid']; did you mean 'sigmoid'"),
    (lambda: excite(activation="x"), ValueError, "unknown activation 'x'"),
    (lambda: block(X[0]), ValueError, "x must be (N, C, H, W)"),
    (lambda: block(X.long()), TypeError, "got torch.int64"),
    (lambda: block(X[:, :7]), ValueError, "expand.weight must have shape (any, 7, 1, 1)"),
    (lambda: block(expand=None), ValueError, "depthwise.weight must have shape (8, 1, any, any)"),
    (
        lambda: block(project=ConvNormParams(torch.zeros(8, 15, 1, 1))),
        ValueError,
        "project.weight must have shape (any, 16, 1, 1)",
    ),
    (
        lambda: block(project=ConvNormParams(torch.zeros(8, 16, 1, 1), None, norm(7))),
        ValueError,
        "project.norm.weight must have shape (8)",
    ),
    (
        lambda: block(project=ConvNormParams(torch.zeros(8, 16, 1, 1), None, norm(running_var=None))),
        ValueError,
        "project.norm must have both running_mean and running_var",
    ),
    (
        lambda: block(
            project=ConvNormParams(torch.zeros(8, 16, 1, 1), None, norm(momentum=None, num_batches_tracked=None))
        ),
        ValueError,
        "project.norm with momentum=None needs num_batches_tracked",
    ),
    (lambda: block(squeeze_excite=narrow_se()), ValueError, "reduce_weight must have shape (any, 16, 1, 1)"),
    (lambda: block(stride=2), ValueError, "residual=True needs an output of x's shape (2, 8, 6, 5)"),
    (lambda: block(stride=0), ValueError, "stride must be at least 1"),
    (lambda: block(padding="valid"), ValueError, "unknown padding 'valid'"),
    (lambda: block(activation="swish"), ValueError, "unknown activation 'swish'"),
    (lambda: block(gate="hardsigmoid"), ValueError, "did you mean 'hard_sigmoid'"),
    (lambda: block(drop_path=1.0), ValueError, "drop_path must be a rate in [0, 1)"),
    (lambda: block(drop_path=-0.1), ValueError, "got -0.1"),
    (lambda: block(drop_path=torch.ones(3)), ValueError, "drop_path must have shape (2,), got (3,)"),
    (lambda: block(drop_path=torch.ones(2, device="meta")), ValueError, "drop_path is on meta, but x is on cpu"),
    (lambda: block(X.to("meta")), ValueError, "is on cpu, but x is on meta"),
    (lambda: block(depthwise=None), TypeError, "depthwise must be ConvNormParams, got NoneType"),
    (lambda: block(project=torch.zeros(8, 16, 1, 1)), TypeError, "project must be ConvNormParams, got Tensor"),
    (lambda: block(squeeze_excite=(None,) * 4), TypeError, "squeeze_excite must be SqueezeExciteParams or None, got"),
    (lambda: fused(expand=None), TypeError, "expand must be ConvNormParams, got NoneType"),
    (lambda: fused(X[:, :7]), ValueError, "expand.weight must have shape (any, 7, any, any), got (16, 8, 3, 3)"),
    (lambda: fused(project=ConvNormParams(torch.zeros(8, 15, 1, 1))), ValueError, "must have shape (any, 16, 1, 1)"),
    (lambda: fused(project=None), ValueError, "residual=True needs an output of x's shape (2, 8, 6, 5), but it is"),
    (lambda: fused(squeeze_excite=narrow_se()), ValueError, "reduce_weight must have shape (any, 16, 1, 1)"),
    (lambda: fused(stride=2), ValueError, "residual=True needs an output of x's shape (2, 8, 6, 5)"),
    (lambda: fused(drop_path=torch.ones(3)), ValueError, "drop_path must have shape (2,), got (3,)"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2] for case in CASES])
def test_error_names_the_culprit(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("two", [np.int64(2), [2, 2], np.array([2, 2]), (np.int32(2), 2)], ids=repr)
def test_whole_numbers_of_any_kind_are_whole_numbers(two: Any) -> None:
    y = depthwise(X, stride=two, padding=two, dilation=two)
    assert y.shape == depthwise(X, stride=2, padding=2, dilation=2).shape == (2, 8, 3, 3)


def test_nothing_is_written_before_an_error() -> None:
    """The running statistics of the first convolutions are not touched when the last one does not fit."""
    first, second = norm(16), norm(16)
    buffers = [t.clone() for n in (first, second) for t in n if isinstance(t, Tensor)]
    with pytest.raises(ValueError, match=r"project\.weight"):
        block(
            normal(2, 8, 6, 5).float(),
            expand=ConvNormParams(torch.ones(16, 8, 1, 1), None, first),
            depthwise=ConvNormParams(torch.ones(16, 1, 3, 3), None, second),
            project=ConvNormParams(torch.zeros(8, 15, 1, 1), None, norm(8)),
        )
    after = [t for n in (first, second) for t in n if isinstance(t, Tensor)]
    assert all(map(torch.equal, after, buffers))


def test_meta_tensors_run_the_reference() -> None:
    y = depthwise(X.to("meta"), WEIGHT.to("meta"), padding=1, stride=2)
    assert y.device.type == "meta" and y.shape == (2, 8, 3, 3)


def test_integer_input_that_would_need_a_gradient() -> None:
    """PyTorch itself refuses the request; what arrives without one is refused here."""
    with pytest.raises(RuntimeError, match="floating point"):
        X.long().requires_grad_()
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        pointwise(X.long(), torch.zeros(4, 8, 1, 1, requires_grad=True))


OPERATOR_CALLS: dict[str, Callable[[], Any]] = {
    "rank": lambda: torch.ops.effnet_ops.depthwise_conv2d(X[0], WEIGHT, None, [1, 1], [], [1, 1], "none"),
    "channels": lambda: torch.ops.effnet_ops.depthwise_conv2d(X, WEIGHT[:7], None, [1, 1], [], [1, 1], "none"),
    "integers": lambda: torch.ops.effnet_ops.depthwise_conv2d(X.int(), WEIGHT, None, [1, 1], [], [1, 1], "none"),
    "activation": lambda: torch.ops.effnet_ops.pointwise_conv2d(X, torch.zeros(4, 8, 1, 1), None, None, "mish"),
    "filters": lambda: torch.ops.effnet_ops.pointwise_conv2d(X, torch.zeros(4, 7, 1, 1), None, None, "none"),
    "bias": lambda: torch.ops.effnet_ops.pointwise_conv2d(X, torch.zeros(4, 8, 1, 1), torch.zeros(5), None, "none"),
    "residual": lambda: torch.ops.effnet_ops.pointwise_conv2d(X, torch.zeros(4, 8, 1, 1), None, X, "none"),
    "stride": lambda: torch.ops.effnet_ops.depthwise_conv2d(X, WEIGHT, None, [0, 1], [], [1, 1], "none"),
    "window": lambda: torch.ops.effnet_ops.depthwise_conv2d(X, WEIGHT, None, [1, 1], [0] * 4, [9, 9], "none"),
    "sides": lambda: torch.ops.effnet_ops.depthwise_conv2d(X, WEIGHT, None, [1, 1], [1, 1], [1, 1], "none"),
}


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_operators_check_for_themselves(name: str) -> None:
    """Whoever calls torch.ops.effnet_ops past the public functions gets an error, not a read out of bounds."""
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError)):
        OPERATOR_CALLS[name]()
