"""The operators of a whole block on Triton kernels, but for the depthwise convolution, where `ops/gpu.py` says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnet_ops import backends
from effnet_ops.kernels import mbconv as kernels
from effnet_ops.kernels.layout import nchw, nhwc
from effnet_ops.ops import gpu
from effnet_ops.ops.calls import ConvNorm
from effnet_ops.ops.cuda import block_depthwise
from effnet_ops.ops.mbconv import MBConvCall, MBConvGradientCall, MBConvTrainingCall
from effnet_ops.ops.triton.layout import result_like
from effnet_ops.ops.triton.squeeze_excite import parameters
from effnet_ops.reference import compute_dtype

_DEPTHWISE = {
    "cuda": kernels.Depthwise(block_depthwise.forward, block_depthwise.backward),
    "triton": kernels.TRITON,
}


def _uncovered(call: MBConvCall) -> bool:
    return call.x.shape[0] == 0 or bool(backends.BACKENDS["triton"].uncovered(call.window()))


def _depthwise(call: MBConvCall) -> kernels.Depthwise:
    """The functions that convolve."""
    batch, _, *size = call.x.shape
    expanded = (batch, call.depthwise.weight.shape[0], *size)
    return _DEPTHWISE[gpu.block_depthwise(call.x, expanded, call.window(), call.sides())]


def convolution(conv: ConvNorm | None, any_strides: bool = False) -> kernels.Convolution | None:
    """A convolution as the kernels take it; a dense one's weight may have any strides."""
    if conv is None:
        return None
    weight, *vectors, eps = conv
    weight = weight if any_strides else weight.contiguous()
    return kernels.Convolution(weight, *(None if t is None else t.contiguous() for t in vectors), eps)


def empty_or(value: Tensor | None, x: Tensor) -> Tensor:
    """A vector that training hands to its gradient, empty where there is none."""
    return x.new_empty(0, dtype=compute_dtype(x.dtype)) if value is None else value


def kept(saved: Tensor) -> Tensor | None:
    """What training hands to its gradient of a stage, pixels first; None where there is none."""
    return nhwc(saved) if saved.numel() else None


def gradients(found: Any, x: Tensor) -> tuple[Tensor, ...]:
    """As the operator of either kind of block gives them: that of x with its strides, empty where nobody asked."""
    dx = None if found.x is None else result_like(found.x, x)
    return tuple(x.new_empty(0) if value is None else value for value in found._replace(x=dx))


def _block(call: MBConvCall) -> kernels.Block:
    """The call as the kernels take it."""
    return kernels.Block(
        nhwc(call.x),
        convolution(call.expand),
        convolution(call.depthwise),
        None if call.squeeze_excite is None else parameters(call.squeeze_excite),
        convolution(call.project),
        None if call.drop_path is None else call.drop_path.contiguous(),
        call.stride,
        call.sides(),
        call.dilation,
        call.residual,
        call.activation,
    )


def mbconv_inference(call: MBConvCall) -> Tensor:
    if _uncovered(call):
        return call.reference()
    return result_like(kernels.inference(_block(call), _depthwise(call)), call.x)


def mbconv_training(training: MBConvTrainingCall) -> tuple[Tensor, ...]:
    call = training.call
    if _uncovered(call):
        return training.reference()
    made = kernels.training(_block(call), _depthwise(call))
    expanded = made.expanded if training.save_expanded else None
    return (
        result_like(made.y, call.x),
        call.x.new_empty(0) if expanded is None else nchw(expanded),
        nchw(made.convolved),
        nchw(made.projected),
        *(empty_or(value, call.x) for used in made.statistics for value in used or (None, None)),
        empty_or(made.pooled, call.x),
    )


def mbconv_backward(gradient: MBConvGradientCall) -> tuple[Tensor, ...]:
    grad, call, saved, needs = gradient
    if _uncovered(call):
        return gradient.reference()
    forward = kernels.Forward(
        None,
        kept(saved.expanded),
        nhwc(saved.convolved),
        nhwc(saved.projected),
        saved.statistics(),
        saved.pooled if saved.pooled.numel() else None,
    )
    return gradients(kernels.backward(nhwc(grad), _block(call), forward, needs, _depthwise(call)), call.x)
