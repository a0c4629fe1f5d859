"""What YAML makes of what people write is said, and no hostile YAML crashes, hangs or fills the memory."""

import datetime
import random
import time
import tracemalloc

import pytest
import yaml
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config_file import load_config
from comfyui_dmm.training.yaml_file import LARGEST, read_yaml

SECONDS, MEGABYTES = 15, 80
"""A file may take no more of the processor, under tracemalloc, and no more memory."""
START = "base: base.safetensors\noutput: out.safetensors\nrun_dir: run\n"
ODD = (
    "in line %d is another number to YAML (a leading 0 means octal, a colon base 60): "
    "write it without, or put it into quotes if it is a text"
)
TEACHER = START + "teachers: [{name: %s, file: a.safetensors}]\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("base", "a"):
        (tmp_path / f"{name}.safetensors").touch()
    return tmp_path


def load(folder, text):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_config(path)


@pytest.mark.parametrize(
    "text, place, message",
    [
        (TEACHER % "1990", "teachers[0].name", "is 1990, which YAML reads as a number: expected text, put it into quotes: '1990'"),
        (TEACHER % "no", "teachers[0].name", "is no, which YAML reads as false: expected text, put it into quotes: 'no'"),
        (TEACHER % "On", "teachers[0].name", "is On, which YAML reads as true: expected text, put it into quotes: 'On'"),
        (TEACHER % "1.50", "teachers[0].name", "is 1.50, which YAML reads as a number: expected text, put it into quotes: '1.50'"),
        (TEACHER % "0x1F", "teachers[0].name", "is 0x1F, which YAML reads as a number: expected text, put it into quotes: '0x1F'"),
        (TEACHER % "null", "teachers[0].name", "is empty, which YAML reads as null: expected text"),
        (TEACHER % "", "teachers[0].name", "is empty, which YAML reads as null: expected text"),
        (TEACHER % "[a]", "teachers[0].name", "is ['a']: expected text"),
        (TEACHER % "x" + "title: 2026-01-01\n", "title",
         "is 2026-01-01, which YAML reads as a date: expected text, put it into quotes: '2026-01-01'"),
        (TEACHER % "x" + "prediction: 5\n", "prediction", "is 5, which YAML reads as a number: expected text, put it into quotes: '5'"),
        (START + "forget: [ink, 1990]\n", "forget[1]", "is 1990, which YAML reads as a number: expected text, put it into quotes: '1990'"),
        (TEACHER % "x" + "no: 3\n", "config", "has a setting that YAML reads as false, not as a name: False"),
        (TEACHER % "x" + "~: 3\n", "config", "has a setting that YAML reads as null, not as a name: None"),
        (TEACHER % "x" + "train: {2: 3}\n", "train", "has a setting that YAML reads as a number, not as a name: 2"),
        (TEACHER % "010", "010", ODD % 4),
        (TEACHER % "x" + "train: {steps: 1:30}\n", "1:30", ODD % 5),
        (TEACHER % "2026-13-45", "'2026-13-45'", "in line 4 is no timestamp, which YAML takes it for: put it into quotes if it is a text"),
        (TEACHER % "x" + "train: {lr: 2026-01-01}\n", "train.lr", "is datetime.date(2026, 1, 1): expected a positive number"),
        (TEACHER % "x" + f"train: {{steps: {10**30}}}\n", "train.steps", f"is {10**30}: expected a whole number from 1"),
    ],
)  # fmt: skip
def test_what_yaml_made_of_it_is_said(folder, text, place, message):
    with pytest.raises(ValueError) as error:
        load(folder, text)
    assert str(error.value) == f"run.yaml: {place} {message}"


