"""A planner preset carried out under its own cap: what was predicted, what it takes."""

from __future__ import annotations

from ..benches.memory import PRESETS, Preset, carried_out
from ..training.families import SMALL
from .setup import Setup

TINY = Preset("tiny", SMALL, 8, 2, 8)


def name_of(preset: Preset) -> str:
    """As in ``stages.MEMORY``."""
    family = preset.family.lower().replace(".", "")
    return f"{family}-{preset.teachers}x{preset.gb}{'-adv' if preset.adversarial else ''}"


def measure(setup: Setup, name: str) -> None:
    named = {"tiny": TINY, **{name_of(preset): preset for preset in PRESETS}}
    setup.note(**carried_out(named[name], setup.device))
