"""Contenders: models that are compared with the teachers as the student is. Other students, and baselines that need no distillation.

Merges are computed when they are needed, from one teacher after the other. A merge uses the student's text encoder, a teacher alone its
own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...dmm_core.bank_size import USUAL, bank_of
from ...dmm_core.unet import UNet, UNetConfig, load_unet
from ..config import TrainConfig
from ..files.hashing import repr_sha256
from ..loop.losses import score_loss
from ..loop.new_student import FILE_ITEMSIZE, new_student
from ..teachers.teacher import Teacher, without_styles
from .agreement import noised, predictions
from .merges import adapter_size, chain_shares, is_full, low_rank, soup_shares, task_vector_shares, weighted_sum
from .model_ref import ModelRef
from .model_runner import ModelRunner
from .settings import EvaluationSettings
from .work_counter import painting_cost

ALL = "all"
BASELINES = ("base", "untrained", "soup", "chain", "task-vectors", "low-rank", "merge", "teachers")
NEED_BASE = ("base", "untrained", "task-vectors", "merge")
MERGES = ("soup", "chain", "task-vectors", "low-rank", "merge")
"""Weighted sums of models, which must all predict the same: eps, or v."""
RANK = 8
"""Default rank of the low-rank bank."""
TUNING_BATCH = 2**30
"""Added to the seeds of the pictures by which a scale is chosen, so that the evaluation's own pictures have no part in the choice."""
TUNING_PICTURES, TUNING_SAMPLES = 8, 4
"""Pictures of each teacher, and samples of each bin of timesteps, by which a scale is chosen."""
TIMES_THE_MEAN = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Scales of task vectors that are tried, in units of 1 / N (where the result is the soup); the scale 1 is tried too."""

Painter = tuple[ModelRef, int | None]
"""A model and the index of its style, None for a plain model."""


@dataclass
class Contender:
    """A model, or several, compared with the teachers as the student is.

    painters: a single one for all styles, or one for each teacher. about: how it was made, for the report. tuning: if given, chooses the
    painters when the contender is to paint. finish: called when it has painted, to free memory.
    """

    name: str
    painters: Sequence[Painter]
    about: dict = field(default_factory=dict)
    tuning: Tuning | None = None
    finish: Callable[[], None] = lambda: None

    @property
    def key(self) -> str:
        """A hash of all its painters."""
        keys = [(ref.key, style) for ref, style in self.painters]
        return keys[0][0] if len(keys) == 1 else repr_sha256("comparison", keys)


def choose_baselines(text: str) -> tuple[str, ...]:
    """The baselines named in a text: "all", or names with commas. Raises ValueError for unknown names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [ALL]:
        return BASELINES
    unknown = [name for name in names if name not in BASELINES]
    if unknown or not names:
        raise ValueError(
            f"unknown baselines {', '.join(map(repr, unknown)) or '(none)'}: choose from {', '.join(BASELINES)}, or {ALL}"
        )
    return tuple(name for name in BASELINES if name in names)


def obstacles(teachers: Sequence[ModelRef], base: ModelRef | None) -> dict[str, str]:
    """Baselines that cannot be made of these models: name -> reason."""
    found = {}
    if base is None:
        found = dict.fromkeys(NEED_BASE, "needs the base model that the student was trained from")
    for name in MERGES:
        parents = [*([base] if base is not None and name in NEED_BASE else []), *teachers]
        predicting = {what: [m.name for m in parents if m.prediction == what] for what in ("eps", "v")}
        if all(predicting.values()) and name not in found:
            said = "; ".join(f"{', '.join(map(repr, names))} predict {what}" for what, names in predicting.items())
            found[name] = f"weights that predict different things do not add up ({said})"
    return found


