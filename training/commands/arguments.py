"""What the arguments of several commands mean."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..fields import about_field, default_of, describe

MODELS = (
    "Settings of a model stand behind its file: FILE,prediction=v,clip_skip=2 (also prediction=eps, zero_snr=true, num_heads=8, "
    "num_head_channels=64); without them its metadata, a yaml beside it or a guess decide (docs/files.md)."
)
"""The end of the help of commands that take models."""


def named_file(text: str) -> tuple[str, str]:
    """ "ink=models/ink.safetensors" -> ("ink", "models/ink.safetensors")"""
    name, equals, file = text.partition("=")
    if not (name.strip() and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name.strip(), file


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
