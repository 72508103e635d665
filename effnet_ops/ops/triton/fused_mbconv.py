"""The operators of a whole Fused-MBConv block on Triton kernels."""

from __future__ import annotations

from torch import Tensor

from effnet_ops import backends
from effnet_ops.kernels import fused_mbconv as kernels
from effnet_ops.kernels.layout import nchw, nhwc
from effnet_ops.ops.fused_mbconv import FusedMBConvCall, FusedMBConvGradientCall, FusedMBConvTrainingCall
from effnet_ops.ops.triton.layout import result_like
from effnet_ops.ops.triton.mbconv import convolution, empty_or, gradients, kept
from effnet_ops.ops.triton.squeeze_excite import parameters


def _uncovered(call: FusedMBConvCall) -> bool:
    if call.x.shape[0] == 0 or (call.project is None and call.squeeze_excite is not None):
        return True
    return bool(backends.BACKENDS["triton"].uncovered(call.window()))


def _block(call: FusedMBConvCall) -> kernels.Block:
    """The call as the kernels take it."""
    return kernels.Block(
        nhwc(call.x),
        convolution(call.expand, any_strides=True),
        None if call.squeeze_excite is None else parameters(call.squeeze_excite),
        convolution(call.project),
        None if call.drop_path is None else call.drop_path.contiguous(),
        call.stride,
        call.sides(),
        call.residual,
        call.activation,
    )


def fused_mbconv_inference(call: FusedMBConvCall) -> Tensor:
    if _uncovered(call):
        return call.reference()
    return result_like(kernels.inference(_block(call)), call.x)


def fused_mbconv_training(training: FusedMBConvTrainingCall) -> tuple[Tensor, ...]:
    call = training.call
    if _uncovered(call):
        return training.reference()
    made = kernels.training(_block(call))
    return (
        result_like(made.y, call.x),
        nchw(made.convolved) if training.save_expanded else call.x.new_empty(0),
        call.x.new_empty(0) if made.projected is None else nchw(made.projected),
        *(empty_or(value, call.x) for used in made.statistics for value in used or (None, None)),
        empty_or(made.pooled, call.x),
    )


def fused_mbconv_backward(gradient: FusedMBConvGradientCall) -> tuple[Tensor, ...]:
    grad, call, saved, needs = gradient
    if _uncovered(call):
        return gradient.reference()
    forward = kernels.Forward(
        None,
        kept(saved.expanded),
        kept(saved.projected),
        saved.statistics(),
        saved.pooled if saved.pooled.numel() else None,
    )
    return gradients(kernels.backward(nhwc(grad), _block(call), forward, needs), call.x)
