"""Shapes and settings that nobody thought of: hypothesis draws them, the fp64 reference judges."""

from __future__ import annotations

from typing import Any

import torch
from cases import ACTIVATIONS, MBConvCase
from helpers import HALF, LAYOUTS, check, mbconv_bounds, mbconv_function, mbconv_tensors, normal
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import effnet_ops
from effnet_ops import checks

examples = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(1, 19)
channels = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 24, 31, 32, 33, 48, 65])
batches = st.integers(0, 3)
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from([torch.float32, torch.float64, *HALF])
activations = st.sampled_from(ACTIVATIONS)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
paddings = st.one_of(st.just("same"), st.integers(0, 4), st.tuples(*[st.integers(0, 4)] * 4))


@examples
@given(st.data())
def test_depthwise(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(batches, channels, sizes, sizes))
    kernel = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    config: dict[str, Any] = dict(stride=data.draw(pairs), dilation=data.draw(pairs), padding=data.draw(paddings))
    sides = checks.padding_sides(config["padding"])
    resolved = checks.resolve_padding(sides, shape[2:], kernel, config["stride"], config["dilation"])
    assume(min(checks.output_size(shape[2:], kernel, config["stride"], resolved, config["dilation"])) >= 1)
    config["activation"] = data.draw(activations)
    tensors = {"x": normal(*shape), "weight": normal(shape[1], 1, *kernel), "bias": normal(shape[1])}

    def function(t: dict[str, Any]) -> torch.Tensor:
        return effnet_ops.depthwise_conv2d(t["x"], t["weight"], t["bias"], **config)

    check(function, tensors, data.draw(dtypes), data.draw(layouts))


@examples
@given(st.data())
def test_pointwise(data: st.DataObject) -> None:
    batch, inner, outer, height, width = data.draw(st.tuples(batches, channels, channels, sizes, sizes))
    activation, residual = data.draw(activations), data.draw(st.booleans())
    tensors = {
        "x": normal(batch, inner, height, width),
        "weight": normal(outer, inner, 1, 1) / inner**0.5,
        "bias": normal(outer),
        "residual": normal(batch, outer, height, width) if residual else None,
    }

    def function(t: dict[str, Any]) -> torch.Tensor:
        return effnet_ops.pointwise_conv2d(
            t["x"], t["weight"], t["bias"], residual=t["residual"], activation=activation
        )

    check(function, tensors, data.draw(dtypes), data.draw(layouts))


@examples
@given(st.data())
def test_squeeze_excite(data: st.DataObject) -> None:
    shape, reduced = data.draw(st.tuples(batches, channels, sizes, sizes)), data.draw(st.integers(1, 9))
    activation = data.draw(activations)
    tensors = {
        "x": normal(*shape) + 0.5,
        "reduce_weight": normal(reduced, shape[1], 1, 1) / shape[1] ** 0.5,
        "reduce_bias": normal(reduced),
        "expand_weight": normal(shape[1], reduced, 1, 1) / reduced**0.5,
        "expand_bias": normal(shape[1]),
    }
    check(
        lambda t: effnet_ops.squeeze_excite(*t.values(), activation=activation),
        tensors,
        data.draw(dtypes),
        data.draw(layouts),
    )


@examples
@given(st.data())
def test_mbconv(data: st.DataObject) -> None:
    training = data.draw(st.booleans())
    kernel = data.draw(st.sampled_from([(3, 3), (5, 5), (7, 7), (3, 5)]))
    batch, inner, height, width = data.draw(st.tuples(st.integers(0, 3), channels, sizes, sizes))
    stride = data.draw(st.sampled_from([1, 2]))
    residual = stride == 1 and data.draw(st.booleans())
    case = MBConvCase(
        "",
        (batch, inner, height, width),
        inner if residual else data.draw(channels),
        data.draw(st.one_of(st.none(), st.sampled_from([8, 24, 37, 64]))),
        data.draw(st.one_of(st.none(), st.integers(1, 8))),
        kernel,
        stride,
        residual=residual,
        activation=data.draw(st.sampled_from(["none", "silu"])),
        norm=data.draw(st.sampled_from(["batch", "affine_free", "folded"])),
        dilation=data.draw(st.sampled_from([1, 1, 2, (1, 3)])),
    )
    # With a handful of values a channel, batch statistics turn rounding into a difference of any size.
    assume(not training or batch * -(-height // stride) * -(-width // stride) >= 16 or batch == 0)
    dtype = data.draw(dtypes)
    check(
        mbconv_function(case, training), mbconv_tensors(case), dtype, data.draw(layouts), **mbconv_bounds(case, dtype)
    )
