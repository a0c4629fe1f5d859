"""Edit Style on the page: its list, the lists behind it, and words of strangers' files that stay words everywhere."""

import json

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo

from ..host.families import DEMO, checkpoint_of, random_unet
from ..host.templates import graph_of
from .test_style_menu import STYLES, add, id_of, link, names_for, until_names
from .test_workflows import LIST, choices, open_graph, open_style_list, queued, run, set_widget

HOSTILE = [
    '<img src=x onerror="window.hacked = 1">',
    "<script>window.hacked = 2</script>",
    "javascript:window.hacked=3",
    '"><svg onload=window.hacked=4>',
]
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 300))))"


def options(page, node: int) -> list[str]:
    return page.evaluate(f"id => ({LIST})(app.graph.getNodeById(id))", node)


def until_options(page, node: int, names: list[str]) -> None:
    page.wait_for_function(
        f"([id, names]) => JSON.stringify(({LIST})(app.graph.getNodeById(id))) === JSON.stringify(names)",
        arg=[node, names],
    )


def set_on(page, node: int, name: str, value: str) -> None:
    page.evaluate(
        "([id, name, value]) => { app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = value; }",
        [node, name, value],
    )


def test_lists_follow_the_new_names(page):
    """Two Edit Styles in a row and a blend between Load DMM Model and Style Selector; the graph paints by the new names."""
    open_graph(page, graph_of("quickstart"))
    choices(page, len(STYLES) + 1)
    first, blend, second = add(page, "DMMEditStyle"), add(page, "DMMNameBlend"), add(page, "DMMEditStyle")
    link(page, id_of(page, "DMMLoadModel"), 0, first, "model")
    link(page, first, 0, blend, "model")
    link(page, blend, 0, second, "model")
    link(page, second, 0, id_of(page, "DMMStyleSelector"), "model")
    until_options(page, first, STYLES)  # and no "none": there is nothing to edit about it
    set_on(page, first, "style", STYLES[0])
    set_on(page, first, "name", " Tusche ")
    set_on(page, blend, "style", "Tusche, candy")
    set_on(page, blend, "name", "mix")
    renamed = ["Tusche", *STYLES[1:], "mix"]
    until_options(page, second, renamed)
    assert names_for(page, blend) == [*renamed[:-1], "none"]
    set_on(page, second, "style", "mix")
    set_on(page, second, "name", "glow")
    assert choices(page, len(STYLES) + 2) == [*renamed[:-1], "glow", "none"]
    set_widget(page, "DMMStyleSelector", "style", "glow")
    run(page)
    page.evaluate("id => { app.graph.getNodeById(id).mode = 4; }", first)  # bypassed
    until_options(page, second, [*STYLES, "mix"])
    assert page.errors == []


def test_edits_are_saved_and_listed_from_the_file(page, server):
    open_graph(page, graph_of("quickstart"))
    edit, save = add(page, "DMMEditStyle"), add(page, "DMMSaveModel")
    link(page, id_of(page, "DMMLoadModel"), 0, edit, "model")
    link(page, edit, 0, save, "model")
    set_on(page, edit, "style", "ink")
    set_on(page, edit, "name", f"Tusche {page.renderer}")
    set_on(page, edit, "description", "black lines\nby hand")
    set_on(page, save, "filename_prefix", f"edited-{page.renderer}")
    run(page)
    (file,) = (server.base / "output" / "dmm").glob(f"edited-{page.renderer}_*.safetensors")
    style = load_checkpoint(file).styles[0]
    assert (style.name, style.description) == (f"Tusche {page.renderer}", "black lines\nby hand")
    set_widget(page, "DMMLoadModel", "ckpt_name", file.name)
    until_options(page, edit, [f"Tusche {page.renderer}", *STYLES[1:]])
    assert page.errors == []


@pytest.fixture
def hostile_graph(server) -> dict:
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    checkpoint.styles = [
        StyleInfo(name, description=f"{name}\n{name}", teacher=name, licence=name, recommended={name: name})
        for name in HOSTILE
    ]
    save_checkpoint(server.base / "models" / "dmm" / "hostile.safetensors", checkpoint)
    return json.loads(json.dumps(graph_of("quickstart")).replace("demo-dmm", "hostile"))


def test_words_of_a_strangers_file_are_never_run(page, hostile_graph):
    """Names and descriptions that are markup: in the lists, in the menu, in a node's report, and in an error."""
    open_graph(page, hostile_graph)
    before = page.locator("script").count()
    edit = add(page, "DMMEditStyle")
    link(page, id_of(page, "DMMLoadModel"), 0, edit, "model")
    until_options(page, edit, HOSTILE)
    region = add(page, "DMMRegion")
    until_names(page, region, [*HOSTILE, "none"])
    assert choices(page, 5) == [*HOSTILE, "none"]
    entries = open_style_list(page)
    for name in HOSTILE:
        entry = entries.get_by_text(name, exact=True).first
        entry.wait_for()
        assert entry.locator("img, script, svg[onload]").count() == 0
    entries.get_by_text(HOSTILE[0], exact=True).first.click()
    selector = str(id_of(page, "DMMStyleSelector"))
    assert queued(page)[selector]["inputs"]["style"] == HOSTILE[0]
    run(page)  # the report of Load DMM Model names them all: it has cards for them, so another node shows it
    words = page.evaluate("id => app.nodeOutputs[id].text", id_of(page, "DMMLoadModel"))
    page.evaluate("([id, text]) => app.graph.getNodeById(id).onExecuted({ text })", [int(selector), words])
    report = page.locator("pre").filter(has_text="4 styles")
    report.wait_for(state="visible")
    assert report.inner_text() == f"4 styles: {', '.join(HOSTILE)}" and report.locator("*").count() == 0
    link(page, edit, 0, int(selector), "model")
    set_on(page, edit, "style", HOSTILE[0])
    set_on(page, edit, "name", "harmless")  # the chosen name is unknown now: an error that lists the hostile ones
    message = page.evaluate("""async () => {
        let failed;
        app.api.addEventListener("execution_error", (event) => { failed ??= event.detail.exception_message; });
        await app.queuePrompt(0);
        for (let i = 0; i < 300 && !failed; i++) await new Promise((done) => setTimeout(done, 200));
        return failed;
    }""")
    assert f"unknown style '{HOSTILE[0]}'" in message and HOSTILE[1] in message
    alert = page.locator("pre[role=alert]")
    alert.wait_for(state="visible")
    assert alert.inner_text() == message.strip() and alert.locator("*").count() == 0
    page.evaluate(SETTLED)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], svg[onload]").count() == 0 and page.locator("script").count() == before
