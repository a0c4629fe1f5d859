"""The models of an evaluation before they are loaded, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...dmm_core.unet import UNetConfig
from ..files.hashing import repr_sha256, tensor_sha256
from ..teachers.teacher import Rows, Teacher, check_architectures, check_schedules


@dataclass
class PromptStates:
    """Text states of the evaluation's prompts: contexts (P, L, d) and, for SDXL, pooled (P, p). key: a hash of the text encoder, or of
    the states."""

    key: str
    contexts: Rows
    pooled: Rows | None = None


@dataclass
class ModelRef:
    """A model of an evaluation, which is loaded when it is needed.

    key: a hash; models that paint differently have different ones. open: loads it, with text states of the evaluation's prompts (row 0
    is the empty prompt). config, zero_snr, prediction, text: its own, known before it is loaded; text is needed for merges only.
    """

    name: str
    key: str
    open: Callable[[], Teacher]
    config: UNetConfig
    zero_snr: bool = False
    prediction: str = "eps"
    text: PromptStates | None = None

    @classmethod
    def of(cls, teacher: Teacher, prompts: int) -> ModelRef:
        """Of a model that is in memory already. prompts: the number of its text states."""
        rows = torch.arange(prompts)
        texts = [tensor_sha256(teacher.contexts[rows])]
        if teacher.pooled is not None:
            texts.append(tensor_sha256(teacher.pooled[rows]))
        heads = teacher.unet.config.num_heads
        key = repr_sha256(
            teacher.weights_sha256, teacher.style, teacher.prediction, *texts, *([heads] if heads else [])
        )
        text = PromptStates(repr_sha256(*texts), teacher.contexts, teacher.pooled)
        return cls(teacher.name, key, lambda: teacher, teacher.unet.config, teacher.zero_snr, teacher.prediction, text)


def check_lineup(teachers: Sequence[ModelRef], prompts: Sequence[str]) -> None:
    """Raises ValueError for a teacher that is named twice, and where there is no prompt after the first, which must be empty."""
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        raise ValueError(f"a teacher is named twice: {', '.join(names)}")
    if len(prompts) < 2 or prompts[0]:
        raise ValueError("no prompts to paint were given")


def check_compatible(student: ModelRef, others: Sequence[ModelRef]) -> None:
    """Raises ValueError for models of another architecture or noise schedule than the student's."""
    check_architectures(student.config, [(ref.name, ref.config) for ref in others])
    check_schedules(student.zero_snr, [(ref.name, ref.zero_snr) for ref in others])
