"""A DMM model that learns from itself to paint in a few steps: what a step compares, what stays, that it goes on exactly, and its files."""

import dataclasses
import json

import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import FewStepConfig, TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents
from comfyui_dmm.training.files.checksums import read_checked
from comfyui_dmm.training.loop.few_steps import few_stepping
from comfyui_dmm.training.loop.own_paths import SizePaths, groups_of, path_timesteps, random_rows
from comfyui_dmm.training.loop.phased import CLEAN, Phases, huber_loss
from comfyui_dmm.training.run.state import identity
from comfyui_dmm.training.run.student_file import save_lora
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.validation import validation_error
from comfyui_dmm.training.run.watch.controls import StopAndSave
from comfyui_dmm.training.run.watch.watch import Watch
from comfyui_dmm.training.text import init_text
from safetensors.torch import save_file

from .families import SMALL, SMALL_RUN, SMALL_XL, resumes_bitwise
from .test_grow import DATA, old_model

CPU = torch.device("cpu")
OLD = {False: old_model(SMALL, seed=4), True: old_model(SMALL_XL, seed=4)}
QUICK = FewStepConfig(paths=2, path_steps=2, objective="consistency")


def few(
    settings=QUICK,
    xl=False,
    prediction="eps",
    zero_snr=False,
    recipe=None,
    data=DATA,
    ranks=None,
    folder=None,
    paint=True,
    **train_settings,
):
    old = dataclasses.replace(
        OLD[xl], unet=load_unet(OLD[xl].unet.state_dict()), prediction=prediction, zero_snr=zero_snr
    )
    styles = [old.as_style(i, StyleInfo(f"old {i}")) for i in range(3)]
    config = TrainConfig(**{**SMALL_RUN, "trainable": "lora", "lora_rank": 4, "base_share": 0.2, **train_settings})
    run = few_stepping(old, styles, data, config=config, device=CPU, settings=settings, recipe=recipe, ranks=ranks)
    if paint:
        run.kind.prepare(run, folder, None, lambda: False)
    return run


def only(run) -> SizePaths:
    """The run's own paths, where its data have one size."""
    (found,) = run.kind.paths.sizes.values()
    return found


def test_style_rows_are_the_styles_blends_of_two_and_none():
    g = torch.Generator().manual_seed(0)
    primary = torch.arange(4).repeat(500)
    rows = random_rows(primary, 3, 0.25, g)
    assert torch.equal(rows[primary == 3], torch.zeros(500, 4))
    styled = rows[primary < 3]
    torch.testing.assert_close(styled[:, :3].sum(1), torch.ones(1500))
    assert (styled[:, 3] == 1).all()
    blended = (styled[:, :3] > 0).sum(1) == 2
    assert blended.float().mean().item() == pytest.approx(0.25, abs=0.05)
    own = styled[torch.arange(1500), primary[primary < 3]]
    assert (own[~blended] == 1).all() and own[blended].mean().item() == pytest.approx(0.5, abs=0.06)
    alone = random_rows(torch.zeros(50, dtype=torch.long), 1, 0.9, g)
    assert torch.equal(alone, torch.ones(50, 2)), "one style has nothing to be blended with"


@pytest.mark.parametrize(
    ("xl", "prediction", "zero_snr"), [(False, "eps", False), (False, "v", True), (True, "eps", False)]
)
def test_a_step_compares_the_students_jump_with_that_from_the_frozen_models_own_step(xl, prediction, zero_snr):
    """Against the formula of the issue, row by row, with the networks called alone."""
    run = few(xl=xl, prediction=prediction, zero_snr=zero_snr)
    for _ in range(2):
        run.train_step()
    batch = run.draws(2)
    rows, phases, c = run.kind.rows(run, batch, 2), run.kind.phases, run.kind.settings
    assert bool(rows.known.any()) and not bool(rows.known.all()), "half of the rows are states of own paths"
    losses = run.kind.losses(run, batch, 2)
    average = load_unet(run.student_weights())
    raw = load_unet(run.student_weights(averaged=False))
    schedule = run.schedule

    def says(unet, x, t, caption, style):
        context, y = run.base.conditioning(caption, x.shape[2:], CPU)
        with torch.no_grad():
            return unet(x, t, context, y=y, style=style)

    for i in range(len(batch)):
        x, t, caption, style = (value[i : i + 1] for value in (rows.x_t, rows.t, rows.caption, rows.style))
        s = next(edge for edge in phases.edges if edge < int(t))
        after = max(int(t) - c.skip, s)

        def ab(at):
            if at == CLEAN:
                return 1.0, 0.0
            alpha, sigma = schedule.coefficients(torch.tensor([at]), torch.zeros(1))
            return alpha.item(), sigma.item()

        def jump(x, out, high, low):
            (a, b), (a_s, b_s) = ab(high), ab(low)
            x0, eps = ((x - b * out) / a, out) if prediction == "eps" else (a * x - b * out, b * x + a * out)
            return a_s * x0 + b_s * eps

        null = says(run.base.unet, x, t, torch.zeros_like(caption), style)
        out = null + c.cfg * (says(run.base.unet, x, t, caption, style) - null)
        target = jump(x, out, int(t), after)
        if after > s:
            at = torch.tensor([after])
            target = jump(target, says(average, target, at, caption, style), after, s)
        mine = jump(x, says(raw, x, t, caption, style), int(t), s)
        want = huber_loss(mine, target, phases.slope(t, torch.tensor([s]), x), c.huber)
        torch.testing.assert_close(losses.score[i : i + 1].detach(), want, atol=1e-4, rtol=2e-3)


