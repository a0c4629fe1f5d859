"""The canvas of Style Mix and Style Region in the real page: driven by mouse, touch and keys, and the text or numbers it writes."""

import json

import pytest

from ..host.test_example_workflows import graph_of
from .test_style_menu import add, id_of, link
from .test_workflows import open_graph, queued, run

HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>'
FIND = "app.graph.getNodeById({})"


class Canvas:
    """The canvas of one node, on the screen; places are shares of the painted canvas."""

    def __init__(self, page, node: int):
        self.page, self.node = page, node
        self.root = page.locator(".dmm-canvas").nth(self.number())
        self.show()

    def number(self) -> int:
        """Which of the page's canvases it is."""
        find = "(id) => [...document.querySelectorAll('.dmm-canvas')].indexOf(app.graph.getNodeById(id).dmmCanvas.root)"
        self.page.wait_for_function(f"(id) => ({find})(id) >= 0", arg=self.node)
        return self.page.evaluate(find, self.node)

    def show(self):
        """At the natural size, all of the node in the window and away from the others."""
        self.page.evaluate(
            """(id) => {
                const node = app.graph.getNodeById(id);
                node.pos = [-3000, -3000];
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [500 - node.pos[0], 120 - node.pos[1]];
                app.canvas.setDirty(true, true);
            }""",
            self.node,
        )
        self.page.wait_for_timeout(400)  # drawn where it is now

    def open(self):
        if not self.root.locator(".dmm-stage").is_visible():
            self.root.locator("[data-action=open]").click()
        self.root.locator(".dmm-stage").wait_for(state="visible")
        self.page.wait_for_timeout(400)

    def at(self, x: float, y: float) -> tuple[float, float]:
        frame = self.root.locator(".dmm-paper").bounding_box()
        return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]

    def drag(self, start, end, *keys):
        mouse, keyboard = self.page.mouse, self.page.keyboard
        mouse.move(*self.at(*start))
        for key in keys:
            keyboard.down(key)
        mouse.down()
        mouse.move(*self.at(*((a + b) / 2 for a, b in zip(start, end))))
        mouse.move(*self.at(*end))
        mouse.up()
        for key in keys:
            keyboard.up(key)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def button(self, action: str):
        return self.root.locator(f"[data-action={action}]")

    @property
    def text(self) -> str:
        return self.page.evaluate(f"{FIND.format(self.node)}.widgets.find((w) => w.name === 'region_list').value")

    @property
    def regions(self) -> list[dict]:
        return json.loads(self.text) if self.text else []

    @property
    def boxes(self) -> list[tuple]:
        return [tuple(region[side] for side in "xywh") for region in self.regions]

    @property
    def numbers(self) -> tuple:
        """Of a Style Region."""
        values = f"['x', 'y', 'width', 'height'].map((name) => {FIND.format(self.node)}.widgets.find((w) => w.name === name).value)"
        return tuple(round(value, 6) for value in self.page.evaluate(values))


@pytest.fixture
def mix(page) -> Canvas:
    """A Style Mix in the template's graph, over a canvas of 512 x 128."""
    open_graph(page, graph_of("regions"))
    canvas = Canvas(page, id_of(page, "DMMStyleMix"))
    page.evaluate(
        f"""() => {{
            const node = {FIND.format(canvas.node)};
            for (const [i, input] of node.inputs.entries())
                if (input.name.startsWith('regions.') && input.link != null) node.disconnectInput(i);
            node.setSize([560, node.size[1]]);
        }}"""
    )
    canvas.show()
    canvas.open()
    return canvas


@pytest.fixture
def square(page) -> Canvas:
    """A new Style Mix, connected to nothing: a square canvas."""
    graph = graph_of("regions")
    open_graph(page, graph | {"nodes": graph["nodes"][:1], "links": [], "groups": []})  # a note alone
    canvas = Canvas(page, add(page, "DMMStyleMix"))
    canvas.open()
    return canvas


