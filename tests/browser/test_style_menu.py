"""Help for the text fields that take styles: the menu of a right click, and styles that Name a Blend adds."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style_value import mix, parse_style, quote_name
from comfyui_dmm.training.files.style_file import save_style

from ..core.test_style_text import NASTY
from ..host.families import DEMO, checkpoint_of, random_unet
from ..host.server import PACK
from ..host.templates import graph_of
from .test_workflows import (
    MARKUP,
    choices,
    markup_graph,  # noqa: F401 (a fixture)
    open_graph,
    queued,
    run,
    set_widget,
)

STYLES = [style.name for style in load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors").styles]
FIELDS = {
    "DMMApplyStyle": ["style"],
    "DMMStyleForPrompt": ["style"],
    "DMMNameBlend": ["style"],
    "DMMStyle": ["text"],
    "DMMBlendStyles": ["first", "second"],
    "DMMStyleSchedule": ["first", "then"],
    "DMMRegion": ["style"],
    "DMMStyleMix": ["background"],
    "DMMStyleSheet": ["styles"],
    "DMMStyleTravel": ["stops"],
}
MENU = "import('/extensions/comfyui-dmm/js/style_menu.js')"
ADD = "(type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node.id; }"
NODE = "(type) => app.graph.findNodesByType(type)[0]"
NAMES_IN_MENU = """async ([id, entry]) => {
    const item = app.canvas.getNodeMenuOptions(app.graph.getNodeById(id)).find((i) => i?.content?.startsWith(entry));
    if (!item || item.disabled) return item?.content ?? null;
    let names;
    const { ContextMenu } = LiteGraph;
    LiteGraph.ContextMenu = function (values) { names = values; };
    item.callback();
    LiteGraph.ContextMenu = ContextMenu;
    return names;
}"""
ENTRIES = """(id) => app.canvas.getNodeMenuOptions(app.graph.getNodeById(id)).map((i) => i?.content)
    .filter((text) => /style/i.test(text))"""


def add(page, node_type: str) -> int:
    return page.evaluate(ADD, node_type)


def link(page, origin: int, output: int, target: int, name: str) -> None:
    page.evaluate(
        """([origin, output, target, name]) => {
            const to = app.graph.getNodeById(target);
            app.graph.getNodeById(origin).connect(output, to, to.inputs.findIndex((i) => i.name === name));
        }""",
        [origin, output, target, name],
    )


def id_of(page, node_type: str) -> int:
    return page.evaluate(f"type => ({NODE})(type).id", node_type)


def names_for(page, node: int, entry: str = "Choose style"):
    """What the entry of a node's menu lists; its text when it cannot, None without such an entry."""
    return page.evaluate(NAMES_IN_MENU, [node, entry])


def until_names(page, node: int, names: list[str] | str, entry: str = "Choose style") -> None:
    page.wait_for_function(
        f"async ([node, entry, names]) => JSON.stringify(await ({NAMES_IN_MENU})([node, entry])) === names",
        arg=[node, entry, page.evaluate("names => JSON.stringify(names)", names)],
    )


def open_menu(page, node: int, entry: str):
    """Right click on a node's title, then the entry, with the mouse -> the locator of the styles listed."""
    page.evaluate(
        """(id) => {
        const node = app.graph.getNodeById(id);
        app.canvas.ds.scale = 1;
        app.canvas.centerOnNode(node);
        app.canvas.setDirty(true, true);
    }""",
        node,
    )
    page.wait_for_timeout(500)  # drawn where it is now
    if page.renderer == "nodes2":
        page.locator(f"[data-node-id='{node}']").get_by_text("Style", exact=False).first.click(button="right")
        trigger = page.get_by_role("menuitem", name=entry, exact=True)
        trigger.hover()
        page.wait_for_timeout(500)
        # Newer pages draw it beside the menu and not inside of its entry.
        inside = trigger.get_attribute("aria-controls")
        return (page.locator(f"[id='{inside}']") if inside else trigger.locator("ul")).get_by_role("menuitem")
    place = page.evaluate(
        """(id) => {
        const node = app.graph.getNodeById(id);
        const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] - 12]);
        const frame = app.canvas.canvas.getBoundingClientRect();
        return [x + frame.left, y + frame.top];
    }""",
        node,
    )
    page.mouse.move(*place)
    page.mouse.click(*place, button="right")
    page.locator(".litemenu-entry").get_by_text(entry, exact=True).click()
    return page.locator(".litecontextmenu").last.locator(".litemenu-entry")


def pick(page, node: int, entry: str, style: str) -> None:
    open_menu(page, node, entry).get_by_text(style, exact=True).click()
    page.wait_for_function("() => !document.querySelector('.litecontextmenu, .p-contextmenu, [role=menu][data-state=open]')")


