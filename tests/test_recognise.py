"""Blocks recognised by what they compute: of other libraries and of a user's own classes; and what is refused."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import sys
import time
import types
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from surgery_models import (
    CHANNELS,
    assert_same_results,
    timm_block,
    timm_inverted,
    timm_separable,
    torchvision_block,
    with_statistics_of,
)
from test_surgery import is_fused
from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import maxxvit
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from effnet_ops import optimize_for_inference, register_block, replace_layers, restore_layers
from effnet_ops.surgery import recognise
from effnet_ops.surgery.folding import SteppedBlock

WIDE = 4 * CHANNELS


@pytest.fixture(autouse=True)
def own_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes of these tests are taken for those of a library."""
    monkeypatch.setattr(recognise, "LIBRARIES", {*recognise.LIBRARIES, __name__, "surgery_models", "test_surgery"})
    # The set itself, to which an adapter that is loaded meanwhile adds, too.
    recognise.DROP_PATHS.add(drop_connect)
    yield
    recognise.DROP_PATHS.discard(drop_connect)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, CHANNELS, 12, 10, dtype=torch.float64)


class ConvNorm(nn.Sequential):
    """A sequence without a forward of its own."""

    def __init__(self, *args: int, **settings: int) -> None:
        super().__init__(PlainConv(*args, bias=False, **settings), nn.BatchNorm2d(args[1]))


class PlainConv(nn.Conv2d):
    """A convolution without a forward of its own."""


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3.0) / 6.0


class Gate(nn.Module):
    """Squeeze-and-excitation in functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(WIDE, 4, 1), nn.Conv2d(4, WIDE, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return self.expand(F.relu(self.reduce(s))).sigmoid() * x


class Scale(nn.Module):
    """A layer scale, which is no part of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OwnBlock(nn.Module):
    """A block as somebody writes it; subclasses change one thing."""

    def __init__(self, act: type[nn.Module] = Swish, before: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.before, self.after = before, after
        self.expand, self.middle = ConvNorm(CHANNELS, WIDE, 1), ConvNorm(WIDE, WIDE, 3, groups=WIDE)
        self.act, self.gate, self.project = act(), Gate(), ConvNorm(WIDE, CHANNELS, 1)

    def shortcut(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.before is None else self.before(x)
        y = F.pad(self.act(self.expand(y)), (1, 1, 1, 1))
        y = self.project(self.gate(self.act(self.middle(y))))
        if self.after is not None:
            y = self.after(y)
        return torch.add(self.shortcut(x), y)


@register_block
class WithoutNorms(nn.Module):
    """What stands in EfficientViT and in decoders: some or all normalisations are missing."""

    def __init__(self, last: bool, expands: bool = True) -> None:
        super().__init__()
        wide = 24 if expands else CHANNELS
        self.expand = nn.Sequential(nn.Conv2d(CHANNELS, wide, 1), nn.Hardswish()) if expands else nn.Identity()
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.Hardswish(), nn.Dropout(0.0))
        self.project = nn.Conv2d(wide, CHANNELS, 1, bias=not last)
        self.norm = nn.BatchNorm2d(CHANNELS) if last else nn.Identity()
        self.act, self.drop = nn.GELU("tanh"), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.drop(self.norm(self.project(self.depthwise(self.expand(x))))))


class Pooled(OwnBlock):
    def __init__(self) -> None:
        super().__init__(before=nn.BatchNorm2d(CHANNELS))
        self.pool = nn.AvgPool2d(3, 1, 1)

    def shortcut(self, x: Tensor) -> Tensor:
        return self.pool(x)


