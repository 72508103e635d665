"""Who of `cuda` and `triton` runs an operator: reasons, requests, the table. The GPU is made up, nothing launched."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ahead_of_time import recorded

from effnet_ops import _native, backends, reference
from effnet_ops.ops import cuda, gpu, triton
from effnet_ops.ops.cuda.depthwise import too_large
from effnet_ops.ops.squeeze_excite import SqueezeExciteCall, SqueezeExciteGradientCall

WINDOW = backends.Window((3, 3), (1, 1), (1, 1))


def on_gpu(
    dtype: torch.dtype = torch.bfloat16,
    *,
    index: int = 0,
    shape: tuple[int, ...] = (2, 8, 5, 5),
    memory_format: torch.memory_format = torch.channels_last,
) -> Any:
    """What the predicates look at of a tensor."""
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    names = ("dtype", "layout", "shape", "element_size", "stride", "is_contiguous")
    return SimpleNamespace(device=torch.device("cuda", index), **{name: getattr(like, name) for name in names})


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which both backends can run, with a GPU of compute capability 9.0 and an old one."""
    monkeypatch.setattr(backends, "_reasons", dict.fromkeys(backends.BACKENDS, ""))
    monkeypatch.setattr(backends, "_automatic", list(backends.BACKENDS))
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(gpu, "_chosen", {})
    backends._refuses_gpu.cache_clear()
    yield
    backends._refuses_gpu.cache_clear()


@pytest.mark.parametrize(
    ("x", "window", "operation", "reason"),
    [
        (on_gpu(), WINDOW, "depthwise_conv2d", ""),
        (on_gpu(torch.float32), WINDOW._replace(stride=(2, 2)), "depthwise_conv2d", ""),
        (on_gpu(), None, "pointwise_conv2d", "it has no kernels for pointwise_conv2d"),
        (on_gpu(), WINDOW, "mbconv", "it has no kernels for mbconv with batch statistics or gradients"),
        (on_gpu(), WINDOW, "mbconv_inference", ""),
        (
            on_gpu(),
            WINDOW._replace(kernel=(7, 7)),
            "mbconv_inference",
            "its kernels for a whole block are 3x3 and 5x5, and this one is 7x7",
        ),
        (
            on_gpu(torch.float64),
            WINDOW,
            "",
            "x is torch.float64, and the kernels are for float32, float16 and bfloat16",
        ),
        (on_gpu(index=1), WINDOW, "", "cuda:1 has compute capability 7.5, and the kernels need 8.0"),
        (torch.zeros(1, 8, 5, 5), WINDOW, "", "x is on cpu"),
        (on_gpu(), WINDOW._replace(kernel=(3, 5)), "", "a 3x5 kernel is not 3x3, 5x5 or 7x7"),
        (on_gpu(), WINDOW._replace(kernel=(9, 9)), "", "a 9x9 kernel is not 3x3, 5x5 or 7x7"),
        (on_gpu(), WINDOW._replace(stride=(1, 2)), "", r"stride (1, 2) is not (1, 1) or (2, 2)"),
        (on_gpu(), WINDOW._replace(stride=(3, 3)), "", r"stride (3, 3) is not (1, 1) or (2, 2)"),
        (on_gpu(), WINDOW._replace(dilation=(2, 1)), "", r"dilation (2, 1) is not (1, 1)"),
    ],
)
@pytest.mark.usefixtures("both")
def test_reasons_of_cuda(x: Any, window: backends.Window | None, operation: str, reason: str) -> None:
    assert backends.why_not("cuda", x, window, operation) == reason
    with backends.use_backend("cuda"):
        if reason:
            with pytest.raises(RuntimeError, match="'cuda' cannot run this call"):
                backends.select(x, "", window, operation)
        else:
            assert backends.select(x, "", window, operation) == "cuda"


@pytest.mark.usefixtures("both")
def test_automatic_choice_passes_over_what_cuda_lacks() -> None:
    assert backends.select(on_gpu(), "", WINDOW, "depthwise_conv2d") == "cuda"
    assert backends.select(on_gpu(), "", WINDOW, "mbconv") == "triton"
    assert backends.select(on_gpu(torch.float64), "", WINDOW, "depthwise_conv2d") == "triton"
    assert backends.select(on_gpu(index=1), "", WINDOW, "depthwise_conv2d") == "reference"


