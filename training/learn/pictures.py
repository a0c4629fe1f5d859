"""A few pictures and what they show, as people have them, made ready for a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.unet import UNetConfig
from ...dmm_core.vae import latent_scale, load_vae
from ..data.buckets import bucket_sizes, choose_bucket, default_resolution, enlargement, fit, kept_share, size_multiple
from ..data.demo.family import FIRST
from ..data.image_folder import (
    EMPTY,
    NO_CAPTION,
    Problem,
    clean_caption,
    decode,
    find_files,
    find_pictures,
    read_captions,
    unreadable_pictures,
)
from ..data.shards import first_few
from ..paint.images import to_pictures, to_tensor
from ..progress import ProgressCallback

MOST = 1000
"""Pictures: more are for a distillation from a trained teacher."""
ENLARGED = 2.0
OTHERS = (
    "a photo of a dog", "a portrait of a woman", "a portrait of an old man", "a house by a lake", "a city street at night",
    "a bowl of fruit", "a sailing boat", "a mountain landscape", "a cat on a sofa", "a red car", "a tree in a field",
    "a bouquet of flowers", "a horse", "a castle", "a cup of coffee", "a child with an umbrella",
)  # fmt: skip
"""Captions of everyday things, for ``other_captions``."""


@dataclass(frozen=True)
class Examples:
    """latents: of each picture (C, h, w) float32, scaled as the UNet sees them, perhaps of several sizes. captions: a text each, "" where
    nothing is said. remarks: what the user should know of how they were read, in sentences."""

    latents: list[Tensor]
    captions: list[str]
    remarks: list[str]

    def __post_init__(self) -> None:
        if not self.latents:
            raise ValueError("no pictures: give at least one, better 5 to 20")
        if len(self.latents) > MOST:
            raise ValueError(
                f"{len(self.latents)} pictures, at most {MOST} are taken here: distil from a trained model"
            )
        if len(self.latents) != len(self.captions):
            raise ValueError(f"{len(self.captions)} captions for {len(self.latents)} pictures")
        bad = [i for i, latent in enumerate(self.latents, start=1) if not latent.isfinite().all()]
        if bad:
            raise ValueError(
                f"the latents of picture {bad[0]} hold NaN or infinite numbers ({len(bad)} of {len(self.latents)} pictures): check the "
                "picture and the VAE"
            )

    def __len__(self) -> int:
        return len(self.latents)


# --- captions ---------------------------------------------------------------------------------------------------------


def captions_from_text(text: str, count: int) -> tuple[list[str], list[str]]:
    """What ``count`` pictures show, from one text: a line for each picture, or one text for all; and remarks. Raises ValueError for another
    number of lines."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    if not any(lines):
        return [""] * count, [without_captions(count, count)]
    if len(lines) == 1:
        said = [f"all {count} pictures have the caption '{lines[0][:60]}'"] if count > 1 else []
        return lines * count, said
    if len(lines) != count:
        raise ValueError(
            f"{len(lines)} lines of captions for {count} pictures: write one line for each picture, or one text for all of them"
        )
    missing = sum(not line for line in lines)
    return lines, [without_captions(missing, count)] if missing else []


