"""Prompt encoding against open_clip's own tokenizer and text network."""

import logging

import pytest
import torch
from comfyui_dmm.training import host_path, text
from comfyui_dmm.training.files.clip_layout import from_open_clip
from comfyui_dmm.training.host_path import TOKENIZER, find_host
from comfyui_dmm.training.text import END, SD1_PREFIX, START, ClipText, context_layer, init_text, windows
from torch import nn

open_clip = pytest.importorskip("open_clip", reason="needs the headless extra")

PROMPTS = ["", "a red star", "A Photo of a CAT, 35mm; f/1.8 -- don't crop!", "[brackets] {braces} #tag @home 2024"]
LONG = ", ".join(["a tall tree by the sea"] * 15)


@pytest.fixture
def no_host(monkeypatch):
    """A machine without ComfyUI: the vocabulary then comes from open_clip's package."""
    monkeypatch.setattr(text, "find_host", lambda: None)
    text.load_tokenizer.cache_clear()
    yield
    text.load_tokenizer.cache_clear()


def reference(width, layers, act_layer=nn.GELU):
    """open_clip's own text transformer with random weights, the norms' included."""
    torch.manual_seed(0)
    model = open_clip.transformer.TextTransformer(
        width=width, heads=max(1, width // 64), layers=layers, act_layer=act_layer
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def reference_encode(model, prompts, pad, skip):
    """(states before the last ``skip`` layers, their norm, projected text at the end token); short prompts only."""
    ids = torch.tensor([windows(open_clip.tokenizer._tokenizer.encode(p), pad)[0] for p in prompts])
    x = model.token_embedding(ids) + model.positional_embedding
    states = [x]
    for block in model.transformer.resblocks:
        x = block(x, attn_mask=model.attn_mask)
        states.append(x)
    last = model.ln_final(x)
    pooled = torch.stack([row[i] for row, i in zip(last, (ids == END).int().argmax(-1))]) @ model.text_projection
    state = states[len(states) - 1 - skip]
    return state, model.ln_final(state), pooled


def sd2_file(model, prefix="cond_stage_model.model."):
    return {prefix + k: v for k, v in model.state_dict().items()}


def sd1_file(model):
    return {SD1_PREFIX + k: v for k, v in from_open_clip(model.state_dict())[0].items()}


def test_the_vocabulary_from_open_clip_is_clips(no_host):
    tokenizer = text.load_tokenizer()
    for prompt in [*PROMPTS, LONG]:
        expected = open_clip.tokenizer._tokenizer.encode(prompt)
        assert tokenizer(prompt)["input_ids"] == [START, *expected, END], prompt


def test_both_vocabularies_are_one(no_host):
    host = find_host()
    if host is None:
        pytest.skip("no ComfyUI to compare with: set COMFYUI_PATH")
    from transformers import CLIPTokenizer

    theirs, ours = CLIPTokenizer.from_pretrained(str(host / TOKENIZER)), text.load_tokenizer()
    assert theirs.get_vocab() == ours.get_vocab()
    for prompt in [*PROMPTS, "naïve café, 日本語 ✨ “quoted” &amp; ﬁne", "<|endoftext|> inside", "tabs\tand\nlines  "]:
        assert theirs(prompt)["input_ids"] == ours(prompt)["input_ids"], prompt


@pytest.mark.parametrize("count, expected", [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_windows_hold_75_words_each(count, expected):
    words = list(range(1000, 1000 + count))
    rows = windows(words, pad=0)
    assert len(rows) == expected and {len(row) for row in rows} == {77}
    assert all(row[0] == START and row.count(END) == 1 for row in rows)
    assert [t for row in rows for t in row[1 : row.index(END)]] == words
    assert not any(t for row in rows for t in row[row.index(END) + 1 :])


def test_sd1_equals_open_clip():
    model = reference(64, 3, open_clip.transformer.QuickGELU)
    for skip in (0, 1):
        _, expected, _ = reference_encode(model, PROMPTS, pad=END, skip=skip)
        context, pooled = ClipText(sd1_file(model), clip_skip=skip + 1).encode_pooled(PROMPTS)
        torch.testing.assert_close(context, expected, rtol=0, atol=1e-4)
        assert pooled is None


def test_sd2_equals_open_clip():
    model = reference(128, 3)
    _, expected, _ = reference_encode(model, PROMPTS, pad=0, skip=1)
    torch.testing.assert_close(ClipText(sd2_file(model)).encode(PROMPTS), expected, rtol=0, atol=1e-4)


def test_sdxl_equals_open_clip():
    small, big = reference(64, 2, open_clip.transformer.QuickGELU), reference(128, 3)
    file = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in sd1_file(small).items()}
    file |= sd2_file(big, "conditioner.embedders.1.model.")
    context, pooled = ClipText(file).encode_pooled(PROMPTS)
    state_l, _, _ = reference_encode(small, PROMPTS, pad=END, skip=1)
    state_g, _, expected = reference_encode(big, PROMPTS, pad=0, skip=1)
    torch.testing.assert_close(context, torch.cat([state_l, state_g], dim=-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-4)


def test_a_batch_equals_its_prompts_and_short_ones_are_repeated():
    clip = ClipText(init_text(64, 2))
    prompts = ["a red star", LONG, "", LONG + LONG]  # 1, 2, 1 and 3 windows
    batch = clip.encode(prompts)
    assert batch.shape == (4, 6 * 77, 64)
    for row, prompt in zip(batch, prompts):
        alone = clip.encode([prompt])[0]
        torch.testing.assert_close(row, alone.repeat(len(row) // len(alone), 1), rtol=0, atol=1e-5)
    query = torch.randn(5, 64)
    attend = nn.functional.scaled_dot_product_attention
    alone = clip.encode(prompts[:1])[0]
    torch.testing.assert_close(attend(query, batch[0], batch[0]), attend(query, alone, alone), rtol=0, atol=1e-5)


def test_more_prompts_than_one_forward_takes(monkeypatch):
    clip = ClipText(init_text(64, 1))
    whole = clip.encode([*PROMPTS, LONG])
    monkeypatch.setattr(text, "WINDOWS_PER_FORWARD", 2)
    torch.testing.assert_close(clip.encode([*PROMPTS, LONG]), whole, rtol=0, atol=1e-5)


def test_weights_round_trip_through_the_file_layout():
    weights = init_text(64, 2)
    saved = ClipText(weights).file_state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[k], weights[k]) for k in weights)
    with pytest.raises(ValueError, match="only SD1.x"):
        ClipText(sd2_file(reference(64, 2))).file_state_dict()


def test_names_of_older_files_are_read():
    weights = init_text(64, 1)
    old = {k.replace("text_model.", ""): v for k, v in weights.items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    extra = {
        "cond_stage_model.transformer.text_projection.weight": torch.eye(64),
        "cond_stage_model.logit_scale": torch.ones(()),
    }
    expected = ClipText(weights).encode(PROMPTS)
    for file in (old, weights | extra):
        assert torch.equal(ClipText(file).encode(PROMPTS), expected)


def test_the_text_encoder_trains_and_leaves_the_file_alone():
    weights = init_text(64, 1)
    copies = {k: v.clone() for k, v in weights.items()}
    clip = ClipText(weights)
    context, _ = clip(PROMPTS)
    context.square().sum().backward()
    assert all(p.grad is not None for p in clip.parameters())
    torch.optim.SGD(clip.parameters(), lr=1.0).step()
    assert all(torch.equal(weights[k], copies[k]) for k in weights)
    assert not clip.encode(PROMPTS).requires_grad


def test_the_unused_last_layer_of_vit_h_may_be_missing():
    assert context_layer(1024, 24, skip=1) == context_layer(1024, 23, skip=1) == 23
    assert context_layer(64, 23, skip=1) == 22
    with pytest.raises(ValueError, match="clip skip 1"):
        context_layer(1024, 23, skip=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.clear(), "no text encoder"),
        (
            lambda w: w.pop(SD1_PREFIX + "embeddings.token_embedding.weight"),
            "'embeddings.token_embedding.weight' is missing",
        ),
        (lambda w: w.pop(SD1_PREFIX + "final_layer_norm.bias"), "'final_layer_norm.bias'"),
        (lambda w: w.update({SD1_PREFIX + "embeddings.token_embedding.weight": torch.zeros(9, 64)}), "9 tokens"),
    ],
)
def test_a_wrong_text_encoder_is_refused(change, message):
    weights = init_text(64, 1)
    change(weights)
    with pytest.raises(ValueError, match=message):
        ClipText(weights)


def test_wrong_arguments_are_refused():
    weights = init_text(64, 2)
    for skip in (0, 3):
        with pytest.raises(ValueError, match="clip.skip"):
            ClipText(weights, clip_skip=skip)
    clip = ClipText(weights)
    for prompts in ("a red star", []):
        with pytest.raises(ValueError, match="list of at least one prompt"):
            clip.encode(prompts)


def test_no_vocabulary_anywhere_says_what_to_do(no_host, monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="COMFYUI_PATH"):
        text.load_tokenizer()


def test_the_host_is_found_in_the_documented_order(tmp_path, monkeypatch, caplog):
    def make(folder):
        (folder / TOKENIZER).mkdir(parents=True)
        (folder / TOKENIZER / "vocab.json").write_text("{}")
        return folder

    named, home = tmp_path / "named", make(tmp_path / "home" / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    monkeypatch.setattr(host_path.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(host_path.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert find_host() == home
    assert str(named) in caplog.text
    parent = make(tmp_path / "parent")
    monkeypatch.setattr(host_path, "__file__", str(parent / "custom_nodes" / "pack" / "training" / "host_path.py"))
    assert find_host() == parent
    assert find_host() == parent and make(named) == find_host()


def test_no_host_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(host_path, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.setattr(host_path.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(host_path.importlib.util, "find_spec", lambda name: None)
    assert find_host() is None
