"""The scale of a LoRA that is not in its tensors: alpha, as trainers write it into the header or beside the file.

A LoRA is applied at alpha / rank. Most files have alpha as a tensor, ``<name>.alpha``, and that is what counts where it is there. PEFT and
diffusers keep it in a configuration (``LoraConfig``: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``), kohya's trainers also in
``ss_network_alpha`` (and ``conv_alpha`` of ``ss_network_args`` for kernels). ComfyUI's loader reads the tensors alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .lora_kinds import Entries, rank_of

logger = logging.getLogger(__name__)

CONFIGS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
"""Metadata that hold a configuration of PEFT as JSON; the first is diffusers'."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's own file, and its configuration beside it."""
SECTIONS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_SECTIONS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PEFT_PREFIX = "base_model.model."
_LIMIT = 1_000_000  # bytes of JSON
_PLAIN = re.compile(r"[\w.\-]+")


@dataclass
class LoraScales:
    """What one LoRA file says of alpha outside of its tensors. configs: (where it is said, section or "", its entries), in the order in
    which they are asked."""

    path: str
    configs: list[tuple[str, str, Mapping[str, Any]]]
    metadata: Mapping[str, str]
    unknown: list[str] = field(default_factory=list)
    other_rank: list[str] = field(default_factory=list)

    def completed(self, name: str, entries: Entries, kernel: int) -> Entries:
        """``entries`` with an alpha where they have none and the file says one. name: of the weight in the file; kernel: values of one
        channel of its kernel, 1 for a Linear. Raises ValueError for an alpha that is no number."""
        rank = rank_of(entries)
        if "alpha" in entries or not rank:
            return entries
        where, alpha = self._configured(name, rank) or self._kohya(kernel) or ("", None)
        if alpha is None:
            self.unknown.append(name)
            return entries
        return {**entries, "alpha": (where, torch.tensor(alpha))}

    def report(self) -> None:
        """Say of which weights nothing told the scale, and warn of ranks that contradict the tensors."""
        if self.unknown:
            logger.info(  # no warning: older files of diffusers are meant so
                "%s: the file does not say alpha for %d weights, neither as tensors nor in its header (the first: '%s'): they are applied "
                "at scale 1; if it was trained at another scale alpha / rank, give that as the strength",
                *(self.path, len(self.unknown), self.unknown[0]),
            )
        if self.other_rank:
            logger.warning("%s: %s; the tensors count", self.path, self.other_rank[0])

    def _configured(self, name: str, rank: int) -> tuple[str, float] | None:
        """(where, alpha over the tensors' rank) by a configuration of PEFT."""
        own, module = _section(name)
        for where, section, config in self.configs:
            if section not in ("", own) or "lora_alpha" not in config and not ("alpha" in config and "r" in config):
                continue
            patterns = _object(config.get("alpha_pattern"), f"{where}: alpha_pattern")
            said = _by_pattern(patterns, module, where)
            what = f"{where}: lora_alpha"
            alpha = _number(config.get("lora_alpha", config.get("alpha")) if said is None else said, what, self.path)
            ranks = _by_pattern(_object(config.get("rank_pattern"), f"{where}: rank_pattern"), module, where)
            stated = config.get("r") if ranks is None else ranks
            if isinstance(stated, (int, float, str)) and str(stated).strip().isdigit() and int(stated) != rank:
                self.other_rank.append(f"{where} says rank {stated} for '{name}', and its tensors have {rank}")
            rooted = str(config.get("use_rslora", False)).lower() == "true"  # the scale is alpha / sqrt(rank)
            return where, alpha * math.sqrt(rank) if rooted else alpha
        return None

    def _kohya(self, kernel: int) -> tuple[str, float] | None:
        """(where, alpha) by kohya's metadata; an alpha of 0 or "None" means the rank there, so scale 1."""
        for where in ("ss_network_alpha", "network_alpha"):
            said = self.metadata.get(where)
            if said is None or said.strip() in ("", "None", "Dynamic"):
                continue
            if kernel > 1 and "ss_network_args" in self.metadata:
                args = _object(_parsed(self.metadata["ss_network_args"], f"{self.path}: ss_network_args"), self.path)
                if "conv_alpha" in args:
                    where, said = "ss_network_args: conv_alpha", args["conv_alpha"]
            alpha = _number(said, where, self.path)
            return (where, alpha) if alpha else None
        return None


def lora_scales(path: str | os.PathLike, metadata: Mapping[str, str]) -> LoraScales:
    """What a LoRA file and, for PEFT's own file, the configuration beside it say. Raises ValueError for what is no JSON."""
    configs = [
        (name, section, config)
        for name in CONFIGS
        if name in metadata
        for section, config in _sections(
            _object(_parsed(metadata[name], f"{path}: metadata '{name}'"), f"{path}: metadata '{name}'")
        )
    ]
    if "lora_alpha" in metadata:
        configs.append(("the header", "", metadata))
    beside = Path(path).with_name(PEFT_CONFIG)
    if Path(path).name == PEFT_FILE and beside.is_file():
        with beside.open("rb") as file:
            text = file.read(_LIMIT + 1)
        configs += [(PEFT_CONFIG, *pair) for pair in _sections(_object(_parsed(text, str(beside)), str(beside)))]
    return LoraScales(str(path), configs, metadata)


def _sections(said: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(section, configuration) for each part of a model: diffusers writes "unet.lora_alpha", PEFT "lora_alpha"."""
    for section in SECTIONS:
        begin = f"{section}."
        inside = {key.removeprefix(begin): value for key, value in said.items() if key.startswith(begin)}
        if isinstance(said.get(section), dict):
            inside |= said[section]
        if inside:
            yield section, inside
    yield "", said


def _section(name: str) -> tuple[str, str]:
    """("unet", "down_blocks.0.attentions.0.proj_in") for a weight's name in a file."""
    for begin, section in KOHYA_SECTIONS.items():
        if name.startswith(begin):
            return section, name.removeprefix(begin)
    bare = name.removeprefix(_PEFT_PREFIX)
    section, dot, module = bare.partition(".")
    if dot and section in SECTIONS:
        return section, module
    return ("text_encoder" if bare.startswith(("text_model.", "text_encoders.")) else "unet"), bare


def _by_pattern(patterns: Mapping[str, Any], module: str, where: str) -> Any:
    """The value of the first pattern that the module's name ends with, as PEFT finds it; None without one.

    PEFT takes them as regular expressions; only names are read here. Raises ValueError for others: a stranger's may run for ever.
    """
    for pattern, value in patterns.items():
        bare = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _PLAIN.fullmatch(bare):
            raise ValueError(
                f"{where}: the pattern '{pattern[:100]}' is a regular expression, only names of modules are read"
            )
        whole, end = module.replace(".", "_"), bare.replace(".", "_")  # kohya's names have no dots
        same = (module, bare) if "." in module else (whole, end)
        if same[0] == same[1] or (
            not pattern.startswith("^") and same[0].endswith(("." if "." in module else "_") + same[1])
        ):
            return value
    return None


def _number(value: Any, where: str, path: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{path}: {where} is {str(value)[:100]!r}, expected a number: the scale of this LoRA is not known"
        )
    return number


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    raise ValueError(f"{where} is no JSON object: the scale of this LoRA is not known")


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text) if len(text) <= _LIMIT else []
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not valid JSON ({str(error)[:100]}): the scale of this LoRA is not known"
        ) from error
