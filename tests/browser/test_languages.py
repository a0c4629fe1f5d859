"""The nodes in other languages, as the page shows them, and the search for nodes."""

import pytest

from ..host.templates import graph_of
from ..locales.files import FOLDER
from ..locales.table import LANGUAGES, read
from ..locales.words import TABLE
from .conftest import configure

ROWS = read(FOLDER / "table.yaml")
SOCKET_TIP = "A DMM Teacher, for one style. A new socket appears when you use the last one."
MADE = """(type) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    node.pos = [200, 200];
    app.graph.add(node);
    app.canvas.ds.reset();
    app.canvas.setDirty(true, true);
    return {
        title: node.title,
        category: node.constructor.category,
        inputs: Object.fromEntries(node.inputs.map((i) => [i.name, i.label ?? i.localized_name])),
        widgets: Object.fromEntries(node.widgets.map((w) => [w.name, w.label])),
        outputs: node.outputs.map((o) => o.localized_name),
    };
}"""
PLACE = """([type, input]) => {
    const node = app.graph.findNodesByType(type)[0];
    const [x, y] = node.getConnectionPos(true, node.inputs.findIndex((i) => i.name === input));
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    return app.canvas.ds.convertOffsetToCanvas([x, y]).map((at, axis) => at + [left, top][axis]);
}"""


@pytest.fixture(params=["en", *LANGUAGES])
def language(request, server):
    """A language, which is set before the page opens: name it before ``page``."""
    configure(server, {"Comfy.Locale": request.param})
    yield request.param
    configure(server, {"Comfy.Locale": "en"})


def word(text: str, language: str) -> str:
    return ROWS[text].get(language, text)


def test_a_node_speaks_the_language(language, page):
    node = page.evaluate(MADE, "DMMMerge")
    assert node["title"] == word("Merge Checkpoints to DMM", language)
    assert node["inputs"]["base"] == word("base", language)
    assert node["widgets"]["budget"] == word("budget", language)
    assert node["outputs"][1:] == [word("kept", language), word("report", language)]
    assert page.evaluate(MADE, "DMMRegion")["category"] == f"DMM/{word('regions', language)}"
    if page.renderer == "canvas":  # Nodes 2.0 has another tooltip, of the same keys
        assert has_tooltip(page, "teachers.teacher0", word(SOCKET_TIP, language))
    assert not page.errors


def has_tooltip(page, socket: str, text: str) -> bool:
    """Whether the text stands beside the mouse that came to rest on a socket of the Merge node."""
    page.evaluate(MADE, "DMMMerge")
    x, y = page.evaluate(PLACE, ["DMMMerge", socket])
    tip = page.locator(".node-tooltip", has_text=text)
    for step in range(1, 11):  # again, when the page was too busy to see it
        page.mouse.move(x + 40, y + 40)
        page.mouse.move(x + 2, y, steps=3)
        page.wait_for_timeout(300 * step)
        if tip.is_visible():
            return True
    return False


FIRST = {
    "Load DMM Model": ["load dmm"],
    "Style Selector": ["style selector", "风格", "風格", "スタイル", "스타일"],
    "Merge Checkpoints to DMM": ["merge checkpoints", "融合", "合併", "マージ", "병합"],
    "Distill Teachers": ["distill", "蒸馏", "蒸餾", "蒸留", "증류"],
}


def test_the_node_search(page):
    """On the English page, by words of other languages too. The page ranks by name, name shown, and length: for "dmm" and "style" the
    shortest come first, whatever the aliases say."""
    for first, queries in FIRST.items():
        for words in queries:
            assert found(page, words)[0] == first, words
    assert "Load DMM Model" in found(page, "dmm")[:10]
    assert "Merge Checkpoints to DMM" in found(page, "merge")[:10] and "Style Selector" in found(page, "style")[:10]


def found(page, words: str) -> list[str]:
    """The names that the search box lists for some words, from the top."""
    if not page.get_by_role("dialog").locator("input").count():
        page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = page.locator("[role=dialog] input").first
    box.fill(words)
    rows = page.locator("[data-testid=result-item], .p-autocomplete-option")
    page.wait_for_timeout(1500)
    rows.first.wait_for()
    return [text.split("\n")[0] for text in rows.all_inner_texts()]


@pytest.mark.parametrize("language", ["ja", "zh"], indirect=True)
def test_the_pages_own_words(language, page):
    """Buttons and marks of web/js, on a page in that language; names of styles stay as they are."""
    rows = read(TABLE)
    graph = graph_of("quickstart")
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    button = page.get_by_role("button", name=rows["Choose a style"][language], exact=True)
    button.wait_for(state="visible")
    assert rows["Styles"][language] in button.inner_text()
    button.click()
    panel = page.get_by_role("dialog", name=rows["Choose a style"][language])
    panel.get_by_role("option", name="pen").wait_for()
    assert panel.get_by_role("option", name=rows["No style."][language]).count() == 1
    page.keyboard.press("Escape")
    page.evaluate(
        "() => { app.graph.findNodesByType('DMMStyleSelector')[0].widgets.find((w) => w.name === 'style').value = 'inc'; }"
    )
    page.get_by_text(rows["not in this model: {names}"][language].replace("{names}", "inc")).first.wait_for()
    assert page.errors == []
