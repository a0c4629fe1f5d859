"""The batches of a run by their number, from the data of its stage; of several processes, each one's rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..config import TrainConfig
from ..data.batches import Batch, Draw, TrainingData
from ..data.difficulty import Difficulty
from ..parallel.ranks import Ranks
from ..seeds import hash_seed

logger = logging.getLogger(__name__)


@dataclass
class Draws:
    """Batch ``number``, counted over forwards; its rows follow from seed and number, and with ``difficulty`` from what was hard so far.

    data: of the steps up to ``config.steps``; final_data: of those after, once there are any. shares: of the rows with a style, by
    teacher, None for equal ones.
    """

    data: TrainingData
    config: TrainConfig
    num_styles: int
    schedule: NoiseSchedule
    shares: tuple[float, ...] | None = None
    difficulty: Difficulty | None = None
    ranks: Ranks = field(default_factory=Ranks)
    final_data: TrainingData | None = None
    _ahead: tuple[int, Batch] | None = None

    def __call__(self, number: int) -> Batch:
        """This process's rows of a batch."""
        if self._ahead and self._ahead[0] == number:
            return self._ahead[1]
        c = self.config
        data, seed, first = self.data, c.seed, 0
        if number >= c.steps * c.accumulate:
            if self.final_data is None:
                raise RuntimeError(
                    f"step {c.steps} is reached, and there is nothing to train on in the final stage: set final_data"
                )
            data, seed, first = self.final_data, hash_seed(c.seed, "final stage"), c.steps * c.accumulate
        chances = self.difficulty.chances(self.shares) if self.difficulty else None
        models = c.teachers_per_step if isinstance(c.teachers_per_step, int) else None
        draw = Draw(
            seed, c.batch_size, self.num_styles, c.base_share, c.caption_dropout, self.schedule, self.shares, chances,
            models, c.accumulate,
        )  # fmt: skip
        return self.local(data.batch(number - first, draw))

    def local(self, batch: Batch) -> Batch:
        """The rows of a batch that this process works on: all, where it is alone."""
        return batch if self.ranks.world == 1 else batch.share(self.ranks.share(len(batch)))

    def look_ahead(self, number: int) -> Batch | None:
        """Read a batch before it is needed, while the device is busy; None where there is none yet."""
        c = self.config
        if number >= (c.all_steps if self.final_data else c.steps) * c.accumulate:
            return None
        batch = self(number)
        self._ahead = number, batch
        return batch

    def load_difficulty(self, state: dict[str, Tensor]) -> None:
        """Go on with the running losses of a saved state."""
        if self.difficulty is None:
            raise RuntimeError("this run draws its rows evenly: it has no running losses")
        self.difficulty.load_state_dict(state)
        self._ahead = None  # drawn by other chances than there are now


def difficulty_of(
    data: TrainingData, config: TrainConfig, num_styles: int, schedule: NoiseSchedule
) -> Difficulty | None:
    """The table by which rows are drawn with ``sampling`` "adaptive"; None where they are drawn evenly."""
    c = config
    if c.sampling != "adaptive":
        return None
    if data.has_targets:  # not refused: presets have it, and are for all data
        logger.info("rollouts bring their teachers and timesteps with them: sampling is uniform")
        return None
    return Difficulty(num_styles, len(schedule), c.adaptive_power, c.adaptive_floor)