def test_boxes_by_mouse(square, page, tmp_path_factory):
    """Draw, move, resize, duplicate, reorder, undo, redo, delete; the canvas snaps unless Alt is held."""
    square.drag((0.1, 0.1), (0.42, 0.51))
    assert square.boxes == [(0.1, 0.1, 0.3, 0.4)]  # on the grid of 0.05 and on the middle
    assert square.regions[0] == {
        "style": "none",
        "x": 0.1,
        "y": 0.1,
        "w": 0.3,
        "h": 0.4,
        "strength": 1,
        "feather": 0.05,
    }
    square.drag((0.25, 0.3), (0.47, 0.31))  # its right edge comes near to the border of nothing: the grid
    assert square.boxes == [(0.3, 0.1, 0.3, 0.4)]
    square.drag((0.6, 0.5), (0.99, 0.74))  # the lower right corner, to the canvas's border
    assert square.boxes == [(0.3, 0.1, 0.7, 0.65)]
    square.drag((0.3, 0.42), (0.5, 0.42))  # the left edge
    assert square.boxes == [(0.5, 0.1, 0.5, 0.65)]
    square.drag((0.75, 0.4), (0.752, 0.43), "Alt")
    assert 0.125 < square.boxes[0][1] < 0.135
    square.button("undo").click()
    square.button("duplicate").click()
    assert square.boxes == [(0.5, 0.1, 0.5, 0.65), (0.45, 0.15, 0.5, 0.65)]
    square.button("back").click()  # the copy goes below
    assert square.boxes == [(0.45, 0.15, 0.5, 0.65), (0.5, 0.1, 0.5, 0.65)]
    square.drag((0.6, 0.05), (0.2, 0.25), "Shift")  # over others
    assert square.boxes[2] == (0.2, 0.05, 0.4, 0.2)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"canvas-square-{page.renderer}.png")
    square.button("delete").click()
    square.button("delete").click()
    assert square.boxes == [(0.45, 0.15, 0.5, 0.65)]
    square.button("undo").click()
    square.button("undo").click()
    assert len(square.boxes) == 3
    square.button("redo").click()
    assert len(square.boxes) == 2
    nodes = page.evaluate("app.graph.nodes.length")
    assert page.evaluate(f"Boolean({FIND.format(square.node)})") and nodes == page.evaluate("app.graph.nodes.length")
    assert page.errors == []


def test_boxes_by_keys(square, page):
    """Tab, arrows, Shift, Delete, Ctrl+D, Ctrl+Z, Page Up; the graph sees none of it, with the node selected."""
    page.evaluate(f"app.canvas.selectNode({FIND.format(square.node)})")
    before = page.evaluate("app.graph.nodes.map((n) => [n.id, ...n.pos])")
    square.button("add").focus()
    square.press("Enter")
    square.press("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowDown")
    assert square.boxes == [(0.27, 0.26, 0.49, 0.51)]
    square.press("Control+d")
    assert square.boxes == [(0.27, 0.26, 0.49, 0.51), (0.32, 0.31, 0.49, 0.51)]
    square.press("Shift+Tab", "ArrowUp")
    assert square.boxes == [(0.27, 0.25, 0.49, 0.51), (0.32, 0.31, 0.49, 0.51)]
    square.press("Tab", "PageDown")
    assert square.boxes == [(0.32, 0.31, 0.49, 0.51), (0.27, 0.25, 0.49, 0.51)]
    square.press("PageUp", "Delete")
    assert square.boxes == [(0.27, 0.25, 0.49, 0.51)]
    square.press("Control+z", "Control+z", "Control+z")
    assert square.boxes == [(0.27, 0.25, 0.49, 0.51), (0.32, 0.31, 0.49, 0.51)]
    square.press("Control+Shift+z", "Control+Shift+z", "Control+Shift+z")
    assert square.boxes == [(0.27, 0.25, 0.49, 0.51)]
    square.press("Backspace", "Control+c", "Control+v", "h", "f", ".")
    assert square.boxes == []
    assert (
        page.evaluate("app.graph.nodes.map((n) => [n.id, ...n.pos])") == before
    )  # none deleted, copied, moved or pasted
    assert page.errors == []


