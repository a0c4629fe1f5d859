"""The image cache: what is in it equals what the networks say, whatever interrupts its making and whatever lies in the folder."""

import argparse
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.dmm_core.vae import SCALE_SD, AutoencoderKL, VAEConfig, load_vae
from comfyui_dmm.training.commands.cache import add_parsers
from comfyui_dmm.training.commands.demo import MODELS
from comfyui_dmm.training.commands.progress_bar import ProgressBar
from comfyui_dmm.training.data import cache, cached_text, shards
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.data.buckets import bucket_sizes, choose_bucket, fit, size_multiple
from comfyui_dmm.training.data.cache import ENLARGED, add_text, build_image_cache, open_image_cache
from comfyui_dmm.training.data.image_folder import (
    Problem,
    ahead,
    decode,
    find_pictures,
    read_caption_file,
    read_captions,
    survey,
)
from comfyui_dmm.training.data.open_cache import open_cache
from comfyui_dmm.training.data.shards import MANIFEST
from comfyui_dmm.training.files.hashing import weights_hash
from comfyui_dmm.training.text import ClipText, init_text
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError

from .families import SMALL, SMALL_XL

LONG = ", ".join(["a tall tree by the sea"] * 15)  # 105 tokens: two windows


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)).state_dict()
    return Checkpoint(unet=dict(UNet(SMALL).state_dict()), text=init_text(16, 1), vae=dict(vae))


def noise(width, height, seed=0, mode="RGB"):
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode if mode == "L" else None
    )


def put(folder, name, image=None, caption="a picture", size=(64, 64)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(*size, seed=len(name))).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path):
    """11 pictures of three shapes with 5 captions, two of them long."""
    folder = tmp_path / "pictures"
    for i in range(11):
        size = [(64, 64), (96, 60), (40, 70)][i % 3]
        put(folder, f"{i:02d}.png", noise(*size, seed=i), [f"caption {i % 4}", LONG][i % 5 == 4])
    return folder


