"""The demo family's text encoder: a two-layer CLIP text transformer that knows the captions' words.

It learns to say, from the states after the end of the text, which object, colour, backdrop and size a caption names. The
UNets are then trained on its frozen states, so one encoder serves the whole family. Tokens are CLIP's own; of the 49408
embedding rows only those of the captions' words are learned, and every other token shares one "unknown word" row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..data.demo.scenes import FIRST_WORLD, sample_scene
from ..data.demo.world import World
from ..text import load_tokenizer, windows

CLIP_VOCABULARY = 49408
START, END = 49406, 49407
LENGTH = 77
DIM = 64
PREFIX = "cond_stage_model.transformer."


def attributes(world: World) -> dict[str, tuple[str, ...]]:
    """What a caption can say; class 0 of each is "says nothing about it"."""
    return {
        "shape": ("", *world.objects),
        "colour": ("", *world.colours),
        "background": ("", *(b for b in world.backgrounds if b != "plain")),
        "size_word": ("", *(s for s in world.sizes if s)),
    }


def demo_text_config(vocab_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        projection_dim=DIM,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=0,  # ids of the short vocabulary; only the pooled state, which SD1.x does not use, would read them
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_token_ids(captions: Sequence[str]) -> Tensor:
    """Captions of at most 75 tokens -> (B, 77) token ids with start, end and padding."""
    tokenizer = load_tokenizer()
    return torch.tensor([windows(tokenizer(caption)["input_ids"][1:-1], END)[0] for caption in captions])


def known_token_ids(world: World) -> list[int]:
    """The sorted CLIP ids of the captions' words and of the two special tokens."""
    ids = clip_token_ids(world.vocabulary)  # (words, 77)
    return sorted(set(ids.flatten().tolist()) | {START, END})


def batch_of_captions(rng: np.random.Generator, size: int, world: World) -> tuple[list[str], dict[str, Tensor]]:
    """Captions with parts left out, words shuffled in, and nothing at all, with the classes that each still names."""
    known = attributes(world)
    captions, classes = [], {name: [] for name in known}
    for _ in range(size):
        scene = sample_scene(rng, world)
        named = {name: getattr(scene, name) for name in known}
        named["background"] = "" if scene.background == "plain" else scene.background
        text = scene.caption
        if rng.uniform() < 0.3:
            for name in ("shape", "colour", "size_word"):
                if named[name] and rng.uniform() < 0.4:
                    text, named[name] = text.replace(named[name], "").replace("  ", " "), ""
        if rng.uniform() < 0.2:
            text = str(rng.choice(["beautiful", "photo of", "masterpiece,", "my"])) + " " + text
        if rng.uniform() < 0.1:
            text, named = "", dict.fromkeys(known, "")
        captions.append(text)
        for name, value in named.items():
            classes[name].append(known[name].index(value))
    return captions, {name: torch.tensor(values) for name, values in classes.items()}


def train_text_encoder(
    steps: int = 700, *, batch: int = 64, lr: float = 2e-3, seed: int = 0, progress=None, world: World = FIRST_WORLD
):
    """Returns ({single-file key: tensor} with the full vocabulary, held-out accuracy with every attribute right)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    known = known_token_ids(world)
    row_of = torch.full((CLIP_VOCABULARY,), len(known))  # the last row is "unknown word"
    row_of[known] = torch.arange(len(known))
    model = CLIPTextModel(demo_text_config(len(known) + 1))
    heads = nn.ModuleDict({name: nn.Linear(DIM, len(values)) for name, values in attributes(world).items()})
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)

    def answers(captions: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        ids = clip_token_ids(captions)  # (B, 77)
        states = model(input_ids=row_of[ids]).last_hidden_state  # (B, 77, D)
        after = (ids == END).float()[..., None]  # the end token and the padding behind it
        return {name: head(states) for name, head in heads.items()}, after[..., 0]

    for step in range(steps):
        captions, classes = batch_of_captions(rng, batch, world)
        logits, after = answers(captions)
        loss = torch.zeros(())
        for name, target in classes.items():
            each = F.cross_entropy(logits[name].flatten(0, 1), target.repeat_interleave(LENGTH), reduction="none")
            loss = loss + (each * after.flatten()).sum() / after.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, loss.item())

    model.eval()
    with torch.no_grad():
        captions, classes = batch_of_captions(np.random.default_rng(seed + 1), 512, world)
        logits, after = answers(captions)
        last = {name: value[:, -1].argmax(-1) for name, value in logits.items()}
        right = torch.stack([last[name] == target for name, target in classes.items()]).all(0).float().mean().item()
    table = model.get_input_embeddings().weight.detach()
    weights = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("position_ids"):
            continue
        key = key if key.startswith("text_model.") else "text_model." + key
        if key.endswith("token_embedding.weight"):
            tensor = table[row_of]  # (V+1, D) -> (49408, D)
        weights[PREFIX + key] = tensor.detach().clone().contiguous()
    return weights, right
