"""The bytes that each design moves, against the figures that were derived by hand before there was a kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import byte_model

# MB an image in bf16, activations only, of B0 at 224 and B4 at 380, as first derived, to three digits.
DERIVED = {
    "eager": (93.9, 712),
    "pointwise ops fused, convolutions opaque": (59.0, 441),
    "activation and residual in epilogues": (41.5, 323),
    "prologues and epilogues (ours)": (27.7, 205),
    "expand and depthwise in one kernel": (14.1, 113),
    "whole block, two passes": (6.2, 40),
    "training: eager": (299, 2259),
    "training: pointwise ops fused": (203, 1514),
    "training: prologues and epilogues": (125, 928),
}


@pytest.mark.parametrize("design", DERIVED)
def test_derived_figures(design: str) -> None:
    """Inference agrees to the last digit; training to 2.5 %, which is stem, head and who recomputes a1."""
    for name, figure in zip(("b0", "b4"), DERIVED[design], strict=True):
        tolerance = 0.025 if design.startswith("training") else 0.005
        assert byte_model.moved(name, design) / 1e6 == pytest.approx(figure, rel=tolerance, abs=0.05)


def test_steps_add_up() -> None:
    """The launches of inference and training, with stem and head, are what the designs count."""
    for name in ("b0", "b7", "v2-b0", "v2-s"):
        _, ends = byte_model.shapes(name)
        for title, design in (
            ("inference", "prologues and epilogues (ours)"),
            ("training", "training: and both gradients at once (ours)"),
        ):
            total = sum(value for step, value in byte_model.steps(name) if step.startswith(f"{title}:"))
            assert total + 2 * byte_model.DESIGNS[design].ends(ends) == byte_model.moved(name, design)


def test_both_gradients_at_once_save_a_reading() -> None:
    """B2 reads 2y + d less, B5 2A (its x is read once either way), in the blocks whose weights are small."""
    blocks, _ = byte_model.shapes("b0")
    saved = sum((2 * b.y + b.convolved) * b.project_both + 2 * b.expanded * b.expand_both for b in blocks)
    designs = ("training: prologues and epilogues", "training: and both gradients at once (ours)")
    apart, at_once = (byte_model.moved("b0", design) for design in designs)
    assert apart - at_once == 2 * saved > 0.1 * apart


def test_shapes_of_b0() -> None:
    blocks, ends = byte_model.shapes("b0")
    assert len(blocks) == 16
    assert blocks[0] == (32 * 112**2, 0, 32 * 112**2, 16 * 112**2, 0, False, True)
    assert blocks[2] == (24 * 56**2, 144 * 56**2, 144 * 56**2, 24 * 56**2, 24 * 56**2, True, True)
    assert ends == (3 * 224**2, 32 * 112**2, 320 * 49, 1280 * 49)


def test_fused_blocks_against_the_mathematics() -> None:
    """docs/mbconv.md: X + 2D + 4O forward; backward with ā2 stored, 5D + 2X and the residual's O in B4."""
    blocks, _ = byte_model.shapes("v2-s")
    fused = [block for block in blocks if isinstance(block, byte_model.Fused)]
    assert len(fused) == 2 + 4 + 4 and sum(block.projects for block in fused) == 8
    (x, d, y, residual, *_) = block = fused[-1]._replace(project_both=True)
    assert (d, y, residual) == (4 * x, x, x) and x == 64 * 38**2
    forward, backward = (
        sum(moved(block) for _, moved in steps) for steps in (byte_model.FUSED_FORWARD, byte_model.FUSED_BACKWARD)
    )
    assert forward == x + 2 * d + 4 * y
    assert backward == 2 * y + (2 * y + 2 * d) + (5 * d + 2 * x + y)


class Eager(TorchDispatchMode):
    """Adds up the elements of activations that PyTorch's operators read and write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = (
            [v.numel() for v in tree_leaves(values) if isinstance(v, Tensor) and v.dim() == 4]
            for values in (args, result)
        )
        name = func.overloadpacket.__name__
        if name == "convolution":
            read = read[:1]
        elif name == "convolution_backward":
            # Its gradient for the input's and for the weight's, and the input.
            read, written = [2 * read[0], read[1]], written[:1]
        elif "batch_norm" in name and any(value is True for value in args):
            # Once for the sums.
            read = 2 * read
        self.total += 0 if func.is_view or name == "detach" else sum(read) + sum(written)
        return result


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("stage", [0, 1], ids=["without projection", "with projection"])
def test_eager_fused_blocks_operator_by_operator(stage: int, training: bool) -> None:
    """With activations that are not in place: PyTorch copies what such a one overwrites (findings/)."""
    block = timm.create_model("efficientnetv2_s").blocks[stage][1].train(training)
    for module in block.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = False
    x = torch.randn(1, (24, 48)[stage], 5, 5, requires_grad=training)
    grad = torch.randn_like(x)
    with Eager() as eager:
        y = block(x)
        if training:
            y.backward(grad)
    size = x.numel()
    fused = byte_model.Fused(size, (1, 4)[stage] * size, size, size, stage == 1, False)
    assert eager.total == byte_model.DESIGNS["training: eager" if training else "eager"].fused(fused)


def test_table_of_the_docs() -> None:
    """docs/triton.md quotes every design of every network as the script prints it."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "triton.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    quoted = {row[0]: row[1:] for row in rows if row[0] in byte_model.DESIGNS}
    networks = byte_model.RESOLUTIONS
    assert quoted == {
        design: [f"{byte_model.moved(name, design) / 1e6:.1f}" for name in networks] for design in byte_model.DESIGNS
    }
