"""Few steps in a real ComfyUI: the edges are its sampler's, the LoRA fits its loader, the node, and words about other settings."""

import json
import logging
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.config import FewStepConfig, TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents
from comfyui_dmm.training.files.checksums import read_checked
from comfyui_dmm.training.loop.few_steps import few_stepping
from comfyui_dmm.training.loop.phased import Phases
from comfyui_dmm.training.run.student_file import save_lora
from comfyui_dmm.training.teachers.teacher import Teacher

from .families import NAMES
from .sampling import conditioning
from .test_distill_host import queue, saved
from .test_grow_host import files, grown, text_of  # noqa: F401  (a fixture)

MODEL = Path(__file__).parents[2] / "models" / "dmm" / "demo-dmm.safetensors"


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_edges_are_what_the_hosts_sampler_visits(host, count, zero_snr):
    import comfy.model_sampling
    import comfy.samplers

    class Config:
        sampling_settings = {"zsnr": zero_snr}

    levels = comfy.model_sampling.ModelSamplingDiscrete(Config(), zsnr=zero_snr)
    sigmas = comfy.samplers.calculate_sigmas(levels, "sgm_uniform", count)
    assert sigmas[-1] == 0
    told = levels.timestep(sigmas[:-1]).long().tolist()
    assert Phases(NoiseSchedule(zero_snr), count).edges == [*told, -1]


def test_the_hosts_lora_loader_makes_the_student_of_the_demo_model(host, tmp_path):
    """A model with a style bank: every module of the LoRA finds its weight, and the patched MODEL has the student's weights."""
    import comfy.lora
    import comfy.sd
    from comfyui_dmm.nodes import host_model

    file = load_checkpoint(MODEL)
    g = torch.Generator().manual_seed(0)
    data = CaptionedLatents(torch.randn(4, 4, 8, 8, generator=g), [f"caption {i}" for i in range(4)])
    base = Teacher("base", load_unet(file.unet), torch.randn(5, 77, file.config.context_dim, generator=g))
    styles = [base.as_style(i, StyleInfo(style.name)) for i, style in enumerate(file.styles)]
    config = TrainConfig(steps=2, batch_size=2, lr=1e-2, trainable="lora", lora_rank=2, ema_gamma=None, seed=1)
    settings = FewStepConfig(paths=0, objective="consistency")
    run = few_stepping(base, styles, data, config=config, device=torch.device("cpu"), settings=settings)
    list(run.run())
    assert save_lora(run, tmp_path / "turbo.safetensors", "turbo")
    with torch.inference_mode():
        model, clip, *_ = host_model.load(str(MODEL))
        weights, _ = read_checked(tmp_path / "turbo.safetensors")
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        found = comfy.lora.load_lora(weights, known, log_missing=True)
        assert len(found) == sum(key.endswith("lora_up.weight") for key in weights)
        patched, _ = comfy.sd.load_lora_for_models(model, clip, weights, 1.0, 0.0)
        student = run.student_weights()
        for key, value in student.items():
            ours = f"diffusion_model.{key}"
            if ours in patched.patches:
                got = comfy.lora.calculate_weight(patched.patches[ours], value.new_tensor(file.unet[key].float()), ours)
                torch.testing.assert_close(got, value, atol=3e-3, rtol=3e-3)
    assert set(found) <= {f"diffusion_model.{key}" for key in student}


