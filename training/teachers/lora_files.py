"""Folds LoRA files into a checkpoint, to the weights that ComfyUI's LoraLoader computes, without ComfyUI.

Where a command takes a model's file, ``sd15.safetensors+ink.safetensors:0.8`` is the model with a LoRA at a strength (1
where none is given, ``:0.8:0.5`` is another one for the text encoder); more LoRAs follow with more ``+``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.metadata import LONGEST
from ...dmm_core.weights_file import read_weights
from ..config import LoraSpec
from ..files.model_files import model_sha256
from .lora_kinds import REFUSED, ROLES, Entries, changed_bias, changed_weight, check_entries
from .lora_names import FIRST_TEXT, SECOND_TEXT, Target, lora_names
from .lora_scales import LoraScales, lora_scales

logger = logging.getLogger(__name__)

EXAMPLES = 4
"""Keys that an error message shows."""
TEXT_NAMES = (*FIRST_TEXT, *SECOND_TEXT, "text_encoders.")
_LORA = re.compile(r"\+(.+?\.safetensors)((?::[^:+]*){0,2})(?=\+|$)")
_ENDS = sorted({**ROLES, **REFUSED}, key=len, reverse=True)  # ".lora_B.default.weight" before ".lora_B"


@dataclass(frozen=True)
class Change:
    """What one LoRA file does to one weight. make: of its entries, the weight as the LoRA knows it, and the strength."""

    target: Target
    entries: Entries
    strength: float
    make: Callable[[Entries, Tensor, float], Tensor]
    file: str

    def put_into(self, tensor: Tensor) -> None:
        """Change the file's tensor, float32, in place. Raises ValueError naming file and key for wrong shapes."""
        view = self.target.view(tensor)
        try:
            view.copy_(self.make(self.entries, view, self.strength))
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error


Changes = dict[tuple[str, str], list[Change]]
"""By (part, key) of the weight, see ``Target``, in the order of the files."""


def apply_loras(checkpoint: Checkpoint, loras: Sequence[LoraSpec], dtype: torch.dtype | None = None) -> Checkpoint:
    """A checkpoint with LoRAs folded in, in order; only the weights that they change are new tensors.

    Computed in float32; the new weights are of ``dtype``, or with None of the dtype that they had. Raises ValueError,
    naming file and key, for a file that is no safetensors file, of which nothing fits, that holds NaN or wrong shapes,
    or whose algorithm is not known here; before that, a file of which only some keys fit is logged as a warning.
    """
    new: dict[str, dict[str, Tensor]] = {"unet": {}, "text": {}}
    for (part, key), changes in planned_changes(checkpoint, loras).items():
        weight = getattr(checkpoint, part)[key]
        tensor = changed(weight, key, changes, dtype or weight.dtype)
        if any(change.strength for change in changes):
            new[part][key] = tensor
    return replace(checkpoint, unet={**checkpoint.unet, **new["unet"]}, text={**checkpoint.text, **new["text"]})


class FoldedUNet(Mapping[str, Tensor]):
    """A UNet's weights with LoRAs folded in, each computed in float32 when it is asked for: the memory of the files, not of a copy.

    Raises ValueError as ``apply_loras`` does, for what only a weight shows when that is asked for.
    """

    def __init__(self, checkpoint: Checkpoint, loras: Sequence[LoraSpec]):
        self.weights = checkpoint.unet
        planned = planned_changes(checkpoint, loras)
        self.changes = {key: changes for (part, key), changes in planned.items() if part == "unet"}

    def __getitem__(self, key: str) -> Tensor:
        weight = self.weights[key]
        return changed(weight, key, self.changes[key], torch.float32) if key in self.changes else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def planned_changes(checkpoint: Checkpoint, loras: Sequence[LoraSpec]) -> Changes:
    """What LoRA files do to which weight. Raises ValueError as ``apply_loras`` does, but for shapes."""
    names = lora_names(checkpoint)
    out: Changes = {}

    def plan(
        target: Target, entries: Entries, lora: LoraSpec, make: Callable[[Entries, Tensor, float], Tensor]
    ) -> None:
        if target.key not in getattr(checkpoint, target.part):
            raise ValueError(f"'{entries['diff_b'][0]}' is for a bias that the model does not have")
        strength = lora.strength if target.part == "unet" else lora.text_strength
        out.setdefault((target.part, target.key), []).append(Change(target, entries, strength, make, lora.file))

    for lora in loras:
        lora.check()
        by_target, scales = read_lora(lora.file, names)
        for target, entries in by_target.items():
            try:
                check_entries(entries)
                entries = _scaled(scales, checkpoint, target, entries)
                if "diff_b" in entries:
                    plan(target.bias, entries, lora, changed_bias)
                if entries.keys() != {"diff_b"}:
                    plan(target, entries, lora, changed_weight)
            except ValueError as error:
                raise ValueError(f"{lora.file}: {error}") from error
        scales.report()
    return out


