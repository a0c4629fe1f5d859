"""From teachers to a painting through a real ComfyUI's nodes, for any family of models: the graphs and the files they need."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.unet import UNetConfig
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.demo.latents import demo_images
from comfyui_dmm.training.data.demo.looks import BASE_LOOK
from comfyui_dmm.training.paint.painter import Settings, painter
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .families import random_unet, text_of
from .sampling import watch

STYLES = ("ink", "oil")
PROMPT, NEGATIVE = "a red star over a quiet lake", "blurry"
SAMPLING = {"seed": 5, "steps": 3, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
SIZE = 128
"""Pixels of the demo scenes, and of what is painted."""


def plain(config: UNetConfig) -> UNetConfig:
    return dataclasses.replace(config, num_styles=0, style_mlp="add_embedding")


def whole_model(config: UNetConfig, seed: int, **changes) -> Checkpoint:
    """A random plain checkpoint in half precision with text encoders and VAE, each of them another one for another seed."""
    unet = random_unet(plain(config), seed)
    torch.manual_seed(seed)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1))
    parts = {"unet": unet.state_dict(), "text": text_of(config, 10 * seed), "vae": vae.state_dict()}
    return Checkpoint(**{name: {k: v.detach().half() for k, v in sd.items()} for name, sd in parts.items()}, **changes)


def write_models(
    folder: Path, family: str, config: UNetConfig, predictions=("eps", "eps", "eps"), zero_snr=False
) -> list[Path]:
    """A base and two teachers that share nothing but their sizes -> their files."""
    paths = [folder / f"{family} {name}.safetensors" for name in ("base", *STYLES)]
    for seed, (path, prediction) in enumerate(zip(paths, predictions)):
        save_checkpoint(path, whole_model(config, seed, prediction=prediction, zero_snr=zero_snr))
    return paths


def load_node(file: str) -> dict:
    return {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": file}}


def text_node(clip: list, text: str) -> dict:
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": text}}


def distil_graph(family: str, steps: int = 4, **settings) -> dict:
    """Demo scenes -> Distill Teachers, each teacher with its own text encoder -> Save DMM Model; ``painting_nodes`` go on."""
    g = {
        "base": load_node(f"{family} base.safetensors"),
        "scenes": {"class_type": "DMMDemoScenes", "inputs": {"count": 8, "seed": 0}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["scenes", 0], "vae": ["base", 2]}},
        "save": {
            "class_type": "DMMSaveModel",
            "inputs": {"model": ["distil", 0], "clip": ["base", 1], "vae": ["base", 2], "filename_prefix": f"{family} saved"},
        },
    }  # fmt: skip
    inputs = {
        "base": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "latents": ["encode", 0], "captions": ["scenes", 1],
        "name": family, "steps": steps, "batch_size": 4, "learning_rate": 1e-3, "seed": 0, "start_from": "base", "style_rate": 1.0,
        "feature_weight": 0.001, "caption_dropout": 0.1, "no_style_share": 0.1, "precision": "fp32",
        "gradient_checkpointing": False, "preview_every": 2, "save_every": 2, **settings,
    }  # fmt: skip
    for i, name in enumerate(STYLES):
        g[f"load {name}"] = load_node(f"{family} {name}.safetensors")
        teacher = {"model": [f"load {name}", 0], "clip": [f"load {name}", 1], "name": name}
        g[f"teacher {name}"] = {"class_type": "DMMTeacher", "inputs": teacher}
        inputs[f"teachers.teacher{i}"] = [f"teacher {name}", 0]
    return (
        g
        | {"distil": {"class_type": "DMMDistillTeachers", "inputs": inputs}}
        | painting_nodes(["distil", 0], ["base", 1], family)
    )


def painting_nodes(model: list, clip: list, prefix: str, size: tuple[int, int] = (SIZE, SIZE)) -> dict:
    """Style Selector -> KSampler -> a latent file ``latents/<prefix>``; ``model`` and ``clip`` are links."""
    width, height = size
    sampler = {
        "model": ["style", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["empty", 0],
    }
    return {
        "style": {"class_type": "DMMStyleSelector", "inputs": {"model": model, "style": STYLES[1], "strength": 1.0}},
        "positive": text_node(clip, PROMPT),
        "negative": text_node(clip, NEGATIVE),
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": height, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": {**sampler, **SAMPLING, "denoise": 1.0}},
        "latent": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sample", 0], "filename_prefix": f"latents/{prefix}"},
        },
    }


def saved_latents(server, prefix: str) -> Tensor:
    """What the newest SaveLatent of this prefix wrote, not scaled."""
    path = sorted((server.base / "output" / "latents").glob(f"{prefix}_*.latent"))[-1]
    return load_file(path)["latent_tensor"]


def our_latents(path: Path, style: str | None, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    """The same painting without the host: file, prompts and seed -> scaled latents."""
    s = SAMPLING
    settings = Settings(s["steps"], s["cfg"], s["sampler_name"], s["scheduler"], *size, negative=NEGATIVE)
    ours = painter(load_checkpoint(path))
    return ours.latents([PROMPT], ours.style(style), s["seed"], settings)


def assert_same_painting(host: Tensor, ours: Tensor) -> None:
    """Within 2e-4 of the largest, as in test_sampling_host; seen on SDXL: 1e-6."""
    torch.testing.assert_close(host, ours, rtol=0, atol=2e-4 * ours.abs().max().item())


def assert_same_weights(a: dict, b: dict) -> None:
    """Bit for bit: keys, dtypes, values."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def read_text(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The text encoders' weights that a prompt meets: without the host's counter, and CLIP's scale, which it holds in float32."""
    return {k: v for k, v in checkpoint.text.items() if not k.endswith(("position_ids", "logit_scale"))}


