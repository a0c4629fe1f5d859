"""Captioned latents as training data; a batch follows from the run's seed and the batch's number, and with
adaptive sampling from the losses so far."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..files.checksums import read_checked
from ..seeds import hash_seed
from .difficulty import Chances
from .few_teachers import rows_of_models


@dataclass
class Batch:
    """The inputs of one forward of the student and the teachers.

    x_t (B, C, h, w) float32; t (B,) timesteps; teacher (B,), sorted so that each teacher's rows are a slice, N standing
    for the base; caption (B,), its row in ``Teacher.contexts``, 0 where the caption is dropped. target (B, C, h,
    w): what the teachers predict, each in its own parameterisation, where the data hold it (rollouts), else None.
    importance, t_importance (B,): importance weights of rows that were not drawn uniformly (``Drawn``), else None.
    full: the batch of all processes where this is one process's share of it, its rows from ``start`` on; None where
    this is all of it. See ``global_batch``.
    """

    x_t: Tensor
    t: Tensor
    teacher: Tensor
    caption: Tensor
    target: Tensor | None = None
    importance: Tensor | None = None
    t_importance: Tensor | None = None
    full: Batch | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.t)

    def share(self, place: slice) -> Batch:
        """The rows ``place`` as one process's share of this batch."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[place]

        return Batch(
            self.x_t[place],
            self.t[place],
            self.teacher[place],
            self.caption[place],
            target=cut(self.target),
            importance=cut(self.importance),
            t_importance=cut(self.t_importance),
            full=self,
            start=place.start,
        )

    @property
    def global_batch(self) -> Batch:
        """The batch of all processes together; this one where it is not a share."""
        return self if self.full is None else self.full


@dataclass(frozen=True)
class Draw:
    """The settings by which a run draws its batches; they and a batch's number determine the batch.

    teachers: their number; base_share: share of the rows that have no style; dropout: share of the captions that are
    dropped; shares: how the rows with a style are split between the teachers (they sum to 1), None for equally.
    chances: probabilities of teachers and timesteps, None for teachers in turn and uniform timesteps. models: drawn for
    each step of ``forwards`` batches, of the teachers and the base (``few_teachers``), None for all in every batch.
    """

    seed: int
    batch_size: int
    teachers: int
    base_share: float
    dropout: float
    schedule: NoiseSchedule
    shares: tuple[float, ...] | None = None
    chances: Chances | None = None
    models: int | None = None
    forwards: int = 1

    def few(self, number: int) -> Tensor | None:
        """The model (the base as the last one) of every row of batch ``number``, (B,) sorted, where a step draws some of
        them; else None. The batches of a step share out its rows in the order of the models, so that each model has its
        rows in one batch or in neighbouring ones."""
        if self.models is None:
            return None
        step, place = divmod(number, self.forwards)
        if self.chances:
            styled = self.chances.cells.sum(1)
        else:
            styled = torch.tensor(self.shares or [1 / self.teachers] * self.teachers, dtype=torch.float64)
        shares = torch.cat([(1 - self.base_share) * styled, styled.new_tensor([self.base_share])])
        rows = self.batch_size * self.forwards
        return rows_of_models(shares, self.models, rows, seed=self.seed, step=step)[
            place * self.batch_size : (place + 1) * self.batch_size
        ]

    def turns(self, number: int) -> Tensor:
        """The teacher of every row of batch ``number``, (B,), before any of them goes to the base."""
        if self.shares is None:
            return (number * self.batch_size + torch.arange(self.batch_size)) % self.teachers
        u = self.uniform_points(number)
        ends = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)
        last = max(i for i, share in enumerate(self.shares) if share > 0)
        return torch.searchsorted(ends, u, right=True).clamp(max=last)

    def uniform_points(self, number: int) -> Tensor:
        """A point in [0, 1) for every row of batch ``number``, (B,) float64.

        Multiples of the golden ratio fill [0, 1) uniformly wherever one begins: every teacher gets its share in a run
        of any length.
        """
        place = number * self.batch_size + torch.arange(self.batch_size)
        return ((place.double() + 0.5) * (math.sqrt(5) - 1) / 2) % 1.0


