"""A student against its teachers (arXiv:2504.12364, Sec. 4.1), from models to figures.

The student in every style and every teacher paint the same prompts from the same noise; the teachers paint them once more from other
noise, which gives the floor: as near as anything comes to a teacher at this number of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.style_value import NO_STYLE
from ..dataset.buckets import size_multiple
from ..hashing import tensor_sha256
from ..teacher import check_architectures, check_schedules
from .agreement import EpsAgreement, Pairing, eps_agreement, noised, pairing, predictions
from .distances import principal_axes, resample
from .features import FeatureNet
from .identify import Confusion, Verdict, confusion, identify
from .matrix import MANY_FEATURES, Distances, Sets, compare
from .settings import OF_FEATURES, EvaluationSettings
from .studio import FEATURE_COST, Member, Meter, Pictures, Studio, Tick, painting_cost


@dataclass
class Cast:
    """Everyone who takes part. styles: the student's, in the order of its codebook; teachers: each has the name of a style.

    base: what the student was trained from, a baseline. prompts: what all text states are of, ``prompts[0]`` the empty one.
    """

    student: Member
    styles: Sequence[str]
    teachers: Sequence[Member]
    prompts: Sequence[str]
    base: Member | None = None
    pictures: Pictures | None = None
    features: FeatureNet | None = None

    def check(self) -> None:
        """Raises ValueError for teachers without a style, twice, or not at all, for models of different kinds, for no prompts, and for
        features without pictures."""
        names = [teacher.name for teacher in self.teachers]
        unknown = [name for name in names if name not in self.styles]
        if unknown or not names:
            raise ValueError(
                f"no style of the student is called {', '.join(map(repr, unknown)) or '(no teacher was named)'}: its styles are "
                f"{', '.join(self.styles) or 'none at all (a plain checkpoint)'}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"a teacher is named twice: {', '.join(names)}")
        if len(self.prompts) < 2 or self.prompts[0]:
            raise ValueError("no prompts to paint were given")
        everyone = [*self.teachers, *([self.base] if self.base else [])]
        check_architectures(self.student.config, [(member.name, member.config) for member in everyone])
        check_schedules(self.student.zero_snr, [(member.name, member.zero_snr) for member in everyone])
        if self.features is not None and self.pictures is None:
            raise ValueError("features need a VAE that turns latents into pictures")


@dataclass
class Evaluation:
    """All figures; None where a metric was not asked for. members: hash of everyone, by name."""

    names: list[str]
    settings: EvaluationSettings
    prompts: int
    members: dict[str, str]
    features: dict | None
    fid: Distances | None = None
    kid: Distances | None = None
    pair: Pairing | None = None
    eps: EpsAgreement | None = None
    own: Confusion | None = None
    about: dict = field(default_factory=dict)
    """Whatever the caller wants to be recorded: file names, versions."""


@torch.no_grad()
def evaluate(
    cast: Cast,
    settings: EvaluationSettings,
    folder: Path | None = None,
    device: torch.device | None = None,
    progress: Tick | None = None,
) -> Evaluation:
    """Everything that ``settings.metrics`` names. One UNet is on the device at a time.

    folder: where finished parts are kept, so that the same call goes on after an interruption; None for nowhere. progress: see
    ``studio.Tick``. Raises ValueError before anything is painted for settings
    that make no sense, too few pictures for FID among them, and for models that do not belong together.
    """
    cast.check()
    settings.check(size_multiple(cast.student.config), cast.features)
    return _Run(cast, settings, folder, device or torch.device("cpu"), progress).all()


class _Run:
    def __init__(self, cast, settings, folder, device, progress):
        self.cast, self.s = cast, settings
        self.names = [teacher.name for teacher in cast.teachers]
        self.index = [list(cast.styles).index(name) for name in self.names]
        self.wants = set(settings.metrics)
        self.resamples = settings.resamples
        if self.resamples < 0:
            size = settings.project or (cast.features.size if cast.features else 0)
            self.resamples = 200 if size <= MANY_FEATURES else 20
        self.meter = Meter(self._work(), progress)
        self.studio = Studio(cast.prompts, settings, folder, device, self.meter)
        if cast.features is not None:
            cast.features.to(device)

    def _work(self) -> int:
        """Forwards, or what takes as long."""
        s, n, base = self.s, len(self.names), self.cast.base is not None
        total = (3 * n + base) * s.count * painting_cost(s)
        if self.wants & set(OF_FEATURES):
            total += (3 * n + base) * s.count * FEATURE_COST
        if "eps" in self.wants:
            total += (2 + base) * n * s.bins * s.bin_samples
        if "own" in self.wants:
            total += n * min(s.own_pictures, s.count) * s.own_draws * (len(self.cast.styles) + 1)
        return total + 1  # the figures, at the end

    def all(self) -> Evaluation:
        cast, studio = self.cast, self.studio
        first, second, asked, said = [], [], [], []
        for member in cast.teachers:
            with studio.visit(member) as load:
                first.append(studio.paint(member, load))
                second.append(studio.paint(member, load, second=True))
                if "eps" in self.wants:
                    asked.append(noised(studio, first[-1], member.zero_snr))
                    said.append(predictions(studio, member, load, asked[-1]))
        with studio.visit(cast.student) as load:
            painted, answers = [], []
            for i, name in zip(self.index, self.names):
                painted.append(studio.paint(cast.student, load, i, name=f"{name}, student"))
                if "eps" in self.wants:
                    answers.append(predictions(studio, cast.student, load, asked[len(answers)], i))
            own = self._own(load, first) if "own" in self.wants else None
        base, base_answers = None, None
        if cast.base is not None:
            with studio.visit(cast.base) as load:
                base = studio.paint(cast.base, load)
                if "eps" in self.wants:
                    base_answers = [predictions(studio, cast.base, load, one) for one in asked]

        result = Evaluation(self.names, self.s, len(cast.prompts) - 1, self._members(), self._about_features(), own=own)
        if "pair" in self.wants:
            weights = resample(self.s.count, self.resamples, self.s.seed)
            result.pair = pairing(self.names, painted, first, second, base, weights)
        if "eps" in self.wants:
            result.eps = eps_agreement(self.names, self.s, said, answers, base_answers)
        if self.wants & set(OF_FEATURES):
            sets = self._sets(painted, first, second, base)
            for metric in OF_FEATURES:
                if metric in self.wants:
                    setattr(result, metric, compare(metric.upper(), sets, self.resamples, self.s.seed))
        self.meter(1, "finished")
        return result

    def _members(self) -> dict[str, str]:
        cast = self.cast
        everyone = {"student": cast.student, **{f"teacher {m.name}": m for m in cast.teachers}}
        return {name: m.key for name, m in {**everyone, **({"base": cast.base} if cast.base else {})}.items()}

    def _about_features(self) -> dict | None:
        network = self.cast.features
        if network is None or not self.wants & set(OF_FEATURES):
            return None
        return {"network": network.name, "sha256": network.key, "size": network.size, "project": self.s.project}

    # --- parts of it --------------------------------------------------------------------------------------------------

    def _own(self, load, latents: list[Tensor]) -> Confusion:
        s, studio, cast = self.s, self.studio, self.cast
        verdicts = []
        for name, pictures in zip(self.names, latents):
            mine = pictures[: s.own_pictures]
            rows = studio.rows(range(len(mine)))
            prompts = [cast.prompts[row] for row in rows.tolist()]
            identity = ("own", cast.student.key, tensor_sha256(mine), prompts, s.own_draws, s.seed, str(studio.dtype))
            what = f"whose are the pictures by '{name}'?"

            def build(mine=mine, rows=rows, what=what) -> dict[str, Tensor]:
                found = identify(
                    load(), cast.styles, mine, rows, s.own_draws, s.seed, tick=lambda _: self.meter(0, what)
                )
                return {"errors": torch.stack([v.errors for v in found])}

            errors = studio.part(identity, len(mine), build)["errors"]
            candidates = [*cast.styles, NO_STYLE]
            verdicts.append([Verdict(candidates, one) for one in errors])
            self.meter(len(mine) * s.own_draws * len(candidates), what)
        return confusion(self.names, verdicts)

    def _sets(self, student, teacher, second, base) -> Sets:
        network, pictures, studio = self.cast.features, self.cast.pictures, self.studio

        def look(latents: list[Tensor], who: str) -> list[Tensor]:
            return [studio.features(z, network, pictures, f"{name}, {who}") for name, z in zip(self.names, latents)]

        groups = [look(student, "student"), look(teacher, "teacher"), look(second, "teacher again")]
        of_base = None if base is None else studio.features(base, network, pictures, "base")
        if self.s.project:
            # The axes are the teachers', so that every student is compared in the same space.
            axes = principal_axes(torch.cat([*groups[1], *groups[2]]), self.s.project)
            groups = [[x.double() @ axes for x in group] for group in groups]
            of_base = None if of_base is None else of_base.double() @ axes
        return Sets(self.names, *groups, of_base, lambda: self.meter(0, "comparing"))
