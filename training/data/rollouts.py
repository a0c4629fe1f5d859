"""Builds rollouts: states on the teachers' own sampling paths, with each teacher's predictions. No pictures are needed.

A teacher paints captions from noise under classifier-free guidance; of each path a few random states are kept, with
both predictions that guidance asks for: of the caption and of the empty prompt (data-free distillation, cf. BOOT,
arXiv:2306.05544).

    rollouts-<owner>-512x512-00000.safetensors   x_t, cond, null (S, 4, h, w) float16; t (S,)
    text-<hash>-00000.safetensors, manifest.json as in an image cache
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.unet import UNetConfig
from ..config import check_names
from ..files.hashing import repr_sha256, unet_hash
from ..files.model_settings import say_guesses
from ..progress import ProgressCallback
from ..teachers.lora_files import recorded
from ..teachers.models import Model, as_checkpoint, base_with_parts, split_model
from ..teachers.teacher import Teacher, check_architectures, check_schedules, plain_unet
from ..text import encoder_key
from .buckets import default_resolution, size_multiple
from .cache import store_all_text
from .cached_text import TextStore
from .image_folder import clean_caption
from .rollout_paths import BASE_NAME, PRECISIONS, Owner, RolloutSettings, paint_states, path_generator
from .shards import ShardWriter, in_cache_folder

SHARD_PATHS = 32


def plan_paths(
    owner: Owner, count: int, prompts: int, settings: RolloutSettings
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(path, row of its caption) by size: sizes in turn, captions shuffled, each equally often. Row 0, the empty
    prompt, is not one."""
    plan: dict[tuple[int, int], list[tuple[int, int]]] = {size: [] for size in settings.sizes}
    for path in range(count):
        epoch, place = divmod(path, prompts - 1)
        if place == 0:
            order = 1 + torch.randperm(
                prompts - 1, generator=path_generator(settings.seed, "captions", owner.key, epoch)
            )
        plan[settings.sizes[path % len(settings.sizes)]].append((path, int(order[place])))
    return {size: paths for size, paths in plan.items() if paths}


