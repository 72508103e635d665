"""What PyTorch is doing around a call, where that decides how the call has to run.

PyTorch has no public name for any of it, so the private ones are here, each in one place.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.fx import Proxy

_RECOMPUTING = ("recompute_fn", "backward")
"""The functions of torch.utils.checkpoint that run a forward pass again, without and with reentrant autograd."""


def transforming() -> bool:
    """Whether forward-mode differentiation or torch.func (vmap, grad, jacfwd ...) has to see every step of a call."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def recomputing() -> bool:
    """Whether torch.utils.checkpoint runs this forward pass a second time, for the backward pass.

    Its function is on the stack then, and nearer than the backward pass that it belongs to. Being inside a backward
    pass is no sign: hooks and autograd functions may run forward passes of their own there.
    """
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if frame.f_code.co_name in _RECOMPUTING and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def is_leaf(module: nn.Module, x: object) -> bool:
    """Whether torch.fx traces a network of which ``module`` is a part, and so shall record it as one node (`leaf`)."""
    return isinstance(x, Proxy) and x.tracer.root is not module


def leaf(module: nn.Module, x: Proxy) -> Proxy:
    """The node ``module(x)``: what torch.fx's own rule, which goes by the package, does for the layers of torch.nn."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})
