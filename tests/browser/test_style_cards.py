"""Styles that can be seen: cards under the loaders, the button and panel of every style field, and marks on names that the connected model
does not know; before anything has run."""

import json

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.style_value import mix, parse_style

from ..host.families import DEMO, checkpoint_of, random_unet
from ..host.server import PACK
from ..host.templates import graph_of
from .test_edit_style import HOSTILE, SETTLED, set_on
from .test_style_menu import FIELDS as TEXT_FIELDS
from .test_style_menu import STYLES, add, id_of, link
from .test_workflows import open_graph, queued, run, set_widget

FIELDS = {"DMMStyleSelector": ["style"], "DMMEditStyle": ["style"], **TEXT_FIELDS, "DMMForgetStyle": ["styles"]}
ROW = "(id, field) => app.graph.getNodeById(id).widgets.find((w) => w.name === `dmm_${field}`).element"
VALUE = "([id, field]) => app.graph.getNodeById(id).widgets.find((w) => w.name === field).value"
TURNED = "safe\u202eexe.\u2066ink"
LONG = "long " * 19 + "ends."


def value(page, node: int, field: str) -> str:
    return page.evaluate(VALUE, [node, field])


def until_value(page, node: int, field: str, text: str) -> None:
    page.wait_for_function(f"([id, field, text]) => ({VALUE})([id, field]) === text", arg=[node, field, text])


def until_row(page, node: int, field: str, text: str, wrong: bool) -> str:
    """Wait until the row under a field says this and is marked or not -> its tooltip."""
    page.wait_for_function(
        f"""([id, field, text, wrong]) => {{
            const row = ({ROW})(id, field);
            return row.lastChild.textContent === text && row.classList.contains('dmm-wrong') === wrong;
        }}""",
        arg=[node, field, text, wrong],
    )
    return page.evaluate(f"([id, field]) => ({ROW})(id, field).lastChild.title", [node, field])


def show(page, node: int) -> None:
    page.evaluate(
        """(id) => {
            app.canvas.ds.scale = 1;
            app.canvas.centerOnNode(app.graph.getNodeById(id));
            app.canvas.setDirty(true, true);
        }""",
        node,
    )
    page.wait_for_timeout(500)  # drawn where it is now


def open_panel(page, node: int, field: str):
    """Click on the button of a field with the mouse -> the panel."""
    show(page, node)
    button = page.evaluate_handle(f"([id, field]) => ({ROW})(id, field).firstChild", [node, field]).as_element()
    button.click()
    panel = page.get_by_role("dialog", name="Choose a style")
    panel.wait_for()
    return panel


def on_button(page, node: int, field: str) -> bool:
    """Whether the focus is on the button of a field."""
    return page.evaluate(f"([id, field]) => ({ROW})(id, field).firstChild === document.activeElement", [node, field])


def cards(page):
    return page.get_by_role("list", name="Styles in this file").get_by_role("listitem")


def save_plain(server) -> None:
    """A model without styles, in the server's folder."""
    checkpoint = load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors")
    checkpoint.unet = load_checkpoint(PACK / "models" / "dmm" / "demo-base.safetensors").unet
    checkpoint.styles, checkpoint.recipe, checkpoint.metadata = [], {}, {}
    save_checkpoint(server.base / "models" / "dmm" / "plain.safetensors", checkpoint)


def open_with_styles(page, name: str, styles: list[dict]) -> None:
    """A template whose model's file has these styles, as far as the server says."""
    page.route("**/dmm/styles?*made-up*", lambda route: route.fulfill(json={"styles": styles}))
    open_graph(page, graph_of(name))
    set_widget(page, "DMMLoadModel", "ckpt_name", "made-up.safetensors")


