"""The pool gives the UNets that were put in, whatever the policy, with two of them on the device at the most."""

import contextlib
import copy
import itertools

import pytest
import torch
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.training.teachers import pool as residency
from comfyui_dmm.training.teachers.pool import TeacherPool

from .families import SMALL, SMALL_XL

N = 4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def unets(count=N, config=SMALL):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(UNet(config))
    return made


def inputs(device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(9)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, SMALL.context_dim, generator=g)
    return x.to(device, dtype), torch.tensor([3, 700], device=device), context.to(device, dtype)


@torch.no_grad()
def answers(models, dtype=torch.float32):
    return [model.to(dtype)(*inputs(dtype=dtype)) for model in models]


@torch.no_grad()
def visited(pool, needed, dtype=torch.float32):
    return {i: unet(*inputs(pool.device, dtype)).cpu() for i, unet in pool.loaded(needed)}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 0, 3, 1], [1], [1, 1, 0, 1], []])
def test_offloaded_unets_answer_as_they_are(order, slots):
    expected = answers(unets())
    pool = TeacherPool(unets(), "cpu", "offload", slots=slots)
    for _ in range(2):
        assert [i for i, _ in pool.loaded(order)] == order
        for index, got in visited(pool, order).items():
            assert torch.equal(got, expected[index])
    assert len(pool.slots) <= slots


def test_no_more_than_two_are_on_the_device_and_each_is_copied_once():
    pool = TeacherPool(unets(), "cpu", "offload")
    list(pool.loaded(range(N)))
    assert len(pool.slots) == 2
    assert pool.copies == N
    assert not {w.untyped_storage().data_ptr() for slot in pool.slots for w in slot.unet.parameters()} & {
        w.untyped_storage().data_ptr() for unet in pool.unets for w in unet.parameters()
    }


def test_the_next_one_is_there_before_it_is_asked_for():
    pool = TeacherPool(unets(), "cpu", "offload")
    copies = [pool.copies for _ in pool.loaded([2, 0, 3])]
    assert copies == [2, 3, 3]
    pool.prefetch(1)
    assert pool.copies == 4
    pool.prefetch(1)
    pool.get(1)
    assert pool.copies == 4


def test_a_prefetch_of_what_is_not_visited_does_no_harm():
    expected = answers(unets())
    pool = TeacherPool(unets(), "cpu", "offload")
    for wrong in range(N):
        pool.prefetch(wrong)
        for index, got in visited(pool, [2, 0]).items():
            assert torch.equal(got, expected[index])


@pytest.mark.parametrize("slots", [1, 2])
def test_a_prefetch_leaves_alone_what_the_caller_works_with(slots):
    expected = answers(unets())
    pool = TeacherPool(unets(), "cpu", "offload", slots=slots)
    for index, others in itertools.product(range(N), itertools.permutations(range(N), 2)):
        unet = pool.get(index)
        for other in others:
            pool.prefetch(other)
        with torch.no_grad():
            assert torch.equal(unet(*inputs()), expected[index])


def test_a_visit_that_is_left_early_does_not_free_another_ones_place():
    expected = answers(unets())
    pool = TeacherPool(unets(), "cpu", "offload")
    left = pool.loaded([0, 1])
    next(left)
    mine = pool.get(3)
    left.close()
    pool.prefetch(1)
    pool.prefetch(2)
    with torch.no_grad():
        assert torch.equal(mine(*inputs()), expected[3])


def test_resident_ones_are_never_copied():
    expected = answers(unets())
    models = unets()
    pool = TeacherPool(models, "cpu", "offload", resident=[3])
    assert pool.get(3) is models[3]
    for _ in range(2):
        for index, got in visited(pool, [0, 3, 1, 3, 2]).items():
            assert torch.equal(got, expected[index])
            assert {slot.holds for slot in pool.slots} <= {0, 1, 2}
    before = pool.copies
    pool.prefetch(3)
    assert pool.copies == before


def test_a_resident_one_between_two_others_does_not_stop_the_copy_ahead():
    pool = TeacherPool(unets(), "cpu", "offload", resident=[3])
    copies = [pool.copies for _ in pool.loaded([0, 3, 1])]
    assert copies == [2, 2, 2]


def test_on_the_device_they_are_the_ones_that_were_put_in():
    models = unets()
    pool = TeacherPool(models, "cpu", "device")
    assert [unet for _, unet in pool.loaded(range(N))] == models
    assert not pool.slots
    assert pool.copies == 0


