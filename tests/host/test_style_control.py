"""Blends, schedules, batches and named blends in the real host: every call of its UNet against our UNet with rows by hand."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.style_value import parse_style

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .sampling import SIZE, conditioning, sample, watch
from .test_sampling_equals_core import assert_equal, load, with_style

POSITIVE, NEGATIVE = conditioning(DEMO, 1), conditioning(DEMO, 2)


@pytest.fixture(scope="module")
def unet():
    return random_unet(DEMO)


@pytest.fixture(scope="module")
def model(models, unet):
    return load(models, checkpoint_of(unet), "control")


def apply(model, style):
    from comfyui_dmm.nodes.style_apply import ApplyStyle

    return ApplyStyle.execute(model, style)[0]


def value(node: str, *args):
    from comfyui_dmm.nodes import style_values

    return getattr(style_values, node).execute(*args)[0]


def test_blends_by_text_and_by_nodes(model, unet):
    rows = style_row(4, {0: 0.7, 1: 0.3})
    by_nodes = value("BlendStyles", "ink", value("DMMStyle", "Neon lines", 1.0), 0.3)
    for style in ("ink:7, neon lines:3", by_nodes):
        with watch(model) as calls:
            sample(apply(model, style), POSITIVE, NEGATIVE)
        for call in calls:
            assert_equal(call, unet, rows)


def test_a_blend_of_one_is_the_style_to_the_bit(model):
    from comfyui_dmm.nodes.style import StyleSelector

    plain = sample(StyleSelector.execute(model, "ink", 1.0)[0], POSITIVE, NEGATIVE)
    assert torch.equal(plain, sample(apply(model, "ink:3"), POSITIVE, NEGATIVE))
    assert torch.equal(
        plain, sample(apply(model, value("BlendStyles", "ink", "paper: cut-out", 0.0)), POSITIVE, NEGATIVE)
    )


def test_a_schedule_follows_the_hosts_percentage(model, unet):
    """Pure styles at the ends, the shares between; the switch falls on the step where a ControlNet's would."""
    style = value("StyleSchedule", "ink", value("StyleSchedule", "Neon lines", "墨", 0.9, 0.0), 0.3, 0.4)
    percent_to_sigma = model.model.model_sampling.percent_to_sigma
    with watch(model) as calls:
        sample(apply(model, style), POSITIVE, NEGATIVE, steps=12)
    seen = set()
    for call in calls:
        progress = 1 - call.t[0].item() / 999
        share = min(max((progress - 0.3) / 0.4, 0), 1)
        late = call.t[0].item() <= model.model.model_sampling.timestep(torch.tensor(percent_to_sigma(0.9))).item()
        assert late == (progress >= 0.9)
        rows = style_row(4, 3) if late else style_row(4, {0: 1 - share, 1: share})
        seen.add("late" if late else ("first" if share == 0 else "second" if share == 1 else "fading"))
        assert_equal(call, unet, rows)
    assert seen == {"first", "fading", "second", "late"}
    assert len(calls) == 12


def test_a_schedule_at_its_ends_is_the_pure_style(model):
    assert torch.equal(
        sample(apply(model, "Neon lines; 100%: ink"), POSITIVE, NEGATIVE, steps=5),
        sample(apply(model, "Neon lines"), POSITIVE, NEGATIVE, steps=5),
    )
    assert torch.equal(
        sample(apply(model, "Neon lines; 0%: ink"), POSITIVE, NEGATIVE, steps=5),
        sample(apply(model, "ink"), POSITIVE, NEGATIVE, steps=5),
    )


def test_scheduled_and_fixed_prompts_share_a_forward(model, unet):
    positive = with_style(model, POSITIVE, "ink; 50%: Neon lines")
    with watch(model) as calls:
        sample(model, positive, with_style(model, NEGATIVE, "none"), steps=4)
    assert [sorted(call.chunks) for call in calls] == [[0, 1]] * 4
    for call in calls:
        late = 1 - call.t[0].item() / 999 >= 0.5
        rows = {0: style_row(4, int(late)), 1: torch.zeros(1, 5)}
        assert_equal(call, unet, torch.cat([rows[chunk] for chunk in call.chunks]))


def sheet_sample(node, model, *args, latent=None, steps=2):
    import comfy.sample

    latent = latent or {"samples": torch.zeros(1, 4, SIZE, SIZE)}
    model, latent, style = node.execute(model, latent, *args)
    noise = comfy.sample.prepare_noise(latent["samples"], 3, latent["batch_index"])
    with torch.inference_mode():
        out = comfy.sample.sample(
            *(model, noise, steps, 4.0, "euler", "normal", POSITIVE, NEGATIVE, latent["samples"]),
            disable_pbar=True,
            seed=3,
        )
    return out, style, noise


def test_style_sheet_paints_all_styles_in_one_batch_from_one_noise(model, unet):
    from comfyui_dmm.nodes.style_sheet import StyleSheet

    with watch(model) as calls:
        out, style, noise = sheet_sample(StyleSheet, model, "", True)
    assert [str(s) for s in style.styles] == ["none", *NAMES]
    assert len(calls) == 2 and all(len(call.x) == 10 for call in calls)  # 5 pictures, two prompts, one forward a step
    assert all(torch.equal(noise[0], n) for n in noise) and not torch.equal(out[1], out[2])
    rows = torch.cat([torch.zeros(1, 5), *(style_row(4, i) for i in range(4))])
    for call in calls:
        assert_equal(call, unet, rows.repeat(2, 1))
    alone = sheet_sample(StyleSheet, model, NAMES[1], False)[0]
    torch.testing.assert_close(alone[0], out[2], rtol=0, atol=1e-4 * out.abs().max().item())


