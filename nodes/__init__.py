"""The ComfyUI nodes: the only part of the pack that imports the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    add_styles,
    demo_scenes,
    distill,
    edit_style,
    evaluate,
    few_steps,
    fold_style,
    grow,
    identify,
    learn,
    legacy,
    loader,
    merge,
    named_blend,
    paths,
    regions,
    routes,
    save,
    style,
    style_apply,
    style_sheet,
    style_values,
    teacher,
    training_routes,
)

MODULES = (
    *(
        loader,
        add_styles,
        style,
        style_values,
        style_apply,
        style_sheet,
        named_blend,
        edit_style,
        fold_style,
        regions,
        save,
    ),
    *(teacher, merge, distill, grow, learn, few_steps, demo_scenes, evaluate, identify),
)


class DMMExtension(ComfyExtension):
    async def on_load(self) -> None:
        paths.register()
        routes.register()
        training_routes.register()
        await legacy.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
