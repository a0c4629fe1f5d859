"""Demo scenes and looks against brute-force geometry and the real CLIP vocabulary; the classifier on fresh renders."""

import dataclasses
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_dmm.training.data.demo.family import FAMILIES, FIRST, SECOND, family_named
from comfyui_dmm.training.data.demo.latents import demo_images
from comfyui_dmm.training.data.demo.scenes import SIZE, Scene, control_hint, layers, sample_scene
from comfyui_dmm.training.demo import classifier
from safetensors.torch import save_file

EVERY_LOOK = [
    pytest.param(family, look, id=f"{family.name}-{look}") for family in FAMILIES.values() for look in family.looks
]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def some_scenes(count, seed=0, family=FIRST, **fixed):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, family.world, **fixed) for _ in range(count)]


def coarse(pictures):
    """(M, H, W, 3) in 0..1 -> (M, H/8, W/8, 3): the latents' resolution, where the models work. Per pixel, hatching a few pixels apart
    would count as well."""
    return pictures.reshape(-1, SIZE // 8, 8, SIZE // 8, 8, 3).mean((2, 4))


def edge_points(mask):
    """Midpoints between neighbouring pixels of which one is inside: (K, 2) as (y, x)."""
    inside = mask > 0.5
    down, right = np.argwhere(inside[1:] != inside[:-1]), np.argwhere(inside[:, 1:] != inside[:, :-1])
    return np.concatenate([down + (0.5, 0), right + (0, 0.5)])


def brute_force_distance(mask):
    """Distance of each pixel to the nearest edge point, negative inside, without any transform: (H, W)."""
    points = np.argwhere(np.ones_like(mask, bool))[:, None]
    nearest = np.sqrt(((points - edge_points(mask)) ** 2).sum(2)).min(1).reshape(mask.shape)
    return np.where(mask > 0.5, -nearest, nearest)


CARRIED_OUTSIDE = {"pop", "paper", "wash", "neon"}
"""Looks whose dots, lowest sheet, bleeding paint or glow have the object's colour outside the object too."""


def chroma(rgb):
    """Colour without lightness: RGB over its largest channel, so a shaded yellow is yellow. (..., 3) -> same."""
    return rgb / rgb.max(-1, keepdims=True)


@each_family
def test_every_word_is_one_clip_token_and_captions_use_no_other(family):
    vocabulary = family.world.vocabulary
    tokenizer = pytest.importorskip("open_clip", reason="needs the headless extra").SimpleTokenizer()
    tokens = {word: tokenizer.encode(word) for word in vocabulary}
    assert {word: ids for word, ids in tokens.items() if len(ids) != 1} == {}
    assert len(vocabulary) == len(set(vocabulary)) <= 48
    known = {ids[0] for ids in tokens.values()}
    used = {token for scene in some_scenes(3000, family=family) for token in tokenizer.encode(scene.caption)}
    assert used == known  # nothing unknown is said, and no word is idle


@each_family
def test_the_caption_tells_the_scene(family):
    world = family.world
    small, _, big = world.sizes
    for scene in some_scenes(300, family=family):
        words = re.findall(r"\w+", scene.caption)
        assert [word for word in words if word in world.objects] == [scene.shape]
        assert [word for word in words if word in world.colours] == [scene.colour]
        backgrounds = [word for word in words if word in world.backgrounds]
        assert backgrounds == ([] if scene.background == "plain" else [scene.background])
        assert (small in words, big in words) == (scene.size_word == small, scene.size_word == big)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", scene.caption)


def test_pinning_a_field_leaves_the_others_alone():
    free, pinned = some_scenes(20), some_scenes(20, shape="cat")
    assert [dataclasses.replace(scene, shape="cat") for scene in free] == pinned


def test_size_words_order_the_drawn_sizes():
    side = {word: [] for word in ("small", "", "big")}
    for scene in some_scenes(200, shape="heart", tilt=0.0):
        rows, columns = np.nonzero(layers(scene).mask[..., 0] > 0.5)
        side[scene.size_word].append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert max(side["small"]) < min(side[""]) and max(side[""]) < min(side["big"])
    assert min(side["small"]) >= 0.45 * SIZE and max(side["big"]) <= 0.76 * SIZE


@pytest.mark.parametrize(("family", "shape"), [(f, shape) for f in FAMILIES.values() for shape in f.world.objects])
def test_distance_field_matches_brute_force(family, shape):
    drawn = layers(some_scenes(1, family=family, shape=shape)[0])
    error = np.abs(drawn.distance[..., 0] - brute_force_distance(drawn.mask[..., 0]))
    assert error.mean() < 0.5 and error.max() < 2.5  # pixels; the field is computed at half resolution


@pytest.mark.parametrize(("family", "look"), EVERY_LOOK)
def test_render_depends_on_scene_and_look_alone(family, look):
    scene = some_scenes(1, seed=3, family=family)[0]
    first = family.render(scene, look)
    family.render(some_scenes(1, seed=4, family=family)[0], family.outlier)
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, family.render(dataclasses.replace(scene), look))
    assert not np.array_equal(first, family.render(dataclasses.replace(scene, x=scene.x + 0.05), look))


