"""VTW: at some depth the text has taken from the image what it needs, and from there on no visual token is left.

Nothing is scored: every layer before k sees all visual tokens, and every layer from k on sees none. What is to be
found is k, by calibration: the first layer at which withdrawal hardly changes the next token's distribution.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoder.layer_counts import distinct_cuts, in_proportion, unreachable
from ..decoder.view import DecoderView
from ..evaluation_mode import evaluating
from .base import register_reducer
from .one_cut import FirstCutReducer


@register_reducer("vtw")
class VTWReducer(FirstCutReducer):
    """
    Visual tokens withdrawal (arXiv 2405.05803): all visual tokens leave before layer k.

    The official code has k = 15 of 32 in the model and 16 on the command line. Text keeps its original positions.

    A budget of K of N tokens is spent on whole layers, k = floor(K L / N). What is left, K L - k N tokens, stays for
    one layer more; they are spread evenly over the image. That layer is our completion, so that the mean is exact.

    Args:
        layer: k of the own rule (no budget), in [1, L - 1]; by default 15 of 32, in proportion. A budget below 1 / L
            is refused: layer 0 sees every token.
    """

    name, published_layer = "vtw", 15
    paper = "VTW (arXiv 2405.05803)"

    def cuts(self, num_layers: int) -> list[int]:
        """Layer 1: the order in which tokens leave is the same wherever they do."""
        return distinct_cuts([1], num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        if num_keep is None:
            return [num_visual if layer < self.first_cut(num_layers) else 0 for layer in range(num_layers)]
        total = num_keep * num_layers
        if total < num_visual:
            raise unreachable(self.name, num_visual, num_keep, num_visual / num_layers, "ask for more.")
        return [min(num_visual, max(0, total - index * num_visual)) for index in range(num_layers)]

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return evenly_spread_order(view.is_visual)


def evenly_spread_order(is_visual: torch.Tensor) -> torch.Tensor:
    """
    Scores of which the K highest stand at nearly even distances for every K: the bits of a token's number behind the
    point, in reverse order, negated (van der Corput's sequence). Half of the tokens are those with even numbers, a
    quarter those whose numbers four divides, and so on. `[batch, n]` bool -> `[batch, n]` float32.
    """
    number = is_visual.long().cumsum(dim=-1) - 1
    reversed_bits = torch.zeros(is_visual.shape, device=is_visual.device)
    # A float32 holds 24 of them, and no prompt shows 2^24 visual tokens.
    for bit in range(24):
        reversed_bits += ((number >> bit) & 1) * 0.5 ** (bit + 1)
    return -reversed_bits


@torch.no_grad()
def choose_withdrawal_layer(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    threshold: float = 0.003,
    layers: Sequence[int] | None = None,
) -> int:
    """
    The first layer before which visual tokens can be withdrawn: the smallest k at which the mean over prompts of
    KL(p_k || p), p_k and p the distributions of the first token of the answer with and without withdrawal, is no
    more than a threshold.

    The official code takes about 20 prompts, layers 5 to 31 of 32, and thresholds 0.003 (LLaVA-1.5-7B), 0.0005 (13B)
    and 0.0001 (LLaVA-1.6-7B).

    Args:
        model: an AdaVTP model.
        batches: of prompts, as the model's `forward` takes them, padded on the left and without an answer.
        threshold: the largest mean divergence that is allowed, in nats.
        layers: candidates, ascending; by default from 5 of 32, in proportion, to the last.

    Returns:
        k, for `{"name": "vtw", "layer": k}`.

    Raises:
        ValueError: if there is no prompt, one is padded on the right, or no candidate stays below the threshold.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("`batches` is empty; calibration needs prompts.")
    if any("attention_mask" in batch and not batch["attention_mask"][:, -1].all() for batch in batches):
        raise ValueError("`batches` holds prompts padded on the right; the answer's place has to be the last column.")
    num_layers = model.config.text_config.num_hidden_layers
    layers = range(in_proportion(5, num_layers), num_layers) if layers is None else layers
    with evaluating(model):
        full = [_log_probabilities(model, batch, token_budget=1.0) for batch in batches]
        divergences = {}
        for layer in layers:
            withdrawal = {"reducer": {"name": "vtw", "layer": layer}, "token_budget": None}
            withdrawn = [_log_probabilities(model, batch, **withdrawal) for batch in batches]
            divergences[layer] = _mean_divergence(torch.cat(withdrawn), torch.cat(full))
            if divergences[layer] <= threshold:
                return layer
    raise ValueError(
        f"`threshold` is {threshold}, and no layer's mean divergence is as low: "
        f"{', '.join(f'{layer}: {divergence:.2g}' for layer, divergence in divergences.items())}."
    )


def _log_probabilities(model: PreTrainedModel, batch: Mapping[str, Any], **how: Any) -> torch.Tensor:
    """Log-probabilities `[batch, vocabulary]` float32 of the token behind each prompt."""
    return model(**batch, **how, logits_to_keep=1).logits[:, -1].float().log_softmax(dim=-1)


def _mean_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Mean over rows of KL(p || q) = sum p (log p - log q)."""
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
