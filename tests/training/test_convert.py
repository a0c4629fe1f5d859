"""``dmm convert``: every way there and back is exact, and what diffusers and transformers save is read as they mean it."""

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.diffusers_layout import unet_to_diffusers
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.training.commands.convert import add_parser
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.model_files import CONFIG, WEIGHTS, load_any, load_any_info, model_sha256, weight_files
from comfyui_dmm.training.files.style_file import ONLY_ITS_OWN, read_style_file, save_style, split, unet_fingerprint
from comfyui_dmm.training.text import ClipText
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..core.test_bank import banked_unet
from ..core.test_diffusers_layout import FAMILIES, SD1, SD2, SDXL, N

STYLES = [
    StyleInfo("ink", "black outlines\non paper", teacher="ink.safetensors", sha256="ab" * 32, licence="CC0"),
    StyleInfo("../../etc/passwd", recommended={"cfg": 7.5, "sampler": "dpmpp_2m"}),
    StyleInfo("<b>水墨</b> {0} %s 🎨", thumbnail="data:image/webp;base64,UklGRg=="),
]


def checkpoint(config=SD1, seed=0, **more) -> Checkpoint:
    """A full checkpoint in three dtypes, with NaN-free random bits, foreign keys and metadata."""
    torch.manual_seed(seed)
    unet = UNet(config).state_dict()
    unet["out.0.bias"] = torch.randn_like(unet["out.0.bias"]).bfloat16()
    full = Checkpoint(
        unet=unet,
        text={"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.randn(64).half()},
        vae={"decoder.conv_in.bias": torch.randn(8)},
        styles=list(STYLES) if config.num_styles else [],
        recipe={"steps": 10, "losses": {"feat": 0.001}, "base": "基"},
        metadata={"modelspec.author": "me", "custom": "kept \u2603"},
        other={"alphas_cumprod": torch.rand(10)},
    )
    return replace(full, **more)


def saved(path: Path, *args, **more) -> Path:
    save_checkpoint(path, checkpoint(*args, **more))
    return path


def content(path: Path) -> tuple:
    """All that a file says, bit for bit."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    raw = {
        k: (v.dtype, tuple(v.shape), v.flatten().view(torch.uint8).numpy().tobytes())
        for k, v in load_file(path).items()
    }
    return raw, metadata


# There and back


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_single_to_diffusers_and_back_is_exact(tmp_path, config):
    source = saved(tmp_path / "a.safetensors", config, prediction="v", zero_snr=True)
    notes = convert(source, tmp_path / "unet", "diffusers")
    assert len(notes) == 1 and "left out of the UNet folder: text encoder, VAE, other tensors" in notes[0]
    assert sorted(p.name for p in (tmp_path / "unet").iterdir()) == [CONFIG, WEIGHTS]
    described = json.loads((tmp_path / "unet" / CONFIG).read_text())
    assert described["num_models"] == N and described["addition_embed_type"].startswith("model_merge")
    for given in (tmp_path / "unet", tmp_path / "unet" / WEIGHTS):  # folder or file
        assert convert(given, tmp_path / "b.safetensors", "single", parts_from=source) == []
        assert content(tmp_path / "b.safetensors") == content(source)
    convert(tmp_path / "b.safetensors", tmp_path / "again", "diffusers")
    assert content(tmp_path / "again" / WEIGHTS) == content(tmp_path / "unet" / WEIGHTS)
    assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / "unet" / CONFIG).read_bytes()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_style_side_and_back_is_exact(tmp_path, config):
    source = saved(tmp_path / "a.safetensors", config, zero_snr=True)
    assert convert(source, tmp_path / "style.safetensors", "style") == [ONLY_ITS_OWN]
    assert len(load_file(tmp_path / "style.safetensors")) == 5
    plain = checkpoint(config, styles=[], recipe={}, metadata={})
    plain.unet = {k: v for k, v in plain.unet.items() if not k.startswith(("model_embedding", f"{config.style_mlp}."))}
    save_checkpoint(tmp_path / "plain.safetensors", plain)
    for onto in ("plain", "a"):  # a model without styles, and one whose own are replaced
        notes = convert(
            tmp_path / "style.safetensors", tmp_path / "b.safetensors", "single", onto=tmp_path / f"{onto}.safetensors"
        )
        assert notes == [] and content(tmp_path / "b.safetensors") == content(source)


def test_styles_go_onto_another_unet_with_a_remark(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "style.safetensors", "style")
    other = saved(tmp_path / "other.safetensors", seed=1)
    note, gone = convert(tmp_path / "style.safetensors", tmp_path / "b.safetensors", "single", onto=other)
    assert "is not the UNet that" in note
    assert "the styles that" in gone and STYLES[0].name in gone and "are not in the result" in gone
    result, expected = load_checkpoint(tmp_path / "b.safetensors"), load_checkpoint(other)
    assert result.styles == STYLES
    assert torch.equal(result.unet["out.2.weight"], expected.unet["out.2.weight"])
    assert torch.equal(result.unet["model_embedding.weight"], checkpoint().unet["model_embedding.weight"])


def test_the_fingerprint_of_a_unet_is_that_of_its_copies():
    unet = {k: v.half() for k, v in UNet(SD1).state_dict().items()}
    plain = split(unet)[1]
    assert plain.keys() != unet.keys()
    said = unet_fingerprint(plain)
    assert said == unet_fingerprint({k: v.float() for k, v in reversed(plain.items())})
    for changed in (
        {**plain, "out.2.bias": plain["out.2.bias"] + 1},
        {k: v for k, v in plain.items() if k != "out.2.bias"},
        {**plain, "out.2.weight": plain["out.2.weight"].flatten()},
    ):
        assert unet_fingerprint(changed) != said


def test_a_style_file_of_the_time_before_fingerprints(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "style.safetensors", "style")
    weights, metadata = content(tmp_path / "style.safetensors")
    assert len(metadata.pop("dmm.unet_fingerprint")) == 64
    save_file(load_file(tmp_path / "style.safetensors"), tmp_path / "old.safetensors", metadata=metadata)
    assert read_style_file(tmp_path / "old.safetensors").made_for.fingerprint == ""
    assert (
        convert(tmp_path / "old.safetensors", tmp_path / "b.safetensors", "single", onto=tmp_path / "a.safetensors")
        == []
    )
    assert content(tmp_path / "b.safetensors") == content(tmp_path / "a.safetensors")


def test_half_keeps_what_is_half(tmp_path):
    source = saved(tmp_path / "a.safetensors")
    convert(source, tmp_path / "half.safetensors", "single", half=True)
    full, half = load_checkpoint(source).tensors, load_checkpoint(tmp_path / "half.safetensors").tensors
    for key, tensor in full.items():
        if key == "alphas_cumprod" or tensor.dtype != torch.float32:
            assert half[key].dtype == tensor.dtype and torch.equal(half[key], tensor)
        else:
            assert half[key].dtype == torch.float16 and torch.equal(half[key], tensor.half())
    large = checkpoint()
    large.unet["out.2.bias"] = torch.tensor([1e6, 0, 0, 0])
    save_checkpoint(tmp_path / "large.safetensors", large)
    with pytest.raises(ValueError, match="out.2.bias.*a cast overflowed"):
        convert(tmp_path / "large.safetensors", tmp_path / "half.safetensors", "single", half=True)


SHIPPED = Path(__file__).parents[2] / "models" / "dmm" / "demo-dmm.safetensors"


def shipped_without_bank(path: Path) -> Path:
    """The shipped DMM model with its codes alone, as a file: diffusers has no layout for a bank."""
    whole = load_checkpoint(SHIPPED)
    save_checkpoint(path, replace(whole, unet={k: v for k, v in whole.unet.items() if not k.startswith("style_bank.")}))
    return path


def test_the_shipped_model_there_and_back(tmp_path):
    """Without its bank; with it the folder is refused, and nothing is written."""
    with pytest.raises(ValueError, match="style bank, for which diffusers has no layout: keep it as a single file"):
        convert(SHIPPED, tmp_path / "unet", "diffusers")
    assert not (tmp_path / "unet").exists()
    model = shipped_without_bank(tmp_path / "codes.safetensors")
    convert(model, tmp_path / "unet", "diffusers")
    convert(tmp_path / "unet", tmp_path / "b.safetensors", "single", parts_from=model)
    ours, theirs = load_checkpoint(tmp_path / "b.safetensors"), load_checkpoint(model)
    assert ours.styles == theirs.styles and ours.recipe == theirs.recipe and ours.metadata == theirs.metadata
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[k], v) for k, v in theirs.tensors.items())


# The authors' files, and pipelines as diffusers saves them


@pytest.mark.parametrize("config", [SD1, SDXL], ids=["SD1", "SDXL"])
@pytest.mark.parametrize("names", [False, True])
def test_the_authors_diffusers_unet(tmp_path, config, names):
    """Written with safetensors alone, as their trainer does; with and without our names in it."""
    sd = UNet(config).state_dict()
    folder = tmp_path / "unet"
    folder.mkdir()
    metadata = {"format": "pt"} | ({"dmm.styles": json.dumps([{"name": n} for n in "abc"])} if names else {})
    save_file(unet_to_diffusers(sd), folder / WEIGHTS, metadata=metadata)
    kind = "model_merge_xl" if config.adm_channels else "model_merge"
    (folder / CONFIG).write_text(
        json.dumps({"addition_embed_type": kind, "num_models": N, "attention_head_dim": [1, 2, 2]})
    )
    for path in (folder / WEIGHTS, folder, tmp_path):
        loaded = load_any(path)
        assert [s.name for s in loaded.styles] == (list("abc") if names else ["style 0", "style 1", "style 2"])
        assert loaded.unet.keys() == sd.keys() and all(torch.equal(loaded.unet[k], v) for k, v in sd.items())
        assert loaded.prediction == "eps"


def clip(folder: Path, activation: str, projection: int = 0):
    """A random CLIP text encoder saved by transformers, and the model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(len(folder.name))
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, hidden_act=activation,
        projection_dim=projection or 512, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def pipeline(folder: Path, config) -> None:
    (folder / "unet").mkdir(parents=True)
    save_file(unet_to_diffusers(UNet(replace(config, num_styles=0)).state_dict()), folder / "unet" / WEIGHTS)


@pytest.mark.parametrize("config, activation", [(SD1, "quick_gelu"), (SD2, "gelu")], ids=["SD1", "SD2"])
@torch.no_grad()
def test_a_pipeline_folder_becomes_one_file(tmp_path, config, activation):
    from diffusers import AutoencoderKL, DDIMScheduler

    folder = tmp_path / "pipeline"
    pipeline(folder, config)
    AutoencoderKL(block_out_channels=(32,), sample_size=8).save_pretrained(folder / "vae")
    DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    theirs = clip(folder / "text_encoder", activation)
    path = folder / "text_encoder" / "model.safetensors"  # transformers 5 has dropped the prefix of all published files
    save_file({f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}, path)
    convert(folder, tmp_path / "a.safetensors", "single")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert (loaded.prediction, loaded.zero_snr, loaded.num_styles) == ("v", True, 0)
    alone = load_any(folder / "unet")
    assert (alone.prediction, alone.zero_snr, alone.text) == ("v", True, {})
    assert "encoder.down.0.block.0.conv1.weight" in loaded.vae

    ids = torch.randint(0, 49000, (2, 77))
    ids[:, 40:] = 49407
    encoder = ClipText(loaded.text, clip_skip=1, tokenizer=object())
    states, _ = encoder.towers[0](ids)
    torch.testing.assert_close(states, theirs(ids).last_hidden_state, rtol=0, atol=1e-4)


def test_the_weights_own_word_counts_more_than_the_scheduler_beside_them(tmp_path):
    (tmp_path / "scheduler").mkdir()
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    loaded = load_any(tmp_path)
    assert (loaded.prediction, loaded.zero_snr) == ("eps", False)


@torch.no_grad()
def test_an_sdxl_pipeline_folder_has_two_text_encoders(tmp_path):
    folder = tmp_path / "pipeline"
    pipeline(folder, SDXL)
    first, second = clip(folder / "text_encoder", "quick_gelu"), clip(folder / "text_encoder_2", "gelu", projection=24)
    ids = torch.randint(0, 49000, (2, 77))
    ids[:, 40:] = 49407
    one, two = ClipText(load_any(folder).text, clip_skip=2, tokenizer=object()).towers
    torch.testing.assert_close(one(ids)[0], first(ids, output_hidden_states=True).hidden_states[-2], rtol=0, atol=1e-4)
    states, pooled = two(ids)
    expected = second(ids, output_hidden_states=True)
    torch.testing.assert_close(states, expected.hidden_states[-2], rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=0, atol=1e-4)


@torch.no_grad()
def test_diffusers_opens_a_folder_without_styles(tmp_path):
    from diffusers import UNet2DConditionModel

    config = replace(SD2, num_styles=0)
    unet = UNet(config).eval()
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(unet.state_dict()))
    convert(tmp_path / "a.safetensors", tmp_path / "unet", "diffusers")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    x, t, context = torch.randn(1, 9, 8, 8), torch.tensor([500]), torch.randn(1, 4, 48)
    torch.testing.assert_close(theirs(x, t, context).sample, unet(x, t, context), rtol=0, atol=1e-4)


