"""Rollouts: every label is what the teacher's UNet says to the stored state, shares are equal, and building can be interrupted."""

import dataclasses
import itertools
import json

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.files import file_sha256
from comfyui_dmm.dmm_core.sampling import cfg_denoiser, sample, sigmas_for
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import UNet, load_unet
from comfyui_dmm.training.commands.demo import MODELS
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data import rollouts
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.data.cache import add_text
from comfyui_dmm.training.data.rollout_data import open_rollouts, share_out, size_of_batch
from comfyui_dmm.training.data.rollout_paths import (
    BASE_NAME,
    Owner,
    Recorder,
    RolloutSettings,
    paint_states,
    shifted_grid,
    timestep_grid,
)
from comfyui_dmm.training.data.rollouts import build_rollouts
from comfyui_dmm.training.data.shards import MANIFEST
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.teachers.teacher import Teacher
from comfyui_dmm.training.text import ClipText, init_text
from safetensors.torch import load_file

from .families import SIZES, SMALL, SMALL_XL

LONG = ", ".join(["a tall tree by the sea"] * 15)  # two windows
CAPTIONS = ["a red star", "a blue house", "a cat", LONG, "a dog"]
SCHEDULE = NoiseSchedule()


def unet(seed, config=SMALL):
    torch.manual_seed(seed)
    return dict(UNet(config).state_dict())


@pytest.fixture(scope="module")
def family():
    """A base and three teachers; "two" has a text encoder of its own and predicts v."""
    base = Checkpoint(unet=unet(0), text=init_text(16, 1))
    two = Checkpoint(unet=unet(2), text=init_text(16, 1, seed=7), prediction="v")
    return base, {"one": Checkpoint(unet=unet(1)), "two": two, "three": Checkpoint(unet=unet(3))}


SMALL_SETTINGS = RolloutSettings(paths=9, base_share=0.1, states=3, sizes=((64, 64), (96, 64)), steps=6, batch_size=4)


def build(folder, family, captions=CAPTIONS, progress=None, teachers=None, **changes):
    base, everyone = family
    settings = dataclasses.replace(SMALL_SETTINGS, **changes)
    return build_rollouts(folder, base, teachers or everyone, captions, settings=settings, progress=progress)


@pytest.fixture(scope="module")
def made(tmp_path_factory, family):
    folder = tmp_path_factory.mktemp("rollouts") / "r"
    return folder, build(folder, family)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def files_of(teachers):
    return {name: (checkpoint, f"{name}.safetensors") for name, checkpoint in teachers.items()}


# --- what is in them --------------------------------------------------------------------------------------------------


