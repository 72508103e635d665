"""Inputs with awkward strides, the comparison with the fp64 reference, and MBConv blocks with realistic statistics."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from cases import MBConvCase
from torch import Tensor

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, SqueezeExciteParams, backends, reference

HALF = (torch.float16, torch.bfloat16)
FORWARD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last")

Tensors = dict[str, Tensor | None]
Function = Callable[[Tensors], Tensor]


def names(cases: Iterable[Any]) -> list[str]:
    return [case.name for case in cases]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (N, C, H, W) as a slice of a larger tensor, with NaN all around it."""
    batch, channels, height, width = x.shape
    sliced = layout.startswith("sliced")
    size = (batch + 2, channels + 3, height + 2, width + 1) if sliced else (batch + 2, channels, height, width)
    last = layout.endswith("channels_last")
    larger = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    larger.fill_(float("nan"))
    part = larger[1 : batch + 1]
    if sliced:
        part = part[:, 1 : channels + 1, 2:, :width]
    return part.copy_(x)


def expected_strides(x: Tensor, size: Iterable[int]) -> tuple[int, ...]:
    """Strides of a result of this size that belongs to x: channels_last if only the channels of x are innermost."""
    last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    format_ = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(size), memory_format=format_, device="meta").stride()


def relative_error(value: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """||value - exact|| / ||exact||, or over ``floor`` where that is larger."""
    scale = max(exact.norm().item(), floor)
    error = (value.double() - exact).norm().item()
    return error / scale if scale > 0 else error


def is_activation(name: str) -> bool:
    return name in ("x", "residual")


def is_constant(name: str) -> bool:
    return name.endswith(("running_mean", "running_var")) or name == "drop_path"


def prepared(tensors: Tensors, dtype: torch.dtype, layout: str, parameter_dtype: torch.dtype | None = None) -> Tensors:
    """Activations in ``dtype`` and ``layout``; parameters in ``parameter_dtype``, or fp32 for half precision."""
    parameter_dtype = parameter_dtype or (torch.float32 if dtype in HALF else dtype)
    cast: Tensors = {}
    for name, value in tensors.items():
        if value is None:
            cast[name] = None
        elif is_activation(name):
            cast[name] = lay_out(value.to(dtype), layout)
        else:
            cast[name] = value.to(parameter_dtype)
    return cast


def run(function: Function, tensors: Tensors, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """``function``'s output, and the gradients of its inputs for the output gradient ``grad`` (or of ones)."""
    leaves = {
        name: value if value is None else value.detach().requires_grad_(not is_constant(name))
        for name, value in tensors.items()
    }
    out = function(leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grad = torch.ones_like(out) if grad is None else grad
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    return out.detach(), dict(zip(wanted, found, strict=True))


def check(
    function: Function,
    tensors: Tensors,
    dtype: torch.dtype,
    layout: str = "channels_last",
    *,
    parameter_dtype: torch.dtype | None = None,
    forward_tolerance: float | None = None,
    gradient_tolerance: float | None = None,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Output and gradients of ``function`` in ``dtype`` against the reference in fp64 on the same, rounded, inputs.

    A gradient that (nearly) vanishes, by symmetry as that of a shift before a normalisation, or by chance, is measured
    against a tenth of the median gradient's norm: its error is that of terms that cancel. A single number, one sum that
    may vanish where the nine of a filter do not all, is measured against a third of it.
    ``rounded_to`` is for `rounded_convolutions`.
    """
    inputs = prepared(tensors, dtype, layout, parameter_dtype)
    exact_inputs = {name: value if value is None else value.double() for name, value in inputs.items()}
    with effnet_ops.use_backend("reference"), torch.no_grad():
        shape = function(exact_inputs).shape
    grad = lay_out(normal(*shape).to(dtype), "contiguous" if layout == "sliced_channels_last" else "channels_last")
    with effnet_ops.use_backend("reference"), rounded_convolutions(rounded_to):
        exact, exact_grads = run(function, exact_inputs, grad.double())
    out, grads = run(function, inputs, grad)

    x = inputs["x"]
    assert out.dtype == x.dtype
    assert relative_error(out, exact) <= (forward_tolerance or FORWARD_TOLERANCE[dtype])
    norms = sorted(value.norm().item() for value in exact_grads.values())
    median = norms[len(norms) // 2]
    floors = {name: median * (0.1 if value.numel() > 1 else 1 / 3) for name, value in exact_grads.items()}
    bound = gradient_tolerance or GRADIENT_TOLERANCE[dtype]
    errors = {name: relative_error(grads[name], value, floors[name]) for name, value in exact_grads.items()}
    assert all(error <= bound for error in errors.values()), errors
    for name, value in grads.items():
        assert value.dtype == inputs[name].dtype and value.shape == inputs[name].shape
    if backends.select(x) != "reference":
        assert out.stride() == expected_strides(x, out.shape)
        assert grads["x"].stride() == expected_strides(x, x.shape)


def mbconv_bounds(case: MBConvCase, dtype: torch.dtype) -> dict[str, Any]:
    """How to judge a block's gradients, where what training keeps is rounded to half precision of unit roundoff u.

    The reference rounds at the same places, because that rounding moves a share of about u of all elements across the
    corners of an activation, an error of sqrt(u) or more that says nothing of the kernels. What remains is the rounding
    of three gradients on the way, each by as much as a whole operator's output: three times its bound. Without an
    activation between them, the next normalisation takes away what one's scale does: the gradient of that scale is an
    eighth of the others, what is left of terms that cancel, and has twice that error.
    """
    if dtype not in HALF:
        return {}
    cancels = case.activation == "none" and case.norm == "batch" and case.expanded
    return {"gradient_tolerance": (6 if cancels else 3) * GRADIENT_TOLERANCE[dtype], "rounded_to": dtype}


@contextlib.contextmanager
def rounded_convolutions(dtype: torch.dtype | None) -> Iterator[None]:
    """The reference block rounds its convolutions, before biases, to ``dtype``; gradients pass as if it did not."""
    if dtype is None:
        yield
        return

    def rounded(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, weight: Tensor, bias: Tensor | None, *config: Any) -> Tensor:
            y = convolution(x, weight, None, *config)
            y = y + (y.to(dtype).to(y.dtype) - y).detach()
            return y if bias is None else y + bias[:, None, None]

        return function

    with pytest.MonkeyPatch.context() as patch:
        for block, spatial in (("mbconv", "depthwise_conv2d"), ("fused_mbconv", "convolution")):
            module = sys.modules[f"effnet_ops.reference.{block}"]
            for name in ("pointwise_conv2d", spatial):
                patch.setattr(module, name, rounded(getattr(module, name)))
        yield


def mbconv_tensors(case: MBConvCase, products: torch.dtype | None = None) -> Tensors:
    """Random parameters of a block by name, in fp64; see `trained_statistics` for ``case.trained``.

    Tensor cores round the weights of products to a half ``products``: they get numbers that it has, so that this too
    moves nothing across the corners of an activation (see `mbconv_bounds`).
    """
    batch, channels = case.shape[:2]
    wide = case.expanded or channels
    tensors: Tensors = {"x": normal(*case.shape)}
    convs = {"depthwise": (wide, 1, *case.kernel), "project": (case.out, wide, 1, 1)}
    if case.expanded:
        convs = {"expand": (wide, channels, 1, 1), **convs}
    for name, shape in convs.items():
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"{name}.weight"] = normal(*shape) / fan_in**0.5
        n = shape[0]
        if case.norm == "folded":
            tensors[f"{name}.bias"] = normal(n) * 0.2
            continue
        if case.norm == "batch":
            tensors[f"{name}.gamma"] = torch.rand(n, dtype=torch.float64) * 1.5 + 0.2
            tensors[f"{name}.beta"] = normal(n) * 0.3
        tensors[f"{name}.running_mean"] = normal(n) * 0.2
        tensors[f"{name}.running_var"] = torch.rand(n, dtype=torch.float64) + 0.3
    if case.reduced:
        tensors["reduce_weight"] = normal(case.reduced, wide, 1, 1) / wide**0.5
        tensors["reduce_bias"] = normal(case.reduced) * 0.3
        tensors["expand_weight"] = normal(wide, case.reduced, 1, 1) / case.reduced**0.5
        tensors["expand_bias"] = normal(wide) * 0.3
    tensors["drop_path"] = None
    if case.drop_path:
        tensors["drop_path"] = torch.tensor([0.0, 1.25, 1.25, 0.0][:batch], dtype=torch.float64)
    if case.trained:
        trained_statistics(case, tensors)
    if products in HALF:
        for name in {"expand.weight", "project.weight"} & tensors.keys():
            tensors[name] = tensors[name].to(products).double()
    return tensors


def trained_statistics(case: MBConvCase, tensors: Tensors) -> None:
    """Give every channel a variance out of 1e-7 to 5e2 and |gamma| up to 13, as real checkpoints have them.

    Weights are scaled until the convolution's output really has that variance, and the running statistics are that
    of the output, with some noise: dead channels stay dead, and large ones do not drown the rest of the block.
    """
    for name in ("expand", "depthwise", "project"):
        if f"{name}.weight" not in tensors:
            continue
        n = tensors[f"{name}.weight"].shape[0]
        ones = {f"{name}.running_mean": torch.zeros(n).double(), f"{name}.running_var": torch.ones(n).double()}
        stage = mbconv_groups(case, {**tensors, **ones}, stop_after=name)
        variance, mean = torch.var_mean(stage, (0, 2, 3), correction=0)
        wanted = 10 ** (torch.rand(n, dtype=torch.float64) * 9.7 - 7)
        factor = torch.where(variance > 0, wanted / variance, 1.0).sqrt()
        tensors[f"{name}.weight"] *= factor[:, None, None, None]
        tensors[f"{name}.running_mean"] = mean * factor + normal(n) * 0.1 * wanted.sqrt()
        tensors[f"{name}.running_var"] = wanted * (torch.rand(n, dtype=torch.float64) * 0.8 + 0.6)
        gamma = torch.rand(n, dtype=torch.float64) * 1.5 + 0.1
        gamma[:: max(n // 5, 1)] = -4.0
        gamma[n // 2] = 13.0
        tensors[f"{name}.gamma"] = gamma


def mbconv_groups(case: MBConvCase, tensors: Tensors, stop_after: str | None = None) -> Any:
    """The parameter groups of a block; with ``stop_after``, what that convolution puts out in evaluation instead."""

    def conv(name: str) -> ConvNormParams | None:
        if f"{name}.weight" not in tensors:
            return None
        norm = None
        if f"{name}.running_mean" in tensors:
            fields = ("gamma", "beta", "running_mean", "running_var")
            norm = BatchNormParams(*(tensors.get(f"{name}.{field}") for field in fields), eps=case.eps)
        return ConvNormParams(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), norm)

    se = None
    if "reduce_weight" in tensors:
        fields = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
        se = SqueezeExciteParams(*(tensors[field] for field in fields), case.se_activation)
    groups = dict(expand=conv("expand"), depthwise=conv("depthwise"), squeeze_excite=se, project=conv("project"))
    return groups if stop_after is None else _stage(case, tensors["x"], groups, stop_after)


def _stage(case: MBConvCase, x: Tensor, groups: dict[str, Any], name: str) -> Tensor:
    """The output of one convolution of the block, before its normalisation."""
    h = x
    for key in ("expand", "depthwise", "project"):
        conv = groups[key]
        if conv is None:
            continue
        if key == "project" and groups["squeeze_excite"] is not None:
            inner = case.se_activation or case.activation
            h = reference.squeeze_excite(h, *groups["squeeze_excite"][:4], inner, case.gate)
        if key == "depthwise":
            config = dict(stride=case.stride, padding=case.padding, dilation=case.dilation)
            with effnet_ops.use_backend("reference"):
                h = effnet_ops.depthwise_conv2d(h, conv.weight, **config)
        else:
            h = reference.pointwise_conv2d(h, conv.weight, None, None, "none")
        if key == name:
            return h
        norm = conv.norm
        h = reference.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        h = reference.activate(h, case.activation)
    raise ValueError(f"no convolution called {name!r}")


def mbconv_function(case: MBConvCase, training: bool) -> Function:
    """The block as a function of its tensors by name; running statistics are not updated, so that it can run twice."""

    def function(tensors: Tensors) -> Tensor:
        copies = {name: value.clone() if name.endswith(("_mean", "_var")) else value for name, value in tensors.items()}
        groups = mbconv_groups(case, copies)
        return effnet_ops.mbconv(
            tensors["x"], **groups, **case.config, drop_path=tensors["drop_path"], training=training
        )

    return function