def test_a_config_beside_a_file_of_another_name_is_not_its_own(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    (tmp_path / "unet" / WEIGHTS).rename(tmp_path / "authors.safetensors")
    (tmp_path / CONFIG).write_text('{"num_models": 99}')
    assert load_any(tmp_path / "authors.safetensors").styles == STYLES


def test_weights_in_parts_are_joined(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    whole = load_any(tmp_path / "unet").unet
    keys, parts = sorted(weights), []
    (tmp_path / "unet" / WEIGHTS).unlink()
    for i, chosen in enumerate((keys[::2], keys[1::2]), 1):
        parts.append(tmp_path / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
        save_file({k: weights[k] for k in chosen}, parts[-1])
    joined = load_any(tmp_path / "unet").unet
    assert joined.keys() == whole.keys() and all(torch.equal(joined[k], v) for k, v in whole.items())
    parts[0].unlink()
    with pytest.raises(ValueError, match="1 of 2 parts"):
        load_any(tmp_path / "unet")


PARTS = (
    "diffusion_pytorch_model-0000{}-of-00002.fp16",
    "diffusion_pytorch_model.fp16-0000{}-of-00002",
    "model-0000{}-of-00002",
)


def in_parts(folder, pattern, weights):
    keys, parts = sorted(weights), []
    for i, chosen in enumerate((keys[::2], keys[1::2]), 1):
        parts.append(folder / f"{pattern.format(i)}.safetensors")
        save_file({k: weights[k] for k in chosen}, parts[-1])
    return parts


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("pattern", PARTS)
def test_a_variant_in_parts_is_joined(tmp_path, pattern, index):
    """As a folder, and by the name of any of its files. An index is not needed, and what it names is not opened."""
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    whole = load_any(tmp_path / "unet").unet
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    (tmp_path / "unet" / WEIGHTS).unlink()
    parts = in_parts(tmp_path / "unet", pattern, weights)
    if index:
        wrong = {"weight_map": dict.fromkeys(weights, "../a.safetensors")}
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(wrong))
    for path in (tmp_path / "unet", *parts):
        joined, info = load_any(path).unet, load_any_info(path)
        assert joined.keys() == whole.keys() and all(torch.equal(joined[k], v) for k, v in whole.items())
        assert info.shapes == load_any(path).shapes and weight_files(path) == parts
        assert len({model_sha256(p) for p in (tmp_path / "unet", *parts)}) == 1
    parts[0].unlink()
    for path in (tmp_path / "unet", parts[1]):
        with pytest.raises(ValueError, match="1 of 2 parts"):
            load_any(path)


def test_a_checkpoint_in_parts_is_joined(tmp_path):
    whole = load_any(saved(tmp_path / "a.safetensors"))
    parts = in_parts(tmp_path, "sd-0000{}-of-00002", load_file(tmp_path / "a.safetensors"))
    joined = load_any(parts[1])
    assert joined.shapes == whole.shapes and all(torch.equal(joined.unet[k], v) for k, v in whole.unet.items())


@pytest.mark.parametrize(
    "names, read",
    [
        (["fp16", "non_ema"], "fp16"),
        (["bf16", "fp16"], "fp16"),
        (["fp16", "fp32"], "fp32"),
        (["non_ema"], "non_ema"),
        (["non_ema", "non_ema.fp16"], "non_ema"),
    ],
)
def test_of_a_folder_with_variants_alone_the_best_is_read(tmp_path, names, read):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    (tmp_path / "unet" / WEIGHTS).unlink()
    for i, name in enumerate(names):
        shifted = {k: v + i for k, v in weights.items()}
        save_file(shifted, tmp_path / "unet" / f"diffusion_pytorch_model.{name}.safetensors")
    assert torch.equal(
        load_any(tmp_path / "unet").unet["time_embed.0.bias"],
        weights["time_embedding.linear_1.bias"] + names.index(read),
    )


def test_a_complete_variant_is_read_before_an_incomplete_one(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    (tmp_path / "unet" / WEIGHTS).rename(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    in_parts(tmp_path / "unet", "diffusion_pytorch_model-0000{}-of-00002", weights)[0].unlink()
    assert [path.name for path in weight_files(tmp_path / "unet")] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_two_models_in_a_folder_are_not_variants_of_one(tmp_path):
    for name in ("sd.v1-4", "sd.v1-5"):
        saved(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several models"):
        load_any(tmp_path)


# What is refused


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "fired"),))

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.bin"):
        with pytest.raises(ValueError, match="unet.*pickle.*get the .safetensors version"):
            convert(path, tmp_path / "b.safetensors", "single")
    assert not (tmp_path / "fired").exists() and not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "not a configuration"),
        ("[" * 200_000, "config.json"),
        ('{"num_models": 8}', "8"),
    ],
)
def test_damaged_config(tmp_path, text, message):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    (tmp_path / "unet" / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"unet.*{message}"):
        load_any(tmp_path / "unet")


