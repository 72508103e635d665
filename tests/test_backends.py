"""Who runs a call: the automatic choice, an explicit request, and the reasons why a backend cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import normal

import effnet_ops
from effnet_ops import backends

X, WEIGHT = torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 3, 3)


def python(code: str, backend: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "EFFNET_OPS_BACKEND"}
    environment |= variables
    if backend is not None:
        environment["EFFNET_OPS_BACKEND"] = backend
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_available_backends() -> None:
    available = effnet_ops.available_backends()
    assert available["reference"] == ""
    assert available["cpu"] == "", "the C++ part is not built"


def test_automatic_choice() -> None:
    assert backends.select(X) == "cpu"
    assert backends.select(X.to("meta")) == "reference"
    assert backends.select(X, uncovered="some reason") == "reference"


def test_use_backend_as_context_manager() -> None:
    with effnet_ops.use_backend("reference"):
        assert backends.select(X) == "reference"
        with effnet_ops.use_backend("cpu"):
            assert backends.select(X) == "cpu"
        assert backends.select(X) == "reference"
    assert backends.select(X) == "cpu"


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_use_backend_while_tracing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever it takes to find out whether a backend can run is not traced."""
    monkeypatch.setattr(backends, "_reasons", dict.fromkeys(backends.BACKENDS, ""))

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        with effnet_ops.use_backend(name):
            return x + 1

    assert traced(X).sum() == X.numel()


def test_use_backend_as_decorator() -> None:
    @effnet_ops.use_backend("reference")
    def chosen() -> str:
        return backends.select(X)

    assert [chosen(), chosen(), backends.select(X)] == ["reference", "reference", "cpu"]


def test_use_backend_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), effnet_ops.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.select(X) == "cpu"


def test_use_backend_is_of_one_thread() -> None:
    seen = []
    with effnet_ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.select(X)))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_backend_runs_what_it_says() -> None:
    """The operator runs under `cpu`, PyTorch's own functions under `reference`: the gradient's node tells."""
    x = normal(1, 8, 5, 5).float().requires_grad_()
    with effnet_ops.use_backend("cpu"):
        assert "effnet_ops" in effnet_ops.depthwise_conv2d(x, WEIGHT).grad_fn.name()
    with effnet_ops.use_backend("reference"):
        assert "effnet_ops" not in effnet_ops.depthwise_conv2d(x, WEIGHT).grad_fn.name()


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'referense'; did you mean 'reference'"),
        effnet_ops.use_backend("referense"),
    ):
        pass


def test_backend_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.Backend(lambda: "there is no such device", lambda x: "")
    monkeypatch.setitem(backends.BACKENDS, "broken", broken)
    monkeypatch.setitem(backends._reasons, "broken", broken.unavailable())
    assert effnet_ops.available_backends()["broken"] == "there is no such device"
    with (
        pytest.raises(RuntimeError, match="'broken' cannot run here: there is no such device"),
        effnet_ops.use_backend("broken"),
    ):
        pass


def test_request_that_does_not_cover_the_call() -> None:
    with effnet_ops.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="'cpu' cannot run this call: x is on meta"):
            effnet_ops.depthwise_conv2d(X.to("meta"), WEIGHT.to("meta"))
        with pytest.raises(RuntimeError, match="channel multiplier"):
            effnet_ops.depthwise_conv2d(X, torch.zeros(16, 1, 3, 3))


SELECT = "import torch; from effnet_ops import backends; print(backends.select(torch.zeros(1, 1, 1, 1)))"


@pytest.mark.parametrize(("variable", "chosen"), [("reference", "reference"), ("", "cpu")])
def test_environment(variable: str, chosen: str) -> None:
    assert python(SELECT, variable).stdout.strip() == chosen


def test_unknown_backend_in_the_environment() -> None:
    result = python(SELECT, "cpuu")
    assert result.returncode != 0
    assert "unknown backend 'cpuu'; did you mean 'cpu'" in result.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "there is no NVIDIA GPU, or no driver for it (TRITON_INTERPRET=1 needs none)"),
        ({"TRITON_INTERPRET": "1"}, ""),
    ],
)
def test_triton_needs_a_gpu_or_the_interpreter(variables: dict[str, str], reason: str) -> None:
    """Importing Triton proves nothing, and is left to the first call that needs it; the CPU keeps its kernels."""
    code = f"""
import sys, torch, effnet_ops
assert effnet_ops.available_backends()["triton"] == {reason!r}, effnet_ops.available_backends()
assert "effnet_ops.kernels.activation" not in sys.modules
assert effnet_ops.backends.select(torch.zeros(1, 1, 1, 1)) == "cpu"
"""
    result = python(code, None, **variables)
    assert result.returncode == 0, result.stderr


def test_without_the_compiled_part() -> None:
    """A package whose C++ was not built still runs its public functions and its operators."""
    code = """
import sys
sys.modules["effnet_ops._C"] = None
import torch, effnet_ops
reason = effnet_ops.available_backends()["cpu"]
assert reason, "no reason"
x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
expected = effnet_ops.depthwise_conv2d(x, weight, padding=1, activation="silu")
out = torch.ops.effnet_ops.depthwise_conv2d(x, weight, None, [1, 1], [], [1, 1], "silu")
assert torch.equal(out, expected)
grads = torch.autograd.grad(expected.sum(), (x, weight)), torch.autograd.grad(out.sum(), (x, weight))
assert all(map(torch.equal, *grads))
try:
    with effnet_ops.use_backend("cpu"):
        pass
except RuntimeError as error:
    print(error)
"""
    result = python(code, None)
    assert result.returncode == 0, result.stderr
    assert "backend 'cpu' cannot run here: " in result.stdout
