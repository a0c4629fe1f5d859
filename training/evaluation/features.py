"""Latents to pictures, and pictures to feature vectors for FID and KID.

The feature network is the demo family's small one, or Inception v3 from a file that the user has.

Nothing is downloaded. Figures from different networks, or from the same network with other weights, cannot be compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...dmm_core.files import file_sha256

DEMO_FILE = Path(__file__).parents[2] / "models" / "demo-classifier.safetensors"
INCEPTION_SIDE, INCEPTION_FEATURES = 299, 2048
_INCEPTION_MARK = "Conv2d_1a_3x3.conv.weight"
_UNUSED = ("AuxLogits.", "fc.")
"""Begins of keys of the layers behind the features."""


@dataclass
class PixelDecoder:
    """Turns latents into pixels. decode: (B, C, h, w), scaled as the UNet sees them -> (B, 3, H, W) in about [-1, 1]. key: a hash of the
    VAE's weights."""

    decode: Callable[[Tensor], Tensor]
    key: str


@dataclass
class FeatureNet:
    """size: of a vector; side: pixels a side that the network takes, whatever the pictures have; key: sha256 of its file."""

    name: str
    size: int
    side: int
    key: str
    network: nn.Module
    pooled: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, size) float32 on the CPU. They are rounded to 8 bits first, as files have them."""
        weight = next(self.network.parameters())
        x = (((pixels.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1).to(weight)
        if tuple(x.shape[2:]) != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return self.pooled(x).float().cpu()

    def to(self, device: torch.device) -> FeatureNet:
        self.network.to(device)
        return self


def load_features(path: str | os.PathLike) -> FeatureNet:
    """A feature network from its file: the demo classifier, or Inception v3 as torchvision (.pth) or timm (.safetensors) have it.

    Raises ValueError for a file that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file '{path}' of a feature network")
    if _is_demo(path):
        return _demo(path)
    weights = _read(path)
    if _INCEPTION_MARK not in weights:
        raise ValueError(
            f"'{path}' is no feature network: expected models/demo-classifier.safetensors, or the weights of Inception v3 of "
            "torchvision or timm"
        )
    return _inception(path, weights)


def _is_demo(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "demo.classifier" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _demo(path: Path) -> FeatureNet:
    from ..data.demo.scenes import SIZE
    from ..demo.classifier import load_classifier

    network = load_classifier(path).requires_grad_(False)
    return FeatureNet("demo classifier", network.width, SIZE, file_sha256(path), network, network.pooled)


def _read(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file or of one that torch wrote; of the latter only tensors are read, nothing in it is run."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types of them
        raise ValueError(f"'{path}' cannot be read as weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"'{path}' holds something else than a state dict")
    return weights


def _inception(path: Path, weights: dict[str, Tensor]) -> FeatureNet:
    try:
        from torchvision.models import inception_v3
    except ImportError:
        raise ValueError("Inception features need the package torchvision: pip install torchvision") from None
    network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    network.fc = nn.Identity()
    kept = {k: v.float() for k, v in weights.items() if not k.startswith(_UNUSED)}
    wanted = network.state_dict()
    missing = sorted(k for k in wanted.keys() - kept.keys() if not k.endswith("num_batches_tracked"))
    wrong = sorted(k for k in wanted.keys() & kept.keys() if wanted[k].shape != kept[k].shape)
    unexpected = sorted(kept.keys() - wanted.keys())
    if missing or wrong or unexpected:
        raise ValueError(
            f"'{path}' is not Inception v3: missing {missing[:4]}, of another shape {wrong[:4]}, unexpected {unexpected[:4]}"
        )
    network.load_state_dict(kept, strict=False)
    network.eval().requires_grad_(False)
    return FeatureNet(
        f"Inception v3 ({path.name})", INCEPTION_FEATURES, INCEPTION_SIDE, file_sha256(path), network, network
    )
