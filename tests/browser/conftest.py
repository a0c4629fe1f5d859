"""ComfyUI's own page in a real browser: playwright drives a Chromium that is installed, nothing is downloaded.

Skipped, with one line, without a ComfyUI, without the playwright package, or without Chromium (``apt-get install chromium``;
CHROMIUM names another one). FRONTEND: the ``static`` folder of another comfyui-frontend-package than the one that the host pins.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import requests
from comfyui_dmm.training.host_path import find_host

from ..host.server import Server

HERE = Path(__file__).parent
HOST = find_host()
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FRONTEND = os.environ.get("FRONTEND")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 90_000
"""Milliseconds that a step may take before it counts as failed, on a busy machine."""


def missing() -> str:
    """What these tests lack, in one line; "" when they can run."""
    if HOST is None:
        return "no ComfyUI found: set COMFYUI_PATH to its folder"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright: pip install playwright"
    if CHROMIUM is None:
        return "no Chromium: apt-get install chromium, or set CHROMIUM to its path"
    return ""


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("--run-browser")
    reason = missing() if asked else "browser: run with --run-browser"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running ComfyUI with only this pack, its first-visit tour switched off."""
    page = ("--front-end-root", FRONTEND) if FRONTEND else ()
    with Server(HOST, tmp_path_factory.mktemp("browser"), page) as running:
        configure(running, {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.UseNewMenu": "Top"})
        yield running


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, args=FLAGS, headless=True, viewport={"width": 1600, "height": 900}
        )
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture(params=["canvas", "nodes2"])
def page(request, server, browser):
    """ComfyUI's page with an empty graph, drawn by the canvas and by the newer "Nodes 2.0"; its script errors are in ``errors``."""
    configure(server, {"Comfy.VueNodes.Enabled": request.param == "nodes2"})
    page = browser.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    local = f"http://{server.address}/"
    page.route(
        "**/*",
        lambda route: route.continue_() if route.request.url.startswith((local, "data:", "blob:")) else route.abort(),
    )
    page.goto(local, wait_until="domcontentloaded")
    page.wait_for_function(
        "() => Boolean(window.app?.graph && app.vueAppReady && LiteGraph.registered_node_types.DMMStyleSelector)"
    )
    page.wait_for_function("() => app.graph.nodes.length > 0")  # the page opens a graph by itself: let it finish
    page.renderer = request.param
    yield page
    page.close()


def configure(server, settings: dict) -> None:
    requests.post(f"http://{server.address}/settings", json=settings, timeout=60).raise_for_status()
