"""Models with a style bank that grow and forget: at once from files, and by training from there."""

import dataclasses
import functools
import json

import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK, bank_key, folded_bank
from comfyui_dmm.dmm_core.bank_fit import fit_bank, neutral_style
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.unet import UNet, load_unet, unet_config_from_state_dict
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import AttackConfig, TrainConfig
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.loop.codes import Search, fit_codes, mean_errors, recover, tables, with_more_codes
from comfyui_dmm.training.loop.forget import ask_old
from comfyui_dmm.training.loop.forget import forgetting as forgetting_run
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.merge.grow import add_teachers
from comfyui_dmm.training.run.state import identity, resume, save_state
from comfyui_dmm.training.text import init_text

from .families import SMALL, small_data, small_teacher
from .test_grow import write
from .test_merge import source

DATA = small_data()
CPU = torch.device("cpu")
NAMES = ("old 0", "old 1", "old 2")
SETTINGS = {
    "steps": 4, "batch_size": 8, "lr": 1e-3, "ema_gamma": 6.94, "seed": 3, "lambda_adv": 0.0, "validation": 0, "growth": "20%",
}  # fmt: skip


@functools.cache
def merged(context_dim=SMALL.context_dim) -> dict[str, torch.Tensor]:
    """A merge of three random teachers around a random base, rank 4."""
    config = dataclasses.replace(SMALL, context_dim=context_dim)
    models = [small_teacher(f"t{i}", i, DATA, config).unet.state_dict() for i in range(4)]
    shapes = {key: tuple(value.shape) for key, value in models[0].items()}
    fitted = fit_bank(models[1:], models[0], 4, shapes=shapes, dtype=torch.float32)
    weights = {key: value for one in fitted for key, value in one.weights.items()}
    return {**weights, **neutral_style(3, config.embed_dim, "add_embedding", torch.float32)}


def old_model():
    text = small_teacher("base", 0, DATA)
    old = dataclasses.replace(text, unet=load_unet(merged()))
    return old, [old.as_style(i, StyleInfo(name)) for i, name in enumerate(NAMES)]


def growing(**settings) -> Trainer:
    old, styles = old_model()
    return Trainer(old, [*styles, small_teacher("new", 9, DATA)], DATA, TrainConfig(**{**SETTINGS, **settings}))


def forgetting(names=("old 1",), attack=AttackConfig(2, 3, 2, check=4), **settings) -> Trainer:
    old, styles = old_model()
    return forgetting_run(
        old, styles, names, DATA, config=TrainConfig(**{**SETTINGS, **settings}), device=CPU, attack=attack
    )


# --- growing by training ----------------------------------------------------------------------------------------------


def test_training_starts_from_the_instant_growth():
    """Bitwise what ``add_teachers`` makes of a float32 file with the same budget in numbers; the old styles as they were."""
    run = growing()
    weights = run.student_weights()
    new = small_teacher("new", 9, DATA).unet.state_dict()
    infos = [StyleInfo(name) for name in NAMES]
    grown, report = add_teachers(Checkpoint(merged(), styles=infos), [source("new", new, "")], "20%")
    assert report.growth.rank > 0 and weights.keys() == grown.unet.keys()
    for key, value in grown.unet.items():
        assert torch.equal(weights[key], value), key
    for style in range(4):
        before, now = torch.eye(4)[style], torch.eye(5)[style if style < 3 else 4]
        one, two = folded_bank(merged(), before), folded_bank(weights, now)
        assert all(torch.equal(one[key], two[key]) for key in new)


