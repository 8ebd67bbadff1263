"""RESTORE's rescaling of attention: what a reducer took from the image, the tokens that are left get back.

Of N visual tokens n are left, and each stands for N / n (arXiv 2606.01711, ICML 2026). A softmax over the rest gives
them less than their share; rotary positions turn queries from keys, the more the farther they are apart. In prefill
the logits get a bias: the logarithm of how many tokens a visual one stands for, and of how much distance has cost.
"""

import torch
from torch.nn.functional import normalize


def rescaling_bias(
    position_embeddings: tuple[torch.Tensor, torch.Tensor], is_visual: torch.Tensor, num_whole: torch.Tensor
) -> torch.Tensor:
    """
    What is added to the logits of attention, b_ij = log(2 - c(i - j)) + [j is visual] log(N / n): c is the mean over
    rotary frequencies of the cosine of the angle between two positions.

    As in the authors' code distances count between all columns, text among them, and only in prefill. Their merged
    tokens stand for as many as went into them, but in the first layer; here, where any reducer may have chosen, all
    stand for equally many in every layer. c is of the positions as they are, on all axes that a family has: the code
    works it out from LLaVA's, in whole numbers.

    Args:
        position_embeddings: cosines and sines of the columns' positions, `[batch, n, head_dim]`.
        is_visual: `[batch, n]` bool, the visual tokens that are left.
        num_whole: `[batch]` int64, N; a prompt that has all of them left gets no bias.

    Returns:
        `[batch, 1, n, n]` float32.
    """
    # Cosine and sine side by side are a vector of one length for all positions, and c the cosine of two of them.
    angles = normalize(torch.cat(position_embeddings, dim=-1).float(), dim=-1).expand(len(is_visual), -1, -1)
    distance = (2 - angles @ angles.transpose(1, 2)).log()
    num_left = is_visual.sum(dim=-1)
    stands_for = (num_whole.clamp(min=1) / num_left.clamp(min=1)).log()
    bias = distance + (is_visual * stands_for[:, None])[:, None]
    return bias.masked_fill((num_left == num_whole)[:, None, None], 0.0)[:, None]
