"""What a node says stands on it, in full: reports, and in red why it stopped."""

from ..host.templates import graph_of
from .test_workflows import open_graph, run, set_widget

TOAST = ".p-toast-message, [data-testid=toast]"
"""Of older pages, and from 1.58 on."""


def queue_and_wait(page, event: str) -> None:
    page.evaluate(
        """(event) => {
            window.seen = null;
            app.api.addEventListener(event, () => { window.seen = event; }, { once: true });
            app.queuePrompt(0);
        }""",
        event,
    )
    page.wait_for_function("() => window.seen")


def test_a_report_is_not_cut_off(page):
    """Sentences wrap and tables scroll sideways; both are as high as they need, up to 16 lines."""
    open_graph(page, graph_of("quickstart"))
    for text in (
        "one line",
        "a sentence that is much wider than the node is, and must go on in the next line, and the next " * 2,
        "a    b\n1    2",
    ):
        page.evaluate("(text) => app.graph.findNodesByType('DMMStyleSelector')[0].onExecuted({ text: [text] })", text)
        report = page.locator("pre").filter(has_text=text.split("\n")[0][:30])
        report.wait_for(state="visible")
        page.wait_for_timeout(500)
        inner, needed = report.evaluate("(e) => [e.clientHeight, e.scrollHeight]")
        assert inner >= needed > 0, text


def test_a_long_report_scrolls_and_leaves_the_nodes_below_alone(page):
    """Once it has the focus, the wheel is the report's and not the graph's."""
    open_graph(page, graph_of("quickstart"))
    text = "\n".join(f"line {i}" for i in range(80))
    page.evaluate("(text) => app.graph.findNodesByType('DMMStyleSelector')[0].onExecuted({ text: [text] })", text)
    report = page.locator("pre").filter(has_text="line 79")
    report.wait_for(state="visible")
    page.wait_for_timeout(500)
    assert report.evaluate("(e) => e.clientHeight") < 20 * 15 < report.evaluate("(e) => e.scrollHeight")
    assert page.evaluate("app.graph.findNodesByType('DMMStyleSelector')[0].size[1]") < 600
    zoom = page.evaluate("app.canvas.ds.scale")
    report.click()
    page.mouse.wheel(0, 200)
    page.wait_for_function("(e) => e.scrollTop > 100", arg=report.element_handle())
    assert page.evaluate("app.canvas.ds.scale") == zoom


def test_a_loader_says_on_its_outputs_what_the_file_lacks(page):
    """Its cards show the styles; what they say is not said twice."""
    open_graph(page, graph_of("quickstart"))
    node = "app.graph.findNodesByType('DMMLoadModel')[0]"
    run(page)
    labels = f"{node}.outputs.map((o) => o.label ?? o.name)"
    assert page.evaluate(labels) == ["MODEL", "CLIP", "VAE"]
    assert not page.evaluate(f"{node}.widgets.some((w) => w.name === 'dmm_report')")
    set_widget(page, "DMMLoadModel", "ckpt_name", "demo-teacher-ink.safetensors")
    queue_and_wait(page, "execution_error")
    assert page.evaluate(labels) == ["MODEL", "not in this file: CLIP", "not in this file: VAE"]
    set_widget(page, "DMMLoadModel", "ckpt_name", "demo-dmm.safetensors")
    assert page.evaluate(labels) == ["MODEL", "CLIP", "VAE"]


def test_an_error_stands_on_its_node_until_the_next_run(page, tmp_path_factory):
    """The next run does not execute the node, whose settings are those of the run before: the host has kept what it made."""
    open_graph(page, graph_of("quickstart"))
    set_widget(page, "DMMStyleSelector", "style", "pen")
    run(page)
    set_widget(page, "DMMStyleSelector", "style", "watercolour")
    queue_and_wait(page, "execution_error")
    alert = page.locator("pre[role=alert]")
    alert.wait_for(state="visible")
    said = "unknown style 'watercolour'. The styles of this model: ink, pen, candy, pop, pixel, sticker, echo, none"
    assert alert.inner_text() == said
    owner = "app.graph.nodes.filter((n) => n.widgets?.some((w) => w.name === 'dmm_report' && w.value.includes('watercolour')))"
    assert page.evaluate(f"{owner}.map((n) => n.type)") == ["DMMStyleSelector"]
    page.locator(TOAST).filter(has_text="watercolour").first.wait_for(state="visible")
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"error-{page.renderer}.png")
    set_widget(page, "DMMStyleSelector", "style", "pen")
    queue_and_wait(page, "execution_success")
    page.wait_for_function("() => !document.querySelector('pre[role=alert]')")
    assert page.errors == []
