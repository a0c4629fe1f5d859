"""What a model predicts and its clip skip: from every place that says it, against diffusers and transformers."""

import dataclasses
import json
import logging

import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import GUESS, load_checkpoint
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import ModelSettings
from comfyui_dmm.training.config_file import load_config
from comfyui_dmm.training.data.buckets import default_resolution
from comfyui_dmm.training.data.open_cache import open_cache
from comfyui_dmm.training.files.describe import describe
from comfyui_dmm.training.files.model_files import load_any, load_any_info
from comfyui_dmm.training.files.model_settings import split_settings, with_settings
from comfyui_dmm.training.paint.painter import painter
from comfyui_dmm.training.run.load import load_run
from comfyui_dmm.training.run.state import identity
from comfyui_dmm.training.teachers.models import as_checkpoint
from comfyui_dmm.training.text import ClipText, init_text
from PIL import Image
from safetensors.torch import save_file

from .families import SMALL

SIZES = dataclasses.replace(SMALL, depth_output=(1, 1, 0, 0))  # which diffusers can describe

PROMPTS = ["", "a red star", "a picture of hills, at night"]
V_YAML = "model:\n  params:\n    parameterization: v\n"


def raw_file(path, seed=0, metadata=None, marks=(), text=True):
    """A checkpoint as others write it: without a word of ours."""
    torch.manual_seed(seed)
    tensors = {f"model.diffusion_model.{k}": v for k, v in UNet(SIZES).state_dict().items()}
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)).state_dict() if text else {}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.items()} | (init_text(16, 3, seed=7) if text else {})
    save_file(tensors | {mark: torch.empty(0) for mark in marks}, path, metadata or {"format": "pt"})
    return path