def test_every_label_is_the_unets_answer_to_the_stored_state(made, family):
    """Recomputed one by one from the files: x_t, t and contexts as stored, the caption from the manifest."""
    folder, counts = made
    assert counts == {"one": 27, "two": 27, "three": 27, BASE_NAME: 9}  # 0.1 / 0.9 * 27 paths = 3 paths of the base
    base, teachers = family
    manifest = json.loads((folder / MANIFEST).read_text())
    checked = 0
    for entry in manifest["owners"]:
        model = base if entry["role"] == "base" else teachers[entry["name"]]
        network, clip = load_unet(model.unet).eval(), ClipText(model.text or base.text)
        contexts, _ = open_rollouts(folder).text_of(model.text or base.text)
        every = torch.arange(len(contexts))
        torch.testing.assert_close(contexts[every], clip.encode(manifest["prompts"]), atol=2e-3, rtol=1e-3)
        assert entry["prediction"] == model.prediction
        for part in entry["parts"]:
            states = [load_file(folder / shard["file"]) for shard in part["shards"]]
            states = {k: torch.cat([s[k] for s in states]) for k in states[0]}
            assert len(states["t"]) == len(part["rows"]) == 3 * (len(part["rows"]) // 3)
            assert states["x_t"].shape[1:] == (4, part["size"][1] // 8, part["size"][0] // 8)
            assert {v.dtype for k, v in states.items()} == {torch.float16, torch.int64}
            for i, row in enumerate(part["rows"]):
                for label, told in (("cond", row), ("null", 0)):
                    with torch.no_grad():
                        out = network(
                            states["x_t"][i : i + 1].float(), states["t"][i : i + 1], contexts[torch.tensor([told])]
                        )
                    # Nothing but the label itself was rounded: half a step of float16 is 2^-11.
                    torch.testing.assert_close(states[label][i : i + 1].float(), out, atol=2e-5, rtol=2**-11)
                    checked += 1
                assert row != 0
            assert not torch.allclose(states["cond"].float(), states["null"].float(), atol=1e-3)
    assert checked == 2 * 90


def test_states_lie_on_the_path_at_their_timestep(family):
    """With every step kept, the states are those of the sampler itself, in the scaling of the timestep that is stored."""
    base, teachers = family
    clip = ClipText(base.text)
    contexts = clip.encode(["", "a red star", "a cat"])
    network = load_unet(teachers["one"].unet)
    teacher = Teacher("one", network, contexts)
    owner = Owner("teacher", "one", "u", "t", "eps", False)
    settings = dataclasses.replace(SMALL_SETTINGS, states=99, cfg=3.0)
    states = paint_states(teacher, owner, [1, 2], [0, 1], size=(64, 64), settings=settings)
    grid = [int(state["t"]) for state in states if state["path"] == 0]
    assert [int(state["t"]) for state in states] == 2 * grid and grid[0] == 999 and len(grid) in (6, 7)
    noise = torch.stack([states[0]["x_t"], states[len(grid)]["x_t"]]).float()  # at the top x_t is the noise itself
    assert 0.9 < noise.std() < 1.1
    seen = []
    denoiser = cfg_denoiser(network, SCHEDULE, contexts[1:], contexts[:1], cfg=3.0)
    sigmas = torch.cat([SCHEDULE.sigmas[grid], torch.zeros(1)])
    sample(denoiser, SCHEDULE, noise, sigmas, callback=lambda i, denoised, x, steps: seen.append(x))
    for state in states:
        x_t = seen[grid.index(int(state["t"]))][state["path"]] * SCHEDULE.alphas_cumprod[state["t"]].sqrt()
        torch.testing.assert_close(state["x_t"].float(), x_t, atol=1e-2, rtol=1e-2)  # float16 along the way


def test_the_recorder_guides_as_the_core_does(family):
    base, _ = family
    contexts = ClipText(base.text).encode(["", "a red star", LONG])
    teacher = Teacher("t", load_unet(base.unet), contexts)
    x, sigma = 3 * torch.randn(2, 4, 8, 8), SCHEDULE.sigmas[[500, 500]]
    keep = torch.tensor([[True, False]])
    recorder = Recorder(teacher, SCHEDULE, torch.tensor([1, 2]), cfg=5.0, keep=keep)
    expected = cfg_denoiser(teacher.unet, SCHEDULE, contexts[1:], contexts[:1], cfg=5.0)
    with torch.no_grad():
        torch.testing.assert_close(recorder(x, sigma), expected(x, sigma), atol=3e-2, rtol=1e-2)
    assert [state["path"] for state in recorder.kept] == [0] and int(recorder.kept[0]["t"]) == 500


def test_v_teachers_paint_what_their_prediction_means(family):
    _, teachers = family
    torch.manual_seed(0)
    contexts = torch.randn(2, 7, 16)
    network = load_unet(teachers["two"].unet)
    recorder = Recorder(
        Teacher("v", network, contexts, None, "v"), SCHEDULE, torch.tensor([1]), cfg=2.0, keep=torch.zeros(1, 1) > 0
    )
    x, sigma = torch.randn(1, 4, 8, 8), SCHEDULE.sigmas[[300]]
    expected = cfg_denoiser(network, SCHEDULE, contexts[1:], contexts[:1], cfg=2.0, prediction="v")
    with torch.no_grad():
        torch.testing.assert_close(recorder(x, sigma), expected(x, sigma), atol=1e-2, rtol=1e-2)


def test_sdxl_rollouts_know_their_size(tmp_path):
    from .test_text import reference, sd1_file, sd2_file

    small, big = reference(8, 2), reference(24, 2)
    text = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in sd1_file(small).items()}
    text |= sd2_file(big, "conditioner.embedders.1.model.")
    config = dataclasses.replace(SMALL_XL, context_dim=32, adm_channels=SIZES + 512)  # open_clip projects to 512
    base, teacher = (Checkpoint(unet=unet(seed, config), text=text) for seed in (0, 1))
    settings = RolloutSettings(paths=2, base_share=0, states=2, sizes=((64, 32), (32, 64)), steps=3)
    build_rollouts(tmp_path / "r", base, {"xl": teacher}, ["a cat"], settings=settings)
    data = open_rollouts(tmp_path / "r")
    contexts, pooled = data.text_of(text)
    with torch.no_grad():
        for which in range(2):
            part = data.states[which][0]
            x_t, t, cond = (part.reader.rows(name, torch.tensor([0])) for name in ("x_t", "t", "cond"))
            told = Teacher("xl", load_unet(teacher.unet), contexts, pooled)
            context, y = told.conditioning(part.rows[:1], x_t.shape[2:], torch.device("cpu"))
            torch.testing.assert_close(told.unet(x_t.float(), t, context, y=y), cond.float(), atol=3e-3, rtol=2e-3)
            other = told.conditioning(part.rows[:1], x_t.shape[2:][::-1], torch.device("cpu"))[1]
            assert not torch.allclose(told.unet(x_t.float(), t, context, y=other), cond.float(), atol=3e-3, rtol=2e-3)


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["sgm_uniform", "normal", "karras", "simple", "ddim_uniform"])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_shifted_grids_fall_from_the_top_and_reach_every_timestep(scheduler, steps):
    grid = timestep_grid(SCHEDULE, steps, scheduler)
    assert all(a > b for a, b in itertools.pairwise(grid))
    told = SCHEDULE.t_from_sigma(sigmas_for(SCHEDULE, steps, scheduler)[:-1]).tolist()
    assert set(grid) == set(told)
    reached = set()
    for shift in range(1000):
        shifted = shifted_grid(grid, shift / 1000)
        assert shifted[0] == 999 and shifted[-1] >= 0 and all(a > b for a, b in itertools.pairwise(shifted))
        assert torch.equal(SCHEDULE.t_from_sigma(SCHEDULE.sigmas[shifted]), torch.tensor(shifted))
        if len(shifted) > 2:  # a tiny first step would make DPM-Solver++(2M) extrapolate far
            assert shifted[0] - shifted[1] >= 0.2 * (grid[0] - grid[1])
        reached |= set(shifted)
    missing = set(range(grid[0])) - reached
    assert all(t > grid[0] - 0.3 * (grid[0] - (grid[1] if len(grid) > 1 else -1)) for t in missing)