def test_own_paths_are_the_frozen_models_guided_euler_paths_in_their_styles():
    run = few()
    paths, phases, told = only(run), run.kind.phases, run.kind.paths.t
    assert told == path_timesteps(phases, 2) and len(told) == 9 and told[::2] == phases.edges
    assert paths.states.shape == (8, 9, 4, 8, 8) and paths.style[6:].sum() == 0, "the last two are of no style"
    assert all(paths.style[i, i // 2] > 0 for i in range(6))
    x = paths.states[:, 3].float()
    t = torch.full((8,), told[3])
    style, text = paths.style, run.base
    null = text.predict(x, t, torch.zeros(8, dtype=torch.long), style).out
    out = null + 4.0 * (text.predict(x, t, paths.caption, style).out - null)
    torch.testing.assert_close(
        phases.step(x, out, t, torch.full((8,), told[4])), paths.states[:, 4].float(), atol=0.02, rtol=0.01
    )


def test_only_the_adapters_learn_and_the_styles_stay():
    run = few()
    before = {k: v.clone() for k, v in run.base.unet.state_dict().items()}
    for _ in range(3):
        run.train_step()
    assert all(".parametrizations." in name and name.endswith((".up", ".down")) for name in run.student.trained)
    after = run.student_weights(averaged=False)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and not any(
        k.startswith(("model_embedding", "add_embedding", "time_embed", "out.")) for k in changed
    )
    whole = few(trainable="all")
    assert not any(name.startswith(("model_embedding", "add_embedding")) for name in whole.student.trained)
    assert len(whole.student.trained) > 50


@pytest.mark.parametrize(
    ("paths", "pictures", "each"),
    [(4, [12], [4]), (4, [12, 4], [3, 1]), (128, [900, 90, 10], [114, 12, 2]), (2, [5, 9, 7], [1, 1]), (3, [1, 1, 1], [1, 1, 1])],
)  # fmt: skip
def test_paintings_are_shared_out_between_the_sizes_of_the_data(paths, pictures, each):
    shapes = {(4, 8, 8 + i): count for i, count in enumerate(pictures)}
    groups = groups_of(paths, shapes, 5)
    assert [group.each for group in groups] == each and sum(each) == paths
    assert [shapes[group.shape] for group in groups] == sorted(pictures, reverse=True)[: len(groups)]
    numbers = [number for group in groups for part in group.parts(7) for number in part]
    assert numbers == list(range(5 * paths)), "every number once: the paths' seeds and the parts' files go by them"
    assert all(group.count == 5 * group.each for group in groups)


WIDE = torch.randn(4, 4, 8, 16, generator=torch.Generator().manual_seed(1))
TWO_SIZES = CaptionedLatents([*DATA.buckets, WIDE], [*DATA.captions, *DATA.captions[:4]])


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("objective", ["regression", "both", "consistency"])
def test_the_model_paints_in_every_size_of_the_data(objective, xl):
    """A batch's rows are states of paths of its own pictures' size, each on the frozen model's path in that size."""
    run = few(FewStepConfig(paths=4, path_steps=2, objective=objective), data=TWO_SIZES, steps=50, xl=xl)
    paths, phases = run.kind.paths, run.kind.phases
    assert {shape: (one.each, one.states.shape[1:]) for shape, one in paths.sizes.items()} == {
        (4, 8, 8): (3, (9, 4, 8, 8)), (4, 8, 16): (1, (9, 4, 8, 16))
    }  # fmt: skip
    for one in paths.sizes.values():
        x, count = one.states[:, 3].float(), len(one.states)
        t, s = (torch.full((count,), paths.t[at]) for at in (3, 4))
        null = run.base.predict(x, t, torch.zeros(count, dtype=torch.long), one.style).out
        out = null + 4.0 * (run.base.predict(x, t, one.caption, one.style).out - null)
        torch.testing.assert_close(phases.step(x, out, t, s), one.states[:, 4].float(), atol=0.02, rtol=0.01)
    seen = set()
    for number in range(40):
        batch = run.draws(number)
        rows, shape = run.kind.rows(run, batch, number), tuple(batch.x_t.shape[1:])
        states = paths.sizes[shape].states.flatten(0, 1).float()
        assert rows.x_t.shape == batch.x_t.shape == rows.edge.shape
        for x in rows.x_t[rows.known]:
            assert (states == x).all((1, 2, 3)).any()
        seen.add((shape, bool(rows.known.any())))
    assert {((4, 8, 8), True), ((4, 8, 16), True)} <= seen
    run.train_step()
    assert validation_error(run) > 0


def test_a_size_without_paintings():
    """With fewer paintings than sizes: regression learns from those of the other size, the others from the batch's own pictures."""
    for objective in ("regression", "both", "consistency"):
        run = few(FewStepConfig(paths=1, path_steps=2, objective=objective), data=TWO_SIZES, steps=50)
        assert list(run.kind.paths.sizes) == [(4, 8, 8)]
        sizes = set()
        for number in range(40):
            batch = run.draws(number)
            rows = run.kind.rows(run, batch, number)
            sizes.add(tuple(batch.x_t.shape[2:]))
            other = tuple(batch.x_t.shape[2:]) != (8, 8)
            if objective == "regression":
                assert rows.known.all() and rows.x_t.shape[2:] == rows.edge.shape[2:] == (8, 8)
                assert not torch.equal(rows.x_t, rows.edge)
            elif other:
                assert not rows.known.any() and torch.equal(rows.x_t, batch.x_t)
        assert sizes == {(8, 8), (8, 16)}
        run.train_step()


def test_the_fixed_check_asks_in_every_size():
    """Worse in one of two sizes, worse in the whole: by half of what it is worse there."""
    run = few(REGRESSION_OF_FOUR, data=TWO_SIZES, validation=64, batch_size=8)
    before = validation_error(run)
    wide = run.kind.paths.sizes[4, 8, 16]
    wide.states = wide.states * 3
    assert validation_error(run) > 1.2 * before


BOTH = FewStepConfig(paths=2, path_steps=2, objective="both", follows="student")
REGRESSION = FewStepConfig(paths=2, path_steps=2)
REGRESSION_OF_FOUR = FewStepConfig(paths=4, path_steps=2)


def test_regression_is_to_where_the_painting_crosses_the_edge():
    """By default. Each row against the formula, with the student called alone; the frozen model is not asked in a step."""
    run = few(REGRESSION, trainable="all")
    run.train_step()
    batch, kind, paths, told = run.draws(1), run.kind, only(run), run.kind.paths.t
    rows = kind.rows(run, batch, 1)
    asked = []
    hook = run.targets.pool.get(run.num_styles).register_forward_pre_hook(lambda *_: asked.append(1))
    losses = kind.losses(run, batch, 1)
    hook.remove()
    assert not asked and rows.known.all()
    raw, phases = load_unet(run.student_weights(averaged=False)), kind.phases
    for i in range(len(batch)):
        path = next(
            p for p in range(len(paths.states)) if (paths.states[p].float() == rows.x_t[i]).all((1, 2, 3)).any()
        )
        at = int((paths.states[path].float() == rows.x_t[i]).all((1, 2, 3)).nonzero()[0, 0])
        assert int(rows.t[i]) == told[at] and torch.equal(rows.style[i], paths.style[path])
        edge = next(k for k in (2, 4, 6, 8) if k > at)
        x, t, s = rows.x_t[i : i + 1], rows.t[i : i + 1], torch.tensor([told[edge]])
        context, y = run.base.conditioning(paths.caption[path : path + 1], x.shape[2:], CPU)
        with torch.no_grad():
            ours = phases.step(x, raw(x, t, context, y=y, style=rows.style[i : i + 1]), t, s)
        d = (ours - paths.states[path, edge].float()) / phases.slope(t, s, x)
        want = ((d**2 + 1e-4).sqrt() - 0.01).mean()
        torch.testing.assert_close(losses.score[i].detach(), want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("settings", [QUICK, BOTH, REGRESSION])
def test_it_goes_on_bitwise(tmp_path, settings):
    resumes_bitwise(lambda: few(settings), tmp_path)


def test_painted_paths_are_kept_with_the_run_and_a_stop_ends_the_painting(tmp_path):
    run = few(paint=False)
    watch = Watch()
    watch.controls.ask("stop")
    with pytest.raises(StopAndSave):
        train(run, tmp_path, watch)
    one = few(paint=False)
    train(one, tmp_path)
    kept = sorted((tmp_path / "own-paths").iterdir())
    assert kept and torch.equal(only(one).states, only(few()).states)
    stamps = [path.stat().st_mtime_ns for path in kept]
    again = few(paint=False, steps=7)
    again.kind.prepare(again, tmp_path, None, lambda: False)
    assert stamps == [path.stat().st_mtime_ns for path in kept] and torch.equal(only(again).states, only(one).states)


@pytest.mark.parametrize("changed", ["cfg", "seed", "captions", "model", "path_steps"])
def test_paths_of_other_settings_models_or_captions_are_painted_anew(tmp_path, changed, caplog):
    """As after a stop while the model paints: the folder has paths, and no state says what they were made from."""

    def painted(folder, changed=""):
        settings = dataclasses.replace(QUICK, cfg=7.0) if changed == "cfg" else QUICK
        settings = dataclasses.replace(settings, path_steps=3) if changed == "path_steps" else settings
        run = few(settings, folder=folder, paint=False, **({"seed": 8} if changed == "seed" else {}))
        if changed == "model":
            next(run.base.unet.parameters()).data.mul_(1.1)
            vars(run.base).pop("weights_sha256", None)
        if changed == "captions":
            run.base.contexts = run.base.contexts * 1.1
        run.kind.prepare(run, folder, None, lambda: False)
        return only(run).states

    painted(tmp_path)
    caplog.clear()
    assert torch.equal(painted(tmp_path, changed), painted(None, changed))
    assert "made with other settings, models or data: made anew" in caplog.text


def test_the_last_thing_said_of_the_painting_is_that_all_is_done(tmp_path):
    said, run = [], few(paint=False)
    run.kind.prepare(run, tmp_path, lambda *one: said.append(one), lambda: False)
    parts = len(list((tmp_path / "own-paths").iterdir()))
    steps = len(run.kind.paths.t) - 1
    assert said[-1][:2] == (parts, parts) and len(said) == parts * (steps + 1), (
        "and it can be stopped at every sampling step"
    )


def test_more_paths_than_there_is_room_for_are_refused_before_any_is_painted(tmp_path):
    run = few(dataclasses.replace(QUICK, paths=10**9), paint=False)
    with pytest.raises(ValueError, match=r"few_steps.paths is 1000000000: .* lower paths"):
        run.kind.prepare(run, tmp_path, None, lambda: False)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_painted_paths_is_said_in_words(tmp_path):
    (tmp_path / "own-paths").write_text("")
    run = few(paint=False)
    with pytest.raises(ValueError, match="is a file, and parts of the work are to be kept in a folder there"):
        run.kind.prepare(run, tmp_path, None, lambda: False)


@pytest.mark.parametrize("objective", ["consistency", "regression"])
def test_it_learns_to_jump_as_the_frozen_models_many_steps_do(objective):
    """The fixed check, which is of jumps from edge to edge of the model's own paths, falls to a fraction."""
    settings = FewStepConfig(paths=1, path_steps=3, path_share=0.9, skip=100, objective=objective)
    run = few(settings, steps=40, lr=2e-3, lora_rank=16, ema_gamma=None)
    before = validation_error(run)
    train(run, None)
    assert validation_error(run) < 0.5 * before


def test_the_fixed_check_is_zero_for_what_the_paths_say():
    run = few(trainable="all")
    paths, phases, told = only(run), run.kind.phases, run.kind.paths.t
    at, edge = paths.states[:, 0].float(), paths.states[:, 2].float()
    t, s = torch.full((8,), told[0]), torch.full((8,), told[2])
    zero, one = (phases.step(at, value, t, s) for value in (torch.zeros_like(at), torch.ones_like(at)))
    exact = (edge - zero) / (one - zero)
    torch.testing.assert_close(phases.step(at, exact, t, s), edge, atol=1e-4, rtol=1e-4)
    assert validation_error(run) > 0


def test_the_lora_is_what_the_student_learnt(tmp_path):
    run = few(ema_gamma=None)
    for _ in range(3):
        run.train_step()
    assert save_lora(run, tmp_path / "turbo.safetensors", "turbo")
    weights, said = read_checked(tmp_path / "turbo.safetensors")
    told = json.loads(said["dmm.few_steps"])
    assert (told["steps"], told["sampler"], told["scheduler"], told["cfg"]) == (4, "euler", "sgm_uniform", 1.0)
    base, student = run.base.unet.state_dict(), run.student_weights()
    modules = {"lora_unet_" + k.removesuffix(".weight").replace(".", "_"): k for k in base if k.endswith(".weight")}
    found = {key.removesuffix(".lora_up.weight") for key in weights if key.endswith(".lora_up.weight")}
    assert found and found <= modules.keys()
    for name in found:
        key = modules[name]
        up, down = (weights[f"{name}.{part}.weight"].float() for part in ("lora_up", "lora_down"))
        added = (up.flatten(1) @ down.flatten(1)).view_as(base[key])
        torch.testing.assert_close(base[key] + added, student[key], atol=2e-3, rtol=2e-3)
    untouched = base.keys() - {modules[name] for name in found}
    assert all(torch.equal(base[k], student[k]) for k in untouched)
    assert not save_lora(few(trainable="all"), tmp_path / "none.safetensors", "none")
    assert not (tmp_path / "none.safetensors").exists()


def test_it_is_another_run_with_other_settings():
    one, other = few(), few(dataclasses.replace(QUICK, skip=30))
    assert identity(one) != identity(other)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": {"few_steps": {"steps": 4}}}, "few-step model already"),
        ({"trainable": "style"}, "trainable is 'style'"),
        ({"settings": FewStepConfig(steps=17)}, "few_steps.steps"),
        ({"settings": FewStepConfig(cfg=4, cfg_spread=3.5)}, "cfg_spread is 3.5"),
        ({"settings": FewStepConfig(objective="regression", paths=0)}, "few_steps.paths is 0"),
        ({"settings": FewStepConfig(steps=2, path_steps=51)}, "few_steps.path_steps"),
    ],
)
def test_what_makes_no_sense_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        few(**given)


def test_more_sampling_steps_than_a_phase_has_timesteps_are_refused():
    with pytest.raises(ValueError, match="the shortest phase has"):
        path_timesteps(Phases(NoiseSchedule(), 16), 100)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    text = init_text(16, 1)
    styles = [StyleInfo(f"old {i}") for i in range(3)]
    save_checkpoint(tmp_path / "dmm.safetensors", Checkpoint(OLD[False].unet.state_dict(), text=text, styles=styles))
    save_file({"latents": DATA.buckets[0]}, tmp_path / "data.safetensors", {"captions": json.dumps(DATA.captions)})
    return tmp_path


def config_file(folder, **changes):
    raw = {
        "base": "dmm.safetensors",
        "output": "out.safetensors",
        "run_dir": "run",
        "picture_every": 0,
        "data": {"kind": "latents", "file": "data.safetensors"},
        "few_steps": {"paths": 1, "path_steps": 2},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "trainable": "lora",
            "lora_rank": 2,
            "lambda_adv": 0.01,
            "validation": 4,
        },
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))
    return str(path)


