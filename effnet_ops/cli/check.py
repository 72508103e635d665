"""`effnet-ops check`: every operator on every backend of this machine against the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

import effnet_ops
from effnet_ops import backends
from effnet_ops.checks import FLOAT_DTYPES, unknown_name
from effnet_ops.cli.cases import Case, Inputs, all_cases
from effnet_ops.cli.console import console, fail, show

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Bound(NamedTuple):
    """Largest allowed ||out - ref|| / ||ref||, ref in fp64 from the same rounded inputs."""

    forward: float
    gradient: float


BOUNDS = {
    torch.float64: Bound(1e-13, 1e-12),
    torch.float32: Bound(2e-6, 2e-5),
    torch.float16: Bound(2e-3, 2e-3),
    torch.bfloat16: Bound(1e-2, 1e-2),
}


class Result(NamedTuple):
    word: str
    dtype: torch.dtype
    forward: float
    gradient: float
    problem: str

    @property
    def passed(self) -> bool:
        bound = BOUNDS[self.dtype]
        return not self.problem and self.forward <= bound.forward and self.gradient <= bound.gradient


def run(backend: str | None, dtype: str | None) -> None:
    if backend is not None and backend not in backends.BACKENDS:
        fail(unknown_name("backend", backend, backends.BACKENDS))
    if dtype is not None and dtype not in DTYPES:
        fail(unknown_name("dtype", dtype, DTYPES))
    available = effnet_ops.available_backends()
    if backend is not None and available[backend]:
        fail(f"backend {backend!r} cannot run here: {available[backend]}")
    failed = 0
    for name, reason in available.items():
        if backend not in (None, name):
            continue
        if reason:
            console.print(f"{name}: not tested, since it cannot run here: {reason}")
            continue
        for device in _devices(name):
            dtypes = [value for key, value in DTYPES.items() if dtype in (None, key)]
            results = list(
                track(_results(name, device, dtypes), f"{name} on {device}", console=console, transient=True)
            )
            show(_table(f"{name} on {device}", results))
            failed += sum(not result.passed for result in results)
    if failed:
        console.print(f"[red]rows above that are wrong: {failed}[/red]")
        raise typer.Exit(1)
    console.print("[green]all within their bounds[/green]")


def _devices(backend: str) -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [
        device for device in devices if not backends.BACKENDS[backend].refuses(torch.empty(1, 1, 1, 1, device=device))
    ]


def _results(backend: str, device: str, dtypes: list[torch.dtype]) -> Iterator[Result]:
    """What the backend has kernels for: not every one takes each operator and dtype."""
    here = backends.BACKENDS[backend]
    for dtype in dtypes:
        if here.refuses(torch.empty(1, 1, 1, 1, device=device, dtype=dtype)):
            continue
        cases = [case for case in all_cases(seed=0) if not here.lacks(case.word.partition(",")[0], None)]
        for word in dict.fromkeys(case.word for case in cases):
            yield _measure(word, [case for case in cases if case.word == word], backend, device, dtype)


def _measure(word: str, cases: list[Case], backend: str, device: str, dtype: torch.dtype) -> Result:
    """The worst errors of the cases of one word, over both memory layouts."""
    forward = gradient = 0.0
    try:
        for case in cases:
            for layout in LAYOUTS:
                inputs = {name: cast(value, name, device, dtype, layout) for name, value in case.inputs.items()}
                exact = {name: value.double() for name, value in inputs.items()}
                with effnet_ops.use_backend("reference"):
                    ref = differentiate(case.function, exact, dtype)
                with effnet_ops.use_backend(backend):
                    out = differentiate(case.function, inputs, dtype)
                forward = max(forward, _error(out[0], ref[0]))
                gradient = max(gradient, *(_error(o, r) for o, r in zip(out[1:], ref[1:], strict=True)))
    except RuntimeError as error:
        return Result(word, dtype, float("nan"), float("nan"), str(error).splitlines()[0])
    return Result(word, dtype, forward, gradient, "")


def cast(value: Tensor, name: str, device: str, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Activations in ``dtype``; parameters too, but fp32 where that is half, as in mixed-precision training."""
    if name == "x":
        return value.to(device, dtype).contiguous(memory_format=layout)
    return value.to(device, torch.float32 if dtype.itemsize == 2 else dtype)


def _weights(y: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, dtype)


def differentiate(function: Callable[[Inputs], Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The output y of the function, and the gradient of sum(y * w) for each input; w has numbers of ``dtype``."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = function(leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), _weights(y, dtype).to(y.dtype))]


def _error(out: Tensor, ref: Tensor) -> float:
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()


def _table(title: str, results: list[Result]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("operator", "dtype", "forward / bound", "gradient / bound"):
        table.add_column(heading)
    table.add_column("", overflow="fold")
    for result in results:
        bound = BOUNDS[result.dtype]
        errors = (f"{result.forward:.1e} / {bound.forward:.0e}", f"{result.gradient:.1e} / {bound.gradient:.0e}")
        verdict = "[green]pass[/green]" if result.passed else f"[red]FAIL[/red] {escape(result.problem)}"
        table.add_row(result.word, str(result.dtype).removeprefix("torch."), *errors, verdict)
    return table
