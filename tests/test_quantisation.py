"""The way to int8 that docs/deployment.md gives: quantised by torchao, real pictures keep their answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from networks import photographs, relative_difference, timm_lite0
from torch import nn

import effnet_ops


def restored() -> nn.Module:
    model = timm_lite0()
    assert len(effnet_ops.replace_layers(model).replaced) >= 16
    effnet_ops.restore_layers(model)
    return model


def own() -> nn.Module:
    """An own model, and what it has learned in timm's layers."""
    model = effnet_ops.create_model("tf_efficientnet_lite0")
    model.load_state_dict(effnet_ops.convert_state_dict(timm_lite0().state_dict(), source="timm", target="effnet_ops"))
    there = timm.create_model("tf_efficientnet_lite0")
    there.load_state_dict(effnet_ops.convert_state_dict(model.state_dict(), source="effnet_ops", target="timm"))
    return there.eval()


@pytest.mark.slow
@pytest.mark.parametrize("build", [restored, own])
def test_model_quantised_by_torchao_keeps_its_answers_on_pictures(build: Callable[[], nn.Module]) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x, quantizer = photographs(), x86.X86InductorQuantizer()
    with torch.no_grad():
        before = timm_lite0()(x)
        graph = torch.export.export(build(), (x,), strict=True).module()
        prepared = prepare_pt2e(graph, quantizer.set_global(x86.get_default_x86_inductor_quantization_config()))
        prepared(x)
        quantised = convert_pt2e(prepared)
        after = quantised(x)
    convolutions = [node for node in quantised.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 49
    for node in convolutions:
        assert all("dequantize" in str(source.target) for source in node.args[:2])
    assert torch.equal(after.argmax(1), before.argmax(1))
    # A class's probability moved by 0.084 at most.
    assert (after.softmax(1) - before.softmax(1)).abs().max() < 0.15
    assert relative_difference(after, before) < 0.2
