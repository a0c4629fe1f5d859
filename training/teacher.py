"""Teachers: frozen fine-tunes of one architecture, each with the text states that its own text encoder gives the captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dmm_core.unet import UNet, UNetConfig, load_unet


@dataclass
class Teacher:
    """A frozen UNet with a name.

    contexts: (U, L, d), its text encoder's states of every distinct caption, row 0 of the empty prompt; y: (U, adm) for
    SDXL. prediction: "eps" or "v"; zero_snr: its noise schedule ends in pure noise. The remaining fields are recorded in the style's metadata.
    """

    name: str
    unet: UNet
    contexts: Tensor
    y: Tensor | None = None
    prediction: str = "eps"
    zero_snr: bool = False
    description: str = ""
    file: str = ""
    sha256: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False).eval()


def plain_unet(sd: Mapping[str, Tensor], name: str) -> UNet:
    """A frozen, style-less UNet from a state dict; ValueError (naming the teacher) for styles, NaN or a foreign layout."""
    try:
        unet = load_unet(sd)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if unet.config.num_styles:
        raise ValueError(f"{name} is itself a DMM model with {unet.config.num_styles} styles: use a plain checkpoint")
    for key, tensor in unet.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or infinite weights in '{key}': the file is damaged, get it again")
    return unet


def check_architectures(base: UNetConfig, teachers: Sequence[tuple[str, UNetConfig]]) -> None:
    """Raises ValueError naming every teacher whose sizes differ from the base's, and the sizes that differ."""
    problems = []
    for name, config in teachers:
        ours, theirs = dataclasses.asdict(base), dataclasses.asdict(config)
        different = [f"{k} {theirs[k]} instead of {ours[k]}" for k in ours if ours[k] != theirs[k]]
        if different:
            problems.append(f"'{name}' has {', '.join(different)}")
    if problems:
        raise ValueError(f"teachers of another architecture than the base model: {'; '.join(problems)}")


def soup(teachers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the teachers' weights ("model soup", arXiv:2203.05482), a starting point and a baseline."""
    return {key: torch.stack([t[key].float() for t in teachers]).mean(0) for key in teachers[0]}
