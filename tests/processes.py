"""What the processes of tests/test_distributed.py run: a function is one process, and raises where something fails."""

from __future__ import annotations

import copy
import datetime
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops import layers, replace_layers
from effnet_ops.surgery.fused import FusedLayer


def run_processes(count: int, function: Callable[..., None], *args: Any, timeout: float = 60) -> None:
    """``function(rank, *args)`` in ``count`` new processes of one group; its error, if one of them has one.

    They are forks of one server, which imports what takes seconds once for all tests.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "timm", "effnet_ops"])
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{Path(folder) / 'store'}"
        arguments = (count, function, args, address, timeout)
        multiprocessing.start_processes(_run_process, arguments, nprocs=count, start_method="forkserver")


def _run_process(
    rank: int, count: int, function: Callable[..., None], args: tuple[Any, ...], address: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=limit)
    function(rank, *args)
    dist.destroy_process_group()


def difference(one: Tensor, other: Tensor, least: float = 1e-30) -> float:
    """The largest difference relative to the largest value, or to ``least``."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=least)) if other.numel() else 0.0


def own_part(rank: int, group: Any, sizes: list[int]) -> slice:
    at = dist.get_group_rank(group, rank)
    return slice(sum(sizes[:at]), sum(sizes[: at + 1]))


def _inverted(cin: int, cout: int, **settings: Any) -> nn.Module:
    settings = dict(exp_ratio=4, se_layer=timm.layers.SqueezeExcite, act_layer=nn.SiLU) | settings
    return timm_blocks.InvertedResidual(cin, cout, **settings)


def _with_norms(block: nn.Module, **settings: Any) -> nn.Module:
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name, value in settings.items():
                setattr(norm, name, value)
            if not settings.get("affine", True):
                norm.weight = norm.bias = None
            if not settings.get("track_running_stats", True):
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "few channels": lambda: _inverted(16, 16),
    "many channels, stride 2": lambda: _inverted(72, 24, stride=2),
    "no expansion": lambda: timm_blocks.DepthwiseSeparableConv(16, 16, act_layer=nn.SiLU, se_layer=None),
    "ours": lambda: layers.MBConv(16, 16),
    "dense": lambda: timm_blocks.EdgeResidual(12, 12, act_layer=nn.SiLU, se_layer=timm.layers.SqueezeExcite),
    "dense alone": lambda: timm_blocks.ConvBnAct(8, 16, 3, stride=2, act_layer=nn.SiLU),
    "ours, dense": lambda: layers.FusedMBConv(8, 12, stride=2),
    "cumulative average": lambda: _with_norms(_inverted(8, 8), momentum=None),
    "no parameters": lambda: _with_norms(_inverted(8, 8), affine=False),
    "no running statistics": lambda: _with_norms(_inverted(8, 8), track_running_stats=False),
}


def converted(model: nn.Module, group: Any) -> nn.Module:
    return timm.layers.convert_sync_batchnorm(model, group)


