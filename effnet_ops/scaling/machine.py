"""What a measurement depends on: the machine, and the software that ran on it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch


@functools.cache
def cpu_model() -> str:
    """The processor's name as the operating system has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def version() -> str:
    """This package's version, also where it runs from its source."""
    try:
        return importlib.metadata.version("effnet_ops")
    except importlib.metadata.PackageNotFoundError:
        return "source"


@functools.cache
def origin() -> str:
    """Machine and versions in one line, for the rows of a run."""
    return f"{cpu_model()}, torch {torch.__version__}, effnet_ops {version()}, Python {platform.python_version()}"
