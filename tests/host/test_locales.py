"""``locales/``: every text of the nodes in every language, by one table, where ComfyUI finds it."""

import asyncio
import re
from pathlib import Path

import pytest

from ..locales.files import FOLDER, HOST_CATEGORIES, categories, files, leaves, node_infos, texts
from ..locales.table import LANGUAGES, missing, read, unused

WRITE = "run python -m comfyui_dmm.tests.locales"


@pytest.fixture(scope="module")
def infos(host) -> dict[str, dict]:
    return asyncio.run(node_infos())


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    return read(FOLDER / "table.yaml")


def test_every_text_has_all_translations(infos, table):
    assert not missing(table, texts(infos))


def test_nothing_is_left_over(infos, table):
    assert not unused(table, texts(infos))


def test_the_files_are_what_the_table_gives(infos, table):
    there = {path.relative_to(FOLDER).as_posix(): path.read_text("utf-8") for path in FOLDER.glob("*/*")}
    made = files(infos, table)
    assert there.keys() == made.keys(), WRITE
    assert not [name for name, text in made.items() if there[name] != text], WRITE


def test_comfyui_finds_them(host, table, tmp_path, monkeypatch):
    """By its own code; the pack as a folder of custom_nodes."""
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "comfyui-dmm").symlink_to(FOLDER.parent, target_is_directory=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    found = CustomNodeManager().build_translations()
    assert found.keys() == {"en", *LANGUAGES}
    for language in LANGUAGES:
        assert found[language]["nodeDefs"]["DMMLoadModel"]["display_name"] == table["Load DMM Model"][language]
        assert found[language]["nodeCategories"]["regions"] == table["regions"][language]


def test_sockets_that_grow_have_their_tooltip_in_english_too(infos, table):
    """The frontend calls them "teachers.teacher0" and looks for "teachers_teacher0"."""
    made = files(infos, table)
    tooltip = "A DMM Teacher, for one style. A new socket appears when you use the last one."
    assert f'"teachers_teacher0": {{\n        "tooltip": "{tooltip}"' in made["en/nodeDefs.json"]
    assert f'"tooltip": "{table[tooltip]["ja"]}"' in made["ja/nodeDefs.json"]


def test_the_host_translates_the_categories_that_we_leave_to_it(infos):
    parts = {part for info in infos.values() for part in info["category"].split("/")}
    assert set(HOST_CATEGORIES) <= parts and set(categories(infos.values())) == parts - set(HOST_CATEGORIES)


def test_no_text_means_something_to_vue_i18n(table):
    """Names and descriptions are compiled: braces hold places, "@" links, "|" divides plurals."""
    assert not [text for row in table.values() for text in row.values() if set("{}@|") & set(text)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_folders_and_values_are_in_the_translation(language, infos, table):
    """What a text says of numbers, folders and values of combo boxes, its translation says too."""
    wrong = []
    for english, row in table.items():
        there = re.findall(r"\d+(?:\.\d+)?|[a-z]+/[a-z_]+|(?<![\w-])[a-z][a-z ]*(?=: )|'[a-z ]+'", english)
        values = [
            word.strip("'") for word in there if word.strip("'") in COMBO_VALUES or "/" in word or word[0].isdigit()
        ]
        wrong += [f"{value!r} of {english!r}" for value in values if value not in row[language]]
    assert not wrong


COMBO_VALUES = {
    *("adaptive", "auto", "base", "custom", "feather", "gaussian", "mean", "none", "off"),
    *("one pass", "own crop", "own prompts", "styles only", "uniform", "whole canvas"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_nodes_are_called_by_their_names_in_that_language(language, infos, table):
    def short(title: str) -> str:
        return re.split(r" ?[(（]", title)[0]

    titles = {short(info["display_name"]): short(table[info["display_name"]][language]) for info in infos.values()}
    titles = {english: title for english, title in titles.items() if " " in english}
    wrong = [
        f"{english!r} says {name!r}, its translation not {title!r}"
        for english, row in table.items()
        for name, title in titles.items()
        if re.search(rf"\b{name}\b", english) and title not in row[language]
    ]
    assert len(titles) > 20 and not wrong


def test_a_text_without_translation_is_named():
    table = {"Style": dict.fromkeys(LANGUAGES, "s"), "gone": dict.fromkeys(LANGUAGES, "g"), "half": {"zh": "h"}}
    shown = {"Style": "DMMStyle, display_name", "half": "DMMStyle.half, name", "new": "DMMStyle.new, tooltip"}
    assert missing(table, shown) == [
        "no zh-TW, ja, ko for DMMStyle.half, name: 'half'",
        "no zh, zh-TW, ja, ko for DMMStyle.new, tooltip: 'new'",
    ]
    assert unused(table, shown) == ["nothing says 'gone': change or remove its row"]


@pytest.mark.parametrize(
    "rows, words",
    [
        ("- {en: a, zh: b}\n- {en: a, ja: c}", "'a' has two rows"),
        ("- {en: a, fr: b}", "languages are zh"),
        ("- {en: a, zh: 1}", "not a text"),
        ("- {zh: a}", "is missing"),
    ],
)
def test_a_wrong_table_is_refused(rows: str, words: str, tmp_path: Path):
    path = tmp_path / "table.yaml"
    path.write_text(rows, "utf-8")
    with pytest.raises(ValueError, match=words):
        read(path)


def test_the_paths_of_texts(infos):
    shown = texts(infos)
    assert shown["Width of the soft edge in pixels."] == "DMMRegion.feather, tooltip"
    assert shown["evaluation"].endswith(", category") and len(list(leaves({"a": {"b": "c"}, "d": "e"}))) == 2
