"""More styles for a model with a style bank, and fewer, without training; and what there is to say about it."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ...dmm_core.bank import BANK, BankConfig
from ...dmm_core.bank_drop import Told, drop_styles
from ...dmm_core.bank_grow import Grown, Growth, grow_bank, grow_codes, growth_of, take_up_offsets
from ...dmm_core.bank_size import Size
from ...dmm_core.checkpoint import STYLE_KEYS, Checkpoint
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.unet import UNetConfig, unet_config_from_state_dict
from ..config import check_names
from ..files.style_file import centred_at_base
from ..markdown import table
from ..paint.heatmap import heatmap
from ..progress import ProgressCallback
from ..teachers.teacher import check_architectures
from .merge import MOST, Source, block_of, with_names
from .report import LayerFigures, MergeReport, TeacherFigures

STALE = ("modelspec.date", "modelspec.merged_from")


@dataclass(frozen=True, kw_only=True)
class GrowthReport(MergeReport):
    """What a model with a bank keeps of the models that it took in. names: all its styles, the ``new`` ones last; before: of each new one,
    the sum of squares that the basis as it was would have held. size: what came on top. from_rank: the largest rank before. rest: the
    offset of the time embedding by the codes of the new styles that nothing takes up, as a share of the embedding's last bias's norm."""

    growth: Growth
    new: int
    before: list[float]
    from_rank: int
    rest: float

    ending: ClassVar[str] = "growth"

    def teachers(self) -> list[TeacherFigures]:
        """The figures of each new style."""
        return super().teachers()[-self.new :]

    def blocks(self) -> dict[str, list[float | None]]:
        """Share of each new model's change that the bank holds, by block of the UNet; None where it changes nothing."""
        return {block: shares[-self.new :] for block, shares in super().blocks().items()}

    def kept_before(self) -> list[float]:
        """The share of each new model's change that the basis would have held as it was."""
        out = []
        for i, held in enumerate(self.before, start=len(self.names) - self.new):
            total = sum(layer.apart[i][i] for layer in self.layers)
            out.append(min(held / total, 1.0) if total else 1.0)
        return out

    def text(self) -> str:
        """The report as Markdown."""
        mb = self.growth.numbers * self.itemsize / 1e6
        lines = [
            f"The style bank of rank {self.from_rank} grew by rank {self.growth.rank}: {mb:.1f} MB more, "
            f"+{100 * self.growth.share:.1f}% of the UNet. The styles that were there are unchanged.",
        ]
        rows = []
        for one, before in zip(self.teachers(), self.kept_before()):
            said = "same weights as the nearest" if one.same else ""
            shares = f"{100 * one.kept:.0f}%", f"{100 * before:.0f}%", f"{100 * one.change:.1f}%"
            rows.append((one.name, *shares, f"{one.nearest} ({one.distance:.2f})", said))
        head = ("new style", "energy kept", "in the basis as it was", "change", "nearest", "")
        return "\n".join([*lines, "", table(head, rows), "", *self.advice()])

    def advice(self) -> list[str]:
        """What to do about it, in sentences."""
        out = [
            "Energy kept: how much of what sets a model apart from the bank's mean is in the bank now. It says nothing certain of "
            "pictures: paint a style sheet."
        ]
        low = [one.name for one in self.teachers() if one.kept < 0.5]
        if low and not self.growth.rank:
            out.append(f"No directions of their own: {', '.join(low)}. A larger budget helps most.")
        elif low:
            out.append(f"Less than half is held of {', '.join(low)}: a larger budget, or training from here, helps.")
        if self.rest > 0.01:
            out.append(
                f"The new styles' codes move the time embedding by {100 * self.rest:.0f}% of its last bias, which this bank, without "
                "biases, cannot take back: training from here does."
            )
        return out

    def picture(self) -> Image.Image:
        """The share of each new model's change that is kept, block by block."""
        blocks = self.blocks()
        return heatmap(
            list(blocks.values()),
            list(blocks),
            self.names[-self.new :],
            "Energy kept by the style bank",
            note="Share of each new model's change from the bank's mean that it holds, by block of the UNet.",
        )

    def to_dict(self) -> dict:
        """All figures, for JSON."""
        return {
            "growth": vars(self.growth) | {"bytes": self.growth.numbers * self.itemsize},
            "teachers": [
                vars(one) | {"kept_before": before} for one, before in zip(self.teachers(), self.kept_before())
            ],
            "blocks": self.blocks(),
        }


