"""GET /dmm/styles?ckpt_name=NAME, or ?styles=NAME for a file of styles alone: the styles in it, for the pickers in the browser. Reads the
header of the file only."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from pathlib import Path

from ..training.files.model_files import change_stamp, load_any_info
from ..training.files.style_file import read_style_file
from . import paths


def register() -> None:
    """Add the route to the host's server; nothing to do where ComfyUI runs without one."""
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)
    if instance is not None:
        instance.routes.get("/dmm/styles")(get_styles)


async def get_styles(request):
    """{"styles": [{"name", "description", "thumbnail"}, ...]}, or {"error": message} with a 4xx status; 304 without a body for a browser
    that has the answer to this version of the file: it asks after every run.

    The texts come from strangers' files: the browser must treat them as text.
    """
    from aiohttp import web

    alone = "styles" in request.query
    name = request.query.get("styles" if alone else "ckpt_name", "")
    try:
        path = paths.style_file_path(name) if alone else paths.model_path(name)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=404)
    try:
        version = hashlib.sha256(repr(change_stamp(path)).encode()).hexdigest()
        if version in [tag.value for tag in request.if_none_match or ()]:
            return web.Response(status=304, headers={"ETag": f'"{version}"', "Cache-Control": "no-cache"})
        read = functools.partial(read_style_file, header_only=True) if alone else load_any_info
        info = await asyncio.to_thread(read, path)
    except (ValueError, OSError) as error:
        message = str(error).replace(path, name).replace(str(Path(path)), name)  # not where it lies on the disk
        return web.json_response({"error": message}, status=422)
    styles = [{"name": s.name, "description": s.description, "thumbnail": s.thumbnail} for s in info.styles]
    return web.json_response({"styles": styles}, headers={"ETag": f'"{version}"', "Cache-Control": "no-cache"})
