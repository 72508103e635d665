"""The bytes of activations that each design of EfficientNet moves, an image: docs/triton.md derives them.

python benchmarks/byte_model.py                   # every design, B0 to B7, V2-B0 and V2-S
python benchmarks/byte_model.py --steps           # our own kernels, step by step

Parameters, statistics and pooled vectors are left out: they are thousands of times smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from effnet_ops.kernels import pointwise as pointwise  # registers the rule
from effnet_ops.kernels import tuning
from effnet_ops.scaling.network import Layer, network, walk

BATCH = 256
RESOLUTIONS = {f"b{i}": size for i, size in enumerate((224, 240, 260, 300, 380, 456, 528, 600))}
RESOLUTIONS |= {"v2-b0": 224, "v2-s": 300}
NAMES = {"v2-b0": "tf_efficientnetv2_b0", "v2-s": "efficientnetv2_s"}
"""Where the name is not that of the efficientnet_b family."""


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


class Fused(NamedTuple):
    """A Fused-MBConv block: as `Block`, with the elements behind its dense convolution in ``convolved``.

    Without a projection what is behind the convolution is y.
    """

    x: int
    convolved: int
    y: int
    residual: int
    projects: bool
    project_both: bool


AnyBlock = Block | Fused


class Ends(NamedTuple):
    """Elements of one image in the picture, behind the stem, before and behind the head's convolution."""

    image: int
    stem: int
    features: int
    head: int


def shapes(name: str) -> tuple[list[AnyBlock], Ends]:
    """The blocks and ends of a network of `RESOLUTIONS` at that size."""
    net = network(NAMES.get(name, f"efficientnet_{name}"))
    layers = [layer for layer in walk(net, RESOLUTIONS[name]) if layer.on_path]
    stem, *body, head, _classifier = layers
    blocks = [_fused(names) if names[0].kind == "conv" else _mbconv(names) for names in _grouped(body).values()]
    picture = stem.in_channels * prod(stem.in_size)
    return blocks, Ends(picture, stem.activations, head.in_channels * prod(head.in_size), head.activations)


def _mbconv(layers: list[Layer]) -> Block:
    first, last = layers[0], layers[-1]
    (depthwise,) = (layer for layer in layers if layer.kind == "depthwise")
    expanded = first.activations if first.kind == "pointwise" else 0
    expand_both = expanded > 0 and _both(1, BATCH * prod(first.in_size), first.in_channels, first.out_channels, 0)
    x, y, residual = _around(layers)
    return Block(x, expanded, depthwise.activations, y, residual, expand_both, _project_both(last, 5))


def _fused(layers: list[Layer]) -> Fused:
    first, last = layers[0], layers[-1]
    x, y, residual = _around(layers)
    projects = last is not first
    return Fused(x, first.activations, y, residual, projects, projects and _project_both(last, 2))


def _around(layers: list[Layer]) -> tuple[int, int, int]:
    """Elements of a block's x, y and residual."""
    first, last = layers[0], layers[-1]
    same = first.in_channels == last.out_channels and first.in_size == last.out_size
    return first.in_channels * prod(first.in_size), last.activations, last.activations if same else 0


def _project_both(project: Layer, sums: int) -> bool:
    return _both(BATCH, prod(project.in_size), project.in_channels, project.out_channels, sums)


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


# Block by block, what each launch of ours reads and writes; a block without an expansion skips the steps marked so.
FORWARD: list[tuple[str, Callable[[Block], int]]] = [
    ("F1 expand, statistics", lambda b: b.expanded and b.x + b.expanded),
    ("F2 depthwise, statistics", lambda b: (b.expanded or b.x) + b.convolved),
    ("F3 pool", lambda b: b.convolved),
    ("F4 project, statistics", lambda b: b.convolved + b.y),
    ("F5 normalise, drop path, residual", lambda b: 2 * b.y + b.residual),
]
BACKWARD: list[tuple[str, Callable[[Block], int]]] = [
    ("B1 normalisation's sums", lambda b: 2 * b.y),
    ("B2 project: input gradient, sums", lambda b: 2 * b.y + 2 * b.convolved),
    ("B2 project: weight gradient", lambda b: 0 if b.project_both else 2 * b.y + b.convolved),
    ("B4 expand again", lambda b: b.expanded and b.x + b.expanded),
    ("B4 depthwise: both gradients, sums", lambda b: 2 * b.convolved + 2 * (b.expanded or b.x)),
    ("B5 expand: input gradient", lambda b: b.expanded and 2 * b.expanded + (1 + b.expand_both) * b.x + b.residual),
    ("B5 expand: weight gradient", lambda b: 0 if b.expand_both else b.expanded and 2 * b.expanded + b.x),
]
INFERENCE: list[tuple[str, Callable[[Block], int]]] = [
    ("expand, activation", lambda b: b.expanded and b.x + b.expanded),
    ("depthwise, activation, pool", lambda b: (b.expanded or b.x) + b.convolved),
    ("gate, project, residual", lambda b: b.convolved + b.y + b.residual),
]

