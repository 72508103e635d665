"""Counts and receptive fields against the published tables, PyTorch's counter and gradients."""

from __future__ import annotations

import pytest
import torch
from networks import on_meta
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops import scaling
from effnet_ops.models import ScaledSpec, model_spec

FAMILY = {
    "efficientnet_b0": (16, 5.289, 0.3858),
    "efficientnet_b1": (23, 7.794, 0.6868),
    "efficientnet_b2": (23, 9.110, 0.9936),
    "efficientnet_b3": (26, 12.233, 1.8271),
    "efficientnet_b4": (32, 19.342, 4.3938),
    "efficientnet_b5": (39, 30.390, 10.2664),
    "efficientnet_b6": (45, 43.041, 19.0676),
    "efficientnet_b7": (55, 66.348, 37.7459),
    "efficientnet_b8": (61, 87.413, 62.5975),
    "efficientnet_l2": (88, 480.309, 475.7037),
    "efficientnet_lite0": (16, 4.652, 0.3852),
    "efficientnet_lite1": (21, 5.417, 0.6002),
    "efficientnet_lite2": (21, 6.092, 0.8597),
    "efficientnet_lite3": (24, 8.197, 1.3833),
    "efficientnet_lite4": (30, 13.007, 2.5530),
    "tf_efficientnetv2_b0": (21, 7.140, 0.7181),
    "tf_efficientnetv2_b1": (27, 8.141, 1.1968),
    "tf_efficientnetv2_b2": (28, 10.096, 1.6975),
    "tf_efficientnetv2_b3": (32, 14.358, 3.0115),
    "efficientnetv2_s": (40, 21.458, 8.3656),
    "efficientnetv2_m": (57, 54.139, 24.5825),
    "efficientnetv2_l": (79, 118.515, 56.0797),
    "efficientnetv2_xl": (100, 208.120, 93.3535),
}
"""Blocks, million parameters, giga multiply-adds at the published resolution."""

RECEPTIVE_FIELDS = {"b0": 851, "b1": 1183, "b2": 1183, "b3": 1407, "b4": 1799, "b5": 2131, "b6": 2523, "b7": 3079}


def counted(model: torch.nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILY)
def test_family_matches_the_published_table(name: str) -> None:
    blocks, parameters, macs = FAMILY[name]
    count = scaling.count(name)
    assert sum(stage.blocks for stage in count.stages) == blocks
    assert round(count.parameters / 1e6, 3) == parameters
    assert round(count.macs / 1e9, 4) == macs
    tensorflow = scaling.count(f"tf_{name.removeprefix('tf_')}")
    assert (tensorflow.parameters, tensorflow.macs) == (count.parameters, count.macs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if blocks > 30 else []) for name, (blocks, *_) in FAMILY.items()]
)
def test_count_equals_the_built_model(name: str) -> None:
    model = on_meta(lambda: effnet_ops.create_model(name))
    count = scaling.count(model)
    assert count.parameters == sum(p.numel() for p in model.parameters())
    assert count.flops == counted(model, 1, 3, *count.resolution) == 2 * count.macs


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0"])
@pytest.mark.parametrize("size", [(65, 97), (1, 1), (224, 33)])
def test_odd_sizes_and_batches(name: str, size: tuple[int, int]) -> None:
    model = on_meta(lambda: effnet_ops.create_model(name, num_classes=7, in_chans=1))
    assert scaling.count(model, size, batch=3).flops == counted(model, 3, 1, *size)


@pytest.mark.parametrize("keywords", [dict(num_classes=0), dict(features_only=True)], ids=str)
def test_networks_without_a_classifier(keywords: dict) -> None:
    model = on_meta(lambda: effnet_ops.create_model("efficientnet_lite0", **keywords))
    count = scaling.count(model, 64)
    assert count.flops == counted(model, 1, 3, 64, 64)
    assert count.parameters == sum(p.numel() for p in model.parameters())


def test_layers_add_up_and_match_the_modules() -> None:
    model = on_meta(lambda: effnet_ops.create_model("efficientnet_b0"))
    count = scaling.count("efficientnet_b0")
    modules = dict(model.named_modules())
    shapes = {}
    for layer in count.layers:
        module = modules[layer.name]
        module.register_forward_hook(lambda _, args, out, n=layer.name: shapes.update({n: (args[0].shape, out.shape)}))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(shapes) == len(count.layers) == 82
    for layer in count.layers:
        taken, given = (tuple(shape[1:]) + (1, 1) * (len(shape) == 2) for shape in shapes[layer.name])
        assert (layer.in_shape, layer.out_shape) == (taken, given)
        assert layer.activations == torch.Size(given).numel()
    for total in ("parameters", "macs", "activations"):
        assert getattr(count, total) == sum(getattr(row, total) for row in count.layers)
        assert getattr(count, total) == sum(getattr(row, total) for row in count.stages)


