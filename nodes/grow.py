"""Add Teacher to DMM and Forget Style: a DMM model goes on learning, or loses a style, without the teachers it was made from."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.style_value import NO_STYLE, Mix, parse_style
from ..training.config import AttackConfig
from . import training_inputs
from .distill_settings import growing_inputs, guard_input, int_input, warm_start_input
from .training_run import comparison, connected, data_inputs, given, learn, outputs, teachers_input

ATTACK = {"attack_codes": "codes", "attack_every": "every", "attack_steps": "steps", "check_steps": "check"}
"""Input of Forget Style -> field of AttackConfig."""


def attack_input(name: str, high: int, **more):
    return int_input(name, high, config=AttackConfig(), field=ATTACK[name], **more)


def model_inputs(goes_on: str) -> list:
    return [
        io.Model.Input("model", tooltip=f"From Load DMM Model; {goes_on}"),
        io.Clip.Input("clip", tooltip="The model's text encoder, from the same loader."),
        io.Vae.Input("vae", tooltip="Saved with the result, and shows the previews."),
    ]


class AddTeacher(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMAddTeacher",
            display_name="Add Teacher to DMM",
            category="DMM/training",
            description=(
                "Teaches a DMM model the looks of more models. The model as it was guards the styles that it has, so their teachers "
                "are not needed. Saves a new file to output/dmm; cancel keeps what was learnt."
            ),
            search_aliases=["add style", "incremental", "extend dmm", "distillation"],
            is_input_list=True,
            inputs=[
                *model_inputs("its styles stay."),
                teachers_input(),
                *data_inputs("my-dmm-grown"),
                guard_input(),
                warm_start_input(),
                *growing_inputs(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teachers, latents, captions, **lists) -> io.NodeOutput:
        one, config = given(lists)
        teachers = connected(teachers)
        parts = training_inputs.dmm_parts(one["model"], one["clip"], one["vae"])

        def gather(say):
            return training_inputs.gather_grown(
                one["model"], one["clip"], teachers, latents=latents, captions=captions, config=config, say=say
            )

        return learn(gather, parts, one=one, node_id=cls.hidden.unique_id, report=comparison)


class ForgetStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMForgetStyle",
            display_name="Forget Style",
            category="DMM/training",
            description=(
                "Takes styles out of a DMM model: not only their names and vectors, but also, as far as an attack can tell, what the "
                "network knows of them. Their teachers are not needed. Saves a new file to output/dmm."
            ),
            search_aliases=["remove style", "unlearn", "delete style", "remove teacher"],
            is_input_list=True,
            inputs=[
                *model_inputs("all but the forgotten styles stay."),
                io.String.Input(
                    "styles", default="", tooltip="What to forget: a name, or several with commas between them."
                ),
                *data_inputs("my-dmm-less"),
                guard_input(),
                attack_input("attack_codes", 64),
                attack_input("attack_every", 100_000, advanced=True),
                attack_input("attack_steps", 10_000, advanced=True),
                attack_input("check_steps", 100_000),
                *growing_inputs(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latents, captions, **lists) -> io.NodeOutput:
        one, config = given(lists)
        attack = AttackConfig(**{field: one[name] for name, field in ATTACK.items()})
        attack.validate()
        forget = style_names(one["styles"])
        parts = training_inputs.dmm_parts(one["model"], one["clip"], one["vae"])

        def gather(say):
            model, clip = one["model"], one["clip"]
            return training_inputs.gather_forgetting(
                model, clip, forget, latents=latents, captions=captions, config=config, attack=attack, say=say
            )

        def report(run, say) -> str:
            return (
                f"{comparison(run, say)}\n\n{run.kind.final_report(run, training_inputs.interruptible(say))}".rstrip()
            )

        return learn(gather, parts, one=one, node_id=cls.hidden.unique_id, report=report)


def style_names(text: str) -> list[str]:
    """Names as style fields take them, with commas between. Raises ValueError for anything but a list of names."""
    style = parse_style(text) if text.strip() else None
    names = [name for name, _ in style.shares] if isinstance(style, Mix) else []
    if not names or NO_STYLE in names:
        raise ValueError(f"styles is '{text}': name one style, or several with commas between them")
    return names


NODES = [AddTeacher, ForgetStyle]
