"""Writes effnet_ops/ops/gpu_choice.json: which of `cuda` and `triton` runs an operator by default, shape by shape.

python benchmarks/gpu/choice.py                    # from the rows of a GPU where there are any, else the byte model

The model is for an H200, and makes one time of what a design moves:

    launches x LAUNCH + max(DRAM bytes / DRAM, L2 bytes / L2)

DRAM bytes: each operand and each result once; the second reading of a tensor where more than the L2 passes in between;
partial sums written and read. L2 bytes: all that blocks read, the halos that neighbours share included, and all that
they write. What a program of Triton's reads twice at the same step stays in its L1 and is not counted. Of the CUDA
kernels, `plan()` says what they read, of Triton's the rule for their tiles does.

An entry stands where another backend than the operator's default, which is the faster over all the shapes together, is
better by more than the model can be wrong by little things, 3 %. Measured shapes are as they were measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from rows import RESULTS, existing_rows

from effnet_ops import _native
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.kernels import depthwise, tuning
from effnet_ops.ops import gpu
from effnet_ops.scaling.network import network, walk

DRAM, L2, LAUNCH = 4.3e12, 5.5e12, 2e-6
"""Bytes a second, bytes a second, seconds: a copy's rate on an H200, what others measured on H100, a small kernel's."""
L2_BYTES = 50 * 2**20
ARCHITECTURE = tuning.ARCHITECTURES["sm_90"]
NETWORKS = {"efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_b7": 600}
BATCHES, ELEMENT_SIZES = (1, 16, 256), (2, 4)
MODEL, MARGIN = "byte model", 0.97


class Moved(NamedTuple):
    """What one call of a design moves."""

    launches: int
    dram: float
    l2: float

    @property
    def seconds(self) -> float:
        return self.launches * LAUNCH + max(self.dram / DRAM, self.l2 / L2)


class Window(NamedTuple):
    channels: int
    size: int
    kernel: int
    stride: int


class Gate(NamedTuple):
    channels: int
    size: int
    reduced: int


def layers() -> tuple[list[Window], list[Gate]]:
    """The distinct depthwise convolutions and squeeze-and-excitations of the networks."""
    windows: dict[Window, None] = {}
    gates: dict[Gate, None] = {}
    for name, resolution in NETWORKS.items():
        for layer in walk(network(name), resolution):
            if layer.kind == "depthwise":
                last = layer
                windows[Window(layer.in_channels, layer.in_size[0], layer.kernel_size, layer.stride)] = None
            elif layer.kind == "squeeze_excite" and layer.out_channels < layer.in_channels:
                gates[Gate(layer.in_channels, last.out_size[0], layer.out_channels)] = None
    return list(windows), list(gates)


class Geometry(NamedTuple):
    """A depthwise convolution of square images, with SAME padding."""

    batch: int
    channels: int
    size: int
    out: int
    kernel: int
    stride: int
    before: int
    element_size: int

    @classmethod
    def of(cls, window: Window, batch: int, element_size: int) -> Geometry:
        sizes, kernel, stride = (window.size,) * 2, (window.kernel,) * 2, (window.stride,) * 2
        sides = resolve_padding((), sizes, kernel, stride, (1, 1))
        out = output_size(sizes, kernel, stride, sides, (1, 1))[0]
        return cls(batch, window.channels, window.size, out, window.kernel, window.stride, sides[0], element_size)

    @property
    def x_bytes(self) -> int:
        return self.batch * self.channels * self.size**2 * self.element_size

    @property
    def y_bytes(self) -> int:
        return self.batch * self.channels * self.out**2 * self.element_size


def _covered(first: int, count: int, length: int) -> int:
    """How many of ``count`` rows or columns from ``first`` on lie in an image of this length."""
    return max(0, min(first + count, length) - max(first, 0))


def _triton_config(operation: str, g: Geometry) -> dict[str, int]:
    window = depthwise._Window((g.kernel,) * 2, (g.stride,) * 2, (g.before,) * 4, (1, 1))
    axes = {
        f"{name}_{axis}": pair[0]
        for name, pair in zip(("kernel", "stride", "dilation"), (window.kernel, window.stride, (1, 1)), strict=True)
        for axis in "hw"
    }
    shape = {"batch": g.batch, "channels": g.channels, "height": g.out, "width": g.out}
    extra = {"fused": 0} if operation == "depthwise_backward" else {}
    extra |= {"element_size": g.element_size, "float16": 0}
    return tuning.from_rule(operation, {**shape, **axes, **extra}, ARCHITECTURE)


def _lane_pixels(config: dict[str, int], rows: int, columns: int, tall: Any, wide: Any) -> int:
    """Pixels of one image that programs read, where lanes of a program that stand beside each other share columns.

    There are ``rows`` x ``columns`` lanes; ``tall(i)`` is what row i of them reads, ``wide(i, n)`` what n from i on do.
    """
    pixels, lanes = 0, rows * columns
    for first in range(0, lanes, config["block_p"]):
        last = min(first + config["block_p"], lanes) - 1
        for row in range(first // columns, last // columns + 1):
            begin = max(first - row * columns, 0)
            end = min(last - row * columns, columns - 1)
            pixels += tall(row) * wide(begin, end - begin + 1)
    return pixels


def triton_forward(g: Geometry) -> Moved:
    config = _triton_config("depthwise_forward", g)
    rows, columns = ceil(g.out / config["rows"]), ceil(g.out / config["columns"])
    steps = (config["rows"] + (g.kernel - 1 + g.stride) // g.stride - 1) * g.stride

    def tall(row: int) -> int:
        return _covered(row * config["rows"] * g.stride - g.before, steps, g.size)

    def wide(first: int, count: int) -> int:
        return _covered(
            first * config["columns"] * g.stride - g.before,
            (count * config["columns"] - 1) * g.stride + g.kernel,
            g.size,
        )

    read = _lane_pixels(config, rows, columns, tall, wide) * g.batch * g.channels * g.element_size
    return Moved(1, g.x_bytes + g.y_bytes, read + g.y_bytes)


def triton_backward(g: Geometry) -> Moved:
    """Both gradients, and the second stage of the weight's."""
    config = _triton_config("depthwise_backward", g)
    steps = max(ceil((g.size + g.before) / g.stride), g.out)
    rows, columns = ceil(steps / config["rows"]), ceil(steps / config["columns"])
    open_rows, reach = (g.kernel - 1 + g.stride) // g.stride, (g.kernel - 1) // g.stride

    def tall(row: int) -> int:
        return _covered(row * config["rows"] - open_rows + 1, config["rows"] + open_rows - 1, g.out)

    def wide(first: int, count: int) -> int:
        return _covered(first * config["columns"] - reach, count * config["columns"] + reach, g.out)

    grads = _lane_pixels(config, rows, columns, tall, wide) * g.batch * g.channels * g.element_size
    slabs, items = ceil(g.channels / config["block_c"]), g.batch * ceil(rows * columns / config["block_p"])
    walkers = max(min(items, ceil(config["programs"] / slabs)), 1)
    partials = 2 * 4 * walkers * g.channels * g.kernel**2
    return Moved(2, g.y_bytes + 2 * g.x_bytes + partials, grads + 2 * g.x_bytes + partials)


