"""New thumbnails in a model's file, whose weights stay bit for bit what they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ...dmm_core.checkpoint import read_info
from ...dmm_core.files import atomic_write
from ...dmm_core.metadata import STYLES, StyleInfo
from ...dmm_core.weights_file import HEADER_LIMIT


def write_thumbnails(path: str | os.PathLike, thumbnails: Mapping[str, str]) -> None:
    """Put thumbnails (data URIs, by the exact names of styles) into a DMM model's safetensors file: only its header is made anew, all else
    is copied as it is. Completely, or not at all.

    Raises ValueError for a file without such styles, for a URI that is no small picture, and where the header would grow too large.
    """
    path = Path(path)
    styles = read_info(path).styles
    known = [style.name for style in styles]
    if unknown := sorted(set(thumbnails) - set(known)):
        raise ValueError(
            f"{path} has no style {', '.join(map(repr, unknown))}: its styles are {', '.join(known) or 'none'}"
        )
    for name, uri in thumbnails.items():
        StyleInfo(name, thumbnail=uri)  # which checks it
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.setdefault("__metadata__", {})
        # What a later version wrote about a style stays; an authors' file has no list yet.
        entries = json.loads(metadata[STYLES]) if STYLES in metadata else [{"name": name} for name in known]
        for entry in entries:
            if entry["name"] in thumbnails:
                entry["thumbnail"] = thumbnails[entry["name"]]
        metadata[STYLES] = json.dumps(entries)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the weights behind it stay aligned
        if len(text) > HEADER_LIMIT:
            raise ValueError(
                f"{path} would get a header of {len(text)} bytes, at most {HEADER_LIMIT} are read: fewer thumbnails"
            )
        with atomic_write(path) as temporary, temporary.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, new, 16 * 2**20)
