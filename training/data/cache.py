"""The image cache: a folder of captioned pictures, encoded once by a model's own VAE and text encoders.

    latents-512x768-00000.safetensors   latents (M, 4, h, w) float16, scaled as the UNet sees them
    text-<hash>-00000.safetensors       contexts of the captions under one text encoder (``cached_text``)
    manifest.json                       captions, sizes, hashes, settings; written last

The latents are the mean of the VAE's posterior times its scale. Nothing in it depends on what the model predicts (eps
or v).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.vae import AutoencoderKL, latent_scale, load_vae
from ..files.hashing import repr_sha256, weights_hash
from ..paint.images import to_tensor
from ..progress import ProgressCallback
from ..teachers.models import Model, as_checkpoint, base_with_parts
from ..text import encoder_key
from .batches import CaptionedLatents
from .buckets import MAX_ASPECT, bucket_sizes, choose_bucket, default_resolution, enlargement, fit, size_multiple
from .cached_text import TextStore, store_text
from .image_folder import Picture, Problem, ahead, captions_alone, find_files, read_picture, survey, unreadable_pictures
from .shards import (
    ShardReader,
    ShardWriter,
    cache_folder,
    check_shards,
    first_few,
    in_cache_folder,
    read_manifest,
    shard_entries,
)

logger = logging.getLogger(__name__)


SHARD_PICTURES = 256
ENLARGED = 2.0
"""Pictures that must be made more than this many times larger are counted and reported: they will be blurred."""


@dataclass
class CacheReport:
    """What a cache holds and what was left out of it. buckets: number of pictures by (width, height) in pixels;
    enlarged: names of pictures that were made more than ``ENLARGED`` times larger; alone: of captions without a picture;
    unread: of pictures of kinds that are not read, and that nothing was said of."""

    pictures: int
    buckets: dict[tuple[int, int], int]
    captions: int
    text_encoders: int
    skipped: list[Problem] = field(default_factory=list)
    enlarged: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = ", ".join(f"{w}x{h}: {count}" for (w, h), count in self.buckets.items())
        lines = [
            f"{self.pictures} pictures ({sizes}), {self.captions} different captions under {self.text_encoders} text encoder(s)"
        ]
        if self.enlarged:
            lines.append(
                f"{len(self.enlarged)} of them had to be made more than {ENLARGED:g} times larger: "
                f"{first_few([repr(name) for name in self.enlarged])}"
            )
        if self.alone:
            lines.append(
                f"{len(self.alone)} captions without a picture: {first_few([repr(name) for name in self.alone])}"
            )
        if self.unread:
            lines.append(
                f"{len(self.unread)} pictures of kinds that are not read: {first_few([repr(name) for name in self.unread])}"
            )
        if self.skipped:
            lines.append(f"{len(self.skipped)} problems, left out: {first_few(self.skipped)}")
        return "\n".join(lines)


# --- building ---------------------------------------------------------------------------------------------------------


@in_cache_folder
def build_image_cache(
    folder: str | os.PathLike,
    images: str | os.PathLike,
    base: Model,
    *,
    teachers: Sequence[Model] = (),
    parts_from: Model | None = None,
    resolution: int | None = None,
    max_aspect: float = MAX_ASPECT,
    skip_bad: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    workers: int = 4,
    progress: ProgressCallback | None = None,
) -> CacheReport:
    """Encode the pictures of ``images`` into the cache ``folder``, or go on with it; pictures added since are added.

    teachers: models whose own text encoders, where they differ from the base's, encode the captions too. parts_from: a
    full checkpoint, for a base without VAE or text encoder. resolution: pixels a side of the square bucket, None for
    what the model was trained at. skip_bad leaves out what cannot be used instead of refusing it. batch_size: pictures
    a VAE forward. workers: threads that read pictures.

    Every picture is read once before anything is encoded: a ValueError names what is wrong with which file, or the process that
    has the folder.
    """
    base = base_with_parts(base, parts_from)
    if not base.vae:
        raise ValueError("the base model has no VAE: name a full checkpoint to take it from (parts_from, --parts-from)")
    config = base.config
    multiple, scale, vae_hash = size_multiple(config), latent_scale(config), weights_hash(base.vae)
    resolution = resolution or default_resolution(config, base.prediction)
    sizes = bucket_sizes(resolution, multiple, max_aspect)
    settings = {
        "vae": vae_hash,
        "scale": scale,
        "resolution": resolution,
        "multiple": multiple,
        "max_aspect": max_aspect,
    }
    writer = ShardWriter(folder, "images", settings)

    pictures, problems = survey(images, workers, progress)
    if problems and not skip_bad:
        raise ValueError(
            f"{len(problems)} problem(s) with the pictures in '{images}': {first_few(problems)}. "
            "Mend or remove them, or leave them out with --skip-bad"
        )
    if not pictures:
        raise ValueError(f"no usable picture in '{images}': {first_few(problems)}")
    by_bucket: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        by_bucket.setdefault(choose_bucket(picture.size, sizes), []).append(picture)

    prompts = ["", *sorted({picture.caption for picture in pictures})]
    text = store_all_text(writer, [base, *teachers], prompts, device=torch.device(device), progress=progress, base=base)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    vae = functools.cache(lambda: load_vae(base.vae).to(device).eval())  # not even built when every shard is there
    buckets, done = [], 0
    with ThreadPoolExecutor(workers) as pool:

        def encode(
            chunk: Sequence[Picture], size: tuple[int, int], on_picture: Callable[[int], None]
        ) -> dict[str, Tensor]:
            return encode_pictures(
                vae(), chunk, size, scale=scale, batch_size=batch_size, pool=pool, on_picture=on_picture
            )

        for size, members in sorted(by_bucket.items()):
            shards = []
            for number, start in enumerate(range(0, len(members), SHARD_PICTURES)):
                chunk = members[start : start + SHARD_PICTURES]
                on_picture = functools.partial(_report, progress, done, len(pictures))
                identity = repr_sha256("latents", vae_hash, scale, size, [picture.sha256 for picture in chunk])
                name = f"latents-{size[0]}x{size[1]}-{number:05d}.safetensors"
                shards.append(
                    writer.shard(name, identity, len(chunk), functools.partial(encode, chunk, size, on_picture))
                )
                done += len(chunk)
                on_picture(len(chunk))
            names = [picture.name.rpartition("/")[2] for picture in members]
            captions = [rows[picture.caption] for picture in members]
            buckets.append({"size": list(size), "rows": captions, "names": names, "shards": shards})
    writer.finish({"prompts": prompts, "buckets": buckets, "text": text})
    enlarged = [p.name for size, members in by_bucket.items() for p in members if enlargement(p.size, size) > ENLARGED]
    counts = {size: len(members) for size, members in sorted(by_bucket.items())}
    return CacheReport(
        pictures=len(pictures),
        buckets=counts,
        captions=len(prompts) - 1,
        text_encoders=len(text),
        skipped=problems,
        enlarged=sorted(enlarged),
        alone=captions_alone(images),
        unread=[one.name for one in unreadable_pictures(find_files(images)) if one not in problems],
    )


def _report(progress: ProgressCallback | None, before: int, total: int, done: int) -> None:
    """Report ``done`` pictures of a shard, before which ``before`` were encoded."""
    if progress:
        progress(before + done, total, "encoding pictures")


def store_all_text(
    writer: ShardWriter,
    models: Sequence[Model],
    prompts: Sequence[str],
    *,
    device: torch.device,
    progress: ProgressCallback | None,
    base: Checkpoint | None = None,
) -> dict[str, Any]:
    """The text section of a manifest: every different text encoder of ``models``, and those that a finished cache of
    the same prompts has already. base: see ``as_checkpoint``."""
    text = dict(writer.before.get("text", {})) if writer.before.get("prompts") == list(prompts) else {}
    dropped = writer.before.get("text", {}).keys() - text.keys()
    mine = set()
    for model in models:
        weights, clip_skip = as_checkpoint(model, base).encoder(base)  # one file in memory at a time
        key = encoder_key(weights, clip_skip)
        if weights and key not in mine:  # most fine-tunes share the base's
            text[key] = store_text(writer, weights, prompts, device, clip_skip=clip_skip, progress=progress)
            mine.add(key)
    if dropped - text.keys():
        logger.warning(
            "the captions changed: %d text encoder(s) of teachers not named now were dropped from the cache; "
            "add them again with 'dmm cache text'",
            len(dropped - text.keys()),
        )
    return text


def add_text(
    folder: str | os.PathLike,
    models: Sequence[Model],
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
) -> int:
    """Add the models' text encoders to a finished cache of any kind, leaving the rest as it is. Returns how many were
    new.

    Raises ValueError for a model without a text encoder, and naming the process that has the folder.
    """
    read_manifest(folder)  # or the lock would make a folder that is not there
    with cache_folder(folder):
        return _add_text(folder, models, device, progress)


def _add_text(
    folder: str | os.PathLike,
    models: Sequence[Model],
    device: torch.device | str,
    progress: ProgressCallback | None,
) -> int:
    manifest = read_manifest(folder)
    check_shards(folder, shard_entries(manifest))
    writer = ShardWriter(folder, manifest["kind"], manifest["settings"])
    for model in models:
        if not as_checkpoint(model).text:
            name = "the model" if isinstance(model, Checkpoint) else f"'{model}'"
            raise ValueError(f"{name} has no text encoder of its own: it uses the base's, nothing is missing")
    text = store_all_text(writer, models, manifest["prompts"], device=torch.device(device), progress=progress)
    content = {k: v for k, v in manifest.items() if k not in ("format", "kind", "settings")}
    writer.finish({**content, "text": text})
    return len(text.keys() - manifest["text"].keys())


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    pictures: Sequence[Picture],
    size: tuple[int, int],
    *,
    scale: float,
    batch_size: int,
    pool: Executor,
    on_picture: Callable[[int], None],
) -> dict[str, Tensor]:
    """Pictures -> scaled mean latents (M, 4, h, w) float16. size: (width, height) in pixels; pool: threads that read
    ahead; on_picture: called with the number of pictures done. Raises ValueError naming a picture whose latents are NaN
    or infinite."""
    device = next(vae.parameters()).device
    pixels = ahead(pool, lambda picture: np.asarray(fit(read_picture(picture), size)), pictures, 4 * batch_size)
    latents = []
    for start in range(0, len(pictures), batch_size):
        images = np.stack([next(pixels) for _ in pictures[start : start + batch_size]])  # (B, H, W, 3) uint8
        latents.append((scale * vae.encode(to_tensor(images, device))).half().cpu())
        good = latents[-1].isfinite().flatten(1).all(1)
        if not good.all():
            bad = pictures[start + int((~good).nonzero()[0])]
            raise ValueError(
                f"{bad.name!r} gives latents with NaN or infinite numbers: the VAE's file is damaged, get it again"
            )
        on_picture(start + len(images))
    return {"latents": torch.cat(latents)}


# --- reading ----------------------------------------------------------------------------------------------------------


class StoredLatents:
    """A Bucket that stays on disk: pictures of one size, read when they are drawn."""

    def __init__(self, folder: str | os.PathLike, entries: Sequence[Mapping[str, Any]], names: Sequence[str] = ()):
        """names: the pictures' files."""
        self.reader = ShardReader(folder, entries, names)
        self.shape = self.reader.shape("latents")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(B,) -> (B, C, h, w) float32"""
        return self.reader.rows("latents", index).float()

    def fingerprint(self) -> str:
        return self.reader.fingerprint()


class ImageCache(CaptionedLatents):
    """A finished image cache as training data. ``text_of`` gives the contexts of each text encoder: see
    ``TextStore``."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]):
        prompts = manifest["prompts"]
        super().__init__(
            [StoredLatents(folder, bucket["shards"], bucket.get("names", ())) for bucket in manifest["buckets"]],
            [prompts[row] for bucket in manifest["buckets"] for row in bucket["rows"]],
        )
        if self.prompts != prompts:
            raise ValueError(
                f"the manifest of the cache '{folder}' is damaged: its list of captions does not fit the pictures"
            )
        self.folder, self.vae_hash = folder, manifest["settings"]["vae"]
        self.text = TextStore(folder, manifest)
        self.text_of = self.text.text_of

    def for_teachers(self, base: Checkpoint, teachers: Mapping[str, tuple[Checkpoint, str]]) -> ImageCache:
        """This cache, after checks. Raises ValueError when the latents are another VAE's than the base's, or a text
        encoder is not in the cache.

        teachers: (checkpoint, file) by name; one without a text encoder uses the base's. A base without a VAE cannot be
        compared.
        """
        if base.vae and weights_hash(base.vae) != self.vae_hash:
            raise ValueError(
                f"the cache '{self.folder}' was made with another VAE than the base model's: the latents would mean other "
                "pictures. Make a cache with this base, or use the base (or parts_from) it was made with"
            )
        for name, checkpoint, file in [("the base model", base, "FILE")] + [
            (f"teacher '{n}'", *c) for n, c in teachers.items()
        ]:
            weights, clip_skip = checkpoint.encoder(base)
            self.text_of(weights, name, file, clip_skip)
        return self


def open_image_cache(folder: str | os.PathLike, verify: bool = False) -> ImageCache:
    """Open a cache that ``build_image_cache`` finished, reading its manifest only.

    Raises ValueError for one that is unfinished, damaged or of a newer version; ``verify`` reads and hashes every
    shard.
    """
    manifest = read_manifest(folder, "images")
    try:
        check_shards(folder, shard_entries(manifest), verify)
        return ImageCache(folder, manifest)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"the manifest of the cache '{folder}' is damaged ({error!r}): make the cache again"
        ) from error
