"""Tests that need an NVIDIA GPU; without one each of them is skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnet_ops import available_backends

HERE = Path(__file__).resolve().parent
REASONS = available_backends()
BACKENDS = ("cuda", "triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            callspec = getattr(item, "callspec", None)
            backend = callspec.params.get("gpu_backend", "triton") if callspec else "triton"
            if REASONS[backend]:
                item.add_marker(pytest.mark.skip(reason=f"backend {backend}: {REASONS[backend]}"))


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend for GPUs; a test that takes it must ask for it, by `use_backend`."""
    return request.param


@pytest.fixture(params=["triton", None], ids=["triton", "automatic"])
def block_request(request: pytest.FixtureRequest) -> str | None:
    """What a block is asked to run on: Triton alone, or, by the automatic choice, `cuda` for what is depthwise."""
    if request.param is None and REASONS["cuda"]:
        pytest.skip(f"backend cuda: {REASONS['cuda']}")
    return request.param
