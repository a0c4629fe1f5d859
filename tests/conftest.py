"""Options of the whole test suite. tests/host also needs a real ComfyUI, see its own conftest."""

import pytest


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
