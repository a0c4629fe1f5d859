"""The recipe that the benches of single settings change: the demo family's without the style bank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...training.config import DistillConfig
from ...training.config_file import load_config

ROOT = Path(__file__).parents[2]
WITHOUT_BANK = {"init": "soup", "sampling": "uniform", "warmup": 30}
"""What training/configs/demo.yaml had until 2026-11-28, and the figures of docs/experiments.md from before are of."""


def demo_config() -> DistillConfig:
    """training/configs/demo.yaml with ``WITHOUT_BANK``."""
    config = load_config(ROOT / "training" / "configs" / "demo.yaml")
    config.train = dataclasses.replace(config.train, **WITHOUT_BANK)
    return config
