"""Feature networks, the demo family and the command line: what ranks the looks, whose picture it is, and ``dmm evaluate``."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.commands.evaluation_inputs import demo_prompts
from comfyui_dmm.training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS
from comfyui_dmm.training.demo.classifier import labelled_renders
from comfyui_dmm.training.evaluation.distances import fid, principal_axes
from comfyui_dmm.training.evaluation.features import DEMO_FILE, load_features
from comfyui_dmm.training.evaluation.identify import identify, judged_size
from comfyui_dmm.training.paint.painter import Settings, painter
from comfyui_dmm.training.teachers.teacher import Teacher
from safetensors.torch import save_file

MODELS = Path(__file__).parents[2] / "models" / "dmm"
PROMPTS = ["", "a red star", "a big blue house, hills", "a green fish by the sea"]


# --- feature networks -------------------------------------------------------------------------------------------------


def test_the_demo_features_rank_the_looks():
    """On renders, where the truth is known: each look is nearest to itself, the near-duplicates to each other, and the base to nobody."""
    looks = (*TEACHER_LOOKS, BASE_LOOK)
    network, count = load_features(DEMO_FILE), 60
    assert network.size == 224
    pixels, _ = labelled_renders(np.random.default_rng(0), 2 * count, looks)
    with torch.no_grad():
        x = torch.cat([network(part.float() / 127.5 - 1) for part in pixels.split(64)])
    x = x @ principal_axes(x, 40).float()
    batches = x.unflatten(0, (2, count, len(looks))).transpose(1, 2)  # (2, looks, count, 40)
    n = len(looks)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    table = fid(list(batches[0]), list(batches[1]), torch.ones(1, count, dtype=torch.float64), pairs).reshape(n, n)
    assert table.argmin(0).tolist() == table.argmin(1).tolist() == list(range(n))
    others = table + torch.diag(torch.full((n,), torch.inf, dtype=torch.float64))
    ink, pen = looks.index("ink"), looks.index("pen")
    assert others[ink].argmin() == pen and others[pen].argmin() == ink
    assert others.argmin().item() in (ink * n + pen, pen * n + ink), "no other two looks are as near"
    assert (table[-1, :-1] > 2 * table.diagonal()[:-1]).all(), "a base that was never trained is far from every teacher"


def test_pictures_are_seen_as_files_have_them():
    """Rounded to 8 bits; larger ones are brought to the network's size."""
    network = load_features(DEMO_FILE)
    pixels, _ = labelled_renders(np.random.default_rng(1), 1, ("candy", "echo"))
    x = pixels.float() / 127.5 - 1
    seen = network(x)
    assert seen.shape == (2, 224) and torch.equal(network(x + 0.001), seen) and not torch.equal(network(x + 0.02), seen)
    large = network(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert (large - seen).abs().mean() < 0.1 * (seen[0] - seen[1]).abs().mean()


def test_inception_features_are_timms(tmp_path):
    """Random weights in timm's file, features against timm's own network: 1e-4 of values of order 1."""
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("inception_v3", pretrained=False).eval()
    with torch.no_grad():
        for m in theirs.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    save_file(theirs.state_dict(), tmp_path / "inception.safetensors")
    network = load_features(tmp_path / "inception.safetensors")
    assert network.size == 2048
    g = torch.Generator().manual_seed(0)
    x = (torch.randint(0, 256, (1, 3, 299, 299), generator=g).float() / 127.5) - 1
    with torch.no_grad():
        want = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    assert want.abs().mean() > 1e-3
    torch.testing.assert_close(network(x), want, atol=1e-4 * want.abs().max().item(), rtol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    assert load_features(tmp_path / "inception.pth").key != network.key


def test_files_that_are_no_feature_network_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    for name, message in (
        ("none.pth", "there is no file"),
        ("evil.pth", "cannot be read as weights"),
        ("numbers.pth", "something else than a state dict"),
        ("other.safetensors", "is no feature network"),
        ("part.safetensors", "is not Inception v3: missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_features(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# --- the demo models --------------------------------------------------------------------------------------------------


def test_the_demo_model_names_the_style_of_its_teachers_pictures():
    """One picture by each teacher: at least 5 of 7 right (ink and pen are near-duplicates), the others taken for one another."""
    brush = painter(load_checkpoint(MODELS / "demo-dmm.safetensors"))
    student = Teacher("student", brush.unet, brush.text.encode(PROMPTS))
    settings = Settings(steps=8, cfg=4.0, width=128, height=128)
    latents = []
    for name in brush.styles:
        unet = load_unet(load_checkpoint(MODELS / f"demo-teacher-{name}.safetensors").unet)
        teacher = dataclasses.replace(brush, unet=unet.eval(), styles=())
        latents.append(teacher.latents([PROMPTS[2]], None, 3, settings))
    found = [v.name for v in identify(student, brush.styles, torch.cat(latents), torch.full((7,), 2), draws=16)]
    wrong = [(by, said) for by, said in zip(brush.styles, found) if by != said]
    assert len(wrong) <= 2 and all({*pair} <= {"ink", "pen"} for pair in wrong), wrong


def test_pictures_are_judged_at_a_size_that_the_model_knows():
    config = load_unet(load_checkpoint(MODELS / "demo-dmm.safetensors").unet).config
    assert judged_size(config, "eps", (2000, 2000)) == (128, 128)
    width, height = judged_size(config, "eps", (400, 800))
    assert width % 16 == height % 16 == 0 and 1.6 < height / width < 2.4 and abs(width * height - 128**2) < 4000


def command(output: Path, *more: str) -> list[str]:
    teachers = [f"--teacher={name}={MODELS / f'demo-teacher-{name}.safetensors'}" for name in ("ink", "candy")]
    return [
        "evaluate", str(MODELS / "demo-dmm.safetensors"), *teachers, "--base", str(MODELS / "demo-base.safetensors"), "--count", "10",
        "--steps", "3", "--project", "6", "--resamples", "3", "--bins", "2", "--bin-samples", "3", "--own-pictures", "1",
        "--own-draws", "6", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


def test_the_command_writes_a_report_and_goes_on(tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "demo-dmm.safetensors against its teachers" in said and "EXCESS" in said
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert found["names"] == ["ink", "candy"] and found["features"]["size"] == 224 and found["fid"]["size"] == 6
    # The student is far nearer to its teachers than the base that it began as, by every figure.
    assert all(own["value"] < 0.7 * base for own, base in zip(found["pair"]["own"], found["pair"]["base"]))
    assert max(found["eps"]["share"]) < 0.7 and found["fid"]["excess"]["value"] < found["fid"]["base_excess"]
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert main(command(tmp_path)) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == parts
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == found


def test_the_command_puts_others_beside_the_student(tmp_path, capsys):
    """The student itself under another name has its figures exactly; the soup is further away."""
    more = ("--also", f"again={MODELS / 'demo-dmm.safetensors'}", "--baselines", "soup", "--metrics", "pair", "eps")
    assert main(command(tmp_path, *more)) == 0
    assert "| again |" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    base, again, soup = found["compared"]
    assert (base["name"], again["name"], soup["name"]) == ("base", "again", "soup")
    assert again["pair"]["own"] == found["pair"]["own"] and again["eps"] == found["eps"]["own"]
    assert found["members"]["again"] != found["members"]["soup"]
    assert soup["eps"]["mean"]["value"] > again["eps"]["mean"]["value"]


def test_baselines_that_need_a_base_say_so(tmp_path, capsys):
    given = command(tmp_path / "out", "--baselines", "all")
    at = given.index("--base")
    assert main(given[:at] + given[at + 2 :]) == 1
    said = capsys.readouterr().err
    assert (
        "base, untrained, task-vectors, merge: needs the base model" in said
        and "soup, chain, low-rank, teachers" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--baselines", "salad"), "unknown baselines 'salad'"),
        (("--baselines", "low-rank", "--rank", "0"), "rank is 0"),
        (("--baselines", "soup", "--also", f"soup={MODELS / 'demo-base.safetensors'}"), "have one name"),
        (("--project", "0"), "FID on 224 features needs at least 225 pictures a style, 10 are asked for"),
        (("--teacher", f"oil={MODELS / 'demo-teacher-pop.safetensors'}"), "no style of the student is called 'oil'"),
        (("--teacher", f"pop={MODELS / 'demo-dmm.safetensors'}"), "itself a DMM model with 7 styles"),
        (("--size", "100x128"), "width is 100"),
        (("--prompts", "nowhere.txt"), "cannot read the captions"),
        (("--features", "nowhere.pth"), "there is no file 'nowhere.pth'"),
    ],
)
def test_the_command_explains_what_does_not_fit(tmp_path, capsys, more, message):
    assert main(command(tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_demo_prompts_are_different_captions():
    prompts = demo_prompts(64)
    assert len(set(prompts)) == 64 and all(prompts) and prompts == demo_prompts(64)
