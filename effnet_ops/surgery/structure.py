"""Whether modules are still what something was made from: their children, classes, methods, hooks and settings.

Asked before each call of a replaced layer, and of a folded one, which asks for tensors, too (`surgery.guard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

from torch import nn

from effnet_ops.surgery.snapshot import Snapshot

HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward_pre",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward_pre",
}
FORWARDS = ("forward", "_conv_forward")
"""What somebody can replace, on a module or on its class, in order to change what the module computes."""

_SETTINGS = ("stride", "padding", "dilation", "output_size")
"""Which can be lists, as those of efficientnet_pytorch are, in which somebody can write."""


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, or the one it had before it was replaced or folded."""
    cls = below_sharding(type(module))
    stock = cls.__dict__.get("stock")
    return stock if isinstance(stock, type) and issubclass(cls, stock) else type(module)


def below_sharding(cls: type[nn.Module]) -> type[nn.Module]:
    """The class on top of which fully_shard of torch.distributed puts one, whose calls are those of this class."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("torch.distributed."))


class Structure:
    """What ``owner`` and the ``modules`` inside it are.

    ``settings`` are attributes of the owner, ``methods`` those whose calls something takes the place of beside the
    forward of the modules, and ``tables`` are looked into in each module, hooks beside them.
    """

    __slots__ = (
        *("_links", "_lists", "_methods", "_modules", "_names"),
        *("_settings", "_snapshot", "_types", "_watched", "fixed"),
    )

    def __init__(
        self,
        owner: nn.Module,
        modules: Sequence[nn.Module],
        settings: Sequence[str],
        methods: Iterable[tuple[type, str]],
        tables: Sequence[str],
    ) -> None:
        self._links, self._modules, self._names = owner._modules, list(modules), settings
        # A new instance attribute can be a forward of its own.
        states = [module.__dict__ for module in self._modules]
        inner = (state[name] for state in states for name in (*tables, *HOOKS) if name in state)
        self._snapshot = Snapshot([*(owner.__dict__[name] for name in tables), *states, *inner])
        self._settings, self._types = self._read(owner), self._types_of(owner)
        written = [state.get(name) for state in (owner.__dict__, *states) for name in _SETTINGS]
        self._lists = [(value, tuple(value)) for value in written if isinstance(value, list)]
        # An array of NumPy is written to without a trace.
        self.fixed = not any(hasattr(value, "__setitem__") for value in written if not isinstance(value, list))
        classes = {*map(stock_class, (owner, *self._modules)), *self._types}
        watched = {*methods, *((cls, name) for cls in classes for name in FORWARDS if hasattr(cls, name))}
        self._watched = tuple(zip(*watched, strict=True))
        self._methods = self._methods_now()

    def _read(self, owner: nn.Module) -> list[Any]:
        return [getattr(owner, name) for name in self._names]

    def _methods_now(self) -> list[Any]:
        return list(map(getattr, *self._watched))

    def _types_of(self, owner: nn.Module) -> list[type]:
        return [type(owner), *map(type, self._modules)]

    def same(self, owner: nn.Module) -> bool:
        """Whether nothing has changed since. A replica that was made by copying __dict__ has children of its own."""
        if self._links is not owner._modules or not self._snapshot.holds():
            return False
        # Objects, since those of NumPy have no truth of being equal.
        if self._types_of(owner) != self._types or not all(map(is_, self._read(owner), self._settings)):
            return False
        if self._methods_now() != self._methods:
            return False
        return not self._lists or all(tuple(value) == content for value, content in self._lists)
