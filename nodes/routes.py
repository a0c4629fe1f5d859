"""GET /dmm/styles?ckpt_name=NAME: the styles in a model file, for the picker in the browser. Reads the file's header only."""

from __future__ import annotations

import asyncio

from ..dmm_core.checkpoint import read_info
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
        info = await asyncio.to_thread(read_info, path)
    except (ValueError, OSError) as error:
        return web.json_response({"error": str(error).replace(path, name)}, status=422)
    styles = [{"name": s.name, "description": s.description, "thumbnail": s.thumbnail} for s in info.styles]
    return web.json_response({"styles": styles})