def frozen(build: Callable[[], nn.Module]) -> nn.Module:
    block = build()
    for module in list(block.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = FrozenBatchNorm2d(child.num_features).double()
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return block


def maxvit_block(stride: int = 1, **settings: object) -> nn.Module:
    config = maxxvit.MaxxVitConvCfg(
        expand_ratio=4, stride_mode="dw", act_layer="silu", norm_layer="batchnorm2d", **settings
    )
    return with_statistics_of(maxxvit.MbConvBlock(CHANNELS, CHANNELS, stride, cfg=config))


def universal(*kernels: int, **settings: object) -> nn.Module:
    block = timm_blocks.UniversalInvertedResidual(CHANNELS, CHANNELS, *kernels, layer_scale_init_value=0.5, **settings)
    return with_statistics_of(block)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "own": lambda: with_statistics_of(OwnBlock()),
    "own, hard swish": lambda: with_statistics_of(OwnBlock(HardSwish)),
    "own, layer scale": lambda: with_statistics_of(OwnBlock(after=Scale())),
    "own, dropout of elements": lambda: with_statistics_of(OwnBlock(after=nn.Dropout(0.5))),
    "activation behind the sum": lambda: with_statistics_of(WithoutNorms(True)),
    "no normalisations": lambda: with_statistics_of(WithoutNorms(False)),
    "no normalisations, no expansion": lambda: with_statistics_of(WithoutNorms(False, expands=False)),
    "own, norm before and another shortcut": lambda: with_statistics_of(Pooled()),
    "sequence": lambda: with_statistics_of(
        nn.Sequential(
            *ConvNorm(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
            nn.ReLU6(),
            *ConvNorm(CHANNELS, 4, 1),
            nn.ReLU(),
        )
    ),
    "timm frozen": lambda: timm.layers.freeze_batch_norm_2d(timm_block()).double(),
    "timm space to depth": lambda: with_statistics_of(timm_inverted(s2d=1, noskip=True)),
    "timm dropout of elements": lambda: with_statistics_of(with_dropout(timm_inverted())),
    "timm activation before the residual": lambda: with_statistics_of(timm_separable(pw_act=True)),
    "timm universal": lambda: universal(0, 3, 0),
    "timm universal with more": lambda: universal(3, 5, 3, drop_path_rate=0.5),
    "timm MaxViT": maxvit_block,
    "timm MaxViT, drop path": lambda: with_statistics_of(maxvit_drop()),
    "timm MaxViT, stride": lambda: maxvit_block(2),
    "torchvision frozen": lambda: frozen(torchvision_block),
}


def maxvit_drop() -> nn.Module:
    block = maxvit_block().float()
    block.drop_path = timm.layers.DropPath(0.5)
    return block


def with_dropout(block: nn.Module) -> nn.Module:
    block.drop_path = nn.Dropout(0.5)
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, x: Tensor) -> None:
    block = BLOCKS[name]()
    stock, before = copy.deepcopy(block), block(x)
    report = replace_layers(block)
    assert report.replaced == [""] and report.skipped == {} and report.kinds == {"": "block"}
    assert not torch.equal(block(x), before)
    assert_same_results(block, stock, x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block) and torch.equal(twin(x), block(x))
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(stock)(x), before)
    restore_layers(block)
    assert [type(m) for m in block.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "elements" not in name])
@torch.no_grad()
def test_copy_in_half_precision(name: str, x: Tensor) -> None:
    block, x = BLOCKS[name]().float(), x.float()
    y, found = block(x), optimize_for_inference(block, dtype=torch.bfloat16)(x)
    assert found.dtype is x.dtype and (found - y).norm() <= 1e-2 * y.norm()


@pytest.mark.parametrize(
    "name", ["own, norm before and another shortcut", "own, layer scale", "activation behind the sum", "timm MaxViT"]
)
@torch.no_grad()
def test_copy_folds_what_is_between_its_steps(name: str, x: Tensor) -> None:
    stock = BLOCKS[name]()
    optimized = optimize_for_inference(stock)
    assert optimized.optimization_report.blocks == [""] and isinstance(optimized.value(), SteppedBlock)
    for _ in range(2):
        torch.testing.assert_close(optimized(x), stock(x), rtol=1e-9, atol=1e-9)
        for module in (optimized, stock):
            for value in filter(Tensor.is_floating_point, (*module.parameters(), *module.buffers())):
                value.mul_(1.25)


class Remembers(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class UsedTwice(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1, 1, 1))))
        return self.project(self.gate(y)) + self.project(y)


class BySize(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] > 20 else x


