"""What a field of a configuration means, stands beside it: a sentence, its bounds or choices, its unit.

    steps: int = setting(100_000, "Optimiser steps.", unit="steps", low=1)

From there come the errors of a wrong value (``check_fields``), the tooltips of the nodes, ``--help`` and the tables of the docs
(``describe``), so that nothing is said, and no default stands, in two places.

These are dataclasses with metadata, and not pydantic models, for two reasons: the headless command line must need nothing beyond
requirements.txt, where pydantic is not, and ``dataclasses.asdict(config)`` goes as JSON into a run's config and identity, which must
stay bitwise what it was or runs written before would not go on.

Kinds of values that are known, by the field's annotation as text (the modules have ``from __future__ import annotations``): int, float,
str, bool, tuple[float, float], list[...]; ``| None`` allows null, ``int | str`` and ``float | str`` allow the words in ``choices`` beside
a number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .yaml_file import shown

KEY = "setting"
"""Of a field's metadata."""


@dataclass(frozen=True)
class About:
    """What is known of a field. low, high: bounds that are allowed themselves; above, below: bounds that are not. choices: the values
    that are allowed. expected: what an error says instead of what follows from the bounds; why: what it adds to that."""

    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    expected: str = ""
    why: str = ""

    def holds(self, value: Any) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


class Row(NamedTuple):
    """A field in a table. default: as YAML writes it, "" for a field that must be given; values: what is allowed, in words."""

    name: str
    default: str
    unit: str
    values: str
    doc: str


def about(doc: str, **more: Any) -> Mapping[str, About]:
    """The metadata of a field that has no plain default; ``more``: the other fields of ``About``."""
    return {KEY: About(doc, **more)}


def setting(default: Any, doc: str, **more: Any) -> Any:
    """A dataclass field with its default and what is known of it; ``more``: the other fields of ``About``."""
    return field(default=default, metadata=about(doc, **more))


def about_field(cls: type, name: str) -> About:
    """What stands beside the field ``name`` of a dataclass. KeyError for a field that is not there or says nothing."""
    return {f.name: f for f in dataclasses.fields(cls)}[name].metadata[KEY]


def default_of(cls: type, name: str) -> Any:
    """The default of a field. KeyError for a field that is not there or has to be given."""
    found = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    return found[name]


def check_fields(config: Any, prefix: str = "") -> None:
    """Raises ValueError for the first field whose value is not what stands beside it: "steps is 0: expected a whole number from 1".

    What is in a list, and nested configurations, are left to their owners. prefix: goes before the field's name, as in "attack.".
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if KEY in f.metadata and not accepts(f, value):
            raise ValueError(f"{prefix}{f.name} is {shown(value)}: {expectation(f)}")


def accepts(f: dataclasses.Field, value: Any) -> bool:
    """Whether a field may have this value."""
    known, kind, optional = f.metadata[KEY], *_kind(f)
    if value is None:
        return optional
    if isinstance(value, str) and known.choices:
        return value in known.choices
    if kind in ("int", "int | str"):
        return is_int(value) and known.holds(value)
    if kind in ("float", "float | str"):
        return is_number(value) and known.holds(value)
    if kind.startswith("tuple[float"):
        fits = isinstance(value, (tuple, list)) and len(value) == kind.count("float")
        return fits and all(is_number(v) and known.holds(v) for v in value)
    if kind.startswith("list["):
        return isinstance(value, list)
    plain = {"bool": bool, "str": str}
    return kind not in plain or (isinstance(value, plain[kind]) and not known.choices)


def expectation(f: dataclasses.Field) -> str:
    """What an error says after the colon, such as "expected a whole number from 1"."""
    known, kind, optional = f.metadata[KEY], *_kind(f)
    bounds = {name: getattr(known, name) for name in ("low", "above", "high", "below")}
    given = {name: value for name, value in bounds.items() if value is not None}
    words = {"low": "from", "above": "from above", "high": "to", "below": "to below"}
    within = "".join(f" {words[name]} {value}" for name, value in given.items())
    if known.expected:
        said = f"expected {known.expected}"
    elif known.choices:
        said = f"choose one of {', '.join(known.choices)}"
    elif optional and given == {"above": 0}:
        said = "expected > 0 or null"
    elif kind == "float" and given == {"above": 0}:
        said = "expected a positive number"
    elif kind == "float" and given == {"low": 0}:
        said = "expected 0 or more"
    elif kind == "float":
        said = f"expected a {'share' if known.unit == 'share' else 'number'}{within}{' or null' * optional}"
    else:
        said = "expected " + {"int": f"a whole number{within}", "bool": "true or false", "str": "text"}.get(kind, kind)
    return said + (f": {known.why}" if known.why else "")


def describe(cls: type) -> list[Row]:
    """The fields of a configuration, in its order, for help texts and tables."""
    rows = []
    for f in dataclasses.fields(cls):
        known = f.metadata[KEY]
        values = ", ".join(known.choices) if known.choices and not known.expected else expectation(f).split(":")[0]
        rows.append(
            Row(f.name, _default_text(f), known.unit, values.removeprefix("expected ").removeprefix("a "), known.doc)
        )
    return rows


def _default_text(f: dataclasses.Field) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return "[]" if f.default_factory is list else "{}"
    if f.default is dataclasses.MISSING:
        return ""
    return f.default if isinstance(f.default, str) and f.default else json.dumps(f.default)


def table(cls: type) -> str:
    """The same as a table in Markdown: name, default, what is allowed with its unit, the sentence."""
    lines = ["| setting | default | values | |", "| --- | --- | --- | --- |"]
    for row in describe(cls):
        unit = f" ({row.unit})" if row.unit and row.unit not in row.values else ""
        default = f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.name}` | {default} | {row.values}{unit} | {row.doc} |")
    return "\n".join(lines)


def is_int(value: Any) -> bool:
    """Whether a value is a whole number of 64 bits; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _kind(f: dataclasses.Field) -> tuple[str, bool]:
    """("float", True) for an annotation "float | None"."""
    text = str(f.type)
    return text.removesuffix(" | None"), text.endswith(" | None")
