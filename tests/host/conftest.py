"""A real ComfyUI for the tests: imported into this process on the CPU, and as a server behind HTTP.

Which one: see ``comfyui_dmm.training.host_path.find_host`` (COMFYUI_PATH first). Its folder is only read: models,
outputs and settings go to temporary folders. Without a host, every test here is skipped.
"""

from pathlib import Path

import pytest
from comfyui_dmm.training.host_path import find_host

from .in_process import import_host, strangers
from .server import Server

HERE = Path(__file__).parent
HOST = find_host()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)
            if HOST is None:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI found: set COMFYUI_PATH to its folder"))


@pytest.fixture(scope="session", autouse=True)
def host(tmp_path_factory):
    """The host's ``comfy`` package in this process, on the CPU, with an empty base folder (``host_folder``)."""
    yield import_host(HOST, tmp_path_factory.mktemp("base"))
    assert not strangers(HOST)


@pytest.fixture(scope="session")
def models(host) -> Path:
    """The models folder of the in-process host."""
    import folder_paths

    return Path(folder_paths.models_dir)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running ComfyUI with only this pack."""
    with Server(HOST, tmp_path_factory.mktemp("server")) as running:
        yield running