def test_the_guard_and_the_new_teacher_both_count():
    """Old styles' targets are the frozen model's, the new one's its teacher's; at the start old styles miss nothing."""
    run = growing(base_share=0.0)
    assert run.kind.guarded == (0, 1, 2) and run.draws.shares == pytest.approx((1 / 6,) * 3 + (0.5,))
    batch = run.data.batch(0, Draw(1, 16, 4, 0.0, 0.0, run.schedule))
    losses = run.losses(batch).score.detach()
    old = batch.teacher < 3
    assert losses[old].max() < 1e-9 < 1e-4 < losses[~old].min()
    before = {name: p.detach().clone() for name, p in run.student.unet.named_parameters()}
    list(run.run())
    moved = {name for name, p in run.student.unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys()


@pytest.mark.parametrize("settings", [{}, {"trainable": "bank", "warm_start": 2}])
def test_a_grown_bank_goes_on_exactly(tmp_path, settings):
    whole = growing(**settings)
    list(whole.run())
    first = growing(**settings)
    for _ in range(2):
        first.train_step()
    save_state(first, tmp_path, identity(first))
    second = growing(**settings)
    assert resume(second, tmp_path, identity(second)) and second.step == 2
    list(second.run())
    one, two = whole.student_weights(), second.student_weights()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert identity(first)["setting growth"] == '"20%"'


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_what_stays_is_moved_to_its_own_mean_before_training():
    """The kept cores sum to zero, every row computes what it did, and the old core is the first of the hostile ones."""
    run = forgetting()
    weights = run.student.unet.state_dict()
    config = unet_config_from_state_dict(weights)
    assert (config.num_styles, config.bank.cores) == (5, 6), "two kept, the old code, two hostile ones; no style"
    cores = weights[bank_key("out.2", "cores")]
    assert cores[:2].sum(0).abs().max() < 1e-5 < 1e-3 < cores[0].abs().max()
    for row, style in ((0, 0), (1, 2), (2, 1), (3, 3), (5, 3)):  # a hostile row begins as "no style", which is the last
        one, two = folded_bank(merged(), torch.eye(4)[style]), folded_bank(weights, torch.eye(6)[row])
        for key in ("out.2.weight", "out.2.bias", "input_blocks.1.0.in_layers.2.weight"):
            torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-5)


@functools.cache
def centred(context_dim=SMALL.context_dim) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A merge centred at its base, of three teachers that are alike, and the base."""
    config = dataclasses.replace(SMALL, context_dim=context_dim)
    base, common, *models = (small_teacher(f"t{i}", i, DATA, config).unet.state_dict() for i in range(5))
    alike = [{key: common[key] + 0.3 * (value - base[key]) for key, value in model.items()} for model in models]
    shapes = {key: tuple(value.shape) for key, value in base.items()}
    fitted = fit_bank(alike, None, 4, shapes=shapes, centre=base, dtype=torch.float32)
    weights = {key: value for one in fitted for key, value in one.weights.items()}
    return weights | neutral_style(3, SMALL.embed_dim, "add_embedding", torch.float32), base


def at_the_base(at_base=True, **settings) -> Trainer:
    """A run that forgets a style of that merge."""
    old = dataclasses.replace(small_teacher("base", 0, DATA), unet=load_unet(centred()[0]), at_base=at_base)
    styles = [old.as_style(i, StyleInfo(name)) for i, name in enumerate(NAMES)]
    config, attack = TrainConfig(**{**SETTINGS, **settings}), AttackConfig(2, 3, 2, check=1)
    return forgetting_run(old, styles, ["old 1"], DATA, config=config, device=CPU, attack=attack)


@torch.no_grad()
def test_a_bank_centred_at_the_base_stays_there_before_training():
    """W is the base's bit for bit and painting without a style is the base's picture bit for bit, in the student and in the file that is
    only deleted from; the styles that stay have their old weights, and the old core is the first of the hostile ones."""
    run, (merge, base) = at_the_base(), centred()
    weights = run.student.unet.state_dict()
    assert all(torch.equal(weights[key], base[key]) for key in base)
    plain = load_unet(base)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    for style in (None, torch.zeros(2, 6)):
        assert torch.equal(run.student.unet(x, t, context, style=style), plain(x, t, context))
    for row, style in ((0, 0), (1, 2), (2, 1)):
        one, two = folded_bank(merge, torch.eye(3)[style]), folded_bank(weights, torch.eye(5)[row])
        assert all(torch.equal(one[key], two[key]) for key in base)
    said = run.kind.final_report(run)
    assert "The cores that stay tell" in said and "the mean was moved" not in said
    moved = at_the_base(False)  # what a merge around the mean needs
    assert not torch.equal(moved.student.unet.out[2].weight, base["out.2.weight"])
    assert "the mean was moved" in moved.kind.final_report(moved)


@torch.no_grad()
def test_with_the_bank_alone_training_leaves_the_base():
    run, base = at_the_base(trainable="bank", steps=2), centred()[1]
    list(run.run())
    weights = run.student_weights()
    assert all(torch.equal(weights[key], base[key]) for key in base)
    before = identity(at_the_base(False, trainable="bank", steps=2))
    assert {key for key, value in identity(run).items() if before.get(key) != value} == {"bank's centre"}, (
        "a run that began elsewhere does not go on here"
    )


def test_the_attack_moves_codes_and_cores_and_training_leaves_them():
    run = forgetting(attack=AttackConfig(100, 3, 2, check=0))
    found = tables(run.student.unet, cores=True)
    assert len(found) > 20 and {table.key.rsplit(".", 2)[-2] for table in found} == {"model_embedding", "cores", "bias"}
    before = [table.rows(range(5)) for table in found]
    run.train_step()
    moved = [((table.rows(range(5)) - rows).abs().amax(1) > 0).tolist() for table, rows in zip(found, before)]
    # The style MLP of a fresh merge makes nothing of a code, so a search gives none a direction: one of two is drawn anew, the other stays.
    assert sorted(moved[0][2:]) == [False, False, True] and not moved[0][2]
    assert all(one[2:] == [False, True, True] for one in moved[1:]), (
        "the old rows stay, the hostile ones are searched for"
    )
    assert all(all(one[:2]) for one in moved), "what stays learns"
    hostile = [table.rows((2, 3, 4)) for table in found]
    none = run.student.unet.get_submodule(f"{BANK}.out.2.cores").weight.detach()[5].clone()
    run.train_step()
    assert all(torch.equal(table.rows((2, 3, 4)), rows) for table, rows in zip(found, hostile))
    assert not torch.equal(run.student.unet.get_submodule(f"{BANK}.out.2.cores").weight[5], none), "'no style' learns"


def test_the_finished_student_has_the_kept_rows_alone():
    run = forgetting(steps=1)
    list(run.run())
    weights = run.student_weights()
    config = unet_config_from_state_dict(weights)
    assert (config.num_styles, config.bank.cores) == (2, 3)
    raw = run.student.unet.state_dict()[bank_key("out.2", "cores")]
    assert torch.equal(run.student_weights(False)[bank_key("out.2", "cores")], raw[[0, 1, 5]])


def test_the_error_of_a_core_is_that_of_the_folded_network():
    """A search's row against a plain UNet with that core in its weights and that code on its embedding."""
    run = forgetting()
    one = run.kind.forgotten[0]
    search = Search(run, run.student.unet, one.code_rows[1:], run.kind.sample(run, one, 2), True)
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(2, sum(table.weight.shape[1] for table in search.tables), generator=g) * 0.3
    batch, which, target = search.sample(7)
    got, _ = search.errors(codes, 7)
    mine = with_more_codes(run.student.unet, 0)
    for table, part in zip(tables(mine, cores=True), codes.split([t.weight.shape[1] for t in search.tables], 1)):
        table.weight.data[list(one.code_rows[1:])] = part * next(t.scale for t in search.tables if t.key == table.key)
    context, _ = run.base.conditioning(batch.caption, (8, 8), CPU)
    style = torch.zeros(len(which), 6)
    style[torch.arange(len(which)), torch.tensor(one.code_rows[1:])[which]] = style[:, -1] = 1.0
    for row in range(len(which)):
        masses = torch.zeros(6)
        masses[one.code_rows[1:][which[row]]] = 1
        alone = load_unet(folded_bank(mine.state_dict(), masses))
        out = alone(batch.x_t[row:][:1], batch.t[row:][:1], context[row:][:1], style=style[row:][:1])
        assert got[row].item() == pytest.approx((out - target[row]).square().mean().item(), rel=1e-3)


