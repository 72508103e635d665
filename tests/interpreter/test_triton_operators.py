"""What PyTorch expects of an operator, of those that run on Triton kernels; and how calls come to them."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import LAYOUTS, normal, relative_error
from test_operators import BACKWARDS, BLOCKS, FORWARDS, OPERATORS, arguments, as_list, clone, differentiable
from torch._subclasses.fake_tensor import FakeTensorMode

import effnet_ops
from effnet_ops import backends
from effnet_ops.ops import _library, triton

# The normalisation alone has kernels for the CPU only.
ALL = [name for name in (*FORWARDS, *BACKWARDS) if not name.startswith("batch_norm")]


def test_every_operator_has_kernels() -> None:
    fused = {f"fused_{name}" for name in ALL if name.startswith("mbconv")}
    assert set(triton.WORDS) == {*ALL, *fused}


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name: str) -> None:
    gradients = name in FORWARDS and name != "mbconv_inference"
    args = clone(arguments(name, "sliced", torch.float32), gradients)
    checks = ("test_schema", "test_faketensor", *(("test_autograd_registration",) if gradients else ()))
    torch.library.opcheck(getattr(OPERATORS, name).default, tuple(args), test_utils=checks)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in ALL for block in (BLOCKS if name.startswith("mbconv") else ["expand"])],
)
@pytest.mark.usefixtures("poison")
def test_every_result_equals_the_fallbacks(name: str, block: str) -> None:
    """Values, sizes, strides and dtypes, also of what only the backward operator reads."""
    layout = LAYOUTS[list(BLOCKS).index(block)]
    with effnet_ops.use_backend("cpu"):
        args = arguments(name, layout, torch.float64, block=block)
    expected = as_list(_library.OPERATORS[name].fallback(*args))
    for value, exact in zip(as_list(getattr(OPERATORS, name)(*args)), expected, strict=True):
        assert (value.dtype, value.shape, value.stride()) == (exact.dtype, exact.shape, exact.stride())
        assert relative_error(value, exact) <= 1e-11


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 0])
def test_fake_results_are_real(name: str, batch: int) -> None:
    args = arguments(name, "channels_last", torch.bfloat16, batch)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = as_list(getattr(OPERATORS, name)(*fakes))
    real = as_list(getattr(OPERATORS, name)(*args))
    assert [(r.dtype, r.shape, r.stride()) for r in real] == [(f.dtype, f.shape, f.stride()) for f in fake]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("depthwise_conv2d", "expand"),
        ("pointwise_conv2d", "expand"),
        ("squeeze_excite", "expand"),
        ("mbconv_training", "plain"),
        pytest.param("mbconv_training", "expand", marks=pytest.mark.slow),
    ],
)
def test_gradcheck(name: str, block: str) -> None:
    assert torch.autograd.gradcheck(*differentiable(name, block), fast_mode=True)


@pytest.mark.parametrize("name", BACKWARDS)
def test_unneeded_gradients_are_empty(name: str) -> None:
    """The gradient alone that needs most steps, the one that needs fewest, and one between."""
    args = arguments(name, "channels_last", torch.float64)
    count = len(args[-1])
    full = as_list(getattr(OPERATORS, name)(*args))
    for wanted in sorted({0, count // 2, count - 1}):
        results = as_list(getattr(OPERATORS, name)(*args[:-1], [i == wanted for i in range(count)]))
        assert relative_error(results[wanted], full[wanted]) <= 1e-12
        assert all(r.shape == (0,) for i, r in enumerate(results) if i != wanted)


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """A list that grows by one name with each call of the operator on Triton kernels."""
    seen: list[str] = []
    function = triton.implementation(name)

    def counted(*args: object) -> object:
        seen.append(name)
        return function(*args)

    replaced = {**{word: triton.implementation(word) for word in triton.WORDS}, name: counted}
    monkeypatch.setattr(triton, "implementation", replaced.__getitem__)
    return seen


def test_only_a_request_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, "depthwise_conv2d")
    x, weight = normal(1, 8, 5, 5), normal(8, 1, 3, 3)
    effnet_ops.depthwise_conv2d(x, weight)
    assert len(seen) == 1
    with effnet_ops.use_backend("cpu"):
        effnet_ops.depthwise_conv2d(x, weight)
    assert len(seen) == 1


def test_backward_runs_where_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the ``with`` block, and in a thread that asks for nothing, as those of GPUs are."""
    seen = calls(monkeypatch, "depthwise_conv2d_backward")
    x, weight = normal(1, 8, 5, 5).requires_grad_(), normal(8, 1, 3, 3)
    out = effnet_ops.depthwise_conv2d(x, weight)
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    assert len(seen) == 1
    with effnet_ops.use_backend("cpu"):
        out = effnet_ops.depthwise_conv2d(x, weight)
    out.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("kernel", "config", "reason"),
    [
        ((8, 8), {}, "8x8 kernel has more than 49 taps"),
        ((3, 3), {"dilation": 8}, "reaches further than 13 pixels"),
        ((3, 3), {"stride": 9}, "stride .9, 9. is longer than 8"),
    ],
)
def test_windows_without_a_kernel(kernel: tuple[int, int], config: dict[str, int], reason: str) -> None:
    """An explicit request is an error that says why; the operator itself is right all the same."""
    x, weight = normal(1, 8, 20, 20), normal(8, 1, *kernel)
    with pytest.raises(RuntimeError, match=f"'triton' cannot run this call: .*{reason}"):
        effnet_ops.depthwise_conv2d(x, weight, **config)
    stride, dilation = [config.get("stride", 1)] * 2, [config.get("dilation", 1)] * 2
    out = OPERATORS.depthwise_conv2d(x, weight, None, stride, [0] * 4, dilation, "none")
    exact = torch.nn.functional.conv2d(x, weight, None, stride, 0, dilation, 8)
    assert relative_error(out, exact) <= 1e-13


def test_reasons_name_the_device() -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot run this call: x is on meta"):
        effnet_ops.depthwise_conv2d(torch.zeros(1, 8, 5, 5, device="meta"), torch.zeros(8, 1, 3, 3, device="meta"))
    assert effnet_ops.available_backends()["triton"] == ""


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._refuses_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backends._refuses_gpu(3) == "cuda:3 has compute capability 7.5, and the kernels need 8.0"
    backends._refuses_gpu.cache_clear()


def test_compile_fullgraph() -> None:
    """PyTorch's compiler sees one opaque operator each way, and runs it."""
    torch.compiler.reset()
    weight = normal(8, 1, 3, 3).requires_grad_()
    x = normal(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)

    def function(x: torch.Tensor) -> torch.Tensor:
        return effnet_ops.depthwise_conv2d(x, weight, stride=2, padding="same", activation="silu").square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.sum(), weight)))
    for value, expected in zip(*results, strict=True):
        assert value.stride() == expected.stride()
        assert relative_error(value, expected) <= 1e-13
