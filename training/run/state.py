"""The state of a run on disk: everything that the next step depends on, written atomically, the last few kept.

One safetensors file a state: ``student.*`` and ``ema.*`` (what learns), ``optimizer.*``, of the discriminator ``head.*`` and
``head_optimizer.*``, and with adaptive sampling ``difficulty.*``; the step, the config and the hashes of teachers and data are in its
metadata. Random numbers and the data position follow from (seed, step), so they need no room. A digest of every tensor and of the header
lies in it too (``files.checksums``): a run never goes on from a damaged state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import TrainConfig
from ..fields import default_of
from ..files.checksums import read_checked, write_checked
from ..files.outputs import free_bytes
from ..loop.optimizers import load_optimizer, optimizer_tensors
from ..loop.trainer import Trainer
from ..memory.footprint import optimizer_state_bytes, tensor_bytes
from ..parallel.ranks import AgreedError
from ..parallel.sharding import gather_to_main, sharded_from_local
from ..teachers.teacher import rows_fingerprint

logger = logging.getLogger(__name__)

FORMAT = "2"
BEST = "best.safetensors"
STATE_NAME = re.compile(r"state-(\d{8})\.safetensors")
DAMAGED = ".damaged"
"""Behind the name of a state that could not be gone on from: it is no state any more, and nobody but its owner removes it."""
MAY_CHANGE = (
    "device", "save_every", "keep", "residency", "teacher_slots", "memory", "validation", "parallel", "gradient_checkpointing",
    "bus_speed", "step_seconds",
)  # fmt: skip
"""Settings that do not change what a step does; every other one is part of a run's identity."""


LEFT_OUT: tuple[tuple[Callable[[TrainConfig], bool], tuple[str, ...]], ...] = (
    (lambda c: c.sampling == "uniform", ("sampling", "adaptive_power", "adaptive_floor", "adaptive_correct")),
    (lambda c: c.loss_weight == "plain", ("loss_weight", "loss_clamp")),
    (lambda c: c.init != "bank", ("bank",)),
    (lambda c: c.teachers_per_step == "all", ("teachers_per_step",)),
    (lambda c: c.growth == default_of(TrainConfig, "growth"), ("growth",)),
    (lambda c: c.lr_schedule == "constant" and not c.final_steps, ("steps",)),
)
"""(when, settings that are then no part of a run's identity). Settings that came later are left out where they change nothing, so that
states from before they existed still load; the number of steps where a longer run begins like a shorter one, which may therefore be made
longer. (A warm-up that is a share of the steps is then a share of the longer run's: where the run is still in it, it takes longer.)"""


def identity(run: Trainer) -> dict[str, str]:
    """What must be the same for a run to go on: config, base, every teacher, data; each as text or hash."""
    out = {name for when, names in LEFT_OUT if when(run.config) for name in names} | set(MAY_CHANGE)
    settings = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in out}
    parts = {f"setting {k}": json.dumps(v) for k, v in settings.items()}
    parts["base model"] = run.base.weights_sha256
    if heads := run.base.unet.config.num_heads:  # all models have the same
        parts["attention heads"] = json.dumps(heads)
    parts["base text"] = rows_fingerprint(run.base.contexts)
    parts["teacher names"] = json.dumps([t.name for t in run.teachers])
    for teacher in run.teachers:
        style = "" if teacher.style is None else f", style {teacher.style}"
        parts[f"teacher '{teacher.name}'"] = teacher.weights_sha256 + style
        parts[f"text of teacher '{teacher.name}'"] = rows_fingerprint(teacher.contexts)
    for who, model in (("base model", run.base), *((f"teacher '{t.name}'", t) for t in run.teachers)):
        if model.told:
            parts[f"prediction of {who}"] = model.told
    parts["data"] = run.data.fingerprint()
    return parts | run.kind.identity()


def same_everywhere(run: Trainer, parts: dict[str, str]) -> None:
    """Raises ValueError when the processes of a run have different identities: they read other files."""
    first, *others = run.ranks.gather(parts)
    for rank, theirs in enumerate(others, start=1):
        if other := sorted(k for k in first.keys() | theirs.keys() if first.get(k) != theirs.get(k)):
            raise AgreedError(f"process {rank} of this run reads other files than the first: {', '.join(other)}")


