"""Styles as values, by name, so that they fit every model that knows the names; and their text form.

Every style comes down to *masses* m (N,), one number per style of the model: ``sum(m)`` is the strength s and ``m / s``
are the weights w of arXiv:2504.12364, Sec. 3.2. "No style" has no mass. Blends, fades and strengths are linear in m, so
fading from a style to none keeps the style and lowers its strength.

A style may change over the sampling *progress*: 0 at the noisiest timestep (t = 999), 1 at t = 0, the same percentage
that the host's "start_percent" inputs mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_STYLE = "none"

Vocabulary = Mapping[str, Sequence[float]]
"""Name of a style -> its weights over the N codes of a model: one-hot for a learned style, several for a named
blend."""


def vocabulary(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The vocabulary of a model with these learned styles."""
    return {name: tuple(float(i == j) for j in range(len(names))) for i, name in enumerate(names)}


def find_style(known: Sequence[str], wanted: str) -> str:
    """The style that a user means: its exact name, or the only one that differs in case and outer spaces alone.

    A number that is no name counts from 0, as graphs made for the authors' nodes have it.
    Raises ValueError naming the styles there are.
    """
    if wanted in known:
        return wanted
    alike = [name for name in known if name.strip().casefold() == wanted.strip().casefold()]
    is_number = re.fullmatch(r"\s*[0-9]{1,4}\s*", wanted) and int(wanted) < len(known)
    if (
        not alike and is_number and not any(name.strip().isdecimal() for name in known)
    ):  # else a number is a name, if a wrong one
        return known[int(wanted)]
    if len(alike) != 1:
        names = ", ".join([*known, NO_STYLE]) if known else f"none at all (a plain checkpoint); only '{NO_STYLE}' works"
        raise ValueError(f"unknown style '{wanted}'. The styles of this model: {names}")
    return alike[0]


def check_new_name(known: Sequence[str], name: str) -> str:
    """``name`` without outer spaces. Raises ValueError when it is empty, taken (case aside), or means no style."""
    name = name.strip()
    if not name:
        raise ValueError("the new style has an empty name: give it one")
    if name.casefold() == NO_STYLE:
        raise ValueError(f"a style cannot be called '{name}': that name means painting without a style")
    taken = [other for other in known if other.strip().casefold() == name.casefold()]
    if taken:
        raise ValueError(f"the model already has a style '{taken[0]}': choose another name")
    return name


class Style:
    """Base of all styles; values, never changed once made."""

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        """(N,) masses at a ``progress`` for item ``index`` of a batch. Raises ValueError for names that are not
        ``known``."""
        raise NotImplementedError

    def parts(self) -> Iterator[Style]:
        """This style and all that it is made of."""
        yield self

    def renamed(self, rename: Callable[[str], str]) -> Style:
        """The same style with each name replaced by ``rename(name)``."""
        raise NotImplementedError

    @property
    def items(self) -> int:
        """Number of styles for the items of a batch; 1 when all items have the same."""
        return max((len(part.styles) for part in self.parts() if isinstance(part, PerItem)), default=1)

    @property
    def changes(self) -> bool:
        """Whether it depends on the sampling progress."""
        return any(isinstance(part, Schedule) for part in self.parts())

    def check(self, known: Vocabulary) -> None:
        """Raise ValueError unless a model that knows these styles can paint it."""
        for part in self.parts():
            if isinstance(part, Mix):
                part.masses(known)


@dataclass(frozen=True)
class Mix(Style):
    """Styles by name with their shares, which sum to 1; a share of "none" lowers the strength."""

    shares: tuple[tuple[str, float], ...]

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        total = [0.0] * len(next(iter(known.values()), ()))
        for name, share in self.shares:
            if name != NO_STYLE:
                codes = known[find_style(list(known), name)]
                total = [m + share * w for m, w in zip(total, codes)]
        return total

    def renamed(self, rename: Callable[[str], str]) -> Style:
        return Mix(tuple((rename(name), share) for name, share in self.shares))

    def __str__(self) -> str:
        if len(self.shares) == 1:
            return self.shares[0][0]
        return ", ".join(f"{name}:{share:.3g}" for name, share in self.shares)


@dataclass(frozen=True)
class Strength(Style):
    """Another style with its strength multiplied."""

    style: Style
    strength: float

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"the strength of a style is {self.strength}: it must be 0 or more")

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        return [self.strength * m for m in self.style.masses(known, progress, index)]

    def parts(self) -> Iterator[Style]:
        yield self
        yield from self.style.parts()

    def renamed(self, rename: Callable[[str], str]) -> Style:
        return replace(self, style=self.style.renamed(rename))

    def __str__(self) -> str:
        return f"{self.style} x{self.strength:.3g}"


