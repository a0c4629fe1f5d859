"""A new style from a few pictures: what learns, what stays, when it stops, what it says of bad input; and the blend nearest to pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK, bank_masses, folded_bank
from comfyui_dmm.dmm_core.bank_room import last_alone, with_room
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.style import CODEBOOK, no_style_row, style_row
from comfyui_dmm.dmm_core.style_value import parse_style, vocabulary
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.data.demo.latents import demo_images
from comfyui_dmm.training.data.text_states import TextStates
from comfyui_dmm.training.files.style_file import centred_at_base
from comfyui_dmm.training.learn.config import LearnConfig
from comfyui_dmm.training.learn.learner import StyleLearner, split_pictures
from comfyui_dmm.training.learn.match import gram_of, match_blend, onto_simplex, simplex_minimum
from comfyui_dmm.training.learn.pictures import (
    Examples,
    captions_from_text,
    collage,
    encoder_of,
    fitted,
    from_pixels,
    make_examples,
    read_folder,
)
from comfyui_dmm.training.learn.style import (
    FEW_STEPS,
    learn_style,
    other_captions,
    prompts_for,
    rows_of,
)
from comfyui_dmm.training.loop.losses import score_loss
from comfyui_dmm.training.paint.painter import Settings, painter
from comfyui_dmm.training.teachers.teacher import Teacher, styled_unet
from PIL import Image

from ..host.server import PACK
from .families import SMALL, small_data, small_teacher
from .test_bank_grow import merged

DATA = small_data()
QUICK = LearnConfig(steps=4, batch_size=4, check=2, directions=2, prior_pictures=3)
MLP = {"add_embedding.linear_2.weight": 0.05 * torch.randn(256, 256, generator=torch.Generator().manual_seed(4))}
"""Of a model that was trained; in a fresh merge codes say nothing."""
STYLES = [StyleInfo(f"old {i}") for i in range(3)]
MODEL = Checkpoint({**merged(), **MLP}, styles=STYLES)


def few(count=5, captions=None) -> Examples:
    g = torch.Generator().manual_seed(7)
    return Examples([torch.randn(4, 8, 8, generator=g) for _ in range(count)], captions or ["a red cat"] * count, [])


def text_for(prompts, model=MODEL) -> Teacher:
    """A model with text states drawn by chance."""
    g = torch.Generator().manual_seed(1)
    return Teacher("m", load_unet(model.unet), torch.randn(len(prompts), 7, SMALL.context_dim, generator=g))


def learnt(config=QUICK, examples=None, model=MODEL, name="new", **more):
    examples = examples or few()
    prompts = prompts_for(model, examples, config)
    return learn_style(
        model, text_for(prompts, model), examples, info=StyleInfo(name), config=config, prompts=prompts, **more
    )


def learner_of(config, examples=None, rank=2):
    examples = examples or few()
    prompts = prompts_for(MODEL, examples, config)
    alone = last_alone(with_room(MODEL.unet, rank, [0.2, 0.3, 0.5]))
    model = dataclasses.replace(text_for(prompts), unet=load_unet(alone))
    known = {key: tuple(value.shape) for key, value in MODEL.unet.items() if key.startswith(BANK)}
    rows, others = rows_of(prompts, examples)
    return StyleLearner(model, examples, config, known=known, rows=rows, others=others)


# --- what learns ------------------------------------------------------------------------------------------------------


def test_the_other_styles_are_bitwise_what_they_were():
    """As tensors, as folded weights, and so in what they predict."""
    after, report = learnt()
    assert [style.name for style in after.styles] == [
        "old 0",
        "old 1",
        "old 2",
        "new",
    ] and report.learns == "directions"
    for key, value in MODEL.unet.items():
        now = after.unet[key]
        if not key.startswith((BANK, CODEBOOK)):
            assert now is value
    g = torch.Generator().manual_seed(3)
    x, t, c = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([10, 900]), torch.randn(2, 7, 16, generator=g)
    cores = MODEL.config.bank.cores
    for style in (0, 1, 2, None):
        before, now = (no_style_row(n) if style is None else style_row(n, style) for n in (3, 4))
        one = folded_bank(MODEL.unet, bank_masses(before, cores)[0])
        two = folded_bank(after.unet, bank_masses(now, cores + 1)[0])
        assert torch.equal(one.pop(f"{CODEBOOK}.weight"), two.pop(f"{CODEBOOK}.weight")[:3])
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        codes = {f"{CODEBOOK}.weight": MODEL.unet[f"{CODEBOOK}.weight"]}
        with torch.no_grad():
            eps = [load_unet({**weights, **codes})(x, t, c, style=before.expand(2, -1)) for weights in (one, two)]
        assert torch.equal(*eps)


@pytest.mark.parametrize("learns", ["code", "core", "directions"])
def test_gradients_reach_the_new_parts_only(learns):
    """Counted independently: which numbers of the whole UNet a training moves."""
    config = dataclasses.replace(QUICK, learns=learns, steps=3, check=1)
    learner = learner_of(config, rank=2 if learns == "directions" else 0)
    before = {key: value.clone() for key, value in learner.unet.state_dict().items()}
    for _ in learner.run(learner.paint_others()):
        pass
    moved = {key: int((value != before[key]).sum()) for key, value in learner.unet.state_dict().items()}
    rooms = {key for key, count in moved.items() if count}
    allowed = {"code": (CODEBOOK,), "core": (CODEBOOK, BANK), "directions": (CODEBOOK, BANK)}[learns]
    assert rooms and all(key.startswith(allowed) for key in rooms)
    old = {key: value.shape for key, value in MODEL.unet.items()}
    for key in rooms - {f"{CODEBOOK}.weight"}:
        value, was = learner.unet.state_dict()[key], before[key]
        if key.endswith(("cores.weight", "bias.weight")):
            assert torch.equal(value[1:], was[1:])
        else:
            assert learns == "directions" and value.shape != old[key]
            known = tuple(map(slice, old[key]))
            assert torch.equal(value[known], was[known])
    if learns == "directions":
        assert any(key.endswith(".up.weight") for key in rooms) and any(key.endswith(".down.weight") for key in rooms)
    assert sum(moved.values()) <= learner.numbers


def test_the_plain_prior_has_no_gradient():
    """What DreamBooth's term would be: without a style, the prediction does not depend on anything that learns."""
    learner = learner_of(QUICK)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 500])
    out = learner._predict(x, t, torch.tensor([1, 2]), learner.none)
    out.square().mean().backward()
    grads = [p.grad for group in learner.groups for p in group["params"]]
    assert all(grad is None or not grad.any() for grad in grads)


