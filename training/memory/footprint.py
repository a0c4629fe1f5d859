"""The memory that a run needs, in bytes, found without a GPU and without allocating it.

Weights, gradients, optimiser state and averages follow from the shapes (modules on torch's "meta" device). What a step
needs on top of them is found by running the real step (teacher, student, losses, backward) on fake tensors, whose
storages have sizes and lifetimes but no memory, and adding up what is alive at the worst moment. What is assumed:

- attention never holds the L x L matrix: scaled_dot_product_attention runs one of its fused kernels, as it does on any CUDA card
  since 2017 and on the CPU. (Fake tensors live on the CPU here, so it is the CPU's fused kernel that is counted.)
- on CUDA, autocast runs norms and nearest upsampling in float32, which the CPU's autocast does not: ``_like_cuda_autocast`` adds that.
- a step with a single forward starts without gradients (``zero_grad(set_to_none=True)``); one that accumulates has them throughout.
- not counted: scratch memory inside one kernel (cuDNN's workspaces), the CUDA context, the allocator's gaps. The planner's margin
  is for these.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...dmm_core.bank import BankConfig
from ...dmm_core.unet import UNet, UNetConfig, Upsample
from ..config import OPTIMIZERS
from ..loop.adversary import Head, discriminator_loss, generator_loss
from ..loop.losses import feature_loss, score_loss
from ..loop.muon import is_matrix
from ..loop.new_student import choose_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAPTION_TOKENS = 77
WIDE = (nn.GroupNorm, nn.LayerNorm, Upsample)


@dataclass(frozen=True)
class Step:
    """All of a run that changes what one forward and backward needs, but the number of samples.

    config: of the teachers (no styles). base: of the base where it is a DMM model, None where it is as the teachers are.
    latents_hw: latent size. precision: of the arithmetic ("fp32", "bf16", "fp16"); teacher_dtype: of the teachers' weights, the same
    names. bank: the student's style bank. trainable: "all", "bank", "lora" or "style". features / adversarial: whether lambda_feat /
    lambda_adv are above 0. device: "cuda" or "cpu", for autocast's rules.
    """

    config: UNetConfig
    latents_hw: tuple[int, int] = (64, 64)
    styles: int = 8
    precision: str = "bf16"
    teacher_dtype: str = "bf16"
    gradient_checkpointing: bool = False
    trainable: str = "all"
    bank: BankConfig | None = None
    lora_rank: int = 32
    features: bool = True
    adversarial: bool = False
    accumulating: bool = True
    device: str = "cuda"
    base: UNetConfig | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes that stay in use from the first step to the last. student: weights (and adapters) in float32; trained: of
    those that learn, and so of their gradients and of their average; largest: of one of these. teacher: one. base: the model that answers
    for rows without a style. head: the discriminator with gradients and optimiser. optimizer: state by the optimiser's name.
    """

    student: int
    trained: int
    largest: int
    teacher: int
    base: int
    head: int
    optimizer: dict[str, int]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(shapes: Iterable[torch.Size], name: str) -> int:
    """Bytes of the state that the optimiser ``name`` keeps for parameters of these shapes (see
    ``optimizers.make_optimizer``).

    Adafactor factors the last two dimensions only: a 3x3 convolution keeps 6/9 of its size, a linear layer next to
    nothing. 8-bit Adam keeps two bytes and 8 bytes of scales per 256 values; small tensors (below 4096 values) stay in
    float32.
    """
    total = 0
    for shape in shapes:
        n = shape.numel()
        if name == "adafactor":
            total += 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        elif name == "adamw8bit" and n >= 4096:
            total += 2 * n + 8 * -(-n // 256)
        elif name == "muon" and is_matrix(shape):
            total += 4 * n
        else:
            total += 8 * n
    return total


def optimizer_state_bytes(student: UNet, trained: Sequence[nn.Parameter], name: str) -> int:
    """Bytes of the state that a run's optimiser keeps for a student's trained parameters."""
    style = {id(p) for p in (*student.style_parameters(), *student.bank_parameters())}
    network, side = ([p.shape for p in trained if (id(p) in style) == is_side] for is_side in (False, True))
    return optimizer_bytes(network, name) + optimizer_bytes(side, "adamw" if name == "muon" else name)


@functools.lru_cache(maxsize=64)
def sizes(step: Step) -> Sizes:
    """Exact, from the modules' shapes."""
    with torch.device("meta"):
        student, teacher, base = _student(step), UNet(step.config), UNet(step.base or step.config)
        head = Head(_middle_channels(step.config), step.styles)
    trained = [p for p in student.parameters() if p.requires_grad]
    for frozen in (teacher, base):
        frozen.to(DTYPES[step.teacher_dtype])
    return Sizes(
        student=tensor_bytes(student.parameters()),
        trained=tensor_bytes(trained),
        largest=max(tensor_bytes([p]) for p in trained),
        teacher=tensor_bytes(teacher.parameters()),
        base=tensor_bytes(base.parameters()),
        head=4 * tensor_bytes(head.parameters()) if step.adversarial else 0,  # weights, gradients, AdamW's two moments
        optimizer={name: optimizer_state_bytes(student, trained, name) for name in OPTIMIZERS},
    )


@functools.lru_cache(maxsize=64)
def step_peak(step: Step, batch: int) -> int:
    """Bytes that a forward and backward of ``batch`` samples needs at its worst moment, on top of ``sizes`` (gradients
    included there).

    Seconds of one CPU core, hardly any memory. All rows are taken to be one teacher's: the worst case of a teacher's
    forward, and with a DMM model as the base its own.
    """
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode():  # ComfyUI calls nodes in inference mode
        student, teacher = _student(step), _teacher(step)
        if step.device == "cuda" and step.precision != "fp32":
            _like_cuda_autocast(student)
            _like_cuda_autocast(teacher)
        head = Head(_middle_channels(step.config), step.styles) if step.adversarial else None
        modules = [student, teacher] + ([head] if head else [])
        known = [p for module in modules for p in module.parameters()]
        trained = [p for p in known if p.requires_grad]
        if step.accumulating:
            for p in trained:
                p.grad = torch.empty_like(p)
        with Allocations([*known, *(p.grad for p in trained if p.grad is not None)]) as memory:
            _one_step(step, batch, student=student, teacher=teacher, head=head)
        # All gradients are alive at the end, so that ``peak`` holds them where they were not known.
        return memory.peak - (0 if step.accumulating else tensor_bytes(trained))


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations create inside the context: ``now``, and ``peak``.

    Works on fake and on real tensors. Storages of ``known`` are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        self._known = [t.untyped_storage() for t in known]  # held, so that an address is not given out again
        self._not_counted = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._not_counted:  # a view, or an operation in place
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _like_cuda_autocast(unet: UNet) -> None:
    """Run some layers in float32, as CUDA's autocast does and the CPU's does not (in place; AT_FORALL_FP32 in torch's
    autocast_mode.h)."""
    for module in unet.modules():
        if isinstance(module, WIDE):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))


