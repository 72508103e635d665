"""The parameter groups of an MBConv block: what `effnet_ops.mbconv` takes for each of its convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class BatchNormParams(NamedTuple):
    """Batch normalisation over the channel axis; every vector has shape (C,).

    ``momentum=None`` means the cumulative average of ``torch.nn.BatchNorm2d`` and needs ``num_batches_tracked``.
    Without running statistics, batch statistics are used in evaluation too, as PyTorch does. In training, the batches
    of all processes of ``process_group`` (of torch.distributed) are one batch to it: each of them must call the block.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    num_batches_tracked: Tensor | None = None
    process_group: Any = None


class ConvNormParams(NamedTuple):
    """A convolution without its own padding or stride, and the normalisation that follows it.

    ``weight`` is (Cout, Cin, 1, 1) for a product and (C, 1, kh, kw) for a depthwise convolution. After folding,
    ``norm`` is None and ``bias`` (Cout,) carries the shift.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: BatchNormParams | None = None


class SqueezeExciteParams(NamedTuple):
    """The two small products of squeeze-and-excitation: reduce (R, C, 1, 1) and expand (C, R, 1, 1) with biases.

    ``activation`` is the one between them; None takes the block's.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: str | None = None