def test_values_as_people_write_them(folder):
    """Against Python's own numbers and dates."""
    loras = "loras: [{file: a.safetensors, strength: 5e-1, clip_strength: 1e+0}]"
    config = load(folder, START + f"teachers: [{{name: '1990', {loras}}}]\ntrain: {{lr: 1e-5, steps: 1_000}}\n")
    assert config.teachers[0].name == "1990" and (config.train.lr, config.train.steps) == (1e-5, 1000)
    assert (config.teachers[0].loras[0].strength, config.teachers[0].loras[0].clip_strength) == (0.5, 1.0)
    text = "a: [1, -2, 0, 0x1F, 1.5, .inf, yes, ~, 'x', 2026-01-02, 0.5, 10, 5e-1, 1e5]\nb: &c {d: [1]}\ne: {<<: *c, f: *c}\n"
    path = folder / "any.yaml"
    path.write_text(text)
    assert read_yaml(path) == yaml.safe_load(text)
    assert read_yaml(path)["a"][9] == datetime.date(2026, 1, 2)
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\r\n")  # as Windows' editor writes it
    assert read_yaml(path) == {"a": "é"}


def nested(count, opening="[", closing="]"):
    return opening * count + closing * count


def lols(levels, width, kind="[%s]"):
    """A billion laughs: width ** levels values."""
    rows = ["a0: &a0 x"]
    rows += [f"a{i}: &a{i} " + kind % ", ".join([f"*a{i - 1}"] * width) for i in range(1, levels + 1)]
    return "\n".join(rows) + "\n"


def merges(levels, width):
    rows = ["m0: &m0 {k: 1}"]
    rows += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * width)}]}}" for i in range(1, levels + 1)]
    return "\n".join(rows) + "\n"


