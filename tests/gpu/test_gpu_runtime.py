"""How operators behave in a GPU program: streams, CUDA graphs, torch.compile, determinism, autocast, TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import MBCONV, MBConvCase
from helpers import mbconv_function, mbconv_tensors, prepared, relative_error
from torch import Tensor

import effnet_ops
from effnet_ops.kernels import launching
from effnet_ops.ops import gpu

CASES = {case.name: case for case in MBCONV}
BLOCK = CASES["residual"]


def block(case: MBConvCase, dtype: torch.dtype, training: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The block as a function of x alone, and an x, on the GPU."""
    tensors = prepared(mbconv_tensors(case), dtype, "channels_last")
    tensors = {name: value if value is None else value.cuda() for name, value in tensors.items()}
    function = mbconv_function(case, training)
    return (lambda x: function({**tensors, "x": x})), tensors["x"]


def test_automatic_choice() -> None:
    x = torch.zeros(1, 8, 4, 4, device="cuda")
    first = "triton" if effnet_ops.available_backends()["cuda"] else "cuda"
    assert effnet_ops.backends.select(x, operation="squeeze_excite") == first
    assert effnet_ops.backends.select(x, operation="mbconv") == "triton"


@pytest.mark.parametrize("training", [True, False])
def test_side_stream(training: bool) -> None:
    """Kernels are launched on the current stream: their input is made on it, late."""
    function, x = block(BLOCK, torch.float32, training)
    expected = function(x)
    stream, late = torch.cuda.Stream(), torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = function(late)
    stream.synchronize()
    assert torch.equal(found, expected)


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("name", ["residual", "no_expansion", "lite", "folded"])
def test_cuda_graph_of_inference(name: str) -> None:
    function, x = block(CASES[name], torch.bfloat16, False)
    static = x.clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        graph, (y,) = captured(lambda: [function(static)])
        for _ in range(2):
            static.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, function(static))


def test_cuda_graph_of_a_training_step() -> None:
    function, x = block(BLOCK, torch.bfloat16, True)
    static = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def step() -> list[Tensor]:
        y = function(static)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), static)]

    graph, results = captured(step)
    with torch.no_grad():
        static.copy_(torch.randn_like(x))
    graph.replay()
    found = [value.clone() for value in results]
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_graph_breaks(training: bool) -> None:
    function, x = block(BLOCK, torch.float32, training)
    compiled = torch.compile(function, fullgraph=True)
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [function(leaves[0]), compiled(leaves[1])]
    assert relative_error(outputs[1].detach(), outputs[0].detach().double()) <= 2e-6
    gradients = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in zip(outputs, leaves, strict=True)]
    assert relative_error(gradients[1], gradients[0].double()) <= 2e-5


def asked_for(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else effnet_ops.use_backend(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(dtype: torch.dtype, block_request: str | None) -> None:
    """The first one goes the whole way, and the others launch what it has launched."""
    function, x = block(MBConvCase("wide", (16, 24, 40, 40), 24, 144, 6, residual=True), dtype, True)

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        with asked_for(block_request):
            y = function(leaf)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaf)]

    first = step()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


@pytest.mark.parametrize("name", ["residual", "no_expansion_residual"])
def test_blocks_are_recorded_with_their_calls(
    name: str, block_request: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each call of a block would run its host code, a millisecond of it."""
    monkeypatch.setattr(gpu, "_chosen", {})
    function, x = block(CASES[name], torch.bfloat16, True)
    with asked_for(block_request):
        y = function(x.requires_grad_())
    y.float().square().sum().backward()
    operators = {key[0]: replayed for key, replayed in gpu._chosen.items() if key[0].startswith("mbconv")}
    assert set(operators) == {"mbconv_training", "mbconv_backward"}
    for replayed in operators.values():
        (recording,) = replayed._recordings.values()
        calls = [step for step in recording._steps if isinstance(step, launching.Call)]
        assert len(calls) == (block_request is None)


def test_autocast() -> None:
    x = torch.randn(2, 24, 9, 9, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(40, 24, 1, 1, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert effnet_ops.pointwise_conv2d(x, weight).dtype == torch.bfloat16


def test_fp32_products_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 has a relative error of about 3e-4; it is used where torch.backends.cuda.matmul allows it."""
    x = torch.randn(2, 96, 20, 20, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(64, 96, 1, 1, device="cuda")
    exact = F.conv2d(x.double(), weight.double())
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert relative_error(effnet_ops.pointwise_conv2d(x, weight), exact) <= 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert 1e-5 <= relative_error(effnet_ops.pointwise_conv2d(x, weight), exact) <= 1e-3


def test_second_device_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(2, 8, 5, 5, device="cuda:1"), torch.randn(8, 8, 1, 1, device="cuda:1")
    expected = F.conv2d(x.double(), weight.double())
    assert relative_error(effnet_ops.pointwise_conv2d(x, weight), expected) <= 2e-6


def test_network_after_replace_layers() -> None:
    """A stock network and its replaced copy agree as far as the stock one agrees with fp64, forward and backward."""
    timm = pytest.importorskip("timm")
    stock = timm.create_model("efficientnet_b0").cuda().to(memory_format=torch.channels_last).train()
    ours = timm.create_model("efficientnet_b0").cuda().to(memory_format=torch.channels_last).train()
    exact = timm.create_model("efficientnet_b0").cuda().double().train()
    ours.load_state_dict(stock.state_dict())
    exact.load_state_dict(stock.state_dict())
    assert effnet_ops.replace_layers(ours).replaced
    x = torch.randn(16, 3, 128, 128, device="cuda").to(memory_format=torch.channels_last)
    for model in (stock, ours, exact):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    reference = exact(x.double())
    reference.square().mean().backward()
    errors = {}
    for name, model in (("stock", stock), ("ours", ours)):
        out = model(x)
        out.square().mean().backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        flat = [torch.cat([p.grad.double().flatten() for p in side]) for side in zip(*pairs, strict=True)]
        errors[name] = (relative_error(out.detach(), reference.detach()), relative_error(flat[0], flat[1]))
    assert errors["ours"][0] <= max(2e-6, 2 * errors["stock"][0]), errors
    assert errors["ours"][1] <= max(2e-5, 2 * errors["stock"][1]), errors