def test_split_in_columns_and_rows(square, page, tmp_path_factory):
    """The whole canvas while it is empty, then the chosen region; by button and by key; styles and prompts go to both halves."""
    square.button("columns").click()
    assert square.boxes == [(0, 0, 0.5, 1), (0.5, 0, 0.5, 1)]
    square.press("Tab", "-")  # the right half in rows
    assert square.boxes == [(0, 0, 0.5, 1), (0.5, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]
    square.press("|")
    assert square.boxes[1:3] == [(0.5, 0, 0.25, 0.5), (0.75, 0, 0.25, 0.5)]
    square.button("rows").click()
    assert len(square.boxes) == 5 and sum(w * h for _, _, w, h in square.boxes) == 1
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"canvas-split-{page.renderer}.png")
    square.press("Control+z", "Control+z", "Control+z")
    assert square.boxes == [(0, 0, 0.5, 1), (0.5, 0, 0.5, 1)]
    square.press("Control+z")
    assert square.boxes == []
    assert page.errors == []


def test_what_a_screen_reader_hears(square):
    square.press("Tab")
    square.drag((0.1, 0.1), (0.3, 0.5))
    square.drag((0.9, 0.5), (1.06, 0.99), "Alt")
    square.drag((0.95, 0.7), (1.05, 0.7), "Alt")
    box = square.root.get_by_role(
        "button", name="Region 1 of 2, none, left 10%, top 10%, width 20%, height 40%", exact=True
    )
    assert box.get_attribute("aria-pressed") == "false"
    off = square.root.get_by_role("button", name="Region 2 of 2")
    assert (
        "lies outside of the canvas" in off.get_attribute("aria-label") and off.get_attribute("aria-pressed") == "true"
    )
    assert "Region 2" in square.root.get_by_role("status").inner_text()
    assert square.root.get_by_role("group", name="Regions on the canvas").count() == 1
    for button in square.root.locator("input[type=button]").all():
        assert button.get_attribute("aria-label")


def test_by_touch(square, page):
    """Pointer events as a finger gives them: drawn, then its corner pulled from 15 pixels beside it."""
    script = """([selector, steps]) => {
        const stage = document.querySelectorAll(selector[0])[selector[1]].querySelector('.dmm-stage');
        stage.setPointerCapture = () => {};
        for (const [type, x, y] of steps)
            stage.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, pointerId: 9, pointerType: 'touch', isPrimary: true,
                button: type === 'pointermove' ? -1 : 0, bubbles: true, cancelable: true }));
    }"""

    def swipe(start, end, off=0):
        (x0, y0), (x1, y1) = square.at(*start), square.at(*end)
        x0, x1 = x0 + off, x1 + off
        steps = [("pointerdown", x0, y0), ("pointermove", x1, y1), ("pointerup", x1, y1)]
        page.evaluate(script, [[".dmm-canvas", square.number()], steps])

    swipe((0.2, 0.2), (0.5, 0.5))
    assert square.boxes == [(0.2, 0.2, 0.3, 0.3)]
    swipe((0.5, 0.5), (0.7, 0.8), off=15)
    assert square.boxes == [(0.2, 0.2, 0.5, 0.6)]
    assert square.root.locator(".dmm-stage").evaluate("e => getComputedStyle(e).touchAction") == "none"


