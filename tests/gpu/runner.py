"""Runs the stages that have no row yet, in order of value, each in its own process under its own time limit.

    make gpu                                     (on a GPU; call it again until it says that nothing is left)
    make gpu DEVICE=cpu SIZE=tiny                (the rehearsal)
    make gpu GPU="--list"                        (stages, limits and what is known of each)
    make gpu GPU="--only step host --again"      (stages whose names begin so, once more)
    make gpu GPU="--minutes 9.5 --copy-to DIR"   (begin no stage that may end later; the rows are also written to DIR)

Rows are written as stages end, to rows.json and rows.md in --folder. A stage that a cut-off call was in the middle of is tried again after
those that have not been tried.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...dmm_core.files import atomic_write
from ...training.files.outputs import check_folder
from .rows import CUT_OFF, FAILED, NAME, TIMED_OUT, Row, as_markdown, read_rows, with_row, write_rows
from .stages import SIZES, Stage, stages

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "out" / "gpu"
CHILD = [sys.executable, "-m", "comfyui_dmm.tests.gpu.child"]
SHOWN = 3000
"""Characters of a failed stage's output that are printed."""


def where(device: str) -> dict:
    """Device name and versions, from a process of its own: this one must not hold memory of the GPU."""
    done = subprocess.run([*CHILD, "--where", "--device", device], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip()[-SHOWN:])
    return json.loads(done.stdout.splitlines()[-1])


class Results:
    """The rows of a folder, kept on disk as they come. copies: other folders that get the same files."""

    def __init__(self, folder: Path, copies: Sequence[Path] = ()):
        self.folders = [folder, *copies]
        self.rows = read_rows(folder / NAME)
        for one in self.folders:
            check_folder(one, f"the folder '{one}'")

    def put(self, row: Row) -> None:
        self.rows = with_row(self.rows, row)
        for folder in self.folders:
            write_rows(folder / NAME, self.rows)
            with atomic_write(folder / "rows.md") as temporary:
                temporary.write_text(as_markdown(self.rows), encoding="utf-8")

    def of(self, stage: Stage, size: str, device: str) -> Row | None:
        return next((row for row in self.rows if row.key == (stage.name, size, device)), None)


def chosen(all_stages: Iterable[Stage], only: Sequence[str]) -> list[Stage]:
    """Stages whose names begin with one of ``only``, or all of them. Raises ValueError where one of ``only`` names none."""
    all_stages = list(all_stages)
    for start in only:
        if not any(stage.name.startswith(start) for stage in all_stages):
            raise ValueError(
                f"no stage is called {start}...: there are {', '.join(stage.name for stage in all_stages)}"
            )
    return [stage for stage in all_stages if not only or stage.name.startswith(tuple(only))]


def waiting(all_stages: Iterable[Stage], results: Results, size: str, device: str) -> list[Stage]:
    """Those without a row or with a stale one, then those that an earlier call was cut off in."""
    known = [(stage, results.of(stage, size, device)) for stage in all_stages]
    cut_off = [stage for stage, row in known if row and row.status == CUT_OFF]
    return [stage for stage, row in known if row is None or (row.stale and row.status != CUT_OFF)] + cut_off


def run_stage(stage: Stage, size: str, device: str, *, folder: Path, place: dict) -> Row:
    """One stage in a process of its own, which is ended with everything that it started when its time is over."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        result, log = Path(temporary, "result.json"), Path(temporary, "log")
        command = [*CHILD, stage.name, "--device", device, "--size", size, "--seconds", str(stage.limit)]
        command += ["--folder", str(folder), "--result", str(result)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(stage.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        found = json.loads(result.read_text()) if result.exists() else {}
        said = log.read_text(errors="replace")
        folder.joinpath("logs").mkdir(parents=True, exist_ok=True)
        shutil.copy(log, folder / "logs" / f"{stage.name}-{size}-{place['device'].replace(' ', '-')}.txt")
    if code is None:
        status, words = TIMED_OUT, f"ended at its limit of {stage.limit:.0f} s"
    elif "status" in found:
        status, words = found["status"], found["words"]
    else:
        status, words = FAILED, f"its process ended with {code}: {said.strip()[-300:]}"
    if status == FAILED:
        print(said.strip()[-SHOWN:])
    return Row(
        stage.name, size, place["device"], status, words, round(time.monotonic() - started, 1),
        found.get("figures", {}), found.get("tables", {}), place["versions"],
    )  # fmt: skip


def end(process: subprocess.Popen) -> None:
    """End a stage's process group; it may be over already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    all_stages: Sequence[Stage],
    results: Results,
    *,
    size: str,
    device: str,
    place: dict,
    seconds: float = float("inf"),
) -> list[Row]:
    """Run what is waiting, and begin nothing that may end after ``seconds``; the first one is always begun. -> the new rows."""
    begun, made = time.monotonic(), []
    for stage in waiting(all_stages, results, size, place["device"]):
        left = seconds - (time.monotonic() - begun)
        if made and left < stage.limit:
            print(f"{left:.0f} s are left, {stage.name} may take {stage.limit:.0f} s: call again to go on with it")
            break
        print(f"{stage.name}: {stage.what} (at most {stage.limit:.0f} s)", flush=True)
        before = results.of(stage, size, place["device"]) or Row(stage.name, size, place["device"], CUT_OFF)
        results.put(dataclasses.replace(before, status=CUT_OFF, words="the call ended before the stage did"))
        made.append(run_stage(stage, size, device, folder=results.folders[0], place=place))
        results.put(made[-1])
        print(f"  {made[-1].status}, {made[-1].seconds:.0f} s {made[-1].words[:200]}", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--size", choices=SIZES, default="sd15", help="tiny: random or demo models; sd15: the real sizes"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for rows.json, rows.md and the stages' logs")
    parser.add_argument("--copy-to", type=Path, action="append", default=[], help="a folder that gets the rows too")
    parser.add_argument("--only", nargs="+", default=[], help="stages whose names begin so")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no stage that may end after these")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    args = parser.parse_args()
    try:
        wanted = chosen(stages(args.size), args.only)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    begun, place = time.monotonic(), where(args.device)
    try:
        results = Results(args.folder, args.copy_to)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.list:
        for stage in wanted:
            row = results.of(stage, args.size, place["device"])
            print(f"{stage.name:24} {stage.limit:4.0f} s  {row.status if row else 'not run':18} {stage.what}")
        return
    seconds = 60 * args.minutes - (time.monotonic() - begun)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the stage would go on alone
    try:
        if args.again:
            for row in filter(None, [results.of(stage, args.size, place["device"]) for stage in wanted]):
                results.put(dataclasses.replace(row, stale=True))
        made = run(wanted, results, size=args.size, device=args.device, place=place, seconds=seconds)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the rows of finished stages are kept, call again to go on") from None
    print(f"\n{as_markdown(made)}")
    left = waiting(wanted, results, args.size, place["device"])
    print(f"{len(left)} stages are left: {', '.join(stage.name for stage in left)}" if left else "nothing is left")
    if any(row.status == FAILED for row in made):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
