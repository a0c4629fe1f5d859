"""Distill to Four Steps: a DMM model learns from itself to paint in a few steps, in every style."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..training.config import FewStepConfig
from ..training.fields import about_field
from ..training.files.outputs import check_folder
from ..training.loop.trainer import Trainer
from ..training.run.student_file import save_lora
from . import training_inputs
from .distill_settings import choice, growing_inputs, int_input
from .grow import model_inputs
from .training_run import data_inputs, given, learn, outputs

STEPS = {"sampling_steps": "steps", "cfg_to_learn": "cfg", "own_paintings": "paths"}
"""Input -> field of FewStepConfig."""
LEFT_OUT = {
    "feature_weight", "adversarial_weight", "adversarial_rate", "final_steps", "final_images", "style_rate", "sampling",
}  # fmt: skip
"""Settings of Distill Teachers that mean nothing here."""
BEGINS_WITH = {"learning_rate": 1e-4, "no_style_share": 0.1, "lora_rank": 64, "trainable": "lora"}


def setting_inputs() -> list:
    """Those of Distill Teachers that matter here, with defaults of their own."""
    kept = [one for one in growing_inputs() if one.id not in LEFT_OUT]
    trainable = choice("trainable", ("lora", "all"), advanced=True, optional=True)
    kept = [trainable if one.id == "trainable" else one for one in kept]
    for one in kept:
        one.default = BEGINS_WITH.get(one.id, one.default)
    return kept


class FewStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        cfg = about_field(FewStepConfig, "cfg").doc
        return io.Schema(
            node_id="DMMFewStep",
            display_name="Distill to Four Steps",
            category="DMM/training",
            description=(
                "Teaches a DMM model to paint in a few steps at cfg 1, in every style, from itself: no teachers are needed. Saves the new "
                "model to output/dmm, and to output/loras a LoRA that does the same to the model you gave. Paint with euler, sgm_uniform "
                "and cfg 1."
            ),
            search_aliases=["turbo", "lcm", "lightning", "few steps", "4 steps", "加速", "高速化", "가속"],
            is_input_list=True,
            inputs=[
                *model_inputs("its styles stay what they are."),
                *data_inputs("my-dmm-four"),
                int_input("sampling_steps", 16, config=FewStepConfig(), field="steps"),
                io.Float.Input("cfg_to_learn", default=FewStepConfig.cfg, min=1, max=30, step=0.1, tooltip=cfg),
                int_input("own_paintings", 10_000, config=FewStepConfig(), field="paths", advanced=True),
                *setting_inputs(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latents, captions, **lists) -> io.NodeOutput:
        one, config = given({"trainable": ["lora"], **lists})
        chosen = {field: one[name] for name, field in STEPS.items()}
        if not chosen["paths"]:  # noised pictures alone
            chosen["objective"] = "consistency"
        settings = FewStepConfig(**chosen)
        settings.validate()
        parts = training_inputs.dmm_parts(one["model"], one["clip"], one["vae"])

        def gather(say) -> Trainer:
            return training_inputs.gather_few_steps(
                one["model"], one["clip"], latents=latents, captions=captions, config=config, settings=settings, say=say
            )

        loras, written = Path(folder_paths.get_output_directory()) / "loras", []
        check_folder(loras, "the folder of the LoRA")  # now, not at the end of the training

        def write_lora(run: Trainer, model: Path) -> None:
            loras.mkdir(parents=True, exist_ok=True)
            if save_lora(run, loras / model.name, model.stem):  # of all weights there is none
                written[:] = [model.name]

        def report(run: Trainer, say) -> str:
            paint = f"Paint with euler, sgm_uniform, {settings.steps} steps, cfg 1."
            if not written:
                return paint
            return f"The LoRA is loras/{written[0]}, for Load LoRA on the model you gave.\n{paint}"

        return learn(gather, parts, one=one, node_id=cls.hidden.unique_id, report=report, beside=write_lora)


NODES = [FewStep]
