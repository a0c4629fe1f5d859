"""An evaluation as files: all figures as JSON, tables as Markdown, heatmaps as PNG."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ...dmm_core.files import atomic_write
from ..markdown import cell, table
from ..paint.heatmap import heatmap, side_by_side
from .agreement import PerStyle
from .evaluate import ContenderFigures, Evaluation
from .matrix import Distances, Figure

FORMAT = 1
T = TypeVar("T")


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """evaluation.json, evaluation.md and a PNG for each table, in a folder that exists; returns the files."""
    pictures = heatmaps(evaluation)
    contents = {
        "evaluation.json": json.dumps(as_json(evaluation), indent=1, ensure_ascii=False) + "\n",
        "evaluation.md": markdown(evaluation, list(pictures)) + "\n",
    }
    written = []
    for name, text in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(folder / name)
    for name, picture in pictures.items():
        with atomic_write(folder / name) as temporary:
            picture.save(temporary, "PNG")
        written.append(folder / name)
    return written


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(result: object) -> dict[str, Any]:
    """A dataclass of figures, as an ``Evaluation`` is, for JSON: every figure with its 95% interval, NaN and infinity as null."""
    return {"format": FORMAT, **_plain(result)}


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return {"value": _plain(value.value), "spread": _plain(value.spread), "interval": _plain(value.interval)}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {**fields, "worst": value.names[value.worst]} if isinstance(value, (Distances, PerStyle)) else fields
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(evaluation: Evaluation, pictures: Sequence[str] = ()) -> str:
    """The whole report. pictures: names of the heatmaps' files, shown at the end."""
    e, s = evaluation, evaluation.settings
    parts = [f"# {e.about.get('title', 'Evaluation')}", conditions(e), summary(e), per_style(e)]
    if e.compared:
        parts.append("\n\n".join([f"## Beside other models\n\n{compared(e)}", *notes(e)]))
    for distances in filter(None, (e.fid, e.kid)):
        parts.append(matrices(distances))
    if e.pair:
        rows = [[name, *(f"{v:.3f}" for v in row)] for name, row in zip(e.names, e.pair.table)]
        parts.append(f"## PAIR: student's style (row) beside each teacher\n\n{table(['', *e.names], rows)}")
    if e.eps:
        heads = ["t", *e.names]
        rows = [[f"{t}..", *(f"{v:.5f}" for v in row)] for t, row in zip(e.eps.starts, e.eps.errors)]
        parts.append(
            f"## eps error of the student over timesteps ({s.bin_samples} samples a cell)\n\n{table(heads, rows)}"
        )
    if e.own:
        heads = ["by", *e.own.candidates]
        counts = [[name, *row] for name, row in zip(e.names, e.own.counts)]
        parts.append(f"## What the student takes each teacher's pictures for\n\n{table(heads, counts)}")
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(parts)


def conditions(e: Evaluation) -> str:
    s = e.settings
    text = (
        f"{s.count} pictures a style and batch of {e.prompts} prompts, {s.width}x{s.height}, {s.steps} steps, cfg {s.cfg:g}, "
        f"{s.sampler} / {s.scheduler}, seeds from {s.seed}."
    )
    if e.features:
        project = f", projected to {e.features['project']}" if e.features["project"] else ""
        text += f" Features: {e.features['network']} ({e.features['size']}{project})."
    for distances in filter(None, (e.fid, e.kid)):
        text += f" ± is 95%, from {distances.resamples} resamples." if distances.resamples else ""
        break
    return text


def summary(e: Evaluation) -> str:
    rows = []
    for d in filter(None, (e.fid, e.kid)):
        digits = digits_of(d)
        worst = f"{e.names[d.worst]}, {d.own_excess[d.worst].text(digits)}"
        leak = d.leak.text(digits) if d.leak else ""
        base = [] if d.base_excess is None else [f"{d.base_excess:.{digits}f}"]
        figures = (f.text(digits) for f in (d.total, d.floor_total, d.excess))
        rows.append([f"{d.metric} (n = {d.count})", *figures, leak, worst, *base])
    heads = ["", "sum over styles", "floor", "EXCESS", "LEAK", "worst style, its excess"]
    if rows and len(rows[0]) > len(heads):
        heads.append("excess of the base")
    lines = [table(heads, rows)] if rows else []
    if e.pair:
        style = e.pair.worst
        of_base = "" if e.pair.base is None else f", of the base {sum(e.pair.base) / len(e.pair.base):.3f}"
        lines.append(
            f"PAIR {e.pair.mean.text(3)} (0 is the teacher; another seed of the teacher "
            f"{sum(e.pair.other_seed) / len(e.pair.other_seed):.3f}{of_base}); worst {cell(e.names[style])}, "
            f"{e.pair.own[style].text(3)}"
        )
    if e.eps:
        share = "" if e.eps.share is None else f", {100 * sum(e.eps.share) / len(e.eps.share):.1f}% of the base's"
        lines.append(f"eps error {sum(e.eps.mean) / len(e.eps.mean):.5f}{share}")
    if e.own:
        lines.append(f"the student recognises its teachers' pictures: {100 * e.own.mean:.0f}%")
    return "\n\n".join(lines)


