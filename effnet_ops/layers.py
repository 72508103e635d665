"""The fused operators as modules, whose children carry timm's parameter names.

A module hands its children's parameters to one fused function. Where that would not be what the children do (a hook,
a subclass, a parametrization, batch normalisations in different modes), it runs them one by one.
torch.fx records each of these modules as one node, as it does the layers of torch.nn.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from effnet_ops import backends, checks, context, distributed, functional, internals, reference
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams

Device = torch.device | str | int | None
Padding = int | str | Sequence[int]


def expanded_channels(in_channels: int, expand_ratio: float) -> int:
    """Channels between the expansion and the projection of a block: t times its input's, to a whole number."""
    return round(in_channels * expand_ratio)


def squeezed_channels(in_channels: int, se_ratio: float) -> int:
    """Channels between the products of squeeze-and-excitation, relative to the block's input; 0 where there is none."""
    return max(1, int(in_channels * se_ratio)) if se_ratio else 0


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with an activation, as `effnet_ops.depthwise_conv2d`; an ``nn.Conv2d`` to all others.

    Input (N, C, H, W), output (N, C, Ho, Wo); ``weight`` (C, 1, kh, kw), ``bias`` (C,) or None.

    Args:
        channels: C.
        kernel_size, stride, dilation: an int or (vertical, horizontal).
        padding: an int, a pair, (top, bottom, left, right) or "same" in TensorFlow's meaning.
        bias: learn an additive bias.
        activation: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".

    Raises ValueError for a size or name that does not fit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        *,
        bias: bool = False,
        activation: str = "none",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_activation(activation)
        channels, kernel_size = checks.check_count("channels", channels), checks.pair("kernel_size", kernel_size, 1)
        stride, dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
        super().__init__(
            channels, channels, kernel_size, stride, 0, dilation, channels, bias, device=device, dtype=dtype
        )
        self.padding = _stored_padding(padding)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        return functional.depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class PaddedConv2d(nn.Conv2d):
    """A dense convolution that pads as the fused operators do: also unevenly, and "same" in TensorFlow's meaning.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo); arguments as ``nn.Conv2d`` with `DepthwiseConv2d`'s padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        *,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels, out_channels = _channels(in_channels, out_channels)
        kernel_size, stride = checks.pair("kernel_size", kernel_size, 1), checks.pair("stride", stride, 1)
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias, device=device, dtype=dtype)
        self.padding = _stored_padding(padding)

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        return padded_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvNormAct(nn.Module):
    """Dense convolution, batch normalisation, activation. A 1x1 convolution runs as `effnet_ops.pointwise_conv2d`.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo). Children: ``conv`` and ``bn1``.

    Args:
        in_channels, out_channels: Cin, Cout.
        kernel_size, stride: an int or (vertical, horizontal).
        padding: as in `DepthwiseConv2d`; None is half the kernel on every side.
        activation: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".
        eps, momentum: of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        *,
        padding: Padding | None = None,
        activation: str = "silu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_activation(activation)
        in_channels, out_channels = _channels(in_channels, out_channels)
        factory = {"device": device, "dtype": dtype}
        padding = _half(kernel_size) if padding is None else padding
        self.activation = activation
        self.conv = dense_conv(in_channels, out_channels, kernel_size, stride, padding, **factory)
        self.bn1 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        return conv_norm_act(x, self.conv, self.bn1, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation, as `effnet_ops.squeeze_excite`: scales each channel of (N, C, H, W) by a gate.

    Children: ``conv_reduce`` (R, C, 1, 1) and ``conv_expand`` (C, R, 1, 1), both with a bias.

    Args:
        channels: C. squeezed: R, at least 1.
        activation: between the products: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".
        gate: one of `effnet_ops.reference.GATES`, such as "sigmoid".
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        *,
        activation: str = "silu",
        gate: str = "sigmoid",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_activation(activation)
        checks.check_gate(gate)
        channels, squeezed = checks.check_count("channels", channels), checks.check_count("squeezed", squeezed)
        factory = {"device": device, "dtype": dtype}
        self.activation, self.gate = activation, gate
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1, **factory)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        params = self.parameter_group()
        if params is not None:
            return functional.squeeze_excite(x, *params[:4], activation=self.activation, gate=self.gate)
        hidden = reference.activate(self.conv_reduce(x.mean((2, 3), keepdim=True)), self.activation)
        return x * reference.GATES[self.gate](self.conv_expand(hidden))

    def parameter_group(self) -> SqueezeExciteParams | None:
        """The children's parameters, or None where a child is not a plain 1x1 convolution."""
        reduce, expand = self._modules["conv_reduce"], self._modules["conv_expand"]
        if _any_patched() or not (_is_pointwise(reduce) and _is_pointwise(expand)):
            return None
        weights = _parameter(reduce, "weight"), _parameter(reduce, "bias")
        return SqueezeExciteParams(*weights, _parameter(expand, "weight"), _parameter(expand, "bias"), self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, gate={self.gate}"


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation (arXiv 1905.11946), as one call of `effnet_ops.mbconv`.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo). Children: ``conv_pw``, ``bn1``, ``conv_dw``, ``bn2``, ``se``,
    ``conv_pwl``, ``bn3``; without expansion ``conv_dw``, ``bn1``, ``se``, ``conv_pw``, ``bn2``. The input is added
    where stride is 1 and Cin = Cout. Each normalisation follows its own training flag, so frozen ones stay frozen.

    Args:
        in_channels, out_channels: Cin, Cout.
        kernel_size, stride: of the depthwise convolution: an int or (vertical, horizontal).
        expand_ratio: t; where t * Cin = Cin there is no expansion.
        se_ratio: width of squeeze-and-excitation relative to Cin; 0 leaves it out.
        padding: as in `DepthwiseConv2d`; None is half the kernel on every side.
        activation: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".
        gate: one of `effnet_ops.reference.GATES`, such as "sigmoid".
        drop_path_rate: probability, in [0, 1), that training drops the branch of an image (arXiv 1603.09382).
        eps, momentum: of the normalisations.

    Raises ValueError for a size, ratio or name that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        *,
        expand_ratio: float = 6.0,
        se_ratio: float = 0.25,
        padding: Padding | None = None,
        activation: str = "silu",
        gate: str = "sigmoid",
        drop_path_rate: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_activation(activation)
        checks.check_gate(gate)
        in_channels, out_channels = _channels(in_channels, out_channels)
        channels, squeezed = _inner_channels(in_channels, expand_ratio, se_ratio, drop_path_rate)
        stride = checks.pair("stride", stride, 1)
        padding = _half(kernel_size) if padding is None else padding
        factory = {"device": device, "dtype": dtype}

        def norm(size: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(size, eps, momentum, **factory)

        self.activation, self.gate = activation, gate
        self.drop_path_rate = drop_path_rate
        self.expands = channels != in_channels
        self.residual = stride == (1, 1) and in_channels == out_channels
        if self.expands:
            self.conv_pw = nn.Conv2d(in_channels, channels, 1, bias=False, **factory)
            self.bn1 = norm(channels)
        self.conv_dw = DepthwiseConv2d(channels, kernel_size, stride, padding, **factory)
        self.add_module("bn2" if self.expands else "bn1", norm(channels))
        se = {"activation": activation, "gate": gate, **factory}
        self.se = SqueezeExcite(channels, squeezed, **se) if squeezed else nn.Identity()
        project = nn.Conv2d(channels, out_channels, 1, bias=False, **factory)
        self.add_module("conv_pwl" if self.expands else "conv_pw", project)
        self.add_module("bn3" if self.expands else "bn2", norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        drop_path = _drawn_drop_path(self, x)
        groups = _fused_groups(self, x)
        if groups is None:
            return self._run_children(x, drop_path)
        *params, depthwise, mode = groups
        return functional.mbconv(
            x,
            *params,
            stride=depthwise.stride,
            padding=depthwise.padding,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            drop_path=drop_path,
            training=mode is not False,
        )

    def _conv_norms(self) -> tuple[tuple[nn.Module, nn.Module] | None, ...]:
        """(convolution, normalisation) of the expansion, or None, the depthwise step and the projection."""
        m = self._modules
        if self.expands:
            return (m["conv_pw"], m["bn1"]), (m["conv_dw"], m["bn2"]), (m["conv_pwl"], m["bn3"])
        return None, (m["conv_dw"], m["bn1"]), (m["conv_pw"], m["bn2"])

    def _groups(self) -> tuple | None:
        """The four parameter groups, the depthwise convolution and the mode of the normalisations (`_shared_mode`).

        None where the fused block would not do what the children do.
        """
        if _any_patched():
            return None
        expand, (depthwise, bn_depthwise), (project, bn_project) = self._conv_norms()
        fits = _is_depthwise(depthwise) and _is_pointwise(project) and (expand is None or _is_pointwise(expand[0]))
        mode = _shared_mode(bn_depthwise, bn_project, *(expand[1:] if expand else ()))
        if not fits or mode is None:
            return None
        training = mode is not False
        se_fits, se_params = _squeeze_excite_params(self._modules["se"])
        expand_params = _conv_norm_params(*expand, training) if expand else None
        depthwise_params = _conv_norm_params(depthwise, bn_depthwise, training)
        project_params = _conv_norm_params(project, bn_project, training)
        if not se_fits or _has_bias_and_norm(expand_params, depthwise_params, project_params):
            return None
        return expand_params, depthwise_params, se_params, project_params, depthwise, mode

    def _run_children(self, x: Tensor, drop_path: Tensor | None) -> Tensor:
        expand, depthwise, project = self._conv_norms()
        h = x
        for conv, norm in (depthwise,) if expand is None else (expand, depthwise):
            h = reference.activate(_normalise(norm, conv(h)), self.activation)
        conv, norm = project
        return _joined(self, x, _normalise(norm, conv(self.se(h))), drop_path)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, residual={self.residual}, drop_path_rate={self.drop_path_rate}"


class FusedMBConv(nn.Module):
    """Fused-MBConv (arXiv 2104.00298), as one call of `effnet_ops.fused_mbconv`.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo). Children: ``conv_exp``, ``bn1``, ``se``, ``conv_pwl``, ``bn2``;
    without expansion the one convolution ``conv`` from Cin to Cout, ``bn1``, ``se``. The input is added where stride is
    1 and Cin = Cout. Each normalisation follows its own training flag, so frozen ones stay frozen.

    Args:
        in_channels, out_channels: Cin, Cout.
        kernel_size, stride: of the dense convolution: an int or (vertical, horizontal).
        expand_ratio: t; where t * Cin = Cin there is no expansion.
        se_ratio: width of squeeze-and-excitation relative to Cin; 0 leaves it out.
        padding, activation, gate, drop_path_rate, eps, momentum: as in `MBConv`.

    Raises ValueError for a size, ratio or name that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        *,
        expand_ratio: float = 4.0,
        se_ratio: float = 0.0,
        padding: Padding | None = None,
        activation: str = "silu",
        gate: str = "sigmoid",
        drop_path_rate: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_activation(activation)
        checks.check_gate(gate)
        in_channels, out_channels = _channels(in_channels, out_channels)
        channels, squeezed = _inner_channels(in_channels, expand_ratio, se_ratio, drop_path_rate)
        stride = checks.pair("stride", stride, 1)
        padding = _half(kernel_size) if padding is None else padding
        factory = {"device": device, "dtype": dtype}
        self.activation, self.gate = activation, gate
        self.drop_path_rate = drop_path_rate
        self.expands = channels != in_channels
        self.residual = stride == (1, 1) and in_channels == out_channels
        wide = channels if self.expands else out_channels
        conv = dense_conv(in_channels, wide, kernel_size, stride, padding, **factory)
        self.add_module("conv_exp" if self.expands else "conv", conv)
        self.bn1 = nn.BatchNorm2d(wide, eps, momentum, **factory)
        se = {"activation": activation, "gate": gate, **factory}
        self.se = SqueezeExcite(wide, squeezed, **se) if squeezed else nn.Identity()
        if self.expands:
            self.conv_pwl = nn.Conv2d(wide, out_channels, 1, bias=False, **factory)
            self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if context.is_leaf(self, x):
            return context.leaf(self, x)
        drop_path = _drawn_drop_path(self, x)
        groups = _fused_groups(self, x)
        if groups is None:
            return self._run_children(x, drop_path)
        *params, conv, mode = groups
        return functional.fused_mbconv(
            x,
            *params,
            stride=conv.stride,
            padding=conv.padding,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            drop_path=drop_path,
            training=mode is not False,
        )

    def _conv_norms(self) -> tuple[tuple[nn.Module, nn.Module], tuple[nn.Module, nn.Module] | None]:
        """(convolution, normalisation) of the dense step, and of the projection or None."""
        m = self._modules
        if self.expands:
            return (m["conv_exp"], m["bn1"]), (m["conv_pwl"], m["bn2"])
        return (m["conv"], m["bn1"]), None

    def _groups(self) -> tuple | None:
        """The three parameter groups, the dense convolution and the mode of the normalisations (`_shared_mode`).

        None where the fused block would not do what the children do.
        """
        if _any_patched():
            return None
        (conv, norm), project = self._conv_norms()
        mode = _shared_mode(norm, *(project[1:] if project else ()))
        if mode is None or not _is_dense(conv) or not (project is None or _is_pointwise(project[0])):
            return None
        training = mode is not False
        fits, squeeze_excite = _squeeze_excite_params(self._modules["se"])
        expand = _conv_norm_params(conv, norm, training)
        last = _conv_norm_params(*project, training) if project else None
        if not fits or _has_bias_and_norm(expand, last):
            return None
        return expand, squeeze_excite, last, conv, mode

    def _run_children(self, x: Tensor, drop_path: Tensor | None) -> Tensor:
        (conv, norm), project = self._conv_norms()
        h = self.se(reference.activate(_normalise(norm, conv(x)), self.activation))
        if project is not None:
            conv, norm = project
            h = _normalise(norm, conv(h))
        return _joined(self, x, h, drop_path)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, residual={self.residual}, drop_path_rate={self.drop_path_rate}"


def _inner_channels(in_channels: int, expand_ratio: float, se_ratio: float, drop_path_rate: float) -> tuple[int, int]:
    """Channels of a block's wide activation, and between the products of its squeeze-and-excitation."""
    check_rate("drop_path_rate", drop_path_rate)
    checks.check_number("expand_ratio", expand_ratio, 0)
    checks.check_number("se_ratio", se_ratio, 0)
    channels = expanded_channels(in_channels, expand_ratio)
    if channels < 1:
        raise ValueError(f"expand_ratio must leave a channel of {in_channels}, got {expand_ratio!r}")
    return channels, squeezed_channels(in_channels, se_ratio)


def _drawn_drop_path(block: MBConv | FusedMBConv, x: Tensor) -> Tensor | None:
    drop = block.training and block.residual and block.drop_path_rate > 0.0
    return reference.drop_path_scale(x, block.drop_path_rate) if drop else None


def _joined(block: MBConv | FusedMBConv, x: Tensor, branch: Tensor, drop_path: Tensor | None) -> Tensor:
    """The end of a block whose children ran one by one."""
    if drop_path is not None:
        # The factor in bfloat16 would be off by up to 0.4 %, alike for all images.
        branch = (branch * drop_path[:, None, None, None]).to(branch.dtype)
    return branch + x if block.residual else branch


def _squeeze_excite_params(se: nn.Module) -> tuple[bool, SqueezeExciteParams | None]:
    """Whether a fused block can run what stands in the place of its gate, and its parameters, if it has any."""
    if _is_plain(se, SqueezeExcite):
        params = se.parameter_group()
        return params is not None, params
    return _is_plain(se, nn.Identity), None


def _has_bias_and_norm(*convs: ConvNormParams | None) -> bool:
    """Whether a convolution has both, which the fused blocks do not take."""
    return any(conv is not None and conv.bias is not None and conv.norm is not None for conv in convs)


def dense_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    **factory,
) -> nn.Conv2d:
    """A dense convolution without a bias: ``nn.Conv2d`` where that can pad so, else `PaddedConv2d`."""
    in_channels, out_channels = _channels(in_channels, out_channels)
    kernel_size, sides = checks.pair("kernel_size", kernel_size, 1), checks.padding_sides(padding)
    stride = checks.pair("stride", stride, 1)
    if kernel_size == (1, 1) and sides == checks.SAME:
        sides = (0, 0, 0, 0)
    if sides == checks.SAME or sides[::2] != sides[1::2]:
        return PaddedConv2d(in_channels, out_channels, kernel_size, stride, padding, **factory)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, sides[::2], bias=False, **factory)