def test_why_cuda_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library, no CUDA in PyTorch, no GPU: each is a reason, none an error."""
    _native.load_cuda.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in backends._cuda_unavailable()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "cuda_library", lambda: None)
    _native.load_cuda.cache_clear()
    assert "FORCE_CUDA=1" in backends._cuda_unavailable()
    broken = _native.Path(__file__)
    monkeypatch.setattr(_native, "cuda_library", lambda: broken)
    assert backends._cuda_unavailable() == "there is no NVIDIA GPU, or no driver for it"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _native.load_cuda.cache_clear()
    assert backends._cuda_unavailable().startswith("the CUDA part does not load: ")
    _native.load_cuda.cache_clear()


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("operator", cuda.WORDS)
def test_a_request_decides_before_the_table(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = WINDOW if operator.startswith("depthwise") else None
    for preferred in gpu.GPU_BACKENDS:
        monkeypatch.setattr(gpu, "preferred", lambda *args, preferred=preferred: (preferred, "a test"))
        assert gpu.choose(operator, on_gpu(), window) == preferred
        for name in gpu.GPU_BACKENDS:
            with backends.use_backend(name):
                assert gpu.choose(operator, on_gpu(), window) == name


@pytest.mark.usefixtures("both")
def test_operators_are_right_where_the_request_has_no_kernel() -> None:
    with backends.use_backend("cuda"):
        assert gpu.choose("pointwise_conv2d", on_gpu(), None) == "triton"
        assert gpu.choose("depthwise_conv2d", on_gpu(), WINDOW._replace(kernel=(2, 2))) == "triton"
        assert gpu.choose("depthwise_conv2d", on_gpu(index=1), WINDOW) == "reference"
        assert gpu.choose("depthwise_conv2d", on_gpu(), WINDOW._replace(kernel=(9, 9))) == "reference"


@pytest.mark.usefixtures("both")
def test_a_decision_is_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are kept, so what was asked for is part of what they are kept by."""
    monkeypatch.setattr(gpu, "_launched", lambda operator, backend: backend)
    found = []
    for name in ("cuda", "triton", "cuda"):
        with backends.use_backend(name):
            found.append(gpu._implementation("depthwise_conv2d", on_gpu(), WINDOW))
    assert found == ["cuda", "triton", "cuda"] and len(gpu._chosen) == 2


@pytest.mark.usefixtures("both")
def test_decisions_are_few_whatever_shapes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_launched", lambda operator, backend: (operator, backend))
    monkeypatch.setattr(gpu, "_MOST_CHOSEN", 5)
    with backends.use_backend("triton"):
        for height in [*range(1, 30), 1]:
            x = on_gpu(shape=(2, 8, height, 5))
            for _ in range(2):
                assert gpu._implementation("depthwise_conv2d", x, WINDOW) == ("depthwise_conv2d", "triton")
            assert 0 < len(gpu._chosen) <= 5


def depthwise_of_block(x: Any, window: backends.Window = WINDOW, channels: int = 48) -> str:
    batch, _, *size = x.shape
    return gpu.block_depthwise(x, (batch, channels, *size), window, (1, 1, 1, 1))


