"""Reading the configuration of a run (``config``) from YAML, with words for what is wrong in it."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import AttackConfig, DataSpec, DistillConfig, LoraSpec, TeacherSpec, TrainConfig
from .fields import check_fields
from .presets import preset
from .yaml_file import Place, read_document, shortened, shown

# What other trainers call a setting, where that is not near enough to ours for the hint in the error.
OTHER_NAMES = {
    "learning_rate": "lr",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "mixed_precision": "precision",
    "max_grad_norm": "grad_clip",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup",
}


def load_config(path: str | Path, grown: bool = False) -> DistillConfig:
    """Read and check a YAML config. grown: of a run that goes on with a DMM model, where a preset has no say in how a student starts.

    Raises ValueError naming the file and the key that is wrong.
    """
    path = Path(path)
    raw, written = read_document(path)
    try:
        train = raw.get("train") if isinstance(raw, Mapping) else None
        if grown and isinstance(train, Mapping) and "preset" in train:
            raw = {**raw, "train": {"init": TrainConfig.init, "bank": TrainConfig.bank, **train}}
        config = _build(DistillConfig, raw, "config", (), written=written)
        check_fields(config)  # before paths are made of texts
        check_fields(config.data, "data.")
        check_fields(config.train, "train.")
        for i, teacher in enumerate(config.teachers):
            check_fields(teacher, f"teachers[{i}].")
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
        raise ValueError(f"{path.name}: {shortened(str(error), 1000)}") from error
    return config


def _build(cls: Any, raw: Any, where: str, place: Place, *, written: Mapping[Place, str]) -> Any:
    """A dataclass from a mapping; unknown and missing keys are named, with the nearest known one.

    place, written: where the mapping is in the file, and how what is no text to YAML is written there.
    """
    if raw is None:
        raise ValueError(f"{where} is empty: give settings under it, or leave it out")
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {type(raw).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if not isinstance(key, str):
            raise ValueError(f"{where} has a setting that YAML reads as {_taken_for(key)}, not as a name: {shown(key)}")
        if key not in fields and not (cls is TrainConfig and key == "preset"):
            near = (
                [OTHER_NAMES[key]]
                if OTHER_NAMES.get(key) in fields
                else difflib.get_close_matches(str(key), fields, n=1)
            )
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ValueError(f"{where} has an unknown setting '{key[:60]}'{hint}")
    _check_texts(fields, raw, "" if where == "config" else f"{where}.", place, written=written)
    values = dict(raw)
    nested = {"data": DataSpec, "train": TrainConfig, "attack": AttackConfig}
    for key, kind in nested.items():
        if cls is DistillConfig and key in values:
            values[key] = _build(kind, values[key], key, (*place, key), written=written)
    if cls is DistillConfig and isinstance(values.get("teachers"), list):
        values["teachers"] = [
            _build(TeacherSpec, t, f"teachers[{i}]", (*place, "teachers", i), written=written)
            for i, t in enumerate(values["teachers"])
        ]
    if cls is TeacherSpec and "loras" in values:
        if not isinstance(values["loras"], list):
            raise ValueError(f"{where}.loras must be a list, each of a file and, if you like, a strength")
        values["loras"] = [
            _build(LoraSpec, lora, f"{where}.loras[{i}]", (*place, "loras", i), written=written)
            for i, lora in enumerate(values["loras"])
        ]
        for lora in values["loras"]:
            lora.check()
    if cls is TrainConfig and "preset" in values:
        values = {**preset(values.pop("preset")), **values}
    values = {k: _number(str(fields[k].type), v) for k, v in values.items()}
    # "description:" with nothing behind it is null in YAML
    values = {k: "" if v is None and fields[k].default == "" else v for k, v in values.items()}
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{where} lacks the settings {', '.join(missing)}")
    return cls(**values)


def _check_texts(
    fields: Mapping[str, dataclasses.Field],
    raw: Mapping[str, Any],
    prefix: str,
    place: Place,
    *,
    written: Mapping[Place, str],
) -> None:
    """Raises ValueError for a value that is meant as text and that YAML reads as something else, saying as what."""
    for key, value in raw.items():
        kind = str(fields[key].type) if key in fields else ""
        empty_is_default = value is None and (fields[key].default in ("", None) if key in fields else True)
        if kind in ("str", "str | None") and not isinstance(value, str) and not empty_is_default:
            raise ValueError(_no_text(f"{prefix}{key}", value, written.get((*place, key))))
        if kind == "list[str]" and isinstance(value, list):
            for i, one in enumerate(value):
                if not isinstance(one, str):
                    raise ValueError(_no_text(f"{prefix}{key}[{i}]", one, written.get((*place, key, i))))


def _no_text(name: str, value: Any, written: str | None) -> str:
    """The message for a value that is no text. written: as in the file, None for a list or mapping."""
    if value is None:
        return f"{name} is empty, which YAML reads as null: expected text"
    if written is None:
        return f"{name} is {shown(value)}: expected text"
    said = written[:60]
    return f"{name} is {said}, which YAML reads as {_taken_for(value)}: expected text, put it into quotes: '{said}'"


def _taken_for(value: Any) -> str:
    """What YAML made of a value, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {int: "a number", float: "a number", datetime.datetime: "a date", datetime.date: "a date", bytes: "bytes"}
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _number(kind: str, value: Any) -> Any:
    """YAML 1.1 reads '1e-5' as text and '2' as an int: give float settings their floats."""
    if "float" in kind and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    if kind.startswith("tuple") and isinstance(value, list):
        return tuple(_number("float", v) for v in value)
    return value