def per_style(e: Evaluation) -> str:
    heads, columns = ["style"], []
    for d in filter(None, (e.fid, e.kid)):
        digits = digits_of(d)
        heads += [d.metric, "floor", "excess"]
        columns += [[f.text(digits) for f in group] for group in (d.own, d.own_floor, d.own_excess)]
    if e.pair:
        heads.append("PAIR")
        columns.append([f.text(3) for f in e.pair.own])
    if e.eps:
        heads.append("eps error")
        columns.append([f"{v:.5f}" for v in e.eps.mean])
        if e.eps.share:
            heads.append("of the base's")
            columns.append([f"{100 * v:.1f}%" for v in e.eps.share])
    if e.own:
        heads.append("recognised")
        columns.append([f"{100 * v:.0f}%" for v in e.own.own])
    return f"## Per style\n\n{table(heads, list(zip(e.names, *columns)))}"


def everyone(e: Evaluation) -> list[ContenderFigures]:
    """Who is compared, the student first."""
    pair = None if e.pair is None else PerStyle(e.names, e.pair.own, e.pair.mean)
    eps, share = (None, None) if e.eps is None else (e.eps.own, e.eps.own_share)
    return [ContenderFigures("student", {}, e.fid, e.kid, pair, eps, share), *e.compared]


def compared(e: Evaluation) -> str:
    """One table, a row for the student and for each of the others: FID_t, EXCESS and so on over all styles."""
    rows = everyone(e)
    heads: list[str] = [""]
    columns: list[list[str]] = []

    def column(head: str, texts: Iterable[str]) -> None:
        heads.append(head)
        columns.append(list(texts))

    def worst(d: Distances | PerStyle, own: Sequence[Figure], digits: int) -> str:
        return f"{e.names[d.worst]}, {own[d.worst].text(digits)}"

    if e.fid:
        digits, found = digits_of(e.fid), of_all(row.fid for row in rows)
        column("FID_t", (d.total.text(digits) for d in found))
        column("EXCESS", (d.excess.text(digits) for d in found))
        column("LEAK", (d.leak.text(digits) if d.leak else "" for d in found))
        column("worst style", (worst(d, d.own_excess, digits) for d in found))
    if e.kid:
        digits, found = digits_of(e.kid), of_all(row.kid for row in rows)
        column("KID EXCESS", (d.excess.text(digits) for d in found))
    if e.pair:
        pairs = of_all(row.pair for row in rows)
        column("PAIR", (pair.mean.text(3) for pair in pairs))
        column("worst PAIR", (worst(pair, pair.own, 3) for pair in pairs))
    if e.eps:
        column("eps error", (eps.mean.text(4) for eps in of_all(row.eps for row in rows)))
        if e.eps.own_share:
            column("of the base's", (percent(share.mean) for share in of_all(row.eps_share for row in rows)))
    return table(heads, list(zip([row.name for row in rows], *columns, strict=True)))


def of_all(values: Iterable[T | None]) -> list[T]:
    """One metric of everyone in the table: where the student has it, everyone has."""
    return [value for value in values if value is not None]


def percent(figure: Figure) -> str:
    """Nothing where the base's error, which it is a share of, is 0."""
    if not math.isfinite(figure.value):
        return ""
    return Figure(100 * figure.value, None if figure.spread is None else 100 * figure.spread).text(1) + "%"


NOTES = {
    "base": "the untouched base, the same pictures for every style.",
    "untrained": "the base with random style codes, as a distillation begins.",
    "soup": "the mean of the teachers' UNets.",
    "chain": "ModelMergeSimple in a row at ratio 0.5, in the order of the teachers: the last one has half of everything.",
    "teachers": "each teacher alone, for every style.",
}