def make_baselines(
    names: Sequence[str],
    student: ModelRef,
    styles: Sequence[str],
    teachers: Sequence[ModelRef],
    *,
    base: ModelRef | None,
    rank: int = RANK,
    budget: str = USUAL,
) -> list[Contender]:
    """The named baselines; "base" adds nothing, as a ``Lineup`` has the base by itself. styles: names of the student's styles. rank: of
    the low-rank bank. budget: of the merge's style bank.

    Raises ValueError with the reasons for baselines that cannot be made of these models, and for a rank below 1.
    """
    against = {name: why for name, why in obstacles(teachers, base).items() if name in names}
    if against:
        reasons = {why: [name for name in against if against[name] == why] for why in against.values()}
        said = "; ".join(f"{', '.join(those)}: {why}" for why, those in reasons.items())
        rest = ", ".join(name for name in BASELINES if name not in obstacles(teachers, base))
        raise ValueError(f"these baselines cannot be made: {said}. Possible here: {rest}")
    if rank < 1:
        raise ValueError(f"rank is {rank}: expected a whole number from 1")
    out: list[Contender] = []
    for name in names:
        if name == "untrained":
            assert base is not None, "obstacles() refuses it without one"
            out.append(untrained(student, styles, teachers, base))
        elif name == "soup":
            out.append(merge("soup", soup_shares(len(teachers)), teachers, student))
        elif name == "chain":
            out.append(merge("chain", chain_shares(len(teachers)), teachers, student))
        elif name == "task-vectors":
            assert base is not None, "obstacles() refuses it without one"
            out.append(Contender("task vectors", (), {"method": name}, Tuning(student, teachers, base)))
        elif name == "low-rank":
            out.append(low_rank_bank(student, teachers, rank))
        elif name == "merge":
            assert base is not None, "obstacles() refuses it without one"
            out.append(merge_with_bank(student, teachers, base, budget))
        elif name == "teachers":
            out += [Contender(f"teacher {one.name}", ((one, None),), {"method": name}) for one in teachers]
    return out


def another_student(name: str, ref: ModelRef, has: Sequence[str], teachers: Sequence[str]) -> Contender:
    """A further model. A DMM model paints in the style of each teacher, found by its name among ``has``, the model's style names; a plain
    model paints the same for all.

    Raises ValueError for a DMM model without the style of a teacher.
    """
    if not ref.config.num_styles:
        return Contender(name, ((ref, None),), {"method": "also"})
    missing = [style for style in teachers if style not in has]
    if missing:
        raise ValueError(
            f"'{name}' has no style called {', '.join(map(repr, missing))}: its styles are {', '.join(has)}"
        )
    return Contender(name, [(ref, list(has).index(style)) for style in teachers], {"method": "also"})


# --- merges -----------------------------------------------------------------------------------------------------------


def merge(method: str, shares: Sequence[float], parents: Sequence[ModelRef], student: ModelRef) -> Contender:
    """One model for all styles whose weights are sum_i share_i * parent_i."""
    ref = derived(
        method,
        (method, [float(share) for share in shares]),
        parents,
        student=student,
        make=lambda: load_unet(summed(shares, parents), dtype=None, copy=False, heads=student.config.num_heads),
    )
    return Contender(method, ((ref, None),), {"method": method})


def summed(shares: Sequence[float], parents: Sequence[ModelRef]) -> dict[str, Tensor]:
    """sum_i share_i * weights_i of the parents' UNets, float32; the parents are read one after the other."""

    def reader(parent: ModelRef) -> Callable[[], Mapping[str, Tensor]]:
        return lambda: parent.open().unet.state_dict()

    return weighted_sum((share, reader(parent)) for share, parent in zip(shares, parents))


def derived(
    name: str, how: tuple, parents: Sequence[ModelRef], *, student: ModelRef, make: Callable[[], UNet]
) -> ModelRef:
    """A model that ``make`` computes from others; it has the student's text states.

    how: the recipe, with a faithful repr; the model's key is a hash of it, of the parents' keys and of the student's text encoder.
    """
    text, first = student.text, parents[0]
    assert text is not None, "a merge reads the prompts with the student's text encoder"
    key = repr_sha256("derived", *how, [parent.key for parent in parents], text.key)

    def open_it() -> Teacher:
        return Teacher(name, make(), text.contexts, text.pooled, first.prediction, first.zero_snr)

    return ModelRef(name, key, open_it, without_styles(first.config), first.zero_snr, first.prediction, text)