def save_state(run: Trainer, folder: Path, parts: dict[str, str], error: float | None = None) -> Path:
    """Write ``state-<step>.safetensors`` and remove all but the last ``keep`` up to it; parts: ``identity(run)``, computed once.

    error: of the fixed check; the state with the lowest is also there as ``best.safetensors``. Of several processes the first one
    writes; where the student is shared out, this is for all of them together.
    """
    path = folder / f"state-{run.step:08d}.safetensors"
    main = run.ranks.is_main
    if not main and not run.student.sharded:
        return path
    tensors = {f"student.{k}": gather_to_main(p.detach(), main) for k, p in run.student.trained.items()}
    metadata = {"dmm.state": FORMAT, "step": str(run.step), "identity": json.dumps(parts)}
    _add_optimizer(tensors, metadata, "optimizer", run.optimizer, named=run.student.trained, is_main=main)
    if run.student.ema:
        average = run.student.ema.average.items()
        tensors.update(
            {f"ema.{k}": gather_to_main(sharded_from_local(v, run.student.trained[k]), main) for k, v in average}
        )
    if not main:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if run.discriminator and run.discriminator_optimizer:
        named = dict(run.discriminator.head.named_parameters())
        tensors.update({f"head.{k}": p.detach() for k, p in named.items()})
        _add_optimizer(tensors, metadata, "head_optimizer", run.discriminator_optimizer, named=named)
    if run.difficulty:
        tensors.update({f"difficulty.{k}": v for k, v in run.difficulty.state_dict().items()})
    if run.scaler.is_enabled():
        metadata["scaler"] = json.dumps(run.scaler.state_dict())
    if error is not None:
        metadata["error"] = repr(error)
    write_checked(path, tensors, metadata)
    if error is not None and error < best_error(folder):
        _link(path, folder / BEST)
    # A state of a later step is none of this run's past: it must not push out this one.
    for old in [state for state in states(folder) if state.name <= path.name][: -run.config.keep]:
        old.unlink(missing_ok=True)
    return path


def state_bytes(run: Trainer) -> int:
    """About the size of a state of the run, before there is one."""
    trained = list(run.student.trained.values())
    weights = tensor_bytes(trained)
    total = weights * (2 if run.student.ema else 1)
    total += optimizer_state_bytes(run.student.unet, trained, run.config.optimizer)
    if run.discriminator:
        total += 3 * tensor_bytes(run.discriminator.head.parameters())  # weights and AdamW's two moments
    return total


def check_room(run: Trainer, folder: Path) -> None:
    """Raise ValueError, with figures, where the disk has too little room for the states that the rest of the run will keep.

    At the worst moment there are ``keep`` of them and the new one, which is complete before the oldest goes; and the best one, which may be
    older than these.
    """
    c = run.config
    there = [path for path in (*states(folder), folder / BEST) if path.exists()]
    saves = math.ceil((c.all_steps - run.step) / c.save_every) + 1
    count = min(c.keep + 1, len(states(folder)) + saves) + bool(c.validation)
    one = state_bytes(run)
    used = sum({path.stat().st_ino: path.stat().st_size for path in there}.values())
    free = free_bytes(folder)
    if count * one - used > free:
        raise ValueError(
            f"too little disk for the states of this run in '{folder}': up to {count} of {_size(one)} each are kept at a time (keep: "
            f"{c.keep}), {_size(used)} of them are there, and {_size(free)} are free. Lower keep, make room, or choose a run folder on "
            "another disk"
        )


def _size(count: int) -> str:
    """ "3.2 GB" """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _add_optimizer(
    tensors: dict,
    metadata: dict,
    prefix: str,
    optimizer: Optimizer,
    *,
    named: Mapping[str, nn.Parameter],
    is_main: bool = True,
) -> None:
    moments, numbers = optimizer_tensors(optimizer, named, is_main)
    tensors.update({f"{prefix}.{k}": v for k, v in moments.items()})
    metadata[prefix] = json.dumps(numbers)


def best_error(folder: Path) -> float:
    """The lowest error of the fixed check in this run so far; infinity when there is none."""
    if not (folder / BEST).exists():
        return math.inf
    try:
        return float(read_checked(folder / BEST, header_only=True)[1]["error"])
    except (OSError, KeyError, ValueError) as error:
        logger.warning("%s cannot be read (%s): the next state that is checked takes its place", BEST, error)
        return math.inf


def _link(path: Path, name: Path) -> None:
    """A second name for a file, replacing what had it; a copy where the file system has no links."""
    temporary = name.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


def states(folder: Path) -> list[Path]:
    """The complete states of a run folder, oldest first (a file is there only once it is complete)."""
    return sorted(p for p in folder.glob("state-*.safetensors") if STATE_NAME.fullmatch(p.name))


