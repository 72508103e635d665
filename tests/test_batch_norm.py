"""Batch statistics inside MBConv: what they are, and how the running buffers follow them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import normal, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, reference


class Block(nn.Module):
    """Depthwise and project convolutions with their normalisations, fused or by torch.nn."""

    def __init__(self, momentum: float | None = 0.1, stride: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, stride, 1, groups=8, bias=False)
        self.project = nn.Conv2d(8, 16, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8, momentum=momentum), nn.BatchNorm2d(16, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """By torch.nn."""
        return self.bn2(self.project(F.silu(self.bn1(self.depthwise(x)))))

    def fused(self, x: Tensor) -> Tensor:
        def conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvNormParams:
            buffers = (norm.running_mean, norm.running_var, norm.eps, norm.momentum, norm.num_batches_tracked)
            return ConvNormParams(conv.weight, None, BatchNormParams(norm.weight, norm.bias, *buffers))

        return effnet_ops.mbconv(
            x,
            None,
            conv(self.depthwise, self.bn1),
            None,
            conv(self.project, self.bn2),
            stride=self.depthwise.stride,
            padding=1,
            residual=False,
            training=self.training,
        )


def pair_of_blocks(**keywords: object) -> tuple[Block, Block]:
    stock, ours = Block(**keywords).double(), Block(**keywords).double()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def assert_same_buffers(ours: nn.Module, stock: nn.Module) -> None:
    for (name, value), expected in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert value.dtype == expected.dtype
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
def test_running_statistics_follow_stock(momentum: float | None, backend: str) -> None:
    """Several steps; with momentum None the cumulative average; the variance is corrected by n / (n - 1)."""
    stock, ours = pair_of_blocks(momentum=momentum)
    for _ in range(3):
        x = normal(2, 8, 5, 6) + 3
        stock(x)
        ours.fused(x)
        assert_same_buffers(ours, stock)
    assert ours.bn1.num_batches_tracked == 3


def test_smallest_count(backend: str) -> None:
    """Two values a channel: the unbiased variance is twice the biased one."""
    stock, ours = pair_of_blocks(stride=1)
    x = normal(2, 8, 1, 1)
    stock(x)
    ours.fused(x)
    assert_same_buffers(ours, stock)


def test_one_value_per_channel_is_refused(backend: str) -> None:
    block = Block().double()
    before = [value.clone() for value in block.buffers()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block.fused(normal(1, 8, 1, 1))
    assert all(map(torch.equal, block.buffers(), before))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_updated_once_under_checkpointing(use_reentrant: bool, backend: str) -> None:
    """Checkpointing runs the block a second time in the backward pass; the buffers move once, gradients agree."""
    stock, ours = pair_of_blocks()
    x = normal(2, 8, 6, 6).requires_grad_()
    y = x.detach().clone().requires_grad_()
    grad = normal(2, 16, 3, 3)
    stock(x).backward(grad)
    checkpoint(ours.fused, y, use_reentrant=use_reentrant).backward(grad)
    assert_same_buffers(ours, stock)
    assert relative_error(y.grad, x.grad) <= 1e-9
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) <= 1e-9, name


def test_evaluation_leaves_buffers_alone(backend: str) -> None:
    block = Block().double().eval()
    before = [value.clone() for value in block.buffers()]
    block.fused(normal(2, 8, 5, 5)).sum().backward()
    assert all(map(torch.equal, block.buffers(), before))


def test_empty_batch_leaves_statistics_alone(backend: str) -> None:
    """But for the number of batches, which PyTorch counts."""
    block = Block().double()
    before = {name: value.clone() for name, value in block.named_buffers()}
    block.fused(normal(0, 8, 6, 6).requires_grad_()).sum().backward()
    for name, value in block.named_buffers():
        assert torch.equal(value, before[name] + name.endswith("num_batches_tracked"))
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_without_running_statistics(training: bool, backend: str) -> None:
    """Batch statistics in evaluation too, as torch.nn.BatchNorm2d(track_running_stats=False)."""
    x, weight, project = normal(3, 8, 5, 5), normal(8, 1, 3, 3), normal(4, 8, 1, 1)
    gamma, beta = normal(8), normal(8)
    norm = BatchNormParams(gamma, beta)
    groups = (None, ConvNormParams(weight, None, norm), None, ConvNormParams(project))
    out = effnet_ops.mbconv(x, *groups, stride=1, padding=1, activation="relu", residual=False, training=training)
    h = F.batch_norm(F.conv2d(x, weight, padding=1, groups=8), None, None, gamma, beta, training=True)
    assert relative_error(out, F.conv2d(F.relu(h), project)) <= 1e-12


def test_half_precision_statistics(backend: str) -> None:
    """Statistics of bf16 activations are those of the convolution's fp32 result or of its rounding, kept in fp32."""
    stock, ours = pair_of_blocks()
    ours.float()
    x = normal(4, 8, 9, 9).bfloat16()
    stock(x.double())
    ours.fused(x)
    for (name, value), expected in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.allclose(value.double(), expected.double(), rtol=4e-3, atol=4e-3), name


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_variance_far_from_zero_mean(offset: float, backend: str) -> None:
    """The variance of values whose mean is a thousand times their deviation: no cancellation of E[x^2] - E[x]^2."""
    block = Block(momentum=1.0, stride=1)
    with torch.no_grad():
        block.depthwise.weight.zero_()[:, :, 1, 1] = 1.0
    x = (normal(4, 8, 16, 16) + offset).float()
    block.fused(x.to(memory_format=torch.channels_last))
    exact = x.double().var((0, 2, 3))
    # x itself is exact here; the mean's own rounding (2^-24 * offset) adds its square to the variance.
    assert relative_error(block.bn1.running_var, exact) <= 1e-5


def test_reference_is_pytorch() -> None:
    x, gamma, beta = normal(3, 5, 4, 6), normal(5), normal(5)
    mean, variance = reference.batch_statistics(x)
    out = reference.batch_norm(x, mean, variance, gamma, beta, 1e-3)
    assert relative_error(out, F.batch_norm(x, None, None, gamma, beta, True, eps=1e-3)) <= 1e-14