def test_the_prior_compares_answers_to_captions():
    """Recomputed here: zero where the new style answers captions as no style does, and that of its formula elsewhere."""
    learner = learner_of(QUICK)
    others = learner.paint_others()
    g = torch.Generator().manual_seed(5)
    found = learner._prior(others, torch.Generator().manual_seed(5)).detach()
    index = torch.randint(3, (1,), generator=g)
    t = torch.randint(1000, (1,), generator=g)
    x_t = NoiseSchedule().add_noise(others[index], torch.randn(1, 4, 8, 8, generator=g), t)
    row, empty = learner.others[index], torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        eps = {
            (said, styled): learner.model.predict(
                x_t, t, row if said else empty, learner.style if styled else learner.none
            ).out
            for said in (True, False)
            for styled in (True, False)
        }
    answer = {styled: eps[True, styled] - eps[False, styled] for styled in (True, False)}
    assert torch.allclose(found, score_loss(answer[True], answer[False]), rtol=1e-4) and found.item() > 1e-7


def test_the_picture_loss_is_the_eps_error():
    """One batch, recomputed from its ingredients."""
    learner = learner_of(dataclasses.replace(QUICK, caption_dropout=0.0))
    x_t, t, eps, rows = learner._batch(torch.Generator().manual_seed(0))
    found = learner._errors(x_t, t, eps, rows=rows, style=learner.style).detach()
    signal = NoiseSchedule().alphas_cumprod[t].view(-1, 1, 1, 1)
    x0 = (x_t - (1 - signal).sqrt() * eps) / signal.sqrt()
    nearest = [
        min((x - latent).abs().max().item() for latent in learner.examples.latents)
        for x, a in zip(x0, signal)
        if a > 0.05
    ]
    assert max(nearest) < 1e-3  # they are pictures of its own
    with torch.no_grad():
        out = learner.unet(x_t, t, learner.model.contexts[rows], style=torch.tensor([[1.0, 1.0]]).expand(4, -1))
    assert torch.allclose(found, (out - eps).square().mean((1, 2, 3)), rtol=1e-4)
    assert set(t.div(250, rounding_mode="floor").tolist()) == {0, 1, 2, 3}  # a quarter of the noise levels for each


