"""The settings of Distill Teachers: all reach the trainer, presets stand for what they fill in, and the host's dataset nodes feed it."""

import dataclasses

import pytest
import requests
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.config import AttackConfig, TrainConfig
from comfyui_dmm.training.fields import about_field
from comfyui_dmm.training.presets import PRESETS
from comfyui_dmm.training.run.state import BEST
from PIL import Image

from .test_distill_host import files, graph, queue, saved  # noqa: F401  (a fixture)


def recipe(server, name: str) -> dict:
    (path,) = saved(server, name)
    return load_checkpoint(path).recipe


CONTROLS = [
    ("steps", "INT", {"default": 1000, "min": 1, "max": 10000000}),
    ("batch_size", "INT", {"default": 8, "min": 1, "max": 4096}),
    ("learning_rate", "FLOAT", {"default": 1e-05, "min": 1e-08, "max": 0.1, "step": 1e-08, "round": False}),
    ("seed", "INT", {"default": 0, "min": 0, "max": 4294967295, "control_after_generate": False}),
    (
        "start_from",
        "COMBO",
        {"advanced": True, "default": "base", "multiselect": False, "options": ["base", "soup", "bank"]},
    ),
    ("style_rate", "FLOAT", {"advanced": True, "default": 1.0, "min": 0.01, "max": 100, "step": 0.1, "round": False}),
    (
        "feature_weight",
        "FLOAT",
        {"advanced": True, "default": 0.001, "min": 0, "max": 1, "step": 0.0001, "round": False},
    ),
    (
        "caption_dropout",
        "FLOAT",
        {"advanced": True, "default": 0.1, "min": 0, "max": 0.9, "step": 0.01, "round": False},
    ),
    (
        "no_style_share",
        "FLOAT",
        {"advanced": True, "default": 0.05, "min": 0, "max": 0.9, "step": 0.01, "round": False},
    ),
    (
        "precision",
        "COMBO",
        {"advanced": True, "default": "fp32", "multiselect": False, "options": ["fp32", "bf16", "fp16"]},
    ),
    ("gradient_checkpointing", "BOOLEAN", {"advanced": True, "default": False}),
    ("preview_every", "INT", {"advanced": True, "default": 100, "min": 0, "max": 1000000}),
    ("save_every", "INT", {"advanced": True, "default": 250, "min": 1, "max": 1000000}),
    (
        "preset",
        "COMBO",
        {
            "default": "custom",
            "multiselect": False,
            "options": ["custom", "draft", "standard", "paper"],
            "optional": True,
        },
    ),
    (
        "memory",
        "COMBO",
        {
            "default": "auto",
            "multiselect": False,
            "options": ["auto", "off", "8 GB", "12 GB", "16 GB", "24 GB", "48 GB"],
            "optional": True,
        },
    ),
    ("accumulate", "INT", {"advanced": True, "default": 1, "min": 1, "max": 4096, "optional": True}),
    (
        "rate_schedule",
        "COMBO",
        {
            "advanced": True,
            "default": "constant",
            "multiselect": False,
            "options": ["constant", "cosine", "linear"],
            "optional": True,
        },
    ),
    (
        "warmup",
        "FLOAT",
        {"advanced": True, "default": 0, "min": 0, "max": 1000000, "optional": True, "round": False, "step": 0.01},
    ),
    (
        "adversarial_weight",
        "FLOAT",
        {"advanced": True, "default": 0.0, "min": 0, "max": 10, "step": 0.001, "round": False, "optional": True},
    ),
    (
        "adversarial_rate",
        "FLOAT",
        {"advanced": True, "default": 1e-05, "min": 1e-08, "max": 0.1, "step": 1e-08, "round": False, "optional": True},
    ),
    (
        "average",
        "FLOAT",
        {"advanced": True, "default": 6.94, "min": 0, "max": 100, "step": 0.01, "round": False, "optional": True},
    ),
    ("final_steps", "INT", {"advanced": True, "default": 0, "min": 0, "max": 10000000, "optional": True}),
    ("final_images", "INT", {"advanced": True, "default": 300, "min": 1, "max": 1000000, "optional": True}),
    (
        "trainable",
        "COMBO",
        {
            "advanced": True,
            "default": "all",
            "multiselect": False,
            "options": ["all", "bank", "lora", "style"],
            "optional": True,
        },
    ),
    ("lora_rank", "INT", {"advanced": True, "default": 32, "min": 1, "max": 1024, "optional": True}),
    (
        "optimizer",
        "COMBO",
        {
            "advanced": True,
            "default": "adamw",
            "multiselect": False,
            "options": ["adamw", "adamw8bit", "adafactor", "muon"],
            "optional": True,
        },
    ),
    (
        "teachers_wait",
        "COMBO",
        {
            "advanced": True,
            "default": "auto",
            "multiselect": False,
            "options": ["auto", "device", "offload"],
            "optional": True,
        },
    ),
    ("validation", "INT", {"advanced": True, "default": 64, "min": 0, "max": 100000, "optional": True}),
    ("compile", "BOOLEAN", {"advanced": True, "default": False, "optional": True}),
    (
        "sampling",
        "COMBO",
        {
            "advanced": True,
            "default": "uniform",
            "multiselect": False,
            "options": ["uniform", "adaptive"],
            "optional": True,
        },
    ),
    ("bank_size", "STRING", {"advanced": True, "default": "10%", "multiline": False, "optional": True}),
    ("guard", "FLOAT", {"default": 0.5, "min": 0, "max": 0.95, "step": 0.05, "round": False}),
    ("warm_start", "INT", {"default": 0, "min": 0, "max": 100000}),
    ("growth", "STRING", {"advanced": True, "default": "2%", "multiline": False, "optional": True}),
    ("attack_codes", "INT", {"default": 3, "min": 0, "max": 64}),
    ("attack_every", "INT", {"advanced": True, "default": 25, "min": 1, "max": 100000}),
    ("attack_steps", "INT", {"advanced": True, "default": 10, "min": 1, "max": 10000}),
    ("check_steps", "INT", {"default": 100, "min": 0, "max": 100000}),
]
"""The inputs as they were before their texts and defaults came from the fields: graphs that people saved depend on them."""


