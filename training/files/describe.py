"""A report on a model file or folder, the text of ``dmm info``; reads headers only, except for the digests."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.bank import BANK
from ...dmm_core.checkpoint import GUESS, Checkpoint
from ...dmm_core.metadata import StyleInfo, architecture
from ...dmm_core.style import CODEBOOK
from .model_files import layout_of, load_any, load_any_info, model_sha256, weight_files
from .model_settings import OWN_WORDS
from .style_file import StyleFile, is_style_file, read_style_file, style_digest, unet_digest

WIDTH = 100
_LONGEST_VALUE = 300  # a workflow embedded by ComfyUI runs to megabytes
_MOST_VALUES = 300


def describe(path: str | os.PathLike, digest: bool = True) -> str:
    """A report of several lines about whatever ``load_any`` reads, or a file of styles alone.

    digest: with the SHA-256 of the file and of its UNet and style side (reads all of it). Control characters from the
    file are shown as "?". Raises ValueError for other files, as ``load_any`` does.
    """
    model = read_style_file(path, header_only=True) if is_style_file(path) else load_any_info(path)
    files = weight_files(path)
    lines = [_row("file", f"{Path(path).name}, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")]
    if isinstance(model, StyleFile):
        lines += [_row("layout", "styles alone"), *_style_sizes(model)]
    else:
        lines += [_row("layout", layout_of(path)), *_sizes(model)]
    if digest:
        lines += [_row("sha256", model_sha256(path)), *_digests(path, model)]
    if model.styles:
        lines += ["", "styles"]
        for i, style in enumerate(model.styles):
            lines += _style(i, style)
    for title, values in (("recipe", model.recipe), ("metadata", dict(sorted(model.metadata.items())))):
        if values:
            lines += ["", title, *_values(values)]
    return "\n".join(_printable(line) for line in lines)


def _sizes(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    count = checkpoint.num_styles
    styles = f"DMM checkpoint, {count} styles" if count else "plain checkpoint, no styles"
    unet = (
        f"{_weights(checkpoint.unet)}; {config.model_channels} channels x {config.channel_mult}, "
        f"{config.in_channels} in, text width {config.context_dim}"
    )
    rows = [
        _row("kind", f"{styles} ({architecture(config, checkpoint.prediction)[0]})"),
        _row(
            "prediction", f"{checkpoint.prediction}{', zero terminal SNR' * checkpoint.zero_snr}{_told_by(checkpoint)}"
        ),
        *([_row("clip skip", str(checkpoint.clip_skip))] if checkpoint.clip_skip else []),
        _row("UNet", unet),
        *([_row("heads", heads)] if (heads := _heads(checkpoint)) else []),
    ]
    if checkpoint.scaled_fp8:
        rows.append(
            _row(
                "float8", f"{checkpoint.scaled_fp8} weights are kept as float8 with a scale, and read in half precision"
            )
        )
    if config.bank:
        bank = {key: weight for key, weight in checkpoint.unet.items() if key.startswith(f"{BANK}.")}
        ranks = [max(up, down) for _, up, down in config.bank.ranks]
        rows.append(_row("style bank", f"{_weights(bank)}, of these; rank {max(ranks)}, {config.bank.cores} cores"))
    contents = (("text encoder", checkpoint.text), ("VAE", checkpoint.vae), ("other", checkpoint.other))
    return rows + [_row(name, _weights(weights)) for name, weights in contents if weights or name != "other"]


def _heads(checkpoint: Checkpoint) -> str:
    """The attention heads of a UNet and what says so; "" for a released model's, which all of them have."""
    said, heads = checkpoint.heads_from, checkpoint.config.all_heads
    if not said and not checkpoint.heads:
        return ""
    text = f"{heads[0]} at every level" if len(set(heads)) == 1 else f"{', '.join(map(str, heads))} by level"
    return text + (" (a guess: nothing in the file says it)" if said == GUESS else f" (by {said})" if said else "")


def _told_by(checkpoint: Checkpoint) -> str:
    """Of a prediction that is not in the file's own marks: what says so."""
    if checkpoint.prediction_from == GUESS:
        return " (a guess: nothing in the file says it)"
    return "" if checkpoint.prediction_from in OWN_WORDS else f" (by {checkpoint.prediction_from})"


def _style_sizes(file: StyleFile) -> list[str]:
    count, width = file.weights[f"{CODEBOOK}.weight"].shape
    what = f"{count} styles of width {width}, to put onto their UNet: dmm convert --onto, or Add DMM Styles to Model"
    rows = [_row("kind", what)]
    if file.prediction:
        rows.append(_row("prediction", file.prediction + (", zero terminal SNR" if file.zero_snr else "")))
    rows.append(_row("style side", _weights(file.weights)))
    bank = {key: weight for key, weight in file.weights.items() if key.startswith(f"{BANK}.")}
    return [*rows, _row("style bank", f"{_weights(bank)}, of these")] if bank else rows


def _digests(path: str | os.PathLike, model: Checkpoint | StyleFile) -> list[str]:
    """Digests of the weights, the same in every layout, by which a style file names its UNet."""
    if isinstance(model, StyleFile):
        made_for = model.made_for.sha256 or "not said"
        return [_row("of styles", style_digest(read_style_file(path).weights)), _row("made for UNet", made_for)]
    unet = load_any(path).unet
    rows = [_row("of the UNet", unet_digest(unet))]
    return [*rows, _row("of styles", style_digest(unet))] if model.num_styles else rows


def _weights(weights: Mapping[str, Tensor]) -> str:
    """Number of values and the dtype that most of them have, in words."""
    if not weights:
        return "not in this file"
    count: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        count[tensor.dtype] += tensor.numel()
    return f"{sum(count.values()) / 1e6:.2f} M parameters, {str(count.most_common(1)[0][0]).removeprefix('torch.')}"


def _style(index: int, style: StyleInfo) -> list[str]:
    facts = {
        "teacher": style.teacher,
        "sha256": style.sha256,
        "licence": style.licence,
        "recommended": ", ".join(f"{k} {v}" for k, v in _flat(style.recommended)),
        "thumbnail": f"{len(style.thumbnail)} characters" if style.thumbnail else "",
    }
    about = textwrap.wrap(style.description, WIDTH - 6)
    return [
        f"  {index:>2}  {style.name}",
        *(f"      {line}" for line in about),
        *(f"      {key}: {_shortened(value)}" for key, value in facts.items() if value),
    ]


def _values(values: Mapping[str, Any]) -> list[str]:
    rows = [f"  {_shortened(key)}: {_shortened(value)}" for key, value in islice(_flat(values), _MOST_VALUES + 1)]
    return rows if len(rows) <= _MOST_VALUES else [*rows[:_MOST_VALUES], "  ... and more"]


def _flat(values: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries, and lists of them, as ("a.0.b", value) pairs."""
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        listed = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        if listed or (isinstance(value, dict) and value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _row(label: str, value: str) -> str:
    return f"{label:<14}{value}"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text)} characters)"


def _printable(line: str) -> str:
    """One line without escape sequences: a file must not be able to steer the terminal it is described in."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)