def test_v_prediction_is_compared_in_eps():
    model = dataclasses.replace(MODEL, prediction="v")
    examples = few()
    prompts = prompts_for(model, examples, QUICK)
    text = dataclasses.replace(text_for(prompts), prediction="v")
    after, report = learn_style(model, text, examples, info=StyleInfo("new"), config=QUICK, prompts=prompts)
    assert after.prediction == "v" and np.isfinite(report.best)


# --- when it stops ----------------------------------------------------------------------------------------------------


def test_the_best_look_is_kept():
    """A rate that ruins it: what is left is the start, and it stops when patience ends."""
    learner = learner_of(dataclasses.replace(QUICK, lr=0.9, steps=40, check=1, patience=3))
    before = {key: value.clone() for key, value in learner.unet.state_dict().items()}
    steps = list(learner.run())
    assert learner.best == min([learner.start, *(step.judged for step in steps)])
    assert learner.judge() == learner.best  # bitwise: the weights of that look are back
    if not learner.best_step:
        assert all(torch.equal(value, before[key]) for key, value in learner.unet.state_dict().items())
    assert steps[-1].step == learner.best_step + 3


def test_a_caller_that_leaves_gets_the_best_look():
    learner = learner_of(dataclasses.replace(QUICK, steps=50, check=1, lr=0.05))
    run = learner.run()
    for step in run:
        if step.step == 6:
            break
    run.close()
    assert learner.judge() == learner.best


def test_held_out_pictures_are_not_learnt():
    learner = learner_of(QUICK, few(10))
    assert len(learner.held) == 2 and not set(learner.held) & set(learner.learn)
    held = [learner.examples.latents[i] for i in learner.held]
    for number in range(5):
        x_t, t, eps, _ = learner._batch(torch.Generator().manual_seed(number))
        x0 = NoiseSchedule().to_x0(eps, x_t, t, "eps")
        assert all((x - latent).abs().max() > 0.1 for x, step in zip(x0, t) if step < 600 for latent in held)


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 0), (3, 1), (5, 1), (10, 2), (20, 4)])
def test_how_many_are_held_out(count, held):
    learn, out = split_pictures(count, LearnConfig())
    assert len(out) == held and sorted(learn + out) == list(range(count))
    assert split_pictures(count, LearnConfig(held_out=0.89))[0], "one to learn from is left"


def test_the_same_command_learns_the_same_style():
    one, two = (learnt()[0].unet for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = learnt(dataclasses.replace(QUICK, seed=1))[0].unet
    assert any(not torch.equal(one[key], other[key]) for key in one)


# --- kinds of models --------------------------------------------------------------------------------------------------


def test_a_model_without_a_bank_gets_a_code():
    weights = {key: value for key, value in MODEL.unet.items() if not key.startswith(BANK)}
    model = Checkpoint(weights, styles=MODEL.styles)
    after, report = learnt(model=model)
    assert report.learns == "code" and "no style bank" in report.text() and report.numbers == SMALL.embed_dim
    changed = {key for key in weights if after.unet[key] is not weights[key]}
    assert changed == {f"{CODEBOOK}.weight"} and torch.equal(
        after.unet[f"{CODEBOOK}.weight"][:3], weights[f"{CODEBOOK}.weight"]
    )


def test_codes_that_say_nothing_are_not_learnt():
    model = Checkpoint(merged(), styles=STYLES)
    with pytest.raises(ValueError, match="codes say nothing in this model"):
        learnt(dataclasses.replace(QUICK, learns="code"), model=model)
    assert learnt(model=model)[1].learns == "directions"


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="no styles"):
        learnt(model=Checkpoint(small_teacher("a", 0, DATA).unet.state_dict()))


