"""Copies and replaced models while something in PyTorch sees or changes what stock layers call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing
import torch.nn.functional as F
import torchvision
from networks import relative_difference, with_statistics
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from effnet_ops import context, optimize_for_inference, replace_layers
from effnet_ops.surgery import folding

SIZE = 64


def stock(library: str = "timm") -> nn.Module:
    torch.manual_seed(0)
    build = {"timm": lambda: timm.create_model("test_efficientnet"), "torchvision": torchvision.models.efficientnet_b0}
    return with_statistics(build[library](), SIZE)


def replaced(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    assert replace_layers(model).replaced
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {"replaced": replaced, "optimized": optimize_for_inference}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return KINDS[request.param]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and relative_difference(found, expected) < 1e-4


class Doubling(TorchFunctionMode):
    """Doubles what the convolutions give."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.conv2d else result


@contextlib.contextmanager
def doubled_function() -> Iterator[None]:
    original = F.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *args, **kwargs: 2 * original(*args, **kwargs))
        # The name by which the convolution of PyTorch calls it.
        patch.setattr("torch.nn.modules.conv.F.conv2d", F.conv2d)
        yield


@contextlib.contextmanager
def doubled_call() -> Iterator[None]:
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return 2 * result if isinstance(self, nn.BatchNorm2d) else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", call)
        yield


@contextlib.contextmanager
def doubled_method() -> Iterator[None]:
    original = nn.Conv2d._conv_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda *args: 2 * original(*args))
        yield


@contextlib.contextmanager
def hook(register: Callable[..., Any], function: Callable[..., Any]) -> Iterator[None]:
    handle = register(function)
    try:
        yield
    finally:
        handle.remove()


def _doubled(module: nn.Module, args: Any, result: Tensor) -> Tensor | None:
    return 2 * result if isinstance(module, nn.Conv2d) else None


def _doubled_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (2 * args[0],) if isinstance(module, nn.BatchNorm2d) else None


CHANGES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "function mode": Doubling,
    "function": doubled_function,
    "call": doubled_call,
    "method": doubled_method,
    "global hook": lambda: hook(register_module_forward_hook, _doubled),
    "global pre-hook": lambda: hook(register_module_forward_pre_hook, _doubled_input),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_stock_layers_call_is_seen(name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other, plain = make(model), model(x)
    close(other(x), plain)
    with CHANGES[name]():
        expected = model(x)
        assert relative_difference(expected, plain) > 0.1
        close(other(x), expected)
    close(other(x), plain)


@torch.no_grad()
def test_flops_of_a_replaced_model_are_those_of_its_operators() -> None:
    """The counter has global hooks, which only note which module runs."""
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    counts = []
    for net in (model, replaced(model)):
        with FlopCounterMode(display=False) as counter:
            assert not context.overridden()
            net(x)
        counts.append(counter)
    assert counts[0].get_total_flops() == counts[1].get_total_flops()
    assert any("effnet_ops" in str(operator) for operator in counts[1].get_flop_counts()["Global"])


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_fake_tensors(called: bool, make: Callable[[nn.Module], nn.Module]) -> None:
    """A copy packs at its first call: not the fakes."""
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other = make(model)
    if called:
        other(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = other(mode.from_tensor(x))
    assert y.shape == (2, 1000) and y.dtype is x.dtype
    close(other(x), model(x))


@torch.no_grad()
def test_tensors_of_another_class(make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    close(make(model)(tv_tensors.Image(x)), model(x))


@torch.no_grad()
@pytest.mark.parametrize("with_copy", [False, True])
def test_swapped_weights_are_noticed(with_copy: bool, make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other, second = make(model), make(model)
    first, other_first = (net.blocks[0][0].bn1 for net in (model, other))
    other(x), second(x)
    weight = second.blocks[0][0].bn1.weight if with_copy else nn.Parameter(first.weight.clone(), False)
    weight.mul_(3)
    first.weight.mul_(3)
    if with_copy:
        second(x)
    torch.utils.swap_tensors(other_first.weight, weight)
    close(other(x), model(x))


def _triple(weight: Tensor, done: Any) -> None:
    weight.data.mul_(3)
    done.set()


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_another_process_writes(before: bool, make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other = make(model)
    if not before:
        other(x)
    other.share_memory()
    other(x)
    processes = torch.multiprocessing.get_context("fork")
    done = processes.Event()
    process = processes.Process(target=_triple, args=(other.blocks[0][0].bn1.weight, done))
    process.start()
    assert done.wait(60)
    process.join()
    model.blocks[0][0].bn1.weight.mul_(3)
    close(other(x), model(x))


@torch.no_grad()
def test_weights_of_a_copy_become_parameters_elsewhere() -> None:
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other = optimize_for_inference(model)
    other(x)
    layer = nn.Linear(*reversed(other.classifier.weight.shape))
    layer.weight = nn.Parameter(other.classifier.weight)
    assert layer.weight.requires_grad and layer.weight.data_ptr() == other.classifier.weight.data_ptr()
    layer.weight.data.mul_(2)
    model.classifier.weight.mul_(2)
    close(other(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_of_a_called_copy(name: str) -> None:
    torch.manual_seed(1)
    model, x = stock(), torch.randn(2, 3, SIZE, SIZE)
    other = optimize_for_inference(model)
    other(x)
    for net in (model, other):
        torch.manual_seed(2)
        getattr(parametrizations, name)(net.conv_head)
        net.eval()
    close(other(x), model(x))


class Attributes(dict):
    """A dictionary with its keys as attributes, as many packages have one."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class TwoNames(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Attributes:
        y = self.body(x)
        return Attributes(first=y, second=y)


@torch.no_grad()
def test_outputs_keep_their_identity_and_any_mapping_comes_back() -> None:
    other = optimize_for_inference(TwoNames(stock()), dtype=torch.bfloat16)
    result = other(torch.randn(2, 3, SIZE, SIZE))
    assert type(result) is Attributes and result.first is result.second and result.first.dtype is torch.float32


@torch.no_grad()
def test_a_default_device_leaves_a_copy_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a mode, too."""
    other, x = optimize_for_inference(stock("torchvision")), torch.randn(2, 3, SIZE, SIZE)
    other(x)
    monkeypatch.setattr(folding, "fold", lambda *args: pytest.fail("folded again"))
    with torch.device("cpu"):
        other(x)
