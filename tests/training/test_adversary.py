"""The multi-class adversarial loss: values by hand, whom its gradients reach, and that it can do what it is for."""

import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.loop.adversary import Discriminator, discriminator_loss, draw_renoise, generator_loss
from comfyui_dmm.training.seeds import hash_seed

from .families import SMALL_XL, small_data, small_run, small_teacher

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


class FixedHead(torch.nn.Module):
    """Logits that are the features' own numbers, so that the losses can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x


def test_losses_by_hand():
    """Two styles, four classes; softmax worked out with math.exp: tolerance 1e-6."""
    head = FixedHead()
    student, teacher = torch.tensor([[1.0, 2.0, 0.5, -1.0]]), torch.tensor([[0.0, 3.0, 1.0, 0.0]])

    def minus_log_p(logits, target):
        return math.log(sum(math.exp(v) for v in logits)) - logits[target]

    style = torch.tensor([1])
    g = generator_loss(head, student, style)
    d = discriminator_loss(head, student, teacher, style)
    assert math.isclose(g.item(), minus_log_p([1.0, 2.0, 0.5, -1.0], 1), rel_tol=1e-6)
    want = minus_log_p([0.0, 3.0, 1.0, 0.0], 1) + minus_log_p([1.0, 2.0, 0.5, -1.0], 2 + 1)
    assert math.isclose(d.item(), want, rel_tol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_features_are_of_the_renoised_clean_latents(prediction):
    """x0 by eq. 12 (or from v), noised again, through the base's middle block, style-less: recomputed row by row, tolerance 1e-4."""
    run = small_run(teachers=2, lambda_adv=0.5, base_share=0.0, prediction=prediction, base_prediction=prediction)
    batch = run.data.batch(0, Draw(1, 6, 2, 0.0, 0.3, run.schedule))
    losses = run.losses(batch, 5)
    noise = draw_renoise(run.config.seed, 5, tuple(batch.x_t.shape), run.schedule)
    for i in range(6):
        who, t, row = int(batch.teacher[i]), int(batch.t[i]), batch.caption[i : i + 1]
        a, b = ABAR[t].sqrt().float(), (1 - ABAR[t]).sqrt().float()
        x_t = batch.x_t[i : i + 1]
        seen = {}
        style = torch.zeros(1, 3)
        style[0, [who, 2]] = 1.0
        outs = {
            "student": run.student.unet(x_t, batch.t[i : i + 1], run.base.contexts[row], style=style),
            "teacher": run.teachers[who].unet(x_t, batch.t[i : i + 1], run.teachers[who].contexts[row]),
        }
        for name, out in outs.items():
            x0 = (x_t - b * out) / a if prediction == "eps" else a * x_t - b * out
            again = int(noise.t[i])
            noisy = ABAR[again].sqrt().float() * x0 + (1 - ABAR[again]).sqrt().float() * noise.eps[i : i + 1]
            middle = run.base.unet.middle(noisy, noise.t[i : i + 1], run.base.contexts[row])
            seen[name] = run.discriminator.head(middle)
        g = torch.nn.functional.cross_entropy(seen["student"], torch.tensor([who]))
        d = torch.nn.functional.cross_entropy(seen["teacher"], torch.tensor([who])) + torch.nn.functional.cross_entropy(
            seen["student"], torch.tensor([2 + who])
        )
        assert math.isclose(losses.adversarial[i].item(), g.item(), rel_tol=1e-4)
        assert math.isclose(losses.discriminator[i].item(), d.item(), rel_tol=1e-4)


def test_the_middle_is_what_the_whole_forward_gives_on_its_way():
    run = small_run(config=SMALL_XL)
    x, t, rows = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    context, y = run.base.conditioning(rows, (8, 8), torch.device("cpu"))
    _, features = run.base.unet(x, t, context, y=y, features=True)
    torch.testing.assert_close(run.base.unet.middle(x, t, context, y), features[len(run.base.unet.input_blocks)])


def gradients(run, losses, which):
    for p in (*run.student.unet.parameters(), *run.discriminator.head.parameters(), *run.base.unet.parameters()):
        p.grad = None
    getattr(losses, which)[losses.judged].mean().backward(retain_graph=True)
    moved = lambda module: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())  # noqa: E731
    return {"student": moved(run.student.unet), "head": moved(run.discriminator.head), "base": moved(run.base.unet)}


def test_gradients_reach_only_what_they_should():
    run = small_run(teachers=2, lambda_adv=1.0)
    losses = run.losses(run.draws(0), 0)
    assert gradients(run, losses, "adversarial") == {"student": True, "head": False, "base": False}
    assert gradients(run, losses, "discriminator") == {"student": False, "head": True, "base": False}


def test_rows_without_a_style_take_no_part():
    run = small_run(teachers=2, lambda_adv=1.0, base_share=0.5)
    batch = run.draws(0)
    styled = int((batch.teacher < 2).sum())
    assert 0 < styled < len(batch.teacher)
    losses = run.losses(batch, 0)
    assert losses.judged.tolist() == (batch.teacher < 2).tolist()
    for loss in (losses.adversarial, losses.discriminator):
        assert loss.shape == (len(batch),) and (loss[:styled] > 0).all() and (loss[styled:] == 0).all()
    want = losses.score.mean() + run.config.lambda_feat * losses.feature.mean()
    want = want + losses.adversarial.sum() / len(batch.teacher)
    torch.testing.assert_close(run.objective.total(losses, batch, run.step), want)


def test_the_student_listens_from_adv_start_on():
    with_it, without = (small_run(steps=2, lambda_adv=1.0, adv_start=start) for start in (0, 2))
    plain = small_run(steps=2, lambda_adv=0.0)
    for run in (with_it, without, plain):
        list(run.run())
    a, b, c = (run.student_weights(False) for run in (with_it, without, plain))
    assert all(torch.equal(b[k], c[k]) for k in b) and any(not torch.equal(a[k], c[k]) for k in a)


def test_noise_is_the_same_for_both_and_follows_from_the_seed():
    schedule = NoiseSchedule()
    one, two = draw_renoise(1, 2, (3, 4, 2, 2), schedule), draw_renoise(1, 2, (3, 4, 2, 2), schedule)
    assert torch.equal(one.eps, two.eps) and torch.equal(one.t, two.t)
    assert not torch.equal(one.eps, draw_renoise(1, 3, (3, 4, 2, 2), schedule).eps)


def test_building_a_discriminator_leaves_the_global_generator_alone():
    base = small_teacher("base", 0, small_data())
    torch.manual_seed(hash_seed(0))
    before = torch.get_rng_state()
    Discriminator(base, 2, NoiseSchedule(), 0, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_discriminator_learns_to_tell_student_and_styles_apart():
    """Frozen student, teachers with offsets: chance is 2 ln 4 = 2.77 for two styles; it must fall far below."""
    run = small_run(teachers=2, lambda_adv=1.0, adv_lr=3e-3, lr=1e-12, base_share=0.0, batch_size=16, steps=120)
    for teacher, offset in zip(run.teachers, (1.0, -1.0)):
        teacher.unet.load_state_dict(run.base.unet.state_dict())
        teacher.unet.out[2].bias.data += offset
    seen = [metrics.discriminator for metrics in run.run()]
    assert seen[0] > 2.5 and sum(seen[-10:]) / 10 < 1.8, (seen[:5], seen[-10:])
