"""Writes docs/gpu.md from the committed rows: what was measured, apart from what was only derived.

python benchmarks/gpu/report.py                    # every file in benchmarks/results/gpu; --plots draws them, too
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import byte_model

from effnet_ops.ops import gpu

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
OURS = "effnet_ops"
COPY_TARGETS = (
    ("depthwise 3x3 forward with its fusions, 112^2 and 56^2", "forward", "k3", (112, 56), 82),
    ("depthwise 5x5 forward with its fusions", "forward", "k5", (), 70),
    ("depthwise backward, both gradients, with its fusions", "backward", "", (), 65),
)
"""Kernels, and the percentage of the copy bandwidth that each must reach: mode, window, sides, percent."""
RATIO_TARGETS = (("forward", 2.0), ("both gradients", 2.5))
"""Times faster than cuDNN, channels_last, bf16: geometric mean over the depthwise convolutions of B0 and B4."""
NETWORK_TARGETS = (
    ("B0 inference, batch 256, against eager channels_last", "forward", "256", ("eager channels_last",), "2x"),
    ("B0 inference, batch 256, against torch.compile", "forward", "256", ("default", "max-autotune"), "1.5x"),
    ("B0 training step, batch 256, against eager channels_last", "step", "256", ("eager channels_last",), "1x"),
    ("B0 training step, batch 256, against torch.compile", "step", "256", ("default", "max-autotune"), "1x"),
)
"""Our fastest way against the fastest of these, with and without a CUDA graph: mode, batch, providers, times."""
LATENCY_TARGET = ("B0 inference, batch 1, CUDA graph", "0.5 ms")

Row = dict[str, Any]


class Measured:
    """The rows of one GPU: of each key, the last."""

    def __init__(self, path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.environments = {line["identity"]: line["environment"] for line in lines if "identity" in line}
        rows = {line["key"]: line for line in lines if "key" in line}
        self.failed = [row for row in rows.values() if "failed" in row]
        self.rows = [row for row in rows.values() if "failed" not in row]
        used = {row["environment"] for row in rows.values()}
        self.environments = {name: value for name, value in self.environments.items() if name in used}
        self.device = next(iter(self.environments.values()))["device"]
        self.name = path.stem

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == part]

    @property
    def copy(self) -> float | None:
        """GB/s of a copy, read and written bytes counted."""
        return next((row["gb_per_s"] for row in self.of("machine") if row["operation"] == "copy"), None)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _times(rows: list[Row], by: tuple[str, ...]) -> list[str]:
    """One line for each combination of ``by``, one column a provider: milliseconds, and ours against the fastest."""
    groups: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        label = row["provider"] + (" graph" if row.get("graph") else "")
        groups[tuple(row[name] for name in by)][label] = row
    providers = sorted({label for group in groups.values() for label in group}, key=lambda p: (OURS not in p, p))
    ours = [p for p in providers if p.startswith(OURS)]
    others = [p for p in providers if not p.startswith(OURS)]
    lines = []
    for key, group in groups.items():
        cells = [_cell(group.get(provider)) for provider in providers]
        best = min((group[p]["p50"] for p in others if p in group), default=None)
        mine = min((group[p]["p50"] for p in ours if p in group), default=None)
        lines.append([*key, *cells, f"{best / mine:.2f}x" if best and mine else ""])
    return table([*by, *(f"{p}, ms" for p in providers), "fastest other / ours"], lines)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['p50']:.4g} ({row['p20']:.4g} to {row['p80']:.4g})"


def _kernels(measured: Measured) -> list[str]:
    copy = measured.copy
    lines = []
    for row in sorted(measured.of("kernels"), key=lambda row: row["gb_per_s"]):
        share = f"{100 * row['gb_per_s'] / copy:.0f} %" if copy else ""
        fields = [row["operation"], row["provider"].removeprefix(f"{OURS} "), row["shape"], row["mode"]]
        lines.append([*fields, f"{row['p50']:.4g}", f"{row['gb_per_s']:.0f}", share])
    return table(["kernel", "backend", "shape", "mode", "ms", "GB/s", "of copy"], lines)


def _ratios(measured: Measured) -> list[str]:
    """The plain depthwise convolution of each backend against cuDNN in the same layout and dtype."""
    lines = []
    for dtype in ("bf16", "fp16", "fp32"):
        for layout in ("channels_last", "contiguous"):
            for backend in ("cuda", "triton"):
                for mode, _ in RATIO_TARGETS:
                    found = ratios(measured, backend, layout, dtype, mode)
                    if found:
                        numbers = f"{geometric_mean(found):.2f}x", f"{min(found):.2f}x to {max(found):.2f}x"
                        lines.append([backend, layout, dtype, mode, str(len(found)), *numbers])
    headings = ["backend", "layout", "dtype", "mode", "shapes", "faster than cuDNN (geometric mean)", "spread"]
    return table(headings, lines) if lines else ["Not measured.", ""]


def ratios(measured: Measured, backend: str, layout: str, dtype: str, mode: str) -> list[float]:
    """cuDNN's time over ours, one number a shape."""

    def times(provider: str) -> dict[str, float]:
        wanted = (provider, dtype, mode)
        rows = [r for r in measured.of("depthwise") if (r["provider"], r["dtype"], r["mode"]) == wanted]
        return {row["shape"]: row["p50"] for row in rows}

    ours, theirs = times(f"{OURS} {backend} {layout}"), times(f"cudnn {layout}")
    return [theirs[shape] / ours[shape] for shape in ours if shape in theirs]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _targets(measured: Measured | None) -> list[str]:
    """Each target, and the worst (of kernels) or the mean (of ratios) that was measured with the cuda backend."""
    lines = []
    for title, mode, window, sides, percent in COPY_TARGETS:
        rows = [] if measured is None else [r for r in measured.of("kernels") if r["provider"] == f"{OURS} cuda"]
        rows = [r for r in rows if r["mode"] == mode and r["operation"] == "depthwise" and window in r["shape"]]
        rows = [r for r in rows if not sides or any(f"x{side} " in r["shape"] for side in sides)]
        worst = min((r["gb_per_s"] for r in rows), default=None)
        found = f"{100 * worst / measured.copy:.0f} %" if worst and measured and measured.copy else "not measured"
        lines.append([title, f"{percent} % of the copy bandwidth", found])
    for mode, times in RATIO_TARGETS:
        values = [] if measured is None else ratios(measured, "cuda", "channels_last", "bf16", mode)
        found = f"{geometric_mean(values):.2f}x" if values else "not measured"
        lines.append([f"plain depthwise of B0 and B4, {mode}, geometric mean", f"{times}x cuDNN channels_last", found])
    products = [row for row in rows_of(measured, "kernels") if row["operation"] == "pointwise"]
    worst = min((row["gb_per_s"] for row in products), default=None)
    found = f"{100 * worst / measured.copy:.0f} %" if worst and measured and measured.copy else "not measured"
    lines.append(["pointwise with its fusions", "70 % of the copy bandwidth", found])
    for title, mode, batch, others, times in NETWORK_TARGETS:
        lines.append([title, times, _against(rows_of(measured, "networks"), mode, batch, others)])
    latency = _fastest(rows_of(measured, "networks"), "forward", "1", (OURS,))
    lines.append([*LATENCY_TARGET, f"{latency:.2f} ms" if latency else "not measured"])
    return table(["what", "at least", "measured"], lines)


