"""The stock models that are measured: random weights, and statistics as training leaves them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops.checks import unknown_name
from effnet_ops.models.family import MEMBERS

LIBRARIES = ("timm", "torchvision", "effnet_ops")


def split(name: str) -> tuple[str, str]:
    """``library:model`` as a pair; a bare name is timm's. ValueError for an unknown library."""
    library, colon, model = name.partition(":")
    if not colon:
        return "timm", name
    if library not in LIBRARIES:
        raise unknown_name("library", library, LIBRARIES)
    return library, model


def build(name: str) -> nn.Module:
    """The stock model in evaluation mode, with random weights.

    Raises:
        ValueError: an unknown library or model.
        ImportError: the library is not installed.
    """
    library, model = split(name)
    if library == "effnet_ops":
        return importlib.import_module("effnet_ops").create_model(model).eval()
    if library == "torchvision":
        models = importlib.import_module("torchvision.models")
        if model not in (known := models.list_models(module=models)):
            raise unknown_name("torchvision model", model, known)
        return models.get_model(model, weights=None).eval()
    timm = importlib.import_module("timm")
    if not timm.is_model(model):
        raise unknown_name("timm model", model, timm.list_models())
    return timm.create_model(model).eval()


def default_resolution(name: str, model: nn.Module) -> int:
    """The published resolution of an EfficientNet, else the one that timm has for the model, else 224."""
    member = split(name)[1].removeprefix("tf_").removeprefix("efficientnet_")
    if member in MEMBERS:
        return MEMBERS[member].resolution
    configuration: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return configuration.get("input_size", (3, 224, 224))[-1]


@torch.no_grad()
def with_statistics(model: nn.Module, resolution: int) -> nn.Module:
    """``model`` with BatchNorm vectors as training leaves them, so that signals neither vanish nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.2, 1.7)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        norm.momentum = 1.0
    size = min(max(resolution, 64), 128)
    model.train()(torch.randn(8, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.6, 1.6))
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * norm.running_var.sqrt() * 0.1)
    return model.eval()


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, in fp64."""
    return ((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()
