"""Regions as a list in JSON: what the canvas of Style Mix writes, and what can be typed there.

    [{"style": "ink", "x": 0, "y": 0, "w": 0.5, "h": 1},
     {"style": "candy:0.7, pen:0.3", "x": 0.5, "y": 0.25, "w": 0.5, "h": 0.5, "feather": 0.1, "prompt": "a cat in the city"}]

Sides are shares of the canvas, from its left upper corner; a box may reach over the borders. The other keys, all optional:

    style     a name, shares or a schedule, as in ``style_value.parse_style``; "none"
    strength  of the style, 0 or more; 1
    weight    against overlapping regions, above 0; 1
    feather   width of the soft edge, as a share of the canvas's shorter side; 0.05
    fall_off  "feather" or "gaussian"; "feather"
    paint_on  "own crop" or "whole canvas"; "own crop"
    prompt    the region's own prompt; "" takes that of the background
    negative  the region's own negative prompt; "" takes that of the background
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .regions import Box, Region
from .style_value import NO_STYLE, Strength, Style, parse_style

Made = TypeVar("Made")

CROP, FULL = "own crop", "whole canvas"
FEATHER = 0.05
MOST = 100
"""Regions of one list."""
SIDES = ("x", "y", "w", "h")
NUMBERS: dict[str, tuple[float, float, float]] = {
    "strength": (1.0, 0.0, 4.0),
    "weight": (1.0, 0.01, 100.0),
    "feather": (FEATHER, 0.0, 1.0),
}
"""Of each number: what it is when left out, the least and the most."""
WORDS = {"style": NO_STYLE, "fall_off": "feather", "paint_on": CROP, "prompt": "", "negative": ""}
KEYS = (*SIDES, *NUMBERS, *WORDS)


@dataclass(frozen=True, eq=False)
class ListedRegion:
    """One entry of a list."""

    style: Style
    place: Region
    prompt: str = ""
    negative: str = ""


def parse_regions(text: str) -> tuple[ListedRegion, ...]:
    """The regions of a list, in its order; none for an empty text.

    Raises ValueError that names the region by its place in the list, from 1, the key and the value that cannot be used.
    """
    if not text.strip():
        return ()
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise ValueError(
            f"the list of regions is not JSON: {error.msg} in line {error.lineno}, column {error.colno}: {shown(line)}"
        ) from None
    except (RecursionError, ValueError):  # nested too deep, or a number with thousands of digits
        raise ValueError(f"the list of regions cannot be read: {shown(text)}") from None
    if not isinstance(entries, list):
        raise ValueError(f'the list of regions is {shown(entries)}: write [{{"style": "ink", "x": 0, ...}}, ...]')
    if len(entries) > MOST:
        raise ValueError(f"the list has {len(entries)} regions: at most {MOST} fit")
    return tuple(_region(f"region {i} of the list", entry) for i, entry in enumerate(entries, 1))


def _region(name: str, entry: object) -> ListedRegion:
    if not isinstance(entry, dict):
        raise ValueError(f'{name} is {shown(entry)}: write {{"style": "ink", "x": 0, "y": 0, "w": 0.5, "h": 1}}')
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        raise ValueError(f"{name} has {shown(unknown[0])}, which is no part of a region: these are {', '.join(KEYS)}")
    missing = [key for key in SIDES if key not in entry]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: a box has x, y, w and h, as shares of the canvas")
    x, y, w, h = (_number(name, entry, key) for key in SIDES)
    numbers = {key: _bounded(name, entry, key) for key in NUMBERS}
    words = {key: _word(name, entry, key) for key in WORDS}
    for key, choices in (("fall_off", ("feather", "gaussian")), ("paint_on", (CROP, FULL))):
        if words[key] not in choices:
            raise ValueError(f"{key} of {name} is {shown(words[key])}: choose {' or '.join(choices)}")
    place = _named(
        name,
        lambda: Region(
            Box(x, y, w, h),
            fall_off=words["fall_off"],
            weight=numbers["weight"],
            crop=words["paint_on"] == CROP,
            feather_share=numbers["feather"],
        ),
    )
    style = _named(name, lambda: parse_style(words["style"]))
    if numbers["strength"] != 1:
        style = Strength(style, numbers["strength"])
    return ListedRegion(style, place, words["prompt"].strip(), words["negative"].strip())


def _named(name: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _number(name: str, entry: dict, key: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:  # nor NaN
        raise ValueError(f"{key} of {name} is {shown(value)}: it must be a number, such as 0.5")
    return float(value)


def _bounded(name: str, entry: dict, key: str) -> float:
    default, least, most = NUMBERS[key]
    value = _number(name, entry, key) if key in entry else default
    if not least <= value <= most:
        raise ValueError(f"{key} of {name} is {value:g}: it must be in {least:g} to {most:g}")
    return value


def _word(name: str, entry: dict, key: str) -> str:
    value = entry.get(key, WORDS[key])
    if not isinstance(value, str):
        raise ValueError(f'{key} of {name} is {shown(value)}: it must be a text, such as "{WORDS[key] or "a cat"}"')
    return value


def shown(value: object) -> str:
    """A value in a message, in short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "\u2026"