def _student(step: Step) -> UNet:
    """A student as the run's own code makes it, with its trainable parameters chosen."""
    student = UNet(dataclasses.replace(step.config, num_styles=step.styles, bank=step.bank))
    choose_trained(student, step.trainable, lora_rank=step.lora_rank, precision=step.precision)
    student.gradient_checkpointing = step.gradient_checkpointing
    return student


def _teacher(step: Step) -> UNet:
    """A frozen teacher in its dtype, norms in float32 as their inputs are (Module.to does not convert fake tensors)."""
    with torch.device("meta"):
        teacher = UNet(step.base or step.config)
    norms = {name for name, module in teacher.named_modules() if isinstance(module, WIDE[:2])}
    weights = {}
    for key, value in teacher.state_dict().items():
        dtype = torch.float32 if key.rpartition(".")[0] in norms else DTYPES[step.teacher_dtype]
        weights[key] = torch.empty(value.shape, dtype=dtype, device="cpu")
    teacher.load_state_dict(weights, assign=True)
    return teacher.requires_grad_(False)


def _middle_channels(config: UNetConfig) -> int:
    return config.channel_mult[-1] * config.model_channels


def _one_step(step: Step, batch: int, *, student: UNet, teacher: UNet, head: Head | None) -> None:
    """The order of ``loop.trainer.Trainer``: teacher, student, losses, backward, discriminator."""
    config, wide = step.config, DTYPES[step.teacher_dtype]
    cast = torch.autocast(
        "cpu", DTYPES[step.precision], enabled=step.precision != "fp32", cache_enabled=not step.gradient_checkpointing
    )
    x_t = torch.randn(batch, config.in_channels, *step.latents_hw)
    t = torch.zeros(batch, dtype=torch.int64)
    context = torch.randn(batch, CAPTION_TOKENS, config.context_dim)
    y = torch.randn(batch, config.adm_channels) if config.adm_channels else None
    rows = torch.randn(batch, step.styles + 1)
    narrow = (t, context.to(wide), None if y is None else y.to(wide))
    with torch.no_grad():
        with cast:
            target = teacher(x_t.to(wide), *narrow, features=step.features)
        target, theirs = target if step.features else (target, [])
        target, theirs = target.float(), [torch.cat([block]) for block in theirs]  # the rows of all teachers: a copy
    with cast:
        out = student(x_t, t, context, y, style=rows, features=step.features)
    out, ours = out if step.features else (out, [])
    loss = score_loss(out, target).mean()
    if step.features:
        loss = loss + feature_loss(ours, theirs).mean()
    judged = None
    if head:
        teacher.gradient_checkpointing = step.gradient_checkpointing
        with cast:
            fake = teacher.middle((x_t - out).to(wide), *narrow)
        with torch.no_grad(), cast:
            real = teacher.middle(target.to(wide), *narrow)
        loss = loss + generator_loss(head, fake, t).mean()
        judged = discriminator_loss(head, fake, real, t).mean()
    loss.backward()
    if judged is not None:
        judged.backward()
