"""The configuration of a distillation run: one dataclass, read from YAML, checked before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .presets import preset

INITS = ("base", "soup")
PRECISIONS = ("fp32", "bf16", "fp16")
DATA_KINDS = ("demo_scenes", "latents", "cache")
LR_SCHEDULES = ("constant", "cosine", "linear")
TRAINABLE = ("all", "lora", "style")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")
RESIDENCIES = ("auto", "device", "offload")
TEACHER_DTYPES = ("auto", *PRECISIONS)
EMA_DEVICES = ("auto", "cpu")
PARALLELS = ("ddp", "fsdp")
SAMPLINGS = ("uniform", "adaptive")
LOSS_WEIGHTS = ("plain", "eps", "v", "x0", "min_snr")


@dataclass
class LoraSpec:
    """A LoRA file and how strongly it is applied: to the UNet, and to the text encoder (None: as to the UNet)."""

    file: str
    strength: float = 1.0
    clip_strength: float | None = None

    @property
    def text_strength(self) -> float:
        return self.strength if self.clip_strength is None else self.clip_strength

    def check(self) -> None:
        """Raises ValueError without a file, and for a strength that is no number."""
        if not isinstance(self.file, str) or not self.file:
            raise ValueError(f"a LoRA's file is {self.file!r}: expected the name of a .safetensors file")
        for name, value in (("strength", self.strength), ("clip_strength", self.text_strength)):
            if not _finite(value):
                raise ValueError(f"LoRA '{self.file}': {name} is {value!r}, expected a number")


@dataclass
class TeacherSpec:
    """One teacher of a headless run: the name its style gets, its checkpoint file ("" for the run's base), the LoRAs on top of
    it, and what to tell users about it."""

    name: str
    file: str = ""
    loras: list[LoraSpec] = field(default_factory=list)
    description: str = ""
    licence: str = ""


@dataclass
class DataSpec:
    """Captioned latents. ``demo_scenes`` renders ``count`` procedural scenes; ``latents`` reads a safetensors ``file``; ``cache``
    is a folder that ``dmm cache`` made, named as ``file``."""

    kind: str = "demo_scenes"
    file: str = ""
    count: int = 600
    seed: int = 0


@dataclass
class TrainConfig:
    """What training does, whatever the models and the data are. The defaults are the recipe of arXiv:2504.12364.

    steps: optimiser steps. batch_size: samples of one forward, shared by all teachers; accumulate: forwards a step.
    lr: of the optimiser, style_lr_scale multiplies it for codebook and MLP; warmup: steps; grad_clip: 0 for none.
    optimizer: see ``make_optimizer``; betas and weight_decay are of AdamW's kind.

    lambda_feat: weight of eq. 10. lambda_adv: weight of eq. 11, 0 for no discriminator; adv_lr: of its own optimiser;
    adv_start: the step from which the student listens to it. caption_dropout: share of empty prompts. base_share: share of samples
    without a style, distilled to the base model.

    loss_weight: what eq. 9 counts at each timestep, see ``losses.timestep_weights``; loss_clamp: of those weights. sampling: "uniform"
    draws teachers in turn and timesteps evenly, "adaptive" more of the (teacher, timestep bin) cells whose running loss is high, by
    loss ** adaptive_power, but a share of adaptive_floor of the rows evenly (``difficulty``). adaptive_correct: importance weights
    keep the objective what it is with "uniform"; without them the hard cells count for more.

    guard: only when a DMM model grows or forgets: the share of the rows with a style that repeat the styles that stay, as the frozen
    old model paints them (Sec. 3.5). warm_start: steps that look for each new style's code, all else frozen, before training begins.

    final_steps: steps after ``steps`` on pictures that the teachers painted ("synthesised fine-tune"), ``final_images`` each, with
    final_lr (None: lr), painted with final_cfg in final_sampling_steps steps.

    init: where the student starts, "base" or "soup" (the teachers' mean). trainable: "all" weights, "lora" (low-rank adapters of
    rank lora_rank and the style side; folded into the file) or "style" (the style side only). ema_gamma: power-function average of
    the weights (arXiv:2312.02696), None for none; ema_device: where it is kept, "auto" is with the student.

    memory: GB that the run may use of its device; batch_size and accumulate (their product stays), optimizer, trainable, ema_device,
    gradient_checkpointing and residency are then chosen to fit, where they are left at their defaults. "auto" is all of a GPU, and
    no plan without one; "off" plans nothing.

    precision: of the arithmetic; weights stay in fp32. teacher_dtype: the teachers' weights, "auto" is the precision on a GPU and
    fp32 elsewhere. residency: the teachers wait on the "device", or in RAM with ``teacher_slots`` places on the device ("offload").
    compile: torch.compile the student. parallel: with several processes a copy of the student in each ("ddp") or a share of it
    ("fsdp"). save_every: steps between run states, keep: how many of them stay; validation: samples of the
    fixed check at each save that finds the best state, 0 for none.
    """

    steps: int = 100_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-5
    style_lr_scale: float = 1.0
    lr_schedule: str = "constant"
    warmup: int = 0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    lambda_feat: float = 0.001
    lambda_adv: float = 0.01
    adv_lr: float = 1e-5
    adv_start: int = 0
    caption_dropout: float = 0.1
    base_share: float = 0.05
    loss_weight: str = "plain"
    loss_clamp: float = 5.0
    sampling: str = "uniform"
    adaptive_power: float = 1.0
    adaptive_floor: float = 0.25
    adaptive_correct: bool = True
    guard: float = 0.5
    warm_start: int = 0
    final_steps: int = 0
    final_images: int = 1500
    final_lr: float | None = None
    final_cfg: float = 7.0
    final_sampling_steps: int = 25
    init: str = "base"
    trainable: str = "all"
    lora_rank: int = 32
    ema_gamma: float | None = None
    ema_device: str = "auto"
    precision: str = "fp32"
    teacher_dtype: str = "auto"
    residency: str = "auto"
    teacher_slots: int = 2
    memory: float | str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"
    tf32: bool = True
    seed: int = 0
    device: str = "auto"
    save_every: int = 500
    keep: int = 2
    validation: int = 64

    @property
    def all_steps(self) -> int:
        return self.steps + self.final_steps

    def check(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""

        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {what}")

        whole = (
            "steps",
            "batch_size",
            "accumulate",
            "save_every",
            "keep",
            "lora_rank",
            "final_images",
            "final_sampling_steps",
        )
        for name in whole:
            need(_whole(getattr(self, name)) and getattr(self, name) >= 1, name, "expected a whole number from 1")
        for name in ("warmup", "adv_start", "warm_start", "final_steps", "validation"):
            need(_whole(getattr(self, name)) and getattr(self, name) >= 0, name, "expected a whole number from 0")
        for name in ("lr", "style_lr_scale", "adv_lr", "final_cfg", "loss_clamp", "adaptive_power"):
            need(_finite(getattr(self, name)) and getattr(self, name) > 0, name, "expected a positive number")
        for name in ("weight_decay", "grad_clip", "lambda_feat", "lambda_adv"):
            need(_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "expected 0 or more")
        for name in ("caption_dropout", "base_share", "guard"):
            need(
                _finite(getattr(self, name)) and 0 <= getattr(self, name) < 1,
                name,
                "expected a share from 0 to below 1",
            )
        need(
            _finite(self.adaptive_floor) and 0 < self.adaptive_floor <= 1,
            "adaptive_floor",
            "expected a share from above 0 to 1: with 0, cells that went well once would never be seen again",
        )
        need(isinstance(self.adaptive_correct, bool), "adaptive_correct", "expected true or false")
        need(_whole(self.seed), "seed", "expected a whole number")
        choices = {
            "init": INITS,
            "precision": PRECISIONS,
            "lr_schedule": LR_SCHEDULES,
            "trainable": TRAINABLE,
            "optimizer": OPTIMIZERS,
            "residency": RESIDENCIES,
            "teacher_dtype": TEACHER_DTYPES,
            "ema_device": EMA_DEVICES,
            "parallel": PARALLELS,
            "sampling": SAMPLINGS,
            "loss_weight": LOSS_WEIGHTS,
        }
        for name, known in choices.items():
            need(getattr(self, name) in known, name, f"choose one of {', '.join(known)}")
        need(
            len(self.betas) == 2 and all(_finite(b) and 0 <= b < 1 for b in self.betas),
            "betas",
            "expected two from 0 to 1",
        )
        need(self.teacher_slots in (1, 2), "teacher_slots", "expected 1 or 2")
        own = self.memory in ("auto", "off") or (_finite(self.memory) and self.memory > 0)
        need(own, "memory", "expected GB, auto or off")
        for name in ("ema_gamma", "final_lr"):
            value = getattr(self, name)
            need(value is None or (_finite(value) and value > 0), name, "expected > 0 or null")


@dataclass
class AttackConfig:
    """The adversary of a run that forgets a style: every ``every`` steps it looks, for ``steps`` steps, for ``codes`` codes that bring
    the style back. codes 0: none, the style is only painted over where its own code was. check: steps of the search that, at the end,
    shows what is left in the network; 0: none."""

    every: int = 25
    steps: int = 10
    codes: int = 3
    check: int = 100

    def validate(self) -> None:
        """Raises ValueError naming the setting that makes no sense."""
        for name, low in (("every", 1), ("steps", 1), ("codes", 0), ("check", 0)):
            value = getattr(self, name)
            if not _whole(value) or value < low:
                raise ValueError(f"attack.{name} is {value!r}: expected a whole number from {low}")


@dataclass
class DistillConfig:
    """A headless run: ``dmm distill --config FILE``. Paths in the file are relative to the file.

    For ``dmm add-teacher`` the base is a DMM model and the teachers are the new ones; for ``dmm forget`` it is one too, there are no
    teachers, and ``forget`` names the styles that go. parts_from: a full checkpoint of the same family, whose VAE (and text encoder) the
    result gets where the base has none. picture_every: steps between contact sheets of student and teachers in the run folder, 0 for none.
    """

    base: str
    output: str
    run_dir: str
    teachers: list[TeacherSpec] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    parts_from: str = ""
    title: str = "DMM"
    picture_every: int = 500
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainConfig = field(default_factory=TrainConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def check(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        if self.forget and self.teachers:
            raise ValueError("forget and teachers are both given: a run either learns or forgets")
        if not isinstance(self.forget, list) or not all(isinstance(name, str) for name in self.forget):
            raise ValueError(f"forget is {self.forget!r}: expected a list of style names")
        if not self.forget:
            check_names([teacher.name for teacher in self.teachers])
        self.attack.validate()
        if self.data.kind not in DATA_KINDS:
            raise ValueError(f"data.kind is {self.data.kind!r}: choose one of {', '.join(DATA_KINDS)}")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output is {self.output!r}: the file name must end in .safetensors")
        if self.data.kind != "demo_scenes" and not self.data.file:
            raise ValueError(f"data.file is missing: data of kind {self.data.kind} are read from there")
        files = [
            ("base", self.base),
            *((f"teacher '{t.name}'", t.file) for t in self.teachers),
            ("parts_from", self.parts_from),
        ]
        for teacher in self.teachers:
            if not teacher.file and not teacher.loras:
                raise ValueError(f"teacher '{teacher.name}' has neither a file nor loras: it would be the base itself")
            for lora in teacher.loras:
                lora.check()
            files += [(f"LoRA of teacher '{teacher.name}'", lora.file) for lora in teacher.loras]
        for role, path in files:  # a model may be a folder of diffusers
            if path and not Path(path).exists():
                raise ValueError(f"{role}: there is no file '{path}'")
        if not _whole(self.picture_every) or self.picture_every < 0:
            raise ValueError(f"picture_every is {self.picture_every!r}: expected a whole number from 0")
        self.train.check()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_names(names: list[str]) -> None:
    """Raises ValueError unless there is at least one name and all are non-empty and different (case and spaces aside)."""
    if not names:
        raise ValueError("no teachers given: connect or list at least one")
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"teacher name {name!r} is empty: every teacher needs a name, it becomes the style's name")
        folded = name.strip().casefold()
        if folded in seen:
            raise ValueError(f"teacher names '{seen[folded]}' and '{name}' are the same style name: rename one of them")
        if folded == "none":
            raise ValueError("a teacher cannot be called 'none': that name means painting without a style")
        seen[folded] = name


def load_config(path: str | Path) -> DistillConfig:
    """Read and check a YAML config. Raises ValueError naming the file and the key that is wrong."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config '{path}': {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a YAML file: {error}") from error
    try:
        config = _build(DistillConfig, raw, "config")
        for name in ("base", "output", "run_dir", "parts_from"):
            if getattr(config, name):
                setattr(config, name, str((path.parent / getattr(config, name)).resolve()))
        for item in (item for teacher in config.teachers for item in (teacher, *teacher.loras)):
            if item.file:
                item.file = str((path.parent / item.file).resolve())
        if config.data.file:
            config.data.file = str((path.parent / config.data.file).resolve())
        config.check()
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return config