def test_refusals_leave_the_target_as_it_was(tmp_path):
    source = saved(tmp_path / "a.safetensors")
    plain = saved(tmp_path / "plain.safetensors", replace(SD1, num_styles=0))
    xl = saved(tmp_path / "xl.safetensors", SDXL)
    convert(source, tmp_path / "style.safetensors", "style")
    style, target = tmp_path / "style.safetensors", tmp_path / "old.safetensors"
    target.write_text("old")
    (tmp_path / "empty").mkdir()
    for (model, destination, to, *onto), message in (
        ((plain, target, "style"), "the model has no styles"),
        ((style, target, "single"), "name the model .* with --onto"),
        ((source, target, "single", plain), "is not a file of styles alone"),
        ((style, target, "single", xl), "style.safetensors does not fit onto .*xl.safetensors.*SDXL"),
        ((source, target, "diffusers"), "is a file: the diffusers layout needs a folder"),
        ((source, target.with_suffix(".ckpt"), "style"), "must end in .safetensors"),
        ((tmp_path / "no.safetensors", target, "single"), "no.safetensors does not exist"),
        ((tmp_path / "empty", target, "single"), "empty holds no .safetensors file"),
        ((target, target, "single"), "old.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, destination, to, onto=onto[0] if onto else None)
        assert target.read_text() == "old"


def test_a_write_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    before = [content(tmp_path / "unet" / WEIGHTS), (tmp_path / "unet" / CONFIG).read_bytes()]
    saved(tmp_path / "b.safetensors", seed=1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "empty").mkdir()
    for name in ("unet", "new", "empty"):
        with pytest.raises(OSError, match="No space left on device.*untouched"):
            convert(tmp_path / "b.safetensors", tmp_path / name, "diffusers")
    assert [content(tmp_path / "unet" / WEIGHTS), (tmp_path / "unet" / CONFIG).read_bytes()] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "empty", "unet"]
    assert len(list((tmp_path / "unet").iterdir())) == 2


def test_the_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    source = saved(tmp_path / "a.safetensors")
    args = parser.parse_args(["convert", str(source), str(tmp_path / "unet"), "--to", "diffusers", "--half"])
    args.run(args)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'unet'}"
    assert load_any(tmp_path / "unet").unet["out.2.weight"].dtype == torch.float16