class Tuning:
    """Chooses the scale of task vectors: the one with the least mean eps error on pictures that the teachers paint only for this choice."""

    def __init__(self, student: ModelRef, teachers: Sequence[ModelRef], base: ModelRef):
        self.student, self.teachers, self.base = student, teachers, base
        n = len(teachers)
        self.scales = sorted({times / n for times in TIMES_THE_MEAN} | {1.0})

    def merged(self, scale: float) -> Contender:
        shares = task_vector_shares(len(self.teachers), scale)
        return merge("task-vectors", shares, [self.base, *self.teachers], self.student)

    def work(self, settings: EvaluationSettings) -> int:
        """The cost of the choice, in forwards of a UNet."""
        s, n = self.settings(settings), len(self.teachers)
        return n * s.count * painting_cost(s) + (1 + len(self.scales)) * n * s.bins * s.bin_samples

    @staticmethod
    def settings(settings: EvaluationSettings) -> EvaluationSettings:
        return dataclasses.replace(
            settings, seed=settings.seed + TUNING_BATCH, count=TUNING_PICTURES, bin_samples=TUNING_SAMPLES
        )

    def settle(self, runner: ModelRunner, name: str) -> Contender:
        """The merge with the best scale; its ``about`` has the error of every scale that was tried."""
        apart = ModelRunner(
            runner.prompts, self.settings(runner.settings), folder=runner.folder, device=runner.device, work=runner.work
        )
        asked, said = [], []
        for ref in self.teachers:
            with apart.loaded(ref) as load:
                asked.append(noised(apart, apart.paint(ref, load), ref.zero_snr))
                said.append(predictions(apart, ref, load, asked[-1]))
        errors = {}
        for scale in self.scales:
            ((ref, _),) = self.merged(scale).painters
            with apart.loaded(ref) as load:
                guesses = [predictions(apart, ref, load, one) for one in asked]
            errors[scale] = torch.stack([score_loss(a, b) for a, b in zip(guesses, said)]).mean().item()
        best = min(errors, key=errors.__getitem__)
        tried = [{"scale": scale, "eps_error": error} for scale, error in errors.items()]
        found = self.merged(best)
        return dataclasses.replace(found, name=name, about={**found.about, "scale": best, "tried": tried})


# --- a bank of adapters -----------------------------------------------------------------------------------------------


def low_rank_bank(student: ModelRef, teachers: Sequence[ModelRef], rank: int) -> Contender:
    """For each teacher the soup plus the best rank-r approximation of (teacher - soup): a soup with N adapters, not one model."""
    bank = _Bank(teachers, rank)
    refs = [
        derived(
            f"low-rank {one.name}",
            ("low-rank", rank, i),
            teachers,
            student=student,
            make=functools.partial(bank.unet, i),
        )
        for i, one in enumerate(teachers)
    ]
    shapes = parameter_shapes(teachers[0].config)
    about = {
        "method": "low-rank",
        "rank": rank,
        "adapters": len(teachers),
        "adapter_parameters": adapter_size(shapes.values(), rank),
        "unet_parameters": sum(shape.numel() for shape in shapes.values()),
    }
    return Contender("low-rank bank", [(ref, None) for ref in refs], about, finish=bank.forget)


class _Bank:
    """Keeps the soup in memory while the models of the bank are made one after the other."""

    def __init__(self, teachers: Sequence[ModelRef], rank: int):
        self.teachers, self.rank = teachers, rank
        self._soup: dict[str, Tensor] | None = None

    def forget(self) -> None:
        self._soup = None

    def unet(self, index: int) -> UNet:
        if self._soup is None:
            self._soup = summed(soup_shares(len(self.teachers)), self.teachers)
        weights = dict(self.teachers[index].open().unet.state_dict())
        for key, mean in self._soup.items():
            own = weights[key].float()
            # A full adapter is the teacher itself, without a rounding of the sum
            weights[key] = own if is_full(own.shape, self.rank) else mean + low_rank(own - mean, self.rank)
        return load_unet(weights, dtype=None, copy=False, heads=self.teachers[index].config.num_heads)


def parameter_shapes(config: UNetConfig) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in UNet(without_styles(config)).named_parameters()}


# --- a style bank -----------------------------------------------------------------------------------------------------


def merge_with_bank(student: ModelRef, teachers: Sequence[ModelRef], base: ModelRef, budget: str) -> Contender:
    """What ``dmm merge`` makes without training: the soup and a style bank of this size. All teachers are in memory while it is made."""
    size = bank_of(budget, parameter_shapes(base.config), len(teachers) + 1, FILE_ITEMSIZE, styles=len(teachers))

    def make() -> UNet:
        config = TrainConfig(init="bank", bank=budget, seed=0)
        return new_student(base.open().unet, [one.open() for one in teachers], config).requires_grad_(False)

    ref = derived("merge", ("merge", budget), [base, *teachers], student=student, make=make)
    about = {"method": "merge", "budget": budget, "rank": size.rank, "bank_share": size.share}
    return Contender("merge", [(ref, i) for i in range(len(teachers))], about)


# --- a student before its training ------------------------------------------------------------------------------------


def untrained(student: ModelRef, styles: Sequence[str], teachers: Sequence[ModelRef], base: ModelRef) -> Contender:
    """The student before training: the base with random style codes and a random style MLP, as a distillation with seed 0 begins."""

    def make() -> UNet:
        start = base.open()
        return new_student(start.unet, [start] * len(styles), TrainConfig(init="base", seed=0)).requires_grad_(False)

    ref = derived("untrained", ("untrained", len(styles)), [base], student=student, make=make)
    painters = [(ref, list(styles).index(one.name)) for one in teachers]
    return Contender("untrained", painters, {"method": "untrained"})