def test_one_unet_may_have_two_indices():
    expected = answers(unets(2))
    first, second = unets(2)
    pool = TeacherPool([first, second, first], "cpu", "offload")
    got = visited(pool, [2, 1, 0])
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("policy", ["device", "offload"])
def test_weights_are_converted_once_and_in_place(policy):
    expected = answers(unets(), torch.bfloat16)
    models = unets()
    pool = TeacherPool(models, "cpu", policy, torch.bfloat16)
    waits = policy == "offload"  # without CUDA as it is, perhaps in its file; converted on the way into a slot
    assert {p.dtype for unet in models for p in unet.parameters()} == {torch.float32 if waits else torch.bfloat16}
    for index, got in visited(pool, range(N), torch.bfloat16).items():
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected[index])


def test_half_precision_in_a_file_waits_there_and_answers_in_float32(tmp_path, monkeypatch):
    """auto: on the device what fits; what does not waits as it is, mapped, with one slot, and answers as a copy in float32."""
    from comfyui_dmm.training.teachers import pool as pools
    from comfyui_dmm.training.teachers.teacher import plain_unet
    from safetensors.torch import load_file, save_file

    for i, unet in enumerate(unets()):
        save_file({key: weight.half() for key, weight in unet.state_dict().items()}, tmp_path / f"{i}.safetensors")
    files = [load_file(tmp_path / f"{i}.safetensors") for i in range(N)]
    expected = answers([plain_unet(file, "a") for file in files])

    def unknown(device):
        raise ValueError("cannot read how much memory is free here")

    cases = (lambda device: 2**40, "device"), (lambda device: 1000, "offload"), (unknown, "device")
    for free, policy in cases:
        monkeypatch.setattr(pools, "available_bytes", free)
        models = [plain_unet(file, "a", copy=False) for file in files]
        pool = TeacherPool(models, "cpu", "auto", torch.float32)
        assert pool.policy == policy
        for index, got in visited(pool, [2, 0, 3, 1]).items():
            assert torch.equal(got, expected[index])
        if policy == "offload":
            assert len(pool.slots) == 1
            mapped = {w.data_ptr() for file in files for w in file.values()}
            assert {w.data_ptr() for unet in models for w in unet.state_dict().values()} <= mapped


@pytest.mark.parametrize("policy", ["device", "offload"])
def test_weights_keep_their_values_and_names_and_are_frozen(policy):
    models = unets(config=SMALL_XL)
    before = [{k: v.clone() for k, v in unet.state_dict().items()} for unet in models]
    models[1].gradient_checkpointing = True
    pool = TeacherPool(models, "cpu", policy)
    list(pool.loaded(range(N)))
    for index, unet in pool.loaded(range(N)):
        assert not unet.training
        assert not unet.gradient_checkpointing
        assert not any(p.requires_grad for p in unet.parameters())
        for held in (unet, models[index]):
            state = held.state_dict()
            assert state.keys() == before[index].keys()
            assert all(torch.equal(state[k], v) for k, v in before[index].items())


def test_every_weight_starts_where_fast_kernels_like_it():
    pool = TeacherPool(unets(1), "cpu", "offload", torch.bfloat16)
    starts = [w.storage_offset() * w.element_size() for w in pool.get(0).parameters()]
    assert all(start % 256 == 0 for start in starts)


def test_gradients_flow_through_to_the_input():
    pool = TeacherPool(unets(), "cpu", "offload", resident=[0])
    x, t, context = inputs()
    x.requires_grad_(True)
    pool.get(0)(x, t, context).sum().backward()
    assert x.grad.abs().sum() > 0


def test_closing_gives_the_places_back_and_can_be_repeated():
    models = unets()
    expected = answers(copy.deepcopy(models))
    pool = TeacherPool(models, "cpu", "offload")
    list(pool.loaded(range(N)))
    pool.close()
    pool.close()
    assert not pool.slots
    with torch.no_grad():  # the UNets are plain ones again
        assert all(torch.equal(unet(*inputs()), e) for unet, e in zip(models, expected))
    with pytest.raises(RuntimeError, match="closed"):
        pool.get(0)


