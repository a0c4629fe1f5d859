"""What a model predicts, its noise schedule, its clip skip and its attention heads, where the weights do not say it.

In this order: what the user says, in a config or behind the file's name (``sd15.safetensors,prediction=v,clip_skip=2``); the file's
``dmm.*`` metadata and the tensors ``v_pred`` and ``ztsnr``; a yaml beside the file (``sd15.yaml`` beside ``sd15.safetensors``), as
such models are shipped with; what trainers write into the metadata; a guess, which is said.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ...dmm_core.checkpoint import GUESS, V_MARK, Checkpoint
from ...dmm_core.heads import METADATA, heads_by_level
from ...dmm_core.heads import NAMES as NAMES_OF_HEADS
from ...dmm_core.unet import unet_config_from_state_dict
from ..config import MOST_SKIPPED, ModelSettings
from ..yaml_file import read_yaml

logger = logging.getLogger(__name__)

SETTING = "a setting"
OWN_WORDS = ("", "dmm.prediction", f"its tensor '{V_MARK}'")
"""``Checkpoint.prediction_from`` of what a yaml beside the file does not overrule: marks made for this very question."""
WEAK_WORDS = ("", GUESS, METADATA)
"""``Checkpoint.heads_from`` of what a yaml beside the file overrules."""
NAMES = tuple(field.name for field in fields(ModelSettings))
_COUNTS = {"clip_skip": MOST_SKIPPED, "num_heads": 9999, "num_head_channels": 9999}
"""Settings that are whole numbers from 1, and their bounds."""
_TAIL = re.compile(r"((?:,\s*\w+=[^,=]*)+)$")


def told(checkpoint: Checkpoint, settings: ModelSettings, by: str = SETTING) -> Checkpoint:
    """``checkpoint`` as ``settings`` say it is, where they say something. Raises ValueError for attention heads that the UNet cannot have,
    and for both ways of saying them at once."""
    if settings.num_heads or settings.num_head_channels:
        checkpoint = replace(checkpoint, heads=_heads(checkpoint, settings), heads_from=by)
    prediction = settings.prediction or checkpoint.prediction
    zero_snr = checkpoint.zero_snr if settings.zero_snr is None else settings.zero_snr
    other = (prediction, zero_snr) != (checkpoint.prediction, checkpoint.zero_snr)
    return replace(
        checkpoint,
        prediction=prediction,
        zero_snr=zero_snr,
        prediction_from=by if settings.prediction else checkpoint.prediction_from,
        overruled=checkpoint.overruled or other,
        clip_skip=settings.clip_skip or checkpoint.clip_skip,
    )


def _heads(checkpoint: Checkpoint, settings: ModelSettings) -> tuple[int, ...]:
    if settings.num_heads and settings.num_head_channels:
        raise ValueError(
            f"num_heads {settings.num_heads} and num_head_channels {settings.num_head_channels} are both given: say one of them"
        )
    said = {"num_heads": settings.num_heads, "num_head_channels": settings.num_head_channels}
    return heads_by_level(unet_config_from_state_dict(checkpoint.unet), said)


def guesses(models: Mapping[str, Checkpoint]) -> str:
    """What was guessed of models, by name, as a sentence for the user; "" where every file says it."""
    return "\n".join(filter(None, (_guessed_predictions(models), guessed_heads(models))))


def guessed_heads(models: Mapping[str, Checkpoint]) -> str:
    """As ``guesses``, of attention heads alone: of models that are no released size of Stable Diffusion."""
    guessed = [name for name, model in models.items() if model.heads_from == GUESS]
    if not guessed:
        return ""
    return (
        f"no file says how many attention heads these models have, which are no released size of Stable Diffusion: {', '.join(guessed)}. "
        "The usual number is taken (64 channels a head, or 8 heads in wide models of SD1's kind); if one paints noise or mush it has "
        "another: say so with num_heads or num_head_channels (docs/files.md)"
    )


def _guessed_predictions(models: Mapping[str, Checkpoint]) -> str:
    guessed = {name: model.prediction for name, model in models.items() if model.prediction_from == GUESS}
    if not guessed:
        return ""
    said = ", ".join(f"{name} {prediction}" for name, prediction in guessed.items())
    return (
        f"no file says what these models predict, it is guessed: {said}. If one paints noise it predicts the other: say so with "
        "prediction (docs/files.md)"
    )


def say_guesses(models: Mapping[str, Checkpoint]) -> None:
    """Log ``guesses``, where there are any."""
    if said := guesses(models):
        logger.info("%s", said)


# --- behind a file's name ---------------------------------------------------------------------------------------------


def split_settings(text: str | os.PathLike) -> tuple[str, ModelSettings]:
    """ "a.safetensors,prediction=v,clip_skip=2" -> ("a.safetensors", settings); a file's own name may have a comma in it.

    Raises ValueError for a setting that is not known, or has no such value.
    """
    text = os.fspath(text)
    tail = _TAIL.search(text)
    if not tail or Path(text).exists():
        return text, ModelSettings()
    given = dict(part.strip().split("=", 1) for part in tail[1].split(",")[1:])
    if not given.keys() & set(NAMES) and not Path(text[: tail.start()]).exists():
        return text, ModelSettings()  # a file that is not there, which is said when it is opened
    return text[: tail.start()], _settings(given)


def with_settings(file: str, settings: ModelSettings) -> str:
    """The text form, which ``split_settings`` reads."""
    said = asdict(settings).items()
    return file + "".join(f",{name}={str(value).lower()}" for name, value in said if value is not None)


def _settings(given: Mapping[str, str]) -> ModelSettings:
    values: dict[str, Any] = {}
    for name, value in given.items():
        value = value.strip()
        if name == "prediction" and value in ("eps", "v"):
            values[name] = value
        elif name == "zero_snr" and value in ("true", "false"):
            values[name] = value == "true"
        elif name in _COUNTS and re.fullmatch(r"0?[1-9][0-9]{0,3}", value) and int(value) <= _COUNTS[name]:
            values[name] = int(value)
        else:
            raise ValueError(
                f"'{name}={value}' behind a model's file: expected prediction=eps, prediction=v, zero_snr=true, zero_snr=false, "
                f"clip_skip=1 to {MOST_SKIPPED}, num_heads=8 or num_head_channels=64"
            )
    return ModelSettings(**values)


# --- a yaml beside the file -------------------------------------------------------------------------------------------


def with_yaml(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """``checkpoint`` as the yaml beside its file ``path`` says, if there is one: prediction, clip skip and attention heads, as LDM's
    inference configs have them. A file that cannot be read, or is something else, is left alone, and so are the heads of a UNet of another
    size. Raises ValueError for what is neither eps nor v, and for heads that do not divide the channels."""
    beside = path.with_suffix(".yaml")
    if path.suffix != ".safetensors" or not beside.is_file():
        return checkpoint
    try:
        config = read_yaml(beside)
    except ValueError as error:
        logger.warning("%s is not looked at: %s", beside.name, error)
        return checkpoint
    params = _inside(config, "model", "params")
    prediction = params.get("parameterization")
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"{beside}: parameterization is {str(prediction)[:40]!r}, only eps and v are supported")
    layer = _inside(params, "cond_stage_config", "params").get("layer_idx")
    counted = isinstance(layer, int) and not isinstance(layer, bool) and -MOST_SKIPPED <= layer <= -1
    skip = -layer if counted and isinstance(layer, int) and checkpoint.clip_skip is None else None
    if prediction and checkpoint.prediction_from in OWN_WORDS:
        if prediction != checkpoint.prediction:
            logger.warning(
                "%s says %s, %s says %s: the file counts", beside.name, prediction, path.name, checkpoint.prediction
            )
        prediction = None
    checkpoint = _with_yaml_heads(checkpoint, params, beside)
    return told(checkpoint, ModelSettings(prediction, clip_skip=skip), by=beside.name)


def _with_yaml_heads(checkpoint: Checkpoint, params: Mapping[str, Any], beside: Path) -> Checkpoint:
    """The attention heads by LDM's ``unet_config``, or ``network_config`` as SDXL's yamls have it. params: of the yaml's ``model``."""
    said = _inside(params, "unet_config", "params") or _inside(params, "network_config", "params")
    if checkpoint.heads_from not in WEAK_WORDS or not any(said.get(name) for name in NAMES_OF_HEADS):
        return checkpoint
    sizes = unet_config_from_state_dict(checkpoint.unet)
    for name, ours in (("model_channels", sizes.model_channels), ("context_dim", sizes.context_dim)):
        if said.get(name) not in (None, ours):
            logger.warning(
                "the attention heads in %s are not looked at: it is for another UNet (%s %s, and the weights have %d)",
                beside.name, name, str(said[name])[:40], ours,
            )  # fmt: skip
            return checkpoint
    try:
        heads = heads_by_level(sizes, said)
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from error
    return replace(checkpoint, heads=heads, heads_from=beside.name) if heads else checkpoint


def _inside(config: Any, *names: str) -> Mapping[str, Any]:
    """A mapping in a mapping, by its names; {} where there is none."""
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}
