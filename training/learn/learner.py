"""A new style of a frozen model, learnt from a few pictures.

    L = E ||eps - eps_th(x_t, t, c; e, C)||^2  +  prior * E ||r_th(x'_t, t, c'; e, C) - r_th(x'_t, t, c'; none)||^2

over the code e, and of a model with a bank the core and biases C and a few directions. r(c) = eps(c) - eps(no caption) is how the model
answers a caption; x' are pictures of other captions c' that it painted itself, without a style.

Why not the prior of DreamBooth (arXiv:2208.12242), the plain error of other captions without a style: what learns here plays no part
without a style (its mass is 0), so that term is constant and has no gradient. The answer to captions is what a style could spoil: a code
that has seen red houses only may paint red houses whatever the caption says. The difference leaves the style's own part of the prediction
free.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.bank import BANK, split_key
from ...dmm_core.bank_drop import has_style_rows
from ...dmm_core.bank_room import rms
from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.style import CODEBOOK, no_style_row, style_row
from ..evaluation.identify import spread_timesteps
from ..loop.losses import score_loss
from ..paint.paint_rows import paint_rows
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .config import LearnConfig
from .pictures import Examples

FEW = 3
"""From so many pictures on some are held out; fewer are too few to spare one."""
JUDGED = 64
"""(t, eps) that the held-out pictures together are judged by, at least 4 each."""
PRIOR_EVERY = 2
"""Steps from one with the prior, which is more than a third of their work, to the next; it counts so many times there."""
OTHER_STEPS, OTHER_CFG = 12, 4.0
"""With which the pictures of other captions are painted: they only have to show them."""


@dataclass(frozen=True)
class Step:
    """What one step did. error: of the pictures of this step; prior: the second term, 0 where it was not looked at. judged: mean error of
    the held-out pictures where they were looked at; best: whether it was the best so far."""

    step: int
    steps: int
    error: float
    prior: float
    judged: float | None
    best: bool
    grad_norm: float


class StyleLearner:
    """Trains the only style of ``model`` (``bank_room.last_alone``), whose UNet is on the device where it computes.

    known: the shapes that weights of the bank had before there was room for more (``with_room``): rows and columns beyond them are the new
    style's. rows (M,): captions of the pictures, as rows of the model's text states; others: rows of the captions of the prior. After
    ``run`` the UNet has the weights of the best look. Raises ValueError for a loss that is not finite, naming the step.
    """

    def __init__(
        self,
        model: Teacher,
        examples: Examples,
        config: LearnConfig,
        *,
        known: Mapping[str, Sequence[int]],
        rows: Tensor,
        others: Tensor,
    ):
        self.model, self.examples, self.rows, self.config = model, examples, rows, config
        self.others = others[: config.prior_pictures]
        self.unet = model.unet
        self.device = next(self.unet.parameters()).device
        self.unet.gradient_checkpointing = self.unet.config.model_channels >= 320  # the demo family's fit as they are
        self.schedule = NoiseSchedule(model.zero_snr)
        self.style, self.none = style_row(1, 0), no_style_row(1)
        self.trained = trained_parts(self.unet.state_dict(), known, config.learns)
        self.groups = self._choose()
        self.learn, self.held = split_pictures(len(examples), config)
        self.judges = self._fixed_questions()
        self.step, self.best_step, self.best = 0, 0, math.inf
        self.start = math.nan
        self.best_weights: dict[str, Tensor] = {}

    @property
    def numbers(self) -> int:
        """How many numbers learn."""
        return int(sum(mask.sum().item() for mask in self.trained.values()))

    # --- what learns --------------------------------------------------------------------------------------------------

    def _choose(self) -> list[dict]:
        """Adam's groups: a rate for each weight, in proportion to its numbers, and no gradient where a number is not the style's own."""
        groups = []
        for name, p in self.unet.named_parameters():
            p.requires_grad_(name in self.trained)
            if name not in self.trained:
                continue
            mask = self.trained[name].to(p.device)
            p.register_hook(lambda grad, mask=mask: grad * mask)
            groups.append({"params": [p], "scale": self._size(name, p)})
        return groups

    def _size(self, name: str, p: Tensor) -> float:
        """Of a weight's numbers. Cores and biases may be zero, where the style began as none: then they are of the size that all cores
        together have, or a hundredth."""
        own = rms(p)
        if name.startswith(BANK) and split_key(name)[1] in ("cores", "bias"):
            same = [
                rms(q)
                for key, q in self.unet.named_parameters()
                if key.startswith(BANK) and split_key(key)[1] == split_key(name)[1]
            ]
            typical = sorted(same)[len(same) // 2]
            return max(own, typical, 1e-3)
        return own

    # --- what is asked ------------------------------------------------------------------------------------------------

    def _fixed_questions(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(x_t, t, eps, rows) by which the held-out pictures are judged, always the same; without any, the pictures that are learnt."""
        judged = self.held or self.learn
        g = torch.Generator().manual_seed(hash_seed(self.config.seed, "held out"))
        draws = max(4, -(-JUDGED // len(judged)))
        questions = []
        for i in judged:
            x0 = self.examples.latents[i].expand(draws, -1, -1, -1)
            t = spread_timesteps(draws, g, 0, len(self.schedule))
            eps = torch.randn(x0.shape, generator=g)
            questions.append((self.schedule.add_noise(x0, eps, t), t, eps, self.rows[i].expand(draws)))
        return questions

    @torch.no_grad()
    def judge(self, style: Tensor | None = None) -> float:
        """Mean error in eps of the held-out pictures, in the new style or with another style row."""
        style = self.style if style is None else style
        errors = [self._errors(x_t, t, eps, rows=rows, style=style) for x_t, t, eps, rows in self.judges]
        return torch.cat(errors).mean().item()

    def _predict(self, x_t: Tensor, t: Tensor, rows: Tensor, style: Tensor) -> Tensor:
        """What the model says is eps."""
        with self.autocast():
            out = self.model.predict(x_t, t, rows, style).out.float()
        return self.schedule.to_eps(out, x_t, t, self.model.prediction)

    def autocast(self) -> contextlib.AbstractContextManager:
        """What forwards compute in: half precision on a GPU."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _errors(self, x_t: Tensor, t: Tensor, eps: Tensor, *, rows: Tensor, style: Tensor) -> Tensor:
        x_t, t, eps = (v.to(self.device) for v in (x_t, t, eps))
        return score_loss(self._predict(x_t, t, rows, style), eps)

    @torch.no_grad()
    def paint_others(self, on_step: Callable[[], None] | None = None) -> Tensor:
        """Pictures (P, C, h, w) of the other captions, without a style; the size of most of the pictures. on_step: is called while it
        paints, and may raise."""
        shapes = [tuple(latent.shape) for latent in self.examples.latents]
        shape = max(sorted(set(shapes)), key=shapes.count)
        g = torch.Generator().manual_seed(hash_seed(self.config.seed, "others"))
        noise = torch.randn(len(self.others), *shape, generator=g)
        painted = []
        for part in torch.arange(len(self.others)).split(self.config.batch_size):
            with self.autocast():
                latents = paint_rows(
                    self.unet, self.model, self.others[part], noise[part].to(self.device), steps=OTHER_STEPS, cfg=OTHER_CFG,
                    style=self.none.expand(len(part), -1), callback=(lambda *_: on_step()) if on_step else None,
                )  # fmt: skip
            painted.append(latents.float().cpu())
        return torch.cat(painted)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self, others: Tensor | None = None) -> Iterator[Step]:
        """Train, yielding after each step; others: pictures of the other captions, None for no prior. The UNet ends with the weights of the
        best look, also where the caller ends it before its time."""
        c = self.config
        optimizer = torch.optim.Adam(self.groups, lr=c.lr, betas=(0.9, 0.99))
        self.start = self.best = self.judge()
        self._keep()
        waited = 0
        try:
            while self.step < c.steps:
                for group in optimizer.param_groups:
                    group["lr"] = c.lr * group["scale"] * rate(self.step, c.steps)
                optimizer.zero_grad(set_to_none=True)
                error, prior, norm = self._backward(others)
                optimizer.step()
                self.step += 1
                judged, better = None, False
                if self.step % c.check == 0 or self.step == c.steps:
                    judged = self.judge()
                    better = judged < self.best
                    waited = 0 if better else waited + 1
                    if better:
                        self.best, self.best_step = judged, self.step
                        self._keep()
                yield Step(self.step, c.steps, error, prior, judged, better, norm)
                if waited >= c.patience:
                    break
        finally:
            self._put_back()

    def _backward(self, others: Tensor | None) -> tuple[float, float, float]:
        c, g = self.config, torch.Generator().manual_seed(hash_seed(self.config.seed, "step", self.step))
        with torch.enable_grad():
            x_t, t, eps, rows = self._batch(g)
            error = self._errors(x_t, t, eps, rows=rows, style=self.style).mean()
            prior = error.new_zeros(())
            if others is not None and c.prior and self.step % PRIOR_EVERY == 0:
                prior = self._prior(others, g).mean()
            loss = error + PRIOR_EVERY * c.prior * prior
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {self.step + 1}: lower the learning rate (lr)")
            loss.backward()
        trained = [p for group in self.groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return error.item(), prior.item(), norm.item()

    def _batch(self, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures of one size, noised. Sizes are drawn in proportion to their numbers of pictures."""
        c = self.config
        first = self.learn[int(torch.randint(len(self.learn), (1,), generator=g))]
        shape = self.examples.latents[first].shape
        alike = [i for i in self.learn if self.examples.latents[i].shape == shape]
        # Whole turns through the pictures, so that none is left out of a batch that has room for all.
        turns = [
            alike[i]
            for _ in range(-(-c.batch_size // len(alike)))
            for i in torch.randperm(len(alike), generator=g).tolist()
        ]
        index = turns[: c.batch_size]
        x0 = torch.stack([self.examples.latents[i] for i in index])
        t = spread_timesteps(c.batch_size, g, 0, len(self.schedule))
        eps = torch.randn(x0.shape, generator=g)
        kept = torch.rand(c.batch_size, generator=g) >= c.caption_dropout
        return self.schedule.add_noise(x0, eps, t), t, eps, self.rows[index] * kept

    def _prior(self, others: Tensor, g: torch.Generator) -> Tensor:
        """The second term (B',), B' a quarter of the batch."""
        count = max(1, self.config.batch_size // 4)
        index = torch.randint(len(others), (count,), generator=g)
        x0 = others[index]
        t = torch.randint(len(self.schedule), (count,), generator=g)
        x_t = self.schedule.add_noise(x0, torch.randn(x0.shape, generator=g), t).to(self.device).repeat(2, 1, 1, 1)
        t = t.to(self.device).repeat(2)
        rows = torch.cat([self.others[index], torch.zeros_like(index)])
        with torch.no_grad():
            said, unsaid = self._predict(x_t, t, rows, self.none).chunk(2)
        now, empty = self._predict(x_t, t, rows, self.style).chunk(2)
        return score_loss(now - empty, said - unsaid)

    def _keep(self) -> None:
        self.best_weights = {name: self.unet.get_parameter(name).detach().clone() for name in self.trained}

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, value in self.best_weights.items():
            self.unet.get_parameter(name).copy_(value)


def trained_parts(weights: dict[str, Tensor], known: Mapping[str, Sequence[int]], learns: str) -> dict[str, Tensor]:
    """Which numbers of which weights are the new style's own, as masks of ones and zeros. weights: of a UNet with this style alone. Of the
    style's core, directions that are new are not counted where only the core learns."""
    masks = {}
    for key, value in weights.items():
        mask = torch.zeros(value.shape)
        if has_style_rows(key):
            if key != f"{CODEBOOK}.weight" and learns == "code":
                continue
            mask[0] = 1
        elif key.startswith(f"{BANK}.") and learns == "directions" and tuple(value.shape) != tuple(known[key]):
            if split_key(key)[1] == "up":
                mask[:, known[key][1] :] = 1
            else:
                mask[known[key][0] :] = 1
        else:
            continue
        masks[key] = mask
    return masks


def split_pictures(count: int, config: LearnConfig) -> tuple[list[int], list[int]]:
    """The pictures to learn from, and those that are held out."""
    held = 0 if count < FEW or not config.held_out else min(count - 1, max(1, round(config.held_out * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(hash_seed(config.seed, "split"))).tolist()
    return sorted(order[held:]), sorted(order[:held])


def rate(step: int, steps: int) -> float:
    """Of the learning rate: a rise over a twentieth of the steps, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