def build(folder, images, base, **options):
    return build_image_cache(folder, images, base, **{"resolution": 64, **options})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """A replaced file has another inode."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


# --- what is in a cache -----------------------------------------------------------------------------------------------


def test_latents_and_contexts_are_the_networks_own(tmp_path, pictures, base):
    report = build(tmp_path / "cache", pictures, base)
    data = open_image_cache(tmp_path / "cache", verify=True)
    assert report.pictures == len(data) == 11 and report.captions == 5 and len(data.buckets) == 3
    assert data.prompts == ["", *sorted({f"caption {i}" for i in range(4)} | {LONG})]
    vae, seen = load_vae(base.vae).eval(), 0
    for bucket, size in zip(data.buckets, report.buckets):
        names = sorted(p.name for p in pictures.glob("*.png") if choose(p) == size)
        for i, name in enumerate(names):
            pixels = np.asarray(fit(Image.open(pictures / name), size)).astype(np.float32) / 127.5 - 1
            with torch.no_grad():
                expected = SCALE_SD * vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            torch.testing.assert_close(bucket[torch.tensor([i])], expected, atol=1e-3, rtol=1e-3)  # float16
            assert bucket.shape[2:] == (size[1] // 8, size[0] // 8)
            assert data.captions[seen] == (pictures / name).with_suffix(".txt").read_text()
            seen += 1
    contexts, pooled = data.text_of(base.text)
    clip = ClipText(base.text)
    for row, prompt in enumerate(data.prompts):
        torch.testing.assert_close(contexts[torch.tensor([row])], clip.encode([prompt]), atol=2e-3, rtol=1e-3)
    rows = torch.tensor([0, data.prompts.index(LONG), 2])
    expected = clip.encode([data.prompts[row] for row in rows])
    assert expected.shape[1] == 154  # the short ones are repeated
    torch.testing.assert_close(contexts[rows], expected, atol=2e-3, rtol=1e-3)
    assert pooled is None and contexts[rows].dtype == torch.float32


def choose(path):
    with Image.open(path) as image:
        return choose_bucket(image.size, bucket_sizes(64, 16))


def test_the_cache_of_demo_scenes_trains(tmp_path):
    """The shipped family end to end: rendered scenes -> cache -> batches, against the demo's own way to the same latents."""
    from comfyui_dmm.training.data.demo.latents import captioned_latents, demo_images
    from comfyui_dmm.training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS

    looks = (BASE_LOOK, *TEACHER_LOOKS)
    images, captions = demo_images(looks, 6, 3)
    for i, (image, caption) in enumerate(zip(images, captions)):
        put(tmp_path / "scenes", f"{i}.png", Image.fromarray(image), caption)
    parts = f"{MODELS}/dmm/demo-dmm.safetensors"
    report = build_image_cache(
        tmp_path / "cache", tmp_path / "scenes", f"{MODELS}/dmm/demo-base.safetensors", parts_from=parts
    )
    assert report.buckets == {(128, 128): 6}
    data, whole = open_image_cache(tmp_path / "cache"), load_checkpoint(parts)
    expected = captioned_latents(load_vae(whole.vae), looks, 6, 3)
    torch.testing.assert_close(data.buckets[0][torch.arange(6)], expected.buckets[0], atol=4e-3, rtol=1e-3)
    assert data.captions == expected.captions
    contexts, _ = data.text_of(whole.text)
    torch.testing.assert_close(contexts[data.rows], ClipText(whole.text).encode(captions), atol=4e-3, rtol=1e-3)
    ours, theirs = (d.batch(0, Draw(0, 4, 2, 0.0, 0.0, NoiseSchedule())) for d in (data, expected))
    torch.testing.assert_close(ours.x_t, theirs.x_t, atol=4e-3, rtol=1e-3)
    assert torch.equal(ours.caption, theirs.caption)


def test_sdxls_pooled_text_and_scale(tmp_path, pictures, base):
    from .test_text import reference, sd1_file, sd2_file

    small, big = reference(16, 2), reference(24, 2)
    text = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in sd1_file(small).items()}
    text |= sd2_file(big, "conditioner.embedders.1.model.")
    xl = Checkpoint(unet=dict(UNet(SMALL_XL).state_dict()), text=text, vae=base.vae)
    build(tmp_path / "xl", pictures, xl)
    build(tmp_path / "sd", pictures, base)
    data = open_image_cache(tmp_path / "xl")
    contexts, pooled = data.text_of(text)
    expected, expected_pooled = ClipText(text).encode_pooled(data.prompts[:3])
    rows = torch.tensor([2, 0, 1])
    torch.testing.assert_close(contexts[rows], expected[rows], atol=4e-3, rtol=2e-3)
    torch.testing.assert_close(pooled[rows], expected_pooled[rows], atol=4e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="scale"):  # the same VAE, but another family's latents
        build(tmp_path / "xl", pictures, base)
    ratio = data.buckets[0][torch.tensor([0])] / open_image_cache(tmp_path / "sd").buckets[0][torch.tensor([0])]
    assert abs(ratio.median().item() - 0.13025 / 0.18215) < 0.01