@dataclass(frozen=True)
class Blend(Style):
    """``share`` of ``second`` in ``first``: 0 is the first, 1 the second; beyond, the one exaggerates its
    difference."""

    first: Style
    second: Style
    share: float

    def __post_init__(self):
        if not math.isfinite(self.share):
            raise ValueError(f"the share of a blend is {self.share}: it must be a number")

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        pairs = zip(self.first.masses(known, progress, index), self.second.masses(known, progress, index))
        return [(1 - self.share) * a + self.share * b for a, b in pairs]

    def parts(self) -> Iterator[Style]:
        yield self
        yield from self.first.parts()
        yield from self.second.parts()

    def renamed(self, rename: Callable[[str], str]) -> Style:
        return replace(self, first=self.first.renamed(rename), second=self.second.renamed(rename))

    def __str__(self) -> str:
        return f"{self.first} > {self.second} {self.share:.0%}"


@dataclass(frozen=True)
class Change:
    """A linear fade to ``style`` between two progresses; a switch when they are equal."""

    start: float
    end: float
    style: Style


@dataclass(frozen=True)
class Schedule(Style):
    """``first``, then each change in turn."""

    first: Style
    then: tuple[Change, ...]

    def __post_init__(self):
        before = 0.0
        for change in self.then:
            if not before <= change.start <= change.end <= 1:
                raise ValueError(
                    f"a change of style from {change.start:.0%} to {change.end:.0%} is not between {before:.0%}, where "
                    "the one before ends, and 100%: give the changes in the order of the steps"
                )
            before = change.end

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        now = self.first.masses(known, progress, index)
        for change in self.then:
            if progress < change.start:
                break
            span = change.end - change.start
            share = min((progress - change.start) / span, 1.0) if span > 0 else 1.0
            now = [(1 - share) * a + share * b for a, b in zip(now, change.style.masses(known, progress, index))]
        return now

    def parts(self) -> Iterator[Style]:
        yield self
        yield from self.first.parts()
        for change in self.then:
            yield from change.style.parts()

    def renamed(self, rename: Callable[[str], str]) -> Style:
        then = tuple(replace(change, style=change.style.renamed(rename)) for change in self.then)
        return Schedule(self.first.renamed(rename), then)

    def __str__(self) -> str:
        return "; ".join([str(self.first), *(f"{c.start:.0%}: {c.style}" for c in self.then)])


@dataclass(frozen=True)
class PerItem(Style):
    """One style per picture of a batch; a larger batch begins again with the first."""

    styles: tuple[Style, ...]

    def __post_init__(self):
        if not self.styles:
            raise ValueError("a batch of styles is empty: give at least one")

    def masses(self, known: Vocabulary, progress: float = 0.0, index: int = 0) -> list[float]:
        return self.styles[index % len(self.styles)].masses(known, progress, index)

    def parts(self) -> Iterator[Style]:
        yield self
        for style in self.styles:
            yield from style.parts()

    def renamed(self, rename: Callable[[str], str]) -> Style:
        return PerItem(tuple(style.renamed(rename) for style in self.styles))

    def __str__(self) -> str:
        return " | ".join(map(str, self.styles))


NONE = Mix(((NO_STYLE, 1.0),))


def mix(shares: Mapping[str, float]) -> Mix:
    """Named styles in these proportions, made to sum to 1. Raises ValueError when they cannot be."""
    if not shares:
        raise ValueError("a blend of styles is empty: name at least one")
    for name, share in shares.items():
        if not math.isfinite(share):
            raise ValueError(f"the share of style '{name}' is {share}: it must be a number")
    total = math.fsum(shares.values())
    if total <= 1e-9:
        raise ValueError(
            f"the shares of {', '.join(shares)} sum to {total:g}: a blend needs a sum above 0"
            f" (write '{NO_STYLE}' for no style)"
        )
    return Mix(tuple((name, share / total) for name, share in shares.items()))