def rows_of(measured: Measured | None, part: str) -> list[Row]:
    return [] if measured is None else measured.of(part)


def _fastest(rows: list[Row], mode: str, batch: str, providers: tuple[str, ...]) -> float | None:
    """Milliseconds of B0 on the fastest of the providers, which begin with these names."""
    times = (
        row["p50"]
        for row in rows
        if row["operation"] == "efficientnet_b0" and (row["mode"], row["shape"].split("x")[0]) == (mode, batch)
        if row["provider"].startswith(providers)
    )
    return min(times, default=None)


def _against(rows: list[Row], mode: str, batch: str, others: tuple[str, ...]) -> str:
    ours, theirs = _fastest(rows, mode, batch, (OURS,)), _fastest(rows, mode, batch, others)
    return f"{theirs / ours:.2f}x" if ours and theirs else "not measured"


def _counters(measured: Measured) -> list[str]:
    lines = []
    for row in measured.of("counters"):
        values = row["counters"]
        shown = (
            ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "{:.0f} %"),
            ("lts__throughput.avg.pct_of_peak_sustained_elapsed", "{:.0f} %"),
            ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "{:.0f} %"),
            ("sm__warps_active.avg.pct_of_peak_sustained_active", "{:.0f} %"),
            ("launch__registers_per_thread", "{:.0f}"),
        )
        numbers = [form.format(values[name]) if name in values else "" for name, form in shown]
        least = next((r.get("bytes") for r in measured.of("kernels") if _same(r, row)), None)
        more = f"{row['dram_bytes'] / least:.2f}" if least else ""
        lines.append([row["operation"], row["provider"], row["shape"], row["mode"], more, *numbers, row["limit"]])
    headings = [
        "kernel",
        "provider",
        "shape",
        "mode",
        "DRAM bytes / least",
        "DRAM",
        "L2",
        "pipes",
        "warps",
        "registers",
    ]
    return table([*headings, "limited by"], lines)


