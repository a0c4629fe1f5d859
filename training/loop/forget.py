"""Taking a style out of a DMM model without its teacher's file.

Deleting the style's code hides the look, but the network still holds it: whoever searches finds a code that brings it back
(``codes.recover``). So the network learns, beside the frozen old model that guards the styles which stay, to paint as without a style
wherever the look can be found: at the old code, and at codes that an attack finds anew every few steps. The idea is that of score
forgetting (arXiv:2409.11219), with the search as its adversary; the teacher is the old model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import load_unet
from ..config import AttackConfig, TrainConfig
from ..data.batches import Batch, Draw, TrainingData
from ..parallel.ranks import Ranks
from ..progress import Tick
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .codes import Search, fit_codes, recover
from .trainer import Distillation


@dataclass
class Forgotten:
    """A style to forget: its place in the old model, and the rows of the student's codebook that stand for it."""

    teacher: Teacher
    rows: list[int]


class Forgetting(Distillation):
    """The styles of ``base``, a DMM model, without those in ``forget`` (names).

    While it trains, codebook rows follow those of the styles that stay: for each forgotten style its old code and ``attack.codes``
    codes that are searched for every ``attack.every`` steps; the optimiser leaves them alone, and the finished student has none of
    them. Raises ValueError for a name that the model does not have, and when nothing would stay.
    """

    def __init__(
        self,
        base: Teacher,
        styles: Sequence[Teacher],
        forget: Sequence[str],
        data: TrainingData,
        config: TrainConfig,
        device: torch.device,
        attack: AttackConfig | None = None,
        ranks: Ranks | None = None,
    ):
        """styles: all of the base's, as ``Teacher.as_style`` gives them."""
        self.attack = attack or AttackConfig()
        self.attack.validate()
        gone = [named(styles, name) for name in forget]
        stay = [style for style in styles if style not in gone]
        if not gone:
            raise ValueError(f"no style to forget was named: choose from {', '.join(s.name for s in styles)}")
        if not stay:
            raise ValueError("all styles would be forgotten: a DMM model keeps at least one")
        self.forgotten, places = [], list(stay)
        for old in gone:
            rows = list(range(len(places), len(places) + 1 + self.attack.codes))
            self.forgotten.append(Forgotten(old, rows))
            places += [as_without_style(old, i) for i in range(len(rows))]
        self.kept = len(stay)
        config = dataclasses.replace(config, warm_start=0)
        super().__init__(base, places, data, config, device, ranks=ranks or Ranks())
        if self.sharded:
            raise ValueError(
                "parallel is 'fsdp', which cannot forget: its codes are looked for with the whole student; use ddp"
            )
        with torch.no_grad():
            book, codes = self.student.model_embedding.weight, base.unet.model_embedding.weight
            for one in self.forgotten:
                book[one.rows[0]] = codes[one.teacher.style].to(book)

    def styles(self):
        return super().styles()[: self.kept]

    def own_identity(self) -> dict[str, str]:
        attack = dataclasses.replace(self.attack, check=0)  # comes after training and changes nothing of it
        return {"forgotten styles": repr([one.teacher.name for one in self.forgotten]), "attack": repr(attack)}

    def what_changed(self) -> dict[str, list[str]]:
        return {"forgotten": [one.teacher.name for one in self.forgotten]}

    def student_weights(self, averaged: bool = True) -> dict[str, Tensor]:
        weights = super().student_weights(averaged)
        weights[f"{CODEBOOK}.weight"] = weights[f"{CODEBOOK}.weight"][: self.kept].clone()
        return weights

    def train_step(self):
        if self.attack.codes and self.step % self.attack.every == 0:
            self.search()
        return super().train_step()

    def _update(self, parts) -> float:
        book = self.student.model_embedding.weight
        hostile = book.detach()[self.kept :].clone()
        norm = super()._update(parts)
        with torch.no_grad():
            book[self.kept :] = hostile  # else the codes would step aside instead of the network
        return norm

    def search(self) -> None:
        """Find codes with which the student, as it is now, paints the forgotten styles again (in place)."""
        book = self.student.model_embedding.weight
        for number, one in enumerate(self.forgotten):
            rows = one.rows[1:]
            start = book.detach()[rows].float().clone()
            # They go on from where they were, but one begins anew: the network must not learn these few only.
            fresh = (self.step // self.attack.every) % len(rows)
            g = torch.Generator().manual_seed(hash_seed(self.config.seed, "hostile code", number, self.step))
            start[fresh] = torch.randn(start.shape[1], generator=g).to(start)
            codes = fit_codes(Search(self, self.student, rows, self._sample(one, len(rows))), start, self.attack.steps)
            with torch.no_grad():
                book[rows] = codes.to(book)
        self.ranks.align(book.detach())

    def _sample(self, one: Forgotten, count: int):
        """Batches whose targets are what the old model paints in the style."""
        c = self.config
        draw = Draw(
            hash_seed(c.seed, "search", self.step, one.teacher.name),
            c.batch_size, self.num_styles, 0.0, c.caption_dropout, self.schedule,
            tuple(float(i == one.rows[0]) for i in range(self.num_styles)),
        )  # fmt: skip

        def sample(number: int) -> tuple[Batch, Tensor, Tensor]:
            batch = self.data.batch(number, draw)
            target = self.ask_old(one.teacher, batch)
            return batch, torch.arange(c.batch_size) % count, target

        return sample

    @torch.no_grad()
    def ask_old(self, style: Teacher, batch: Batch) -> Tensor:
        """What the frozen old model predicts in one of its styles, (B, C, h, w)."""
        x_t, t = batch.x_t.to(self.device), batch.t.to(self.device)
        unet = self.rack.get(self.num_styles)
        kind = unet.dtype
        context, y = self.base.conditioning(batch.rows, x_t.shape[2:], self.device)
        rows = style.style_row.expand(len(t), -1).to(self.device)
        with self.autocast():
            out = unet(x_t.to(kind), t, context.to(kind), y=None if y is None else y.to(kind), style=rows)
        return out.float()

    def last_word(self, tick: Tick | None = None) -> str:
        """What a search of ``attack.check`` steps for each forgotten style brings back, before and after, as a small table.

        eps errors against what the old model painted in that style. Deleting the code alone leaves the network as it was *before*; a
        network that knows nothing of the style comes out as *without a style*.
        """
        steps = self.attack.check
        if not steps:
            return ""
        width = max(len("a search for"), *(len(one.teacher.name) for one in self.forgotten))
        lines = [f"{'a search for':<{width}}  found before   found now  without a style"]
        networks = (self.base.unet, load_unet(self.student_weights()).to(self.device))
        total = len(networks) * steps * len(self.forgotten)
        for place, one in enumerate(self.forgotten):
            found = []
            for half, unet in enumerate(networks):
                done, what = steps * (len(networks) * place + half), f"searching for '{one.teacher.name}'"
                report = tick and (lambda n, done=done, what=what: tick(done + n, total, what))
                found.append(
                    recover(self, unet, lambda batch, one=one: self.ask_old(one.teacher, batch), steps, tick=report)
                )
            before, now = found
            lines.append(f"{one.teacher.name:<{width}}  {before.error:12.5f}{now.error:12.5f}{now.untouched:17.5f}")
        return "\n".join(lines)


def named(styles: Sequence[Teacher], name: str) -> Teacher:
    """The style of this name. Raises ValueError listing those that there are."""
    for style in styles:
        if style.name.strip() == name.strip():
            return style
    raise ValueError(f"the model has no style '{name}': it has {', '.join(style.name for style in styles)}")


def as_without_style(style: Teacher, number: int) -> Teacher:
    """The teacher of a forgotten style's rows: the old model painting without a style."""
    one = dataclasses.replace(style, name=f"{style.name} (forgotten, {number})", style=None, known=None)
    one.weights_sha256 = style.weights_sha256
    return one
