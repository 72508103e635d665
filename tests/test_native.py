"""The compiled library: stable ABI, instruction sets that agree, threads that agree."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from cases import (
    DEPTHWISE,
    MBCONV,
    POINTWISE,
    SQUEEZE_EXCITE,
    DepthwiseCase,
    MBConvCase,
    PointwiseCase,
    SqueezeExciteCase,
)
from helpers import HALF, check, mbconv_bounds, mbconv_function, mbconv_tensors, names, relative_error, run
from test_depthwise import problem as depthwise_problem
from test_pointwise import problem as pointwise_problem
from test_squeeze_excite import problem as squeeze_excite_problem

import effnet_ops
from effnet_ops import _native, reference

assert _native.module is not None, _native.why_missing
C = _native.module
LOWER = [isa for isa in C.available_isas() if isa != C.isa()]


@pytest.fixture(params=LOWER)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that runs here besides the best."""
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


def test_stable_abi() -> None:
    """No symbol of ATen or c10 is undefined, so that one build serves later versions of PyTorch."""
    nm = shutil.which("nm") or shutil.which("llvm-nm")
    assert nm, "nm (binutils) is needed"
    listing = subprocess.run([nm, "-D", "--undefined-only", C.__file__], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") or "stable" in symbol for symbol in undefined)
    assert [symbol for symbol in undefined if "2at" in symbol or "3c10" in symbol] == []


def test_build_information() -> None:
    info = C.build_info()
    assert info["built_isas"] and set(C.available_isas()) <= set(info["built_isas"])
    assert C.isa() == C.available_isas()[-1]
    assert all(isinstance(value, bool) for value in C.cpu_features().values())


def test_unknown_isa() -> None:
    before = C.isa()
    with pytest.raises(ValueError, match="available: "):
        C.set_isa("mmx")
    assert C.isa() == before


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
TAILS = ("3x3", "5x5_stride2_odd", "7x7", "channels_13", "channels_67", "square", "odd_channels", "deep")
"""Channel counts with and without a remainder on every vector width."""


def few(cases: list) -> list:
    return [case for case in cases if case.name in TAILS]


@pytest.mark.parametrize("case", DEPTHWISE, ids=names(DEPTHWISE))
def test_isa_depthwise(isa: str, case: DepthwiseCase) -> None:
    check(*depthwise_problem(case), torch.float32)


@pytest.mark.parametrize("case", POINTWISE, ids=names(POINTWISE))
def test_isa_pointwise(isa: str, case: PointwiseCase) -> None:
    check(*pointwise_problem(case), torch.float32)


@pytest.mark.parametrize("case", SQUEEZE_EXCITE, ids=names(SQUEEZE_EXCITE))
def test_isa_squeeze_excite(isa: str, case: SqueezeExciteCase) -> None:
    check(*squeeze_excite_problem(case), torch.float32)


@DTYPES
@pytest.mark.parametrize("case", few(DEPTHWISE), ids=names(few(DEPTHWISE)))
def test_isa_depthwise_precisions(isa: str, case: DepthwiseCase, dtype: torch.dtype) -> None:
    check(*depthwise_problem(case), dtype)


@DTYPES
@pytest.mark.parametrize("case", few(POINTWISE), ids=names(few(POINTWISE)))
def test_isa_pointwise_precisions(isa: str, case: PointwiseCase, dtype: torch.dtype) -> None:
    check(*pointwise_problem(case), dtype)


@pytest.mark.parametrize("case", MBCONV, ids=names(MBCONV))
def test_isa_mbconv(isa: str, case: MBConvCase) -> None:
    check(mbconv_function(case, True), mbconv_tensors(case), torch.float32)


@DTYPES
@pytest.mark.parametrize("case", few(MBCONV), ids=names(few(MBCONV)))
def test_isa_mbconv_precisions(isa: str, case: MBConvCase, dtype: torch.dtype) -> None:
    for training in (False, True):
        check(mbconv_function(case, training), mbconv_tensors(case), dtype, **mbconv_bounds(case, dtype))


THREADED = [case for case in MBCONV if case.name in ("large", "residual", "b0_style", "one_pixel", "odd_channels")]


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", THREADED, ids=names(THREADED))
def test_threads_agree(case: MBConvCase, training: bool, threads: int) -> None:
    """However many threads share the work, also more than there are images or cores."""
    function, tensors = mbconv_function(case, training), mbconv_tensors(case)
    expected, expected_grads = run(function, tensors)
    torch.set_num_threads(threads)
    try:
        out, grads = run(function, tensors)
    finally:
        torch.set_num_threads(1)
    assert relative_error(out, expected) <= 1e-13
    assert all(relative_error(grads[name], exact, 1e-6) <= 1e-10 for name, exact in expected_grads.items())


@pytest.mark.parametrize("case", DEPTHWISE, ids=names(DEPTHWISE))
def test_threads_agree_depthwise(case: DepthwiseCase) -> None:
    torch.set_num_threads(3)
    try:
        check(*depthwise_problem(case), torch.float32)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_freed_memory_is_an_error(layout: torch.memory_format) -> None:
    """As sharding and offloading leave it."""
    x, weight = torch.randn(1, 8, 5, 5).contiguous(memory_format=layout), torch.randn(8, 1, 3, 3)
    for tensor, name in ((x, "x"), (weight, "weight")):
        given = {"x": x, "weight": weight, name: tensor.clone(memory_format=torch.preserve_format)}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name} has no memory: its storage was freed"):
            effnet_ops.depthwise_conv2d(given["x"], given["weight"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_stride_longer_than_the_image(layout: torch.memory_format) -> None:
    """One output, at no more than the cost of one."""
    x, weight = torch.randn(1, 8, 8, 8).contiguous(memory_format=layout).requires_grad_(), torch.randn(8, 1, 3, 3)
    y = effnet_ops.depthwise_conv2d(x, weight, padding=1, stride=2**31 - 1)
    # Longer ones overflow in PyTorch's own gradient.
    expected = torch.nn.functional.conv2d(x, weight, padding=1, stride=1000, groups=8)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("macro", "named"), [("ACTIVATIONS", reference.ACTIVATIONS), ("GATES", reference.GATES)])
def test_c_and_python_list_the_same_activations(macro: str, named: Mapping[str, object]) -> None:
    """In the same order, too: prepared kernels take the numbers of activations and gates."""
    header = (Path(__file__).resolve().parent.parent / "csrc" / "activations.h").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"#define EFFNET_{macro}\(X\) (.*)", header)
    assert re.findall(r"X\((\w+)\)", listed) == list(named)