def test_a_few_step_model_is_refused_in_words():
    with pytest.raises(ValueError, match="few steps.*take the model that it was made of"):
        learnt(model=dataclasses.replace(MODEL, recipe={FEW_STEPS: {"steps": 4}}))


@pytest.mark.parametrize(
    ("name", "said"),
    [(" OLD 1", "already has a style 'old 1'"), ("  ", "empty"), ("None", "without a style"), ("x" * 101, "100 are")],
)
def test_names_that_cannot_be(name, said):
    with pytest.raises(ValueError, match=said):
        learnt(name=name)


def test_a_merge_centred_at_the_base_stays_one():
    """The model's own weights do not change, so its styles still go onto any copy of the base."""
    model = dataclasses.replace(MODEL, recipe={"merge": {"centre": "base"}})
    after, _ = learnt(model=model)
    assert centred_at_base(model.recipe) and centred_at_base(after.recipe)
    assert after.recipe["learned"]["style"] == "new" and after.recipe["history"][-1]["styles"] == [
        "old 0",
        "old 1",
        "old 2",
    ]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_no_pictures_and_nan():
    with pytest.raises(ValueError, match="no pictures: give at least one"):
        Examples([], [], [])
    with pytest.raises(ValueError, match="picture 2 hold NaN"):
        Examples([torch.zeros(4, 8, 8), torch.full((4, 8, 8), torch.nan)], ["", ""], [])
    pixels = torch.zeros(3, 8, 8, 3)
    pixels[2, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"picture 3 holds NaN .*1 of 3"):
        from_pixels(pixels)
    with pytest.raises(ValueError, match="shape"):
        from_pixels(torch.zeros(0, 8, 8, 3))


def test_one_picture_works_and_says_so():
    after, report = learnt(examples=few(1))
    assert after.num_styles == 4 and report.held == 0
    assert (
        "1 picture cannot tell a style from what it shows" in report.text() and "on the same pictures" in report.text()
    )


def test_captions_by_lines():
    assert captions_from_text("a cat", 3) == (["a cat"] * 3, ["all 3 pictures have the caption 'a cat'"])
    assert captions_from_text("a cat\n a  dog \n", 2) == (["a cat", "a dog"], [])
    assert (
        captions_from_text("", 2)[0] == ["", ""]
        and "2 of 2 pictures have no caption" in captions_from_text(" \n", 2)[1][0]
    )
    lines, said = captions_from_text("a cat\n\na dog", 3)
    assert lines == ["a cat", "", "a dog"] and "1 of 3 pictures have no caption" in said[0]
    with pytest.raises(ValueError, match="2 lines of captions for 3 pictures"):
        captions_from_text("a\nb", 3)


def test_pictures_without_captions_learn(tmp_path):
    after, _ = learnt(examples=few(3, ["", "a red cat", ""]))
    assert after.num_styles == 4


def test_a_folder_as_people_have_it(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red field")
    Image.new("L", (128, 128)).save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes(b"no picture")
    pictures, captions, remarks = read_folder(tmp_path, "a thing")
    assert [p.size for p in pictures] == [(300, 200), (128, 128)] and captions == ["a red field", "a thing"]
    assert "1 pictures left out: 'c.png'" in remarks[0] and "1 of 2 pictures have the caption 'a thing'" in remarks[1]
    config = load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors").config
    ready, said = fitted(pictures, config, "eps")
    assert (
        ready[1].size == (128, 128)
        and ready[0].size[0] > ready[0].size[1]
        and "1 of 2 pictures were resized" in said[0]
    )
    _, said = fitted([Image.new("RGB", (20, 20))], config, "eps")
    assert "made more than 2 times larger" in said[-1]
    with pytest.raises(ValueError, match="no pictures in"):
        (tmp_path / "empty").mkdir()
        read_folder(tmp_path / "empty")


def test_captions_that_cannot_be_read_are_said(tmp_path):
    for name in "abcd":
        Image.new("RGB", (128, 128), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("ein grünes Haus".encode("latin-1"))
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "b.caption").write_text("two")
    (tmp_path / "c.txt").write_text(" ")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "away.png", "text": "gone"}\n')
    _, captions, remarks = read_folder(tmp_path, "a house")
    assert captions == ["a house"] * 4
    assert remarks[0].startswith("3 captions could not be used: ")
    for said in ("metadata.jsonl line 1", "'a.txt' is not UTF-8 text", "'b.png': it has two captions"):
        assert said in remarks[0]


