"""Forgetting a style: what the network learns, what an attack finds, and that the rest is guarded."""

import dataclasses
import itertools

import pytest
import torch
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.style import style_delta
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.config import AttackConfig, TrainConfig
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.loop.codes import Search, best_start, fit_codes, mean_errors, recover, with_more_codes
from comfyui_dmm.training.loop.forget import ask_old
from comfyui_dmm.training.loop.forget import forgetting as forgetting_run
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.watch import Watch

from .families import SMALL_RUN, small_run
from .test_grow import DATA, growing, old_model

OLD = old_model(seed=4)
CPU = torch.device("cpu")


def forgetting(names=("old 1",), attack=AttackConfig(2, 3, 2), **settings):
    old = dataclasses.replace(OLD, unet=load_unet(OLD.unet.state_dict()))
    styles = [old.as_style(i, StyleInfo(f"old {i}", licence="CC0")) for i in range(3)]
    return forgetting_run(
        old, styles, names, DATA, config=TrainConfig(**{**SMALL_RUN, "steps": 5, **settings}), device=CPU, attack=attack
    )


def test_the_old_code_must_paint_as_without_a_style_and_the_others_as_before():
    run = forgetting()
    assert [s.name for s in run.kind.styles(run.teachers)] == ["old 0", "old 2"] and run.num_styles == 2 + 3
    old = OLD.unet.model_embedding.weight
    assert torch.equal(run.student.unet.model_embedding.weight[:3], old[[0, 2, 1]]), (
        "what stays, then the code that goes"
    )
    batch = run.data.batch(0, Draw(1, 30, 5, 0.0, 0.0, run.schedule))
    target = run.targets(batch, batch.x_t, batch.t).out
    context, _ = run.base.conditioning(batch.caption, (8, 8), CPU)
    for i, style in ((0, 0), (1, 2), (2, None), (3, None), (4, None)):
        mine = batch.teacher == i
        rows = None
        if style is not None:
            rows = torch.zeros(int(mine.sum()), 4)
            rows[:, [style, -1]] = 1.0
        want = OLD.unet(batch.x_t[mine], batch.t[mine], context[mine], style=rows)
        torch.testing.assert_close(target[mine], want, atol=1e-5, rtol=1e-5)
    assert run.draws.shares == pytest.approx((0.25, 0.25, 0.5 / 3, 0.5 / 3, 0.5 / 3))


def test_the_network_moves_and_not_the_hostile_codes():
    run = forgetting(attack=AttackConfig(100, 3, 2), weight_decay=0.1, lr=1e-2)
    run.train_step()
    hostile = run.student.unet.model_embedding.weight.detach()[2:].clone()
    weights = run.student.unet.out[2].weight.detach().clone()
    run.train_step()
    assert torch.equal(run.student.unet.model_embedding.weight[2:], hostile)
    assert not torch.equal(run.student.unet.out[2].weight, weights)


def test_the_attack_searches_every_few_steps_and_one_code_begins_anew():
    run = forgetting(attack=AttackConfig(2, 3, 2), steps=4)
    seen = [run.student.unet.model_embedding.weight.detach()[2:].clone()]
    for _ in range(3):
        run.train_step()
        seen.append(run.student.unet.model_embedding.weight.detach()[2:].clone())
    moved = [(a - b).abs().amax(1) > 0 for a, b in itertools.pairwise(seen)]
    assert [m.tolist() for m in moved] == [[False, True, True], [False, False, False], [False, True, True]], (
        "steps 0 and 2"
    )
    small = 4 * 0.03  # three steps of Adam at this rate
    near = [(a - b).abs().amax(1)[1:] < small for a, b in itertools.pairwise(seen)]
    assert near[0].tolist() == [False, True] and near[2].tolist() == [True, False], "each in its turn"


def test_the_finished_student_has_none_of_the_hostile_codes():
    run = forgetting(steps=1)
    list(run.run())
    assert (
        run.student_weights()["model_embedding.weight"].shape[0]
        == run.student_weights(False)["model_embedding.weight"].shape[0]
        == 2
    )