def _build(cls, raw: Any, where: str):
    """A dataclass from a mapping; unknown and missing keys are named, with the nearest known one."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {type(raw).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields and not (cls is TrainConfig and key == "preset"):
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ValueError(f"{where} has an unknown setting '{key}'{hint}")
    values = dict(raw)
    nested = {"data": DataSpec, "train": TrainConfig, "attack": AttackConfig}
    for key, kind in nested.items():
        if cls is DistillConfig and key in values:
            values[key] = _build(kind, values[key], key)
    if cls is DistillConfig and isinstance(values.get("teachers"), list):
        values["teachers"] = [_build(TeacherSpec, t, f"teachers[{i}]") for i, t in enumerate(values["teachers"])]
    if cls is TeacherSpec and "loras" in values:
        if not isinstance(values["loras"], list):
            raise ValueError(f"{where}.loras must be a list, each of a file and, if you like, a strength")
        values["loras"] = [_build(LoraSpec, lora, f"{where}.loras[{i}]") for i, lora in enumerate(values["loras"])]
        for lora in values["loras"]:
            lora.check()
    if cls is TrainConfig:
        if "preset" in values:
            values = {**preset(values.pop("preset")), **values}
        values = {k: _number(fields[k].type, v) for k, v in values.items()}
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{where} lacks the settings {', '.join(missing)}")
    return cls(**values)


def _number(kind: str, value: Any) -> Any:
    """YAML 1.1 reads '1e-5' as text and '2' as an int: give float settings their floats."""
    if "float" in kind and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if kind.startswith("tuple") and isinstance(value, list):
        return tuple(_number("float", v) for v in value)
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
