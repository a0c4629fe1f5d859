"""Styles as values: the text form, and what blends, schedules and batches come to, worked out by hand."""

import pytest
import torch
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.style_value import (
    NONE,
    Blend,
    Change,
    Mix,
    PerItem,
    Schedule,
    Strength,
    check_new_name,
    find_style,
    mix,
    parse_style,
    quote_name,
    style_rows,
    vocabulary,
)

NAMES = ["flat", "ink", "neon", "paper: cut-out", "a, b", "3 %", "it's", '6" nails', "50%: grey"]
KNOWN = vocabulary(NAMES)


def row(text: str, progress: float = 0.0) -> list[float]:
    return style_rows(parse_style(text), KNOWN, progress)[0].tolist()


def by_hand(strength: float = 1.0, **weights: float) -> list[float]:
    names = {name.split(":")[0].split(",")[0]: i for i, name in enumerate(NAMES)}
    return style_row(len(NAMES), {names[k]: v for k, v in weights.items()}, strength)[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_alone_is_that_style(name):
    assert row(quote_name(name)) == style_row(len(NAMES), NAMES.index(name))[0].tolist()


@pytest.mark.parametrize(
    "text, weights, strength",
    [
        ("ink:0.7, neon:0.3", {"ink": 0.7, "neon": 0.3}, 1),
        ("ink:7,neon:3", {"ink": 0.7, "neon": 0.3}, 1),
        ("ink, neon", {"ink": 0.5, "neon": 0.5}, 1),
        (" INK : 1e0 ,Neon: .5,", None, None),
        ("ink:2, none:2", {"ink": 1}, 0.5),
        ("ink:1.5, flat:-0.5", {"ink": 1.5, "flat": -0.5}, 1),
        ("paper: cut-out", {"paper": 1}, 1),
        ("paper: cut-out:3, ink", {"paper": 0.75, "ink": 0.25}, 1),
        ('"a, b":0.5, ink:0.5', {"a": 0.5, "ink": 0.5}, 1),
        ("ink, INK", {"ink": 1}, 1),
        ("none", {}, 0),
    ],
)
def test_shares(text, weights, strength):
    if weights is None:
        with pytest.raises(ValueError, match="a style's name is missing"):
            row(text)
    else:
        assert row(text) == pytest.approx(by_hand(strength, **weights), abs=1e-6)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0%: flat; 60%: ink", {0: {"flat": 1}, 0.599: {"flat": 1}, 0.6: {"ink": 1}, 1: {"ink": 1}}),
        ("flat\n40%-60%: ink", {0.4: {"flat": 1}, 0.45: {"flat": 0.75, "ink": 0.25}, 0.6: {"ink": 1}, 0.9: {"ink": 1}}),
        ("flat; 20%: ink; 50% - 100%: neon", {0.1: {"flat": 1}, 0.3: {"ink": 1}, 0.75: {"ink": 0.5, "neon": 0.5}}),
        ("0%: ink:1, neon:1; 100%: flat", {0.99: {"ink": 0.5, "neon": 0.5}, 1: {"flat": 1}}),
    ],
)
def test_schedules(text, expected):
    for progress, weights in expected.items():
        assert row(text, progress) == pytest.approx(by_hand(**weights), abs=1e-6), progress


def test_fading_to_none_lowers_the_strength_and_keeps_the_style():
    assert row("ink; 0%-100%: none", 0.25) == pytest.approx(by_hand(0.75, ink=1), abs=1e-6)
    assert row("30%: ink", 0.1) == by_hand(0)


def test_blends_of_anything():
    blend = Blend(Strength(Mix((("ink", 1.0),)), 2.0), Mix((("neon", 1.0),)), 0.5)  # masses 1 and 0.5
    assert style_rows(blend, KNOWN)[0].tolist() == pytest.approx(by_hand(1.5, ink=2 / 3, neon=1 / 3), abs=1e-6)
    schedule = Blend(parse_style("flat; 50%: ink"), parse_style("neon"), 0.25)
    assert schedule.changes
    assert style_rows(schedule, KNOWN, 0.7)[0].tolist() == pytest.approx(by_hand(ink=0.75, neon=0.25), abs=1e-6)
    beyond = Blend(parse_style("flat"), parse_style("ink"), 1.5)
    assert style_rows(beyond, KNOWN)[0].tolist() == pytest.approx(by_hand(flat=-0.5, ink=1.5), abs=1e-6)


