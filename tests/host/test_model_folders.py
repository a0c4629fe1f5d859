"""What Load DMM Model lists and opens: files and diffusers folders of every model folder, and nothing outside of them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path, PurePath

import pytest
import requests
import torch
from comfyui_dmm.dmm_core.checkpoint import save_checkpoint
from comfyui_dmm.training.files.convert import convert

from .families import DEMO, NAMES, SD15, SD20, SDXL, SMALL_SDXL, checkpoint_of, random_unet
from .test_files import assert_same, load

# With attention behind all blocks of a level or none, as diffusers can say it.
SHAPES = {
    "sd15": replace(SD15, depth_output=(1, 1, 0, 0)),
    "sd20": replace(SD20, depth_output=(1, 1, 0, 0)),
    "sdxl": replace(SDXL, depth_middle=10),
    "small sdxl": SMALL_SDXL,
}


@pytest.fixture(scope="module")
def folders(models):
    """Diffusers folders in each of the host's model folders, with the files that lie about in such folders."""
    import folder_paths

    single = models / "dmm" / "whole.safetensors"
    save_checkpoint(single, checkpoint_of(random_unet(DEMO), torch.float16, whole=True))
    for place in ("dmm/authors", "diffusion_models/team/unet-only", "diffusers/pipe/unet", "diffusers/alone"):
        (models / place).parent.mkdir(parents=True, exist_ok=True)
        convert(single, models / place, "diffusers")
    unet = models / "diffusers" / "pipe" / "unet"
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (models / "diffusers" / "pipe" / "safety_checker").mkdir()
    (models / "diffusers" / "pipe" / "safety_checker" / "model.safetensors").write_bytes(b"not looked at")
    for part in ("unet", "diffusion_models"):
        (models / part).mkdir(exist_ok=True)
    (models / "unet" / "bare.safetensors").write_bytes(
        (models / "dmm/authors/diffusion_pytorch_model.safetensors").read_bytes()
    )
    (models / "diffusion_models" / "flux.gguf").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    return models


def test_what_is_listed(folders, monkeypatch):
    """Each model once, by the name of its folder, and no file is opened for it."""
    from comfyui_dmm.nodes import paths

    def refused(*_, **__):
        raise AssertionError("a file was opened to list it")

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(Path, "open", refused)
    names = paths.model_files()
    wanted = {"whole.safetensors", "authors", "team/unet-only", "pipe", "alone", "bare.safetensors"}
    assert wanted <= set(names) and len(names) == len(set(names))
    assert not any("diffusion_pytorch_model" in name or "safety" in name or "gguf" in name for name in names)


def test_names_alone_say_what_belongs_together():
    from comfyui_dmm.nodes.paths import as_models

    weights = "diffusion_pytorch_model.safetensors"
    files = [
        *("a.safetensors", "b/c.SAFETENSORS", "b/d.ckpt", weights, f"unet/{weights}", "vae.safetensors"),
        *(
            f"p/unet/{weights}",
            f"p/vae/{weights}",
            "p/text_encoder/model.safetensors",
            "p/model_index.json",
            "p/x.safetensors",
        ),
        *(f"q/r/unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *(
            "s/diffusion_pytorch_model.fp16.safetensors",
            f"s/{weights}",
            "s/other.safetensors",
            f"p/nested/unet/{weights}",
        ),
    ]
    files = [str(PurePath(name)) for name in files]
    assert set(as_models(files)) == {
        *("a.safetensors", str(PurePath("b/c.SAFETENSORS")), weights, "unet", "vae.safetensors"),
        *("p", str(PurePath("q/r")), "s", str(PurePath("s/other.safetensors"))),
    }
    assert as_models([]) == []


