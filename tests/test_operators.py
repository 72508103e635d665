"""What PyTorch expects of an operator: schema, fake kernels, gradients, autocast, tracing, FLOP counts, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MBConvCase
from helpers import LAYOUTS, lay_out, mbconv_function, mbconv_groups, mbconv_tensors, normal, relative_error, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops.ops import _library
from effnet_ops.ops.calls import ConvNorm, SqueezeExcite
from effnet_ops.ops.mbconv import MBConvCall

OPERATORS = torch.ops.effnet_ops
BLOCK = _library.OPERATORS["mbconv_inference"].signature
DROP_PATH = [argument.name for argument in BLOCK.arguments].index("drop_path")
SIZE = (2, 6, 7, 5)
CONFIGS: dict[str, list[Any]] = {
    "depthwise_conv2d": [[2, 1], [], [1, 1], "silu"],
    "pointwise_conv2d": ["hardswish"],
    "squeeze_excite": ["silu", "sigmoid"],
    "batch_norm_training": [None, None, 1e-3, "silu"],
}
BLOCKS = {
    "expand": MBConvCase("", (3, 6, 7, 5), 6, 16, 4, kernel=(5, 5), residual=True, drop_path=True),
    "plain": MBConvCase("", (2, 6, 8, 5), 10, None, None, stride=2),
    "folded": MBConvCase("", (2, 6, 7, 5), 10, 12, 2, norm="folded"),
}
FORWARDS = ["depthwise_conv2d", "pointwise_conv2d", "squeeze_excite", "mbconv_inference", "mbconv_training"]
FORWARDS += ["batch_norm_training"]
BACKWARDS = ["depthwise_conv2d_backward", "pointwise_conv2d_backward", "squeeze_excite_backward", "mbconv_backward"]
BACKWARDS += ["batch_norm_backward"]


def block_arguments(case: MBConvCase, x: Tensor, batch_statistics: bool) -> list[Any]:
    tensors = mbconv_tensors(case)

    def get(name: str) -> Tensor | None:
        value = tensors.get(name)
        return None if value is None else value.to(x.dtype)

    def conv(name: str, eps: float) -> ConvNorm | None:
        fields = ("weight", "gamma", "beta", "running_mean", "running_var")
        values = [get(f"{name}.{field}") for field in fields]
        if case.norm == "folded":
            values[2] = get(f"{name}.bias")
        statistics = (None, None) if batch_statistics else values[3:]
        return None if values[0] is None else ConvNorm(*values[:3], *statistics, eps)

    se = [get(name) for name in ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")]
    call = MBConvCall(
        x,
        conv("expand", 1e-3),
        conv("depthwise", 1e-4),
        None if se[0] is None else SqueezeExcite(*se, "relu", case.gate),
        conv("project", 1e-5),
        get("drop_path"),
        [case.stride] * 2,
        [],
        [1, 1],
        case.residual,
        case.activation,
    )
    return list(BLOCK.flatten(call))


def arguments(name: str, layout: str, dtype: torch.dtype, batch: int | None = None, block: str = "expand") -> list[Any]:
    """Arguments of the operator called ``name``; of a backward operator with everything that its forward gave."""
    if name.endswith("_backward"):
        forward = name.removesuffix("_backward")
        forward = f"{forward}_training" if forward in ("mbconv", "batch_norm") else forward
        args = arguments(forward, layout, dtype, batch, block)
        results = getattr(OPERATORS, forward)(*args)
        results = results if isinstance(results, tuple) else (results,)
        grad = normal(*results[0].shape).to(dtype)
        if forward == "mbconv_training":
            return [grad, *args[:-1], *results[1:], [True] * 14]
        if forward == "squeeze_excite":
            return [grad, *args, results[1], [True] * 5]
        if forward == "batch_norm_training":
            return [grad, *args, *results[1:], [True] * 3]
        if forward == "pointwise_conv2d":
            args[3] = None
        return [grad, *args, [True] * 3]
    size = BLOCKS[block].shape if name.startswith("mbconv") else SIZE
    x = lay_out(normal(*size).to(dtype)[:batch], layout)
    if name.startswith("mbconv"):
        case = BLOCKS[block]
        args = block_arguments(case, x, name == "mbconv_training")
        if args[DROP_PATH] is not None:
            args[DROP_PATH] = args[DROP_PATH][:batch]
        return [*args, True] if name == "mbconv_training" else args
    parameters = {
        "depthwise_conv2d": [normal(6, 1, 3, 5), normal(6)],
        "pointwise_conv2d": [normal(9, 6, 1, 1), normal(9), normal(SIZE[0], 9, *SIZE[2:])[:batch]],
        "squeeze_excite": [normal(3, 6, 1, 1), normal(3), normal(6, 3, 1, 1), normal(6)],
        "batch_norm_training": [normal(6), normal(6)],
    }[name]
    return [x, *(p.to(dtype) for p in parameters), *CONFIGS[name]]


def clone(args: list[Any], requires_grad: bool) -> list[Any]:
    def copy(position: int, value: Any) -> Any:
        constant = len(args) > 20 and position not in BLOCK.differentiable
        return value.detach().requires_grad_(requires_grad and not constant) if isinstance(value, Tensor) else value

    return [copy(i, value) for i, value in enumerate(args)]


@pytest.mark.parametrize("name", [name for name in FORWARDS if name != "mbconv_inference"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_opcheck_with_gradients(name: str, layout: str) -> None:
    args = clone(arguments(name, layout, torch.float32), True)
    torch.library.opcheck(getattr(OPERATORS, name).default, tuple(args))


@pytest.mark.parametrize("name", ["mbconv_inference", *BACKWARDS])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_opcheck(name: str, layout: str) -> None:
    torch.library.opcheck(getattr(OPERATORS, name).default, tuple(arguments(name, layout, torch.float32)))


_CONV = "Tensor{0} {1}_weight, Tensor? {1}_gamma, Tensor? {1}_beta, Tensor? {1}_mean, Tensor? {1}_var, float {1}_eps"
_SE = "Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, str activation, str gate"
_MBCONV = (
    f"Tensor x, {_CONV.format('?', 'expand')}, {_CONV.format('', 'depthwise')}, "
    "Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, "
    "Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, "
    f"{_CONV.format('', 'project')}, Tensor? drop_path, int[] stride, int[] padding, "
    "int[] dilation, bool residual, str activation"
)
_SAVED = (
    "Tensor expanded, Tensor convolved, Tensor projected, Tensor expand_mean_used, Tensor expand_var_used, "
    "Tensor depthwise_mean_used, Tensor depthwise_var_used, Tensor project_mean_used, Tensor project_var_used, "
    "Tensor pooled"
)
_FUSED = (
    f"Tensor x, {_CONV.format('', 'expand')}, "
    "Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, "
    "Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, "
    f"{_CONV.format('?', 'project')}, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation"
)
_FUSED_SAVED = (
    "Tensor expanded, Tensor projected, Tensor expand_mean_used, Tensor expand_var_used, Tensor project_mean_used, "
    "Tensor project_var_used, Tensor pooled"
)
_DEPTHWISE = "Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation"
_POINTWISE = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation"
_NORM = "Tensor x, Tensor gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, str activation"
_PACKED = "Tensor x, Tensor weight, Tensor bias"
SCHEMAS = {
    "depthwise_conv2d": (_DEPTHWISE, 1),
    "depthwise_conv2d_backward": (f"Tensor grad, {_DEPTHWISE}, bool[] needs", 3),
    "pointwise_conv2d": (_POINTWISE, 1),
    "pointwise_conv2d_backward": (f"Tensor grad, {_POINTWISE}, bool[] needs", 3),
    "squeeze_excite": (f"Tensor x, {_SE}", 2),
    "squeeze_excite_backward": (f"Tensor grad, Tensor x, {_SE}, Tensor pooled, bool[] needs", 5),
    "batch_norm_training": (_NORM, 3),
    "batch_norm_backward": (f"Tensor grad, {_NORM}, Tensor mean_used, Tensor var_used, bool[] needs", 3),
    "mbconv_inference": (_MBCONV, 1),
    "mbconv_training": (f"{_MBCONV}, bool save_expanded", 11),
    "mbconv_backward": (f"Tensor grad, {_MBCONV}, {_SAVED}, bool[] needs", 14),
    "fused_mbconv_inference": (_FUSED, 1),
    "fused_mbconv_training": (f"{_FUSED}, bool save_expanded", 8),
    "fused_mbconv_backward": (f"Tensor grad, {_FUSED}, {_FUSED_SAVED}, bool[] needs", 11),
    "fused_mbconv_sync_training": (f"{_FUSED}, bool save_expanded, str process_group", 9),
    "fused_mbconv_sync_backward": (
        f"Tensor grad, {_FUSED}, {_FUSED_SAVED}, Tensor counts, str process_group, bool[] needs",
        11,
    ),
    "mbconv_sync_training": (f"{_MBCONV}, bool save_expanded, str process_group", 12),
    "mbconv_sync_backward": (
        f"Tensor grad, {_MBCONV}, {_SAVED}, Tensor counts, str process_group, bool[] needs",
        14,
    ),
    "batch_norm_inference": (
        "Tensor x, Tensor gamma, Tensor? beta, Tensor mean, Tensor var, float eps, str activation",
        1,
    ),
    "conv_norm_inference": (f"Tensor x, {_CONV.format('', 'conv')}, int[] stride, int[] padding, str activation", 1),
    "mbconv_packed": (
        "Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, "
        "Tensor? reduce_weight, Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, "
        "Tensor project_weight, Tensor project_bias, int[] stride, int[] padding, int[] dilation, bool residual, "
        "str activation, str squeeze_activation, str gate",
        1,
    ),
    "fused_mbconv_packed": (
        "Tensor x, Tensor expand_weight, Tensor expand_bias, Tensor? reduce_weight, Tensor? reduce_bias, "
        "Tensor? excite_weight, Tensor? excite_bias, Tensor? project_weight, Tensor? project_bias, int[] kernel, "
        "int[] stride, int[] padding, bool residual, str activation, str squeeze_activation, str gate",
        1,
    ),
    "pointwise_packed": (f"{_PACKED}, str activation", 1),
    "convolution_packed": (f"{_PACKED}, int[] kernel, int[] stride, int[] padding, str activation", 1),
    "average_pool": ("Tensor x, bool keepdim", 1),
}
"""Of each operator the arguments and how many results: csrc/bindings.cpp reads them in this order."""


def test_schemas() -> None:
    assert _library.OPERATORS.keys() == SCHEMAS.keys()
    for name, (arguments, count) in SCHEMAS.items():
        results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        assert str(_library.OPERATORS[name].overload._schema) == f"effnet_ops::{name}({arguments}) -> {results}"


def as_list(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("name", [*FORWARDS, *BACKWARDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [None, 1, 0])
def test_fake_results_are_real(name: str, layout: str, batch: int | None) -> None:
    """Fake sizes, strides and dtypes equal the real ones, of the fallback too; opcheck of torch 2.11 skips strides."""
    for dtype in (torch.float32, torch.bfloat16):
        for block in BLOCKS if name.startswith("mbconv") else ("expand",):
            args = arguments(name, layout, dtype, batch, block)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = as_list(getattr(OPERATORS, name)(*fakes))
            for kernel in (getattr(OPERATORS, name), _library.OPERATORS[name].fallback):
                real = as_list(kernel(*args))
                assert [r.dtype for r in real] == [f.dtype for f in fake]
                assert [r.shape for r in real] == [f.shape for f in fake]
                assert [r.stride() for r in real] == [f.stride() for f in fake]


@pytest.mark.parametrize("name", [*FORWARDS, *BACKWARDS])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("poison")
def test_every_result_equals_the_fallbacks(name: str, block: str) -> None:
    """Also what only the backward operator reads: intermediate activations and statistics."""
    args = arguments(name, "channels_last", torch.float64, block=block)
    expected = as_list(_library.OPERATORS[name].fallback(*args))
    for value, exact in zip(as_list(getattr(OPERATORS, name)(*args)), expected, strict=True):
        assert relative_error(value, exact) <= 1e-11


@pytest.mark.parametrize("name", BACKWARDS)
def test_unneeded_gradients_are_empty(name: str) -> None:
    args = arguments(name, "channels_last", torch.float32)
    count = len(args[-1])
    full = as_list(getattr(OPERATORS, name)(*args))
    for wanted in range(count):
        needs = [i == wanted for i in range(count)]
        for kernel in (getattr(OPERATORS, name), _library.OPERATORS[name].fallback):
            results = as_list(kernel(*args[:-1], needs))
            assert relative_error(results[wanted], full[wanted].double(), 1e-3) <= 1e-5
            assert all(r.shape == (0,) and r.dtype == torch.float32 for i, r in enumerate(results) if i != wanted)


def differentiable(name: str, block: str = "expand") -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a function of its floating-point inputs, its fixed arguments bound."""
    args = clone(arguments(name, "channels_last", torch.float64, block=block), True)
    positions = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]

    def function(*inputs: Tensor) -> Tensor:
        bound = list(args)
        for position, value in zip(positions, inputs, strict=True):
            bound[position] = value
        return as_list(getattr(OPERATORS, name)(*bound))[0]

    return function, [args[i] for i in positions]


