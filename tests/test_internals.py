"""PyTorch's private names mean what `effnet_ops.internals` says, and a call is prepared only where nobody sees it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_surroundings import CHANGES, Doubling
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops import context, internals
from effnet_ops.ops import prepared

PACKAGE = Path(effnet_ops.__file__).parent
PRIVATE = re.compile(r'torch\._[A-Za-z]|from torch\._|_dynamo_marked|forward_ad\._|(?<!")\btorch\.[a-z.]+\._[a-z]')


def test_private_names_are_in_one_file() -> None:
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "internals.py" and "benchmark" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if PRIVATE.search(line) and "torch.__version__" not in line and "import OpOverload" not in line
    ]
    assert found == []


@contextlib.contextmanager
def forward_mode() -> Any:
    with forward_ad.dual_level():
        yield


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "gradient mode": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "function mode": Doubling,
    "default device": lambda: torch.device("cpu"),
    "forward-mode differentiation": forward_mode,
    "another backend": lambda: effnet_ops.use_backend("reference"),
}
"""Each state of PyTorch in which a kernel may not stand in for operators."""


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
def test_no_prepared_call_in_a_state_that_sees_operators(state: str) -> None:
    x = torch.ones(1, 8, 2, 2)
    assert prepared.fits(x)
    with STATES[state]():
        assert not prepared.fits(x)
    assert prepared.fits(x)


@torch.no_grad()
def test_states_of_tensors() -> None:
    x = torch.ones(1, 8, 2, 2)
    negative = torch.ones(1, 8, 2, 2, dtype=torch.complex64).conj().imag
    assert negative.is_neg() and not prepared.fits(negative)
    assert not prepared.fits(nn.Parameter(x)) and not prepared.fits(x[:0]) and not prepared.fits(x.to("meta"))


@torch.no_grad()
@pytest.mark.parametrize("deterministic", [False, True])
def test_states_that_change_nothing(deterministic: bool) -> None:
    """Kernels give the same bits in each run, and inference mode hides nothing."""
    x = torch.ones(1, 8, 2, 2)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.inference_mode():
            assert prepared.fits(x)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_stock_layers_are_seen(change: str) -> None:
    """A replaced ``_conv_forward`` is a matter of each class, see `context.is_patched`."""
    assert not context.overridden()
    with CHANGES[change]():
        assert context.overridden() or context.is_patched(nn.Conv2d, "_conv_forward")
    assert not context.overridden()


def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(context.in_transform())
        return x.sum()

    x = torch.ones(3)
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd):
        transform(function)(x)
    torch.func.jvp(function, (x,), (x,))
    assert seen == [True] * 4 and not context.in_transform()
    with forward_ad.dual_level():
        assert internals.forward_level() == 0
    assert internals.forward_level() == -1


def test_tracing_is_seen() -> None:
    seen: list[tuple[bool, bool]] = []

    def function(x: Tensor) -> Tensor:
        seen.append((internals.tracer(), internals.tracing_mode()))
        return x + 1

    function(torch.ones(3))
    torch.jit.trace(function, torch.ones(3), check_trace=False)
    make_fx(function)(torch.ones(3))
    with FakeTensorMode():
        function(torch.ones(3))
    assert seen[0] == (False, False) and (True, False) in seen
    assert seen[-2:] == [(False, True), (False, True)]
    with FlopCounterMode(display=False):
        assert not internals.tracing_mode()


def test_versions_and_storages() -> None:
    x = torch.ones(3)
    version, storage = internals.version_of(x), x.untyped_storage()
    x.add_(1)
    assert internals.version_of(x) == version + 1
    uses = internals.storage_uses(storage)
    y = x.detach()
    assert internals.storage_uses(storage) == uses + 1 and internals.same_storage(storage, y.untyped_storage())
    assert not internals.same_storage(storage, torch.ones(3).untyped_storage())


def test_keys() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    assert internals.any_requires_grad(1, None, x) and not internals.any_requires_grad(x.detach())
    with internals.below_autograd():
        assert not (x @ x).requires_grad
        with internals.above_autograd():
            assert (x @ x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with internals.without(internals.AUTOCAST):
            assert (x @ x).dtype is torch.float32


def test_names_of_modules() -> None:
    assert nn.ModuleList.forward is internals.no_forward
    assert not internals.global_hook() and list(internals.global_hooks()) == []


def test_constants_are_taken_while_compiling() -> None:
    calls: list[int] = []

    @internals.constant
    def ask() -> bool:
        calls.append(1)
        return True

    compiled = torch.compile(lambda x: x + 1 if ask() else x - 1, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 1 and len(calls) == 1