def test_a_few_step_file_warns_of_other_settings_and_paints(host, caplog):
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.few_step_check import what_is_wrong

    told = {"steps": 4, "sampler": "euler", "scheduler": "sgm_uniform", "cfg": 1.0}
    assert what_is_wrong(told, "euler", 4, 1.0) == "" == what_is_wrong(told, "", 4, None)
    assert what_is_wrong(told, "dpmpp_2m", 25, 7.0) == (
        "this few-step model paints best with sampler euler (not dpmpp_2m), 4 steps (not 25), cfg 1 (not 7)"
    )
    file = load_checkpoint(MODEL)
    file.recipe = {**file.recipe, "few_steps": told}
    import comfy.sample

    with torch.inference_mode():
        model = host_model.build_model(file)
        noise = torch.randn(1, 4, 8, 8)
        cond = conditioning(file.config, 0)
        for steps, cfg, sampler, warns in ((4, 1.0, "euler", False), (2, 5.0, "dpmpp_2m", True)):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                out = comfy.sample.sample(
                    model, noise, steps, cfg, sampler, "sgm_uniform", cond, cond, torch.zeros_like(noise), seed=0
                )
            assert torch.isfinite(out).all()
            assert ("this few-step model paints best with" in caplog.text) == warns


def few(name: str, **settings) -> dict:
    """The graph of Forget Style with the few-step node in its place."""
    g = grown("DMMForgetStyle", name)
    inputs = g["distil"]["inputs"]
    for key in ("guard", "attack_codes", "attack_every", "attack_steps", "check_steps", "feature_weight", "style_rate"):
        inputs.pop(key, None)
    inputs |= {"sampling_steps": 4, "cfg_to_learn": 2.0, "own_paintings": 1, "lora_rank": 2, **settings}
    g["distil"]["class_type"] = "DMMFewStep"
    g["style"]["inputs"]["style"] = NAMES[0]
    return g


def test_the_node_saves_a_model_and_a_lora_and_goes_on(files):  # noqa: F811
    end, messages = queue(files, few("four"))
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "four")
    assert load_checkpoint(path).recipe["few_steps"]["steps"] == 4
    (lora,) = (files.base / "output" / "loras").glob("four-*.safetensors")
    told = json.loads(read_checked(lora)[1]["dmm.few_steps"])
    assert (told["sampler"], told["scheduler"], told["cfg"]) == ("euler", "sgm_uniform", 1.0)
    assert f"loras/{lora.name}" in text_of(messages) and "cfg 1" in text_of(messages)
    assert lora.stem == path.stem, "one run, one name"
    output = next(d["output"] for kind, d in messages if kind == "executed" and d["node"] == "distil")
    assert output["saved"][0]["few_steps"] == load_checkpoint(path).recipe["few_steps"]
    (files.base / "models" / "dmm" / "four.safetensors").write_bytes(path.read_bytes())
    g = few("again")
    g["old"]["inputs"]["ckpt_name"] = "four.safetensors"
    end, messages = queue(files, g)
    assert end == "execution_error" and "few-step model already" in str(messages[-1])


def test_a_cancel_keeps_the_lora_too(files):  # noqa: F811
    asked = []

    def cancel(message):
        kind, data = message
        if kind == "progress" and data["node"] == "distil" and data["value"] >= 3 and not asked:
            asked.append(data["value"])
            files.interrupt()

    end, _ = queue(files, few("few-cancelled", steps=40, own_paintings=0, save_every=1000), cancel)
    assert end == "execution_interrupted" and asked
    (path,) = saved(files, "few-cancelled")
    lora = files.base / "output" / "loras" / path.name
    steps = json.loads(read_checked(lora)[1]["dmm.few_steps"])["steps_done"]
    assert 3 <= steps == load_checkpoint(path).recipe["steps_done"] < 40


def test_a_lora_that_could_not_be_written_is_said_before_training(files):  # noqa: F811
    loras, away = files.base / "output" / "loras", files.base / "output" / "loras-away"
    loras.parent.mkdir(parents=True, exist_ok=True)
    if loras.exists():
        loras.rename(away)
    try:
        loras.write_text("a file where the folder would be")
        end, messages = queue(files, few("few-unwritable"))
        assert end == "execution_error"
        assert "the folder of the LoRA cannot be made" in str(messages[-1]) and not saved(files, "few-unwritable")
    finally:
        loras.unlink()
        if away.exists():
            away.rename(loras)
