"""Merging files: what ``dmm merge`` does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.metadata import StyleInfo, check_new_text
from ..files.hashing import repr_sha256
from ..files.model_files import add_parts, change_stamp, load_any
from ..files.model_settings import say_guesses, told
from ..files.outputs import check_output
from ..files.style_file import save_style
from ..progress import ProgressCallback
from ..teachers.lora_files import FoldedUNet, recorded
from ..teachers.models import as_checkpoint, split_model
from ..text import usual_clip_skip
from .finished import remember, remembered
from .grow import DeletionReport, GrowthReport, add_teachers, delete_styles
from .merge import MergeConfig, Source, forget_parts, merge, merge_folder
from .report import MergeReport

logger = logging.getLogger(__name__)


def merge_files(
    teachers: Sequence[tuple[str, str]],
    output: Path,
    config: MergeConfig,
    *,
    base: str | None = None,
    parts_from: str | None = None,
    title: str = "DMM",
    to: str = "single",
    progress: ProgressCallback | None = None,
    then: Callable[[MergeReport, list[Path]], None] | None = None,
) -> tuple[MergeReport, list[Path]]:
    """Merge the files of (style name, file) into ``output``, and write the report beside it: the report and all files written.

    base: what is painted without a style. parts_from: where text encoder and VAE come from, else the base, else the first that has them.
    to: "single", or "style" for the styles alone, which then go onto the base. A merge that was interrupted has left its parts beside the
    output, and goes on. then: what else is done with the result; where that was interrupted, the finished merge is not made again.
    Raises ValueError naming the file, before anything is written, for what does not belong together, and where another process merges into
    that output.
    """
    checked_output(output, *(file for _, file in teachers), base, parts_from)
    check_new_text("title", title)
    folder = output.with_name(f".{output.stem}-merge-parts")
    with merge_folder(folder):
        return _merge_files(
            teachers,
            output,
            config,
            base=base,
            parts_from=parts_from,
            title=title,
            to=to,
            folder=folder,
            progress=progress,
            then=then,
        )


def _merge_files(
    teachers: Sequence[tuple[str, str]],
    output: Path,
    config: MergeConfig,
    *,
    base: str | None,
    parts_from: str | None,
    title: str,
    to: str,
    folder: Path,
    progress: ProgressCallback | None,
    then: Callable[[MergeReport, list[Path]], None] | None,
) -> tuple[MergeReport, list[Path]]:
    if to == "style" and config.centre != "base":
        raise ValueError(
            "styles alone (--to style) belong on the models' mean, which would be saved nowhere: centre them at the base (--centre base)"
        )
    foundation = as_checkpoint(base) if base else None
    sources, parts, read = [], foundation, {"base": foundation} if foundation else {}
    for name, file in teachers:
        source, read[name] = source_of(name, file, foundation)
        sources.append(source)
        parts = parts or (read[name] if read[name].text else None)
    if parts_from:
        parts = add_parts(as_checkpoint(parts_from), parts or Checkpoint({}))
    say_guesses(read)
    if to == "style":
        parts = Checkpoint({})
    elif not parts or not parts.text:
        raise ValueError("no model has a text encoder: name a full checkpoint to take it from (--parts-from)")
    else:
        warn_of_clip_skip(parts, read)
    none = None
    if foundation is not None and base:
        none = Source(
            file_info(base), foundation.unet, shapes_of(foundation),
            stamp_of(split_model(base)[0]), foundation.prediction,
            foundation.zero_snr, foundation.heads,
        )  # fmt: skip
    what = repr_sha256(
        [(one.info.name, one.info.sha256, one.stamp, *said_of(read[one.name])) for one in sources],
        (none.info.sha256, none.stamp, *said_of(foundation)) if none and foundation else (),
        (stamp_of(split_model(parts_from)[0]), parts_from) if parts_from else (),
        (config.budget, str(config.dtype), config.centre, title, to),
    )
    report = remembered(folder, what, output)
    if report is None:
        checkpoint, report = merge(sources, none, parts, config, folder=folder, progress=progress)
        checkpoint = dataclasses.replace(checkpoint, metadata={"modelspec.title": title})
        (save_style if to == "style" else save_checkpoint)(output, checkpoint)
        remember(folder, what, output, report)
        del checkpoint
    written = [output, *report.write(output.with_suffix(""))]
    if then:
        then(report, written)
    forget_parts(folder)
    return report, written


def said_of(checkpoint: Checkpoint) -> tuple:
    """What a user, or a yaml beside the file, may have said of a model."""
    return checkpoint.prediction, checkpoint.zero_snr, checkpoint.clip_skip, tuple(checkpoint.heads)


def grow_file(
    model: str,
    teachers: Sequence[tuple[str, str]],
    output: Path,
    budget: str,
    *,
    device: torch.device | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[GrowthReport, list[Path]]:
    """The DMM model in the file ``model`` with a style more for each (style name, file), into ``output`` without training, and the report
    beside it: the report and all files written. Raises ValueError as ``add_teachers`` does, before anything is written."""
    checked_output(output, model, *(file for _, file in teachers))
    before = as_checkpoint(model)
    sources, read = [], {"the model": before}
    for name, file in teachers:
        source, read[name] = source_of(name, file, before)
        sources.append(source)
    say_guesses(read)
    warn_of_clip_skip(before, read)
    after, report = add_teachers(before, sources, budget, base=file_info(model), device=device, progress=progress)
    save_checkpoint(output, after)
    return report, [output, *report.write(output.with_suffix(""))]


def delete_from_file(model: str, styles: Sequence[str], output: Path) -> DeletionReport:
    """The DMM model in the file ``model`` without some of its styles, into ``output``. Raises ValueError as ``delete_styles`` does."""
    checked_output(output, model)
    after, report = delete_styles(as_checkpoint(model), styles, base=file_info(model))
    save_checkpoint(output, after)
    return report


def checked_output(output: Path, *inputs: str | None) -> None:
    """Raise ValueError where the result could not be written to ``output``; inputs: files, with LoRAs or without."""
    if output.suffix != ".safetensors":
        raise ValueError(f"output is '{output}': the file name must end in .safetensors")
    files = []
    for name in filter(None, inputs):
        path, loras, _ = split_model(name)
        files += [path, *(lora.file for lora in loras)]
    check_output(output, files)


def file_info(file: str) -> StyleInfo:
    """A file and its sha256, as recipes have it."""
    names, digest = recorded(*split_model(file)[:2])
    return StyleInfo("base", teacher=names, sha256=digest)


def source_of(name: str, file: str, base: Checkpoint | None) -> tuple[Source, Checkpoint]:
    """A teacher to merge, and the checkpoint it is from."""
    path, loras, settings = split_model(file)
    checkpoint = told(load_any(path), settings)
    if loras:  # they may change the text encoder too, of which the merged model has only one: the base's
        text = checkpoint.text or (base.text if base else {})
        unet: Mapping[str, Tensor] = FoldedUNet(dataclasses.replace(checkpoint, text=text), loras)
    else:
        unet = checkpoint.unet
    names, digest = recorded(path, loras)
    stamp = "\n".join(stamp_of(one) for one in (path, *(lora.file for lora in loras))) + repr(loras)
    info = StyleInfo(name, teacher=names, sha256=digest)
    shapes, heads = shapes_of(checkpoint), checkpoint.heads
    return Source(info, unet, shapes, stamp, checkpoint.prediction, checkpoint.zero_snr, heads), checkpoint


def warn_of_clip_skip(parts: Checkpoint, models: Mapping[str, Checkpoint]) -> None:
    """Log the models that read their prompts at another clip skip than the merged one, which has one text encoder: that of ``parts``."""
    ours = parts.clip_skip or usual_clip_skip(parts.text)
    skips = {name: model.clip_skip or usual_clip_skip(model.text) for name, model in models.items() if model.text}
    if other := [f"{name} {skip}" for name, skip in skips.items() if skip != ours]:
        logger.warning(
            "the merged model reads its prompts at clip skip %d; these were made for another one: %s",
            ours,
            ", ".join(other),
        )


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the UNet's weights, which LoRAs do not change."""
    return {key: tuple(weight.shape) for key, weight in checkpoint.unet.items()}


def stamp_of(file: str) -> str:
    return f"{Path(file).resolve()} {change_stamp(file)}"
