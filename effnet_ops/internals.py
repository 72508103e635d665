"""PyTorch's private names, all that this package uses, each with what it is for: no public name says it.

tests/test_internals.py fails where one of them changes its meaning. The tables of nn.Module (``_parameters``,
``_buffers``, ``_modules``, hooks) are used where modules are looked at: subclasses have relied on them for years.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

# Who sees a call: asked before each prepared call, which would hide it.
transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
"""The innermost function transform of torch.func, or None."""
function_mode: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
function_modes: Callable[[], int] = torch._C._len_torch_function_stack
function_mode_at: Callable[[int], object] = torch._C._get_function_stack_at
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
profiler: Callable[[], bool] = torch._C._autograd._profiler_enabled
tracer: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace records; torch.jit.is_tracing is a function of Python around it."""
global_hook: Callable[[], bool] = _module._has_any_global_hook

DispatchMode = TorchDispatchMode
"""The base of modes that see each operator."""
default_device = DeviceContext
"""The class of the function mode that is a default device."""
run_backward = _engine_run_backward
"""The function on the stack between a backward pass and what runs in it."""
no_forward = _module._forward_unimplemented
"""The forward of modules that have none."""

# What stands between a call and its kernel.
Keys = torch._C.DispatchKeySet
AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
AUTOCAST = Keys(AUTOCAST_KEYS["cpu"]) | Keys(AUTOCAST_KEYS["cuda"])
AUTOGRAD = Keys(torch._C.DispatchKey.AutogradFunctionality)
AFTER_AUTOGRAD = torch._C._after_autograd_keyset
below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context: operators go past their autograd kernels."""
without = torch._C._ExcludeDispatchKeyGuard
"""A context: operators go past the kernels of these keys."""
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad

version_of: Callable[[Tensor], int] = Tensor._version.__get__
"""How often a tensor was written to; the getter itself, which `map` calls without a frame of Python."""


def compile_package(program: Any, path: str, settings: dict[str, Any]) -> str:
    """Compile a program of torch.export with AOTInductor into a package; gives its path."""
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


def load_package(path: str) -> Callable[..., Any]:
    """What such a package computes, as a function."""
    return torch._inductor.aoti_load_package(path)


_storage_uses: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_GLOBAL_HOOKS = ("forward_pre", "forward", "backward_pre", "backward")
_F = TypeVar("_F", bound=Callable[..., Any])


def process_group(name: str) -> Any:
    """The process group of this name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def forward_level() -> int:
    """The level of forward-mode differentiation, -1 outside."""
    return forward_ad._current_level


def global_hooks() -> Iterator[Any]:
    """Hooks on all modules."""
    for kind in _GLOBAL_HOOKS:
        yield from getattr(_module, f"_global_{kind}_hooks").values()


def tracing_mode() -> bool:
    """Whether a mode of ``__torch_dispatch__`` of PyTorch itself fakes or traces tensors; others see operators run."""
    return dispatch_modes() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING_MODES))


def above_autograd() -> Any:
    """A context inside a kernel: autograd sees operators again."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(include, exclude - AUTOGRAD)


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects have this memory; 0 where this PyTorch does not say."""
    return 0 if _storage_uses is None else _storage_uses(storage._cdata)


def same_storage(one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    return one._cdata == other._cdata


def constant(function: _F) -> _F:
    """Let torch.compile call a function while it traces, and take its result for a constant.

    What torch.compiler.assume_constant_result does, without the seconds that importing it takes.
    """
    function._dynamo_marked_constant = True
    return function
