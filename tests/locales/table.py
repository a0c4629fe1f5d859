"""The table of translations: read, and compared with the texts that the nodes show."""

from pathlib import Path

import yaml

LANGUAGES = ("zh", "zh-TW", "ja", "ko")
"""ComfyUI's names of the languages that the table translates into. English is in the Python code."""

Table = dict[str, dict[str, str]]
"""English text -> language -> translation."""


def read(path: Path) -> Table:
    """The table in a file. ValueError: a row that is not "en" and some of LANGUAGES, all of them texts, or an English text twice."""
    table: Table = {}
    for row in yaml.safe_load(path.read_text("utf-8")):
        english = row.pop("en", None)
        if not all(isinstance(text, str) and text.strip() for text in (english, *row.values())):
            raise ValueError(
                f"{path.name}: a text is missing or not a text (quote it) in the row of {english!r}: {row}"
            )
        if not row.keys() <= set(LANGUAGES):
            raise ValueError(
                f"{path.name}: the row of {english!r} has {sorted(row)}; languages are {', '.join(LANGUAGES)}"
            )
        if english in table:
            raise ValueError(f"{path.name}: {english!r} has two rows; keep one")
        table[english] = row
    return table


def missing(table: Table, shown: dict[str, str]) -> list[str]:
    """One line for each text of ``shown`` (text -> where) that lacks a translation: what it lacks, where it is, the text."""
    lacks = {text: [name for name in LANGUAGES if name not in table.get(text, {})] for text in shown}
    return [f"no {', '.join(names)} for {shown[text]}: {text!r}" for text, names in lacks.items() if names]


def unused(table: Table, shown: dict[str, str]) -> list[str]:
    """One line for each row of the table whose English text no node shows."""
    return [f"nothing says {text!r}: change or remove its row" for text in table if text not in shown]