def clip_by_transformers(text, prompts, skip):
    """transformers' own CLIP: its last state, or that before the last layers through its final norm (diffusers' ``clip_skip``)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    weights = {k.removeprefix("cond_stage_model.transformer."): v for k, v in text.items()}
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )).eval()  # fmt: skip
    own = model.state_dict()
    model.load_state_dict(
        {k if k in own else k.removeprefix("text_model."): v for k, v in weights.items()}, strict=False
    )
    tokens = ClipText(text).tokenizer
    ids = torch.tensor([(i := tokens(p)["input_ids"]) + [49407] * (77 - len(i)) for p in prompts])
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        norm = getattr(model, "text_model", model).final_layer_norm
        return norm(out.hidden_states[-skip])


SAID = [
    ({}, (), None, "", "eps", False, GUESS),
    ({"dmm.prediction": "v"}, (), None, "", "v", False, "dmm.prediction"),
    ({}, ("v_pred",), None, "", "v", False, "its tensor 'v_pred'"),
    ({}, ("v_pred", "ztsnr"), None, "", "v", True, "its tensor 'v_pred'"),
    ({}, (), V_YAML, "", "v", False, "model.yaml"),
    ({}, (), V_YAML.replace("v\n", "eps\n"), "", "eps", False, "model.yaml"),
    ({"modelspec.prediction_type": "v"}, (), None, "", "v", False, "modelspec"),
    ({"modelspec.predict_key": "epsilon"}, (), V_YAML, "", "v", False, "model.yaml"),
    ({"ss_v_parameterization": "True"}, (), None, "", "v", False, "ss_v_parameterization"),
    ({"ss_v_parameterization": "False"}, (), None, "", "eps", False, "ss_v_parameterization"),
    ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (), None, "", "v", True, "ss_v_parameterization"),
    ({"dmm.prediction": "eps"}, (), V_YAML, "", "eps", False, "dmm.prediction"),  # with a warning
    ({}, (), V_YAML, ",prediction=eps", "eps", False, "a setting"),
    ({"dmm.prediction": "eps"}, (), None, ",prediction=v,zero_snr=true", "v", True, "a setting"),
    ({}, ("v_pred", "ztsnr"), None, ",zero_snr=false", "v", False, "its tensor 'v_pred'"),
]  # fmt: skip


@pytest.mark.parametrize("metadata, marks, beside, behind, prediction, zero_snr, told_by", SAID)
def test_every_place_that_says_what_a_model_predicts(
    tmp_path, metadata, marks, beside, behind, prediction, zero_snr, told_by
):
    file = raw_file(tmp_path / "model.safetensors", metadata={"a": "b", **metadata}, marks=marks, text=False)
    if beside:
        (tmp_path / "model.yaml").write_text(beside)
    model = as_checkpoint(f"{file}{behind}")
    assert (model.prediction, model.zero_snr, model.prediction_from) == (prediction, zero_snr, told_by)
    if not behind:
        row = next(line for line in describe(file, digest=False).splitlines() if line.startswith("prediction"))
        assert prediction in row.split() or f"{prediction}," in row.split()
        assert ("guess" in row) == (told_by == GUESS) and (".yaml" in row) == told_by.endswith(".yaml")
        assert load_any_info(file).prediction == prediction


@pytest.mark.parametrize(
    "metadata, beside, behind, skip",
    [
        ({}, "", "", None),
        ({"dmm.clip_skip": "3"}, "", "", 3),
        ({"modelspec.encoder_layer": "2"}, "", "", 2),
        ({"modelspec.encoder_layer": "1"}, "", "", None),
        ({"ss_clip_skip": "2"}, "", "", 2),
        ({"ss_clip_skip": "None"}, "", "", None),
        ({}, "model: {params: {cond_stage_config: {params: {layer: hidden, layer_idx: -2}}}}", "", 2),
        ({}, "model: {params: {cond_stage_config: {params: {layer_idx: [1]}}}}", "", None),
        ({"ss_clip_skip": "3"}, "", ",clip_skip=2", 2),
        ({"ss_clip_skip": "3"}, "", ",clip_skip=1", 1),
    ],
)
def test_every_place_that_says_the_clip_skip(tmp_path, metadata, beside, behind, skip):
    file = raw_file(tmp_path / "model.safetensors", metadata={"a": "b", **metadata})
    if beside:
        (tmp_path / "model.yaml").write_text(beside)
    model = as_checkpoint(f"{file}{behind}")
    assert model.clip_skip == skip
    contexts = painter(model).text.encode(PROMPTS)
    torch.testing.assert_close(contexts, clip_by_transformers(model.text, PROMPTS, skip or 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("broken", ["model: [", "a: 1", "[]", "model: {params: 3}", "\x00", "model: &a {params: *a}"])
def test_a_yaml_that_is_something_else_is_left_alone(tmp_path, broken):
    file = raw_file(tmp_path / "model.safetensors", text=False)
    (tmp_path / "model.yaml").write_text(broken)
    assert load_any(file).prediction_from == GUESS
    (tmp_path / "model.yaml").write_text(V_YAML.replace("v\n", "x0\n"))
    with pytest.raises(ValueError, match="model.yaml: parameterization is 'x0', only eps and v"):
        load_any(file)


def test_the_text_form_of_settings(tmp_path):
    plain = raw_file(tmp_path / "a,clip_skip=2.safetensors", text=False)
    assert split_settings(plain) == (str(plain), ModelSettings())
    odd = tmp_path / "a,clip_skip=2"
    plain.rename(odd)  # a file that is really called so
    assert split_settings(odd) == (str(odd), ModelSettings())
    file = str(raw_file(tmp_path / "b.safetensors", text=False))
    for settings in (ModelSettings(), ModelSettings("v", False, 3), ModelSettings(clip_skip=1)):
        assert split_settings(with_settings(file, settings)) == (file, settings)
    for wrong in ("clipskip=2", "prediction=x0", "clip_skip=0", "clip_skip=two", "zero_snr=1", "prediction="):
        with pytest.raises(ValueError, match=f"'{wrong}' behind a model's file: expected prediction=eps"):
            split_settings(f"{file},{wrong}")
    with pytest.raises(ValueError, match="none.safetensors"):
        as_checkpoint(f"{tmp_path}/none.safetensors,prediction=v")


@pytest.fixture
def run_folder(tmp_path):
    """A base and two teachers as others write them, and latents."""
    for seed, name in enumerate(("base", "one", "two")):
        raw_file(tmp_path / f"{name}.safetensors", seed)
    captions = json.dumps(PROMPTS[1:] * 4)
    save_file({"latents": torch.randn(8, 4, 8, 8)}, tmp_path / "data.safetensors", {"captions": captions})
    return tmp_path


def config_of(folder, base=None, **teacher):
    config = {
        "base": "base.safetensors", "output": "out.safetensors", "run_dir": "run",
        "teachers": [{"name": "one", "file": "one.safetensors", **teacher}, {"name": "two", "file": "two.safetensors"}],
        "data": {"kind": "latents", "file": "data.safetensors"},
        "train": {"steps": 2, "batch_size": 2, "lambda_adv": 0.0, "validation": 0, "device": "cpu"},
        **(base or {}),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "run.yaml")


def test_a_run_reads_each_model_at_its_own_clip_skip(run_folder):
    """Base at 1, one teacher at 2, the other at 3 by its metadata; the student's file keeps the base's."""
    raw_file(run_folder / "two.safetensors", 2, {"ss_clip_skip": "3"})
    loaded = load_run(config_of(run_folder, clip_skip=2), torch.device("cpu"))
    text = load_any(run_folder / "base.safetensors").text
    for teacher, skip in zip((loaded.base, *loaded.teachers), (1, 2, 3)):
        expected = clip_by_transformers(text, loaded.data.prompts, skip)
        torch.testing.assert_close(teacher.contexts, expected, rtol=0, atol=1e-5)
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 0
    assert load_checkpoint(run_folder / "out.safetensors").clip_skip is None
    config_of(run_folder, base={"clip_skip": 2, "output": "other.safetensors", "run_dir": "other"})
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 0
    student = load_checkpoint(run_folder / "other.safetensors")
    assert student.clip_skip == 2
    expected = clip_by_transformers({k: v.float() for k, v in student.text.items()}, PROMPTS, 2)
    torch.testing.assert_close(painter(student).text.encode(PROMPTS), expected, rtol=0, atol=1e-4)


def test_a_teacher_that_predicts_v_is_converted_as_diffusers_does(run_folder, caplog):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    with caplog.at_level(logging.INFO):
        run = load_run(config_of(run_folder, prediction="v"), torch.device("cpu")).start()
    assert "it is guessed: base eps, two eps." in caplog.text and "one v" not in caplog.text
    teacher = run.teachers[0]
    assert (teacher.prediction, run.base.prediction) == ("v", "eps")
    torch.manual_seed(3)
    x_t, rows = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2])
    t = torch.tensor([1, 500, 999])
    out = teacher.predict(x_t, t, rows).out
    ours = NoiseSchedule().to_eps(out, x_t, t, teacher.prediction)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    scheduler.set_timesteps(1000)
    for i in range(3):  # eps from what diffusers takes for the clean picture
        clean = scheduler.step(out[i], int(t[i]), x_t[i]).pred_original_sample
        abar = scheduler.alphas_cumprod[t[i]]
        expected = (x_t[i] - abar.sqrt() * clean) / (1 - abar).sqrt()
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=2e-3 if t[i] == 1 else 1e-4)
    target = run.targets(_batch(rows), x_t, t).out
    torch.testing.assert_close(target, ours, rtol=0, atol=1e-5)


def _batch(rows):
    from comfyui_dmm.training.data.batches import Batch

    return Batch(torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), rows)


def test_a_run_does_not_go_on_with_another_prediction(run_folder, capsys):
    """By a setting or a yaml; without either its identity is what it was before there were such settings."""
    plain = load_run(config_of(run_folder), torch.device("cpu")).start()
    assert not any("prediction" in name for name in identity(plain))
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 0
    config_of(run_folder, prediction="eps")  # says what was guessed
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 0
    config_of(run_folder, prediction="v")
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 1
    assert "started with something else: prediction of teacher 'one'" in capsys.readouterr().err
    config_of(run_folder)
    (run_folder / "two.yaml").write_text(V_YAML)
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 1
    assert "prediction of teacher 'two'" in capsys.readouterr().err


def test_a_cache_holds_the_contexts_of_each_clip_skip(run_folder, capsys):
    (run_folder / "pictures").mkdir()
    for i, caption in enumerate(PROMPTS[1:]):
        Image.new("RGB", (128, 128), (90 * i, 0, 0)).save(run_folder / "pictures" / f"{i}.png")
        (run_folder / "pictures" / f"{i}.txt").write_text(caption)
    base = run_folder / "base.safetensors"
    command = ["cache", "images", "--images", run_folder / "pictures", "--base", base, "--output", run_folder / "cache"]
    command += ["--teacher", f"{run_folder}/one.safetensors,clip_skip=2", "--resolution", "64", "--workers", "1"]
    assert main([str(word) for word in command]) == 0
    config = config_of(run_folder, clip_skip=2)
    config.data = dataclasses.replace(config.data, kind="cache", file=str(run_folder / "cache"))
    loaded = load_run(config, torch.device("cpu"))
    text = load_any(base).text
    everything = torch.arange(len(loaded.data.prompts))
    for teacher, skip in zip((loaded.base, *loaded.teachers), (1, 2, 1)):
        expected = clip_by_transformers(text, loaded.data.prompts, skip)
        torch.testing.assert_close(teacher.contexts[everything], expected, rtol=0, atol=5e-3)  # float16
    config.teachers[0].clip_skip = 3
    with pytest.raises(
        ValueError, match=r"at clip skip 3 is not in the cache.*This adds it: (dmm cache text .*clip_skip=3)"
    ):
        load_run(config, torch.device("cpu"))
    assert (
        main(
            [
                "cache",
                "text",
                "--cache",
                str(run_folder / "cache"),
                "--teacher",
                f"{run_folder}/one.safetensors,clip_skip=3",
            ]
        )
        == 0
    )
    load_run(config, torch.device("cpu"))
    assert len(open_cache(run_folder / "cache").text.stored) == 3


def test_convert_writes_it_into_the_file_and_a_merge_keeps_it(run_folder, caplog):
    for name in ("base", "one", "two"):
        target = run_folder / f"{name}-v.safetensors"
        assert (
            main(
                [
                    "convert",
                    f"{run_folder}/{name}.safetensors,prediction=v,zero_snr=true,clip_skip=2",
                    str(target),
                    "--to",
                    "single",
                ]
            )
            == 0
        )
        written = load_any(target)
        assert (written.prediction, written.zero_snr, written.clip_skip, written.prediction_from) == (
            "v",
            True,
            2,
            "dmm.prediction",
        )
    assert main(["convert", str(run_folder / "one-v.safetensors"), str(run_folder / "unet"), "--to", "diffusers"]) == 0
    folder = load_any(run_folder / "unet")
    assert (folder.prediction, folder.zero_snr, folder.clip_skip) == ("v", True, 2)
    merged = run_folder / "merged.safetensors"
    command = ["merge", "--budget", "40%", "--output", str(merged)]
    one, two = f"one={run_folder}/one-v.safetensors", f"two={run_folder}/two.safetensors"
    assert main([*command, "--teacher", one, "--teacher", two]) == 1  # eps and v
    with caplog.at_level(logging.WARNING):
        assert main([*command, "--teacher", one, "--teacher", f"{two},prediction=v,zero_snr=true"]) == 0
    made = load_any(merged)
    assert (made.prediction, made.zero_snr, made.clip_skip) == ("v", True, 2)
    assert "reads its prompts at clip skip 2; these were made for another one: two 1" in caplog.text
    picture = run_folder / "picture.png"
    words = ["--prompt", "a red star", "--steps", "2", "--size", "64", "--output", str(picture)]
    assert main(["sample", str(merged), *words]) == 0
    as_v = picture.read_bytes()
    assert main(["sample", f"{merged},prediction=eps,zero_snr=false", *words]) == 0
    assert picture.read_bytes() != as_v


def test_sd15_that_predicts_v_stays_at_its_size():
    """512 pixels a side, as it was taught; only SD2.x's v model was taught at 768."""
    sd15 = dataclasses.replace(SMALL, model_channels=320, context_dim=768)
    sd2 = dataclasses.replace(sd15, context_dim=1024)
    sizes = [default_resolution(config, prediction) for config in (sd15, sd2) for prediction in ("eps", "v")]
    assert sizes == [512, 512, 512, 768]


