"""The EfficientNet module (arXiv 1905.11946), built from a specification; parameter names are timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_ops import layers
from effnet_ops.checks import check_count
from effnet_ops.models.convert import network_of
from effnet_ops.models.family import model_spec, warn_of_name
from effnet_ops.models.spec import BlockSpec, ScaledSpec

BLOCK_MODULES: dict[str, type[nn.Module]] = {"mbconv": layers.MBConv, "fused_mbconv": layers.FusedMBConv}


class FeatureInfo(tuple):
    """One entry a feature map: ``num_chs``, ``reduction`` (pixels of the image a step) and the ``module`` it leaves."""

    def channels(self) -> list[int]:
        """The number of channels of each feature map."""
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        """How many pixels of the image a step of each feature map is."""
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        """The name of the module that each feature map leaves."""
        return [entry["module"] for entry in self]


class _Trunk(nn.Module):
    """Stem and stages, which the classifier and the feature pyramid share."""

    def __init__(self, spec: ScaledSpec, in_chans: int, drop_path_rate: float) -> None:
        super().__init__()
        layers.check_rate("drop_path_rate", drop_path_rate)
        self.spec = spec
        self.in_chans = check_count("in_chans", in_chans)
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False
        padding = "same" if spec.convention.padding == "same" else 1
        self.conv_stem = layers.dense_conv(in_chans, spec.stem_channels, 3, 2, padding)
        self.bn1 = self._norm(spec.stem_channels)
        stages, count, index = spec.stages(), sum(map(len, spec.stages())), 0
        self.blocks = nn.Sequential()
        for stage in stages:
            rates = [drop_path_rate * (index + i) / count for i in range(len(stage))]
            self.blocks.append(nn.Sequential(*map(self._block, stage, rates)))
            index += len(stage)
        self.feature_info = feature_info(spec)

    def _norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, self.spec.convention.eps, self.spec.convention.momentum)

    def _block(self, block: BlockSpec, drop_path_rate: float) -> nn.Module:
        convention, architecture = self.spec.convention, self.spec.architecture
        return BLOCK_MODULES[block.block](
            block.in_channels,
            block.out_channels,
            block.kernel_size,
            block.stride,
            expand_ratio=block.expand_ratio,
            se_ratio=block.se_ratio,
            padding="same" if convention.padding == "same" else None,
            activation=architecture.activation,
            gate=architecture.gate,
            drop_path_rate=drop_path_rate,
            eps=convention.eps,
            momentum=convention.momentum,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's; another network's weights are an error that names it, before anything is loaded."""
        if strict and isinstance(state_dict, Mapping):
            found = None if state_dict.keys() == self.state_dict().keys() else network_of(state_dict)
            if found is not None and found != (own := network_of(self.state_dict())):
                raise RuntimeError(f"these are the weights of an {found}, and this network is an {own or 'other one'}")
        return super().load_state_dict(state_dict, strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep one activation a block in training, and run each block again in the backward."""
        self.grad_checkpointing = enable

    def forward_stem(self, x: Tensor) -> Tensor:
        """The first convolution: (N, C, H / 2, W / 2), rounded up."""
        return layers.conv_norm_act(x, self.conv_stem, self.bn1, self.spec.architecture.activation)

    def _stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        for block in stage:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class EfficientNet(_Trunk):
    """An EfficientNet classifier. Input (N, in_chans, H, W) of any size, output (N, num_classes).

    Args:
        spec: the network; see `model_spec` for the released ones.
        num_classes: 0 returns the pooled features (N, ``num_features``).
        in_chans: channels of the image.
        drop_rate: dropout before the classifier; None is the specification's.
        drop_path_rate: stochastic depth, growing linearly to this rate over the blocks; None is the specification's.

    Raises ValueError for a count or a rate out of range.
    """

    def __init__(
        self,
        spec: ScaledSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__(spec, in_chans, spec.drop_path if drop_path_rate is None else drop_path_rate)
        self.drop_rate = spec.dropout if drop_rate is None else drop_rate
        layers.check_rate("drop_rate", self.drop_rate)
        self.num_features = spec.head_channels
        self.conv_head = layers.dense_conv(spec.stages()[-1][-1].out_channels, self.num_features, 1)
        self.bn2 = self._norm(self.num_features)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        initialize(self)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """A new, initialised classifier for ``num_classes`` on the device and in the dtype of the network."""
        self.num_classes = check_count("num_classes", num_classes, minimum=0)
        like = {"device": self.conv_head.weight.device, "dtype": self.conv_head.weight.dtype}
        self.classifier = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        self.classifier.train(self.training)
        initialize(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map before pooling: (N, ``num_features``, H / 32, W / 32), rounded up."""
        x = self.forward_stem(x)
        for stage in self.blocks:
            x = self._stage(stage, x)
        return self.forward_last(x)

    def forward_last(self, x: Tensor) -> Tensor:
        """The 1x1 convolution behind the last block."""
        return layers.conv_norm_act(x, self.conv_head, self.bn2, self.spec.architecture.activation)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (N, ``num_features``) where ``pre_logits``, else the classifier's output."""
        x = F.dropout(self.global_pool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class EfficientNetFeatures(_Trunk):
    """An EfficientNet as a backbone: the last feature map at each of the strides 2, 4, 8, 16 and 32.

    Arguments as `EfficientNet`. ``feature_info`` gives each map's channels and stride.
    """

    def __init__(self, spec: ScaledSpec, in_chans: int = 3, drop_path_rate: float | None = None) -> None:
        super().__init__(spec, in_chans, spec.drop_path if drop_path_rate is None else drop_path_rate)
        self._taps = frozenset(self.feature_info.module_name())
        initialize(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.forward_stem(x)
        features = [x] if "bn1" in self._taps else []
        for index, stage in enumerate(self.blocks):
            x = self._stage(stage, x)
            if f"blocks.{index}" in self._taps:
                features.append(x)
        return features


def feature_info(spec: ScaledSpec) -> FeatureInfo:
    """Where each stride ends: the stem or stage before the next stride, and the last stage."""
    ends = [("bn1", spec.stem_channels, 2)]
    for index, stage in enumerate(spec.stages()):
        previous = ends[-1][2]
        if stage[0].stride == 1:
            ends.pop()
        ends.append((f"blocks.{index}", stage[-1].out_channels, previous * stage[0].stride))
    return FeatureInfo(
        {"index": index, "module": module, "num_chs": channels, "reduction": reduction}
        for index, (module, channels, reduction) in enumerate(ends)
    )


def initialize(model: nn.Module) -> None:
    """Weights as TensorFlow's EfficientNet draws them (tensorflow/tpu, efficientnet_model.py).

    Convolutions: normal with variance 2 / (kh * kw * filters), where a depthwise convolution counts one filter.
    Linear: uniform within 1 / sqrt(outputs). Biases 0, normalisations the identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def create_model(
    name: str | ScaledSpec,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    features_only: bool = False,
) -> EfficientNet | EfficientNetFeatures:
    """Build an EfficientNet with fresh weights.

    Args:
        name: one of `list_models`: ``efficientnet_*`` pads symmetrically with eps 1e-5, ``tf_efficientnet_*`` computes
            as TensorFlow (SAME padding, eps 1e-3). Or ``"library:model"``, as `model_spec` takes it, for another
            library's eps, momentum and padding; a name that says something else is a warning. Or a specification.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier; None is the published rate, 0.2 to 0.5.
        drop_path_rate: stochastic depth's rate at the last block; None is the published 0.2.
        features_only: return the feature maps at strides 2 to 32 as a list, without head and classifier.

    Raises:
        ValueError: an unknown name (with the closest one), a count or a rate out of range.
        TypeError: a name that is neither a string nor a specification.
    """
    if not isinstance(name, str | ScaledSpec):
        raise TypeError(f"name must be a model's name or a ScaledSpec, got {type(name).__name__}")
    spec = name if isinstance(name, ScaledSpec) else model_spec(name)
    if isinstance(name, str):
        warn_of_name(name)
    if features_only:
        check_count("num_classes", num_classes, minimum=0)
        layers.check_rate("drop_rate", 0.0 if drop_rate is None else drop_rate)
        return EfficientNetFeatures(spec, in_chans, drop_path_rate)
    return EfficientNet(spec, num_classes, in_chans, drop_rate, drop_path_rate)
