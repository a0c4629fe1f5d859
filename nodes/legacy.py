"""Graphs made for the authors' own two nodes, DMMLoader and DMMApply (github.com/songtianhui/ComfyUI-DMM).

The host's node replacement turns them into ours: in the browser on a click ("Replace All"), in a prompt sent to the server
by itself. Where their pack is installed too, their nodes stay what they are.

DMMApply names a style by its index in the codebook. The number goes into Style Selector as it is, which finds the style.

A DMMLoader without DMMApply painted in style 0 there and paints in no style here: a replacement puts one node for one node and
cannot tell what follows it. Style 0 as a default of Load DMM Model would change what its own graphs paint.
"""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

# The browser wants every widget and output listed; the server wants a value for every input of the new node.
REPLACEMENTS = [
    io.NodeReplace(
        old_node_id="DMMLoader",
        new_node_id="DMMLoadModel",
        old_widget_ids=["ckpt_name"],
        input_mapping=[{"old_id": "ckpt_name", "new_id": "ckpt_name"}],
        output_mapping=[{"old_idx": i, "new_idx": i} for i in range(3)],
    ),
    io.NodeReplace(
        old_node_id="DMMApply",
        new_node_id="DMMStyleSelector",
        old_widget_ids=["index"],
        input_mapping=[
            {"old_id": "model", "new_id": "model"},
            {"old_id": "index", "new_id": "style"},
            {"new_id": "strength", "set_value": 1.0},
        ],
        output_mapping=[{"old_idx": 0, "new_idx": 0}],
    ),
]


async def register() -> None:
    """Tell the host; nothing to do where ComfyUI runs without a server."""
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is not None:
        for replacement in REPLACEMENTS:
            await ComfyAPI().node_replacement.register(replacement)