BOMBS = {
    "aliases": lols(12, 10),
    "aliases in a setting": lols(12, 10) + "train: {lr: *a12}\n",
    "aliases where a name is": START + lols(9, 9) + "teachers: [{name: *a9, file: a}]\n",
    "a doubling chain": lols(40, 2),
    "a chain of single aliases": lols(3000, 1),
    "merges": merges(12, 10),
    "a list in itself": "train: &a [*a]\n",
    "a mapping in itself": "train: &a {lr: *a}\n",
    "a mapping that merges itself": "train: &a {<<: *a}\n",
    "brackets": nested(100_000),
    "brackets and no end": "[" * 200_000,
    "braces": nested(50_000, "{a: ", "}"),
    "blocks": "".join(" " * i + "a:\n" for i in range(600)),
    "dashes": "- " * 100_000,
    "questions": "? " * 100_000,
    "questions in brackets": "[" + "? [" * 40_000,
    "a large file": "a: " + "x" * LARGEST,
    "many keys": "".join(f"k{i}: 1\n" for i in range(9_000)),
    "many documents": "---\n" * 60_000,
    "a number of many digits": TEACHER % "x" + f"train: {{lr: {'9' * 200_000}}}\n",
    "a hexadecimal number": TEACHER % "x" + f"train: {{steps: 0x{'F' * 200_000}}}\n",
    "a binary number": TEACHER % "x" + f"train: {{lr: 0b{'1' * 200_000}}}\n",
    "base 60": TEACHER % "x" + f"train: {{steps: 1{':59' * 60_000}}}\n",
    "a float": TEACHER % "x" + f"train: {{lr: 1.0e+{'9' * 50_000}}}\n",
    "a long text for a number": TEACHER % "x" + f"train: {{lr: {'x' * 200_000}}}\n",
    "a long name of a setting": TEACHER % "x" + f"{'y' * 100_000}: 3\n",
    "a long path": START.replace("base.saf", "b" * 100_000 + ".saf") + "teachers: [{name: x, file: a.safetensors}]\n",
    "spaces": "a:" + " " * 250_000 + "b",
    "tags": "!" * 100_000,
    "anchors": "".join(f"- &x{i} 1\n" for i in range(9_000)),
    "percent": "%" * 100_000,
    "comments": "#\n" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(folder, name):
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(ValueError) as error:
            load(folder, BOMBS[name])
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 2000 and "\n\n" not in str(error.value)
    assert time.process_time() - begun < SECONDS and peak < MEGABYTES, peak


TOKENS = [
    "base", "teachers", "name", "file", "train", "lr", "steps", "loras", "data", "kind", "seed", "prediction", "clip_skip", "preset",
    "betas", ": ", ":", "- ", "[", "]", "{", "}", ", ", "? ", "&a ", "*a", "<<: ", "\n", "\n  ", "\n    ", "|\n", ">-\n", "'", '"', "#",
    "%YAML 1.1\n", "---\n", "...\n", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ",
    "!!null ",    "!!str ",
    "!!python/object/apply:os.system ", "!!merge ", "!!map ", "!!seq ", "!x ", "1", "-1", "0", "1e5", ".nan", "-.inf", "0x", "0b2",
    "007", "1:2:3", "2026-01-01", "2026-99-99 25:61:61", "yes", "no", "~", "null", "=", "\\x00", '"\\ud800"', '"\\0"', "\x00", "\x85",
    "\u2028",    "\ufeff",
    "é", "\t", "\r", "@", "`", "1_0", "1" * 30, "base.safetensors", "a.safetensors", "v", "cache", "x" * 300,
]  # fmt: skip
TAGGED = [
    f"{tag}{value}"
    for tag in TOKENS
    if tag.startswith("!")
    for value in ("x", "''", "1", "[1]", "{a: 1}", "[[a, b]]", "~")
]
GOOD = {
    "base": "base.safetensors", "output": "out.safetensors", "run_dir": "run", "title": "t", "parts_from": "",
    "prediction": "v",
    "clip_skip": "2", "picture_every": "3", "forget": "[]", "teachers": "[{name: A, file: a.safetensors, loras: [{file: a.safetensors}]}]",
    "data": "{kind: demo_scenes, count: 5, seed: 1}", "train": "{preset: draft, lr: 1e-5, betas: [0.9, 0.99], tf32: true}",
    "attack": "{every: 3}",
}  # fmt: skip


def hostile(seed):
    """A file of random tokens, or a good one in which random values are replaced."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        return "".join(draw.choices(TOKENS, k=draw.randrange(1, 40)))
    text = "".join(f"{key}: {value}\n" for key, value in GOOD.items())
    for _ in range(draw.randrange(1, 4)):
        if seed % 3 == 1:  # a value in its place
            key = draw.choice(list(GOOD))
            new = draw.choice(TAGGED) if draw.random() < 0.6 else "".join(draw.choices(TOKENS, k=draw.randrange(1, 4)))
            text = "".join(f"{key}: {new}\n" if line.startswith(f"{key}:") else line for line in text.splitlines(True))
        else:  # anywhere
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice(TOKENS + TAGGED) + text[place + draw.randrange(8) :]
    return text


def test_hostile_files_by_the_hundred(folder):
    """Refused in words, or read; the good one is read."""
    assert load(folder, "".join(f"{key}: {value}\n" for key, value in GOOD.items())).train.lr == 1e-5
    counts = {"read": 0, "refused": 0}
    for seed in range(1500):
        begun = time.process_time()
        try:
            load(folder, hostile(seed))
            counts["read"] += 1
        except ValueError as error:
            counts["refused"] += 1
            assert 0 < len(str(error)) < 2000 and "run.yaml" in str(error), seed
        assert time.process_time() - begun < SECONDS, seed
    print(counts)
    assert min(counts.values()) > 3


def test_a_pipe_and_a_folder_are_no_yaml(folder):
    import os

    (folder / "folder.yaml").mkdir()
    for path in (folder / "folder.yaml", *([folder / "pipe.yaml"] if hasattr(os, "mkfifo") else [])):
        if not path.exists():
            os.mkfifo(path)
        with pytest.raises(ValueError, match=f"{path.name}: it is no file"):
            load_config(path)


def test_the_command_says_it_in_one_line(folder, capsys):
    (folder / "run.yaml").write_text(lols(12, 10) + "train: {lr: *a12}\n")
    assert main(["distill", "--config", str(folder / "run.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dmm: run.yaml: it stands for 2345679012361 values") and said.count("\n") == 1