@pytest.mark.parametrize("name", ["authors", "team/unet-only", "pipe", "alone", "bare.safetensors"])
def test_each_of_them_is_the_model_that_it_was_made_from(folders, name):
    from comfyui_dmm.nodes import loader, paths

    node = loader.LoadDMMModel
    with torch.inference_mode():
        out = node.execute(name)
    model, clip, vae = out.result
    whole = load(folders / "dmm" / "whole.safetensors")[0]
    assert_same(model.model.diffusion_model.state_dict(), whole.model.diffusion_model.state_dict())
    text = str(out.ui)
    assert "4 styles: ink, Neon lines" in text
    assert "no CLIP and no VAE in this file: to paint, add Load CLIP and Load VAE" in text
    assert clip is None
    model.cached_patcher_init[0](*model.cached_patcher_init[1])  # the host's second copy
    before = node.fingerprint_inputs(name)
    assert node.fingerprint_inputs(name) == before
    path = Path(paths.model_path(name))
    file = next(path.rglob("*.safetensors")) if path.is_dir() else path
    os.utime(file, ns=(1, 1))
    assert node.fingerprint_inputs(name) != before


@pytest.mark.parametrize("family", SHAPES)
def test_unets_of_every_family_in_diffusers_layout(models, tmp_path, family):
    save_checkpoint(tmp_path / "a.safetensors", checkpoint_of(random_unet(SHAPES[family]), torch.float16))
    convert(tmp_path / "a.safetensors", tmp_path / "unet", "diffusers")
    one, other = load(tmp_path / "a.safetensors"), load(tmp_path / "unet")
    assert_same(one[0].model.diffusion_model.state_dict(), other[0].model.diffusion_model.state_dict())
    assert (one[3].styles, one[3].prediction) == (other[3].styles, other[3].prediction)


