"""Baselines in an evaluation: how they are made, who paints what, that they are compared as the student is, what is refused.

Merges are compared with sums written out, within 1e-6 of float32 numbers of order 1; where a comparison must be that of the teachers or of
the student, it is so exactly.
"""

import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.bank import folded_bank
from comfyui_dmm.dmm_core.bank_fit import fit_bank
from comfyui_dmm.dmm_core.bank_size import bank_of
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS
from comfyui_dmm.dmm_core.unet import UNet, load_unet
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.evaluation.agreement import eps_per_style, noised, stratified_error
from comfyui_dmm.training.evaluation.baselines import (
    BASELINES,
    NEED_BASE,
    TUNING_BATCH,
    Contender,
    Tuning,
    another_student,
    choose_baselines,
    make_baselines,
    obstacles,
)
from comfyui_dmm.training.evaluation.evaluate import Lineup, evaluate
from comfyui_dmm.training.evaluation.merges import adapter_size, chain_shares, low_rank
from comfyui_dmm.training.evaluation.model_ref import ModelRef
from comfyui_dmm.training.evaluation.model_runner import ModelRunner
from comfyui_dmm.training.evaluation.report import as_json, markdown, write
from comfyui_dmm.training.evaluation.settings import SECOND_BATCH
from comfyui_dmm.training.evaluation.work_counter import WorkCounter
from comfyui_dmm.training.loop.new_student import new_student
from comfyui_dmm.training.teachers.teacher import Teacher, soup

from .families import SMALL, SMALL_XL
from .test_evaluation import CPU, DECODER, NAMES, PROMPTS, dmm, plain, refs, small_features
from .test_evaluation import settings as all_settings

FULL = 10_000
"""A rank above that of every matrix."""


def settings(**changes):
    return all_settings(**{"count": 14, "resamples": 3, "metrics": ("fid", "kid", "pair", "eps"), **changes})


def family(config=SMALL, words=None) -> tuple[Teacher, list[Teacher], Teacher]:
    """Student, three teachers that are fine-tunes of the base (near it, as fine-tunes are), and the base.

    words: text states that all have; None gives everyone their own.
    """
    base = plain("base", 7, config)
    teachers = []
    for i, name in enumerate(NAMES, start=1):
        one = plain(name, i, config)
        torch.manual_seed(i)
        for p, q in zip(one.unet.parameters(), base.unet.parameters()):
            p.copy_(q + 0.05 * torch.randn_like(q))
        teachers.append(one)
    everyone = [dmm(config), *teachers, base]
    if words is not None:
        for one in everyone:
            one.contexts = words
    return everyone[0], everyone[1:4], everyone[4]


def lineup_of(student, teachers, base, names=BASELINES, rank=8, others=(), **changes) -> Lineup:
    who, all_of, first = ModelRef.of(student, len(PROMPTS)), refs(teachers), ModelRef.of(base, len(PROMPTS))
    made = [*others, *make_baselines(names, who, NAMES, all_of, base=first, rank=rank)]
    return Lineup(
        who,
        NAMES,
        all_of,
        PROMPTS,
        first,
        **{"decoder": DECODER, "features": small_features(), "others": made, **changes},
    )


def rows_of(evaluation) -> dict:
    return {row.name: row for row in evaluation.compared}


def the_model(contender: Contender, place: int = 0) -> Teacher:
    return contender.painters[place][0].open()


def made(name: str, student, teachers, base=None, rank=8) -> Contender:
    first = None if base is None else ModelRef.of(base, len(PROMPTS))
    (one,) = make_baselines([name], ModelRef.of(student, len(PROMPTS)), NAMES, refs(teachers), base=first, rank=rank)
    return one


