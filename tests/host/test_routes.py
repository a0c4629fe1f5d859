"""GET /dmm/styles, as the browser calls it."""

import pytest
import requests
import torch
from comfyui_dmm.dmm_core.checkpoint import save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.training.files.style_file import save_style

from .families import DEMO, NAMES, checkpoint_of, random_unet, with_bank

THUMBNAIL = "data:image/jpeg;base64,/9j/4AAQ"


@pytest.fixture(scope="module")
def folder(server):
    return server.base / "models" / "dmm"


def ask(server, name):
    return requests.get(f"http://{server.address}/dmm/styles", params={"ckpt_name": name}, timeout=60)


def test_names_descriptions_and_thumbnails_in_order(server, folder):
    styles = [StyleInfo(name, f"about {name}", THUMBNAIL if name == "ink" else "") for name in NAMES]
    (folder / "sub").mkdir()
    save_checkpoint(
        folder / "sub" / "route.safetensors", checkpoint_of(random_unet(DEMO), torch.float16, styles=styles)
    )
    answer = ask(server, "sub/route.safetensors")
    assert answer.status_code == 200
    expected = [{"name": s.name, "description": s.description, "thumbnail": s.thumbnail} for s in styles]
    assert answer.json() == {"styles": expected}


def test_what_the_browser_has_is_not_sent_again(server, folder):
    """Until the file changes."""
    path, url = folder / "again.safetensors", f"http://{server.address}/dmm/styles"
    for style in ("old", "new"):
        styles = [StyleInfo(f"{style} {i}", thumbnail=THUMBNAIL) for i in range(DEMO.num_styles)]
        save_checkpoint(path, checkpoint_of(random_unet(DEMO), torch.float16, styles=styles))
        answer = ask(server, path.name)
        assert [one["name"] for one in answer.json()["styles"]] == [one.name for one in styles]
        tag = answer.headers["ETag"]
        again = requests.get(url, params={"ckpt_name": path.name}, headers={"If-None-Match": tag}, timeout=60)
        assert again.status_code == 304 and not again.content


def test_the_styles_of_a_file_of_styles_alone(server):
    folder = server.base / "models" / "dmm_styles"
    folder.mkdir(exist_ok=True)
    save_style(folder / "alone.safetensors", checkpoint_of(with_bank(random_unet(DEMO)), torch.float16))
    url = f"http://{server.address}/dmm/styles"
    answer = requests.get(url, params={"styles": "alone.safetensors"}, timeout=60)
    assert answer.status_code == 200
    assert [style["name"] for style in answer.json()["styles"]] == NAMES
    for outside in ("../dmm/sub/route.safetensors", "missing.safetensors", ""):
        answer = requests.get(url, params={"styles": outside}, timeout=60)
        assert answer.status_code == 404 and "not found" in answer.json()["error"]


def test_markup_in_a_name_stays_a_name(server, folder):
    names = ["<img src=x onerror=alert(1)>", "</script>", "a & b", '"quoted"']
    checkpoint = checkpoint_of(random_unet(DEMO), torch.float16, styles=[StyleInfo(name) for name in names])
    save_checkpoint(folder / "markup.safetensors", checkpoint)
    answer = ask(server, "markup.safetensors")
    assert answer.headers["Content-Type"].startswith("application/json")  # never a page that a browser would run
    assert [style["name"] for style in answer.json()["styles"]] == names


def test_a_plain_checkpoint_has_no_styles(server, folder):
    plain = checkpoint_of(random_unet(DEMO), torch.float16, styles=[], recipe={})
    plain.unet = {k: v for k, v in plain.unet.items() if not k.startswith(("model_embedding.", "add_embedding."))}
    save_checkpoint(folder / "unstyled.safetensors", plain)
    answer = ask(server, "unstyled.safetensors")
    assert (answer.status_code, answer.json()) == (200, {"styles": []})


def test_only_the_header_is_read(server, folder):
    path = folder / "wrecked.safetensors"
    save_checkpoint(path, checkpoint_of(random_unet(DEMO), torch.float16))
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)  # NaN everywhere
    path.write_bytes(data)
    assert [style["name"] for style in ask(server, path.name).json()["styles"]] == NAMES


@pytest.mark.parametrize(
    "name", ["", "gone.safetensors", "../server.log", "../../../../../../etc/passwd", "sub", "a\x00b"]
)
def test_a_file_that_is_not_in_the_models_folders(server, folder, name):
    answer = ask(server, name)
    assert answer.status_code == 404
    assert "not found" in answer.json()["error"] and name in answer.json()["error"]


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b"PK\x03\x04" + b"x" * 99, "pickle"), (b"\xff" * 99, "not a safetensors")]
)
def test_a_broken_file_is_explained_without_its_place_on_the_disk(server, folder, content, message):
    (folder / "broken.safetensors").write_bytes(content)
    answer = ask(server, "broken.safetensors")
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert message in error and "broken.safetensors" in error and str(server.base) not in error
