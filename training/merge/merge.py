"""Merges models into one DMM model without training: the mean of their weights, and a style bank of what sets each apart. Or the base's
weights, and a bank of what sets each apart from those: then the styles alone can go onto any copy of the base (docs/bank.md).

The models' tensors are read from their files one after the other, so that memory holds the result and one weight of every model. What is
computed goes into files, block by block: a merge that was interrupted goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ...dmm_core.bank_fit import Fitted, NotFinite, fit_bank, neutral_style
from ...dmm_core.bank_size import USUAL, bank_of
from ...dmm_core.checkpoint import STYLE_KEYS, Checkpoint
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.style import mlp_name
from ...dmm_core.unet import UNetConfig, unet_config_from_state_dict
from ...dmm_core.weights_file import write_weights
from ..config import check_names
from ..files.checksums import read_checked, with_digest
from ..files.folder_lock import locked
from ..files.hashing import repr_sha256
from ..progress import ProgressCallback
from ..teachers.teacher import check_architectures
from .report import LayerFigures, MergeReport, block_of

logger = logging.getLogger(__name__)

MOST = 64
"""Models in one merge: each has a core in every layer, and memory holds one weight of each."""
FIGURES = "dmm.merge"
"""Metadata of a part: the figures of its layers."""
CENTRES = ("mean", "base")
"""What the merged model's own weights may be."""


@dataclass(frozen=True)
class Source:
    """A model to merge. unet: its weights by key, of which one is asked for at a time; shapes: theirs. stamp: what changes when they do.
    prediction, zero_snr, heads: as of a ``Checkpoint``."""

    info: StyleInfo
    unet: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    stamp: str
    prediction: str = "eps"
    zero_snr: bool = False
    heads: Sequence[int] = ()

    @property
    def name(self) -> str:
        return self.info.name

    def plain(self) -> Mapping[str, Tensor]:
        """The weights without a style side."""
        if not any(key.startswith(STYLE_KEYS) for key in self.unet):
            return self.unet
        raise ValueError(
            f"'{self.name}' is a DMM model with styles of its own: merge the models it was made of, or teach it more styles (add-teacher)"
        )


@dataclass(frozen=True)
class MergeConfig:
    """budget: of the bank, see ``bank_size.bank_of``. dtype: of the result; weights that are the base's keep theirs. device: where it is
    computed. centre: see ``CENTRES``."""

    budget: str = USUAL
    dtype: torch.dtype = torch.float16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    centre: str = "mean"


