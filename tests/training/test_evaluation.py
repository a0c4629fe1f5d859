"""An evaluation from models to figures, on small random models: who paints what, what the figures are, refusals, resuming, files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.sampling import cfg_denoiser, host_noise, sample, sigmas_for
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import UNet, init_style
from comfyui_dmm.training.evaluation.agreement import noised, pair
from comfyui_dmm.training.evaluation.distances import resample
from comfyui_dmm.training.evaluation.evaluate import Lineup, evaluate
from comfyui_dmm.training.evaluation.features import FeatureNet, PixelDecoder
from comfyui_dmm.training.evaluation.identify import Verdict, identify
from comfyui_dmm.training.evaluation.model_ref import ModelRef
from comfyui_dmm.training.evaluation.model_runner import ModelRunner
from comfyui_dmm.training.evaluation.report import as_json, markdown, write
from comfyui_dmm.training.evaluation.settings import SECOND_BATCH, EvaluationSettings
from comfyui_dmm.training.evaluation.work_counter import WorkCounter
from comfyui_dmm.training.paint.heatmap import colour_of, heatmap, side_by_side
from comfyui_dmm.training.teachers.teacher import Teacher
from PIL import Image
from torch import nn

from .families import SMALL, SMALL_XL, small_data, small_teacher

NAMES = ["ink", "p|pe\\n", "echo"]
PROMPTS = ["", "a star", "a fish", "a cat", "a house"]
SIZE = 64
TINY = {
    "count": 20, "width": SIZE, "height": SIZE, "steps": 2, "cfg": 2.0, "resamples": 4, "bins": 3, "bin_samples": 2, "own_pictures": 2,
    "own_draws": 3,
}  # fmt: skip
CPU = torch.device("cpu")


def settings(**changes) -> EvaluationSettings:
    return EvaluationSettings(**{**TINY, **changes})


def dmm(config=SMALL, styles=3, prediction="eps") -> Teacher:
    """A random DMM model whose styles show."""
    torch.manual_seed(5)
    unet = UNet(dataclasses.replace(config, num_styles=styles)).requires_grad_(False)
    init_style(unet, torch.Generator().manual_seed(5))
    unet.style_mlp.linear_2.weight *= 60
    plain = small_teacher("student", 5, small_data(4), config)
    rows = torch.arange(len(PROMPTS)) % len(plain.contexts)
    pooled = None if plain.pooled is None else plain.pooled[rows]
    return Teacher("student", unet, torch.randn(len(PROMPTS), 7, config.context_dim), pooled, prediction)


def plain(name: str, seed: int, config=SMALL, prediction="eps") -> Teacher:
    torch.manual_seed(seed)
    contexts = torch.randn(len(PROMPTS), 7, config.context_dim)
    pooled = torch.randn(len(PROMPTS), config.adm_channels - 6 * 256) if config.adm_channels else None
    return Teacher(name, UNet(config), contexts, pooled, prediction)


def refs(teachers) -> list[ModelRef]:
    return [ModelRef.of(teacher, len(PROMPTS)) for teacher in teachers]


def as_pixels(latents):
    return nn.functional.interpolate(latents[:, :3].clamp(-1, 1), scale_factor=8.0, mode="nearest")


DECODER = PixelDecoder(as_pixels, "upsampled")


def small_features() -> FeatureNet:
    """Twelve means of regions: enough to tell pictures apart."""
    pool = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten()).requires_grad_(False)
    pool[0].weight.copy_(torch.eye(3)[..., None, None])
    return FeatureNet("regions", 12, 32, "regions", pool, pool)


def lineup(student=None, teachers=None, base=None, **changes) -> Lineup:
    student = student or dmm()
    teachers = teachers or [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    own = {"decoder": DECODER, "features": small_features(), **changes}
    return Lineup(
        ModelRef.of(student, len(PROMPTS)),
        NAMES,
        refs(teachers),
        PROMPTS,
        base and ModelRef.of(base, len(PROMPTS)),
        **own,
    )


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teachers_scores_the_floor():
    """The teachers are the student's own styles: no excess, no leak, no distance from the same noise, no eps error; all exactly."""
    student = dmm()
    teachers = [student.as_style(i, StyleInfo(name)) for i, name in enumerate(NAMES)]
    e = evaluate(lineup(student, teachers), settings())
    for d in (e.fid, e.kid):
        assert d.m == d.floor and d.excess.value == d.leak.value == 0 and d.count == 20 and d.size == 12
    assert [f.value for f in e.pair.own] == [0, 0, 0] and min(e.pair.other_seed) > 0.1
    assert e.pair.table[0][1] > 0.01, "styles differ"
    assert np.abs(np.array(e.eps.errors)).max() == 0 and len(e.eps.errors) == 3
    assert [sum(row) for row in e.own.counts] == [2, 2, 2] and e.own.candidates == [*NAMES, "none"]