def test_no_name_leads_out(folders, tmp_path):
    from comfyui_dmm.nodes import paths

    outside = folders.parent / "outside"
    convert(folders / "dmm" / "whole.safetensors", outside, "diffusers")
    (folders / "dmm" / "dangling.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (folders / "dmm" / "loop.safetensors").symlink_to(folders / "dmm" / "loop.safetensors")
    (folders / "dmm" / "empty").mkdir()
    for name in (
        *(
            "../../outside",
            "../outside",
            str(outside),
            "..",
            ".",
            "",
            "/",
            "\x00",
            "authors\x00",
            "authors/..",
            "authors/../authors",
        ),
        *(
            "pipe/unet",
            "team",
            "empty",
            "dangling.safetensors",
            "loop.safetensors",
            "x" * 5000,
            "\ud800",
            "..\\outside",
        ),
        *("pipe/safety_checker/model.safetensors", "alone/", "./alone"),
    ):
        with pytest.raises(ValueError, match="not found"):
            paths.model_path(name)
    (folders / "dmm" / "dangling.safetensors").unlink()
    (folders / "dmm" / "loop.safetensors").unlink()


def test_links_that_users_made_are_followed_as_the_host_does(folders, tmp_path):
    """Models often lie on another disk; Hugging Face's own cache is made of links."""
    import folder_paths
    from comfyui_dmm.nodes import paths

    convert(folders / "dmm" / "whole.safetensors", tmp_path / "far", "diffusers")
    (folders / "dmm" / "near").symlink_to(tmp_path / "far", target_is_directory=True)
    folder_paths.filename_list_cache.clear()
    assert "near" in paths.model_files()
    assert list(load(paths.model_path("near"))[3].known) == NAMES
    (folders / "dmm" / "near").unlink()
    folder_paths.filename_list_cache.clear()


# Over HTTP


@pytest.fixture(scope="module")
def served(server):
    """A diffusers folder, and files that lie about what is in them, in the folders of a running host."""
    dmm = server.base / "models" / "dmm"
    save_checkpoint(dmm / "good.safetensors", checkpoint_of(random_unet(DEMO), torch.float16, whole=True))
    convert(dmm / "good.safetensors", dmm / "folder", "diffusers")
    convert(dmm / "good.safetensors", dmm / "lying", "diffusers")
    (dmm / "lying" / "config.json").write_text(json.dumps({"num_models": 99}))
    convert(dmm / "good.safetensors", dmm / "styles.safetensors", "style")
    entry = '{"dtype":"F16","shape":[%d,0],"data_offsets":[0,0]}'
    for name, header in {
        "huge": "{{{}}}".format(",".join(f'"{key}":{entry % 2**63}' for key in ("a", "b"))),
        "nothing": '{"model_embedding.weight":' + entry % 10**9 + "}",
        "many": "{" + ",".join(f'"{i}":{entry % 1}' for i in range(400_000)) + "}",
    }.items():
        (dmm / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    return server


def ask(served, name):
    return requests.get(f"http://{served.address}/dmm/styles", params={"ckpt_name": name}, timeout=60)


def test_the_styles_of_a_folder(served):
    answer = ask(served, "folder")
    assert [style["name"] for style in answer.json()["styles"]] == NAMES
    options = served.get("object_info/DMMLoadModel").json()["DMMLoadModel"]["input"]["required"]["ckpt_name"]
    listed = options[1]["options"] if isinstance(options[0], str) else options[0]
    assert "folder" in listed


@pytest.mark.parametrize(
    "name, message",
    [
        ("huge.safetensors", "sizes over"),
        ("nothing.safetensors", "no Stable Diffusion UNet"),
        ("many.safetensors", "more than 300000 tensors"),
        ("styles.safetensors", "styles without a UNet"),
        ("lying", "num_models 99"),
    ],
)
def test_lies_are_explained_without_their_place_on_the_disk(served, name, message):
    answer = ask(served, name)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert message in error and name in error and str(served.base) not in error


@pytest.mark.parametrize(
    "name", ["folder/..", "../dmm/folder", "folder\x00", "/etc", "x" * 3000, "%ff", "folder/config.json\n"]
)
def test_other_names_are_not_found(served, name):
    answer = ask(served, name)
    assert answer.status_code == 404 and "not found" in answer.json()["error"]


# --- folders that go while the host runs ------------------------------------------------------------------------------


def test_an_output_folder_that_was_emptied_is_no_end(folders):
    """rm -rf output/dmm, and a subfolder of the models, between two looks at the lists: what is left is listed and loads, what is saved
    anew is found, and the nodes' own descriptions are there."""
    from comfyui_dmm.nodes import paths
    from comfyui_dmm.nodes.add_styles import AddStyles
    from comfyui_dmm.nodes.evaluate import feature_files
    from comfyui_dmm.nodes.loader import LoadDMMModel

    places = [Path(paths.output_folder(name)) / "old" for name in (paths.FOLDER, paths.STYLES_FOLDER)]
    places += [folders / kind / "old" for kind in ("checkpoints", "diffusion_models", "dmm_features")]
    for place in places:
        place.mkdir(parents=True)
        shutil.copy(folders / "dmm" / "whole.safetensors", place / "gone.safetensors")
    assert os.path.join("old", "gone.safetensors") in paths.model_files() and paths.style_files() and feature_files()
    for place in places:
        shutil.rmtree(place.parent if "output" in place.parts else place)
    assert os.path.join("old", "gone.safetensors") not in paths.model_files()
    assert not paths.style_files() and not feature_files()
    assert "whole.safetensors" in paths.model_files() and os.path.isfile(paths.model_path("whole.safetensors"))
    with pytest.raises(ValueError, match="not found"):
        paths.model_path(os.path.join("old", "gone.safetensors"))
    for node in (LoadDMMModel, AddStyles):
        assert node.define_schema().inputs
    folder = Path(paths.output_folder())
    folder.mkdir()
    shutil.copy(folders / "dmm" / "whole.safetensors", folder / "new.safetensors")
    assert "new.safetensors" in paths.model_files()
    shutil.rmtree(folder)
    assert "new.safetensors" not in paths.model_files()


def test_a_running_host_outlives_an_emptied_output_folder(server):
    """By HTTP: the loader is in /object_info before and after, and the host's own list of the folder answers again."""
    folder = server.base / "output" / "dmm"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "a.safetensors").write_bytes(b"")
    name = os.path.join("old", "a.safetensors")
    assert name in str(requests.get(f"http://{server.address}/object_info/DMMLoadModel").json())
    shutil.rmtree(server.base / "output")
    info = requests.get(f"http://{server.address}/object_info").json()
    assert {"DMMLoadModel", "DMMAddStyles"} <= info.keys() and name not in str(info["DMMLoadModel"])
    assert requests.get(f"http://{server.address}/models/dmm").status_code == 200