def test_cores_bring_back_what_codes_cannot():
    """In the deleted file: the look sits in the cores, so a search for codes alone finds nothing (W is what they all paint), one for cores
    finds more."""
    run = forgetting()
    one = run.kind.forgotten[0]
    search = Search(run, run.student.unet, one.code_rows[1:], run.kind.sample(run, one, 2), True)
    start = torch.cat([table.rows(one.code_rows[1:]) for table in search.tables], 1)
    codes = fit_codes(search, start, 40)
    before, after = (mean_errors(search, c, range(500, 502)) for c in (start, codes))
    assert (after < 0.6 * before).all()
    ask = functools.partial(ask_old, run, one.teacher)
    only, both = (recover(run, run.student.unet, ask, 60, cores=cores, tries=3, batches=2) for cores in (False, True))
    assert only.error == pytest.approx(only.start) and both.error < 0.7 * only.error


def test_more_styles_change_nothing_else_in_a_bank():
    unet = load_unet(merged())
    grown = with_more_codes(unet, 2)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    rows = torch.tensor([[0.0, 1, 0, 1], [0.5, 0, 0.2, 0.7]])
    more = torch.cat([rows[:, :3], torch.zeros(2, 2), rows[:, 3:]], 1)
    torch.testing.assert_close(unet(x, t, context, style=rows), grown(x, t, context, style=more), atol=1e-6, rtol=1e-6)


