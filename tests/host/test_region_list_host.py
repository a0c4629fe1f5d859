"""Style Mix with a list of regions and Style Region with bounding boxes in the real host: bit for bit what equal Style Regions paint."""

import copy
import json

import pytest
import torch
from comfyui_dmm.dmm_core.regions import Box

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .server import NodeError
from .test_example_workflows import paint, twin_of
from .test_regions_host import LEFT, NEGATIVE, POSITIVE, RIGHT, mix, region
from .test_regions_host import paint as paint_latents
from .test_sampling_equals_core import load

BOXES = [(0.0, 0.0, 0.5, 1.0), (0.4, 0.25, 0.9, 0.5)]


@pytest.fixture(scope="module")
def model(models):
    return load(models, checkpoint_of(random_unet(DEMO)), "region-list")


class Encoder:
    """Two prompts and their text states: what the host's CLIP does for a prompt, with this test's own conditionings."""

    texts = {"left": LEFT, "right": RIGHT}

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return self.texts[tokens]


def entry(style, box, **more):
    return {"style": style, **dict(zip("xywh", box)), **more}


def listed(model, entries, regions=(), mode="own prompts", background="none", **more):
    from comfyui_dmm.nodes.regions import StyleMix

    named = {f"region{i}": r for i, r in enumerate(regions)}
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return StyleMix.execute(model, POSITIVE, NEGATIVE, background, mode, named, region_list=text, **more)


def same(model, one, other, **size):
    one, other = (paint_latents(model, prompts, **size) for prompts in (one, other))
    assert one.isfinite().all() and one.std() > 0.1
    assert torch.equal(one, other)


@pytest.mark.parametrize("paint_on", ["own crop", "whole canvas"])
@pytest.mark.parametrize("fall_off", ["feather", "gaussian"])
def test_a_list_paints_what_style_regions_paint(model, fall_off, paint_on):
    """16 pixels of feather are a quarter of a canvas of 8 latents."""
    entries = [
        entry(NAMES[0], BOXES[0], fall_off=fall_off, feather=0.25, prompt="left", paint_on=paint_on),
        entry(
            NAMES[2],
            BOXES[1],
            fall_off=fall_off,
            feather=0.25,
            prompt="right",
            negative="left",
            paint_on=paint_on,
            weight=2.0,
        ),
    ]
    nodes = [
        region(NAMES[0], BOXES[0], fall_off, 16, positive=LEFT, paint_on=paint_on),
        region(NAMES[2], BOXES[1], fall_off, 16, positive=RIGHT, negative=LEFT, paint_on=paint_on, weight=2.0),
    ]
    ours = listed(model, entries, background=NAMES[1], clip=Encoder()).args
    same(model, ours, mix(model, *nodes, background=NAMES[1]), height=8, width=12)


def test_connected_regions_come_first(model):
    """Half of the regions as nodes and half in the list: the order of all is that of nodes, then list, in both modes."""
    first, second = region(NAMES[0], BOXES[0], feather=8), region(NAMES[3], BOXES[1], feather=8)
    for mode in ("own prompts", "one pass"):
        ours = listed(model, [entry(NAMES[3], BOXES[1], feather=0.125)], [first], mode).args
        same(model, ours, mix(model, first, second, mode=mode))


def test_the_background_keeps_its_share(model):
    """A quarter under a region of weight 1 is a region of weight 1/3 over the same place: 1/3 / (1 + 1/3)."""
    whole = (0.0, 0.0, 1.0, 1.0)
    ours = listed(
        model,
        [entry(NAMES[0], whole, feather=0, prompt="left", paint_on="whole canvas")],
        background=NAMES[1],
        clip=Encoder(),
        background_share=0.25,
    ).args
    region_of = {"feather": 0, "paint_on": "whole canvas"}
    hand = mix(
        model, region(NAMES[1], whole, weight=1 / 3, **region_of), region(NAMES[0], whole, positive=LEFT, **region_of)
    )
    one, other = (paint_latents(model, prompts) for prompts in (ours, hand))
    assert (one - other).abs().max() < 1e-4 * other.std()
    none = listed(model, [entry(NAMES[0], whole, feather=0)], background=NAMES[1], mode="one pass").args
    kept = listed(
        model, [entry(NAMES[0], whole, feather=0)], background=NAMES[1], mode="one pass", background_share=0.5
    ).args
    assert (paint_latents(model, none) - paint_latents(model, kept)).std() > 0.01  # another blend of styles
    shares = kept[0][0][1]["dmm_map"].shares(4, 4)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.5))


def test_the_common_prompt_comes_before_those_of_the_list(model):
    class Both(Encoder):
        texts = {"right, left": RIGHT}

    entries = [entry(NAMES[0], BOXES[0], prompt="left"), entry(NAMES[2], BOXES[1])]
    ours = listed(model, entries, clip=Both(), common_prompt=" right, ").args
    alone = [{**entries[0], "prompt": "right"}, entries[1]]
    same(model, ours, listed(model, alone, clip=Encoder()).args)


