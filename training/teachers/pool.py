"""``TeacherPool``: keeps frozen UNets on the device, or in RAM with one or two places on the device.

Distilling N teachers on one GPU needs one of them at a time. With "offload" a teacher's weights are ONE flat tensor in
RAM (pinned when the device is CUDA, so that the copy runs beside the arithmetic) and a place on the device, a ``Slot``,
is one flat tensor of the same layout: fetching a teacher is a single copy. The next one is copied while this one
computes, or while the student trains. Without CUDA they wait as they are, which may be mapped from their files in half
precision, and are converted on the way into a slot.

Two rules keep that right, and on CUDA each is an event between the streams:
- a slot is overwritten only after the work that was queued on its last owner (``Slot.done``);
- a slot is read only after its copy (``Slot.ready``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ...dmm_core.unet import UNet, UNetConfig
from ..parallel.devices import available_bytes

logger = logging.getLogger(__name__)

POLICIES = ("auto", "device", "offload")
ALIGNMENT = 256  # bytes: where each weight starts within the flat tensor, as fast kernels like it


class Layout:
    """Where each weight of an architecture lies within one flat tensor of ``size`` elements.

    itemsize: bytes of an element, for the alignment.
    """

    def __init__(self, unet: UNet, itemsize: int):
        self.places: dict[str, tuple[int, torch.Size]] = {}
        step, self.size = ALIGNMENT // itemsize, 0
        for key, weight in unet.state_dict().items():
            self.places[key] = (self.size, weight.shape)
            self.size += -(-weight.numel() // step) * step

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights by their keys, as views of a flat tensor (size,)."""
        return {key: flat[start : start + shape.numel()].view(shape) for key, (start, shape) in self.places.items()}


class Slot:
    """A place for one teacher on the device. ``holds``: the index of the teacher in it, or None; ``used``: it was given
    out since it was copied; ``ready``: its copy is done; ``done``: the work that was queued on its last owner is done
    (None without CUDA)."""

    def __init__(self, layout: Layout, config: UNetConfig, device: torch.device, dtype: torch.dtype):
        self.flat = torch.empty(layout.size, dtype=dtype, device=device)
        with torch.device("meta"):
            self.unet = UNet(config)  # its own weights never exist: they are views of ``flat``
        self.unet.load_state_dict(layout.views(self.flat), assign=True)
        self.unet.requires_grad_(False).eval()
        self.holds: int | None = None
        self.used = False
        self.ready: torch.cuda.Event | None = None
        self.done: torch.cuda.Event | None = None