class Bucket(Protocol):
    """All pictures of one size, of shape (M, C, h, w), in files that are read when a picture is asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Tensor:
        """(B,) -> (B, C, h, w) float32, scaled as the UNet sees them."""

    def fingerprint(self) -> str:
        """Changes when any of the pictures changes."""


class TrainingData(Protocol):
    """Training data of a run. ``prompts`` are the distinct captions, the empty one first."""

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def shapes(self) -> Mapping[tuple[int, int, int], int]:
        """(C, h, w) of every size of samples -> their number."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a typical sample, for pictures on the way."""

    @property
    def has_targets(self) -> bool:
        """Whether batches bring the teachers' predictions with them."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A hash of all data: a run refuses to go on with data of another one."""

    def batch(self, number: int, draw: Draw) -> Batch:
        """Batch ``number`` of a run. It depends on the arguments only, so a resumed run draws the batches it would have
        drawn."""


class CaptionedLatents:
    """Pictures with captions, of one size or of several.

    latents: (M, C, h, w) float32, scaled as the UNet sees them, or one such Tensor or Bucket per size; captions: a text
    for each picture, in the buckets' order; owner: (M,) the teacher that painted the picture, which then is the only
    one to learn from it, or None. ``rows`` (M,) are the captions' places in ``prompts``. Raises ValueError for data
    that cannot be trained on.
    """

    has_targets = False

    def __init__(
        self, latents: Tensor | Sequence[Tensor | Bucket], captions: Sequence[str], owner: Tensor | None = None
    ):
        self.buckets: list[Tensor | Bucket] = [latents] if isinstance(latents, Tensor) else list(latents)
        self.captions, self.owner = list(captions), owner
        self._check()
        self.prompts = ["", *sorted(set(self.captions))]
        row = {prompt: i for i, prompt in enumerate(self.prompts)}
        self.rows = torch.tensor([row[caption] for caption in self.captions])

    def _check(self) -> None:
        for bucket in self.buckets:
            if len(bucket.shape) != 4:
                raise ValueError(
                    f"latents of shape {tuple(bucket.shape)}: expected (count, channels, height, width), a caption for each"
                )
        count = len(self)
        if not count:
            raise ValueError("no training pictures given")
        if count != len(self.captions):
            raise ValueError(
                f"{len(self.captions)} captions for latents of {count} pictures: expected one caption for each"
            )
        empty = [i for i, caption in enumerate(self.captions) if not caption.strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {count} captions are empty (the first at position {empty[0]}): caption every picture; "
                "training without prompts is covered by caption_dropout"
            )
        start = 0
        for bucket in self.buckets:
            if isinstance(bucket, Tensor) and (bad := bad_rows(bucket)):
                raise ValueError(
                    f"the latents contain NaN or infinite numbers in {len(bad)} of {len(bucket)} pictures, the first in row "
                    f"{start + bad[0]} ({self.captions[start + bad[0]][:60]!r}): check the picture and the VAE that encoded it"
                )
            start += len(bucket)

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def shapes(self) -> Counter[tuple[int, int, int]]:
        found: Counter[tuple[int, int, int]] = Counter()
        for bucket in self.buckets:
            _, channels, height, width = bucket.shape
            found[channels, height, width] += len(bucket)
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.shapes.most_common(1)[0][0]

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.captions).encode())
        for bucket in self.buckets:
            digest.update(bucket_fingerprint(bucket))
        if self.owner is not None:
            digest.update(self.owner.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, number: int, draw: Draw) -> Batch:
        """Teachers take turns, so that each gets its share of the rows; a ``base_share`` of the rows goes to the base
        instead.

        With ``draw.chances`` the timestep of every row, and the teacher of rows without an owner, are drawn from them.
        With ``draw.models`` rows without an owner go to the models of the step.
        """
        which, index = epoch_batch(draw.seed, number, [len(b) for b in self.buckets], draw.batch_size)
        start = sum(len(b) for b in self.buckets[:which])
        g = torch.Generator().manual_seed(hash_seed(draw.seed, "batch", number))
        owner = None if self.owner is None else self.owner[start + index]
        to_base = torch.rand(draw.batch_size, generator=g) < draw.base_share
        few = draw.few(number) if owner is None else None
        drawn = None
        if draw.chances:
            # Moved by a number of the run's own: over all seeds, every row alone has exactly these chances.
            u = (draw.uniform_points(number) + hash_seed(draw.seed, "cells") / 2**63) % 1.0
            drawn = draw.chances.pick(u, to_base, owner) if few is None else draw.chances.pick_bins(u, few)
            teacher = drawn.teacher
        elif few is not None:
            teacher = few
        else:
            teacher = torch.where(to_base, draw.teachers, draw.turns(number) if owner is None else owner)
        teacher, order = teacher.sort(stable=True)
        index = index[order]
        x0 = self.buckets[which][index]
        if draw.chances and drawn:
            t = draw.chances.timesteps(drawn.bins[order], g)
        else:
            t = torch.randint(len(draw.schedule), (draw.batch_size,), generator=g)
        eps = torch.randn(x0.shape, generator=g)
        drop = torch.rand(draw.batch_size, generator=g) < draw.dropout
        rows = torch.where(drop, 0, self.rows[start + index])
        x_t = draw.schedule.add_noise(x0, eps, t)
        if drawn is None:
            return Batch(x_t, t, teacher, rows)
        importance, t_importance = drawn.importance[order], drawn.t_importance[order]
        return Batch(x_t, t, teacher, rows, importance=importance, t_importance=t_importance)


