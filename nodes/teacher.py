"""DMM Teacher: one checkpoint (with its LoRAs) as a named teacher for Distill Teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..dmm_core.metadata import check_new_text
from ..training.config import check_names

TeacherType = io.Custom("DMM_TEACHER")


@dataclass(frozen=True)
class TeacherInput:
    """What travels on the wire: the host's own objects, untouched."""

    name: str
    model: Any
    clip: Any = None
    description: str = ""


class DMMTeacher(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMTeacher",
            display_name="DMM Teacher",
            category="DMM/training",
            description=(
                "A model whose look Distill Teachers should learn, under the name its style will have. LoRAs applied to the "
                "MODEL are part of it."
            ),
            search_aliases=["distill", "merge checkpoints", "教师", "教師", "교사"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that paints this look, with LoRAs or without."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder this model was made for. Without one, the base's reads the captions for it.",
                ),
                io.String.Input("name", default="my style", tooltip="The name of the style."),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Shown to whoever picks the style.",
                ),
            ],
            outputs=[TeacherType.Output(display_name="teacher")],
        )

    @classmethod
    def execute(cls, model, name, clip=None, description="") -> io.NodeOutput:
        check_names([name])
        check_new_text("description", description.strip())
        return io.NodeOutput(TeacherInput(name.strip(), model, clip, description.strip()))


NODES = [DMMTeacher]
