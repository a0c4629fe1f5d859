"""Merging files: what ``dmm merge`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.metadata import StyleInfo, check_new_text
from ..files.model_files import add_parts, change_stamp, load_any
from ..files.outputs import check_output
from ..files.style_file import save_style
from ..progress import ProgressCallback
from ..teachers.lora_files import FoldedUNet, recorded, split_loras
from .grow import DeletionReport, GrowthReport, add_teachers, delete_styles
from .merge import MergeConfig, Source, forget_parts, merge
from .report import MergeReport


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
) -> tuple[MergeReport, list[Path]]:
    """Merge the files of (style name, file) into ``output``, and write the report beside it: the report and all files written.

    base: what is painted without a style. parts_from: where text encoder and VAE come from, else the base, else the first that has them.
    to: "single", or "style" for the styles alone, which then go onto the base. A merge that was interrupted has left its parts beside the
    output, and goes on.
    Raises ValueError naming the file, before anything is written, for what does not belong together.
    """
    checked_output(output, *(file for _, file in teachers), base, parts_from)
    check_new_text("title", title)
    if to == "style" and config.centre != "base":
        raise ValueError(
            "styles alone (--to style) belong on the models' mean, which would be saved nowhere: centre them at the base (--centre base)"
        )
    foundation = load_any(base) if base else None
    sources, parts = [], foundation
    for name, file in teachers:
        source, checkpoint = source_of(name, file, foundation)
        sources.append(source)
        parts = parts or (checkpoint if checkpoint.text else None)
    if parts_from:
        parts = add_parts(load_any(parts_from), parts or Checkpoint({}))
    if to == "style":
        parts = Checkpoint({})
    elif not parts or not parts.text:
        raise ValueError("no model has a text encoder: name a full checkpoint to take it from (--parts-from)")
    none = None
    if foundation is not None and base:
        none = Source(
            file_info(base), foundation.unet, shapes_of(foundation),
            stamp_of(base), foundation.prediction,
            foundation.zero_snr,
        )  # fmt: skip
    folder = output.with_name(f".{output.stem}-merge-parts")
    checkpoint, report = merge(sources, none, parts, config, folder=folder, progress=progress)
    checkpoint = dataclasses.replace(checkpoint, metadata={"modelspec.title": title})
    (save_style if to == "style" else save_checkpoint)(output, checkpoint)
    forget_parts(folder)
    return report, [output, *report.write(output.with_suffix(""))]


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
    before = load_any(model)
    sources = [source_of(name, file, before)[0] for name, file in teachers]
    after, report = add_teachers(before, sources, budget, base=file_info(model), device=device, progress=progress)
    save_checkpoint(output, after)
    return report, [output, *report.write(output.with_suffix(""))]


def delete_from_file(model: str, styles: Sequence[str], output: Path) -> DeletionReport:
    """The DMM model in the file ``model`` without some of its styles, into ``output``. Raises ValueError as ``delete_styles`` does."""
    checked_output(output, model)
    after, report = delete_styles(load_any(model), styles, base=file_info(model))
    save_checkpoint(output, after)
    return report


def checked_output(output: Path, *inputs: str | None) -> None:
    """Raise ValueError where the result could not be written to ``output``; inputs: files, with LoRAs or without."""
    if output.suffix != ".safetensors":
        raise ValueError(f"output is '{output}': the file name must end in .safetensors")
    files = []
    for name in filter(None, inputs):
        path, loras = split_loras(name)
        files += [path, *(lora.file for lora in loras)]
    check_output(output, files)


def file_info(file: str) -> StyleInfo:
    """A file and its sha256, as recipes have it."""
    names, digest = recorded(file, [])
    return StyleInfo("base", teacher=names, sha256=digest)


def source_of(name: str, file: str, base: Checkpoint | None) -> tuple[Source, Checkpoint]:
    """A teacher to merge, and the checkpoint it is from."""
    path, loras = split_loras(file)
    checkpoint = load_any(path)
    if loras:  # they may change the text encoder too, of which the merged model has only one: the base's
        text = checkpoint.text or (base.text if base else {})
        unet: Mapping[str, Tensor] = FoldedUNet(dataclasses.replace(checkpoint, text=text), loras)
    else:
        unet = checkpoint.unet
    names, digest = recorded(path, loras)
    stamp = "\n".join(stamp_of(one) for one in (path, *(lora.file for lora in loras))) + repr(loras)
    info = StyleInfo(name, teacher=names, sha256=digest)
    return Source(info, unet, shapes_of(checkpoint), stamp, checkpoint.prediction, checkpoint.zero_snr), checkpoint


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the UNet's weights, which LoRAs do not change."""
    return {key: tuple(weight.shape) for key, weight in checkpoint.unet.items()}


def stamp_of(file: str) -> str:
    return f"{Path(file).resolve()} {change_stamp(file)}"
