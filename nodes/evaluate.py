"""Evaluate DMM: a model against the teachers it was made from, as heatmaps and a report."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..dmm_core.unet import UNetConfig
from ..dmm_core.vae import latent_scale
from ..training.config import check_names
from ..training.data.image_folder import clean_caption
from ..training.evaluation.baselines import BASELINES, RANK, Contender, make_baselines, obstacles
from ..training.evaluation.evaluate import Lineup, evaluate
from ..training.evaluation.features import DEMO_FILE, FeatureNet, PixelDecoder, load_features
from ..training.evaluation.model_ref import ModelRef
from ..training.evaluation.report import markdown, sheet, write
from ..training.evaluation.settings import METRICS, OF_FEATURES, EvaluationSettings
from ..training.files.hashing import repr_sha256, weights_hash
from ..training.paint.images import to_pixels
from ..training.teachers.teacher import Teacher, plain_unet
from . import host_model, paths
from .preview import send_text
from .teacher import TeacherInput
from .training_inputs import frozen_styles, frozen_teachers
from .training_run import memory_given_back, teachers_input
from .weights import unet_weights

FEATURES = "dmm_features"
"""The folder models/dmm_features: weights of Inception v3."""
AUTO, NONE = "auto", "none"
DISTANCES = {"none": (), "KID": ("kid",), "FID and KID": ("fid", "kid")}
PROMPTS = "a red star\na big blue house, hills\na green fish by the sea\na yellow moon in the city\nan orange cat\na pink flower, hills"


class EvaluateDMM(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMEvaluate",
            display_name="Evaluate DMM",
            category="DMM/evaluation",
            description=(
                "How near a DMM model is to its teachers, style by style: both paint the same prompts from the same noise. Cancel keeps "
                "what is painted; queueing the same graph again goes on from there."
            ),
            search_aliases=["fid", "kid", "benchmark", "compare with teachers", "quality", "评估", "評估", "評価"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.Clip.Input("clip", tooltip="The model's text encoder, from the same loader."),
                io.Vae.Input("vae", tooltip="Makes the pictures that KID and FID look at."),
                teachers_input(),
                io.Model.Input("base", optional=True, tooltip="What the model was trained from, as a baseline."),
                io.String.Input(
                    "prompts", default=PROMPTS, multiline=True, tooltip="One a line; they are painted in turn."
                ),
                io.Int.Input(
                    "count", default=32, min=2, max=100_000, tooltip="Pictures a style. FID needs more than features."
                ),
                io.Int.Input(
                    "width", default=128, min=16, max=8192, step=8, tooltip="128 for the demo models, 512 for SD 1.5."
                ),
                io.Int.Input("height", default=128, min=16, max=8192, step=8, tooltip="Of the pictures, in pixels."),
                io.Int.Input("steps", default=12, min=1, max=1000, tooltip="Sampling steps of a picture."),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Classifier-free guidance."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Of the first picture's noise; the next has the next.",
                ),
                io.Combo.Input(
                    "distances",
                    options=list(DISTANCES),
                    default="KID",
                    tooltip="Between sets of pictures, by features.",
                ),
                io.Combo.Input(
                    "features",
                    options=[AUTO, NONE, *feature_files()],
                    default=AUTO,
                    tooltip="auto: the demo models' own network, for other models none. Inception v3 goes into models/dmm_features.",
                ),
                io.Int.Input(
                    "project",
                    default=0,
                    min=0,
                    max=2048,
                    advanced=True,
                    tooltip="Compare only so many directions of the features, so that FID needs fewer pictures; 0 for all.",
                ),
                io.Int.Input(
                    "resamples",
                    default=-1,
                    min=-1,
                    max=10_000,
                    advanced=True,
                    tooltip="For the ±; -1: what is affordable.",
                ),
                io.Int.Input(
                    "bins", default=10, min=1, max=1000, advanced=True, tooltip="Of the timesteps, for the eps errors."
                ),
                io.Int.Input(
                    "own_pictures", default=8, min=1, max=10_000, advanced=True, tooltip="By each teacher, to sort."
                ),
                io.Int.Input(
                    "own_draws", default=32, min=2, max=1000, advanced=True, tooltip="By which it judges each of them."
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp32", "bf16", "fp16"],
                    default="auto",
                    advanced=True,
                    tooltip="Of the painting; auto: what the device is fast in.",
                ),
                # Optional and at the end: graphs from before these inputs still run.
                io.Boolean.Input(
                    "baselines",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also compare what needs no distilling: merges of the teachers, each teacher alone. Takes about twice as long.",
                ),
                io.Int.Input(
                    "rank",
                    default=RANK,
                    min=1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Of the baseline with a low-rank adapter for each style.",
                ),
            ],
            outputs=[io.Image.Output(display_name="heatmaps"), io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, teachers, prompts, distances, features, base=None, baselines=False, rank=RANK, **numbers
    ) -> io.NodeOutput:
        inputs = [teacher for teacher in teachers.values() if teacher is not None]
        check_names([teacher.name for teacher in inputs])
        lines = ["", *(clean_caption(line) for line in prompts.splitlines() if line.strip())]
        node_id = cls.hidden.unique_id
        with torch.inference_mode(False), torch.no_grad(), memory_given_back():
            send_text("reading the models", node_id)
            student, own = frozen_styles(model, clip, lines)
            network, note = feature_network(features, student.unet.config)
            wanted = [m for m in METRICS if m not in OF_FEATURES or (network and m in DISTANCES[distances])]
            settings = EvaluationSettings(**numbers, metrics=tuple(wanted))
            lineup = Lineup(
                ModelRef.of(student, len(lines)),
                [style.name for style in own],
                [model_ref(teacher, student, clip, lines) for teacher in inputs],
                lines,
                model_ref(TeacherInput("base", base), student, clip, lines) if base is not None else None,
                host_decoder(vae, student.unet.config) if network else None,
                network,
            )
            left_out = ""
            if baselines:
                lineup.others, left_out = possible_baselines(lineup, rank)
            result, folder = run(lineup, settings, node_id)
            report = "\n\n".join(filter(None, (markdown(result), note, left_out)))
            picture = to_pixels([sheet(result)])
        said = f"saved dmm_evaluations/{folder.name}\n\n{report}"
        return io.NodeOutput(picture, report, ui=ui.PreviewText(said))


def feature_files() -> list[str]:
    """Names in models/dmm_features, a folder that this pack adds to the host's."""
    folder_paths.add_model_folder_path(FEATURES, os.path.join(folder_paths.models_dir, FEATURES))
    return [name for name in paths.file_names(FEATURES) if name.endswith((".safetensors", ".pth", ".pt"))]


