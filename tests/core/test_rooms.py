"""Imports point one way: nodes -> training -> dmm_core, and only nodes may touch ComfyUI."""

import ast
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


def imports(path: Path):
    """(room or None, top-level module or None) of every import anywhere in a file, those inside functions included."""
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
                yield (*base, *name.split("."))[0], None


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
