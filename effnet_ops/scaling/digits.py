"""A task on every machine: the 1797 handwritten digits of scikit-learn, for small networks of the family's kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_ops.models import ArchitectureSpec, Convention, ScaledSpec, StageSpec, create_model
from effnet_ops.scaling.objective import Score

TINY = ScaledSpec(
    ArchitectureSpec(
        stages=(
            StageSpec(repeats=1, kernel_size=3, stride=1, expand_ratio=1, out_channels=32),
            StageSpec(repeats=2, kernel_size=3, stride=2, expand_ratio=2, out_channels=48),
            StageSpec(repeats=2, kernel_size=3, stride=2, expand_ratio=2, out_channels=64),
        ),
        stem_channels=32,
        head_channels=128,
    ),
    resolution=12,
    dropout=0.0,
    drop_path=0.0,
    convention=Convention(eps=1e-3, momentum=0.1),
    name="tiny",
)
"""The unscaled network of the study. The digits have 8x8 pixels: resolutions above that enlarge them."""


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) with zero mean and unit deviation, and labels (1797,). Needs scikit-learn, no network."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(data.target).long()


@dataclass(frozen=True)
class DigitsTraining:
    """An objective: trains a network on a part of the digits and gives its accuracy on the others.

    AdamW with a one-cycle learning rate, random shifts and, of every image, other pixels each time (noise). The seed
    decides the split, the weights, the order and the noise: on one machine the same seed gives the same accuracy, bit
    for bit.

    Args:
        train: images to learn from; the rest, at most ``test`` of them, are scored.
        epochs, batch, learning_rate: of the training; the learning rate is the cycle's peak.
        noise: standard deviation of the noise on training images and scored ones; the images have deviation 1.
    """

    train: int = 400
    test: int = 1000
    epochs: int = 10
    batch: int = 25
    learning_rate: float = 1e-2
    noise: float = 0.5

    def __call__(self, spec: ScaledSpec, seed: int) -> Score:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in the same order everywhere
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._train(spec)
        finally:
            torch.set_num_threads(threads)

    def _train(self, spec: ScaledSpec) -> Score:
        images, labels = digits()
        order = torch.randperm(len(images))
        images, labels = images[order] + self.noise * torch.randn_like(images), labels[order]
        split, end = self.train, min(self.train + self.test, len(images))
        scored = resized(images[split:end], spec.resolution), labels[split:end]
        clean = digits()[0][order[:split]]
        model = create_model(spec, num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=0.02)
        steps = self.epochs * -(-self.train // self.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.15)
        curve = []
        for _ in range(self.epochs):
            model.train()
            for batch in torch.randperm(split).split(self.batch):
                x = shifted(clean[batch] + self.noise * torch.randn_like(clean[batch]))
                loss = F.cross_entropy(model(resized(x, spec.resolution)), labels[:split][batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            curve.append(accuracy(model, *scored))
        return Score(curve[-1], {"curve": curve, "loss": loss.item()})


def resized(images: Tensor, resolution: int) -> Tensor:
    """``images`` (N, 1, H, W) at ``resolution`` pixels, smoothed where that is fewer; channels_last."""
    if images.shape[-1] != resolution:
        images = F.interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor) -> Tensor:
    """The whole batch moved by up to one pixel in each direction, with the border repeated."""
    top, left = torch.randint(0, 3, (2,)).tolist()
    height, width = images.shape[2:]
    return F.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, top : top + height, left : left + width]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` that ``model`` labels right, in evaluation mode."""
    model.eval()
    return (model(images).argmax(1) == labels).double().mean().item()
