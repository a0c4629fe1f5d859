"""The model that learns: its weights, their running average, and how it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...dmm_core.unet import UNet
from ..config import TrainConfig
from ..parallel.devices import sent
from ..parallel.ranks import Ranks
from ..parallel.sharding import distribute_like, gather_to_main, local_tensor, replicate, shard
from ..teachers.teacher import Prediction, Teacher
from .adapters import folded
from .ema import PowerEMA
from .new_student import new_student

EMA_EVERY_ON_CPU = 8
"""Steps between updates of an average that is kept in RAM: each one copies the student there."""


class Student:
    """A UNet with a style for each of ``teachers``, on the device, of one process or of one among several (``ranks``).

    ``unet``: the network. ``trained``: the parameters that learn, by name. ``ema``: their average, None without one. ``sharded``: each
    process holds a share of every parameter. autocast: makes the context in which it computes. stays: which parameters, by name, do not
    learn whatever the config says.
    """

    def __init__(
        self,
        base: Teacher,
        teachers: Sequence[Teacher],
        config: TrainConfig,
        device: torch.device,
        *,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager],
        stays: Callable[[str], bool] = lambda name: False,
    ):
        c = config
        self.base, self.ranks, self.autocast = base, ranks, autocast
        self.sharded = c.parallel == "fsdp" and ranks.world > 1
        self.unet = new_student(base.unet, teachers, c)
        for name, p in self.unet.named_parameters():
            p.requires_grad_(p.requires_grad and not stays(name))
        if self.sharded:
            # Each process cuts its share out of a student of its own: where the signs of singular vectors are other machines' (init: bank),
            # the shares would not belong together. (DDP begins with the first process's student by itself.)
            for p in self.unet.bank_parameters():
                ranks.align(p.detach())
            shard(self.unet, c.precision, device, ranks.world)
        self.unet.to(device)
        self.trained = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.ema: PowerEMA | None = None
        if c.ema_gamma:
            on_cpu = c.ema_device == "cpu" and device.type != "cpu"
            where, every = (torch.device("cpu"), EMA_EVERY_ON_CPU) if on_cpu else (None, 1)
            self.ema = PowerEMA(self.local_weights(), c.ema_gamma, device=where, every=every)
        several = ranks.world > 1 and not self.sharded
        forward = replicate(self.unet, device) if several else self.unet
        self.forward = torch.compile(forward) if c.compile else forward

    def predict(self, x_t: Tensor, t: Tensor, rows: Tensor, style: Tensor, *, features: bool = False) -> Prediction:
        """As ``Teacher.predict``, with the base's text states and parameterisation, and with gradients."""
        with self.autocast():
            context, y = self.base.conditioning(rows, x_t.shape[2:], x_t.device)
            with compiler_explained():
                out = self.forward(x_t, t, context, y=y, style=sent(style, x_t.device), features=features)
        out, blocks = out if features else (out, [])
        return Prediction(out.float(), blocks)

    @torch.no_grad()
    def predict_averaged(self, x_t: Tensor, t: Tensor, rows: Tensor, style: Tensor) -> Tensor:
        """What the averaged weights predict (B, C, h, w), the weights as they are where there is no average yet; beside the student, whose
        own weights stay where they are. Not for one that is shared out."""
        if not (self.ema and self.ema.ready):
            return self.predict(x_t, t, rows, style).out
        weights = {name: value.to(x_t.device) for name, value in self.ema.average.items()}
        with self.autocast():
            context, y = self.base.conditioning(rows, x_t.shape[2:], x_t.device)
            given = {"y": y, "style": sent(style, x_t.device)}
            return torch.func.functional_call(self.unet, weights, (x_t, t, context), given).float()

    def update_average(self) -> None:
        """After each step."""
        if self.ema:
            self.ema.update(self.local_weights())

    def local_weights(self) -> list[tuple[str, Tensor]]:
        """The parameters that learn, by name, in their own memory; of those that are shared out, this process's part."""
        return [(name, local_tensor(p)) for name, p in self.trained.items()]

    def state_dict(self, averaged: bool = True) -> dict[str, Tensor]:
        """All weights on the CPU in float32, adapters folded in; their average where there is one and ``averaged`` is set.

        Where the student is shared out, this is for all processes together, and the first one gets it (the others nothing).
        """
        main = self.ranks.is_main
        with self.averaged() if averaged else contextlib.nullcontext():
            state = {k: gather_to_main(v, main) for k, v in self.unet.state_dict().items()}
            if self.sharded and not main:
                return {}
            return {k: v.float().cpu().clone() for k, v in folded(self.unet, state).items()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[UNet]:
        """Inside, the UNet holds its averaged weights (if there are any): for pictures and checks on the way."""
        if not (self.ema and self.ema.ready):
            yield self.unet
            return
        raw = {name: p.to("cpu", copy=True) for name, p in self.local_weights()}
        try:
            self._put_local(self.ema.average)
            yield self.unet
        finally:
            self._put_local(raw)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the parameters that learn; every process has all of them, and takes its share."""
        for name, p in self.trained.items():
            p.copy_(distribute_like(weights[name], p))

    def load_average(self, weights: Mapping[str, Tensor], step: int) -> None:
        """The same for the average of the first ``step`` steps."""
        if self.ema is None:
            raise RuntimeError("this run averages no weights")
        self.ema.load_state_dict(
            {name: local_tensor(distribute_like(weights[name], p)) for name, p in self.trained.items()}, step
        )

    def _put_local(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.local_weights():
            p.copy_(weights[name])


def style_rows(teacher: Tensor, num_styles: int) -> Tensor:
    """Teacher indices (B,) -> style rows (B, N+1); index N (the base) gives the row of zeros, "no style"."""
    hot = nn.functional.one_hot(teacher, num_styles + 1).float()
    rows = hot.clone()
    rows[:, -1] = 1.0 - hot[:, -1]  # the last column is the strength
    return rows


@contextlib.contextmanager
def compiler_explained() -> Iterator[None]:
    """Raises ValueError for what torch.compile cannot do on this machine, as where an earlier run was stopped while it wrote its cache."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"the student could not be compiled ({reason}): set compile to false. If a compiled run was stopped while it compiled, empty "
            "torch's cache instead (the folder torchinductor_... of temporary files, or TORCHINDUCTOR_CACHE_DIR)"
        ) from error