def _same(a: Row, b: Row) -> bool:
    return all(a[name] == b[name] for name in ("operation", "provider", "shape", "dtype", "mode"))


def _traffic(measured: Measured) -> list[str]:
    """Measured DRAM bytes of a training step by kernel class, and the byte model's sum for the same design."""
    lines = []
    for row in measured.of("traffic"):
        images = int(row["shape"].split("x")[0])
        total, model = sum(row["dram_bytes"].values()), row["model_bytes"]
        for label, value in sorted(row["dram_bytes"].items(), key=lambda item: -item[1]):
            milliseconds = row["kernel_ms"].get(label, 0.0)
            lines.append([row["provider"], label, f"{value / images / 1e6:.1f}", f"{milliseconds:.2f}", ""])
        verdict = f"{total / model:.2f}x of {model / images / 1e6:.1f} ({row['design']})"
        lines.append([row["provider"], "**all**", f"{total / images / 1e6:.1f}", "", verdict])
    return table(["provider", "kernel class", "DRAM, MB an image", "ms under ncu", "byte model, MB an image"], lines)


def _sanitizer(measured: Measured) -> list[str]:
    lines = [[r["operation"], r["provider"], f"{r['calls']} calls", str(r["errors"])] for r in measured.of("sanitizer")]
    return table(["tool", "kernels", "reduced table", "errors"], lines)


def _smoke(measured: Measured) -> list[str]:
    """The largest error of each operator, backend, dtype and direction; of a network, over the stock network's."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in measured.of("smoke"):
        groups[tuple(row[name] for name in ("operation", "provider", "dtype", "mode"))].append(row)
    lines = [[*key, str(len(rows)), f"{max(row['error'] for row in rows):.1e}"] for key, rows in groups.items()]
    return table(["operator", "provider", "dtype", "direction", "calls", "largest error"], lines)


def _machine(measured: Measured) -> list[str]:
    lines = []
    for row in measured.of("machine"):
        rate = f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else f"{row['gflop_per_s'] / 1e3:.0f} TFLOP/s"
        lines.append([row["operation"], row["dtype"], rate])
    return table(["limit", "dtype", "measured"], lines)


def _memory(measured: Measured) -> list[str]:
    lines = []
    for row in measured.of("networks"):
        if "saved_bytes" in row or "peak_bytes" in row:
            numbers = (f"{row[name] / 1e6:.0f}" if name in row else "" for name in ("saved_bytes", "peak_bytes"))
            lines.append([row["operation"], row["shape"], row["mode"], row["provider"], *numbers])
    return table(["network", "shape", "mode", "provider", "saved, MB", "peak, MB"], lines)


def _profile(measured: Measured) -> list[str]:
    lines = []
    for row in measured.of("profile"):
        total = sum(row["kernel_ms"].values())
        for label, value in sorted(row["kernel_ms"].items(), key=lambda item: -item[1]):
            lines.append([row["operation"], row["provider"], label, f"{value:.2f}", f"{100 * value / total:.0f} %"])
    return table(["network", "provider", "kernel class", "ms", "share"], lines)


def _losses(measured: Measured) -> list[str]:
    """What is slower than the fastest of the others."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for part in ("operations", "blocks", "networks"):
        for row in measured.of(part):
            key = tuple(str(row.get(name)) for name in ("part", "operation", "shape", "dtype", "mode", "graph"))
            groups[key].append(row)
    lines = []
    for key, rows in groups.items():
        mine = [row for row in rows if row["provider"].startswith(OURS)]
        others = [row for row in rows if not row["provider"].startswith(OURS)]
        if mine and others:
            best, fastest = min(mine, key=lambda r: r["p50"]), min(others, key=lambda r: r["p50"])
            if best["p50"] > fastest["p50"]:
                lines.append([*key[1:3], key[4], fastest["provider"], f"{best['p50'] / fastest['p50']:.2f}x"])
    return table(["operation", "shape", "mode", "faster", "ours takes"], lines) if lines else ["Nothing.", ""]