def test_another_teachers_text_is_added_and_the_rest_stays(tmp_path, pictures, base):
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    before, fingerprint = identities(folder), open_image_cache(folder).fingerprint()
    other = Checkpoint(unet=base.unet, text=init_text(16, 1, seed=5))
    with pytest.raises(
        ValueError,
        match=r"of teacher 'ink' is not in the cache.*dmm cache text --cache .*cache --teacher 'my ink.safetensors'",
    ):
        open_image_cache(folder).for_teachers(base, {"ink": (other, "my ink.safetensors")})
    assert add_text(folder, [other]) == 1 and add_text(folder, [other]) == 0
    data = open_image_cache(folder, verify=True)
    data.for_teachers(
        base, {"ink": (other, "my ink.safetensors"), "bare": (Checkpoint(unet=base.unet), "b.safetensors")}
    )
    assert before.items() <= identities(folder).items() and data.fingerprint() == fingerprint
    contexts, _ = data.text_of(other.text)
    expected = ClipText(other.text).encode(data.prompts[1:3])
    torch.testing.assert_close(contexts[torch.tensor([1, 2])], expected, atol=2e-3, rtol=1e-3)
    assert contexts.fingerprint() != data.text_of(base.text)[0].fingerprint()
    # And a later run that does not name that teacher keeps its text.
    build(folder, pictures, base)
    open_image_cache(folder).text_of(other.text)
    with pytest.raises(ValueError, match="no text encoder of its own"):
        add_text(folder, [Checkpoint(unet=base.unet)])


def test_one_hash_for_every_precision_and_not_for_other_weights(base):
    half = {k: v.half() for k, v in base.vae.items()}
    assert weights_hash(base.vae) == weights_hash(half) == weights_hash({**half, "model_ema.decay": torch.ones(1)})
    key = next(iter(half))
    assert weights_hash({**half, key: half[key] * 1.01}) != weights_hash(half)


# --- interrupted and resumed ------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_PICTURES", 2)
    monkeypatch.setattr(cached_text, "SHARD_PROMPTS", 2)


def test_a_build_interrupted_everywhere_ends_with_the_same_files(tmp_path, pictures, base, small_shards):
    build(tmp_path / "whole", pictures, base)
    folder, attempts = tmp_path / "cache", 0
    for calls in itertools.count(1):
        count = itertools.count(1)

        def stop(done, total, what, count=count, calls=calls):
            if next(count) == calls:
                raise KeyboardInterrupt

        before = identities(folder) if folder.exists() else {}
        try:
            build(folder, pictures, base, progress=stop)
            break
        except KeyboardInterrupt:
            attempts += 1
            assert before.items() <= identities(folder).items()  # finished shards are not written again
            with pytest.raises(ValueError, match="not finished: run the same|not a cache"):
                open_image_cache(folder)
    assert attempts > 15
    assert content(folder) == content(tmp_path / "whole")
    before = identities(folder), (folder / MANIFEST).stat()
    build(folder, pictures, base)
    assert (identities(folder), (folder / MANIFEST).stat()) == before  # nothing to do, nothing done


