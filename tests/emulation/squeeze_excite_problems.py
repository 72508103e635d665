"""Squeeze-and-excitation with random operands on the emulated GPU, and what its results should be, in fp64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import SqueezeExciteCase
from cuda_kernels import Kernels
from depthwise_problems import vectors
from helpers import normal
from torch import Tensor

from effnet_ops.reference import GATES, activate

PARAMETERS = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")


def parameters(case: SqueezeExciteCase) -> dict[str, Tensor]:
    channels, reduced = case.shape[1], case.reduced
    made = {
        "reduce_weight": normal(reduced, channels) / channels**0.5,
        "expand_weight": normal(channels, reduced) / reduced**0.5,
    }
    if case.bias:
        made.update(reduce_bias=normal(reduced), expand_bias=normal(channels))
    return {name: value.float() for name, value in made.items()}


def layer(case: SqueezeExciteCase, given: dict[str, Tensor]) -> dict[str, Any]:
    """The layer's structure of kernels.h."""
    images, channels, height, width = case.shape
    sizes = {"images": images, "pixels": height * width, "channels": channels, "reduced": case.reduced}
    weights = {name: given.get(name) for name in PARAMETERS}
    return {**sizes, **weights, "activation": case.activation, "gate": case.gate}


def gates_of(case: SqueezeExciteCase, pooled: Tensor, weights: dict[str, Tensor]) -> Tensor:
    hidden = activate(F.linear(pooled, weights["reduce_weight"], weights.get("reduce_bias")), case.activation)
    return GATES[case.gate](F.linear(hidden, weights["expand_weight"], weights.get("expand_bias")))