def test_the_right_style_meets_the_right_teacher():
    """Teachers in another order than the styles, and only two of them: by name. Shuffled names raise the diagonal."""
    student = dmm()
    styles = [student.as_style(i, StyleInfo(name)) for i, name in enumerate(NAMES)]
    e = evaluate(lineup(student, [styles[2], styles[0]]), settings(metrics=("fid", "pair")))
    assert e.names == [NAMES[2], NAMES[0]] and e.fid.excess.value == 0 and e.eps is e.own is e.kid is None
    swapped = [dataclasses.replace(styles[0], name=NAMES[2]), dataclasses.replace(styles[2], name=NAMES[0])]
    wrong = evaluate(lineup(student, swapped), settings(metrics=("fid", "pair")))
    assert wrong.fid.excess.value > 0 and min(f.value for f in wrong.pair.own) > 0.01


def test_the_base_is_a_baseline():
    """A student whose first teacher is the base itself: there the base has no distance left."""
    base = plain("base", 7)
    teachers = [dataclasses.replace(base, name=NAMES[0]), plain(NAMES[1], 2)]
    e = evaluate(lineup(dmm(), teachers, base), settings(metrics=("kid", "pair", "eps")))
    assert e.pair.base[0] == 0 and e.pair.base[1] > 0.01
    assert [row[0] for row in e.eps.base] == [0, 0, 0] and e.eps.base[0][1] > 0
    assert e.kid.base[0] == pytest.approx(e.kid.floor[0][0]) and e.kid.base[1] == pytest.approx(e.kid.floor[0][1])
    # What is left of the base's error, over the second style's own sums.
    assert e.eps.share[1] == pytest.approx(sum(r[1] for r in e.eps.errors) / sum(r[1] for r in e.eps.base), rel=1e-5)


@pytest.mark.parametrize(("config", "prediction"), [(SMALL, "eps"), (SMALL, "v"), (SMALL_XL, "eps")])
def test_pictures_are_those_of_one_prompt_and_one_seed_each(config, prediction):
    """Each picture alone, with the noise of its own seed, against the batch: float16 of values of order 1."""
    student, s = dmm(config, prediction=prediction), settings(count=3, seed=11, steps=3)
    runner = ModelRunner(PROMPTS, s, folder=None, device=CPU, work=WorkCounter(1, None))
    with runner.loaded(ModelRef.of(student, len(PROMPTS))) as load:
        got = runner.paint(ModelRef.of(student, len(PROMPTS)), load, 1, second=True)
    row = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    for k in range(3):
        prompt = torch.tensor([1 + k])
        (context, y), (empty, empty_y) = (student.conditioning(r, (8, 8), CPU) for r in (prompt, torch.tensor([0])))
        schedule = NoiseSchedule()
        denoiser = cfg_denoiser(
            student.unet, schedule, context, empty, cfg=2.0, style=row, y=y, uncond_y=empty_y, prediction=prediction
        )
        noise = host_noise((1, 4, 8, 8), 11 + k + SECOND_BATCH)
        want = sample(denoiser, schedule, noise, sigmas_for(schedule, 3, "karras"))
        torch.testing.assert_close(got[k : k + 1].float(), want, atol=4e-3, rtol=4e-3)


def test_prompts_come_in_turn_and_batches_of_any_size_paint_the_same():
    ref = ModelRef.of(dmm(), len(PROMPTS))
    painted = []
    for batch in (0, 3):
        runner = ModelRunner(
            PROMPTS, settings(count=6, batch_size=batch), folder=None, device=CPU, work=WorkCounter(1, None)
        )
        assert runner.rows(range(6)).tolist() == [1, 2, 3, 4, 1, 2]
        with runner.loaded(ref) as load:
            painted.append(runner.paint(ref, load, 0))
    torch.testing.assert_close(*painted, atol=4e-3, rtol=4e-3)


