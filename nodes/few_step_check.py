"""A few-step model says so, in words, where it is sampled otherwise than it has learnt. It paints all the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from ..training.loop.few_steps import FEW_STEPS
from .preview import send_text

logger = logging.getLogger(__name__)

KEY = "dmm few steps"


def install(patcher, recipe: Mapping[str, Any]) -> None:
    """Let a fresh MODEL of a few-step file say so, on the node that samples, where it is asked to paint otherwise than it has learnt."""
    told = recipe.get(FEW_STEPS)
    if not isinstance(told, Mapping):
        return

    def say(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removeprefix("sample_")
        if words := what_is_wrong(told, name, len(sigmas) - 1, getattr(guider, "cfg", None)):
            logger.warning("%s", words)
            context = get_executing_context()
            send_text(words, context and context.node_id)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, say)


def what_is_wrong(told: Mapping[str, Any], sampler: str, steps: int, cfg: float | None) -> str:
    """In words, where a few-step model (``few_steps`` of its recipe) is sampled otherwise than it has learnt; "" where all is well.
    sampler: "" and cfg: None where they are not known."""
    wrong = []
    if sampler and sampler != told.get("sampler"):
        wrong.append(f"sampler {told.get('sampler')} (not {sampler})")
    if steps != told.get("steps"):
        wrong.append(f"{told.get('steps')} steps (not {steps})")
    if cfg is not None and not math.isclose(cfg, told.get("cfg", 1.0)):
        wrong.append(f"cfg {told.get('cfg', 1.0):g} (not {cfg:g})")
    return f"this few-step model paints best with {', '.join(wrong)}" if wrong else ""
