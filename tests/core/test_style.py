"""Style rows and the style side against arithmetic written out by hand."""

import pytest
import torch
from comfyui_dmm.dmm_core.style import StyleMLP, no_style_row, style_delta, style_row

N, D = 3, 8


@pytest.fixture
def side():
    torch.manual_seed(0)
    return torch.nn.Embedding(N, D), StyleMLP(D)


def by_hand(side, weights, strength):
    """s * (W2 silu(W1 (w E) + b1) + b2), arXiv:2504.12364 Sec. 3.2 and Suppl. A.1, in float64."""
    codebook, mlp = side[0].weight.double(), side[1].double()
    e = sum(w * codebook[i] for i, w in enumerate(weights))
    h = mlp.linear_1.weight @ e + mlp.linear_1.bias
    h = h * torch.sigmoid(h)
    return strength * (mlp.linear_2.weight @ h + mlp.linear_2.bias)


@pytest.mark.parametrize(
    "weights, strength", [((1, 0, 0), 1), ((0.2, 0.3, 0.5), 1), ((1.5, -0.5, 0), 0.7), ((0, 0, 1), 2)]
)
def test_delta_equals_the_formula(side, weights, strength):
    row = style_row(N, dict(enumerate(weights)), strength)
    got = style_delta(*side, row)
    torch.testing.assert_close(got[0].double(), by_hand(side, weights, strength), atol=1e-6, rtol=1e-5)


def test_rows_of_a_batch_are_independent(side):
    rows = torch.cat([style_row(N, i) for i in range(N)])
    together = style_delta(*side, rows)
    for i in range(N):
        torch.testing.assert_close(together[i : i + 1], style_delta(*side, rows[i : i + 1]), atol=1e-6, rtol=0)


def test_strength_zero_is_exactly_nothing(side):
    assert style_delta(*side, no_style_row(N)).abs().max() == 0
    assert style_delta(*side, style_row(N, 1, 0.0)).abs().max() == 0


def test_rows_of_another_model_are_refused(side):
    with pytest.raises(ValueError, match=r"model with 3 styles.*another DMM model"):
        style_delta(*side, torch.zeros(1, 9))


def test_bad_rows():
    with pytest.raises(ValueError, match="style index 3 is outside 0..2"):
        style_row(N, 3)
    with pytest.raises(ValueError, match="not finite"):
        style_row(N, {0: float("nan")})
    with pytest.raises(ValueError, match="not finite"):
        style_row(N, 0, float("inf"))
