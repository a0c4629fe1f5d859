"""The files of ``locales/``: what is in each, computed from the nodes and the table, in ComfyUI's layout
(``app/custom_node_manager.py``: ``locales/<language>/nodeDefs.json`` and ``main.json``).

The frontend looks texts up by these keys (``nodeDefs.<id>.inputs.<name>.tooltip``, ...), with "_" for a dot in a name. It translates no
values of combo boxes, and no names of the sockets that an Autogrow input makes.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .table import LANGUAGES, Table

FOLDER = Path(__file__).absolute().parents[2] / "locales"

HOST_CATEGORIES = ("training",)
"""Parts of our nodes' categories that ComfyUI translates itself. All packs share these words: leave ComfyUI's as they are."""

SLOTS = 16
"""Sockets of an Autogrow input that get a tooltip. The frontend names each of them and has no text for any, so English has a file too."""


async def node_infos() -> dict[str, dict[str, Any]]:
    """Node id -> its entry in ``/object_info``, in the order of the pack. Needs the host in this process."""
    from comfyui_dmm import comfy_entrypoint

    extension = await comfy_entrypoint()
    infos = [node.GET_NODE_INFO_V1() for node in await extension.get_node_list()]
    return {info["name"]: info for info in infos}


def texts(infos: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every English text that the frontend would translate -> where it stands first: "DMMRegion.feather, tooltip"."""
    found: dict[str, str] = {}
    for path, text in leaves(node_definitions(infos)):
        node, *inner, kind = path
        found.setdefault(text, f"{'.'.join([node, *inner[1:]])}, {kind}")
    for info in infos.values():
        for part in categories([info]):
            found.setdefault(part, f"{info['name']}, category")
    return found


def files(infos: dict[str, dict[str, Any]], table: Table) -> dict[str, str]:
    """Path in ``locales/`` -> text of the file. Needs a complete table (``table.missing``): KeyError otherwise."""
    english = node_definitions(infos)
    made = {"en/nodeDefs.json": slot_tooltips(infos)}
    for language in LANGUAGES:
        made[f"{language}/nodeDefs.json"] = translated(english, {text: row[language] for text, row in table.items()})
        made[f"{language}/main.json"] = {
            "nodeCategories": {part: table[part][language] for part in categories(infos.values())}
        }
    return {path: json.dumps(content, ensure_ascii=False, indent=2) + "\n" for path, content in made.items()}


def write(made: dict[str, str], folder: Path = FOLDER) -> Iterator[Path]:
    """Write what ``files`` made; yields the paths."""
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        yield path


def categories(infos: Iterable[dict[str, Any]]) -> list[str]:
    """The words of the nodes' categories ("DMM/style": DMM, style), each once, without those that ComfyUI translates."""
    parts = [part for info in infos for part in info["category"].split("/")]
    return [part for part in dict.fromkeys(parts) if part not in HOST_CATEGORIES]


def node_definitions(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``nodeDefs.json`` in English: node id -> display_name, description, inputs and outputs."""
    slots = slot_tooltips(infos)
    made = {}
    for name, info in infos.items():
        inputs = {key(input): described(input, options) for input, options in options_of(info["input"])}
        inputs |= slots.get(name, {}).get("inputs", {})
        made[name] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": inputs,
            "outputs": outputs(info),
        }
    return made


def outputs(info: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Index -> name and tooltip. An output that is called as its type (MODEL) has ComfyUI's word for the type."""
    named = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    made = {
        str(index): ({"name": name} if name != type else {}) | ({"tooltip": tooltip} if tooltip else {})
        for index, (name, type, tooltip) in enumerate(named)
    }
    return {index: output for index, output in made.items() if output}


def slot_tooltips(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tooltips of the sockets of Autogrow inputs ("teachers.teacher0"), as part of ``nodeDefs.json``."""
    made: dict[str, Any] = {}
    for name, info in infos.items():
        for input, options in options_of(info["input"]):
            template = options.get("template", {"input": {}})
            for _, inner in options_of(template["input"]):
                if tooltip := inner.get("tooltip"):
                    slots = (
                        key(f"{input}.{template['prefix']}{index}") for index in range(min(SLOTS, template["max"]))
                    )
                    made.setdefault(name, {"inputs": {}})["inputs"] |= {slot: {"tooltip": tooltip} for slot in slots}
    return made


def options_of(inputs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of the inputs that are shown."""
    for kind in ("required", "optional"):
        for name, (_, *options) in inputs.get(kind, {}).items():
            yield name, options[0] if options else {}


def described(name: str, options: dict[str, Any]) -> dict[str, str]:
    """An input's name as shown, and its tooltip where it has one."""
    tooltip = options.get("tooltip")
    return {"name": options.get("display_name") or name} | ({"tooltip": tooltip} if tooltip else {})


def key(name: str) -> str:
    """A name as the frontend looks it up (normalizeI18nKey)."""
    return name.replace(".", "_")


def translated(content: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
    """The same tree with every text replaced by its translation. KeyError: a text without one."""
    return {name: translated(part, words) if isinstance(part, dict) else words[part] for name, part in content.items()}


def leaves(content: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text) of every text of a tree."""
    for name, part in content.items():
        yield from leaves(part, (*path, name)) if isinstance(part, dict) else [((*path, name), part)]