# --- without ComfyUI's graph ------------------------------------------------------------------------------------------


def headless(folder: Path, files: list[Path]) -> tuple[Path, Path]:
    """dmm cache, dmm distill and dmm sample with a base and two teachers -> the student's file, a picture in its second style."""
    base, *teachers = map(str, files)
    images, captions = demo_images([BASE_LOOK], 6, 0)
    (folder / "images").mkdir()
    for i, (image, caption) in enumerate(zip(images, captions)):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(caption)
    every = [argument for teacher in teachers for argument in ("--teacher", teacher)]
    main(
        [
            "cache",
            "images",
            "--images",
            str(folder / "images"),
            "--base",
            base,
            *every,
            "--output",
            str(folder / "cache"),
        ]
    )
    train = {"steps": 3, "batch_size": 4, "lr": 1e-3, "lambda_adv": 0.0, "validation": 4, "device": "cpu"}
    config = {
        "base": base,
        "teachers": [{"name": name, "file": file} for name, file in zip(STYLES, teachers)],
        "output": str(folder / "student.safetensors"),
        "run_dir": str(folder / "run"),
        "picture_every": 2,
        "data": {"kind": "cache", "file": str(folder / "cache")},
        "train": train,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["distill", "--config", str(folder / "run.yaml")])
    s = SAMPLING
    options = {
        "seed": s["seed"],
        "steps": s["steps"],
        "cfg": s["cfg"],
        "sampler": s["sampler_name"],
        "scheduler": s["scheduler"],
    }
    options |= {"prompt": PROMPT, "negative": NEGATIVE, "style": STYLES[1], "output": folder / "picture.png"}
    main(["sample", config["output"], *(part for k, v in options.items() for part in (f"--{k}", str(v)))])
    return Path(config["output"]), folder / "picture.png"


@torch.inference_mode()
def host_picture(path: Path) -> Tensor:
    """What a graph of Load DMM Model, Style Selector, CLIPTextEncode, KSampler and VAEDecode paints: (height, width, 3) in 0..255."""
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.style import StyleSelector

    import nodes

    model, clip, vae, _ = host_model.load(str(path))
    model = StyleSelector.execute(model, STYLES[1], 1.0)[0]
    positive, negative = (encode(clip, text) for text in (PROMPT, NEGATIVE))
    (empty,) = nodes.EmptyLatentImage().generate(SIZE, SIZE)
    s = dict(SAMPLING)
    (latent,) = nodes.KSampler().sample(model, positive=positive, negative=negative, latent_image=empty, **s)
    return 255 * nodes.VAEDecode().decode(vae, latent)[0][0]


def check_headless(folder: Path, files: list[Path]) -> Path:
    """``dmm sample`` shows the host's picture, to one step of the PNG's 255."""
    path, picture = headless(folder, files)
    ours = torch.tensor(np.asarray(Image.open(picture).convert("RGB")), dtype=torch.float32)
    theirs = host_picture(path)
    assert (ours - theirs).abs().max() <= 1 and theirs.std() > 5
    assert len(list((folder / "run" / "pictures").iterdir())) >= 2
    return path


# --- inside this process ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def load(path: Path) -> tuple:
    """-> MODEL, CLIP by Load DMM Model's own function."""
    from comfyui_dmm.nodes import host_model

    return host_model.load(str(path))[:2]


@torch.inference_mode()
def encode(clip, text: str) -> list:
    """The host's CLIPTextEncode -> a CONDITIONING."""
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


def check_teachers(files: list[Path], scale: float, patch=lambda model: model) -> list:
    """The trainer's copies, text states and size conditioning give what the host's UNet gives for plain prompts; gives the run's
    base and teachers.

    patch: a host node's change to every MODEL. Tolerance 1e-4 of the largest value.
    """
    from comfyui_dmm.nodes.teacher import TeacherInput
    from comfyui_dmm.nodes.training_inputs import gather

    import nodes

    with torch.inference_mode():
        loaded = [(patch(model), clip) for model, clip in map(load, files)]
        latents = torch.randn(2, 4, 8, 12)
    (model, clip), *others = loaded
    teachers = [TeacherInput(name, *one) for name, one in zip(STYLES, others)]
    config = TrainConfig(steps=1, lambda_adv=0.0)
    run = gather(
        model,
        clip,
        teachers,
        latents=[{"samples": latents}],
        captions=[PROMPT, NEGATIVE],
        config=config,
        say=lambda text: None,
    )
    torch.testing.assert_close(run.data.buckets[0], scale * latents.clone())
    everyone = [run.base, *run.teachers]
    for teacher, (model, clip) in zip(everyone, loaded):
        positive, negative = (encode(clip, text) for text in (PROMPT, ""))
        with torch.inference_mode():
            empty = {"samples": torch.zeros(1, 4, 8, 12)}
            with watch(model) as calls:
                nodes.common_ksampler(model, 0, 2, 4.0, "euler", "normal", positive, negative, empty)
        for call in calls:
            rows = torch.tensor([(run.data.prompts.index(PROMPT), 0)[chunk] for chunk in call.chunks])
            context, y = teacher.conditioning(rows, (8, 12), torch.device("cpu"))
            torch.testing.assert_close(context, call.context, rtol=0, atol=1e-4)
            assert (y is None) == (call.y is None)
            if y is not None:
                torch.testing.assert_close(y, call.y, rtol=0, atol=1e-4)
            with torch.no_grad():
                ours = teacher.unet.float()(call.x, call.t, context, y)
            torch.testing.assert_close(ours, call.out, rtol=0, atol=1e-4 * ours.abs().max().item())
    run.targets.pool.close()
    return everyone