def same_weights(unet: UNet, want: dict) -> None:
    got = unet.state_dict()
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value.float(), atol=1e-6, rtol=1e-6)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, SMALL_XL])
def test_merges_are_the_sums_that_they_are_called(config):
    """Against ``teacher.soup`` and against the steps written out; all read the student's words."""
    student, teachers, base = family(config)
    weights = [teacher.unet.state_dict() for teacher in teachers]
    before = {k: v.clone() for k, v in weights[0].items()}
    start = base.unet.state_dict()
    same_weights(the_model(made("soup", student, teachers)).unet, soup(weights))
    chained = {k: v.double() for k, v in weights[0].items()}
    for other in weights[1:]:
        chained = {k: 0.5 * v + 0.5 * other[k].double() for k, v in chained.items()}
    model = the_model(made("chain", student, teachers))
    same_weights(model.unet, chained)
    assert torch.equal(model.contexts, student.contexts)
    tuning = made("task-vectors", student, teachers, base).tuning
    for scale in (0.25, 1.0):
        want = {k: v.double() + scale * sum(w[k].double() - v.double() for w in weights) for k, v in start.items()}
        same_weights(the_model(tuning.merged(scale)).unet, want)
    same_weights(the_model(tuning.merged(1 / 3)).unet, soup(weights))
    assert all(torch.equal(v, before[k]) for k, v in teachers[0].unet.state_dict().items()), "teachers are only read"


def test_the_merge_is_what_dmm_merge_makes():
    """Against the same fit, folded for each style by hand; in the order of the teachers, whatever the student's."""
    student, teachers, base = family()
    shapes = {key: tuple(w.shape) for key, w in base.unet.state_dict().items()}
    size = bank_of("40%", shapes, 4, 2)
    weights = [teacher.unet.state_dict() for teacher in teachers]
    fitted = fit_bank(weights, base.unet.state_dict(), size.rank, shapes=shapes, bias=size.bias, dtype=torch.float32)
    want = {key: value for one in fitted for key, value in one.weights.items()}
    who, first = ModelRef.of(student, len(PROMPTS)), ModelRef.of(base, len(PROMPTS))
    (one,) = make_baselines(["merge"], who, NAMES, refs(teachers), base=first, budget="40%")
    assert [place for _, place in one.painters] == [0, 1, 2] and one.about["rank"] == size.rank
    got = the_model(one).unet.state_dict()
    masses = torch.tensor([0.0, 1.0, 0.0, 0.0])
    same_weights(load_unet(folded_bank(plain_keys(got), masses)), folded_bank(want, masses))


def plain_keys(sd: dict) -> dict:
    """Without codebook and MLP."""
    return {key: value for key, value in sd.items() if key.startswith("style_bank.") or not key.startswith(STYLE_KEYS)}


