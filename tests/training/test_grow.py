"""A DMM model that learns more styles: what it starts from, who speaks for the old styles, and that it goes on exactly."""

import dataclasses
import json

import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import UNet, load_unet
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.loop.codes import warm_start
from comfyui_dmm.training.loop.eps_table import eps_errors, format_table
from comfyui_dmm.training.loop.student import style_rows
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.run.state import identity
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.teachers.teacher import Teacher, plain_unet, styled_unet
from comfyui_dmm.training.text import init_text

from .families import SMALL, SMALL_RUN, SMALL_XL, small_data, small_run, small_teacher

DATA = small_data()


def old_model(config=SMALL, styles=3, seed=0) -> Teacher:
    """A random DMM model whose styles show."""
    sizes = dataclasses.replace(
        config, num_styles=styles, style_mlp="add_embedding2" if config.adm_channels else "add_embedding"
    )
    teacher = small_teacher("base", seed, DATA, sizes)
    with torch.no_grad():
        teacher.unet.style_mlp.linear_2.weight *= 30
    return teacher


def growing(new=1, config=SMALL, old=None, device=None, **settings) -> Trainer:
    old = old or old_model(config)
    styles = [
        old.as_style(i, StyleInfo(f"old {i}", description=f"about {i}")) for i in range(old.unet.config.num_styles)
    ]
    teachers = [small_teacher(f"new {i}", 10 + i, DATA, config) for i in range(new)]
    return Trainer(old, [*styles, *teachers], DATA, TrainConfig(**{**SMALL_RUN, **settings}))


@pytest.mark.parametrize("config", [SMALL, SMALL_XL])
def test_the_student_starts_as_the_old_model_with_more_codes(config):
    run = growing(2, config)
    old, new = run.base.unet, run.student.unet
    assert new.config.num_styles == 5 and new.config.style_mlp == old.config.style_mlp
    theirs, ours = old.state_dict(), new.state_dict()
    for key, weight in theirs.items():
        assert torch.equal(ours[key][:3] if key == "model_embedding.weight" else ours[key], weight), key
    fresh = ours["model_embedding.weight"][3:]
    assert 0.7 < fresh.std() < 1.3 and not torch.equal(fresh[0], fresh[1])


def test_old_styles_are_told_by_the_frozen_model_in_one_forward(monkeypatch):
    """Against the plain formula, row by row; and the frozen model is asked once, not once for each style."""
    run = growing(1, lambda_feat=0.001, base_share=0.3)
    batch = run.data.batch(0, Draw(1, 24, 4, 0.3, 0.2, run.schedule))
    assert set(batch.teacher.tolist()) == {0, 1, 2, 3, 4}
    calls = []
    whole = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda unet, *a, **k: calls.append(unet) or whole(unet, *a, **k))
    target, features = run.targets(batch, batch.x_t, batch.t, features=True)
    assert [unet is run.base.unet for unet in calls] == [True, False]
    monkeypatch.undo()
    for row, i in enumerate(batch.teacher.tolist()):
        source = (*run.teachers, run.base)[i]
        context, y = source.conditioning(batch.caption[row : row + 1], batch.x_t.shape[2:], run.device)
        style = style_row(3, i) if i < 3 else None
        want, blocks = source.unet(
            batch.x_t[row : row + 1], batch.t[row : row + 1], context, y, style=style, features=True
        )
        torch.testing.assert_close(target[row : row + 1], want, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(features, blocks):
            torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-4, rtol=1e-4)


def test_the_guard_is_the_old_styles_share_of_the_rows():
    run = growing(2, guard=0.4)
    assert run.draws.shares == pytest.approx((0.4 / 3,) * 3 + (0.3,) * 2)
    draw = Draw(0, 16, 5, 0.0, 0.0, run.schedule, run.draws.shares)
    turns = torch.cat([draw.turns(number) for number in range(500)])
    counts = torch.bincount(turns, minlength=5) / len(turns)
    assert (counts - torch.tensor(run.draws.shares)).abs().max() < 2e-3  # evenly at any length
    assert set(
        torch.cat(
            [Draw(0, 16, 5, 0.0, 0.0, run.schedule, growing(2, guard=0.0).draws.shares).turns(n) for n in range(9)]
        ).tolist()
    ) == {3, 4}
    assert small_run(2).draws.shares is None


