"""The words of the page's own code, ``web/js``: found in it, and written for it in the other languages."""

import json
import re

from .files import FOLDER
from .table import LANGUAGES, Table

SCRIPTS = FOLDER.parent / "web" / "js"
FILE = SCRIPTS / "words.json"
TABLE = FOLDER / "words.yaml"

CALL = re.compile(r"(?<!function )\bsay\(")
TEXT = re.compile(r'\bsay\(\s*"((?:[^"\\]|\\.)*)"')


def words() -> dict[str, str]:
    """Every English text that the code says -> the file that says it first. Raises ValueError where ``say`` is called with anything but a
    literal in double quotes: such a text could not be found."""
    found: dict[str, str] = {}
    for path in sorted(SCRIPTS.glob("*.js")):
        script = path.read_text("utf-8")
        texts = [json.loads(f'"{text}"') for text in TEXT.findall(script)]
        if len(texts) != len(CALL.findall(script)):
            raise ValueError(
                f"{path.name} calls say with something that is no text in double quotes: write the text there"
            )
        for text in texts:
            found.setdefault(text, path.name)
    return found


def words_json(table: Table) -> str:
    """What words.json holds: language -> English -> translation."""
    made = {language: {text: row[language] for text, row in table.items()} for language in LANGUAGES}
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"
