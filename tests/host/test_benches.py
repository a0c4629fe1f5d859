"""The benches of painting and loading compare what they time: right pictures have a ratio, others none."""

import pytest
import torch
from comfyui_dmm.tests.benches import loading, styles
from comfyui_dmm.tests.benches.styles import Bench, in_weights, load, measure, sizes

pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture(scope="module", params=["", "10%"], ids=["codes", "bank"])
def lines(request, tmp_path_factory):
    """A function that gives the lines with a text in their names."""
    config, side = sizes("demo", request.param)
    with torch.inference_mode():
        model = load(config, tmp_path_factory.mktemp("bench"), torch.float32)

    @torch.inference_mode()
    def of(*only):
        found = []
        measure(Bench(config, side, 2, 1, only, found.append), model, 1e-4)
        return found

    return of


def test_pictures_that_agree_have_a_ratio(lines):
    found = lines("one style / host", "2 styles in a batch", "own 4 areas", "one pass", "schedule")
    assert len(found) == 5
    for line in found:
        assert line.ratio is not None and line.apart < 1e-5, line


@pytest.mark.parametrize("name", ["one style / host", "2 styles in a batch", "own 4 areas"])
def test_another_style_has_none(lines, monkeypatch, name):
    monkeypatch.setattr(styles, "in_weights", lambda model, _: in_weights(model, "style 7"))
    (line,) = lines(name)
    assert line.ratio is None and line.apart > 20 * line.tolerance
    assert "the sides disagree" in line.cells.values()


@torch.inference_mode()
def test_loading_compares_every_weight(tmp_path, monkeypatch):
    dmm, plain = loading.make_files(tmp_path, "demo", "", torch.float16)
    (line,) = loading.load_lines(dmm, plain, 1, "demo")
    assert line.ratio is not None and line.apart == 0
    ours = loading.our_loader

    def off_by_one_weight(path):
        parts = ours(path)
        parts[0].model.diffusion_model.middle_block[0].in_layers[2].bias[3] += 1e-3
        return parts

    monkeypatch.setattr(loading, "our_loader", off_by_one_weight)
    (line,) = loading.load_lines(dmm, plain, 1, "demo")
    assert line.ratio is None