def test_even_grids_make_timesteps_even():
    grid = timestep_grid(SCHEDULE, 25, "sgm_uniform")
    counts = torch.zeros(1000)
    for shift in torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist():
        counts[shifted_grid(grid, shift)] += 1
    bins = counts[:950].view(19, 50).sum(1)
    assert bins.max() / bins.min() < 1.25


# --- interrupted and extended -----------------------------------------------------------------------------------------


def test_interrupted_everywhere_ends_with_the_same_files(tmp_path, made, family, monkeypatch):
    whole = tmp_path / "whole"
    monkeypatch.setattr(rollouts, "SHARD_PATHS", 4)
    small = {"teachers": {"one": family[1]["one"]}, "steps": 3, "states": 2}
    build(whole, family, **small)
    folder, attempts = tmp_path / "r", 0
    for calls in itertools.count(1):
        count = itertools.count(1)

        def stop(done, total, what, count=count, calls=calls):
            assert 0 <= done <= total
            if next(count) == calls:
                raise KeyboardInterrupt

        before = identities(folder) if folder.exists() else {}
        try:
            build(folder, family, progress=stop, **small)
            break
        except KeyboardInterrupt:
            attempts += 1
            assert before.items() <= identities(folder).items()
            with pytest.raises(ValueError, match="not finished|not a cache"):
                open_rollouts(folder)
    assert attempts > 5 and content(folder) == content(whole)
    build(folder, family, **small)
    assert content(folder) == content(whole)


def test_another_seed_gives_other_states(tmp_path, family):
    small = {"teachers": {"one": family[1]["one"]}, "steps": 2, "states": 1, "paths": 2}
    for name, seed in (("a", 0), ("b", 1)):
        build(tmp_path / name, family, seed=seed, **small)
    a, b = (next(p for n, p in sorted(content(tmp_path / n).items()) if n.startswith("roll")) for n in "ab")
    assert a != b


