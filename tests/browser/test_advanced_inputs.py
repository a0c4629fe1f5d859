"""Advanced inputs are folded, by both renderers; folding changes neither what is queued nor what is saved."""

import json

from ..host.templates import graph_of
from .test_workflows import open_graph, queued

TRAINER = "app.graph.findNodesByType('DMMDistillTeachers')[0]"
VISIBLE = f"""() => {{
    const node = {TRAINER};
    const seen = (w) => node.isWidgetRowVisible?.(w) ?? node.isWidgetVisible(w); // newer pages: its row is, while a link decides it
    return node.getLayoutWidgets().filter((w) => seen(w) && w.name !== 'dmm_advanced').map((w) => w.name);
}}"""
ESSENTIAL = ["preset", "name", "steps", "batch_size", "learning_rate", "seed", "memory"]


def serialized(page) -> dict:
    return page.evaluate(f"JSON.parse(JSON.stringify({TRAINER}.serialize()))")


def test_the_canvas_shows_the_essentials_and_the_preset_first(page):
    if page.renderer != "canvas":
        return  # "Nodes 2.0" folds by itself: below
    graph = graph_of("distill_quickstart")
    open_graph(page, graph)
    assert page.evaluate(VISIBLE) == ESSENTIAL
    before, sent = serialized(page)["widgets_values"], queued(page)
    assert before == next(n["widgets_values"] for n in graph["nodes"] if n["type"] == "DMMDistillTeachers")
    toggle = f"{TRAINER}.widgets.find((w) => w.name === 'dmm_advanced')"
    assert page.evaluate(f"{toggle}.label") == "25 advanced inputs \u25be"
    folded = page.evaluate(f"{TRAINER}.computeSize()[1]")
    page.evaluate(f"{toggle}.callback()")
    assert len(page.evaluate(VISIBLE)) == len(ESSENTIAL) + 25
    assert page.evaluate(f"{TRAINER}.size[1]") >= folded + 25 * 20
    assert serialized(page)["widgets_values"] == before and serialized(page)["showAdvanced"] and queued(page) == sent
    page.evaluate(f"{toggle}.callback()")
    assert page.evaluate(VISIBLE) == ESSENTIAL
    assert page.errors == []


def test_nodes_2_has_its_own_button_and_no_second_one(page):
    if page.renderer != "nodes2":
        return
    open_graph(page, graph_of("distill_quickstart"))
    node = page.locator("[data-node-id]").filter(has_text="Distill Teachers")
    node.get_by_text("Show advanced inputs").wait_for(state="visible")
    assert node.get_by_text("dmm_advanced").count() == 0 and node.get_by_text("feature_weight").count() == 0
    assert page.errors == []


def test_an_input_that_a_link_decides_stays_in_sight(page):
    open_graph(page, graph_of("distill_quickstart"))
    page.evaluate(f"""() => {{
        const source = LiteGraph.createNode('PrimitiveFloat');
        app.graph.add(source);
        source.connect(0, {TRAINER}, {TRAINER}.inputs.findIndex((i) => i.widget?.name === 'style_rate'));
    }}""")
    if page.renderer == "canvas":
        assert page.evaluate(VISIBLE) == [*ESSENTIAL[:-2], "seed", "style_rate", "memory"]
    assert (
        next(n for n in queued(page).values() if n["class_type"] == "DMMDistillTeachers")["inputs"]["style_rate"] != 3
    )


def test_a_graph_saved_before_folding_opens_folded_and_as_low(page):
    """Its node was as high as all inputs; its values are kept."""
    graph = json.loads(json.dumps(graph_of("distill_quickstart")))
    node = next(n for n in graph["nodes"] if n["type"] == "DMMDistillTeachers")
    node["size"] = [340, 2000]
    open_graph(page, graph)
    assert page.evaluate(f"{TRAINER}.size[1]") < 700
    assert serialized(page)["widgets_values"] == node["widgets_values"]