def style_rows(style: Style, known: Vocabulary, progress: float = 0.0, batch: int = 1) -> Tensor:
    """A style at one moment as style rows (batch, N+1), see ``dmm_core.style``; equal rows come as (1, N+1).

    Raises ValueError for unknown names, and where weights of opposite signs cancel each other.
    """
    size = len(next(iter(known.values()), ()))
    rows = torch.zeros(min(batch, style.items), size + 1)
    for index, row in enumerate(rows):
        masses = style.masses(known, progress, index)
        strength = math.fsum(masses)
        if any(abs(m) > 1e-9 for m in masses):
            if strength <= 1e-9:
                raise ValueError(f"the weights of '{style}' sum to {strength:g}: a style needs a sum above 0")
            row[:-1] = torch.tensor(masses, dtype=torch.float64) / strength
            row[-1] = strength
    if len(rows) == 1 or len(rows) == batch:
        return rows
    return rows[torch.arange(batch) % len(rows)]


def progress_at(t: float) -> float:
    """Timestep 999 .. 0 -> sampling progress from 0 to just under 1: what begins at 100% never begins, as in the
    host."""
    return min(1 - t / 999, 1 - 1e-9)


# --- the text form ----------------------------------------------------------------------------------------------------

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TIME = re.compile(rf"\s*({_NUMBER})\s*%\s*(?:-\s*({_NUMBER})\s*%\s*)?:(.*)", re.DOTALL)
_WEIGHT = re.compile(rf"(.*):\s*({_NUMBER})\s*", re.DOTALL)
_QUOTES = "\"'"


def parse_style(text: str) -> Style:
    """A style from text.

    - ``ink`` or ``ink:0.7, neon:0.3``: one style, or shares of several (made to sum to 1);
    - ``0%: flat; 60%: ink``: flat, from 60% of the sampling on ink; ``40%-60%: ink`` fades in between.

    A name with one of ``, ; : %`` or a line break in it that reads as something else goes into quotes: ``"a, b":0.5``.
    ``none`` is no style. New lines count as ";". Raises ValueError that quotes what cannot be read.
    """
    segments = [s for s in _split(text, ";\n") if s.strip()]
    if not segments:
        raise ValueError("the style is empty: write a name, such as ink, or shares, such as ink:0.7, pen:0.3")
    first, changes = None, []
    for number, segment in enumerate(segments):
        timed = _TIME.fullmatch(segment)
        if timed is None:
            if number:
                raise ValueError(
                    f"'{segment.strip()}' lacks the moment it begins at: write it as 50%: {segment.strip()}"
                )
            first = _parse_shares(segment)
            continue
        start = float(timed[1]) / 100
        end = start if timed[2] is None else float(timed[2]) / 100
        if not 0 <= start <= end <= 1:
            raise ValueError(f"'{segment.strip()}' does not begin and end between 0% and 100%")
        style = _parse_shares(timed[3])
        if first is None and end == 0:
            first = style
        else:
            changes.append(Change(start, end, style))
    if first is None:
        first = NONE
    return Schedule(first, tuple(changes)) if changes else first


def _parse_shares(text: str) -> Mix:
    shares: dict[str, float] = {}
    for entry in _split(text, ","):
        if not entry.strip():
            raise ValueError(f"a style's name is missing in '{text.strip()}': write names with commas between them")
        weighted = _WEIGHT.fullmatch(entry)
        name, share = (weighted[1], float(weighted[2])) if weighted else (entry, 1.0)
        name = _unquote(name.strip())
        if not name:
            raise ValueError(f"a style's name is missing in '{entry.strip()}': write it as name:0.5")
        if name in shares:
            raise ValueError(f"style '{name}' is given twice in '{text.strip()}': add its shares up")
        shares[name] = share
    return mix(shares)


def quote_name(name: str) -> str:
    """A style's name as ``parse_style`` reads it back."""
    plain = not set(name) & set(",;%\n" + _QUOTES) and name == name.strip() and not _WEIGHT.fullmatch(name)
    if plain:
        return name
    quote = next((q for q in _QUOTES if q not in name), None)
    if quote is None:
        raise ValueError(
            f"style name {name!r} holds both kinds of quotes and cannot be written in a text: rename the style"
        )
    return f"{quote}{name}{quote}"


def _unquote(name: str) -> str:
    return name[1:-1] if len(name) >= 2 and name[0] == name[-1] and name[0] in _QUOTES else name


def _split(text: str, separators: str) -> list[str]:
    """``text`` at its separators, except inside quotes; a quote counts at the start of a name only (the cat's eye)."""
    pieces, quote, fresh = [""], "", True
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif fresh and letter in _QUOTES:
            quote = letter
        elif letter in separators:
            pieces.append("")
            fresh = True
            continue
        if not letter.isspace():
            fresh = letter in ",;:"
        pieces[-1] += letter
    if quote:
        raise ValueError(f"a quote {quote} is opened and not closed in '{text.strip()}'")
    return pieces
