"""Compact storage of a token table: only the rows that training changed.

CLIP's vocabulary has 49408 rows; a text encoder trained on a small vocabulary leaves most of them equal. Such a table
is stored as its distinct rows and then the one row that stands for all others; the distinct rows' token ids lie beside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
IDS = "cond_stage_model.dmm_token_ids"
NUM_TOKENS = 49408
MAX_WIDTH = 1280
"""No CLIP text encoder is wider; without a bound, a file of a few bytes could ask for any amount of memory."""


def compact_vocabulary(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's tensors with the token table compacted where that is shorter; bit-exact to undo.

    The table (49408, d) becomes (V, d) plus the token ids (V-1,), int32, of all rows but the last.
    """
    text = dict(text)
    table = text.get(TABLE)
    if table is None or table.ndim != 2 or table.shape[0] != NUM_TOKENS:
        return text
    # A row that more than half of the tokens have is the median of every column. As bits, so that -0.0 and 0.0 differ.
    bits = table.detach().cpu().contiguous().view(_BITS[table.element_size()])  # (49408, d)
    common = bits.median(dim=0).values  # (49408, d) -> (d,)
    used = (bits != common).any(dim=1).nonzero().flatten()  # (49408, d) -> (V-1,)
    if 2 * len(used) >= NUM_TOKENS:
        return text
    text[TABLE] = torch.cat([bits[used], common[None]]).view(table.dtype)  # (V, d)
    text[IDS] = used.to(torch.int32)
    return text


def expand_vocabulary(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``compact_vocabulary``: the full table (49408, d) in the stored dtype, and no ids.

    Raises ValueError when the ids and the table do not belong together.
    """
    text = dict(text)
    ids = text.pop(IDS, None)
    if ids is None:
        return text
    table = text.get(TABLE)
    if table is None or table.ndim != 2 or ids.ndim != 1 or table.shape[0] != len(ids) + 1 or ids.is_floating_point():
        raise ValueError(
            f"the compact token table is damaged: '{IDS}' must list one id for every row but the last of '{TABLE}'"
        )
    if table.shape[1] > MAX_WIDTH:
        raise ValueError(f"the token table is {table.shape[1]} wide; CLIP text encoders have at most {MAX_WIDTH}")
    if len(ids) > NUM_TOKENS:
        raise ValueError(f"the compact token table is damaged: {len(ids)} ids, CLIP knows {NUM_TOKENS} tokens")
    ids = ids.long()
    if len(ids) and (ids.min() < 0 or ids.max() >= NUM_TOKENS or len(ids.unique()) != len(ids)):
        raise ValueError(f"the compact token table is damaged: '{IDS}' must hold different ids in 0..{NUM_TOKENS - 1}")
    if table.is_meta:  # only the header of the file was read
        text[TABLE] = table.new_empty(NUM_TOKENS, table.shape[1])
        return text
    full = table[-1:].repeat(NUM_TOKENS, 1)  # (V, d) -> (49408, d)
    full.view(torch.uint8)[ids] = table[:-1].contiguous().view(torch.uint8)  # torch 2.4 cannot index float8
    text[TABLE] = full
    return text


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
