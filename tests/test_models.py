"""The EfficientNet module: timm's names and numbers, its variants, its initialisation, and how it is used."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from networks import on_meta, relative_difference, with_statistics
from torch import Tensor, nn

import effnet_ops
from effnet_ops import create_model, layers, list_models
from effnet_ops.models import ArchitectureSpec, Convention, ScaledSpec, StageSpec, model_spec

TINY = ScaledSpec(
    ArchitectureSpec(
        stages=(
            StageSpec(repeats=1, kernel_size=3, stride=1, expand_ratio=1, out_channels=8),
            StageSpec(repeats=2, kernel_size=5, stride=2, expand_ratio=4, out_channels=16),
            StageSpec(repeats=2, kernel_size=3, stride=2, expand_ratio=4, out_channels=24, se_ratio=0.0),
        ),
        stem_channels=8,
        head_channels=32,
    ),
    convention=Convention(eps=1e-3, momentum=0.1, padding="same"),
    name="tiny",
)


def tiny(**keywords) -> nn.Module:
    return create_model(TINY, **{"num_classes": 10, "drop_rate": 0.0, "drop_path_rate": 0.0, **keywords})


def without_chance(name: str) -> nn.Module:
    return create_model(name, drop_rate=0.0, drop_path_rate=0.0)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnet_lite0", "tf_efficientnetv2_b0"]
)
def test_forward_and_training_step_equal_timm(name: str) -> None:
    theirs = with_statistics(timm.create_model(name), 40).double()
    ours = without_chance(name).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 45, 38, dtype=torch.float64)
    with torch.no_grad():
        assert relative_difference(ours.eval()(x), theirs.eval()(x)) < 1e-11
    results = []
    for model in (ours, theirs):
        y = model.train()(x)
        y.square().sum().backward()
        results.append({**{k: p.grad for k, p in model.named_parameters()}, **dict(model.named_buffers()), "y": y})
    scale = sorted(p.grad.norm().item() for p in theirs.parameters())[len(list(theirs.parameters())) // 2]
    for key, value in results[1].items():
        error = (results[0][key] - value).double().norm().item()
        assert error <= 1e-8 * max(value.double().norm().item(), scale), key


@pytest.mark.parametrize("size", [(1, 1), (33, 65), (2, 31)])
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_lite0"])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    ours, theirs = without_chance(name).eval(), timm.create_model(name).eval()
    with_statistics(theirs, 32).double()
    ours.double().load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative_difference(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_b4", "tf_efficientnet_lite2", "tf_efficientnetv2_b3"]
)
def test_features_equal_timm(name: str) -> None:
    ours, theirs = create_model(name, features_only=True).eval(), timm.create_model(name, features_only=True).eval()
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert ours.feature_info.module_name() == theirs.feature_info.module_name()
    ours.double().load_state_dict(theirs.double().state_dict())
    x = torch.randn(1, 3, 50, 64, dtype=torch.float64)
    with torch.no_grad():
        features, expected = ours(x), theirs(x)
    assert [f.shape[1] for f in features] == ours.feature_info.channels()
    for feature, value in zip(features, expected, strict=True):
        assert relative_difference(feature, value) < 1e-10


def test_features_of_a_network_that_strides_at_once() -> None:
    stages = tuple(StageSpec(1, 3, stride, 2, 8) for stride in (2, 1, 2))
    model = create_model(ScaledSpec(ArchitectureSpec(stages, stem_channels=8)), features_only=True).eval()
    assert model.feature_info.module_name() == ["bn1", "blocks.1", "blocks.2"]
    assert [tuple(f.shape[2:]) for f in model(torch.randn(1, 3, 16, 16))] == [(8, 8), (4, 4), (2, 2)]


def test_head_and_classifier() -> None:
    model = with_statistics(tiny())
    x = torch.randn(2, 3, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 32, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3 and not model.classifier.training
    model.double().reset_classifier(4)
    assert model(x.double()).shape == (2, 4)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x.double()).float(), pooled, rtol=1e-4, atol=1e-5)
    assert tiny(num_classes=0)(x).shape == (2, 32)
    assert tiny(in_chans=5)(torch.randn(2, 5, 8, 8)).shape == (2, 10)


def test_drop_rates() -> None:
    model = on_meta(lambda: create_model("efficientnet_b0", drop_path_rate=0.32))
    blocks = [module for module in model.modules() if isinstance(module, layers.MBConv)]
    assert [block.drop_path_rate for block in blocks] == pytest.approx([0.32 * i / 16 for i in range(16)])
    published = on_meta(lambda: create_model("efficientnet_b4"))
    assert (published.drop_rate, published.blocks[6][-1].drop_path_rate) == (0.4, pytest.approx(0.2 * 31 / 32))
    dropped = tiny(drop_rate=0.5, num_classes=0).train()
    assert 0.3 < (dropped.forward_head(torch.ones(20, 32, 1, 1)) == 0).double().mean() < 0.7
    assert dropped.eval().forward_head(torch.ones(2, 32, 1, 1)).eq(1).all()


def test_initialisation_is_tensorflows() -> None:
    """Standard deviations over many weights: their own relative error is 1 / sqrt(2 n), of which 5 are allowed."""
    model = create_model("efficientnet_b0")
    seen = {"dense": 0, "depthwise": 0}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            n = module.weight.numel()
            depthwise = module.groups > 1
            fan_out = math.prod(module.kernel_size) * (1 if depthwise else module.out_channels)
            expected = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
            assert abs(module.weight.mean().item()) < 5 * expected / math.sqrt(n)
            assert module.bias is None or not module.bias.any()
            seen["depthwise" if depthwise else "dense"] += 1
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and not module.bias.any()
    assert seen == {"dense": 65, "depthwise": 16}
    bound = 1 / math.sqrt(1000)
    weight = model.classifier.weight
    assert 0.999 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not model.classifier.bias.any()


def test_names() -> None:
    assert len(list_models()) == 42 and list_models() == sorted(list_models())
    assert list_models("tf_*lite?") == [f"tf_efficientnet_lite{i}" for i in range(5)]
    assert set(list_models()) <= set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "keywords", "culprit"),
    [
        ("eficientnet-b0", {}, "did you mean 'efficientnet_b0'"),
        ("resnet50", {}, "unknown model 'resnet50'"),
        ("efficientnet_v2_s", {}, "did you mean 'efficientnetv2_s'"),
        ("efficientnetv2_b0", {}, "did you mean 'tf_efficientnetv2_b0'\\?$"),
        ("torchvision:efficientnet_b9", {}, "unknown torchvision model"),
        ("keras:efficientnet_b0", {}, "unknown library 'keras'"),
        (TINY, dict(num_classes=-1), "num_classes .* got -1"),
        (TINY, dict(num_classes=2.5), "num_classes .* got 2.5"),
        (TINY, dict(in_chans=0), "in_chans .* got 0"),
        (TINY, dict(drop_rate=1.0), "drop_rate .* got 1.0"),
        (TINY, dict(drop_path_rate=-0.1), "drop_path_rate .* got -0.1"),
        (TINY, dict(drop_path_rate="0.1"), "drop_path_rate .* got '0.1'"),
        (TINY, dict(drop_rate=7, features_only=True), "drop_rate .* got 7"),
        (TINY, dict(num_classes=-3, features_only=True), "num_classes .* got -3"),
    ],
)
def test_bad_arguments_are_named(name, keywords: dict, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        create_model(name, **keywords)
    with pytest.raises(TypeError, match="got int"):
        create_model(7)


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (lambda: StageSpec(1, 3, 1, 6, 16, block="fused"), "unknown block 'fused'"),
        (lambda: StageSpec(0, 3, 1, 6, 16), "repeats"),
        (lambda: StageSpec(1, 3, 1, 0.5, 16), "expand_ratio"),
        (lambda: StageSpec(1, 3, 1, float("nan"), 16), "expand_ratio must be a number of at least 1"),
        (lambda: StageSpec(1, 3, 1, None, 16), "expand_ratio must be a number"),
        (lambda: StageSpec(1, 3, 1, 6, 16, se_ratio=2.0), "se_ratio"),
        (lambda: StageSpec(1, 3, 1, 6, 16, se_ratio="half"), "se_ratio must lie in"),
        (lambda: ArchitectureSpec(()), "at least one stage"),
        (lambda: ArchitectureSpec(TINY.architecture.stages, activation="swish"), "'swish'"),
        (lambda: ArchitectureSpec(TINY.architecture.stages, round_limit=-1), "round_limit must lie in"),
        (lambda: ScaledSpec(TINY.architecture, train_resolution=0), "train_resolution"),
        (lambda: ScaledSpec(TINY.architecture, width=0.0), "width"),
        (lambda: ScaledSpec(TINY.architecture, depth=math.inf), "depth"),
        (lambda: ScaledSpec(TINY.architecture, resolution=224.5), "resolution"),
        (lambda: Convention(padding="valid"), "unknown padding 'valid'"),
        (lambda: Convention(eps=-1.0), "eps"),
        (lambda: Convention(momentum=None), "momentum must lie in"),
        (lambda: model_spec(["efficientnet_b0"]), "unknown model"),
    ],
)
def test_bad_specifications_are_named(build: Callable, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        build()


def test_rounding_of_channels_and_repeats() -> None:
    """The one place in B0 to L2 where the 10 % rule fires: 16 * 1.2 = 19.2 becomes 24, not 16."""
    assert model_spec("efficientnet_b3").stages()[0][0].out_channels == 24
    assert model_spec("efficientnet_lite4").stem_channels == 32
    assert model_spec("efficientnet_lite4").head_channels == 1280
    assert [len(stage) for stage in model_spec("efficientnet_lite1").stages()] == [1, 3, 3, 4, 4, 5, 1]
    assert [len(stage) for stage in model_spec("efficientnet_b1").stages()] == [2, 3, 3, 4, 4, 5, 2]
    # EfficientNetV2 has no such rule.
    assert model_spec("tf_efficientnetv2_b3").stages()[0][0].out_channels == 16
    ends = [(spec.stem_channels, spec.head_channels) for spec in map(model_spec, list_models("tf_efficientnetv2_b?"))]
    assert ends == [(32, 1280), (32, 1280), (32, 1408), (40, 1536)]


def test_resolutions_of_v2() -> None:
    """What timm says of each network's images, in training and for the test."""
    for name in list_models("tf_efficientnetv2_*"):
        spec, theirs = model_spec(name), timm.models.get_pretrained_cfg(name)
        assert (spec.train_resolution, spec.resolution) == (theirs.input_size[-1], theirs.test_input_size[-1])


