"""Distill Teachers: the trainer of ``training/`` as a node. Inputs are checked before anything is written."""

from __future__ import annotations

from comfy_api.latest import io

from . import training_inputs
from .distill_settings import setting_inputs
from .training_run import comparison, connected, data_inputs, given, learn, outputs, teachers_input


class DistillTeachers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMDistillTeachers",
            display_name="Distill Teachers",
            category="DMM/training",
            description=(
                "Trains one model that holds the looks of all teachers and saves it to output/dmm. Cancel keeps what was learnt; "
                "queueing the same graph again goes on from there. While it runs, buttons on the node pause it, show and save what "
                "it has learnt, or stop it and go on with the graph."
            ),
            search_aliases=["train dmm", "merge models", "distillation", "蒸馏", "蒸餾", "蒸留", "증류"],
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "base",
                    tooltip=(
                        "Where the student starts, and what it paints without a style. A model from Merge Checkpoints to DMM goes on with "
                        "its styles, each with the teacher of its name."
                    ),
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the base; it becomes the student's."),
                io.Vae.Input("vae", tooltip="Saved with the student, and shows the previews."),
                teachers_input(),
                *data_inputs("my-dmm"),
                *setting_inputs(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teachers, latents, captions, **lists) -> io.NodeOutput:
        one, config = given(lists)
        teachers = connected(teachers)
        parts = training_inputs.base_parts(one["base"], one["clip"], one["vae"])

        def gather(say):
            return training_inputs.gather(
                one["base"], one["clip"], teachers, latents=latents, captions=captions, config=config, say=say
            )

        return learn(gather, parts, one=one, node_id=cls.hidden.unique_id, report=comparison)


NODES = [DistillTeachers]
