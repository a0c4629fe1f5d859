"""Named starting points for ``TrainConfig``: what the node's preset fills in, and what ``preset:`` in a YAML config stands for.

Learning rates are for SD-size models; the demo family's tiny ones want 2e-3. "draft" and "standard" hold what beat plain DMM there
(docs/experiments.md), but for Muon, which at SD size costs as much as 7 more samples a step. "paper" is arXiv:2504.12364 as published:
32 million samples, a month of one A100.
"""

from __future__ import annotations

from typing import Any

from .yaml_file import shown

PRESETS: dict[str, dict[str, Any]] = {
    "draft": {
        "steps": 1000,
        "batch_size": 8,
        "accumulate": 1,
        "lr": 5e-5,
        "style_lr_scale": 10.0,
        "lr_schedule": "constant",
        "warmup": 0.02,
        "lambda_feat": 0.001,
        "lambda_adv": 0.0,
        "init": "bank",
        "bank": "10%",
        "ema_gamma": 6.94,
        "sampling": "adaptive",
        "final_steps": 0,
    },
    "standard": {
        "steps": 20_000,
        "batch_size": 16,
        "accumulate": 1,
        "lr": 2e-5,
        "style_lr_scale": 10.0,
        "lr_schedule": "constant",
        "warmup": 0.02,
        "lambda_feat": 0.001,
        "lambda_adv": 0.0,
        "init": "bank",
        "bank": "10%",
        "ema_gamma": 6.94,
        "sampling": "adaptive",
        "final_steps": 0,
    },
    "paper": {
        "steps": 100_000,
        "batch_size": 320,
        "accumulate": 1,
        "lr": 1e-5,
        "style_lr_scale": 1.0,
        "lr_schedule": "constant",
        "warmup": 0,
        "lambda_feat": 0.001,
        "lambda_adv": 0.01,
        "init": "base",
        "ema_gamma": None,
        "sampling": "uniform",
        "final_steps": 10_000,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Settings of a preset. Raises ValueError for an unknown one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset is {shown(name)}: choose one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
