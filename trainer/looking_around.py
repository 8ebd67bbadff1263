"""A new vision tower whose heads begin by looking at neighbours, along rows and down columns.

A tower from nothing attends to all patches alike, and from there it takes thousands of steps until a head finds out
that what belongs to a glyph is the glyph beside it. Trained towers have such heads. So a new one gets them: its
position embeddings are sines and cosines of row and column, and in every layer the query of some heads is the key of
a patch some places away, turned there by the rotation that takes one position's sines and cosines to the other's.
Everything is trained further.
"""

import math

import torch
from transformers import PreTrainedModel

from ..modeling.vision.tower import tower_layers

# Rows down and columns to the right at which a head looks; `None`: anywhere in its row, or in its column.
HEADS: tuple[tuple[int | None, int | None], ...] = ((0, -1), (0, 1), (0, -3), (0, 3), (0, None), (0, None), (None, 0))
# How much larger than that of other heads the logits of these are: about 4 between a place and the one beside it.
GAIN = 1.7


@torch.no_grad()
def look_around(tower: PreTrainedModel) -> None:
    """
    Gives a new CLIP tower its first positions and its first heads, in place. The first heads of every layer are those
    of `HEADS`; further ones stay as they are.

    Raises:
        ValueError: if the tower's width is not a multiple of 4, or its heads are fewer than `HEADS`, or not a multiple
            of 4 wide.
    """
    config = tower.config
    side, width, num_heads = config.image_size // config.patch_size, config.hidden_size, config.num_attention_heads
    head_dim = width // num_heads
    if width % 4 or head_dim % 4 or num_heads < len(HEADS):
        raise ValueError(
            f"the tower has {num_heads} heads of {head_dim}, {width} together; allowed are {len(HEADS)} heads and "
            "more, and multiples of 4."
        )
    frequencies = _frequencies(side, width // 4)
    tower.embeddings.position_embedding.weight[-(side**2) :] = _positions(side, frequencies)
    for layer in tower_layers(tower):
        attention = layer.self_attn
        for number, (down, right) in enumerate(HEADS):
            rows = slice(number * head_dim, (number + 1) * head_dim)
            query, key = _head(down, right, frequencies, head_dim)
            attention.q_proj.weight[rows] += GAIN * query
            attention.k_proj.weight[rows] += GAIN * key


def _frequencies(side: int, count: int) -> torch.Tensor:
    """From pi, where neighbours are opposites, to pi / side, where the page is half a turn: `[count]`, geometric."""
    return math.pi * side ** (-torch.arange(count) / (count - 1))


def _positions(side: int, frequencies: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the row, then of the column: `[side^2, 4 * len(frequencies)]`."""
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=-1)


def _head(
    down: int | None, right: int | None, frequencies: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Query and key weights `[head_dim, width]` whose product is sum_f cos(f (r' - r - down)) + cos(f (c' - c - right)),
    over frequencies spread evenly, for a query at row r and column c and a key at r' and c'.
    """
    count, offsets = len(frequencies), [(axis, by) for axis, by in enumerate((down, right)) if by is not None]
    per_axis = head_dim // 2 // len(offsets)
    # Not the very first: at whole places the sine of pi times the place is 0.
    chosen = torch.linspace(1, count * 0.8, per_axis).round().long()
    query, key = torch.zeros(head_dim, 4 * count), torch.zeros(head_dim, 4 * count)
    for number, (axis, by, frequency) in enumerate((a, b, f) for a, b in offsets for f in chosen.tolist()):
        sine, cosine = 2 * axis * count + frequency, (2 * axis + 1) * count + frequency
        turn = float(frequencies[frequency] * by)
        key[2 * number, sine] = key[2 * number + 1, cosine] = 1.0
        query[2 * number, sine], query[2 * number, cosine] = math.cos(turn), math.sin(turn)
        query[2 * number + 1, cosine], query[2 * number + 1, sine] = math.cos(turn), -math.sin(turn)
    return query, key
