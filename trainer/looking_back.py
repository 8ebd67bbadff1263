"""A new decoder whose heads begin by looking back, by finding what is alike, and by copying what they find.

A decoder from nothing attends to all columns alike. To answer what a page says about a key it has to gather the key
from the question, find the same key among hundreds of visual tokens, and copy what stands beside it. It takes
thousands of steps until heads do all three by chance, and until then none of them learns anything. Trained decoders
have such heads: those that look at the token before, and those that complete what was seen before (induction heads,
arXiv 2209.11895). So a new one gets them, in every layer:

- The first heads look a certain number of columns back, whatever stands there. The biases of their queries and keys
  are one vector, turned by rotary embeddings as far as those columns are apart.
- All others find what is alike: their queries and keys are the same linear map, in those dimensions that rotary
  embeddings hardly turn within a prompt.
- Every head copies what it finds: its output is a projection of its input. Those that find what is alike take turns in
  turning it by a quarter of the width, which makes of a word that is told in another role the word itself (see
  [`told_embeddings`]).

Its word embeddings are large enough for a head that shares their weight to name what was copied. Everything is trained
further.
"""

import math
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

Number = TypeVar("Number", int, torch.Tensor)

OFFSETS: tuple[int, ...] = (1, 2, 3, 4)
"""Columns back at which a head looks."""

NUM_ROLES = 3
"""Of words that are told, among heads that find what is alike."""

# Logits between columns that a head looks at and the ones beside them, and between what is alike and what is not.
_LOOKING_GAIN, _LIKENESS_GAIN = 8.0, 6.0
# Of each head's output in the residual stream.
_COPYING_GAIN = 0.5
# Standard deviation of word embeddings.
_WORD_SIZE = 0.1
# Rotary frequencies, in radians a column: as many of the fastest tell neighbours apart, and what turns less than this
# is alike anywhere in a prompt.
_NUM_FAST, _SLOW = 4, 0.005


def turn_of_role(role: Number, width: int) -> Number:
    """By how many entries the embedding of a word is turned that is told in a role, a number or a tensor of them."""
    return role * (width // 4)


@torch.no_grad()
def look_back(decoder: PreTrainedModel) -> None:
    """
    Gives a new Llama decoder its first heads, in place.

    Args:
        decoder: with `attention_bias`, as many key as query heads, and more of them than `OFFSETS`.

    Raises:
        ValueError: if it has no such heads, or no rotary frequencies that are slow enough (see `rope_theta`).
    """
    config, frequencies = decoder.config, decoder.rotary_emb.inv_freq
    num_heads, num_slow = config.num_attention_heads, int((frequencies < _SLOW).sum())
    if not config.attention_bias or num_heads <= len(OFFSETS) or config.num_key_value_heads != num_heads:
        raise ValueError(
            f"the decoder has `attention_bias` {config.attention_bias}, `num_attention_heads` {num_heads} and "
            f"`num_key_value_heads` {config.num_key_value_heads}; allowed are True, and the same number of both, "
            f"{len(OFFSETS) + 1} or more."
        )
    if num_slow < 2 or len(frequencies) - num_slow < _NUM_FAST:
        raise ValueError(
            f"of {len(frequencies)} rotary frequencies {num_slow} are below {_SLOW}; allowed are 2 to "
            f"{len(frequencies) - _NUM_FAST}. Choose another `rope_theta` or `head_dim`."
        )
    nn.init.normal_(decoder.get_input_embeddings().weight, std=_WORD_SIZE)
    for layer in decoder.layers:
        attention = layer.self_attn
        for number in range(num_heads):
            rows = slice(number * attention.head_dim, (number + 1) * attention.head_dim)
            copied = _projection(attention.head_dim, config.hidden_size)
            role = max(number - len(OFFSETS), 0) % NUM_ROLES
            attention.v_proj.weight[rows] = copied
            attention.o_proj.weight[:, rows] = (
                _COPYING_GAIN * copied.roll(-turn_of_role(role, config.hidden_size), 1).T
            )
            if number < len(OFFSETS):
                attention.q_proj.bias[rows], attention.k_proj.bias[rows] = _looking(OFFSETS[number], frequencies)
            else:
                alike = _likeness(num_slow, attention.head_dim, config.hidden_size)
                attention.q_proj.weight[rows] += alike
                attention.k_proj.weight[rows] += alike


def _projection(num_rows: int, width: int) -> torch.Tensor:
    """Orthonormal rows `[num_rows, width]`."""
    return nn.init.orthogonal_(torch.empty(num_rows, width))


def _looking(offset: int, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Biases of query and key `[head_dim]` whose product at a distance d is proportional to
    sum_f cos(f (d - offset)), over the fastest frequencies.
    """
    half = len(frequencies)
    size = (_LOOKING_GAIN * math.sqrt(2 * half)) ** 0.5
    query, key, fast = torch.zeros(2 * half), torch.zeros(2 * half), torch.arange(_NUM_FAST)
    # Rotary embeddings turn dimension i and i + head_dim / 2 together.
    key[fast] = size
    query[fast] = size * torch.cos(offset * frequencies[fast])
    query[fast + half] = -size * torch.sin(offset * frequencies[fast])
    return query, key


def _likeness(num_slow: int, head_dim: int, width: int) -> torch.Tensor:
    """
    A map `[head_dim, width]` into the slowest dimensions, for queries and keys: of states whose entries are about 1
    the product with itself, over the root of `head_dim`, is about `_LIKENESS_GAIN`.
    """
    mapped = _projection(2 * num_slow, width) * (_LIKENESS_GAIN * math.sqrt(head_dim) / (2 * num_slow)) ** 0.5
    weight, half = torch.zeros(head_dim, width), head_dim // 2
    weight[half - num_slow : half], weight[head_dim - num_slow :] = mapped[:num_slow], mapped[num_slow:]
    return weight
