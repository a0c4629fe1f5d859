"""How well two styles mix: a blend of style codes (arXiv:2504.12364, Sec. 3.2) compared with merged weights.

A path is a way of mixing. All paths paint the same prompts from the same noise at every ratio w, the share of the second style:

    blend        e = (1 - w) e_i + w e_j                  the student, one forward
    merge        theta = (1 - w) theta_i + w theta_j      the two teachers, as ComfyUI's ModelMergeSimple
    predictions  eps = (1 - w) eps(e_i) + w eps(e_j)      the student, two forwards
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...data.buckets import size_multiple
from ...files.hashing import repr_sha256, tensor_sha256
from ...progress import ProgressCallback
from ...teachers.teacher import Teacher
from ..features import FeatureNet, PixelDecoder
from ..identify import identify
from ..matrix import Figure
from ..model_ref import ModelRef, check_compatible, check_lineup
from ..model_runner import ModelRunner
from ..settings import EvaluationSettings
from ..work_counter import FEATURE_COST, WorkCounter, painting_cost
from .figures import (
    FIGURES,
    Observations,
    PathDifference,
    as_figure,
    curves,
    figures,
    layout_distances,
    mean_of,
    path_difference,
    weights_of,
)
from .judges import answers_of, caption_truth, is_neither, looks_of, wins
from .mixers import blended, both, check_mergeable, merged, with_mixed_predictions

BLEND, MERGE, PREDICTIONS = "blend", "merge", "predictions"
PATHS = {BLEND: "DMM", MERGE: "weight merging", PREDICTIONS: "mixed predictions"}
RATIOS = tuple(k / 8 for k in range(9))
SHOWN = 2
"""Pictures of a pair that strips show."""
RESAMPLES = 200

Pair = tuple[str, str]


@dataclass
class MixingLineup:
    """The models of a judged mixing.

    styles: names of the student's styles, in the order of its codebook. teachers: named like the styles, needed for merging only.
    prompts: of all models' text states, ``prompts[0]`` the empty one. decoder: for the classifier. classifier: the demo classifier, which
    knows looks, shapes and colours; without one the student itself judges the style (``identify``), and nobody the content.
    """

    student: ModelRef
    styles: Sequence[str]
    teachers: Sequence[ModelRef]
    prompts: Sequence[str]
    decoder: PixelDecoder | None = None
    classifier: FeatureNet | None = None

    def check(self, pairs: Sequence[Pair], ratios: Sequence[float], paths: Sequence[str]) -> None:
        """Raises ValueError for unknown styles or paths, invalid ratios, and models that do not belong together."""
        unknown = [name for name in paths if name not in PATHS]
        if unknown or not paths or len(set(paths)) < len(paths):
            raise ValueError(
                f"unknown or repeated paths {', '.join(paths) or '(none)'}: choose from {', '.join(PATHS)}"
            )
        w = list(ratios)
        if len(w) < 3 or any(not a < b for a, b in itertools.pairwise(w)) or (w[0], w[-1]) != (0, 1):
            raise ValueError(
                f"the ratios are {', '.join(f'{r:g}' for r in w) or '(none)'}: expected 3 or more that rise from 0 to 1, both included"
            )
        if not pairs or len({frozenset(pair) for pair in pairs}) < len(pairs):
            raise ValueError(
                f"no pairs of styles, or one twice: {', '.join(':'.join(pair) for pair in pairs) or '(none)'}"
            )
        for pair in pairs:
            missing = [name for name in pair if name not in self.styles]
            if missing or pair[0] == pair[1]:
                raise ValueError(
                    f"'{':'.join(pair)}' is no pair of two styles of the student: they are "
                    f"{', '.join(self.styles) or 'none at all (a plain checkpoint)'}"
                )
        check_lineup(self.teachers, self.prompts)
        names = [teacher.name for teacher in self.teachers]
        lacking = sorted({name for pair in pairs for name in pair} - set(names))
        if MERGE in paths and lacking:
            raise ValueError(
                f"weight merging needs the teachers of {', '.join(lacking)}: name their files, or leave '{MERGE}' out of the paths"
            )
        if MERGE in paths:
            check_compatible(self.student, self.teachers)
            for pair in pairs:
                check_mergeable(*(self.teachers[names.index(name)] for name in pair))
        if self.classifier is not None:
            if self.decoder is None:
                raise ValueError("the classifier needs a VAE that turns latents into pictures")
            looks = looks_of(self.classifier)
            strange = sorted({name for pair in pairs for name in pair} - set(looks))
            if strange:
                raise ValueError(
                    f"the classifier does not know {', '.join(strange)}: it knows {', '.join(looks) or 'no looks at all'}; without it "
                    "the student judges"
                )


@dataclass
class PathResult:
    """Of one pair on one path. curves: name -> a figure for each ratio; figures: those of ``figures.FIGURES``, by name."""

    curves: dict[str, list[Figure]]
    figures: dict[str, Figure]


@dataclass
class PairResult:
    """Of one pair of styles. paths: by name. against: path -> figure -> the first path compared with it, for all paths but the first."""

    first: str
    second: str
    paths: dict[str, PathResult]
    against: dict[str, dict[str, PathDifference]]


@dataclass
class Mixing:
    """All figures of a judged mixing. The field names are the keys of mixing.json, but for ``shown``.

    prompts: their number. captioned: pictures whose caption names a shape or a colour. members: name -> hash of every model. judge: who
    judged. mean: path -> figure -> its mean over the pairs; where a figure aims at a number, of the distance from it. against: path ->
    figure -> the first path compared with it, over all pairs. shown: latents (k, R, C, h, w) of the first pictures, by pair and path.
    """

    settings: EvaluationSettings
    ratios: list[float]
    paths: list[str]
    prompts: int
    captioned: int
    members: dict[str, str]
    judge: dict
    pairs: list[PairResult]
    mean: dict[str, dict[str, Figure]]
    against: dict[str, dict[str, PathDifference]]
    about: dict = field(default_factory=dict)
    shown: dict[Pair, dict[str, Tensor]] = field(default_factory=dict, repr=False)


@torch.no_grad()
def judge_mixing(
    lineup: MixingLineup,
    settings: EvaluationSettings,
    pairs: Sequence[Pair],
    ratios: Sequence[float] = RATIOS,
    *,
    paths: Sequence[str] = (BLEND, MERGE),
    folder: Path | None = None,
    device: torch.device | None = None,
    progress: ProgressCallback | None = None,
) -> Mixing:
    """Paint every pair of styles on every path, and judge what was painted.

    settings: those of painting, ``own_draws`` and ``resamples`` are read. ratios: shares of the second style, rising from 0 to 1. paths:
    the first is compared with the others. folder: where finished parts are kept, so that the same call goes on after an interruption; None
    for nowhere. device: None for the CPU. Raises ValueError before anything is painted for invalid arguments. Up to two teachers and their
    merge are in memory at a time.
    """
    lineup.check(pairs, ratios, paths)
    settings = dataclasses.replace(settings, metrics=("own",))
    settings.check(size_multiple(lineup.student.config), None)
    return _Run(
        lineup,
        settings,
        pairs,
        ratios=ratios,
        paths=paths,
        folder=folder,
        device=device or torch.device("cpu"),
        progress=progress,
    ).all()


class _Run:
    """One call of ``judge_mixing``, whose arguments these are."""

    def __init__(
        self,
        lineup: MixingLineup,
        settings: EvaluationSettings,
        pairs: Sequence[Pair],
        *,
        ratios: Sequence[float],
        paths: Sequence[str],
        folder: Path | None,
        device: torch.device,
        progress: ProgressCallback | None,
    ):
        self.lineup, self.s, self.paths = lineup, settings, list(paths)
        self.pairs, self.ratios = [(first, second) for first, second in pairs], [float(w) for w in ratios]
        self.teachers = {ref.name: ref for ref in lineup.teachers}
        self.work = WorkCounter(self._work(), progress)
        self.runner = ModelRunner(lineup.prompts, settings, folder=folder, device=device, work=self.work)
        self.rows = self.runner.rows(range(settings.count))
        self.truth: list[
            list[tuple[str, int]] | None
        ] = []  # of each picture, see ``caption_truth``; empty without a classifier
        if lineup.classifier is not None:
            lineup.classifier.to(device)
            self.truth = [caption_truth(lineup.prompts[row], lineup.classifier) for row in self.rows.tolist()]

    def _sets(self) -> dict[str, int]:
        """How many different sets of pictures each path has: the pure styles at the ends are painted once for all pairs."""
        inner = len(self.pairs) * (len(self.ratios) - 2)
        ends = len({name for pair in self.pairs for name in pair})
        student = [path for path in self.paths if path != MERGE]
        return {path: inner + (ends if path == MERGE or path == student[0] else 0) for path in self.paths}

    def _work(self) -> int:
        """All work of this call, in forwards of a UNet, for the progress bar."""
        s, sets = self.s, self._sets()
        look = FEATURE_COST if self.lineup.classifier is not None else s.own_draws * (len(self.lineup.styles) + 1)
        # Every pair's ends are looked at, though mostly in the folder's or the memory's copy.
        looks = len(self.pairs) * len(self.ratios) * len(self.paths)
        painted = sum(n * (2 if path == PREDICTIONS else 1) for path, n in sets.items())
        return s.count * (painted * painting_cost(s) + looks * look) + 1

    def all(self) -> Mixing:
        painted: dict[str, list[Tensor]] = {path: [] for path in self.paths}
        with self.runner.loaded(self.lineup.student) as load:
            ends = functools.cache(lambda name: self._style(load, name))
            for path in self.paths:
                if path != MERGE:
                    painted[path] = [
                        self._between(pair, ends, self._student_at(path, pair, load)) for pair in self.pairs
                    ]
        if MERGE in self.paths:
            ends = functools.cache(self._teacher)
            for pair in self.pairs:
                with both(*(self.teachers[name] for name in pair)) as loads:
                    painted[MERGE].append(self._between(pair, ends, self._merged_at(pair, loads)))
        if self.lineup.classifier is not None:
            observed = self._by_classifier(painted, self.lineup.classifier)
        else:
            with self.runner.loaded(self.lineup.student) as load:
                observed = self._by_student(painted, load)
        result = self._result(observed)
        result.shown = {
            pair: {path: painted[path][k][:SHOWN] for path in self.paths} for k, pair in enumerate(self.pairs)
        }
        self.work(1, "finished")
        return result

    # --- painting -----------------------------------------------------------------------------------------------------

    def _between(self, pair: Pair, end: Callable, at: Callable) -> Tensor:
        """Latents (n, R, C, h, w) of one path. end: name -> latents of a pure style; at: ratio -> latents of a mix."""
        inner = [at(w) for w in self.ratios[1:-1]]
        return torch.stack([end(pair[0]), *inner, end(pair[1])], 1)

    def _style(self, load: Callable[[], Teacher], name: str) -> Tensor:
        index = list(self.lineup.styles).index(name)
        return self.runner.paint(self.lineup.student, load, index, name=f"{name}, student")

    def _teacher(self, name: str) -> Tensor:
        with self.runner.loaded(self.teachers[name]) as load:
            return self.runner.paint(self.teachers[name], load)

    def _student_at(self, path: str, pair: Pair, load: Callable[[], Teacher]) -> Callable[[float], Tensor]:
        student = self.lineup.student

        def at(w: float) -> Tensor:
            shares = self._shares(pair, w)
            key = repr_sha256(path, student.key, sorted(shares.items()))
            name = f"{':'.join(pair)} {w:g}, {PATHS[path]}"
            make = blended if path == BLEND else with_mixed_predictions
            one = dataclasses.replace(student, name=name, key=key)
            latents = self.runner.paint(one, lambda: make(load(), shares))
            if path == PREDICTIONS:
                self.work(self.s.count * painting_cost(self.s), f"'{name}' paints")
            return latents

        return at

    def _shares(self, pair: Pair, w: float) -> dict[int, float]:
        """Style -> its share, for a ratio between 0 and 1."""
        first, second = (list(self.lineup.styles).index(name) for name in pair)
        return {first: 1 - w, second: w}

    def _merged_at(self, pair: Pair, loads: Sequence[Callable[[], Teacher]]) -> Callable[[float], Tensor]:
        first, second = (self.teachers[name] for name in pair)
        load_first, load_second = loads

        def at(w: float) -> Tensor:
            def open_it() -> Teacher:
                return merged(load_first(), load_second(), w, len(self.lineup.prompts), dtype=self.runner.dtype)

            key = repr_sha256(MERGE, sorted([(first.key, 1 - w), (second.key, w)]))
            one = ModelRef(f"{':'.join(pair)} {w:g}, {PATHS[MERGE]}", key, open_it, first.config, first.zero_snr)
            with self.runner.loaded(one) as load:
                return self.runner.paint(one, load)

        return at

    # --- judging ------------------------------------------------------------------------------------------------------

    def _by_classifier(self, painted: dict[str, list[Tensor]], classifier: FeatureNet) -> dict[str, list[Observations]]:
        looks, decoder = looks_of(classifier), self.lineup.decoder
        assert decoder is not None, "MixingLineup.check asks for one"

        def observe(pair: Pair, path: str, latents: Tensor) -> Observations:
            first, second = (looks.index(name) for name in pair)
            score: list[Tensor] = []
            away: list[Tensor] = []
            neither: list[Tensor] = []
            content: list[Tensor] = []
            for w, one in zip(self.ratios, latents.unbind(1)):
                name = f"{':'.join(pair)} {w:g}, {PATHS[path]}"
                answers = answers_of(classifier, self.runner.features(one, classifier, decoder, name))
                look = answers["look"].softmax(1)
                score.append(look[:, second])
                away.append(1 - look[:, first])
                neither.append(is_neither(look.argmax(1), first, second))
                content.append(self._content(answers))
            known = any(truth is not None for truth in self.truth)
            to_first, to_second = layout_distances(latents.float())
            return Observations(
                score=torch.stack(score, 1),
                neither=torch.stack(neither, 1),
                to_first=to_first,
                to_second=to_second,
                away=torch.stack(away, 1),
                content=torch.stack(content, 1) if known else None,
            )

        return self._each(painted, observe)

    def _content(self, answers: Mapping[str, Tensor]) -> Tensor:
        """(n,) 1 where a picture has the shape and colour of its caption, else 0; NaN where the caption names none."""
        right = []
        for k, truth in enumerate(self.truth):
            said = truth is not None and all(answers[question][k].argmax() == answer for question, answer in truth)
            right.append(math.nan if truth is None else float(said))
        return torch.tensor(right)

    def _by_student(
        self, painted: dict[str, list[Tensor]], load: Callable[[], Teacher]
    ) -> dict[str, list[Observations]]:
        def observe(pair: Pair, path: str, latents: Tensor) -> Observations:
            first, second = (list(self.lineup.styles).index(name) for name in pair)
            score, neither = [], []
            for w, one in zip(self.ratios, latents.unbind(1)):
                errors = self._errors(one, load, f"whose are '{':'.join(pair)} {w:g}, {PATHS[path]}'?")
                score.append(wins(errors, first, second))
                neither.append(is_neither(errors.mean(1).argmin(1), first, second))
            to_first, to_second = layout_distances(latents.float())
            return Observations(torch.stack(score, 1), torch.stack(neither, 1), to_first, to_second)

        return self._each(painted, observe)

    def _errors(self, latents: Tensor, load: Callable[[], Teacher], what: str) -> Tensor:
        """Errors (n, draws, styles + 1) of the student for latents (n, C, h, w), see ``identify``; the last candidate is "none"."""
        s, student, parts = self.s, self.lineup.student, []
        for places in self.runner.batches(len(latents)):
            mine, rows = latents[places], self.rows[places]
            prompts = [self.lineup.prompts[row] for row in rows.tolist()]
            identity = ("own", student.key, tensor_sha256(mine), prompts, s.own_draws, s.seed, str(self.runner.dtype))

            def build(mine: Tensor = mine, rows: Tensor = rows) -> dict[str, Tensor]:
                found = identify(
                    load(),
                    self.lineup.styles,
                    mine,
                    rows,
                    draws=s.own_draws,
                    seed=s.seed,
                    on_batch=lambda _: self.work(0, what),
                )
                return {"errors": torch.stack([verdict.errors for verdict in found])}

            parts.append(self.runner.part(identity, len(places), build)["errors"])
            self.work(len(places) * s.own_draws * (len(self.lineup.styles) + 1), what)
        return torch.cat(parts)

    def _each(self, painted: dict[str, list[Tensor]], observe: Callable) -> dict[str, list[Observations]]:
        return {
            path: [observe(pair, path, latents) for pair, latents in zip(self.pairs, every)]
            for path, every in painted.items()
        }

    # --- figures ------------------------------------------------------------------------------------------------------

    def _result(self, observed: dict[str, list[Observations]]) -> Mixing:
        s, lineup = self.s, self.lineup
        weights = weights_of(self.rows.tolist(), RESAMPLES if s.resamples < 0 else s.resamples, s.seed)
        found = {path: [figures(one, self.ratios, weights) for one in every] for path, every in observed.items()}
        names = list(found[self.paths[0]][0])
        results = []
        for k, pair in enumerate(self.pairs):
            of_paths = {
                path: PathResult(
                    {name: list(map(as_figure, curve.T)) for name, curve in curves(observed[path][k], weights).items()},
                    {name: as_figure(found[path][k][name]) for name in names},
                )
                for path in self.paths
            }
            results.append(PairResult(pair[0], pair[1], of_paths, self._against(found, names, [k])))
        everything = range(len(self.pairs))
        mean = {
            path: {
                name: as_figure(mean_of([FIGURES[name].measure(one[name]) for one in found[path]])) for name in names
            }
            for path in self.paths
        }
        members = {"student": lineup.student.key, **{f"teacher {m.name}": m.key for m in lineup.teachers}}
        return Mixing(
            s, self.ratios, self.paths, len(lineup.prompts) - 1, self._captioned(), members, self._judge(), results, mean,
            self._against(found, names, everything),
        )  # fmt: skip

    def _against(
        self, found: Mapping[str, Sequence[Mapping[str, Tensor]]], names: Sequence[str], places: Sequence[int]
    ) -> dict[str, dict[str, PathDifference]]:
        """The first path compared with each other one. found: path -> for each pair its figures (W,); places: of the pairs that count."""
        head, *others = self.paths
        return {
            path: {
                name: path_difference(
                    FIGURES[name], (head, path), *([found[p][k][name] for k in places] for p in (head, path))
                )
                for name in names
            }
            for path in others
        }

    def _captioned(self) -> int:
        """Pictures whose caption names a shape or a colour that the classifier knows."""
        return sum(truth is not None for truth in self.truth)

    def _judge(self) -> dict:
        network = self.lineup.classifier
        if network is None:
            return {"name": "the student as its own classifier", "draws": self.s.own_draws}
        return {"name": network.name, "sha256": network.key}