@pytest.mark.parametrize(("family", "look"), EVERY_LOOK)
def test_every_look_keeps_composition_and_colour(family, look):
    """Where the picture changes when only the colour word does is the object; and the colour there is the word's."""
    colours = family.world.colours
    for scene in some_scenes(6, seed=1, family=family):
        mask = layers(scene).mask[..., 0] > 0.5
        painted = {c: family.render(dataclasses.replace(scene, colour=c), look).astype(float) for c in colours}
        change = np.std(np.stack(list(painted.values())), 0).mean(2)
        assert change[mask].mean() > (2 if look in CARRIED_OUTSIDE else 8) * change[~mask].mean()
        palette = chroma(np.array(list(colours.values()), float))
        for i, colour in enumerate(colours):
            pixels = painted[colour][mask]
            strength = np.ptp(pixels, 1)
            vivid = pixels[strength > 0.75 * strength.max()]  # neither outlines nor pale parts or dots
            nearest = np.linalg.norm(chroma(vivid.mean(0)) - palette, axis=1).argmin()
            assert nearest == i, f"{scene.caption} in {look}: {colour} reads as {list(colours)[nearest]}"


@each_family
def test_one_pair_of_twins_and_one_outlier(family):
    assert set(family.looks) == {*family.painted, *filter(None, [family.lora])}
    assert not set(family.looks) & set(family.more_loras)
    assert {*family.twins, family.outlier} <= set(family.teachers)
    scenes = [layers(scene) for scene in some_scenes(24, seed=2, family=family)]
    pictures = {
        look: coarse(np.stack([family.render_layers(s, look) for s in scenes]) / 255) for look in family.teachers
    }
    gap = {frozenset((a, b)): ((pictures[a] - pictures[b]) ** 2).mean() for a in pictures for b in pictures if a < b}
    by_size = sorted(gap, key=gap.get)
    assert by_size[0] == set(family.twins) and gap[by_size[0]] * 2 < gap[by_size[1]]
    others = len(family.teachers) - 1
    assert all(family.outlier in pair for pair in by_size[-others:])
    largest_without, smallest_with = gap[by_size[-others - 1]], gap[by_size[-others]]
    assert smallest_with > (2 if family is FIRST else 1.2) * largest_without


def test_the_families_share_no_word_but_grammar_and_no_look():
    first, second = FIRST.world, SECOND.world
    for of in ("objects", "colours"):
        assert not set(getattr(first, of)) & set(getattr(second, of))
    assert set(first.vocabulary) & set(second.vocabulary) == {"a", "an", ",", "in", "the"}
    assert not set(FIRST.looks) & set(SECOND.looks) and FIRST.seed != SECOND.seed


def test_the_second_familys_looks_are_other_ways_to_paint():
    """The scenes of one family in the looks of both: every look of the second is further from each of the first's than the twins are from
    each other."""
    scenes = [layers(scene) for scene in some_scenes(12, seed=2)]

    def painted(family, look):
        return coarse(np.stack([family.render_layers(s, look) for s in scenes]) / 255)

    first = {look: painted(FIRST, look) for look in FIRST.painted}
    twins = ((first["ink"] - first["pen"]) ** 2).mean()
    for look in SECOND.painted:
        mine = painted(SECOND, look)
        nearest = min((((mine - theirs) ** 2).mean(), name) for name, theirs in first.items())
        assert nearest[0] > 1.3 * twins, (look, nearest)


def test_the_first_familys_scenes_are_those_of_its_models():
    """The shipped models and figures belong to these scenes: digests of 50 scenes and captions, taken before there was a second family."""
    scenes = some_scenes(50, seed=5)
    said = [tuple(v for name, v in vars(scene).items() if name != "world") for scene in scenes]
    assert sha256(repr(said).encode()).hexdigest().startswith("3e221a44fd34")
    _, captions = demo_images(("plain",), 45, 3)
    assert sha256("\n".join(captions).encode()).hexdigest().startswith("785abce7bda0")


def test_a_familys_scenes_in_a_look_of_another():
    """As pictures to learn a style from: what the demo models know, in a look that they do not."""
    pictures, captions = demo_images(("woodcut",), 3, 5)
    assert captions == demo_images(("plain",), 3, 5)[1]
    for picture, scene in zip(pictures, some_scenes(3, seed=5)):
        assert (picture == SECOND.render(scene, "woodcut")).all()
    with pytest.raises(ValueError, match="unknown look 'oil'"):
        demo_images(("oil",), 1, 0)