def merge(
    teachers: Sequence[Source],
    base: Source | None,
    parts: Checkpoint,
    config: MergeConfig,
    *,
    folder: Path,
    progress: ProgressCallback | None = None,
) -> tuple[Checkpoint, MergeReport]:
    """One model that paints in the look of each teacher by name, and a report on what it keeps of them.

    base: what it paints without a style, which gets a core of its own; None: the teachers' mean. Centred at the base, the result holds the
    base's weights bit for bit, and no core for it. parts: text encoder and VAE of the result. folder: for what is computed until the end;
    when it is there from an earlier merge of the same models, that goes on. It stays until ``forget_parts``.

    Raises ValueError, before anything is computed, for fewer than two models, names that clash, other architectures, predictions or noise
    schedules, a model with styles, a budget that is too small, and a centre that is not there; for NaN when it is met.
    """
    if config.centre not in CENTRES:
        raise ValueError(f"the centre is '{config.centre}', expected {' or '.join(CENTRES)}")
    if config.centre == "base" and base is None:
        raise ValueError("a merge centred at the base needs the base: name its file with --base")
    centre, none = (base, None) if config.centre == "base" else (None, base)
    models = [*teachers, *([base] if base else [])]
    unet_config, shapes = checked(teachers, models)
    cores = len(teachers) + bool(none)
    size = bank_of(config.budget, shapes, cores, config.dtype.itemsize, styles=len(teachers))
    what = repr_sha256([m.stamp for m in models], cores, size.rank, size.bias, str(config.dtype))[:16]
    new = not any(folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {}
    figures: list[LayerFigures] = []
    done = 0
    # In an order of our own: the tensors of a layer must not be apart.
    for name, group in groupby(sorted(shapes, key=lambda key: (block_of(key), key)), key=block_of):
        keys, path = list(group), folder / f"{what}-{name}.safetensors"
        found = finished_block(path)
        if found is None:
            fitted = fit_bank(
                [model.unet for model in teachers],
                none.unet if none else None,
                size.rank,
                shapes={key: shapes[key] for key in keys},
                bias=size.bias,
                centre=centre.unet if centre else None,
                dtype=config.dtype,
                device=config.device,
            )
            try:
                write_block(
                    path,
                    with_names(fitted, [*(f"'{one.name}'" for one in teachers), "the base"]),
                    progress and (lambda k, done=done, name=name: progress(done + k, len(shapes), f"merging {name}")),
                )
            except ValueError:  # refused, which no later run with these files changes
                if new:
                    forget_parts(folder)
                raise
            found = read_checked(path)  # finished blocks lie in files, and not in memory
        elif progress:
            progress(done + len(keys), len(shapes), f"merging {name}")
        done += len(keys)
        weights |= found[0]
        figures += [LayerFigures(**values) for values in json.loads(found[1][FIGURES])]
    weights |= neutral_style(
        len(teachers), unet_config.embed_dim, mlp_name(bool(unet_config.adm_channels)), config.dtype
    )
    report = MergeReport([m.name for m in teachers], figures, size, config.dtype.itemsize, centre=config.centre)
    recipe = {
        "merge": {
            "budget": config.budget,
            "rank": size.rank,
            "biases": size.bias,
            "kept": report.kept_by_teacher(),
            **({"centre": "base"} if centre else {}),
        },
        "base": {"file": base.info.teacher, "sha256": base.info.sha256} if base else None,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    checkpoint = Checkpoint(
        weights,
        parts.text,
        parts.vae,
        [m.info for m in teachers],
        {key: value for key, value in recipe.items() if value},
        prediction=teachers[0].prediction,
        zero_snr=teachers[0].zero_snr,
        clip_skip=parts.clip_skip if parts.text else None,
        heads=unet_config.num_heads,
    )
    return checkpoint, report


def write_block(path: Path, fitted: Iterable[Fitted], progress: Callable[[int], None] | None) -> None:
    """Compute the weights of a block into a file, with their figures as metadata. progress: called with the number done."""
    weights: dict[str, Tensor] = {}
    figures = []
    for one in fitted:
        weights |= one.weights
        figures.append(LayerFigures(one.key, one.kept, one.total, one.apart.tolist(), one.shared))
        if progress:
            progress(len(figures))
    write_weights(path, weights, with_digest(weights, {FIGURES: json.dumps([vars(f) for f in figures])}))


def finished_block(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Weights and metadata of a block that an earlier merge computed; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        return read_checked(path)
    except (ValueError, OSError) as error:
        logger.warning("a part of the merge cannot be used (%s): made anew", error)
        return None


T = TypeVar("T")


def with_names(fitted: Iterable[T], names: Sequence[str]) -> Iterator[T]:
    """The same, with models that hold NaN named. names: of the models, in their order."""
    try:
        yield from fitted
    except NotFinite as error:
        raise ValueError(error.explained(names)) from error


def checked(teachers: Sequence[Source], models: Sequence[Source]) -> tuple[UNetConfig, Mapping[str, tuple[int, ...]]]:
    """The sizes that all models have; ValueError, naming the model, where they do not belong together."""
    if not 2 <= len(teachers) <= MOST:
        raise ValueError(f"{len(teachers)} models to merge: expected 2 to {MOST}")
    check_names([m.name for m in teachers])
    configs = []
    for model in models:
        plain = model.plain()
        try:
            configs.append((model.name, unet_config_from_state_dict(plain, model.heads)))
        except ValueError as error:
            raise ValueError(f"'{model.name}': {error}") from error
    check_architectures(configs[0][1], configs)
    for what in ("prediction", "zero_snr"):
        values = {getattr(model, what) for model in models}
        if len(values) > 1:
            said = "; ".join(f"'{model.name}' has {getattr(model, what)}" for model in models)
            raise ValueError(f"weights of models with another {what.replace('_', ' ')} do not add up ({said})")
    shapes = models[0].shapes
    for model in models[1:]:
        different = sorted(k for k in shapes.keys() | model.shapes.keys() if shapes.get(k) != model.shapes.get(k))
        if different:
            raise ValueError(f"'{model.name}' and '{models[0].name}' differ in the weights {', '.join(different[:4])}")
    return configs[0][1], shapes


@contextlib.contextmanager
def merge_folder(folder: Path) -> Iterator[None]:
    """Inside, the folder for a merge's parts is this process's alone; it is removed afterwards when nothing is in it. Raises ValueError
    naming the process that has it, so that two merges into one file do not mix."""
    try:
        with locked(folder, "the merge folder", "give the output another name"):
            yield
    finally:
        with contextlib.suppress(OSError):  # parts are in it, or it is gone
            folder.rmdir()


def forget_parts(folder: Path) -> None:
    """Remove what ``merge`` left in ``folder``, once its result is saved."""
    shutil.rmtree(folder, ignore_errors=True)
