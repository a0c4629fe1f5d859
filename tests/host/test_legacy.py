"""Graphs made for the authors' nodes, DMMLoader and DMMApply: as a prompt, and as the browser opens them."""

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import save_checkpoint
from safetensors.torch import load_file, save_file

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .server import NodeError
from .test_example_workflows import to_api
from .test_workflows import painting, pictures

OLD_NODES = ("DMMLoader", "DMMApply")
NAMELESS = "legacy/nameless.safetensors"
NAMED = "legacy/named.safetensors"
NUMBERED = "legacy/numbered.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """Where DMMLoader looks: a file without any metadata, as the authors' is, and two with names for its styles."""
    folder = server.base / "models" / "checkpoints" / "legacy"
    folder.mkdir()
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, whole=True)
    save_checkpoint(folder / "named.safetensors", checkpoint)
    save_file(load_file(folder / "named.safetensors"), folder / "nameless.safetensors")
    for style, name in zip(checkpoint.styles, ["3", "2", "1", "zero"]):
        object.__setattr__(style, "name", name)
    save_checkpoint(folder / "numbered.safetensors", checkpoint)


@pytest.fixture(scope="module")
def replacements(server) -> dict:
    """What the browser is told, for the two old nodes."""
    told = server.get("node_replacements").json()
    for name in OLD_NODES:
        assert len(told[name]) == 1
    return {name: told[name][0] for name in OLD_NODES}


@pytest.fixture(scope="module")
def node_info(server) -> dict:
    return server.get("object_info").json()


def old_prompt(file: str, index) -> dict:
    """``painting`` with the old nodes, as the browser exports it (a prompt without ``_meta`` fails in the host)."""
    graph = painting({"a": ""}, file)
    graph["load"] = {"class_type": "DMMLoader", "inputs": {"ckpt_name": file}}
    graph["style a"] = {"class_type": "DMMApply", "inputs": {"model": ["load", 0], "index": index}}
    return {key: {**node, "_meta": {"title": node["class_type"]}} for key, node in graph.items()}


def old_graph(file: str, index: int) -> dict:
    """The same graph as the browser saves it."""
    graph = {"nodes": [], "links": []}

    def node(node_type: str, widgets: list, inputs: list[tuple], outputs: str) -> dict:
        key = len(graph["nodes"]) + 1
        slots = []
        for slot, (name, origin, output) in enumerate(inputs):
            source = origin["outputs"][output]
            link = len(graph["links"]) + 1
            graph["links"].append([link, origin["id"], output, key, slot, source["type"]])
            source["links"].append(link)
            slots.append({"name": name, "type": source["type"], "link": link})
        ends = [{"name": kind, "type": kind, "links": []} for kind in outputs.split()]
        graph["nodes"].append(
            {"id": key, "type": node_type, "inputs": slots, "outputs": ends, "widgets_values": widgets}
        )
        return graph["nodes"][-1]

    load = node("DMMLoader", [file], [], "MODEL CLIP VAE")
    style = node("DMMApply", [index], [("model", load, 0)], "MODEL")
    positive = node("CLIPTextEncode", ["a red house"], [("clip", load, 1)], "CONDITIONING")
    negative = node("CLIPTextEncode", ["blurry"], [("clip", load, 1)], "CONDITIONING")
    latent = node("EmptyLatentImage", [64, 64, 1], [], "LATENT")
    conditionings = [("positive", positive, 0), ("negative", negative, 0)]
    sampler = node(
        "KSampler",
        [5, "fixed", 3, 4.0, "euler", "normal", 1.0],
        [("model", style, 0), *conditionings, ("latent_image", latent, 0)],
        "LATENT",
    )
    picture = node("VAEDecode", [], [("samples", sampler, 0), ("vae", load, 2)], "IMAGE")
    node("SaveImage", ["test"], [("images", picture, 0)], "")
    return graph