def test_a_teacher_is_added_and_the_others_stay(tmp_path, family):
    base, teachers = family
    folder = tmp_path / "r"
    build(folder, family, teachers={k: teachers[k] for k in ("one", "two")})
    before = identities(folder)
    data = open_rollouts(folder).for_teachers(base, files_of({k: teachers[k] for k in ("one", "two")}))
    build(folder, family, teachers={"three": teachers["three"]}, base_share=0.0)
    after = identities(folder)
    assert {k: v for k, v in before.items() if "-00000" in k}.items() <= after.items()
    opened = open_rollouts(folder, verify=True)
    assert sorted(opened.names) == ["one", "three", "two"] and opened.has_base
    again = opened.for_teachers(base, files_of({k: teachers[k] for k in ("one", "two")}))
    assert again.fingerprint() == data.fingerprint() != opened.fingerprint()
    one, two = (d.batch(3, Draw(0, 8, 2, 0.1, 0.1, SCHEDULE)) for d in (data, again))
    assert torch.equal(one.x_t, two.x_t) and torch.equal(one.target, two.target)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_teachers_are_refused_by_name(made, family):
    folder, _ = made
    base, teachers = family
    data = open_rollouts(folder)
    changed = {**teachers["one"].unet, "out.2.bias": teachers["one"].unet["out.2.bias"] + 0.1}
    wrong = {**teachers, "one": Checkpoint(unet=changed), "new": Checkpoint(unet=unet(9))}
    with pytest.raises(
        ValueError, match=r"not painted by teacher 'one', teacher 'new' .* they are those of 'one', 'two', 'three'"
    ):
        data.for_teachers(base, files_of(wrong))
    with pytest.raises(ValueError, match="not painted by the base model"):
        data.for_teachers(Checkpoint(unet=unet(8), text=base.text), files_of(teachers))
    as_eps = dataclasses.replace(teachers["two"], prediction="eps")
    with pytest.raises(ValueError, match="not painted by teacher 'two'"):
        data.for_teachers(base, files_of({**teachers, "two": as_eps}))
    other_text = dataclasses.replace(teachers["two"], text=init_text(16, 1, seed=8))
    with pytest.raises(ValueError, match="text encoder of teacher 'two' is not in the cache.*dmm cache text"):
        data.for_teachers(base, files_of({**teachers, "two": other_text}))
    with pytest.raises(ValueError, match="rollouts of 3 teachers for a run of 2"):
        data.batch(0, Draw(0, 4, 2, 0.0, 0.0, SCHEDULE))
    renamed = data.for_teachers(base, files_of({"drei": teachers["three"], "eins": teachers["one"]}))
    assert renamed.names == ["drei", "eins"]
    half = {
        name: Checkpoint(**{**vars(c), "unet": {k: v.half() for k, v in c.unet.items()}})
        for name, c in teachers.items()
    }
    data.for_teachers(base, files_of(half))  # the same weights in another precision


def test_a_base_share_needs_paths_of_the_base(tmp_path, family):
    base, teachers = family
    build(tmp_path / "r", family, teachers={"one": teachers["one"]}, base_share=0.0, paths=2, steps=2, states=1)
    data = open_rollouts(tmp_path / "r").for_teachers(base, files_of({"one": teachers["one"]}))
    data.batch(0, Draw(0, 4, 1, 0.0, 0.1, SCHEDULE))
    with pytest.raises(ValueError, match="no paths of the base.*base_share to 0"):
        data.batch(0, Draw(0, 4, 1, 0.1, 0.1, SCHEDULE))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"paths": 0}, "paths is 0"),
        ({"states": 7}, "7 states of each painting, but it has 6 steps"),
        ({"sizes": ((60, 64),)}, "size 60x64: .* multiples of 16"),
        ({"sizes": ((64, 64), (64, 64))}, "expected different sizes"),
        ({"paths": 1}, "a path for each"),
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
        ({"scheduler": "magic"}, "unknown scheduler"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"base_share": 1.0}, "base_share is 1.0"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"captions": [" "]}, "caption is empty"),
        ({"captions": []}, "no captions given"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, family, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "r", family, **changes)
    assert not list(tmp_path.glob("r/*"))


