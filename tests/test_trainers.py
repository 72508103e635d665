"""Lightning's Trainer and accelerate's loop train replaced models as stock ones, from checkpoints of either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_features import batch, models
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.slow

STEPS = 30


def batches(first: int, last: int) -> DataLoader:
    return DataLoader([batch(step, 32, torch.float32) for step in range(first, last)], batch_size=None)


def by_lightning(model: nn.Module, folder: Path, first: int, last: int) -> list[float]:
    """Losses of Trainer.fit for these steps; it goes on from the checkpoint in the folder, and leaves one there."""
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, images_and_labels: Any, index: int) -> torch.Tensor:
            images, labels = images_and_labels
            torch.manual_seed(self.global_step)
            loss = F.cross_entropy(self.model(images), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 0.002)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2 if first else 1, default_root_dir=folder, **quiet)
    task, saved = Task(), folder / "lightning.ckpt"
    trainer.fit(task, batches(first, last), ckpt_path=saved if first else None)
    trainer.save_checkpoint(saved)
    return task.losses


def by_accelerate(model: nn.Module, folder: Path, first: int, last: int) -> list[float]:
    """The same by the loop of accelerate's documentation."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.002)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, batches(first, last), scheduler)
    if first:
        accelerator.load_state(str(folder))
    losses = []
    for step, (images, labels) in enumerate(loader, first):
        torch.manual_seed(step)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(str(folder))
    return losses


@pytest.mark.parametrize("run", [by_lightning, by_accelerate])
def test_thirty_steps_and_checkpoints_of_either_model(run: Callable[..., list[float]], tmp_path: Path) -> None:
    stock, ours = models(torch.float32)
    pairs = {"stock": (stock, stock), "ours": (ours, ours), "to ours": (stock, ours), "to stock": (ours, stock)}
    losses = {}
    for name, pair in pairs.items():
        first, second = (copy.deepcopy(model) for model in pair)
        folder = tmp_path / name
        half = run(first, folder, 0, STEPS // 2)
        with FlopCounterMode(display=False) as counter:
            losses[name] = half + run(second, folder, STEPS // 2, STEPS)
        fused = any("mbconv_backward" in str(op) for op in counter.get_flop_counts()["Global"])
        assert fused == (pair[1] is ours), name
    assert len(losses["stock"]) == STEPS
    for name, found in losses.items():
        assert max(abs(one - other) for one, other in zip(found, losses["stock"], strict=True)) < 1e-4, name
