"""The EfficientNet family: specifications, modules, and weights of other libraries."""

from effnet_ops.models.convert import convert_state_dict
from effnet_ops.models.efficientnet import EfficientNet, EfficientNetFeatures, FeatureInfo, create_model
from effnet_ops.models.family import conventions, list_models, model_spec
from effnet_ops.models.files import load_model, save_model, spec_from_dict, spec_to_dict
from effnet_ops.models.spec import ArchitectureSpec, BlockSpec, Convention, ScaledSpec, StageSpec

__all__ = [
    "ArchitectureSpec",
    "BlockSpec",
    "Convention",
    "EfficientNet",
    "EfficientNetFeatures",
    "FeatureInfo",
    "ScaledSpec",
    "StageSpec",
    "conventions",
    "convert_state_dict",
    "create_model",
    "list_models",
    "load_model",
    "model_spec",
    "save_model",
    "spec_from_dict",
    "spec_to_dict",
]