def test_weights_of_another_network_are_named_before_anything_is_loaded() -> None:
    model = create_model("efficientnet_b0")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = create_model("tf_efficientnetv2_b0", num_classes=7).state_dict()
    with pytest.raises(RuntimeError, match="weights of an efficientnetv2_b0, and this network is an efficientnet_b0"):
        model.load_state_dict(other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"conv_stem.weight": before["conv_stem.weight"]})


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _state(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = create_model(model.spec, num_classes=10).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved, _state],
    ids=["deepcopy", "pickle", "save", "state"],
)
def test_copies_are_independent_and_equal(copied: Callable) -> None:
    model = with_statistics(tiny())
    x = torch.randn(2, 3, 17, 20)
    expected = model(x)
    twin = copied(model)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert twin.feature_info.channels() == model.feature_info.channels()
    with torch.no_grad():
        model.conv_stem.weight.zero_()
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


def test_memory_formats() -> None:
    model = with_statistics(tiny())
    x = torch.randn(3, 3, 19, 22)
    expected = model(x)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.transpose(2, 3).contiguous().transpose(2, 3)), expected, rtol=1e-4, atol=1e-5)
    model.to(memory_format=torch.channels_last)
    assert model.forward_features(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training: bool) -> None:
    model = with_statistics(tiny()).train(training)
    before = {name: value.clone() for name, value in model.named_buffers() if "num_batches" not in name}
    x = torch.randn(0, 3, 16, 16, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(value, model.get_buffer(name)) for name, value in before.items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_one_pixel_in_training_is_an_error_before_anything_changes() -> None:
    model = tiny().train()
    block = model.blocks[1][0]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 8, 1, 1))
    assert block.bn1.num_batches_tracked == 0