@dataclass
class State:
    """A state that was read and found sound; ``before``: the newer ones that are not, and so were passed over."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    before: list[Path]


def resume(run: Trainer, folder: Path, parts: dict[str, str]) -> bool:
    """Load the newest sound state of ``folder`` into ``run``; False when the folder has no states. Newer ones, which are damaged, get
    another name (``DAMAGED``).

    Raises ValueError naming what changed when the state belongs to another run, and when every state is damaged.
    """
    state = None
    with run.ranks.together():
        if run.ranks.is_main:
            state = newest_sound(folder)
    path = run.ranks.from_main(state and state.path)
    if path is None:
        return False
    with run.ranks.together():
        tensors, metadata = (state.tensors, state.metadata) if state else read_state(path)
        _check(path, metadata, parts)
        for damaged in state.before if state else ():
            damaged.replace(aside := damaged.with_name(damaged.name + DAMAGED))
            logger.warning("the damaged state is now called %s: remove it when you have no use for it", aside.name)
    try:
        _load(run, tensors, metadata)
    except KeyError as error:  # of states from before there were digests
        raise ValueError(f"{path} is damaged: it lacks {error}. Put back a copy, or remove it") from error
    return True


def newest_sound(folder: Path) -> State | None:
    """The newest state of a run folder that is as it was written, None where there are no states. What is wrong with those passed over is
    said as a warning. Raises ValueError where none is sound."""
    found = states(folder)
    damaged: list[Path] = []
    problems = []
    for path in [*reversed(found), *([folder / BEST] if found and (folder / BEST).exists() else [])]:
        try:
            tensors, metadata = read_state(path)
            if damaged:
                logger.warning("going on from %s, at its step %s", path.name, metadata["step"])
            return State(path, tensors, metadata, damaged)
        except (ValueError, OSError) as error:
            if isinstance(error, PermissionError):  # nothing is wrong with it
                raise
            logger.warning("a state cannot be used: %s", error)
            problems.append(str(error))
            damaged += [path] if path.name != BEST else []
    if not problems:
        return None
    raise ValueError(
        f"no state of the run in '{folder}' can be used: {'; '.join(problems)}. Put back a copy of one, or begin anew in another run folder"
    )


def begun_with(folder: Path) -> int | None:
    """The batch_size of the run that has states in ``folder``, None where none can be read: other processes would plan another one, and a
    run that draws other batches is another run."""
    for path in reversed(states(folder)):
        try:
            return int(json.loads(_described(path, header_only=True)[1]["identity"])["setting batch_size"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a state. Raises ValueError for a file that is none or is damaged, OSError for one that cannot be read."""
    return _described(path, header_only=False)


def _described(path: Path, header_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_checked(path, header_only)
    if not metadata.get("step", "").isdecimal() or "dmm.state" not in metadata:
        raise ValueError(f"'{path}' is not a run state: expected one of the state-*.safetensors of a run folder")
    name = STATE_NAME.fullmatch(path.name)
    if name and int(name[1]) != int(metadata["step"]):
        raise ValueError(f"{path} is damaged or was renamed: it says that it is of step {metadata['step']}")
    if metadata["dmm.state"] == FORMAT:
        for entry in ("identity", "optimizer"):  # of states from before there were digests, this much can be seen
            try:
                json.loads(metadata[entry]).items()
            except (KeyError, ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is damaged in its header (entry '{entry}': {error!r})") from error
    return tensors, metadata


def fork(run: Trainer, source: Path) -> int:
    """Give a new run the weights of an old one (a run folder, or one of its states) and nothing else; returns the old step.

    Its averaged weights where it has them. Raises ValueError when there is no such state, it is damaged, or its model has other styles or
    sizes.
    """
    state = State(source, *read_state(source), []) if source.is_file() else newest_sound(source)
    if state is None:
        raise ValueError(
            f"there is no run to start from in '{source}': expected a run folder or one of its state files"
        )
    path, tensors, metadata = state.path, state.tensors, state.metadata
    prefix = "ema." if any(key.startswith("ema.") for key in tensors) else "student."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shapes = {k: tuple(p.shape) for k, p in run.student.trained.items()}
    other = sorted(
        k for k in shapes.keys() | weights if shapes.get(k) != (tuple(weights[k].shape) if k in weights else None)
    )
    if other:
        raise ValueError(
            f"the run in '{path.parent}' trained another model (for example '{other[0]}'): a fork keeps the sizes, the number "
            "of teachers and what is trainable"
        )
    run.student.load(weights)
    if run.student.ema:
        run.student.load_average(weights, 0)
    return int(metadata["step"])


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


def _load(run: Trainer, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}

    run.step = int(metadata["step"])
    run.student.load(part("student"))
    load_optimizer(run.optimizer, run.student.trained, part("optimizer"), json.loads(metadata["optimizer"]))
    if run.student.ema:
        run.student.load_average(part("ema"), run.step)
    if run.discriminator and run.discriminator_optimizer:
        named = dict(run.discriminator.head.named_parameters())
        run.discriminator.head.load_state_dict(part("head"))
        numbers = json.loads(metadata["head_optimizer"])
        load_optimizer(run.discriminator_optimizer, named, part("head_optimizer"), numbers)
    if run.difficulty:
        run.draws.load_difficulty(part("difficulty"))
    if "scaler" in metadata:
        run.scaler.load_state_dict(json.loads(metadata["scaler"]))
