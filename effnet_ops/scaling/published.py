"""Accuracies that others published, on ImageNet; nothing here was measured by this package."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from effnet_ops.models import ScaledSpec, model_spec


class Published(NamedTuple):
    """A network with its top-1 accuracy in percent, and the costs that its authors give, in millions and billions."""

    spec: ScaledSpec
    top1: float
    parameters: float | None
    gmacs: float | None
    source: str


_RELEASED = (
    ("b0", 77.1, 5.3, 0.39),
    ("b1", 79.1, 7.8, 0.70),
    ("b2", 80.1, 9.2, 1.0),
    ("b3", 81.6, 12.0, 1.8),
    ("b4", 82.9, 19.0, 4.2),
    ("b5", 83.6, 30.0, 9.9),
    ("b6", 84.0, 43.0, 19.0),
    ("b7", 84.3, 66.0, 37.0),
)
_LITE = (("lite0", 75.1), ("lite1", 76.7), ("lite2", 77.6), ("lite3", 79.8), ("lite4", 81.5))
_V2_SCALED = (("b0", 78.7), ("b1", 79.8), ("b2", 80.5), ("b3", 82.1))
_V2_SEARCHED = (("s", 83.9), ("m", 85.2), ("l", 85.7), ("xl", 87.2))
_AXES = (
    ("B0", 1.0, 1.0, 1.0, 0.4, 77.3),
    ("depth only", 4.0, 1.0, 1.0, 1.8, 79.0),
    ("width only", 1.0, 2.0, 1.0, 1.8, 78.9),
    ("resolution only", 1.0, 1.0, 2.0, 1.9, 79.1),
    ("compound", 1.4, 1.2, 1.3, 1.8, 81.1),
)

RELEASED = tuple(
    Published(model_spec(f"efficientnet_{name}"), top1, parameters, gmacs, "arXiv 1905.11946, table 2")
    for name, top1, parameters, gmacs in _RELEASED
)
"""B0 to B7, trained with AutoAugment. The paper calls multiply-adds FLOPS."""

LITE = tuple(
    Published(model_spec(f"efficientnet_{name}"), top1, None, None, "tensorflow/tpu, efficientnet/lite")
    for name, top1 in _LITE
)

V2_SCALED = tuple(
    Published(model_spec(f"tf_efficientnetv2_{name}"), top1, None, None, "google/automl, efficientnetv2")
    for name, top1 in _V2_SCALED
)
"""V2-B0 to B3: one network, scaled as B0 to B3 are."""

V2_SEARCHED = tuple(
    Published(model_spec(f"efficientnetv2_{name}"), top1, None, None, "google/automl, efficientnetv2")
    for name, top1 in _V2_SEARCHED
)
"""V2-S, M, L and XL, each with stages of its own; XL was trained on ImageNet-21k first."""

SCALED_B0 = tuple(
    Published(
        replace(model_spec("efficientnet_b0"), depth=d, width=w, resolution=round(224 * r), name=name),
        top1,
        None,
        gmacs,
        "arXiv 1905.11946, table 7",
    )
    for name, d, w, r, gmacs, top1 in _AXES
)
"""B0 scaled along one axis and along all three, at what the paper gives as about equal cost."""
