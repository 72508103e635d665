"""The operators of a whole block on Triton kernels, but for the depthwise convolution, where `ops/gpu.py` says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnet_ops import backends
from effnet_ops.checks import resolve_padding
from effnet_ops.kernels import mbconv as kernels
from effnet_ops.kernels.layout import nchw, nhwc
from effnet_ops.kernels.squeeze_excite import Parameters
from effnet_ops.ops import _library, gpu
from effnet_ops.ops.cuda import block_depthwise
from effnet_ops.ops.mbconv import N_INPUTS, Block, Config, split
from effnet_ops.ops.triton.layout import result_like
from effnet_ops.reference import compute_dtype

_N_STAGES = 10
_DEPTHWISE = {
    "cuda": kernels.Depthwise(block_depthwise.forward, block_depthwise.backward),
    "triton": kernels.TRITON,
}


def _window(block: Block, config: Config) -> backends.Window:
    return backends.Window(block.depthwise_weight.shape[2:], config.stride, (1, 1))


def _uncovered(block: Block, config: Config) -> bool:
    return block.x.shape[0] == 0 or bool(backends.BACKENDS["triton"].uncovered(_window(block, config)))


def _sides(block: Block, config: Config) -> tuple[int, int, int, int]:
    return resolve_padding(config.padding, block.x.shape[2:], block.depthwise_weight.shape[2:], config.stride, (1, 1))


def _depthwise(block: Block, config: Config) -> kernels.Depthwise:
    """The functions that convolve."""
    batch, _, *size = block.x.shape
    expanded = (batch, block.depthwise_weight.shape[0], *size)
    return _DEPTHWISE[gpu.block_depthwise(block.x, expanded, _window(block, config), _sides(block, config))]


def _block(block: Block, config: Config) -> kernels.Block:
    """The operators' arguments as the kernels take them."""
    tensors = {name: None if t is None else t.contiguous() for name, t in block._asdict().items() if name != "x"}

    def convolution(name: str, eps: float) -> kernels.Convolution | None:
        fields = ("weight", "gamma", "beta", "mean", "var")
        weight, *norm = (tensors[f"{name}_{field}"] for field in fields)
        return None if weight is None else kernels.Convolution(weight, *norm, eps)

    se = [tensors[f"se_{name}"] for name in ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")]
    expand, depthwise, project = map(convolution, ("expand", "depthwise", "project"), config.eps)
    return kernels.Block(
        nhwc(block.x),
        expand,
        depthwise,
        None if se[0] is None else Parameters(*se, config.se_activation, config.gate),
        project,
        tensors["drop_path"],
        config.stride,
        _sides(block, config),
        config.residual,
        config.activation,
    )


def mbconv_inference(*args: Any) -> Tensor:
    block, config = split(args)
    if _uncovered(block, config):
        return _library.fallbacks["mbconv_inference"](*args)
    return result_like(kernels.inference(_block(block, config), _depthwise(block, config)), block.x)


def mbconv_training(*args: Any) -> tuple[Tensor, ...]:
    block, config = split(args)
    if _uncovered(block, config):
        return _library.fallbacks["mbconv_training"](*args)
    x, save_expanded = block.x, args[N_INPUTS]
    made = kernels.training(_block(block, config), _depthwise(block, config))
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
    found = kernels.backward(nhwc(grad), _block(block, config), saved, needs, _depthwise(block, config))
    dx = None if found.x is None else result_like(found.x, block.x)
    return tuple(block.x.new_empty(0) if value is None else value for value in found._replace(x=dx))
