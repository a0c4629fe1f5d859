"""The example workflows and the style picker, as a user meets them."""

import json
import re

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo

from ..host.families import DEMO, checkpoint_of, random_unet
from ..host.server import PACK
from ..host.templates import TITLES, graph_of, twin_of

MARKUP = '<img src=x onerror="window.hacked = true"> & <b>bold</b>'

ERROR_TOAST = ".p-toast-message-error, [data-toast-kind=error]"
"""A message of an error: of older pages, and from 1.58 on."""

LIST = """(selector) => {
    const values = selector.widgets.find((w) => w.name === 'style').options.values;
    return typeof values === 'function' ? values() : values;
}"""


def open_graph(page, graph: dict) -> None:
    """What dropping the file on the page does."""
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(graph["nodes"]))


def run(page, minutes: float = 1.5) -> None:
    """What the Run button does; returns when it has succeeded."""
    page.evaluate("""() => {
        window.ended = null;
        for (const kind of ['execution_success', 'execution_error'])
            app.api.addEventListener(kind, (event) => { window.ended ??= [kind, event.detail.exception_message]; });
        return app.queuePrompt(0);
    }""")
    page.wait_for_function("() => window.ended", timeout=minutes * 60_000)
    assert page.evaluate("window.ended")[0] == "execution_success", page.evaluate("window.ended")


def queued(page) -> dict:
    """What the page would send to the server: {node id: {"class_type", "inputs"}}."""
    prompt = page.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))")
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


def choices(page, count: int) -> list[str]:
    """The entries of the Style Selector's list, once it has ``count``."""
    page.wait_for_function(
        f"count => ({LIST})(app.graph.findNodesByType('DMMStyleSelector')[0]).length === count", arg=count
    )
    return page.evaluate(f"({LIST})(app.graph.findNodesByType('DMMStyleSelector')[0])")


def set_widget(page, node_type: str, name: str, value) -> None:
    """As if the user had chosen it."""
    script = """([type, name, value]) => {
        const node = app.graph.findNodesByType(type)[0];
        const widget = node.widgets.find((w) => w.name === name);
        widget.value = value;
        widget.callback?.(value, app.canvas, node);
    }"""
    page.evaluate(script, [node_type, name, value])


def open_style_list(page):
    """Click the style field with the mouse -> the locator of the list's entries."""
    if page.renderer == "nodes2":
        node = page.locator("[data-node-id]").filter(has_text="Style Selector").filter(has=page.get_by_role("combobox"))
        node.get_by_role("combobox").first.click()
        return page.get_by_role("option")
    place = page.evaluate("""() => {
        const node = app.graph.findNodesByType('DMMStyleSelector')[0];
        const widget = node.widgets.find((w) => w.name === 'style');
        const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]);
        const frame = app.canvas.canvas.getBoundingClientRect();
        return [x + frame.left, y + frame.top];
    }""")
    page.mouse.move(*place)
    page.mouse.click(*place)
    return page.locator(".litecontextmenu .litemenu-entry")


@pytest.mark.parametrize("name", TITLES)
def test_the_graph_opens_whole(page, name, tmp_path_factory):
    """No missing nodes or models, nothing red; what would be queued is the API twin, what would be saved the same graph."""
    graph = graph_of(name)
    open_graph(page, graph)
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    values, kept = ({n["id"]: n.get("widgets_values") or [] for n in g["nodes"]} for g in (graph, saved))
    assert kept == values
    assert named_links(saved) == named_links(graph)
    unknown = page.evaluate(
        "app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    )
    assert unknown == []
    assert queued(page) == {
        key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in twin_of(name).items()
    }
    assert page.get_by_text(re.compile("missing (nodes?|models?)", re.IGNORECASE)).count() == 0
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"{name}-{page.renderer}.png")
    assert page.errors == []


