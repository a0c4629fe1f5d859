"""What a checkpoint file is, in words: the text behind ``dmm info``. Reads the header only, except to hash the file."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint, read_info
from ..dmm_core.files import file_sha256
from ..dmm_core.metadata import StyleInfo, architecture
from ..dmm_core.unet import unet_config_from_state_dict

WIDTH = 100
_LONGEST_VALUE = 300  # a workflow embedded by ComfyUI runs to megabytes


def describe(path: str | os.PathLike, digest: bool = True) -> str:
    """A report of several lines about a DMM or plain checkpoint; ``digest``: with the file's SHA-256 (reads all of it).

    Control characters from the file are shown as "?". Raises ValueError for other files, as ``load_checkpoint`` does.
    """
    checkpoint = read_info(path)
    lines = [_row("file", f"{Path(path).name}, {Path(path).stat().st_size / 2**20:.1f} MiB")]
    lines += _sizes(checkpoint)
    if digest:
        lines.append(_row("sha256", file_sha256(path)))
    if checkpoint.num_styles:
        lines += ["", "styles"]
        for i, style in enumerate(checkpoint.styles):
            lines += _style(i, style)
    for title, values in (("recipe", checkpoint.recipe), ("metadata", dict(sorted(checkpoint.metadata.items())))):
        if values:
            lines += ["", title, *(f"  {key}: {_shortened(value)}" for key, value in _flat(values))]
    return "\n".join(_printable(line) for line in lines)


def _sizes(checkpoint: Checkpoint) -> list[str]:
    config = unet_config_from_state_dict(checkpoint.unet)
    count = checkpoint.num_styles
    styles = f"DMM checkpoint, {count} styles" if count else "plain checkpoint, no styles"
    unet = (
        f"{_weights(checkpoint.unet)}; {config.model_channels} channels x {config.channel_mult}, "
        f"{config.in_channels} in, text width {config.context_dim}"
    )
    schedule = ", zero terminal SNR" if checkpoint.zero_snr else ""
    rows = [
        _row("kind", f"{styles} ({architecture(config, checkpoint.prediction)[0]})"),
        _row("prediction", checkpoint.prediction + schedule),
        _row("UNet", unet),
    ]
    parts = (("text encoder", checkpoint.text), ("VAE", checkpoint.vae), ("other", checkpoint.other))
    return rows + [_row(name, _weights(part)) for name, part in parts if part or name != "other"]


def _weights(part: Mapping[str, Tensor]) -> str:
    """Number of values and the dtype that most of them have."""
    if not part:
        return "not in this file"
    count = Counter()
    for tensor in part.values():
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as ("a.b", value) pairs."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
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
