"""The machinery of ``make gpu``: rows survive a cut-off call, each stage ends in a row; and the stages themselves, rehearsed on the CPU."""

import dataclasses
import importlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from comfyui_dmm.tests.gpu import pack, report, runner
from comfyui_dmm.tests.gpu.rows import CUT_OFF, FAILED, NAME, NOT_HERE, OK, TIMED_OUT, Row, as_markdown, read_rows
from comfyui_dmm.tests.gpu.runner import Results
from comfyui_dmm.tests.gpu.stages import MEMORY, SIZES, Stage, stages

FAST = ("ceilings", "check-fused", "check-tf32", "memory-tiny")
PLACE = {"device": "CPU", "versions": {"torch": "some"}}


def run(made, results, **options):
    return runner.run(made, results, size="tiny", device="cpu", place=PLACE, **options)


@pytest.mark.parametrize("size", SIZES)
def test_the_list_of_stages(size):
    made = stages(size)
    assert len({stage.name for stage in made}) == len(made)
    assert {stage.part for stage in made} == set("abcdefghi")
    for stage in made:
        assert callable(importlib.import_module(f"comfyui_dmm.tests.gpu.{stage.module}").measure)
        assert stage.limit < 600, "a call has ten minutes"


def test_each_preset_of_the_planner_has_a_stage():
    from comfyui_dmm.tests.benches.memory import PRESETS
    from comfyui_dmm.tests.gpu.memory import name_of

    assert MEMORY["sd15"] == tuple(map(name_of, PRESETS))


def test_fast_stages_on_the_cpu(tmp_path):
    """Each leaves a row in the file; a second call has nothing to do."""
    results = Results(tmp_path)
    made = runner.chosen(stages("tiny"), FAST)
    new = run(made, results)
    assert [row.stage for row in new] == [stage.name for stage in made]
    statuses = {row.stage: row.status for row in new}
    assert statuses == {**dict.fromkeys(statuses, OK), "check-tf32": NOT_HERE}
    words = {row.stage: row.words for row in new}
    assert "CUDA" in words["check-tf32"]
    assert read_rows(tmp_path / NAME) == new and new[0].figures["bf16 product TFLOP/s"] > 0
    assert run(made, Results(tmp_path)) == []
    text = (tmp_path / "rows.md").read_text()
    assert all(f"| {name} |" in text for name in statuses)


def test_failures_and_limits_are_rows_too(tmp_path):
    results = Results(tmp_path)
    unknown = Stage("memory-tiny", "d", "a preset that there is not", "memory", 60)
    slow = dataclasses.replace(next(stage for stage in stages("tiny") if stage.name == "check-loop"), limit=0.5)
    # The child finds its stage by name in the list: what is changed here is the limit, and a name that is not in it.
    lost = dataclasses.replace(unknown, name="no such stage")
    rows = run([slow, lost], results)
    assert [row.status for row in rows] == [TIMED_OUT, FAILED]
    assert "0 s" in rows[0].words and "ended with 1" in rows[1].words
    assert [row.status for row in read_rows(tmp_path / NAME)] == [TIMED_OUT, FAILED]


def test_a_cut_off_stage_comes_after_those_that_have_no_row(tmp_path):
    results, made = Results(tmp_path, [tmp_path / "copy"]), stages("tiny")[:3]
    results.put(Row(made[0].name, "tiny", "CPU", CUT_OFF))
    results.put(Row(made[1].name, "tiny", "another card", OK))
    assert runner.waiting(made, Results(tmp_path), "tiny", "CPU") == [made[1], made[2], made[0]]
    assert read_rows(tmp_path / "copy" / NAME) == results.rows


def test_a_row_that_is_measured_again_keeps_its_figures_until_then(tmp_path, monkeypatch):
    """A call with --again that is cut off in its first stage, and one without that goes on."""
    made = runner.chosen(stages("tiny"), ["ceilings", "check-fused"])
    for stage in made:
        Results(tmp_path).put(Row(stage.name, "tiny", "CPU", OK, figures={"old": 1}))
    monkeypatch.setattr(runner, "where", lambda device: PLACE)
    command = f"runner --device cpu --size tiny --folder {tmp_path} --again --only ceil check-fu"
    monkeypatch.setattr("sys.argv", command.split())

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as within, pytest.raises(SystemExit, match="rows of finished stages are kept"):
        within.setattr(runner, "run_stage", cut_off)
        runner.main()
    results = Results(tmp_path)
    assert [row.status for row in results.rows] == [CUT_OFF, OK] and all(
        row.figures == {"old": 1} for row in results.rows
    )
    assert runner.waiting(made, results, "tiny", "CPU") == [made[1], made[0]]
    run(made, results)
    assert all(row.status == OK and not row.stale and "old" not in row.figures for row in read_rows(tmp_path / NAME))
    assert runner.waiting(made, Results(tmp_path), "tiny", "CPU") == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for a process's children")