def test_one_style_per_item():
    style = PerItem((parse_style("ink"), NONE, parse_style("neon")))
    rows = [by_hand(ink=1), by_hand(0), by_hand(neon=1)]
    assert style.items == 3
    for batch in (1, 2, 3, 5):
        assert style_rows(style, KNOWN, batch=batch).tolist() == [rows[i % 3] for i in range(batch)]
    assert len(style_rows(parse_style("ink"), KNOWN, batch=4)) == 1
    faded = Schedule(parse_style("flat"), (Change(0.0, 1.0, style),))
    assert style_rows(faded, KNOWN, 0.5, 3)[2].tolist() == pytest.approx(by_hand(flat=0.5, neon=0.5), abs=1e-6)


def test_named_blends_are_styles():
    known = {**vocabulary(["a", "b"]), "dusk": (0.25, 0.75)}
    assert style_rows(parse_style("dusk:0.5, a:0.5"), known)[0].tolist() == pytest.approx([0.625, 0.375, 1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the style is empty"),
        (" ; \n", "the style is empty"),
        ("ink,,neon", "name is missing in 'ink,,neon'"),
        (":0.5", "name is missing in ':0.5'"),
        ("ink:1, ink:2", "style 'ink' is given twice"),
        ("ink:1, neon:-1", "shares of ink, neon sum to 0: a blend needs a sum above 0"),
        ("ink:0", "sum to 0"),
        ("ink; neon", "'neon' lacks the moment it begins at: write it as 50%: neon"),
        ("60%: ink; 20%: flat", "from 20% to 20% is not between 60%"),
        ("60%-30%: ink", "does not begin and end between 0% and 100%"),
        ("0%: ink; 130%: flat", "does not begin and end between 0% and 100%"),
        ('"ink', "is opened and not closed"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_style(text)


def test_unknown_names_list_the_known_ones_before_anything_is_painted():
    for text in ("oil", "ink:0.5, oil:0.5", "ink; 50%: oil"):
        style = parse_style(text)
        with pytest.raises(
            ValueError, match="unknown style 'oil'. The styles of this model: flat, ink, neon, .*, none"
        ):
            style.check(KNOWN)
    with pytest.raises(ValueError, match="none at all"):
        parse_style("ink").check({})
    NONE.check({})
    assert style_rows(NONE, {}).tolist() == [[0.0]]


def test_weights_that_cancel_in_a_blend_are_refused():
    with pytest.raises(ValueError, match="needs a sum above 0"):
        style_rows(Blend(Strength(parse_style("ink"), 0.5), parse_style("flat"), -1.0), KNOWN)
    for share in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a number"):
            mix({"ink": share})
        with pytest.raises(ValueError, match="must be"):
            Blend(NONE, NONE, share)
        with pytest.raises(ValueError, match="must be 0 or more"):
            Strength(NONE, share)


def test_names_as_people_type_them():
    names = ["ink", "Neon", "neon", "paper"]
    assert [find_style(names, n) for n in ("ink", "INK ", "Neon", "neon", "3")] == [
        "ink",
        "ink",
        "Neon",
        "neon",
        "paper",
    ]
    for wrong in ("NEON", "", "pape", "none of these", "4", "-1"):  # two alike, nothing, a part, no such number
        with pytest.raises(ValueError, match="ink, Neon, neon, paper, none"):
            find_style(names, wrong)
    assert find_style(["1", "0"], "0") == "0"  # a name before a number
    with pytest.raises(ValueError, match="unknown style '0'"):
        find_style(["1", "2"], "0")


def test_new_names():
    assert check_new_name(["ink"], " dusk ") == "dusk"
    for name, message in ((" ", "empty"), ("None", "without a style"), ("INK", "already has a style 'ink'")):
        with pytest.raises(ValueError, match=message):
            check_new_name(["ink"], name)


def test_what_is_shown_reads_back():
    for text in ("ink", "flat; 60%: ink", "ink:0.7, neon:0.3"):
        shown = parse_style(str(parse_style(text)))
        for progress in (0.0, 0.5, 1.0):
            torch.testing.assert_close(
                style_rows(shown, KNOWN, progress), style_rows(parse_style(text), KNOWN, progress), rtol=0, atol=1e-3
            )
