"""The released EfficientNets by name, and how each library computes the ones that it has.

Coefficients: tensorflow/tpu efficientnet_builder.py and efficientnet_lite_builder.py. B8 is AdvProp's
(arXiv 1911.09665), L2 NoisyStudent's (arXiv 1911.04252).
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from effnet_ops.checks import unknown_name
from effnet_ops.models.spec import ArchitectureSpec, Convention, ScaledSpec, StageSpec

EFFICIENTNET = ArchitectureSpec(
    stages=(
        StageSpec(repeats=1, kernel_size=3, stride=1, expand_ratio=1, out_channels=16),
        StageSpec(repeats=2, kernel_size=3, stride=2, expand_ratio=6, out_channels=24),
        StageSpec(repeats=2, kernel_size=5, stride=2, expand_ratio=6, out_channels=40),
        StageSpec(repeats=3, kernel_size=3, stride=2, expand_ratio=6, out_channels=80),
        StageSpec(repeats=3, kernel_size=5, stride=1, expand_ratio=6, out_channels=112),
        StageSpec(repeats=4, kernel_size=5, stride=2, expand_ratio=6, out_channels=192),
        StageSpec(repeats=1, kernel_size=3, stride=1, expand_ratio=6, out_channels=320),
    )
)
EFFICIENTNET_LITE = replace(
    EFFICIENTNET,
    stages=tuple(replace(stage, se_ratio=0.0) for stage in EFFICIENTNET.stages),
    activation="relu6",
    scale_ends=False,
)

NATIVE = Convention(eps=1e-5, momentum=0.1, padding="symmetric")
TENSORFLOW = Convention(eps=1e-3, momentum=0.1, padding="same")

MEMBERS: dict[str, ScaledSpec] = {
    name: ScaledSpec(architecture, width, depth, resolution, dropout, name=name)
    for name, architecture, width, depth, resolution, dropout in (
        ("b0", EFFICIENTNET, 1.0, 1.0, 224, 0.2),
        ("b1", EFFICIENTNET, 1.0, 1.1, 240, 0.2),
        ("b2", EFFICIENTNET, 1.1, 1.2, 260, 0.3),
        ("b3", EFFICIENTNET, 1.2, 1.4, 300, 0.3),
        ("b4", EFFICIENTNET, 1.4, 1.8, 380, 0.4),
        ("b5", EFFICIENTNET, 1.6, 2.2, 456, 0.4),
        ("b6", EFFICIENTNET, 1.8, 2.6, 528, 0.5),
        ("b7", EFFICIENTNET, 2.0, 3.1, 600, 0.5),
        ("b8", EFFICIENTNET, 2.2, 3.6, 672, 0.5),
        ("l2", EFFICIENTNET, 4.3, 5.3, 800, 0.5),
        ("lite0", EFFICIENTNET_LITE, 1.0, 1.0, 224, 0.2),
        ("lite1", EFFICIENTNET_LITE, 1.0, 1.1, 240, 0.2),
        ("lite2", EFFICIENTNET_LITE, 1.1, 1.2, 260, 0.3),
        ("lite3", EFFICIENTNET_LITE, 1.2, 1.4, 280, 0.3),
        ("lite4", EFFICIENTNET_LITE, 1.4, 1.8, 300, 0.3),
    )
}
"""The family by its short names, in the native convention."""

_BASE = tuple(name for name in MEMBERS if not name.startswith("lite"))
_LITE = tuple(name for name in MEMBERS if name.startswith("lite"))


class Library(NamedTuple):
    """How a library names and computes the family.

    Attributes:
        keys: its state-dict layout; "" where its weights are no state dict of PyTorch.
        models: each model's family member and convention.
        other_keys: the layout of models that have another, by pattern.
        remarks: what a name does not say, or says wrongly, by pattern.
    """

    keys: str
    models: dict[str, tuple[str, Convention]]
    other_keys: Mapping[str, str] = MappingProxyType({})
    remarks: Mapping[str, str] = MappingProxyType({})


def _models(pattern: str, members: tuple[str, ...], convention: Convention) -> dict[str, tuple[str, Convention]]:
    return {pattern.format(member): (member, convention) for member in members}


_TIMM_MODELS = {
    **_models("efficientnet_{}", tuple(MEMBERS), NATIVE),
    **_models("tf_efficientnet_{}", tuple(MEMBERS), TENSORFLOW),
}
_TENSORFLOW_MOMENTUM = replace(TENSORFLOW, momentum=0.01)
_MINDCV = Convention(eps=1e-5, momentum=0.1, padding="same")
_TORCHVISION_LARGE = Convention(eps=1e-3, momentum=0.01, padding="symmetric")

# efficientnet_lite_pytorch is a fork of efficientnet_pytorch with the same layout, so either name takes Lite's weights.
LIBRARIES: dict[str, Library] = {
    "effnet_ops": Library("timm", _TIMM_MODELS),
    "timm": Library("timm", _TIMM_MODELS),
    "geffnet": Library("timm", _TIMM_MODELS),
    "torchvision": Library(
        "torchvision",
        {
            **_models("efficientnet_{}", _BASE[:5], NATIVE),
            **_models("efficientnet_{}", _BASE[5:8], _TORCHVISION_LARGE),
        },
    ),
    "efficientnet_pytorch": Library(
        "efficientnet_pytorch", _models("efficientnet-{}", tuple(MEMBERS), _TENSORFLOW_MOMENTUM)
    ),
    "efficientnet_lite_pytorch": Library(
        "efficientnet_pytorch", _models("efficientnet-{}", _LITE, _TENSORFLOW_MOMENTUM)
    ),
    "segmentation_models_pytorch": Library(
        "efficientnet_pytorch",
        {
            **_models("efficientnet-{}", _BASE[:8], _TENSORFLOW_MOMENTUM),
            **_models("timm-efficientnet-{}", _BASE, NATIVE),
            **_models("timm-tf_efficientnet_{}", _LITE, NATIVE),
        },
        other_keys={"timm-*": "timm"},
        remarks={
            "timm-tf_*": "has eps 1e-5 and symmetric padding, though its name says tf_: TensorFlow's weights compute "
            "something else in it, and what they are made for in tf_efficientnet_lite0 and its like"
        },
    ),
    "monai": Library(
        "monai",
        _models("efficientnet-{}", _BASE, _TENSORFLOW_MOMENTUM),
        remarks={"*": "pads every image as one of 224 pixels; SAME padding, as here, agrees with it at 224 alone"},
    ),
    "mindcv": Library("", _models("efficientnet_{}", _BASE[:8], _MINDCV)),
}


def list_models(filter: str | None = None) -> list[str]:
    """The names that `create_model` knows, sorted; ``filter`` is a shell pattern such as ``"tf_*"``."""
    names = sorted(LIBRARIES["effnet_ops"].models)
    return names if filter is None else fnmatch.filter(names, filter)


def model_spec(name: str) -> ScaledSpec:
    """The specification of a model by name.

    ``name`` is one of `list_models`, or ``"library:model"`` for the network as that library computes it, with its
    eps, momentum and padding: ``"torchvision:efficientnet_b5"``, ``"efficientnet_pytorch:efficientnet-b0"``.

    Raises ValueError for an unknown name, with the closest one.
    """
    library, _, model = name.rpartition(":") if isinstance(name, str) else ("", "", name)
    library = library.removeprefix("effnet_ops:") or "effnet_ops"
    models = _library(library).models
    if not isinstance(model, str) or model not in models:
        kind = "model" if library == "effnet_ops" else f"{library} model"
        raise unknown_name(kind, model, models)
    member, convention = models[model]
    return replace(MEMBERS[member], convention=convention, name=name)


def warn_of_name(name: str) -> None:
    """Warn the caller's caller where ``"library:model"``, which exists, does not compute what its name says."""
    library, _, model = name.removeprefix("effnet_ops:").rpartition(":")
    for pattern, remark in LIBRARIES[library or "effnet_ops"].remarks.items():
        if fnmatch.fnmatchcase(model, pattern):
            warnings.warn(f"{name} {remark}", stacklevel=3)


def conventions(library: str, name: str) -> Convention:
    """The eps, momentum and padding with which ``library`` computes its model ``name``."""
    return model_spec(f"{library}:{name}").convention


def _library(name: str) -> Library:
    if name not in LIBRARIES:
        raise unknown_name("library", name, LIBRARIES)
    return LIBRARIES[name]
