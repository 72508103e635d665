"""The stock models that are measured, with random weights that are the same in every run."""

from __future__ import annotations

import importlib

import torch
from torch import nn

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


def check(name: str) -> None:
    """Raise ValueError for an unknown library or model, ImportError where the library is not installed."""
    library, model = split(name)
    package = importlib.import_module(library)
    if library == "effnet_ops":
        known = package.list_models()
    elif library == "torchvision":
        known = package.models.list_models(module=package.models)
    else:
        known = [model] if package.is_model(model) else package.list_models()
    if model not in known:
        raise unknown_name(f"{library} model", model, known)


def build(name: str) -> nn.Module:
    """The stock model in evaluation mode, with random weights; errors as `check`.

    Weights of another draw would make another network, with rounding errors of another size: results that are compared
    with twice eager PyTorch's own error have to be of one.
    """
    check(name)
    library, model = split(name)
    package = importlib.import_module(library)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "torchvision":
            return package.models.get_model(model, weights=None).eval()
        return package.create_model(model).eval()


def default_resolution(name: str) -> int:
    """The published resolution of an EfficientNet, else the one that timm has for the model, else 224."""
    library, model = split(name)
    member = model.removeprefix("tf_").removeprefix("efficientnet_")
    if member in MEMBERS:
        return MEMBERS[member].resolution
    if library == "timm":
        configuration = importlib.import_module("timm").get_pretrained_cfg(model)
        if configuration is not None:
            return configuration.input_size[-1]
    return 224


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