def test_the_command_writes_a_model_and_a_lora(folder, capsys):
    assert main(["fewstep", "--config", config_file(folder)]) == 0
    made = load_checkpoint(folder / "out.safetensors")
    assert [style.name for style in made.styles] == ["old 0", "old 1", "old 2"]
    assert made.recipe["few_steps"] == {"steps": 4, "sampler": "euler", "scheduler": "sgm_uniform", "cfg": 1.0}
    assert made.recipe["history"], "how the model came to what it knew before"
    told = json.loads(read_checked(folder / "out-lora.safetensors")[1]["dmm.few_steps"])
    assert told["base"].endswith("dmm.safetensors") and len(told["base_sha256"]) == 64 and told["steps_done"] == 2
    assert main(["fewstep", "--config", config_file(folder)]) == 0, "the same command again goes on, here from the end"
    capsys.readouterr()
    again = config_file(folder, base="out.safetensors", output="more.safetensors", run_dir="run2")
    for more in ([], ["--dry-run"]):
        assert main(["fewstep", "--config", again, *more]) == 1
        assert "few-step model already (4 steps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"few_steps": None, "teachers": [{"name": "a", "file": "dmm.safetensors"}]}, "few_steps: {steps: 4}"),
        ({"forget": ["old 0"]}, "few_steps is given with teachers or forget"),
        ({"few_steps": {"step": 4}}, "did you mean 'steps'"),
        ({"few_steps": {"cfg": 0.5}}, "few_steps.cfg"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(folder, capsys, changes, said):
    assert main(["fewstep", "--config", config_file(folder, **changes)]) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "out.safetensors").exists()


def test_other_commands_send_a_few_step_config_to_its_own(folder, capsys):
    assert main(["add-teacher", "--config", config_file(folder)]) == 1
    assert "run it with dmm fewstep" in capsys.readouterr().err