def test_the_chain_depends_on_the_order():
    assert chain_shares(1) == [1] and chain_shares(3) == [0.25, 0.25, 0.5] and sum(chain_shares(7)) == 1
    student, teachers, _ = family()
    a, b = made("chain", student, teachers), made("chain", student, teachers[::-1])
    assert a.key != b.key and a.key != made("soup", student, teachers).key
    last = teachers[-1].unet.state_dict()["time_embed.0.weight"]
    first = teachers[0].unet.state_dict()["time_embed.0.weight"]
    assert (
        (the_model(a).unet.time_embed[0].weight - last).norm() < (the_model(b).unet.time_embed[0].weight - last).norm()
    ) and (
        (the_model(b).unet.time_embed[0].weight - first).norm()
        < (the_model(a).unet.time_embed[0].weight - first).norm()
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 4, 3, 3), (4, 4), (40, 3, 3, 3)])
def test_a_low_rank_part_is_the_svds(shape):
    """numpy's SVD cut off, 1e-5; its rank; the error is the singular values that are left."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = np.linalg.svd(x.flatten(1).double().numpy(), full_matrices=False)
    got = low_rank(x, 2)
    assert got.shape == x.shape and got.dtype == x.dtype
    np.testing.assert_allclose(got.flatten(1).numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert np.linalg.matrix_rank(got.flatten(1).numpy(), tol=1e-4) == 2
    assert (x - got).square().sum().item() == pytest.approx((s[2:] ** 2).sum(), rel=1e-4)
    assert torch.equal(low_rank(x, FULL), x) and torch.equal(low_rank(x, min(x.flatten(1).shape)), x)
    assert torch.equal(low_rank(x.flatten(), 1), x.flatten()), "vectors stay as they are"


def test_the_bank_is_the_soup_with_an_adapter_each():
    student, teachers, _ = family()
    bank = made("low-rank", student, teachers, rank=3)
    weights = [teacher.unet.state_dict() for teacher in teachers]
    mean = soup(weights)
    numbers = 0
    for place, own in enumerate(weights):
        got = the_model(bank, place).unet.state_dict()
        for key, value in own.items():
            if value.ndim < 2:
                torch.testing.assert_close(got[key], value, rtol=0, atol=0)
                numbers += value.numel() if place == 0 else 0
                continue
            rest, shape = (value - mean[key]).flatten(1), value.flatten(1).shape
            u, s, v = torch.linalg.svd(rest.double(), full_matrices=False)
            want = mean[key].double() + ((u[:, :3] * s[:3]) @ v[:3]).reshape(value.shape)
            torch.testing.assert_close(got[key].double(), want, atol=1e-5, rtol=0)
            numbers += min(3 * sum(shape), value.numel()) if place == 0 else 0
    assert bank.about["adapter_parameters"] == numbers and bank.about["adapters"] == 3 and bank.about["rank"] == 3
    assert bank.about["unet_parameters"] == sum(v.numel() for v in weights[0].values())
    assert (
        adapter_size([torch.Size((10, 20)), torch.Size((7,)), torch.Size((3, 5)), torch.Size((6, 6))], 4)
        == 4 * 30 + 7 + 15 + 36
    )
    assert bank.key != made("low-rank", student, teachers, rank=4).key


def test_the_untrained_student_is_the_trainers():
    """The base's network, the trainer's own first codes, one for each of the student's styles; its styles paint differently."""
    student, teachers, base = family()
    one = made("untrained", student, teachers[:2], base)
    got = the_model(one)
    want = new_student(base.unet, teachers, TrainConfig())
    assert got.unet.config.num_styles == 3 and [style for _, style in one.painters] == [0, 1]
    for key, value in want.state_dict().items():
        assert torch.equal(got.unet.state_dict()[key], value), key
    assert torch.equal(got.contexts, student.contexts) and not any(p.requires_grad for p in got.unet.parameters())
    assert base.unet.config.num_styles == 0


def test_one_teacher_is_in_memory_at_a_time():
    """Whoever is asked for weights finds those before gone, in every baseline; the bank's soup is given up at the end."""
    student, teachers, base = family()
    alive, most, opened = [], [0], []

    def strict(teacher: Teacher) -> ModelRef:
        ref = ModelRef.of(teacher, len(PROMPTS))

        def open_it() -> Teacher:
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            opened.append(teacher.name)
            copy = UNet(teacher.unet.config).requires_grad_(False)
            copy.load_state_dict(teacher.unet.state_dict())
            weights = copy.state_dict()
            copy.state_dict = lambda: weights  # the same tensors each time, so that it shows who keeps one
            alive.extend(weakref.ref(one) for one in (copy.time_embed[0].weight, weights["time_embed.0.weight"]))
            return dataclasses.replace(teacher, unet=copy)

        return dataclasses.replace(ref, open=open_it)

    who, all_of, first = ModelRef.of(student, len(PROMPTS)), [strict(t) for t in teachers], strict(base)
    for name in ("soup", "chain", "untrained", "low-rank"):
        (one,) = make_baselines([name], who, NAMES, all_of, base=first)
        for place in range(len(one.painters)):
            the_model(one, place)
        assert most[0] == 0, f"{name} still held {most[0]} models when it read the next"
    assert opened.count(NAMES[0]) == 1 + 1 + 1 + 1, "soup, chain, the bank's soup and its own adapter"
    bank = one.finish.__self__
    assert bank._soup is not None
    one.finish()
    assert bank._soup is None