def named_links(graph: dict) -> list:
    """The links with the name of the input in place of its number: newer pages add a growing input more."""
    inputs = {node["id"]: node.get("inputs", []) for node in graph["nodes"]}
    return sorted([*link[:4], inputs[link[3]][link[4]]["name"], link[5]] for link in graph["links"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_the_graph_runs_to_its_end(page, name, tmp_path_factory):
    """Opened, queued, finished, with a picture of the page after it; nothing red and no message of an error. One trains for minutes."""
    open_graph(page, graph_of(name))
    run(page, minutes=60)
    page.wait_for_timeout(3000)  # the pictures that the last node's message names are fetched after it
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"{name}-{page.renderer}-ran.png")
    assert page.evaluate("app.graph.nodes.filter(n => n.has_errors).map(n => n.type)") == []
    assert page.locator(ERROR_TOAST).count() == 0
    assert page.errors == []


def test_quickstart_runs(page):
    """The Run button's command leads to pictures, with no error shown."""
    open_graph(page, graph_of("quickstart"))
    run(page)
    if page.renderer == "canvas":
        page.wait_for_function("() => app.graph.findNodesByType('SaveImage')[0].imgs?.length === 4")
    else:
        page.wait_for_function("() => document.querySelectorAll('[data-node-id] img:not(.dmm-thumbnail)').length === 4")
    assert page.errors == []


def test_the_picker_lists_the_styles_of_the_file(page):
    open_graph(page, graph_of("quickstart"))
    names = [style.name for style in load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors").styles]
    assert choices(page, len(names) + 1) == [*names, "none"]
    entries = open_style_list(page)
    entries.get_by_text("pixel", exact=True).click()
    assert queued(page)[selector_id()]["inputs"]["style"] == "pixel"


def selector_id() -> str:
    return next(key for key, node in twin_of("quickstart").items() if node["class_type"] == "DMMStyleSelector")


def test_the_picker_follows_file_and_connections(page, server):
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    save_checkpoint(server.base / "models" / "dmm" / "other.safetensors", checkpoint)
    others = [style.name for style in checkpoint.styles]
    open_graph(page, graph_of("quickstart"))
    choices(page, 8)
    set_widget(page, "DMMLoadModel", "ckpt_name", "other.safetensors")
    assert choices(page, 5) == [*others, "none"]
    # Through a LoRA loader, a reroute and another selector, in a graph where the first loader is of no account any more.
    page.evaluate("""() => {
        const add = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
        const [load, second, lora, reroute, selector] =
            ['DMMLoadModel', 'DMMLoadModel', 'LoraLoaderModelOnly', 'Reroute', 'DMMStyleSelector'].map(add);
        const target = app.graph.findNodesByType('DMMStyleSelector')[0];
        second.widgets[0].value = 'demo-dmm.safetensors';
        second.connect(0, lora, 0);
        lora.connect(0, reroute, 0);
        reroute.connect(0, selector, 0);
        selector.connect(0, target, 0);
    }""")
    assert len(choices(page, 8)) == 8
    page.evaluate("app.graph.findNodesByType('DMMStyleSelector')[0].disconnectInput(0)")
    assert choices(page, 3)[:2] == ["ink", "none"]  # unknown: its own value, none, and typing a name
    assert page.errors == []


def test_the_picker_looks_into_and_out_of_subgraphs(page):
    open_graph(page, graph_of("quickstart"))
    names = choices(page, 8)
    for node_type in ("DMMStyleSelector", "DMMLoadModel"):  # the selector alone, then the loader in another one
        page.evaluate("type => { app.graph.convertToSubgraph(new Set(app.graph.findNodesByType(type))); }", node_type)
        inner = (
            "[...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes).find((n) => n.type === 'DMMStyleSelector')"
        )
        assert page.evaluate(f"({LIST})({inner})") == names


def test_after_a_distillation_the_styles_are_the_teachers(page):
    open_graph(page, graph_of("distill_quickstart"))
    assert choices(page, 4) == ["ink", "candy", "echo", "none"]
    set_widget(page, "DMMTeacher", "name", "my ink")
    assert choices(page, 4) == ["my ink", "candy", "echo", "none"]


def test_a_name_can_be_typed_where_the_styles_are_unknown(page):
    open_graph(page, graph_of("quickstart"))
    page.evaluate("app.graph.findNodesByType('DMMStyleSelector')[0].disconnectInput(0)")
    choices(page, 3)
    open_style_list(page).last.click()
    page.get_by_role("textbox").last.fill("  Neon lines ")
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph.findNodesByType('DMMStyleSelector')[0].widgets[0].value === 'Neon lines'")


@pytest.fixture
def markup_graph(server) -> dict:
    """The quickstart with a model one of whose styles has markup for a name."""
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    checkpoint.styles[1] = StyleInfo(MARKUP)
    save_checkpoint(server.base / "models" / "dmm" / "markup.safetensors", checkpoint)
    return json.loads(json.dumps(graph_of("quickstart")).replace("demo-dmm", "markup"))


def test_a_style_name_is_text_and_never_markup(page, markup_graph):
    open_graph(page, markup_graph)
    assert MARKUP in choices(page, 5)
    entry = open_style_list(page).get_by_text(MARKUP, exact=True)
    assert entry.count() == 1 and entry.locator("*").count() == 0  # one text, no elements made from it
    entry.click()
    assert queued(page)[selector_id()]["inputs"]["style"] == MARKUP
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_node_shows_its_report_as_text(page, markup_graph):
    """A report that names a style of a stranger's file; it is neither queued nor saved with the graph."""
    open_graph(page, markup_graph)
    before = queued(page)
    said = f"this is {MARKUP}, and not ink"
    page.evaluate("(text) => app.graph.findNodesByType('DMMStyleSelector')[0].onExecuted({ text: [text] })", said)
    report = page.locator("pre").filter(has_text="this is")
    report.wait_for(state="visible")
    assert report.inner_text() == said
    assert report.locator("*").count() == 0 and page.evaluate("window.hacked") is None
    assert queued(page) == before
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize())).nodes")
    assert [n["widgets_values"] for n in saved if n["type"] == "DMMLoadModel"] == [["markup.safetensors", 0, 0]]