def test_an_error_on_the_way_in_closes_the_rack(monkeypatch):
    closed = []
    monkeypatch.setattr(residency.TeacherPool, "close", lambda self: closed.append(self))
    monkeypatch.setattr(residency, "Layout", lambda *a: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        TeacherPool(unets(), "cpu", "offload")
    assert closed


def test_auto_keeps_them_on_the_cpu_when_that_is_the_device():
    assert TeacherPool(unets(), "cpu", "auto").policy == "device"


@pytest.mark.parametrize(("free", "policy"), [(4, "offload"), (100, "device")])
def test_auto_asks_for_the_memory_that_is_free(monkeypatch, free, policy):
    pool = TeacherPool(unets(), "cpu", "device")
    pool.device = torch.device("cuda")
    one = sum(p.numel() for p in pool.unets[0].parameters()) * 2
    monkeypatch.setattr(residency, "available_bytes", lambda device: free * one)
    assert pool._choose(torch.bfloat16) == policy


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="'ram'.*auto, device, offload"):
        TeacherPool(unets(1), "cpu", "ram")
    with pytest.raises(ValueError, match="slots is 3"):
        TeacherPool(unets(1), "cpu", "offload", slots=3)
    with pytest.raises(ValueError, match=r"resident names \[4\].*0 to 3"):
        TeacherPool(unets(), "cpu", "offload", resident=[4])
    with pytest.raises(ValueError, match="model 1 has other sizes"):
        TeacherPool([*unets(1), *unets(1, SMALL_XL)], "cpu", "offload")
    with pytest.raises(ValueError, match="no model 4"):
        TeacherPool(unets(), "cpu", "offload").get(4)


class Timeline:
    """Stands in for CUDA's streams and events: writes down in which order things were queued."""

    def __init__(self, pool, monkeypatch):
        self.log, self.pool, copy_ = [], pool, pool._copy
        timeline = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_event(self, event):
                timeline.log.append(("wait", self.name, event))

        class Event:
            def record(self, stream):
                timeline.log.append(("record", stream.name, self))

        @contextlib.contextmanager
        def stream_context(stream):
            timeline.log.append(("copy", stream.name, timeline.slot))
            yield

        def copy_into(index, slot):
            timeline.slot = slot
            copy_(index, slot)

        main, pool._stream = Stream("main"), Stream("copy")
        monkeypatch.setattr(pool, "_copy", copy_into)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream_context)

    def use(self, unet):
        self.log.append(("use", "main", next(slot for slot in self.pool.slots if slot.unet is unet)))

    def last(self, until, kind, slot):
        return max((i for i, entry in enumerate(self.log[:until]) if entry[::2] == (kind, slot)), default=-1)

    def waited_for(self, until, waiting, other, since):
        """Whether ``waiting`` waits, before ``until``, for an event that ``other`` recorded after ``since``."""
        recorded = {entry[2] for entry in self.log[since + 1 : until] if entry[:2] == ("record", other)}
        return any(entry[:2] == ("wait", waiting) and entry[2] in recorded for entry in self.log[:until])

    def check(self):
        copies = 0
        for i, (kind, _, slot) in enumerate(self.log):
            if kind == "copy":
                copies += 1
                assert self.waited_for(i, "copy", "main", self.last(i, "use", slot)), "overwritten while it computes"
            if kind == "use":
                assert self.waited_for(i, "main", "copy", self.last(i, "copy", slot)), "read before its copy is done"
        return copies


@pytest.mark.parametrize("slots", [1, 2])
def test_streams_wait_for_each_other(monkeypatch, slots):
    pool = TeacherPool(unets(), "cpu", "offload", slots=slots)
    timeline = Timeline(pool, monkeypatch)
    for order in ([0, 1, 2, 3], [2, 0], [1, 3, 0]):
        for _, unet in pool.loaded(order):
            timeline.use(unet)
        pool.prefetch(order[0])
        pool.prefetch(2)
        for i in (1, 2):
            timeline.use(pool.get(i))
            pool.prefetch(3)
    assert timeline.check() > 9


@needs_cuda
def test_on_cuda_offloaded_ones_answer_the_same_in_less_memory():
    sizes = {**vars(SMALL), "model_channels": 256}  # large enough for copies that take longer than a launch
    config, count, rounds = type(SMALL)(**sizes), 6, 3
    orders = [torch.randperm(count).tolist() for _ in range(rounds)]
    results, peaks = [], []
    for policy in ("device", "offload"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        models = unets(count, config)
        one = sum(p.numel() * 2 for p in models[0].parameters())
        pool = TeacherPool(models, "cuda", policy, torch.bfloat16)
        for order in orders:
            pool.prefetch(order[0])
            results.append(visited(pool, order, torch.bfloat16))
        peaks.append(torch.cuda.max_memory_allocated() - start)
        if policy == "offload":
            assert all(flat.is_pinned() for flat in pool._flat.values())
        pool.close()
        del pool, models
        assert torch.cuda.memory_allocated() - start < one
    for plain, offloaded in zip(results[:rounds], results[rounds:]):
        assert all(torch.equal(plain[i], offloaded[i]) for i in plain)
    assert peaks[1] < peaks[0] - 3 * one
