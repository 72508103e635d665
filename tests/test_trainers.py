"""The trainers of timm, Lightning and accelerate train replaced models as stock ones, from checkpoints of either."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from processes import difference
from test_training_features import batch, models
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import trainers

STEPS = 30


@pytest.mark.parametrize(
    "name",
    ["timm", pytest.param("lightning", marks=pytest.mark.slow), pytest.param("accelerate", marks=pytest.mark.slow)],
)
def test_thirty_steps_and_checkpoints_of_either_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    stock, ours = models(torch.float32)
    batches = [batch(step, 32, torch.float32) for step in range(STEPS)]
    pairs = {"stock": (stock, stock), "ours": (ours, ours), "to ours": (stock, ours), "to stock": (ours, stock)}
    losses = {}
    for case, pair in pairs.items():
        first, second = (copy.deepcopy(model) for model in pair)
        folder, losses[case] = tmp_path / case, []
        folder.mkdir()
        trainers.TRAINERS[name](first, batches[: STEPS // 2], folder, 0, losses[case].append)
        with FlopCounterMode(display=False) as counter:
            trainers.TRAINERS[name](second, batches[STEPS // 2 :], folder, STEPS // 2, losses[case].append)
        fused = any("mbconv_backward" in str(op) for op in counter.get_flop_counts()["Global"])
        assert fused == (pair[1] is ours), case
    assert len(losses["stock"]) == STEPS
    for case, found in losses.items():
        assert max(abs(one - other) for one, other in zip(found, losses["stock"], strict=True)) < 1e-4, case
    if name == "timm":
        expected, average = (torch.load(tmp_path / case / "timm.pt")["ema"] for case in ("stock", "ours"))
        worst = max(difference(value, expected[key], 0.1) for key, value in average.items())
        assert worst < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_benchmark_measures_time_and_memory_of_steps(name: str) -> None:
    pytest.importorskip(name)
    # Of few and small images, the last normalisations are of a handful of values, and rounding is amplified.
    task = trainers.Task("efficientnet_b0", 16, 96, 4)
    runs = {
        provider: [trainers.in_own_process(name, provider, task, 1)] for provider in (trainers.STOCK, trainers.OURS)
    }
    for row in trainers.rows_of(name, task, 1, runs):
        assert not row.problem and row.p50 > 0
        assert sys.platform != "linux" or row.peak_rss_bytes > 1e6