def test_control_hint_traces_the_silhouette():
    for scene in some_scenes(16):
        hint, mask = control_hint(scene), layers(scene).mask[..., 0]
        assert hint.shape == (SIZE, SIZE, 3) and hint.dtype == np.uint8
        away = np.abs(brute_force_distance(mask))
        outline = hint[..., 0] > 200
        assert (hint[(away > 5) & (mask < 0.5)] == 0).all()
        assert away[outline].max() < 5.5
        to_line = np.linalg.norm(edge_points(mask)[:, None] - np.argwhere(outline), axis=2).min(1)
        assert to_line.max() < 3 and to_line.mean() < 1  # pixels: no part of the edge goes untraced


@each_family
def test_objects_stay_on_the_canvas(family):
    for scene in some_scenes(400, family=family):
        mask = layers(scene).mask[..., 0]
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0


@pytest.mark.parametrize("field", ["shape", "colour", "background"])
def test_unknown_words_are_named(field):
    scene = dataclasses.replace(Scene("cat", "red", "sea"), **{field: "wrong"})
    with pytest.raises(ValueError, match=f"unknown {field} 'wrong': choose one of"):
        layers(scene)


def test_unknown_looks_and_families_are_named():
    with pytest.raises(ValueError, match="unknown look 'oil': choose one of plain"):
        FIRST.render(Scene("cat", "red", "sea"), "oil")
    with pytest.raises(ValueError, match="unknown look 'ink': choose one of clay"):
        SECOND.render(some_scenes(1, family=SECOND)[0], "ink")
    with pytest.raises(ValueError, match="no demo family 'third': choose from first, second"):
        family_named("third")


@pytest.fixture(scope="module")
def judge():
    return classifier.train_classifier(seed=0, samples=3200)


def test_classifier_learns_from_little(judge):
    """50 steps: look and colour are far above chance (1/9 and 1/7), so labels and pictures belong together."""
    images, labels = classifier.labelled_renders(np.random.default_rng(99), 16)
    share = classifier.accuracy(judge, images.float() / 127.5 - 1, labels)
    assert share["look"] > 0.35 and share["colour"] > 0.7, share


def test_labels_follow_the_scene():
    rng = np.random.default_rng(5)
    images, labels = classifier.labelled_renders(np.random.default_rng(5), 4)
    expected = [
        [getattr(scene, q) for q in ("shape", "colour", "background")] + [look]
        for scene in (sample_scene(rng) for _ in range(4))
        for look in FIRST.looks
    ]
    classes = classifier.classes_of()
    assert [[classes[q][i] for q, i in zip(classes, row)] for row in labels.tolist()] == expected
    assert images.shape == (len(expected), 3, SIZE, SIZE)


def test_classifier_survives_its_file(judge, tmp_path):
    path = tmp_path / "judge.safetensors"
    classifier.save_classifier(path, judge)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.stat().st_size < 500_000
    again = classifier.load_classifier(path)
    x = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    before, after = classifier.classify(judge, x), classifier.classify(again, x)
    assert again.classes == judge.classes
    for question, answers in judge.classes.items():
        assert before[question].shape == (3, len(answers))
        torch.testing.assert_close(after[question], before[question], atol=0.02, rtol=0.02)  # half precision weights


def test_foreign_file_and_wrong_size_are_refused(judge, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="demo.classifier is None, expected '1'"):
        classifier.load_classifier(path)
    with pytest.raises(ValueError, match=r"\(B, 3, 128, 128\), got \(1, 3, 64, 64\)"):
        classifier.classify(judge, torch.zeros(1, 3, 64, 64))


def test_disturbance_keeps_range_and_repeats():
    x = classifier.labelled_renders(np.random.default_rng(0), 1)[0].float() / 127.5 - 1
    once, twice = (classifier.disturb(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(once, twice) and once.shape == x.shape and once.abs().max() <= 1
    assert 0.02 < (once - x).abs().mean() < 0.4


def test_the_shipped_judge_reads_fresh_renders():
    path = Path(__file__).parents[2] / "models" / "demo-classifier.safetensors"
    model = classifier.load_classifier(path)
    assert model.classes == classifier.classes_of()  # else the scenes changed after it was trained
    images, labels = classifier.labelled_renders(np.random.default_rng(2024), 40)
    share = classifier.accuracy(model, images.float() / 127.5 - 1, labels)
    assert min(share["shape"], share["colour"], share["background"]) >= 0.98 and share["look"] >= 0.95, share