def test_a_search_brings_the_style_back_where_it_is():
    """In the old model itself: the code that is there is an upper bound on what a search should come near to."""
    run = forgetting()
    one = run.kind.forgotten[0]
    search = Search(run, run.student.unet, one.code_rows[1:], run.kind.sample(run, one, 2))
    start = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    codes = fit_codes(search, start, 60)
    before, after = (mean_errors(search, c, range(500, 504)) for c in (start, codes))
    assert (after < 0.6 * before).all(), (before, after)
    true = mean_errors(search, one.teacher.unet.model_embedding.weight[[1, 1]], range(500, 506))
    assert (true < 1e-10).all()
    assert torch.equal(
        best_start(search, torch.cat([start, OLD.unet.model_embedding.weight]))[0], OLD.unet.model_embedding.weight[1]
    )


def test_the_error_of_a_code_is_eq_9_of_its_own_samples():
    """Against the plain formula: emb + MLP(code), every sample by its own code."""
    run = forgetting()
    one = run.kind.forgotten[0]
    sample = run.kind.sample(run, one, 2)
    search = Search(run, run.student.unet, one.code_rows[1:], sample)
    codes = torch.randn(2, 256)
    batch, which, target = sample(7)
    got, _ = search.errors(codes, 7)
    unet, (context, _) = run.student.unet, run.base.conditioning(batch.caption, (8, 8), CPU)
    book = torch.nn.Embedding.from_pretrained(codes)
    rows = torch.nn.functional.one_hot(which, 3).float()
    rows[:, -1] = 1.0
    delta = style_delta(book, unet.style_mlp, rows)
    grown = unet.time_embed.register_forward_hook(lambda m, a, out: out + delta)
    want = (unet(batch.x_t, batch.t, context) - target).square().mean(dim=(1, 2, 3))
    grown.remove()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_recovery_compares_like_with_like():
    run = forgetting()
    one = run.kind.forgotten[0]

    def truth(batch):
        return ask_old(run, one.teacher, batch)

    found = recover(run, run.base.unet, truth, 40, tries=2, batches=2)
    assert found.error < 0.7 * min(found.start, found.untouched)
    again = recover(run, run.base.unet, truth, 40, tries=2, batches=2)
    assert found == again, "the attack follows from the run's seed"
    lost = recover(run, run.base.unet, truth, 0, tries=2, batches=2)
    assert lost.error == lost.start == found.start


def test_training_against_attacks_leaves_less_to_find_than_deleting_the_code():
    run = forgetting(steps=40, batch_size=8, lr=2e-3, validation=0, attack=AttackConfig(8, 4, 2))
    train(run, None)
    student = load_unet(run.student_weights())
    one = run.kind.forgotten[0]
    before, now = (
        recover(run, unet, lambda b: ask_old(run, one.teacher, b), 40, tries=2, batches=2)
        for unet in (run.base.unet, student)
    )
    left = (now.untouched - now.error) / (before.untouched - before.error)
    assert left < 0.6, (before, now)


def test_it_goes_on_exactly_after_a_stop(tmp_path):
    settings = {"steps": 5, "save_every": 2}
    whole = forgetting(**settings)
    train(whole, None)

    def stop(run, metrics):
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(forgetting(**settings), tmp_path, Watch(on_step=stop))
    second = forgetting(**settings)
    train(second, tmp_path)
    for key, weight in whole.student_weights().items():
        assert torch.equal(weight, second.student_weights()[key]), key
    with pytest.raises(ValueError, match="forgotten styles"):
        train(forgetting(names=("old 2",), **settings), tmp_path)


def test_more_codes_change_nothing_else():
    grown = with_more_codes(OLD.unet, 2)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    rows = torch.tensor([[0.0, 1, 0, 1], [0.5, 0, 0.5, 1]])
    more = torch.cat([rows[:, :3], torch.zeros(2, 2), rows[:, 3:]], 1)
    assert torch.equal(OLD.unet(x, t, context, style=rows), grown(x, t, context, style=more))


def test_refusals():
    with pytest.raises(ValueError, match="no style 'blue': it has old 0, old 1, old 2"):
        forgetting(["blue"])
    with pytest.raises(ValueError, match="all styles would be forgotten"):
        forgetting(["old 0", "old 1", "old 2"])
    with pytest.raises(ValueError, match="no style to forget was named"):
        forgetting([])
    with pytest.raises(ValueError, match="attack.codes is -1"):
        forgetting(attack=AttackConfig(codes=-1))
    for run in (small_run(1), growing(1)):
        assert run.kind.final_report(run) == ""
