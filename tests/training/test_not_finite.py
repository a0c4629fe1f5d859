"""NaN or infinity in the data is named with its row, and not blamed on the learning rate."""

import json

import pytest
import torch
from comfyui_dmm.training.data.batches import CaptionedLatents, bad_rows, load_latents
from comfyui_dmm.training.data.cache import build_image_cache, open_image_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .families import small_data, small_run, small_teacher
from .test_cache import base, pictures  # noqa: F401 (fixtures)

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_latents_name_the_row_and_the_caption(tmp_path, bad):
    """Rows are counted as in the file, and through the buckets."""
    latents, captions = torch.randn(9, 4, 8, 8), [f"caption {i}" for i in range(9)]
    latents[4, 2, 3, 1] = latents[7, 0, 0, 0] = bad
    save_file({"latents": latents}, tmp_path / "data.safetensors", {"captions": json.dumps(captions)})
    message = r"NaN or infinite numbers in 2 of 9 pictures, the first in row 4 \('caption 4'\)"
    with pytest.raises(ValueError, match=message):
        load_latents(tmp_path / "data.safetensors")
    with pytest.raises(ValueError, match=r"in 2 of 9 pictures, the first in row 6 \('caption 6'\)"):
        CaptionedLatents([torch.zeros(2, 4, 8, 12), latents], [*captions, "a", "b"])
    assert bad_rows(latents) == [4, 7] and bad_rows(latents[:0]) == []


def spoil(path, name, row, bad):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name][row].view(-1)[5] = bad
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["latents", "context"])
def test_a_cache_names_the_file_the_row_and_the_picture(tmp_path, pictures, base, what, bad):  # noqa: F811
    folder = tmp_path / "cache"
    build_image_cache(folder, pictures, base, resolution=64, workers=1)
    path = sorted(folder.glob({"latents": "latents-*", "context": "text-*"}[what]))[0]
    spoil(path, what, 1, bad)
    data = open_image_cache(folder)
    if what == "latents":
        names = json.loads((folder / "manifest.json").read_text())["buckets"]
        (of_it,) = [bucket for bucket in names if bucket["shards"][0]["file"] == path.name]
        bucket = data.buckets[names.index(of_it)]
        bucket[torch.tensor([0])]
        with pytest.raises(
            ValueError, match=f"{path.name} has NaN or infinite numbers in row 1 of 'latents', of '{of_it['names'][1]}'"
        ):
            bucket[torch.tensor([0, 1])]
    else:
        contexts = data.text_of(base.text)[0]
        contexts[torch.tensor([0])]
        with pytest.raises(ValueError, match=f"{path.name} has NaN or infinite numbers in row 1 of 'context'"):
            contexts[torch.tensor([0, 1])]


def test_text_states_name_teacher_and_caption():
    data = small_data()
    teachers = [small_teacher("one", 1, data), small_teacher("two", 2, data)]
    teachers[1].contexts[3, 2, 1] = float("inf")
    from comfyui_dmm.training.config import TrainConfig
    from comfyui_dmm.training.loop.trainer import Trainer

    with pytest.raises(
        ValueError, match=rf"text states of 'two' .* 1 of 6 captions, the first in row 3 \('{data.prompts[3]}'\)"
    ):
        Trainer(small_teacher("base", 0, data), teachers, data, TrainConfig(device="cpu", lambda_adv=0.0))


class Spoilt(CaptionedLatents):
    """Data that are looked at only when a batch is drawn, as a bucket of a file is."""

    def batch(self, number, draw):
        batch = super().batch(number, draw)
        batch.x_t[1, 0, 0, 0] = float("nan")
        return batch


def test_a_loss_says_whose_fault_it_is():
    """The data, a teacher, or the student: each alone is made to fail."""
    good = small_data()
    run = small_run(teachers=2, data=Spoilt(good.buckets, good.captions))
    with pytest.raises(
        ValueError,
        match=r"not finite at step 1.*the data have NaN or infinite numbers in row 1 of the batch \(.*caption",
    ):
        run.train_step()
    run = small_run(teachers=2)
    with torch.no_grad():
        run.teachers[1].unet.out[2].bias.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"the teacher itself predicts NaN or infinite numbers in row \d of the batch \('teacher 2'"
    ):
        run.train_step()
    run = small_run(teachers=2)
    with torch.no_grad():
        run.student.unet.out[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="lower the learning rate"):
        run.train_step()
