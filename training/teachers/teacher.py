"""``Teacher``: a frozen UNet with its text encoder's states of the captions, how it is called, and checks of several
together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...dmm_core.metadata import StyleInfo
from ...dmm_core.sdxl import SIZE_CHANNELS, sdxl_vector
from ...dmm_core.style import MLP_NAMES, no_style_row, style_row
from ...dmm_core.unet import UNet, UNetConfig, load_unet
from ...dmm_core.weights_file import is_finite
from ..files.hashing import PART, tensor_sha256, weights_sha256
from ..files.remembered import Stamps, remembered
from ..parallel.devices import sent


class StoredRows(Protocol):
    """Text states of U distinct captions, of shape (U, ...), in files that are read when rows are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B,) -> (B, ...) float32"""

    def fingerprint(self) -> str:
        """Changes when any of the states changes."""


Rows = Tensor | StoredRows


def rows_fingerprint(rows: Rows) -> str:
    return tensor_sha256(rows) if isinstance(rows, Tensor) else rows.fingerprint()


class Prediction(NamedTuple):
    """What a UNet says to a batch. out: (B, C, h, w) float32, eps or v; features: of its blocks, (B, C_j, h_j, w_j)
    each, [] where they were not asked for."""

    out: Tensor
    features: Sequence[Tensor]


@dataclass
class Teacher:
    """A frozen UNet with a name.

    contexts: (U, L, d), its text encoder's states of every distinct caption, row 0 of the empty prompt; pooled: (U, p),
    the pooled text of SDXL's second encoder. prediction: "eps" or "v"; zero_snr: its noise schedule ends in pure noise.
    style: of a UNet that is itself a DMM model, which of its styles this teacher is, or which mix of them (index:
    share); None for no style. The remaining fields are recorded in the style's metadata; ``known`` is what an older DMM
    file says of the style, and is recorded as it is. told: prediction and noise schedule where a config or a yaml says another than the
    file alone, "" otherwise. at_base: of a DMM model with a style bank, its own weights are its base's (``style_file.centred_at_base``).
    stamps: of the files that its weights were read from, taken before that, where they are nothing else.
    """

    name: str
    unet: UNet
    contexts: Rows
    pooled: Rows | None = None
    prediction: str = "eps"
    zero_snr: bool = False
    description: str = ""
    file: str = ""
    sha256: str = ""
    licence: str = ""
    style: int | Mapping[int, float] | None = None
    known: StyleInfo | None = None
    told: str = ""
    at_base: bool = False
    stamps: Stamps | None = None

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False).eval()

    @property
    def style_row(self) -> Tensor | None:
        """The style row (1, n+1) with which its UNet is called, n the styles that the UNet has; None for a plain
        UNet."""
        styles = self.unet.config.num_styles
        if not styles:
            return None
        return no_style_row(styles) if self.style is None else style_row(styles, self.style)

    def info(self) -> StyleInfo:
        """What the student's file records of the style that is learnt from this teacher."""
        return self.known or StyleInfo(
            self.name.strip(), self.description, teacher=self.file, sha256=self.sha256, licence=self.licence
        )

    def as_style(self, index: int, info: StyleInfo) -> Teacher:
        """One style of this DMM model as a teacher of its own; they share the UNet and the text states."""
        one = dataclasses.replace(self, name=info.name, style=index, known=info)
        one.weights_sha256 = self.weights_sha256  # one UNet, hashed once
        return one

    def goes_on_as(self, style: StyleInfo) -> None:
        """Teach what the run's base knows as ``style`` already: what its file says of the style stays, but for where it was learnt from
        and for what this teacher says of itself (in place; call it once file and sha256 are known)."""
        self.known = dataclasses.replace(
            style,
            teacher=self.file,
            sha256=self.sha256,
            description=self.description or style.description,
            licence=self.licence or style.licence,
        )

    @cached_property
    def weights_sha256(self) -> str:
        """``hashing.weights_sha256`` of the UNet's values in float32, whatever it has them in, at the time of the first call; a run
        calls it before it converts the weights."""
        return self.hashed()

    def hashed(self) -> str:
        """``weights_sha256``, computed, or remembered of its files."""
        return remembered(
            "UNet's values in float32, as read by version 1",
            self.stamps,
            lambda: weights_sha256(self.unet.state_dict(), torch.float32),
        )

    # The one place where a teacher is called. What goes in and what comes out:
    #
    #   x_t    (B, C, h, w)  noisy latents, scaled as the UNet sees them, on the device of the UNet, any float dtype
    #   t      (B,) int64    timesteps 0..999, there too
    #   rows   (B,) int64    captions, as rows of ``contexts`` and ``pooled`` (0 is the empty prompt), on any device
    #   style  (B, n+1)      rows for a UNet with n styles (``dmm_core.style``), None for the teacher's own ``style_row``
    #   out    (B, C, h, w)  eps or v, as ``prediction`` says, float32; features: each block's output, as the UNet computed it
    #
    # The UNet computes in the dtype of its weights, to which predict converts; autocast and gradients are the caller's.

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        rows: Tensor,
        style: Tensor | None = None,
        *,
        features: bool = False,
        unet: UNet | None = None,
    ) -> Prediction:
        """What the teacher predicts, see above. unet: where its weights are now, None for its own; or another UNet of
        this text encoder and parameterisation."""
        unet = unet or self.unet
        if style is None and unet.config.num_styles:
            style = self.style_row
        dtype, device = unet.dtype, x_t.device
        context, y = self.conditioning(rows, x_t.shape[2:], device)
        out = unet(
            x_t.to(dtype),
            t,
            context.to(dtype),
            y=None if y is None else y.to(dtype),
            style=None if style is None else sent(style.expand(len(t), -1), device),
            features=features,
        )
        out, blocks = out if features else (out, [])
        return Prediction(out.float(), blocks)

    def conditioning(self, rows: Tensor, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """context (B, L, d) and, for SDXL, y (B, adm) of captions (B,) for latents of the size (h, w), on the
        device."""
        rows = rows.cpu()
        context = sent(self.contexts[rows], device)
        if self.pooled is None:
            return context, None
        height, width = size
        return context, sent(sdxl_vector(self.pooled[rows], 8 * height, 8 * width), device)


class HasName(Protocol):
    """Anything that has a name."""

    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=HasName)


