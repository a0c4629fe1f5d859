"""The settings of Distill Teachers: its inputs, and what of the trainer's configuration each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..training.config import (
    INITS,
    LR_SCHEDULES,
    OPTIMIZERS,
    PRECISIONS,
    RESIDENCIES,
    SAMPLINGS,
    TRAINABLE,
    TrainConfig,
)
from ..training.presets import PRESETS, preset

DEFAULTS = TrainConfig(
    steps=1000, batch_size=8, lr=1e-5, lambda_adv=0.0, ema_gamma=6.94, final_images=300, save_every=250
)
CUSTOM = "custom"
GIGABYTES = (8, 12, 16, 24, 48)
MEMORY = ("auto", "off", *(f"{size} GB" for size in GIGABYTES))

FIELDS = {
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "lr",
    "seed": "seed",
    "start_from": "init",
    "style_rate": "style_lr_scale",
    "feature_weight": "lambda_feat",
    "caption_dropout": "caption_dropout",
    "no_style_share": "base_share",
    "precision": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "save_every": "save_every",
    "memory": "memory",
    "accumulate": "accumulate",
    "rate_schedule": "lr_schedule",
    "warmup": "warmup",
    "adversarial_weight": "lambda_adv",
    "adversarial_rate": "adv_lr",
    "average": "ema_gamma",
    "final_steps": "final_steps",
    "final_images": "final_images",
    "trainable": "trainable",
    "lora_rank": "lora_rank",
    "optimizer": "optimizer",
    "teachers_wait": "residency",
    "validation": "validation",
    "compile": "compile",
    "sampling": "sampling",
}
"""Input -> field of TrainConfig."""
GROWING = {"guard": "guard", "warm_start": "warm_start"}
"""The same, of the nodes that go on with a DMM model."""


def field_of(name: str) -> str:
    return {**FIELDS, **GROWING}[name]


def whole(name: str, low: int, high: int, tooltip: str | None = None, **more):
    return io.Int.Input(name, default=getattr(DEFAULTS, field_of(name)), min=low, max=high, tooltip=tooltip, **more)


def number(name: str, low: float, high: float, step: float, tooltip: str | None = None, **more):
    default = getattr(DEFAULTS, field_of(name))
    return io.Float.Input(name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip, **more)


def choice(name: str, options, tooltip: str | None = None, **more):
    return io.Combo.Input(name, options=list(options), default=getattr(DEFAULTS, FIELDS[name]), tooltip=tooltip, **more)


def setting_inputs() -> list:
    """In the order of saved workflows: new ones go to the end, and are optional so that older graphs still run."""
    seldom = {"advanced": True}
    new = {"advanced": True, "optional": True}
    return [
        whole("steps", 1, 10_000_000),
        whole("batch_size", 1, 4096, "Pictures a step, shared by all teachers."),
        number("learning_rate", 1e-8, 0.1, 1e-8),
        io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False),
        choice("start_from", INITS, "soup: the teachers' average.", **seldom),
        number("style_rate", 0.01, 100, 0.1, "Times the learning rate, for the style vectors.", **seldom),
        number("feature_weight", 0, 1, 1e-4, **seldom),
        number("caption_dropout", 0, 0.9, 0.01, **seldom),
        number("no_style_share", 0, 0.9, 0.01, "Share of the pictures that teach 'no style' = the base.", **seldom),
        choice("precision", PRECISIONS, **seldom),
        io.Boolean.Input("gradient_checkpointing", default=False, tooltip="Less memory, a third slower.", **seldom),
        io.Int.Input(
            "preview_every",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between pictures of the student beside its teachers; 0 for none.",
            **seldom,
        ),
        whole("save_every", 1, 1_000_000, "Steps between saved run states.", **seldom),
        io.Combo.Input(
            "preset",
            options=[CUSTOM, *PRESETS],
            default=CUSTOM,
            optional=True,
            tooltip="Fills in the settings for models of Stable Diffusion's size; changing one of them makes it 'custom'.",
        ),
        choice(
            "memory",
            MEMORY,
            "Of the GPU. The run is fitted into it: forwards are split, teachers wait in RAM, blocks are recomputed.",
            optional=True,
        ),
        whole("accumulate", 1, 4096, "Forwards of batch_size pictures a step.", **new),
        choice("rate_schedule", LR_SCHEDULES, **new),
        whole("warmup", 0, 1_000_000, "Steps.", **new),
        number("adversarial_weight", 0, 10, 1e-3, "The paper's third loss (0.01 there); 0: no discriminator.", **new),
        number("adversarial_rate", 1e-8, 0.1, 1e-8, "Learning rate of the discriminator.", **new),
        number("average", 0, 100, 0.01, "Of the weights: 6.94 looks back over a tenth of the run; 0: none.", **new),
        whole("final_steps", 0, 10_000_000, "More steps, on pictures that the teachers paint then.", **new),
        whole("final_images", 1, 1_000_000, "Pictures that each teacher paints for the final steps.", **new),
        choice("trainable", TRAINABLE, "lora: adapters and styles, in little memory; saved as a whole model.", **new),
        whole("lora_rank", 1, 1024, **new),
        choice("optimizer", OPTIMIZERS, "adafactor, adamw8bit and muon need less memory.", **new),
        choice("teachers_wait", RESIDENCIES, "offload: in RAM, two at a time on the GPU.", **new),
        whole("validation", 0, 100_000, "Samples of the fixed check that finds the best state.", **new),
        io.Boolean.Input("compile", default=False, tooltip="torch.compile: slow to start, then faster.", **new),
        choice("sampling", SAMPLINGS, "adaptive: more of the styles and noise levels that are still bad.", **new),
    ]


def growing_inputs() -> list:
    """Of the nodes that go on with a DMM model: the student starts from that model, whatever else is set."""
    return [setting for setting in setting_inputs() if setting.id != "start_from"]


def guard_input():
    return number(
        "guard", 0, 0.95, 0.05, "Share of the training that repeats the styles which stay. 0: they are forgotten."
    )


def warm_start_input():
    tooltip = "Steps that first look for the new style's vector with the network frozen; 0: it begins at random."
    return whole("warm_start", 0, 100_000, tooltip)


def train_config(given: Mapping[str, Any]) -> TrainConfig:
    """What the node's inputs say. Raises ValueError naming a setting that makes no sense."""
    named = given.get("preset", CUSTOM)
    values = {**given, **({} if named == CUSTOM else preset_inputs(named))}
    settings = {field: values[name] for name, field in {**FIELDS, **GROWING}.items() if name in values}
    settings["ema_gamma"] = values.get("average", DEFAULTS.ema_gamma) or None
    if "memory" in values:
        settings["memory"] = in_gigabytes(values["memory"])
    config = TrainConfig(**{**vars(DEFAULTS), **settings})
    config.check()
    return config


def preset_inputs(name: str) -> dict[str, Any]:
    """A preset in the node's own inputs."""
    inputs = {field: name for name, field in FIELDS.items()}
    return {inputs[field]: 0.0 if value is None else value for field, value in preset(name).items()}


def in_gigabytes(memory: str) -> float | str:
    return float(memory.removesuffix(" GB")) if memory.endswith(" GB") else memory