def triton_squeeze_excite(images: int, gate: Gate, element_size: int, backward: bool) -> Moved:
    """Pool, gate, scale; backward also the weights' gradients. The second reading is a whole batch after the first."""
    x = images * gate.channels * gate.size**2 * element_size
    tensors = 2 if backward else 1
    read_again = x if tensors * x > L2_BYTES else 0
    return Moved(4 if backward else 3, (tensors + 1) * x + read_again, (tensors + 2) * x)


class _Request(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("dtype", "multiprocessors", "major", "minor", "max_shared_bytes")]


class Plans:
    """What the CUDA library's plan() says, for the model's GPU; no GPU is needed."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def _ask(self, name: str, size: list[int], element_size: int, backward: bool) -> tuple[int, int, int, int]:
        """Bytes of activations that are read, launches, blocks, bytes of workspace."""
        request = _Request(0 if element_size == 4 else 1, ARCHITECTURE.multiprocessors, 9, 0, ARCHITECTURE.shared_bytes)
        found = (ctypes.c_int64 * 4)()
        function = getattr(self._library, f"effnet_cuda_{name}_plan")
        function(ctypes.byref(request), (ctypes.c_int64 * len(size))(*size), ctypes.c_bool(backward), found)
        return tuple(found)

    def depthwise(self, g: Geometry, backward: bool) -> Moved:
        size = [g.batch, g.channels, g.size, g.size, g.out, g.out, g.kernel, g.stride, g.before, g.before]
        read, launches, _, workspace = self._ask("depthwise", size, g.element_size, backward)
        if not backward:
            return Moved(launches, g.x_bytes + g.y_bytes, read + g.y_bytes)
        partials = 2 * workspace
        return Moved(launches, g.y_bytes + 2 * g.x_bytes + partials, read + g.x_bytes + partials)

    def squeeze_excite(self, images: int, gate: Gate, element_size: int, backward: bool) -> Moved:
        """Where a block takes whole images, the second reading is as far behind as all blocks have images."""
        size = [images, gate.size**2, gate.channels, gate.reduced]
        read, launches, blocks, _ = self._ask("squeeze_excite", size, element_size, backward)
        x = images * gate.channels * gate.size**2 * element_size
        tensors = 2 if backward else 1
        between = tensors * x * (min(blocks / images, 1.0) if launches == 1 else 1.0)
        read_again = x if between > L2_BYTES else 0
        return Moved(launches, (tensors + 1) * x + read_again, read + x)


class Compared(NamedTuple):
    operator: str
    bucket: str
    cuda: float
    triton: float

    @property
    def better(self) -> str:
        return "cuda" if self.cuda <= self.triton else "triton"


def modelled(library: Path) -> Iterator[Compared]:
    """Both backends' seconds by the model, at every layer of the networks."""
    plans, (windows, gates) = Plans(library), layers()
    for element_size in ELEMENT_SIZES:
        for batch in BATCHES:
            for window in windows:
                g = Geometry.of(window, batch, element_size)
                key = gpu.bucket((batch, g.channels, g.size, g.size), g.kernel, g.stride, element_size)
                times = plans.depthwise(g, False).seconds, triton_forward(g).seconds
                yield Compared("depthwise_conv2d", key, *times)
                times = plans.depthwise(g, True).seconds, triton_backward(g).seconds
                yield Compared("depthwise_conv2d_backward", key, *times)
            for gate in gates:
                key = gpu.bucket((batch, gate.channels, gate.size, gate.size), None, None, element_size)
                for operator, backward in (("squeeze_excite", False), ("squeeze_excite_backward", True)):
                    designs = plans.squeeze_excite, triton_squeeze_excite
                    times = (design(batch, gate, element_size, backward).seconds for design in designs)
                    yield Compared(operator, key, *times)