def section(measured: Measured, plots: list[str]) -> list[str]:
    lines = [f"## {measured.device}", ""]
    for environment in measured.environments.values():
        versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
        lines.append(f"Driver {environment.get('driver', '-')}, {versions}, commit {environment['commit'][:12]}.")
    lines += ["", "Times are milliseconds of one call with a cold cache: median (20th to 80th percentile).", ""]
    lines += [f"![{plot}]({plot})\n" for plot in plots]
    parts = (
        ("Limits of the machine", "machine", _machine),
        ("Errors against fp64", "smoke", _smoke),
        ("Kernels", "kernels", _kernels),
        ("Depthwise against cuDNN", "depthwise", _ratios),
        ("What limits the slowest kernels", "counters", _counters),
        ("DRAM bytes of a training step", "traffic", _traffic),
        ("Memory and race checkers", "sanitizer", _sanitizer),
        ("Networks", "networks", lambda m: _times(m.of("networks"), ("operation", "shape", "mode"))),
        ("Memory", "networks", _memory),
        ("Blocks", "blocks", lambda m: _times(m.of("blocks"), ("operation", "shape", "mode"))),
        ("Operations", "operations", lambda m: _times(m.of("operations"), ("operation", "shape", "mode"))),
        ("Elementwise", "elementwise", lambda m: _times(m.of("elementwise"), ("operation", "shape", "mode"))),
        ("Plain depthwise convolutions", "depthwise", lambda m: _times(m.of("depthwise"), ("shape", "dtype", "mode"))),
        ("Where a training step's time goes", "profile", _profile),
    )
    for title, part, write in parts:
        lines += [f"### {title}", "", *(write(measured) if measured.of(part) else ["Not measured.", ""])]
    lines += ["### What lost", "", *_losses(measured)]
    if measured.failed:
        lines += ["### What failed", "", *table(["row", "reason"], [[r["key"], r["failed"]] for r in measured.failed])]
    return lines


def choice() -> list[str]:
    """Which backend is the default, and by what."""
    lines = [
        "## The default backend",
        "",
        "Where `cuda` and `triton` both have a kernel (`effnet_ops/ops/gpu_choice.json`).",
        "",
    ]
    rows = []
    for operator, entry in gpu.table().items():
        counts = Counter((found["backend"], found["origin"]) for found in entry["shapes"].values())
        rows.append([operator, "all others", entry["default"], entry["origin"]])
        rows += [[operator, f"{n} shapes", backend, origin] for (backend, origin), n in sorted(counts.items())]
    return [*lines, *table(["operator", "shapes", "default", "origin"], rows)]


def derived() -> list[str]:
    """The byte model: what has to be moved, not what was."""
    lines = ["## Derived", "", "Not measured: MB of activations an image, bf16, from [triton.md](triton.md).", ""]
    rows = [
        [design, *(f"{byte_model.moved(name, design) / 1e6:.1f}" for name in byte_model.RESOLUTIONS)]
        for design in byte_model.DESIGNS
    ]
    return [*lines, *table(["design", *(name.upper() for name in byte_model.RESOLUTIONS)], rows)]


