"""The operators on CUDA C++ kernels: one file a word, with functions of the operators' names that take their calls.

The kernels themselves are internal operators, `torch.ops.effnet_ops.cuda_*`, with every prologue and epilogue that they
can carry. Activations are (N, C, H, W) in any layout, best channels_last; what is stored for a channel or an image is
float32, whatever the parameters' dtype. They have an implementation for CUDA only, no gradient and no fake kernel: only
other operators call them. Their arguments mean what those of `kernels/depthwise.py` and `kernels/squeeze_excite.py` do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from effnet_ops.ops import _library

WORDS = {
    "depthwise_conv2d": "depthwise",
    "depthwise_conv2d_backward": "depthwise",
    "squeeze_excite": "squeeze_excite",
    "squeeze_excite_backward": "squeeze_excite",
    "mbconv_inference": "mbconv",
}
"""The file that has each operator."""


def _norm(of: str = "") -> str:
    """A normalisation with constant statistics; without gamma, beta is a bias."""
    return "".join(f"Tensor? {of}{name}, " for name in ("gamma", "beta", "mean", "var")) + f"float {of}eps"


_LAYER = "Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias"

KERNELS = {
    # y, sums (N, parts, C) of the result if pool, (programs, 3, C) count, mean and squares if statistics
    "cuda_depthwise_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor? gate, Tensor? out_norm, "
    "Tensor? grad, int stride, int[] padding, str activation, str out_activation, bool pool, bool statistics) "
    "-> (Tensor, Tensor, Tensor)",
    # the gradients of x, weight and bias as `needs` says, and with norm the sums (programs, 2, C);
    # `like` has the size and the layout of x, `bias` only its dtype
    "cuda_depthwise_backward": "(Tensor grad, Tensor? x, Tensor weight, Tensor? bias, Tensor? a, Tensor? a_norm, "
    "Tensor? coefficients, Tensor? gate, Tensor? pooled, Tensor? norm, Tensor? residual, Tensor like, int stride, "
    "int[] padding, str a_activation, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    # y if scale, pooled (N, C), gate (N, C)
    "cuda_squeeze_excite_forward": f"(Tensor x, Tensor? norm, {_LAYER}, str norm_activation, str activation, str gate, "
    "bool scale) -> (Tensor, Tensor, Tensor)",
    "cuda_squeeze_excite_backward": f"(Tensor grad, Tensor x, Tensor pooled, {_LAYER}, str activation, str gate, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # pooled, gate
    "cuda_gates_forward": f"(Tensor sums, int pixels, {_LAYER}, str activation, str gate) -> (Tensor, Tensor)",
    # the parameters' gradients, gate, the gradient of the mean over the pixels' number, (N, 2, C) of five rows
    "cuda_gates_backward": f"(Tensor sums, int pixels, Tensor pooled, {_LAYER}, str activation, str gate, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # whether there is a tile for the next operator
    "cuda_expand_depthwise_fits": "(Tensor x, Tensor expand_weight, Tensor depthwise_weight, int stride, "
    "int[] padding, bool pool) -> bool",
    # y, sums (N, parts, C) of it if pool; activation stands behind both convolutions
    "cuda_expand_depthwise": f"(Tensor x, Tensor expand_weight, {_norm('expand_')}, Tensor depthwise_weight, "
    f"{_norm('depthwise_')}, int stride, int[] padding, str activation, bool pool) -> (Tensor, Tensor)",
    "cuda_gated_project": f"(Tensor x, Tensor? gates, Tensor weight, {_norm()}, Tensor? image_scale, Tensor? residual)"
    " -> Tensor",
}
"""The schemas of the internal operators."""

for _name, _schema in KERNELS.items():
    _library.library.define(_name + _schema)


@functools.cache
def implementation(name: str) -> Callable[..., Any]:
    """The operator called ``name`` on CUDA C++ kernels."""
    return getattr(importlib.import_module(f"{__name__}.{WORDS[name]}"), name)