def test_other_captions_are_none_of_the_pictures():
    given = other_captions(SMALL, [], 4)
    others = other_captions(SMALL, given, 4)
    assert len(others) == 4 and not set(given) & set(others)
    large = dataclasses.replace(SMALL, model_channels=320)
    assert len(other_captions(large, ["a castle"], 16)) == 15


def test_the_thumbnail_shows_the_pictures():
    colours = ["red", "lime", "blue", "white", "black"]
    pictures = [Image.new("RGB", (64, 40), colour) for colour in colours]
    four = collage(pictures)
    assert [four.getpixel(p) for p in ((10, 10), (200, 10), (10, 200), (200, 200))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip
    assert collage(pictures[1:2]).getpixel((200, 200)) == (0, 255, 0)


# --- the nearest blend ------------------------------------------------------------------------------------------------


def test_the_minimum_on_the_simplex():
    """Against a grid of all blends of three, and exactly where the answer is known."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 50, generator=g, dtype=torch.float64) + 0.5
    gram = gram_of([vectors])
    w = simplex_minimum(gram)
    grid = [(a / 200, b / 200, 1 - (a + b) / 200) for a in range(201) for b in range(201 - a)]
    errors = (torch.tensor(grid, dtype=torch.float64) @ gram).mul(torch.tensor(grid, dtype=torch.float64)).sum(1)
    assert (w @ gram @ w).item() <= errors.min().item() + 1e-9 and (
        w - torch.tensor(grid[int(errors.argmin())])
    ).abs().max() < 0.01
    target = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    corners = torch.randn(4, 60, generator=g, dtype=torch.float64)
    found = simplex_minimum(gram_of([corners - target @ corners]))
    assert torch.allclose(found, target, atol=1e-5)
    assert torch.allclose(onto_simplex(torch.tensor([2.0, 0.0, -1.0])), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(onto_simplex(torch.tensor([0.5, 0.5])), torch.tensor([0.5, 0.5]))


@pytest.fixture(scope="module")
def demo():
    return load_checkpoint(PACK / "models" / "dmm" / "demo-dmm.safetensors")


@pytest.mark.parametrize(
    ("style", "shares"),
    [("pixel:0.6, echo:0.4", {"pixel": 0.6, "echo": 0.4}), ("candy", {"candy": 1.0}), ("none", {"none": 1.0})],
)
def test_a_known_blend_is_found(demo, style, shares):
    """Pictures that the demo model painted in it."""
    brush = painter(demo)
    captions = other_captions(demo.config, [], 6)
    settings = Settings(steps=8, width=128, height=128)
    latents = brush.latents(captions, None if style == "none" else brush.style(style), 5, settings)
    prompts = ["", *captions]
    text = Teacher("demo", styled_unet(demo.unet, "demo"), *TextStates(prompts).of(demo.text))
    names = [one.name for one in demo.styles]
    found = match_blend(text, names, Examples(list(latents), captions, []), torch.arange(1, 7), draws=12)
    assert sum(found.shares) == pytest.approx(1, abs=1e-6)
    for name, share in zip(found.names, found.shares):
        assert share == pytest.approx(shares.get(name, 0.0), abs=0.17), found.text
    parsed = parse_style(found.text)
    parsed.check(vocabulary(names))


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    images, captions = demo_images(["frame"], 4, 12)
    place = tmp_path / "pictures"
    place.mkdir()
    for i, (image, caption) in enumerate(zip(images, captions)):
        Image.fromarray(image).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption)
    return place


def test_the_command_adds_a_style(tmp_path, folder, capsys, demo):
    model, output = PACK / "models" / "dmm" / "demo-dmm.safetensors", tmp_path / "more.safetensors"
    command = [
        "--threads", "1", "learn-style", str(model), "--images", str(folder), "--name", "frame", "--steps", "30", "--check", "10",
        "--learns", "core", "--prior-pictures", "2", "--output", str(output), "--device", "cpu",
    ]  # fmt: skip
    before = model.read_bytes()
    assert main(command) == 0
    assert model.read_bytes() == before
    said = capsys.readouterr().out
    assert "'frame' was learnt from 4 pictures (1 of them held out)" in said
    after = load_checkpoint(output)
    assert [s.name for s in after.styles] == [*(s.name for s in demo.styles), "frame"]
    assert after.styles[:7] == demo.styles and after.styles[7].thumbnail.startswith("data:image/jpeg;base64,")
    assert all(torch.equal(after.text[k], v) for k, v in demo.text.items()) and after.vae.keys() == demo.vae.keys()
    error = after.recipe["learned"]["error"]
    assert error["best"] < 0.8 * error["start"] <= error["none"]
    # It can be learnt from again, and not under the same name.
    again = [str(output) if part == str(model) else part for part in command[:-3]]
    assert main([*again, str(tmp_path / "again.safetensors"), *command[-2:]]) == 1
    assert "already has a style 'frame'" in capsys.readouterr().err and not (tmp_path / "again.safetensors").exists()


def test_the_command_names_the_blend(folder, capsys):
    model = PACK / "models" / "dmm" / "demo-dmm.safetensors"
    command = ["--threads", "1", "match-style", str(model), "--images", str(folder), "--draws", "4", "--device", "cpu"]
    assert main(command) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    parse_style(first)
    assert rest[0].startswith("error of the blend") and any(line.startswith("pixel") for line in rest)


def test_bad_settings_are_refused_before_anything_is_read(tmp_path, folder, capsys):
    model, output = str(PACK / "models" / "dmm" / "demo-dmm.safetensors"), tmp_path / "new.safetensors"
    bad = ["learn-style", model, "--images", str(folder), "--name", "x", "--output"]
    assert main([*bad, str(output), "--lr", "7"]) == 1 and "lr is 7.0" in capsys.readouterr().err
    assert main([*bad, model]) == 1 and "one of the inputs" in capsys.readouterr().err
    assert main([*bad, str(tmp_path / "new.bin")]) == 1 and ".safetensors" in capsys.readouterr().err
    base = str(PACK / "models" / "dmm" / "demo-base.safetensors")
    assert main(["learn-style", base, *bad[2:], str(output)]) == 1 and "no styles" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))


def test_an_interrupt_leaves_nothing(tmp_path, folder, monkeypatch, capsys):
    from comfyui_dmm.training.commands import learn as commands

    class Impatient(commands.ProgressBar):
        def __call__(self, done, total, what):
            if what.startswith("learning") and done == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(commands, "ProgressBar", Impatient)
    output = tmp_path / "new.safetensors"
    model = str(PACK / "models" / "dmm" / "demo-dmm.safetensors")
    command = [
        "learn-style",
        model,
        "--images",
        str(folder),
        "--name",
        "x",
        "--output",
        str(output),
        "--prior",
        "0",
        "--learns",
        "code",
    ]
    assert main(command) == 130 and "nothing was written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures"]


def test_a_file_that_was_saved_reads_back(tmp_path):
    after, _ = learnt()
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, after)
    back = load_checkpoint(path)
    assert all(torch.equal(back.unet[key], value) for key, value in after.unet.items())
    assert json.loads(json.dumps(back.recipe)) == back.recipe and back.recipe["learned"]["pictures"] == 5


def test_encoding_says_what_was_done(demo):
    examples = make_examples(
        [Image.new("RGB", (400, 128), "blue")], ["x"], [], config=demo.config, prediction="eps",
        encode=encoder_of(demo, torch.device("cpu")),
    )  # fmt: skip
    assert examples.latents[0].shape[0] == 4 and "resized" in examples.remarks[0]
    with pytest.raises(ValueError, match="no VAE"):
        encoder_of(dataclasses.replace(demo, vae={}), torch.device("cpu"))