def test_checkpointing_gives_the_same_gradients_and_updates_statistics_once() -> None:
    plain = with_statistics(tiny()).double().train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in plain.named_buffers():
        torch.testing.assert_close(saving.get_buffer(name), value)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training: bool) -> None:
    model = with_statistics(tiny()).double().train(training)
    x = torch.randn(3, 3, 17, 20, dtype=torch.float64)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in model.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), value)


def test_exports_for_every_image_size() -> None:
    """Stock SAME padding fails here: it fixes the size that it was traced with."""
    model = with_statistics(tiny())
    dims = {
        axis: torch.export.Dim(name, min=low, max=256) for axis, name, low in ((0, "n", 1), (2, "h", 32), (3, "w", 32))
    }
    program = torch.export.export(model, (torch.randn(2, 3, 40, 48),), dynamic_shapes=(dims,)).module()
    for shape in ((1, 3, 65, 33), (3, 3, 64, 99)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_functional_call_uses_the_given_parameters(training: bool) -> None:
    model, other = with_statistics(tiny()).train(training), with_statistics(tiny()).train(training)
    x = torch.randn(2, 3, 16, 16)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = with_statistics(tiny())
    x = torch.randn(2, 3, 24, 24)
    expected = model(x)
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_difference(y.float(), expected) < 5e-2


def test_autocast() -> None:
    model = with_statistics(tiny())
    x = torch.randn(2, 3, 24, 24)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_difference(y.float(), expected) < 5e-2


def test_learns() -> None:
    """Fused gradients move a whole network: it tells brighter images from darker ones in a few steps."""
    model = tiny(num_classes=2, in_chans=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = torch.arange(16) % 2

    def images() -> Tensor:
        return torch.randn(16, 1, 16, 16) * 0.3 + labels[:, None, None, None]

    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_specification_travels_with_the_model() -> None:
    model = create_model(TINY)
    assert model.spec is TINY
    assert create_model("torchvision:efficientnet_b0").spec.convention == Convention(1e-5, 0.1, "symmetric")
    assert effnet_ops.create_model("tf_efficientnet_b0", num_classes=0).spec.convention.padding == "same"
