"""The words of ``web/js`` in other languages: all there, none left over, and the same places to fill."""

import re

import pytest

from ..locales import words as of_page
from ..locales.table import LANGUAGES, missing, read, unused
from ..locales.words import FILE, SCRIPTS, TABLE, words, words_json

PLACE = re.compile(r"\{\w+\}")


def test_every_text_of_the_page_has_all_translations():
    table, said = read(TABLE), words()
    assert not missing(table, said)
    assert not unused(table, said)
    assert len(said) > 80


def test_the_file_is_what_the_table_gives():
    assert FILE.read_text("utf-8") == words_json(read(TABLE)), "run python -m comfyui_dmm.tests.locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_places_to_fill_are_the_same(language):
    assert not [
        text for text, row in read(TABLE).items() if sorted(PLACE.findall(text)) != sorted(PLACE.findall(row[language]))
    ]


def test_a_text_that_is_shown_goes_through_say():
    """What a screen reader reads, or a tooltip, a field or a button shows, is no bare literal."""
    shown = re.compile(
        r'(?:\btitle|"aria-label"|placeholder|textContent|\bsummary|\bmessage)\s*[:=] *(["`])((?:(?!\1).)*)\1'
    )
    bare = [
        (path.name, text)
        for path in sorted(SCRIPTS.glob("*.js"))
        for _, text in shown.findall(path.read_text("utf-8"))
        if re.search(r"[A-Za-z]{2}", re.sub(r"\$\{[^}]*\}", "", text))
    ]
    assert bare == []


def test_a_text_that_is_no_literal_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(of_page, "SCRIPTS", tmp_path)
    (tmp_path / "a.js").write_text('say("one");\nsay(two);\n')
    with pytest.raises(ValueError, match="a.js calls say"):
        words()
