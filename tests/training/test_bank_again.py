"""A merged model as the base of a distillation: it goes on with its bank, its codes and its styles, each from the teacher of its name."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK, folded_bank
from comfyui_dmm.dmm_core.bank_fit import fit_bank, neutral_style
from comfyui_dmm.dmm_core.bank_size import bank_of
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.unet import UNet, load_unet
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.loop.eps_table import eps_errors
from comfyui_dmm.training.loop.new_student import plain_shapes
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.memory import footprint
from comfyui_dmm.training.memory.fitting import fitted
from comfyui_dmm.training.memory.footprint import Step, sizes, step_peak
from comfyui_dmm.training.memory.planner import GB, Choice, Want, resident_bytes
from comfyui_dmm.training.run.watch.pictures import Pictures
from comfyui_dmm.training.teachers.teacher import Teacher, in_style_order, without_styles
from PIL import Image

from .families import SMALL, SMALL_RUN, SMALL_XL, resumes_bitwise, small_data, small_teacher
from .test_cli import SHORT, dmm, folder, write_config  # noqa: F401  (a fixture)
from .test_planner import MIDDLE, measured_peak

DATA = small_data()
STYLE_SIDE = (f"{BANK}.", "model_embedding.", "add_embedding")


def merged_model(config=SMALL, styles=3, budget="60%") -> tuple[Teacher, list[Teacher], Teacher]:
    """(the merged model, its teachers, what it was told to paint without a style), random. Its codes and MLP show, as of one that was
    trained."""
    plain = small_teacher("plain", 0, DATA, config)
    teachers = [small_teacher(f"teacher {i}", i, DATA, config) for i in range(1, styles + 1)]
    shapes = plain_shapes(config)
    size = bank_of(budget, shapes, styles + 1, 2)
    models = [teacher.unet.state_dict() for teacher in teachers]
    fit = fit_bank(models, plain.unet.state_dict(), size.rank, shapes=shapes, bias=size.bias, dtype=torch.float32)
    weights = {key: weight for one in fit for key, weight in one.weights.items()}
    mlp = "add_embedding2" if config.adm_channels else "add_embedding"
    weights |= neutral_style(styles, config.embed_dim, mlp, torch.float32)
    weights[f"{mlp}.linear_2.weight"] = 0.1 * torch.randn(config.embed_dim, config.embed_dim)
    return dataclasses.replace(plain, name="base", unet=load_unet(weights)), teachers, plain


def again(config=SMALL, base=None, teachers=None, **settings) -> Trainer:
    made, theirs, _ = merged_model(config)
    return Trainer(base or made, teachers or theirs, DATA, TrainConfig(**{**SMALL_RUN, **settings}))


# --- where it starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "init"), [(SMALL, "base"), (SMALL_XL, "base"), (SMALL, "bank")])
def test_the_student_starts_as_the_merged_model(config, init):
    """With init bank too, as the presets have: it has its bank, whatever size they name."""
    run = again(config, init=init, bank="20%")
    base, student = run.base.unet, run.student.unet
    assert student.config == base.config and student.config.bank
    theirs, ours = base.state_dict(), student.state_dict()
    assert all(torch.equal(ours[key], weight) for key, weight in theirs.items()) and ours.keys() == theirs.keys()
    assert ours["model_embedding.weight"].data_ptr() != theirs["model_embedding.weight"].data_ptr()


def test_no_style_is_the_merged_model_without_one():
    """Rows of the base against a plain UNet with the last core folded in, which at full rank is the model the merge was told."""
    base, teachers, told = merged_model(budget="900%")
    run = again(base=base, teachers=teachers, base_share=0.5, lambda_feat=0.001)
    batch = run.data.batch(0, Draw(1, 12, 3, 0.5, 0.2, run.schedule))
    rows = batch.teacher == 3
    assert 0 < rows.sum() < 12
    out, features = run.targets(batch, batch.x_t, batch.t, features=True)
    alone = load_unet(
        {k: v for k, v in folded_bank(base.unet.state_dict(), torch.eye(4)[3]).items() if k in told.unet.state_dict()}
    )
    with torch.no_grad():
        context, y = base.conditioning(batch.caption[rows], batch.x_t.shape[2:], run.device)
        want, blocks = alone(batch.x_t[rows], batch.t[rows], context, y, features=True)
    torch.testing.assert_close(out[rows], want, rtol=1e-4, atol=1e-5)
    for ours, block in zip(features, blocks, strict=True):
        torch.testing.assert_close(ours[rows], block, rtol=1e-4, atol=1e-4)
    theirs, ours = told.unet.state_dict()["out.2.weight"], alone.state_dict()["out.2.weight"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    for i in range(3):  # the others are asked of their teachers, not of the merged model
        rows = batch.teacher == i
        with torch.no_grad():
            want = teachers[i].predict(batch.x_t[rows], batch.t[rows], batch.caption[rows]).out
        torch.testing.assert_close(out[rows], want, rtol=1e-5, atol=1e-5)


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable": "bank"},
        pytest.param({"optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param({"trainable": "lora", "lora_rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_what_learns_and_that_it_learns(settings):
    run = again(steps=25, **settings)
    before = {key: weight.clone() for key, weight in run.student_weights(False).items()}
    losses = [metrics.loss for metrics in run.run()]
    changed = {key for key, weight in run.student_weights(False).items() if not torch.equal(weight, before[key])}
    side = {key for key in before if key.startswith(STYLE_SIDE)}
    bank = {key for key in side if key.startswith(f"{BANK}.")}
    if settings.get("trainable") == "bank":
        assert changed == side
    elif settings.get("trainable") == "lora":  # adapters of the network; the bank is left alone
        assert side - bank <= changed and not changed & bank and "input_blocks.1.0.in_layers.2.weight" in changed
    else:
        assert changed == set(before)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable": "bank", "optimizer": "muon", "residency": "offload"},
        pytest.param({"lambda_adv": 0.1}, marks=pytest.mark.slow),
        pytest.param({"trainable": "lora", "lora_rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_it_resumes_bitwise(tmp_path, settings):
    resumes_bitwise(lambda: again(**settings), tmp_path)


def test_teachers_in_ram_teach_the_same():
    """The merged model has other sizes than they have: it stays on the device."""
    losses = [
        [m.loss for m in again(steps=3, residency=where, base_share=0.3).run()] for where in ("device", "offload")
    ]
    assert losses[0] == losses[1]


def test_pictures_and_the_table_at_the_end():
    run = again(steps=30, lr=1e-3)
    sheet = Pictures(run, lambda latents: [picture(latent) for latent in latents])._sheet()
    assert sheet is not None and sheet.size[1] > 3 * 8
    before = eps_errors(run.teachers, run.base, None, load_unet(run.student_weights(False)), data=run.data)
    list(run.run())
    after = eps_errors(run.teachers, run.base, None, load_unet(run.student_weights(False)), data=run.data)
    assert all(new.student < old.student for new, old in zip(after, before, strict=True))


def picture(latent: torch.Tensor) -> Image.Image:
    return Image.fromarray((127 + 127 * latent[:3].clamp(-1, 1)).byte().permute(1, 2, 0).numpy())


# --- teachers by name -------------------------------------------------------------------------------------------------


def test_teachers_are_put_in_the_order_of_the_styles():
    styles = [StyleInfo("ink"), StyleInfo("Pop Art"), StyleInfo("墨")]
    teachers = [StyleInfo(name) for name in ("墨", "INK ", "pop art")]
    assert [one.name for one in in_style_order(styles, teachers)] == ["INK ", "pop art", "墨"]
    with pytest.raises(
        ValueError, match="no teacher for Pop Art, 墨; no style oil in it. Its styles are ink, Pop Art, 墨"
    ):
        in_style_order(styles, [StyleInfo("oil"), StyleInfo("ink")])


def test_what_a_teacher_says_of_itself_and_what_the_model_knew():
    known = StyleInfo(
        "ink", "thin lines", teacher="old.safetensors", sha256="1" * 64, licence="CC0", recommended={"cfg": 3}
    )
    teacher = small_teacher("INK", 1, DATA)
    teacher.file, teacher.sha256, teacher.licence = "new.safetensors", "2" * 64, "MIT"
    teacher.goes_on_as(known)
    assert teacher.info() == dataclasses.replace(known, teacher="new.safetensors", sha256="2" * 64, licence="MIT")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(folder):  # noqa: F811
    """merged.safetensors, of the folder's teachers."""
    teachers = [word for name in ("one", "two") for word in ("--teacher", f"{name}={folder / name}.safetensors")]
    base = folder / "base.safetensors"
    output = folder / "merged.safetensors"
    assert dmm("merge", *teachers, "--base", base, "--parts-from", base, "--budget", "60%", "--output", output) == 0
    return folder