_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?: k(\d+) s(\d+))?")
ENOUGH, MOST = 8, 0.9
"""So many measured shapes, of which so large a part says the same, decide for an operator."""
_PARTS = ("depthwise", "operations", "kernels")
_MODES = {"forward": "", "backward": "_backward", "both gradients": "_backward"}


def measured(rows: list[dict[str, Any]]) -> Iterator[Compared]:
    """Both backends' milliseconds, where rows have both: plain convolutions in every dtype, public functions, or else
    the kernels with all that a block fuses into them.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted((row for row in rows if row["part"] in _PARTS), key=lambda row: _PARTS.index(row["part"])):
        backend = re.fullmatch(r"effnet_ops (cuda|triton)(?: channels_last)?", row["provider"])
        if backend is None or row["mode"] not in _MODES:
            continue
        if row["operation"] not in ("depthwise", "squeeze_excite"):
            continue
        *size, kernel, stride = (None if n is None else int(n) for n in _SHAPE.match(row["shape"]).groups())
        word = "depthwise_conv2d" if row["operation"] == "depthwise" else "squeeze_excite"
        key = gpu.bucket(size, kernel, stride, 4 if row["dtype"] == "fp32" else 2)
        # fp16 and bf16 move the same bytes: the first of them stands for both.
        found.setdefault((word + _MODES[row["mode"]], key), {}).setdefault(backend[1], row["p50"])
    for (operator, key), times in found.items():
        if len(times) == 2:
            yield Compared(operator, key, times["cuda"], times["triton"])


def measured_blocks(rows: list[dict[str, Any]]) -> Iterator[Compared]:
    """The same of whole blocks in inference. Blocks of one input share an entry, and their milliseconds are added."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        backend = re.fullmatch(r"effnet_ops (cuda|triton)", row["provider"])
        if row["operation"] == "mbconv" and row["mode"] == "inference" and row["part"] == "kernels" and backend:
            size = [int(n) for n in _SHAPE.match(row["shape"]).groups()[:4]]
            key = gpu.bucket(size, None, None, 4 if row["dtype"] == "fp32" else 2)
            found.setdefault(key, {}).setdefault(row["shape"], {})[backend[1]] = row["p50"]
    for key, shapes in found.items():
        both = [times for times in shapes.values() if len(times) == 2]
        if both:
            yield Compared(
                "mbconv_inference", key, *(sum(times[name] for times in both) for name in ("cuda", "triton"))
            )


