"""A merge whose file is saved while its thumbnails are still to be painted: remembered in its folder, in place of the parts, so that the
same command finds it after a cancel instead of merging again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ...dmm_core.bank_size import Size
from ...dmm_core.files import atomic_write
from ..files.model_files import change_stamp
from .report import LayerFigures, MergeReport

MARK = "finished.json"


def remember(folder: Path, inputs: str, output: Path, report: MergeReport) -> None:
    """Remove a merge's parts and note instead that the merge is in ``output``. inputs: a digest of all that determines the file."""
    mark = {"inputs": inputs, "output": _stamp(output), "report": dataclasses.asdict(report)}
    with atomic_write(folder / MARK) as temporary:
        temporary.write_text(json.dumps(mark), encoding="utf-8")
    for part in folder.glob("*.safetensors"):
        part.unlink()


def remembered(folder: Path, inputs: str, output: Path) -> MergeReport | None:
    """The report on the merge of the same inputs that is in ``output``, untouched since; None where there is none."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if (mark["inputs"], mark["output"]) != (inputs, _stamp(output)):
            return None
        report = mark["report"]
        return MergeReport(
            report["names"],
            [LayerFigures(**layer) for layer in report["layers"]],
            Size(**report["size"]),
            report["itemsize"],
            centre=report["centre"],
        )
    except (OSError, ValueError, KeyError, TypeError):  # no mark, no output, or a damaged mark
        return None


def _stamp(output: Path) -> str:
    return repr(change_stamp(output))
