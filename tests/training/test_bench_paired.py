"""The benches' common measurement: quartiles, turns, and no ratio without equal results."""

import pytest
import torch
from comfyui_dmm.tests.benches.paired import Memory, PeakMemory, Side, apart, in_turns, paired, printed, quartiles


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def side(self, seconds, result=1.0, log=None, name=""):
        seconds = iter(seconds)

        def work():
            self.now += next(seconds)
            if log is not None:
                log.append(name)
            return result

        return Side(work)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], [0.1 * i * i for i in range(12)]])
def test_quartiles_are_those_of_torch(values):
    wanted = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    torch.testing.assert_close(torch.tensor(quartiles(values), dtype=torch.float64), wanted)


def test_ratios_are_of_turns_and_the_first_turn_only_warms_up():
    clock = Clock()
    one = clock.side([100, 1, 2, 4, 5, 10])
    other = clock.side([7, 2, 6, 4, 20, 10])
    line = paired("b / a", one, other, tolerance=0, rounds=5, clock=clock)
    assert line.ratio == quartiles([2, 3, 1, 4, 1]) == [1, 2, 3]
    assert line.amount == 4
    assert "| 2.000 | 1.000 to 3.000 | 4 s |" in printed([line])


def test_the_sides_alternate_and_preparation_is_not_timed():
    clock, log = Clock(), []

    def prepare():
        clock.now += 1000

    a, b = clock.side([1] * 9, log=log, name="a"), clock.side([1] * 9, log=log, name="b")
    took = in_turns({"a": Side(a.work, prepare), "b": b}, 4, clock=clock)
    assert log == ["a", "b", "b", "a"] * 2
    assert took == {"a": [1] * 4, "b": [1] * 4}


@pytest.mark.parametrize(
    ("found", "distance"),
    [
        (torch.tensor([2.0, 4.0]), 0.0),
        (torch.tensor([2.0, 4.4]), 0.1),
        (torch.tensor([2.0, float("nan")]), float("inf")),
        (torch.tensor([2.0, 4.0, 0.0]), float("inf")),
    ],
)
def test_how_far_results_are_apart(found, distance):
    wanted = torch.tensor([2.0, 4.0])
    assert apart(wanted, found) == pytest.approx(distance, abs=1e-6)
    assert apart({"a": [1, wanted]}, {"a": [1, found]}) == pytest.approx(distance, abs=1e-6)
    assert apart({"a": wanted}, {"b": wanted}) == apart([wanted], [wanted, wanted]) == float("inf")
    assert apart(torch.full((2,), float("nan")), torch.full((2,), float("nan"))) == float("inf")
    with pytest.raises(TypeError):
        apart("a picture", "another one")


def test_sides_that_disagree_have_no_ratio_and_are_not_timed():
    clock = Clock()
    one, other = clock.side([1.0, 1.0], torch.ones(3)), clock.side([1.0, 1.0], torch.tensor([1.0, 1.0, 1.2]))
    line = paired("b / a", one, other, tolerance=0.1, rounds=1, clock=clock)
    assert line.ratio is None and line.apart == pytest.approx(0.2)
    row = printed([line]).splitlines()[-1]
    assert "the sides disagree |  |  |" in row and "2.0e-01 (1e-01)" in row
    assert clock.now == 2  # the two that were compared


def test_what_is_compared_instead_of_two_things():
    clock = Clock()
    one, other = clock.side([1.0] * 4, torch.ones(3)), clock.side([3.0] * 4, torch.zeros(3))
    line = paired("b / a", one, other, tolerance=0, rounds=3, same=lambda: (2.0, 2.0), clock=clock)
    assert line.ratio == [3, 3, 3]
    refused = paired("b / a", clock.side([1]), clock.side([1]), tolerance=0, same=lambda: (2.0, 2.1), clock=clock)
    assert refused.ratio is None


def test_memory_sees_what_is_kept():
    """After much was freed too, in pieces that the C library keeps: an earlier version saw nothing of what was then kept."""
    pieces = [bytearray(100_000) for _ in range(2000)]
    last = bytearray(100_000)  # on top of the heap, so that it does not shrink
    del pieces
    with Memory() as memory:
        kept = torch.ones(25_000_000)
    assert memory.peak - memory.before > 0.9 * kept.nbytes
    del last


def test_memory_of_turns():
    kept = []

    def side(count):
        return Side(lambda: kept.append(torch.ones(count)), prepare=kept.clear)

    clock = PeakMemory()
    line = paired(
        "b / a", side(10_000_000), side(20_000_000), tolerance=0, rounds=3, same=lambda: (1, 1), clock=clock, unit="B"
    )
    assert line.ratio[1] == pytest.approx(2, rel=0.2)
    assert line.cells["one"].endswith(" MB") and line.amount == pytest.approx(40e6, rel=0.2)
