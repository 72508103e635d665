"""What goes on around a call, where that decides how the call has to run: transforms, traces, patched classes.

What is asked of PyTorch's private names is in `internals`.
"""

from __future__ import annotations

import sys
from operator import itemgetter
from types import FrameType

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn import functional

from effnet_ops import internals

_RECOMPUTING = ("recompute_fn", "backward")
"""The functions of torch.utils.checkpoint that run a forward pass again, without and with reentrant autograd."""


def in_transform() -> bool:
    """Whether forward-mode differentiation or torch.func (vmap, grad, jacfwd ...) has to see every step of a call."""
    return internals.forward_level() >= 0 or internals.transform() is not None


def transforming() -> bool:
    """The same for functions that torch.compile traces: it sees transforms itself, and cannot trace the question."""
    return not torch.compiler.is_compiling() and in_transform()


_COUNTING = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")
"""Whose global hooks only note which module is running, such as those of torch.utils.flop_counter."""

_FUNCTIONS = itemgetter(
    *("conv2d", "batch_norm", "linear", "pad", "dropout", "adaptive_avg_pool2d"),
    *("relu", "relu6", "hardtanh", "silu", "hardswish", "hardsigmoid"),
)
_ORIGINAL = (*_FUNCTIONS(vars(functional)), torch.sigmoid, nn.Module.__call__)
"""What the stock layers call, as it was when this package was imported."""


def overridden() -> bool:
    """Whether somebody sees or changes the calls that stock layers make, so that a fused one must not hide them.

    That are global module hooks, modes of ``__torch_function__`` but for the default device, and functions of
    torch.nn.functional, or the call of a module, that somebody has replaced.
    """
    return (
        (internals.global_hook() and _has_changing_hook())
        or (internals.function_modes() > 0 and _has_function_mode())
        or (*_FUNCTIONS(vars(functional)), torch.sigmoid, nn.Module.__call__) != _ORIGINAL
    )


def _has_changing_hook() -> bool:
    return any(getattr(hook, "__module__", None) not in _COUNTING for hook in internals.global_hooks())


def _has_function_mode() -> bool:
    stack = map(internals.function_mode_at, range(internals.function_modes()))
    return any(type(mode) is not internals.default_device for mode in stack)


def recomputing() -> bool:
    """Whether torch.utils.checkpoint runs this forward pass a second time, for the backward pass.

    Its function is on the stack then, and nearer than the backward pass that it belongs to. Being inside a backward
    pass is no sign: hooks and autograd functions may run forward passes of their own there.
    """
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not internals.run_backward.__code__:
        if frame.f_code.co_name in _RECOMPUTING and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def is_leaf(module: nn.Module, x: object) -> bool:
    """Whether torch.fx traces a network of which ``module`` is a part, and so shall record it as one node (`leaf`).

    Asked in the forward of our layers. Where more than that runs when the module is called (hooks, the forward of a
    subclass, a patched one), this more is traced already, and the node would run it again.
    """
    if not isinstance(x, Proxy) or x.tracer.root is module:
        return False
    cls, state = type(module), module.__dict__
    more = state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or is_patched(cls, "forward")
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return not more and owner.__module__ == "effnet_ops.layers"


def leaf(module: nn.Module, x: Proxy) -> Proxy:
    """The node ``module(x)``: what torch.fx's own rule, which goes by the package, does for the layers of torch.nn."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


@internals.constant
def is_patched(cls: type[nn.Module], method: str) -> bool:
    """Whether a method of a class is another one than its library wrote.

    Told from where the function was written: somebody may have replaced it before this package was imported.
    """
    owner = next((base for base in cls.__mro__ if method in vars(base)), None)
    # Lists of modules have no forward, and the name of that is another.
    if owner is None or vars(owner)[method] is internals.no_forward:
        return False
    function, module = vars(owner)[method], sys.modules.get(owner.__module__)
    written_there = module is not None and getattr(function, "__globals__", None) is vars(module)
    return not written_there or function.__qualname__ != f"{owner.__qualname__}.{method}"