def run(
    kernels: Kernels, name: str, values: dict[str, Any], results: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """Ask, plan, allocate and run."""
    wanted = dict.fromkeys(results, 1)
    assert kernels.why_not(name, **values, **wanted) is None
    plan = kernels.plan(name, **values, **wanted)
    made = {key: kernels.empty(key, *result) for key, result in results.items()}
    workspace = None
    if plan.workspace_bytes:
        workspace = kernels.empty("workspace", (-(-plan.workspace_bytes // 4),), torch.float32)
    kernels.run(name, **values, **made, workspace=workspace)
    return made


def forward_from_tensor(
    kernels: Kernels, case: SqueezeExciteCase, dtype: torch.dtype, norm_activation: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Found and exact; through a normalisation and its activation instead of y where ``norm_activation`` is given."""
    images, channels, height, width = case.shape
    norm = None if norm_activation is None else vectors(channels)
    x = normal(images, height * width, channels) + (0 if norm is None else norm[0].double())
    given = {"x": x.to(dtype), **parameters(case)}
    given = {name: kernels.upload(name, value) for name, value in given.items()}
    results = {"pooled": ((images, channels), torch.float32), "gates": ((images, channels), torch.float32)}
    values = {"layer": layer(case, given), "dtype": dtype, "x": given["x"]}
    u = given["x"].double()
    if norm is None:
        results["y"] = (tuple(x.shape), dtype)
    else:
        values.update(norm=kernels.upload("norm", norm), norm_activation=norm_activation)
        mean, scale, shift = norm.double()
        u = activate((u - mean) * scale + shift, norm_activation)
    found = run(kernels, "SqueezeExciteForward", values, results)
    pooled = u.mean(1)
    gates = gates_of(case, pooled, {name: value.double() for name, value in given.items()})
    return found, {"pooled": pooled, "gates": gates, "y": u * gates[:, None]}


def in_parts(sums: Tensor, parts: int) -> Tensor:
    """(images, ...) as (images, parts, ...) fp32 sums of which the whole is the sum."""
    shares = torch.rand(parts, dtype=torch.float64)
    shares = (shares / shares.sum()).view(1, parts, *[1] * (sums.ndim - 1))
    return (sums[:, None] * shares).float()


def forward_from_partials(
    kernels: Kernels, case: SqueezeExciteCase, parts: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Found and exact pooled and gates."""
    images, channels, height, width = case.shape
    given = {"sums": in_parts(normal(images, channels) * height * width, parts), **parameters(case)}
    given = {name: kernels.upload(name, value) for name, value in given.items()}
    values = {"layer": layer(case, given), "dtype": torch.float32, "sums": given["sums"], "parts": parts}
    results = {name: ((images, channels), torch.float32) for name in ("pooled", "gates")}
    found = run(kernels, "SqueezeExciteForward", values, results)
    pooled = given["sums"].double().sum(1) / (height * width)
    return found, {"pooled": pooled, "gates": gates_of(case, pooled, {n: v.double() for n, v in given.items()})}


def backward_from_tensor(
    kernels: Kernels, case: SqueezeExciteCase, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Found and exact gradients of x and of the parameters."""
    images, channels, height, width = case.shape
    weights = parameters(case)
    x, grad = (normal(images, height * width, channels).to(dtype) for _ in range(2))
    leaves = {name: value.double().requires_grad_() for name, value in {"x": x, **weights}.items()}
    pooled = leaves["x"].mean(1)
    y = leaves["x"] * gates_of(case, pooled, leaves)[:, None]
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.double()), strict=True))
    exact = {"dx" if name == "x" else f"{name}_grad": value for name, value in gradients.items()}

    given = {"x": x, "grad": grad, "pooled": pooled.detach().float(), **weights}
    given = {name: kernels.upload(name, value) for name, value in given.items()}
    values = {"layer": layer(case, given), "dtype": dtype, **{name: given[name] for name in ("x", "grad", "pooled")}}
    results = {f"{name}_grad": (tuple(value.shape), torch.float32) for name, value in weights.items()}
    results["dx"] = (tuple(x.shape), dtype)
    return run(kernels, "SqueezeExciteBackward", values, results), exact


def backward_from_partials(
    kernels: Kernels, case: SqueezeExciteCase, parts: int, rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Found and exact, from the one or five sums over pixels of which docs/mbconv.md: B3 speaks.

    A normalisation and SiLU stand in front: u = silu(norm(a)), and z = u * gates has the gradient z_grad.
    """
    images, channels, height, width = case.shape
    pixels, norm = height * width, vectors(channels).double()
    weights = parameters(case)
    leaves = {name: value.double().requires_grad_() for name, value in weights.items()}
    centred = normal(images, pixels, channels)
    n = (centred * norm[1] + norm[2]).requires_grad_()
    u = F.silu(n)
    gates = gates_of(case, u.mean(1), leaves)
    z_grad = normal(images, pixels, channels)
    n_grad, *gradients = torch.autograd.grad(u * gates[:, None], [n, *leaves.values()], z_grad)
    exact = {f"{name}_grad": value for name, value in zip(leaves, gradients, strict=True)}
    exact["gates"] = gates.detach()
    m = n.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(m).sum(), m)
    exact["partials"] = torch.stack([n_grad.sum(1), (n_grad * centred).sum(1)], 1)
    exact["pooled_grad"] = (n_grad - z_grad * gates.detach()[:, None] * slope).div(slope)[:, 0]

    u = u.detach()
    of_pixels = (z_grad * u, z_grad * slope, slope, z_grad * slope * centred, slope * centred)[:rows]
    sums = in_parts(torch.stack(of_pixels, 1).sum(2), parts)
    given = {"sums": sums, "pooled": u.mean(1).float(), **weights}
    given = {name: kernels.upload(name, value) for name, value in given.items()}
    values = {
        "layer": layer(case, given), "dtype": torch.float32, "sums": given["sums"], "parts": parts, "rows": rows,
        "pooled": given["pooled"],
    }  # fmt: skip
    f32 = torch.float32
    results = {f"{name}_grad": (tuple(value.shape), f32) for name, value in weights.items()}
    results |= {"gates": ((images, channels), f32), "pooled_grad": ((images, channels), f32)}
    if rows == 5:
        results["partials"] = ((images, 2, channels), f32)
    return run(kernels, "SqueezeExciteBackward", values, results), exact