TEACHERS = [
    {"name": "Two", "file": "two.safetensors", "description": "again"},
    {"name": "one", "file": "one.safetensors"},
]


def test_a_merged_file_goes_on_from_files(merged, capsys):
    """Teachers in another order; stopped and gone on; then once more from its own result."""
    write_config(merged, base="merged.safetensors", teachers=TEACHERS, train={**SHORT, "steps": 2})
    assert dmm("distill", "--config", merged / "run.yaml") == 0, capsys.readouterr().err
    write_config(merged, base="merged.safetensors", teachers=TEACHERS)
    assert dmm("distill", "--config", merged / "run.yaml") == 0, capsys.readouterr().err
    start, end = (load_checkpoint(merged / file) for file in ("merged.safetensors", "out/dmm.safetensors"))
    assert [style.name for style in end.styles] == ["one", "two"] and end.recipe["steps_done"] == 4
    assert end.styles[1].description == "again" and end.styles[1].sha256 == start.styles[1].sha256
    (before,) = end.recipe["history"]
    assert before["styles"] == ["one", "two"] and before["merge"]["budget"] == "60%"
    assert end.unet.keys() == start.unet.keys() and end.text and end.vae
    # Four steps: still far nearer to where it began than the other style's core is.
    key = f"{BANK}.input_blocks.1.0.in_layers.2.cores.weight"
    moved = (end.unet[key].float() - start.unet[key].float()).norm(dim=1)
    apart = (start.unet[key][0].float() - start.unet[key][1].float()).norm()
    assert 0 < moved.max() < 0.3 * apart
    write_config(
        merged, base="out/dmm.safetensors", teachers=TEACHERS, output="out/more.safetensors", run_dir="out/run2"
    )
    assert dmm("distill", "--config", merged / "run.yaml") == 0, capsys.readouterr().err
    more = load_checkpoint(merged / "out" / "more.safetensors")
    assert [list(entry)[1] for entry in more.recipe["history"]] == ["merge", "train"]
    capsys.readouterr()
    assert dmm("info", merged / "out" / "more.safetensors") == 0
    assert "style bank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": TEACHERS[:1]}, "no teacher for one. Its styles are one, two"),
        ({"teachers": [*TEACHERS, {"name": "oil", "file": "one.safetensors"}]}, "no style oil in it"),
        ({"train": {**SHORT, "init": "soup"}}, "init is 'soup': a model that has styles already goes on from itself"),
        (
            {"teachers": [TEACHERS[0], {"name": "one", "file": "merged.safetensors"}]},
            "teacher 'one' is itself a DMM model with 2 styles",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(merged, capsys, changes, message):
    write_config(merged, **{"base": "merged.safetensors", "teachers": TEACHERS, **changes})
    assert dmm("distill", "--config", merged / "run.yaml") == 1
    assert message in capsys.readouterr().err
    assert not (merged / "out").exists()


# --- memory -----------------------------------------------------------------------------------------------------------


def bank_again(trainable="all", **changes) -> Step:
    base, *_ = merged_model(MIDDLE, 3)
    step = Step(MIDDLE, (32, 32), 3, precision="fp32", teacher_dtype="fp32", device="cpu")
    return dataclasses.replace(step, bank=base.unet.config.bank, base=base.unet.config, trainable=trainable, **changes)


@pytest.mark.parametrize("trainable", [pytest.param("all", marks=pytest.mark.slow), "bank"])
def test_the_estimate_is_that_of_a_real_step(trainable):
    """The merged model answers, as for rows without a style. Tolerance 5%, as for other steps."""
    step = bank_again(trainable)
    student, base = footprint._student(step), UNet(step.base).requires_grad_(False)
    for p in student.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    real = measured_peak(lambda: footprint._one_step(step, 3, student=student, teacher=base, head=None))
    assert step_peak(step, 3) == pytest.approx(real, rel=0.05)


def test_the_base_is_counted_as_it_is():
    """Its bank and codes come on top of a teacher's size; and where teachers wait in RAM it does not."""
    step = bank_again()
    extra = [p for name, p in UNet(step.base).named_parameters() if name.startswith(STYLE_SIDE)]
    assert sizes(step).base - sizes(step).teacher == sum(4 * p.numel() for p in extra)
    here = Choice("all", "adamw", 2, "device", False, "device", 4, 1)
    waiting = dataclasses.replace(here, residency="offload")
    bytes_of = {
        (choice.residency, base is not None): resident_bytes(
            sizes(dataclasses.replace(step, base=base)), 8, choice, Want(base=base)
        )["teachers"]
        for choice in (here, waiting)
        for base in (step.base, None)
    }
    teacher, merged = sizes(step).teacher, sizes(step).base
    assert bytes_of["device", True] == 8 * teacher + merged and bytes_of["device", False] == 9 * teacher
    assert bytes_of["offload", True] == 2 * teacher + merged and bytes_of["offload", False] == 2 * teacher


def test_in_little_memory_the_bank_learns_alone():
    """Of a student that has its bank from its base. (Of one that gets one: test_bank_run.) Memory in sizes of a model in float32."""
    banked = merged_model(SMALL, 3, "10%")[0].unet.config
    size = 4 * sum(p.numel() for p in UNet(without_styles(banked)).parameters())
    for models, trainable in ((12, "all"), (7, "bank")):
        config = TrainConfig(lambda_adv=0.0, lambda_feat=0.0, batch_size=1, memory=models * size / GB)
        fits, found = fitted(config, banked, (8, 8), 3, device=torch.device("cpu"))
        assert fits.trainable == trainable and found.peak < models * size
        named = dataclasses.replace(
            config, init="bank", bank="90%"
        )  # of which only a bank of its own would have the size
        assert fitted(named, banked, (8, 8), 3, device=torch.device("cpu"))[1].breakdown == found.breakdown


def test_the_plan_is_printed(merged, capsys):
    write_config(
        merged, base="merged.safetensors", teachers=TEACHERS, train={**SHORT, "trainable": "bank", "memory": 1.0}
    )
    assert dmm("distill", "--config", merged / "run.yaml", "--dry-run") == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "learning: the style bank and the style side, adamw" in shown and not (merged / "out").exists()
