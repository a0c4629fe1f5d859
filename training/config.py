"""The configuration of a distillation run, checked before anything is loaded or written; ``config_file`` reads it from YAML.

What each setting means, and which values it may have, stands beside it (``fields``); docs/training.md has the same as tables.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dmm_core.bank_grow import USUAL_GROWTH
from ..dmm_core.bank_size import USUAL, parse_budget
from ..dmm_core.metadata import check_new_text
from .fields import about, check_fields, is_number, setting, table
from .yaml_file import shown

INITS = ("base", "soup", "bank")
PRECISIONS = ("fp32", "bf16", "fp16")
DATA_KINDS = ("demo_scenes", "latents", "cache")
LR_SCHEDULES = ("constant", "cosine", "linear")
TRAINABLE = ("all", "bank", "lora", "style")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")
RESIDENCIES = ("auto", "device", "offload")
TEACHER_DTYPES = ("auto", *PRECISIONS)
EMA_DEVICES = ("auto", "cpu")
PARALLELS = ("ddp", "fsdp")
SAMPLINGS = ("uniform", "adaptive")
LOSS_WEIGHTS = ("plain", "eps", "v", "x0", "min_snr")
MOST_SKIPPED = 24
"""Layers of the deepest text encoder but one; SDXL's second has 32."""


@dataclass(frozen=True)
class ModelSettings:
    """What a user says of a model whose file does not say it, or wrongly; None: what the file says."""

    prediction: str | None = None
    zero_snr: bool | None = None
    clip_skip: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None

    def __bool__(self) -> bool:
        return self != ModelSettings()


_OF_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "prediction": ("What {it} predicts; null: what its file, or a yaml beside it, says.", {"choices": ("eps", "v")}),
    "zero_snr": ("Whether {its} noise schedule ends in pure noise (zero terminal SNR); null: what its file says.", {}),
    "clip_skip": (
        "Which layer of the text encoder {it} reads its prompts from: 1 the last, 2 the one before; null: what its file says, or its "
        "family's.",
        {"unit": "layers", "low": 1, "high": MOST_SKIPPED},
    ),
    "num_heads": (
        "Attention heads of every block of {its} UNet; null: what its file says, or its family's.",
        {"unit": "heads", "low": 1},
    ),
    "num_head_channels": (
        "The same said otherwise: channels of each attention head, instead of num_heads.",
        {"unit": "channels", "low": 1},
    ),
}
"""What stands beside each of ``ModelSettings``, wherever a config says them of a model."""


def _of_model(name: str, model: str = "it") -> Any:
    """The field of a setting of ``ModelSettings`` for a model that the docs call ``model``."""
    doc, more = _OF_MODEL[name]
    return setting(None, doc.format(it=model, its="its" if model == "it" else f"{model}'s"), **more)


def _settings_of(spec: TeacherSpec | DistillConfig) -> ModelSettings:
    return ModelSettings(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(ModelSettings)})


@dataclass
class LoraSpec:
    """A LoRA file and how strongly it is applied: to the UNet, and to the text encoder (None: as to the UNet)."""

    file: str = field(metadata=about("The LoRA, a .safetensors file."))
    strength: float = setting(1.0, "How strongly it is applied to the UNet.")
    clip_strength: float | None = setting(None, "How strongly it is applied to the text encoder; null: as to the UNet.")

    @property
    def text_strength(self) -> float:
        return self.strength if self.clip_strength is None else self.clip_strength

    def check(self) -> None:
        """Raises ValueError without a file, and for a strength that is no number."""
        if not isinstance(self.file, str) or not self.file:
            raise ValueError(f"a LoRA's file is {self.file!r}: expected the name of a .safetensors file")
        for name, value in (("strength", self.strength), ("clip_strength", self.text_strength)):
            if not is_number(value):
                raise ValueError(f"LoRA '{self.file}': {name} is {shown(value)}, expected a number")


@dataclass
class TeacherSpec:
    """One teacher of a headless run."""

    name: str = field(metadata=about("The name that its style gets."))
    file: str = setting("", "Its checkpoint; empty: the run's base.")
    loras: list[LoraSpec] = field(
        default_factory=list,
        metadata=about("LoRAs on top of it.", expected="a list of {file, strength, clip_strength}"),
    )
    description: str = setting("", "What to tell users about the style.")
    licence: str = setting("", "The licence of the teacher, kept in the student's file.")
    prediction: str | None = _of_model("prediction")
    zero_snr: bool | None = _of_model("zero_snr")
    clip_skip: int | None = _of_model("clip_skip")
    num_heads: int | None = _of_model("num_heads")
    num_head_channels: int | None = _of_model("num_head_channels")

    @property
    def settings(self) -> ModelSettings:
        return _settings_of(self)