class TeacherPool:
    """Frozen UNets by index (teachers 0..N-1, the base N; one UNet may have several), and where they live. Those that
    are not resident have one architecture.

    policy: where they live. "device": all of them on the device. "offload": in RAM, at most ``slots`` (2, or 1: no
    copying ahead while a teacher computes) on the device at a time. "auto": "device" if all of them fit into half of
    the memory that is free now, so make the pool after the student has moved in; else "offload", without CUDA with one slot,
    as nothing is copied beside the arithmetic there. resident: indices that stay on the
    device whatever the policy is. dtype: of the weights, None for what each UNet has (those that wait: what the first
    of them has).

    The pool owns the UNets from now on: they are converted to ``dtype`` IN PLACE (all but those that wait without CUDA), because
    a second copy of N teachers does not fit into many machines' RAM. So read whatever needs their original values (hashes, the
    student's start) before. At the most one UNet exists twice, while it is packed. After ``close`` they are on the CPU.
    late: a UNet is converted and packed when it is first asked for, for a process that asks for few of them.

    A UNet that ``get`` or ``loaded`` gave out holds until the next one is asked for. Gradients may not flow through the
    weights of one that is not resident: they may be overwritten before the backward pass.

    Raises ValueError for an unknown policy or index, or waiting UNets of different sizes.
    """

    def __init__(
        self,
        unets: Sequence[UNet],
        device: torch.device | str,
        policy: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        resident: Collection[int] = (),
        slots: int = 2,
        late: bool = False,
    ):
        self.unets, self.device = list(unets), torch.device(device)
        self.copies = self.moved_bytes = 0  # to the device so far
        self._check(policy, resident, slots)
        self.policy = self._choose(dtype) if policy == "auto" else policy
        slots = 1 if policy == "auto" and self.device.type != "cuda" else slots
        self.resident = frozenset(range(len(unets)) if self.policy == "device" else resident)
        self._check_waiting()
        self.slots: list[Slot] = []
        self._max_slots = slots
        self._flat: dict[int, Tensor] = {}  # by index: all weights of a UNet that waits in RAM
        self._given: Slot | None = None  # the slot whose UNet the caller works with
        self._turn = 0  # counts what was given out
        self._closed = False
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._settled: set[int] = set()  # indices of UNets that are where they belong
        try:
            self._place(dtype, late)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.unets)

    def loaded(self, needed: Sequence[int]) -> Iterator[tuple[int, UNet]]:
        """(index, UNet on the device) for every index of ``needed``, in that order; the next is copied while this one
        computes."""
        order = list(needed)
        for place, index in enumerate(order):
            unet = self.get(index)
            turn = self._turn
            waiting = [i for i in order[place + 1 :] if i not in self.resident]
            if waiting:
                self.prefetch(waiting[0])
            try:
                yield index, unet
            finally:
                if self._turn == turn:  # else the caller has asked for another one meanwhile
                    self._give_back()
            if waiting:  # with a single slot this is the first moment at which there is room
                self.prefetch(waiting[0])

    def prefetch(self, index: int) -> None:
        """Start to copy a UNet to the device, if there is a slot that the caller does not work with. Only a hint:
        ``get`` works without."""
        self._check_index(index)
        self._settle(index)
        if index in self.resident or self._slot_of(index) is not None:
            return
        slot = self._room(keep_unused=False)
        if slot is not None:
            self._copy(index, slot)

    def get(self, index: int) -> UNet:
        """The UNet, on the device now (its copy may still run on the device: work queued on the current stream waits
        for it)."""
        self._check_index(index)
        self._give_back()
        self._turn += 1
        self._settle(index)
        if index in self.resident:
            return self.unets[index]
        slot = self._slot_of(index)
        if slot is None:
            slot = self._room(keep_unused=True) or self._room(keep_unused=False)
            assert slot is not None, "every slot is free once the caller's was given back"
            self._copy(index, slot)
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        slot.used, self._given = True, slot
        return slot.unet

    def close(self) -> None:
        """Give all device memory back; the UNets are plain CPU modules again. May be called twice, and after an
        error."""
        if self._closed:
            return
        self._closed, self._given = True, None
        if self._stream is not None:
            self._stream.synchronize()  # a copy that still runs must not write into memory that others get next
        self.slots.clear()
        for unet in self.unets:
            unet.to("cpu")
        for flat in self._flat.values():
            _unpin(flat)
        self._flat.clear()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check(self, policy: str, resident: Collection[int], slots: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"residency is {policy!r}: choose one of {', '.join(POLICIES)}")
        if slots not in (1, 2):
            raise ValueError(f"slots is {slots!r}: expected 1 or 2 places on the device")
        if outside := sorted(set(resident) - set(range(len(self.unets)))):
            raise ValueError(f"resident names {outside}, but the models are 0 to {len(self.unets) - 1}")

    def _check_waiting(self) -> None:
        self._waiting = [i for i in range(len(self.unets)) if i not in self.resident]
        for index in self._waiting:
            if self.unets[index].config != self.unets[self._waiting[0]].config:
                raise ValueError(
                    f"model {index} has other sizes than model {self._waiting[0]}: those that wait must have one architecture"
                )

    def _check_index(self, index: int) -> None:
        if self._closed:
            raise RuntimeError("the pool is closed: its models have left the device")
        if not 0 <= index < len(self.unets):
            raise ValueError(f"there is no model {index}: the models are 0 to {len(self.unets) - 1}")

    def _choose(self, dtype: torch.dtype | None) -> str:
        """The policy that "auto" stands for."""
        weights = [p for unet in {id(unet): unet for unet in self.unets}.values() for p in unet.parameters()]
        if self.device.type == "cpu":  # those of the right dtype are there already
            weights = [p for p in weights if dtype and p.dtype != dtype]
        need = sum(p.numel() * (dtype or p.dtype).itemsize for p in weights)
        try:
            free = available_bytes(self.device)
        except ValueError:
            if self.device.type != "cpu":
                raise
            return "device"  # Windows and macOS do not say how much is free
        return "device" if need <= free // 2 else "offload"

    def _place(self, dtype: torch.dtype | None, late: bool) -> None:
        """Freeze the UNets and, unless ``late``, put all of them where they belong."""
        for unet in self.unets:
            unet.requires_grad_(False).eval()
            unet.gradient_checkpointing = False
        # One for all, since they take turns in a slot.
        waiting = self.unets[self._waiting[0]].dtype if self._waiting else torch.get_default_dtype()
        self._dtype, self._waiting_dtype = dtype, dtype or waiting
        if self._waiting:
            self._layout = Layout(self.unets[self._waiting[0]], self._waiting_dtype.itemsize)
        for index in range(0 if late else len(self.unets)):
            self._settle(index)

    def _settle(self, index: int) -> None:
        """Put a UNet where it belongs, if it is not there yet."""
        if index in self._settled:
            return
        unet = self.unets[index]
        if index in self.resident:
            unet.to(self.device, self._dtype)
        elif self._stream is None:
            pass  # it waits as it is
        elif all(unet is not self.unets[i] for i in self._flat):
            self._flat[index] = self._pack(unet, self._waiting_dtype)
        else:  # one UNet under two indices
            self._flat[index] = next(flat for i, flat in self._flat.items() if self.unets[i] is unet)
        self._settled.add(index)

    def _pack(self, unet: UNet, dtype: torch.dtype) -> Tensor:
        """Move a UNet's weights into one flat tensor, of which they become views."""
        flat = torch.empty(self._layout.size, dtype=dtype)
        views = self._layout.views(flat)
        for key, weight in unet.state_dict().items():
            views[key].copy_(weight)
        unet.load_state_dict(views, assign=True)
        _pin(flat)
        return flat

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds == index), None)

    def _room(self, keep_unused: bool) -> Slot | None:
        """A slot to overwrite: a new one, one that has had its use, or (unless ``keep_unused``) one copied ahead in
        vain."""
        free = [slot for slot in self.slots if slot is not self._given]
        used = [slot for slot in free if slot.used]
        if used:
            return used[0]
        if len(self.slots) < self._max_slots:
            config = self.unets[self._waiting[0]].config
            self.slots.append(Slot(self._layout, config, self.device, self._waiting_dtype))
            self._mark(self.slots[-1])  # its memory may have been another tensor's a moment ago
            return self.slots[-1]
        return free[0] if free and not keep_unused else None

    def _copy(self, index: int, slot: Slot) -> None:
        """Copy a UNet's weights into a slot; on CUDA beside the arithmetic, and ``slot.ready`` says when it is done."""
        slot.holds, slot.used = None, False  # should the copy fail, the slot is empty
        if self._stream is None:
            self._fill(slot, index)
        else:
            assert slot.done is not None, "a slot is marked when it is made"
            self._stream.wait_event(slot.done)
            with torch.cuda.stream(self._stream):
                self._fill(slot, index)
                slot.ready = torch.cuda.Event()
                slot.ready.record(self._stream)
        slot.holds = index
        self.copies += 1
        self.moved_bytes += slot.flat.nbytes

    def _fill(self, slot: Slot, index: int) -> None:
        if index in self._flat:
            slot.flat.copy_(self._flat[index], non_blocking=True)
            return
        views = self._layout.views(slot.flat)
        for key, weight in self.unets[index].state_dict().items():
            views[key].copy_(weight)

    def _give_back(self) -> None:
        """The caller has queued all its work on the UNet it was given."""
        if self._given is not None:
            self._mark(self._given)
            self._given = None

    def _mark(self, slot: Slot) -> None:
        """Remember what is queued on the current stream: the slot may be overwritten after it."""
        if self._stream is not None:
            slot.done = torch.cuda.Event()
            slot.done.record(torch.cuda.current_stream(self.device))


def _pin(flat: Tensor) -> None:
    """Pin memory in place (``Tensor.pin_memory`` would round 5 GB up to 8). Where that fails copies work too, but not
    beside arithmetic."""
    if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
        return
    logger.warning("could not pin %.1f GB of memory: copying teachers to the GPU will be slower", flat.nbytes / 2**30)
    # CUDA reports an error once more with the next operation: let it be this one.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def _unpin(flat: Tensor) -> None:
    if flat.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
