"""Captioned latents, and how a step's batch follows from (seed, step) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass
class CaptionedLatents:
    """latents: (M, 4, h, w), scaled as the UNet sees them; captions: M texts.

    ``prompts`` are the distinct captions, the empty one first; ``rows`` (M,) index them.
    """

    latents: Tensor
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or len(self.latents) != len(self.captions):
            raise ValueError(
                f"{len(self.captions)} captions for latents of shape {tuple(self.latents.shape)}: "
                "expected one caption for each of the latents (count, channels, height, width)"
            )
        if not len(self.latents):
            raise ValueError("no training pictures given")
        if not torch.isfinite(self.latents).all():
            raise ValueError(
                "the latents contain NaN or infinite numbers: check the pictures and the VAE that encoded them"
            )
        empty = [i for i, caption in enumerate(self.captions) if not caption.strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(self.captions)} captions are empty (the first at position {empty[0]}): caption every "
                "picture; training without prompts is covered by caption_dropout"
            )
        self.prompts = ["", *sorted(set(self.captions))]
        row = {prompt: i for i, prompt in enumerate(self.prompts)}
        self.rows = torch.tensor([row[caption] for caption in self.captions])

    def fingerprint(self) -> str:
        """sha256 over latents and captions: a run refuses to go on with other data."""
        digest = hashlib.sha256("\0".join(self.captions).encode())
        digest.update(self.latents.float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_latents(path: str | Path) -> CaptionedLatents:
    """Read a safetensors file with ``latents`` (M, 4, h, w) and the metadata ``captions`` (a JSON list of M texts)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            captions = json.loads((file.metadata() or {})["captions"])
            latents = file.get_tensor("latents").float()
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{path}' is not a file of captioned latents (tensor 'latents', metadata 'captions'): {error}"
        ) from error
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"'{path}': the metadata 'captions' is not a JSON list of texts")
    return CaptionedLatents(latents, captions)


@dataclass
class Batch:
    """One step's random choices. teacher (B,) is sorted so that each teacher's rows are a slice; N stands for the base."""

    index: Tensor
    teacher: Tensor
    t: Tensor
    eps: Tensor
    drop: Tensor


def draw_batch(
    seed: int, step: int, data: CaptionedLatents, batch_size: int, teachers: int, base_share: float, dropout: float
) -> Batch:
    """The batch of a step. It depends on (seed, step) only, so a resumed run draws what the first run would have drawn.

    Teachers take turns, so that over the run each gets the same number of rows; a ``base_share`` of the rows goes to the
    base instead. Pictures are drawn without repetition within an epoch.
    """
    g = torch.Generator().manual_seed(hash_seed(seed, "batch", step))
    position = step * batch_size + torch.arange(batch_size)
    teacher = position % teachers
    teacher = torch.where(torch.rand(batch_size, generator=g) < base_share, teachers, teacher)
    teacher = teacher.sort().values
    count = len(data.latents)
    # The permutation of each epoch this batch touches; at most two unless the data are smaller than a batch.
    index = torch.empty(batch_size, dtype=torch.long)
    for epoch in range(int(position[0]) // count, int(position[-1]) // count + 1):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(hash_seed(seed, "epoch", epoch)))
        here = position // count == epoch
        index[here] = order[position[here] % count]
    index = index[torch.randperm(batch_size, generator=g)]  # or a teacher would meet the same pictures every epoch
    return Batch(
        index=index,
        teacher=teacher,
        t=torch.randint(1000, (batch_size,), generator=g),
        eps=torch.randn(batch_size, *data.latents.shape[1:], generator=g),
        drop=torch.rand(batch_size, generator=g) < dropout,
    )


def hash_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose of a run, unrelated to that of any other purpose."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
