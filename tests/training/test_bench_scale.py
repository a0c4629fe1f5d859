"""The formulae of the costs on paper, against torch's count and by hand."""

import pytest
import torch
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.tests.benches import scale
from comfyui_dmm.tests.benches.memory import SD15, SDXL
from comfyui_dmm.tests.benches.scale import FAMILIES, Family, Rate, Recipe, cost, forward_flop, rate_of, sent_bytes
from comfyui_dmm.tests.gpu.report import DOC, KEPT, with_generated
from comfyui_dmm.tests.gpu.rows import Row, read_rows
from comfyui_dmm.training.demo.stages import DEMO_UNET
from torch.utils.flop_counter import FlopCounterMode

from .families import SMALL, SMALL_XL


@pytest.mark.parametrize(
    ("config", "side"), [(SD15, 64), (SD15, 32), (SDXL, 128), (DEMO_UNET, 16), (SMALL, 8), (SMALL_XL, 16)],
    ids=["SD1.5", "SD1.5 at 256", "SDXL", "demo", "small", "small SDXL"],
)  # fmt: skip
def test_flop_are_those_that_torch_counts(config, side):
    with torch.device("meta"):
        unet = UNet(config)
        x, t, context = (
            torch.empty(1, 4, side, side),
            torch.empty(1, dtype=torch.long),
            torch.empty(1, 77, config.context_dim),
        )
        y = torch.empty(1, config.adm_channels) if config.adm_channels else None
        with FlopCounterMode(display=False) as counter:
            unet(x, t, context, y)
    assert forward_flop(config, side) == counter.get_total_flops()


def test_a_sample_is_four_forwards():
    """Teacher, student, and a backward of twice the student's forward: counted on a small UNet, but for the gradients that no
    input needs."""
    with torch.device("meta"):
        teacher, student = UNet(SMALL).requires_grad_(False), UNet(SMALL)
        x, t, context = torch.empty(1, 4, 8, 8), torch.empty(1, dtype=torch.long), torch.empty(1, 77, SMALL.context_dim)
        with FlopCounterMode(display=False) as counter:
            (student(x, t, context) - teacher(x, t, context)).square().mean().backward()
    family = Family("small", SMALL, 8, "step")
    assert counter.get_total_flops() == pytest.approx(family.sample_flop, rel=0.03)


def test_communication_by_hand():
    one = Recipe("", 6400, 16, 1.0)
    family = FAMILIES[0]
    assert family.numbers == 859_520_964
    assert sent_bytes(one, family, 1) == 0
    assert sent_bytes(one, family, 8) == pytest.approx(2 * 7 / 8 * 4 * 859_520_964)
    half = Recipe("", 6400, 16, 0.5)
    assert sent_bytes(half, family, 64) == pytest.approx(sent_bytes(one, family, 64) / 2)


def test_days_by_hand(monkeypatch):
    monkeypatch.setattr(scale, "sum_seconds", lambda recipe, family, gpus: 0.25 if gpus > 1 else 0.0)
    recipe, rate = Recipe("", 6400, 16, 1.0), Rate(4.0, "")
    assert cost(recipe, FAMILIES[0], 1, rate) == pytest.approx((400 * 4.0 / 86400, 1.0))
    assert cost(recipe, FAMILIES[0], 8, rate) == pytest.approx((400 * 0.75 / 86400, 2 / 3))
    assert cost(recipe, FAMILIES[0], 64, rate) == pytest.approx(
        (100 * 0.5 / 86400, 0.5)
    )  # a row each, a quarter of the steps


def test_work_of_a_sample():
    assert Recipe("", 1, 1, 1.0).work == 1
    assert Recipe("", 1, 1, 1.0, backward=1.0).work == 0.75
    assert Recipe("", 1, 1, 1.0, student=2.0).work == 7 / 4


def test_a_gpus_row_changes_the_table_by_itself():
    before = scale.written([])
    row = Row("step", "sd15", "NVIDIA H200", "ok", figures={"samples/s": 120.0})
    slower = Row("step", "sd15", "NVIDIA L4", "ok", figures={"samples/s": 9.0})
    failed = Row("step-sdxl", "sd15", "NVIDIA H200", "failed")
    tiny = Row("step", "tiny", "NVIDIA H200", "ok", figures={"samples/s": 1e6})
    rows = [slower, row, failed, tiny]
    assert rate_of(FAMILIES[0], rows) == Rate(120.0, "measured on NVIDIA H200")
    assert rate_of(FAMILIES[1], rows) == rate_of(FAMILIES[1], [])
    after = scale.written(rows)
    assert "measured on NVIDIA H200" in after and "measured" not in before
    assert f"{32e6 / 120 / 86400:.3g} days (100%)" in after


def test_the_document_is_what_the_script_writes():
    text = DOC.read_text(encoding="utf-8")
    assert with_generated(text, scale.written(read_rows(KEPT)), scale.MARKS) == text
