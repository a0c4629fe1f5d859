"""The rows that stages leave: one JSON file, and the same as tables in Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...dmm_core.files import atomic_write
from ...training.markdown import table

OK, FAILED, TIMED_OUT, NOT_HERE, CUT_OFF = "ok", "failed", "timed out", "not possible here", "cut off"
NAME = "rows.json"


@dataclass(frozen=True)
class Row:
    """What one stage found on one device.

    status: "ok", "failed", "timed out", "not possible here", or "cut off" while it runs and where the whole call was ended; words: why,
    where it is not "ok". figures: {name: number or text}; tables: {title: lines, each of them {column: value}}; versions: of the
    driver's side of the machine. seconds: of the whole process, the imports included. stale: to be measured once more; until then it
    stands for what was found before, and where that is cut off, its figures do.
    """

    stage: str
    size: str
    device: str
    status: str
    words: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.stage, self.size, self.device


def read_rows(path: Path) -> list[Row]:
    """Of a file that ``write_rows`` made; none where there is no file. Raises ValueError, naming the file, for one that is damaged."""
    if not path.exists():
        return []
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, list):
            raise TypeError(f"expected a list, found {type(read).__name__}")
        return [Row(**one) for one in read]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged ({error}): put back a copy of it, or move it away to begin anew"
        ) from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def with_row(rows: Iterable[Row], new: Row) -> list[Row]:
    """The new row stands where the one of the same stage, size and device stood, else at the end."""
    found = {row.key: row for row in rows}
    found[new.key] = new
    return list(found.values())


def shown(value: Any) -> str:
    """A figure for people: four digits of what is not whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_a_cell(row: Row) -> str:
    """The figures of a row in one cell of a table, or why there are none."""
    figures = "; ".join(f"{name} {shown(value)}" for name, value in row.figures.items())
    return "; ".join(part for part in (row.words, figures) if part)


def as_markdown(rows: Iterable[Row]) -> str:
    """One table of all rows, then the tables that stages brought with them."""
    rows = list(rows)
    lines = [[row.stage, row.size, row.device, row.status, f"{row.seconds:.0f}", in_a_cell(row)] for row in rows]
    parts = [table(["stage", "size", "device", "status", "s", "figures"], lines)]
    for row in rows:
        parts += [f"{row.stage}: {title}\n\n{lines_table(lines)}" for title, lines in row.tables.items() if lines]
    return "\n\n".join(parts) + "\n"


def lines_table(lines: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    return table(columns, [[shown(line.get(name, "")) for name in columns] for line in lines])