def padded_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """torch.nn.functional.conv2d with `DepthwiseConv2d`'s padding."""
    if isinstance(x, Proxy):
        return handle_torch_function(padded_conv2d, (x,), x, weight, bias, stride, padding, dilation, groups)
    steps = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    top, bottom, left, right = checks.resolve_padding(
        checks.padding_sides(padding), x.shape[-2:], weight.shape[2:], *steps
    )
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, steps[0], 0, steps[1], groups)


def conv_norm_act(x: Tensor, conv: nn.Module, norm: nn.Module, activation: str) -> Tensor:
    """``activation(norm(conv(x)))``; a plain 1x1 convolution is fused with what follows it as far as that goes."""
    if isinstance(x, Proxy) or _any_patched():
        return reference.activate(_normalise(norm, conv(x)), activation)
    if not _is_pointwise(conv):
        return _norm_act(norm, conv(x), activation)
    if _is_plain(norm, nn.Identity):
        return functional.pointwise_conv2d(x, conv.weight, conv.bias, activation=activation)
    return _norm_act(norm, functional.pointwise_conv2d(x, conv.weight, conv.bias), activation)


def check_rate(name: str, rate: float) -> None:
    """``rate`` is a probability in [0, 1), or ValueError."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be a rate in [0, 1), got {rate!r}")


def _channels(in_channels: int, out_channels: int) -> tuple[int, int]:
    return checks.check_count("in_channels", in_channels), checks.check_count("out_channels", out_channels)


def _half(kernel_size: int | Sequence[int]) -> tuple[int, int]:
    kernel = checks.pair("kernel_size", kernel_size, 1)
    return kernel[0] // 2, kernel[1] // 2


def _stored_padding(padding: Padding) -> str | tuple[int, ...]:
    """``padding`` as a module keeps it: "same", (vertical, horizontal), or four sides where they are uneven."""
    sides = checks.padding_sides(padding)
    if sides == checks.SAME:
        return "same"
    return sides[::2] if sides[::2] == sides[1::2] else sides


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does and nothing else: no subclass, hook or patched forward."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_pointwise(conv: nn.Module) -> bool:
    return (
        _is_plain(conv, nn.Conv2d)
        and "_conv_forward" not in conv.__dict__
        and _everywhere(conv.kernel_size, 1)
        and _everywhere(conv.stride, 1)
        and _everywhere(conv.padding, 0)
        and conv.groups == 1
    )


def _is_dense(conv: nn.Module) -> bool:
    """Whether a convolution is one that `functional.fused_mbconv` takes as its expansion."""
    return (
        (_is_plain(conv, nn.Conv2d) or _is_plain(conv, PaddedConv2d))
        and "_conv_forward" not in conv.__dict__
        and _everywhere(conv.dilation, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and (not isinstance(conv.padding, str) or type(conv) is PaddedConv2d)
    )


def _is_depthwise(conv: nn.Module) -> bool:
    return _is_plain(conv, DepthwiseConv2d) and _everywhere(conv.dilation, 1) and conv.activation == "none"


def _everywhere(setting: Any, number: int) -> bool:
    """Whether a setting of a convolution, in any form that PyTorch takes, is this number in both directions."""
    return setting == (number, number) if type(setting) is tuple else set(checks.integers(setting, 2)) == {number}


def _fused_groups(block: MBConv | FusedMBConv, x: Tensor) -> tuple | None:
    """What the fused function takes of a block, or None where its children have to run."""
    # Exporters to ONNX fold the normalisations that they see as modules.
    if isinstance(x, Proxy) or backends.exports_to_onnx():
        return None
    groups = block._groups()
    # On a GPU, normalisations that share their statistics are left to torch.nn.SyncBatchNorm.
    shares = groups is not None and not isinstance(groups[-1], bool)
    return None if shares and x.device.type != "cpu" else groups


def _shared_mode(*norms: nn.Module) -> Any:
    """Whether all normalisations use batch statistics (True) or none (False), or the process group that shares these.

    None where they differ or do not fit.
    """
    mode = None
    for norm in norms:
        if _is_plain(norm, nn.BatchNorm2d) or _is_plain(norm, nn.SyncBatchNorm):
            own = norm.training and (distributed.group_of(norm) or True)
            if mode is not None and own is not mode:
                return None
            mode = own
        elif not _is_plain(norm, nn.Identity):
            return None
    return mode or False


def _conv_norm_params(conv: nn.Module, norm: nn.Module, training: bool) -> ConvNormParams:
    weight, bias = _parameter(conv, "weight"), _parameter(conv, "bias")
    if type(norm) is nn.Identity:
        return ConvNormParams(weight, bias)
    return ConvNormParams(weight, bias, _norm_params(norm, training))


def _norm_params(norm: nn.Module, training: bool) -> BatchNormParams:
    gamma, beta, mean, variance, count = _parameter(norm, "weight"), _parameter(norm, "bias"), None, None, None
    if norm.track_running_stats or not training:
        buffers = norm._buffers
        mean, variance, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    group = distributed.group_of(norm)
    return BatchNormParams(gamma, beta, mean, variance, norm.eps, norm.momentum, count, group)


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, also in training on a CPU, where torch.nn.SyncBatchNorm refuses, even in a group of one process."""
    if not (_is_plain(norm, nn.SyncBatchNorm) and norm.training and x.device.type == "cpu"):
        return norm(x)
    group = distributed.group_of(norm)
    if group is None:
        return distributed.batch_norm_alone(norm, x)
    return functional.sync_batch_norm(x, _norm_params(norm, True), group)


