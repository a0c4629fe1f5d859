"""The example workflows: what the template browser shows, its API twins, and that both lead to pictures."""

import copy
import json

import numpy as np
import pytest
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from PIL import Image

from .server import PACK

FOLDER = PACK / "workflows"
NAMES = ["quickstart", "distill_quickstart"]
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TITLE = 30
"""Pixels that a node's title bar takes above its position."""


@pytest.fixture(scope="module")
def node_info(server) -> dict:
    return server.get("object_info").json()


def graph_of(name) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def twin_of(name) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def widget_names(info: dict):
    """The entries of a saved node's widgets_values, in order; None for one that the server never sees."""
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            options = options[0] if options else {}
            if (type_ in WIDGETS or isinstance(type_, list)) and not options.get("forceInput"):
                yield name
                if options.get("control_after_generate", type_ == "INT" and name in ("seed", "noise_seed")):
                    yield None


def to_api(graph: dict, node_info: dict) -> dict:
    """What the browser queues for a saved graph: {node id: {"class_type", "inputs"}}. For graphs without subgraphs."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    nodes = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        names = list(widget_names(node_info[node["type"]]))
        values = node.get("widgets_values", [])
        assert len(values) == len(names), f"{node['type']} has {len(values)} values for {names}"
        inputs = {name: value for name, value in zip(names, values) if name}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        nodes[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return nodes


def only(graph: dict, class_type: str) -> str:
    """The id of the one node of a class in an API graph."""
    (node,) = [key for key, value in graph.items() if value["class_type"] == class_type]
    return node


def picture_node(graph: dict) -> str:
    (node,) = [key for key, value in graph.items() if value["class_type"] in ("SaveImage", "PreviewImage")]
    return node


def paint(server, graph) -> np.ndarray:
    """(batch, H, W, 3) of the one image node."""
    images = server.run(graph, seconds=3000)[picture_node(graph)]["images"]
    return np.stack([np.asarray(server.image(entry)) for entry in images])


@pytest.mark.parametrize("name", NAMES)
def test_the_template_browser_lists_it(server, name):
    assert name in server.get("workflow_templates").json()["comfyui-dmm"]
    assert server.get(f"api/workflow_templates/comfyui-dmm/{name}.json").json() == graph_of(name)
    server.get(f"api/workflow_templates/comfyui-dmm/{name}.jpg")
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.format == "JPEG" and min(thumbnail.size) >= 256
    assert (FOLDER / f"{name}.jpg").stat().st_size < 200_000


def test_nothing_but_the_examples_is_listed(server):
    assert sorted(server.get("workflow_templates").json()["comfyui-dmm"]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_equals_its_api_twin(node_info, name):
    twin = {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in twin_of(name).items()}
    assert to_api(graph_of(name), node_info) == twin


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_readable(name):
    """Nodes do not overlap, every link runs from left to right or downwards, and every node but the note is in a group."""
    graph = graph_of(name)
    boxes = {
        n["id"]: (n["pos"][0], n["pos"][1] - TITLE, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1])
        for n in graph["nodes"]
    }
    kinds = {n["id"]: n["type"] for n in graph["nodes"]}
    for a, (left, top, right, bottom) in boxes.items():
        for b, (left_b, top_b, right_b, bottom_b) in boxes.items():
            apart = right <= left_b or right_b <= left or bottom <= top_b or bottom_b <= top
            assert a == b or apart, f"{kinds[a]} {a} overlaps {kinds[b]} {b}"
    for _, a, _, b, _, _ in graph["links"]:
        assert boxes[a][2] <= boxes[b][0] or (boxes[a][0] == boxes[b][0] and boxes[a][3] <= boxes[b][1]), (
            kinds[a],
            kinds[b],
        )
    groups = [(x, y, x + w, y + h) for x, y, w, h in (g["bounding"] for g in graph["groups"])]
    for node, (left, top, right, bottom) in boxes.items():
        inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(inside) == (kinds[node] not in NOTES), f"{kinds[node]} {node}"
    assert all(g["title"].strip() for g in graph["groups"])
    assert [kinds[n] for n in boxes].count("MarkdownNote") == 1


def test_quickstart_paints_the_style(server):
    graph = twin_of("quickstart")
    styled = paint(server, graph)
    assert styled.shape == (4, 128, 128, 3)
    assert (styled.std((1, 2, 3)) > 15).all()  # pictures, not one flat colour
    plain = copy.deepcopy(graph)
    plain[only(graph, "DMMStyleSelector")]["inputs"]["style"] = "none"
    assert np.abs(paint(server, plain).astype(int) - styled).mean() > 5  # of 255: another look, not a rounding error


def test_the_distillation_runs(server):
    """The example with 3 steps on 8 pictures: nothing is learnt, everything is used."""
    graph = twin_of("distill_quickstart")
    train = graph[only(graph, "DMMDistillTeachers")]["inputs"]
    train |= {"steps": 3, "batch_size": 4, "preview_every": 2, "save_every": 2, "name": "short"}
    graph[only(graph, "DMMDemoScenes")]["inputs"]["count"] = 8
    assert paint(server, graph).shape == (4, 128, 128, 3)
    (file,) = (server.base / "output" / "dmm").glob("short-*.safetensors")
    student = load_checkpoint(file)
    assert [style.name for style in student.styles] == ["ink", "candy", "echo"]
    assert student.text and student.vae


@pytest.mark.slow
def test_the_distillation_in_full(server):
    """As shipped: every style is nearer to its own teacher than the base, the teachers' average and every other style are."""
    graph = twin_of("distill_quickstart")
    outputs = server.run(graph, seconds=3000)
    report = outputs[only(graph, "DMMDistillTeachers")]["text"][0]
    rows = {words[0]: [float(v) for v in words[1:]] for words in map(str.split, report.splitlines()) if len(words) == 6}
    for style in ("ink", "candy", "echo"):
        base, soup, student, _, nearest_other = rows[style]
        assert student < 0.5 * min(base, soup, nearest_other), style
    shown = {}
    for style in ("ink", "candy", "echo", "none"):
        graph[only(graph, "DMMStyleSelector")]["inputs"]["style"] = style
        shown[style] = paint(server, graph).astype(int)
    for a in shown:
        for b in shown:
            assert a == b or np.abs(shown[a] - shown[b]).mean() > 5