def test_the_fields_of_a_region(mix, page, tmp_path_factory):
    """Style, strength, feather, weight, prompt and the two switches; then the graph runs with what was drawn."""
    link(page, id_of(page, "DMMLoadModel"), 1, mix.node, "clip")
    mix.drag((0.02, 0.04), (0.35, 0.96))
    field = mix.root.locator
    for name, value in {
        "style": "ink:0.7, pen:0.3",
        "prompt": "an orange cat in the city",
        "feather": "0.1",
        "weight": "2",
    }.items():
        field(f"[data-field={name}]").fill(value)
        field(f"[data-field={name}]").press("Tab")
    field("[data-field=fall_off]").check()
    field("[data-field=paint_on]").check()
    (region,) = mix.regions
    drawn = [region.pop(side) for side in "xywh"]
    assert drawn[0] == pytest.approx(0, abs=0.02) and drawn[3] == pytest.approx(1, abs=0.02)
    words = {"style": "ink:0.7, pen:0.3", "prompt": "an orange cat in the city"}
    assert region == words | {
        "strength": 1,
        "feather": 0.1,
        "weight": 2,
        "fall_off": "gaussian",
        "paint_on": "whole canvas",
    }
    mix.drag((0.6, 0.04), (0.95, 0.96))
    field("[data-field=style]").fill("candy")
    field("[data-field=style]").press("Enter")
    assert [r["style"] for r in mix.regions] == ["ink:0.7, pen:0.3", "candy"]
    assert field("datalist option").evaluate_all("options => options.map((o) => o.value)")[:2] == ["ink", "pen"]
    frame = mix.root.locator(".dmm-paper").bounding_box()
    assert frame["width"] / frame["height"] == pytest.approx(4, rel=0.02)  # 512 x 128, from Empty Latent Image
    sent = queued(page)[str(mix.node)]["inputs"]
    assert sent["region_list"] == mix.text and json.loads(sent["region_list"]) == mix.regions
    run(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.dmm-picture')].some((i) => !i.hidden && i.naturalWidth === 512)"
    )
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"canvas-{page.renderer}.png")
    assert page.errors == []


def test_running_and_saving_take_what_is_being_typed(square, page):
    square.drag((0.1, 0.1), (0.6, 0.6))
    field = square.root.locator("[data-field=negative]")
    field.fill("blurry")
    assert "negative" not in square.regions[0]
    field.press("Control+Enter")
    assert square.regions[0]["negative"] == "blurry"
    assert "Connect clip" in square.root.get_by_role("status").inner_text()


def test_each_change_is_a_step_of_the_graph_s_own_undo(square, page):
    """For who undoes from outside of the canvas; the node is then the graph's of before."""
    square.drag((0.1, 0.1), (0.6, 0.6))
    square.drag((0.3, 0.3), (0.4, 0.4))
    assert square.boxes == [(0.2, 0.2, 0.5, 0.5)]
    page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function(
        "() => app.graph.findNodesByType('DMMStyleMix')[0]?.dmmCanvas.value.includes('\"x\":0.1,\"y\":0.1,')"
    )
    page.evaluate("app.extensionManager.command.execute('Comfy.Redo')")
    page.wait_for_function(
        "() => app.graph.findNodesByType('DMMStyleMix')[0]?.dmmCanvas.value.includes('\"x\":0.2,\"y\":0.2,')"
    )


@pytest.mark.parametrize("zoom", [0.6, 1.5])
def test_at_other_zooms(square, page, zoom):
    page.evaluate("(zoom) => { app.canvas.ds.scale = zoom; app.canvas.setDirty(true, true); }", zoom)
    page.evaluate(
        "([id, zoom]) => { const node = app.graph.getNodeById(id);"
        " app.canvas.ds.offset = [300 / zoom - node.pos[0], -100 - node.pos[1]]; }",
        [square.node, zoom],
    )
    page.wait_for_timeout(400)
    square.drag((0.1, 0.1), (0.6, 0.6))
    square.drag((0.35, 0.35), (0.55, 0.25))
    assert square.boxes == [(0.3, 0, 0.5, 0.5)]


def test_text_that_cannot_be_read_stays(square, page):
    """As text it can be edited; what is not JSON is kept, said and sent, and the canvas does not touch it."""
    square.button("text").click()
    area = square.root.locator("textarea")
    good = '[{"style": "ink", "x": 0, "y": 0, "w": 0.5, "h": 1}]'
    area.fill(good)
    area.blur()
    assert square.boxes == [(0, 0, 0.5, 1)] and square.text == good
    area.fill('[{"x": 0,]')
    area.blur()
    assert square.text == '[{"x": 0,]' and "not JSON" in square.root.get_by_role("status").inner_text()
    square.drag((0.1, 0.1), (0.6, 0.6))
    square.button("add").click()
    assert square.text == '[{"x": 0,]' and area.input_value() == '[{"x": 0,]'
    square.button("undo").click()
    assert square.text == good


