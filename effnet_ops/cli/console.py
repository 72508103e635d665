"""What all sub-commands share: the console and its tables, one-line errors with exit code 2, optional packages."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from effnet_ops import backends
from effnet_ops.checks import unknown_name

console = Console()
LEAST_NAME = 8
"""Characters that are left of a column of names before figures would be cut."""


def complain(message: object) -> None:
    typer.echo(f"effnet-ops: {message}", err=True)


def fail(message: object) -> NoReturn:
    complain(message)
    raise typer.Exit(2)


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors of arguments and files as one line with exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(error)


def need_file(path: Path) -> None:
    """`fail` where ``path`` cannot be written, before the work whose result it shall keep; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def need_folder(path: Path) -> None:
    """As `need_file`, for a folder of results."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        fail(f"cannot write into the folder {path}: {error.strerror}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show(table: Table) -> None:
    """Print a table in which no number is cut, however narrow the terminal is.

    Where it does not fit, the widest columns give way: headings and texts wrap between words, the cells of ``no_wrap``
    columns stay whole, and names (``overflow="fold"``) break anywhere. What is still too wide leaves the terminal.
    """
    wide = console.options.update(width=100_000)
    widths, least = map(list, zip(*(_column_widths(column) for column in table.columns), strict=True))
    excess = Measurement.get(console, wide, table).maximum - console.width
    if excess > 0:
        while excess > 0 and widths != least:
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
            excess -= 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width, column.no_wrap = width, False
        if excess > 0:
            table.width = console.width + excess
    console.print(table, crop=False)


def _column_widths(column: Column) -> tuple[int, int]:
    """Characters that a column takes, and the least that it can do with."""
    wide = console.options.update(width=100_000)
    heads = [Measurement.get(console, wide, cell) for cell in (column.header, column.footer)]
    cells = [Measurement.get(console, wide, cell) for cell in column.cells]
    natural = max(measured.maximum for measured in (*heads, *cells))
    if column.overflow == "fold":
        return natural, min(natural, LEAST_NAME)
    least = [measured.maximum if column.no_wrap else measured.minimum for measured in cells]
    return natural, max([*least, *(measured.minimum for measured in heads)])


def need(module: str, *, extra: str = "demo") -> ModuleType:
    """Import an optional package, or say which command installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        fail(f"this needs the package {missing.split('.')[0]}: pip install 'effnet_ops[{extra}]'")


def on_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """`use_backend` for an option; None leaves the automatic choice."""
    if name is None:
        return contextlib.nullcontext()
    if name not in backends.BACKENDS:
        fail(unknown_name("backend", name, backends.BACKENDS))
    if reason := backends.available_backends()[name]:
        fail(f"backend {name!r} cannot run here: {reason}")
    return backends.use_backend(name)
