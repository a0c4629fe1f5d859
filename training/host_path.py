"""Finds the ComfyUI folder on this machine, to read its tokenizer files; nothing of it is imported."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

TOKENIZER = Path("comfy", "sd1_tokenizer")
"""CLIP's vocabulary inside a ComfyUI folder; also what a folder is recognised by."""


def find_host() -> Path | None:
    """The ComfyUI folder, or None.

    In this order: the environment variable COMFYUI_PATH, the folder whose ``custom_nodes`` holds this pack, the one
    this process runs from, ``~/comfy/ComfyUI``.
    """
    for candidate in candidates():
        if (candidate / TOKENIZER / "vocab.json").is_file():
            return candidate
        if str(candidate) == os.environ.get("COMFYUI_PATH"):
            logger.warning("COMFYUI_PATH=%s is not a ComfyUI folder (no %s in it): ignored", candidate, TOKENIZER)
    return None


def candidates() -> list[Path]:
    """Folders that may be ComfyUI's, in the order in which ``find_host`` tries them."""
    found = []
    if os.environ.get("COMFYUI_PATH"):
        found.append(Path(os.environ["COMFYUI_PATH"]))
    pack = Path(__file__).absolute().parents[1]  # not resolved: the pack may be a link inside custom_nodes
    for folder in (pack, pack.resolve()):
        if folder.parent.name == "custom_nodes":
            found.append(folder.parents[1])
    spec = importlib.util.find_spec("comfy")
    if spec is not None:
        found += [Path(location).parent for location in spec.submodule_search_locations or ()]
    return [*found, Path.home() / "comfy" / "ComfyUI"]