FUSED_FORWARD: list[tuple[str, Callable[[Fused], int]]] = [
    ("F2 dense convolution, statistics", lambda b: b.x + b.convolved),
    ("F4 project behind it, statistics", lambda b: b.projects and b.convolved + b.y),
    ("F5 normalise, drop path, residual of Fused-MBConv", lambda b: 2 * b.y + b.residual),
]
FUSED_BACKWARD: list[tuple[str, Callable[[Fused], int]]] = [
    ("B1 normalisation's sums of Fused-MBConv", lambda b: 2 * b.y),
    ("B2 project behind it: input gradient, sums", lambda b: b.projects and 2 * b.y + 2 * b.convolved),
    ("B2 project behind it: weight gradient", lambda b: b.projects and (not b.project_both) * (2 * b.y + b.convolved)),
    ("B4 normalisation behind it", lambda b: 3 * b.convolved),
    ("B4 dense convolution: input gradient", lambda b: b.convolved + b.x + b.residual),
    ("B4 dense convolution: weight gradient", lambda b: b.convolved + b.x),
]
FUSED_INFERENCE: list[tuple[str, Callable[[Fused], int]]] = [
    ("dense convolution, activation", lambda b: b.x + b.convolved + (0 if b.projects else b.residual)),
    ("project behind it, residual", lambda b: b.projects and b.convolved + b.y + b.residual),
]


class Design(NamedTuple):
    """Elements moved by one MBConv block, by one Fused-MBConv block, and by stem and head together."""

    block: Callable[[Block], int]
    fused: Callable[[Fused], int]
    ends: Callable[[Ends], int]

    def moved(self, block: AnyBlock) -> int:
        return self.fused(block) if isinstance(block, Fused) else self.block(block)


def _of(steps: list[tuple[str, Callable[[Any], int]]]) -> Callable[[Any], int]:
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


# Without a gate the convolution's result is read by the projection alone; without a projection it is y.
def _fused_eager(b: Fused) -> int:
    return b.x + (6 * b.convolved + 3 * b.y if b.projects else 5 * b.y) + 3 * b.residual


def _fused_opaque(b: Fused) -> int:
    return b.x + (4 * b.convolved + 3 * b.y if b.projects else 3 * b.y) + b.residual


def _fused_eager_training(b: Fused) -> int:
    return 3 * b.x + (19 * b.convolved + 11 * b.y if b.projects else 16 * b.y) + 6 * b.residual


def _fused_opaque_training(b: Fused) -> int:
    return 3 * b.x + (14 * b.convolved + 11 * b.y if b.projects else 11 * b.y) + 2 * b.residual


_inference, _training = _of(INFERENCE), _of(FORWARD + BACKWARD)
_fused_inference, _fused_training = _of(FUSED_INFERENCE), _of(FUSED_FORWARD + FUSED_BACKWARD)

DESIGNS = {
    "eager": Design(_eager, _fused_eager, lambda e: e.image + 5 * e.stem + e.features + 6 * e.head),
    "pointwise ops fused, convolutions opaque": Design(
        _opaque_convolutions, _fused_opaque, lambda e: e.image + 3 * e.stem + e.features + 2 * e.head
    ),
    "activation and residual in epilogues": Design(
        _epilogues, _fused_inference, lambda e: e.image + e.stem + e.features + 2 * e.head
    ),
    "prologues and epilogues (ours)": Design(
        _inference, _fused_inference, lambda e: e.image + e.stem + e.features + 2 * e.head
    ),
    "expand and depthwise in one kernel": Design(
        lambda b: b.x + 2 * b.convolved + b.y + b.residual,
        _fused_inference,
        lambda e: e.image + e.stem + e.features + 2 * e.head,
    ),
    "whole block, two passes": Design(
        lambda b: 2 * b.x + b.y, lambda b: b.x + b.y, lambda e: e.image + e.stem + e.features
    ),
    "training: eager": Design(
        _eager_training, _fused_eager_training, lambda e: 2 * e.image + 16 * e.stem + 3 * e.features + 19 * e.head
    ),
    "training: pointwise ops fused": Design(
        _opaque_training, _fused_opaque_training, lambda e: 2 * e.image + 10 * e.stem + 3 * e.features + 8 * e.head
    ),
    "training: prologues and epilogues": Design(
        lambda b: _training(b._replace(expand_both=False, project_both=False)),
        lambda b: _fused_training(b._replace(project_both=False)),
        lambda e: 2 * e.image + 9 * e.stem + 3 * e.features + 5 * e.head,
    ),
    "training: and both gradients at once (ours)": Design(
        _training, _fused_training, lambda e: 2 * e.image + 9 * e.stem + 3 * e.features + 5 * e.head
    ),
}


def moved(name: str, design: str, element_size: int = 2) -> int:
    """Bytes that one image of a network of `RESOLUTIONS` moves in a design of `DESIGNS`."""
    blocks, ends = shapes(name)
    chosen = DESIGNS[design]
    return element_size * (sum(chosen.moved(block) for block in blocks) + chosen.ends(ends))


def steps(name: str, element_size: int = 2) -> Iterator[tuple[str, int]]:
    """The bytes of our launches in inference and training, summed over the blocks."""
    blocks, _ = shapes(name)
    for title, kind, group in (
        ("inference", Block, INFERENCE),
        ("inference", Fused, FUSED_INFERENCE),
        ("training", Block, FORWARD + BACKWARD),
        ("training", Fused, FUSED_FORWARD + FUSED_BACKWARD),
    ):
        for step, of_block in group:
            yield f"{title}: {step}", element_size * sum(of_block(b) for b in blocks if isinstance(b, kind))


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