def test_the_loader_shows_the_styles_of_its_file(page, server, tmp_path_factory):
    """Before a run: whole, with pictures and descriptions; also of the next file; and one line for a plain checkpoint."""
    save_plain(server)
    named = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    save_checkpoint(server.base / "models" / "dmm" / "names.safetensors", named)
    open_graph(page, graph_of("quickstart"))
    cards(page).nth(len(STYLES) - 1).wait_for()
    assert cards(page).all_inner_texts() == STYLES
    assert cards(page).locator("img").count() == len(STYLES)
    assert cards(page).first.get_attribute("title") == "ink: bold black outline and hatching"
    page.wait_for_timeout(600)  # the node has grown
    cut = """() => {
        const frame = document.querySelector('.dmm-frame');
        return [frame.scrollHeight - frame.clientHeight, frame.scrollWidth - frame.clientWidth];
    }"""
    assert page.evaluate(cut) == [0, 0]
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"cards-{page.renderer}.png")
    set_widget(page, "DMMLoadModel", "ckpt_name", "names.safetensors")
    page.wait_for_function("() => document.querySelector('.dmm-names')?.children.length === 4")
    assert cards(page).all_inner_texts() == [style.name for style in named.styles]
    assert cards(page).locator("img").count() == 0
    set_widget(page, "DMMLoadModel", "ckpt_name", "plain.safetensors")
    page.get_by_text("No styles: fine as a teacher or base.").wait_for()
    assert cards(page).count() == 0
    assert page.errors == []


def test_every_style_field_has_a_button_and_graphs_are_saved_as_before(page, server):
    info = server.get("object_info").json()
    open_graph(page, graph_of("quickstart"))
    cards(page).first.wait_for()
    for node_type, fields in FIELDS.items():
        node = add(page, node_type)
        if "model" in info[node_type]["input"]["required"]:
            link(page, id_of(page, "DMMLoadModel"), 0, node, "model")
        for field in fields:
            set_on(page, node, field, "candy")
            panel = open_panel(page, node, field)
            options = panel.get_by_role("option")
            assert [text.split("\n")[0] for text in options.all_inner_texts()[: len(STYLES)]] == STYLES
            assert panel.get_by_role("option", selected=True).count() == 1
            page.keyboard.press("Escape")
            panel.wait_for(state="detached")
            assert on_button(page, node, field)
        saved = page.evaluate(
            "id => JSON.parse(JSON.stringify(app.graph.getNodeById(id).serialize())).widgets_values", node
        )
        own = page.evaluate(
            "id => app.graph.getNodeById(id).widgets.filter((w) => w.serialize !== false).map((w) => [w.name, w.value])",
            node,
        )
        assert saved == [value for _, value in own]
        sent = queued(page)[str(node)]["inputs"]
        assert not [key for key in sent if key.startswith("dmm_")]
        page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", node)
    assert page.errors == []


def test_styles_are_taken_and_blended_with_the_mouse(page, tmp_path_factory):
    open_graph(page, graph_of("regions"))
    region = id_of(page, "DMMRegion")
    set_on(page, region, "style", "none")
    panel = open_panel(page, region, "style")
    panel.get_by_role("option", name="pixel").click()
    until_value(page, region, "style", "pixel")
    panel.wait_for(state="detached")
    panel = open_panel(page, region, "style")
    panel.get_by_role("option", name="candy").locator(".dmm-plus").click()
    until_value(page, region, "style", "pixel:0.5, candy:0.5")
    panel.get_by_role("slider").fill("30")
    until_value(page, region, "style", "pixel:0.7, candy:0.3")
    panel.get_by_role("option", name="echo").locator(".dmm-plus").click()
    until_value(page, region, "style", "pixel:0.49, candy:0.21, echo:0.3")
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"panel-{page.renderer}.png")
    page.mouse.click(150, 800)  # beside it
    panel.wait_for(state="detached")
    assert queued(page)[str(region)]["inputs"]["style"] == "pixel:0.49, candy:0.21, echo:0.3"
    page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function(
        "() => app.graph.findNodesByType('DMMRegion').every((n) => !n.widgets[0].value.includes('echo'))"
    )
    assert page.errors == []