def test_styles_go_from_the_menu_into_the_field(page, tmp_path_factory):
    open_graph(page, graph_of("regions"))
    region = id_of(page, "DMMRegion")
    entries = open_menu(page, region, "Choose style")
    entries.last.wait_for()
    assert entries.all_inner_texts() == [*STYLES, "none"]
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"menu-{page.renderer}.png")
    entries.get_by_text("pixel", exact=True).click()
    assert queued(page)[str(region)]["inputs"]["style"] == "pixel"
    pick(page, region, "Add style", "candy")
    assert queued(page)[str(region)]["inputs"]["style"] == "pixel, candy"
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"chosen-{page.renderer}.png")
    page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function("() => app.graph.findNodesByType('DMMRegion')[0].widgets[0].value === 'pixel'")
    assert page.errors == []


def test_a_multiline_field(page, tmp_path_factory):
    open_graph(page, graph_of("style_sheet"))
    sheet, travel = id_of(page, "DMMStyleSheet"), id_of(page, "DMMStyleTravel")
    until_names(page, sheet, STYLES, "Add style")
    pick(page, sheet, "Add style", "echo")
    pick(page, sheet, "Add style", "pen")
    pick(page, travel, "Add style", "pixel")
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"lines-{page.renderer}.png")
    prompt = queued(page)
    assert prompt[str(sheet)]["inputs"]["styles"] == "echo\npen"
    assert prompt[str(travel)]["inputs"]["stops"] == "ink\ncandy\nsticker\npixel"


def test_every_text_field_has_the_menu(page, server):
    """Also before it is connected, from the graph's only model with styles."""
    info = server.get("object_info").json()
    inputs = {
        name: {**node["input"].get("required", {}), **node["input"].get("optional", {})} for name, node in info.items()
    }
    takes_text = {
        name: [key for key, spec in fields.items() if "DMM_STYLE" in str(spec[0]).split(",") and "STRING" in spec[0]]
        for name, fields in inputs.items()
    }
    assert {name: keys for name, keys in takes_text.items() if keys}.items() <= FIELDS.items()
    open_graph(page, graph_of("quickstart"))
    for node_type, fields in FIELDS.items():
        node = add(page, node_type)
        for field in fields:
            set_widget(page, node_type, field, "ink")
        words = ["Add style"] if node_type in ("DMMStyleSheet", "DMMStyleTravel") else ["Choose style", "Add style"]
        ends = [f": {field}" for field in fields] if len(fields) > 1 else [""]
        assert page.evaluate(ENTRIES, node) == [f"{word}{end}" for end in ends for word in words]
        until_names(page, node, STYLES, "Add style")
    for node_type in ("KSampler", "DMMStyleSelector", "DMMLoadModel"):
        assert page.evaluate(ENTRIES, id_of(page, node_type)) == []


def test_the_menu_follows_the_connections(page, server):
    """From a style over a region, a reroute and subgraphs to the model of the Style Mix; never to the other model."""
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    save_checkpoint(server.base / "models" / "dmm" / "other.safetensors", checkpoint)
    others = [style.name for style in checkpoint.styles]
    open_graph(page, graph_of("quickstart"))
    set_widget(page, "DMMLoadModel", "ckpt_name", "other.safetensors")
    add(page, "Reroute")
    style, blend, region, styles, load = (
        add(page, name) for name in ("DMMStyle", "DMMBlendStyles", "DMMRegion", "DMMStyleMix", "DMMLoadModel")
    )
    page.evaluate("id => app.graph.getNodeById(id).widgets[0].value = 'demo-dmm.safetensors'", load)
    unknown = "Choose style (no model with styles is connected)"
    until_names(page, region, unknown)  # two models, and the region leads to none
    link(page, style, 0, blend, "first")
    link(page, blend, 0, region, "style")
    page.evaluate(
        """([from, to]) => {
            const reroute = app.graph.findNodesByType('Reroute')[0], mix = app.graph.getNodeById(to);
            app.graph.getNodeById(from).connect(0, reroute, 0);
            reroute.connect(0, mix, mix.inputs.findIndex((i) => i.type === 'DMM_REGION'));
        }""",
        [region, styles],
    )
    until_names(page, style, unknown)
    link(page, load, 0, styles, "model")
    until_names(page, style, [*STYLES, "none"])
    assert names_for(page, region) is None  # its field is a link's
    assert names_for(page, styles) == [*STYLES, "none"]
    link(page, id_of(page, "DMMStyleSelector"), 0, styles, "model")
    until_names(page, style, [*others, "none"])
    inner = """(type) => [...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes).find((n) => n.type === type)"""
    for node_type in ("DMMStyle", "DMMRegion"):  # the style alone, then what it leads to
        page.evaluate("type => { app.graph.convertToSubgraph(new Set(app.graph.findNodesByType(type))); }", node_type)
        names = page.evaluate(
            f"""async () => {{
                const {{ stylesFor }} = await import('/extensions/comfyui-dmm/js/model_styles.js');
                return stylesFor(({inner})('DMMStyle'));
            }}"""
        )
        assert names == others
    assert page.errors == []