def test_without_steps_nothing_of_the_old_model_is_lost():
    """Its eps errors against itself are zero, and so is the style-less row's against the old model without a style."""
    run = growing(1)
    table = eps_errors(run.teachers, run.base, None, load_unet(run.student_weights()), data=DATA, samples=12)
    assert all(row.student < 1e-10 for row in table[:3]) and table[3].student > 1e-4
    assert all(row.wrong > 1e-3 for row in table[:3])
    text = format_table(table)
    assert "soup" not in text and "nan" not in text and "nearest" in text


def test_the_guard_holds_the_old_styles_while_the_new_one_is_learnt():
    def after(guard: float) -> list[float]:
        run = growing(1, guard=guard, steps=30, batch_size=8, base_share=0.0, lr=5e-4)
        list(run.run())
        return [
            row.student
            for row in eps_errors(run.teachers, run.base, None, load_unet(run.student_weights()), data=DATA, samples=12)
        ]

    with_guard, without = after(0.5), after(0.0)
    assert sum(with_guard[:3]) < 0.5 * sum(without[:3]), (with_guard, without)


def test_a_warm_start_finds_a_better_code_and_moves_nothing_else():
    run = growing(1, warm_start=40, batch_size=12)
    new = run.teachers[3]

    def error() -> float:
        batch = run.data.batch(0, Draw(9, 24, 4, 0.0, 0.0, run.schedule, (0.0, 0.0, 0.0, 1.0)))
        target = run.targets(batch, batch.x_t, batch.t).out
        out = run.student.predict(batch.x_t, batch.t, batch.caption, style_rows(batch.teacher, run.num_styles)).out
        return (out - target).square().mean().item()

    before, weights = error(), {k: v.clone() for k, v in run.student.unet.state_dict().items()}
    ticks = []
    warm_start(run, run.kind.guarded, lambda *tick: ticks.append(tick))
    assert error() < before
    after = run.student.unet.state_dict()
    assert [k for k in weights if not torch.equal(weights[k], after[k])] == ["model_embedding.weight"]
    assert torch.equal(weights["model_embedding.weight"][:3], after["model_embedding.weight"][:3])
    assert all(p.grad is None for p in run.student.unet.parameters()), "nothing gathers in the network's own gradients"
    assert ticks[-1][:2] == (40, 40) and new.name == "new 0"


@pytest.mark.parametrize(
    "settings", [{"warm_start": 3}, {"trainable": "lora", "lora_rank": 4}, {"trainable": "style", "guard": 0.2}]
)
def test_a_growing_run_that_stops_goes_on_exactly(tmp_path, settings):
    whole = growing(2, steps=5, lambda_feat=0.001, **settings)
    train(whole, None)
    first = growing(2, steps=5, lambda_feat=0.001, save_every=2, **settings)
    from comfyui_dmm.training.run.watch.watch import Watch

    def stop(run, metrics):
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(first, tmp_path, Watch(on_step=stop))
    second = growing(2, steps=5, lambda_feat=0.001, save_every=2, **settings)
    train(second, tmp_path)
    for key, weight in whole.student_weights().items():
        assert torch.equal(weight, second.student_weights()[key]), key


def test_the_order_of_old_styles_is_part_of_the_runs_identity():
    old = old_model()
    swapped = [old.as_style(i, StyleInfo(f"old {j}")) for j, i in enumerate((1, 0, 2))]
    run = growing(1, old=old)
    other = Trainer(old, [*swapped, run.teachers[3]], DATA, run.config)
    one, two = identity(run), identity(other)
    assert {k for k in one if one[k] != two[k]} == {"teacher 'old 0'", "teacher 'old 1'"}