def test_style_sheet_of_lines_over_two_latents(model):
    from comfyui_dmm.nodes.style_sheet import StyleSheet

    start = {"samples": torch.zeros(2, 4, SIZE, SIZE), "noise_mask": torch.rand(2, 1, 64, 64)}
    _, latent, style = StyleSheet.execute(model, start, "ink:1, 墨:1\n\nNeon lines; 50%: ink\n", False)
    assert latent["batch_index"] == [0, 0, 1, 1] and latent["samples"].shape[0] == latent["noise_mask"].shape[0] == 4
    assert style.items == 2 and start.keys() == {"samples", "noise_mask"}
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        StyleSheet.execute(model, start, "oil", False)


def test_style_travel(model):
    from comfyui_dmm.nodes.style_sheet import StyleTravel

    out, style, _ = sheet_sample(StyleTravel, model, "ink\nNeon lines\n墨", 5)
    assert [str(s) for s in style.styles] == ["ink", "ink > Neon lines 50%", "Neon lines", "Neon lines > 墨 50%", "墨"]
    assert len(out) == 5
    with pytest.raises(ValueError, match="at least two stops, got 1"):
        StyleTravel.execute(model, {"samples": torch.zeros(1, 4, 8, 8)}, "ink", 4)


def test_labels(model):
    from comfyui_dmm.nodes.style_sheet import LabelStyles

    images = torch.rand(5, 64, 64, 3)
    sheet = LabelStyles.execute(images, parse_style("ink"), "Title", 0)[0]
    assert (
        sheet.shape[0] == 1 and sheet.shape[-1] == 3 and sheet.shape[1] > 2 * 64 and 0 <= sheet.min() < sheet.max() <= 1
    )


def test_a_named_blend_is_a_style_now_and_in_the_file(models, model, unet):
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.named_blend import NameBlend

    named = NameBlend.execute(model, "ink:0.6, Neon lines:0.4", " dusk ")[0]
    rows = style_row(4, {0: 0.6, 1: 0.4})
    with watch(model) as calls:
        expected = sample(apply(named, "dusk"), POSITIVE, NEGATIVE)
    for call in calls:
        assert_equal(call, unet, rows)
    with pytest.raises(ValueError, match="unknown style 'dusk'"):
        apply(model, "dusk")  # the MODEL before is as it was
    path = models / "dmm" / "dusk.safetensors"
    with torch.inference_mode():
        save_checkpoint(path, host_model.to_checkpoint(apply(named, "墨")))
        again = host_model.load(str(path))[0]
    assert [style.name for style in load_checkpoint(path).styles] == [*NAMES, "dusk"]
    painted = sample(apply(again, "dusk"), POSITIVE, NEGATIVE)
    torch.testing.assert_close(painted, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    twice = NameBlend.execute(again, "dusk:0.5, 墨:0.5", "night")[0]
    assert list(host_model.model_info(twice).known) == [*NAMES, "dusk", "night"]


@pytest.mark.parametrize(
    "style, name, message",
    [
        ("ink", "INK", "already has a style 'ink'"),
        ("ink", "none", "without a style"),
        ("ink", " ", "empty name"),
        ("ink; 50%: 墨", "x", "changes over the steps"),
        ("ink:0.5, none:0.5", "x", "strength 0.5"),
        ("none", "x", "strength 0"),
        ("oil", "x", "unknown style 'oil'"),
        ("ink:0", "x", "sum to 0"),
        ("ink:0.5, 墨:0.5", "my\u202eblend", r"name holds the control character '\\u202e': remove it"),
    ],
)
def test_blends_that_cannot_be_named(model, style, name, message):
    from comfyui_dmm.nodes.named_blend import NameBlend

    with pytest.raises(ValueError, match=message):
        NameBlend.execute(model, style, name)


def test_a_plain_checkpoint_says_that_it_has_no_styles(models):
    from comfyui_dmm.nodes.style_sheet import StyleSheet

    plain = load(models, checkpoint_of(random_unet(DEMO.__class__(**{**DEMO.__dict__, "num_styles": 0}))), "plain")
    for attempt in (
        lambda: apply(plain, "ink"),
        lambda: with_style(plain, POSITIVE, "ink"),
        lambda: StyleSheet.execute(plain, {"samples": torch.zeros(1, 4, 8, 8)}, "", False),
    ):
        with pytest.raises(ValueError, match="plain checkpoint"):
            attempt()
    assert torch.equal(sample(apply(plain, "none"), POSITIVE, NEGATIVE), sample(plain, POSITIVE, NEGATIVE))


def test_branches_of_one_model_in_either_order(model):
    """Two styles of one loader, painted one after the other and the other way round: equal to painting each alone."""
    styles = ("ink; 50%: 墨", "Neon lines:0.5, ink:0.5")
    alone = [sample(apply(model, style), POSITIVE, NEGATIVE, steps=3) for style in styles]
    one, two = (apply(model, style) for style in styles)
    assert torch.equal(sample(two, POSITIVE, NEGATIVE, steps=3), alone[1])
    assert torch.equal(sample(one, POSITIVE, NEGATIVE, steps=3), alone[0])
    assert torch.equal(sample(two, POSITIVE, NEGATIVE, steps=3), alone[1])
