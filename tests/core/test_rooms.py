"""Imports point one way: nodes -> training -> dmm_core, and only nodes may touch ComfyUI."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "execution",
    "node_helpers",
    "nodes",
}
MAY_USE = {"dmm_core": set(), "training": {"dmm_core"}, "nodes": {"dmm_core", "training"}}
CORE_PACKAGES = {"torch", "safetensors", "numpy", "einops"}
TRAINING = (
    "yaml_file presets fields config config_file progress seeds markdown files parallel host_path text teachers paint data loop memory run "
    "merge demo evaluation learn commands cli"
).split()
"""The rooms of training/, files and folders, ground first: each may import those before it, and dmm_core."""


def imports(path: Path, depth: int = 1):
    """(room or None, top-level module or None) of every import anywhere in a file, those inside functions included.

    depth: of the room's name, 1 for "training", 2 for "training.loop".
    """
    inside = path.relative_to(PACK).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((None, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield None, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield ".".join((*base, *name.split("."))[:depth]), None


@pytest.mark.parametrize("room", MAY_USE)
def test_imports_point_one_way(room):
    files = list((PACK / room).rglob("*.py"))
    assert files, f"no files in {room}"
    for path in files:
        for used, module in imports(path):
            assert used in {None, room} | MAY_USE[room], f"{path.relative_to(PACK)} imports from {used}"
            assert module != "comfyui_dmm", (
                f"{path.relative_to(PACK)}: use relative imports, the folder's name is the user's"
            )
            if room != "nodes":
                assert module not in HOST_MODULES, f"{path.relative_to(PACK)} imports {module}: only nodes/ may"
            if room == "dmm_core" and module:
                known = module in CORE_PACKAGES or module in sys.stdlib_module_names
                assert known, (
                    f"{path.relative_to(PACK)} imports {module}: dmm_core must run on {', '.join(CORE_PACKAGES)}"
                )


@pytest.mark.parametrize("room", TRAINING)
def test_rooms_of_training_import_towards_the_ground(room):
    place = PACK / "training" / room
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files, f"no files in {room}"
    may_use = {f"training.{name}" for name in TRAINING[: TRAINING.index(room) + 1]}
    for path in files:
        used = {place for place, _ in imports(path, depth=2) if place and place.startswith("training")}
        assert used <= may_use, (
            f"{path.relative_to(PACK)} imports from {', '.join(sorted(used - may_use))}, built after {room}"
        )


def test_every_room_of_training_is_in_the_table():
    found = {
        path.stem for path in (PACK / "training").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found == {"__init__", *TRAINING}


def test_every_package_is_installed():
    """pip installs what pyproject lists."""
    listed = re.search(r"\npackages = \[(.*?)\]", (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)
    folders = {path.parent.relative_to(PACK) for room in MAY_USE for path in (PACK / room).rglob("__init__.py")}
    assert sorted(re.findall(r'"(.*?)"', listed[1])) == sorted(
        ["comfyui_dmm", *(".".join(("comfyui_dmm", *f.parts)) for f in folders)]
    )


def test_the_pack_imports_without_comfyui():
    code = "import sys, comfyui_dmm; assert 'comfy' not in sys.modules and 'torch' not in sys.modules; print(comfyui_dmm.WEB_DIRECTORY)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "web", done.stderr


def test_the_rule_catches_a_breach(tmp_path, monkeypatch):
    (tmp_path / "dmm_core").mkdir()
    (tmp_path / "dmm_core" / "bad.py").write_text("def f():\n    from ..training import loop\n    import comfy.utils\n")
    monkeypatch.setattr(sys.modules[__name__], "PACK", tmp_path)
    found = list(imports(tmp_path / "dmm_core" / "bad.py"))
    assert ("training", None) in found and (None, "comfy") in found


def test_the_order_catches_a_lazy_breach(tmp_path, monkeypatch):
    (tmp_path / "training" / "data").mkdir(parents=True)
    (tmp_path / "training" / "data" / "bad.py").write_text("def f():\n    from ..run.distill import distill\n")
    monkeypatch.setattr(sys.modules[__name__], "PACK", tmp_path)
    with pytest.raises(AssertionError, match="training.run, built after data"):
        test_rooms_of_training_import_towards_the_ground("data")