def replace_all(graph: dict, replacements: dict, node_info: dict) -> dict:
    """What the browser's "Replace All" makes of a saved graph (frontend 1.48, ``replaceWithMapping``).

    It carries over only what the mappings list: links by the names of inputs, values by their place in
    ``old_widget_ids``, outputs by number.
    """
    links = {link[0]: link for link in graph["links"]}
    nodes = []
    for old in graph["nodes"]:
        rule = replacements.get(old["type"])
        if rule is None:
            nodes.append(old)
            continue
        info = node_info[rule["new_node_id"]]
        inputs, values = {}, {}
        for entry in rule["input_mapping"]:
            if "set_value" in entry:
                values[entry["new_id"]] = entry["set_value"]
            elif entry["old_id"] in rule["old_widget_ids"]:
                values[entry["new_id"]] = old["widgets_values"][rule["old_widget_ids"].index(entry["old_id"])]
            else:
                (slot,) = [slot for slot in old["inputs"] if slot["name"] == entry["old_id"]]
                inputs[entry["new_id"]] = slot["link"]
        for entry in rule["output_mapping"]:
            for link in old["outputs"][entry["old_idx"]]["links"]:
                links[link] = [link, old["id"], entry["new_idx"], *links[link][3:]]
        order = info["input_order"]["required"]
        nodes.append(
            {
                "id": old["id"],
                "type": rule["new_node_id"],
                "inputs": [{"name": name, "link": inputs[name]} for name in order if name in inputs],
                "widgets_values": [values[name] for name in order if name in values],
            }
        )
    return {"nodes": nodes, "links": list(links.values())}


def picture(server, graph) -> np.ndarray:
    (shown,) = [output["images"] for output in server.run(graph).values() if "images" in output]
    return np.asarray(server.image(shown[0]))


def test_the_old_nodes_are_not_nodes_of_this_pack(node_info):
    assert not set(OLD_NODES) & set(node_info)


@pytest.mark.parametrize("old_node", OLD_NODES)
def test_the_mapping_fits_the_new_node(replacements, node_info, old_node):
    rule = replacements[old_node]
    info = node_info[rule["new_node_id"]]
    mapped = [entry["new_id"] for entry in rule["input_mapping"]]
    assert sorted(mapped) == sorted(info["input"]["required"])  # the server gives an input no default
    old_outputs = {"DMMLoader": ["MODEL", "CLIP", "VAE"], "DMMApply": ["MODEL"]}[old_node]
    by_index = {entry["old_idx"]: info["output"][entry["new_idx"]] for entry in rule["output_mapping"]}
    assert by_index == dict(enumerate(old_outputs))


@pytest.mark.parametrize("file, styles", [(NAMELESS, [f"style {i}" for i in range(4)]), (NAMED, NAMES)])
def test_a_prompt_runs(server, file, styles):
    """Each index paints, bit for bit, the style in that place of the file; the styles differ."""
    shown = [picture(server, old_prompt(file, index)) for index in range(4)]
    ours = pictures(server, painting(dict(zip("abcd", styles)), file))
    for index, key in enumerate("abcd"):
        assert np.array_equal(shown[index], ours[f"save {key}"])
        assert index == 0 or not np.array_equal(shown[index], shown[0])


def test_a_saved_graph_runs_after_replace_all(server, replacements, node_info):
    graph = to_api(replace_all(old_graph(NAMELESS, 2), replacements, node_info), node_info)
    assert not set(OLD_NODES) & {node["class_type"] for node in graph.values()}
    ours = pictures(server, painting({"a": "style 2"}, NAMELESS))
    assert np.array_equal(picture(server, graph), ours["save a"])


def test_a_name_wins_over_an_index(server):
    """In a file whose styles are called by numbers, the number of one of them is its name."""
    ours = pictures(server, painting({"a": "style 0"}, NAMELESS))  # the same weights
    assert np.array_equal(picture(server, old_prompt(NUMBERED, 3)), ours["save a"])


def test_a_loader_without_apply_paints_no_style(server):
    """The authors' loader alone painted in style 0; a replacement cannot add a node."""
    graph = old_prompt(NAMELESS, 0)
    del graph["style a"]
    (sampler,) = [node["inputs"] for node in graph.values() if node["inputs"].get("model") == ["style a", 0]]
    sampler["model"] = ["load", 0]
    ours = pictures(server, painting({"a": "none"}, NAMELESS))
    assert np.array_equal(picture(server, graph), ours["save a"])


@pytest.mark.parametrize("index", [4, 7, -1])
def test_an_index_that_the_model_lacks(server, index):
    with pytest.raises(
        NodeError, match=f"unknown style '{index}'. The styles of this model: style 0, .*, none"
    ) as info:
        server.run(old_prompt(NAMELESS, index))
    assert info.value.node == "style a"


def test_a_file_that_is_not_there(server):
    with pytest.raises(NodeError, match="ckpt_name.*gone.safetensors") as info:
        server.run(old_prompt("gone.safetensors", 0))
    assert info.value.node == "load"
