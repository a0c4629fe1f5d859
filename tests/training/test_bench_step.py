"""The bench of the training step: no ratio without equal results."""

import torch
from comfyui_dmm.tests.benches import training_step
from comfyui_dmm.tests.benches.training_step import difference, measure, ours, rig, table, theirs


def test_the_published_loop_computes_what_ours_does():
    result = measure("cpu", "tiny", seconds=0, batch=1)
    one = result["sides"]["theirs"]
    assert one["equal"] and one["apart"]["gradient"] < 1e-4 and one["ours over it"][0] > 0
    assert result["turns"] == 3 and "sides disagree" not in table(result)


def test_sides_that_disagree_have_no_ratio(monkeypatch):
    """A feature loss of another weight, a tenth of the loss, is seen."""
    made = rig(torch.device("cpu"), "tiny", 1)
    monkeypatch.setattr(training_step, "feature_loss", lambda one, other: 0 * one[0].mean())
    apart = difference(made, ours(made), theirs(made))
    assert apart["loss"] > 1e-3 and apart["gradient"] > 1e-3


def test_variants_one_by_one():
    """The same to rounding by the slow kernel of attention; what this machine has no kernel for is said, and is no end."""
    found = {}
    training_step.each_beside_ours("cpu", "tiny", 0, ["math attention", "efficient attention"], found.__setitem__)
    slow = found["math attention"]["sides"]["math attention"]
    assert slow["equal"] and slow["ours over it"][0] > 0
    assert isinstance(found["efficient attention"], str) and found["efficient attention"]
