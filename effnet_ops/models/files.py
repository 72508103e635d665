"""Specifications as plain data, and models in files that carry theirs: a designed network loads without its code."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from effnet_ops.models.efficientnet import EfficientNet, EfficientNetFeatures, create_model
from effnet_ops.models.spec import ArchitectureSpec, Convention, ScaledSpec, StageSpec

_FORMAT = "effnet_ops model"
Path = str | os.PathLike[str]


def spec_to_dict(spec: ScaledSpec) -> dict[str, Any]:
    """``spec`` as dictionaries, lists, numbers and strings, which JSON takes; `spec_from_dict` undoes it."""
    data = dataclasses.asdict(spec)
    # Fields that are younger than the files of others, whose networks have no other value, are left out.
    for part, name, value in ((data["architecture"], "round_limit", 0.9), (data, "train_resolution", None)):
        if part[name] == value:
            del part[name]
    return data


def spec_from_dict(data: dict[str, Any]) -> ScaledSpec:
    """The specification that `spec_to_dict` wrote.

    Raises ValueError where a field is missing, unknown or out of range.
    """
    try:
        architecture = dict(data["architecture"])
        stages = tuple(StageSpec(**stage) for stage in architecture.pop("stages"))
        rest = {key: value for key, value in data.items() if key not in ("architecture", "convention")}
        convention = Convention(**data["convention"])
        return ScaledSpec(ArchitectureSpec(stages=stages, **architecture), convention=convention, **rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no specification of a network: {error}") from None


def save_model(model: EfficientNet | EfficientNetFeatures, path: Path) -> None:
    """Write a model's weights with its specification, its ends and its rates, for `load_model`.

    Raises TypeError for anything but a model that `create_model` built, and OSError where ``path`` cannot be written;
    a file that was there before stays whole until the new one is complete.
    """
    if type(model) not in (EfficientNet, EfficientNetFeatures):
        raise TypeError(f"expected a model that effnet_ops.create_model built, got {type(model).__name__}")
    arguments: dict[str, Any] = {"in_chans": model.in_chans, "drop_path_rate": model.drop_path_rate}
    if isinstance(model, EfficientNet):
        arguments |= {"num_classes": model.num_classes, "drop_rate": model.drop_rate}
    else:
        arguments["features_only"] = True
    content = {
        "format": _FORMAT,
        "specification": spec_to_dict(model.spec),
        "arguments": arguments,
        "state": model.state_dict(),
    }
    partial = f"{os.fspath(path)}.partial"
    torch.save(content, partial)
    os.replace(partial, path)


def load_model(path: Path) -> EfficientNet | EfficientNetFeatures:
    """The model that `save_model` wrote, on the CPU and in training mode, as `create_model` gives it.

    Nothing in the file is executed. Raises ValueError for a file that is damaged or something else, OSError where it
    cannot be read.
    """
    name = os.fspath(path)
    try:
        content = torch.load(name, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of something else can make the unpickler raise anything
        raise ValueError(f"{name} is damaged or no file of PyTorch: {first_line(error)}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{name} was not written by effnet_ops.models.save_model")
    try:
        model = create_model(spec_from_dict(content["specification"]), **content["arguments"])
        model.to(next(iter(content["state"].values())).dtype).load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} does not describe a network: {first_line(error)}") from None
    return model


def first_line(error: Exception) -> str:
    """What an error says, in one line; PyTorch's go on with advice."""
    return next(iter(str(error).splitlines()), type(error).__name__)