def test_hostile_names_are_text(square, page):
    before = page.locator("script").count()
    entry = {"style": HOSTILE, "x": 0, "y": 0, "w": 1, "h": 1, "prompt": HOSTILE}
    page.evaluate(
        f"(text) => {{ {FIND.format(square.node)}.widgets.find((w) => w.name === 'region_list').value = text; }}",
        json.dumps([entry]),
    )
    box = square.root.locator(".dmm-box")
    box.wait_for()
    assert box.locator(".dmm-name").inner_text() == f"1 {HOSTILE}" and box.locator("img, script").count() == 0
    assert HOSTILE in box.locator("input").get_attribute("aria-label")
    box.locator("input").focus()
    page.wait_for_timeout(500)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0 and page.locator("script").count() == before
    assert page.errors == []


def test_the_box_of_style_region(page, tmp_path_factory):
    """The canvas and the numbers are one: drawn, moved, resized by mouse and keys, undone; numbers typed move the box."""
    open_graph(page, graph_of("regions"))
    canvas = Canvas(page, id_of(page, "DMMRegion"))
    assert canvas.numbers == (0.03, 0, 0.25, 1)
    assert not canvas.root.locator(".dmm-stage").is_visible()  # a graph from before the canvas
    canvas.open()
    page.wait_for_timeout(500)
    frame = canvas.root.locator(".dmm-paper").bounding_box()
    assert frame["width"] / frame["height"] == pytest.approx(4, rel=0.05)
    box = canvas.root.locator(".dmm-box")
    assert "ink" in box.inner_text() and "an orange cat in the city" in box.inner_text()
    canvas.drag((0.15, 0.5), (0.4, 0.5))
    assert canvas.numbers == (0.3, 0, 0.25, 1)
    canvas.press("ArrowRight", "Shift+ArrowRight")
    assert canvas.numbers == (0.31, 0, 0.26, 1)
    canvas.press("Delete", "Control+d")  # there is one box
    assert canvas.numbers == (0.31, 0, 0.26, 1)
    canvas.press("Control+z", "Control+z")
    assert canvas.numbers == (0.3, 0, 0.25, 1)
    canvas.drag((0.7, 0.2), (0.9, 0.8))  # drawn anew
    assert canvas.numbers == (0.7, 0.2, 0.2, 0.6)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"canvas-box-{page.renderer}.png")
    page.evaluate(f"{FIND.format(canvas.node)}.widgets.find((w) => w.name === 'x').value = 0.1")
    page.wait_for_timeout(700)
    assert canvas.root.get_by_role("button", name="left 10%, top 20%").count() == 1
    sent = queued(page)[str(canvas.node)]["inputs"]
    assert (sent["x"], sent["width"]) == (0.1, 0.2) and "dmm_canvas" not in sent
    assert page.errors == []


def test_a_mask_or_a_link_decides_the_place(page):
    """Then the canvas says so and changes nothing; a closed canvas says what is wrong on its button."""
    open_graph(page, graph_of("regions"))
    canvas = Canvas(page, id_of(page, "DMMRegion"))
    set_number = f"(x) => {{ {FIND.format(canvas.node)}.widgets.find((w) => w.name === 'x').value = x; }}"
    page.evaluate(set_number, 0.9)
    opener = canvas.button("open")
    page.wait_for_function("(e) => e.value.startsWith('\u26a0')", arg=opener.element_handle())
    assert "60% of it lies outside" in opener.get_attribute("aria-label")
    page.evaluate(set_number, 0.03)
    page.wait_for_function("(e) => e.value.startsWith('Draw')", arg=opener.element_handle())
    canvas.open()
    mask = add(page, "SolidMask")
    link(page, mask, 0, canvas.node, "mask")
    status = canvas.root.get_by_role("status")
    page.wait_for_function("(e) => e.textContent.includes('comes from mask')", arg=status.element_handle())
    canvas.drag((0.15, 0.5), (0.4, 0.5))
    canvas.press("ArrowRight")
    assert canvas.numbers == (0.03, 0, 0.25, 1)
    assert page.errors == []