def feature_network(choice: str, config: UNetConfig) -> tuple[FeatureNet | None, str]:
    """The network for KID and FID, and what there is to say about it."""
    if choice == AUTO and config.model_channels < host_model.SD_WIDTH:
        return load_features(DEMO_FILE), ""
    if choice in (AUTO, NONE):
        return None, "KID and FID are left out: they need a feature network (features)."
    return load_features(folder_paths.get_full_path_or_raise(FEATURES, choice)), ""


def possible_baselines(lineup: Lineup, rank: int) -> tuple[list[Contender], str]:
    """All baselines that the connected models allow, and what there is to say about the others."""
    against = obstacles(lineup.teachers, lineup.base)
    # A merge holds all teachers in memory at once; Merge Checkpoints to DMM makes one, which can be evaluated as a model.
    offered = [name for name in BASELINES if name != "merge"]
    names = [name for name in offered if name not in against]
    said = "".join(f"\n- {name}: {against[name]}" for name in offered if name in against)
    made = make_baselines(names, lineup.student, lineup.styles, lineup.teachers, base=lineup.base, rank=rank)
    return made, f"Baselines that are left out:\n{said}" if said else ""


def model_ref(teacher: TeacherInput, student: Teacher, clip, prompts: list[str]) -> ModelRef:
    """A connected model, whose weights are copied when its turn comes: the host keeps them anyway."""
    who = f"teacher '{teacher.name}'"
    (once,) = frozen_teachers([teacher], student, clip, prompts)
    # Nothing else is kept of ``once``: its UNet is a copy.
    heads = once.unet.config.num_heads
    rest = (once.contexts, once.pooled, once.prediction, once.zero_snr)

    def open_it() -> Teacher:
        return Teacher(teacher.name, plain_unet(unet_weights(teacher.model), who, heads=heads), *rest)

    return dataclasses.replace(ModelRef.of(once, len(prompts)), open=open_it)


def host_decoder(vae, config: UNetConfig) -> PixelDecoder:
    """The host's VAE as the evaluation takes it."""
    scale = latent_scale(config)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = vae.decode(latents.float().cpu() / scale)  # (B, H, W, 3), 0..1
        return pixels.float().movedim(-1, 1) * 2 - 1

    return PixelDecoder(decode, weights_hash(vae.get_sd()))


def run(lineup: Lineup, settings: EvaluationSettings, node_id) -> tuple:
    """(Evaluation, the folder that its report was written to). What is painted lies in a folder for all evaluations: another model's
    evaluation finds the teachers' pictures there."""
    mm.unload_all_models()  # the host's copies are not needed while this runs
    root = Path(folder_paths.get_output_directory()) / "dmm_evaluations"
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def progress(done: int, total: int, what: str) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        send_text(f"{what}: {100 * done // total}%", node_id)

    result = evaluate(lineup, settings, folder=root / "parts", device=mm.get_torch_device(), progress=progress)
    result.about = {"title": "A DMM model against its teachers", "torch": torch.__version__}
    folder = root / repr_sha256(sorted(result.members.items()), settings, lineup.prompts)[:8]
    folder.mkdir(parents=True, exist_ok=True)
    write(result, folder)
    return result, folder


NODES = [EvaluateDMM]