@pytest.mark.usefixtures("both")
def test_who_convolves_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++ kernels where they can and nobody asked for Triton's, whatever the layout of the block's input."""
    contiguous = on_gpu(torch.float32, memory_format=torch.contiguous_format)
    for x in (on_gpu(), on_gpu(torch.float16), contiguous):
        assert depthwise_of_block(x) == depthwise_of_block(x, backends.Window((5, 5), (2, 2), (1, 1))) == "cuda"
    for request in ("cuda", "triton"):
        with backends.use_backend(request):
            assert depthwise_of_block(on_gpu()) == request
    monkeypatch.setattr(backends, "_environment", "triton")
    assert depthwise_of_block(on_gpu()) == "triton"


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("x", "window"),
    [
        (on_gpu(torch.float64), WINDOW),
        (on_gpu(), WINDOW._replace(kernel=(3, 5))),
        (on_gpu(), WINDOW._replace(stride=(1, 2))),
        (on_gpu(index=1), WINDOW),
        (on_gpu(shape=(1, 8, 16000, 16000)), WINDOW),
    ],
    ids=["fp64", "3x5", "stride 1x2", "old GPU", "large image"],
)
def test_blocks_convolve_with_triton_where_cuda_has_no_kernel(x: Any, window: backends.Window) -> None:
    assert depthwise_of_block(x, window) == "triton"


@pytest.mark.usefixtures("both")
def test_blocks_convolve_with_triton_without_the_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._reasons, "cuda", "the CUDA part was not built")
    assert depthwise_of_block(on_gpu()) == "triton"


@pytest.mark.usefixtures("both")
def test_the_operators_of_a_block_ask_who_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the block's window, padding and expanded size, and then convolves with what it is told."""
    from launches import arguments, blocks, implementation

    asked: list[tuple[Any, ...]] = []
    used: list[str] = []

    def told(x: torch.Tensor, *problem: Any) -> str:
        asked.append(problem)
        return "cuda"

    monkeypatch.setattr(gpu, "block_depthwise", told)
    module = importlib.import_module("effnet_ops.ops.triton.mbconv")

    def instead(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            used.append(name)
            return getattr(module.kernels.TRITON, name)(*args, **kwargs)

        return run

    monkeypatch.setitem(module._DEPTHWISE, "cuda", module.kernels.Depthwise(instead("forward"), instead("backward")))
    block, side = next((block, side) for block, side in blocks("b0") if block.stride == 2 and block.kernel_size == 5)
    given = arguments(block, 2, side, torch.bfloat16, True)
    with recorded("sm_90"):
        implementation("mbconv_inference")(*arguments(block, 2, side, torch.bfloat16, False))
        y, *saved = implementation("mbconv_training")(*given, True)
        implementation("mbconv_backward")(y, *given, *saved, [True] * 14)
    expected = ((2, block.expanded_channels, side, side), backends.Window((5, 5), (2, 2), (1, 1)), (1, 2, 1, 2))
    assert used == ["forward", "forward", "backward"]
    assert [(size, backends.Window(*map(tuple, window)), sides) for size, window, sides in asked] == [expected] * 3


def test_every_operator_is_registered_for_cuda_tensors() -> None:
    for operator in triton.WORDS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"effnet_ops::{operator}", "CUDA")
    assert set(cuda.WORDS) <= set(triton.WORDS)


def test_too_large_for_the_kernels_is_right_all_the_same() -> None:
    """What has more channels than shared memory has room for runs the fallback: on the CPU there is nothing else."""
    x, weights = torch.randn(1, 16000, 1, 1), (torch.randn(2, 16000, 1, 1) / 100, torch.randn(16000, 2, 1, 1))
    call = SqueezeExciteCall(x, weights[0], None, weights[1], None, "silu", "sigmoid")
    y, pooled = cuda.implementation("squeeze_excite")(call)
    assert torch.equal(y, reference.squeeze_excite(x, weights[0], None, weights[1], None, "silu", "sigmoid"))
    gradient = SqueezeExciteGradientCall(x, call, pooled, (True, False, False, False, False))
    assert cuda.implementation("squeeze_excite_backward")(gradient)[0].shape == x.shape


@pytest.mark.parametrize(
    ("shape", "sides", "expected"),
    [
        ((256, 96, 112, 112), (1, 1, 1, 1), False),
        ((520, 16, 512, 512), (1, 1, 1, 1), False),
        ((1, 16, 16000, 16000), (1, 1, 1, 1), True),
        ((1, 8, 4, 4), (20000, 20000, 20000, 20000), True),
        ((1 << 22, 8, 20, 20), (1, 1, 1, 1), True),
    ],
)
def test_images_too_large_for_the_kernels(shape: tuple[int, ...], sides: tuple[int, ...], expected: bool) -> None:
    assert too_large(shape, 3, sides) is expected


def test_table_covers_the_operators_of_both() -> None:
    assert set(gpu.table()) == set(cuda.WORDS)
    for entry in gpu.table().values():
        for choice in (entry | {"backend": entry["default"]}, *entry["shapes"].values()):
            assert choice["backend"] in gpu.GPU_BACKENDS
            known = choice["origin"] in ("byte model", "no row compares them yet")
            assert known or choice["origin"].startswith("measured on ")


