"""comfyui-dmm: distilled multi-style models for ComfyUI (arXiv:2504.12364).

Imports without ComfyUI: the host is touched only inside ``comfy_entrypoint``, which ComfyUI awaits when it loads the pack.
"""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    """Return the V3 extension that registers the nodes (called by ComfyUI)."""
    from .nodes import DMMExtension

    return DMMExtension()