@in_cache_folder
def build_rollouts(
    folder: str | os.PathLike,
    base: Model,
    teachers: Mapping[str, Model],
    captions: Sequence[str],
    *,
    settings: RolloutSettings | None = None,
    parts_from: Model | None = None,
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Paint with every teacher and the base and keep states, or go on with it. Returns the number of states by name.

    teachers: name -> checkpoint or its file; others that a finished cache has already stay in it. parts_from: a full
    checkpoint, for a base without a text encoder. One UNet is in memory at a time when files are given. Raises
    ValueError for models that do not fit together, before anything is painted, and naming the process that has the folder.
    """
    check_names(list(teachers))
    base_model = base_with_parts(base, parts_from)
    config = base_model.config
    settings = settings or RolloutSettings()
    if not settings.sizes:
        side = default_resolution(config, base_model.prediction)
        settings = dataclasses.replace(settings, sizes=((side, side),))
    settings.check(size_multiple(config))
    prompts = ["", *sorted({clean_caption(caption) for caption in captions})]
    if len(prompts) == 1:
        raise ValueError("no captions given: the teachers need something to paint")
    fixed = {k: v for k, v in vars(settings).items() if k not in ("paths", "base_share")}
    fixed["captions"] = repr_sha256(prompts)
    writer = ShardWriter(folder, "rollouts", fixed)

    owners = _owners(teachers, base_model, config)
    models = [base_model, *teachers.values()]
    text = store_all_text(writer, models, prompts, device=torch.device(device), progress=progress, base=base_model)
    store = TextStore(folder, {"text": text})

    work: list[tuple[Owner, Model, int]] = [(owner, teachers[owner.name], settings.paths) for owner in owners]
    if settings.base_share:
        share = settings.base_share / (1 - settings.base_share)
        count = max(round(share * len(teachers) * settings.paths), len(settings.sizes))
        work.append((_owner(BASE_NAME, base, base_model, role="base", base=base_model), base_model, count))
    total, done = sum(count for *_, count in work), 0
    entries: list[dict[str, Any]] = []
    for owner, model, count in work:

        def on_path(painted: int, before: int = done, name: str = owner.name) -> None:
            if progress:
                progress(before + painted, total, f"'{name}' paints")

        load = functools.cache(functools.partial(_load_teacher, owner, model, store, settings, device=device))
        plan = plan_paths(owner, count, len(prompts), settings)
        by_size = _store_paths(writer, owner, plan, prompts, settings=settings, load=load, on_path=on_path)
        entries.append({**vars(owner), "parts": by_size})
        done += count
    names, weights = {entry["name"] for entry in entries}, {(entry["role"], entry["unet"]) for entry in entries}
    before = [entry for entry in writer.before.get("owners", []) if entry["name"] not in names]
    kept = [entry for entry in before if (entry["role"], entry["unet"]) not in weights]
    writer.finish({"prompts": prompts, "owners": [*kept, *entries], "text": text})
    return {entry["name"]: sum(len(of_size["rows"]) for of_size in entry["parts"]) for entry in entries}


def _owners(teachers: Mapping[str, Model], base: Checkpoint, config: UNetConfig) -> list[Owner]:
    """The teachers as owners of paths. Raises ValueError for another architecture or schedule than the base's, and for
    the same one twice."""
    owners, sizes = [], []
    guessed: dict[str, Checkpoint] = {}
    seen: dict[str, str] = {}  # name by hash
    for name, model in teachers.items():
        checkpoint = as_checkpoint(model, base)  # one file in memory at a time
        owners.append(_owner(name, model, checkpoint, role="teacher", base=base))
        sizes.append((name, checkpoint.config))
        guessed[name] = dataclasses.replace(checkpoint, unet={}, text={}, vae={}, other={})
    check_architectures(config, sizes)
    say_guesses({"base": base, **guessed})
    check_schedules(base.zero_snr, [(owner.name, owner.zero_snr) for owner in owners])
    for owner in owners:
        if owner.name.strip() == BASE_NAME:
            raise ValueError(f"a teacher cannot be called '{BASE_NAME}': the base's own paths have that name")
        if owner.unet in seen:
            raise ValueError(
                f"teachers '{seen[owner.unet]}' and '{owner.name}' have the same weights: name one of them"
            )
        seen[owner.unet] = owner.name
    return owners


def _owner(name: str, model: Model, checkpoint: Checkpoint, *, role: str, base: Checkpoint) -> Owner:
    """A model as the owner of paths. Raises ValueError for a DMM model."""
    if checkpoint.num_styles:
        raise ValueError(f"'{name}' is itself a DMM model with {checkpoint.num_styles} styles: use a plain checkpoint")
    file, digest = ("", "") if isinstance(model, Checkpoint) else recorded(*split_model(model)[:2])
    unet, text = unet_hash(checkpoint), encoder_key(*checkpoint.encoder(base))
    return Owner(
        role,
        name,
        unet,
        text,
        prediction=checkpoint.prediction,
        zero_snr=checkpoint.zero_snr,
        file=file,
        sha256=digest,
    )


def _load_teacher(
    owner: Owner, model: Model, store: TextStore, settings: RolloutSettings, *, device: torch.device | str
) -> Teacher:
    """An owner of paths as a teacher on the device, in the settings' precision."""
    checkpoint = as_checkpoint(model)
    unet = plain_unet(checkpoint.unet, f"'{owner.name}'", heads=checkpoint.heads).to(
        device, PRECISIONS[settings.precision]
    )
    contexts, pooled = store.stored[owner.text]
    return Teacher(owner.name, unet, contexts, pooled, prediction=owner.prediction, zero_snr=owner.zero_snr)


def _store_paths(
    writer: ShardWriter,
    owner: Owner,
    plan: Mapping[tuple[int, int], list[tuple[int, int]]],
    prompts: Sequence[str],
    *,
    settings: RolloutSettings,
    load: Callable[[], Teacher],
    on_path: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write one owner's shards -> its ``parts`` in the manifest, one per size. The UNet is loaded only when a shard is
    missing."""
    entries: list[dict[str, Any]] = []
    done = 0
    for size, paths in plan.items():
        shards = []
        for number, start in enumerate(range(0, len(paths), SHARD_PATHS)):
            chunk = paths[start : start + SHARD_PATHS]

            def build(
                chunk: list[tuple[int, int]] = chunk, size: tuple[int, int] = size, before: int = done
            ) -> dict[str, Tensor]:
                states = []
                for first in range(0, len(chunk), settings.batch_size):
                    batch = chunk[first : first + settings.batch_size]
                    numbers, rows = zip(*batch)
                    states += paint_states(load(), owner, rows, numbers, size=size, settings=settings)
                    on_path(before + first + len(batch))
                return {name: torch.stack([state[name] for state in states]) for name in ("x_t", "cond", "null", "t")}

            texts = [(path, prompts[row]) for path, row in chunk]
            identity = repr_sha256("rollouts", owner.key, size, sorted(writer.settings.items()), texts)
            name = f"rollouts-{owner.key}-{size[0]}x{size[1]}-{number:05d}.safetensors"
            shards.append(writer.shard(name, identity, len(chunk) * settings.states, build))
            done += len(chunk)
            on_path(done)
        rows = [row for _, row in paths for _ in range(settings.states)]
        entries.append({"size": list(size), "rows": rows, "shards": shards})
    return entries
