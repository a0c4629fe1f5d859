"""The buttons on a Distill Teachers node while it trains, pressed with the mouse."""

import json
import re

import pytest

from ..host.templates import graph_of
from .conftest import PATIENCE
from .test_workflows import open_graph, queued, set_widget

TRAINER = "app.graph.findNodesByType('DMMDistillTeachers')[0]"
LABELS = ["Sample now", "Save now", "Pause", "Stop and save"]


@pytest.fixture
def trainer(page, server, request):
    """The quickstart of training, set to go on for ever and under a name of its own: the host runs nothing twice."""
    graph = graph_of("distill_quickstart")
    open_graph(page, graph)
    settings = {"name": re.sub(r"\W+", "-", request.node.name), "steps": 100_000, "batch_size": 4}
    for name, value in settings.items():
        set_widget(page, "DMMDistillTeachers", name, value)
    set_widget(page, "DMMDemoScenes", "count", 8)
    show(page)
    page.evaluate("""() => {
        window.ended = null;
        for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
            app.api.addEventListener(kind, () => { window.ended ??= kind; });
    }""")
    yield page
    if training(server):
        page.evaluate("app.api.interrupt(null)")
        page.wait_for_function("() => window.ended")


def show(page):
    """The whole trainer on the screen, with room below for what it will show."""
    page.evaluate(f"""() => {{
        const node = {TRAINER};
        app.canvas.ds.scale = 0.6;
        app.canvas.ds.offset = [400 - node.pos[0], 150 - node.pos[1]];
        app.canvas.setDirty(true, true);
    }}""")


def training(server) -> list[dict]:
    return server.get("dmm/training").json()["training"]


def start(page, server):
    page.evaluate("() => { app.queuePrompt(0); }")
    button(page, "Sample now").wait_for(state="visible")
    steps_done(page, server)


def steps_done(page, server):
    """The host's loss graph cannot draw a single step."""
    until(page, lambda: training(server)[0]["step"] >= 2)


def until(page, happened):
    for _ in range(PATIENCE // 200):
        if happened():
            return
        page.wait_for_timeout(200)
    pytest.fail("it never happened")


def files(server, pattern) -> set:
    """Of all runs so far."""
    return set(server.base.rglob(f"output/dmm_runs/*/{pattern}"))


def button(page, label):
    return page.get_by_role("button", name=label, exact=True)


def saved(page) -> list:
    """What saving the workflow would write: widget values by node, and the trainer's inputs."""
    nodes = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize())).nodes")
    inputs = next(node["inputs"] for node in nodes if node["type"] == "DMMDistillTeachers")
    return [{node["id"]: node.get("widgets_values") for node in nodes}, [entry["name"] for entry in inputs]]


def test_the_buttons_steer_the_training(trainer, server, tmp_path_factory):
    page = trainer
    before = queued(page), saved(page)
    assert page.get_by_role("button", name="Stop and save").count() == 0  # nothing trains
    start(page, server)
    assert all(button(page, label).is_enabled() for label in LABELS)
    (entry,) = training(server)
    assert entry["node_id"] == str(page.evaluate(f"{TRAINER}.id"))

    button(page, "Pause").click()
    button(page, "Resume").wait_for(state="visible")
    assert training(server)[0]["paused"]
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"paused-{page.renderer}.png")
    pictures, states = files(server, "pictures/*.png"), files(server, "state-*.safetensors")
    button(page, "Sample now").click()
    until(page, lambda: files(server, "pictures/*.png") - pictures)
    button(page, "Save now").click()
    until(page, lambda: files(server, "state-*.safetensors") - states)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"sampled-{page.renderer}.png")
    button(page, "Resume").click()
    button(page, "Pause").wait_for(state="visible")
    assert not training(server)[0]["paused"]
    assert (queued(page), saved(page)) == before
    chart = page.locator("svg[role=img]")
    page.wait_for_function("() => document.querySelectorAll('svg[role=img] polyline').length === 4")
    assert re.match(r"Loss after \d+ of 100000 steps: ink [\d.e-]+, candy ", chart.get_attribute("aria-label"))

    button(page, "Stop and save").click()
    page.wait_for_function("() => window.ended")
    assert page.evaluate("window.ended") == "execution_success"
    assert all(button(page, label).is_disabled() for label in LABELS)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"stopped-{page.renderer}.png")
    names = page.evaluate(f"{TRAINER}.widgets.map((w) => w.name)")
    assert (
        chart.count() == 1 and "dmm_losses" in names and "$$node-text-preview" not in names
    )  # no "step 180 of 100000"
    assert (queued(page), saved(page)) == before and training(server) == []
    assert page.errors == []


def test_a_page_that_is_opened_while_its_graph_trains(trainer, server):
    page = trainer
    start(page, server)
    button(page, "Pause").click()
    button(page, "Resume").wait_for(state="visible")
    graph = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    open_graph(page, json.loads(json.dumps(graph)))
    show(page)
    button(page, "Resume").wait_for(state="visible")
    button(page, "Stop and save").click()
    page.wait_for_function("() => window.ended")
    assert page.evaluate("window.ended") == "execution_success" and page.errors == []


def test_inside_a_subgraph(trainer, server):
    """Its id is then that of the subgraph and its own."""
    page = trainer
    page.evaluate("() => { app.graph.convertToSubgraph(new Set(app.graph.findNodesByType('DMMDistillTeachers'))); }")
    page.evaluate("() => { app.queuePrompt(0); }")
    inner = "[...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes).find((n) => n.type === 'DMMDistillTeachers')"
    page.wait_for_function(f"() => {inner}.widgets.some((w) => w.name === 'dmm_controls')")
    steps_done(page, server)
    (entry,) = training(server)
    assert ":" in entry["node_id"]
    page.evaluate(f"() => {inner}.widgets.find((w) => w.name === 'dmm_controls').element.lastChild.click()")
    page.wait_for_function("() => window.ended")
    assert page.evaluate("window.ended") == "execution_success" and page.errors == []
