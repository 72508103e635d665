"""The released EfficientNets by name, and how each library computes the ones that it has.

Coefficients: tensorflow/tpu efficientnet_builder.py and efficientnet_lite_builder.py. B8 is AdvProp's
(arXiv 1911.09665), L2 NoisyStudent's (arXiv 1911.04252). EfficientNetV2 (arXiv 2104.00298): google/automl,
efficientnetv2/effnetv2_configs.py.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

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


def _v2(*rows: tuple[int, int, int, int], **ends: Any) -> ArchitectureSpec:
    """EfficientNetV2 from rows of (repeats, stride, expansion, channels), three of them Fused-MBConv; all are 3x3."""
    stages = tuple(
        StageSpec(repeats, 3, stride, expand, channels, *((0.0, "fused_mbconv") if index < 3 else (0.25, "mbconv")))
        for index, (repeats, stride, expand, channels) in enumerate(rows)
    )
    return ArchitectureSpec(stages, **ends)


EFFICIENTNET_V2 = {
    "base": _v2(
        *((1, 1, 1, 16), (2, 2, 4, 32), (2, 2, 4, 48), (3, 2, 4, 96), (5, 1, 6, 112), (8, 2, 6, 192)),
        round_limit=0.0,
    ),
    "s": _v2(
        *((2, 1, 1, 24), (4, 2, 4, 48), (4, 2, 4, 64), (6, 2, 4, 128), (9, 1, 6, 160), (15, 2, 6, 256)),
        stem_channels=24,
        round_limit=0.0,
    ),
    "m": _v2(
        *((3, 1, 1, 24), (5, 2, 4, 48), (5, 2, 4, 80), (7, 2, 4, 160), (14, 1, 6, 176), (18, 2, 6, 304)),
        (5, 1, 6, 512),
        stem_channels=24,
        round_limit=0.0,
    ),
    "l": _v2(
        *((4, 1, 1, 32), (7, 2, 4, 64), (7, 2, 4, 96), (10, 2, 4, 192), (19, 1, 6, 224), (25, 2, 6, 384)),
        (7, 1, 6, 640),
        round_limit=0.0,
    ),
    "xl": _v2(
        *((4, 1, 1, 32), (8, 2, 4, 64), (8, 2, 4, 96), (16, 2, 4, 192), (24, 1, 6, 256), (32, 2, 6, 512)),
        (8, 1, 6, 640),
        round_limit=0.0,
    ),
}

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
MEMBERS |= {
    name: ScaledSpec(
        EFFICIENTNET_V2[architecture], width, depth, resolution, dropout, name=name, train_resolution=trained
    )
    for name, architecture, width, depth, resolution, trained, dropout in (
        ("v2_b0", "base", 1.0, 1.0, 224, 192, 0.2),
        ("v2_b1", "base", 1.0, 1.1, 240, 192, 0.2),
        ("v2_b2", "base", 1.1, 1.2, 260, 208, 0.3),
        ("v2_b3", "base", 1.2, 1.4, 300, 240, 0.3),
        ("v2_s", "s", 1.0, 1.0, 384, 300, 0.2),
        ("v2_m", "m", 1.0, 1.0, 480, 384, 0.3),
        ("v2_l", "l", 1.0, 1.0, 480, 384, 0.4),
        ("v2_xl", "xl", 1.0, 1.0, 512, 384, 0.4),
    )
}
"""The family by its short names, in the native convention."""

_V2 = tuple(name for name in MEMBERS if name.startswith("v2_"))
_LITE = tuple(name for name in MEMBERS if name.startswith("lite"))
_BASE = tuple(name for name in MEMBERS if name not in _V2 + _LITE)


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


def member_name(member: str) -> str:
    """How timm calls a member of the family."""
    return f"efficientnet{member}" if member in _V2 else f"efficientnet_{member}"


_GEFFNET_MODELS = {
    **_models("efficientnet_{}", _BASE + _LITE, NATIVE),
    **_models("tf_efficientnet_{}", _BASE + _LITE, TENSORFLOW),
}
_TIMM_MODELS = {
    **_GEFFNET_MODELS,
    # timm has the small ones, B0 to B3, as TensorFlow computes them only.
    **_models("efficientnet{}", _V2[4:], NATIVE),
    **_models("tf_efficientnet{}", _V2, TENSORFLOW),
}
_TENSORFLOW_MOMENTUM = replace(TENSORFLOW, momentum=0.01)
_MINDCV = Convention(eps=1e-5, momentum=0.1, padding="same")
_TORCHVISION_V2 = Convention(eps=1e-3, momentum=0.1, padding="symmetric")
_TORCHVISION_LARGE = Convention(eps=1e-3, momentum=0.01, padding="symmetric")

# efficientnet_lite_pytorch is a fork of efficientnet_pytorch with the same layout, so either name takes Lite's weights.
LIBRARIES: dict[str, Library] = {
    "effnet_ops": Library("timm", _TIMM_MODELS),
    "timm": Library("timm", _TIMM_MODELS),
    "geffnet": Library("timm", _GEFFNET_MODELS),
    "torchvision": Library(
        "torchvision",
        {
            **_models("efficientnet_{}", _BASE[:5], NATIVE),
            **_models("efficientnet_{}", _BASE[5:8], _TORCHVISION_LARGE),
            **_models("efficientnet_{}", _V2[4:7], _TORCHVISION_V2),
        },
    ),
    "efficientnet_pytorch": Library(
        "efficientnet_pytorch", _models("efficientnet-{}", _BASE + _LITE, _TENSORFLOW_MOMENTUM)
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
        # Of V2-B0 there is TensorFlow's alone, and nearer by its letters is efficientnet_b0.
        raise unknown_name(kind, model, models, meant=f"tf_{model}")
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
