"""Activations, gates and their derivatives as Triton functions, and conversions between stored and computed precision.

The codes in `ACTIVATION_CODES` and `GATE_CODES` are what kernels take as constants: the places of the names in
`reference/activation.py`. Values are fp32, or fp64 where tensors are.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from effnet_ops.kernels import interpreter
from effnet_ops.reference.activation import ACTIVATIONS, GATES

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter; Triton itself decides that once, when a kernel is defined."""

if INTERPRETED:
    interpreter.repair()

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
GATE_CODES = {name: code for code, name in enumerate(GATES)}

NONE = tl.constexpr(ACTIVATION_CODES["none"])
RELU = tl.constexpr(ACTIVATION_CODES["relu"])
RELU6 = tl.constexpr(ACTIVATION_CODES["relu6"])
SILU = tl.constexpr(ACTIVATION_CODES["silu"])
HARDSWISH = tl.constexpr(ACTIVATION_CODES["hardswish"])
GELU = tl.constexpr(ACTIVATION_CODES["gelu"])
GELU_TANH = tl.constexpr(ACTIVATION_CODES["gelu_tanh"])
SIGMOID = tl.constexpr(GATE_CODES["sigmoid"])

_INTERPRETED = tl.constexpr(INTERPRETED)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of products of tensors of ``dtype`` are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _fast_tanh(x):
    """By one call of the special-function unit, with an error of 2^-11: for results in bf16."""
    if _INTERPRETED:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    # Where exp overflows, in fp32 below -88, the quotient is the right 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def normal_below(x):
    """The standard normal distribution function, by which GELU multiplies x."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu_inner(x):
    """GELU by tanh is x times the sigmoid of this: 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * (1.5957691216057308 + 0.07135481627260025 * x * x)


@triton.jit
def normalise(x, norm, FOLDED: tl.constexpr = False):
    """(x - mean) * scale + shift of norm = (mean, scale, shift); or x * scale + shift, after `fold`."""
    if FOLDED:
        return x * norm[1] + norm[2]
    else:
        # Centred, since |mean| can be far larger than the deviation.
        return (x - norm[0]) * norm[1] + norm[2]


@triton.jit
def fold(norm, KIND: tl.constexpr, FAST: tl.constexpr):
    """(mean, scale, shift) for `normalise` with FOLDED, in front of `activate` with HALVED = FAST.

    For tensors stored in 16 bits: what cancels where |mean| is far larger than the deviation is 2^-24 of it, and x
    itself is known to 2^-12 at best. What is issued for each element limits kernels, and this saves two operations.
    """
    scale, shift = norm[1], norm[2] - norm[0] * norm[1]
    if FAST and KIND == SILU:
        scale, shift = 0.5 * scale, 0.5 * shift
    return norm[0], scale, shift


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr = False, HALVED: tl.constexpr = False):
    """The activation at x. With FAST and HALVED, what is passed is x / 2 where the activation is SiLU."""
    if KIND == RELU:
        return tl.maximum(x, 0.0)
    elif KIND == RELU6:
        return tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif KIND == SILU:
        if FAST:
            half = x if HALVED else 0.5 * x
            return half * _fast_tanh(half) + half
        else:
            return x * sigmoid(x)
    elif KIND == HARDSWISH:
        return x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1.0 / 6.0))
    elif KIND == GELU:
        return x * normal_below(x)
    elif KIND == GELU_TANH:
        return x * sigmoid(gelu_inner(x))
    else:
        return x


@triton.jit
def activation_gradient(x, KIND: tl.constexpr, FAST: tl.constexpr = False, HALVED: tl.constexpr = False):
    """The derivative at x; at a kink, the one that PyTorch takes. FAST and HALVED as in `activate`."""
    if KIND == RELU:
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    elif KIND == RELU6:
        return tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0).to(x.dtype)
    elif KIND == SILU:
        if FAST:
            half = x if HALVED else 0.5 * x
            tanh = _fast_tanh(half)
            s = 0.5 * tanh + 0.5
            return (half * tanh + half) * (1.0 - s) + s
        else:
            s = sigmoid(x)
            return x * s * (1.0 - s) + s
    elif KIND == HARDSWISH:
        inside = x * (1.0 / 3.0) + 0.5
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, inside, 1.0))
    elif KIND == GELU:
        return x * 0.3989422804014327 * tl.exp(-0.5 * x * x) + normal_below(x)
    elif KIND == GELU_TANH:
        s = sigmoid(gelu_inner(x))
        # Further out s is 0 or 1 to all digits, and no product overflows.
        inside = tl.minimum(tl.abs(x), 40.0)
        slope = 1.5957691216057308 + 0.2140644488178008 * inside * inside
        return s + x * s * (1.0 - s) * slope
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


@triton.constexpr_function
def _divides(divisor, number):
    return number % divisor == 0


@triton.jit
def inside(o_c, C: tl.constexpr):
    """Which channels of a block are below C. Where eight neighbours share the answer, the compiler can see that."""
    if _divides(o_c.shape[0], C):
        return tl.full(o_c.shape, True, tl.int1)
    elif _divides(8, C):
        return o_c // 8 < C // 8
    else:
        return o_c < C


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


@triton.jit
def once(x, ANCHOR: tl.constexpr):
    """x, computed by one thread where ANCHOR is set.

    Triton moves what leads to a product's operand behind the exchange of data between threads, where each of several
    warps holds the operand and would compute it again. It does not move what may have an effect.
    """
    if ANCHOR and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def operand(x, TYPE: tl.constexpr):
    """x as a product takes it: rounded to TYPE, that of the tensors; the interpreter can only multiply it widened."""
    x = narrow(x, TYPE)
    if _INTERPRETED:
        x = widen(x)
    return x
