"""docs/compatibility.md: what is replaced in the networks of every library, and whether it stays right.

    python benchmarks/compatibility.py                   # what has no row yet for the installed versions, then the page
    python benchmarks/compatibility.py --only smp timm:mobilenetv4 --seconds 600
    python benchmarks/compatibility.py --page            # only the page

A row is a network that was built with random weights and looked at by `effnet_ops.cli.try_parity.examine`, at a small
size. A library that is not installed has no new rows. Exit code 1 where a network disagrees.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_ops.benchmark.models import with_statistics
from effnet_ops.cli.try_parity import examine

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGE = ROOT / "benchmarks" / "results" / "compatibility.jsonl", ROOT / "docs" / "compatibility.md"
FIRST = (
    *("efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "mnasnet_100", "fbnetc_100", "mixnet_s", "lcnet_100", "tinynet_a", "hardcorenas_a"),
    *("ghostnet_100", "maxvit_nano_rw_256", "maxvit_tiny_tf_224", "coatnet_nano_rw_224", "coatnet_0_rw_224"),
    *("rexnet_100", "tiny_vit_5m_224", "fastvit_t8", "mobileone_s0", "edgenext_small", "efficientvit_b0", "repvit_m1"),
    *("tf_efficientnetv2_b0", "mobilenet_edgetpu_100", "spnasnet_100", "semnasnet_100"),
)
"""timm's networks that come before all others: one of each kind."""
FAMILIES = (
    *("efficientnet", "mobilenet", "mnasnet", "fbnet", "mixnet", "lcnet", "tinynet", "hardcorenas", "ghostnet"),
    *("maxvit", "coatnet", "rexnet", "tiny_vit", "fastvit", "mobileone", "edgenext", "efficientvit"),
)
LIMIT = 120
"""Millions of parameters, beyond which a network is the same with more of it."""
PACKAGES = {
    **{"timm": "timm", "torchvision": "torchvision", "smp": "segmentation_models_pytorch", "monai": "monai"},
    **{"transformers": "transformers", "effdet": "effdet", "pytorchcv": "pytorchcv"},
    **{"efficientnet_pytorch": "efficientnet_pytorch", "geffnet": "geffnet"},
}
Entry = tuple[str, str, int, Callable[[], nn.Module]]


def entries() -> Iterator[Entry]:
    """Library, name, size and factory of every network, one of each kind first."""
    yield from _others()
    timm = importlib.import_module("timm")
    known = timm.list_models()
    names = [name for name in FIRST if name in known]
    names += [name for name in known if any(family in name for family in FAMILIES) and name not in names]
    for name in names:
        config = timm.get_pretrained_cfg(name)
        fixed = config is not None and config.fixed_input_size
        size = config.input_size[-1] if fixed else 64
        yield "timm", name, size, functools.partial(timm.create_model, name)


def _others() -> Iterator[Entry]:
    def entry(library: str, name: str, made: str, *args: Any, size: int = 64, **settings: Any) -> Entry:
        return library, name, size, functools.partial(_make, f"{PACKAGES[library]}.{made}", *args, **settings)

    for encoder in (*(f"efficientnet-b{n}" for n in range(5)), "timm-efficientnet-b0", "mobilenet_v2"):
        yield entry("smp", f"{encoder} in Unet", "Unet", encoder, encoder_weights=None)
    dilated = dict(encoder_weights=None, encoder_output_stride=8)
    yield entry(
        "smp", "efficientnet-b0 in DeepLabV3Plus, output stride 8", "DeepLabV3Plus", "efficientnet-b0", **dilated
    )
    for name in ("EfficientNet", "MobileNetV1", "MobileNetV2", "AlignVision"):
        yield "transformers", name, 64, functools.partial(_hugging_face, name)
    for n in range(3):
        settings = dict(pretrained=False, spatial_dims=2, in_channels=3)
        yield entry("monai", f"EfficientNetBN b{n}", "networks.nets.EfficientNetBN", f"efficientnet-b{n}", **settings)
    names = ("efficientnet_b0", "efficientnet_b1", "efficientnet_b0b", "efficientnet_b0c", "efficientnet_edge_small_b")
    names += ("mobilenet_w1", "mobilenetv2_w1", "mobilenetv2b_w1", "mobilenetv3_large_w1", "mobilenetv3_small_w1")
    for name in (*names, "mnasnet_b1", "mnasnet_a1", "proxylessnas_cpu", "fbnet_cb", "mixnet_s", "spnasnet"):
        yield entry("pytorchcv", name, "model_provider.get_model", name, size=160 if "eff" in name else 224)
    for name in ("efficientdet_d0", "tf_efficientdet_lite0"):
        yield entry("effdet", name, "create_model", name, size=128, pretrained_backbone=False)
    for name in ("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0"):
        yield entry("torchvision", name, f"models.{name}")
    yield entry("torchvision", "maxvit_t", "models.maxvit_t", size=224)
    yield entry("torchvision", "mobilenet_v3_large, quantizable", "models.quantization.mobilenet_v3_large")
    yield entry("efficientnet_pytorch", "efficientnet-b0", "EfficientNet.from_name", "efficientnet-b0")
    yield entry("geffnet", "efficientnet_b0", "create_model", "efficientnet_b0")


