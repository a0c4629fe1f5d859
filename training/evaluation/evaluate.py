"""A student against its teachers (arXiv:2504.12364, Sec. 4.1), from models to figures.

The student in every style and every teacher paint the same prompts from the same noise; the teachers paint them once more from other
noise, which gives the floor: as near as anything comes to a teacher at this number of pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.style_value import NO_STYLE
from ..data.buckets import size_multiple
from ..files.hashing import tensor_sha256
from ..progress import ProgressCallback
from ..teachers.teacher import Teacher
from .agreement import (
    EpsAgreement,
    PairTable,
    PerStyle,
    eps_agreement,
    eps_errors,
    eps_per_style,
    noised,
    own_pairs,
    pair_table,
    predictions,
)
from .baselines import Contender
from .distances import principal_axes, resample
from .features import FeatureNet, PixelDecoder
from .identify import Confusion, Verdict, confusion, identify
from .matrix import MANY_FEATURES, Distances, Sets, Yardstick
from .model_ref import ModelRef, check_compatible, check_lineup
from .model_runner import ModelRunner
from .settings import OF_FEATURES, EvaluationSettings
from .work_counter import FEATURE_COST, WorkCounter, painting_cost


@dataclass
class Lineup:
    """The models of an evaluation.

    styles: names of the student's styles, in the order of its codebook. teachers: each is named like the style it was learnt as. prompts:
    of all models' text states, ``prompts[0]`` the empty one. base: what the student was trained from, as a baseline. decoder, features:
    for FID and KID only. others: further models that are compared with the teachers, see ``baselines``.
    """

    student: ModelRef
    styles: Sequence[str]
    teachers: Sequence[ModelRef]
    prompts: Sequence[str]
    base: ModelRef | None = None
    decoder: PixelDecoder | None = None
    features: FeatureNet | None = None
    others: Sequence[Contender] = ()

    @property
    def compared(self) -> list[Contender]:
        """The base, where there is one, and ``others``."""
        base = [Contender("base", ((self.base, None),), {"method": "base"})] if self.base else []
        return [*base, *self.others]

    def check(self) -> None:
        """Raises ValueError for a teacher that has no style of the student, for a teacher named twice or none at all, for models of
        different architectures or noise schedules, for no prompts, and for a feature network without a decoder."""
        names = [teacher.name for teacher in self.teachers]
        unknown = [name for name in names if name not in self.styles]
        if unknown or not names:
            raise ValueError(
                f"no style of the student is called {', '.join(map(repr, unknown)) or '(no teacher was named)'}: its styles are "
                f"{', '.join(self.styles) or 'none at all (a plain checkpoint)'}"
            )
        check_lineup(self.teachers, self.prompts)
        rows = ["student", *(one.name for one in self.compared)]
        if len(set(rows)) < len(rows):
            raise ValueError(f"two models to compare have one name: {', '.join(rows)}")
        check_compatible(self.student, [*self.teachers, *(m for one in self.compared for m, _ in one.painters)])
        if self.features is not None and self.decoder is None:
            raise ValueError("features need a VAE that turns latents into pictures")

    @property
    def feature_inputs(self) -> tuple[FeatureNet, PixelDecoder]:
        """The feature network and what makes its pictures; only where a metric needs features, which the checks have made sure of."""
        assert self.features is not None and self.decoder is not None
        return self.features, self.decoder


@dataclass
class ContenderFigures:
    """The figures of a contender; None where a metric was not asked for.

    about: how it was made. eps_share: its eps error over the base's; None without a base.
    """

    name: str
    about: dict = field(default_factory=dict)
    fid: Distances | None = None
    kid: Distances | None = None
    pair: PerStyle | None = None
    eps: PerStyle | None = None
    eps_share: PerStyle | None = None


@dataclass
class Evaluation:
    """All figures of an evaluation; None where a metric was not asked for. The field names are the keys of evaluation.json.

    names: of the teachers. prompts: their number. members: name -> hash of every model. features: of the feature network its name, sha256
    and sizes. pair, eps, own: PAIR, eps agreement, and the student as its own classifier. compared: the contenders.
    """

    names: list[str]
    settings: EvaluationSettings
    prompts: int
    members: dict[str, str]
    features: dict | None
    fid: Distances | None = None
    kid: Distances | None = None
    pair: PairTable | None = None
    eps: EpsAgreement | None = None
    own: Confusion | None = None
    compared: list[ContenderFigures] = field(default_factory=list)
    about: dict = field(default_factory=dict)
    """Whatever the caller wants to be recorded: file names, versions."""


@torch.no_grad()
def evaluate(
    lineup: Lineup,
    settings: EvaluationSettings,
    *,
    folder: Path | None = None,
    device: torch.device | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """The metrics of ``settings.metrics`` for the student and all contenders. One UNet is on the device at a time.

    folder: where finished parts are kept, so that the same call goes on after an interruption; None for nowhere. device: None for the CPU.
    Raises ValueError before anything is painted for invalid settings (also for fewer pictures than FID needs) and for models that do not
    belong together.
    """
    lineup.check()
    settings.check(size_multiple(lineup.student.config), lineup.features)
    return _Run(lineup, settings, folder=folder, device=device or torch.device("cpu"), progress=progress).all()


@dataclass
class _Painted:
    """What a contender painted: latents (n, C, h, w) and features (n, d), one tensor for each style or a single one for all."""

    contender: Contender
    latents: list[Tensor]
    features: list[Tensor] | None = None


class _Run:
    """One call of ``evaluate``, whose arguments these are."""

    def __init__(
        self,
        lineup: Lineup,
        settings: EvaluationSettings,
        *,
        folder: Path | None,
        device: torch.device,
        progress: ProgressCallback | None,
    ):
        self.lineup, self.s = lineup, settings
        self.names = [teacher.name for teacher in lineup.teachers]
        self.index = [list(lineup.styles).index(name) for name in self.names]
        self.wants = set(settings.metrics)
        self.resamples = settings.resamples
        if self.resamples < 0:
            size = settings.project or (lineup.features.size if lineup.features else 0)
            self.resamples = 200 if size <= MANY_FEATURES else 20
        self.work = WorkCounter(self._work(), progress)
        self.runner = ModelRunner(lineup.prompts, settings, folder=folder, device=device, work=self.work)
        if lineup.features is not None:
            lineup.features.to(device)
        self.known: dict[tuple[str, int | None], Tensor] = {}  # latents of (key of a model, style)
        self.yardsticks: dict[str, Yardstick] = {}
        self.axes: Tensor | None = None

    def _work(self) -> int:
        """All work of this evaluation, in forwards of a UNet, for the progress bar."""
        s, n, others = self.s, len(self.names), self.lineup.compared
        batches = 3 * n + sum(len(one.painters) or 1 for one in others)
        total = batches * s.count * (painting_cost(s) + FEATURE_COST * bool(self.wants & set(OF_FEATURES)))
        if "eps" in self.wants:
            total += (2 + len(others)) * n * s.bins * s.bin_samples
        total += sum(one.tuning.work(s) for one in others if one.tuning)
        if "own" in self.wants:
            total += n * min(s.own_pictures, s.count) * s.own_draws * (len(self.lineup.styles) + 1)
        return total + 1  # the figures, at the end

    def all(self) -> Evaluation:
        """Teachers, student, base and the other contenders, in this order: a later one needs what the earlier ones painted."""
        lineup = self.lineup
        second = self._ask_teachers()
        painted, answers, own = self._ask_student()
        others = lineup.compared
        base, of_base = self._paint_contender(others.pop(0)) if lineup.base else (None, None)

        result = Evaluation(self.names, self.s, len(lineup.prompts) - 1, {}, self._about_features(), own=own)
        self.weights = resample(self.s.count, self.resamples, self.s.seed)
        if "pair" in self.wants:
            latents = None if base is None else base.latents[0]
            result.pair = pair_table(self.names, painted, self.first, second=second, base=latents, weights=self.weights)
        if "eps" in self.wants:
            result.eps = eps_agreement(self.names, self.s, eps_errors(answers, self.said), of_base)
        if self.wants & set(OF_FEATURES):
            sets = self._sets(painted, self.first, second)
            features = None
            if base is not None:
                base.features = self._features(base)
                features = base.features[0]
            for metric in OF_FEATURES:
                if metric in self.wants:
                    self.yardsticks[metric] = Yardstick(metric.upper(), sets, self.resamples, self.s.seed)
                    setattr(result, metric, self.yardsticks[metric].measure(sets.student, features))
        if base is not None:
            result.compared.append(self._measured(base, of_base, of_base))
        members = self._keys()
        for one in others:
            theirs, errors = self._paint_contender(one)
            result.compared.append(self._measured(theirs, errors, of_base))
            members[theirs.contender.name] = theirs.contender.key
        result.members = members
        self.work(1, "finished")
        return result

    def _ask_teachers(self) -> list[Tensor]:
        """The teachers paint both batches and predict eps. Returns the second batch, a tensor (n, C, h, w) for each teacher."""
        runner, second = self.runner, []
        self.first, self.asked, self.said = [], [], []
        for ref in self.lineup.teachers:
            with runner.loaded(ref) as load:
                self.first.append(runner.paint(ref, load))
                second.append(runner.paint(ref, load, second=True))
                if "eps" in self.wants:
                    self.asked.append(noised(runner, self.first[-1], ref.zero_snr))
                    self.said.append(predictions(runner, ref, load, self.asked[-1]))
            self.known[ref.key, None] = self.first[-1]
        return second

    def _ask_student(self) -> tuple[list[Tensor], list[Tensor], Confusion | None]:
        """The student's latents (n, C, h, w) and eps (S, C, h, w) for each style, and what it takes the teachers' pictures for (None
        where that was not asked for)."""
        runner, student = self.runner, self.lineup.student
        painted, answers = [], []
        with runner.loaded(student) as load:
            for place, (i, name) in enumerate(zip(self.index, self.names)):
                painted.append(runner.paint(student, load, i, name=f"{name}, student"))
                self.known[student.key, i] = painted[-1]
                if "eps" in self.wants:
                    answers.append(predictions(runner, student, load, self.asked[place], style=i))
            own = self._own(load, self.first) if "own" in self.wants else None
        return painted, answers, own

    def _keys(self) -> dict[str, str]:
        lineup = self.lineup
        everyone = {"student": lineup.student, **{f"teacher {m.name}": m for m in lineup.teachers}}
        return {name: m.key for name, m in {**everyone, **({"base": lineup.base} if lineup.base else {})}.items()}

    # --- whoever else is compared -------------------------------------------------------------------------------------

    def _paint_contender(self, one: Contender) -> tuple[_Painted, Tensor | None]:
        """What a contender painted, and its eps errors (N, S), None where they were not asked for."""
        runner, finish = self.runner, one.finish
        try:
            if one.tuning:
                one = one.tuning.settle(runner, one.name)
            latents, answers = [], []
            for _, group in itertools.groupby(range(len(one.painters)), key=lambda k: id(one.painters[k][0])):
                places = list(group)
                ref = one.painters[places[0]][0]
                with runner.loaded(ref) as load:
                    for k in places:
                        latents.append(self._painted(one, k, load))
                        asked = self.asked if len(one.painters) == 1 else self.asked[k : k + 1]  # none without eps
                        answers += [predictions(runner, ref, load, a, style=one.painters[k][1]) for a in asked]
        finally:
            finish()
        return _Painted(one, latents), eps_errors(answers, self.said) if answers else None

    def _painted(self, one: Contender, place: int, load: Callable[[], Teacher]) -> Tensor:
        """Latents (n, C, h, w) by one of its painters; those of the student and of teachers are there already."""
        ref, style = one.painters[place]
        known = self.known.get((ref.key, style))
        if known is None:
            name = one.name if len(one.painters) == 1 else f"{self.names[place]}, {one.name}"
            return self.runner.paint(ref, load, style, name=name)
        self.work(painting_cost(self.s) * self.s.count, f"'{one.name}' has painted")
        return known

    def _features(self, painted: _Painted) -> list[Tensor]:
        names = self.names if len(painted.latents) > 1 else [""]
        looks = [f"{name}, {painted.contender.name}".removeprefix(", ") for name in names]
        network, decoder = self.lineup.feature_inputs
        found = [self.runner.features(z, network, decoder, look) for z, look in zip(painted.latents, looks)]
        return found if self.axes is None else [x.double() @ self.axes for x in found]

    def _measured(self, painted: _Painted, errors: Tensor | None, of_base: Tensor | None) -> ContenderFigures:
        row = ContenderFigures(painted.contender.name, painted.contender.about)
        if self.yardsticks:
            features = self._features(painted) if painted.features is None else painted.features
            for metric, yardstick in self.yardsticks.items():
                setattr(row, metric, yardstick.measure(features))
        if "pair" in self.wants:
            n = len(self.names)
            latents = painted.latents * n if len(painted.latents) == 1 else painted.latents
            row.pair = own_pairs(self.names, latents, self.first, self.weights)
        if errors is not None:
            row.eps, row.eps_share = eps_per_style(self.names, self.s.bins, errors, of_base)
        return row

    def _about_features(self) -> dict | None:
        network = self.lineup.features
        if network is None or not self.wants & set(OF_FEATURES):
            return None
        return {"network": network.name, "sha256": network.key, "size": network.size, "project": self.s.project}

    # --- parts of it --------------------------------------------------------------------------------------------------

    def _own(self, load: Callable[[], Teacher], latents: list[Tensor]) -> Confusion:
        """What the student takes the teachers' pictures for. latents: by teacher."""
        s, runner, lineup = self.s, self.runner, self.lineup
        verdicts = []
        for name, pictures in zip(self.names, latents):
            mine = pictures[: s.own_pictures]
            rows = runner.rows(range(len(mine)))
            prompts = [lineup.prompts[row] for row in rows.tolist()]
            identity = ("own", lineup.student.key, tensor_sha256(mine), prompts, s.own_draws, s.seed, str(runner.dtype))
            what = f"whose are the pictures by '{name}'?"

            def build(mine: Tensor = mine, rows: Tensor = rows, what: str = what) -> dict[str, Tensor]:
                found = identify(
                    load(),
                    lineup.styles,
                    mine,
                    rows,
                    draws=s.own_draws,
                    seed=s.seed,
                    on_batch=lambda _: self.work(0, what),
                )
                return {"errors": torch.stack([v.errors for v in found])}

            errors = runner.part(identity, len(mine), build)["errors"]
            candidates = [*lineup.styles, NO_STYLE]
            verdicts.append([Verdict(candidates, one) for one in errors])
            self.work(len(mine) * s.own_draws * len(candidates), what)
        return confusion(self.names, verdicts)

    def _sets(self, student: list[Tensor], teacher: list[Tensor], second: list[Tensor]) -> Sets:
        """Features of these latents, by style."""
        runner, (network, decoder) = self.runner, self.lineup.feature_inputs

        def look(latents: list[Tensor], who: str) -> list[Tensor]:
            return [runner.features(z, network, decoder, f"{name}, {who}") for name, z in zip(self.names, latents)]

        groups = [look(student, "student"), look(teacher, "teacher"), look(second, "teacher again")]
        if self.s.project:
            # The axes are the teachers', so that every student is compared in the same space.
            self.axes = principal_axes(torch.cat([*groups[1], *groups[2]]), self.s.project)
            groups = [[x.double() @ self.axes for x in group] for group in groups]
        of_student, of_teacher, of_second = groups
        return Sets(self.names, of_student, of_teacher, of_second, on_item=lambda: self.work(0, "comparing"))
