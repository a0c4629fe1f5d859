"""The ComfyUI nodes: the only part of the pack that imports the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import demo_scenes, distill, loader, paths, routes, save, style, teacher


class DMMExtension(ComfyExtension):
    async def on_load(self) -> None:
        paths.register()
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loader.NODES, *style.NODES, *save.NODES, *teacher.NODES, *distill.NODES, *demo_scenes.NODES]