def test_models_that_do_not_fit_together(tmp_path, family):
    _, teachers = family
    for wrong, message in (
        ({"one": teachers["one"], "twin": teachers["one"]}, "'one' and 'twin' have the same weights"),
        (
            {"odd": Checkpoint(unet=unet(1, dataclasses.replace(SMALL, context_dim=32)))},
            "'odd' has context_dim 32 instead of 16",
        ),
        ({"z": dataclasses.replace(teachers["one"], zero_snr=True)}, "another noise schedule .*: z"),
        ({BASE_NAME: teachers["one"]}, "cannot be called"),
        (
            {"dmm": Checkpoint(unet=unet(1, dataclasses.replace(SMALL, num_styles=2)))},
            "itself a DMM model with 2 styles",
        ),
        ({"a": teachers["one"], "A ": teachers["two"]}, "the same style name"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "r", family, teachers=wrong)
    broken = {k: v * float("nan") if k == "out.2.bias" else v for k, v in unet(4).items()}
    with pytest.raises(ValueError, match="'bad' has NaN or infinite weights"):
        build(tmp_path / "r", family, teachers={"bad": Checkpoint(unet=broken)})


def test_other_captions_or_settings_do_not_mix(tmp_path, family):
    small = {"teachers": {"one": family[1]["one"]}, "steps": 2, "states": 1, "paths": 2}
    build(tmp_path / "r", family, **small)
    before = content(tmp_path / "r")
    for changes, message in (({"cfg": 3.0}, r"cfg \(7.0 -> 3.0\)"), ({"captions": ["new"]}, "captions")):
        with pytest.raises(ValueError, match=f"made with something else: {message}"):
            build(tmp_path / "r", family, **{**small, **changes})
    assert content(tmp_path / "r") == before
    build(tmp_path / "r", family, **{**small, "paths": 5})
    assert len(open_rollouts(tmp_path / "r", verify=True)) == 5 + 2


# --- as training data -------------------------------------------------------------------------------------------------


def test_teachers_share_equally_and_every_state_comes_once(made, family):
    folder, _ = made
    data = open_rollouts(folder).for_teachers(family[0], files_of(family[1]))
    met = {}
    per_size = {}
    for number in range(60):
        batch = data.batch(number, Draw(5, 6, 3, 0.0, 0.0, SCHEDULE))
        assert (batch.teacher.diff() >= 0).all() and torch.bincount(batch.teacher, minlength=3).tolist() == [2, 2, 2]
        for x, owner in zip(batch.x_t, batch.teacher.tolist()):
            met.setdefault((owner, tuple(x.shape)), []).append(x.flatten()[:8].numpy().tobytes())
        per_size[tuple(batch.x_t.shape[2:])] = per_size.get(tuple(batch.x_t.shape[2:]), 0) + 1
    assert set(per_size) == {(8, 8), (8, 12)}
    assert abs(per_size[8, 8] / 60 - 5 / 9) < 0.07  # five of nine paths are of that size
    for (_, shape), states in met.items():
        count = 15 if shape == (4, 8, 8) else 12  # 3 states of each path
        first = states[:count]
        assert len(set(first)) == count == len(set(states))
        assert first != states[count : 2 * count]  # another order in the next epoch


def test_targets_captions_and_dropout(made, family):
    folder, _ = made
    data = open_rollouts(folder).for_teachers(family[0], files_of(family[1]))
    everyone = [*family[1].values(), family[0]]
    nets = [load_unet(c.unet).eval() for c in everyone]
    texts = [data.text_of(c.text or family[0].text)[0] for c in everyone]
    owners, dropped = [], 0
    for number in range(12):
        batch = data.batch(number, Draw(1, 8, 3, 0.2, 0.4, SCHEDULE))
        assert batch.target.shape == batch.x_t.shape and batch.x_t.dtype == batch.target.dtype == torch.float32
        assert batch.t.dtype == torch.int64 and len(batch.caption) == 8
        for i, owner in enumerate(batch.teacher.tolist()):
            with torch.no_grad():
                out = nets[owner](batch.x_t[i : i + 1], batch.t[i : i + 1], texts[owner][batch.caption[i : i + 1]])
            torch.testing.assert_close(batch.target[i : i + 1], out, atol=2e-5, rtol=2**-11)
            owners.append(owner)
            dropped += int(batch.caption[i] == 0)
        again = data.batch(number, Draw(1, 8, 3, 0.2, 0.4, SCHEDULE))
        assert all(
            torch.equal(getattr(batch, k), getattr(again, k)) for k in ("x_t", "t", "teacher", "caption", "target")
        )
    assert 0.17 < owners.count(3) / len(owners) < 0.23 and 0.25 < dropped / 96 < 0.55


def test_sharing_out_is_exact():
    owner, draw = (torch.cat(x) for x in zip(*(share_out(start, 7, 3, 0.3) for start in range(0, 700, 7))))
    assert torch.bincount(owner).tolist() == [164, 163, 163, 210]
    for i in range(4):
        assert draw[owner == i].tolist() == list(range(int((owner == i).sum())))
    owner, _ = share_out(0, 12, 4, 0.0)
    assert owner.tolist() == [0, 1, 2, 3] * 3


def test_sizes_come_as_often_as_they_have_batches():
    turns = [size_of_batch(0, number, (3, 1)) for number in range(40)]
    assert [turn for which, turn in turns if which == 0] == list(range(30))
    assert [turn for which, turn in turns if which == 1] == list(range(10))
    assert len({tuple(which for which, _ in turns[i : i + 4]) for i in range(0, 40, 4)}) > 1


def test_a_student_trains_on_rollouts_without_asking_a_teacher(made, family, monkeypatch):
    folder, _ = made
    base, teachers = family
    data = open_rollouts(folder).for_teachers(base, files_of(teachers))

    def teacher(name, checkpoint):
        network = load_unet(checkpoint.unet)
        return Teacher(name, network, *data.text_of(checkpoint.text or base.text), checkpoint.prediction)

    config = TrainConfig(steps=12, batch_size=8, lr=2e-3, lambda_feat=0.0, lambda_adv=0.0, device="cpu", seed=1)
    everyone = [teacher(name, checkpoint) for name, checkpoint in teachers.items()]
    run = Trainer(teacher("base", base), everyone, data, config)
    for one in everyone:
        monkeypatch.setattr(one.unet, "forward", None)
    losses = [metrics.loss for metrics in run.run()]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_the_shipped_family_from_files(tmp_path):
    """Two demo teachers by file: names, hashes, and labels that equal the teacher's answer."""
    files = {name: f"{MODELS}/dmm/demo-teacher-{name}.safetensors" for name in ("ink", "pop")}
    settings = RolloutSettings(paths=2, states=3, steps=4)
    counts = build_rollouts(
        tmp_path / "r", f"{MODELS}/dmm/demo-base.safetensors", files, ["a red ball", "a blue star"], settings=settings,
        parts_from=f"{MODELS}/dmm/demo-dmm.safetensors",
    )  # fmt: skip
    assert counts == {"ink": 6, "pop": 6, BASE_NAME: 3}
    data = open_rollouts(tmp_path / "r", verify=True)
    assert data.shape == (4, 16, 16) and data.shapes == {(4, 16, 16): 6 + 6 + 3} and data.has_targets
    assert data.owners["ink"].file == "demo-teacher-ink.safetensors" and data.owners["ink"].sha256 == file_sha256(
        files["ink"]
    )
    text = load_checkpoint(f"{MODELS}/dmm/demo-dmm.safetensors").text
    batch = data.batch(0, Draw(0, 6, 2, 0.0, 0.3, SCHEDULE))
    contexts, _ = data.text_of(text)
    for i, name in enumerate(data.names):
        network, mine = load_unet(load_checkpoint(files[name]).unet).eval(), batch.teacher == i
        with torch.no_grad():
            out = network(batch.x_t[mine], batch.t[mine], contexts[batch.caption[mine]])
        torch.testing.assert_close(batch.target[mine], out, atol=4e-3, rtol=3e-3)


def test_text_of_another_teacher_is_added_to_rollouts(tmp_path, family):
    small = {"teachers": {"one": family[1]["one"]}, "steps": 2, "states": 1, "paths": 2}
    build(tmp_path / "r", family, **small)
    before, other = open_rollouts(tmp_path / "r").fingerprint(), init_text(16, 1, seed=77)
    save_checkpoint(tmp_path / "other.safetensors", Checkpoint(unet=unet(5), text=other))
    assert add_text(tmp_path / "r", [tmp_path / "other.safetensors"]) == 1
    data = open_rollouts(tmp_path / "r", verify=True)
    assert data.fingerprint() == before and len(data.text_of(other)[0]) == len(data.prompts)
