"""Names of styles in a file that ComfyUI's own savers wrote, which keep the weights of the styles and the workflow, and no more.

The workflow names the files that *Load DMM Model* loaded. One of these that is still in a model folder, and whose codes are the same, has
the names. What a file says is only looked up among the names of the loader's list; it is never a path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint
from ..dmm_core.metadata import StyleInfo, default_styles
from ..dmm_core.style import CODEBOOK
from ..dmm_core.weights_file import read_weights
from ..training.files.model_files import load_any_info
from . import paths

LONGEST = 5_000_000
"""Characters of a workflow that is looked at."""
MOST = 16
"""Files that are compared."""


def with_names(checkpoint: Checkpoint, path: str) -> tuple[Checkpoint, str]:
    """(``checkpoint`` with the names, pictures and descriptions that its styles had, what to tell the user); the same one and "" where
    nothing was lost."""
    nodes = saved_nodes(checkpoint)
    if not nodes:
        return checkpoint, ""
    if not checkpoint.num_styles:
        if not any(str(node.get("class_type"))[:3] == "DMM" for node in nodes):
            return checkpoint, ""
        return checkpoint, (
            "its workflow has nodes for styles, but no styles are in the file: it was saved from another MODEL, or its styles were dropped "
            "by another loader than Load DMM Model. Load the original with Load DMM Model and save it with Save DMM Model"
        )
    if checkpoint.styles != default_styles(checkpoint.num_styles):
        return checkpoint, ""
    for name in dict.fromkeys(loaded_files(nodes)):
        styles = names_in(name, path, checkpoint.unet[f"{CODEBOOK}.weight"])
        if styles:
            return replace(checkpoint, styles=styles), (
                f"this file holds no names of styles (ComfyUI's own savers write none): they are those of '{name}', which has the same "
                "codes. Save DMM Model writes them into a file"
            )
    return checkpoint, (
        "this file holds no names of styles (ComfyUI's own savers write none), and no model that its workflow loads has the same codes: "
        "Edit Style names them, and Save DMM Model keeps the names"
    )


def saved_nodes(checkpoint: Checkpoint) -> list[dict]:
    """The nodes of the workflow in a file's metadata, as the host writes it; [] for anything else."""
    text = checkpoint.metadata.get("prompt", "")
    if not 0 < len(text) <= LONGEST:
        return []
    try:
        prompt = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [node for node in prompt.values() if isinstance(node, dict)] if isinstance(prompt, dict) else []


def loaded_files(nodes: list[dict]) -> Iterator[str]:
    """What the nodes name as files of Load DMM Model, if the loader lists it."""
    listed = set(paths.model_files())
    for node in nodes:
        inputs = node.get("inputs")
        name = inputs.get("ckpt_name") if isinstance(inputs, dict) else None
        if node.get("class_type") == "DMMLoadModel" and isinstance(name, str) and name in listed:
            yield name


def names_in(name: str, path: str, codes: Tensor) -> list[StyleInfo]:
    """The styles of a file on the loader's list, if it names them and has these codes; [] otherwise. path: of the file they are for."""
    try:
        other = paths.model_path(name)
        if os.path.isdir(other) or os.path.samefile(other, path):
            return []
        info = load_any_info(other)
        if info.num_styles != len(codes) or info.styles == default_styles(info.num_styles):
            return []
        tensors, _ = read_weights(
            other, lambda key, shape: key.endswith(f"{CODEBOOK}.weight") and shape == tuple(codes.shape)
        )
    except (ValueError, OSError):
        return []
    (theirs,) = [
        tensor for key, tensor in tensors.items() if key.endswith(f"{CODEBOOK}.weight") and not tensor.is_meta
    ] or [None]
    return info.styles if theirs is not None and same_codes(codes, theirs) else []


def same_codes(codes: Tensor, others: Tensor) -> bool:
    """Whether two codebooks are one, as exact as the coarser of their types is."""
    dtype = min(codes.dtype, others.dtype, key=lambda one: torch.finfo(one).bits)
    return torch.equal(codes.to(dtype).float(), others.to(dtype).float())
