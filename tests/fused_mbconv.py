"""Fused-MBConv blocks for the tests of all backends: their cases, tensors, and the block as a function of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from helpers import GRADIENT_TOLERANCE, HALF, Function, Tensors, normal
from torch import Tensor

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, SqueezeExciteParams


class Case(NamedTuple):
    name: str
    shape: tuple[int, int, int, int]
    channels: int
    out: int | None
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: Any = "same"
    reduced: int = 0
    residual: bool = False
    drop_path: bool = False
    activation: str = "silu"
    norm: bool = True


CASES = [
    Case("residual", (2, 10, 9, 7), 40, 10, residual=True, drop_path=True),
    Case("stride 2", (2, 16, 11, 12), 33, 24, stride=(2, 2), padding=1),
    Case("gate", (3, 8, 6, 5), 32, 8, reduced=3, residual=True, drop_path=True),
    Case("alone", (2, 12, 7, 13), 12, None, residual=True, drop_path=True),
    Case("stem", (2, 3, 23, 30), 24, None, stride=(2, 2), activation="hardswish"),
    Case("head", (2, 40, 5, 5), 70, None, kernel=(1, 1), padding=0),
    Case("gaps", (1, 5, 9, 10), 17, None, kernel=(1, 2), stride=(3, 3), padding=0, activation="none"),
    Case("uneven", (1, 6, 12, 9), 20, 9, kernel=(5, 4), stride=(3, 2), padding=(2, 1), activation="relu6"),
    Case("no norm", (2, 7, 8, 8), 18, 11, kernel=(2, 2), padding=0, norm=False),
    Case("one pixel", (3, 9, 4, 3), 20, 6, kernel=(4, 3), stride=(2, 2), padding=0),
]
NAMED = {case.name: case for case in CASES}


def bounds(dtype: torch.dtype) -> dict[str, Any]:
    """What training keeps is rounded to half precision; see `helpers.mbconv_bounds`."""
    return {"gradient_tolerance": 3 * GRADIENT_TOLERANCE[dtype], "rounded_to": dtype} if dtype in HALF else {}


def tensors_of(case: Case) -> Tensors:
    tensors: Tensors = {"x": normal(*case.shape)}
    weights = {"expand": (case.channels, case.shape[1], *case.kernel)}
    if case.out is not None:
        weights["project"] = (case.out, case.channels, 1, 1)
    for name, shape in weights.items():
        tensors[f"{name}.weight"] = normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
        if not case.norm:
            tensors[f"{name}.bias"] = normal(shape[0]) * 0.2
            continue
        tensors[f"{name}.gamma"] = torch.rand(shape[0], dtype=torch.float64) * 1.5 + 0.2
        tensors[f"{name}.beta"] = normal(shape[0]) * 0.3
        tensors[f"{name}.running_mean"] = normal(shape[0]) * 0.2
        tensors[f"{name}.running_var"] = torch.rand(shape[0], dtype=torch.float64) + 0.3
    if case.reduced:
        tensors["reduce_weight"] = normal(case.reduced, case.channels, 1, 1) / case.channels**0.5
        tensors["reduce_bias"] = normal(case.reduced) * 0.3
        tensors["expand_weight"] = normal(case.channels, case.reduced, 1, 1)
        tensors["expand_bias"] = normal(case.channels) * 0.3
    scales = torch.tensor([1.25, 0.0, 1.25][: case.shape[0]], dtype=torch.float64)
    tensors["drop_path"] = scales if case.drop_path else None
    return tensors


def function_of(case: Case, training: bool) -> Function:
    """The block as a function of its tensors; running statistics are not updated, so that it can run twice."""

    def function(tensors: Tensors) -> Tensor:
        def conv(name: str) -> ConvNormParams | None:
            if f"{name}.weight" not in tensors:
                return None
            norm = None
            if case.norm:
                mean, var = (tensors[f"{name}.{field}"].clone() for field in ("running_mean", "running_var"))
                norm = BatchNormParams(tensors[f"{name}.gamma"], tensors[f"{name}.beta"], mean, var, 1e-3)
            return ConvNormParams(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), norm)

        fields = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
        layer = SqueezeExciteParams(*(tensors[field] for field in fields)) if case.reduced else None
        settings: dict[str, Any] = dict(stride=case.stride, padding=case.padding, activation=case.activation)
        settings |= dict(residual=case.residual, drop_path=tensors["drop_path"], training=training)
        return effnet_ops.fused_mbconv(tensors["x"], conv("expand"), layer, conv("project"), **settings)

    return function
