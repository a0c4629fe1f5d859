"""Style mixing, judged: figures of curves that are known, who paints what on the way, and what is refused or goes on."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.sampling import cfg_denoiser, host_noise, sample, sigmas_for
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.style_value import Blend, mix, style_rows, vocabulary
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.training.evaluation.evaluate import evaluate
from comfyui_dmm.training.evaluation.features import FeatureNet, PixelDecoder
from comfyui_dmm.training.evaluation.identify import identify
from comfyui_dmm.training.evaluation.mixing.figures import (
    FIGURES,
    Observations,
    figures,
    layout_distances,
    mean_of,
    path_difference,
    spearman,
    weights_of,
)
from comfyui_dmm.training.evaluation.mixing.judge_mixing import MixingLineup, judge_mixing
from comfyui_dmm.training.evaluation.mixing.judges import caption_truth, wins
from comfyui_dmm.training.evaluation.mixing.mixers import blended, merged
from comfyui_dmm.training.evaluation.mixing.report import COLOURS, figure_text, markdown, plots, write
from comfyui_dmm.training.evaluation.model_ref import ModelRef
from comfyui_dmm.training.evaluation.model_runner import ModelRunner
from comfyui_dmm.training.evaluation.report import as_json
from comfyui_dmm.training.evaluation.work_counter import WorkCounter
from comfyui_dmm.training.teachers.teacher import Teacher
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from .families import SMALL
from .test_evaluation import CPU, DECODER, NAMES, PROMPTS, Enough, as_pixels, dmm, plain, refs, settings
from .test_evaluation import lineup as evaluation_lineup

W5 = [0.0, 0.25, 0.5, 0.75, 1.0]
ONCE = torch.ones(1, 1, dtype=torch.float64)


def observations(scores, **other) -> Observations:
    scores = torch.tensor(np.array(scores), dtype=torch.float32)
    nothing = torch.zeros_like(scores)
    return Observations(scores, **{"neither": nothing, "to_first": nothing, "to_second": nothing, **other})


def of_curve(values, ratios) -> dict[str, float]:
    return {name: v.item() for name, v in figures(observations([values]), ratios, ONCE).items()}


# --- figures of known curves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5, 9])
def test_a_straight_line_is_what_a_slider_promises(count):
    """Spearman 1, no fall, 10% to 90% over 0.8 of the ratios, half at 0.5, whatever the ends' values: 1e-6."""
    w = np.linspace(0, 1, count)
    for low, high in ((0, 1), (0.3, 0.7)):
        f = of_curve(low + (high - low) * w, w.tolist())
        assert f["reach"] == pytest.approx(high - low, abs=1e-6) and f["spearman"] == pytest.approx(1)
        assert f["width"] == pytest.approx(0.8, abs=1e-6) and f["half"] == pytest.approx(0.5, abs=1e-6)
        assert f["fall"] == 0 and f["monotone"] == 1


def test_steps_and_late_curves():
    """A sigmoid on a fine grid has the closed width 2 ln 9 / k (to 1e-3); a step between two ratios has 0.8 of their distance."""
    w, k, centre = np.linspace(0, 1, 1001), 30, 0.7
    f = of_curve(1 / (1 + np.exp(-k * (w - centre))), w.tolist())
    assert f["width"] == pytest.approx(2 * math.log(9) / k, abs=1e-3) and f["half"] == pytest.approx(centre, abs=1e-3)
    f = of_curve([0.0, 0.0, 1.0, 1.0, 1.0], W5)
    assert f["width"] == pytest.approx(0.2) and f["half"] == pytest.approx(0.375)


def test_falls_are_found_wherever_they_are():
    f = of_curve([0.0, 0.6, 0.5, 0.2, 1.0], W5)
    assert f["fall"] == pytest.approx(0.4) and f["monotone"] == 0
    assert of_curve([0.0, 0.5, 0.46, 0.8, 1.0], W5)["monotone"] == 1, "a slip of 0.04 is forgiven"
    backwards = of_curve([1.0, 0.7, 0.4, 0.2, 0.0], W5)
    assert backwards["spearman"] == -1 and backwards["reach"] == -1 and backwards["fall"] == 1
    assert math.isnan(backwards["width"]) and math.isnan(backwards["half"])


