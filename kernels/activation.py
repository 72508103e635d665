"""Activations, gates and their derivatives as Triton functions, and conversions between stored and computed precision.

The codes in `ACTIVATION_CODES` and `GATE_CODES` are what kernels take as constants. Values are fp32, or fp64 where
tensors are.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from effnet_ops.kernels import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter; Triton itself decides that once, when a kernel is defined."""

if INTERPRETED:
    interpreter.repair()

ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
GATE_CODES = {"sigmoid": 0, "hard_sigmoid": 1}

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)
SIGMOID = tl.constexpr(0)

_INTERPRETED = tl.constexpr(INTERPRETED)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of products of tensors of ``dtype`` are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def sigmoid(x, FAST: tl.constexpr = False):
    """1 / (1 + exp(-x)). ``FAST``: by one call of the special-function unit, with an error of 2.4e-4: for bf16."""
    if FAST and not _INTERPRETED:
        return 0.5 + 0.5 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
    # Where exp overflows, in fp32 below -88, the quotient is the right 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr = False):
    if KIND == RELU:
        return tl.maximum(x, 0.0)
    elif KIND == RELU6:
        return tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif KIND == SILU:
        return x * sigmoid(x, FAST)
    elif KIND == HARDSWISH:
        return x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1.0 / 6.0))
    else:
        return x


@triton.jit
def activation_gradient(x, KIND: tl.constexpr, FAST: tl.constexpr = False):
    """The derivative at x; at a kink, the one that PyTorch takes."""
    if KIND == RELU:
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    elif KIND == RELU6:
        return tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0).to(x.dtype)
    elif KIND == SILU:
        s = sigmoid(x, FAST)
        return s + x * s * (1.0 - s)
    elif KIND == HARDSWISH:
        inside = x * (1.0 / 3.0) + 0.5
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, inside, 1.0))
    else:
        return x * 0.0 + 1.0


@triton.jit
def gate(x, KIND: tl.constexpr):
    if KIND == SIGMOID:
        return sigmoid(x)
    else:
        return tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1.0 / 6.0)


@triton.jit
def gate_gradient(x, KIND: tl.constexpr):
    """The derivative at x."""
    if KIND == SIGMOID:
        s = sigmoid(x)
        return s * (1.0 - s)
    else:
        return tl.where((x > -3.0) & (x < 3.0), tl.full(x.shape, 1.0 / 6.0, x.dtype), 0.0)


@triton.jit
def widen(x):
    """A loaded value in the precision that it is computed in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to nearest even, as it is stored. The interpreter's own conversion to bf16 would cut it off."""
    if DTYPE == tl.bfloat16 and _INTERPRETED:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x != x, bits, rounded)
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)
