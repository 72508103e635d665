"""The operators of the layers around blocks, on every instruction set of this machine, against the fp64 reference."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, LAYOUTS, expected_strides, lay_out, normal, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from effnet_ops import BatchNormParams, _native, functional, reference
from effnet_ops.checks import resolve_padding
from effnet_ops.ops import _library, conv_norm

assert _native.module is not None, _native.why_missing
C = _native.module
OPS = torch.ops.effnet_ops
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


def norm_arguments(channels: int, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """gamma, beta, mean, var and eps in ``dtype``, and as they are in fp64."""
    gamma, var = torch.rand(channels).double() + 0.5, torch.rand(channels).double() + 0.2
    given = [p.to(dtype) for p in (gamma, normal(channels), normal(channels), var)]
    return [*given, 1e-3], [*(p.double() for p in given), 1e-3]


def normalised(x: Tensor, norm: list[Any], activation: str) -> Tensor:
    gamma, beta, mean, var, eps = norm
    return reference.activate(reference.batch_norm(x, mean, var, gamma, beta, eps), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "activation"),
    [
        ((2, 32, 9, 7), "silu"),
        ((1, 40, 33, 20), "none"),
        ((3, 7, 5, 1), "hardswish"),
        ((2, 1, 4, 4), "relu6"),
        ((2, 50, 1, 1), "relu"),
        ((2, 24, 113, 57), "silu"),
    ],
)
def test_batch_norm(isa: str, size: tuple[int, ...], activation: str, dtype: torch.dtype, poison: None) -> None:
    x = normal(*size)
    for parameters in {dtype, reference.compute_dtype(dtype)}:
        norm, exact_norm = norm_arguments(size[1], parameters)
        exact = normalised(x.to(dtype).double(), exact_norm, activation)
        for layout in LAYOUTS:
            given = lay_out(x.to(dtype), layout)
            y = conv_norm.batch_norm.run(given, *norm, activation)
            assert y.dtype is dtype and y.stride() == expected_strides(given, y.shape)
            assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


CONVOLUTIONS: list[tuple[int, int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, ...]]] = [
    (1, 3, 32, (33, 20), (3, 3), (2, 2), (1, 1, 1, 1)),
    (2, 3, 24, (16, 17), (3, 3), (2, 2), ()),
    (1, 1, 17, (9, 9), (7, 5), (1, 2), (3, 3, 2, 2)),
    (2, 16, 40, (8, 8), (2, 2), (2, 2), (0, 0, 0, 0)),
    (2, 3, 8, (5, 6), (1, 1), (2, 1), (0, 0, 0, 0)),
    (1, 3, 8, (5, 6), (1, 1), (1, 1), (1, 0, 0, 0)),
    (2, 20, 33, (7, 5), (1, 1), (1, 1), (0, 0, 0, 0)),
    (1, 320, 96, (6, 6), (1, 1), (1, 1), ()),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["norm", "bias", "nothing"])
@pytest.mark.parametrize(("batch", "channels", "out", "size", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_conv_norm(
    isa: str,
    batch: int,
    channels: int,
    out: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, ...],
    norm: str,
    dtype: torch.dtype,
    poison: None,
) -> None:
    x = normal(batch, channels, *size)
    weight = (normal(out, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    sides = resolve_padding(padding, size, kernel, stride, (1, 1))
    given_norm, exact_norm = norm_arguments(out, dtype)
    zeros = torch.zeros(out).double()
    exact = reference.convolution(x.to(dtype).double(), weight.double(), zeros, stride, sides, "none")
    if norm == "norm":
        exact = normalised(exact, exact_norm, "silu")
    else:
        bias = exact_norm[1] if norm == "bias" else zeros
        exact = reference.activate(exact + bias[:, None, None], "silu")
        given_norm = [None, given_norm[1] if norm == "bias" else None, None, None, 0.0]
    for layout in LAYOUTS:
        for filters in (weight, weight.contiguous(memory_format=torch.channels_last)):
            given = lay_out(x.to(dtype), layout)
            y = conv_norm.conv_norm.run(given, filters, *given_norm, stride, padding, "silu")
            last = conv_norm.keeps_channels_last(given, filters)
            assert y.dtype is dtype
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


def arguments(name: str, dtype: torch.dtype, layout: str) -> list[Any]:
    x = lay_out(normal(2, 6, 7, 5).to(dtype), layout)
    norm = norm_arguments(9 if name == "conv_norm_inference" else 6, dtype)[0]
    if name == "batch_norm_inference":
        return [x, *norm, "silu"]
    return [x, normal(9, 6, 3, 3).to(dtype), *norm, [2, 2], [], "silu"]


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("name", ["batch_norm_inference", "conv_norm_inference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(name: str, layout: str, gradients: bool) -> None:
    args = arguments(name, torch.float32, layout)
    for i in _library.OPERATORS[name].signature.differentiable:
        if args[i] is not None:
            args[i].requires_grad_(gradients)
    torch.library.opcheck(getattr(OPS, name).default, tuple(args))


@pytest.mark.parametrize("name", ["batch_norm_inference", "conv_norm_inference"])
def test_fallback_agrees_with_the_kernel_and_has_its_strides(name: str) -> None:
    for layout in LAYOUTS:
        args = arguments(name, torch.float64, layout)
        y, other = getattr(OPS, name)(*args), _library.OPERATORS[name].fallback(*args)
        assert other.stride() == y.stride()
        assert relative_error(y, other) < FORWARD_TOLERANCE[torch.float64]


def test_autocast_rounds_the_input_of_a_convolution_and_no_norm() -> None:
    x = normal(2, 6, 7, 5).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        convolved = OPS.conv_norm_inference(*arguments("conv_norm_inference", torch.float32, "channels_last"))
        y = OPS.batch_norm_inference(x, *arguments("batch_norm_inference", torch.float32, "channels_last")[1:])
    assert (convolved.dtype, y.dtype) == (torch.bfloat16, torch.float32)


def test_flops_are_those_of_the_convolution() -> None:
    args = arguments("conv_norm_inference", torch.float32, "channels_last")
    with FlopCounterMode(display=False) as counter:
        y = OPS.conv_norm_inference(*args)
    assert counter.get_total_flops() == 2 * y.numel() * 6 * 9


@pytest.mark.parametrize("name", ["batch_norm_inference", "conv_norm_inference"])
def test_threads_change_no_bit(name: str) -> None:
    args = arguments(name, torch.float32, "channels_last")
    args[0] = torch.randn(2, 6, 150, 70).to(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(getattr(OPS, name)(*args))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.ones(9, 5, 3, 3)}, "weight"),
        ({1: torch.ones(9, 6, 17, 1)}, "taller than 16"),
        ({2: torch.ones(8)}, "gamma must have 9 elements"),
        ({4: None}, "none of them"),
        ({0: torch.ones(2, 6, 1, 1), 8: [0, 0, 0, 0]}, "does not fit"),
    ],
)
def test_direct_call_cannot_read_out_of_bounds(change: dict[int, Any], message: str) -> None:
    args = arguments("conv_norm_inference", torch.float32, "channels_last")
    for position, value in change.items():
        args[position] = value
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        OPS.conv_norm_inference(*args)


_FAULTS = """
import resource, timm, torch, effnet_ops
torch.set_num_threads(1)
model, x = timm.create_model("efficientnet_b0").eval(), torch.randn(8, 3, 224, 224)
effnet_ops.replace_layers(model)
model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        model(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // calls
with torch.inference_mode():
    faults(8)
    print(min(faults(3) for _ in range(4)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how memory is kept is glibc's")
def test_large_outputs_are_not_faulted_in_at_each_call() -> None:
    """The first two outputs have 12.8 MB each, 6272 pages; where glibc puts them takes some calls to settle."""
    result = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 600


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("size", "activation"),
    [((2, 32, 9, 7), "silu"), ((3, 7, 5, 1), "hardswish"), ((2, 1, 4, 4), "relu6"), ((70, 300, 1, 1), "none")],
)
def test_batch_norm_with_gradients(
    isa: str, size: tuple[int, ...], activation: str, training: bool, dtype: torch.dtype, poison: None
) -> None:
    x, grad = normal(*size), normal(*size)
    given = [p.to(reference.compute_dtype(dtype)) for p in norm_arguments(size[1], torch.float64)[0][:4]]
    exact_x = x.to(dtype).double().requires_grad_()
    exact_norm = [p.double().requires_grad_(i < 2) for i, p in enumerate(given)]
    mean, var = reference.batch_statistics(exact_x) if training else exact_norm[2:]
    exact = normalised(exact_x, [*exact_norm[:2], mean, var, 1e-3], activation)
    expected = torch.autograd.grad(exact, [exact_x, *exact_norm[:2]], grad.to(dtype).double())
    for layout in LAYOUTS:
        x_given = lay_out(x.to(dtype), layout).requires_grad_()
        norm = BatchNormParams(*(p.clone().requires_grad_(i < 2) for i, p in enumerate(given)), eps=1e-3)
        y = functional.batch_norm(x_given, norm, activation=activation, training=training)
        assert y.dtype is dtype and y.stride() == expected_strides(x_given, y.shape)
        assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]
        found = torch.autograd.grad(y, [x_given, norm.weight, norm.bias], grad.to(dtype))
        for value, right in zip(found, expected, strict=True):
            assert relative_error(value, right) < 3 * GRADIENT_TOLERANCE[dtype]
        if training:
            count = x.numel() // size[1]
            running = torch.lerp(given[3].double(), var * count / (count - 1), 0.1)
            assert relative_error(norm.running_var, running) < FORWARD_TOLERANCE[dtype]


def test_batch_norm_is_the_same_on_two_threads(two_threads: None) -> None:
    x = normal(4, 48, 40, 40).float().to(memory_format=torch.channels_last).requires_grad_()
    norm = BatchNormParams(torch.rand(48).requires_grad_(), torch.rand(48).requires_grad_())
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = functional.batch_norm(x, norm, activation="silu", training=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *norm[:2]])])
    assert all(map(torch.equal, *results))


def test_batch_norm_refuses_what_does_not_fit() -> None:
    x = normal(2, 6, 7, 5).float()
    with pytest.raises(ValueError, match=r"norm.weight .*\(5,\)"):
        functional.batch_norm(x, BatchNormParams(torch.ones(5), None), training=True)
    with pytest.raises(ValueError, match="unknown activation 'silo'; did you mean 'silu'"):
        functional.batch_norm(x, BatchNormParams(None, None), activation="silo", training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.batch_norm(x[:1, :, :1, :1], BatchNormParams(None, None), training=True)