def notes(e: Evaluation) -> list[str]:
    """How the others were made, a line each."""
    made: dict[str | None, ContenderFigures] = {}
    for row in e.compared:
        made.setdefault(row.about.get("method"), row)
    out = [f"- {method}: {NOTES[method]}" for method in made if method in NOTES]
    if "task-vectors" in made:
        about = made["task-vectors"].about
        tried = ", ".join(f"{one['scale']:.3f}: {one['eps_error']:.4f}" for one in about["tried"])
        out.append(
            f"- task vectors: base + lambda * sum of (teacher - base) (arXiv:2212.04089), lambda = {about['scale']:.3f}, by the eps error "
            f"on pictures that the teachers painted for this alone ({tried})."
        )
    if "low-rank" in made:
        about = made["low-rank"].about
        one, whole = about["adapter_parameters"], about["unet_parameters"]
        out.append(
            f"- low-rank bank, zero training: the mean of the teachers and for each style the nearest adapter of rank {about['rank']}. It "
            f"is a bank of {about['adapters']} adapters, not one model: {about['adapters']} x {one:,} numbers beside the UNet's {whole:,} "
            f"({100 * about['adapters'] * one / whole:.0f}%)."
        )
    if "merge" in made:
        about = made["merge"].about
        out.append(
            f"- merge, zero training: the mean of the teachers with a style bank of rank {about['rank']}, "
            f"{100 * about['bank_share']:.0f}% of the UNet (dmm merge --budget {about['budget']})."
        )
    return ["\n".join(out)] if out else []


def matrices(d: Distances) -> str:
    digits = digits_of(d)

    def rows(values):
        return [[name, *(f"{v:.{digits}f}" for v in row)] for name, row in values]

    student = list(zip(d.names, d.m))
    if d.base:
        student.append(("(base)", d.base))
    return (
        f"## {d.metric}: student's style (row) to each teacher\n\n{table(['', *d.names], rows(student))}\n\n"
        f"## {d.metric}: the floor, teacher (row) to teacher, other seeds\n\n{table(['', *d.names], rows(zip(d.names, d.floor)))}"
    )


def digits_of(d: Distances) -> int:
    """Digits after the point that leave three figures of the smallest floor."""
    smallest = min((abs(f.value) for f in d.own_floor if f.value), default=1.0)
    largest = max((abs(f.value) for f in d.own), default=1.0)
    return min(max(2 - math.floor(math.log10(max(smallest, largest / 100))), 2), 6)


# --- pictures ---------------------------------------------------------------------------------------------------------


def heatmaps(e: Evaluation) -> dict[str, Image.Image]:
    """File name -> picture."""
    out = {}
    for d in filter(None, (e.fid, e.kid)):
        digits, values, rows = digits_of(d), list(d.m), list(e.names)
        if d.base:
            values, rows = [*values, d.base], [*rows, "(base)"]
        name = d.metric.lower()
        out[f"{name}.png"] = heatmap(
            values, rows, e.names, f"{d.metric}: student's style (row) to teacher", note=f"n = {d.count}. EXCESS {d.excess.text(digits)}"
            + (f", LEAK {d.leak.text(digits)}" if d.leak else ""), log=d.metric == "FID", digits=digits,
        )  # fmt: skip
        out[f"{name}-floor.png"] = heatmap(
            d.floor, e.names, e.names, f"{d.metric}: the floor, teacher to teacher", note=f"n = {d.count}, other seeds",
            log=d.metric == "FID", digits=digits,
        )  # fmt: skip
    if e.pair:
        values, rows = list(e.pair.table), list(e.names)
        if e.pair.base:
            values, rows = [*values, e.pair.base], [*rows, "(base)"]
        note = "0: the teacher itself; the same noise for all"
        out["pair.png"] = heatmap(values, rows, e.names, "PAIR: student's style (row) beside teacher", note=note)
    if e.eps:
        rows = [f"t {t}.." for t in e.eps.starts]
        out["eps.png"] = heatmap(e.eps.errors, rows, e.names, "eps error of the student", log=True, digits=4)
    out.update(heatmaps_compared(e))
    if e.own:
        note = "row: who painted; column: what the student takes it for"
        out["own.png"] = heatmap(
            e.own.counts, e.names, e.own.candidates, "The student as its own classifier", note=note, digits=0
        )
    return out


def heatmaps_compared(e: Evaluation) -> dict[str, Image.Image]:
    """Everyone in every style, where there is more to see than the base."""
    if all(row.about.get("method") == "base" for row in e.compared):
        return {}
    out, rows = {}, everyone(e)
    names = [row.name for row in rows]
    if e.pair:
        values = [[f.value for f in pair.own] for pair in of_all(row.pair for row in rows)]
        title, note = "PAIR of everyone in each style", "0: the teacher itself"
        out["pair-compared.png"] = heatmap(values, names, e.names, title, note=note)
    if e.eps:
        values = [[f.value for f in eps.own] for eps in of_all(row.eps for row in rows)]
        title = "eps error of everyone in each style"
        out["eps-compared.png"] = heatmap(values, names, e.names, title, log=True, digits=4)
    return out


def sheet(e: Evaluation) -> Image.Image:
    """All heatmaps as one picture."""
    return side_by_side(list(heatmaps(e).values()))
