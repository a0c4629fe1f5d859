"""What does not fit together is refused before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import TrainConfig, check_names
from ..data.batches import TrainingData, bad_rows
from ..parallel.sharding import check_parallel
from ..teachers.teacher import Teacher, check_architectures, check_predictions, check_schedules, check_text


def check_run(
    base: Teacher, teachers: Sequence[Teacher], data: TrainingData, *, config: TrainConfig, world: int
) -> None:
    """Raises ValueError for teachers of another architecture, noise schedule or text width than the base, for bad names, a bad config,
    latents with another number of channels, and for what ``world`` processes cannot do."""
    config.check()
    if config.teachers_per_step == "auto":
        raise ValueError(
            "teachers_per_step is 'auto', and this run was not planned (memory.fitting): give a number, or all"
        )
    check_parallel(config, world)
    check_names([teacher.name for teacher in teachers])
    check_architectures(base.unet.config, [(t.name, t.unet.config) for t in teachers])
    if data.shape[0] != base.unet.config.in_channels:
        raise ValueError(f"latents have {data.shape[0]} channels, the models take {base.unet.config.in_channels}")
    check_schedules(base.zero_snr, [(t.name, t.zero_snr) for t in teachers])
    check_predictions(base, teachers)
    check_text((base, *teachers))
    check_text_values((base, *teachers), data.prompts)


def check_text_values(teachers: Sequence[Teacher], prompts: Sequence[str]) -> None:
    """Raises ValueError for text states in memory that hold NaN or infinity, naming teacher and caption. (Those of a cache are looked at
    when they are read.)"""
    seen: set[int] = set()
    for teacher in teachers:
        for states in (teacher.contexts, teacher.pooled):
            if isinstance(states, Tensor) and id(states) not in seen and (bad := bad_rows(states)):
                raise ValueError(
                    f"the text states of '{teacher.name}' have NaN or infinite numbers for {len(bad)} of {len(states)} captions, the first "
                    f"in row {bad[0]} ({prompts[bad[0]][:60]!r}): its text encoder is damaged, get its file again"
                )
            seen.add(id(states))
