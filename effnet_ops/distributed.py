"""Statistics that the processes of a group share: batch normalisation as torch.nn.SyncBatchNorm does it, on a CPU too.

A normalisation makes two collectives of its group a step. Forward, each process gathers [count, means, squared
deviations] of all, and merges them by Chan's formula; backward, the sums of equation (2) of docs/mbconv.md are added
up. Both are in float64, so that processes with different numbers of images get the same bits. Gradients of parameters
stay those of the process: DistributedDataParallel averages them, as it does those of all others.

The kernels of the CPU call `reduce_at` between two of their steps; `reference.sync_batch_norm` is the same in PyTorch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from effnet_ops import _native, internals


def group_of(norm: nn.Module) -> Any:
    """The process group with which a normalisation shares its statistics now; None where it does not."""
    if not norm.training or not isinstance(norm, nn.SyncBatchNorm):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if group.size() > 1 else None


def batch_norm_alone(norm: Any, x: Tensor) -> Tensor:
    """What torch.nn.SyncBatchNorm computes in training where it shares nothing, also on a CPU, where it refuses."""
    return nn.BatchNorm2d.forward(norm, x)


def merge_statistics(group: Any, values: Tensor) -> None:
    """[count, means, squared deviations] of this process, in float64, become those of all, in place."""
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    _reduce(group, lambda: dist.all_gather(gathered, values, group))
    every = torch.stack(gathered)
    channels = values.numel() // 2
    count, mean, square = every[:, :1], every[:, 1 : 1 + channels], every[:, 1 + channels :]
    total = count.sum()
    # Around the first mean: sums of count * mean would cancel where the means are far from zero.
    merged = mean[0] + (count * (mean - mean[0])).sum(0) / total.clamp(min=1)
    values[0] = total
    values[1 : 1 + channels] = merged
    values[1 + channels :] = (square + count * (mean - merged).square()).sum(0)


def add_sums(group: Any, values: Tensor) -> None:
    """Sums of this process, in float64, become those of all, in place."""
    _reduce(group, lambda: dist.all_reduce(values, group=group))


def _reduce(group: Any, collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise RuntimeError(
            f"effnet_ops: process {group.rank()} of {group.size()} could not share the statistics of a batch "
            "normalisation. Every process must run the same normalisations in the same order, with the same ones "
            "frozen; one has ended, waits for something else, or has frozen normalisations. "
            f"torch.distributed says: {error}"
        ) from error


def reduce_at(name: str, statistics: bool, address: int, count: int) -> None:
    """`merge_statistics` or `add_sums` with a group by its name, of ``count`` numbers at an address."""
    values = torch.frombuffer((ctypes.c_double * count).from_address(address), dtype=torch.float64)
    with torch.inference_mode(False), torch.no_grad():
        (merge_statistics if statistics else add_sums)(internals.process_group(name), values)


def gather(args: Sequence[Any]) -> tuple[list[Any], Callable[[Tensor], Tensor]] | None:
    """The arguments of an operator with whole tensors in the places of DTensors, for each process to compute the whole.

    Returns:
        The arguments, and what makes a DTensor of a result; None where not all tensors are DTensors.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or not all(isinstance(value, DTensor) for value in tensors):
        return None
    mesh = tensors[0].device_mesh
    whole = [value.full_tensor() if isinstance(value, Tensor) else value for value in args]
    return whole, lambda y: DTensor.from_local(y, mesh, [Replicate()] * mesh.ndim, run_check=False)


if _native.module is not None:
    _native.module.set_reduce(reduce_at)
