"""DMM Demo Scenes and DMM Demo Outline: pictures made on the spot, so that the examples need no files."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..training.data.demo.family import SECOND
from ..training.data.demo.latents import demo_images
from ..training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS
from ..training.data.demo.scenes import SHAPES, control_hint, sample_scene

ALL = "all of the demo models"


class DMMDemoScenes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMDemoScenes",
            display_name="DMM Demo Scenes",
            category="DMM/training",
            description=(
                "Small captioned pictures for the demo models, in all their looks or in a new one. For your own models use Load "
                "Image-Text (from Folder) instead."
            ),
            search_aliases=["dataset"],
            inputs=[
                io.Int.Input("count", default=192, min=8, max=10_000, tooltip="How many pictures."),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Another seed draws other scenes."),
                io.Combo.Input(
                    "look",
                    options=[ALL, *SECOND.teachers],
                    default=ALL,
                    optional=True,
                    tooltip="The demo models' looks in turn, or one that they do not know, to learn it from pictures.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True),
                io.String.Output(display_name="texts", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, count, seed, look=ALL) -> io.NodeOutput:
        looks = (BASE_LOOK, *TEACHER_LOOKS) if look == ALL else (look,)
        images, captions = demo_images(looks, count, seed)
        tensors = torch.from_numpy(images).float() / 255  # (count, H, W, 3)
        return io.NodeOutput(list(tensors.split(1)), captions)


class DemoOutline(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMDemoOutline",
            display_name="DMM Demo Outline",
            category="DMM/training",
            description="The outline of a thing that the demo models know, white on black: a hint for the demo ControlNet.",
            search_aliases=["demo hint", "control image", "outline"],
            inputs=[
                io.Combo.Input(
                    "object", options=list(SHAPES), default=SHAPES[0], tooltip="The thing whose outline is drawn."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, tooltip="Another seed moves, turns and resizes the object."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, object, seed) -> io.NodeOutput:
        hint = control_hint(sample_scene(np.random.default_rng(seed), shape=object))  # (H, W, 3) uint8
        return io.NodeOutput(torch.from_numpy(hint).float()[None] / 255)


NODES = [DMMDemoScenes, DemoOutline]