def test_memory_that_runs_out_halves_the_batch():
    runner = ModelRunner(PROMPTS, settings(batch_size=8), folder=None, device=CPU, work=WorkCounter(1, None))
    asked = []

    def work(part: slice) -> torch.Tensor:
        asked.append(part.stop - part.start)
        if asked[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return torch.arange(part.start, part.stop)

    assert runner.split(work, 7).tolist() == list(range(7)) and asked == [7, 4, 2, 2, 2, 1] and runner.batch == 2


# --- figures without features -----------------------------------------------------------------------------------------


def test_pair_is_the_error_over_the_teachers_variance():
    """numpy, also of a resample as rows repeated (1e-9). Two draws of one distribution give 2."""
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 9, 4, 3, 3, generator=g) * 2 + 1
    weights = torch.cat([torch.ones(1, 9, dtype=torch.float64), resample(9, 2, 0)])
    for weight, got in zip(weights, pair(z, t, weights).tolist()):
        copies = np.repeat(np.arange(9), weight.long().numpy())
        a, b = z.double().numpy()[copies], t.double().numpy()[copies]
        assert got == pytest.approx(((a - b) ** 2).mean() / b.var(0, ddof=1).mean(), abs=1e-9)
    z, t = torch.randn(2, 4000, 1, 2, 2, generator=g)
    assert pair(z, t, torch.ones(1, 4000, dtype=torch.float64)).item() == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_eps_errors_are_in_eps_over_timesteps(prediction):
    """From the networks' own outputs, one sample at a time: rtol 1e-3."""
    student, teacher = dmm(), plain(NAMES[0], 1, prediction=prediction)
    s = settings(metrics=("eps",))
    e = evaluate(lineup(student, [teacher]), s)
    runner = ModelRunner(PROMPTS, s, folder=None, device=CPU, work=WorkCounter(1, None))
    with runner.loaded(ref := ModelRef.of(teacher, len(PROMPTS))) as load:
        asked = noised(runner, runner.paint(ref, load), False)
    assert asked.t.tolist() == [83, 250, 416, 583, 750, 916]
    abar = NoiseSchedule().alphas_cumprod.double()
    for k, t in enumerate(asked.t.tolist()):
        x, row = asked.x_t[k : k + 1], asked.rows[k : k + 1]
        ours = student.unet(x, asked.t[k : k + 1], student.contexts[row], style=torch.tensor([[1.0, 0, 0, 1]]))
        theirs = teacher.unet(x, asked.t[k : k + 1], teacher.contexts[row])
        if prediction == "v":  # v = sqrt(abar) eps - sqrt(1 - abar) x0, solved for eps with x_t
            theirs = (1 - abar[t]).sqrt() * x + abar[t].sqrt() * theirs
        if k % 2 == 0:
            total = 0.0
        total += ((ours - theirs) ** 2).mean().item() / 2
        if k % 2:
            assert e.eps.errors[k // 2][0] == pytest.approx(total, rel=1e-3)


def test_identify_asks_what_it_says():
    """Every error recomputed one by one with the noise equation written out (1e-4); all styles see the same (t, eps)."""
    student = dmm()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    rows, seen = torch.tensor([2, 0]), []
    handle = student.unet.register_forward_pre_hook(
        lambda m, a, kw: seen.append((a[0], a[1], kw["style"])), with_kwargs=True
    )
    verdicts = identify(student, NAMES, latents, rows, draws=3, seed=1, batch=5)
    handle.remove()
    x_t, t, style = (torch.cat(v).unflatten(0, (2, 3, 4)) for v in zip(*seen))  # (pictures, draws, candidates, ...)
    assert (x_t == x_t[:, :, :1]).all() and (t == t[:1, :, :1]).all()
    assert 50 <= t.min() < 350 <= 650 <= t.max() < 950
    assert torch.equal(style[0, 0], torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]))
    abar = NoiseSchedule().alphas_cumprod
    for p, verdict in enumerate(verdicts):
        assert verdict.names == [*NAMES, "none"] and verdict.errors.shape == (3, 4)
        for k in range(3):
            a = abar[t[p, k, 0]]
            eps = (x_t[p, k, 0] - a.sqrt() * latents[p]) / (1 - a).sqrt()
            for i in range(4):
                out = student.unet(
                    x_t[p, k, i][None], t[p, k, i][None], student.contexts[rows[p]][None], style=style[p, k, i][None]
                )
                assert verdict.errors[k, i].item() == pytest.approx(((out[0] - eps) ** 2).mean().item(), rel=2e-3)


