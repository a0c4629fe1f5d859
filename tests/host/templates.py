"""The templates: what they are called in the browser, which shows the names of their files."""

import json

from .server import PACK

FOLDER = PACK / "workflows"
TITLES = {
    "quickstart": "DMM 01 - Quickstart, one model many styles",
    "style_sheet": "DMM 02 - Style sheet, every style at once",
    "blend_and_schedule": "DMM 03 - Blend and schedule styles",
    "regions": "DMM 04 - Regions, several styles on one canvas",
    "controlnet": "DMM 05 - ControlNet, one outline in every style",
    "lora": "DMM 06 - LoRA on a model with styles",
    "controlnet_lora_regions": "DMM 07 - ControlNet, LoRA and regions together",
    "instant_merge": "DMM 08 - Merge checkpoints into one model at once",
    "merge_loras": "DMM 09 - Merge LoRAs into one model",
    "distill_quickstart": "DMM 10 - Distill your own model from teachers",
    "add_teacher": "DMM 11 - Add a style to a model",
    "forget_style": "DMM 12 - Forget a style",
    "evaluate": "DMM 13 - Evaluate a model",
    "four_steps": "DMM 14 - Four steps, every style",
    "learn_style": "DMM 15 - Learn a style from pictures",
}
"""Name of the twin in the API's form -> title, in the order in which one learns."""


def graph_of(name: str) -> dict:
    """A template as the browser opens it."""
    return json.loads((FOLDER / f"{TITLES[name]}.json").read_text(encoding="utf-8"))


def twin_of(name: str) -> dict:
    """A template's graph in the API's form."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