def test_a_run_and_a_merge_of_models_with_their_own_heads(run_folder, capsys, caplog):
    """The usual number of these sizes is 1. Student and merge have the models' 4 and say so; each part of a run counts as the file does."""
    said = {"num_heads": 4}
    config_of(run_folder, base=said, **said)
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 1
    assert "'two' has num_heads (1, 1) instead of (4, 4)" in capsys.readouterr().err
    (run_folder / "two.yaml").write_text("model: {params: {unet_config: {params: {num_heads: 4}}}}\n")
    run = load_run(config_of(run_folder, base=said, **said), torch.device("cpu"))
    assert {model.unet.config.num_heads for model in (run.base, *run.teachers)} == {(4, 4)}
    assert identity(run.start())["attention heads"] == "[4, 4]"
    with caplog.at_level(logging.INFO):
        assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 0
    assert "how many attention heads" not in caplog.text
    student = load_checkpoint(run_folder / "out.safetensors")
    assert student.config.num_heads == (4, 4) and painter(student).unet.config.num_heads == (4, 4)
    config_of(run_folder, base={"num_head_channels": SMALL.model_channels * 2}, **said)
    assert main(["distill", "--config", str(run_folder / "run.yaml")]) == 1
    capsys.readouterr()
    one, two = (f"{name}={run_folder / name}.safetensors" for name in ("one", "two"))
    (run_folder / "two.yaml").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        merge = [
            "merge",
            "--teacher",
            f"{one},num_heads=4",
            "--teacher",
            two,
            "--output",
            str(run_folder / "merged.safetensors"),
        ]
        assert main(merge) == 1
    assert "has num_heads" in capsys.readouterr().err and "attention heads these models have" in caplog.text
    merge[4] += ",num_heads=4"
    assert main(merge) == 0
    assert load_checkpoint(run_folder / "merged.safetensors").heads == (4, 4)
