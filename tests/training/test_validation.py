"""The fixed check that finds the best state."""

import pytest
import torch
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.run.validation import validation_error
from comfyui_dmm.training.seeds import hash_seed

from .families import small_run


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_is_the_mean_error_of_the_averaged_student(prediction):
    """Recomputed batch by batch with the average's weights: tolerance 1e-5; the raw weights are back afterwards."""
    run = small_run(validation=20, batch_size=8, lr=5e-3, prediction=prediction)
    list(run.run())
    before = {k: v.clone() for k, v in run.student.unet.state_dict().items()}
    ours = validation_error(run)
    assert all(torch.equal(v, before[k]) for k, v in run.student.unet.state_dict().items())
    assert validation_error(run) == ours
    seed, errors = hash_seed(run.config.seed, "validation"), []
    with run.student.averaged(), torch.no_grad():
        for number in range(3):
            batch = run.data.batch(number, Draw(seed, 8, 3, 0.0, 0.0, run.schedule))
            for i in range(8):
                row, who = batch.caption[i : i + 1], int(batch.teacher[i])
                style = torch.zeros(1, 4)
                style[0, [who, 3]] = 1.0
                x_t, t = batch.x_t[i : i + 1], batch.t[i : i + 1]
                out = run.student.unet(x_t, t, run.base.contexts[row], style=style)
                target = run.teachers[who].unet(x_t, t, run.teachers[who].contexts[row])
                if prediction == "v":
                    target = run.schedule.to_eps(target, x_t, t, "v")
                errors.append((out - target).square().mean().item())
    assert abs(ours - sum(errors) / 24) < 1e-5 * ours


def test_it_does_not_look_at_dropped_captions_or_the_base():
    run = small_run(caption_dropout=0.9, base_share=0.9, validation=16)
    batch = run.data.batch(0, Draw(hash_seed(run.config.seed, "validation"), 8, 3, 0.0, 0.0, run.schedule))
    assert (batch.caption > 0).all() and (batch.teacher < 3).all()