@pytest.fixture(scope="module")
def everything():
    """(student, teachers, base) and the evaluation of them with all baselines."""
    models = family()
    e = evaluate(lineup_of(*models), settings())
    return models, e


# --- in the evaluation ------------------------------------------------------------------------------------------------


def test_everyone_is_in_one_table(everything):
    """Every row from everyone's own pictures: the figures of a model that takes part alone, as the base does."""
    (student, teachers, base), e = everything
    s, rows = settings(), rows_of(e)
    assert list(rows) == [
        "base", "untrained", "soup", "chain", "task vectors", "low-rank bank", "merge", *(f"teacher {name}" for name in NAMES),
    ]  # fmt: skip
    # The soup as if it were the base: other code computes its figures there.
    model = the_model(made("soup", student, teachers))
    alone = evaluate(lineup_of(student, teachers, model, ()), s)
    assert [f.value for f in rows["soup"].pair.own] == alone.pair.base
    assert [f.value for f in rows["soup"].fid.own] == pytest.approx(alone.fid.base)
    assert rows["soup"].fid.excess.value == pytest.approx(alone.fid.base_excess)
    assert [f.value for f in rows["soup"].eps.own] == pytest.approx(np.mean(alone.eps.base, axis=0), rel=1e-5)
    assert rows["soup"].pair.mean.value == pytest.approx(np.mean(alone.pair.base))
    assert rows["base"].eps_share.mean.value == pytest.approx(1) and rows["base"].pair.own[0].value == e.pair.base[0]
    share = [a.value / b.value for a, b in zip(rows["soup"].eps.own, rows["base"].eps.own)]
    assert [f.value for f in rows["soup"].eps_share.own] == pytest.approx(share)
    assert rows["soup"].eps_share.mean.value == pytest.approx(np.mean(share))
    for row in e.compared:
        assert all(f.spread is not None for f in (row.fid.excess, row.kid.excess, row.pair.mean, row.eps.mean)), (
            row.name
        )
        assert row.fid.floor == e.fid.floor and row.kid.names == NAMES
    assert rows["soup"].fid.m[0] == rows["soup"].fid.m[2], "the same pictures stand for every style"
    assert rows["untrained"].fid.m[0] != rows["untrained"].fid.m[2], "and here each style has its own"


def test_a_teacher_alone_is_perfect_in_its_own_style():
    student, teachers, base = family()
    e = evaluate(lineup_of(student, teachers, base, ("teachers",)), settings(project=6))
    assert e.fid.size == rows_of(e)[f"teacher {NAMES[0]}"].fid.size == 6
    for i, name in enumerate(NAMES):
        row = rows_of(e)[f"teacher {name}"]
        assert (
            row.pair.own[i].value
            == row.eps.own[i].value
            == row.fid.own_excess[i].value
            == row.kid.own_excess[i].value
            == 0
        )
        assert row.fid.own_excess[i].spread == 0
        for j in range(3):
            if j != i:
                assert row.pair.own[j].value > 0.01 and row.eps.own[j].value > 0
                assert row.fid.own[j].value == e.fid.floor[i][j]


def test_a_full_bank_is_the_teachers():
    """With everyone reading the same words, a bank of full rank scores no excess at all, and less than full some."""
    words = torch.randn(len(PROMPTS), 7, SMALL.context_dim, generator=torch.Generator().manual_seed(1))
    student, teachers, base = family(words=words)
    e = evaluate(lineup_of(student, teachers, base, ("low-rank",), rank=FULL), settings())
    row = rows_of(e)["low-rank bank"]
    assert row.fid.m == e.fid.floor and row.fid.excess.value == row.fid.leak.value == row.kid.excess.value == 0
    assert [f.value for f in (*row.pair.own, *row.eps.own)] == [0] * 6
    both = lineup_of(student, teachers, base, ("soup", "low-rank"), rank=2)
    others = rows_of(evaluate(both, settings(metrics=("pair", "eps"))))
    less, soup_of = others["low-rank bank"], others["soup"]
    assert both.others[1].finish.__self__._soup is None, "the bank's soup is not kept"
    assert 0 < less.eps.mean.value < soup_of.eps.mean.value and less.pair.mean.value > 0