def test_a_killed_process_leaves_what_the_next_one_needs(tmp_path, pictures, base, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_PICTURES", 1)
    folder = tmp_path / "cache"
    build(tmp_path / "whole", pictures, base)
    folder.mkdir()
    for path in (tmp_path / "whole").glob("text-*"):  # or the process would spend its time on importing transformers
        shutil.copy(path, folder)
    save_checkpoint(tmp_path / "base.safetensors", base)
    code = (
        "import sys; from comfyui_dmm.training.data import cache; cache.SHARD_PICTURES = 1\n"
        "cache.build_image_cache(*sys.argv[1:], resolution=64)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder, pictures, tmp_path / "base.safetensors"])
    while process.poll() is None and len(list(folder.glob("latents-*"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = identities(folder)
    assert 2 <= len(list(folder.glob("latents-*"))) < 11
    build(folder, pictures, base)
    assert before.items() <= identities(folder).items()
    ours = {name: data for name, data in content(folder).items() if not name.endswith(".tmp")}
    assert ours == content(tmp_path / "whole")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space left")])
def test_a_full_disk_leaves_the_finished_shards(tmp_path, pictures, base, small_shards, monkeypatch, error):
    build(tmp_path / "whole", pictures, base)
    write, written = shards.save_file, []

    def full(tensors, path, metadata):
        if len(written) == 4:
            raise error
        written.append(path)
        write(tensors, path, metadata)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="could not be written .*pace.*finished and stay usable: free some space"):
        build(tmp_path / "cache", pictures, base)
    before = identities(tmp_path / "cache")
    assert len(before) == 4 and set(content(tmp_path / "cache")) == set(before)  # no temporary file stays
    monkeypatch.setattr(shards, "save_file", write)
    build(tmp_path / "cache", pictures, base)
    assert before.items() <= identities(tmp_path / "cache").items()
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_pictures_added_and_changed_are_followed(tmp_path, pictures, base, small_shards):
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    old, before = open_image_cache(folder).fingerprint(), identities(folder)
    put(pictures, "zz.png", noise(64, 64, 99), "caption 1")
    assert build(folder, pictures, base).pictures == 12
    assert len(before.items() & identities(folder).items()) >= len(before) - 1
    data = open_image_cache(folder, verify=True)
    assert len(data) == 12 and data.fingerprint() != old
    put(pictures, "00.png", noise(64, 64, 123), "caption 0")
    assert build(folder, pictures, base).pictures == 12
    assert open_image_cache(folder, verify=True).fingerprint() != data.fingerprint()
    for path in pictures.glob("0[1-9].*"):
        path.unlink()
    assert build(folder, pictures, base).pictures == 3
    build(tmp_path / "fresh", pictures, base)
    assert content(folder) == content(tmp_path / "fresh")  # no shard of before is left over


def test_a_finished_cache_that_is_being_changed_is_unfinished(tmp_path, pictures, base, small_shards):
    """Or its manifest would vouch for shards that are no longer those."""
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    put(pictures, "00.png", noise(64, 64, 123), "caption 0")

    def stop(done, total, what):
        if what == "encoding pictures" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, pictures, base, progress=stop)
    with pytest.raises(ValueError, match="is not finished"):
        open_image_cache(folder)
    build(folder, pictures, base)
    assert len(open_image_cache(folder, verify=True)) == 11


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_vae_or_settings_are_refused(tmp_path, pictures, base):
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    other = Checkpoint(unet=base.unet, text=base.text, vae={k: v * 1.5 for k, v in base.vae.items()})
    before = content(folder)
    with pytest.raises(ValueError, match="made with another VAE than the base model's"):
        open_image_cache(folder).for_teachers(other, {})
    with pytest.raises(ValueError, match="was made with something else: vae .* Choose another folder"):
        build(folder, pictures, other)
    with pytest.raises(ValueError, match=r"something else: resolution \(64 -> 96\)"):
        build(folder, pictures, base, resolution=96)
    assert content(folder) == before
    open_image_cache(folder).for_teachers(base, {})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: next(f.glob("latents-*")).unlink(), r"damaged: latents-.* is missing.*again"),
        (lambda f: os.truncate(next(f.glob("text-*")), 100), r"text-.* has 100 bytes instead of \d+"),
        (lambda f: (f / MANIFEST).unlink(), "is not finished: run the same 'dmm cache' command again"),
        (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "format None, this version reads 1"),
        (lambda f: edit(f, format=2), "format 2, this version reads 1"),
        (lambda f: edit(f, kind="rollouts"), "a cache of rollouts, expected one of images"),
        (lambda f: edit(f, prompts=["", "b"]), "damaged"),
        (lambda f: edit(f, buckets=[{"shards": [{"file": "../../secret", "bytes": 1}]}]), "names files that are no shards"),
        (lambda f: edit(f, buckets=[{"shards": [7]}]), "damaged"),
        (lambda f: edit(f, buckets=[]), "no training pictures"),
        (lambda f: edit(f, text=None), "damaged|not in the cache"),
    ],
)  # fmt: skip
def test_a_damaged_cache_says_what_is_wrong(tmp_path, pictures, base, damage, message):
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_image_cache(folder).text_of(base.text)


