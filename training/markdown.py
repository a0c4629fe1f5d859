"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def cell(text: object) -> str:
    """A name may hold what a table is made of."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
