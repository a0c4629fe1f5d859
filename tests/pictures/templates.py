"""The thumbnails that the template browser shows: every template is run by a real ComfyUI, and what it paints is put on one sheet."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..host.server import Server
from ..host.templates import TITLES, twin_of
from .layout import rows, scaled, stack

SIDE = 192
"""Pixels of a single picture of the demo model on a thumbnail."""
ZOOM = SIDE / 128

Painted = dict[str, list[Image.Image]]
"""Node id -> its pictures."""


def sheet_of(node: str) -> Callable[[Painted], Image.Image]:
    return lambda painted: painted[node][0].convert("RGB")


def under(*nodes: str, width: int) -> Callable[[Painted], Image.Image]:
    return lambda painted: stack([painted[node][0] for node in nodes], width)


def columns(*nodes: str, count: int) -> Callable[[Painted], Image.Image]:
    """A column of ``count`` pictures for each node."""
    return lambda painted: rows([[painted[node][i] for node in nodes] for i in range(count)], ZOOM)


def lines(*nodes: str, count: int) -> Callable[[Painted], Image.Image]:
    """A line of ``count`` pictures for each node."""
    return lambda painted: rows([painted[node][:count] for node in nodes], ZOOM)


THUMBNAILS: dict[str, Callable[[Painted], Image.Image]] = {
    "style_sheet": sheet_of("10"),
    "blend_and_schedule": columns("10", "15", "21", count=2),
    "regions": under("15", "20", width=512),
    "controlnet": sheet_of("14"),
    "lora": lines("9", "13", count=2),
    "controlnet_lora_regions": under("17", "24", width=768),
    "instant_merge": sheet_of("20"),
    "merge_loras": sheet_of("20"),
    "add_teacher": lambda painted: rows([painted["16"], painted["21"]]),
    "forget_style": lambda painted: rows([painted["13"], painted["18"]]),
    "four_steps": lambda painted: rows([painted["13"], painted["18"]]),
    "learn_style": lambda painted: rows([painted["7"][i : i + 4] for i in (0, 4)] + [painted["12"]], ZOOM),
    "evaluate": lambda painted: rows([[first_tables(painted["11"][0]), scaled(painted["18"][0], ZOOM)]]),
}
"""Template -> its thumbnail from what it paints. ``quickstart`` and ``distill_quickstart`` show more than one run."""
SHOWN = {
    "add_teacher": {"n12": {"styles": "candy\nsticker\necho"}, "n17": {"styles": "candy\nsticker\necho\nframe"}},
    "forget_style": {"n9": {"styles": "candy\npixel\nsticker\necho"}, "n14": {"styles": "candy\npixel\nsticker"}},
    "four_steps": {"n9": {"styles": "candy\npixel\nsticker\necho"}, "n14": {"styles": "candy\npixel\nsticker\necho"}},
}
"""Inputs that differ on the thumbnail, as not all styles find room there."""


def first_tables(report: Image.Image) -> Image.Image:
    """The upper left of an evaluation's picture: distances of the features, and PAIR."""
    return report.crop((0, 0, round(0.4 * report.width), round(0.55 * report.height)))


def paint(server: Server, graph: dict) -> Painted:
    """What a graph in the API's form paints."""
    shown = server.run(graph, seconds=3600)
    return {node: [server.image(one) for one in ui["images"]] for node, ui in shown.items() if "images" in ui}


def changed(graph: dict, **inputs: dict) -> dict:
    """A copy of a graph with some inputs of some nodes set: ``n2={"style": "pen"}`` for node 2."""
    graph = copy.deepcopy(graph)
    for node, values in inputs.items():
        graph[node.removeprefix("n")]["inputs"].update(values)
    return graph


def quickstart(server: Server, graph: dict) -> Image.Image:
    """Four of its styles."""
    painted = [
        paint(server, changed(graph, n2={"style": style}, n3={"text": "a purple mushroom"}, n5={"batch_size": 1}))
        for style in ("ink", "candy", "sticker", "pixel")
    ]
    one, two, three, four = (images["8"][0] for images in painted)
    return rows([[one, two], [three, four]], ZOOM)


def distill_quickstart(server: Server, graph: dict) -> Image.Image:
    """Three captions in the three styles that it learns."""
    return rows(
        [
            [
                paint(
                    server,
                    changed(graph, n13={"style": style}, n14={"text": caption}, n16={"batch_size": 1}),
                )["19"][0]
                for style in ("ink", "candy", "echo")
            ]
            for caption in ("an orange cat", "a big blue house, hills", "a purple mushroom")
        ]
    )  # fmt: skip


def thumbnail(server: Server, name: str) -> Image.Image:
    graph = twin_of(name)
    if name in THUMBNAILS:
        return THUMBNAILS[name](paint(server, changed(graph, **SHOWN.get(name, {}))))
    return {"quickstart": quickstart, "distill_quickstart": distill_quickstart}[name](server, graph)


def thumbnails(host: Path, base: Path, folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Paint the thumbnails of these templates into ``folder``, each named like its template; yields their paths. base: for the server."""
    folder.mkdir(parents=True, exist_ok=True)
    with Server(host, base) as server:
        for name in names:
            path = folder / f"{TITLES[name]}.jpg"
            thumbnail(server, name).save(path, quality=90)
            yield path
