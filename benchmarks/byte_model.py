"""The bytes of activations that each design of EfficientNet moves, an image: docs/triton.md derives them.

python benchmarks/byte_model.py                   # every design, B0 to B7
python benchmarks/byte_model.py --steps           # our own kernels, step by step

Parameters, statistics and pooled vectors are left out: they are thousands of times smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from effnet_ops.kernels import pointwise as pointwise  # registers the rule
from effnet_ops.kernels import tuning
from effnet_ops.scaling.network import Layer, network, walk

BATCH = 256
RESOLUTIONS = {f"b{i}": size for i, size in enumerate((224, 240, 260, 300, 380, 456, 528, 600))}


class Block(NamedTuple):
    """Elements of one image in x, in what the expansion makes (0 without one), behind the depthwise convolution, in y.

    ``residual`` is y's size where x is added to it, else 0. ``expand_both`` and ``project_both`` say whether the rule
    of kernels/pointwise.py makes both gradients of that product in one launch, at batch 256 on an H200.
    """

    x: int
    expanded: int
    convolved: int
    y: int
    residual: int
    expand_both: bool
    project_both: bool


class Ends(NamedTuple):
    """Elements of one image in the picture, behind the stem, before and behind the head's convolution."""

    image: int
    stem: int
    features: int
    head: int


def shapes(name: str) -> tuple[list[Block], Ends]:
    """The blocks and ends of "b0" to "b7" at its own resolution."""
    layers = [layer for layer in walk(network(f"efficientnet_{name}"), RESOLUTIONS[name]) if layer.on_path]
    stem, *body, head, _classifier = layers
    blocks = []
    for names in _grouped(body).values():
        by_kind = [layer.kind for layer in names]
        first, last = names[0], names[-1]
        depthwise = names[by_kind.index("depthwise")]
        x, y = first.in_channels * prod(first.in_size), last.activations
        same = first.in_channels == last.out_channels and first.in_size == last.out_size
        expanded = first.activations if first.kind == "pointwise" else 0
        expand_both = expanded > 0 and _both(1, BATCH * prod(first.in_size), first.in_channels, first.out_channels, 0)
        project_both = _both(BATCH, prod(last.in_size), last.in_channels, last.out_channels, 5)
        blocks.append(Block(x, expanded, depthwise.activations, y, y if same else 0, expand_both, project_both))
    picture = stem.in_channels * prod(stem.in_size)
    return blocks, Ends(picture, stem.activations, head.in_channels * prod(head.in_size), head.activations)


def _both(images: int, pixels: int, c_in: int, c_out: int, sums: int) -> bool:
    shape = {"images": images, "pixels": pixels, "channels_in": c_in, "channels_out": c_out, "sums": sums}
    shape |= {"element_size": 2, "float16": 0}
    config = tuning.from_rule("pointwise_both_gradients", shape, tuning.ARCHITECTURES["sm_90"])
    return bool(config["fits"])


def _grouped(layers: list[Layer]) -> dict[str, list[Layer]]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    return groups


Step = tuple[str, Callable[[Block], int]]

# Block by block, what each launch of ours reads and writes; a block without an expansion skips the steps marked so.
FORWARD: list[Step] = [
    ("F1 expand, statistics", lambda b: b.expanded and b.x + b.expanded),
    ("F2 depthwise, statistics", lambda b: (b.expanded or b.x) + b.convolved),
    ("F3 pool", lambda b: b.convolved),
    ("F4 project, statistics", lambda b: b.convolved + b.y),
    ("F5 normalise, drop path, residual", lambda b: 2 * b.y + b.residual),
]
BACKWARD: list[Step] = [
    ("B1 normalisation's sums", lambda b: 2 * b.y),
    ("B2 project: input gradient, sums", lambda b: 2 * b.y + 2 * b.convolved),
    ("B2 project: weight gradient", lambda b: 0 if b.project_both else 2 * b.y + b.convolved),
    ("B4 expand again", lambda b: b.expanded and b.x + b.expanded),
    ("B4 depthwise: both gradients, sums", lambda b: 2 * b.convolved + 2 * (b.expanded or b.x)),
    ("B5 expand: input gradient", lambda b: b.expanded and 2 * b.expanded + (1 + b.expand_both) * b.x + b.residual),
    ("B5 expand: weight gradient", lambda b: 0 if b.expand_both else b.expanded and 2 * b.expanded + b.x),
]
INFERENCE: list[Step] = [
    ("expand, activation", lambda b: b.expanded and b.x + b.expanded),
    ("depthwise, activation, pool", lambda b: (b.expanded or b.x) + b.convolved),
    ("gate, project, residual", lambda b: b.convolved + b.y + b.residual),
]