def _norm_act(norm: nn.Module, x: Tensor, activation: str) -> Tensor:
    """``activation(norm(x))``, one operator where a gradient may come and the CPU's kernel takes x as it is."""
    trains = norm.training or torch.is_grad_enabled()
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or context.in_transform()
    if trains and not seen and _is_plain(norm, nn.BatchNorm2d) and functional.trains_norm(x):
        params = _norm_params(norm, norm.training)
        return functional.batch_norm(x, params, activation=activation, training=norm.training)
    return reference.activate(_normalise(norm, x), activation)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``, without the cost of nn.Module's attribute lookup where the parameter is in its usual place."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


_CHILDREN = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.Identity,
    DepthwiseConv2d,
    PaddedConv2d,
    SqueezeExcite,
)
"""Classes whose modules the fused functions run without calling them."""

_forward_of = attrgetter("forward")


def _methods() -> list[Any]:
    return [nn.Conv2d._conv_forward, *map(_forward_of, _CHILDREN)]


@internals.constant
def _any_patched() -> bool:
    """Whether somebody has replaced what these classes compute."""
    return _methods() != _OWN_METHODS


_patched_before = any(context.is_patched(cls, name) for cls in _CHILDREN for name in ("forward", "_conv_forward"))
_OWN_METHODS = [] if _patched_before else _methods()
