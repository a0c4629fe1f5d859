"""A real ComfyUI, started as its users start it, paints the pack's example graphs with the demo family."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...training.host_path import find_host
from .setup import NotPossible, Setup

NEEDED = ("aiohttp", "av", "comfy_aimdo", "comfy_kitchen", "requests", "sqlalchemy", "torchsde", "websocket")
STEPS = {"tiny": 2, "sd15": 20}
GRAPHS = {"tiny": ("quickstart", "one pass"), "sd15": ("quickstart", "regions", "style sheet", "one pass")}
REFERENCE = "host-cpu.npz"


def graph(name: str, steps: int) -> dict:
    """The API twin of a template, up to its first picture; "one pass" is regions with one prompt."""
    from ..host.templates import twin_of

    made = twin_of({"style sheet": "style_sheet", "one pass": "regions"}.get(name, name))
    first = next(key for key, node in made.items() if node["class_type"] == "SaveImage")
    wanted, waiting = set(), [first]
    while waiting:
        key = waiting.pop()
        if key not in wanted:
            wanted.add(key)
            waiting += [value[0] for value in made[key]["inputs"].values() if isinstance(value, list)]
    made = {key: node for key, node in made.items() if key in wanted}
    for node in made.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = steps
        if name == "one pass" and node["class_type"] == "DMMStyleMix":
            node["inputs"]["mode"] = name
        if name == "one pass" and node["class_type"] == "DMMRegion":
            node["inputs"].pop("positive")
    return made


def measure(setup: Setup, flags: Sequence[str]) -> None:
    """The same seeds as the stage host-cpu, whose pictures these are compared with: mean difference in levels of 255."""
    host = find_host()
    if host is None:
        raise NotPossible("no ComfyUI here: set COMFYUI_PATH, or carry the folder that make gpu-pack prepares")
    if not setup.cuda and (excluded := [flag for flag in flags if flag in ("--lowvram", "--novram")]):
        raise NotPossible(f"the host takes --cpu or {excluded[0]}, not both")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise NotPossible(f"the host needs {', '.join(missing)}: carry the folder that make gpu-pack prepares")
    from ..host.server import Server

    cpu = not setup.cuda or "--cpu" in flags
    reference = setup.folder / f"{setup.size}-{REFERENCE}"
    pictures: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page")
        page.mkdir()
        (page / "index.html").write_text("<title>no page: the tests drive the API</title>")
        arguments = [flag for flag in flags if flag != "--cpu"]
        if importlib.util.find_spec("comfyui_frontend_package") is None:
            arguments += ["--front-end-root", str(page)]
        started = time.monotonic()
        with Server(host, Path(folder, "base"), tuple(arguments), cpu=cpu) as server:
            setup.note(**{"start s": time.monotonic() - started})
            told = server.get("system_stats").json()
            setup.note(host=told["system"]["comfyui_version"], on=told["devices"][0]["name"][:40])
            for name in GRAPHS[setup.size]:
                for turn in ("first", "second"):
                    wanted = graph(name, STEPS[setup.size])
                    for node in wanted.values():  # a seed that is new: the host does nothing twice
                        if node["class_type"] == "KSampler":
                            node["inputs"]["seed"] += turn == "second"
                    begun = time.monotonic()
                    outputs = server.run(wanted)
                    seconds = time.monotonic() - begun
                    images = [entry for output in outputs.values() for entry in output.get("images", [])]
                    pictures[f"{name} {turn}"] = np.stack([np.asarray(server.image(entry)) for entry in images])
                    setup.note(**{f"{name}, {turn} s": seconds})
            warnings = [line for line in server.log.read_text().splitlines() if "vram" in line.lower()]
            print("\n".join(warnings))
    flat = [name for name, picture in pictures.items() if picture.std() < 5]
    if flat:
        raise AssertionError(f"pictures of one colour: {', '.join(flat)}")
    if "--cpu" in flags:
        np.savez_compressed(reference, **pictures)
        return
    if not reference.exists():
        setup.note(compared="with nothing: the stage host-cpu left no pictures")
        return
    known = np.load(reference)
    for name, picture in pictures.items():
        difference = np.abs(picture.astype(float) - known[name].astype(float)).mean()
        setup.line("pictures", {"graph": name, "from the CPU's, levels of 255": float(difference)})
