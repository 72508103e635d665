"""The choice of tile sizes: the table first, then the rule, logged once, and never a measurement."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import torch

from effnet_ops.kernels import batch_norm, convolution, pointwise, squeeze_excite, tuning

SHAPE = {"images": 1, "pixels": 802816, "channels_in": 16, "channels_out": 96, "element_size": 2, "float16": 0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is chosen or announced before, and nothing stays that was chosen for an invented GPU."""
    tuning._chosen.cache_clear()
    tuning._announce.cache_clear()
    yield
    tuning._chosen.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda device: tuning.ARCHITECTURES["sm_90"])


def test_rule_is_logged_once(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="effnet_ops.kernels.tuning"):
        first = tuning.choose("pointwise_forward", SHAPE, CPU)
        assert tuning.choose("pointwise_forward", SHAPE, CPU) == first
        tuning.choose("pointwise_forward", {**SHAPE, "pixels": 802815}, CPU)
    assert [record.message for record in caplog.records] == [
        "no tuned configuration of pointwise_forward for sm_90 at channels_in=16,channels_out=96,element_size=2,"
        "float16=0,images=1,pixels=1048576: using the rule"
    ]


def test_unknown_gpu_runs_by_the_rule(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One that neither the table nor a test has heard of, with less shared memory; logged once for each shape."""
    unknown = tuning.Architecture("sm_999", 24, 99 * 1024)
    monkeypatch.setattr(tuning, "architecture", lambda device: unknown)
    with caplog.at_level(logging.INFO, logger="effnet_ops.kernels.tuning"):
        for _ in range(2):
            config = tuning.choose("pointwise_forward", SHAPE, CPU)
            tuning._chosen.cache_clear()
    assert config == tuning.from_rule("pointwise_forward", SHAPE, unknown)
    assert len(caplog.records) == 1 and "for sm_999 at" in caplog.text


def test_interpreter_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="effnet_ops.kernels.tuning"):
        tuning.choose("pointwise_forward", SHAPE, CPU)
    assert not caplog.records


def test_table_comes_first(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"block_p": 32, "num_warps": 2, "origin": "H200, measured"}
    table = {"pointwise_forward": {"sm_90": {tuning.bucket(SHAPE): entry}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    assert tuning.choose("pointwise_forward", SHAPE, CPU) == {"block_p": 32, "num_warps": 2}
    other = {**SHAPE, "channels_in": 24}
    assert tuning.choose("pointwise_forward", other, CPU)["block_reduced"] == 32


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match=r"pointwise_forwards.*pointwise_forward"):
        tuning.choose("pointwise_forwards", SHAPE, CPU)


def test_table_is_valid() -> None:
    """Each entry has its origin and the fields of its operation's rule, for known operations and architectures."""
    written = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
    assert set(written) == {"configurations"}
    for operation, architectures in written["configurations"].items():
        assert operation in tuning._heuristics
        for architecture, buckets in architectures.items():
            assert architecture.startswith("sm_")
            for name, entry in buckets.items():
                assert entry.pop("origin")
                shape = {key: int(value) for key, value in (part.split("=") for part in name.split(","))}
                arch = tuning.ARCHITECTURES.get(architecture, tuning.ARCHITECTURES["sm_90"])
                assert set(entry) == set(tuning.from_rule(operation, shape, arch))


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_rules_give_tiles_that_triton_takes(architecture: str) -> None:
    """Powers of two, at least 16 for a product, at least one part, for shapes from one pixel to millions."""
    arch = tuning.ARCHITECTURES[architecture]
    for module in (pointwise, convolution, batch_norm, squeeze_excite):
        assert module.tuning is tuning
    for images, pixels in ((1, 1), (1, 49), (1, 12544), (256, 49), (256, 12544), (1, 256 * 12544)):
        for c_in, c_out in ((1, 1), (16, 96), (96, 24), (3840, 640), (13, 19)):
            for size, float16 in ((2, 0), (2, 1), (4, 0)):
                shape = {"images": images, "pixels": pixels, "channels_in": c_in, "channels_out": c_out}
                shape |= {"channels": c_in, "reduced": max(1, c_in // 24), "sums": 5}
                shape |= {"element_size": size, "float16": float16}
                shape |= {"taps": 9, "phases": 4, "out_pixels": max(1, pixels // 4)}
                for operation in [name for name in tuning._heuristics if not name.startswith("depthwise")]:
                    config = tuning.from_rule(operation, shape, arch)
                    blocks = {key: value for key, value in config.items() if key.startswith("block")}
                    assert all(value & (value - 1) == 0 and value > 0 for value in blocks.values()), (operation, config)
                    if operation.startswith(("pointwise", "convolution")):
                        assert min(blocks.values()) >= 16, (operation, shape, config)
                    tiles = {key: value for key, value in config.items() if key != "fits"}
                    assert all(value >= 1 for value in tiles.values()), (operation, config)