def plot(measured: Measured, folder: Path) -> list[str]:
    """Bandwidth of every kernel beside the copy's, a roofline, and end-to-end bars; the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for name, draw in (("bandwidth", _draw_bandwidth), ("roofline", _draw_roofline), ("networks", _draw_networks)):
        figure, axes = plt.subplots(figsize=(9, 5))
        if draw(measured, axes):
            figure.tight_layout()
            made.append(f"gpu_{measured.name}_{name}.png")
            figure.savefig(folder / made[-1], dpi=110)
        plt.close(figure)
    return made


def _draw_bandwidth(measured: Measured, axes: Any) -> bool:
    rows = measured.of("kernels")
    labels = [f"{row['provider'].removeprefix(OURS)} {row['operation']} {row['mode']} {row['shape']}" for row in rows]
    axes.barh(labels, [row["gb_per_s"] for row in rows])
    axes.tick_params(axis="y", labelsize=4)
    if measured.copy:
        axes.axvline(measured.copy, color="black", linestyle="--", label="copy")
        axes.legend()
    axes.set_xlabel("GB/s")
    return bool(rows)


def _draw_roofline(measured: Measured, axes: Any) -> bool:
    rows = [row for row in measured.rows if "bytes" in row and "flops" in row]
    peak = next((r["gflop_per_s"] for r in measured.of("machine") if r["dtype"] == "bf16"), None)
    if not rows or not measured.copy or not peak:
        return False
    for operation in sorted({row["operation"] for row in rows}):
        chosen = [row for row in rows if row["operation"] == operation]
        axes.loglog([r["flops"] / r["bytes"] for r in chosen], [r["gflop_per_s"] for r in chosen], ".", label=operation)
    intensities = [2.0**i for i in range(-2, 12)]
    axes.loglog(intensities, [min(peak, i * measured.copy) for i in intensities], color="black")
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    return True


def _draw_networks(measured: Measured, axes: Any) -> bool:
    rows = [row for row in measured.of("networks") if row["operation"] == "efficientnet_b0"]
    labels = [f"{r['mode']} {r['shape'].split('x')[0]}: {r['provider']}{' graph' if r['graph'] else ''}" for r in rows]
    images = [int(row["shape"].split("x")[0]) / row["p50"] * 1e3 for row in rows]
    axes.barh(labels, images)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("efficientnet_b0, images a second")
    return bool(rows)


def render(files: list[Path], folder: Path, plots: bool) -> str:
    """The text of docs/gpu.md; plots go into ``folder``."""
    lines = ["# On a GPU", "", "Written by `benchmarks/gpu/report.py`; edit that, or measure with `make gpu`.", ""]
    measured = [Measured(path) for path in files]
    if not measured:
        lines += [
            "**Nothing has been measured yet.** There is no row: no kernel of this package has run on a GPU, and no",
            "speed is claimed. Triton kernels are interpreted, and compiled for sm_80, sm_90 and sm_100. CUDA kernels",
            "run on an emulated GPU, and are compiled for sm_80 and sm_90a.",
            "",
        ]
    for one in measured:
        lines += section(one, plot(one, folder) if plots else [])
    h200 = next((one for one in measured if "H200" in one.device), None)
    lines += ["## Targets", "", "On an H200, bf16, channels_last; of kernels the worst, of ratios the mean.", ""]
    lines += [*_targets(h200), *choice(), *derived()]
    return "\n".join(lines).rstrip() + "\n"


def main(
    output: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "gpu.md",
    results: Annotated[Path, typer.Option(help="The folder with one .jsonl a GPU.")] = RESULTS,
    plots: Annotated[bool, typer.Option(help="Whether to draw plots beside the page.")] = False,
) -> None:
    """Write the page from every file of rows."""
    files = sorted(path for path in results.glob("*.jsonl") if path.stem != "cpu")
    output.write_text(render(files, output.parent, plots), encoding="utf-8")
    print(f"{output} written from {len(files)} file(s) of rows")


if __name__ == "__main__":
    typer.run(main)
