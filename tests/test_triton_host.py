"""What surrounds the Triton kernels' launches, without a GPU: CUDA graphs can hold it, and TF32 is torch's to allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ahead_of_time import Launch, compile_launch, recorded
from launches import blocks, fused_blocks, fused_step, implementation, inference, meta, single_layers, training
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_ops.kernels import pointwise

BLOCKS = blocks("b0")
ALLOCATIONS = {"aten::empty.memory_format", "aten::empty_like", "aten::new_empty"}
VIEWS = {"aten::view", "aten::permute", "aten::unsqueeze"}
CAST = "aten::_to_copy"


class Operators(TorchDispatchMode):
    """Counts the PyTorch operators that are called; a copy between devices counts as one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen[func.name() + (" between devices" if func.name() == CAST and "device" in kwargs else "")] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("run", [inference, training, single_layers])
def test_no_data_is_read(run: Callable[..., list[Launch]], batch: int) -> None:
    """Host code never waits for the device, and no allocation depends on what tensors hold: on meta they hold nothing.

    Every PyTorch operator that reads data on the host raises for them; those that are called allocate, view, or cast on
    the device.
    """
    for block, side in BLOCKS:
        with Operators() as operators:
            run(block, batch, side, torch.bfloat16, "sm_90")
        assert set(operators.seen) <= ALLOCATIONS | VIEWS | {CAST}


def test_no_data_of_a_fused_block_is_read() -> None:
    for block, side in fused_blocks("tf_efficientnetv2_b0", 192):
        with Operators() as operators:
            fused_step(block, 1, side, torch.bfloat16, "sm_90")
        assert set(operators.seen) <= ALLOCATIONS | VIEWS | {CAST}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
    ],
)
def test_reading_data_would_be_noticed(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(meta(3))


def test_launches_of_inference() -> None:
    """As kernels/mbconv.py states: five, four without expansion, and a cast of a weight that many tiles read."""
    for batch, casts in ((1, 0), (256, 2)):
        for block, side in BLOCKS:
            with Operators() as operators:
                launches = inference(block, batch, side, torch.bfloat16, "sm_90")
            assert len(launches) == (5 if block.expands else 4)
            assert operators.seen[CAST] <= casts


@pytest.fixture
def precisions() -> Iterator[None]:
    """Leaves torch's settings as they were. (They are no attributes that monkeypatch could restore.)"""
    places = (torch.backends.cuda.matmul, torch.backends)
    before = [place.fp32_precision for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "ieee"),
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "ieee"),
    ],
)
def test_torch_decides_about_tf32(setting: str, value: object, expected: str) -> None:
    setattr(torch.backends.cuda.matmul, setting, value)
    assert pointwise.precision(torch.float32) == expected
    assert pointwise.precision(torch.float64) == pointwise.precision(torch.bfloat16) == "ieee"


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("generic", ["tf32", "ieee"])
def test_generic_setting_of_tf32(generic: str) -> None:
    """What torch.backends.fp32_precision says counts where that of products is not set."""
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = generic
    assert pointwise.precision(torch.float32) == generic


def test_tf32_is_off_by_default() -> None:
    assert pointwise.precision(torch.float32) == "ieee"


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_in_machine_code(allowed: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    x, weight = meta(8, 32, 56, 56), meta(16, 32, 1, 1)
    with recorded("sm_90") as launches:
        implementation("pointwise_conv2d")(x, weight, None, None, "none")
    (launch,) = launches
    assert ("tf32" in compile_launch(launch, "sm_90").ptx) == allowed