class Design(NamedTuple):
    """Elements moved by one block, and by stem and head together."""

    block: Callable[[Block], int]
    ends: Callable[[Ends], int]


def _of(steps: list[Step]) -> Callable[[Block], int]:
    return lambda block: sum(moved(block) for _, moved in steps)


def _eager(b: Block) -> int:
    return b.x + 6 * b.expanded + 9 * b.convolved + 3 * b.y + 3 * b.residual


def _opaque_convolutions(b: Block) -> int:
    return b.x + 4 * b.expanded + 5 * b.convolved + 3 * b.y + b.residual


def _epilogues(b: Block) -> int:
    return b.x + 2 * b.expanded + 5 * b.convolved + b.y + b.residual


def _eager_training(b: Block) -> int:
    return 3 * b.x + 19 * b.expanded + 29 * b.convolved + 11 * b.y + 6 * b.residual


def _opaque_training(b: Block) -> int:
    return 3 * b.x + 14 * b.expanded + 17 * b.convolved + 11 * b.y + 2 * b.residual


DESIGNS = {
    "eager": Design(_eager, lambda e: e.image + 5 * e.stem + e.features + 6 * e.head),
    "pointwise ops fused, convolutions opaque": Design(
        _opaque_convolutions, lambda e: e.image + 3 * e.stem + e.features + 2 * e.head
    ),
    "activation and residual in epilogues": Design(_epilogues, lambda e: e.image + e.stem + e.features + 2 * e.head),
    "prologues and epilogues (ours)": Design(_of(INFERENCE), lambda e: e.image + e.stem + e.features + 2 * e.head),
    "expand and depthwise in one kernel": Design(
        lambda b: b.x + 2 * b.convolved + b.y + b.residual, lambda e: e.image + e.stem + e.features + 2 * e.head
    ),
    "whole block, two passes": Design(lambda b: 2 * b.x + b.y, lambda e: e.image + e.stem + e.features),
    "training: eager": Design(_eager_training, lambda e: 2 * e.image + 16 * e.stem + 3 * e.features + 19 * e.head),
    "training: pointwise ops fused": Design(
        _opaque_training, lambda e: 2 * e.image + 10 * e.stem + 3 * e.features + 8 * e.head
    ),
    "training: prologues and epilogues": Design(
        lambda b: _of(FORWARD + BACKWARD)(b._replace(expand_both=False, project_both=False)),
        lambda e: 2 * e.image + 9 * e.stem + 3 * e.features + 5 * e.head,
    ),
    "training: and both gradients at once (ours)": Design(
        _of(FORWARD + BACKWARD), lambda e: 2 * e.image + 9 * e.stem + 3 * e.features + 5 * e.head
    ),
}


def moved(name: str, design: str, element_size: int = 2) -> int:
    """Bytes that one image of "b0" to "b7", at its own resolution, moves in a design of `DESIGNS`."""
    blocks, ends = shapes(name)
    chosen = DESIGNS[design]
    return element_size * (sum(chosen.block(block) for block in blocks) + chosen.ends(ends))


def steps(name: str, element_size: int = 2) -> Iterator[tuple[str, int]]:
    """The bytes of our launches in inference and training, summed over the blocks."""
    blocks, _ = shapes(name)
    for title, group in (("inference", INFERENCE), ("training", FORWARD + BACKWARD)):
        totals: Counter[str] = Counter()
        for step, of_block in group:
            totals[f"{title}: {step}"] = element_size * sum(of_block(block) for block in blocks)
        yield from totals.items()


def main(show_steps: bool = typer.Option(False, "--steps", help="Our own launches, one by one.")) -> None:
    """Print MB an image, bf16, activations only."""
    table = Table(title="MB an image, bf16, activations only, each network at its own resolution")
    for heading in ("design", *RESOLUTIONS):
        table.add_column(heading.upper() if heading in RESOLUTIONS else heading, justify="right")
    if show_steps:
        columns = {name: dict(steps(name)) for name in RESOLUTIONS}
        for step in columns["b0"]:
            table.add_row(step, *(f"{columns[name][step] / 1e6:.1f}" for name in RESOLUTIONS))
    else:
        for design in DESIGNS:
            table.add_row(design, *(f"{moved(name, design) / 1e6:.1f}" for name in RESOLUTIONS))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