def test_a_named_blend_is_a_style_of_the_list(page):
    """Between Load DMM Model and Style Selector: listed by its name, and it paints."""
    open_graph(page, graph_of("quickstart"))
    choices(page, 8)
    blends = [add(page, "DMMNameBlend") for _ in range(2)]
    for blend, name in zip(blends, ("first mix", " second mix ")):
        page.evaluate(
            "([id, name]) => app.graph.getNodeById(id).widgets.find((w) => w.name === 'name').value = name",
            [blend, name],
        )
    link(page, id_of(page, "DMMLoadModel"), 0, blends[0], "model")
    link(page, blends[0], 0, blends[1], "model")
    link(page, blends[1], 0, id_of(page, "DMMStyleSelector"), "model")
    assert choices(page, 10) == [*STYLES, "first mix", "second mix", "none"]
    assert names_for(page, blends[0]) == [*STYLES, "none"]
    assert names_for(page, blends[1]) == [*STYLES, "first mix", "none"]
    set_widget(page, "DMMStyleSelector", "style", "second mix")
    run(page)
    page.evaluate("id => { app.graph.getNodeById(id).mode = 4; }", blends[0])
    assert choices(page, 9) == [*STYLES, "second mix", "none"]
    assert page.errors == []


def test_the_styles_of_an_add_on(page, server):
    """Behind Add DMM Styles to Model those of its file, whatever the model it is on has."""
    folder = server.base / "models" / "dmm_styles"
    folder.mkdir(exist_ok=True)
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16)
    save_style(folder / "menu.safetensors", checkpoint)
    open_graph(page, graph_of("quickstart"))
    added, selector = add(page, "DMMAddStyles"), id_of(page, "DMMStyleSelector")
    page.evaluate("id => app.graph.getNodeById(id).widgets[0].value = 'menu.safetensors'", added)
    link(page, id_of(page, "DMMLoadModel"), 0, added, "model")
    link(page, added, 0, selector, "model")
    assert choices(page, 5) == [*(style.name for style in checkpoint.styles), "none"]
    page.evaluate("id => { app.graph.getNodeById(id).mode = 4; }", added)
    assert choices(page, 8) == [*STYLES, "none"]
    assert page.errors == []


def test_names_are_text_in_the_menu(page, markup_graph):  # noqa: F811
    open_graph(page, markup_graph)
    node = add(page, "DMMRegion")
    until_names(page, node, ["ink", MARKUP, "paper: cut-out", "墨", "none"])
    entry = open_menu(page, node, "Choose style").get_by_text(MARKUP, exact=True)
    assert entry.count() == 1 and entry.locator("*").count() == 0
    entry.click()
    page.wait_for_function(f"() => ({NODE})('DMMRegion').widgets[0].value !== 'none'")
    text = page.evaluate(f"({NODE})('DMMRegion').widgets[0].value")
    assert parse_style(text) == mix({MARKUP: 1.0})
    assert page.locator("img[src=x]").count() == 0 and page.evaluate("window.hacked") is None


@pytest.mark.parametrize("page", ["canvas"], indirect=True)
def test_names_are_written_as_the_server_reads_them(page):
    written = page.evaluate(f"async names => names.map((await {MENU}).quoteName)", [*NASTY, "both ' and \""])
    assert written == [*map(quote_name, NASTY), None]
    for name, text in zip(NASTY, written):
        assert parse_style(f"{text}:2, pen:6") == mix({name: 2, "pen": 6})
    texts = ["", "none", " ", "ink", "ink:3,", "0%: ink; 40%-60%:", "0%: ink; 60% : pop", "0%: ink;\n60%:\n"]
    added = page.evaluate(
        f"async texts => {{ const menu = await {MENU}; return texts.map((text) => menu.withStyle(text, 'pen')); }}",
        texts,
    )
    same = ["pen", "pen", "pen", "ink, pen", "ink:3, pen", "0%: ink; 40%-60%: pen", "0%: ink; 60% : pop, pen"]
    assert list(map(parse_style, added)) == list(map(parse_style, [*same, "0%: ink; 60%: pen"])), texts