@pytest.fixture(scope="module")
def settings(host):
    from comfyui_dmm.nodes import distill_settings

    return distill_settings


def test_every_input_is_a_field_of_the_configuration(settings):
    inputs = {i.id for i in settings.setting_inputs()}
    assert inputs == settings.FIELDS.keys() | {"preset", "preview_every"}
    fields = {f.name for f in dataclasses.fields(settings.DEFAULTS)}
    assert set(settings.FIELDS.values()) <= fields


@pytest.fixture(scope="module")
def grow(settings):
    from comfyui_dmm.nodes import grow

    return grow


def test_the_controls_stay(settings, grow):
    attack = [i for i in grow.ForgetStyle.define_schema().inputs if i.id in grow.ATTACK]
    growing = [settings.guard_input(), settings.warm_start_input(), settings.growth_input()]
    inputs = [*settings.setting_inputs(), *growing, *attack]
    found = []
    for i in inputs:
        said = {k: v for k, v in i.as_dict().items() if k != "tooltip" and (k, v) != ("optional", False)}
        found.append((i.id, i.io_type, said))
    assert found == CONTROLS


def test_tooltips_are_the_texts_of_the_configuration(settings, grow):
    inputs = [*settings.setting_inputs(), *(i for node in grow.NODES for i in node.define_schema().inputs)]
    said = {i.id: i.template.input.tooltip if i.id == "teachers" else i.tooltip for i in inputs}
    assert not [name for name, text in said.items() if not (text and text.endswith("."))]
    docs = {
        name: about_field(TrainConfig, field).doc for name, field in {**settings.FIELDS, **settings.GROWING}.items()
    }
    docs |= {name: about_field(AttackConfig, field).doc for name, field in grow.ATTACK.items()}
    docs["average"] = docs["average"].replace("null: none", "0: none")
    assert {name: said[name] for name in docs} == docs and "0: none" in docs["average"]


def test_a_control_offers_only_what_the_configuration_takes(settings):
    """Both ends of every number, every choice, both positions of every switch and every text's default, one at a time."""
    for i in settings.setting_inputs():
        control = i.as_dict()
        for value in control.get(
            "options",
            [control[end] for end in ("min", "max") if end in control]
            or ([control["default"]] if isinstance(control["default"], str) else [True, False]),
        ):
            settings.train_config({i.id: value})


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
    (run,) = (files.base / "output" / "dmm_runs").glob("all-of-it-????????")
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
