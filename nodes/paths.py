"""Where DMM models and styles alone live: the host's folders, and the demo files that this pack brings along."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePath

import folder_paths

from ..dmm_core.checkpoint import Checkpoint
from ..training.files.hashing import weights_sha256
from ..training.files.model_files import UNET_FILE

FOLDER = "dmm"
STYLES_FOLDER = "dmm_styles"
"""Of style files, which are no models: Load DMM Model does not look there."""
DIFFUSERS = "diffusers"
FOLDERS = (FOLDER, "checkpoints", "diffusion_models", DIFFUSERS)
"""The host's names of the folders that models are looked for in, in this order."""
EXTENSIONS = {".safetensors"}
PACK_MODELS = Path(__file__).absolute().parents[1] / "models"


def register() -> None:
    """Make the host know ``models/dmm``, ``<output>/dmm``, the pack's own demo models, and the folders of style files (idempotent)."""
    for folder, more in ((FOLDER, [str(PACK_MODELS / FOLDER)]), (STYLES_FOLDER, [])):
        for path in (os.path.join(folder_paths.models_dir, folder), output_folder(folder), *more):
            folder_paths.add_model_folder_path(folder, path)
        # A folder that is new to the host would list files of any kind; extra_model_paths.yaml may have made it already.
        folder_paths.folder_names_and_paths[folder] = (folder_paths.get_folder_paths(folder), EXTENSIONS)
    for name in ("controlnet", "loras"):
        folder_paths.add_model_folder_path(name, str(PACK_MODELS / name))


def output_folder(folder: str = FOLDER) -> str:
    """Where this pack's nodes save models, or style files; the loading nodes list it."""
    return os.path.join(folder_paths.get_output_directory(), folder)


def result_file(stem: str, parts: Iterable[str], inherited: Checkpoint) -> Path:
    """Where a model goes that a node has made: its name ends in a hash of what it was made of, and of the text encoder and VAE that it
    inherits, so that another one overwrites nothing."""
    rest = (weights_sha256(inherited.text), weights_sha256(inherited.vae), str(inherited.clip_skip))
    short = hashlib.sha256("\n".join((*parts, *rest)).encode()).hexdigest()[:8]
    return Path(output_folder(), f"{stem}-{short}.safetensors")


def file_names(folder: str) -> list[str]:
    """The files in one of the host's kinds of model folder, by its own search, whatever was deleted meanwhile.

    The host remembers which folders it has searched, and fails for good when one of them is gone: an output folder that was emptied, or a
    subfolder of models. Then it is made to search again; folders that are gone hold no files.
    """
    try:
        return folder_paths.get_filename_list(folder)
    except OSError:
        folder_paths.filename_list_cache.pop(folder, None)
        return folder_paths.get_filename_list(folder)


def style_files() -> list[str]:
    """Names of style files to choose from."""
    return file_names(STYLES_FOLDER)


def style_file_path(name: str) -> str:
    """The file behind a name from ``style_files``. Raises ValueError when it is gone or was never there."""
    path = folder_paths.get_full_path(STYLES_FOLDER, name)
    if path is None:
        raise ValueError(f"style file '{name}' not found: put it into models/dmm_styles and refresh")
    return path


def model_files() -> list[str]:
    """Names to choose from, each once: the DMM folder first. Nothing is opened: the names alone say what may be a model."""
    names = [name for folder in FOLDERS for name in as_models(_listed(folder))]
    return list(dict.fromkeys(names))


def model_path(name: str) -> str:
    """The file or folder behind a name from ``model_files``. Raises ValueError when it is gone or was never there.

    As in the host, a name cannot climb out of the model folders, and links in them that users made are followed.
    """
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name) if folder != DIFFUSERS else None
        if path is None and name in as_models(_listed(folder)):
            places = (os.path.join(root, name) for root in folder_paths.get_folder_paths(folder))
            path = next((place for place in places if os.path.exists(place)), None)
        if path is not None:
            return path
    raise ValueError(
        f"model '{name}' not found: put it into models/dmm, checkpoints, diffusion_models or diffusers and refresh"
    )


def _listed(folder: str) -> list[str]:
    """Every file in a kind of model folder, by the host's own search; it knows models/diffusers by folders and lists no files."""
    if folder != DIFFUSERS:
        return file_names(folder)
    return [
        name
        for root in folder_paths.get_folder_paths(folder)
        for name in folder_paths.recursive_search(root, [".git"])[0]
    ]


def as_models(names: Iterable[str]) -> list[str]:
    """Of file names, those that may be a model; the files of a diffusers pipeline or UNet folder as one, by the folder's name."""
    paths = [path for path in map(PurePath, names) if path.suffix.lower() in EXTENSIONS]
    pipelines = {path.parents[1] for path in paths if _is_diffusers(path) and path.parent.name == "unet"} - {PurePath()}
    found = []
    for path in sorted(paths):
        whole = next((parent for parent in reversed(path.parents) if parent in pipelines), None)
        if whole is None and _is_diffusers(path) and path.parent != PurePath():
            whole = path.parent
        found.append(str(whole or path))
    return list(dict.fromkeys(found))


def _is_diffusers(path: PurePath) -> bool:
    return UNET_FILE.fullmatch(path.name) is not None