def test_the_student_also_is_the_student(tmp_path):
    """Its row by ``another_student`` has the student's figures; another one with the styles in another order is read by name."""
    student, teachers, base = family()
    who = ModelRef.of(student, len(PROMPTS))
    e = evaluate(
        lineup_of(student, teachers, base, (), others=[another_student("again", who, NAMES, NAMES)]),
        settings(),
        folder=tmp_path,
    )
    row = rows_of(e)["again"]
    assert row.fid == e.fid or dataclasses.replace(row.fid, base=e.fid.base, base_excess=e.fid.base_excess) == e.fid
    assert row.pair.own == e.pair.own and row.pair.mean == e.pair.mean
    assert row.eps == e.eps.own and row.eps_share == e.eps.own_share
    turned = dataclasses.replace(student)
    turned.unet = UNet(student.unet.config).requires_grad_(False)
    turned.unet.load_state_dict(student.unet.state_dict())
    turned.unet.model_embedding.weight.copy_(student.unet.model_embedding.weight.flip(0))
    other = another_student("turned", ModelRef.of(turned, len(PROMPTS)), NAMES[::-1], NAMES)
    e = evaluate(
        lineup_of(student, teachers, base, (), others=[other]), settings(metrics=("pair", "eps")), folder=tmp_path
    )
    assert [f.value for f in rows_of(e)["turned"].pair.own] == pytest.approx([f.value for f in e.pair.own], abs=1e-4)
    with pytest.raises(ValueError, match=f"'short' has no style called '{NAMES[2]}'"):
        another_student("short", who, NAMES[:2], NAMES)
    assert another_student("plain", ModelRef.of(base, len(PROMPTS)), [], NAMES).painters[0][1] is None


def test_the_scale_is_chosen_on_pictures_of_its_own():
    """Its seeds lie beside those of both batches. The errors are those of a recomputation; the least wins, and is in the report."""
    student, teachers, base = family()
    s, seen = settings(metrics=("eps",), bins=2), []
    tuning = made("task-vectors", student, teachers, base).tuning
    apart = Tuning.settings(s)
    theirs, first = range(apart.seed, apart.seed + apart.count), range(s.seed, s.seed + 100_000)
    assert theirs.start == s.seed + TUNING_BATCH and not {*theirs} & {*first}
    assert not {*theirs} & {k + SECOND_BATCH for k in first}
    work = WorkCounter(1, lambda *a: seen.append(a))
    found = tuning.settle(ModelRunner(PROMPTS, s, folder=None, device=CPU, work=work), "task vectors")
    assert work.done == tuning.work(s) and found.name == "task vectors"
    runner = ModelRunner(PROMPTS, apart, folder=None, device=CPU, work=WorkCounter(1, None))
    errors = {}
    for scale in tuning.scales:
        model, total = the_model(tuning.merged(scale)), 0.0
        for teacher in teachers:
            with runner.loaded(ref := ModelRef.of(teacher, len(PROMPTS))) as load:
                asked = noised(runner, runner.paint(ref, load), False)
            ours = model.unet(asked.x_t, asked.t, model.contexts[asked.rows])
            want = teacher.unet(asked.x_t, asked.t, teacher.contexts[asked.rows])
            total += (ours - want).square().mean().item() / 3
        errors[scale] = total
    tried = {one["scale"]: one["eps_error"] for one in found.about["tried"]}
    assert tried == pytest.approx(errors, rel=1e-3) and found.about["scale"] == min(errors, key=errors.get)
    assert {1 / 3, 1.0} <= set(tried)
    assert found.key == tuning.merged(found.about["scale"]).key