def test_shapes_of_one_entry() -> None:
    assert gpu.bucket((300, 96, 112, 112), 3, 2, 2) == gpu.bucket((256, 96, 112, 112), 3, 2, 2)
    assert gpu.bucket((255, 96, 112, 112), 3, 2, 2) == gpu.bucket((64, 96, 112, 112), 3, 2, 2)
    assert gpu.bucket((1, 96, 14, 14), None, None, 4) == "batch=1,channels=96,height=14,width=14,element_size=4"
    assert gpu.bucket((0, 8, 4, 4), 3, 1, 4).startswith("batch=1,")


@pytest.mark.usefixtures("both")
def test_an_entry_wins_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    x = on_gpu(shape=(16, 96, 14, 14))
    shapes = {gpu.bucket(x.shape, 3, 1, 2): {"backend": "triton", "origin": "measured on a GPU"}}
    made = {"depthwise_conv2d": {"default": "cuda", "origin": "byte model", "shapes": shapes}}
    monkeypatch.setattr(gpu, "table", lambda: made)
    assert gpu.preferred("depthwise_conv2d", x, WINDOW) == ("triton", "measured on a GPU")
    assert gpu.preferred("depthwise_conv2d", on_gpu(), WINDOW) == ("cuda", "byte model")


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("operator", ["depthwise_conv2d", "depthwise_conv2d_backward"])
def test_contiguous_images_run_where_they_need_no_copy(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table says of channels_last ones; what is both at once is in the table."""
    made = {operator: {"default": "triton", "origin": "measured on a GPU", "shapes": {}}}
    monkeypatch.setattr(gpu, "table", lambda: made)
    monkeypatch.setattr(gpu, "_launched", lambda operator, backend: backend)
    contiguous = on_gpu(memory_format=torch.contiguous_format)
    assert gpu._implementation(operator, contiguous, WINDOW) == "cuda"
    assert gpu._implementation(operator, on_gpu(), WINDOW) == "triton"
    for shape in ((2, 8, 1, 1), (2, 1, 5, 5)):
        both = on_gpu(shape=shape, memory_format=torch.contiguous_format)
        assert gpu._implementation(operator, both, WINDOW) == "triton"
    with backends.use_backend("triton"):
        assert gpu._implementation(operator, contiguous, WINDOW) == "triton"


def block_row(provider: str, shape: str, milliseconds: float) -> dict[str, Any]:
    row = {"part": "kernels", "operation": "mbconv", "mode": "inference", "dtype": "bf16"}
    return {**row, "provider": f"effnet_ops {provider}", "shape": shape, "p50": milliseconds}


def test_blocks_run_on_what_their_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of one input are added up; what one backend has no row of does not count."""
    monkeypatch.syspath_prepend(str(gpu.TABLE.parents[2] / "benchmarks" / "gpu"))
    choice = importlib.import_module("choice")
    rows = [
        block_row("cuda", "256x24x56x56 -> 144 k3 s1 -> 24", 1.0),
        block_row("triton", "256x24x56x56 -> 144 k3 s1 -> 24", 2.0),
        block_row("cuda", "256x24x56x56 -> 144 k5 s2 -> 40", 4.0),
        block_row("triton", "256x24x56x56 -> 144 k5 s2 -> 40", 2.0),
        block_row("cuda", "256x16x112x112 -> 96 k3 s2 -> 24", 1.0),
    ]
    key = gpu.bucket((256, 24, 56, 56), None, None, 2)
    assert list(choice.measured_blocks(rows)) == [("mbconv_inference", key, 5.0, 4.0)]


@pytest.mark.usefixtures("both")
def test_a_block_in_inference_runs_on_cuda_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_launched", lambda operator, backend: backend)
    x = on_gpu()
    assert gpu._implementation("mbconv_inference", x, None) == "triton"
    with backends.use_backend("cuda"):
        assert gpu._implementation("mbconv_inference", x, None) == "cuda"
        assert gpu._implementation("mbconv_training", x, None) == "triton"
