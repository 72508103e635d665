"""Bytes and memory against what PyTorch really moves and keeps, and the costs of convolutions and blocks."""

from __future__ import annotations

import time

import pytest
import timm
import torch
from networks import on_meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops import scaling
from effnet_ops.models import ScaledSpec, model_spec
from effnet_ops.models.spec import BlockSpec


class Moved(TorchDispatchMode):
    """Adds up the elements of activations that operations read and write; views and shapes move nothing."""

    FREE = ("detach", "view", "t.default", "expand", "_to_copy", "empty", "alias", "addmm")

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {id(value) for value in (*model.parameters(), *model.buffers())}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(name in str(func) for name in self.FREE):
            results = out if isinstance(out, tuple | list) else (out,)
            tensors = [a for a in args if isinstance(a, torch.Tensor) and id(a) not in self.weights]
            tensors += [o for o in results if isinstance(o, torch.Tensor)]
            self.elements += sum(t.numel() for t in tensors if t.dim() >= 2)
        return out


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0"])
def test_stock_bytes_are_what_a_stock_model_moves(name: str) -> None:
    model = on_meta(lambda: timm.create_model(name))
    with torch.no_grad(), Moved(model) as moved:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert scaling.count(name).stock_bytes == pytest.approx(4 * moved.elements, rel=0.002)


def saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the different memories that a training forward pass keeps, without parameters and buffers."""
    mine = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes(), value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model.train()(x)
    return sum(size for size, _ in kept.values())


def test_saved_bytes_are_what_training_keeps() -> None:
    stock = saved_bytes(timm.create_model("efficientnet_b0"), torch.randn(2, 3, 64, 64))
    assert scaling.count("efficientnet_b0", 64, batch=2).stock_saved_bytes == pytest.approx(stock, rel=0.03)
    fused = saved_bytes(effnet_ops.create_model("efficientnet_b0", drop_path_rate=0.0), torch.randn(1, 3, 160, 160))
    assert scaling.count("efficientnet_b0", 160).fused_saved_bytes == pytest.approx(fused, rel=0.03)


def test_published_traffic_of_b0() -> None:
    half = scaling.count("efficientnet_b0", dtype=torch.bfloat16)
    assert round(half.stock_bytes / 1e6, 1) == 93.9
    assert half.weight_bytes == 2 * half.parameters
    full = scaling.count("efficientnet_b0", batch=3)
    assert full.stock_bytes == 6 * half.stock_bytes and full.fused_bytes == 6 * half.fused_bytes
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.fused_intensity > full.stock_intensity


def test_every_total_adds_up_by_layer_and_stage() -> None:
    costs = scaling.count("efficientnet_b2", (97, 130), batch=2)
    for total in scaling.counters._TOTALS:
        assert getattr(costs, total) == sum(getattr(row, total) for row in costs.layers)
        assert getattr(costs, total) == sum(getattr(row, total) for row in costs.stages)


@pytest.mark.parametrize("phi", [-3.0, 0.3, 1.7])
def test_designed_networks_agree_with_the_flop_counter(phi: float) -> None:
    spec = scaling.CompoundScaling(1.3, 1.07, 1.21).spec(phi)
    model = on_meta(lambda: effnet_ops.create_model(spec))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, spec.resolution, spec.resolution, device="meta"))
    assert scaling.count(spec).flops == counter.get_total_flops()
    assert scaling.count(spec).parameters == sum(p.numel() for p in model.parameters())


def test_separable_convolutions_save_what_the_formula_says() -> None:
    cost = scaling.convolution_cost(64, 72, 3, pixels=49)
    assert cost.saving == pytest.approx(1 / (1 / 72 + 1 / 9))
    standard, depthwise = torch.nn.Conv2d(64, 72, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1, groups=64)
    separable = torch.nn.Sequential(depthwise, torch.nn.Conv2d(64, 72, 1))
    for module, macs, weights in (
        (standard, cost.standard_macs, cost.standard_weights),
        (separable, cost.separable_macs, cost.separable_weights),
    ):
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, 64, 7, 7))
        assert counter.get_total_flops() == 2 * macs
        assert sum(p.numel() for p in module.parameters() if p.dim() > 1) == weights
    with pytest.raises(ValueError, match="kernel_size must be a positive whole number, got 0"):
        scaling.convolution_cost(8, 8, 0)


def test_expansion_scales_a_block_and_the_kernel_does_not() -> None:
    def block(t: float, k: int, se: float = 0.25) -> scaling.StageCount:
        return scaling.count_block(BlockSpec("mbconv", 80, 80, k, 1, t, se), 14)

    assert block(6, 3).macs == pytest.approx(2 * block(3, 3).macs, rel=0.001)
    assert block(6, 5).macs - block(6, 3).macs == 480 * (25 - 9) * 14 * 14
    without = block(6, 3, 0.0)
    assert block(6, 3).macs - without.macs == 2 * 480 * 20
    assert block(6, 3).fused_bytes - without.fused_bytes == 4 * 480 * 14 * 14


def test_counting_b7_is_fast() -> None:
    start = time.process_time()
    scaling.count("efficientnet_b7")
    assert time.process_time() - start < 1.0


def test_receptive_field_by_layer() -> None:
    field = scaling.receptive_field("efficientnet_b0")
    layers = {layer.name: layer for layer in field.layers}
    assert layers["conv_stem"].size == 3
    assert (layers["blocks.1.0.conv_pw"].size, layers["blocks.1.0.conv_dw"].size) == (7, 11)
    assert not layers["blocks.0.0.conv_dw"].sees_all and layers["blocks.0.0.se.conv_reduce"].sees_all
    assert field.layers[-1].size == field.size == 851


SMALL = ScaledSpec(model_spec("efficientnet_b0").architecture, width=0.25, depth=0.4, resolution=128)


def test_effective_field_is_inside_the_theoretical_one_without_gates() -> None:
    fields = scaling.effective_receptive_field(SMALL, gates=False, draws=2)
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(SMALL.stages()) for j in range(len(stage))]
    assert [field.name for field in fields] == ["stem", *blocks]
    for field in fields:
        assert 1 <= field.size <= min(field.theoretical, 128)
        assert field.outside < 1e-9
    assert fields[-1].size > fields[1].size
    gated = scaling.effective_receptive_field(SMALL, draws=1)
    assert max(field.outside for field in gated[1:4]) > 1e-6


def test_effective_field_of_a_given_model_leaves_it_as_it_was() -> None:
    model = effnet_ops.create_model(SMALL, features_only=True).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    a = scaling.effective_receptive_field(model, 64, draws=1)
    assert a == scaling.effective_receptive_field(model, 64, draws=1)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_effective_field_refuses_bad_arguments() -> None:
    for keywords, message in (
        (dict(share=1.0), "share must lie in"),
        (dict(draws=0), "draws must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            scaling.effective_receptive_field(SMALL, **keywords)
    with pytest.raises(ValueError, match="pass its specification"):
        scaling.effective_receptive_field(on_meta(lambda: effnet_ops.create_model(SMALL)), gates=False)


def test_bad_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32.*torch\.int8"):
        scaling.count("efficientnet_b0", dtype=torch.int8)
