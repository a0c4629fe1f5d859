"""How many attention heads a UNet has, which its weights do not show.

SD1.x has 8 heads everywhere; SD2.x, SDXL and the demo family have 64 channels a head (``UNetConfig.usual_heads``). For sizes of other
models that is a guess, and files say otherwise: in LDM's words, ``num_heads`` or ``num_head_channels`` (arXiv:2112.10752), in diffusers'
``attention_head_dim``, which by an old mistake of naming is the number of heads, or ``num_attention_heads``, which is that too; in our
own files' metadata, ``dmm.heads``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .unet import UNetConfig, with_heads

HEADS = "dmm.heads"
"""Metadata key: the number of attention heads, one for all levels ("8") or one for each ("5,10,20")."""
METADATA = "its metadata"
"""``Checkpoint.heads_from`` where another tool's metadata say it."""
NAMES = ("num_heads", "num_head_channels", "num_attention_heads", "attention_head_dim")
"""What files call it. Each but the second counts heads."""
_RELEASED = {
    (320, (1, 2, 4, 4), 768, False),  # SD1.x
    (320, (1, 2, 4, 4), 1024, True),  # SD2.x
    (320, (1, 2, 4), 2048, True),  # SDXL
    (384, (1, 2, 4, 4), 1280, True),  # its refiner
}


def is_released(config: UNetConfig) -> bool:
    """Whether these are the widths of a released Stable Diffusion model, whose number of heads is known."""
    return (config.model_channels, config.channel_mult, config.context_dim, config.linear_proj) in _RELEASED


def heads_by_level(config: UNetConfig, said: Mapping[str, Any]) -> tuple[int, ...]:
    """The heads of each level by the first of ``NAMES`` in ``said`` that is not null; LDM's -1 is "not said". () where none is.

    The value is a whole number, or a list of one for each level. Raises ValueError, naming it, for anything else and for heads that do not
    divide the channels.
    """
    for name in NAMES:
        value = said.get(name)
        if value is None or value == -1:
            continue
        levels = len(config.channel_mult)
        each = list(value) if isinstance(value, (list, tuple)) else [value] * levels
        if len(each) != levels or not all(type(v) is int and v > 0 for v in each):
            raise ValueError(
                f"{name} is {str(value)[:40]!r}: expected a whole number from 1, or a list of {levels}, one for each level"
            )
        values = each
        if name == "num_head_channels":
            channels = [mult * config.model_channels for mult in config.channel_mult]
            values = [max(1, width // one) for width, one in zip(channels, each)]
            if odd := [channels[i] for i in config.attention_levels if values[i] * each[i] != channels[i]]:
                raise ValueError(f"{name} is {str(value)[:40]}, which does not divide the {odd[0]} channels of a level")
        try:
            with_heads(config, values)
        except ValueError as error:
            raise ValueError(f"{name} is {str(value)[:40]}: {error}") from error
        return tuple(values)
    return ()


def read_heads(text: str, config: UNetConfig) -> tuple[int, ...]:
    """The heads of each level from the metadata entry ``HEADS``. Raises ValueError for what is none, or is another model's."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", text):
        raise ValueError(
            f"metadata '{HEADS}' is {text[:40]!r}, expected numbers of attention heads: the file is damaged"
        )
    values = [int(number) for number in text.split(",")]
    try:
        return heads_by_level(config, {"num_heads": values if len(values) > 1 else values[0]})
    except ValueError as error:
        raise ValueError(f"metadata '{HEADS}' is {text[:40]!r} ({error}): the file is damaged") from error


def written_heads(config: UNetConfig) -> dict[str, str]:
    """Metadata that says the number of heads; {} for a released model's sizes with the heads that all of them have."""
    if is_released(config) and not config.num_heads:
        return {}
    heads = config.all_heads
    return {HEADS: str(heads[0]) if len(set(heads)) == 1 else ",".join(map(str, heads))}


def foreign_heads(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What other tools' metadata say of heads, by ``NAMES``: entries of their own, or in a ``config`` in JSON; {} for nothing."""
    said = {name: _value(metadata[name]) for name in NAMES if name in metadata}
    config = _value(metadata.get("config", "")) if len(metadata.get("config", "")) < 100_000 else None
    return said or ({name: config[name] for name in NAMES if name in config} if isinstance(config, dict) else {})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
