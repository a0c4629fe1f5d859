"""What of the student learns, the optimisers, and what the file gets of it."""

import sys

import pytest
import torch
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.adapters import folded_state_dict
from comfyui_dmm.training.loop.student import compiler_explained, style_rows

from .families import small_run


@pytest.mark.parametrize("trainable", ["lora", "style"])
def test_only_what_is_trainable_moves(trainable):
    run = small_run(trainable=trainable, lora_rank=4)
    base = run.base.unet.state_dict()
    list(run.run())
    style = ("model_embedding.", "add_embedding.")
    moved = {k for k, v in run.student_weights(False).items() if k not in base or not torch.equal(v, base[k])}
    assert {k for k in moved if k.startswith(style)} == {k for k in run.student_weights() if k.startswith(style)}
    others = {k for k in moved if not k.startswith(style)}
    if trainable == "style":
        assert not others
    else:  # Linear and Conv2d weights inside the blocks, nothing else
        want = {k for k, v in base.items() if v.ndim > 1 and k.split(".")[0].endswith(("blocks", "block"))}
        assert others == want


def test_a_low_rank_students_file_paints_what_it_painted():
    """The folded weights in a plain UNet give the adapters' output: tolerance 1e-5."""
    run = small_run(trainable="lora", lora_rank=4, lr=1e-2)
    list(run.run())
    batch = run.draws(0)
    with torch.no_grad():
        rows = style_rows(batch.teacher, run.num_styles)
        ours = run.student.predict(batch.x_t, batch.t, batch.caption, rows).out
        file = load_unet(run.student_weights(averaged=False))
        context, _ = run.base.conditioning(batch.caption, (8, 8), torch.device("cpu"))
        theirs = file(batch.x_t, batch.t, context, style=rows)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_folding_is_weight_plus_up_times_down():
    run = small_run(trainable="lora", lora_rank=3)
    with torch.no_grad():
        for name, p in run.student.trained.items():
            if name.endswith(".up"):
                p.normal_()
    folded = folded_state_dict(run.student.unet)
    name = "input_blocks.1.0.in_layers.2"
    adapter = run.student.unet.get_submodule(name).parametrizations.weight
    want = adapter.original + (adapter[0].up @ adapter[0].down).view_as(adapter.original)  # alpha = rank: scale 1
    torch.testing.assert_close(folded[f"{name}.weight"], want)
    assert set(folded) == set(small_run().student.unet.state_dict())


def test_a_low_rank_student_starts_as_its_base_and_learns_little_memory():
    run, full = small_run(trainable="lora", lora_rank=2), small_run()
    base = run.base.unet.state_dict()
    assert all(torch.equal(v, base[k]) for k, v in run.student_weights().items() if k in base)
    count = {id(r): sum(p.numel() for p in r.student.trained.values()) for r in (run, full)}
    assert count[id(run)] < 0.5 * count[id(full)]


def test_frozen_matrices_wait_in_half_precision_and_lose_nothing_of_an_fp16_base():
    run = small_run(trainable="lora", lora_rank=2, precision="bf16")
    frozen = {k: p for k, p in run.student.unet.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values() if p.ndim > 1} == {torch.float16}
    assert (
        {p.dtype for p in frozen.values() if p.ndim == 1}
        == {p.dtype for p in run.student.trained.values()}
        == {torch.float32}
    )
    base = run.base.unet.state_dict()
    weights = run.student_weights(False)
    assert all(torch.equal(weights[k].half(), base[k].half()) for k in base if base[k].ndim > 1)
    losses = [m.loss for m in run.run()]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_other_optimisers_move_by_rates_of_adamws_kind():
    """All move a weight by about lr a step (root mean square); within a factor of 3 at the first step."""
    moved = {}
    for kind in ("adamw", "adafactor", "muon"):
        run = small_run(optimizer=kind, lr=1e-4, weight_decay=0.0)
        before = run.student.unet.out[2].weight.detach().clone()
        run.train_step()
        moved[kind] = (run.student.unet.out[2].weight.detach() - before).square().mean().sqrt().item()
    assert all(1 / 3 < moved[kind] / moved["adamw"] < 3 for kind in moved), moved


def test_eight_bit_without_its_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        small_run(optimizer="adamw8bit")


def test_compiled_training_takes_the_same_steps():
    """torch.compile without graph breaks (backend aot_eager): same losses to 1e-4."""
    plain, compiled = small_run(steps=3), small_run(steps=3)
    compiled.student.forward = torch.compile(compiled.student.unet, backend="aot_eager", fullgraph=True)
    for a, b in zip(plain.run(), compiled.run()):
        assert abs(a.loss - b.loss) < 1e-4 * abs(a.loss)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("accumulate", 0, "accumulate is 0"),
        ("optimizer", "sgd", "optimizer is 'sgd': choose one of adamw"),
        ("trainable", "most", "trainable is 'most'"),
        ("lambda_adv", -1.0, "lambda_adv is -1.0"),
        ("final_lr", 0.0, "final_lr is 0.0"),
        ("residency", "cloud", "residency is 'cloud'"),
    ],
)
def test_settings_that_make_no_sense(setting, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{setting: value}).check()


def test_a_compiler_that_fails_is_explained_and_other_errors_are_not():
    from torch._dynamo.exc import TorchDynamoException

    with (
        pytest.raises(ValueError, match=r"could not be compiled \(main.so: file too short\): set compile to false"),
        compiler_explained(),
    ):
        raise TorchDynamoException("main.so: file too short\nand 200 lines more")
    with pytest.raises(RuntimeError, match="out of memory"), compiler_explained():
        raise RuntimeError("out of memory")
