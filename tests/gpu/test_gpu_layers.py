"""How single layers of each GPU backend behave in a program: streams, graphs, torch.compile, devices, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import relative_error
from test_gpu_runtime import captured
from torch import Tensor

import effnet_ops
from effnet_ops import backends
from effnet_ops.ops import gpu


class Layers(torch.nn.Module):
    """A depthwise convolution and squeeze-and-excitation, on one backend."""

    def __init__(self, backend: str, channels: int = 48, device: str = "cuda") -> None:
        super().__init__()
        self.backend = backend
        sizes = ((channels, 1, 5, 5), (channels,), (8, channels, 1, 1), (8,), (channels, 8, 1, 1), (channels,))
        self.weights = torch.nn.ParameterList(torch.randn(size, device=device) / 3 for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, *squeeze = self.weights
        with effnet_ops.use_backend(self.backend):
            y = effnet_ops.depthwise_conv2d(x, weight, bias, stride=2, padding="same", activation="silu")
            return effnet_ops.squeeze_excite(y, *squeeze)

    def step(self, x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = self(leaf)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [leaf, *self.parameters()])]


def image(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", batch: int = 8) -> Tensor:
    return torch.randn(batch, 48, 33, 31, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_side_stream(gpu_backend: str) -> None:
    """Kernels are launched on the current stream: their input is made on it, late."""
    layers, x = Layers(gpu_backend), image()
    expected = layers.step(x)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = layers.step(late)
    stream.synchronize()
    assert equal(found, expected)


def test_cuda_graph_of_a_step(gpu_backend: str) -> None:
    layers, x = Layers(gpu_backend), image()
    static = x.clone(memory_format=torch.preserve_format)
    graph, results = captured(lambda: layers.step(static))
    for _ in range(2):
        static.copy_(torch.randn_like(x))
        graph.replay()
        assert equal([value.clone() for value in results], layers.step(static))


def test_compiled_without_graph_breaks(gpu_backend: str) -> None:
    layers, x = Layers(gpu_backend), image(torch.float32)
    compiled = torch.compile(layers, fullgraph=True)
    outputs, gradients = [], []
    # What is traced inside the model chooses at each call, by what is asked for around it.
    with effnet_ops.use_backend(gpu_backend):
        for run in (layers, compiled):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = run(leaf)
            outputs.append(y.detach())
            gradients.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert relative_error(outputs[1], outputs[0].double()) <= 2e-6
    assert relative_error(gradients[1], gradients[0].double()) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(gpu_backend: str, dtype: torch.dtype) -> None:
    layers, x = Layers(gpu_backend), image(dtype, batch=64)
    first = layers.step(x)
    for _ in range(5):
        assert equal(layers.step(x), first)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_depthwise_copies_no_layout(layout: torch.memory_format) -> None:
    """Beside its results, and the gradient of the activation, a convolution needs a fraction of x."""
    if reason := effnet_ops.available_backends()["cuda"]:
        pytest.skip(f"backend cuda: {reason}")
    x = image(batch=256).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(48, 1, 3, 3, device="cuda", requires_grad=True)

    def peak(run: Callable[[], object]) -> float:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        assert results is not None
        return (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())

    with effnet_ops.use_backend("cuda"):
        y = effnet_ops.depthwise_conv2d(x, weight, padding=1, activation="silu")
        grad = torch.randn_like(y)
        assert peak(lambda: effnet_ops.depthwise_conv2d(x, weight, padding=1, activation="silu")) < 1.2
        assert peak(lambda: torch.autograd.grad(y, (x, weight), grad)) < 2.2


def test_second_device_is_used(gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layers, x = Layers(gpu_backend, device="cuda:1"), image(torch.float32, "cuda:1")
    expected = [value.to("cuda:0") for value in layers.step(x)]
    layers, x = layers.to("cuda:0"), x.to("cuda:0")
    assert torch.cuda.current_device() == 0
    assert equal(layers.step(x), expected)


def test_autocast(gpu_backend: str) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        assert Layers(gpu_backend)(image(torch.float32)).dtype == torch.bfloat16


def test_backward_runs_where_forward_ran(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the ``with`` block is left, in the thread that PyTorch gives a GPU's backward pass."""
    seen: list[tuple[str, str | None]] = []
    implementation = gpu._implementation

    def recorded(operator: str, *args: object) -> object:
        seen.append((operator, backends.requested()))
        return implementation(operator, *args)

    monkeypatch.setattr(gpu, "_implementation", recorded)
    layers, x = Layers(gpu_backend), image().requires_grad_()
    layers(x).sum().backward()
    assert len(seen) == 4 and {backend for _, backend in seen} == {gpu_backend}


def test_default_is_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    if any(effnet_ops.available_backends()[name] for name in gpu.GPU_BACKENDS):
        pytest.skip("needs both backends")
    x = image()
    window = backends.Window((5, 5), (2, 2), (1, 1))
    for name in gpu.GPU_BACKENDS:
        monkeypatch.setattr(gpu, "preferred", lambda *args, name=name: (name, "a test"))
        assert gpu.choose("depthwise_conv2d", x, window) == name


def test_an_explicit_request_without_kernels_is_an_error() -> None:
    if reason := effnet_ops.available_backends()["cuda"]:
        pytest.skip(f"backend cuda: {reason}")
    x, weight = image(), torch.randn(8, 48, 1, 1, device="cuda")
    with effnet_ops.use_backend("cuda"), pytest.raises(RuntimeError, match="it has no kernels for pointwise_conv2d"):
        effnet_ops.pointwise_conv2d(x, weight)