def test_it_goes_on_where_it_stopped(tmp_path, everything):
    """Everything is kept in parts; a bar that ends where it said; with everything there no model is read."""
    (student, teachers, base), whole = everything
    s, seen = settings(), []
    evaluate(lineup_of(student, teachers, base), s, folder=tmp_path, progress=lambda *a: seen.append(a[:2]))
    assert seen == sorted(seen) and seen[-1] == (seen[0][1], seen[0][1])
    assert sum(done == total for done, total in seen) == 1, "not before the end"
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    def fail():
        raise AssertionError("a model was read again")

    again = lineup_of(student, teachers, base)
    for one in again.others:
        for ref, _ in one.painters:
            ref.open = fail
    for ref in (again.student, again.base, *again.teachers):
        ref.open = fail
    e = evaluate(again, s, folder=tmp_path)
    assert as_json(e) == as_json(whole) and {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == kept
    # Another teacher in third place is another soup, and the first two paint what they painted.
    torch.manual_seed(99)
    changed = [*teachers[:2], dataclasses.replace(teachers[2], unet=UNet(SMALL))]
    a, b = (lineup_of(student, those, base) for those in (teachers, changed))
    for x, y in zip(a.others, b.others):
        if x.painters:
            same = x.name in ("untrained", f"teacher {NAMES[0]}", f"teacher {NAMES[1]}")
            assert (x.key == y.key) is same, x.name


def test_eps_errors_have_the_spread_of_repeated_experiments():
    """Closed forms against 4000 draws: errors that rise with t, of two models that share their noise (10%)."""
    bins, per_bin, draws = 4, 3, 4000
    g = torch.Generator().manual_seed(0)
    level = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(per_bin)
    shared = torch.rand(draws, 1, bins * per_bin, generator=g)
    base = level * (1 + shared) * (1 + 0.2 * torch.rand(draws, 2, bins * per_bin, generator=g))
    student = 0.3 * level * (1 + shared) * (1 + 0.2 * torch.rand(draws, 2, bins * per_bin, generator=g))
    values, spreads, ratios, ratio_spreads, means, mean_spreads = [], [], [], [], [], []
    for x, b in zip(student, base):
        own, share = eps_per_style(["a", "b"], bins, x, b)
        values.append(own.own[0].value), spreads.append(own.own[0].spread)
        means.append(own.mean.value), mean_spreads.append(own.mean.spread)
        ratios.append(share.mean.value), ratio_spreads.append(share.mean.spread)
    for found, said in ((values, spreads), (means, mean_spreads), (ratios, ratio_spreads)):
        assert np.sqrt(np.mean(np.square(said))) == pytest.approx(np.std(found), rel=0.1)
    assert np.std(ratios) / np.mean(ratios) < 0.5 * np.std(values) / np.mean(values), "a ratio keeps what both share"
    assert stratified_error(torch.ones(2, 5), 5) == [None, None]


# --- files and refusals -----------------------------------------------------------------------------------------------


def test_the_report_has_the_table(tmp_path, everything):
    _, e = everything
    files = {p.name for p in write(e, tmp_path)}
    assert {"pair-compared.png", "eps-compared.png"} <= files
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    block = text.split("## Beside other models")[1].split("\n## ")[0]
    lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 1 + len(e.compared)
    heads = [cell.strip() for cell in lines[0].split("|")]
    for head in (
        "FID_t",
        "EXCESS",
        "LEAK",
        "worst style",
        "KID EXCESS",
        "PAIR",
        "worst PAIR",
        "eps error",
        "of the base's",
    ):
        assert head in heads
    soup_line = next(line for line in lines if line.startswith("| soup"))
    row = rows_of(e)["soup"]
    assert (
        row.pair.mean.text(3) in soup_line
        and f"{100 * row.eps_share.mean.value:.1f}" in soup_line
        and soup_line.count("±") == 9
    )
    assert f"lambda = {rows_of(e)['task vectors'].about['scale']:.3f}" in block
    assert (
        "3 adapters, not one model" in block
        and f"3 x {rows_of(e)['low-rank bank'].about['adapter_parameters']:,}" in block
    )
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in found["compared"]] == [row.name for row in e.compared]
    said = found["compared"][2]
    assert said["fid"]["excess"]["value"] == row.fid.excess.value and len(said["eps"]["mean"]["interval"]) == 2
    assert set(found["members"]) >= {"student", "base", "soup", "task vectors", "low-rank bank", f"teacher {NAMES[0]}"}


