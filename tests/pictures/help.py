"""The pictures of the nodes' help pages: each node in the page, in a graph that it is used in."""

import io
from collections.abc import Iterator
from pathlib import Path

import requests
from PIL import Image

from ..host.server import Server
from ..host.templates import graph_of

STYLES = {
    "load": {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "demo-dmm.safetensors"}},
    "save": {
        "class_type": "DMMSaveModel",
        "inputs": {"model": ["load", 0], "filename_prefix": "demo-styles", "what": "styles only"},
    },
}
"""A graph in the API's form that writes a file of styles, for Add DMM Styles to Model."""

LONGEST = 560
"""Pixels of a picture's longer side."""
SIZE = 40_000
"""Bytes of a picture at most."""

NODES = {
    "DMMLoadModel": "quickstart",
    "DMMStyleSelector": "quickstart",
    "DMMStyleSheet": "style_sheet",
    "DMMLabelStyles": "style_sheet",
    "DMMStyleTravel": "style_sheet",
    "DMMBlendStyles": "blend_and_schedule",
    "DMMApplyStyle": "blend_and_schedule",
    "DMMStyleSchedule": "blend_and_schedule",
    "DMMStyle": "blend_and_schedule",
    "DMMNameBlend": "blend_and_schedule",
    "DMMRegion": "regions",
    "DMMStyleMix": "regions",
    "DMMPanorama": "regions",
    "DMMDemoOutline": "controlnet",
    "DMMTeacher": "instant_merge",
    "DMMMerge": "instant_merge",
    "DMMDemoScenes": "distill_quickstart",
    "DMMDistillTeachers": "distill_quickstart",
    "DMMAddTeacher": "add_teacher",
    "DMMForgetStyle": "forget_style",
    "DMMFewStep": "four_steps",
    "DMMLearnStyle": "learn_style",
    "DMMMatchStyle": "learn_style",
    "DMMEvaluate": "evaluate",
    "DMMIdentifyStyle": "evaluate",
}
"""Node -> the template that it is shown in."""
ADDED = ("DMMAddStyles", "DMMEditStyle", "DMMFoldStyle", "DMMSaveModel", "DMMStyleForPrompt")
"""Nodes of no template: they are put into the quickstart, beside its Style Selector."""

READY = "() => Boolean(window.app?.graph && app.vueAppReady && LiteGraph.registered_node_types.DMMStyleSelector)"
ADD = """(type) => {
    const [loader, prompt] = ['DMMLoadModel', 'CLIPTextEncode'].map((kind) => app.graph.findNodesByType(kind)[0]);
    const selector = app.graph.findNodesByType('DMMStyleSelector')[0];
    const node = LiteGraph.createNode(type);
    node.pos = [selector.pos[0], selector.pos[1]];
    app.graph.remove(selector);
    app.graph.add(node);
    node.setSize([selector.size[0], node.computeSize()[1]]);
    for (const input of node.inputs) {
        for (const from of [loader, prompt]) {
            const slot = from.outputs.findIndex((output) => output.type === input.type);
            if (slot >= 0 && input.type !== '*') from.connect(slot, node, node.inputs.indexOf(input));
        }
    }
}"""
SHOW = """(type) => {
    const node = app.graph.findNodesByType(type)[0];
    app.canvas.ds.scale = 1;
    const width = node.size[0];
    const height = Math.min(node.size[1], node.computeSize()[1] + 12); // without the room for what it will show
    app.canvas.ds.offset = [420 - node.pos[0], 140 - node.pos[1]];
    app.canvas.setDirty(true, true);
    return [420 - 70, 140 - 60, width + 140, Math.min(height, 660) + 90];
}"""


def help_pictures(host: Path, base: Path, folder: Path, nodes: tuple[str, ...] = (*NODES, *ADDED)) -> Iterator[Path]:
    """Take the pictures of these nodes' pages into ``folder`` (web/docs); yields their paths. base: for the server. Needs playwright and
    Chromium, as the tests in tests/browser do."""
    from playwright.sync_api import sync_playwright

    from ..browser.conftest import CHROMIUM, FLAGS, PATIENCE

    folder.mkdir(parents=True, exist_ok=True)
    with Server(host, base) as server, sync_playwright() as playwright:
        settings = {
            "Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.UseNewMenu": "Top", "Comfy.VueNodes.Enabled": False,
            "Comfy.Minimap.Visible": False, "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
        }  # fmt: skip
        server.run(STYLES)
        requests.post(f"http://{server.address}/settings", json=settings, timeout=60).raise_for_status()
        context = playwright.chromium.launch_persistent_context(
            str(base / "profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            headless=True,
            viewport={"width": 1600, "height": 900},
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(f"http://{server.address}/", wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.wait_for_function("() => app.graph.nodes.length > 0")
        for node in nodes:
            graph = graph_of(NODES.get(node, "quickstart"))
            page.evaluate("graph => app.loadGraphData(graph)", graph)
            page.wait_for_function("count => app.graph.nodes.length === count", arg=len(graph["nodes"]))
            if node not in NODES:
                page.evaluate(ADD, node)
            page.evaluate(SHOW, node)
            page.wait_for_timeout(1500)  # the styles of the file, and the node's room for them
            x, y, width, height = page.evaluate(SHOW, node)
            page.wait_for_timeout(500)
            clip = {"x": x, "y": y, "width": min(width, 1600 - x), "height": min(height, 900 - y)}
            picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            path = folder / f"{node}.webp"
            path.write_bytes(small(picture))
            yield path
        context.close()


def small(picture: Image.Image) -> bytes:
    """A picture as WebP of at most LONGEST pixels and SIZE bytes."""
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    for quality in range(85, 20, -10):
        held = io.BytesIO()
        picture.save(held, "WEBP", quality=quality, method=6)
        if held.tell() <= SIZE:
            break
    return held.getvalue()
