"""The documents' pictures that the shipped models paint. Those of the evaluation and of mixing come from their commands, and
those of the graph are screenshots."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.demo.tour import BLEND, BLEND_SEED, CAPTIONS, SETTINGS
from comfyui_dmm.training.paint.images import blend_strip, grid
from comfyui_dmm.training.paint.painter import Painter, painter
from PIL import Image

from ..host.server import Server
from ..host.templates import twin_of
from .layout import rows
from .templates import paint

MODELS = Path(__file__).parents[2] / "models" / "dmm"
SEED = 1


def teachers_and_student(brush: Painter) -> Image.Image:
    """A row for each teacher, and under it the shipped model in its style."""
    pictures, labels = [], []
    for style in brush.styles:
        unet = load_unet(load_checkpoint(MODELS / f"demo-teacher-{style}.safetensors").unet).eval()
        teacher = replace(brush, unet=unet, styles=())
        for who, name, row in ((teacher, "teacher", None), (brush, "DMM", brush.style_row(style))):
            labels.append(f"{style}: {name}")
            pictures.append(who.pictures(who.latents(CAPTIONS, row, SEED, SETTINGS)))
    return grid(pictures, labels, CAPTIONS, title="Each teacher, and the one DMM model in its style")


def blends(brush: Painter) -> Image.Image:
    first, second = BLEND
    shares = [i / 6 for i in range(7)]
    rows = torch.cat([brush.style_row({first: 1 - share, second: share}) for share in shares])
    latents = brush.latents(["a big blue house, hills"] * 7, rows, BLEND_SEED, SETTINGS, same_noise=True)
    return blend_strip(brush.pictures(latents), first, second, shares, title="One model, two styles, seven blends")


BANNER = ("an orange cat", "a big blue house, hills", "a purple mushroom")
CORNERS = ("ink", "candy", "sticker", "echo")


def wall(brush: Painter, styles: Sequence[str], caption: str) -> list[Image.Image]:
    """One caption in each of these styles, from one noise."""
    return [brush.pictures(brush.latents([caption], brush.style_row(style), SEED, SETTINGS))[0] for style in styles]


def banner(brush: Painter) -> Image.Image:
    """For the registry, which wants 21 to 9: every style, three captions."""
    return rows([wall(brush, brush.styles, caption) for caption in BANNER], 1.5, gap=0)


def icon(brush: Painter) -> Image.Image:
    """For the registry: a square of four styles, 400 pixels a side."""
    one, two, three, four = wall(brush, CORNERS, BANNER[0])
    return rows([[one, two], [three, four]], 200 / 128, gap=0)


WITHOUT_HOST = {"demo-grid": teachers_and_student, "demo-blend": blends, "banner": banner, "icon": icon}


def documents(folder: Path) -> Iterator[Path]:
    """Paint those that need no ComfyUI into ``folder``; yields their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    brush = painter(load_checkpoint(MODELS / "demo-dmm.safetensors"))
    for name, picture_of in WITHOUT_HOST.items():
        path = folder / f"{name}.jpg"
        picture_of(brush).save(path, quality=90)
        yield path


ONE_PASS = (
    ("a red heart", ("candy", "pixel")),
    ("a big blue house, hills", ("ink", "sticker")),
    ("an orange cat", ("ink", "candy", "pop", "sticker")),
)
"""Prompts, and the styles that share a canvas of two squares."""


def one_pass(server: Server) -> Image.Image:
    """The same styles in the same places: a pass for each, and one pass for all."""
    modes = {"a pass per style": "own prompts", "one pass": "one pass"}
    return grid(
        [[paint(server, shared(prompt, styles, mode))["save"][0] for prompt, styles in ONE_PASS] for mode in modes.values()],
        list(modes),
        [f"{prompt}: {', '.join(styles)}" for prompt, styles in ONE_PASS],
    )  # fmt: skip


def shared(prompt: str, styles: Sequence[str], mode: str) -> dict:
    """A graph in the API's form: the styles on equal parts of a canvas of two squares, from left to right."""
    part = {
        "y": 0.0,
        "width": 1 / len(styles),
        "height": 1.0,
        "fall_off": "feather",
        "feather": 8,
        "paint_on": "whole canvas",
    }
    regions = {
        f"region{i}": {
            "class_type": "DMMRegion",
            "inputs": {"style": style, "x": i / len(styles), "weight": 1.0, **part},
        }
        for i, style in enumerate(styles)
    }
    mix = {
        "model": ["load", 0], "positive": ["prompt", 0], "negative": ["negative", 0], "background": "none", "mode": mode,
        **{f"regions.{name}": [name, 0] for name in regions},
    }  # fmt: skip
    sampler = {
        "model": ["load", 0], "positive": ["mix", 0], "negative": ["mix", 1], "latent_image": ["empty", 0],
        "seed": 2, "steps": 12, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
    }  # fmt: skip
    nodes = {
        "load": ("DMMLoadModel", {"ckpt_name": "demo-dmm.safetensors"}),
        "prompt": ("CLIPTextEncode", {"text": prompt, "clip": ["load", 1]}),
        "negative": ("CLIPTextEncode", {"text": "", "clip": ["load", 1]}),
        "mix": ("DMMStyleMix", mix),
        "empty": ("EmptyLatentImage", {"width": 256, "height": 128, "batch_size": 1}),
        "paint": ("KSampler", sampler),
        "decode": ("VAEDecode", {"samples": ["paint", 0], "vae": ["load", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "one-pass"}),
    }
    return regions | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def documents_by_host(host: Path, base: Path, folder: Path) -> Iterator[Path]:
    """Paint those that need ComfyUI into ``folder``; yields their paths. base: for the server."""
    folder.mkdir(parents=True, exist_ok=True)
    with Server(host, base) as server:
        sheets = paint(server, twin_of("style_sheet"))
        for name, picture in (
            ("style-sheet", sheets["10"][0]),
            ("style-travel", sheets["15"][0]),
            ("one-pass", one_pass(server)),
        ):
            path = folder / f"{name}.jpg"
            picture.convert("RGB").save(path, quality=90)
            yield path
