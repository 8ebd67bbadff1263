"""AutoPrune: every prompt has a schedule of its own, by what its question has to do with its image.

How much the question's attention tells of which visual token is a number, their mutual information, and it differs
from prompt to prompt (arXiv 2509.23931, NeurIPS 2025). It sets how steeply the number of visual tokens falls with
depth: an early look at everything and then a few, or a longer search.
"""

import math
from collections.abc import Sequence

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion, solved_counts
from ..decoder.reducer import DecoderReducer
from ..decoder.view import DecoderView, marked_columns
from .base import register_reducer
from .priortr import attention_of_question

# Of the authors' code: the share of the tokens at the head of the curve, its shift in layers, and what ratios of
# probabilities are kept above.
_HEAD, _SHIFT, _LEAST = 0.75, 14.9, 1e-6


@register_reducer("autoprune")
class AutoPruneReducer(DecoderReducer):
    """
    AutoPrune's schedule: behind layer p of 32 the share 0.75 / (1 + exp(k (p - 14.9 - k))) of the visual tokens is
    left, with k = max(0, k0 - gamma I) and I the mutual information of a prompt's question and image.

    Without a budget that is the curve as it stands, so that each prompt keeps another number of tokens; the authors'
    code returns it where no target is set. With a budget the curve is scaled, and held at 1, so that its mean over
    layers is exact; then prompts differ in where tokens leave. Layers 0 and 1 see all. For other depths p is in
    proportion.

    Tokens are ranked before every layer by the mean attention that they get from all text behind the image in the
    layer before. Left out of the authors' code: a first cut behind layer 0, to 2.5 K tokens by CLS's attention too,
    and the tokens into which what leaves is clustered with a random number in it. Where they count positions anew,
    here they are the model's to say (`visual_position_ids`).

    Args:
        k0: above 0, the steepness of a prompt whose question tells nothing of the image.
        gamma: 0 or more, how much information flattens the curve.
    """

    has_own_rule = True
    adapts = True
    paper = "AutoPrune (arXiv 2509.23931)"

    def __init__(self, config: AdaVTPConfig, k0: float = 0.4, gamma: float = 0.2) -> None:
        super().__init__(config)
        for name, value, least in (("k0", k0, "above 0"), ("gamma", gamma, "from 0")):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf or (name == "k0" and value == 0):
                raise ValueError(f"`{name}` is {value!r}; allowed are finite numbers {least}.")
        self.k0, self.gamma = k0, gamma

    def cuts(self, num_layers: int) -> list[int]:
        """Layer 2 of 32, and every one behind it."""
        return distinct_cuts(range(in_proportion(2, num_layers), num_layers), num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        """The counts of a prompt without information, the steepest; what is reached by one is reached by all."""
        return self.counts_of(self.k0, num_visual, num_keep, num_layers)

    def adapted_counts(
        self, view: DecoderView, num_visual: Sequence[int], num_keep: Sequence[int | None], num_layers: int
    ) -> list[list[int]]:
        """See [`DecoderReducer.adapted_counts`]."""
        steepness = (self.k0 - self.gamma * mutual_information(view)).clamp(min=0.0).tolist()
        num_keep = [keep if keep is None else min(keep, n) for keep, n in zip(num_keep, num_visual, strict=True)]
        return [self.counts_of(*prompt, num_layers) for prompt in zip(steepness, num_visual, num_keep, strict=True)]

    def counts_of(self, steepness: float, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        """The counts of a curve of some steepness k."""
        first = [*self.cuts(num_layers), num_layers][0]
        curve = [retained(steepness, (layer - 1) * 32 / num_layers) for layer in range(first, num_layers)]
        if num_keep is None:
            return [num_visual] * first + [min(num_visual, math.ceil((num_visual - 1) * share)) for share in curve]

        def shares(strength: float) -> list[float]:
            scale = math.inf if strength == 0.0 else 1.0 / strength - 1.0
            return [1.0] * first + [min(1.0, scale * share) for share in curve]

        return solved_counts("autoprune", shares, num_visual, num_keep, num_layers, "ask for more.")

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return attention_of_question(view)


def retained(steepness: float, layer: float) -> float:
    """The share of the visual tokens that is left behind a layer of 32, on a logistic curve."""
    return _HEAD / (1 + math.exp(steepness * (layer - _SHIFT - steepness)))


def mutual_information(view: DecoderView) -> torch.Tensor:
    """
    In bits, I = sum over heads of sum_tv p_tv log2(p_tv / (p_t p_v)), with p_tv = a_tv / T: a the attention of the T
    columns of text behind the image to the visual tokens, in the layer before, as it is; p_t = 1 / T and p_v = sum_t
    p_tv. `[batch]` float32, 0 where there is no such text.
    """
    rows, is_asking = marked_columns(view.is_question)
    weights = is_asking / is_asking.sum(dim=-1, keepdim=True).clamp(min=1)
    attention, is_visual = view.attention(rows, "previous"), view.is_visual[:, None, None]
    of_token = attention.received(weights[:, None])[:, :, None]
    information = of_token.new_zeros(len(of_token))
    for part, block in attention.blocks():
        of_text = weights[:, None, part, None]
        joint = block * of_text * is_visual
        ratio = joint / (of_text * of_token + _LEAST)
        information += (joint * ratio.clamp(min=_LEAST).log2()).sum(dim=(1, 2, 3))
    return information
