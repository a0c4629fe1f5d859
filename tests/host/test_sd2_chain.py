"""SD2.x through a real ComfyUI: v-prediction, teachers of both kinds, schedules that end in pure noise."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.unet import UNetConfig

from . import chain
from .families import SD20, SDXL, SMALL_SD20, checkpoint_of, random_unet
from .mixture import check_regions

SCALE = 0.18215
"""Of SD1.x's and SD2.x's latents."""


@pytest.fixture(scope="module")
def distilled(server):
    """Base and first teacher predict v, the second eps -> (server, the student's file)."""
    chain.write_models(server.base / "models" / "dmm", "sd2", SMALL_SD20, ("v", "v", "eps"))
    server.run(chain.distil_graph("sd2"))
    (path,) = (server.base / "output" / "dmm").glob("sd2-*.safetensors")
    return server, path


def test_the_student_predicts_as_its_base(distilled):
    server, path = distilled
    base = load_checkpoint(server.base / "models" / "dmm" / "sd2 base.safetensors")
    learnt = load_checkpoint(path)
    saved = load_checkpoint(next((server.base / "output" / "dmm").glob("sd2 saved_*.safetensors")))
    assert learnt.prediction == saved.prediction == "v" and not learnt.zero_snr
    assert [style.name for style in learnt.styles] == list(chain.STYLES)
    chain.assert_same_weights(chain.read_text(learnt), chain.read_text(base))
    chain.assert_same_weights(chain.read_text(saved), chain.read_text(learnt))
    chain.assert_same_weights(saved.unet, learnt.unet)


def test_the_painting_is_our_own_and_that_of_the_reloaded_files(distilled):
    server, path = distilled
    host = chain.saved_latents(server, "sd2")
    ours, plain = (chain.our_latents(path, style) for style in (chain.STYLES[1], None))
    chain.assert_same_painting(SCALE * host, ours)
    assert (ours - plain).abs().max() > 0.01 * ours.abs().max(), "the style does not show in this test"
    for name in (path.name, "sd2 saved_00001_.safetensors"):
        server.run({"model": chain.load_node(name), **chain.painting_nodes(["model", 0], ["model", 1], "sd2 again")})
        assert torch.equal(chain.saved_latents(server, "sd2 again"), host)


def test_headless_with_a_schedule_that_ends_in_noise(models, tmp_path):
    files = chain.write_models(tmp_path, "sd2", SMALL_SD20, ("v", "v", "v"), zero_snr=True)
    learnt = load_checkpoint(chain.check_headless(tmp_path, files))
    assert learnt.prediction == "v" and learnt.zero_snr


@pytest.mark.parametrize("zero_snr", [False, True])
def test_regions_are_mixture_of_diffusers(models, zero_snr):
    unet = random_unet(SMALL_SD20)
    path = models / "dmm" / "small-sd2.safetensors"
    save_checkpoint(path, checkpoint_of(unet, whole=True, prediction="v", zero_snr=zero_snr))
    model, clip = chain.load(path)
    prompts = [chain.encode(clip, text) for text in ("a lake", "", "a red star", "grey")]
    check_regions(model, unet, prompts, SCALE, "v", zero_snr)


def test_what_the_trainer_sees_is_what_the_host_paints_with(models, tmp_path):
    files = chain.write_models(tmp_path, "sd2", SMALL_SD20, ("v", "v", "eps"))
    everyone = chain.check_teachers(files, SCALE)
    assert [teacher.prediction for teacher in everyone] == ["v", "v", "eps"]


@pytest.mark.parametrize("sampling, zero_snr", [("v_prediction", True), ("eps", False)])
def test_the_hosts_model_sampling_discrete_counts(models, tmp_path, sampling, zero_snr):
    """For files that do not say what they predict the user does, with the host's node; here against what the files say."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    files = chain.write_models(tmp_path, "sd2", SMALL_SD20, ("eps", "v", "eps"))
    everyone = chain.check_teachers(files, SCALE, lambda m: ModelSamplingDiscrete().patch(m, sampling, zero_snr)[0])
    assert {(t.prediction, t.zero_snr) for t in everyone} == {(sampling.removesuffix("_prediction"), zero_snr)}


def test_a_teacher_that_predicts_something_else_is_refused(models, tmp_path):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    files = chain.write_models(tmp_path, "sd2", SMALL_SD20)
    with pytest.raises(
        ValueError, match="the base model samples by ModelSamplingDiscreteDistilled, LCM: only eps- and v"
    ):
        chain.check_teachers(files, SCALE, lambda m: ModelSamplingDiscrete().patch(m, "lcm", False)[0])


# The host reads SD2.x's prediction off one bias of the last block (its std is above 0.09 where v is predicted).
TWELVE_BLOCKS = dataclasses.replace(
    SD20, num_res_blocks=(5, 5), depth_input=(1,) + (0,) * 9, depth_output=(0,) * 11 + (1,), depth_middle=0
)


@pytest.mark.parametrize("config, spread", [(TWELVE_BLOCKS, 0.2), (SDXL, None)], ids=["sd2", "sdxl"])
def test_the_hosts_own_loader_sees_v(models, tmp_path, config: UNetConfig, spread):
    """Checkpoint Loader (Simple) on a DMM file of the released widths: SDXL by its marks, SD2.x by the weights."""
    import comfy.sd
    from comfy.model_base import ModelType

    unet = random_unet(config)
    if spread:
        unet.get_parameter("output_blocks.11.1.transformer_blocks.0.norm1.bias").data.normal_(std=spread)
    for prediction, expected in (("v", ModelType.V_PREDICTION), ("eps", ModelType.EPS)):
        if prediction == "eps" and spread:
            unet.get_parameter("output_blocks.11.1.transformer_blocks.0.norm1.bias").data.zero_()
        zero_snr = prediction == "v" and not spread
        path = tmp_path / f"{prediction}.safetensors"
        save_checkpoint(path, checkpoint_of(unet, torch.float16, prediction=prediction, zero_snr=zero_snr))
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0].model
        assert model.model_type == expected
        assert (model.model_sampling.sigma_max > 1000) == zero_snr