def in_style_order(styles: Sequence[StyleInfo], teachers: Sequence[Named]) -> list[Named]:
    """The teachers in the order of a DMM model's styles, each of them of its name (case and spaces aside).

    Raises ValueError naming the styles that no teacher has the name of, and the teachers that no style has the name of.
    """
    named = {teacher.name.strip().casefold(): teacher for teacher in teachers}
    names = [style.name.strip().casefold() for style in styles]
    missing = [style.name for style, name in zip(styles, names) if name not in named]
    strange = [teacher.name for name, teacher in named.items() if name not in names]
    problems = [f"no teacher for {', '.join(missing)}"] if missing else []
    problems += [f"no style {', '.join(strange)} in it"] if strange else []
    if problems:
        raise ValueError(
            f"the base is a DMM model that goes on with the styles that it has, each with the teacher of its name: {'; '.join(problems)}. "
            f"Its styles are {', '.join(style.name for style in styles)} (more styles: Add Teacher to DMM, dmm add-teacher)"
        )
    return [named[name] for name in names]


def plain_unet(
    sd: Mapping[str, Tensor], name: str, copy: bool = True, look: bool = True, *, heads: Sequence[int] = ()
) -> UNet:
    """A frozen, style-less UNet from a state dict; ValueError (naming the teacher) for styles, NaN or a foreign layout.

    copy: False makes its weights the tensors of ``sd`` themselves; look: False skips the search for NaN; heads: as of ``load_unet``.
    """
    unet = sound_unet(sd, name, copy, look, heads=heads)
    if unet.config.num_styles:
        raise ValueError(
            f"{name} is itself a DMM model with {unet.config.num_styles} styles: use a plain checkpoint (new teachers for a DMM "
            "model: Add Teacher to DMM, dmm add-teacher)"
        )
    return unet


def styled_unet(sd: Mapping[str, Tensor], name: str, *, heads: Sequence[int] = ()) -> UNet:
    """A frozen DMM UNet from a state dict; ValueError (naming it) for one without styles, NaN or a foreign layout."""
    unet = sound_unet(sd, name, heads=heads)
    if not unet.config.num_styles:
        raise ValueError(
            f"{name} has no styles: it is a plain checkpoint, not a DMM model (Distill Teachers makes one)"
        )
    return unet