def table(comparisons: list[Compared], origin: str) -> dict[str, Any]:
    """The entries of these comparisons: a default for each operator, and the shapes where the other is better."""
    operators: dict[str, Any] = {}
    for operator in dict.fromkeys(c.operator for c in comparisons):
        mine = [c for c in comparisons if c.operator == operator]
        default = "cuda" if sum(c.cuda for c in mine) <= sum(c.triton for c in mine) else "triton"
        others = {
            c.bucket: {"backend": c.better, "origin": origin}
            for c in mine
            if c.better != default and min(c.cuda, c.triton) < MARGIN * max(c.cuda, c.triton)
        }
        operators[operator] = {"default": default, "origin": origin, "shapes": dict(sorted(others.items()))}
    return operators


def overlaid(base: dict[str, Any], comparisons: list[Compared], origin: str) -> dict[str, Any]:
    """The model's table with every shape that was measured as it was measured.

    Where nearly all measured shapes of an operator say the same, the others follow them, and not the model.
    """
    for operator in dict.fromkeys(c.operator for c in comparisons):
        better = Counter(c.better for c in comparisons if c.operator == operator)
        (backend, most), *_ = better.most_common()
        if better.total() >= ENOUGH and most >= MOST * better.total():
            base[operator] = {"default": backend, "origin": origin, "shapes": {}}
    for c in comparisons:
        if c.better != base[c.operator]["default"] or base[c.operator]["origin"] != origin:
            base[c.operator]["shapes"][c.bucket] = {"backend": c.better, "origin": origin}
    return base


def chosen(library: Path) -> dict[str, Any]:
    """The table: by the model, whose plans ``library`` makes, and over it by every committed row."""
    operators = table(list(modelled(library)), MODEL)
    # Fewer bytes are no evidence here: the kernels of whole blocks compute as much as they read.
    operators["mbconv_inference"] = {"default": "triton", "origin": "no row compares them yet", "shapes": {}}
    for path in sorted(path for path in RESULTS.glob("*.jsonl") if path.stem != "cpu"):
        first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
        origin = f"measured on {first['environment']['device']}, {first['date'][:10]}"
        rows = existing_rows(path)
        operators = overlaid(operators, [*measured(rows), *measured_blocks(rows)], origin)
    return operators


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="whose plans are asked; by default those of effnet_ops")
    library = parser.parse_args().library or _native.cuda_library()
    if library is None:
        print(f"no plan to ask: {_native.load_cuda()}", file=sys.stderr)
        return 3
    operators = chosen(library)
    gpu.TABLE.write_text(json.dumps({"operators": operators}, indent=1) + "\n", encoding="utf-8")
    for operator, entry in operators.items():
        print(f"{operator}: {entry['default']} ({entry['origin']}), {len(entry['shapes'])} shapes of their own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