def check_block(
    name: str, rank: int, group: Any, sizes: list[int], dtype: torch.dtype, tolerance: float, policy: str
) -> None:
    """A block on parts of a batch equals the stock block on the whole."""
    torch.manual_seed(1)
    big = BLOCKS[name]().to(dtype).train()
    small = copy.deepcopy(big)
    if policy != "never":
        replace_layers(small)
    small = converted(small, group)
    replace_layers(small)
    assert isinstance(small, (FusedLayer, layers.MBConv, layers.FusedMBConv)), name
    channels = next(m for m in big.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(sum(sizes), channels, 9, 10, dtype=dtype) * 0.5 + torch.randn(channels, 1, 1, dtype=dtype)
    weights = torch.randn(copy.deepcopy(big)(x).shape, dtype=dtype)
    part = own_part(rank, group, sizes)
    whole_x, part_x = x.clone().requires_grad_(), x[part].clone().requires_grad_()
    expected = big(whole_x)
    with effnet_ops.set_recompute(policy), FlopCounterMode(display=False) as counter:
        y = small(part_x)
    kernels = part_x.shape[0] != 0
    assert any("mbconv_sync_training" in str(op) for op in counter.get_flop_counts()["Global"]) == kernels, name
    with effnet_ops.set_recompute(policy):
        (y * weights[part]).sum().backward()
    (expected * weights).sum().backward()
    found = {"y": (y, expected[part]), "x.grad": (part_x.grad, whole_x.grad[part])}
    for (key, one), other in zip(small.named_parameters(), big.parameters(), strict=True):
        dist.all_reduce(one.grad, group=group)
        found[f"{key}.grad"] = (one.grad, other.grad)
    for (key, one), other in zip(small.named_buffers(), big.buffers(), strict=True):
        found[key] = (one, other)
    for key, pair in found.items():
        assert difference(*pair) < tolerance, f"{name}, {policy}, {dtype}: {key} differs by {difference(*pair)}"


class Classifier(nn.Module):
    """A small network of a stem, blocks of several kinds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.blocks = nn.Sequential(layers.MBConv(8, 8), _inverted(8, 16, stride=2), _inverted(16, 16))
        self.head = layers.ConvNormAct(16, 32, 1)
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def train(
    model: nn.Module, step: Callable[[nn.Module, Tensor, Tensor], Tensor], steps: int, x: Tensor, labels: Tensor
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(model, x, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_training(rank: int, group: Any, sizes: list[int], dtype: torch.dtype, steps: int, tolerance: float) -> None:
    """Steps of DistributedDataParallel with a converted model are those of one process with the whole batch."""
    torch.manual_seed(2)
    big = Classifier().to(dtype).train()
    small = copy.deepcopy(big)
    x, labels = torch.randn(sum(sizes), 3, 32, 32, dtype=dtype), torch.arange(sum(sizes)) % 4
    part = own_part(rank, group, sizes)
    report = replace_layers(small)
    assert sorted(report.replaced) == ["blocks.1", "blocks.2"], report
    wrapped = nn.parallel.DistributedDataParallel(small, process_group=group)
    converted(wrapped, group)
    assert "stem.1" in replace_layers(small).around
    share = group.size() / sum(sizes)
    train(big, lambda model, x, labels: F.cross_entropy(model(x), labels), steps, x, labels)
    train(
        wrapped,
        lambda model, x, labels: F.cross_entropy(model(x), labels, reduction="sum") * share,
        steps,
        x[part],
        labels[part],
    )
    state = big.state_dict()
    # The true gradient of a bias in front of another normalisation is zero.
    worst = max((difference(value, state[key], 0.1), key) for key, value in small.state_dict().items())
    assert worst[0] < tolerance, f"after {steps} steps in {dtype}: {worst}"
    with torch.no_grad():
        assert difference(small.eval()(x), big.eval()(x)) < tolerance


def check_own_statistics(rank: int, group: Any, sizes: list[int], training: bool) -> None:
    """DistributedDataParallel without shared statistics: the sum of what each part of the batch gives by itself.

    With frozen normalisations that is what one process gets from the whole batch.
    """
    torch.manual_seed(5)
    stock = Classifier().double().train(training)
    small = copy.deepcopy(stock)
    replace_layers(small)
    wrapped = nn.parallel.DistributedDataParallel(small, process_group=group)
    x, labels = torch.randn(sum(sizes), 3, 32, 32, dtype=torch.float64), torch.arange(sum(sizes)) % 4

    def step(model: nn.Module, part: slice, share: float) -> nn.Module:
        (F.cross_entropy(model(x[part]), labels[part], reduction="sum") * share / sum(sizes)).backward()
        return model

    with FlopCounterMode(display=False) as counter:
        step(wrapped, own_part(rank, group, sizes), group.size())
    assert any("mbconv_backward" in str(op) for op in counter.get_flop_counts()["Global"])
    parts = [own_part(at, group, sizes) for at in range(group.size())] if training else [slice(None)]
    models = [step(copy.deepcopy(stock), part, 1) for part in parts]
    for (name, value), *others in zip(small.named_parameters(), *(m.parameters() for m in models), strict=True):
        assert difference(value.grad, sum(other.grad for other in others), 0.1) < 1e-11, name
    for (name, value), other in zip(small.named_buffers(), models[rank if training else 0].buffers(), strict=True):
        assert difference(value, other, 0.1) < 1e-11, name


SHARING = ("few channels", "dense")
"""Blocks whose kernels differ."""


def end_early(rank: int, folder: str) -> None:
    """The last process dies between two steps, as one that runs out of memory; the others note how they end."""
    torch.manual_seed(0)
    block = converted(BLOCKS["few channels"](), None)
    replace_layers(block)
    x = torch.randn(2, 16, 8, 8)
    block(x).sum().backward()
    if rank == dist.get_world_size() - 1:
        os._exit(0)
    note_error(rank, folder, lambda: block(x))


def freeze_alone(rank: int, folder: str) -> None:
    """The last process freezes its normalisations and hangs; the others wait until the time of the group is over."""
    groups = [dist.new_group(timeout=datetime.timedelta(seconds=3)) for _ in SHARING]
    for name, group in zip(SHARING, groups, strict=True):
        block = converted(BLOCKS[name](), group)
        replace_layers(block)
        x = torch.randn(2, next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels, 8, 8)
        if rank < dist.get_world_size() - 1:
            note_error(rank, folder, lambda block=block, x=x: block(x), name)
            continue
        block.eval()
        block(x)
        while not (Path(folder) / f"0 {name}").exists():
            time.sleep(0.1)


def note_error(rank: int, folder: str, call: Callable[[], object], name: str = "few channels") -> None:
    """Write the error of a call to a file, and how many seconds it took; then the kernels must still run."""
    start, note = time.monotonic(), "0.0 no error"
    try:
        call()
    except RuntimeError as error:
        note = f"{time.monotonic() - start:.1f} {error}"
    (Path(folder) / f"{rank} {name}").write_text(note)
    alone = BLOCKS[name]()
    replace_layers(alone)
    x = torch.randn(2, next(m for m in alone.modules() if isinstance(m, nn.Conv2d)).in_channels, 8, 8)
    alone(x).sum().backward()


class _Sent:
    """A context that notes how many bytes each collective of this process sends."""

    def __enter__(self) -> dict[str, list[int]]:
        self.bytes: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
        self._patch = pytest.MonkeyPatch()
        for name, position in (("all_gather", 1), ("all_reduce", 0)):
            self._patch.setattr(dist, name, functools.partial(self._note, name, position, getattr(dist, name)))
        return self.bytes

    def _note(self, name: str, position: int, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.bytes[name].append(args[position].nbytes)
        return collective(*args, **kwargs)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def check_collectives(rank: int, group: Any) -> None:
    """What a step of EfficientNet-B0 sends, as docs/distributed.md has it."""
    torch.manual_seed(6)
    model = converted(timm.create_model("efficientnet_b0", num_classes=4), group)
    replace_layers(model)
    with _Sent() as sent:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {name: (len(sizes), sum(sizes)) for name, sizes in sent.items()} == {
        "all_gather": (49, 336_520),
        "all_reduce": (49, 336_128),
    }


def check_alone(rank: int) -> None:
    """A group of one process: shared statistics are those of the batch, in any layout, and nothing is sent."""
    torch.manual_seed(7)
    networks = (Classifier, functools.partial(effnet_ops.create_model, "efficientnet_lite0", num_classes=4))
    for make, layout in itertools.product(networks, (torch.contiguous_format, torch.channels_last)):
        stock = make().double().train()
        shared = converted(copy.deepcopy(stock), None)
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout)
        replace_layers(shared)
        torch.manual_seed(9)
        with _Sent() as sent:
            y = shared(x)
            y.square().sum().backward()
        assert not any(sent.values())
        # The classifier of some drops elements.
        torch.manual_seed(9)
        expected = stock(x)
        expected.square().sum().backward()
        assert difference(y, expected) < 1e-11
        for (name, value), other in zip(shared.named_parameters(), stock.parameters(), strict=True):
            assert difference(value.grad, other.grad, 0.1) < 1e-11, name
        for (name, value), other in zip(shared.named_buffers(), stock.buffers(), strict=True):
            assert difference(value, other, 0.1) < 1e-11, name


def check_compiled(rank: int, group: Any) -> None:
    """torch.compile of blocks and of what is around them, all of which share their statistics, in one graph."""
    torch.manual_seed(8)
    eager = Classifier().double().train()
    model = copy.deepcopy(eager)
    for each in (eager, model):
        replace_layers(converted(each, group))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    y, expected = compiled(x), eager(x)
    for result in (y, expected):
        result.square().sum().backward()
    assert difference(y, expected) < 1e-11
    for (name, value), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert difference(value.grad, other.grad, 0.1) < 1e-11, name
    for (name, value), other in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert difference(value, other, 0.1) < 1e-11, name


def check_sharding(rank: int, group: Any, sizes: list[int], folder: str) -> None:
    """fully_shard over replaced blocks: fused, the steps of the whole batch, and states that a stock model loads."""
    torch.manual_seed(3)
    big = Classifier().double().train()
    small = copy.deepcopy(big)
    replace_layers(small)
    small = converted(small, group)
    replace_layers(small)
    mesh = init_device_mesh("cpu", (group.size(),))
    for block in small.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(small, mesh=mesh)
    x, labels = torch.randn(sum(sizes), 3, 32, 32, dtype=torch.float64), torch.arange(sum(sizes)) % 4
    part, share = own_part(rank, group, sizes), group.size() / sum(sizes)
    train(big, lambda model, x, labels: F.cross_entropy(model(x), labels), 2, x, labels)
    with FlopCounterMode(display=False) as counter:
        train(
            small,
            lambda model, x, labels: F.cross_entropy(model(x), labels, reduction="sum") * share,
            2,
            x[part],
            labels[part],
        )
    assert any("mbconv_sync_backward" in str(op) for op in counter.get_flop_counts()["Global"])
    assert all(isinstance(p, DTensor) for p in small.parameters())
    state, expected = small.state_dict(), big.state_dict()
    checkpoint.save(state, checkpoint_id=folder)
    full = get_model_state_dict(small, options=StateDictOptions(full_state_dict=True))
    sharded = Classifier().double()
    loaded = sharded.state_dict()
    checkpoint.load(loaded, checkpoint_id=folder)
    for key, value in loaded.items():
        assert difference(value, expected[key], 0.1) < 1e-11, key
        if rank == 0:
            assert difference(full[key], expected[key], 0.1) < 1e-11, key
    sharded.load_state_dict(loaded)
    with torch.no_grad():
        assert difference(small.eval()(x[part]), sharded.eval()(x[part])) < 1e-11


def check_mixed_precision(rank: int, group: Any) -> None:
    """Blocks in bfloat16 by a policy of fully_shard; PyTorch's own normalisations refuse that on a CPU."""
    torch.manual_seed(4)
    stock = Classifier().train()
    small = copy.deepcopy(stock)
    replace_layers(small)
    mesh = init_device_mesh("cpu", (group.size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for block in small.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(small, mesh=mesh)
    x = torch.randn(4, 3, 32, 32)
    y, expected = small(x), stock(x)
    for result in (y, expected):
        result.square().sum().backward()
    assert 1e-6 < difference(y, expected) < 0.05
    for (name, one), other in zip(small.named_parameters(), stock.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert difference(one.grad.full_tensor(), other.grad, 1) < 0.1, name


def check_distributed_tensors(rank: int, group: Any) -> None:
    """Parameters that are distributed tensors when a block is called: the images are gathered, also those in parts."""
    mesh = init_device_mesh("cpu", (group.size(),))
    torch.manual_seed(9)
    for name, training in itertools.product(SHARING, (False, True)):
        stock = BLOCKS[name]().double().train(training)
        block = copy.deepcopy(stock)
        replace_layers(block)
        channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
        x = torch.randn(4, channels, 8, 8, dtype=torch.float64)
        if not training:
            with torch.no_grad():
                block(x)
        distribute_module(block, mesh)
        for placement in (Replicate(), Shard(0)):
            if not training:
                with torch.no_grad():
                    y = block(distribute_tensor(x, mesh, [placement]))
                assert difference(y.full_tensor(), stock(x)) < 1e-11
            y, expected = block(distribute_tensor(x, mesh, [placement])), stock(x)
            assert difference(y.full_tensor(), expected) < 1e-11
            for result in (y, expected):
                result.square().sum().backward()
            for (key, one), other in zip(block.named_parameters(), stock.parameters(), strict=True):
                assert difference(one.grad.full_tensor(), other.grad) < 1e-11, key
            for (key, one), other in zip(block.named_buffers(), stock.buffers(), strict=True):
                assert difference(one.full_tensor(), other, 0.1) < 1e-11, key