def test_without_features_or_a_base_there_is_still_a_table():
    student, teachers, _ = family()
    who, all_of = ModelRef.of(student, len(PROMPTS)), refs(teachers)
    others = make_baselines(("soup",), who, NAMES, all_of, base=None)
    e = evaluate(Lineup(who, NAMES, all_of, PROMPTS, others=others), settings(metrics=("pair",), resamples=0))
    text = markdown(e)
    assert "## Beside other models" in text and "| soup |" in text and "FID" not in text and "±" not in text
    assert "## Beside" not in markdown(evaluate(Lineup(who, NAMES, all_of, PROMPTS), settings(metrics=("pair",))))


def test_names_of_baselines():
    assert choose_baselines("all") == BASELINES and choose_baselines(" teachers, soup ") == ("soup", "teachers")
    for text in ("", "soup,salad", ","):
        with pytest.raises(ValueError, match="unknown baselines.*choose from base, untrained, soup"):
            choose_baselines(text)


def test_what_cannot_be_made_is_refused_by_name():
    student, teachers, base = family()
    who, all_of, first = ModelRef.of(student, len(PROMPTS)), refs(teachers), ModelRef.of(base, len(PROMPTS))
    for name in NEED_BASE:
        with pytest.raises(
            ValueError, match=f"{name}: needs the base model.*Possible here: soup, chain, low-rank, teachers"
        ):
            make_baselines([name], who, NAMES, all_of, base=None)
    mixed = refs([*teachers[:2], dataclasses.replace(teachers[2], prediction="v")])
    assert set(obstacles(mixed, first)) == {"soup", "chain", "task-vectors", "low-rank", "merge"}
    with pytest.raises(
        ValueError, match=rf"soup, chain: weights that predict different things.*'{NAMES[2]}' predict v"
    ):
        make_baselines(["soup", "chain"], who, NAMES, mixed, base=first)
    assert len(make_baselines(["teachers", "untrained"], who, NAMES, mixed, base=first)) == 4
    all_v = refs([dataclasses.replace(one, prediction="v") for one in teachers])
    assert set(obstacles(all_v, first)) == {"task-vectors", "merge"}, "the base predicts eps"
    assert the_model(make_baselines(["soup"], who, NAMES, all_v, base=first)[0]).prediction == "v"
    with pytest.raises(ValueError, match="rank is 0"):
        make_baselines(["low-rank"], who, NAMES, all_of, base=first, rank=0)
    again = [Contender("soup", ((first, None),)), *make_baselines(["soup"], who, NAMES, all_of, base=first)]
    with pytest.raises(ValueError, match="two models to compare have one name"):
        evaluate(Lineup(who, NAMES, all_of, PROMPTS, others=again), settings(metrics=("pair",)))
    small = ModelRef.of(plain("small", 1, dataclasses.replace(SMALL, model_channels=32)), len(PROMPTS))
    with pytest.raises(ValueError, match="another architecture.*'small'"):
        evaluate(
            Lineup(who, NAMES, all_of, PROMPTS, others=[Contender("x", ((small, None),))]), settings(metrics=("pair",))
        )
