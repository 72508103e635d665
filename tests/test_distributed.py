"""Several processes: batch normalisation with shared statistics inside the blocks, and what PyTorch wraps models in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import processes
import pytest
import torch
from processes import run_processes
from torch import distributed as dist


def _normalisations(rank: int) -> None:
    pair, every = dist.new_group([0, 1]), dist.group.WORLD
    for name in processes.BLOCKS:
        if rank < 2:
            processes.check_block(name, rank, pair, [5, 3], torch.float64, 1e-11, "auto")
    for policy, name in (("always", "many channels, stride 2"), ("never", "few channels"), ("always", "few channels")):
        processes.check_block(name, rank, every, [4, 3, 1], torch.float64, 1e-11, policy)
        processes.check_block(name, rank, every, [4, 3, 1], torch.float32, 2e-5, policy)
    for name in ("dense", "dense alone"):
        processes.check_block(name, rank, every, [4, 3, 1], torch.float64, 1e-11, "always")
    for name in ("few channels", "dense"):
        processes.check_block(name, rank, every, [5, 0, 3], torch.float64, 1e-11, "auto")
    processes.check_training(rank, every, [4, 3, 1], torch.float64, 1, 1e-11)
    if rank < 2:
        processes.check_training(rank, pair, [5, 3], torch.float32, 1, 1e-4)
        processes.check_training(rank, pair, [5, 3], torch.float64, 20, 1e-11)
        processes.check_training(rank, pair, [5, 3], torch.float32, 20, 1e-3)


def test_shared_statistics_are_those_of_the_whole_batch() -> None:
    run_processes(3, _normalisations)


@pytest.mark.parametrize(
    ("function", "blocks"), [(processes.end_early, ("few channels",)), (processes.freeze_alone, processes.SHARING)]
)
def test_a_process_that_does_not_take_part_ends_the_others(
    function: Callable[..., None], blocks: Sequence[str], tmp_path: Path
) -> None:
    run_processes(2, function, str(tmp_path), timeout=3 if function is processes.end_early else 60)
    for name in blocks:
        seconds, _, message = (tmp_path / f"0 {name}").read_text().partition(" ")
        # The group's timeout is 3 s; what is on top, a busy machine takes.
        assert float(seconds) < 30
        assert message.startswith("effnet_ops: process 0 of 2 could not share the statistics")
        assert "frozen normalisations" in message


def _data_parallel_and_sharded(rank: int, folder: str) -> None:
    for training in (True, False):
        processes.check_own_statistics(rank, dist.group.WORLD, [5, 3], training)
    processes.check_sharding(rank, dist.group.WORLD, [5, 3], folder)
    processes.check_mixed_precision(rank, dist.group.WORLD)
    processes.check_collectives(rank, dist.group.WORLD)


def test_data_parallel_and_sharded_models(tmp_path: Path) -> None:
    run_processes(2, _data_parallel_and_sharded, str(tmp_path))


def _distributed_tensors(rank: int) -> None:
    processes.check_distributed_tensors(rank, dist.group.WORLD)


def test_blocks_gather_distributed_tensors() -> None:
    run_processes(2, _distributed_tensors)


def _compiled(rank: int) -> None:
    processes.check_compiled(rank, None)


def test_compiled_model_shares_its_statistics() -> None:
    run_processes(2, _compiled)


def test_a_group_of_one_process_shares_nothing() -> None:
    run_processes(1, processes.check_alone)


@pytest.mark.slow
def test_script_in_the_docs_runs_by_torchrun(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    block = re.search(r"```python\n(.*?)```", (root / "docs" / "distributed.md").read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(block.group(1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count(": loss ") == 2
