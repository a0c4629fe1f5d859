"""What there is to set of a new style from a few pictures."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import check_fields, setting

LEARNS = ("directions", "core", "code")
"""Everything that a style may have of its own, from most to least."""


@dataclass(frozen=True)
class LearnConfig:
    """All but the pictures, the captions and the name."""

    learns: str = setting(
        LEARNS[0],
        "What the new style gets: directions of its own in the style bank, its core in the bank as it is, or a code alone. A model without "
        "a bank has codes only.",
        choices=LEARNS,
    )
    directions: int = setting(
        4,
        "New directions of every layer of the style bank, where it has as many left.",
        unit="directions",
        low=1,
        high=512,
    )
    steps: int = setting(300, "Steps at most.", unit="steps", low=1, high=1_000_000)
    batch_size: int = setting(8, "Pictures of a step.", unit="pictures", low=1, high=1024)
    lr: float = setting(0.05, "Learning rate, as a share of the size of what learns.", above=0, below=1)
    prior: float = setting(
        3.0, "Weight of what keeps other captions working in the new style; 0: off.", low=0, high=100
    )
    prior_pictures: int = setting(
        16,
        "Pictures of other captions that the model paints for that, without a style.",
        unit="pictures",
        low=1,
        high=1000,
    )
    caption_dropout: float = setting(0.1, "Share of the captions left out.", low=0, below=1)
    held_out: float = setting(
        0.2,
        "Share of the pictures that are only looked at, to see when to stop; of 3 pictures or more, at least one.",
        low=0,
        below=0.9,
    )
    check: int = setting(25, "Steps between two looks at the held-out pictures.", unit="steps", low=1)
    patience: int = setting(8, "Looks without a better one after which it stops.", unit="looks", low=1)
    seed: int = setting(0, "Of all that is drawn by chance.", low=0, high=2**63 - 1)

    def validate(self) -> None:
        """Raises ValueError naming the first field that makes no sense."""
        check_fields(self)
