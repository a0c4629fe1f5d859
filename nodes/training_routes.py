"""What runs now, and what may be asked of it: GET /dmm/training and POST /dmm/training/NODE/ACTION, for the node's buttons; and GET
/dmm/presets, for its preset."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..training.presets import PRESETS
from ..training.run.watch.controls import Controls
from ..training.run.watch.progress import Progress
from .distill_settings import preset_inputs

_running: dict[str, tuple[Controls, Progress]] = {}
"""By node id, only while the training runs; requests and numbers, nothing of the model."""


@contextlib.contextmanager
def listed(node_id, controls: Controls, progress: Progress) -> Iterator[None]:
    """Inside, the training of this node answers to the routes."""
    _running[str(node_id)] = (controls, progress)
    try:
        yield
    finally:
        del _running[str(node_id)]


def register() -> None:
    """Add the routes to the host's server; nothing to do where ComfyUI runs without one."""
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)
    if instance is not None:
        instance.routes.get("/dmm/training")(get_training)
        instance.routes.get("/dmm/presets")(get_presets)
        instance.routes.post("/dmm/training/{node_id}/{action}")(post_action)


async def get_presets(request):
    """{preset: {input of Distill Teachers: value}}"""
    from aiohttp import web

    return web.json_response({name: preset_inputs(name) for name in PRESETS})


async def get_training(request):
    """{"training": [{"node_id", "step", "steps", "paused", "stopping", "seconds_left" (or null), "curve" (``Curve.as_lists``)}, ...]}"""
    from aiohttp import web

    return web.json_response({"training": [describe(*entry) for entry in list(_running.items())]})


async def post_action(request):
    """The node's entry of ``get_training``; {"error": message} with 404 for a node that is not training, 400 for an unknown action."""
    from aiohttp import web

    node_id, action = request.match_info["node_id"], request.match_info["action"]
    training = _running.get(node_id)
    if training is None:
        return web.json_response({"error": f"node '{node_id}' is not training"}, status=404)
    try:
        training[0].ask(action)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(describe(node_id, training))


def describe(node_id: str, training: tuple[Controls, Progress]) -> dict:
    controls, progress = training
    return {
        "node_id": node_id,
        "step": progress.step,
        "steps": progress.steps,
        "paused": controls.paused,
        "stopping": controls.stopping,
        "seconds_left": progress.seconds_left,
        "curve": progress.curve.as_lists(),
    }