def add_teachers(
    model: Checkpoint,
    teachers: Sequence[Source],
    budget: str,
    *,
    base: StyleInfo | None = None,
    device: torch.device | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[Checkpoint, GrowthReport]:
    """A DMM model with a style bank and more styles, without training: the styles that it has compute bitwise the same weights.

    budget: what the new styles may add together, see ``bank_grow.growth_of``. base: the model's file and its sha256, for the recipe. In
    the model's own precision, a weight at a time. Raises ValueError, before anything is computed, for a model without a bank, names that
    clash, other architectures, predictions or noise schedules, a teacher with styles of its own, and a budget that is too small; for NaN
    when it is met.
    """
    config, bank = with_bank(model)
    shapes = checked(model, config, teachers)
    itemsize = model.unet[f"{bank.ranks[0][0]}.weight"].element_size()
    growth = growth_of(budget, shapes, bank, new=len(teachers), itemsize=itemsize)
    codes, offsets = grow_codes(model.unet, len(teachers))
    weights: dict[str, Tensor] = {}
    layers, before = [], [0.0] * len(teachers)
    # In an order of our own: the tensors of a layer must not be apart.
    order = {key: shapes[key] for key in sorted(shapes, key=lambda key: (block_of(key), key))}
    grown = grow_bank(model.unet, [one.unet for one in teachers], growth.rank, shapes=order, device=device)
    for done, one in enumerate(with_names(grown, [f"'{one.name}'" for one in teachers]), start=1):
        weights |= one.weights
        layers.append(figures_of(one))
        before = [a + b for a, b in zip(before, one.before or before_nothing(teachers))]
        if progress:
            progress(done, len(shapes), f"adding styles, {block_of(one.key)}")
    taken_up = take_up_offsets(weights, offsets, len(model.styles))
    rest = 0.0 if taken_up else offsets.norm(dim=1).max().item() / model.unet["time_embed.2.bias"].float().norm().item()
    names = [*(style.name for style in model.styles), *(one.name for one in teachers)]
    rank = max(max(up, down) for _, up, down in bank.ranks)
    held = sum(math.prod(model.unet[key].shape) for key in model.unet if key.startswith(f"{BANK}.")) + growth.numbers
    size = Size(rank + growth.rank, bank.bias, held, held / sum(map(math.prod, shapes.values())))
    report = GrowthReport(
        names, layers, size, itemsize, growth=growth, new=len(teachers), before=before, from_rank=rank, rest=rest
    )
    made = {"added": [one.name for one in teachers], "growth": {
        "budget": budget.strip(), "rank": growth.rank, "kept": report.kept_by_teacher(),
    }}  # fmt: skip
    styles = [*model.styles, *(one.info for one in teachers)]
    unet = {**model.unet, **weights, **codes}
    return changed(model, unet, styles, recipe_of(model, made, base)), report


def with_bank(model: Checkpoint) -> tuple[UNetConfig, BankConfig]:
    """The sizes of a model and of its bank. Raises ValueError for one without."""
    config = model.config
    if not config.num_styles:
        raise ValueError("the model has no styles: it is a plain checkpoint, not a DMM model (dmm merge makes one)")
    if not config.bank:
        raise ValueError(
            "the model has no style bank: its styles are in the network, which must be trained for another one (Add Teacher to DMM without "
            "'instant', dmm add-teacher --config)"
        )
    return config, config.bank


def checked(model: Checkpoint, config: UNetConfig, teachers: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's weights without its styles, which all teachers have; ValueError, naming one, where they do not fit."""
    if not 1 <= len(teachers) <= MOST:
        raise ValueError(f"{len(teachers)} models to add: expected 1 to {MOST}")
    check_names([*(style.name for style in model.styles), *(one.name for one in teachers)])
    shapes = {key: tuple(weight.shape) for key, weight in model.unet.items() if not key.startswith(STYLE_KEYS)}
    for one in teachers:
        plain = one.plain()
        try:
            check_architectures(config, [(one.name, unet_config_from_state_dict(plain, one.heads))])
        except ValueError as error:
            raise ValueError(f"'{one.name}': {error}") from error
        for what in ("prediction", "zero_snr"):
            if getattr(one, what) != getattr(model, what):
                raise ValueError(
                    f"weights of models with another {what.replace('_', ' ')} do not add up ('{one.name}' has {getattr(one, what)}, the "
                    f"model {getattr(model, what)})"
                )
        different = sorted(k for k in shapes.keys() | one.shapes.keys() if shapes.get(k) != one.shapes.get(k))
        if different:
            raise ValueError(f"'{one.name}' and the model differ in the weights {', '.join(different[:4])}")
    return shapes


def figures_of(one: Grown) -> LayerFigures:
    """As of a merge of all styles: of the old ones, the bank holds what it says."""
    old = one.apart.diagonal()[: len(one.apart) - len(one.kept)].tolist() if one.kept else []
    return LayerFigures(one.key, [*old, *one.kept], [*old, *one.total], one.apart.tolist(), one.shared)


def before_nothing(teachers: Sequence[Source]) -> list[float]:
    """Of what no bank holds a part of."""
    return [0.0] * len(teachers)


def changed(model: Checkpoint, unet: dict[str, Tensor], styles: list[StyleInfo], recipe: dict[str, Any]) -> Checkpoint:
    """The model with another UNet and other styles; what its metadata say of the time and the models it was made of is said anew."""
    metadata = {key: value for key, value in model.metadata.items() if key not in STALE}
    return dataclasses.replace(model, unet=unet, styles=styles, recipe=recipe, metadata=metadata)


def recipe_of(model: Checkpoint, made: Mapping[str, Any], base: StyleInfo | None) -> dict[str, Any]:
    """What was done now, and how the model came to what it was before."""
    before = {key: value for key, value in model.recipe.items() if key != "history"}
    now = {"base": {"file": base.teacher, "sha256": base.sha256}} if base else {}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    history = [*model.recipe.get("history", []), {"styles": [style.name for style in model.styles], **before}]
    return {**made, **now, "versions": versions, "history": history}


# --- fewer styles -----------------------------------------------------------------------------------------------------


def delete_styles(
    model: Checkpoint, names: Sequence[str], *, base: StyleInfo | None = None
) -> tuple[Checkpoint, DeletionReport]:
    """A DMM model without some of its styles, without training: their codes go, and of a bank their cores and biases. See
    ``dmm_core.bank_drop`` for what stays. Raises ValueError for a name that it does not have, and when no style would stay."""
    if not model.styles:
        raise ValueError("the model has no styles: it is a plain checkpoint, not a DMM model")
    gone = indices_of(model, names)
    at_base = centred_at_base(model.recipe)
    dropped = drop_styles(model.unet, gone, keep_centre=at_base)
    stay = [style for i, style in enumerate(model.styles) if i not in gone]
    forgotten = [model.styles[i].name for i in gone]
    made = {"forgotten": forgotten, "deleted": {"mean moved": dropped.moved}}
    left = changed(model, dropped.unet, stay, recipe_of(model, made, base))
    return left, DeletionReport(forgotten, dropped.told, dropped.moved, at_base)


def indices_of(model: Checkpoint, names: Sequence[str]) -> list[int]:
    """The places of styles, each once. Raises ValueError listing those that there are for a name that is none, or without a name."""
    known = [style.name.strip() for style in model.styles]
    for name in names:
        if name.strip() not in known:
            raise ValueError(f"the model has no style '{name}': it has {', '.join(known)}")
    if not names:
        raise ValueError(f"no style to forget was named: choose from {', '.join(known)}")
    return sorted({known.index(name.strip()) for name in names})


@dataclass(frozen=True)
class DeletionReport:
    """names: of the styles that were deleted. told, moved: as of ``bank_drop.Dropped``. at_base: the bank's centre is the base."""

    names: list[str]
    told: list[Told]
    moved: bool
    at_base: bool = False

    def text(self) -> str:
        """In sentences."""
        if not self.told:
            return (
                f"Deleted: {', '.join(self.names)}. Only the codes are gone: what the network knows of such styles is still in it, and a "
                "search finds it. Train to forget them."
            )
        lines = [f"Deleted: {', '.join(self.names)}: code and cores are out of the file."]
        for name, told in zip(self.names, self.told):
            before, around = f"{100 * told.before:.0f}%", f"{100 * told.around:.0f}%"
            if self.moved:
                lines.append(
                    f"The cores that stay told {before} of '{name}' (in a merge all cores add up to zero), so the mean was moved to that "
                    f"of the styles that stay: now they tell {around}. They paint as before, up to rounding."
                )
            else:
                lines.append(
                    f"The cores that stay tell {around} of '{name}', as much as they are like it. They paint as before, bit for bit."
                )
        if self.at_base:
            lines.append(
                "Painting without a style is the base, as before. What is still there: the directions that it shared with others."
            )
        else:
            lines.append(
                "What is still there: the directions that it shared with others, and its share of the mean where the bank does not reach "
                "(norms, and what the bank left out)."
            )
        lines.append(
            "Someone with pictures or a model of that style can fit new cores: training makes that harder, not impossible."
        )
        return "\n".join(lines)