@dataclass
class DataSpec:
    """Captioned latents."""

    kind: str = setting(
        "demo_scenes",
        "demo_scenes renders procedural scenes; latents reads a .safetensors file; cache reads a folder that dmm cache made.",
        choices=DATA_KINDS,
    )
    file: str = setting("", "The file or folder with the data; demo_scenes needs none.")
    count: int = setting(600, "Scenes that demo_scenes renders.", low=1, unit="scenes")
    seed: int = setting(0, "Of the scenes that are rendered.")


@dataclass
class TrainConfig:
    """What training does, whatever the models and the data are. The defaults are the recipe of arXiv:2504.12364,
    whose equations and sections are meant below."""

    # --- the step ---
    steps: int = setting(100_000, "Optimiser steps.", unit="steps", low=1)
    batch_size: int = setting(8, "Pictures in one forward, shared by all teachers.", unit="pictures", low=1)
    accumulate: int = setting(1, "Forwards of batch_size pictures in one step.", unit="forwards", low=1)
    lr: float = setting(1e-5, "Learning rate of the network.", above=0)
    style_lr_scale: float = setting(
        1.0, "Learning rate of the style side (codebook and MLP), as a multiple of the network's.", above=0
    )
    lr_schedule: str = setting("constant", "How the learning rate goes on after the warm-up.", choices=LR_SCHEDULES)
    warmup: float = setting(
        0,
        "Steps in which the learning rate rises to its full value; below 1 a share of the steps.",
        unit="steps",
        low=0,
    )
    optimizer: str = setting(
        "adamw",
        "adafactor, adamw8bit and muon need less memory; adamw8bit needs the package bitsandbytes and a GPU, adafactor transformers.",
        choices=OPTIMIZERS,
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        "Decay of AdamW's two running averages.",
        low=0,
        below=1,
        expected="two numbers from 0 to below 1, as in [0.9, 0.99]",
    )
    weight_decay: float = setting(0.01, "Decoupled weight decay, as AdamW's.", low=0)
    grad_clip: float = setting(1.0, "Longest norm of the gradient; 0: not limited.", low=0)

    # --- the losses ---
    lambda_feat: float = setting(
        0.001,
        "Weight of the feature loss (eq. 10): how much the inside of the network counts beside its result.",
        low=0,
    )
    lambda_adv: float = setting(
        0.01, "Weight of the adversarial loss (eq. 11; 0.01 in the paper); 0: no discriminator.", low=0
    )
    adv_lr: float = setting(
        1e-5,
        "Learning rate of the discriminator, which has an AdamW of its own: no warm-up, schedule or clipping.",
        above=0,
    )
    adv_start: int = setting(0, "Step from which the student listens to the discriminator.", unit="steps", low=0)

    # --- the rows: captions, timesteps, teachers ---
    caption_dropout: float = setting(
        0.1,
        "Share of the pictures that are shown with an empty prompt, so that CFG works.",
        unit="share",
        low=0,
        below=1,
    )
    base_share: float = setting(
        0.05,
        "Share of the pictures that teach 'no style', which is what the base paints.",
        unit="share",
        low=0,
        below=1,
    )
    loss_weight: str = setting(
        "plain", "In which quantity eq. 9 measures the squared error at each timestep.", choices=LOSS_WEIGHTS
    )
    loss_clamp: float = setting(5.0, "Largest weight that loss_weight gives a timestep, before scaling.", above=0)
    sampling: str = setting(
        "uniform",
        "uniform: teachers in turn and timesteps evenly; adaptive: more of the styles and noise levels that are still bad.",
        choices=SAMPLINGS,
    )
    adaptive_power: float = setting(
        1.0, "Adaptive sampling: a cell is drawn by its running loss to this power.", above=0
    )
    adaptive_floor: float = setting(
        0.25,
        "Adaptive sampling: share of the rows that are drawn evenly.",
        unit="share",
        above=0,
        high=1,
        why="with 0, cells that went well once would never be seen again",
    )
    adaptive_correct: bool = setting(
        True,
        "Adaptive sampling: importance weights keep the objective that of even draws; false: hard cells count for more.",
    )

    # --- growing and forgetting ---
    guard: float = setting(
        0.5,
        "When a DMM model grows or forgets: share of the training with a style that repeats the styles which stay, as the frozen old "
        "model paints them (Sec. 3.5); 0: they are forgotten.",
        unit="share",
        low=0,
        below=1,
    )
    warm_start: int = setting(
        0,
        "Steps that first look for each new style's code with the network frozen; 0: it begins at random.",
        unit="steps",
        low=0,
    )

    growth: str = setting(
        USUAL_GROWTH,
        "When a model with a style bank grows: what the new styles add to it before the first step, as a share of the UNet's weights or of "
        "the file in MB; 0%: their cores alone, in the basis as it is.",
    )

    # --- the final stage ---
    final_steps: int = setting(
        0, "More steps at the end, on pictures that the teachers paint then.", unit="steps", low=0
    )
    final_images: int = setting(1500, "Pictures that each teacher paints for the final steps.", unit="pictures", low=1)
    final_lr: float | None = setting(None, "Learning rate of the final steps; null: lr.", above=0)
    final_cfg: float = setting(7.0, "Guidance with which the teachers paint for the final steps.", above=0)
    final_sampling_steps: int = setting(25, "Sampling steps of those pictures.", unit="steps", low=1)

    # --- the student ---
    init: str = setting(
        "base",
        "Where the student starts: base; soup, the teachers' average; bank, their average and a style bank of what sets each apart, which "
        "paints near the teachers before the first step. A base that has a bank goes on from itself.",
        choices=INITS,
    )
    bank: str = setting(
        USUAL,
        "Size of the style bank where the student starts from bank: a share of the UNet's weights, or a size in MB. A base that has a bank "
        "keeps its own.",
    )
    trainable: str = setting(
        "all",
        "What learns: all weights; in little memory, bank, the style bank and the style side, or lora, low-rank adapters and the style "
        "side; style, the style side only. The saved model is whole in every case.",
        choices=TRAINABLE,
    )
    lora_rank: int = setting(32, "Rank of the adapters of trainable lora.", low=1)
    ema_gamma: float | None = setting(
        None,
        "Power-function average of the weights (arXiv:2312.02696): 6.94 looks back over a tenth of the run; null: none.",
        above=0,
    )
    ema_device: str = setting("auto", "Where the average is kept; auto: with the student.", choices=EMA_DEVICES)

    # --- memory and speed ---
    precision: str = setting(
        "fp32",
        "Of the arithmetic: bf16 for newer graphics cards, fp32 if in doubt. The student's weights stay in fp32.",
        choices=PRECISIONS,
    )
    teacher_dtype: str = setting(
        "auto", "Of the teachers' weights; auto: precision on a GPU, fp32 elsewhere.", choices=TEACHER_DTYPES
    )
    residency: str = setting(
        "auto",
        "Where the teachers wait: device, all on the GPU; offload, in RAM, one or two at a time on the GPU; auto: as memory allows.",
        choices=RESIDENCIES,
    )
    teacher_slots: int = setting(
        2, "Teachers on the GPU at a time with residency offload.", low=1, high=2, unit="teachers", expected="1 or 2"
    )
    teachers_per_step: int | str = setting(
        "all",
        "Teachers that a step asks, drawn so that each keeps its share of all rows; the base counts as one. Fewer move less to the GPU "
        "where they wait in RAM; auto: as many as bus_speed and step_seconds leave time for.",
        unit="teachers",
        low=1,
        choices=("all", "auto"),
        expected="a whole number from 1, all or auto",
    )
    bus_speed: float = setting(
        20.0, "For teachers_per_step auto: what a second moves from RAM to the GPU.", unit="GB", above=0
    )
    step_seconds: float | None = setting(
        None,
        "For teachers_per_step auto: seconds that a step computes, without waiting for teachers.",
        unit="seconds",
        above=0,
    )
    memory: float | str = setting(
        "auto",
        "Memory of the GPU that the run may use; auto: all of it, and no plan without a GPU. The run is fitted into it where settings are "
        "left at their defaults: forwards are split, teachers wait in RAM, blocks are recomputed. off: nothing is planned.",
        unit="GB",
        above=0,
        choices=("auto", "off"),
        expected="GB, auto or off",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, a third slower.")
    compile: bool = setting(False, "torch.compile the student: slow to start, then faster.")
    parallel: str = setting(
        "ddp", "With several processes: ddp, a copy of the student in each; fsdp, a share of it.", choices=PARALLELS
    )
    tf32: bool = setting(True, "TensorFloat-32 for what a GPU multiplies in fp32.")

    # --- the run ---
    seed: int = setting(0, "Of all randomness: same settings and seed, same training.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:0.")
    save_every: int = setting(500, "Steps between saved run states.", unit="steps", low=1)
    keep: int = setting(2, "Run states that stay, the newest ones.", unit="states", low=1)
    validation: int = setting(
        64, "Samples of the fixed check at each save that finds the best state; 0: none.", unit="samples", low=0
    )

    @property
    def all_steps(self) -> int:
        return self.steps + self.final_steps

    def check(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        check_fields(self)
        parse_budget(self.bank)
        parse_budget(self.growth)
        if self.trainable == "bank" and self.init == "soup":
            raise ValueError("trainable is 'bank' and init is 'soup', which makes none: set init to bank")


@dataclass
class AttackConfig:
    """The adversary of a run that forgets a style: it looks for codes that bring the style back."""

    every: int = setting(25, "Steps between searches.", unit="steps", low=1)
    steps: int = setting(10, "Steps of a search.", unit="steps", low=1)
    codes: int = setting(
        3,
        "Style vectors that search for the style while it is forgotten, so that it cannot be found again; 0: none, it is only painted "
        "over where its own code was.",
        unit="vectors",
        low=0,
    )
    check: int = setting(
        100,
        "At the end the style is searched for in the model before and after, for so many steps; 0: it is not.",
        unit="steps",
        low=0,
    )

    def validate(self) -> None:
        """Raises ValueError naming the setting that makes no sense."""
        check_fields(self, "attack.")


@dataclass
class FewStepConfig:
    """How a DMM model learns to paint in a few steps, from itself (``dmm fewstep``; ``loop.phased``)."""

    steps: int = setting(
        4,
        "Sampling steps to learn, each of them a phase; with the sampler euler, sgm_uniform and cfg 1.",
        unit="steps",
        low=1,
        high=16,
    )
    cfg: float = setting(
        4.0, "Guidance that is learnt: the few-step model paints at cfg 1 what the model painted at this cfg.", low=1
    )
    cfg_spread: float = setting(0.0, "The guidance is drawn evenly from so much below cfg to so much above it.", low=0)
    skip: int = setting(
        20,
        "Length of the frozen model's own step, between the two states that are compared.",
        unit="timesteps",
        low=1,
        high=500,
    )
    huber: float = setting(0.01, "Error of a prediction above which the loss grows evenly, not as a square.", low=0)
    blends: float = setting(0.2, "Share of the pictures in a random blend of two styles.", unit="share", low=0, below=1)
    paths: int = setting(
        128,
        "Paintings by the model itself in each style, whose states it learns from; 0: noised pictures alone (consistency).",
        unit="paintings",
        low=0,
    )
    path_share: float = setting(
        0.5,
        "Share of what it learns from that are states of these paintings; with regression all of it is.",
        unit="share",
        low=0,
        high=1,
    )
    path_steps: int = setting(6, "Sampling steps of these paintings in each phase.", unit="steps", low=1, high=50)
    objective: str = setting(
        "regression",
        "regression: from states of the model's own paintings to the edge of their phase; consistency: states on one path must lead to one "
        "place; both: regression where there is a painting.",
        choices=("regression", "consistency", "both"),
    )
    follows: str = setting(
        "average",
        "Whose word counts for the later state: average, the running average of the weights; student, the weights as they are.",
        choices=("average", "student"),
    )

    def validate(self) -> None:
        """Raises ValueError naming the setting that makes no sense."""
        check_fields(self, "few_steps.")
        if self.cfg - self.cfg_spread < 1:
            raise ValueError(
                f"few_steps.cfg_spread is {self.cfg_spread}: cfg {self.cfg} less that is below 1, lower it"
            )
        if self.objective != "consistency" and not self.paths:
            raise ValueError(
                f"few_steps.objective is '{self.objective}' and few_steps.paths is 0: set paths, or objective: consistency"
            )


@dataclass
class DistillConfig:
    """A headless run: ``dmm distill --config FILE``. Paths in the file are relative to the file.

    For ``dmm add-teacher`` the base is a DMM model and the teachers are the new ones; for ``dmm forget`` and ``dmm fewstep`` it is one
    too, and there are no teachers.
    """

    base: str = field(
        metadata=about(
            "The checkpoint that the student starts from, or a merged model that goes on; to grow or forget, the DMM model."
        )
    )
    output: str = field(metadata=about("The student's file, .safetensors."))
    run_dir: str = field(metadata=about("Folder of the run: its states, log and pictures."))
    teachers: list[TeacherSpec] = field(
        default_factory=list,
        metadata=about(
            "The teachers, one for each style; none where styles are forgotten.", expected="a list, see teachers"
        ),
    )
    forget: list[str] = field(
        default_factory=list, metadata=about("dmm forget: the styles that go.", expected="a list of style names")
    )
    parts_from: str = setting(
        "", "A full checkpoint of the same family, for the VAE and the text encoder where the base has none."
    )
    prediction: str | None = _of_model("prediction", "the base")
    zero_snr: bool | None = _of_model("zero_snr", "the base")
    clip_skip: int | None = _of_model("clip_skip", "the base")
    num_heads: int | None = _of_model("num_heads", "the base")
    num_head_channels: int | None = _of_model("num_head_channels", "the base")
    title: str = setting("DMM", "The model's title in its file.")
    picture_every: int = setting(
        500,
        "Steps between contact sheets of student and teachers in the run folder; 0: none.",
        unit="steps",
        low=0,
    )
    data: DataSpec = field(
        default_factory=DataSpec, metadata=about("What the run trains on.", expected="settings, see data")
    )
    train: TrainConfig = field(
        default_factory=TrainConfig, metadata=about("What training does.", expected="settings, see train")
    )
    attack: AttackConfig = field(
        default_factory=AttackConfig,
        metadata=about("dmm forget: the search for codes that bring a style back.", expected="settings, see attack"),
    )
    few_steps: FewStepConfig | None = field(
        default=None,
        metadata=about("dmm fewstep: the model learns to paint in a few steps.", expected="settings, see few_steps"),
    )

    @property
    def settings(self) -> ModelSettings:
        """Of the base."""
        return _settings_of(self)

    def check(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        check_fields(self)
        if self.forget and self.teachers:
            raise ValueError("forget and teachers are both given: a run either learns or forgets")
        if not isinstance(self.forget, list) or not all(isinstance(name, str) for name in self.forget):
            raise ValueError(f"forget is {self.forget!r}: expected a list of style names")
        if self.few_steps:
            if self.forget or self.teachers:
                raise ValueError("few_steps is given with teachers or forget: a model learns few steps from itself")
            self.few_steps.validate()
        elif not self.forget:
            check_names([teacher.name for teacher in self.teachers])
        self.attack.validate()
        check_fields(self.data, "data.")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output is {self.output!r}: the file name must end in .safetensors")
        if self.data.kind != "demo_scenes" and not self.data.file:
            raise ValueError(f"data.file is missing: data of kind {self.data.kind} are read from there")
        files = [
            ("base", self.base),
            *((f"teacher '{t.name}'", t.file) for t in self.teachers),
            ("parts_from", self.parts_from),
        ]
        check_new_text("title", self.title)
        for teacher in self.teachers:
            check_new_text("description", teacher.description)
            check_new_text("licence", teacher.licence)
            if not teacher.file and not teacher.loras:
                raise ValueError(f"teacher '{teacher.name}' has neither a file nor loras: it would be the base itself")
            for lora in teacher.loras:
                lora.check()
            files += [(f"LoRA of teacher '{teacher.name}'", lora.file) for lora in teacher.loras]
        for role, path in files:  # a model may be a folder of diffusers
            if path and not _exists(path):
                raise ValueError(f"{role}: there is no file '{path}'")
        self.train.check()

    def inputs(self) -> list[str]:
        """Every file and folder that the run reads."""
        loras = [lora.file for teacher in self.teachers for lora in teacher.loras]
        files = [self.base, self.parts_from, self.data.file, *(teacher.file for teacher in self.teachers), *loras]
        return [file for file in files if file]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _exists(path: str) -> bool:
    """Whether there is such a file or folder; False too for a name that no file can have."""
    try:
        return Path(path).exists()
    except OSError:  # too long
        return False


def check_names(names: list[str]) -> None:
    """Raises ValueError unless there is at least one name and all are non-empty and different (case and spaces aside)."""
    if not names:
        raise ValueError("no teachers given: connect or list at least one")
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"teacher name {name!r} is empty: every teacher needs a name, it becomes the style's name")
        check_new_text("name", name)
        folded = name.strip().casefold()
        if folded in seen:
            raise ValueError(f"teacher names '{seen[folded]}' and '{name}' are the same style name: rename one of them")
        if folded == "none":
            raise ValueError("a teacher cannot be called 'none': that name means painting without a style")
        seen[folded] = name


SECTIONS = {
    "The file": DistillConfig,
    "`teachers`, each": TeacherSpec,
    "`loras` of a teacher, each": LoraSpec,
    "`data`": DataSpec,
    "`train`": TrainConfig,
    "`attack`": AttackConfig,
    "`few_steps`": FewStepConfig,
}


def settings_tables() -> str:
    """All settings of a config file as Markdown, a table for each part of the file: what ``dmm distill --list-settings`` prints."""
    return "\n\n".join(f"### {title}\n\n{table(cls)}" for title, cls in SECTIONS.items())