def edit(folder, **changes):
    """A manifest of another program, which has no digest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_other_content_of_the_same_size_is_found_by_verify_and_mended(tmp_path, pictures, base):
    folder = tmp_path / "cache"
    build(folder, pictures, base)
    before, path = content(folder), next(folder.glob("latents-*"))
    path.write_bytes(before[path.name][:-1] + bytes([before[path.name][-1] ^ 1]))
    open_image_cache(folder)
    with pytest.raises(ValueError, match=f"{path.name} has other content"):
        open_image_cache(folder, verify=True)
    build(folder, pictures, base)
    assert content(folder) == before


def test_a_folder_that_is_no_cache(tmp_path, pictures, base):
    with pytest.raises(ValueError, match="is not a cache: make one with 'dmm cache'"):
        open_image_cache(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        build(tmp_path / "file", pictures, base)
    mine = tmp_path / "mine"
    put(mine, "holiday.png")
    build(mine, pictures, base)
    assert (mine / "holiday.png").exists()


def test_models_without_the_parts_are_refused(tmp_path, pictures, base):
    with pytest.raises(ValueError, match="no VAE: .*--parts-from"):
        build(tmp_path / "c", pictures, Checkpoint(unet=base.unet, text=base.text))
    with pytest.raises(ValueError, match="no text encoder: .*--parts-from"):
        build(tmp_path / "c", pictures, Checkpoint(unet=base.unet, vae=base.vae))
    broken = {k: v * float("nan") for k, v in base.vae.items()}
    with pytest.raises(ValueError, match=r"'\d\d.png' gives latents with NaN"):
        build(tmp_path / "c", pictures, Checkpoint(unet=base.unet, text=base.text, vae=broken))


# --- hostile folders --------------------------------------------------------------------------------------------------


def spoil(folder):
    """Bad pictures, by name -> what must be said about each."""
    put(folder, "no caption.png", caption=None)
    put(folder, "empty.png", caption=" \n ")
    put(folder, "truncated.png")
    data = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    put(folder, "truncated.jpg", noise(200, 200))
    data = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("<html>not found</html>")
    (folder / "text.txt").write_text("caption")
    (folder / "zero.webp").touch()
    (folder / "zero.txt").write_text("caption")
    put(folder, "latin.png")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "dangling.txt").write_text("caption")
    return {
        "no caption.png": "it has no caption: neither a file 'no caption.txt'",
        "empty.png": "its caption is empty",
        "truncated.png": "it is damaged",
        "truncated.jpg": "it is damaged",
        "text.png": "not a picture that can be read",
        "zero.webp": "not a picture that can be read",
        "latin.png": "'latin.txt' is not UTF-8",
        "dangling.png": "a link to nothing",
    }


def test_every_bad_file_is_named_before_anything_is_encoded(tmp_path, pictures, base):
    expected = spoil(pictures)
    good, problems = survey(pictures)
    found = {problem.name: problem.reason for problem in problems}
    assert found.keys() == expected.keys() and len(problems) == len(expected)
    assert [name for name, reason in expected.items() if reason not in found[name]] == []
    assert [picture.name for picture in good] == [f"{i:02d}.png" for i in range(11)]
    with pytest.raises(ValueError, match=r"8 problem\(s\) with the pictures in .*; and 3 more.*--skip-bad"):
        build(tmp_path / "cache", pictures, base)
    assert not (tmp_path / "cache").exists()
    report = build(tmp_path / "cache", pictures, base, skip_bad=True)
    assert report.pictures == 11 and len(report.skipped) == 8 and "8 problems, left out" in str(report)
    assert len(open_image_cache(tmp_path / "cache")) == 11
    for path in pictures.glob("[0-9]*"):
        path.unlink()
    with pytest.raises(ValueError, match="no usable picture"):
        build(tmp_path / "none", pictures, base, skip_bad=True)


def test_odd_sizes_names_and_places(tmp_path, base):
    folder = tmp_path / "odd"
    for name, size in {"1.png": (1, 1), "line.png": (1, 3000), "wide.png": (5000, 3), "large.png": (1200, 900)}.items():
        put(folder, name, size=size)
    put(folder, "ünïcode 日本語 ✨.PNG")
    put(folder, "a/b/c/nested.jpeg")
    put(folder, "a/1.png", noise(64, 64, 5), "<b>markup</b> & ../../etc/passwd\n  second\tline")
    outside = put(tmp_path / "elsewhere", "linked.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "link.txt").write_text("a link")
    (folder / "around").symlink_to(folder)  # a circle
    put(folder, ".hidden.png")
    put(folder, ".cache/also hidden.png")
    for name in ("notes.md", "Thumbs.db", "movie.mp4", "picture.psd"):
        (folder / name).write_bytes(b"\0" * 50)
    report = build(tmp_path / "cache", folder, base)
    assert report.pictures == 8 and not report.skipped
    assert report.enlarged == ["1.png", "line.png", "wide.png"] and f"more than {ENLARGED:g} times larger" in str(
        report
    )
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    names = sorted(name for bucket in manifest["buckets"] for name in bucket["names"])
    assert names == sorted(
        ["1.png", "1.png", "line.png", "wide.png", "large.png", "ünïcode 日本語 ✨.PNG", "nested.jpeg", "link.png"]
    )
    assert "<b>markup</b> & ../../etc/passwd second line" in open_image_cache(tmp_path / "cache").prompts


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes elsewhere")
def test_a_name_that_is_no_unicode(tmp_path, base):
    put(tmp_path / "odd", "a.png")
    for ending in (b"png", b"txt"):
        os.rename(tmp_path / "odd" / f"a.{ending.decode()}", os.fsencode(tmp_path / "odd") + b"/\xff." + ending)
    build(tmp_path / "cache", tmp_path / "odd", base)
    assert len(open_image_cache(tmp_path / "cache")) == 1


def test_captions_from_metadata_jsonl(tmp_path):
    names = ["a.png", "in/b.png", "c.png"]
    for name in names:
        put(tmp_path, name, caption="from the text file")
    lines = [
        '{"file_name": "./a.png", "text": "  one\\n two ", "other": 1}',
        "",
        '{"file_name": "in/b.png", "text": "three"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    captions, problems = read_captions(tmp_path, find_pictures(tmp_path))
    assert captions == {"a.png": "one two", "in/b.png": "three", "c.png": "from the text file"} and not problems
    bad = ['{"file_name": "../a.png", "text": "x"}', "{", "[]", '{"file_name": "a.png"}', '{"file_name": 1, "text": "x"}',
           '{"file_name": "c.png", "text": 5}', '{"file_name": "a.png", "text": "again"}',
           '{"file_name": "c.png", "text": "\\ud800"}', "[" * 100000]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, *bad]), encoding="utf-8")
    captions, problems = read_captions(tmp_path, find_pictures(tmp_path))
    assert [str(problem) for problem in problems] == [
        "'metadata.jsonl line 4': there is no picture '../a.png' in the folder",
        *(f"'metadata.jsonl line {n}': " + 'expected {"file_name": "...", "text": "..."}' for n in range(5, 10)),
        "'metadata.jsonl line 10': a second caption for 'a.png'",
        "'metadata.jsonl line 12': " + 'expected {"file_name": "...", "text": "..."}',
        "'c.png': its caption is not valid Unicode",
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    assert "UTF-8" in str(read_captions(tmp_path, find_pictures(tmp_path))[1][0])


def test_captions_from_a_text_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffone  cat\r\n\r\n日本\ntwo\none cat\n".encode())
    assert read_caption_file(path) == ["one cat", "日本", "two"]
    for data, message in ((b"\n \n", "holds no caption"), (b"\xff", "not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_caption_file(path)
    with pytest.raises(ValueError, match="cannot read the captions .*No such file"):
        read_caption_file(tmp_path / "nothing")


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        survey(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no pictures in .*\.png, \.jpg"):
        survey(tmp_path)


def test_a_picture_that_changes_on_the_way_is_named(tmp_path, pictures, base):
    def swap(done, total, what):
        if what == "encoding captions":
            put(pictures, "00.png", noise(64, 64, 77))

    with pytest.raises(ValueError, match="'00.png': it has changed since it was checked"):
        build(tmp_path / "cache", pictures, base, progress=swap)


# --- pixels and buckets -----------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_are_upright_and_on_white():
    image = noise(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (10, 20)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))
    clear = noise(8, 8, mode="RGBA")
    pixels = np.asarray(clear).astype(float)
    expected = pixels[..., 3:] / 255 * pixels[..., :3] + 255 - pixels[..., 3:]
    assert abs(np.asarray(decode(encoded(clear))) - expected).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert decode(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    deep = Image.fromarray(np.full((4, 4), 200 * 256 + 7, dtype=np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (200, 200, 200)
    assert decode(encoded(Image.new("L", (4, 4), 9))).getpixel((0, 0)) == (9, 9, 9)
    assert decode(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    two = encoded(
        Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
    )
    assert decode(two).getpixel((0, 0)) == (255, 0, 0)


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(ValueError, match="not a picture"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_a_decompression_bomb_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        decode(encoded(noise(40, 40)))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(512, 64), (1024, 64), (768, 64), (128, 16), (64, 16)])
)
def test_the_bucket_crops_least(width, height, family):
    sizes = bucket_sizes(*family)

    def cropped(bucket):
        """Pixels lost, as a share, when the picture is enlarged to cover the bucket."""
        scale = max(bucket[0] / width, bucket[1] / height)
        return 1 - bucket[0] * bucket[1] / (scale * width * scale * height)

    chosen = choose_bucket((width, height), sizes)
    assert cropped(chosen) <= min(map(cropped, sizes)) + 1e-9
    if (width, height) in sizes:
        assert chosen == (width, height)


@pytest.mark.parametrize("resolution, multiple", [(512, 64), (768, 64), (1024, 64), (128, 16), (64, 16)])
def test_bucket_sizes(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes)) and sizes == sorted(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0 and (height, width) in sizes
        assert 0.85 < width * height / resolution**2 < 1.15 and 1 / 3 <= width / height <= 3
    assert bucket_sizes(resolution, multiple, 1) == [(resolution, resolution)]


def test_bucket_refusals():
    with pytest.raises(ValueError, match="resolution is 500: .* multiple of 64"):
        bucket_sizes(500, 64)
    with pytest.raises(ValueError, match="resolution is 0"):
        bucket_sizes(0, 64)
    for aspect in (0.5, float("nan")):
        with pytest.raises(ValueError, match="largest aspect"):
            bucket_sizes(512, 64, aspect)


def test_multiples_of_the_families():
    from comfyui_dmm.dmm_core.unet import UNetConfig, unet_config_from_state_dict

    demo = load_checkpoint(f"{MODELS}/dmm/demo-base.safetensors")
    assert size_multiple(unet_config_from_state_dict(demo.unet)) == 16 and size_multiple(UNetConfig()) == 64


def test_fitting_keeps_the_middle():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste(Image.new("RGB", (100, 100), "blue"), (100, 0))
    fitted = np.asarray(fit(wide, (64, 64)))
    assert abs(fitted[:, 4:-4].astype(int) - (0, 0, 255)).max() <= 2
    image = noise(128, 128)
    assert np.array_equal(
        np.asarray(fit(image, (64, 64))), np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))
    )


def test_reading_ahead_is_in_order_and_bounded():
    from concurrent.futures import ThreadPoolExecutor

    started, taken = [], 0
    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(ahead(pool, lambda n: started.append(n) or n * n, range(50), 6)):
            assert result == i * i and len(started) <= taken + 6
            taken += 1
    assert taken == 50


# --- the command ------------------------------------------------------------------------------------------------------


def dmm(*args):
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args([str(arg) for arg in args])
    args.run(args)


def test_the_commands_from_files_to_files(tmp_path, pictures, base, capsys):
    base_file, bare, teacher = (tmp_path / f"{name}.safetensors" for name in ("base", "bare", "my teacher"))
    save_checkpoint(base_file, base)
    save_checkpoint(bare, Checkpoint(unet=base.unet))
    torch.manual_seed(1)
    save_checkpoint(teacher, Checkpoint(unet=dict(UNet(SMALL).state_dict()), text=init_text(16, 1, seed=4)))
    (pictures / "bad.png").write_text("x")
    images = ["cache", "images", "--images", pictures, "--base", bare, "--parts-from", base_file, "--device", "cpu"]
    images += ["--resolution", 64, "--output", tmp_path / "i"]
    with pytest.raises(ValueError, match=r"2 problem\(s\).*has no caption.*not a picture"):
        dmm(*images)
    dmm(*images, "--skip-bad")
    out = capsys.readouterr().out
    assert "11 pictures (48x80: 3, 64x64: 4, 80x48: 4)" in out and "left out: 'bad.png'" in out
    loaded = {"my teacher": (load_checkpoint(teacher), str(teacher))}
    with pytest.raises(ValueError) as refusal:
        open_cache(tmp_path / "i").for_teachers(base, loaded)
    command = shlex.split(str(refusal.value).rpartition("This adds it: dmm ")[2])
    dmm(*command, "--device", "cpu")  # what the message says is what helps
    assert open_cache(tmp_path / "i").for_teachers(base, loaded).prompts
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    dmm("cache", "rollouts", "--captions", tmp_path / "captions.txt", "--base", base_file, "--teacher", f"my={teacher}",
        "--output", tmp_path / "r", "--paths", 2, "--steps", 2, "--states", 2, "--size", "32x64", "--size", "64x32",
        "--device", "cpu", "--cfg", 3)  # fmt: skip
    assert "states: my 4, (base) 4" in capsys.readouterr().out
    assert open_cache(tmp_path / "r").sizes == [(32, 64), (64, 32)]
    for folder, what in (("i", "11 pictures, 5 captions"), ("r", "8 states, 2 captions")):
        dmm("cache", "check", "--cache", tmp_path / folder)
        assert what in capsys.readouterr().out
        shard = next((tmp_path / folder).glob("[lr]*.safetensors"))
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match="has other content"):
            dmm("cache", "check", "--cache", tmp_path / folder)


@pytest.mark.parametrize("args", [["--teacher", "nofile"], ["--teacher", "=x"], ["--teacher", "a=b", "--size", "64"]])
def test_commands_that_make_no_sense(args, capsys):
    with pytest.raises(SystemExit):
        dmm("cache", "rollouts", "--captions", "c", "--base", "b", "--output", "o", *args)
    assert "is not" in capsys.readouterr().err


def test_the_progress_bar_follows(capsys):
    bar = ProgressBar()
    for done, total, what in (
        (1, 3, "checking"),
        (3, 3, "checking"),
        (2, 3, "encoding"),
        (1, 3, "again"),
        (1, 9, "more"),
    ):
        bar(done, total, what)
    bar.close()
    err = capsys.readouterr().err
    assert all(
        f"{what}: {share}" in err for what, share in (("checking", "100%"), ("encoding", " 67%"), ("more", " 11%"))
    )


def test_names_cannot_write_to_the_terminal(tmp_path):
    assert str(Problem("日本 \x1b[2J.png", "it is damaged")) == "'日本 \\x1b[2J.png': it is damaged"
    put(tmp_path, "\x1b[2J\n.png", caption=None)
    _, problems = survey(tmp_path)
    assert len(problems) == 1 and str(problems[0]).isprintable()
