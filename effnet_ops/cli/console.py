"""What all sub-commands share: the console, one-line errors with exit code 2, and optional packages."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import NoReturn

import typer
from rich.console import Console

from effnet_ops import backends
from effnet_ops.checks import unknown_name

console = Console()


def complain(message: object) -> None:
    typer.echo(f"effnet-ops: {message}", err=True)


def fail(message: object) -> NoReturn:
    complain(message)
    raise typer.Exit(2)


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