def captions_of(given: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """The same from a list of texts, which are one for each picture, whatever lines they have; a single one is as above."""
    if len(given) == 1:
        return captions_from_text(given[0] or "", count)
    if len(given) != count:
        raise ValueError(
            f"{len(given)} captions for {count} pictures: connect one text for each picture, or one for all"
        )
    texts = [" ".join((text or "").split()) for text in given]
    missing = sum(not text for text in texts)
    return texts, [without_captions(missing, count)] if missing else []


def without_captions(missing: int, count: int) -> str:
    said = f"{missing} of {count} pictures have no caption: what they show is taken for a part of their style. "
    return said + "Say what they show, and it is not"


def other_captions(config: UNetConfig, given: Sequence[str], count: int) -> list[str]:
    """``count`` captions, each once, that are none of ``given``: of everyday things, or for a small model of the demo family's scenes."""
    known, found = {text.casefold() for text in given}, dict.fromkeys(OTHERS)
    if config.model_channels < 320:
        rng, found = np.random.default_rng(7_500_000), {}
        while len(found) < 4 * count:
            found[FIRST.sample_scene(rng).caption] = None
    return [text for text in found if text.casefold() not in known][:count]


# --- pictures ---------------------------------------------------------------------------------------------------------


def read_folder(folder: str | os.PathLike, text: str = "") -> tuple[list[Image.Image], list[str], list[str]]:
    """The pictures of a folder, in the order of their names, what they show, and remarks. text: what those show that have no caption of
    their own (``data.image_folder`` says where captions are looked for).

    A picture that cannot be read is left out, and said, and so is a caption. Raises ValueError without a folder, or without a picture
    that can be read.
    """
    paths = find_pictures(folder)
    found, problems = read_captions(folder, paths)
    text = clean_caption(text) if text.strip() else ""
    pictures, captions, bad, own = [], [], list[Problem](), 0
    for name, path in paths.items():
        try:
            pictures.append(decode(path.read_bytes()))
        except (ValueError, OSError) as error:
            bad.append(Problem(name, getattr(error, "strerror", None) or str(error)))
            continue
        own += name in found
        captions.append(found.get(name, text))
    bad += unreadable_pictures(find_files(folder))
    if not pictures:
        raise ValueError(f"no picture of '{folder}' can be read: {first_few(bad)}")
    remarks = [f"{len(bad)} pictures left out: {first_few(bad)}"] if bad else []
    left_out = {problem.name for problem in bad}
    wrong = [one for one in problems if one.name not in left_out and not one.reason.startswith((NO_CAPTION, EMPTY))]
    if wrong:
        remarks.append(f"{len(wrong)} captions could not be used: {first_few(wrong)}")
    if text and own < len(pictures):
        remarks.append(f"{len(pictures) - own} of {len(pictures)} pictures have the caption '{text[:60]}'")
    if missing := sum(not caption for caption in captions):
        remarks.append(without_captions(missing, len(captions)))
    return pictures, captions, remarks


def from_pixels(pixels: Tensor) -> list[Image.Image]:
    """(B, H, W, 3 or 4) in 0..1 -> pictures. Raises ValueError for NaN, naming the picture, and for other shapes."""
    if pixels.ndim != 4 or pixels.shape[3] not in (3, 4) or not all(pixels.shape):
        raise ValueError(f"images of shape {tuple(pixels.shape)}: expected (count, height, width, 3)")
    bad = (~pixels.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"picture {bad[0] + 1} holds NaN or infinite numbers ({len(bad)} of {len(pixels)} pictures): look at the node that makes it"
        )
    return to_pictures(pixels[..., :3])


def fitted(pictures: Sequence[Image.Image], config: UNetConfig, prediction: str) -> tuple[list[Image.Image], list[str]]:
    """The pictures in sizes that the model was trained at, the largest centred part of each, and remarks on what was done to them."""
    sizes = bucket_sizes(default_resolution(config, prediction), size_multiple(config))
    chosen = [choose_bucket(picture.size, sizes) for picture in pictures]
    kept = [kept_share(picture.size, size) for picture, size in zip(pictures, chosen)]
    other = sum(picture.size != size for picture, size in zip(pictures, chosen))
    remarks = []
    if other:
        cut = f", at most {100 * (1 - min(kept)):.0f}% of one cut off at its edges" if min(kept) < 0.995 else ""
        counts = ", ".join(f"{w}x{h}" for w, h in sorted(set(chosen)))
        remarks.append(f"{other} of {len(pictures)} pictures were resized to {counts}{cut}")
    large = sum(enlargement(picture.size, size) > ENLARGED for picture, size in zip(pictures, chosen))
    if large:
        remarks.append(
            f"{large} of {len(pictures)} pictures had to be made more than {ENLARGED:g} times larger: the style will be blurred"
        )
    return [fit(picture, size) for picture, size in zip(pictures, chosen)], remarks


def encoder_of(checkpoint: Checkpoint, device: torch.device) -> Callable[[Image.Image], Tensor]:
    """picture -> (C, h, w), scaled, by the checkpoint's own VAE. Raises ValueError for a checkpoint without one."""
    if not checkpoint.vae:
        raise ValueError(
            "the model has no VAE to read pictures with: name a full checkpoint to take it from (--parts-from)"
        )
    vae, scale = load_vae(checkpoint.vae).to(device).eval(), latent_scale(checkpoint.config)

    @torch.no_grad()
    def encode(picture: Image.Image) -> Tensor:
        return (scale * vae.encode(to_tensor(np.asarray(picture)[None].copy(), device)))[0].float().cpu()

    return encode


def make_examples(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    remarks: Sequence[str],
    *,
    config: UNetConfig,
    prediction: str,
    encode: Callable[[Image.Image], Tensor],
    progress: ProgressCallback | None = None,
) -> Examples:
    """Pictures of any size -> what a model learns from. encode: a picture of a size that the model takes -> (C, h, w), scaled."""
    ready, said = fitted(pictures, config, prediction) if pictures else ([], [])
    latents = []
    for done, picture in enumerate(ready, start=1):
        latents.append(encode(picture))
        if progress:
            progress(done, len(ready), "encoding pictures")
    return Examples(latents, list(captions), [*remarks, *said])


def collage(pictures: Sequence[Image.Image], side: int = 256) -> Image.Image:
    """A square of the first four pictures; of fewer, the first alone."""
    if len(pictures) < 4:
        return fit(pictures[0], (side, side))
    half = side // 2
    square = Image.new("RGB", (side, side))
    for i, picture in enumerate(pictures[:4]):
        square.paste(fit(picture, (half, half)), (half * (i % 2), half * (i // 2)))
    return square


def folder_of(path: str | os.PathLike) -> str:
    """The name of a folder, for what a file records of where a style came from."""
    return Path(os.path.realpath(path)).name
