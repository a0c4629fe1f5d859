"""What the arguments of several commands mean."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..fields import about_field, default_of, describe

MODELS = (
    "Settings of a model stand behind its file: FILE,prediction=v,clip_skip=2 (also prediction=eps, zero_snr=true, num_heads=8, "
    "num_head_channels=64); without them its metadata, a yaml beside it or a guess decide (docs/files.md). NAME=FILE is split at the first "
    "equals sign with a file behind it."
)
"""The end of the help of commands that take models."""


def named_file(text: str) -> tuple[str, str]:
    """ "ink=models/ink.safetensors" -> ("ink", "models/ink.safetensors")

    Both may hold an equals sign: the one between them is the first that has a file or folder behind it, and where none has, the first.
    """
    places = [i for i, letter in enumerate(text) if letter == "=" and text[:i].strip() and text[i + 1 :]]
    if not places:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    place = next((i for i in places if _is_model(text[i + 1 :])), places[0])
    return text[:place].strip(), text[place + 1 :]


def _is_model(text: str) -> bool:
    """Whether there is a file or folder behind a model's text, without its LoRAs and settings."""
    from ..teachers.models import split_model

    try:
        return os.path.exists(text) or os.path.exists(split_model(text)[0])
    except ValueError:  # of the settings, which is said when the model is read
        return False


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768), width first"""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def add_settings(
    parser: argparse.ArgumentParser, cls: type, names: Iterable[str], defaults: Mapping[str, Any] | None = None
) -> None:
    """An option for each of the settings ``names`` of a dataclass with ``fields``: its help comes from there, and its default where
    ``defaults`` has no other."""
    rows = {row.name: row for row in describe(cls)}
    for name in names:
        row, default = rows[name], (defaults or {}).get(name, default_of(cls, name))
        allowed = f" One of {row.values}." if about_field(cls, name).choices else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{row.doc}{allowed} (default: {default})",
        )
