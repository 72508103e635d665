"""Weights of one library's EfficientNet under another library's names.

Names alone do not make two models equal: eps, momentum and padding are in no state dict. Give model names
(``"timm:tf_efficientnet_b0"``) on both sides and a conversion between models that compute differently is an error;
give plain library names and only the keys are converted. To carry another library's conventions into a model of ours,
create it by that library's name:

    model = effnet_ops.create_model("torchvision:efficientnet_b5")
    model.load_state_dict(effnet_ops.convert_state_dict(weights, source="torchvision", target="effnet_ops"))
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_ops.checks import unknown_name
from effnet_ops.models.family import LIBRARIES, MEMBERS, member_name, model_spec, warn_of_name
from effnet_ops.models.spec import BlockSpec, ScaledSpec

SHOWN_PROBLEMS = 3


class _Entry(NamedTuple):
    """One tensor: its key in every layout, its shape (None is any size), and whether a file may lack it."""

    keys: dict[str, str]
    shape: tuple[int | None, ...]
    optional: bool = False


class _Model(NamedTuple):
    """A parsed ``source`` or ``target``; ``name`` is "" for a plain library."""

    library: str
    name: str

    @property
    def keys(self) -> str:
        library, (_, _, model) = LIBRARIES[self.library], self.name.rpartition(":")
        others = (keys for pattern, keys in library.other_keys.items() if fnmatch.fnmatchcase(model, pattern))
        return next(others, library.keys)

    @property
    def members(self) -> list[str]:
        """The family members that it may be."""
        models = LIBRARIES[self.library].models
        return [_member(self.name)] if self.name else list(dict.fromkeys(member for member, _ in models.values()))

    def __str__(self) -> str:
        return self.name or self.library


def convert_state_dict(state_dict: Mapping[str, Tensor], *, source: str, target: str) -> dict[str, Tensor]:
    """The tensors of ``state_dict`` under the target's keys, in the target's order; the tensors are shared, not copied.

    Args:
        state_dict: of a whole B0-B8, L2 or Lite0-4 with any number of classes (or without its classifier) and of
            input channels. ``num_batches_tracked`` may be missing, as in old files, and is 0 then.
        source, target: ``"effnet_ops"``, ``"timm"``, ``"geffnet"``, ``"torchvision"``, ``"efficientnet_pytorch"``,
            ``"efficientnet_lite_pytorch"``, ``"monai"`` or ``"segmentation_models_pytorch"`` (encoders), or one of its
            models as ``"library:model"``. With models on both sides their eps and padding must agree; a momentum that
            differs, which matters in training only, is a warning, and so is a name that says what does not hold.

    Raises:
        ValueError: an unknown library or model; one that has no state dict of PyTorch; a missing, unexpected or
            misshapen entry (named); a target library without this network; models that are different networks, or
            compute with another eps or padding.
        TypeError: a state dict that is none, or an entry that is no tensor.
    """
    source_model, target_model = _parse("source", source), _parse("target", target)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(value).__name__}")
    for model in (source_model, target_model):
        if model.name:
            warn_of_name(model.name)
    if source_model.name and target_model.name:
        _check_conventions(source_model, target_model)
    member, entries = _identify(state_dict, source_model)
    if member not in target_model.members:
        wrong = "is another network" if target_model.name else "has no such model"
        raise ValueError(f"the state dict is an {member_name(member)}, but target {target} {wrong}")
    converted = {}
    for entry in entries:
        key = entry.keys[source_model.keys]
        if key in state_dict:
            converted[entry.keys[target_model.keys]] = state_dict[key]
        elif key.endswith("num_batches_tracked"):
            converted[entry.keys[target_model.keys]] = torch.zeros((), dtype=torch.long)
    return converted


def _parse(argument: str, value: str) -> _Model:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a string, got {type(value).__name__}")
    library, _, name = value.partition(":")
    if library not in LIBRARIES:
        raise unknown_name(f"{argument} library", library, LIBRARIES)
    if name:
        model_spec(value)
    if not LIBRARIES[library].keys:
        raise ValueError(
            f"{argument} {value!r}: {library} has no state dict of PyTorch; create_model knows its conventions"
        )
    return _Model(library, value if name else "")


def _member(name: str) -> str:
    """The family member that ``"library:model"`` is."""
    library, model = name.split(":")[-2:]
    return LIBRARIES[library].models[model][0]


def _check_conventions(source: _Model, target: _Model) -> None:
    """The two models are the same network and compute it alike."""
    if source.members != target.members:
        raise ValueError(f"{source} and {target} are different networks")
    ours, theirs = model_spec(source.name).convention, model_spec(target.name).convention
    for field in ("eps", "padding"):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            raise ValueError(
                f"{source} has {field} {mine} but {target} has {other}: the same weights compute something else. "
                f"effnet_ops.create_model({source.name!r}) keeps the source's; plain library names convert keys alone."
            )
    if ours.momentum != theirs.momentum:
        warnings.warn(
            f"{source} trains with BatchNorm momentum {ours.momentum}, {target} with {theirs.momentum}", stacklevel=3
        )


def network_of(state_dict: Mapping[str, Any]) -> str | None:
    """Whose weights these are, under timm's names, whatever the number of classes; None where no network fits."""
    for member, spec in MEMBERS.items():
        if not _problems(state_dict, list(_entries(spec)), "timm"):
            return member_name(member)
    return None


