"""What a model predicts, its noise schedule and its clip skip, where the weights do not say it.

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
from ..config import MOST_SKIPPED, ModelSettings
from ..yaml_file import read_yaml

logger = logging.getLogger(__name__)

SETTING = "a setting"
OWN_WORDS = ("", "dmm.prediction", f"its tensor '{V_MARK}'")
"""``Checkpoint.prediction_from`` of what a yaml beside the file does not overrule: marks made for this very question."""
NAMES = tuple(field.name for field in fields(ModelSettings))
_TAIL = re.compile(r"((?:,\s*\w+=[^,=]*)+)$")


def told(checkpoint: Checkpoint, settings: ModelSettings, by: str = SETTING) -> Checkpoint:
    """``checkpoint`` as ``settings`` say it is, where they say something."""
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


def guesses(models: Mapping[str, Checkpoint]) -> str:
    """What was guessed of models, by name, as a sentence for the user; "" where every file says it."""
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
        elif name == "clip_skip" and re.fullmatch(r"[0-9]{1,2}", value) and 1 <= int(value) <= MOST_SKIPPED:
            values[name] = int(value)
        else:
            raise ValueError(
                f"'{name}={value}' behind a model's file: expected prediction=eps, prediction=v, zero_snr=true, zero_snr=false or "
                f"clip_skip=1 to {MOST_SKIPPED}"
            )
    return ModelSettings(**values)


# --- a yaml beside the file -------------------------------------------------------------------------------------------


def with_yaml(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """``checkpoint`` as the yaml beside its file ``path`` says, if there is one: prediction and clip skip, as LDM's inference configs have
    them. A file that cannot be read, or is something else, is left alone. Raises ValueError for what is neither eps nor v."""
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
    return told(checkpoint, ModelSettings(prediction, clip_skip=skip), by=beside.name)


def _inside(config: Any, *names: str) -> Mapping[str, Any]:
    """A mapping in a mapping, by its names; {} where there is none."""
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}
