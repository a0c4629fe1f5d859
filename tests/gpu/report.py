"""Writes the part "On a GPU" of docs/performance.md: ``make gpu-report``.

Rows of CUDA devices in --rows are taken over into docs/gpu-rows.json, which is committed, so that figures stay when the machine is gone;
the tables are made from that file alone. A stage without a row there says "not run".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...dmm_core.files import atomic_write
from ...training.markdown import table
from .rows import CUT_OFF, NAME, Row, in_a_cell, lines_table, read_rows, with_row, write_rows
from .runner import FOLDER, ROOT
from .stages import stages

DOC, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu-rows.json"
BEGIN, END = "<!-- make gpu-report writes from here -->", "<!-- to here -->"
SIZE = "sd15"


def generated(rows: Sequence[Row]) -> str:
    """A table for each device, and one of stages that are not run where there is none."""
    rows = [row for row in rows if row.size == SIZE]
    parts = []
    for device in dict.fromkeys(row.device for row in rows) or [""]:
        of = {row.stage: row for row in rows if row.device == device}
        lines = []
        for stage in stages(SIZE):
            row = of.get(stage.name)
            lines.append([stage.name, stage.what, row.status if row else "not run", in_a_cell(row) if row else ""])
        if of:
            versions = next(iter(of.values())).versions
            parts.append(f"{device}; {', '.join(f'{name} {number}' for name, number in versions.items())}")
        parts.append(table(["stage", "what", "status", "figures"], lines))
        for row in of.values():
            parts += [f"{row.stage}: {title}\n\n{lines_table(found)}" for title, found in row.tables.items() if found]
    return "\n\n".join(parts)


def with_generated(text: str, part: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Raises ValueError where the text lacks the two marks."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the text has no part between {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def write_part(part: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Into docs/performance.md, between the marks."""
    text = with_generated(DOC.read_text(encoding="utf-8"), part, marks)
    with atomic_write(DOC) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=FOLDER / NAME)
    args = parser.parse_args()
    kept = read_rows(KEPT)
    for row in read_rows(args.rows):
        if row.device != "CPU" and row.status != CUT_OFF:
            kept = with_row(kept, row)
    if kept:
        write_rows(KEPT, kept)
    write_part(generated(kept))
    print(f"{DOC.relative_to(ROOT)}: {len(kept)} rows of GPUs")


if __name__ == "__main__":
    main()
