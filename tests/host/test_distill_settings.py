"""The settings of Distill Teachers: all reach the trainer, presets stand for what they fill in, and the host's dataset nodes feed it."""

import dataclasses

import pytest
import requests
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.presets import PRESETS
from comfyui_dmm.training.run.state import BEST
from PIL import Image

from .test_distill_host import files, graph, queue, saved  # noqa: F401  (a fixture)


def recipe(server, name: str) -> dict:
    (path,) = saved(server, name)
    return load_checkpoint(path).recipe


@pytest.fixture(scope="module")
def settings(host):
    from comfyui_dmm.nodes import distill_settings

    return distill_settings


def test_every_input_is_a_field_of_the_configuration(settings):
    inputs = {i.id for i in settings.setting_inputs()}
    assert inputs == settings.FIELDS.keys() | {"preset", "preview_every"}
    fields = {f.name for f in dataclasses.fields(settings.DEFAULTS)}
    assert set(settings.FIELDS.values()) <= fields


def test_what_is_given_arrives(settings):
    config = settings.train_config(
        {"steps": 7, "learning_rate": 0.5, "average": 0.0, "memory": "12 GB", "adversarial_weight": 0.25}
    )
    assert (config.steps, config.lr, config.ema_gamma, config.memory, config.lambda_adv) == (7, 0.5, None, 12.0, 0.25)
    plain = settings.train_config({})
    assert plain == settings.DEFAULTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_names_and_nothing_else(settings, name):
    config = settings.train_config({"preset": name, "steps": 3, "seed": 5, "trainable": "lora"})
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert config.seed == 5 and config.trainable == "lora"
    assert settings.preset_inputs(name).keys() <= settings.FIELDS.keys()


def test_the_browser_gets_the_presets(server, settings):
    got = requests.get(f"http://{server.address}/dmm/presets", timeout=30).json()
    assert got == {name: settings.preset_inputs(name) for name in PRESETS} and got["paper"]["steps"] == 100_000


def test_the_whole_recipe_runs_in_the_graph(files):  # noqa: F811
    """Discriminator, accumulation, low-rank, final stage with painting teachers, memory plan: in one run, and a picture afterwards."""
    more = {
        "adversarial_weight": 0.01, "accumulate": 2, "final_steps": 2, "final_images": 4, "trainable": "lora", "lora_rank": 4,
        "optimizer": "adafactor", "memory": "8 GB", "average": 6.94, "warmup": 1, "rate_schedule": "cosine", "validation": 4,
    }  # fmt: skip
    end, messages = queue(files, graph(steps=3, name="all-of-it", **more))
    assert end == "execution_success"
    texts = [data.decode(errors="replace") for kind, data in messages if kind == 3]
    assert any("paints" in text for text in texts) and any("activations" in text for text in texts)
    train = recipe(files, "all-of-it")["train"]
    assert train["batch_size"] * train["accumulate"] == 8 and train["trainable"] == "lora"
    assert recipe(files, "all-of-it")["steps_done"] == 5
    (run,) = (files.base / "output" / "dmm_runs").glob("all-of-it-*")
    names = {p.name for p in run.iterdir()}
    assert {BEST, "log.jsonl", "pictures", "painted"} <= names


def test_the_hosts_dataset_folder_with_pictures_of_two_sizes(files):  # noqa: F811
    folder = files.base / "input" / "my pictures"
    folder.mkdir(parents=True)
    for i, size in enumerate([(128, 128), (128, 64), (128, 128), (128, 64), (64, 128)]):
        Image.new("RGB", size, (50 * i, 100, 20)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a plain colour, number {i}")
    g = graph(name="from-folder", steps=3)
    g["scenes"] = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "my pictures"}}
    assert queue(files, g)[0] == "execution_success"
    assert recipe(files, "from-folder")["data"]["count"] == 5
