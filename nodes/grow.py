"""Add Teacher to DMM and Forget Style: a DMM model goes on learning, or loses a style, without the teachers it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..dmm_core.checkpoint import Checkpoint, save_checkpoint
from ..dmm_core.metadata import StyleInfo
from ..dmm_core.style_value import NO_STYLE, Mix, parse_style
from ..training.config import AttackConfig
from ..training.files.hashing import weights_sha256
from ..training.merge.grow import add_teachers, delete_styles
from . import host_model, paths, training_inputs
from .distill_settings import growing_inputs, growth_input, guard_input, int_input, warm_start_input
from .merge import source
from .preview import progress_on, send_text, told_with_file
from .teacher import TeacherInput
from .training_run import (
    comparison,
    connected,
    data_inputs,
    file_stem,
    given,
    learn,
    memory_given_back,
    outputs,
    teachers_input,
)

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
            search_aliases=[
                "add style",
                "incremental",
                "extend dmm",
                "distillation",
                "添加风格",
                "加入風格",
                "教師を追加",
            ],
            is_input_list=True,
            inputs=[
                *model_inputs("its styles stay."),
                teachers_input(),
                *data_inputs("my-dmm-grown", optional=True),
                guard_input(),
                warm_start_input(),
                *growing_inputs(),
                growth_input(),
                io.Boolean.Input(
                    "instant",
                    default=False,
                    optional=True,
                    tooltip=(
                        "No training: the looks join the style bank of a merged model at once, and the styles that it has keep every bit. "
                        "Needs no latents and captions."
                    ),
                ),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teachers, latents=None, captions=None, **lists) -> io.NodeOutput:
        one, config = given(lists)
        config = dataclasses.replace(config, init="base")  # from the model, whatever a preset says
        teachers = connected(teachers)
        if one.get("instant"):
            node_id = cls.hidden.unique_id
            return at_once(one, node_id, lambda before, say: grown(before, teachers, config.growth, node_id))
        needed(latents, captions, "instant")
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
            search_aliases=["remove style", "unlearn", "delete style", "remove teacher", "遗忘", "遺忘", "忘却"],
            is_input_list=True,
            inputs=[
                *model_inputs("all but the forgotten styles stay."),
                io.String.Input(
                    "styles", default="", tooltip="What to forget: a name, or several with commas between them."
                ),
                *data_inputs("my-dmm-less", optional=True),
                guard_input(),
                attack_input("attack_codes", 64),
                attack_input("attack_every", 100_000, advanced=True),
                attack_input("attack_steps", 10_000, advanced=True),
                attack_input("check_steps", 100_000),
                *growing_inputs(),
                io.Boolean.Input(
                    "only_delete",
                    default=False,
                    optional=True,
                    tooltip=(
                        "No training: what the file holds of the styles alone goes. What the network knows stays; with latents and "
                        "captions the report says how much of the looks a search finds back."
                    ),
                ),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latents=None, captions=None, **lists) -> io.NodeOutput:
        one, config = given(lists)
        config = dataclasses.replace(config, init="base")  # from the model, whatever a preset says
        attack = AttackConfig(**{field: one[name] for name, field in ATTACK.items()})
        attack.validate()
        forget = style_names(one["styles"])

        def gather(say):
            model, clip = one["model"], one["clip"]
            return training_inputs.gather_forgetting(
                model, clip, forget, latents=latents, captions=captions, config=config, attack=attack, say=say
            )

        if one.get("only_delete"):
            searched = gather if latents is not None and captions is not None else None
            return at_once(one, cls.hidden.unique_id, lambda before, say: deleted(before, forget, searched, say))
        needed(latents, captions, "only_delete")
        parts = training_inputs.dmm_parts(one["model"], one["clip"], one["vae"])

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


# --- without training -------------------------------------------------------------------------------------------------

Change = Callable[[Checkpoint, training_inputs.Say], tuple[Checkpoint, str, str]]
"""(model, where to say things) -> the model that it becomes, what else determines it, and the report."""


def needed(latents, captions, instead: str) -> None:
    """Raises ValueError without training pictures."""
    if latents is None or captions is None:
        raise ValueError(f"training needs latents and captions: connect them, or switch '{instead}' on")


def at_once(one, node_id, change: Change) -> io.NodeOutput:
    """A node's work without training: the MODEL of the inputs as it would be saved, changed, in a new file. one: the node's inputs."""
    stem = file_stem(one["name"])

    def say(text: str) -> None:
        send_text(text, node_id)

    # Nodes run in inference mode, whose tensors a model that is trained later would refuse.
    with torch.inference_mode(False), torch.no_grad(), memory_given_back():
        before = host_model.to_checkpoint(one["model"], one["clip"], one["vae"])
        after, what, report = change(before, say)
        parts = [weights_sha256(before.unet), what, *([repr(before.heads)] if before.heads else [])]
        path = paths.result_file(stem, parts, before)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, dataclasses.replace(after, metadata={**after.metadata, "modelspec.title": stem}))
    model, *_ = host_model.load(str(path))
    # There are no losses: a Loss Graph behind the node is left out.
    return io.NodeOutput(model, ExecutionBlocker(None), ui=told_with_file(f"saved dmm/{path.name}\n\n{report}", path))


def grown(before: Checkpoint, teachers: Sequence[TeacherInput], budget: str, node_id) -> tuple[Checkpoint, str, str]:
    """The model with a style for each teacher, as ``Change`` has it."""
    sources = [source(f"teacher '{one.name}'", one.model, StyleInfo(one.name, one.description)) for one in teachers]
    device = mm.get_torch_device()
    after, report = add_teachers(before, sources, budget, device=device, progress=progress_on(node_id))
    return after, repr([budget, *((one.name, one.stamp) for one in sources)]), report.text()


def deleted(
    before: Checkpoint, forget: Sequence[str], gather: Callable | None, say: training_inputs.Say
) -> tuple[Checkpoint, str, str]:
    """The model without some styles, as ``Change`` has it. gather: makes a run that can search for them, where there are pictures."""
    after, report = delete_styles(before, forget)
    text = report.text()
    if gather:
        run = gather(say)
        try:
            found = run.kind.final_report(run, training_inputs.interruptible(say))
        finally:
            run.targets.pool.close()
            vars(run).clear()
        text = f"{text}\n\n{found}".rstrip()
    return after, repr(sorted(forget)), text


NODES = [AddTeacher, ForgetStyle]