# --- what does not belong together ------------------------------------------------------------------------------------


def test_styles_of_another_prediction_are_refused(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "style.safetensors", "style")
    before = checkpoint(seed=1)
    save_checkpoint(tmp_path / "v.safetensors", replace(before, prediction="v"))
    with pytest.raises(ValueError, match=r"predicts eps, and .*v\.safetensors predicts v: they do not fit"):
        convert(tmp_path / "style.safetensors", tmp_path / "b.safetensors", "single", onto=tmp_path / "v.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_style_weights_that_are_not_finite_are_refused(tmp_path, value):
    for key in ("model_embedding.weight", "add_embedding.linear_2.bias"):
        damaged = checkpoint()
        damaged.unet[key].flatten()[3] = value
        save_file({f"model.diffusion_model.{k}": v for k, v in damaged.unet.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=rf"style weight '{key}' holds NaN or infinity"):
            load_checkpoint(tmp_path / "bad.safetensors")


def test_styles_in_float8_are_read(tmp_path):
    """As ComfyUI saves a model under --fp8_e4m3fn-unet: torch cannot ask float8 for NaN."""
    small = checkpoint()
    small.unet["model_embedding.weight"] = small.unet["model_embedding.weight"].to(torch.float8_e4m3fn)
    save_file({f"model.diffusion_model.{k}": v for k, v in small.unet.items()}, tmp_path / "fp8.safetensors")
    assert load_checkpoint(tmp_path / "fp8.safetensors").num_styles == N


LAYER = "style_bank.middle_block.0.in_layers.2"
DAMAGED_STYLES = {
    "a code of another width": lambda w: w.update(
        {"model_embedding.weight": w["model_embedding.weight"][:, :-1].clone()}
    ),
    "no MLP": lambda w: w.pop("add_embedding.linear_2.bias"),
    "an MLP of another width": lambda w: w.update({"add_embedding.linear_1.bias": torch.zeros(3)}),
    "no codebook": lambda w: w.pop("model_embedding.weight"),
    "no up": lambda w: w.pop(f"{LAYER}.up.weight"),
    "no cores": lambda w: w.pop(f"{LAYER}.cores.weight"),
    "down of another rank": lambda w: w.update({f"{LAYER}.down.weight": w[f"{LAYER}.down.weight"][1:].clone()}),
    "cores of another number": lambda w: w.update({f"{LAYER}.cores.weight": w[f"{LAYER}.cores.weight"][1:].clone()}),
    "a flat up": lambda w: w.update({f"{LAYER}.up.weight": w[f"{LAYER}.up.weight"].flatten()}),
    "an unknown part": lambda w: w.update({f"{LAYER}.sideways.weight": torch.zeros(2)}),
    "NaN": lambda w: w[f"{LAYER}.up.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("kind", DAMAGED_STYLES)
def test_info_says_when_a_file_of_styles_is_damaged(tmp_path, kind, capsys):
    from comfyui_dmm.training.cli import main

    sound, bad = tmp_path / "sound.safetensors", tmp_path / "bad.safetensors"
    save_style(sound, Checkpoint(unet=dict(banked_unet().state_dict())))
    assert main(["info", str(sound)]) == 0
    with safe_open(sound, "pt") as file:
        metadata, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    DAMAGED_STYLES[kind](weights)
    save_file(weights, bad, metadata)
    capsys.readouterr()
    assert main(["info", str(bad)]) == 1
    said = capsys.readouterr().err
    assert "bad.safetensors" in said and ("damaged" in said or "no codebook" in said)
