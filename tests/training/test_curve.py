"""The points of the loss chart, beside a recomputation from all steps."""

import json
import math
from itertools import pairwise

from comfyui_dmm.training.run.watch.curve import MOST, Curve


def test_a_short_run_is_kept_whole():
    curve = Curve()
    for step in range(1, 101):
        curve.add(step, {"ink": 1 / step, "pen": step})
    lists = curve.as_lists()
    assert lists["steps"] == list(range(1, 101))
    assert lists["losses"] == {
        "ink": [float(f"{1 / s:.6g}") for s in range(1, 101)],
        "pen": [float(s) for s in range(1, 101)],
    }


def test_a_long_run_is_spread_evenly():
    curve = Curve()
    for step in range(1, 10_001):
        curve.add(step, {"ink": float(step)})
    steps = curve.as_lists()["steps"]
    gaps = {b - a for a, b in pairwise(steps)}
    assert MOST / 2 - 1 <= len(steps) < MOST
    (gap,) = gaps
    assert steps[0] <= 2 * gap and 10_000 - steps[-1] <= gap
    assert curve.as_lists()["losses"]["ink"] == [float(s) for s in steps]


def test_a_teacher_that_comes_later_and_what_json_does_not_know():
    curve = Curve()
    curve.add(1, {"ink": math.nan})
    curve.add(2, {"ink": 0.5, "pen": math.inf})
    lists = curve.as_lists()
    assert lists["losses"] == {"ink": [None, 0.5], "pen": [None, None]}
    json.dumps(lists, allow_nan=False)


def test_nothing_yet():
    assert Curve().as_lists() == {"steps": [], "losses": {}}
