"""FID and KID against closed forms and formulas written out; intervals against repeated experiments; refusals."""

import numpy as np
import pytest
import scipy.linalg
import torch
from comfyui_dmm.training.evaluation.distances import (
    Gaussian,
    check_count,
    fid,
    frechet,
    gaussian,
    kid,
    principal_axes,
    resample,
)
from comfyui_dmm.training.evaluation.matrix import Figure, Sets, compare, figures


def once(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.float64)


def correlated(count: int, size: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Features whose directions are neither axes nor independent."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(size)) / size**0.5
    return scale * torch.randn(count, size, generator=g) @ mixing + shift


# --- FID --------------------------------------------------------------------------------------------------------------


def test_fid_of_known_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 where both covariances have the same axes (rotated here): float64, 1e-9."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    s1, s2 = torch.rand(2, 6, generator=g, dtype=torch.float64)
    m1, m2 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    a, b = (Gaussian(m, axes @ torch.diag(s**2) @ axes.T) for m, s in ((m1, s1), (m2, s2)))
    assert frechet(a, b) == pytest.approx(float((m1 - m2).square().sum() + (s1 - s2).square().sum()), abs=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_of_gaussians_with_different_axes():
    """2 x 2: tr (S1 S2)^(1/2) = (tr S1 S2 + 2 (det S1 S2)^(1/2))^(1/2), by Cayley and Hamilton."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    between = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    want = 1.25 + a.trace() + b.trace() - 2 * between
    got = frechet(Gaussian(torch.tensor([0.0, 0.0]).double(), a), Gaussian(torch.tensor([1.0, 0.5]).double(), b))
    assert got == pytest.approx(want.item(), abs=1e-12)


def test_fid_of_samples_is_the_formula_with_scipys_square_root():
    """Means and covariances by numpy, the square root of the product by scipy: float64, 1e-6 of values of order 1 to 100."""
    sets = [correlated(70, 12, 1), correlated(90, 12, 2, 1.0, 2.0)]
    (x, y) = (s.double().numpy() for s in sets)
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    got = frechet(gaussian(sets[0], once(70)[0]), gaussian(sets[1], once(90)[0]))
    assert got == pytest.approx(want, rel=1e-6)


def test_sampled_fid_comes_to_the_true_one():
    """N(0, I) to N(1/2, 4 I) in 4 dimensions: 4 (1/4 + 1) = 5; 10000 pictures, whose spread is 0.05."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(10_000, 4, generator=g), 0.5 + 2 * torch.randn(10_000, 4, generator=g)
    assert fid([a], [b], once(10_000), [(0, 0)]).item() == pytest.approx(5, abs=0.15)


def test_features_that_never_vary_are_no_trouble():
    x, y = correlated(40, 5, 1), correlated(40, 5, 2)
    dead = [torch.cat([v, torch.full((40, 3), 7.0)], 1) for v in (x, y)]
    got = fid(dead[:1], dead[1:], once(40), [(0, 0)]).item()
    assert got == pytest.approx(fid([x], [y], once(40), [(0, 0)]).item(), rel=1e-6)


def test_too_few_pictures_are_refused_with_the_number_needed():
    check_count(225, 224)
    with pytest.raises(ValueError, match="at least 225 pictures a style, 224 are asked for"):
        check_count(224, 224)
    with pytest.raises(ValueError, match="at least 2049 pictures.*fewer than 1000.*KID"):
        check_count(1000, 2048)


# --- KID --------------------------------------------------------------------------------------------------------------


def test_kid_is_the_sum_written_out():
    """Loops over all pairs of different pictures: float64, 1e-9."""
    x, y = (correlated(9, 5, seed, shift) for seed, shift in ((1, 0.0), (2, 0.4)))

    def k(a, b):
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    def within(v):
        return np.mean([k(v[i], v[j]) for i in range(9) for j in range(9) if i != j])

    want = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kid([x], [y], once(9), [(0, 0)]).item() == pytest.approx(want, abs=1e-9)


def test_kid_of_known_gaussians():
    """MMD^2 of N(0, 1) and N(1/2, 1) in one dimension, with E (xy + 1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1 and the moments
    0, 1, 0 and 1/2, 5/4, 13/8: 4 + 9.078125 - 2 * 4.75 = 3.578125. The mean of 8 estimates, within 4 standard errors."""
    g = torch.Generator().manual_seed(0)
    sets = [(torch.randn(800, 1, generator=g), 0.5 + torch.randn(800, 1, generator=g)) for _ in range(8)]
    got = np.array([kid([x], [y], once(800), [(0, 0)]).item() for x, y in sets])
    assert got.std() < 1.8, "too wide to tell"
    assert abs(got.mean() - 3.578125) < 4 * got.std(ddof=1) / 8**0.5


def test_kid_has_no_bias():
    """Two sets of one distribution: the mean of 200 estimates is 0 within 3 standard errors, though n is 6."""
    got = np.array(
        [kid([correlated(6, 4, s)], [correlated(6, 4, s + 1000)], once(6), [(0, 0)]).item() for s in range(200)]
    )
    assert abs(got.mean()) < 3 * got.std() / 200**0.5
    assert got.min() < 0 < got.max()


def test_kid_in_blocks_is_the_same(monkeypatch):
    x, y = correlated(50, 6, 1), correlated(50, 6, 2)
    weights = resample(50, 3, 0)
    whole = kid([x], [y], weights, [(0, 0)])
    monkeypatch.setattr("comfyui_dmm.training.evaluation.distances.BLOCK", 7)
    torch.testing.assert_close(kid([x], [y], weights, [(0, 0)]), whole, rtol=1e-12, atol=1e-12)


# --- resamples --------------------------------------------------------------------------------------------------------


def test_weights_stand_for_copies():
    """FID and KID of a resample are those of the rows repeated; KID without pairs of a row and its copy (1e-9)."""
    x, y = correlated(12, 3, 1), correlated(12, 3, 2, 0.5)
    weights = resample(12, 4, 5)
    assert torch.equal(weights.sum(1), torch.full((4,), 12.0, dtype=torch.float64))
    for r, weight in enumerate(weights):
        copies = torch.arange(12).repeat_interleave(weight.long())
        got = fid([x], [y], weights[r : r + 1], [(0, 0)]).item()
        assert got == pytest.approx(fid([x[copies]], [y[copies]], once(12), [(0, 0)]).item(), abs=1e-9)

        def within(v, copies=copies):
            pairs = [(a, b) for i, a in enumerate(copies) for j, b in enumerate(copies) if a != b]
            return np.mean([(float(v[a].double() @ v[b].double()) / 3 + 1) ** 3 for a, b in pairs])

        across = np.mean([(float(x[a].double() @ y[b].double()) / 3 + 1) ** 3 for a in copies for b in copies])
        got = kid([x], [y], weights[r : r + 1], [(0, 0)]).item()
        assert got == pytest.approx(within(x) + within(y) - 2 * across, abs=1e-9)


@pytest.mark.parametrize("metric", ["FID", "KID"])
def test_the_spread_is_that_of_repeated_experiments(metric):
    """EXCESS of a student that is a little off: the bootstrap's spread, on average over experiments, is the spread over 60 experiments
    within a third."""
    values, spreads = [], []
    for seed in range(60):
        a, b = correlated(60, 6, 3 * seed), correlated(60, 6, 3 * seed + 1)
        student = a + 0.3 + 0.2 * correlated(60, 6, 3 * seed + 2)
        excess = compare(metric, Sets(["x"], [student], [a], [b]), 40 if seed < 12 else 0, seed).excess
        values.append(excess.value)
        spreads += [excess.spread] if excess.spread is not None else []
    assert 0.67 < np.mean(spreads) / np.std(values, ddof=1) < 1.5


def test_the_interval_is_around_the_value():
    assert Figure(2.0, 0.5).interval == pytest.approx((2 - 0.98, 2 + 0.98)) and Figure(2.0).interval is None


# --- the matrix -------------------------------------------------------------------------------------------------------


def three_styles(seed: int = 0, count: int = 80, size: int = 5) -> tuple[list, list]:
    """Two batches of three teachers: different means, the third far away."""
    shifts = (0.0, 0.6, 3.0)
    return tuple(
        [correlated(count, size, 10 * seed + 100 * batch + i, shift) for i, shift in enumerate(shifts)]
        for batch in range(2)
    )


@pytest.mark.parametrize("metric", ["FID", "KID"])
def test_a_student_that_equals_its_teachers_scores_the_floor(metric):
    first, second = three_styles()
    d = compare(metric, Sets(["a", "b", "c"], first, first, second), 5, 0)
    assert d.m == d.floor and d.excess.value == d.leak.value == 0 and d.total.value == d.floor_total.value != 0
    assert d.excess.spread == 0 and d.total.spread > 0


@pytest.mark.parametrize("metric", ["FID", "KID"])
def test_shuffled_names_raise_the_diagonal(metric):
    first, second = three_styles()
    student = [x + 0.05 for x in first]
    right = compare(metric, Sets(["a", "b", "c"], student, first, second), 0, 0)
    wrong = compare(metric, Sets(["a", "b", "c"], [student[1], student[2], student[0]], first, second), 0, 0)
    assert all(w.value > r.value for w, r in zip(wrong.own, right.own))
    assert wrong.excess.value > 10 * abs(right.excess.value) and wrong.leak.value > 3 * right.leak.value


def test_the_figures_are_what_the_paper_says():
    """Traces, their difference and the mean off the diagonal, by numpy from the matrices."""
    first, second = three_styles()
    student = [first[0] + 0.3, first[1] * 1.2, first[2]]
    base = correlated(80, 5, 77)
    d = compare("FID", Sets(["a", "b", "c"], student, first, second, base), 3, 0)
    m, floor = np.array(d.m), np.array(d.floor)
    for i in range(3):
        for j in range(3):
            assert m[i, j] == pytest.approx(fid([student[i]], [second[j]], once(80), [(0, 0)]).item())
            assert floor[i, j] == pytest.approx(fid([first[i]], [second[j]], once(80), [(0, 0)]).item())
    assert d.total.value == pytest.approx(np.trace(m)) and d.floor_total.value == pytest.approx(np.trace(floor))
    assert d.excess.value == pytest.approx(np.trace(m) - np.trace(floor))
    assert [f.value for f in d.own] == pytest.approx(np.diag(m)) and [f.value for f in d.own_floor] == pytest.approx(
        np.diag(floor)
    )
    assert [f.value for f in d.own_excess] == pytest.approx(np.diag(m) - np.diag(floor))
    assert d.leak.value == pytest.approx(np.abs(m - floor)[~np.eye(3, dtype=bool)].mean())
    assert d.base_excess == pytest.approx(sum(d.base) - np.trace(floor))
    assert d.worst == int(np.argmax(np.diag(m) - np.diag(floor)))


def test_many_features_resample_the_diagonal_only(monkeypatch):
    first, second = three_styles()
    student = [x + 0.1 for x in first]
    whole = compare("FID", Sets(["a", "b", "c"], student, first, second), 6, 0)
    monkeypatch.setattr("comfyui_dmm.training.evaluation.matrix.MANY_FEATURES", 4)
    cheap = compare("FID", Sets(["a", "b", "c"], student, first, second), 6, 0)
    assert cheap.leak == Figure(whole.leak.value) and cheap.m == whole.m
    assert cheap.excess.spread == pytest.approx(whole.excess.spread)
    assert [f.spread for f in cheap.own_floor] == pytest.approx([f.spread for f in whole.own_floor])


def test_one_style_has_no_leak():
    first, second = three_styles()
    d = compare("KID", Sets(["a"], first[:1], first[:1], second[:1]), 0, 0)
    assert d.leak is None and d.excess == Figure(0.0)
    assert figures(torch.zeros(1, 1), torch.ones(1, 1))["excess"] == -1


def test_features_that_are_no_numbers_are_refused():
    first, second = three_styles()
    second[1][3, 2] = float("nan")
    with pytest.raises(ValueError, match="features of second.*wrong: \\[1\\]"):
        compare("FID", Sets(["a", "b", "c"], first, first, second), 0, 0)


def test_principal_axes_keep_most_of_the_variance():
    x = correlated(200, 8, 1) * torch.arange(1, 9)
    axes = principal_axes(x, 3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
    values = np.linalg.eigvalsh(np.cov(x.double().numpy(), rowvar=False))
    assert (x.double() @ axes).var(0).sum().item() == pytest.approx(values[-3:].sum())
    with pytest.raises(ValueError, match="they have 8"):
        principal_axes(x, 9)
