"""A designed network is a real one: it trains, fuses, folds, exports, and loads from a file without its code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import relative_difference, with_statistics

import effnet_ops
from effnet_ops import scaling
from effnet_ops.models import (
    EfficientNetFeatures,
    ScaledSpec,
    load_model,
    model_spec,
    save_model,
    spec_from_dict,
    spec_to_dict,
)
from effnet_ops.scaling.digits import TINY


def designed() -> ScaledSpec:
    """A network that a search gives."""
    points = scaling.search(target=2.0, tolerance=0.1).points
    law = points[len(points) // 2].point.law
    return law.spec(law.phi_for("60MMACs"))


SPEC = designed()


def test_a_designed_network_equals_its_reference_and_its_optimized_copy() -> None:
    model = with_statistics(effnet_ops.create_model(SPEC, num_classes=7, drop_path_rate=0.0)).double()
    x = torch.randn(2, 3, 65, 48, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        with effnet_ops.use_backend("reference"):
            assert relative_difference(y, model(x)) < 1e-12
        optimized = effnet_ops.optimize_for_inference(model)
        assert relative_difference(optimized(x), y) < 1e-12
    assert len(optimized.optimization_report.blocks) == sum(map(len, SPEC.stages()))


def test_a_designed_network_trains() -> None:
    torch.manual_seed(0)
    model = effnet_ops.create_model(scaling.CompoundScaling(base=TINY).spec(1.0), num_classes=2, in_chans=1)
    images = torch.randn(16, 1, 14, 14)
    labels = torch.arange(16) % 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_designed_network_exports() -> None:
    model = effnet_ops.create_model(scaling.CompoundScaling(base=TINY).spec(0.7)).eval()
    x = torch.randn(1, 3, 17, 17)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, model_spec("tf_efficientnet_lite1"), TINY], ids=lambda spec: spec.name)
def test_specifications_survive_json(spec: ScaledSpec) -> None:
    again = spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))))
    assert again == spec and again.stages() == spec.stages()


def test_models_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    keywords = dict(num_classes=5, in_chans=1, drop_rate=0.1, drop_path_rate=0.3)
    model = with_statistics_of_one_channel(effnet_ops.create_model(TINY, **keywords)).double()
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.spec == TINY and loaded.training
    assert {key: getattr(loaded, key) for key in keywords} == keywords
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert [path] == list(tmp_path.iterdir())


def with_statistics_of_one_channel(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 1, 16, 16))
    return model


def test_backbones_survive_a_file_too(tmp_path: Path) -> None:
    model = effnet_ops.create_model(TINY, features_only=True, drop_path_rate=0.2)
    save_model(model, tmp_path / "backbone.pt")
    loaded = load_model(tmp_path / "backbone.pt")
    assert type(loaded) is EfficientNetFeatures and loaded.drop_path_rate == 0.2
    x = torch.randn(1, 3, 16, 16)
    for a, b in zip(loaded.eval()(x), model.eval()(x), strict=True):
        assert torch.equal(a, b)


def test_files_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = effnet_ops.create_model(TINY)
    save_model(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.pt is damaged or no file of PyTorch"):
        load_model(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match="is damaged or no file of PyTorch"):
        load_model(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="was not written by"):
        load_model(path)
    path.write_bytes(whole)
    content = torch.load(path, weights_only=True)
    changed = copy.deepcopy(content)
    changed["specification"]["width"] = 2.0
    torch.save(changed, path)
    with pytest.raises(ValueError, match="does not describe a network"):
        load_model(path)
    del content["specification"]["architecture"]["stages"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="does not describe a network: this is no specification of a network"):
        load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "missing.pt")


def test_only_our_own_models_are_saved(tmp_path: Path) -> None:
    for model in (torch.nn.Linear(1, 1), effnet_ops.optimize_for_inference(torch.nn.Sequential(torch.nn.Linear(1, 1)))):
        with pytest.raises(TypeError, match=r"expected a model that effnet_ops\.create_model built"):
            save_model(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [{"width": -1.0}, {"depth": "deep"}, {"stages": 3}, {"architecture": None}], ids=str)
def test_damaged_specifications_are_refused(damage: dict) -> None:
    with pytest.raises(ValueError):
        spec_from_dict({**spec_to_dict(TINY), **damage})
