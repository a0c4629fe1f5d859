"""The preset of a Distill Teachers node fills in its settings; a setting changed by hand makes it "custom"."""

from comfyui_dmm.training.presets import PRESETS

from ..host.templates import graph_of
from .test_workflows import open_graph, queued, set_widget

TRAINER = "app.graph.findNodesByType('DMMDistillTeachers')[0]"


def values(page) -> dict:
    return page.evaluate(f"Object.fromEntries({TRAINER}.widgets.map((w) => [w.name, w.value]))")


def choose(page, name, value):
    set_widget(page, "DMMDistillTeachers", name, value)


def test_a_preset_fills_in_and_a_change_makes_it_custom(page, tmp_path_factory):
    graph = graph_of("distill_quickstart")
    open_graph(page, graph)
    page.wait_for_function("fetch('/dmm/presets').then((answer) => answer.ok)")
    before = values(page)
    assert before["preset"] == "custom" and before["steps"] == 200 and before["adversarial_weight"] == 0
    choose(page, "preset", "paper")
    after = values(page)
    paper = PRESETS["paper"]
    want = {"steps": paper["steps"], "batch_size": 320, "learning_rate": 1e-5, "adversarial_weight": 0.01, "average": 0}
    assert {name: after[name] for name in want} == want and after["preset"] == "paper"
    kept = ("name", "seed", "precision", "preview_every")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    page.evaluate(f"app.canvas.centerOnNode({TRAINER})")
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"preset-{page.renderer}.png")
    choose(page, "steps", 500)
    assert values(page)["preset"] == "custom" and values(page)["batch_size"] == 320
    choose(page, "preset", "draft")
    choose(page, "name", "other")
    assert values(page)["preset"] == "draft"  # no setting of a preset
    sent = next(n for n in queued(page).values() if n["class_type"] == "DMMDistillTeachers")["inputs"]
    assert sent["preset"] == "draft" and sent["steps"] == PRESETS["draft"]["steps"]
    assert not page.errors