def test_the_keyboard_is_enough(page):
    """Enter on the button, arrows, Home and End, Enter takes, Shift+Enter adds, Tab goes round inside, Esc leads back to the button."""
    open_graph(page, graph_of("regions"))
    mixed = id_of(page, "DMMStyleMix")
    set_on(page, mixed, "background", "ink")
    panel = open_panel(page, mixed, "background")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    columns = page.evaluate("""() => {
        const cards = [...document.querySelectorAll('.dmm-option')];
        return cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
    }""")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    active = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).textContent"
    )
    assert active.startswith([*STYLES, "none"][1 + columns])
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")  # no further
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    panel.wait_for(state="detached")
    assert value(page, mixed, "background") == "pen" and on_button(page, mixed, "background")
    page.keyboard.press("Enter")
    panel.wait_for()
    page.keyboard.press("End")  # "none", which cannot be added
    page.keyboard.press("Shift+Enter")
    assert value(page, mixed, "background") == "pen"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+Enter")
    assert value(page, mixed, "background") == "pen:0.5, echo:0.5"
    page.keyboard.press("Tab")  # the button
    page.keyboard.press("Tab")  # the slider
    page.keyboard.press("ArrowRight")
    until_value(page, mixed, "background", "pen:0.45, echo:0.55")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "listbox"  # round
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    count = page.evaluate("app.graph.nodes.length")
    page.keyboard.press("Delete")  # not the canvas's
    page.keyboard.press("Escape")
    panel.wait_for(state="detached")
    assert on_button(page, mixed, "background") and page.evaluate("app.graph.nodes.length") == count
    assert page.errors == []


def test_fields_of_several_lines_and_of_names(page):
    open_graph(page, graph_of("style_sheet"))
    sheet, forget = id_of(page, "DMMStyleSheet"), add(page, "DMMForgetStyle")
    link(page, id_of(page, "DMMLoadModel"), 0, forget, "model")
    set_on(page, sheet, "styles", "")
    panel = open_panel(page, sheet, "styles")
    for name in ("echo", "pen"):
        panel.get_by_role("option", name=name).click()
    until_value(page, sheet, "styles", "echo\npen")
    panel.get_by_role("option", name="pop").locator(".dmm-plus").click()
    until_value(page, sheet, "styles", "echo\npen:0.5, pop:0.5")
    page.keyboard.press("Escape")
    panel = open_panel(page, forget, "styles")
    for name in ("echo", "pen", "echo"):
        panel.get_by_role("option", name=name).click()
    until_value(page, forget, "styles", "echo, pen")
    assert panel.get_by_role("slider").count() == 0  # nothing blends here
    page.keyboard.press("Escape")
    assert page.errors == []


def test_many_styles_are_searched(page):
    styles = [{"name": f"style {i}", "description": "blue" if i == 17 else "", "thumbnail": ""} for i in range(40)]
    open_with_styles(page, "regions", styles)
    page.wait_for_function("() => document.querySelector('.dmm-names')?.children.length === 40")
    region = id_of(page, "DMMRegion")
    set_on(page, region, "style", "none")
    panel = open_panel(page, region, "style")
    page.wait_for_function("() => document.activeElement.type === 'search'")
    assert panel.get_by_role("option").count() == 41
    page.keyboard.type("BLUE")
    assert panel.get_by_role("option").count() == 1
    page.keyboard.press("Enter")
    until_value(page, region, "style", "style 17")


