"""Text states in a cache: the contexts of every caption under every text encoder, written to shards and read a few rows
at a time.

A context is 77 x 768 numbers for SD1.x, 118 KB in float16: those of 100,000 captions do not fit in memory. In a shard
lie the windows of its captions end to end, ``context`` (W, 77, d) float16, and for SDXL ``pooled`` (count, p) float16;
how many windows a caption has is in the manifest. Captions are counted as in the manifest's ``prompts``, the empty one
first.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.hashing import repr_sha256
from ..progress import ProgressCallback
from ..text import WINDOW, ClipText, encoder_key, windows
from .shards import ShardReader, ShardWriter

SHARD_PROMPTS = 256
BATCH = 16


class StoredText:
    """``Teacher.contexts`` in files: (U, 77 k, d), read when rows are asked for. entry: of the text encoder in the
    manifest."""

    def __init__(self, folder: str | os.PathLike, entry: Mapping[str, Any]):
        self.reader, self.width = ShardReader(folder, entry["shards"]), entry["width"]
        self.windows = torch.tensor(entry["windows"])  # (U,)
        if len(self.windows) != len(self.reader):
            raise ValueError(
                f"the cache in '{folder}' is damaged: {len(self.windows)} captions, {len(self.reader)} contexts"
            )
        # Where each caption's windows begin in its shard.
        by_shard = self.windows.split([shard["count"] for shard in entry["shards"]])
        self.begin = torch.cat([counts.cumsum(0) - counts for counts in by_shard])  # (U,)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Captions (B,) -> contexts (B, 77 k, d) float32; the shorter are repeated to the common multiple, see
        ``ClipText``."""
        counts = self.windows[rows].tolist()
        k = math.lcm(*counts)
        return torch.stack([self._one(row).repeat(k // n, 1) for row, n in zip(rows.tolist(), counts)])

    def _one(self, row: int) -> Tensor:
        """The context (77 n, d) of one caption of n windows."""
        shard, _ = self.reader.place(row)
        start = int(self.begin[row])
        return self.reader.span(shard, "context", start, start + int(self.windows[row])).flatten(0, 1).float()

    def fingerprint(self) -> str:
        return repr_sha256("contexts", self.reader.fingerprint())


class StoredPooled:
    """``Teacher.pooled`` of SDXL in files: (U, p), read when rows are asked for."""

    def __init__(self, reader: ShardReader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Captions (B,) -> (B, p) float32"""
        return self.reader.rows("pooled", rows).float()

    def fingerprint(self) -> str:
        return repr_sha256("pooled", self.reader.fingerprint())


class TextStore:
    """The text states in a cache, by the text encoders' ``encoder_key``."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]):
        self.folder = Path(folder)
        self.stored: dict[str, tuple[StoredText, StoredPooled | None]] = {}
        for key, entry in manifest["text"].items():
            contexts = StoredText(folder, entry)
            self.stored[key] = contexts, StoredPooled(contexts.reader) if entry["pooled"] else None

    def text_of(
        self,
        weights: Mapping[str, Tensor],
        who: str = "the model",
        file: str = "FILE",
        clip_skip: int | None = None,
    ) -> tuple[StoredText, StoredPooled | None]:
        """Contexts and, for SDXL, pooled texts of the captions under a text encoder; clip_skip: see ``ClipText``.

        Raises ValueError with the command that adds a missing one; who: the model's name in it, file: its file.
        """
        key = encoder_key(weights, clip_skip)
        if key not in self.stored:
            how = f" at clip skip {clip_skip}" if clip_skip else ""
            command = f"dmm cache text --cache {shlex.quote(str(self.folder))} --teacher {shlex.quote(file)}"
            raise ValueError(
                f"the text encoder of {who}{how} is not in the cache '{self.folder}'. This adds it: {command}"
            )
        return self.stored[key]


def store_text(
    writer: ShardWriter,
    weights: Mapping[str, Tensor],
    prompts: Sequence[str],
    device: torch.device,
    *,
    clip_skip: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Encode prompts into shards; returns the text encoder's entry in the manifest. clip_skip: see ``ClipText``.

    Finished shards are kept; the encoder is built only when one is missing.
    """
    key = encoder_key(weights, clip_skip)
    encoder: ClipText | None = None
    counts: list[int] = []

    def build(chunk: Sequence[str], start: int) -> dict[str, Tensor]:
        nonlocal encoder
        encoder = encoder or ClipText(weights, clip_skip).to(device)
        on_prompt = (lambda done: progress(start + done, len(prompts), "encoding captions")) if progress else None
        return encode_shard(encoder, chunk, on_prompt)

    entry: dict[str, Any] = {"shards": []}
    for number, start in enumerate(range(0, len(prompts), SHARD_PROMPTS)):
        chunk = prompts[start : start + SHARD_PROMPTS]
        name, identity = f"text-{key[:16]}-{number:05d}.safetensors", repr_sha256("text", key, tuple(chunk))
        entry["shards"].append(writer.shard(name, identity, len(chunk), functools.partial(build, chunk, start)))
        reader = ShardReader(writer.folder, entry["shards"][-1:])
        counts += reader.span(0, "windows", 0, len(chunk)).tolist()
        if progress:
            progress(start + len(chunk), len(prompts), "encoding captions")
    entry["width"] = reader.shape("context")[-1]
    entry["pooled"] = has_pooled(weights)
    entry["windows"] = counts
    return entry


def has_pooled(weights: Mapping[str, Tensor]) -> bool:
    """Whether this is SDXL's pair of text encoders, which also gives a pooled text."""
    return any(key.startswith("conditioner.") for key in weights)


@torch.no_grad()
def encode_shard(
    encoder: ClipText, prompts: Sequence[str], on_prompt: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """context (W, 77, d), windows (B,) and, for SDXL, pooled (B, p). on_prompt: called with the number of prompts done.

    Raises ValueError for states that float16 cannot hold.
    """
    counts = [len(windows(encoder.tokenizer(prompt)["input_ids"][1:-1], 0)) for prompt in prompts]
    contexts: dict[int, Tensor] = {}  # by the prompt's place
    pooled: dict[int, Tensor] = {}
    done = 0
    for count in sorted(set(counts)):  # prompts of one length at a time, or the short would be repeated to fit the long
        same = [i for i, n in enumerate(counts) if n == count]
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            context, pool = encoder.encode_pooled([prompts[i] for i in batch])
            for j, i in enumerate(batch):
                contexts[i] = context[j].unflatten(0, (count, WINDOW)).half().cpu()  # (77 n, d) -> (n, 77, d)
                if pool is not None:
                    pooled[i] = pool[j].half().cpu()
            done += len(batch)
            if on_prompt:
                on_prompt(done)
    everyone = range(len(prompts))
    shard = {"context": torch.cat([contexts[i] for i in everyone]), "windows": torch.tensor(counts)}
    if pooled:
        shard["pooled"] = torch.stack([pooled[i] for i in everyone])
    if not all(torch.isfinite(value).all() for value in shard.values()):
        raise ValueError(
            "the text encoder gives NaN or numbers too large for float16: its file is damaged, get it again"
        )
    return shard