class Asks(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


class NormBetween(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(Gate(), nn.BatchNorm2d(WIDE))


class ReflectingPad(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.act(self.expand(x)), (1, 1, 1, 1), mode="reflect")
        return self.project(self.act(self.middle(y)))


class DropsAlone(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.twice


class Counts(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Unregistered(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layers[0](x))


class Configured(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"residual": True}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.config["residual"] else x


class NegativePad(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.pad(self.act(self.expand(x)), (2, 2, 2, 2)), (-1, -1, -1, -1))
        return self.project(self.act(self.middle(y)))


class WidthPad(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1)))))


class AddsItself(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1, 1, 1)))))
        return y + y


class InPlace(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        x += self.project(self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1, 1, 1)))))
        return x


class InPlaceMethod(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.project(self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1, 1, 1))))))


class Replicates(nn.ZeroPad2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, mode="replicate")


class PadModule(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.pad = Replicates(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.middle(self.pad(self.act(self.expand(x))))))


class SigmoidBlock(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.middle(F.pad(torch.sigmoid(self.expand(x)), (1, 1, 1, 1))))
        return self.project(y)


class DrawsTwice(OwnBlock):
    def __init__(self) -> None:
        super().__init__(before=nn.Dropout(0.3), after=nn.Dropout(0.3))


class CheckingNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        assert input.shape[1] == WIDE


class NormThatChecks(OwnBlock):
    def __init__(self) -> None:
        super().__init__()
        self.middle[1] = CheckingNorm(WIDE)


class TwiceShifted(nn.Module):
    """Nearly hardswish."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x.add(3, alpha=2)) / 6


class NearlyHardswish(OwnBlock):
    def __init__(self) -> None:
        super().__init__(act=TwiceShifted)


class OneGate(OwnBlock):
    """One gate for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.expand = nn.Conv2d(4, 1, 1)


class Reduces(OwnBlock):
    def __reduce__(self) -> tuple:
        return Reduces, ()


def drop_connect(x: Tensor, rate: float, training: bool) -> Tensor:
    """What a library calls its drop path."""
    if not training:
        return x
    return x / (1 - rate) * torch.floor(1 - rate + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype))


class Dropping(OwnBlock):
    def branch(self, x: Tensor) -> Tensor:
        y = self.act(self.middle(F.pad(self.act(self.expand(x)), (1, 1, 1, 1))))
        return self.project(self.gate(y))


