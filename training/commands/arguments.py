"""What the arguments of several commands mean."""

from __future__ import annotations

import argparse
import re


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
