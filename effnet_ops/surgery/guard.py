"""The one guard of optimized copies: whether what was made from modules and their tensors still holds.

Packed weights lie beside the weights that they were made from. A change of such a weight is seen by its version, as
autograd sees it. For what writes past versions (``.data``, NumPy, the storage), a parameter notes that somebody asks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops import internals
from effnet_ops.surgery.structure import Structure

_BESIDES_VERSIONS = ("numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "_typed_storage")
_VIEWS = ("view", "reshape", "flatten", "__getitem__", "select", "narrow", "split", "chunk", "unbind")
_VIEWS += ("squeeze", "unsqueeze", "transpose", "permute", "t", "expand")
"""Methods that give a tensor with the same memory, whose ``data`` or ``numpy()`` nobody sees."""
_OWN_USES = 3
"""A tensor, its alias, and the storage object that asks."""


class _Watch:
    """What is known of a watched tensor; ``asked`` counts who asked for its memory."""

    __slots__ = ("alias", "asked")
    asked_in_all = 0

    def __init__(self) -> None:
        self.alias: Tensor | None = None
        self.asked = 0


def _note(tensor: Tensor) -> None:
    tensor._watch.asked += 1
    _Watch.asked_in_all += 1


def _noted(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        _note(self)
        return method(self, *args, **kwargs)

    return noted


class WatchedParameter(nn.Parameter):
    """A parameter that notes who asks for its memory. It pickles and copies as a plain one."""

    @functools.cached_property
    def _watch(self) -> _Watch:
        return _Watch()

    @property
    def data(self) -> Tensor:
        _note(self)
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        _note(self)
        Tensor.data.__set__(self, value)

    def detach(self) -> Tensor:
        _note(self)
        alias = Tensor.detach(self)
        # nn.Parameter(parameter) asks for it, and insists on the same class.
        wanted = sys._getframe(1).f_code is nn.Parameter.__new__.__code__
        return alias.as_subclass(WatchedParameter) if wanted else alias

    def __setattr__(self, name: str, value: Any) -> None:
        # By which torch.utils.swap_tensors gives a parameter another's memory.
        if name == "__class__":
            _note(self)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(Tensor.detach(self).clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        # torch.multiprocessing moves the memory to where other processes can write.
        _note(self)
        return nn.Parameter(Tensor.detach(self), self.requires_grad).__reduce_ex__(protocol)


for _name in (*_BESIDES_VERSIONS, *_VIEWS):
    setattr(WatchedParameter, _name, _noted(_name))


class Sources:
    """The tensors that something was made from, and whether they still hold the same numbers."""

    __slots__ = ("_asked", "_asked_in_all", "_buffers", "_known", "_parameters", "_places", "_versioned", "_versions")

    def __init__(self, tensors: Sequence[Tensor], known: bool = True) -> None:
        self._parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        self._buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        plain = all(type(buffer) is Tensor and not buffer.is_inference() for buffer in self._buffers)
        self._known = known and plain and all(map(_watch, self._parameters))
        if self._known:
            self._asked_in_all, self._asked = _Watch.asked_in_all, self._all_asked()
            # The getter of versions is fast on plain tensors alone, and an alias has the version of its original.
            self._versioned = [*(parameter._watch.alias for parameter in self._parameters), *self._buffers]
            self._versions = list(map(internals.version_of, self._versioned))
            self._places = list(map(Tensor.data_ptr, self._buffers))
            self._known = all(map(_alone, self._parameters))

    def _all_asked(self) -> list[Any]:
        watches = [parameter.__dict__.get("_watch") for parameter in self._parameters]
        return [(watch, watch and watch.asked) for watch in watches]

    def hold(self) -> bool:
        """Whether nobody has written to them. Where somebody else has their memory, too, nobody knows."""
        if not self._known or list(map(internals.version_of, self._versioned)) != self._versions:
            return False
        if list(map(Tensor.data_ptr, self._buffers)) != self._places:
            return False
        if self._asked_in_all != _Watch.asked_in_all:
            now = _Watch.asked_in_all
            if self._asked != self._all_asked():
                return False
            self._asked_in_all = now
        return True

    def need_gradients(self) -> bool:
        return any(parameter.requires_grad for parameter in self._parameters)


def _watch(parameter: nn.Parameter) -> bool:
    """Watch a parameter; False where its class is somebody else's, or it has no version."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = WatchedParameter
    if type(parameter) is not WatchedParameter or parameter.is_inference():
        return False
    watch = parameter._watch
    if watch.alias is None or not internals.same_storage(_storage(watch.alias), _storage(parameter)):
        with torch.inference_mode(False), torch.no_grad():
            watch.alias = Tensor.detach(parameter)
    return True


def release(parameters: Iterable[Tensor]) -> None:
    """Give parameters their own class back: modes of ``__torch_dispatch__`` do not take every class."""
    for parameter in parameters:
        if type(parameter) is WatchedParameter:
            parameter.__class__ = nn.Parameter


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return Tensor.untyped_storage(tensor)


def _alone(tensor: Tensor) -> bool:
    """Whether nobody else, in this process or another, has the memory; NumPy's cannot be resized."""
    storage = _storage(tensor)
    if tensor.device.type == "cpu" and (storage.is_shared() or not storage.resizable()):
        return False
    return internals.storage_uses(storage) <= _OWN_USES


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The floating-point parameters and buffers of the modules themselves, each once."""
    found = (t for m in modules for table in (m._parameters, m._buffers) for t in table.values())
    return list({id(t): t for t in found if t is not None and t.is_floating_point()}.values())


def _have_parameters(modules: Iterable[nn.Module]) -> bool:
    """Whether all that stands for a parameter is one: torch.func.functional_call puts tensors there."""
    found = (p for module in modules for p in module._parameters.values())
    return all(p is None or isinstance(p, nn.Parameter) for p in found)


class Kept(Structure):
    """A value made from ``owner``'s ``settings`` and from ``modules``, with all that it was read from.

    ``make`` may return None: then the modules run one by one, until something changes.
    """

    __slots__ = ("sources", "value")

    def __init__(
        self,
        owner: nn.Module,
        modules: Sequence[nn.Module],
        settings: Sequence[str],
        methods: Sequence[tuple[type, str]],
        make: Callable[[], Any],
    ) -> None:
        super().__init__(owner, modules, settings, methods, ("_modules", "_parameters", "_buffers"))
        # Before they are read, so that what changes meanwhile is noticed.
        self.sources = Sources(tensors_of([owner, *modules]), _have_parameters([owner, *modules]))
        self.value = make()

    def holds(self, owner: nn.Module) -> bool:
        """Whether nothing has changed since."""
        return self.fixed and self.same(owner) and self.sources.hold()