def test_old_graphs_open_as_they_were(page):
    """Saved before the canvas: values, links and sizes stay, and the graph that is saved again opens again."""
    old = graph_of("regions")
    for node in old["nodes"]:
        if node["type"] in ("DMMRegion", "DMMStyleMix"):
            node["widgets_values"] = node["widgets_values"][:-1]
            node["inputs"] = [i for i in node["inputs"] if i["name"] not in ("clip", "bboxes", "picture")]
    values = {n["id"]: n["widgets_values"] for n in old["nodes"] if n["type"] in ("DMMRegion", "DMMStyleMix")}
    defaults = {"DMMRegion": 0, "DMMStyleMix": ""}
    open_graph(page, old)
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    kept = {n["id"]: (n["type"], n["widgets_values"]) for n in saved["nodes"] if n["id"] in values}
    assert kept == {key: (kind, [*values[key], defaults[kind]]) for key, (kind, _) in kept.items()}
    heights = {n["type"]: n["size"][1] for n in saved["nodes"] if n["id"] in values}
    assert (
        max(heights.values()) < 430 and page.locator(".dmm-stage:visible").count() == 0
    )  # with a button for the canvas, closed
    links = {link[0]: link[1:5] for link in saved["links"]}
    assert links == {link[0]: link[1:5] for link in old["links"]}
    sent = queued(page)
    mix = sent[str(id_of(page, "DMMStyleMix"))]["inputs"]
    assert mix["region_list"] == "" and sorted(k for k in mix if k.startswith("regions.")) == [
        f"regions.region{i}" for i in range(3)
    ]
    open_graph(page, saved)
    assert queued(page) == sent
    assert page.errors == []


def test_connected_regions_are_shown_in_the_list_s_canvas(page):
    """As dashed boxes that cannot be moved; edges snap to them."""
    open_graph(page, graph_of("regions"))
    canvas = Canvas(page, id_of(page, "DMMStyleMix"))
    canvas.open()
    page.wait_for_timeout(500)
    ghosts = canvas.root.locator(".dmm-ghost .dmm-name")
    assert ghosts.all_inner_texts() == ["ink", "candy", "sticker"]
    before = queued(page)
    canvas.drag((0.1, 0.5), (0.275, 0.95))
    assert canvas.boxes == [(0.1, 0.5, 0.18, 0.5)]  # to the right edge of ink: 0.03 + 0.25
    after = queued(page)
    before[str(canvas.node)]["inputs"]["region_list"] = canvas.text
    assert after == before