def test_a_verdict_is_the_lowest_error_and_knows_how_sure_it_is():
    errors = torch.tensor([[1.0, 0.5, 2.0], [2.0, 1.5, 1.0], [3.0, 2.4, 9.0], [1.0, 0.6, 4.0]])
    v = Verdict(["a", "b", "none"], errors)
    assert v.name == "b" and v.order == [1, 0, 2]
    d = np.array([0.5, 0.5, 0.6, 0.4])
    assert v.z(0) == pytest.approx(d.mean() / (d.std(ddof=1) / 2), rel=1e-5) and v.confidence == "sure"
    assert Verdict(["a", "b"], torch.tensor([[1.0, 1.2], [1.0, 0.9]])).confidence == "unsure"
    assert v.text().splitlines()[0] == "b (sure, before a)" and "none" in v.text().splitlines()[-1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def untouchable(lineup: Lineup) -> Lineup:
    def fail():
        raise AssertionError("a model was loaded before the settings were checked")

    everyone = [lineup.student, *lineup.teachers]
    for ref in everyone:
        ref.open = fail
    return lineup


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 12}, "at least 13 pictures a style, 12 are asked for"),
        ({"project": 13}, "project is 13: the network has 12 features"),
        ({"count": 6, "project": 6}, "at least 7 pictures"),
        ({"width": 60}, "width is 60: for these models it must be a multiple of 16"),
        ({"metrics": ("fid", "lpips")}, "unknown metrics lpips"),
        ({"metrics": ()}, "unknown metrics"),
        ({"own_draws": 1}, "own_draws is 1"),
        ({"steps": 1001}, "steps is 1001"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"sampler": "magic"}, "sampler is 'magic': choose one of dpmpp_2m"),
        ({"precision": "fp8"}, "precision is 'fp8': choose one of auto"),
        ({"seed": -1}, "seed is -1"),
        ({"bins": 1001}, "bins is 1001"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(untouchable(lineup()), settings(**changes), folder=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_few_pictures_do_for_fewer_features_and_for_kid():
    e = evaluate(lineup(), settings(count=6, project=5, metrics=("fid",)))
    assert e.fid.size == 5 and e.fid.count == 6 and e.features["project"] == 5
    assert evaluate(lineup(), settings(count=6, metrics=("kid",))).kid.size == 12


def test_who_does_not_belong_is_refused():
    other = dataclasses.replace(SMALL, model_channels=32)
    for changes, message in (
        ({"teachers": [plain("oil", 1)]}, "no style of the student is called 'oil'.*ink"),
        ({"teachers": [plain("ink", 1), plain("ink", 2)]}, "named twice"),
        ({"teachers": [plain("ink", 1, other)]}, "another architecture"),
        ({"teachers": [dataclasses.replace(plain("ink", 1), zero_snr=True)]}, "another noise schedule"),
        ({"decoder": None}, "need a VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(untouchable(lineup(**changes)), settings())
    with pytest.raises(ValueError, match="fid, kid need a feature network"):
        evaluate(untouchable(lineup(features=None)), settings())
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(dataclasses.replace(untouchable(lineup()), prompts=[""]), settings())


def test_a_teacher_that_paints_nan_is_named():
    bad = plain(NAMES[1], 2)
    bad.unet.out[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="paints NaN"):
        evaluate(lineup(teachers=[plain(NAMES[0], 1), bad]), settings(metrics=("pair",)))


# --- going on ---------------------------------------------------------------------------------------------------------


class Enough(BaseException):
    pass


def test_an_interrupted_evaluation_goes_on(tmp_path):
    whole, seen = evaluate(lineup(), settings()), []

    def stop(done, total, what):
        seen.append((done, total))
        if len(seen) == 5:
            raise Enough

    with pytest.raises(Enough):
        evaluate(lineup(), settings(), folder=tmp_path, progress=stop)
    first = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert first and not any(name.endswith(".tmp") for name in first)
    damaged = sorted(first)[0]
    (tmp_path / damaged).write_bytes(b"damaged")
    seen.clear()
    again = evaluate(lineup(), settings(), folder=tmp_path, progress=lambda *a: seen.append(a[:2]))
    assert as_json(again) == as_json(whole)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert [name for name in first if kept[name] != first[name]] == [damaged]
    assert seen == sorted(seen) and seen[-1] == (seen[0][1], seen[0][1]), "the bar ends where it said it would"
    # With everything there, no model is needed, and no file is written.
    assert as_json(evaluate(untouchable(lineup()), settings(), folder=tmp_path)) == as_json(whole)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == kept


def test_what_changes_is_painted_anew_and_nothing_else(tmp_path):
    only = settings(metrics=("pair",), count=4)
    evaluate(lineup(), only, folder=tmp_path)
    before = set(tmp_path.iterdir())
    assert len(before) == 9  # three models, two batches each of the teachers'
    for changes, new in (({"steps": 3}, 9), ({"seed": 1}, 9), ({"resamples": 9}, 0), ({"cfg": 3.0}, 9)):
        evaluate(lineup(), dataclasses.replace(only, **changes), folder=tmp_path)
        after = set(tmp_path.iterdir())
        assert len(after - before) == new, changes
        before = after
    teachers = [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    teachers[1] = plain(NAMES[1], 99)
    evaluate(lineup(teachers=teachers), only, folder=tmp_path)
    assert len(set(tmp_path.iterdir()) - before) == 2
    before = set(tmp_path.iterdir())
    evaluate(dataclasses.replace(lineup(), prompts=["", "another", *PROMPTS[2:]]), only, folder=tmp_path)
    assert len(set(tmp_path.iterdir()) - before) == 9, "other words under the same states are other prompts"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_report_says_it_all(tmp_path):
    e = evaluate(lineup(base=plain("base", 7)), settings())
    e.about = {"title": "a | b"}
    files = write(e, tmp_path)
    names = {p.name for p in files}
    assert names == {
        "evaluation.json", "evaluation.md", "fid.png", "fid-floor.png", "kid.png", "kid-floor.png", "pair.png", "eps.png", "own.png",
    }  # fmt: skip
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert found["fid"]["m"] == e.fid.m and found["settings"]["count"] == 20 and found["fid"]["worst"] in NAMES
    low, high = found["fid"]["excess"]["interval"]
    assert (low + high) / 2 == pytest.approx(e.fid.excess.value)
    assert set(found["members"]) == {"student", "base", *(f"teacher {n}" for n in NAMES)}
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "EXCESS" in text and "LEAK" in text and "n = 20" in text and "p\\|pe" in text
    for line in text.splitlines():  # a name's bar would make a column of its own
        if line.startswith("| p\\|pe") and "±" in line:
            assert line.replace("\\|", "").count("|") == text.split("## Per style")[1].split("\n")[2].count("|")


def test_figures_that_are_none_leave_no_hole(tmp_path):
    e = evaluate(
        lineup(teachers=[plain(NAMES[0], 1)], features=None, decoder=None), settings(metrics=("pair",), resamples=0)
    )
    text = markdown(e)
    assert "PAIR" in text and "FID" not in text and "±" not in text
    json.dumps(as_json(e), allow_nan=False)
    assert [p.name for p in write(e, tmp_path)] == ["evaluation.json", "evaluation.md", "pair.png"]


def test_a_heatmap_is_dark_where_numbers_are_high():
    picture = heatmap(
        [[0.0, 5.0], [10.0, None]], ["a", "a rather long name of a style"], ["x", "y"], "title", note="note"
    )
    assert picture.width > 2 * 74
    pixels = np.asarray(picture)
    for value, share in ((0.0, 0), (5.0, 0.5), (10.0, 1)):
        assert (pixels == colour_of(share)).all(-1).sum() > 500, value
    assert [sum(colour_of(i / 20)) for i in range(21)] == sorted(
        (sum(colour_of(i / 20)) for i in range(21)), reverse=True
    )
    pixels = np.asarray(heatmap([[0.0, 0.0], [10.0, None]], ["a", "b"], ["x", "y"], "t"))
    low, high = ((pixels == colour_of(share)).all(-1).sum() for share in (0, 1))
    assert low > 1.6 * high, "two cells are low, one is high"
    with pytest.raises(ValueError, match="labels"):
        heatmap([[1.0]], ["a"], ["x", "y"], "t")


def test_pictures_stand_side_by_side():
    """Every one whole, whatever its size."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(((30, 10), (20, 40), (50, 20)), colours)]
    pixels = np.asarray(side_by_side(pictures))
    for picture, colour in zip(pictures, colours):
        ys, xs = (pixels == colour).all(-1).nonzero()
        assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == picture.size and len(xs) == picture.width * picture.height