def sound_unet(
    sd: Mapping[str, Tensor], name: str, copy: bool = True, look: bool = True, *, heads: Sequence[int] = ()
) -> UNet:
    """A UNet from a state dict; ValueError, naming it, for NaN or a foreign layout. copy, look, heads: as of
    ``plain_unet``."""
    try:
        unet = load_unet(sd, copy=copy, heads=heads)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for key, tensor in unet.state_dict().items() if look else ():
        if not is_finite(tensor):
            raise ValueError(f"{name} has NaN or infinite weights in '{key}': the file is damaged, get it again")
    return unet


def without_styles(config: UNetConfig) -> UNetConfig:
    """The sizes of the same network without a style side."""
    return dataclasses.replace(config, num_styles=0, style_mlp=MLP_NAMES[0], bank=None)


def check_architectures(base: UNetConfig, teachers: Sequence[tuple[str, UNetConfig]]) -> None:
    """Raises ValueError naming every teacher whose sizes differ from the base's, and the sizes that differ; styles
    aside."""
    problems = []
    for name, config in teachers:
        ours, theirs = ({**dataclasses.asdict(without_styles(c)), "num_heads": c.all_heads} for c in (base, config))
        different = [f"{k} {theirs[k]} instead of {ours[k]}" for k in ours if ours[k] != theirs[k]]
        if different:
            problems.append(f"'{name}' has {', '.join(different)}")
    if problems:
        raise ValueError(f"teachers of another architecture than the base model: {'; '.join(problems)}")


def check_schedules(zero_snr: bool, teachers: Iterable[tuple[str, bool]]) -> None:
    """Raises ValueError naming every teacher whose noise schedule ends otherwise than the base's (``zero_snr``): the
    same timestep would mean another noise level to it."""
    other = [name for name, theirs in teachers if theirs != zero_snr]
    if other:
        raise ValueError(
            f"teachers with another noise schedule (zero terminal SNR or not) than the base: {', '.join(other)}"
        )


def check_predictions(base: Teacher, teachers: Iterable[Teacher]) -> None:
    """Raises ValueError naming every eps-prediction teacher of a v-prediction base with zero terminal SNR.

    v = (eps - sqrt(1 - abar) x_t) / sqrt(abar), and that schedule ends at 1 / sqrt(abar) = 4519, by which an error of
    eps would be multiplied.
    """
    if base.zero_snr and base.prediction == "v":
        eps = [teacher.name for teacher in teachers if teacher.prediction == "eps"]
        if eps:
            raise ValueError(
                f"eps-prediction teachers for a v-prediction base with zero terminal SNR: {', '.join(eps)}. In pure noise eps says "
                "nothing of a picture: use teachers that predict v"
            )


def check_text(teachers: Iterable[Teacher]) -> None:
    """Raises ValueError naming the first teacher whose text states have other widths than its UNet takes."""
    empty = torch.zeros(1, dtype=torch.long)
    for teacher in teachers:
        config = teacher.unet.config
        pooled = 0 if teacher.pooled is None else teacher.pooled[empty].shape[-1]
        given = (teacher.contexts[empty].shape[-1], pooled + SIZE_CHANNELS if pooled else 0)
        if given != (config.context_dim, config.adm_channels):
            raise ValueError(
                f"'{teacher.name}': its text encoder gives contexts of width {given[0]} and a pooled conditioning of {given[1]}, its "
                f"UNet takes {config.context_dim} and {config.adm_channels}: give it the text encoder of its own file (the refiner of "
                "SDXL and unCLIP models cannot be distilled)"
            )


def soup(teachers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the teachers' weights in float32 ("model soup", arXiv:2203.05482), a starting point and a
    baseline."""
    first, *others = teachers
    means = {}
    for key, weight in first.items():
        mean = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        # A few megabytes at a time: they stay in the processor's cache, which takes a third of the time of whole tensors.
        parts = [tensor.detach().flatten().split(PART) for tensor in (weight, *(other[key] for other in others))]
        for sums, own, *theirs in zip(mean.view(-1).split(PART), *parts):
            sums.copy_(own)
            for part in theirs:
                sums += part
            sums /= len(teachers)
        means[key] = mean
    return means