def test_the_report_tells_deleting_from_training():
    run = forgetting(steps=1)
    ticks = []
    lines = run.kind.final_report(run, lambda *tick: ticks.append(tick)).splitlines()
    assert "deleted: codes" in lines[0] and "trained" not in lines[0], "nothing was trained yet"
    assert len(lines[1].removeprefix("old 1").split()) == 3 and "told 100% of 'old 1'" in lines[-1]
    assert ticks[-1][:2] == (8, 8)
    list(run.run())
    lines = run.kind.final_report(run).splitlines()
    assert "trained: and cores" in lines[0] and len(lines[1].removeprefix("old 1").split()) == 5


# --- from files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """merged.safetensors with text encoder, teachers a and b, latents for ``write``."""
    config = dataclasses.replace(SMALL, context_dim=64)
    half = {key: value.half() for key, value in merged(64).items()}
    styles = [StyleInfo("ink", licence="CC0"), StyleInfo("墨"), StyleInfo("oil")]
    recipe = {"merge": {"budget": "10%"}}
    save_checkpoint(tmp_path / "merged.safetensors", Checkpoint(half, init_text(64, 2), styles=styles, recipe=recipe))
    for i, name in enumerate("ab"):
        unet = small_teacher(name, 5 + i, DATA, config).unet.state_dict()
        save_checkpoint(tmp_path / f"{name}.safetensors", Checkpoint(dict(unet)))
    other = UNet(dataclasses.replace(config, context_dim=32)).state_dict()
    save_checkpoint(tmp_path / "other.safetensors", Checkpoint(dict(other)))
    plain = {key: value for key, value in half.items() if not key.startswith(f"{BANK}.")}
    save_checkpoint(tmp_path / "codes.safetensors", Checkpoint(plain, styles=styles))
    from safetensors.torch import save_file

    captions = {"captions": json.dumps([f"c{i}" for i in range(6)])}
    save_file({"latents": torch.randn(6, 4, 8, 8)}, tmp_path / "latents.safetensors", captions)
    return tmp_path


def instant(folder, *more, model="merged", teacher="a", name="new", budget="20%", output="out.safetensors"):
    given = [f"{name}={folder / f'{teacher}.safetensors'}"]
    files = ["--model", str(folder / f"{model}.safetensors"), "--output", str(folder / output)]
    return ["add-teacher", "--instant", "--teacher", *given, *files, "--budget", budget, *more]


