"""DMM Demo Scenes: captioned pictures made on the spot, so that a first distillation needs no dataset."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..training.demo.bank import demo_images
from ..training.demo.looks import BASE_LOOK, TEACHER_LOOKS


class DMMDemoScenes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMDemoScenes",
            display_name="DMM Demo Scenes",
            category="DMM/training",
            description=(
                "Small captioned pictures for the demo models, in all their looks. For your own models use Load Image-Text (from "
                "Folder) instead."
            ),
            search_aliases=["dataset"],
            inputs=[
                io.Int.Input("count", default=192, min=8, max=10_000, tooltip="How many pictures."),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True),
                io.String.Output(display_name="texts", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, count, seed) -> io.NodeOutput:
        images, captions = demo_images((BASE_LOOK, *TEACHER_LOOKS), count, seed)
        tensors = torch.from_numpy(images).float() / 255  # (count, H, W, 3)
        return io.NodeOutput(list(tensors.split(1)), captions)


NODES = [DMMDemoScenes]
