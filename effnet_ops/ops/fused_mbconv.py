"""The operators of a whole Fused-MBConv block: inference, training and its gradient; and what training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effnet_ops import backends, reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, Constant, ConvNorm, Flags, Pair, Sides, SqueezeExcite
from effnet_ops.ops.mbconv import (
    Block,
    SyncBlock,
    block_gradient_flops,
    conv_norm,
    conv_norm_params,
    empty_pooled,
    empty_stage,
    empty_statistics,
    squeeze_excite_flops,
    squeeze_excite_layer,
    sync_flops,
    sync_output,
    sync_reference,
    training_results,
    used_statistics,
)
from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference.batch_norm import Statistics


class FusedMBConvCall(NamedTuple):
    """A block of x (N, Cin, H, W); ``drop_path`` (N,) multiplies each image's branch.

    Without ``project`` the block is one convolution with its normalisation and activation.
    """

    x: Activation
    expand: ConvNorm
    squeeze_excite: SqueezeExcite | None
    project: ConvNorm | None
    drop_path: Constant | None
    stride: Pair
    padding: Sides
    residual: bool
    activation: str

    @classmethod
    def of(
        cls,
        x: Tensor,
        expand: ConvNormParams,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams | None,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        activation: str,
        gate: str,
        residual: bool,
        drop_path: Tensor | None = None,
        training: bool = False,
    ) -> FusedMBConvCall:
        """The call of `effnet_ops.fused_mbconv` with these arguments."""
        if drop_path is not None:
            drop_path = drop_path.to(reference.compute_dtype(x.dtype))
        layer = squeeze_excite_layer(squeeze_excite, activation, gate)
        last = None if project is None else conv_norm(project, training)
        return cls(x, conv_norm(expand, training), layer, last, drop_path, stride, padding, residual, activation)

    def convs(self) -> tuple[ConvNorm, ConvNorm | None]:
        return self.expand, self.project

    def uses_batch(self) -> bool:
        """Whether a normalisation takes the statistics of this batch."""
        return any(conv is not None and conv.uses_batch() for conv in self.convs())

    def saves_expanded(self) -> bool:
        """Whether training keeps the result of the expansion: a dense convolution costs too much to run again."""
        return True

    def window(self) -> backends.Window:
        return backends.Window(self.expand.weight.shape[2:], self.stride, (1, 1))

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.expand.weight.shape[2:], self.stride, (1, 1))

    def output_shape(self) -> tuple[int, int, int, int]:
        weight = self.expand.weight
        size = output_size(self.x.shape[2:], weight.shape[2:], self.stride, self.sides(), (1, 1))
        last = weight if self.project is None else self.project.weight
        return (self.x.shape[0], last.shape[0], *size)

    def stages(self) -> reference.FusedStages:
        layer = self.squeeze_excite
        return reference.fused_mbconv(
            self.x,
            conv_norm_params(self.expand),
            None if layer is None else SqueezeExciteParams(*layer[:5]),
            conv_norm_params(self.project),
            stride=self.stride,
            padding=self.sides(),
            activation=self.activation,
            gate="sigmoid" if layer is None else layer.gate,
            residual=self.residual,
            drop_path=self.drop_path,
            training=False,
        )

    def reference(self) -> Tensor:
        return _library.as_result(self.x, self.stages().y)

    def standard(self) -> Tensor:
        if self.uses_batch():
            return self.stages().y
        block = (self.expand, self.squeeze_excite, self.project)
        settings = (self.stride, self.sides(), self.activation, self.residual, self.drop_path)
        return standard.fused_mbconv(self.x, *block, *settings)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, self.output_shape())

    def flops(self, out: Sequence[int]) -> int:
        flops = _library.convolution_flops(out, self.expand.weight)
        if self.project is not None:
            flops += _library.convolution_flops(out, self.project.weight)
        return flops + squeeze_excite_flops(self.x[0], self.squeeze_excite)


class Saved(NamedTuple):
    """What training hands to its gradient: before each normalisation, the statistics of the batch, the pooled values.

    What there is none of is empty.
    """

    expanded: Constant
    projected: Constant
    expand_mean_used: Constant
    expand_var_used: Constant
    project_mean_used: Constant
    project_var_used: Constant
    pooled: Constant

    def statistics(self) -> list[Statistics | None]:
        """Of expand and project."""
        return used_statistics(self)


class FusedMBConvTrainingCall(NamedTuple):
    """The block where a gradient may come; the results are y and those of `Saved`."""

    call: FusedMBConvCall
    save_expanded: bool

    def reference(self) -> tuple[Tensor, ...]:
        stages = self.call.stages()
        return training_results(self.output(), (stages.expanded, stages.projected), stages)

    def output(self) -> tuple[Tensor, ...]:
        call = self.call
        x, size, channels = call.x, call.output_shape(), call.expand.weight.shape[0]
        return (
            _library.empty_result(x, size),
            empty_stage(x, (size[0], channels, *size[2:]) if self.save_expanded else None),
            empty_stage(x, None if call.project is None else size),
            *empty_statistics(x, call.convs()),
            empty_pooled(x, channels, call.squeeze_excite),
        )

    def flops(self, out: Sequence[Sequence[int]]) -> int:
        return self.call.flops(out[0])


class FusedMBConvGradientCall(NamedTuple):
    """The gradients of all that has one in the call, as far as ``needs`` asks for them."""

    grad: Activation
    call: FusedMBConvCall
    saved: Saved
    needs: Flags

    of = _library.Gradient.of(FusedMBConvCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        """The gradients of each convolution; what is computed a second time does not count."""
        convs = {"project": (self.call.project, self.grad), "expand": (self.call.expand, self.grad)}
        return block_gradient_flops(fused_mbconv.signature, self, convs)


class FusedMBConvSyncTrainingCall(NamedTuple):
    """Training where the processes of a group share the statistics; the results are the same, and counts (2,)."""

    training: FusedMBConvTrainingCall
    process_group: str

    reference, output, flops = sync_reference, sync_output, sync_flops


class FusedMBConvSyncGradientCall(NamedTuple):
    """The gradients of such a block."""

    grad: Activation
    call: FusedMBConvCall
    saved: Saved
    counts: Constant
    process_group: str
    needs: Flags

    of = _library.Gradient.of(FusedMBConvCall)
    reference, output = sync_reference, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        return FusedMBConvGradientCall(self.grad, self.call, self.saved, self.needs).flops(out)


fused_mbconv = Block("fused_mbconv", FusedMBConvCall, FusedMBConvTrainingCall, FusedMBConvGradientCall, Saved)
fused_mbconv_inference = fused_mbconv.inference
fused_mbconv_sync = SyncBlock(fused_mbconv, FusedMBConvSyncTrainingCall, FusedMBConvSyncGradientCall)