def test_a_flat_curve_has_no_way():
    """Equal but for rounding (1e-4): no correlation, no transition, but all monotone."""
    f = of_curve([0.5, 0.50005, 0.5001, 0.50015, 0.5002], W5)
    assert f["spearman"] == 0 and f["monotone"] == 1 and math.isnan(f["width"]) and f["fall"] < 2e-4


def test_rank_correlations_are_scipys():
    """Random curves with ties, 1e-9."""
    g = np.random.default_rng(0)
    scores = g.integers(0, 4, (50, 6)) / 10
    w = np.sort(g.uniform(size=6))
    got = spearman(torch.tensor(scores), torch.tensor(w)).tolist()
    assert len(set(scores[0])) < 6
    assert got == pytest.approx([spearmanr(w, row).statistic for row in scores], abs=1e-9)


def test_neither_content_and_layout_are_averages_over_the_path():
    """Uneven ratios: the share of the path is an integral, the others means between the ends. Captions that name nothing do not count."""
    ratios, nan = [0.0, 0.1, 1.0], math.nan
    one = observations(
        [[0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1]],
        neither=torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 0]]),
        content=torch.tensor([[1.0, 0, 1], [1, 1, 0], [nan, nan, nan]]),
        to_first=torch.tensor([[0, 0.3, 1.0], [0, 0.2, 1], [0, 0.1, 1]]),
        to_second=torch.tensor([[1, 0.1, 0.0], [1, 0.4, 0], [1, 0.3, 0]]),
    )
    f = {name: v.item() for name, v in figures(one, ratios, torch.ones(1, 3, dtype=torch.float64)).items()}
    assert f["neither"] == pytest.approx((2 / 3) * 0.5) and f["layout"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert f["content"] == 0.5 and f["kept"] == pytest.approx(0.5 - 0.75)


def test_resamples_draw_prompts():
    """Two pictures of a prompt come and go together; the spread of a mean of n independent numbers is s / sqrt(n) (10%)."""
    weights = weights_of([1, 1, 3, 2, 2, 3], 50, 0)
    assert weights.shape == (51, 6) and (weights[0] == 1).all()
    assert torch.equal(weights[:, [0, 2, 3]], weights[:, [1, 5, 4]]) and (weights[1:].sum(1) == 6).all()
    assert (weights[1:, 0] != weights[1:, 2]).any() and (weights[1:, 2] != weights[1:, 3]).any()
    g = torch.Generator().manual_seed(0)
    score = torch.rand(40, 1, generator=g) * torch.tensor([[0.0, 0.5, 1.0]])
    reach = figures(observations(score.tolist()), [0, 0.5, 1], weights_of(range(40), 4000, 1))["reach"]
    want = score[:, -1].double().std(correction=0).item() / 40**0.5
    assert reach[1:].std().item() == pytest.approx(want, rel=0.1)
    assert weights_of([5, 5, 5], 20, 0)[1:].std() > 0.3, "of one prompt the pictures themselves are drawn"


def test_who_is_better_follows_the_aim():
    w = 0.02 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.cat([torch.zeros(1, dtype=torch.float64), w])
    a, b = 0.8 + noise, 0.6 - noise
    names = ("a", "b")
    assert path_difference(FIGURES["spearman"], names, [a], [b]).better == "a"
    assert path_difference(FIGURES["fall"], names, [a], [b]).better == "b"
    assert path_difference(FIGURES["half"], names, [a], [b]).better == "b", "0.6 is nearer to 0.5"
    assert path_difference(FIGURES["width"], names, [a], [b]).better == "a"
    assert path_difference(FIGURES["width"], names, [a], [b]).difference.value == pytest.approx(-0.2)
    assert path_difference(FIGURES["spearman"], names, [a], [a - 0.001 - noise]).better is None, "within chance"
    # Opposite errors do not cancel in a mean over pairs, and a pair without a number counts for neither.
    nan = torch.full_like(a, math.nan)
    far, good = [a * 0 + 0.2, a * 0 + 0.8, nan], [a * 0 + 0.5, a * 0 + 0.6, a * 0]
    assert path_difference(FIGURES["half"], names, far, good).difference.value == pytest.approx(0.3 - 0.05)
    assert mean_of([nan, a])[0] == pytest.approx(0.8) and mean_of([nan]).isnan().all()


def test_layouts_are_compared_in_cells():
    """numpy: means of 2x2 blocks, over the difference of two strangers; fine detail does not count."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 3, 4, 8, 8, generator=g)
    checker = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    z[:, 1] = z[:, 0] + checker  # the same cells
    z[:, 2] = z[:, 0] + 1
    first, second = layout_distances(z)
    small = z.double().numpy().reshape(6, 3, 4, 4, 2, 4, 2).mean((4, 6)).reshape(6, 3, -1)
    strangers = np.mean(
        [((small[a, e] - small[b, e]) ** 2).mean() for e in (0, 2) for a in range(6) for b in range(6) if a != b]
    )
    assert first[:, 0].abs().max() == 0 and first[:, 1].abs().max() < 1e-10
    assert first[:, 2].numpy() == pytest.approx(np.full(6, 1 / strangers), rel=1e-6)
    assert second[:, 1].numpy() == pytest.approx(np.full(6, 1 / strangers), rel=1e-6)


# --- a painter and a judge of known form ------------------------------------------------------------------------------


class Known(nn.Module):
    """Predicts the noise that leaves a picture whose every number is g = (2 u^2 - 1) / 2, u the second style's share of the code."""

    def __init__(self):
        super().__init__()
        self.config = dataclasses.replace(SMALL, num_styles=3)
        self.nothing = nn.Parameter(torch.zeros(()))
        self.dtype = torch.float32
        self.register_buffer("abar", NoiseSchedule().alphas_cumprod.float())

    def forward(self, x, t, context, y=None, style=None):
        # Sampling asks between whole timesteps; log abar is interpolated as the schedule's log sigma is.
        sigma = NoiseSchedule().sigma_from_t(t.float())[:, None, None, None]
        a = 1 / (1 + sigma**2)
        g = (2 * style[:, 1] ** 2 - 1)[:, None, None, None] / 2
        return (x - a.sqrt() * g) / (1 - a).sqrt()


class Judge(nn.Module):
    """Looks have the logits -4 g, 4 g and 1.1; the shape is a star while g < 0, a fish after."""

    classes = {"look": NAMES, "shape": ["star", "fish"], "colour": ["red", "blue"]}

    def __init__(self):
        super().__init__()
        weights = {"look": [[-4.0], [4.0], [0.0]], "shape": [[-1.0], [1.0]], "colour": [[0.0], [0.0]]}
        self.heads = nn.ModuleDict({name: nn.Linear(1, len(rows)) for name, rows in weights.items()})
        for name, rows in weights.items():
            self.heads[name].weight.data = torch.tensor(rows)
            self.heads[name].bias.data = torch.tensor([0.0, 0.0, 1.1] if name == "look" else [0.0, 0.0])
        self.requires_grad_(False)


def judge() -> FeatureNet:
    network = Judge()
    return FeatureNet("known", 1, 64, "known", network, lambda x: x.mean((1, 2, 3))[:, None])


def test_known_curves_come_out():
    """Through painting, decoding, judging and averaging; pixels have 8 bits, so probabilities are within 0.01."""
    prompts = ["", "a star", "a green cat"]
    teacher = Teacher("student", Known(), torch.zeros(3, 7, SMALL.context_dim))
    lineup = MixingLineup(
        ModelRef("student", "known", lambda: teacher, teacher.unet.config), NAMES, [], prompts, DECODER, judge()
    )
    w = np.linspace(0, 1, 9)
    m = judge_mixing(lineup, settings(count=3), [(NAMES[0], NAMES[1])], w.tolist(), paths=["blend", "predictions"])
    (pair,) = m.pairs
    for path, g in (("blend", (2 * w**2 - 1) / 2), ("predictions", (2 * w - 1) / 2)):
        logits = np.stack([-4 * g, 4 * g, np.full(9, 1.1)])
        p = np.exp(logits) / np.exp(logits).sum(0)
        got = pair.paths[path]
        values = {name: np.array([f.value for f in curve]) for name, curve in got.curves.items()}
        assert values["score"] == pytest.approx(p[1], abs=0.01) and values["away"] == pytest.approx(1 - p[0], abs=0.01)
        assert values["neither"].tolist() == (logits.argmax(0) == 2).tolist()
        if path == "blend":  # where g is 0, the last of 8 bits decides what is seen
            assert values["content"].tolist() == (g < 0).tolist(), "the cat is no shape that the judge knows"
            assert got.figures["content"].value == np.mean(g[1:-1] < 0)
            assert got.figures["kept"].value == pytest.approx(np.mean(g[1:-1] < 0) - 0.5)
        way = (p[1] - p[1][0]) / (p[1][-1] - p[1][0])
        at = {level: np.interp(level, way, w) for level in (0.1, 0.5, 0.9)}
        figures = {name: figure.value for name, figure in got.figures.items()}
        assert figures["reach"] == pytest.approx(p[1][-1] - p[1][0], abs=0.01) and figures["spearman"] == 1
        assert figures["half"] == pytest.approx(at[0.5], abs=0.01)
        assert figures["width"] == pytest.approx(at[0.9] - at[0.1], abs=0.02)
        assert figures["fall"] == 0 and figures["monotone"] == 1
        assert figures["neither"] == pytest.approx(np.convolve(logits.argmax(0) == 2, [0.5, 0.5], "valid") @ np.diff(w))
    assert abs(pair.paths["blend"].figures["half"].value - 0.5) > 0.1, "the two paths differ"
    assert m.captioned == 2, "of a star, a cat, a star"
    assert all(f.spread == 0 for f in pair.paths["blend"].curves["score"]), "all pictures are one"
    assert m.against["predictions"]["half"].better == "predictions"


def test_captions_are_read_for_shape_and_colour():
    network = judge()
    assert caption_truth("a red star, hills", network) == [("shape", 0), ("colour", 0)]
    assert caption_truth("A Blue thing", network) == [("colour", 1)]
    assert caption_truth("a starry cat", network) is None and caption_truth("a star and a fish", network) is None


# --- who paints what --------------------------------------------------------------------------------------------------


def mixing_lineup(student=None, teachers=None, **changes) -> MixingLineup:
    teachers = teachers or [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    return MixingLineup(
        ModelRef.of(student or dmm(), len(PROMPTS)),
        NAMES,
        refs(teachers),
        PROMPTS,
        **{"decoder": DECODER, **changes},
    )


def painted(teacher: Teacher, s, style=None) -> torch.Tensor:
    runner, ref = (
        ModelRunner(PROMPTS, s, folder=None, device=CPU, work=WorkCounter(1, None)),
        ModelRef.of(teacher, len(PROMPTS)),
    )
    with runner.loaded(ref) as load:
        return runner.paint(ref, load, style)


def by_hand(unet, contexts, s, k: int, row=None) -> torch.Tensor:
    """One picture, the sampler called directly."""
    context, empty = contexts[[1 + k]], contexts[[0]]
    schedule = NoiseSchedule()
    denoiser = cfg_denoiser(unet, schedule, context, empty, cfg=s.cfg, style=row)
    return sample(denoiser, schedule, host_noise((1, 4, 8, 8), s.seed + k), sigmas_for(schedule, s.steps, "karras"))


def test_the_ends_are_the_pure_styles_and_teachers_bit_for_bit():
    s, student = settings(count=3), dmm()
    teachers = [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    m = judge_mixing(
        mixing_lineup(student, teachers),
        s,
        [(NAMES[2], NAMES[0])],
        [0, 0.25, 1],
        paths=["blend", "merge", "predictions"],
    )
    shown = m.shown[(NAMES[2], NAMES[0])]
    for end, index in ((0, 2), (-1, 0)):
        pure = painted(student, s, index)[:2]
        assert torch.equal(shown["blend"][:, end], pure) and torch.equal(shown["predictions"][:, end], pure)
        assert torch.equal(shown["merge"][:, end], painted(teachers[index], s)[:2])
        # A blend with nothing of the other, and a merger with nothing of the other, are the same bits too.
        other = 2 - index
        assert torch.equal(painted(blended(student, {index: 1.0, other: 0.0}), s)[:2], pure)
        whole = merged(teachers[index], teachers[other], 0.0, len(PROMPTS))
        assert torch.equal(painted(whole, s)[:2], painted(teachers[index], s)[:2])
        whole = merged(teachers[other], teachers[index], 1.0, len(PROMPTS))
        assert torch.equal(painted(whole, s)[:2], painted(teachers[index], s)[:2])


def test_between_the_ends_codes_weights_and_predictions_are_mixed():
    """Every picture by hand from the equation of its path: float16 of values of order 1 (4e-3)."""
    s, student = settings(count=2, seed=3), dmm()
    teachers = [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    m = judge_mixing(
        mixing_lineup(student, teachers),
        s,
        [(NAMES[0], NAMES[2])],
        [0, 0.25, 1],
        paths=["blend", "merge", "predictions"],
    )
    shown = m.shown[(NAMES[0], NAMES[2])]
    row = style_rows(Blend(mix({NAMES[0]: 1}), mix({NAMES[2]: 1}), 0.25), vocabulary(NAMES))
    assert row.tolist() == [[0.75, 0.0, 0.25, 1.0]], "what Apply Style makes of the same blend"
    first, _, third = (teacher.unet.state_dict() for teacher in teachers)
    middle = UNet(SMALL).requires_grad_(False)
    middle.load_state_dict({key: 0.75 * first[key] + 0.25 * third[key] for key in first})
    texts = 0.75 * teachers[0].contexts + 0.25 * teachers[2].contexts

    def mixed(x, t, context, y=None, style=None):
        one, two = (torch.tensor([row]).expand(len(x), -1) for row in ([1.0, 0, 0, 1], [0.0, 0, 1, 1]))
        return 0.75 * student.unet(x, t, context, style=one) + 0.25 * student.unet(x, t, context, style=two)

    mixed.parameters = student.unet.parameters
    for k in range(2):
        want = {
            "blend": by_hand(student.unet, student.contexts, s, k, row),
            "merge": by_hand(middle, texts, s, k),
            "predictions": by_hand(mixed, student.contexts, s, k),
        }
        for path, latents in want.items():
            torch.testing.assert_close(shown[path][k, 1][None].float(), latents, atol=4e-3, rtol=4e-3)
        assert (want["blend"] - want["predictions"]).abs().max() > 0.01, "not the same thing"


def test_equal_codes_are_flat():
    """Codes that are equal: every ratio paints the same (1e-2 of float16 latents), and nothing rises, falls or turns."""
    student = dmm()
    student.unet.model_embedding.weight[1] = student.unet.model_embedding.weight[0]
    m = judge_mixing(mixing_lineup(student), settings(count=3), [(NAMES[0], NAMES[1])], W5, paths=["blend"])
    latents = m.shown[(NAMES[0], NAMES[1])]["blend"].float()
    assert (latents - latents[:, :1]).abs().max() < 1e-2 < latents.std()
    f = m.pairs[0].paths["blend"].figures
    # A judge that sees no difference wins half of the draws, but for float noise in its own errors.
    assert f["layout"].value < 1e-4 and m.against == {}
    other = judge_mixing(mixing_lineup(student), settings(count=3), [(NAMES[0], NAMES[2])], W5, paths=["blend"])
    assert other.pairs[0].paths["blend"].figures["layout"].value > 100 * f["layout"].value


def test_the_student_judges_by_the_sign_of_each_draw():
    """Recomputed from ``identify`` one picture at a time; ties count half."""
    s, student = settings(count=3, own_draws=5), dmm()
    m = judge_mixing(mixing_lineup(student), s, [(NAMES[1], NAMES[2])], [0, 0.5, 1], paths=["blend"])
    ends = [painted(student, s, index) for index in (1, 2)]
    for place, latents in ((0, ends[0]), (2, ends[1])):
        verdicts = identify(student, NAMES, latents, torch.tensor([1, 2, 3]), draws=5, seed=s.seed)
        score = np.mean([(v.errors[:, 1] > v.errors[:, 2]).float().mean().item() for v in verdicts])
        neither = np.mean([v.name not in NAMES[1:] for v in verdicts])
        curve = m.pairs[0].paths["blend"].curves
        assert curve["score"][place].value == pytest.approx(score) and curve["neither"][place].value == pytest.approx(
            neither
        )
        assert "away" not in curve and "content" not in curve
    errors = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [3.0, 1.0, 0.0]]])
    assert wins(errors, 0, 1).tolist() == [0.625] and m.judge["draws"] == 5


def test_merging_needs_one_kind_of_model():
    a, b = plain("ink", 1), plain("pen", 2, prediction="v")
    with pytest.raises(ValueError, match="'ink' predicts eps and 'pen' v"):
        merged(a, b, 0.5, len(PROMPTS))
    same = merged(a, dataclasses.replace(plain("pen", 2), contexts=a.contexts), 0.3, len(PROMPTS))
    assert torch.equal(same.contexts, a.contexts), "texts that are the same stay what they are"
    long = dataclasses.replace(plain("pen", 2), contexts=torch.randn(len(PROMPTS), 14, SMALL.context_dim))
    texts = merged(a, long, 0.5, len(PROMPTS)).contexts
    torch.testing.assert_close(texts, (torch.cat([a.contexts, a.contexts], 1) + long.contexts) / 2)
    assert merged(a, long, 0.5, len(PROMPTS), dtype=torch.float16).unet.dtype == torch.float16


# --- refusals, going on -----------------------------------------------------------------------------------------------


def untouchable(lineup: MixingLineup) -> MixingLineup:
    def fail():
        raise AssertionError("a model was loaded before everything was checked")

    for ref in (lineup.student, *lineup.teachers):
        ref.open = fail
    return lineup


PAIR = [(NAMES[0], NAMES[2])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [0, 1]}, "the ratios are 0, 1: expected 3 or more that rise from 0 to 1"),
        ({"ratios": [0, 0.5, 0.5, 1]}, "that rise from 0 to 1"),
        ({"ratios": [0, 0.5, 0.9]}, "both included"),
        ({"ratios": [0, math.nan, 1]}, "the ratios are 0, nan, 1"),
        ({"pairs": []}, "no pairs of styles"),
        ({"pairs": [*PAIR, PAIR[0][::-1]]}, "or one twice"),
        ({"pairs": [("ink", "oil")]}, "'ink:oil' is no pair of two styles of the student: they are ink"),
        ({"pairs": [("ink", "ink")]}, "no pair of two styles"),
        ({"paths": ["blend", "soup"]}, "unknown or repeated paths blend, soup"),
        ({"settings": settings(count=1)}, "count is 1"),
        ({"settings": settings(width=60)}, "width is 60"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(tmp_path, changes, message):
    given = {"settings": settings(count=2), "pairs": PAIR, "ratios": W5, "paths": ["blend", "merge"], **changes}
    with pytest.raises(ValueError, match=message):
        judge_mixing(untouchable(mixing_lineup()), **given, folder=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_who_does_not_belong_is_refused():
    other = dataclasses.replace(SMALL, model_channels=32)
    strange = judge()
    strange.network.classes = {"look": ["ink", "oil"]}
    for changes, message in (
        ({"teachers": [plain("ink", 1)]}, "weight merging needs the teachers of echo"),
        ({"teachers": [plain("ink", 1), plain("ink", 2), plain("echo", 3)]}, "named twice"),
        ({"teachers": [plain("ink", 1), plain("echo", 2, other)]}, "another architecture"),
        (
            {"teachers": [plain("ink", 1), dataclasses.replace(plain("echo", 1), zero_snr=True)]},
            "another noise schedule",
        ),
        ({"teachers": [plain("ink", 1), plain("echo", 2, prediction="v")]}, "'ink' predicts eps and 'echo' v"),
        ({"classifier": strange}, "the classifier does not know echo: it knows ink, oil"),
        ({"classifier": evaluation_lineup().features}, "it knows no looks at all"),
        ({"classifier": judge(), "decoder": None}, "needs a VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            judge_mixing(untouchable(mixing_lineup(**changes)), settings(count=2), PAIR)
    with pytest.raises(ValueError, match="no prompts"):
        judge_mixing(dataclasses.replace(untouchable(mixing_lineup()), prompts=[""]), settings(count=2), PAIR)
    judge_mixing(mixing_lineup(teachers=[plain("ink", 1)]), settings(count=2), PAIR, [0, 0.5, 1], paths=["blend"])
    with pytest.raises(ValueError, match="named twice"):  # where they are not needed, too
        judge_mixing(
            mixing_lineup(teachers=[plain("ink", 1), plain("ink", 2)]),
            settings(count=2),
            PAIR,
            [0, 0.5, 1],
            paths=["blend"],
        )


@pytest.mark.parametrize("classifier", [False, True])
def test_an_interrupted_run_goes_on(tmp_path, classifier):
    """The same figures, nothing painted twice, no model loaded when all is there; the bar rises to what it announced."""
    lineup = lambda: mixing_lineup(classifier=judge() if classifier else None)  # noqa: E731
    pairs = [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[2])]
    call = {
        "settings": settings(count=2),
        "pairs": pairs,
        "ratios": [0, 0.25, 0.75, 1],
        "paths": ["blend", "merge", "predictions"],
    }
    data = lambda m: as_json(dataclasses.replace(m, shown={}))  # noqa: E731
    whole, done = judge_mixing(lineup(), **call), []

    def stop(*a):
        done.append(a)
        if len(done) == 8:
            raise Enough

    with pytest.raises(Enough):
        judge_mixing(lineup(), **call, folder=tmp_path, progress=stop)
    first = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert first
    done.clear()
    again = judge_mixing(lineup(), **call, folder=tmp_path, progress=lambda *a: done.append(a[:2]))
    assert data(again) == data(whole)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert all(kept[name] == first[name] for name in first)
    assert done == sorted(done) and done[-1] == (done[0][1], done[0][1]) and done[-2][0] == done[-2][1] - 1
    assert data(judge_mixing(untouchable(lineup()), **call, folder=tmp_path)) == data(whole)
    # Another order of a pair is the same pictures in another order.
    call["pairs"] = [pair[::-1] for pair in pairs]
    back = judge_mixing(untouchable(lineup()), **call, folder=tmp_path)
    assert not torch.equal(*whole.shown[pairs[0]]["blend"][:, 1:3].unbind(1)), "each ratio has parts of its own"
    assert torch.equal(back.shown[pairs[0][::-1]]["merge"].flip(1), whole.shown[pairs[0]]["merge"])


def test_the_ends_are_those_of_an_evaluation(tmp_path):
    """In one folder, what ``evaluate`` has painted is not painted again."""
    s, student = settings(count=4, metrics=("pair",)), dmm()
    teachers = [plain(name, i) for i, name in enumerate(NAMES, start=1)]
    evaluate(evaluation_lineup(student, teachers), s, folder=tmp_path)
    before = len(list(tmp_path.iterdir()))
    judge_mixing(mixing_lineup(student, teachers, classifier=judge()), s, PAIR, [0, 0.5, 1], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) - before == 2 + 6, "two mixes, and what the judge sees of six"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_report_says_it_all(tmp_path):
    pairs = [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2])]
    m = judge_mixing(mixing_lineup(classifier=judge()), settings(count=6), pairs, [0, 0.5, 1])
    m.about = {"title": "a title"}
    files = [p.name for p in write(m, tmp_path, DECODER)]
    assert files == ["mixing.json", "mixing.md", "curves.png", "strip-01-ink-p-pe-n.jpg", "strip-02-ink-echo.jpg"]
    found = json.loads((tmp_path / "mixing.json").read_text(encoding="utf-8"))
    assert found["pairs"][1]["second"] == "echo" and found["ratios"] == [0, 0.5, 1] and not found["shown"]
    assert found["about"] == {"title": "a title"} and found["members"]["student"]
    figure = found["pairs"][1]["paths"]["merge"]["figures"]["spearman"]
    assert figure["value"] == m.pairs[1].paths["merge"].figures["spearman"].value and len(figure["interval"]) == 2
    assert found["against"]["merge"]["fall"]["better"] in (None, "blend", "merge")
    text = (tmp_path / "mixing.md").read_text(encoding="utf-8")
    head = text.split("## Per pair")[1].split("\n")[4]
    for line in text.split("\n"):
        if line.startswith(("| ink > ", "| mean |")):
            assert line.replace("\\|", "").count("|") == head.count("|") and " / " in line
    assert "DMM less weight merging" in text and text.startswith("# a title")
    strip = Image.open(tmp_path / files[-1])
    assert strip.width > 3 * 64 and strip.height > 4 * 64, "two prompts on two paths, three ratios"
    nothing = judge_mixing(mixing_lineup(), settings(count=2, resamples=0), PAIR, [0, 0.5, 1], paths=["blend"])
    json.dumps(as_json(dataclasses.replace(nothing, shown={})), allow_nan=False)
    assert "±" not in markdown(nothing) and [p.name for p in write(nothing, tmp_path)][-1] == "curves.png"


def test_numbers_that_are_none_are_dashes():
    from comfyui_dmm.training.evaluation.matrix import Figure

    assert figure_text(Figure(math.nan, 0.1), 2) == "-" and figure_text(Figure(0.5, 0.1), 2) == "0.50 ± 0.20"


def test_a_plot_shows_the_curves():
    """The blend's curve is where its numbers are: in columns at a ratio, the middle of what has its colour; 4 pixels of 150."""
    teacher = Teacher("student", Known(), torch.zeros(3, 7, SMALL.context_dim))
    ref = ModelRef("student", "known", lambda: teacher, teacher.unet.config)
    lineup = MixingLineup(ref, NAMES, [], ["", "a star", "a green cat"], DECODER, judge())
    m = judge_mixing(lineup, settings(count=2), [(NAMES[0], NAMES[1])], W5, paths=["blend"])
    for of_curve in (m.pairs[0].paths["blend"].curves,):
        of_curve.pop("away")
    pixels = np.asarray(plots(m)).astype(int)
    near = np.abs(pixels - np.array(COLOURS["blend"])).sum(-1) < 40
    near[: pixels.shape[0] - 150 - 20 - 20] = False  # the legend
    ys, xs = near.nonzero()
    left, right = xs.min(), xs.max()
    assert right - left == pytest.approx(210, abs=4)
    rise = [f.value for f in m.pairs[0].paths["blend"].curves["score"]]
    heights = [ys[np.abs(xs - (left + w * 210)) <= 1].mean() for w in (0.25, 0.5, 0.75)]
    want = [150 * (rise[1] - v) for v in rise[1:4]]
    assert [h - heights[0] for h in heights] == pytest.approx(want, abs=4)


def test_pictures_of_any_size_fit_a_strip():
    m = judge_mixing(mixing_lineup(), settings(count=2), PAIR, [0, 0.5, 1], paths=["blend"])
    from comfyui_dmm.training.evaluation.mixing.report import strip

    large = PixelDecoder(lambda z: as_pixels(z).repeat_interleave(8, 2).repeat_interleave(8, 3), "large")
    assert strip(m, m.pairs[0], large).width < 3 * 256 + 200