def test_a_call_that_is_ended_ends_its_stage(tmp_path):
    """As ``kill`` and a job's end do it."""
    folder, stage = str(tmp_path / "rows"), "check-loop"
    command = [
        sys.executable,
        "-m",
        "comfyui_dmm.tests.gpu.runner",
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--folder",
        folder,
        "--only",
        stage,
    ]
    call = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = next(line for line in call.stdout if line.startswith(stage))
    children = Path(f"/proc/{call.pid}/task/{call.pid}/children")
    while not (child := children.read_text().split()):
        time.sleep(0.05)
    time.sleep(1)  # the call, too, knows of it by now
    call.terminate()
    assert "call again to go on" in call.communicate(timeout=60)[0] and said
    assert not Path(f"/proc/{child[0]}").exists() and [row.status for row in read_rows(Path(folder, NAME))] == [CUT_OFF]


@pytest.mark.parametrize("text", ["{", "", "null", "[1]", '[{"stage": "x"}]', '[{"odd": 1}]', "{}"])
def test_damaged_rows_are_said_and_left(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=r"rows.json' is damaged \(.*put back a copy"):
        Results(tmp_path)
    assert (tmp_path / NAME).read_text() == text
    with pytest.raises(ValueError, match="cannot be made: .* is a file"):
        Results(tmp_path / "other", [tmp_path / NAME])


def test_no_stage_is_begun_that_may_end_too_late(tmp_path, capsys):
    results = Results(tmp_path)
    made = runner.chosen(stages("tiny"), ["check-tf32", "ceilings"])
    assert len(run(made, results, seconds=made[0].limit)) == 1
    assert "call again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no stage is called nothing.*ceilings"):
        runner.chosen(stages("tiny"), ["nothing"])


def test_the_report_says_what_is_not_run(tmp_path):
    row = Row("step", "sd15", "some card", OK, figures={"samples/s": 12.3456}, tables={"lines": [{"a": 1, "b": 0.5}]})
    text = report.generated([row, dataclasses.replace(row, size="tiny", figures={"samples/s": 99.0})])
    assert "samples/s 12.35" in text and "99" not in text and "| 1 | 0.5 |" in text
    assert text.count("| not run |") == len(stages("sd15")) - 1
    assert report.generated([]).count("| not run |") == len(stages("sd15"))
    kept = report.with_generated(f"before {report.BEGIN} old {report.END} after", text)
    assert kept.startswith("before ") and kept.endswith(" after") and " old " not in kept and text in kept


def test_the_documents_part_is_what_the_kept_rows_say():
    text = report.DOC.read_text(encoding="utf-8")
    assert text == report.with_generated(text, report.generated(read_rows(report.KEPT))), "run make gpu-report"


def test_a_row_is_told_in_markdown():
    row = Row("a", "tiny", "CPU", FAILED, "x | y", 1.0)
    assert "x \\| y" in as_markdown([row])
    assert json.loads(json.dumps(dataclasses.asdict(row)))["words"] == "x | y"


def test_the_packs_list_and_its_archives(tmp_path):
    host = tmp_path / "host"
    for name, size in (
        ("main.py", 10),
        ("comfy/large.bin", 5000),
        ("comfy/sd1_tokenizer/vocab.json", 5000),
        ("tests/t.py", 1),
    ):
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_bytes(b"0" * size)
    (host / "requirements.txt").write_text("torch\ncomfy-kitchen==1.2.3\ncomfy-aimdo==4.5\n")
    names = dict(pack.wanted(host))
    assert names["comfy-kitchen==1.2.3"] is True and names["comfy-aimdo==4.5"] is False and "av" in names
    out = pack.pack_host(host, tmp_path / "host.tar.xz", 1000)
    assert out == ["tests/", "comfy/large.bin (0.0 MiB)"]
    with pack.tarfile.open(tmp_path / "host.tar.xz") as archive:
        assert set(archive.getnames()) == {
            "host/main.py",
            "host/comfy/sd1_tokenizer/vocab.json",
            "host/requirements.txt",
        }
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_STORED) as wheel:
        wheel.writestr("a.py", "x = 1\n" * 1000)
    pack.smaller(tmp_path / "a.whl", tmp_path / "b.whl")
    with zipfile.ZipFile(tmp_path / "b.whl") as wheel:
        assert wheel.read("a.py") == b"x = 1\n" * 1000
    assert (tmp_path / "b.whl").stat().st_size < (tmp_path / "a.whl").stat().st_size


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    """Minutes: every stage on the CPU; what needs a package or a GPU says so, and nothing fails or is cut off."""
    rows = run(stages("tiny"), Results(tmp_path))
    assert {row.stage: (row.status, row.words) for row in rows if row.status not in (OK, NOT_HERE)} == {}
    for row in rows:
        assert row.words if row.status == NOT_HERE else row.figures, row.stage