def test_added_twice_and_deleted_from_files(files, capsys):
    assert main(instant(files)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "grew by rank" in said and "| new |" in said and "unchanged" in said
    one = load_checkpoint(files / "out.safetensors")
    assert [s.name for s in one.styles] == ["ink", "墨", "oil", "new"] and one.styles[0].licence == "CC0"
    assert one.recipe["added"] == ["new"] and one.recipe["base"]["file"] == "merged.safetensors"
    assert one.recipe["history"] == [{"styles": ["ink", "墨", "oil"], "merge": {"budget": "10%"}}]
    figures = json.loads((files / "out-growth.json").read_text())
    assert figures["teachers"][0]["kept"] > figures["teachers"][0]["kept_before"] > 0
    assert (files / "out-growth.png").exists() and one.text
    more = str(files / "more.safetensors")
    assert main(instant(files, model="out", teacher="b", name="newer", output="more.safetensors", budget="0%")) == 0
    assert len(load_checkpoint(more).recipe["history"]) == 2
    less = str(files / "less.safetensors")
    assert main(["forget", "--instant", "--model", more, "--style", "newer", "--style", "new", "--output", less]) == 0
    assert "bit for bit" in capsys.readouterr().out
    before, back = (load_checkpoint(files / f"{name}.safetensors") for name in ("merged", "less"))
    assert back.unet.keys() == before.unet.keys() and back.recipe["forgotten"] == ["new", "newer"]
    assert all(torch.equal(back.unet[key], before.unet[key]) for key in before.unet)


def test_energy_kept_is_what_the_folded_weights_miss(files):
    """The report's share against the weights of the file: 1 - |folded - teacher|^2 / |W - teacher|^2 over layers, norms and biases."""
    model, teacher = (load_checkpoint(files / f"{name}.safetensors") for name in ("merged", "a"))
    grown, report = add_teachers(model, [source("new", teacher.unet, "")], "40%")
    folded = folded_bank(grown.unet, torch.eye(5)[3])
    total = sum((teacher.unet[key] - model.unet[key].float()).double().square().sum() for key in teacher.unet)
    missed = 0.0
    for key, value in teacher.unet.items():
        layer = key.endswith(".weight") and bank_key(key.removesuffix(".weight"), "up") in model.unet
        # as a merge's report, of float32 sums: biases, which the bank has exactly, are not counted as kept
        now = grown.unet[key].float() + (0 if not layer else folded_change(grown.unet, key))
        missed += (value - now).double().square().sum()
    assert report.teachers()[0].kept == pytest.approx(1 - (missed / total).item(), abs=2e-3)
    assert folded["out.2.bias"].float().sub(teacher.unet["out.2.bias"]).abs().max() < 2e-3


def folded_change(unet, key):
    """U C V of the new style, dense."""
    name = key.removesuffix(".weight")
    up, down, cores = (unet[bank_key(name, part)].float() for part in ("up", "down", "cores"))
    change = up @ cores[3].view(up.shape[1], -1) @ down.flatten(1)
    return change.view(unet[key].shape)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda f: instant(f, teacher="other"), "context_dim 32 instead of 64"),
        (lambda f: instant(f, name="INK "), "are the same style name"),
        (lambda f: instant(f, budget="0.001%"), "too small for 1 more style: the smallest is"),
        (lambda f: instant(f, model="codes"), "the model has no style bank"),
        (lambda f: instant(f, model="a"), "the model has no styles"),
        (lambda f: instant(f, teacher="merged"), "is a DMM model with styles of its own"),
        (lambda f: instant(f, output="out.ckpt"), "must end in .safetensors"),
        (lambda f: instant(f, "--config", "x.yaml"), "--instant trains nothing"),
        (lambda f: ["add-teacher", "--instant", "--model", "x"], "--instant lacks --teacher, --output"),
        (lambda f: ["add-teacher", "--budget", "3%"], "--budget belong to --instant"),
        (lambda f: ["add-teacher"], "name what to train with --config"),
        (lambda f: forget(f, "blue"), "no style 'blue': it has ink, 墨, oil"),
        (lambda f: forget(f, "ink", "墨", "oil"), "all styles would be forgotten"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(files, capsys, command, message):
    before = sorted(path.name for path in files.iterdir())
    assert main(command(files)) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == before


def forget(folder, *styles) -> list[str]:
    named = [word for style in styles for word in ("--style", style)]
    return [
        "forget",
        "--instant",
        "--model",
        str(folder / "merged.safetensors"),
        *named,
        "--output",
        str(folder / "o.safetensors"),
    ]


def test_a_bank_is_trained_on_and_forgets_from_configs(files, capsys):
    # The preset's start, a bank of the teachers, is for models without styles.
    train = {"preset": "draft", "steps": 2, "batch_size": 4, "lr": 1e-3, "validation": 0, "growth": "20%"}
    config = write(files, base="merged.safetensors", train=train)
    assert main(["add-teacher", "--config", config]) == 0, capsys.readouterr().err
    grown = load_checkpoint(files / "grown.safetensors")
    assert [s.name for s in grown.styles] == ["ink", "墨", "oil", "new"]
    assert unet_config_from_state_dict(grown.unet).bank.cores == 5
    attack = {"every": 1, "steps": 1, "codes": 2, "check": 2}
    changes = {"base": "merged.safetensors", "teachers": None, "forget": ["墨"], "attack": attack, "train": train}
    config = write(files, **changes, output="less.safetensors", run_dir="run2")
    assert main(["forget", "--config", config]) == 0, capsys.readouterr().err
    less = load_checkpoint(files / "less.safetensors")
    assert [s.name for s in less.styles] == ["ink", "oil"] and unet_config_from_state_dict(less.unet).bank.cores == 3
    assert "trained: and cores" in (files / "run2" / "report.txt").read_text(encoding="utf-8")


def test_a_file_that_is_centred_at_its_base_forgets_there(files, capsys):
    """From the recipe in the file: with the bank alone learning, the result holds the base's weights, bit for bit."""
    merge, base = ({key: value.half() for key, value in one.items()} for one in centred(64))
    styles = [StyleInfo(name) for name in ("ink", "墨", "oil")]
    recipe = {"merge": {"centre": "base"}}
    save_checkpoint(files / "centred.safetensors", Checkpoint(merge, init_text(64, 2), styles=styles, recipe=recipe))
    attack = {"every": 1, "steps": 1, "codes": 2, "check": 0}
    train = {"steps": 2, "batch_size": 4, "lr": 1e-3, "lambda_adv": 0.0, "validation": 0, "trainable": "bank"}
    changes = {"base": "centred.safetensors", "teachers": None, "forget": ["墨"], "attack": attack, "train": train}
    assert main(["forget", "--config", write(files, **changes)]) == 0, capsys.readouterr().err
    less = load_checkpoint(files / "grown.safetensors")
    assert [s.name for s in less.styles] == ["ink", "oil"]
    assert all(torch.equal(less.unet[key], base[key]) for key in base)