def test_refusals():
    with pytest.raises(ValueError, match="init is 'soup'.*goes on from itself"):
        growing(1, init="soup")
    with pytest.raises(ValueError, match="'new 0' has context_dim"):
        old = old_model()
        wide = small_teacher("new 0", 1, DATA, dataclasses.replace(SMALL, context_dim=24))
        Trainer(old, [old.as_style(0, StyleInfo("a")), wide], DATA, TrainConfig(lambda_adv=0.0))
    plain, styled = small_teacher("x", 0, DATA).unet.state_dict(), old_model().unet.state_dict()
    with pytest.raises(ValueError, match="the base model has no styles"):
        styled_unet(plain, "the base model")
    with pytest.raises(ValueError, match="itself a DMM model with 3 styles.*add-teacher"):
        plain_unet(styled, "teacher 'x'")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A DMM file with text encoder, a teacher, latents and a config for ``dmm add-teacher``."""
    config = dataclasses.replace(SMALL, context_dim=64)
    old = old_model(config)
    infos = [StyleInfo("ink", licence="CC0"), StyleInfo("墨"), StyleInfo("oil")]
    recipe = {"steps_done": 7, "history": [{"styles": [], "steps_done": 3}]}
    save_checkpoint(
        tmp_path / "old.safetensors",
        Checkpoint(unet=dict(old.unet.state_dict()), text=init_text(64, 2), styles=infos, recipe=recipe),
    )
    for i, name in enumerate(("a", "b")):
        save_checkpoint(
            tmp_path / f"{name}.safetensors",
            Checkpoint(unet=dict(small_teacher(name, 5 + i, DATA, config).unet.state_dict())),
        )
    from safetensors.torch import save_file

    save_file(
        {"latents": torch.randn(6, 4, 8, 8)},
        tmp_path / "latents.safetensors",
        {"captions": json.dumps([f"c{i}" for i in range(6)])},
    )
    return tmp_path


def write(folder, **changes) -> str:
    config = {
        "base": "old.safetensors", "teachers": [{"name": "new", "file": "a.safetensors"}], "output": "grown.safetensors",
        "run_dir": "run", "picture_every": 0, "data": {"kind": "latents", "file": "latents.safetensors"},
        "train": {"steps": 3, "batch_size": 4, "lr": 1e-3, "lambda_adv": 0.0, "validation": 4, "warm_start": 2}, **changes,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}, allow_unicode=True))
    return str(path)


def test_four_plus_one_plus_one_from_files(files, capsys):
    assert main(["add-teacher", "--config", write(files)]) == 0, capsys.readouterr().err
    grown = load_checkpoint(files / "grown.safetensors")
    assert [s.name for s in grown.styles] == ["ink", "墨", "oil", "new"] and grown.styles[0].licence == "CC0"
    assert grown.recipe["added"] == ["new"]
    assert [len(entry["styles"]) for entry in grown.recipe["history"]] == [0, 3]
    assert grown.recipe["history"][1]["steps_done"] == 7 and "history" not in grown.recipe["history"][1]
    again = write(
        files,
        base="grown.safetensors",
        teachers=[{"name": "newer", "file": "b.safetensors"}],
        output="more.safetensors",
        run_dir="run2",
    )
    assert main(["add-teacher", "--config", again]) == 0, capsys.readouterr().err
    more = load_checkpoint(files / "more.safetensors")
    assert more.num_styles == 5 and [len(entry["styles"]) for entry in more.recipe["history"]] == [0, 3, 4]
    capsys.readouterr()
    assert main(["info", str(files / "more.safetensors")]) == 0
    assert "newer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("distill", {}, "the base model is itself a DMM model with 3 styles"),
        ("add-teacher", {"base": "a.safetensors", "parts_from": "old.safetensors"}, "the base model has no styles"),
        ("add-teacher", {"teachers": [{"name": "Ink", "file": "a.safetensors"}]}, "are the same style name"),
        ("add-teacher", {"teachers": None}, "no teachers given"),
        ("forget", {}, "name the styles to forget in the config"),
        ("add-teacher", {"teachers": None, "forget": ["ink"]}, "run it with dmm forget"),
        ("forget", {"forget": ["ink"]}, "forget and teachers are both given"),
        ("forget", {"teachers": None, "forget": ["green"]}, "no style 'green': it has ink, 墨, oil"),
        ("forget", {"teachers": None, "forget": ["ink"], "attack": {"every": 0}}, "attack.every is 0"),
        ("add-teacher", {"train": {"guard": 1.0}}, "guard is 1.0"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(files, capsys, command, changes, message):
    assert main([command, "--config", write(files, **changes)]) == 1
    assert message in capsys.readouterr().err
    assert not (files / "grown.safetensors").exists() and not (files / "run").exists()


def test_forgetting_from_files(files, capsys):
    config = write(
        files,
        teachers=None,
        forget=["墨"],
        attack={"every": 2, "steps": 2, "codes": 2, "check": 3},
        output="less.safetensors",
    )
    assert main(["forget", "--config", config]) == 0, capsys.readouterr().err
    less = load_checkpoint(files / "less.safetensors")
    assert [s.name for s in less.styles] == ["ink", "oil"] and less.recipe["forgotten"] == ["墨"]
    report = (files / "run" / "report.txt").read_text(encoding="utf-8").splitlines()
    assert report[0].split() == "a search for found before found now without a style".split() and report[1].startswith(
        "墨"
    )
