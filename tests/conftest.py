"""Options of the whole test suite. tests/host also needs a real ComfyUI, see its own conftest."""

import os
from zlib import crc32

import pytest
import torch

os.environ["DMM_HASHES"] = ""  # nothing in the user's own folders


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes (marked slow)")
    parser.addoption("--run-browser", action="store_true", help="also drive ComfyUI's page in a real Chromium")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests come in random order (pytest-randomly): what one draws from torch's global generator must not depend on those before it.

    One seed for all: a fixture of a file has the same numbers whichever test asks for it first.
    """
    torch.manual_seed(crc32(b"fixtures"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    torch.manual_seed(crc32(item.nodeid.encode()))