def _identify(state_dict: Mapping[str, Tensor], source: _Model) -> tuple[str, list[_Entry]]:
    """The family member whose names and shapes these are, or an error from the one that comes closest."""
    closest: list[str] | None = None
    for member in source.members:
        entries = list(_entries(MEMBERS[member]))
        problems = _problems(state_dict, entries, source.keys)
        if not problems:
            return member, entries
        if closest is None or len(problems) < len(closest):
            closest, best = problems, member
    shown = "; ".join(closest[:SHOWN_PROBLEMS])
    more = f"; and {len(closest) - SHOWN_PROBLEMS} more" if len(closest) > SHOWN_PROBLEMS else ""
    raise ValueError(
        f"not a {source} state dict (closest: {member_name(best)}{_other_layout(state_dict, source)}): {shown}{more}"
    )


def _other_layout(state_dict: Mapping[str, Tensor], source: _Model) -> str:
    """A hint where the keys are another library's."""
    stem = next(_entries(MEMBERS["b0"])).keys
    if stem[source.keys] in state_dict:
        return ""
    others = [layout for layout, key in stem.items() if key in state_dict]
    return f", but the keys look like {others[0]}'s" if others else ""


def _problems(state_dict: Mapping[str, Tensor], entries: list[_Entry], layout: str) -> list[str]:
    """Everything about the keys and shapes that does not fit, the first of each kind first."""
    expected = {entry.keys[layout]: entry for entry in entries}
    head = [entry.keys[layout] for entry in entries[-2:]]
    headless = not any(key in state_dict for key in head)
    wrong = [
        f"{key} must have shape {_shape_text(entry.shape)}, got {tuple(state_dict[key].shape)}"
        for key, entry in expected.items()
        if key in state_dict and not _matches(state_dict[key], entry.shape)
    ]
    if not headless and not wrong and all(key in state_dict for key in head):
        weight, bias = (state_dict[key] for key in head)
        if weight.shape[0] != bias.shape[0]:
            wrong.append(f"{head[1]} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    missing = [
        f"{key} is missing"
        for key, entry in expected.items()
        if key not in state_dict and not entry.optional and not (headless and key in head)
    ]
    unexpected = [f"{key} is unexpected" for key in state_dict if key not in expected]
    return [problem for row in zip_longest(missing, unexpected, wrong) for problem in row if problem]