def test_strength_is_that_of_the_style(model):
    from comfyui_dmm.nodes.style_values import DMMStyle

    half = DMMStyle.execute(NAMES[0], 0.5)[0]
    ours = listed(model, [entry(NAMES[0], BOXES[0], feather=0, strength=0.5)]).args
    same(model, ours, mix(model, region(half, BOXES[0], feather=0)))


def test_feather_share_of_style_region(model):
    shares = region(NAMES[0], BOXES[1], feather=0, feather_share=0.25)
    same(model, mix(model, shares), mix(model, region(NAMES[0], BOXES[1], feather=16)))


def pixels(box, height, width):
    return dict(zip(("x", "y", "width", "height"), (n * m for n, m in zip(box, (width, height, width, height)))))


def test_bounding_boxes_are_boxes(model):
    picture = torch.rand(1, 64, 128, 3)
    box = (0.25, 0.5, 0.5, 0.5)
    by_numbers = region(NAMES[0], box, positive=LEFT)
    for value in (pixels(box, 64, 128), [pixels(box, 64, 128)], [[pixels(box, 64, 128)]]):
        by_box = region(NAMES[0], bboxes=value, picture=picture, positive=LEFT)
        assert by_box.place.box == Box(*box)
        same(model, mix(model, by_box), mix(model, by_numbers))
    both = [[pixels(box, 64, 128), pixels((0, 0, 0.25, 0.5), 64, 128)]]
    mask = torch.zeros(1, 64, 128)
    mask[:, 32:, 32:96], mask[:, :32, :32] = 1, 1
    several = region(NAMES[0], bboxes=both, picture=picture, positive=LEFT)
    same(model, mix(model, several), mix(model, region(NAMES[0], mask=mask, positive=LEFT)), height=8, width=16)
    places = [entry(NAMES[i], (0, 0, 1, 1), feather=0.25) for i in range(2)]
    ours = listed(model, places, bboxes=both, picture=picture).args
    hand = [
        region(NAMES[i], (b["x"] / 128, b["y"] / 64, b["width"] / 128, b["height"] / 64)) for i, b in enumerate(both[0])
    ]
    same(model, ours, mix(model, *hand))


def test_what_is_refused(model):
    good = entry(NAMES[0], BOXES[0])
    for words, call in {
        "there is no region": lambda: listed(model, ""),
        "the list of regions is not JSON.*'\\[ink'": lambda: listed(model, "[ink"),
        "unknown style 'nix'": lambda: listed(model, [entry("nix", BOXES[0])]),
        "region 2 of the list has a prompt of its own, 'left': connect": lambda: listed(
            model, [good, {**good, "prompt": "left"}]
        ),
        "clear those in region_list": lambda: listed(
            model, [{**good, "prompt": "left"}], mode="one pass", clip=Encoder()
        ),
        "connect the picture": lambda: listed(model, [good], bboxes=[pixels(BOXES[0], 64, 64)]),
        "hold 2 boxes on the picture, and region_list 1 regions": lambda: listed(
            model, [good], bboxes=[pixels(BOXES[0], 64, 64)] * 2, picture=torch.zeros(1, 64, 64, 3)
        ),
        "bboxes hold no box": lambda: region(NAMES[0], bboxes=[], picture=torch.zeros(1, 64, 64, 3)),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_warnings_reach_the_page_and_the_log(model, caplog):
    from comfyui_dmm.nodes.regions import DMMRegion

    entries = [entry(NAMES[0], BOXES[0]), entry(NAMES[1], (0.9, 0, 1, 1)), entry(NAMES[1], (0, 0, 0.01, 1))]
    (report,) = listed(model, entries).ui["dmm_canvas"]
    off, thin = report["warnings"]
    assert off.startswith("region 2 of the list: 90% of the box lies outside") and thin.startswith(
        "region 3 of the list: the box is 0.01"
    )
    assert report["picture"] is None
    assert listed(model, entries[:1]).ui["dmm_canvas"][0]["warnings"] == []
    (report,) = DMMRegion.execute(NAMES[0], 0.9, 0, 1, 1, "feather", 0).ui["dmm_canvas"]
    assert len(report["warnings"]) == 1 and "90%" in report["warnings"][0]
    narrow = mix(model, region(NAMES[0], (0, 0, 0.2, 1)))  # of 64 pixels: 1.6 latents
    assert not caplog.records
    paint_latents(model, narrow)
    (record,) = caplog.records
    assert record.message.startswith(f"the region in style '{NAMES[0]}'") and "1.6 latents" in record.message
    caplog.clear()
    paint_latents(model, narrow, height=8, width=16)
    assert not caplog.records


# --- through the server -----------------------------------------------------------------------------------------------


def half_of(name: str) -> tuple[dict, str]:
    """The template's API twin with its first picture alone -> graph, id of Style Mix."""
    graph = twin_of(name)
    (mix_id,) = [key for key, node in graph.items() if node["class_type"] == "DMMStyleMix"]
    (save,) = [key for key, node in graph.items() if node["inputs"].get("filename_prefix") == "dmm-regions"]
    wanted, found = [save], {}
    while wanted:
        key = wanted.pop()
        found[key] = graph[key]
        wanted += [value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)]
    return found, mix_id