GEOMETRY = """async () => {
    const b = await import('/extensions/comfyui-dmm/js/region_boxes.js');
    const wrong = [];
    const is = (what, seen, wanted) => {
        if (JSON.stringify(seen) !== JSON.stringify(wanted)) wrong.push([what, seen, wanted]);
    };
    let state = 1;
    const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
    const near = (p, q) => Math.abs(p - q) < 1e-9;
    for (let i = 0; i < 500; i++) {
        const box = { x: random() * 2 - 0.5, y: random() * 2 - 0.5, w: 0.01 + random(), h: 0.01 + random(), style: 'ink' };
        const [dx, dy] = [random() - 0.5, random() - 0.5];
        const kept = b.kept(box);
        if (kept.x >= 1 || kept.x + kept.w <= 0 || kept.y >= 1 || kept.y + kept.h <= 0) wrong.push(['off the canvas', box, kept]);
        is('style is kept', kept.style, 'ink');
        for (const handle of b.HANDLES) {
            const after = b.dragged(box, handle, dx, dy);
            if (after.w < b.SMALLEST - 1e-12 || after.h < b.SMALLEST - 1e-12) wrong.push(['no area', handle, after]);
            // The edges across stay where they are.
            if (!handle.includes('w') && !near(after.x, box.x)) wrong.push(['left moved', handle, after]);
            if (!handle.includes('n') && !near(after.y, box.y)) wrong.push(['top moved', handle, after]);
            if (!handle.includes('e') && !near(after.x + after.w, box.x + box.w)) wrong.push(['right moved', handle, after]);
            if (!handle.includes('s') && !near(after.y + after.h, box.y + box.h)) wrong.push(['bottom moved', handle, after]);
            const [hx, hy] = b.handlePoint(box, handle);
            const at = b.hit([box], 0, hx, hy, { x: 0.001, y: 0.001 });
            is('its own handle is hit', at, { index: 0, part: handle });
        }
        const moved = b.dragged(box, 'move', dx, dy);
        is('a move keeps the size', [moved.w, moved.h], [box.w, box.h]);
        // Closed form of the share on the canvas, by counting a fine raster.
        let on = 0;
        for (let u = 0; u < 40; u++) for (let v = 0; v < 40; v++) {
            const [px, py] = [box.x + box.w * (u + 0.5) / 40, box.y + box.h * (v + 0.5) / 40];
            on += px >= 0 && px <= 1 && py >= 0 && py <= 1;
        }
        if (Math.abs(b.inside(box) - on / 1600) > 0.06) wrong.push(['inside', box, b.inside(box), on / 1600]);
    }
    const lines = b.snapLines([{ x: 0.1, y: 0.2, w: 0.33, h: 0.3 }]);
    is('lines', lines, { x: [0, 0.5, 1, 0.1, 0.43000000000000005], y: [0, 0.5, 1, 0.2, 0.5] });
    const reach = { x: 0.02, y: 0.02 };
    is('to an edge', b.kept(b.snapped({ x: 0.44, y: 0.21, w: 0.2, h: 0.1 }, 'move', lines, reach)),
        { x: 0.43, y: 0.2, w: 0.2, h: 0.1 });
    is('by the right edge', b.kept(b.snapped({ x: 0.79, y: 0.7, w: 0.2, h: 0.1 }, 'move', lines, reach)),
        { x: 0.8, y: 0.7, w: 0.2, h: 0.1 });
    is('to the grid', b.kept(b.snapped({ x: 0.63, y: 0.68, w: 0.2, h: 0.1 }, 'move', lines, { x: 0, y: 0 })),
        { x: 0.65, y: 0.7, w: 0.2, h: 0.1 });
    is('one side', b.kept(b.snapped({ x: 0.2, y: 0.3, w: 0.787, h: 0.3 }, 'e', lines, reach)),
        { x: 0.2, y: 0.3, w: 0.8, h: 0.3 });
    const list = ['a', 'b', 'c'];
    is('up', b.reordered(list, 0, 1), ['b', 'a', 'c']);
    is('no further', b.reordered(list, 2, 3), list);
    is('on top', b.hit([{ x: 0, y: 0, w: 1, h: 1 }, { x: 0, y: 0, w: 1, h: 1 }], -1, 0.5, 0.5, reach), { index: 1, part: 'move' });
    is('nothing there', b.hit([{ x: 0, y: 0, w: 0.2, h: 1 }], -1, 0.5, 0.5, reach), null);
    is('a copy stays on', b.duplicated([{ x: 0.5, y: 0, w: 0.5, h: 1 }], 0)[1], { x: 0.45, y: 0.05, w: 0.5, h: 1 });
    const text = b.writeRegions([{ style: 'a"\\n', x: 0, y: 0, w: 1, h: 1 }]);
    is('read what was written', b.readRegions(text), { regions: [{ style: 'a"\\n', x: 0, y: 0, w: 1, h: 1 }], error: null });
    is('nothing', [b.writeRegions([]), b.readRegions('  ')], ['', { regions: [], error: null }]);
    for (const bad of ['{', '{}', '[3]', '[null]', '[{"x":0}]', '[{"x":0,"y":0,"w":0,"h":1}]', '[{"x":0,"y":0,"w":1,"h":1,"style":3}]'])
        if (!b.readRegions(bad).error) wrong.push(['read', bad]);
    const history = new b.History();
    history.record('0', 'place 0', 1000);
    history.record('1', 'place 0', 1500);
    history.record('2', 'place 0', 5000);
    const steps = [history.undo('3'), history.undo('2'), history.undo('0'), history.redo('0'), history.redo('2')];
    is('steps', steps, ['2', '0', undefined, '2', '3']);
    history.undo('3');
    history.record('2', 'place 0', 5100);
    is('a change ends what could be redone', [history.redo('4'), history.undo('4')], [undefined, '2']);
    return wrong;
}"""


def test_the_geometry_alone(page):
    """web/js/region_boxes.js without nodes: properties of 500 random boxes and every handle, and cases by hand."""
    assert page.evaluate(GEOMETRY) == []
