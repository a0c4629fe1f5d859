"""The state of a run on disk: everything that the next step depends on, written atomically, the last few kept.

One safetensors file a state: ``student.*``, ``ema.*``, ``exp_avg.*``, ``exp_avg_sq.*``; the step, the config and the
hashes of teachers and data are in its metadata. Random numbers and the data position follow from (seed, step), so they need no room.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..dmm_core.files import atomic_write
from .loop import Distillation

logger = logging.getLogger(__name__)

FORMAT = "1"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAY_CHANGE = ("device", "save_every", "keep")
"""Settings that do not change what a step does; every other one is part of a run's identity."""


def identity(run: Distillation) -> dict[str, str]:
    """What must be the same for a run to go on: config, base, every teacher, data; each as text or hash."""
    settings = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in MAY_CHANGE}
    if run.config.lr_schedule == "constant":
        settings.pop("steps")  # then a longer run begins like a shorter one, which may therefore be made longer
    parts = {f"setting {k}": json.dumps(v) for k, v in settings.items()}
    parts["base model"] = weights_sha256(run.base.unet.state_dict())
    parts["base text"] = tensor_sha256(run.base.contexts)
    parts["teacher names"] = json.dumps([t.name for t in run.teachers])
    for teacher in run.teachers:
        parts[f"teacher '{teacher.name}'"] = weights_sha256(teacher.unet.state_dict())
        parts[f"text of teacher '{teacher.name}'"] = tensor_sha256(teacher.contexts)
    parts["data"] = run.data.fingerprint()
    return parts


def weights_sha256(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(tensor_sha256(weights[key]).encode())
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.flatten().view(torch.uint8).numpy().data).hexdigest()


def save_state(run: Distillation, folder: Path, parts: dict[str, str]) -> Path:
    """Write ``state-<step>.safetensors`` and remove all but the last ``keep``; parts: ``identity(run)``, computed once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{run.step:08d}.safetensors"
    named = dict(run.student.named_parameters())
    tensors = {f"student.{k}": p.detach() for k, p in named.items()}
    for key, p in named.items():
        state = run.optimizer.state.get(p, {})
        tensors.update({f"{moment}.{key}": state[moment] for moment in MOMENTS if moment in state})
    if run.ema:
        tensors.update({f"ema.{k}": v for k, v in run.ema.average.items()})
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    metadata = {"dmm.state": FORMAT, "step": str(run.step), "identity": json.dumps(parts)}
    if run.scaler.is_enabled():
        metadata["scaler"] = json.dumps(run.scaler.state_dict())
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
    for old in states(folder)[: -run.config.keep]:
        old.unlink(missing_ok=True)
    return path


def states(folder: Path) -> list[Path]:
    """The complete states of a run folder, oldest first (a file is there only once it is complete)."""
    return sorted(p for p in folder.glob("state-*.safetensors") if re.fullmatch(r"state-\d{8}\.safetensors", p.name))


def resume(run: Distillation, folder: Path, parts: dict[str, str]) -> bool:
    """Load the newest readable state of ``folder`` into ``run``; False when there is none.

    Raises ValueError naming what changed when the state belongs to another run.
    """
    for path in reversed(states(folder)):
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                _check(path, metadata, parts)
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s): trying the state before it", path.name, error)
            continue
        _load(run, tensors, metadata)
        return True
    return False


def _check(path: Path, metadata: dict[str, str], parts: dict[str, str]) -> None:
    if metadata.get("dmm.state") != FORMAT:
        raise ValueError(f"{path} is a run state of format {metadata.get('dmm.state')}, this version reads {FORMAT}")
    then: dict[str, Any] = json.loads(metadata["identity"])
    changed = [name for name in sorted(then.keys() | parts.keys()) if then.get(name) != parts.get(name)]
    if changed:
        shown = [
            f"{n} ({then.get(n, 'not set')} -> {parts.get(n, 'not set')})" if n.startswith("setting") else n
            for n in changed
        ]
        raise ValueError(
            f"the run in '{path.parent}' was started with something else: {'; '.join(shown)}. "
            "Use a new run folder, or put back what changed"
        )


def _load(run: Distillation, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    run.step = int(metadata["step"])
    with torch.no_grad():
        for key, p in run.student.named_parameters():
            p.copy_(tensors[f"student.{key}"])
            if f"exp_avg.{key}" in tensors:
                run.optimizer.state[p] = {
                    "step": torch.tensor(float(run.step)),
                    **{moment: tensors[f"{moment}.{key}"].to(p.device) for moment in MOMENTS},
                }
    if run.ema:
        run.ema.load_state_dict({k: tensors[f"ema.{k}"] for k in run.ema.average}, run.step)
    if "scaler" in metadata:
        run.scaler.load_state_dict(json.loads(metadata["scaler"]))
