"""Nests of tensors in another dtype: what goes into a copy that computes in one, and what comes out."""

from __future__ import annotations

import copy
import dataclasses
import threading
import types
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

_Pairs = list[tuple[Tensor, Tensor]]


def cast(value: Any, dtype: torch.dtype, but: Tensor | None = None, done: _Pairs | None = None) -> Any:
    """The floating-point tensors in ``value``, without ``but``, in ``dtype``; what stays as it is is the same object.

    Looks into mappings, lists, tuples (also named ones), dataclasses and namespaces, and keeps their classes. What is
    one tensor in two places stays one; ``done`` has those that were cast, each with what came of it.
    """
    done = [] if done is None else done
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value is but:
            return value
        # torch.compile has no ids of tensors, by which a dictionary would go.
        found = [new for old, new in done if old is value] or [value.to(dtype)]
        done.append((value, found[0]))
        return found[0]
    items, changed = dict(_items(value)), {}
    for key, item in items.items():
        new = cast(item, dtype, but, done)
        if new is not item:
            changed[key] = new
    return _replaced(value, items | changed, changed) if changed else value


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in ``value``."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    for _, item in _items(value):
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """What is in a container, each with its key, index or name."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    elif isinstance(value, types.SimpleNamespace):
        yield from vars(value).items()


def _replaced(value: Any, items: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """A container like ``value`` with other items in the place of those in ``changed``."""
    if isinstance(value, tuple):
        values = list(items.values())
        # torch.return_types take a list; named tuples have a constructor of their own, other tuples may.
        make = getattr(type(value), "_make", type(value))
        return make(values)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)(items)
    try:
        result = copy.copy(value)
    except KeyError:
        # A mapping whose attributes are its keys, and which says KeyError where Python expects AttributeError.
        result = type(value)(value)
    for key, item in changed.items():
        if isinstance(value, Mapping | list):
            result[key] = item
        else:
            # Also of a frozen dataclass.
            object.__setattr__(result, key, item)
    return result


def own_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's own floating-point tensors, not of those of other modules inside it."""
    own = [*module._parameters.values(), *module._buffers.values()]
    if "parametrizations" in module._modules:
        own += module._modules["parametrizations"].parameters()
    for tensor in own:
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return None


def cast_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """A hook: what a module is given, in the dtype of its own tensors."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and first_tensor(first) is None:
        kind = first.dtype if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(f"x must be a tensor of floating-point numbers, got {kind}")
    dtype = own_dtype(module)
    if dtype is None:
        # A fused layer, which computes with the tensors of its children. Norms among them may keep their precision.
        convs = (inner for inner in module.modules() if isinstance(inner, nn.modules.conv._ConvNd))
        dtype = next(p for conv in convs for p in conv.parameters() if p.is_floating_point()).dtype
    return cast(args, dtype), cast(kwargs, dtype)


class _Given(threading.local):
    """The dtype that this thread gave to each copy last, by the id of the copy's hook."""

    def __init__(self) -> None:
        self.by_hook: dict[int, torch.dtype | None] = {}


_given = _Given()


class CastOutput:
    """A hook on a copy: what it returns, in the dtype of the first tensor given, or of the model where there is none.

    The model's dtype is that of its parameters before they were converted. What was given is seen by `CastInput`.
    """

    def __init__(self, model: torch.dtype | None) -> None:
        self._model = model
        self._traced: torch.dtype | None = None

    def remember(self, dtype: torch.dtype | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = dtype
        else:
            _given.by_hook[id(self)] = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = self._traced if torch.compiler.is_compiling() else _given.by_hook.get(id(self))
        dtype = self._model if given is None else given
        return output if dtype is None else cast(output, dtype)


class CastInput:
    """A hook on a copy: all that it is given but the first tensor, in the dtype that it computes in.

    The first is cast where it meets a layer: what the model itself does to its images has their precision.
    """

    def __init__(self, output: CastOutput, like: nn.Module | None) -> None:
        self._output, self._like = output, like
        """``like``: a layer whose own tensors, a buffer of folded ones among them, have that dtype."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = first_tensor([*args, *kwargs.values()])
        self._output.remember(None if first is None else first.dtype)
        if self._like is None:
            return args, kwargs
        like = self._like._buffers.get("activations")
        dtype = own_dtype(self._like) if like is None else like.dtype
        return (args, kwargs) if dtype is None else (cast(args, dtype, first), cast(kwargs, dtype, first))
