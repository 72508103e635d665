"""How the call of an operator is a value: one NamedTuple lists its arguments, and everything else is derived from that.

A field is a tensor (`Activation`, `Weight`, `Constant`, each perhaps ``| None``), a number, a flag, a name, several
numbers, or a group: another NamedTuple, whose fields stand in the schema in its place. A group that is None has all its
tensors None. `Signature` is what PyTorch is told of such a class.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

CAST, GRADIENT, PASSED = "cast by autocast", "has a gradient", "its gradient is that of the result"
Activation = Annotated[Tensor, CAST, GRADIENT]
Weight = Annotated[Tensor, GRADIENT]
Added = Annotated[Tensor, CAST, PASSED]
Constant = Annotated[Tensor, ""]
Pair = tuple[int, int]
Sides = tuple[int, ...]
"""(top, bottom, left, right), or () for TensorFlow's SAME."""
Flags = tuple[bool, ...]

_TYPES = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", Pair: "int[]", Sides: "int[]"}
_TYPES[Flags] = "bool[]"


class ConvNorm(NamedTuple):
    """A convolution and its normalisation.

    Without gamma there is none, and beta is the convolution's bias; with gamma but without mean and var, batch
    statistics are used; with all, they are constants.
    """

    weight: Weight
    gamma: Weight | None
    beta: Weight | None
    mean: Constant | None
    var: Constant | None
    eps: float = 0.0

    def uses_batch(self) -> bool:
        return self.gamma is not None and self.mean is None


class SqueezeExcite(NamedTuple):
    """Squeeze-and-excitation: reduce, an activation, expand, a gate."""

    reduce_weight: Weight
    reduce_bias: Weight | None
    expand_weight: Weight
    expand_bias: Weight | None
    activation: str = "none"
    gate: str = "sigmoid"


class PackedConv(NamedTuple):
    """A convolution with its normalisation folded in, its weight packed (see `effnet_ops.packing`)."""

    weight: Weight
    bias: Weight


_PREFIXED = (ConvNorm, SqueezeExcite, PackedConv)
"""Groups of which a call has several, so that names in the schema begin with that of the field."""


class Argument(NamedTuple):
    """One argument in a schema."""

    name: str
    type: str
    roles: tuple[str, ...]
    absent: Any
    """Its value where its group is None."""


class Signature:
    """The arguments of a call's class, as a schema has them one after the other."""

    def __init__(self, call: type) -> None:
        self.call = call
        hints = get_type_hints(call, include_extras=True)
        fields = (_inner(hints[name])[0] for name in call._fields)
        self._groups = [Signature(field) if hasattr(field, "_fields") else None for field in fields]
        self._grouped = any(self._groups)
        self.arguments = tuple(_arguments(call, "", False))
        self.schema = ", ".join(f"{argument.type} {argument.name}" for argument in self.arguments)
        self.absent = [argument.absent for argument in self.arguments]
        """The values of a group that is None."""
        self.cast = self._with(CAST)
        self.differentiable = self._with(GRADIENT)
        """Positions of the arguments whose gradients are computed."""
        self.tracked = self._with(GRADIENT, PASSED)
        """Positions of the arguments that have a gradient."""

    def _with(self, *roles: str) -> list[int]:
        return [i for i, argument in enumerate(self.arguments) if not set(roles).isdisjoint(argument.roles)]

    def flatten(self, call: Any) -> Sequence[Any]:
        """The values in the order of the schema."""
        if not self._grouped:
            return call
        flat: list[Any] = []
        for value, group in zip(call, self._groups, strict=True):
            if group is None:
                flat.append(value)
            else:
                # torch.compile cannot add a named tuple to a list.
                flat.extend(group.absent if value is None else group.flatten(value))
        return flat

    def parse(self, flat: Sequence[Any]) -> Any:
        """The call with these values."""
        if not self._grouped:
            return self.call(*flat)
        values, at = [], 0
        for group in self._groups:
            if group is None:
                values.append(flat[at])
                at += 1
            else:
                part = flat[at : at + len(group.arguments)]
                values.append(None if part[0] is None else group.parse(part))
                at += len(part)
        return self.call(*values)

    def replace(self, call: Any, positions: Sequence[int], values: Sequence[Any]) -> Any:
        """The call with other values at these positions of the schema."""
        flat = list(self.flatten(call))
        for position, value in zip(positions, values, strict=True):
            flat[position] = value
        return self.parse(flat)


def _inner(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None)), True
    return hint, False


def _arguments(call: type, prefix: str, optional: bool) -> Iterator[Argument]:
    hints = get_type_hints(call, include_extras=True)
    for name in call._fields:
        inner, may_be_none = _inner(hints[name])
        if hasattr(inner, "_fields"):
            yield from _arguments(inner, f"{prefix}{name}_" if inner in _PREFIXED else prefix, optional or may_be_none)
            continue
        annotated = get_origin(inner) is Annotated
        kind, *roles = get_args(inner) if annotated else (inner,)
        mark = "?" if annotated and (optional or may_be_none) else ""
        yield Argument(prefix + name, _TYPES[kind] + mark, tuple(roles), call._field_defaults.get(name))
