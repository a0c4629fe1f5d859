"""Edit Style: the names and pictures of a MODEL change, go into the file and come back; nothing else does."""

import base64
import io

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import LONGEST, StyleInfo
from comfyui_dmm.dmm_core.style_value import Blend, Mix, parse_style
from comfyui_dmm.training.paint.thumbnails import SIDE, thumbnail_uri
from PIL import Image

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .test_files import assert_same, load, save

NASTY = [
    '<img src=x onerror="window.hacked = true">',
    "🎨 墨 水墨畫",
    "ציור בדיו",
    "x" * 100,
    "../../etc/passwd",
]


@pytest.fixture(scope="module")
def path(models, tmp_path_factory):
    file = tmp_path_factory.mktemp("edit") / "a.safetensors"
    save_checkpoint(file, checkpoint_of(random_unet(DEMO), torch.float16))
    return file


def edit(model, style, name="", description="", **more):
    from comfyui_dmm.nodes.edit_style import EditStyle

    with torch.inference_mode():
        return EditStyle.execute(model, style, name, description, **more).result[0]


def info_of(model):
    from comfyui_dmm.nodes.host_model import model_info

    return model_info(model)


def chosen(model):
    from comfyui_dmm.nodes.style_patch import chosen_style

    return chosen_style(model)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_edits_go_into_the_file_and_come_back(path, tmp_path):
    model = load(path)[0]
    image = torch.zeros(2, 300, 600, 3)
    image[0, :, 300:, 0] = 1.0  # the first: black and red
    image[1] = 1.0
    edited = edit(model, "ink", "Tusche", "black lines\non paper", thumbnail=image, licence="CC0")
    edited = edit(edited, "paper: cut-out", description="from coloured paper")
    save(tmp_path / "b.safetensors", edited)
    before, after = load_checkpoint(path), load_checkpoint(tmp_path / "b.safetensors")
    ink, neon, paper, last = after.styles
    assert (ink.name, ink.description, ink.licence) == ("Tusche", "black lines\non paper", "CC0")
    assert paper == StyleInfo("paper: cut-out", "from coloured paper")
    assert [neon, last] == [before.styles[1], before.styles[3]]
    picture = opened(ink.thumbnail)
    assert (picture.format, picture.size) == ("JPEG", (SIDE, SIDE // 2))
    assert np.abs(np.asarray(picture)[:, :100]).max() < 30 and np.asarray(picture)[:, -100:, 0].min() > 225
    assert_same(before.unet, after.unet)
    assert (after.recipe, after.metadata["modelspec.title"]) == (before.recipe, "a test")
    again = load(tmp_path / "b.safetensors")[0]
    assert info_of(again).styles == tuple(after.styles)


def test_the_incoming_model_is_not_changed(path):
    model = load(path)[0]
    before, style = info_of(model), chosen(model)
    edit(model, "ink", "Tusche", "other")
    assert info_of(model) is before and chosen(model) is style and list(before.known) == NAMES


def test_the_old_name_is_unknown_to_later_nodes(path):
    from comfyui_dmm.nodes.host_model import styled

    edited = edit(load(path)[0], "ink", "Tusche")
    styled(edited, Mix((("Tusche", 1.0),)))
    with pytest.raises(ValueError, match="unknown style 'ink'. The styles of this model: Tusche, Neon lines"):
        styled(edited, Mix((("ink", 1.0),)))


@pytest.mark.parametrize("text", ["ink", "INK:2, Neon lines:2", "0%: none; 40%: ink; 50%-60%: Neon lines:1, 0:1"])
def test_a_model_keeps_painting_in_the_style_that_is_renamed(path, text):
    from comfyui_dmm.nodes.host_model import styled

    model = styled(load(path)[0], Blend(parse_style(text), parse_style("ink"), 0.25))
    edited = edit(model, "ink", "Tusche")
    for progress in (0.0, 0.45, 0.9):
        assert chosen(edited).masses(info_of(edited).known, progress) == chosen(model).masses(
            info_of(model).known, progress
        )
    assert "Tusche" in str(chosen(edited)) and "ink" not in str(chosen(edited)).lower()


def test_a_named_blend_is_edited_too(path, tmp_path):
    from comfyui_dmm.nodes.host_model import with_blend

    with torch.inference_mode():
        model = with_blend(load(path)[0], parse_style("ink, Neon lines"), StyleInfo("mix", "half and half"))
    edited = edit(edit(model, "mix", "glow"), "ink", "Tusche")
    save(tmp_path / "b.safetensors", edited)
    styles = load_checkpoint(tmp_path / "b.safetensors").styles
    assert [style.name for style in styles] == ["Tusche", *NAMES[1:], "glow"]
    assert styles[-1].description == "half and half"
    assert list(info_of(edited).known["glow"]) == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("name", NASTY)
def test_names_of_every_kind_are_kept_as_they_are(path, tmp_path, name):
    edited = edit(load(path)[0], "ink", f" {name} ", description=name)
    save(tmp_path / "b.safetensors", edited)
    loaded = info_of(load(tmp_path / "b.safetensors")[0])
    assert loaded.styles[0].name == loaded.styles[0].description == name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gone", "x"), "unknown style 'gone'. The styles of this model: ink"),
        (("none", "x"), "unknown style 'none'"),
        (("ink", "neon LINES"), "already has a style 'Neon lines'"),
        (("ink", "None"), "means painting without a style"),
        (("ink", "x" * 101), "name has 101 characters, at most 100"),
        (("ink", "a\x1b[2J"), "control character"),
        (("ink", "", "x" * 4001), "description has 4001 characters"),
        (("ink", "", "\ud800"), "control character"),
        (("ink", "\u202eknis"), r"a style's name holds the control character '\\u202e': remove it"),
        (("ink", "", "so \u2066 it is"), "a style's description holds the control character"),
    ],
)
def test_what_is_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(load(path)[0], *arguments)


def test_only_the_letters_of_a_name_may_change(path):
    assert next(iter(info_of(edit(load(path)[0], "ink", "INK")).known)) == "INK"


def test_a_plain_model_has_nothing_to_edit(models, tmp_path):
    plain = checkpoint_of(random_unet(DEMO), torch.float16, styles=[], recipe={})
    plain.unet = {k: v for k, v in plain.unet.items() if not k.startswith(("model_embedding.", "add_embedding."))}
    save_checkpoint(tmp_path / "plain.safetensors", plain)
    with pytest.raises(ValueError, match="unknown style 'ink'.*a plain checkpoint"):
        edit(load(tmp_path / "plain.safetensors")[0], "ink", "x")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_the_host_become_pictures(channels):
    from comfyui_dmm.nodes.edit_style import picture

    image = torch.full((1, 4, 6, channels), 0.5)
    image[0, 0, 0], image[0, 0, 1] = float("nan"), 7.0
    made = np.asarray(picture(image)).reshape(4, 6, channels)
    assert (made[0, 0] == 0).all() and (made[0, 1] == 255).all() and (made[1] == 128).all()


def test_thumbnails_fit_whatever_the_picture():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    for mode, size in (("RGB", (512, 512)), ("L", (5000, 1)), ("RGBA", (1, 1)), ("RGB", (256, 256))):
        uri = thumbnail_uri(Image.fromarray(noise).resize(size).convert(mode))
        assert len(uri) <= LONGEST["thumbnail"] and max(opened(uri).size) <= SIDE
        assert StyleInfo("a", thumbnail=uri).thumbnail == uri
    clear = opened(thumbnail_uri(Image.new("RGBA", (9, 9), (255, 0, 0, 0))))
    assert np.asarray(clear).min() > 250
