"""Where DMM models live: the host's folders, and the demo files that this pack brings along."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "dmm"
EXTENSIONS = {".safetensors"}
PACK_MODELS = Path(__file__).absolute().parents[1] / "models"


def register() -> None:
    """Make the host know ``models/dmm``, ``<output>/dmm`` and the pack's own demo models (idempotent)."""
    for path in (os.path.join(folder_paths.models_dir, FOLDER), output_folder(), str(PACK_MODELS / FOLDER)):
        folder_paths.add_model_folder_path(FOLDER, path)
    # A folder that is new to the host would list files of any kind; extra_model_paths.yaml may have made it already.
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), EXTENSIONS)
    for name in ("controlnet", "loras"):
        folder_paths.add_model_folder_path(name, str(PACK_MODELS / name))


def output_folder() -> str:
    """Where this pack's nodes save models; Load DMM Model lists it."""
    return os.path.join(folder_paths.get_output_directory(), FOLDER)


def model_files() -> list[str]:
    """Names to choose from: the DMM folder first, then the safetensors among the checkpoints (once each)."""
    checkpoints = [f for f in folder_paths.get_filename_list("checkpoints") if Path(f).suffix.lower() in EXTENSIONS]
    return list(dict.fromkeys(folder_paths.get_filename_list(FOLDER) + checkpoints))


def model_path(name: str) -> str:
    """The file behind a name from ``model_files``. Raises ValueError when it is gone or was never there."""
    path = folder_paths.get_full_path(FOLDER, name) or folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise ValueError(f"model file '{name}' not found: put it into models/dmm or models/checkpoints and refresh")
    return path
