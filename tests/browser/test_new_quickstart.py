"""The button that opens what was just merged or trained in a new quickstart."""

from ..host.templates import graph_of
from .test_workflows import open_graph, queued, run

TABS = "app.extensionManager.workflow.openWorkflows.map((one) => one.path)"


def test_a_merged_model_opens_in_a_tab_of_its_own(page):
    open_graph(page, graph_of("instant_merge"))
    before, tabs = queued(page), page.evaluate(TABS)
    button = page.get_by_role("button", name="Open in a new quickstart")
    assert button.count() == 0
    run(page)
    button.wait_for(state="visible")
    assert queued(page) == before  # the button is no part of the graph
    button.click()
    page.wait_for_function(
        "(tabs) => !tabs.includes(app.extensionManager.workflow.activeWorkflow?.path) && app.graph.nodes.length === 8",
        arg=tabs,
    )
    now = queued(page)
    loader, selector = (
        next(node["inputs"] for node in now.values() if node["class_type"] == kind)
        for kind in ("DMMLoadModel", "DMMStyleSelector")
    )
    name = loader["ckpt_name"]
    assert name.startswith("merged-") and name.endswith(".safetensors") and selector["style"] == "ink"
    stem = name.removesuffix(".safetensors")
    (new,) = set(page.evaluate(TABS)) - set(tabs)
    assert new.startswith(f"workflows/Quickstart {stem}")
    assert page.evaluate("app.extensionManager.workflow.activeWorkflow.path") == new
    run(page)  # the lists know the file
    assert page.errors == []


def test_a_few_step_model_opens_with_its_own_settings(page):
    """A cfg of 1 and the sampler that it has learnt: with the template's it paints badly."""
    open_graph(page, graph_of("quickstart"))
    few = {"steps": 4, "sampler": "euler", "scheduler": "sgm_uniform", "cfg": 1.0}
    saved = {"file": "demo-dmm.safetensors", "style": "pen", "side": 128, "few_steps": few}
    tabs = page.evaluate(TABS)
    page.evaluate(
        "(saved) => app.graph.findNodesByType('DMMStyleSelector')[0].onExecuted({ text: ['saved'], saved: [saved] })",
        saved,
    )
    page.get_by_role("button", name="Open in a new quickstart").click()
    page.wait_for_function("(tabs) => !tabs.includes(app.extensionManager.workflow.activeWorkflow?.path)", arg=tabs)
    sampler = next(node["inputs"] for node in queued(page).values() if node["class_type"] == "KSampler")
    names = {"steps": "steps", "cfg": "cfg", "sampler": "sampler_name", "scheduler": "scheduler"}
    assert {ours: sampler[theirs] for ours, theirs in names.items()} == few
    run(page)
    assert page.errors == []
