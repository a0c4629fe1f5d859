"""The host in this process is the host, whatever else has its names: this pack has a folder ``nodes``, too."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import HOST
from .in_process import origin, strangers, top_level_names

PACK = Path(__file__).absolute().parents[2]
LATE = (
    *("nodes", "execution", "server", "utils.extra_config", "app.logger"),
    *("comfy_extras.nodes_clip_sdxl", "comfy.samplers", "node_helpers"),
)
"""Modules that the ``host`` fixture does not all import: the pack or a test does, later."""


def test_comfy_is_the_hosts(host):
    assert list(host.__path__) == [str(HOST / "comfy")] and not strangers(HOST)


@pytest.mark.parametrize("name", LATE)
def test_a_module_is_the_hosts_whenever_it_is_imported(name):
    module = importlib.import_module(name)
    assert HOST.resolve() in origin(module).parents and not strangers(HOST)


def test_the_names_are_those_that_the_hosts_code_imports():
    names = top_level_names(HOST)
    assert {
        "comfy",
        "comfy_api",
        "comfy_execution",
        "folder_paths",
        "node_helpers",
        "nodes",
        "server",
        "utils",
    } <= names
    assert not names & {"tests", "models", "comfyui_dmm", "torch"}


@pytest.mark.parametrize(
    "folder, others", [("comfyui-dmm", ()), ("nodes", ()), ("dmm", top_level_names(HOST) if HOST else ())]
)
def test_folders_that_stand_in_front(folder, others, tmp_path):
    """Tests of the host, then of the core, then of the host: pytest sets up a folder of tests again whenever it comes to it, and in its
    default mode puts the checkout in front of sys.path then; or the checkout's parent, when the checkout could be a package by its name.
    The checkout may be called like a module of the host; and ``others`` with such names may stand on PYTHONPATH."""
    checkout = tmp_path / "clone" / folder
    checkout.parent.mkdir()
    checkout.symlink_to(PACK, target_is_directory=True)
    for name in others:
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "__init__.py").write_text("raise ImportError(f'{__name__} is not the host')")
    here = f"{checkout}/tests/host/{Path(__file__).name}"
    tests = (
        f"{here}::{test_comfy_is_the_hosts.__name__}",
        f"{checkout}/tests/core/test_rooms.py::test_the_pack_imports_without_comfyui",
        f"{here}::{test_a_module_is_the_hosts_whenever_it_is_imported.__name__}",
    )
    options = "-q -p no:randomly -p no:cacheprovider -p no:xdist".split()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, (str(tmp_path / "others"), environment.get("PYTHONPATH"))))
    environment |= {"COMFYUI_PATH": str(HOST), "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and f"{2 + len(LATE)} passed" in run.stdout, run.stdout + run.stderr
