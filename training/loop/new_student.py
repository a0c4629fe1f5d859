"""Where a student starts, and which of its parameters learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...dmm_core.bank import BankConfig
from ...dmm_core.bank_fit import fit_bank
from ...dmm_core.bank_size import bank_of, layout_of
from ...dmm_core.style import CODEBOOK, MLP_NAMES, mlp_name
from ...dmm_core.unet import UNet, UNetConfig, init_style, load_unet
from ..config import TrainConfig
from ..seeds import hash_seed
from ..teachers.teacher import Teacher, soup, without_styles
from .adapters import add_lora
from .bank_start import FILE_ITEMSIZE, bank_start

STYLE_SIDE = tuple(f"{name}." for name in (CODEBOOK, *MLP_NAMES))


def new_student(base: UNet, teachers: Sequence[Teacher], config: TrainConfig) -> UNet:
    """A UNet with a style per teacher, on the CPU, what learns in float32; its start follows from config and seed alone.

    Where ``base`` is a DMM model, a teacher that is one of its styles begins with that style's code, and every other one with a
    random code; network and style MLP are the base's. Where the base has a style bank, it goes on with the teachers of its own styles, in
    their order (``goes_on``), or with more styles or fewer (``bank_start``); init "bank" is "base" then, since it has one. Raises
    ValueError for init "soup", and for init "bank" of a model with styles and no bank: they would lose what it knows.
    """
    grown, again = base.config.num_styles > 0, goes_on(base, teachers)
    banks = config.init == "bank" and not base.config.bank  # it gets a bank of its own
    if grown and (banks or config.init == "soup"):
        raise ValueError(f"init is {config.init!r}: a model that has styles already goes on from itself (init: base)")
    if base.config.bank and any(teacher.unet is base for teacher in teachers):
        return ready(load_unet(bank_start(base, teachers, config), heads=base.config.num_heads), config)
    if base.config.bank and not again:
        raise ValueError(
            "the base is a DMM model with a style bank, which goes on with the styles that it has, and no others yet: start from a plain "
            "model"
        )
    sizes = {**vars(base.config), "num_styles": len(teachers)}
    if not grown:
        sizes["style_mlp"] = mlp_name(bool(sizes["adm_channels"]))
    if banks:
        sizes["bank"] = student_bank(base.config, len(teachers), config)
        source = banked(base, teachers, config)
    else:
        source = soup([t.unet.state_dict() for t in teachers]) if config.init == "soup" else base.state_dict()
    codes = None if again else source.pop(f"{CODEBOOK}.weight", None)
    student = filled(UNetConfig(**sizes), source, torch.Generator().manual_seed(hash_seed(config.seed, "style")))
    if banks:
        nn.init.zeros_(student.style_mlp.linear_2.weight)  # at first the bank alone makes the styles
        nn.init.zeros_(student.style_mlp.linear_2.bias)
    for row, teacher in enumerate(teachers):
        if codes is not None and teacher.unet is base and isinstance(teacher.style, int):
            student.model_embedding.weight.data[row] = codes[teacher.style]
    return ready(student, config)


def filled(config: UNetConfig, source: dict[str, Tensor], generator: torch.Generator) -> UNet:
    """A UNet with contiguous copies of ``source`` in float32, on the CPU; a style side that has no source is new, by ``generator``.

    No memory is filled with random numbers that are overwritten. Takes the tensors out of ``source``, one after the other (in place).
    """
    with torch.device("meta"):
        student = UNet(config)
    shapes = {key: tensor.shape for key, tensor in student.state_dict().items()}
    style = {key for key, _ in student.named_parameters() if key.startswith(STYLE_SIDE)}
    if lost := sorted(shapes.keys() - source.keys() - style):
        raise AssertionError(f"nothing says what {lost[:4]} begin as")
    student.load_state_dict({key: torch.empty(shapes[key]) for key in style}, strict=False, assign=True)
    if style:
        init_style(student, generator)
    student.load_state_dict({key: source.pop(key) for key in style & source.keys()}, strict=False)
    weights = {key: torch.empty(shapes[key]).copy_(source.pop(key)) for key in shapes.keys() & source.keys()}
    student.load_state_dict(weights, strict=False, assign=True)
    return student


def ready(student: UNet, config: TrainConfig) -> UNet:
    """The student, with what learns chosen (in place)."""
    generator = torch.Generator().manual_seed(hash_seed(config.seed, "lora"))
    choose_trained(
        student.float(), config.trainable, lora_rank=config.lora_rank, precision=config.precision, generator=generator
    )
    student.gradient_checkpointing = config.gradient_checkpointing
    return student


def goes_on(base: UNet, teachers: Sequence[Teacher]) -> bool:
    """Whether a base with a style bank, such as a merged model, learns more of the styles that it has, from other models."""
    others = all(teacher.unet is not base for teacher in teachers)
    return base.config.bank is not None and len(teachers) == base.config.num_styles and others


def student_bank(unet: UNetConfig, teachers: int, config: TrainConfig) -> BankConfig:
    """The bank of a student with ``init`` "bank", whose last core is that of the base. unet: of the teachers."""
    shapes = plain_shapes(unet)
    return layout_of(shapes, bank_of(config.bank, shapes, teachers + 1, FILE_ITEMSIZE, styles=teachers), teachers + 1)


def banked(base: UNet, teachers: Sequence[Teacher], config: TrainConfig) -> dict[str, Tensor]:
    """The teachers' mean and the bank of what sets each of them, and the base, apart; float32."""
    shapes, models = plain_shapes(base.config), [teacher.unet.state_dict() for teacher in teachers]
    size = bank_of(config.bank, shapes, len(teachers) + 1, FILE_ITEMSIZE, styles=len(teachers))
    with torch.no_grad():
        fitted = fit_bank(models, base.state_dict(), size.rank, shapes=shapes, bias=size.bias, dtype=torch.float32)
        return {key: weight for one in fitted for key, weight in one.weights.items()}


def plain_shapes(unet: UNetConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a UNet's weights without a style side."""
    with torch.device("meta"):
        return {key: tuple(weight.shape) for key, weight in UNet(without_styles(unet)).state_dict().items()}


def choose_trained(
    student: UNet, trainable: str, *, lora_rank: int, precision: str, generator: torch.Generator | None = None
) -> None:
    """Turn off the gradients of what does not learn, and attach low-rank adapters for "lora" (in place). Raises ValueError for "bank"
    where there is none.

    With half-precision arithmetic, frozen matrices are kept in float16, which is what checkpoint files have, so that nothing is lost.
    """
    if trainable == "all":
        return
    learns = [*student.style_parameters(), *(student.bank_parameters() if trainable == "bank" else [])]
    if trainable == "bank" and not student.config.bank:
        raise ValueError(
            "trainable is 'bank', and the student has no style bank: set init to bank, or go on from a merged model"
        )
    style = {id(p) for p in learns}
    for module in student.modules():
        for name, p in module.named_parameters(recurse=False):
            half = precision != "fp32" and id(p) not in style and p.ndim > 1
            value = p.detach().half() if half else p.detach()
            setattr(module, name, nn.Parameter(value, requires_grad=id(p) in style))
    if trainable == "lora":
        add_lora(student, lora_rank, lora_rank, generator)