def _make(path: str, *args: Any, **settings: Any) -> nn.Module:
    found, *names = path.split(".")
    made = importlib.import_module(found)
    for name in names:
        found = f"{found}.{name}"
        made = getattr(made, name) if hasattr(made, name) else importlib.import_module(found)
    return made(*args, **settings)


def _hugging_face(name: str) -> nn.Module:
    return _make(f"transformers.{name}Model", _make(f"transformers.{name}Config"))


def versions(library: str) -> str:
    return f"torch {torch.__version__.partition('+')[0]}, {library} {importlib.metadata.version(PACKAGES[library])}"


def row_of(library: str, name: str, size: int, build: Callable[[], nn.Module]) -> dict[str, Any]:
    torch.manual_seed(0)
    row: dict[str, Any] = {"library": library, "name": name, "versions": versions(library), "size": size}
    try:
        model = build()
        if (count := sum(p.numel() for p in model.parameters())) > LIMIT * 1e6:
            return row | {"problem": f"not looked at: {count / 1e6:.0f} M parameters"}
        model = with_statistics(model, size) if size < 200 else model.eval()
        found = examine(model, torch.randn(3, 3, size, size))
    except Exception as error:  # a library's network can raise anything
        return row | {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
    reasons = sorted(found.reasons().items(), key=lambda item: -item[1])
    return row | {
        **{"found": found.found, "replaced": found.replaced, "reasons": reasons, "optimized": found.optimized},
        **{"fp64": found.fp64, "ours": found.ours, "stock": found.stock, "restored": found.restored},
        "wrong": found.wrong(),
    }


def read() -> dict[tuple[str, str], dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(row["library"], row["name"]): row for row in map(json.loads, lines)}


def write(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    ROWS.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


HEAD = """# Compatibility

Written by `make compatibility` from `benchmarks/results/compatibility.jsonl`; do not edit. Networks with random
weights, small images, two threads of a CPU. Blocks, depthwise convolutions and squeeze-and-excitation layers (those
that are in no replaced block): replaced of found. fp64: the largest difference of the replaced from the stock network,
both in fp64, of evaluation, training, its gradients and statistics, and of the optimized copy. fp32: our error in
evaluation and of the gradients as a multiple of the stock network's own, against fp64. One draw: with ReLU6 a
gradient jumps where rounding moves a value across a corner, and both errors are of such jumps. In the remarks, why
layers were left.
"""


def page(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if "problem" not in row]
    lines = [HEAD, f"{len(good)} networks, {sum(bool(row['wrong']) for row in good)} of them disagree."]
    for library in dict.fromkeys(row["library"] for row in rows):
        mine = [row for row in rows if row["library"] == library]
        lines += ["", f"## {library}", "", "; ".join(sorted({row["versions"] for row in mine})), ""]
        lines += ["| network | blocks | depthwise | SE | fp64 | fp32 | restored | remarks |", "|---" * 8 + "|"]
        lines += [_line(row) for row in mine]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"| {row['name']} | | | | | | | {_cell(row['problem'])} |"
    found, replaced = row["found"], row["replaced"]
    kinds = ("block", "depthwise", "squeeze_excite")
    counts = [f"{replaced[kind]} of {found[kind]}" if kind in found else "" for kind in kinds]
    ratios = [row["ours"][key] / max(row["stock"][key], 1e-12) for key in ("evaluation", "gradients")]
    remarks = [f"{count}x {reason}" for reason, count in row["reasons"][:3]]
    if len(row["reasons"]) > 3:
        remarks.append(f"{len(row['reasons']) - 3} more reasons")
    if row["wrong"]:
        remarks.insert(0, "**wrong: " + ", ".join(row["wrong"]) + "**")
    cells = (row["name"], *counts, f"{max(row['fp64'].values()):.0e}", " ".join(f"{r:.1f}x" for r in ratios))
    return "| " + " | ".join((*cells, "yes" if row["restored"] else "**no**", _cell("; ".join(remarks)))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:400]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of library:name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no network after this time")
    parser.add_argument("--fresh", action="store_true", help="repeat rows of the installed versions, too")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    rows, start = read(), time.perf_counter()
    for library, name, size, build in () if options.page else entries():
        key = (library, name)
        if options.only and not any(f"{library}:{name}".startswith(only) for only in options.only):
            continue
        try:
            done = rows.get(key, {}).get("versions") == versions(library)
        except importlib.metadata.PackageNotFoundError:
            continue
        if (done and not options.fresh) or time.perf_counter() - start > options.seconds:
            continue
        rows[key] = row = row_of(library, name, size, build)
        print(f"{library}:{name}", row.get("problem") or row["replaced"], row.get("wrong", ""), flush=True)
        write(rows)
    PAGE.write_text(page([rows[key] for key in sorted(rows)]))
    return int(any(row.get("wrong") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
