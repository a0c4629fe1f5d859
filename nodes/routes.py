"""GET /dmm/styles?ckpt_name=NAME: the styles in a model, for the pickers in the browser. Reads the header of its file only."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..training.files.model_files import load_any_info
from . import paths


def register() -> None:
    """Add the route to the host's server; nothing to do where ComfyUI runs without one."""
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)
    if instance is not None:
        instance.routes.get("/dmm/styles")(get_styles)


async def get_styles(request):
    """{"styles": [{"name", "description", "thumbnail"}, ...]}, or {"error": message} with a 4xx status.

    The texts come from strangers' files: the browser must treat them as text.
    """
    from aiohttp import web

    name = request.query.get("ckpt_name", "")
    try:
        path = paths.model_path(name)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=404)
    try:
        info = await asyncio.to_thread(load_any_info, path)
    except (ValueError, OSError) as error:
        message = str(error).replace(path, name).replace(str(Path(path)), name)  # not where it lies on the disk
        return web.json_response({"error": message}, status=422)
    styles = [{"name": s.name, "description": s.description, "thumbnail": s.thumbnail} for s in info.styles]
    return web.json_response({"styles": styles})
