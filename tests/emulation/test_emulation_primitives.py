"""What emulated device code is made of: shuffles, votes, conversions, matrix fragments, and the shadowed headers."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from emulator import CUDA, HERE, EmulationError, Machine
from torch import Tensor

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
by_format = pytest.mark.parametrize("name", HALF)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def declared(path: Path) -> set[str]:
    """The functions that a header defines for kernels."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    text = re.sub(r"namespace detail \{.*?\n\}  ?\n?", "", text, flags=re.S)
    return set(re.findall(r"^(?:__device__ |inline |template <[^>]*> |[\w:]+\*? )+(\w+)\(", text, re.M)) - {"asm"}


@pytest.mark.parametrize("name", ["ptx.cuh", "launch.cuh"])
def test_shadowed_headers_have_the_same_functions(name: str) -> None:
    assert declared(CUDA / name) == declared(HERE / "include" / name)
    assert len(declared(CUDA / name)) >= 3


def test_assembly_and_launches_stay_in_the_shadowed_headers() -> None:
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]:
        if path.name not in ("ptx.cuh", "launch.cuh"):
            assert not re.search(r"\basm\b|<<<|__shared__", re.sub(r"//[^\n]*", "", path.read_text())), path


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("delta", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_shuffles(samples: Machine, dtype: torch.dtype, delta: int, width: int) -> None:
    threads, lane = 96, 5
    values = torch.arange(1, threads + 1).to(dtype)
    x, out = samples.upload("x", values), samples.empty("out", (4, threads), dtype)
    function = "shuffle_floats" if dtype == torch.float32 else "shuffle_longs"
    assert samples.call(function, *pointers(x, out), threads, lane, delta, width) == 0
    position = torch.arange(threads)
    within, first = position % width, position - position % width
    sources = (
        first + lane % width,
        torch.where(within >= delta, position - delta, position),
        torch.where(within + delta < width, position + delta, position),
        # Groups in front can be read, those behind not.
        torch.where((position ^ delta) < first + width, position ^ delta, position),
    )
    for found, source in zip(out, sources, strict=True):
        assert torch.equal(found, values[source])


def test_votes(samples: Machine) -> None:
    wishes = torch.stack([torch.ones(32), torch.zeros(32), torch.rand(32).round()]).int()
    x, out = samples.upload("x", wishes.flatten()), samples.empty("out", (3, 3, 32), torch.int32)
    assert samples.call("count_votes", *pointers(x, out), 96) == 0
    ballots = (wishes.long() << torch.arange(32)).sum(1).to(torch.int32)
    assert torch.equal(out[0], ballots[:, None].expand(3, 32))
    assert torch.equal(out[1], wishes.any(1).int()[:, None].expand(3, 32))
    assert torch.equal(out[2], wishes.all(1).int()[:, None].expand(3, 32))


@by_format
def test_conversions_are_pytorchs(samples: Machine, name: str) -> None:
    """All 2**16 numbers widened; rounded, all of them, what lies halfway between two, and its neighbours."""
    dtype = HALF[name]
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype).float()
    widened = torch.empty(2**16)
    samples.call("widen_from", name == "f16", *pointers(bits, widened), 2**16, result=None)
    assert torch.equal(widened.nan_to_num(nan=7e7), exact.nan_to_num(nan=7e7))

    finite = exact[exact.isfinite()].sort().values
    halfway = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    values = [finite, halfway, *(halfway.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    largest = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38, -3.4e38, 1e-40, -1e-40, 0.0, -0.0]
    )
    values = torch.cat([*values, largest, torch.randn(10000) * torch.rand(10000).mul(60).sub(30).exp2()])
    rounded = torch.empty(len(values), dtype=torch.int16)
    samples.call("round_to", name == "f16", *pointers(values, rounded), len(values), result=None)
    expected = values.to(dtype)
    assert torch.equal(rounded.view(dtype).isnan(), expected.isnan())
    assert torch.equal(rounded[~expected.isnan()], expected[~expected.isnan()].view(torch.int16))


def test_approximations(samples: Machine) -> None:
    """As coarse as the instructions may be, not coarser; and a multiplication and addition that rounds once."""
    x = torch.cat([torch.randn(1000) * 3, torch.tensor([1 + 2.0**-12, 1e-30, -100.0, 100.0])])
    out = torch.empty(4, len(x))
    samples.call("approximate", *pointers(x, out), len(x), result=None)
    exact = x.double()
    for found, value, bound in (
        (out[0], exact.tanh(), 2**-11),
        (out[1], exact.exp2(), 2**-22),
        (out[2], 1 / exact, 2**-23),
    ):
        assert ((found.double() - value).abs() <= bound * value.abs() + 2**-126).all()
    assert (out[0].double() - exact.tanh()).abs().max() > 2**-16
    assert torch.equal(out[3], (exact * exact - 1).float())


def words(values: Tensor) -> Tensor:
    """Two neighbouring two-byte numbers a word, the first in the lower half."""
    return values.contiguous().view(torch.int32)


def fragments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each of 32 lanes holds of a (16, 16), b (16, 8) and c (16, 8): the tables of docs/emulation.md."""
    group, place = torch.arange(32) // 4, torch.arange(32) % 4
    pair = torch.stack([2 * place, 2 * place + 1], 1)  # [32, 2]
    of_a = [a[(group + 8 * (i % 2))[:, None], pair + 8 * (i // 2)] for i in range(4)]
    of_b = [b[pair + 8 * i, group[:, None]] for i in range(2)]
    of_c = [c[(group + 8 * i)[:, None], pair] for i in range(2)]
    return words(torch.stack(of_a, 1)), words(torch.stack(of_b, 1)), torch.cat(of_c, 1)


@by_format
def test_matrix_product_by_fragments(samples: Machine, name: str) -> None:
    a, b = torch.randn(16, 16).to(HALF[name]), torch.randn(16, 8).to(HALF[name])
    before = torch.randn(16, 8)
    given = fragments(a, b, before)
    x = [samples.upload(part, value) for part, value in zip("ab", given[:2], strict=True)]
    c = samples.upload("c", given[2], kind="inout")
    assert samples.call("multiply_fragments", name == "f16", *pointers(*x, c)) == 0
    exact = (before.double() + a.double() @ b.double()).float()
    assert torch.equal(c.view(32, 4), fragments(a, b, exact)[2])


@by_format
def test_matrix_product_by_tiles(samples: Machine, name: str) -> None:
    """ldmatrix brings the rows of a and the columns of b as the product's fragments."""
    a, b = torch.randn(16, 16).to(HALF[name]), torch.randn(16, 8).to(HALF[name])
    x, y, c = samples.upload("a", a), samples.upload("b", b), samples.empty("c", (16, 8), torch.float32)
    assert samples.call("multiply_tiles", name == "f16", *pointers(x, y, c)) == 0
    assert torch.equal(c, (a.double() @ b.double()).float())


def test_a_grid_is_needed(samples: Machine) -> None:
    x, out = samples.upload("x", torch.ones(1)), samples.empty("out", (4, 1), torch.float32)
    with pytest.raises(EmulationError, match="cannot be launched"):
        samples.call("shuffle_floats", *pointers(x, out), 1025, 0, 0, 32)