def test_names_that_the_model_does_not_know_are_marked(page, server, tmp_path_factory):
    """At once, and again when the file of the loader changes; the tooltip has the names that there are."""
    save_plain(server)
    other = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    save_checkpoint(server.base / "models" / "dmm" / "marks.safetensors", other)
    open_graph(page, graph_of("quickstart"))
    selector, apply = id_of(page, "DMMStyleSelector"), add(page, "DMMApplyStyle")
    set_on(page, apply, "style", "foo:0.5, ink")
    until_row(page, apply, "style", "", False)  # not connected: nobody knows
    link(page, id_of(page, "DMMLoadModel"), 0, apply, "model")
    tip = until_row(page, apply, "style", "not in this model: foo", True)
    assert tip == f"The styles of this model: {', '.join(STYLES)}"
    show(page, apply)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"marked-{page.renderer}.png")
    set_on(page, apply, "style", "0%: INK; 40%-60%: candy:2, none")
    until_row(page, apply, "style", "", False)
    set_on(page, apply, "style", "ink, ink")
    assert "given twice" in until_row(page, apply, "style", "cannot be read", True)
    set_on(page, apply, "style", "candy")
    until_row(page, apply, "style", "diagonal candy stripes", False)
    set_widget(page, "DMMStyleSelector", "style", "candy")
    set_widget(page, "DMMLoadModel", "ckpt_name", "marks.safetensors")
    for node in (selector, apply):
        tip = until_row(page, node, "style", "not in this model: candy", True)
        assert tip == f"The styles of this model: {', '.join(style.name for style in other.styles)}"
    set_widget(page, "DMMLoadModel", "ckpt_name", "plain.safetensors")
    until_row(page, apply, "style", "this model has no styles", True)
    set_on(page, apply, "style", "none")
    until_row(page, apply, "style", "this model has no styles", False)
    panel = open_panel(page, apply, "style")
    assert "This model has no styles" in panel.inner_text() and panel.get_by_role("option").count() == 0
    page.keyboard.press("Escape")
    assert page.errors == []


@pytest.fixture
def strange_graph(server) -> dict:
    """The regions template with a model whose names and descriptions are markup, turn the direction of text, or are very long."""
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    names = [HOSTILE[0], HOSTILE[3], TURNED, LONG]
    checkpoint.styles = [StyleInfo(name, description=f"{name}\n" * 30) for name in names]
    save_checkpoint(server.base / "models" / "dmm" / "strange.safetensors", checkpoint)
    return json.loads(json.dumps(graph_of("regions")).replace("demo-dmm", "strange"))


def test_a_hostile_model_is_inert(page, strange_graph, tmp_path_factory):
    scripts = page.locator("script").count()
    open_graph(page, strange_graph)
    cards(page).nth(3).wait_for()
    assert cards(page).nth(0).inner_text() == HOSTILE[0]
    assert "\u202e" not in cards(page).nth(2).inner_text() and "\u2066" not in cards(page).nth(2).inner_text()
    region = id_of(page, "DMMRegion")
    panel = open_panel(page, region, "style")
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"hostile-{page.renderer}.png")
    assert panel.bounding_box()["width"] <= 500
    for option in panel.get_by_role("option").all():
        assert option.bounding_box()["width"] <= 200
        assert option.locator("img, script, svg, b").count() == 0
    panel.get_by_role("option").nth(1).click()
    page.wait_for_function(f"id => ({VALUE})([id, 'style']) !== 'ink'", arg=region)
    assert parse_style(value(page, region, "style")) == mix({HOSTILE[3]: 1.0})
    page.wait_for_timeout(600)
    page.evaluate(SETTLED)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], svg[onload]").count() == 0 and page.locator("script").count() == scripts
    assert page.errors == []


def test_only_small_jpeg_and_webp_data_become_pictures(page):
    good = load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors").styles[0].thumbnail
    bad = [
        *("javascript:window.hacked=1", "https://example.invalid/a.jpg", "data:image/svg+xml;base64,PHN2Zy8+", "x"),
        *(
            "data:text/html;base64,PGI+",
            "data:image/jpeg;base64,AA==\n",
            f"{good} ",
            "data:image/jpeg;base64," + "A" * 200_000,
        ),
        *(7, None, {"a": 1}),
    ]
    styles = [{"name": f"s{i}", "description": None, "thumbnail": uri} for i, uri in enumerate([good, *bad])]
    open_with_styles(page, "quickstart", styles)
    cards(page).nth(len(bad)).wait_for()
    assert cards(page).locator("img").count() == 1 and cards(page).first.locator("img").get_attribute("src") == good
    assert page.evaluate("window.hacked") is None and page.errors == []


def test_the_graph_still_runs(page):
    """With a style from the panel, by the Run button's command."""
    open_graph(page, graph_of("quickstart"))
    cards(page).first.wait_for()
    selector = id_of(page, "DMMStyleSelector")
    panel = open_panel(page, selector, "style")
    panel.get_by_role("option", name="sticker").click()
    until_value(page, selector, "style", "sticker")
    run(page)
    assert page.errors == []
