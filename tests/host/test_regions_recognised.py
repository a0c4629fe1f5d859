"""Regions of the shipped demo model, judged by the classifier that was trained on rendered scenes: is each in its style?

The classifier looks at squares of 128 pixels, the size it knows. Figures are printed (``-s`` shows them).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_dmm.training.demo.classifier import classify, load_classifier

MODELS = Path(__file__).parents[2] / "models"
SIZE, SEEDS = 128, 6
LOOKS = ("candy", "sticker", "pixel")
PROMPTS = ("a red heart", "a pink flower", "an orange cat")


class Demo:
    """The demo model in the in-process host."""

    def __init__(self):
        from comfyui_dmm.nodes import host_model

        with torch.inference_mode():
            self.model, self.clip, self.vae, _ = host_model.load(str(MODELS / "dmm" / "demo-dmm.safetensors"))
        self.classifier = load_classifier(MODELS / "demo-classifier.safetensors")

    @torch.inference_mode()
    def text(self, prompt):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    @torch.inference_mode()
    def paint(self, prompts, width, height=SIZE, seed=0, model=None):
        """-> (3, height, width) in [-1, 1]."""
        import comfy.sample

        latent = torch.zeros(1, 4, height // 8, width // 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        out = comfy.sample.sample(
            *(model or self.model, noise, 12, 4.0, "dpmpp_2m", "karras", *prompts, latent), disable_pbar=True, seed=seed
        )
        return self.vae.decode(out)[0].permute(2, 0, 1) * 2 - 1

    def shares(self, pictures, question="look") -> np.ndarray:
        """(B, answers) probabilities; the pictures' middle 128 pixels count."""
        return classify(self.classifier, torch.stack(list(pictures)).contiguous())[question].softmax(1).numpy()

    def names(self, pictures, question="look") -> list[str]:
        return [self.classifier.classes[question][i] for i in self.shares(pictures, question).argmax(1)]

    def look(self, name: str) -> int:
        return self.classifier.classes["look"].index(name)


@pytest.fixture(scope="module")
def demo(host):
    return Demo()


def region(style, index, count, **kwargs):
    from comfyui_dmm.nodes.regions import DMMRegion

    return DMMRegion.execute(style, index / count, 0.0, 1 / count, 1.0, "feather", 8, **kwargs)[0]


def mix(demo, regions, mode="own prompts", prompt=""):
    from comfyui_dmm.nodes.regions import StyleMix

    named = {f"region{i}": r for i, r in enumerate(regions)}
    return StyleMix.execute(demo.model, demo.text(prompt), demo.text(""), "none", mode, named).args


def test_every_region_shows_its_style_and_its_object(demo):
    """Three regions side by side with prompts of their own: at least 85% of the squares are named right, look and object."""
    regions = [region(look, i, 3, positive=demo.text(prompt)) for i, (look, prompt) in enumerate(zip(LOOKS, PROMPTS))]
    prompts = mix(demo, regions)
    canvases = [demo.paint(prompts, 3 * SIZE, seed=seed) for seed in range(SEEDS)]
    right = {"look": 0, "shape": 0}
    for i, (look, prompt) in enumerate(zip(LOOKS, PROMPTS)):
        squares = [canvas[..., i * SIZE : (i + 1) * SIZE] for canvas in canvases]
        right["look"] += demo.names(squares).count(look)
        right["shape"] += demo.names(squares, "shape").count(prompt.split()[-1])
    total = 3 * SEEDS
    print(f"regions with own prompts: look right in {right['look']} of {total}, object in {right['shape']} of {total}")
    assert right["look"] >= 0.85 * total and right["shape"] >= 0.85 * total, right


def test_over_a_seam_one_style_gives_way_to_the_other(demo):
    """A square that slides from one region into the next: the first style's share falls, the second's rises, and on average
    nothing else is seen as much as these two."""
    regions = [region(look, i, 2, positive=demo.text("a red heart")) for i, look in enumerate(("candy", "pixel"))]
    prompts = mix(demo, regions)
    canvases = [demo.paint(prompts, 2 * SIZE, seed=seed) for seed in range(SEEDS)]
    places = range(0, SIZE + 1, 16)
    shares = np.stack([demo.shares([c[..., x : x + SIZE] for c in canvases]).mean(0) for x in places])
    first, second = shares[:, demo.look("candy")], shares[:, demo.look("pixel")]
    for x, a, b in zip(places, first, second):
        print(f"window at {x:3d} pixels: candy {a:.2f}, pixel {b:.2f}, others {1 - a - b:.2f}")
    assert first[0] > 0.8 and second[-1] > 0.8 and first[-1] < 0.1 and second[0] < 0.1
    assert np.mean(np.diff(first) <= 0.05) >= 0.8 and np.mean(np.diff(second) >= -0.05) >= 0.8
    assert (first + second).mean() > 0.6


def test_a_panorama_shows_its_styles(demo):
    """Three parts over three overlapping tiles: at least 70% of the tiles show their part's look."""
    from comfyui_dmm.dmm_core.regions import tiles
    from comfyui_dmm.nodes.regions import StylePanorama

    parts = {
        f"region{i}": region(look, 0, 1, positive=demo.text(prompt))
        for i, (look, prompt) in enumerate(zip(LOOKS, PROMPTS))
    }
    width = 320
    prompts = StylePanorama.execute(demo.model, demo.text(""), demo.text(""), SIZE, SIZE, 0.25, parts).args
    canvases = [demo.paint(prompts, width, seed=seed) for seed in range(SEEDS)]
    (row,) = tiles(16, width // 8, 16, 16, overlap=0.25)
    right = 0
    for i, (_, _, _, left) in enumerate(row):
        squares = [canvas[..., 8 * left : 8 * left + SIZE] for canvas in canvases]
        right += demo.names(squares).count(LOOKS[i * 3 // len(row)])
    total = len(row) * SEEDS
    print(f"panorama: look right in {right} of {total} tiles")
    assert right >= 0.7 * total, right


def test_one_pass_paints_each_half_in_its_style(demo):
    """Beside the pass per style (masks on the whole canvas): how often each half is named right, and how far apart they are."""
    right = {}
    pictures = {}
    for mode in ("own prompts", "one pass"):
        regions = [region(look, i, 2, paint_on="whole canvas") for i, look in enumerate(("candy", "pixel"))]
        prompts = mix(demo, regions, mode, "a red heart")
        pictures[mode] = [demo.paint(prompts, 2 * SIZE, seed=seed) for seed in range(SEEDS)]
        halves = [demo.names([c[..., x : x + SIZE] for c in pictures[mode]]) for x in (0, SIZE)]
        right[mode] = halves[0].count("candy") + halves[1].count("pixel")
    gap = np.mean([(a - b).abs().mean().item() for a, b in zip(*pictures.values())]) / 2
    print(f"halves named right of {2 * SEEDS}: {right}; mean difference {gap:.3f} of the range")
    assert right["own prompts"] >= 0.8 * 2 * SEEDS and right["one pass"] >= 0.6 * 2 * SEEDS, right