@pytest.mark.parametrize("name", FORWARDS[:3])
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(*differentiable(name), fast_mode=True)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("save_expanded", [False, True])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_gradcheck_mbconv(block: str, save_expanded: bool, batch_statistics: bool) -> None:
    function, inputs = differentiable_block(BLOCKS[block], batch_statistics, save_expanded)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def differentiable_block(
    case: MBConvCase, batch_statistics: bool, save_expanded: bool
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A block as a function of its floating-point inputs."""
    args = clone([*block_arguments(case, normal(*case.shape), batch_statistics), save_expanded], True)
    positions = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]

    def function(*inputs: Tensor) -> Tensor:
        bound = list(args)
        for position, value in zip(positions, inputs, strict=True):
            bound[position] = value
        return OPERATORS.mbconv_training(*bound)[0]

    return function, [args[i] for i in positions]


@pytest.mark.parametrize("name", FORWARDS[:3])
def test_second_derivatives(name: str) -> None:
    assert torch.autograd.gradgradcheck(*differentiable(name), fast_mode=True)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_second_derivatives_of_mbconv(block: str, batch_statistics: bool) -> None:
    assert torch.autograd.gradgradcheck(*differentiable_block(BLOCKS[block], batch_statistics, True), fast_mode=True)


def test_third_derivatives() -> None:
    x, *params = differentiable("squeeze_excite")[1]

    def third() -> Tensor:
        y = effnet_ops.squeeze_excite(x, *params)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y

    with effnet_ops.use_backend("reference"):
        expected = third()
    torch.testing.assert_close(third(), expected, rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_a_frozen_weight() -> None:
    """What the forward pass did not keep is not needed here either."""
    x, weight = normal(2, 6, 7, 5).requires_grad_(), normal(6, 1, 3, 3)
    assert torch.autograd.gradgradcheck(lambda x: effnet_ops.depthwise_conv2d(x, weight, padding=1), x, fast_mode=True)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", [name for name in FORWARDS if name != "mbconv_training"])
def test_forward_mode_sees_the_reference(name: str, gradients: bool) -> None:
    args = arguments(name, "channels_last", torch.float64)
    tangent = normal(*SIZE).double() if name.endswith("conv2d") else normal(*args[0].shape).double()

    def derivative() -> Tensor:
        with forward_ad.dual_level():
            found = getattr(OPERATORS, name)(forward_ad.make_dual(args[0], tangent), *args[1:])
            return forward_ad.unpack_dual(found[0] if isinstance(found, tuple) else found).tangent

    step = 1e-6
    above, below = (getattr(OPERATORS, name)(args[0] + sign * step * tangent, *args[1:]) for sign in (1, -1))
    above, below = (found[0] if isinstance(found, tuple) else found for found in (above, below))
    with torch.set_grad_enabled(gradients):
        assert relative_error(derivative(), (above - below) / (2 * step)) < 1e-6


def test_function_transforms_see_the_reference() -> None:
    x, weight = normal(*SIZE).double(), normal(SIZE[1], 1, 3, 3).double()

    def loss(x: Tensor) -> Tensor:
        return effnet_ops.depthwise_conv2d(x, weight, padding=1, activation="silu").square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative_error(torch.func.grad(loss)(x), expected) < 1e-12


def test_batched_gradients() -> None:
    function, inputs = differentiable("depthwise_conv2d")
    y = function(*inputs)
    grads = torch.randn(2, *y.shape).to(y)
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for found, expected in zip(batched, torch.autograd.grad(y, inputs, grads[i], retain_graph=True), strict=True):
            assert torch.equal(found[i], expected)


def test_forward_mode_of_a_gradient_is_an_error() -> None:
    function, inputs = differentiable("depthwise_conv2d")
    y = function(*inputs)
    match = "forward-mode differentiation of the gradient of depthwise_conv2d is not supported"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(y, inputs, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_backward_twice_with_retained_graph() -> None:
    function, inputs = differentiable("mbconv_training")
    out = function(*inputs)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, inputs, grad), strict=True):
        assert torch.equal(a, b)


def test_only_the_output_is_differentiable() -> None:
    args = clone(arguments("mbconv_training", "channels_last", torch.float32), True)
    y, *rest = OPERATORS.mbconv_training(*args)
    assert y.requires_grad and not any(value.requires_grad for value in rest)
    y, pooled = OPERATORS.squeeze_excite(*clone(arguments("squeeze_excite", "channels_last", torch.float32), True))
    assert y.requires_grad and not pooled.requires_grad


def test_statistics_and_drop_path_have_no_gradient() -> None:
    args = arguments("mbconv_training", "channels_last", torch.float32)
    args[DROP_PATH].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for drop_path"):
        OPERATORS.mbconv_training(*args)


@pytest.mark.parametrize("name", [name for name in FORWARDS if name != "batch_norm_training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_activations_only(name: str, dtype: torch.dtype) -> None:
    args = arguments(name, "channels_last", torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = as_list(getattr(OPERATORS, name)(*args))[0]
    cast = list(args)
    for position in (0, 3) if name == "pointwise_conv2d" else (0,):
        cast[position] = args[position].to(dtype)
    assert out.dtype == dtype
    assert torch.equal(out, as_list(getattr(OPERATORS, name)(*cast))[0])


@pytest.mark.parametrize("name", FORWARDS)
def test_autocast_leaves_fp64_alone(name: str) -> None:
    args = arguments(name, "channels_last", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = as_list(getattr(OPERATORS, name)(*args))[0]
    assert torch.equal(out, as_list(getattr(OPERATORS, name)(*args))[0])


def test_gradients_through_autocast() -> None:
    """fp32 leaves get fp32 gradients, those of the bf16 operator; a backward inside the region is the same."""
    case = BLOCKS["expand"]
    tensors = {name: value if value is None else value.float() for name, value in mbconv_tensors(case).items()}
    function = mbconv_function(case, True)
    results = []
    for inside in (False, True):
        leaves = {
            n: v if v is None else v.clone().requires_grad_("running" not in n and n != "drop_path")
            for n, v in tensors.items()
        }
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(leaves)
            if inside:
                out.float().square().sum().backward()
        if not inside:
            out.float().square().sum().backward()
        results.append({n: v.grad for n, v in leaves.items() if v is not None and v.requires_grad})
    assert all(grad.dtype == torch.float32 for grad in results[0].values())
    assert all(torch.equal(results[0][name], grad) for name, grad in results[1].items())


class Network(nn.Module):
    """Every public function once."""

    def __init__(self, case: MBConvCase) -> None:
        super().__init__()
        self.case = case
        tensors = mbconv_tensors(case)
        tensors |= {"dw": normal(6, 1, 3, 3), "pw": normal(6, 6, 1, 1), "pw_bias": normal(6)}
        tensors |= {"r": normal(2, 6, 1, 1), "e": normal(6, 2, 1, 1)}
        self.names = [name for name, value in tensors.items() if value is not None and name != "x"]
        for name in self.names:
            value, name = tensors[name].float(), name.replace(".", "__")
            if "running" in name or name == "drop_path":
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        t = {name: getattr(self, name.replace(".", "__")) for name in self.names}
        h = effnet_ops.depthwise_conv2d(x, t["dw"], stride=2, padding="same", activation="silu")
        h = effnet_ops.pointwise_conv2d(h, t["pw"], t["pw_bias"], residual=h, activation="relu")
        h = effnet_ops.squeeze_excite(h, t["r"], None, t["e"], None, gate="hard_sigmoid")
        groups = mbconv_groups(self.case, t)
        return effnet_ops.mbconv(h, **groups, **self.case.config, training=self.training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(training: bool, dynamic: bool) -> None:
    torch.compiler.reset()
    network = Network(BLOCKS["expand"]).train(training)
    expected_network = Network(BLOCKS["expand"]).train(training)
    expected_network.load_state_dict(network.state_dict())
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(3, 6, 15, 18), (2, 6, 9, 20)] if dynamic else [(3, 6, 15, 18)]:
        x = normal(*size).float().contiguous(memory_format=torch.channels_last)
        out, expected = compiled(x), expected_network(x)
        assert out.stride() == expected.stride()
        assert relative_error(out, expected.double()) <= 1e-6
        out.square().mean().backward()
        expected.square().mean().backward()
    for p, q in zip(network.parameters(), expected_network.parameters(), strict=True):
        assert relative_error(p.grad, q.grad.double()) <= 1e-5
    for p, q in zip(network.buffers(), expected_network.buffers(), strict=True):
        assert torch.allclose(p, q)


def test_compile_with_inductor() -> None:
    torch.compiler.reset()
    network = Network(BLOCKS["expand"]).eval()
    x = normal(2, 6, 12, 10).float()
    with torch.no_grad():
        assert relative_error(torch.compile(network, fullgraph=True)(x), network(x).double()) <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_export_with_dynamic_size(layout: str) -> None:
    network = Network(BLOCKS["expand"]).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    x = lay_out(normal(2, 6, 16, 18).float(), layout)
    with torch.no_grad():
        exported = torch.export.export(network, (x,), dynamic_shapes={"x": dynamic}).module()
        for size in ((3, 6, 21, 10), (1, 6, 12, 33)):
            x = lay_out(normal(*size).float(), layout)
            assert torch.equal(exported(x), network(x))


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_flops_are_two_per_multiply_add(name: str) -> None:
    args = arguments(name, "channels_last", torch.float32)
    batch, pixels = 3, 7 * 5
    block = 2 * batch * (pixels * (6 * 16 + 25 * 16 + 16 * 6) + 2 * 16 * 4)
    expected = {
        "depthwise_conv2d": 2 * 2 * 6 * (4 * 5) * 15,
        "pointwise_conv2d": 2 * 2 * 35 * 6 * 9,
        "squeeze_excite": 2 * 2 * 2 * 6 * 3,
        "mbconv_inference": block,
        "mbconv_training": block,
        "batch_norm_training": 0,
    }[name]
    assert flops(lambda: getattr(OPERATORS, name)(*args)) == expected


@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_flops_are_twice_the_forwards(name: str) -> None:
    """One product for the gradient of each factor; nothing for one that is not needed, nor for what is recomputed."""
    forward = name.removesuffix("_backward")
    forward = f"{forward}_training" if forward in ("mbconv", "batch_norm") else forward
    once = flops(lambda: getattr(OPERATORS, forward)(*arguments(forward, "channels_last", torch.float32)))
    args = arguments(name, "channels_last", torch.float32)
    assert flops(lambda: getattr(OPERATORS, name)(*args)) == 2 * once
    assert flops(lambda: getattr(OPERATORS, name)(*args[:-1], [False] * len(args[-1]))) == 0


def test_training_flops_of_a_frozen_block() -> None:
    """Only SE's last product learns: the gradient of its weight and of all that follows, but of nothing before."""
    args = arguments("mbconv_backward", "channels_last", torch.float32)
    needs = [i == 9 for i in range(14)]
    project, product = 2 * 3 * 35 * 16 * 6, 2 * 3 * 16 * 4
    assert flops(lambda: OPERATORS.mbconv_backward(*args[:-1], needs)) == project + product


def saved_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass besides parameters, each storage once."""
    kept: dict[int, int] = {}
    ignored = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    del out
    return sum(kept.values())


def recompute_case(channels: int) -> tuple[Callable[[], Tensor], list[Tensor], int, int]:
    """A block with the bytes of its expanded activation, and of all the rest that training has to keep."""
    case = MBConvCase("", (2, channels, 16, 16), channels, 6 * channels, 4, stride=2)
    tensors = {name: value if value is None else value.float() for name, value in mbconv_tensors(case).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    leaves = {n: v if v is None else v.requires_grad_("running" not in n) for n, v in tensors.items()}
    function = mbconv_function(case, True)
    parameters = [v for n, v in leaves.items() if v is not None and n != "x"]
    wide = 6 * channels
    expanded = 4 * 2 * wide * 256
    vectors = 2 * (wide + wide + channels) + 2 * wide
    rest = 4 * (2 * channels * 256 + 2 * (wide + channels) * 64 + vectors)
    return lambda: function(leaves), parameters, expanded, rest


@pytest.mark.parametrize(
    ("policy", "channels", "saves"),
    [("always", 72, False), ("never", 16, True), ("auto", 64, False), ("auto", 72, True)],
)
def test_recompute_policy_saves_what_it_promises(policy: str, channels: int, saves: bool) -> None:
    function, parameters, expanded, rest = recompute_case(channels)
    with effnet_ops.use_backend("cpu"), effnet_ops.set_recompute(policy):
        assert saved_bytes(function, parameters) == rest + saves * expanded


def test_recompute_policies_agree() -> None:
    """With bf16 the saved activation is the rounded one, without it the same value is rounded again."""
    case = BLOCKS["expand"]
    tensors = mbconv_tensors(case)
    results = []
    for policy in ("always", "never"):
        with effnet_ops.set_recompute(policy):
            results.append(run(mbconv_function(case, True), tensors))
    (always, always_grads), (never, never_grads) = results
    assert torch.equal(always, never)
    assert all(relative_error(always_grads[name], grad) <= 1e-11 for name, grad in never_grads.items())


def test_set_recompute_lasts_and_restores() -> None:
    function, parameters, expanded, rest = recompute_case(16)
    with effnet_ops.use_backend("cpu"), effnet_ops.set_recompute("always"):
        effnet_ops.set_recompute("never")
        assert saved_bytes(function, parameters) == rest + expanded
        with effnet_ops.set_recompute("always"):
            assert saved_bytes(function, parameters) == rest
        assert saved_bytes(function, parameters) == rest + expanded


def test_unknown_recompute_policy() -> None:
    with pytest.raises(ValueError, match="unknown recompute policy 'allways'; did you mean 'always'"):
        effnet_ops.set_recompute("allways")


def test_frozen_weight_does_not_keep_x() -> None:
    """The gradient of a linear convolution's input needs no activation at all."""
    weight = normal(8, 1, 3, 3).float()
    product = normal(8, 8, 1, 1).float()
    x = normal(2, 8, 6, 6).float().requires_grad_()
    with effnet_ops.use_backend("cpu"):
        assert saved_bytes(lambda: effnet_ops.depthwise_conv2d(x, weight, padding=1), [weight]) == 0
        assert saved_bytes(lambda: effnet_ops.pointwise_conv2d(x, product), [product]) == 0
        h = effnet_ops.pointwise_conv2d(effnet_ops.depthwise_conv2d(x, weight, padding=1), product)
        (grad,) = torch.autograd.grad(h.sum(), x)
    with effnet_ops.use_backend("reference"):
        h = effnet_ops.pointwise_conv2d(effnet_ops.depthwise_conv2d(x, weight, padding=1), product)
        (expected,) = torch.autograd.grad(h.sum(), x)
    assert relative_error(grad, expected.double()) <= 1e-5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", [*FORWARDS, *BACKWARDS])
def test_two_runs_are_equal_bit_for_bit(name: str) -> None:
    args = arguments(name, "channels_last", torch.float32)
    first, second = (as_list(getattr(OPERATORS, name)(*args)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_training_flops_of_b0() -> None:
    """Forward, and backward of everything but the image: 2.29 GFLOP (PyTorch's own formula, without groups: 32.2)."""
    with FakeTensorMode():
        model = effnet_ops.create_model("efficientnet_b0")
        x = torch.empty(1, 3, 224, 224)
        forward = flops(lambda: model(x))
        training = flops(lambda: model.train()(x).sum().backward())
    stem = 2 * 112 * 112 * 27 * 32
    assert round(forward / 2e9, 4) == 0.3858
    assert training == 3 * forward - stem
    assert round(training / 1e9, 2) == 2.29
