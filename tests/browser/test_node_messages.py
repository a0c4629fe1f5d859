"""What a node says stands on it, in full: reports, and in red why it stopped."""

from ..host.templates import graph_of
from .test_workflows import open_graph, run, set_widget


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
    open_graph(page, graph_of("quickstart"))
    run(page)
    report = page.locator("pre").filter(has_text="7 styles")
    report.wait_for(state="visible")
    page.wait_for_timeout(500)
    inner, needed = report.evaluate("(e) => [e.clientHeight, e.scrollHeight]")
    assert inner >= needed > 0


def test_an_error_stands_on_its_node_until_the_next_run(page, tmp_path_factory):
    open_graph(page, graph_of("quickstart"))
    set_widget(page, "DMMStyleSelector", "style", "watercolour")
    queue_and_wait(page, "execution_error")
    alert = page.locator("pre[role=alert]")
    alert.wait_for(state="visible")
    said = "unknown style 'watercolour'. The styles of this model: ink, pen, candy, pop, pixel, sticker, echo, none"
    assert alert.inner_text() == said
    owner = "app.graph.nodes.filter((n) => n.widgets?.some((w) => w.name === 'dmm_report' && w.value.includes('watercolour')))"
    assert page.evaluate(f"{owner}.map((n) => n.type)") == ["DMMStyleSelector"]
    page.locator(".p-toast-message").filter(has_text="watercolour").first.wait_for(state="visible")
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"error-{page.renderer}.png")
    set_widget(page, "DMMStyleSelector", "style", "pen")
    queue_and_wait(page, "execution_success")
    page.wait_for_function("() => !document.querySelector('pre[role=alert]')")
    assert page.errors == []
