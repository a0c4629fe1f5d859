"""The final stage: who paints what, in what way, that it resumes, and that the student then learns from it."""

import pytest
import torch
from comfyui_dmm.dmm_core.sampling import host_noise
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.run.state import states
from comfyui_dmm.training.run.synthesis import caption_rows, paint, painted_by_teachers
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.watch import Watch
from comfyui_dmm.training.seeds import hash_seed

from .families import SMALL_XL, small_run

FINAL = {"final_steps": 3, "final_images": 10, "final_sampling_steps": 4, "final_cfg": 3.0, "batch_size": 4}


@pytest.mark.parametrize("config, prediction", [(None, "eps"), (None, "v"), (SMALL_XL, "eps")])
def test_a_teacher_paints_with_its_own_text_and_guidance(config, prediction):
    """First-order DPM-Solver++ steps written out for one picture at a time: with two sampling steps the solver is of first order
    (its second step ends at 0). Tolerance 1e-3 on values of order 1."""
    settings = {**FINAL, "final_sampling_steps": 2, **({"config": config} if config else {})}
    run = small_run(teachers=2, prediction=prediction, **settings)
    rows = torch.tensor([1, 3])
    ours = paint(run, 1, rows, seed=5)
    teacher, schedule = run.teachers[1], NoiseSchedule()
    noise = host_noise((2, *run.data.shape), 5)
    high, low = schedule.sigma_max, schedule.sigma_min
    for i, row in enumerate(rows):
        x = noise[i : i + 1] * (1 + high**2) ** 0.5
        for sigma, following in ((high, low), (low, 0.0)):
            t = schedule.t_from_sigma(torch.tensor([sigma]))
            signal = 1 / (1 + sigma**2) ** 0.5
            x_t, both = signal * x, []
            for r in (row[None], torch.zeros(1, dtype=torch.long)):
                context, y = teacher.conditioning(r, run.data.shape[1:], torch.device("cpu"))
                with torch.no_grad():
                    both.append(teacher.unet(x_t, t, context, y=y))
            out = both[1] + 3.0 * (both[0] - both[1])
            n = sigma * signal
            x0 = (x_t - n * out) / signal if prediction == "eps" else signal * x_t - n * out
            x = following / sigma * x + (1 - following / sigma) * x0
        torch.testing.assert_close(ours[i : i + 1], x, atol=1e-3, rtol=1e-3)


def test_every_teacher_paints_as_many_and_every_caption_as_often():
    run = small_run(teachers=3, **FINAL)
    data = painted_by_teachers(run)
    assert len(data) == 30 and torch.bincount(data.owner).tolist() == [10, 10, 10]
    for i in range(3):
        mine = [caption for caption, owner in zip(data.captions, data.owner.tolist()) if owner == i]
        assert {mine.count(caption) for caption in run.data.prompts[1:]} == {2} and "" not in mine
    assert set(data.prompts) == set(run.data.prompts)
    rows = caption_rows(run, 2, 4)
    assert [run.data.prompts[r] for r in rows] == data.captions[24:28]
    part = paint(run, 2, rows, hash_seed(run.config.seed, "paint", 2, 4))
    torch.testing.assert_close(data.buckets[0][24:28], part.half().float())


class Enough(BaseException):
    pass


def test_an_interrupted_painting_goes_on(tmp_path):
    whole = painted_by_teachers(small_run(teachers=2, **FINAL))
    painted = []

    def stop(done, total, what):
        painted.append(done)
        if done == 3:
            raise Enough

    with pytest.raises(Enough):
        painted_by_teachers(small_run(teachers=2, **FINAL), tmp_path, stop)
    first = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(first) == 3
    (tmp_path / sorted(first)[1]).write_bytes(b"damaged")
    run = small_run(teachers=2, **FINAL)
    again = painted_by_teachers(run, tmp_path)
    assert torch.equal(again.buckets[0], whole.buckets[0]) and again.captions == whole.captions
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(kept) == 6 and [kept[n] == first[n] for n in sorted(first)] == [True, False, True]


def test_a_teacher_that_paints_nan_is_named():
    run = small_run(teachers=2, **FINAL)
    with torch.no_grad():
        run.teachers[1].unet.out[2].bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="teacher 'teacher 2' paints NaN"):
        painted_by_teachers(run)


def test_the_last_steps_train_on_what_each_teacher_painted(tmp_path):
    run = small_run(teachers=2, steps=2, **FINAL)
    steps, parts = [], []
    train(run, tmp_path, Watch(lambda run, m: steps.append((m.step, m.steps)), on_paint=lambda *a: parts.append(a[:2])))
    assert steps == [(i, 5) for i in range(1, 6)] and list(dict.fromkeys(parts)) == [(i, 6) for i in range(7)]
    assert len(run.draws.final_data) == 20 and states(tmp_path)[-1].name == "state-00000005.safetensors"
    batch = run.draws(2)
    want = run.draws.final_data.batch(0, Draw(hash_seed(run.config.seed, "final stage"), 4, 2, 0.05, 0.1, run.schedule))
    assert torch.equal(batch.x_t, want.x_t)
