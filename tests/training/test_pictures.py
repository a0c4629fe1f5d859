"""Student beside teacher: what is painted, that training never notices, and that nothing that fails there ends it."""

import logging

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.sampling import cfg_denoiser, host_noise, sample, sigmas_for
from comfyui_dmm.dmm_core.sdxl import sdxl_vector
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.training.data.batches import CaptionedLatents
from comfyui_dmm.training.paint.images import GAP, PAPER
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch import pictures as module
from comfyui_dmm.training.run.watch.journal import Journal, read_log
from comfyui_dmm.training.run.watch.pictures import CFG, SEED, Pictures, spread
from comfyui_dmm.training.run.watch.watch import Watch
from PIL import Image

from .families import SMALL_XL, small_run

FLAT = (64, 96)
"""(height, width) in pixels of the latents of 8 x 12."""


STEPS = 3


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", STEPS)


class Eye:
    """A decoder that remembers the latents that it was given, and shows each as a picture of its size."""

    def __init__(self):
        self.seen = []

    def __call__(self, latents):
        self.seen.append(latents.clone())
        gray = (latents.mean(1, keepdim=True).sigmoid() * 255).byte().cpu().numpy()  # (B, 1, h, w)
        return [Image.fromarray(p[0]).convert("RGB").resize((8 * p.shape[2], 8 * p.shape[1])) for p in gray]


def flat_data(count=12) -> CaptionedLatents:
    g = torch.Generator().manual_seed(0)
    return CaptionedLatents(torch.randn(count, 4, 8, 12, generator=g), [f"caption {i % 5}" for i in range(count)])