def as_list(graph: dict, mix_id: str) -> dict:
    """The same graph with its Style Regions written into region_list; prompts from their CLIPTextEncodes."""
    graph, entries = copy.deepcopy(graph), []
    size = next(n["inputs"] for n in graph.values() if n["class_type"] == "EmptyLatentImage")
    inputs = graph[mix_id]["inputs"]
    for key in sorted(k for k in inputs if k.startswith("regions.")):
        node = graph.pop(inputs.pop(key)[0])["inputs"]
        prompt = graph.pop(node["positive"][0])["inputs"]
        entries.append(
            {
                "style": node["style"],
                **{short: node[long] for short, long in zip("xywh", ("x", "y", "width", "height"))},
                "feather": node["feather"] / min(size["width"], size["height"]),
                "prompt": prompt["text"],
            }
        )
        inputs["clip"] = prompt["clip"]
    inputs["region_list"] = json.dumps(entries)
    return graph


def test_the_picture_of_a_list_is_that_of_the_template(server):
    graph, mix_id = half_of("regions")
    from_list = as_list(graph, mix_id)
    assert "DMMRegion" not in {node["class_type"] for node in from_list.values()}
    one, other = paint(server, graph), paint(server, from_list)
    assert one.std() > 10 and (one == other).all()


def test_graphs_from_before_the_canvas(server):
    """API graphs without the new inputs paint as before: bit for bit what they paint with them at their defaults."""
    graph, _ = half_of("regions")
    old = copy.deepcopy(graph)
    for node in old.values():
        for name in ("feather_share", "region_list"):
            node["inputs"].pop(name, None)
    assert (paint(server, old) == paint(server, graph)).all()


def test_bad_text_is_said_on_the_node(server):
    graph, mix_id = half_of("regions")
    graph[mix_id]["inputs"]["region_list"] = '[{"style": "ink", "x": "left"}]'
    with pytest.raises(NodeError, match="region 1 of the list lacks y, w, h") as failed:
        server.run(graph)
    assert failed.value.node == mix_id


def test_create_bounding_boxes_of_the_host(server):
    """The host's own node draws, Style Region and Style Mix take its boxes; hosts without that node skip this."""
    if "CreateBoundingBoxes" not in server.get("object_info").json():
        pytest.skip("this host has no Create Bounding Boxes")
    graph, mix_id = half_of("regions")
    first = graph[mix_id]["inputs"]["regions.region0"][0]
    place = graph[first]["inputs"]
    width, height = 512, 128
    x, y, w, h = (place[key] for key in ("x", "y", "width", "height"))
    drawn = {"x": round(x * width), "y": round(y * height), "width": round(w * width), "height": round(h * height)}
    graph[first]["inputs"] |= {"x": drawn["x"] / width, "width": drawn["width"] / width}
    by_numbers = paint(server, graph)
    graph["boxes"] = {
        "class_type": "CreateBoundingBoxes",
        "inputs": {"width": width, "height": height, "editor_state": {"__value__": [drawn]}},
    }
    place |= {"x": 0.0, "width": 0.1, "bboxes": ["boxes", 1], "picture": ["boxes", 0]}
    assert (paint(server, graph) == by_numbers).all()


def test_the_picture_under_the_boxes(server):
    """What is connected to picture, a mask, or nothing; as a file of the host's temporary folder, with its size."""
    graph, mix_id = half_of("regions")
    graph["light"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 32, "batch_size": 2, "color": 0xFF0000},
    }
    graph["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 64, "height": 32}}
    graph[mix_id]["inputs"]["picture"] = ["light", 0]
    first, second, _ = (graph[mix_id]["inputs"][f"regions.region{i}"][0] for i in range(3))
    graph[first]["inputs"]["mask"] = ["mask", 0]
    outputs = server.run(graph, seconds=3000)
    (report,) = outputs[mix_id]["dmm_canvas"]
    picture = server.image(report["picture"]).convert("RGB")
    assert picture.size == (96, 32) and picture.getpixel((5, 5)) == (255, 0, 0)
    (report,) = outputs[first]["dmm_canvas"]
    picture = server.image(report["picture"]).convert("RGB")
    assert picture.size == (64, 32) and picture.getpixel((5, 5)) == (127, 127, 127)
    assert outputs[second]["dmm_canvas"] == [{"warnings": [], "picture": None}]
