"""The settings of Distill Teachers: its inputs, and what of the trainer's configuration each of them is.

Tooltips, choices and lower bounds are those of the configuration's fields. Upper bounds and steps are of the node's controls only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..training.config import TrainConfig
from ..training.fields import about_field
from ..training.presets import PRESETS, preset

DEFAULTS = TrainConfig(
    steps=1000, batch_size=8, lr=1e-5, lambda_adv=0.0, ema_gamma=6.94, final_images=300, save_every=250
)
"""Where the node starts from, which is not the paper's recipe: short runs on one card."""
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
    "bank_size": "bank",
}
"""Input -> field of TrainConfig."""
GROWING = {"guard": "guard", "warm_start": "warm_start", "growth": "growth"}
"""The same, of the nodes that go on with a DMM model."""


def field_of(name: str) -> str:
    return {**FIELDS, **GROWING}[name]


def doc(name: str) -> str:
    return about_field(TrainConfig, field_of(name)).doc


def int_input(name: str, high: int, *, config: Any = DEFAULTS, field: str = "", low: float | None = None, **more):
    """An input with the default, tooltip and lower bound of a field: of ``config``'s ``field``, or the one that FIELDS names."""
    field = field or field_of(name)
    known = about_field(type(config), field)
    low = known.low if low is None else low
    return io.Int.Input(name, default=getattr(config, field), min=low, max=high, tooltip=known.doc, **more)


def number(name: str, high: float, step: float, *, low: float | None = None, tooltip: str = "", **more):
    known = about_field(TrainConfig, field_of(name))
    return io.Float.Input(
        name,
        default=getattr(DEFAULTS, field_of(name)),
        min=known.low if low is None else low,
        max=high,
        step=step,
        round=False,
        tooltip=tooltip or known.doc,
        **more,
    )


def choice(name: str, options: Sequence[str] = (), **more):
    known = about_field(TrainConfig, field_of(name))
    default = getattr(DEFAULTS, field_of(name))
    return io.Combo.Input(name, options=list(options or known.choices), default=default, tooltip=known.doc, **more)


def switch(name: str, **more):
    return io.Boolean.Input(name, default=getattr(DEFAULTS, field_of(name)), tooltip=doc(name), **more)


def setting_inputs() -> list:
    """In the order of saved workflows: new ones go to the end, and are optional so that older graphs still run."""
    seldom = {"advanced": True}
    new = {"advanced": True, "optional": True}
    return [
        int_input("steps", 10_000_000),
        int_input("batch_size", 4096),
        number("learning_rate", 0.1, 1e-8, low=1e-8),
        int_input("seed", 2**32 - 1, low=0, control_after_generate=False),
        choice("start_from", **seldom),
        number("style_rate", 100, 0.1, low=0.01, **seldom),
        number("feature_weight", 1, 1e-4, **seldom),
        number("caption_dropout", 0.9, 0.01, **seldom),
        number("no_style_share", 0.9, 0.01, **seldom),
        choice("precision", **seldom),
        switch("gradient_checkpointing", **seldom),
        io.Int.Input(
            "preview_every",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between pictures of the student beside its teachers; 0 for none.",
            **seldom,
        ),
        int_input("save_every", 1_000_000, **seldom),
        io.Combo.Input(
            "preset",
            options=[CUSTOM, *PRESETS],
            default=CUSTOM,
            optional=True,
            tooltip="Fills in the settings for models of Stable Diffusion's size; changing one of them makes it 'custom'.",
        ),
        choice("memory", MEMORY, optional=True),
        int_input("accumulate", 4096, **new),
        choice("rate_schedule", **new),
        number("warmup", 1_000_000, 0.01, **new),
        number("adversarial_weight", 10, 1e-3, **new),
        number("adversarial_rate", 0.1, 1e-8, low=1e-8, **new),
        # a number's control has no null: 0 stands for it
        number("average", 100, 0.01, low=0, tooltip=doc("average").replace("null:", "0:"), **new),
        int_input("final_steps", 10_000_000, **new),
        int_input("final_images", 1_000_000, **new),
        choice("trainable", **new),
        int_input("lora_rank", 1024, **new),
        choice("optimizer", **new),
        choice("teachers_wait", **new),
        int_input("validation", 100_000, **new),
        switch("compile", **new),
        choice("sampling", **new),
        io.String.Input("bank_size", default=DEFAULTS.bank, tooltip=doc("bank_size"), **new),
    ]


def growing_inputs() -> list:
    """Of the nodes that go on with a DMM model: the student starts from that model, whatever else is set."""
    return [setting for setting in setting_inputs() if setting.id not in ("start_from", "bank_size")]


def guard_input():
    return number("guard", 0.95, 0.05)


def warm_start_input():
    return int_input("warm_start", 100_000)


def growth_input():
    return io.String.Input("growth", default=DEFAULTS.growth, tooltip=doc("growth"), advanced=True, optional=True)


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