def test_stages_of_b0() -> None:
    stages = scaling.count("efficientnet_b0").stages
    assert [stage.name for stage in stages] == ["stem", *(f"stage {i}" for i in range(1, 8)), "head"]
    assert [stage.blocks for stage in stages] == [0, 1, 2, 2, 3, 3, 4, 1, 0]
    channels = [(32, 112), (16, 112), (24, 56), (40, 28), (80, 14), (112, 14), (192, 7), (320, 7), (1280, 7)]
    assert [stage.out_shape for stage in stages] == [(c, size, size) for c, size in channels]


def test_batch_multiplies_the_work_only() -> None:
    one, four = scaling.count("efficientnet_b1"), scaling.count("efficientnet_b1", batch=4)
    assert (four.macs, four.activations, four.parameters) == (4 * one.macs, 4 * one.activations, one.parameters)


@pytest.mark.parametrize("member", RECEPTIVE_FIELDS)
def test_receptive_field_of_the_family(member: str) -> None:
    field = scaling.receptive_field(f"efficientnet_{member}")
    assert field.size == RECEPTIVE_FIELDS[member]
    assert [stage.sees_all for stage in field.stages] == [False] + [True] * 7


def test_receptive_field_of_v2_b0_by_stage() -> None:
    """A dense convolution counts as a depthwise one; gates come with the fourth stage."""
    stages = scaling.receptive_field("tf_efficientnetv2_b0").stages
    assert [stage.size for stage in stages] == [3, 7, 19, 43, 123, 283, 763]
    assert [stage.sees_all for stage in stages] == [False] * 4 + [True] * 3


def test_bytes_of_fused_blocks() -> None:
    """Fused, the expanded tensor is never in memory but in training, which keeps it; a residual is read once more."""
    layers = {layer.name: layer for layer in scaling.count("tf_efficientnetv2_b0", 32).layers}
    expand, project = layers["blocks.1.1.conv_exp"], layers["blocks.1.1.conv_pwl"]
    small, wide = 4 * 32 * 8 * 8, 4 * 128 * 8 * 8
    assert (expand.fused_bytes, project.fused_bytes) == (small, 2 * small)
    assert (expand.stock_bytes, project.stock_bytes) == (small + 5 * wide, wide + 6 * small)
    assert (expand.fused_saved_bytes, project.fused_saved_bytes) == (small + wide, small)


def test_receptive_field_of_b0_by_stage() -> None:
    stages = scaling.receptive_field("efficientnet_b0").stages
    assert [stage.size for stage in stages] == [3, 7, 19, 67, 147, 339, 787, 851]
    assert [stage.stride for stage in stages] == [2, 2, 4, 8, 16, 16, 32, 32]


def test_receptive_field_is_what_gradients_reach() -> None:
    """One output pixel of Lite0, which has no gates, with positive weights that nothing clips."""
    field = scaling.receptive_field("efficientnet_lite0")
    assert not any(stage.sees_all for stage in field.stages)
    model = effnet_ops.create_model("efficientnet_lite0", features_only=True).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 0.5 / module.weight[0].numel())
    x = torch.ones(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    sizes = {stage.name: stage.size for stage in field.stages}
    for features, name in zip(model(x)[:3], ("stage 1", "stage 2", "stage 3"), strict=True):
        middle = features.shape[-1] // 2
        (grad,) = torch.autograd.grad(features[0, 0, middle, middle], x, retain_graph=True)
        reached = int((grad[0, 0].abs().amax(0) > 0).sum())
        assert reached == sizes[name]


def test_a_specification_of_ones_own() -> None:
    spec = ScaledSpec(model_spec("efficientnet_b0").architecture, width=0.5, depth=0.7, resolution=96)
    model = on_meta(lambda: effnet_ops.create_model(spec))
    assert scaling.count(spec).flops == counted(model, 1, 3, 96, 96)
    assert scaling.count(spec).parameters == sum(p.numel() for p in model.parameters())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="did you mean 'efficientnet_b0'"):
        scaling.count("eficientnet_b0")
    with pytest.raises(ValueError, match="resolution must be at least 1"):
        scaling.count("efficientnet_b0", 0)
    with pytest.raises(ValueError, match="batch"):
        scaling.count("efficientnet_b0", batch=0)
    with pytest.raises(TypeError, match="got Linear"):
        scaling.receptive_field(torch.nn.Linear(2, 2))