def raw(run) -> dict:
    return {key: value.clone() for key, value in run.student.unet.state_dict().items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flat"])
def test_both_paint_the_same_captions_from_the_same_noise(family, prediction):
    """Against the sampler called by hand, with the averaged weights."""
    changes = {"sd": {}, "sdxl": {"config": SMALL_XL}, "flat": {"data": flat_data()}}[family]
    run, eye = small_run(teachers=2, prediction=prediction, batch_size=2, **changes), Eye()
    run.base.prediction = prediction
    for _ in range(2):
        run.train_step()
    sheet = Pictures(run, eye, prompts=2).paint()
    assert sheet is not None and len(eye.seen) == 4
    rows = torch.tensor([1, 3])  # of "", caption 0 ... caption 4
    noise = host_noise((2, *run.data.shape), SEED)
    sigmas = sigmas_for(run.schedule, STEPS, "karras")

    def whole_y(pooled):
        return sdxl_vector(pooled, *(8 * side for side in run.data.shape[1:]))

    def by_hand(unet, text, style=None):
        y = (None, None) if text.pooled is None else (whole_y(text.pooled[rows]), whole_y(text.pooled[:1]))
        denoiser = cfg_denoiser(
            unet,
            run.schedule,
            text.contexts[rows],
            text.contexts[:1],
            cfg=CFG,
            style=style,
            y=y[0],
            uncond_y=y[1],
            prediction=prediction,
        )
        return sample(denoiser, run.schedule, noise, sigmas)

    for i, teacher in enumerate(run.teachers):
        torch.testing.assert_close(eye.seen[i], by_hand(teacher.unet, teacher))
        with run.student.averaged():
            torch.testing.assert_close(eye.seen[2 + i], by_hand(run.student.unet, run.base, style_row(2, i)))
        assert not torch.allclose(eye.seen[2 + i], by_hand(run.student.unet, run.base, style_row(2, i))), (
            "the raw weights"
        )
        assert eye.seen[i].shape[1:] == run.data.shape


def test_rows_are_styles_and_columns_teacher_and_student():
    """A student that is its teacher paints what the teacher paints, whatever the style is called."""
    run = small_run(teachers=2, data=flat_data())
    with torch.no_grad():
        run.student.unet.style_mlp.linear_2.weight.zero_()
        run.student.unet.style_mlp.linear_2.bias.zero_()
    run.teachers[1].unet.load_state_dict(run.base.unet.state_dict())
    run.teachers[1].contexts = run.base.contexts
    sheet = np.asarray(Pictures(run, Eye()).paint())
    cells = cells_of(sheet, rows=2, columns=2)
    assert np.array_equal(cells[1][0], cells[1][1]) and not np.array_equal(cells[0][0], cells[0][1])


def cells_of(sheet: np.ndarray, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The cells of a contact sheet, from its lower right corner."""
    height, width = FLAT
    bottom, right = sheet.shape[0] - GAP, sheet.shape[1] - GAP
    assert (sheet[-1] == PAPER).all()
    return [
        [
            sheet[
                bottom - (rows - r) * (height + GAP) + GAP : bottom - (rows - r - 1) * (height + GAP),
                right - (columns - c) * (width + GAP) + GAP : right - (columns - c - 1) * (width + GAP),
            ]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def test_teachers_paint_once():
    run, eye = small_run(teachers=2), Eye()
    pictures = Pictures(run, eye)
    pictures.paint()
    assert len(eye.seen) == 4
    run.train_step()
    pictures.paint()
    assert len(eye.seen) == 6  # the students only
    assert not torch.equal(eye.seen[2], eye.seen[4])


def test_a_teachers_unet_is_asked_of_the_rack():
    run, asked = small_run(teachers=2), []

    class TeacherPool:
        def get(self, index):
            asked.append(index)
            return run.teachers[index].unet

    run.targets.pool = TeacherPool()
    Pictures(run, Eye()).paint()
    assert asked == [0, 1]


def test_many_styles_show_the_first(monkeypatch):
    assert module.STYLES == 16
    monkeypatch.setattr(module, "STYLES", 2)
    run, eye = small_run(teachers=3), Eye()
    Pictures(run, eye).paint()
    assert len(eye.seen) == 2 * 2


@pytest.mark.parametrize(
    "seconds, styles, steps",  # of a pass of a UNet; a pair of a style is 2 * 6 passes, and a sheet of three 36
    [(1, 3, 6), (2, 2, 6), (3, 1, 6), (6, 1, 5), (7.4, 1, 4), (8, 0, 0)],
)
def test_the_sheet_before_the_first_step_takes_a_minute(monkeypatch, tmp_path, seconds, styles, steps):
    """Seconds are counted passes of the UNets here. Only the first sheet is cut down, and the journal says by how much."""
    monkeypatch.setattr(module, "STEPS", 6)
    run, eye, journal, passed, passes = small_run(teachers=3, batch_size=2), Eye(), Journal(tmp_path), [0.0], []
    for unet in (run.student.unet, *(teacher.unet for teacher in run.teachers)):

        def count(*_):
            passed[0] += seconds
            passes.append(1)

        unet.register_forward_pre_hook(count)
    pictures = Pictures(run, eye, journal=journal, clock=lambda: passed[0])
    assert (pictures.paint() is None) == (styles == 0)
    assert len(eye.seen) == 2 * styles
    tried = 1 if steps < 6 else 0  # the step that told
    assert len(passes) == 2 * styles * steps + tried
    assert passed[0] <= module.FIRST_SECONDS + seconds
    notes = [line["note"] for line in read_log(tmp_path / "log.jsonl")] if (tmp_path / "log.jsonl").exists() else []
    if styles == 3:
        assert not notes
    elif styles:
        assert len(notes) == 1 and f"{styles} of 3 styles after {steps} of 6 steps" in notes[0]
    else:
        assert len(notes) == 1 and "no pictures before the first step" in notes[0]
    run.train_step()
    passes.clear()
    eye.seen.clear()
    assert pictures.paint() is not None
    assert len(eye.seen) == 6 - (styles if steps == 6 else 0), "teachers with all steps are painted once"


@pytest.mark.parametrize(
    "count, wanted, rows", [(1, 2, [0]), (2, 2, [1]), (3, 2, [1, 2]), (601, 2, [1, 301]), (601, 1, [1])]
)
def test_captions_are_spread(count, wanted, rows):
    assert spread(count, wanted) == rows


def test_a_sheet_is_a_file_by_step(tmp_path):
    run = small_run(teachers=2)
    run.train_step()
    image = Pictures(run, Eye(), folder=tmp_path / "pictures").paint()
    (path,) = tmp_path.rglob("*.*")
    assert path == tmp_path / "pictures" / "step-00000001.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_large_pictures_are_shown_smaller():
    run = small_run(teachers=1)
    large = [Image.new("RGB", (1024, 768))]
    sheet = Pictures(run, lambda latents: large).paint()
    assert sheet.width < 3 * 512 + 100 and large[0].size == (1024, 768)


# --- training never notices -------------------------------------------------------------------------------------------


def noisy_decoder(latents):
    torch.randn(3)  # a decoder that draws from the global generator
    return [Image.new("RGB", (8, 8)) for _ in latents]


def test_training_is_bitwise_the_same_with_and_without_pictures(tmp_path):
    runs = []
    for painted in (True, False):
        run = small_run(steps=3, teachers=2, batch_size=4)
        run.student.unet.train()
        run.student.unet.middle_block.eval()  # whatever its modes are
        modes = [module.training for module in run.student.unet.modules()]
        torch.manual_seed(5)
        pictures = Pictures(run, noisy_decoder, folder=tmp_path)
        if painted:
            pictures.paint()
        train(run, None, Watch(lambda run, metrics, p=pictures, painted=painted: p.paint() if painted else None))
        assert [module.training for module in run.student.unet.modules()] == modes
        assert all(p.requires_grad for p in run.student.unet.parameters())
        runs.append((run, torch.randn(4)))
    (one, after), (two, after_too) = runs
    assert torch.equal(after, after_too), "the global generator moved"
    assert same(raw(one), raw(two)) and same(one.student_weights(), two.student_weights())
    assert len(list(tmp_path.iterdir())) == 4


class Interrupt(BaseException):
    """Like the host's."""


def fails(error):
    def decode(latents):
        raise error

    return decode


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    MemoryError(),
    ValueError("of another family"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_failure_is_reported_once_with_its_step_and_harms_nothing(error, tmp_path, caplog):
    run, journal = small_run(teachers=1, batch_size=2), Journal(tmp_path)
    run.train_step()
    before = raw(run)
    pictures = Pictures(run, fails(error), folder=tmp_path / "pictures", journal=journal)
    for _ in range(2):
        assert pictures.paint() is None
    assert same(raw(run), before)
    assert len(caplog.records) == 1 and f"at step 1, training goes on: {type(error).__name__}" in caplog.text
    assert "\n" not in caplog.records[0].message
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line["step"] == 1 and type(error).__name__ in line["note"]
    assert not (tmp_path / "pictures").exists()

    pictures.decode = fails(RuntimeError("another kind"))
    pictures.paint()
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    pictures.decode = Eye()
    assert pictures.paint() is not None, "the next sheet is tried again"


@pytest.mark.parametrize(
    "error, passes", [(Interrupt(), True), (KeyboardInterrupt(), True), (RuntimeError("CUDA"), False)]
)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_an_end_in_the_middle_of_painting_puts_the_raw_weights_back(error, passes, who):
    run = small_run(teachers=2, batch_size=2)
    for _ in range(2):
        run.train_step()
    before, calls = raw(run), []

    def check():
        calls.append(1)
        if len(calls) == (
            2 if who == "student" else 2 * STEPS + 2
        ):  # after the student's two styles, a teacher's second step
            if who == "student":
                assert not same(raw(run), before), "not inside the averaged weights: this test tests nothing"
            raise error

    pictures = Pictures(run, Eye(), check_interrupt=check)
    if passes:
        with pytest.raises(type(error)):
            pictures.paint()
    else:
        assert pictures.paint() is None
    assert same(raw(run), before)


def test_a_failed_painting_holds_no_memory():
    """The latents of a failed sheet are gone when paint returns, with no error or frame that keeps them."""
    import gc
    import weakref

    run, latents = small_run(teachers=1), []

    def decode(latent):
        latents.append(weakref.ref(latent))
        raise RuntimeError

    gc.disable()
    try:
        assert Pictures(run, decode).paint() is None
    finally:
        gc.enable()
    assert latents[0]() is None


def test_a_full_disk_costs_the_file_only(tmp_path, monkeypatch, caplog):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert Pictures(small_run(teachers=1), Eye(), folder=tmp_path).paint() is not None
    assert list(tmp_path.iterdir()) == [] and "No space left" in caplog.text


def test_sheets_go_to_tensorboard(tmp_path):
    journal, shown = Journal(tmp_path), []
    journal.picture = lambda step, image: shown.append((step, image))
    image = Pictures(small_run(teachers=1), Eye(), journal=journal).paint()
    assert shown == [(0, image)]
