"""What trainers do to a model: replaced layers train as the stock ones under each of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import difference
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from effnet_ops import replace_layers
from effnet_ops.scaling.digits import digits
from effnet_ops.surgery.fused import FusedLayer

pytest.importorskip("sklearn")


class Network(nn.Module):
    """A stem, blocks of timm with drop path, a Fused-MBConv first, and a head, for the digits of scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"exp_ratio": 3, "se_layer": timm.layers.SqueezeExcite, "act_layer": nn.SiLU}
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.stem.append(timm_blocks.EdgeResidual(8, 8, drop_path_rate=0.2, **settings))
        self.blocks = nn.Sequential(
            timm_blocks.InvertedResidual(8, 8, drop_path_rate=0.2, **settings),
            timm_blocks.InvertedResidual(8, 16, stride=2, **settings),
            timm_blocks.InvertedResidual(16, 16, drop_path_rate=0.2, **settings),
        )
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def models(dtype: torch.dtype = torch.float64) -> tuple[Network, Network]:
    """The stock network and a replaced one with the same weights."""
    torch.manual_seed(0)
    stock = Network().to(dtype).train()
    ours = copy.deepcopy(stock)
    assert len(replace_layers(ours).replaced) == 4
    return stock, ours


def batch(step: int, size: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    at = slice(step * size, (step + 1) * size)
    return images[at].to(dtype), labels[at]


def train(model: nn.Module, steps: range, parts: int = 1, after: Callable[[], None] = lambda: None) -> list[float]:
    """Losses of steps of SGD, each of ``parts`` batches; the step's number is the seed of what is random in it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for step in steps:
        torch.manual_seed(step)
        for part in range(parts):
            images, labels = batch(step * parts + part)
            loss = F.cross_entropy(model(images), labels) / parts
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        after()
    return losses


def assert_same(ours: nn.Module, stock: nn.Module) -> None:
    for (name, value), other in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        assert difference(value, other, 0.1) < 1e-11, name


def average(model: nn.Module) -> nn.Module:
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    train(model, range(2), after=lambda: averaged.update_parameters(model))
    swa_utils.update_bn([batch(9), batch(10)], averaged)
    return averaged.eval()


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model.blocks[0].conv_pw, "weight", 0.5)
    prune.ln_structured(model.blocks[2].conv_dw, "weight", 0.25, n=2, dim=0)
    train(model, range(2))
    prune.remove(model.blocks[0].conv_pw, "weight")
    train(model, range(2, 4))
    return model


def accumulated(model: nn.Module) -> nn.Module:
    train(model, range(2), parts=3)
    return model


def frozen(model: nn.Module) -> nn.Module:
    for module in (model.stem, model.blocks[0]):
        module.requires_grad_(False).eval()
    train(model, range(2))
    return model


def parametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.blocks[0].conv_dw)
    torch.manual_seed(0)
    parametrizations.spectral_norm(model.stem[3].conv_exp)
    train(model, range(2))
    parametrize.remove_parametrizations(model.blocks[0].conv_dw, "weight")
    parametrize.remove_parametrizations(model.stem[3].conv_exp, "weight")
    train(model, range(2, 4))
    return model


def by_functional_call(model: nn.Module) -> nn.Module:
    """Two steps away from the parameters, by gradients of parameters that are not the module's own, as in MAML."""
    fast = dict(model.named_parameters())
    for step in range(2):
        torch.manual_seed(step)
        images, labels = batch(step)
        loss = F.cross_entropy(functional_call(model, fast, (images,)), labels)
        gradients = torch.autograd.grad(loss, list(fast.values()))
        fast = {key: value - 0.05 * grad for (key, value), grad in zip(fast.items(), gradients, strict=True)}
    model.load_state_dict(fast, strict=False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """Replaced blocks run again in the backward pass. Stock ones do not: they would update their statistics twice."""
    if isinstance(model.blocks[0], FusedLayer):
        model.blocks.forward = functools.partial(checkpoint, model.blocks.forward, use_reentrant=False)
    train(model, range(2))
    vars(model.blocks).pop("forward", None)
    return model


@pytest.mark.parametrize(
    "feature", [average, pruned, accumulated, frozen, parametrized, by_functional_call, checkpointed]
)
def test_feature_is_that_of_the_stock_model(feature: Callable[[nn.Module], nn.Module]) -> None:
    """All of them with drop path, which draws the same images for the same seed."""
    stock, ours = models()
    assert_same(feature(ours), feature(stock))
    images, _ = batch(20)
    with torch.no_grad():
        assert difference(ours.eval()(images), stock.eval()(images)) < 1e-11


def test_nothing_is_computed_for_gradients_that_nobody_needs() -> None:
    """No backward pass of a frozen block in front, and of the last only what its bias needs."""
    _, ours = models()
    ours.requires_grad_(False)
    ours.blocks[2].bn3.bias.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        train(ours, range(1))
    backward = [flops for op, flops in counter.get_flop_counts()["Global"].items() if "mbconv_backward" in str(op)]
    assert backward in ([], [0])
    assert ours.blocks[2].conv_pwl.weight.grad is None


class LowRank(nn.Module):
    """A convolution with an adapter of low rank beside it, as peft wraps them."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Conv2d(base_layer.in_channels, 2, 1, bias=False, dtype=base_layer.weight.dtype)
        self.up = nn.Conv2d(2, base_layer.out_channels, 1, bias=False, dtype=base_layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Conv2d:
        with torch.no_grad():
            self.base_layer.weight += torch.einsum("oruv,riuv->oiuv", self.up.weight, self.down.weight)
        return self.base_layer


def adapted_by_hand(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for block in model.blocks:
        block.conv_pw, block.conv_pwl = LowRank(block.conv_pw), LowRank(block.conv_pwl)
    return model


def merged_by_hand(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.conv_pw, block.conv_pwl = block.conv_pw.merged(), block.conv_pwl.merged()
    return model


def adapted_by_peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["conv_pw", "conv_pwl"], init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize(
    ("adapt", "merge"),
    [(adapted_by_hand, merged_by_hand), (adapted_by_peft, lambda model: model.merge_and_unload())],
    ids=["by hand", "by peft"],
)
def test_adapters_train_as_on_the_stock_model(adapt: Callable, merge: Callable) -> None:
    """Put on before the replacement or behind it; merged into the weights, their blocks are fused again."""
    stock, before = models()
    after, adapted = copy.deepcopy(stock), []
    for model in (stock, before, after):
        torch.manual_seed(1)
        adapted.append(adapt(model))
    report = replace_layers(after)
    assert "blocks.0" in report.skipped and "blocks.0.conv_dw" in report.replaced
    assert "runs its stock forward now: " in replace_layers(before).skipped["blocks.0"]
    losses = [train(model, range(3)) for model in adapted]
    images, _ = batch(20)
    for ours, found in zip(adapted[1:], losses[1:], strict=True):
        assert found == pytest.approx(losses[0], rel=1e-11)
        assert_same(ours, adapted[0])
        with torch.no_grad():
            whole = merge(ours).eval()
            assert difference(whole(images), adapted[0].eval()(images)) < 1e-11
    assert len(replace_layers(after).kinds) == 4
    for model in (before, after):
        with FlopCounterMode(display=False) as counter:
            model.train()(images)
        assert any("mbconv_training" in str(op) for op in counter.get_flop_counts()["Global"])


def accuracy_after(model: nn.Module, steps: int, dtype: torch.dtype) -> float:
    """Accuracy on the last 500 digits after steps under autocast, with a scaler for float16."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for step in range(steps):
        torch.manual_seed(step)
        images, labels = batch(step % 40, 32, torch.float32)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images).float(), labels)
        assert loss.isfinite()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    images, labels = digits()
    with torch.no_grad():
        return float((model.eval()(images[-500:]).argmax(1) == labels[-500:]).float().mean())


def test_half_precision_with_a_scaler_stays_finite() -> None:
    _, ours = models(torch.float32)
    assert accuracy_after(ours, 12, torch.float16) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_after_300_steps_is_that_of_the_stock_model(dtype: torch.dtype) -> None:
    stock, ours = models(torch.float32)
    again = copy.deepcopy(ours)
    expected, found = accuracy_after(stock, 300, dtype), accuracy_after(ours, 300, dtype)
    assert abs(expected - found) <= 0.01
    assert accuracy_after(again, 300, dtype) == found
    for value, other in zip(again.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other)
