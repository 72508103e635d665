"""The operators of a whole block on Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnet_ops import backends
from effnet_ops.checks import resolve_padding
from effnet_ops.kernels import mbconv as kernels
from effnet_ops.kernels.layout import nchw, nhwc
from effnet_ops.kernels.squeeze_excite import Parameters
from effnet_ops.ops import _library
from effnet_ops.ops.mbconv import N_INPUTS, Block, Config, split
from effnet_ops.ops.triton.layout import result_like
from effnet_ops.reference import compute_dtype

_N_STAGES = 10


def _uncovered(block: Block, config: Config) -> bool:
    window = backends.Window(block.depthwise_weight.shape[2:], config.stride, (1, 1))
    return block.x.shape[0] == 0 or bool(backends.BACKENDS["triton"].uncovered(window))


def _block(block: Block, config: Config) -> kernels.Block:
    """The operators' arguments as the kernels take them."""
    tensors = {name: None if t is None else t.contiguous() for name, t in block._asdict().items() if name != "x"}

    def convolution(name: str, eps: float) -> kernels.Convolution | None:
        fields = ("weight", "gamma", "beta", "mean", "var")
        weight, *norm = (tensors[f"{name}_{field}"] for field in fields)
        return None if weight is None else kernels.Convolution(weight, *norm, eps)

    se = [tensors[f"se_{name}"] for name in ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")]
    expand, depthwise, project = map(convolution, ("expand", "depthwise", "project"), config.eps)
    size, kernel = block.x.shape[2:], block.depthwise_weight.shape[2:]
    return kernels.Block(
        nhwc(block.x),
        expand,
        depthwise,
        None if se[0] is None else Parameters(*se, config.se_activation, config.gate),
        project,
        tensors["drop_path"],
        config.stride,
        resolve_padding(config.padding, size, kernel, config.stride, (1, 1)),
        config.residual,
        config.activation,
    )


def mbconv_inference(*args: Any) -> Tensor:
    block, config = split(args)
    if _uncovered(block, config):
        return _library.fallbacks["mbconv_inference"](*args)
    return result_like(kernels.inference(_block(block, config)), block.x)


def mbconv_training(*args: Any) -> tuple[Tensor, ...]:
    block, config = split(args)
    if _uncovered(block, config):
        return _library.fallbacks["mbconv_training"](*args)
    x, save_expanded = block.x, args[N_INPUTS]
    made = kernels.training(_block(block, config))
    expanded = made.expanded if save_expanded else None

    def vector(value: Tensor | None) -> Tensor:
        return x.new_empty(0, dtype=compute_dtype(x.dtype)) if value is None else value

    return (
        result_like(made.y, x),
        x.new_empty(0) if expanded is None else nchw(expanded),
        nchw(made.convolved),
        nchw(made.projected),
        *(vector(value) for used in made.statistics for value in used or (None, None)),
        vector(made.pooled),
    )


def mbconv_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    block, config = split(args)
    if _uncovered(block, config):
        return _library.fallbacks["mbconv_backward"](grad, *args)
    needs = args[-1]
    expanded, convolved, projected, *vectors, pooled = args[N_INPUTS : N_INPUTS + _N_STAGES]
    statistics = [(mean, var) if mean.numel() else None for mean, var in zip(vectors[::2], vectors[1::2], strict=True)]
    saved = kernels.Forward(
        None,
        nhwc(expanded) if expanded.numel() else None,
        nhwc(convolved),
        nhwc(projected),
        statistics,
        pooled if pooled.numel() else None,
    )
    found = kernels.backward(nhwc(grad), _block(block, config), saved, needs)
    dx = None if found.x is None else result_like(found.x, block.x)
    return tuple(block.x.new_empty(0) if value is None else value for value in found._replace(x=dx))