def _matches(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return str(shape).replace("None", "any")


def _entries(spec: ScaledSpec) -> Iterator[_Entry]:
    """Every tensor of a network, in the order that all libraries share; the classifier's two come last."""
    stem, head = spec.stem_channels, spec.head_channels
    stages = spec.stages()
    yield from _conv(_keys("conv_stem", "features.0.0", "_conv_stem"), (stem, None, 3, 3))
    yield from _norm(_keys("bn1", "features.0.1", "_bn0"), stem)
    number = 0
    for stage, blocks in enumerate(stages):
        for index, block in enumerate(blocks):
            prefixes = _keys(
                f"blocks.{stage}.{index}",
                f"features.{stage + 1}.{index}.block",
                f"_blocks.{number}",
                f"_blocks.{stage}.{number}",
            )
            yield from _block(block, prefixes)
            number += 1
    last = f"features.{len(stages) + 1}"
    yield from _conv(_keys("conv_head", f"{last}.0", "_conv_head"), (head, stages[-1][-1].out_channels, 1, 1))
    yield from _norm(_keys("bn2", f"{last}.1", "_bn1"), head)
    classifier = _keys("classifier", "classifier.1", "_fc")
    yield _Entry(_leaf(classifier, "weight"), (None, head))
    yield _Entry(_leaf(classifier, "bias"), (None,))


def _block(block: BlockSpec, prefixes: dict[str, str]) -> Iterator[_Entry]:
    """The tensors of one block: timm names steps by what a block has, torchvision by their position."""
    wide, k, squeezed = block.expanded_channels, block.kernel_size, block.se_channels
    fused, position = block.block == "fused_mbconv", 0

    def inside(*names: str) -> dict[str, str]:
        return {layout: f"{prefix}.{_keys(*names)[layout]}" for layout, prefix in prefixes.items()}

    def gate(wide: int) -> Iterator[_Entry]:
        reduce = inside("se.conv_reduce", f"{position}.fc1", "_se_reduce")
        expand = inside("se.conv_expand", f"{position}.fc2", "_se_expand")
        yield from _conv(reduce, (squeezed, wide, 1, 1), bias=True)
        yield from _conv(expand, (wide, squeezed, 1, 1), bias=True)

    if fused and not block.expands:
        wide = block.out_channels
    if fused:
        dense = inside("conv_exp" if block.expands else "conv", f"{position}.0", "_expand_conv")
        yield from _conv(dense, (wide, block.in_channels, k, k))
        yield from _norm(inside("bn1", f"{position}.1", "_bn0"), wide)
        position += 1
    elif block.expands:
        yield from _conv(inside("conv_pw", f"{position}.0", "_expand_conv"), (wide, block.in_channels, 1, 1))
        yield from _norm(inside("bn1", f"{position}.1", "_bn0"), wide)
        position += 1
    bn_depthwise, project, bn_project = ("bn2", "conv_pwl", "bn3") if block.expands else ("bn1", "conv_pw", "bn2")
    if fused:
        bn_project = "bn2"
    else:
        yield from _conv(inside("conv_dw", f"{position}.0", "_depthwise_conv"), (wide, 1, k, k))
        yield from _norm(inside(bn_depthwise, f"{position}.1", "_bn1"), wide)
        position += 1
    if squeezed:
        yield from gate(wide)
        position += 1
    if fused and not block.expands:
        return
    yield from _conv(inside(project, f"{position}.0", "_project_conv"), (block.out_channels, wide, 1, 1))
    yield from _norm(inside(bn_project, f"{position}.1", "_bn2"), block.out_channels)


def _keys(timm: str, torchvision: str, efficientnet_pytorch: str, monai: str = "") -> dict[str, str]:
    """A name in each layout; MONAI has efficientnet_pytorch's but for the blocks' numbers."""
    return {
        "timm": timm,
        "torchvision": torchvision,
        "efficientnet_pytorch": efficientnet_pytorch,
        "monai": monai or efficientnet_pytorch,
    }


def _leaf(prefixes: dict[str, str], name: str) -> dict[str, str]:
    return {layout: f"{prefix}.{name}" for layout, prefix in prefixes.items()}


def _conv(prefixes: dict[str, str], shape: tuple[int | None, ...], bias: bool = False) -> Iterator[_Entry]:
    yield _Entry(_leaf(prefixes, "weight"), shape)
    if bias:
        yield _Entry(_leaf(prefixes, "bias"), shape[:1])


def _norm(prefixes: dict[str, str], channels: int) -> Iterator[_Entry]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield _Entry(_leaf(prefixes, name), (channels,))
    yield _Entry(_leaf(prefixes, "num_batches_tracked"), (), optional=True)