def _scaled(scales: LoraScales, checkpoint: Checkpoint, target: Target, entries: Entries) -> Entries:
    """``entries`` with the alpha that the file says elsewhere than in a tensor."""
    weight = getattr(checkpoint, target.part).get(target.key)
    role, (key, _) = next(iter(entries.items()))
    name = next(key.removesuffix(end) for end in _ENDS if ROLES.get(end) == role and key.endswith(end))
    return scales.completed(name, entries, 1 if weight is None else weight.shape[2:].numel())


def changed(weight: Tensor, key: str, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """A weight with its changes, on the CPU, computed in float32. Raises ValueError naming file and key for wrong shapes, and for NaN."""
    tensor = weight.detach().to("cpu", torch.float32, copy=True)
    for change in changes:  # even at strength 0: shapes are checked all the same
        change.put_into(tensor)
    tensor = tensor.to(dtype)
    if not tensor.float().isfinite().all():
        files = ", ".join(f"'{change.file}'" for change in changes)
        raise ValueError(f"weight '{key}' becomes NaN or infinite with the LoRA {files}: lower the strength")
    return tensor


def read_lora(path: str | os.PathLike, names: Mapping[str, Target]) -> tuple[Mapping[Target, Entries], LoraScales]:
    """The entries of a LoRA file by the weight that they change, and what it says of their scale. names: see ``lora_names``.

    Keys that fit nothing are counted in a warning. Raises ValueError for a file of which nothing fits, for algorithms
    that are not known here, and for NaN.
    """
    places: dict[str, tuple[Target, str] | None] = {}

    def fits(key: str, shape: tuple[int, ...]) -> bool:
        places[key] = _place(key, names)
        return places[key] is not None

    tensors, metadata = read_weights(path, fits)
    strange = [key for key, place in places.items() if place is None]
    if len(strange) == len(tensors):
        raise ValueError(f"{path}: none of its {len(tensors)} keys fits the model{_reason(strange, names)}")
    if strange:
        count, examples = f"{len(strange)} of {len(tensors)}", _examples(strange)
        logger.warning("%s: %s keys do not fit the model and are left out: %s", path, count, examples)
    entries: dict[Target, dict[str, tuple[str, Tensor]]] = {}
    for key, (target, role) in ((key, place) for key, place in places.items() if place):
        of_target = entries.setdefault(target, {})
        if role in of_target:
            raise ValueError(f"{path}: '{of_target[role][0]}' and '{key}' are the same entry for one weight")
        of_target[role] = key, _checked(path, key, role, tensors[key])
    return entries, lora_scales(path, metadata)


def _place(key: str, names: Mapping[str, Target]) -> tuple[Target, str] | None:
    """(weight, role) of a key; None when it is for no weight of the model."""
    for end in _ENDS:
        name = key.removesuffix(end)
        if name != key and name in names:
            if end in REFUSED:
                raise ValueError(f"'{key}' is of the kind {REFUSED[end]}, which is not read here")
            return names[name], ROLES[end]
    name = key
    while name and name not in names:
        name = name.rpartition(".")[0]
    if name:  # for this model, so leaving it out would make another teacher of it
        raise ValueError(f"'{key}': LoRA files with '{key[len(name) :]}' are not read here")
    return None


def _checked(path: str | os.PathLike, key: str, role: str, tensor: Tensor) -> Tensor:
    """An entry in float32. Raises ValueError for NaN, integers, or an alpha that is not one number."""
    if role == "alpha":
        if tensor.numel() != 1:
            raise ValueError(f"{path}: '{key}' has shape {tuple(tensor.shape)}, expected one number")
    elif not tensor.is_floating_point():
        raise ValueError(f"{path}: '{key}' holds {tensor.dtype}, expected floating point numbers")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: '{key}' holds NaN or infinity: the file is damaged, get it again")
    return tensor


def _reason(strange: Sequence[str], names: Mapping[str, Target]) -> str:
    """Why no key of a file fits, as the end of an error message."""
    if not strange:
        return ""
    has_text = any(target.part == "text" for target in names.values())
    if not has_text and all(key.startswith(TEXT_NAMES) for key in strange):
        return ": they are for a text encoder, and the model has none"
    return f" (the first: {_examples(strange)}): it is no LoRA, or one for another kind of model"


def _examples(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(keys)[:EXAMPLES])


# --- the text form ----------------------------------------------------------------------------------------------------


def with_loras(file: str, loras: Sequence[LoraSpec]) -> str:
    """The text form of a model with LoRAs, which ``split_loras`` reads."""
    return "+".join([file, *(lora.file + _strengths(lora) for lora in loras)])


def split_loras(text: str | os.PathLike) -> tuple[str, list[LoraSpec]]:
    """ "a.safetensors+b.safetensors:0.8" -> ("a.safetensors", [b at 0.8]); the model's own name may have a "+" in it.

    Raises ValueError for a strength that is no number.
    """
    text = os.fspath(text)
    for plus in re.finditer(r"\+", text):
        file, rest = text[: plus.start()], text[plus.start() :]
        found = list(_LORA.finditer(rest))
        if Path(file).exists() and not Path(text).exists() and "".join(lora[0] for lora in found) == rest:
            return file, [_spec(*lora.groups()) for lora in found]
    return text, []


def _spec(file: str, strengths: str) -> LoraSpec:
    try:
        return LoraSpec(file, *(float(number) for number in strengths.split(":")[1:]))
    except ValueError:
        raise ValueError(f"'{file}{strengths}': expected a strength such as :0.8 behind the LoRA's name") from None


def patched(checkpoint: Checkpoint, loras: Sequence[LoraSpec], base: Checkpoint | None = None) -> Checkpoint:
    """A checkpoint with LoRAs folded in, changed weights in float32. Where it has no text encoder, they change that of
    ``base``."""
    if not loras:
        return checkpoint
    text = checkpoint.text or (base.text if base else {})
    return apply_loras(replace(checkpoint, text=text), loras, torch.float32)


def recorded(
    file: str | os.PathLike, loras: Sequence[LoraSpec], sums: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str]:
    """(names, sha256) that a style's metadata record of a teacher: file names without folders; "" for the sha256 of one
    with LoRAs. sums: ``model_sha256`` by file, of those that are known already."""
    name = Path(file).name
    if not loras:
        return name, sums.get(os.fspath(file)) or model_sha256(file)
    names = " + ".join([name, *(Path(lora.file).name + _strengths(lora) for lora in loras)])
    longest = LONGEST["teacher"]
    return (names if len(names) <= longest else f"{name} + {len(loras)} LoRAs"[-longest:]), ""


def _strengths(lora: LoraSpec) -> str:
    """ ":0.8" or ":0.8:0.5" (the text encoder's apart); "" at strength 1."""
    if lora.clip_strength not in (None, lora.strength):
        return f":{lora.strength:g}:{lora.clip_strength:g}"
    return "" if lora.strength == 1 else f":{lora.strength:g}"
