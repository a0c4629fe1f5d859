"""Finished rollouts as training data: the teachers' predictions are stored with the states."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ..files.hashing import repr_sha256, unet_hash
from ..seeds import hash_seed
from .batches import Batch, Draw
from .cached_text import TextStore
from .rollout_paths import BASE_NAME, Owner
from .shards import ShardReader, check_shards, read_manifest, shard_entries


@dataclass
class OwnerStates:
    """One owner's M states of one size, in the files. rows (M,): their captions."""

    reader: ShardReader
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


class Rollouts:
    """Finished rollouts as training data with stored targets: training needs no teacher's UNet.

    ``names``: the teachers, in order; ``owners``: what is known of each of them, and of the base under ``BASE_NAME``.
    Rows of a batch are of the teachers in turn, a share of ``base_share`` of the base's own paths; each owner's states
    come once before any comes again.
    """

    has_targets = True

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]):
        self.folder, self.manifest, self.prompts = folder, manifest, manifest["prompts"]
        teachers = [entry for entry in entries if entry["role"] == "teacher"]
        base = [entry for entry in entries if entry["role"] == "base"]
        self.names, self.has_base = [entry["name"] for entry in teachers], bool(base)
        self.entries = [*teachers, *base]
        self.owners = {
            entry["name"]: Owner(**{k: v for k, v in entry.items() if k != "parts"}) for entry in self.entries
        }
        sizes = {tuple(part["size"]) for entry in self.entries for part in entry["parts"]}
        self.sizes = sorted(sizes)
        self.states = [
            [self._states(entry, size) for entry in self.entries] for size in self.sizes
        ]  # by size, then owner
        self.text = TextStore(folder, manifest)
        self.text_of = self.text.text_of

    def _states(self, entry: Mapping[str, Any], size: tuple[int, int]) -> OwnerStates:
        """An owner's states of a size (width, height) in pixels. Raises ValueError when it has none."""
        for of_size in entry["parts"]:
            if tuple(of_size["size"]) == size:
                reader = ShardReader(self.folder, of_size["shards"])
                if len(reader) != len(of_size["rows"]):
                    raise ValueError(
                        f"the manifest of '{self.folder}' is damaged: {len(of_size['rows'])} captions of {len(reader)}"
                    )
                return OwnerStates(reader, torch.tensor(of_size["rows"]))
        width, height = size
        raise ValueError(
            f"the rollouts in '{self.folder}' have no paths of '{entry['name']}' at {width}x{height}, but of others: "
            "make them with the same sizes for all"
        )

    def for_teachers(self, base: Checkpoint, teachers: Mapping[str, tuple[Checkpoint, str]]) -> Rollouts:
        """The rollouts of these teachers alone, in this order and under these names.

        teachers: (checkpoint, file) by name. Raises ValueError naming those whose weights are not the ones that
        painted.
        """
        found, missing = [], []
        for role, name, checkpoint in [("teacher", n, c) for n, (c, _) in teachers.items()] + [
            ("base", BASE_NAME, base)
        ]:
            entry = self._painted_by(role, checkpoint)
            if entry:
                found.append({**entry, "name": name})
            elif role == "teacher" or self.has_base:
                missing.append(f"teacher '{name}'" if role == "teacher" else "the base model")
        if missing:
            known = ", ".join(f"'{name}'" for name in self.names)
            raise ValueError(
                f"the rollouts in '{self.folder}' were not painted by {', '.join(missing)} (other weights, prediction or noise "
                f"schedule); they are those of {known}. Run 'dmm cache rollouts' again with these teachers to add them"
            )
        rollouts = Rollouts(self.folder, self.manifest, found)
        for name, checkpoint, file in [("the base model", base, "FILE")] + [
            (f"teacher '{n}'", *c) for n, c in teachers.items()
        ]:
            weights, clip_skip = checkpoint.encoder(base)
            if weights:
                rollouts.text_of(weights, name, file, clip_skip)
        return rollouts

    def _painted_by(self, role: str, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
        wanted = unet_hash(checkpoint), checkpoint.prediction, checkpoint.zero_snr
        for entry in self.entries:
            if entry["role"] == role and (entry["unet"], entry["prediction"], entry["zero_snr"]) == wanted:
                return entry
        return None

    def __len__(self) -> int:
        return sum(len(one) for owners in self.states for one in owners)

    @property
    def shapes(self) -> Counter[tuple[int, int, int]]:
        found: Counter[tuple[int, int, int]] = Counter()
        for owners in self.states:
            channels, height, width = owners[0].reader.shape("x_t")[1:]
            found[channels, height, width] += sum(map(len, owners))
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of most states."""
        return self.shapes.most_common(1)[0][0]

    def fingerprint(self) -> str:
        shards = [[one.reader.fingerprint() for one in owners] for owners in self.states]
        rows = [entry["parts"][i]["rows"] for entry in self.entries for i in range(len(entry["parts"]))]
        return repr_sha256("rollouts", self.prompts, self.sizes, shards, rows)

    def batch(self, number: int, draw: Draw) -> Batch:
        """As ``TrainingData.batch``. Where a caption is dropped, the target is the prediction for the empty prompt.

        Raises ValueError for another number of teachers than there are, and for a base_share without paths of the base.
        """
        if draw.teachers != len(self.names):
            raise ValueError(
                f"rollouts of {len(self.names)} teachers for a run of {draw.teachers}: see Rollouts.for_teachers"
            )
        if draw.shares is not None:
            raise ValueError(
                "rollouts give every teacher the same share; to add or forget styles use pictures (data of kind cache made by "
                "'dmm cache images')"
            )
        if draw.base_share and not self.has_base:
            raise ValueError(
                f"the rollouts in '{self.folder}' have no paths of the base: make them with a base share, or set base_share to 0"
            )
        counts = tuple(math.ceil(sum(len(one) for one in owners) / draw.batch_size) for owners in self.states)
        which, turn = size_of_batch(draw.seed, number, counts)
        teacher, turns = share_out(turn * draw.batch_size, draw.batch_size, draw.teachers, draw.base_share)
        teacher, order = teacher.sort(stable=True)
        turns = turns[order]
        g = torch.Generator().manual_seed(hash_seed(draw.seed, "rollout batch", number))
        drop = torch.rand(draw.batch_size, generator=g) < draw.dropout
        x_t: list[Tensor] = []
        t: list[Tensor] = []
        rows: list[Tensor] = []
        target: list[Tensor] = []
        for i in teacher.unique().tolist():
            mine, states = teacher == i, self.states[which][i]
            drawn = [_drawn(draw.seed, which, i, count=len(states), draw=d) for d in turns[mine].tolist()]
            index = torch.tensor(drawn)
            dropped = drop[mine]
            x_t.append(states.reader.rows("x_t", index).float())
            t.append(states.reader.rows("t", index))
            rows.append(torch.where(dropped, 0, states.rows[index]))
            stored = [states.reader.rows("null" if d else "cond", i[None]) for i, d in zip(index, dropped.tolist())]
            target.append(torch.cat(stored).float())
        return Batch(torch.cat(x_t), torch.cat(t), teacher, torch.cat(rows), target=torch.cat(target))


def size_of_batch(seed: int, number: int, counts: tuple[int, ...]) -> tuple[int, int]:
    """(size of batch ``number``, its number among the batches of that size); counts: batches of each size in an
    epoch."""
    epoch, place = divmod(number, sum(counts))
    which, turn = _epoch_of_sizes(seed, epoch, counts)[place]
    return which, epoch * counts[which] + turn


@functools.lru_cache(maxsize=4)
def _epoch_of_sizes(seed: int, epoch: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, number among the batches of that size) of every batch of an epoch, shuffled."""
    sizes = torch.tensor([which for which, count in enumerate(counts) for _ in range(count)])
    g = torch.Generator().manual_seed(hash_seed(seed, "rollout sizes", epoch))
    order = sizes[torch.randperm(len(sizes), generator=g)].tolist()
    met = [0] * len(counts)
    turns = []
    for which in order:
        turns.append((which, met[which]))
        met[which] += 1
    return turns


def share_out(position: int, count: int, teachers: int, base_share: float) -> tuple[Tensor, Tensor]:
    """(owner (count,), number of the row among its owner's (count,)) of rows position to position + count - 1 of an
    endless run; owner ``teachers`` is the base. The base's rows are spread evenly, and the teachers take turns in the
    others."""
    place = torch.arange(position, position + count + 1)
    base = (place.double() * base_share).floor().long()  # the base's rows before each place
    is_base, place, base = base.diff() > 0, place[:-1], base[:-1]
    others = place - base
    return torch.where(is_base, teachers, others % teachers), torch.where(is_base, base, others // teachers)


def _drawn(seed: int, size: int, owner: int, *, count: int, draw: int) -> int:
    """The index of the state, of an owner's ``count`` of one size, that its draw number ``draw`` is: a new order every
    epoch."""
    epoch, place = divmod(draw, count)
    return int(_order(seed, size, owner, count=count, epoch=epoch)[place])


@functools.lru_cache(maxsize=256)
def _order(seed: int, size: int, owner: int, *, count: int, epoch: int) -> Tensor:
    """The order (count,) of an owner's states of one size in an epoch."""
    g = torch.Generator().manual_seed(hash_seed(seed, "rollout epoch", size, owner, epoch))
    return torch.randperm(count, generator=g)


def open_rollouts(folder: str | os.PathLike, verify: bool = False) -> Rollouts:
    """Open rollouts that ``build_rollouts`` finished, reading the manifest only: all teachers, in the manifest's order.

    Raises ValueError for those that are unfinished, damaged or of a newer version; ``verify`` reads and hashes every
    shard.
    """
    manifest = read_manifest(folder, "rollouts")
    try:
        check_shards(folder, shard_entries(manifest), verify)
        return Rollouts(folder, manifest, manifest["owners"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the manifest of the rollouts '{folder}' is damaged ({error!r}): make them again") from error