def bad_rows(values: Tensor) -> list[int]:
    """Of values (M, ...) the rows that hold NaN or infinity."""
    return (~values.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist() if len(values) else []


def bucket_fingerprint(bucket: Tensor | Bucket) -> bytes:
    """Bytes that change when a picture of the bucket changes: a Bucket's ``fingerprint()``, a Tensor's values."""
    if isinstance(bucket, Tensor):
        return bucket.float().contiguous().numpy().tobytes()
    return bucket.fingerprint().encode()


def epoch_batch(seed: int, number: int, sizes: Sequence[int], batch_size: int) -> tuple[int, Tensor]:
    """(bucket, indices (batch_size,) in it) of batch ``number`` of an endless run over buckets of these sizes.

    All of a batch is of one bucket. Every sample comes once an epoch; a bucket that is no multiple of the batch wraps
    around.
    """
    count = sum(math.ceil(size / batch_size) for size in sizes)
    epoch, place = divmod(number, count)
    which, chunk = _epoch_order(seed, epoch, tuple(sizes), batch_size)[place]
    order = _permutation(seed, epoch, which, sizes[which])
    return which, order[(chunk * batch_size + torch.arange(batch_size)) % sizes[which]]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, sizes: tuple[int, ...], batch_size: int) -> list[tuple[int, int]]:
    """The batches of an epoch, shuffled: (bucket, number of the batch in the bucket) of each."""
    batches = [(b, chunk) for b, size in enumerate(sizes) for chunk in range(math.ceil(size / batch_size))]
    g = torch.Generator().manual_seed(hash_seed(seed, "order", epoch))
    return [batches[i] for i in torch.randperm(len(batches), generator=g).tolist()]


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, bucket: int, size: int) -> Tensor:
    """The order (size,) of a bucket's pictures in an epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(hash_seed(seed, "epoch", epoch, bucket)))


def load_latents(path: str | Path) -> CaptionedLatents:
    """Read a safetensors file with ``latents`` (M, 4, h, w) and the metadata ``captions`` (a JSON list of M texts).

    Raises ValueError naming a file that is none.
    """
    try:
        tensors, metadata = read_checked(Path(path))
        captions, latents = json.loads(metadata["captions"]), tensors["latents"].float()
    except (OSError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is not a file of captioned latents (tensor 'latents', metadata 'captions'): {error}"
        ) from error
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"'{path}': the metadata 'captions' is not a JSON list of texts")
    return CaptionedLatents(latents, captions)
