"""web/js/style_text.js reads the text form of styles as ``dmm_core.style_value`` does: the same texts through both, by node."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from comfyui_dmm.dmm_core.style_value import Mix, Schedule, Style, find_style, parse_style, quote_name

SCRIPT = Path(__file__).absolute().parents[2] / "web" / "js" / "style_text.js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: it runs the file of the page")

READABLE = [
    *(
        "ink",
        " ink ",
        "none",
        "my ink",
        "ink, pen",
        "ink:0.7, pen:0.3",
        "ink:7,pen:3",
        "ink : .5 , pen : 1e-1 ",
        "ink:+1.",
    ),
    *(
        "ink:1.5, pen:-0.5",
        "paper: cut-out",
        "paper: cut-out:2, ink",
        '"a, b":0.5, c',
        "'a;b'",
        '"50%: x"',
        "the cat's eye",
    ),
    *(
        'say "hi"',
        "ink:٣, pen:١",
        "ink:𝟛, pen:𝟙",
        "墨:2, pen:6",
        "0%: flat; 60%: ink",
        "40%-60%: ink",
        "ink; 40% - 60% : pen",
    ),
    *(
        "0%: ink\n50%: pen\n\n100%: 墨",
        "ink;",
        "50%:ink:0.5,pen:0.5",
        "a:b:2, c",
        "1:2:",
        '""x"", y',
        "ink\u2003",
        "\x1cink\x1f",
    ),
    *(
        "\ufeffink",
        "0%-0%: ink",
        "0%: a; 0%: b",
        "5e1%: ink",
        "ink:0, pen:1",
        "a\tb",
        "'it''s'",
        '"a":"b"',
        "x:'y:2'",
        "50% : none",
    ),
]
REFUSED = [
    *(
        "",
        "  ",
        "\n;\n",
        ",",
        "ink,",
        "ink,,pen",
        "ink, ink",
        ":5",
        "ink:0",
        "ink:1, pen:-1",
        "ink:1e999",
        "ink:-1e999, pen",
    ),
    *(
        '"ink',
        "'a, b",
        "ink; pen",
        "120%: ink",
        "-5%: ink",
        "60%-40%: ink",
        "60%: a; 40%: b",
        "50%:",
        "0%: ink; 40%-60%:",
    ),
    *("a; 10%-50%: b; 20%: c", '"":1', "''", "ink:0.00000000001"),
]
NASTY = [
    *(
        "ink",
        "my ink",
        " ink",
        "ink ",
        "a, b",
        "a;b",
        "50%",
        "a\nb",
        "ink:0.5",
        "ink: 3e2 ",
        "ink:.5",
        "1:2:",
        "paper: cut-out",
        "-1",
    ),
    *(
        "the cat's eye",
        "'quoted'",
        'say "hi"',
        '"',
        "ink:٣",
        ":5",
        "墨",
        "<b>",
        "a:b:-0.5",
        "a:5.",
        "none of it",
        "x\x85",
    ),
]
BOTH_QUOTES = "both ' and \""


def in_node(expression: str, value):
    """What a JavaScript expression of the file's exports (``text``) and of ``value`` gives."""
    program = f"""
        const text = await import({json.dumps(SCRIPT.as_uri())});
        const value = JSON.parse(process.argv[1]);
        console.log(JSON.stringify({expression}));
    """
    command = [str(NODE), "--input-type=module", "--no-warnings", "-e", program, json.dumps(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = """value.map((style) => {
    try {
        const { first, then } = text.parseStyle(style);
        return [[...first], then.map((change) => [change.start, change.end, [...change.shares]])];
    } catch (error) {
        return error.message;
    }
})"""


def plain(style: Style) -> list:
    """A parsed style as the page's parser has it."""
    first, then = (style.first, style.then) if isinstance(style, Schedule) else (style, ())
    mixes = [first, *(change.style for change in then)]
    assert all(isinstance(mix, Mix) for mix in mixes)
    shares = [[list(pair) for pair in mix.shares] for mix in mixes]
    return [shares[0], [[change.start, change.end, share] for change, share in zip(then, shares[1:])]]


def close(got, expected) -> bool:
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(close, got, expected))
    return got == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_what_can_be_read():
    for text, got in zip(READABLE, in_node(READ, READABLE), strict=True):
        assert close(got, plain(parse_style(text))), (text, got, plain(parse_style(text)))


def test_what_is_refused_with_the_same_words():
    for text, got in zip(REFUSED, in_node(READ, REFUSED), strict=True):
        with pytest.raises(ValueError) as refusal:
            parse_style(text)
        assert got == str(refusal.value), text


def test_names_are_written_as_the_server_reads_them():
    written = in_node("value.map(text.quoteName)", [*NASTY, BOTH_QUOTES])
    assert written == [*map(quote_name, NASTY), None]


def test_names_are_found_as_the_server_finds_them():
    lists = [["ink", "Pen", "straße", "ΟΔΟΣ"], ["ink", "INK "], ["1", "ink"], ["ink", "\u0661"], [], ["none at all"]]
    wanted = [
        "ink",
        "INK",
        " pen ",
        "STRASSE",
        "οδος",
        "0",
        "1",
        " 3 ",
        "03",
        "4",
        "01234",
        "ink ",
        "x",
        "",
        "\u0661",
        "Iné",
    ]
    cases = [[known, name] for known in lists for name in wanted]
    got = in_node("value.map(([known, name]) => text.findStyle(known, name) ?? null)", cases)
    for (known, name), found in zip(cases, got, strict=True):
        try:
            expected = find_style(known, name)
        except ValueError:
            expected = None
        assert found == expected, (known, name)


def test_a_share_of_one_more_style():
    """Its share is exact, what was there keeps its proportions, and the times of a schedule stay."""
    cases = [
        ("", "pen", 0.3, "pen"),
        ("none", "pen", 0.3, "pen"),
        ("ink", "pen", 0.3, "ink:0.7, pen:0.3"),
        ("ink:0.7, pen:0.3", "pop", 0.5, "ink:0.35, pen:0.15, pop:0.5"),
        ("ink:0.7, pen:0.3", "pen", 0.5, "ink:0.5, pen:0.5"),
        ("ink", "ink", 0.5, "ink"),
        ("0%: ink; 40%-60%: pen", "a, b", 0.25, '0%: ink; 40%-60%: pen:0.75, "a, b":0.25'),
        ("ink;\n60%:pen:2", "pop", 0.5, "ink; 60%: pen:0.5, pop:0.5"),
        ('"a, b"', "pen", 0.5, '"a, b":0.5, pen:0.5'),
    ]
    got = in_node("value.map(([style, name, share]) => text.withShare(style, name, share))", [c[:3] for c in cases])
    assert got == [case[3] for case in cases]
    for text in got:
        parse_style(text)
    assert in_node("text.withShare(...value)", ["ink, ink", "pen", 0.5]) == "ink, ink, pen"  # unreadable: kept