class DropsAlways(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return x + drop_connect(self.branch(x), 0.5, True)


class DropsByModeOfNorm(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return x + drop_connect(self.branch(x), 0.5, self.project[1].training)


class DropsAtDefault(Dropping):
    """A drop rate of the call that has a default other than None."""

    def forward(self, x: Tensor, drop_connect_rate: float = 0.5) -> Tensor:
        return x + drop_connect(self.branch(x), drop_connect_rate, self.training)


class OnlyForOthers(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x if isinstance(x, Tensor) else super().forward(x)


class InheritsQuestion(OnlyForOthers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


REFUSED: dict[str, tuple[type[OwnBlock], str]] = {
    "pads by less than nothing": (NegativePad, "it calls pad, which is not fused"),
    "pads the width alone": (WidthPad, "it calls pad, which is not fused"),
    "adds itself": (AddsItself, "both parts of its sum use the same values"),
    "writes into its input": (InPlace, "it changes the tensor that it is given"),
    "writes into its input by a method": (InPlaceMethod, "it changes the tensor that it is given"),
    "a subclass of zero padding": (PadModule, "pad is Replicates"),
    "a gate for an activation": (SigmoidBlock, "sigmoid is no activation that is fused"),
    "draws in two places": (DrawsTwice, "it draws random numbers"),
    "a norm with a method of its own": (NormThatChecks, "CheckingNorm"),
    "nearly an activation": (NearlyHardswish, "act is TwiceShifted"),
    "one gate for all channels": (OneGate, "makes 1 gates for"),
    "its own way to be copied": (Reduces, "Reduces has a __reduce__ of its own"),
    "writes attributes": (Remembers, "its forward changes attributes"),
    "writes buffers": (Counts, "its forward changes parameters or buffers"),
    "modules in a list": (Unregistered, "layers of Unregistered keeps modules that are not registered"),
    "a setting that may change": (Configured, "it is Configured, whose forward reads config, a dict that may change"),
    "used twice": (UsedTwice, "used in several places"),
    "goes by the size": (BySize, "cannot be traced"),
    "goes by the mode of gradients": (Asks, "asks for is_grad_enabled"),
    "a norm behind the gate": (NormBetween, "gate.1 is BatchNorm2d, which is not fused"),
    "another padding": (ReflectingPad, "it calls pad, which is not fused"),
    "drops in evaluation": (DropsAlways, "it drops paths in evaluation, too"),
    "goes by the mode of a part": (DropsByModeOfNorm, "it goes by the mode of project.1"),
    "goes by the type": (OnlyForOthers, "the forward of OnlyForOthers asks for isinstance"),
    "inherits a question": (InheritsQuestion, "the forward of InheritsQuestion asks for isinstance"),
    "a factor": (DropsAlone, "it calls"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, x: Tensor) -> None:
    cls, reason = REFUSED[name]
    block = with_statistics_of(cls())
    block.train()
    state = copy.deepcopy(block.state_dict())
    report = replace_layers(block)
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    restore_layers(block.eval())
    report = replace_layers(block)
    assert reason in report.skipped[""] and "" not in report.replaced
    torch.manual_seed(0)
    found = block(x)
    restore_layers(block)
    torch.manual_seed(0)
    torch.testing.assert_close(found, block(x))
    assert "last" not in block.__dict__ or isinstance(block.last, Tensor)


def test_drop_rate_of_a_call_that_has_a_default(x: Tensor) -> None:
    block = with_statistics_of(DropsAtDefault())
    stock = copy.deepcopy(block)
    assert replace_layers(block).replaced == [""]
    for rate in ((), (0.9,), (0.0,)):
        for training in (True, False):
            results = []
            for module in (block.train(training), stock.train(training)):
                torch.manual_seed(0)
                results.append(module(x, *rate))
            torch.testing.assert_close(*results)


class ByKernel(OwnBlock):
    """Asks a part of it for its settings."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.middle = ConvNorm(WIDE, WIDE, kernel, groups=WIDE)

    def forward(self, x: Tensor) -> Tensor:
        side = self.middle[0].kernel_size[0] // 2
        y = self.act(self.middle(F.pad(self.act(self.expand(x)), (side,) * 4)))
        return x + self.project(self.gate(y))


def test_settings_of_parts_tell_blocks_apart(x: Tensor) -> None:
    model = with_statistics_of(nn.Sequential(ByKernel(3), ByKernel(5)))
    expected = model(x)
    assert len(replace_layers(model).replaced) == 2
    torch.testing.assert_close(model(x), expected)


SOMEBODYS_MODEL = """
class Inherits(OwnBlock):
    def extra_repr(self):
        return "mine"

class Block(OwnBlock):
    def forward(self, x):
        return super().forward(x)
"""


def test_classes_of_ones_own_are_registered(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """A class that only inherits is what it inherits from; one with a forward of its own is left until it is known."""
    somebodys_model = types.ModuleType("somebodys_model")
    somebodys_model.OwnBlock = OwnBlock
    monkeypatch.setitem(sys.modules, "somebodys_model", somebodys_model)
    exec(SOMEBODYS_MODEL, vars(somebodys_model))
    assert replace_layers(somebodys_model.Inherits()).replaced == [""]
    block = with_statistics_of(somebodys_model.Block())
    assert replace_layers(block).skipped[""] == "Block is a class of your own: see effnet_ops.register_block"
    monkeypatch.setattr(recognise, "_registered", set())
    assert register_block(somebodys_model.Block) is somebodys_model.Block
    expected = block(x)
    assert replace_layers(block).replaced == [""]
    torch.testing.assert_close(block(x), expected)
    with pytest.raises(TypeError, match="takes a subclass"):
        register_block(3)


@torch.no_grad()
def test_settings_and_modes_that_change_later(x: Tensor) -> None:
    block = BLOCKS["own, dropout of elements"]()
    replace_layers(block)
    stock = copy.deepcopy(block)
    restore_layers(stock)
    for change in (
        lambda b: setattr(b, "after", None),
        lambda b: setattr(b, "before", nn.BatchNorm2d(CHANNELS).double().eval()),
        lambda b: setattr(b, "act", nn.GELU()),
        lambda b: setattr(b, "act", nn.ReLU()),
        lambda b: b.gate.train(),
        lambda b: setattr(b, "gate", nn.Identity()),
    ):
        block(x)
        change(block), change(stock)
        torch.testing.assert_close(block(x), stock(x))


def test_one_form_serves_all_modules_of_a_kind() -> None:
    start = time.perf_counter()
    report = replace_layers(timm.create_model("tf_efficientnet_b7"))
    assert len(report.replaced) == 55
    # 1.2 seconds on two threads of 2026; tracing each block by itself takes ten times as long.
    assert time.perf_counter() - start < 20


def _segmentation(network: str, **settings: int) -> nn.Module:
    library = importlib.import_module("segmentation_models_pytorch")
    return getattr(library, network)("efficientnet-b0", encoder_weights=None, **settings)


def _transformers() -> nn.Module:
    library = importlib.import_module("transformers")
    config = library.EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=64)
    return library.EfficientNetModel(config)


def _monai() -> nn.Module:
    nets = importlib.import_module("monai.networks.nets")
    return nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=3)


def _pytorchcv(name: str) -> nn.Module:
    return importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False)


NETWORKS: dict[str, tuple[str, int, Callable[[], nn.Module]]] = {
    "smp": ("segmentation_models_pytorch", 16, functools.partial(_segmentation, "Unet")),
    "smp dilated": (
        "segmentation_models_pytorch",
        16,
        functools.partial(_segmentation, "DeepLabV3Plus", encoder_output_stride=8),
    ),
    "transformers": ("transformers", 10, _transformers),
    "MONAI": ("monai", 16, _monai),
    "pytorchcv": ("pytorchcv", 16, functools.partial(_pytorchcv, "efficientnet_b0")),
    "pytorchcv SAME": ("pytorchcv", 16, functools.partial(_pytorchcv, "efficientnet_b0b")),
    "pytorchcv MobileNetV3": ("pytorchcv", 15, functools.partial(_pytorchcv, "mobilenetv3_large_w1")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_other_libraries(name: str) -> None:
    library, count, build = NETWORKS[name]
    pytest.importorskip(library)
    model = build().double()
    stock = copy.deepcopy(model)
    report = replace_layers(model)
    blocks = [key for key, kind in report.kinds.items() if kind == "block"]
    assert len(blocks) >= count and set(blocks) <= set(report.replaced)
    if name.startswith("smp"):
        # Decoders have blocks without a drop rate.
        blocks = [key for key in blocks if key.startswith("encoder")]
    for key in (blocks[0], blocks[1], blocks[2], blocks[len(blocks) // 2], blocks[-1]):
        block, other = model.get_submodule(key), stock.get_submodule(key)
        conv = next(m for m in other.modules() if isinstance(m, nn.Conv2d))
        image = torch.randn(3, conv.in_channels, 12, 9, dtype=torch.float64)
        assert is_fused(block.eval(), image)
        assert_same_results(block, other, image, *((0.3,) if name.startswith("smp") else ()))
    restore_layers(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


class Small(nn.Module):
    """A network with one block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.act = nn.Conv2d(3, CHANNELS, 3), OwnBlock(), nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(self.stem(x)))


def test_a_block_and_not_what_is_around_it() -> None:
    model = Small()
    assert replace_layers(model).replaced == ["block"]
    sequence = nn.Sequential(*OwnBlock().children(), nn.Mish())
    assert "" not in replace_layers(sequence).replaced
    assert replace_layers(nn.Sequential(nn.Sequential(nn.ReLU(), OwnBlock()))).replaced == ["0.1"]
