"""Reducers that act inside the language model: visual tokens leave before some of its layers.

How many leave where is a list of counts, one for each layer, whose mean is what the token budget says. Which ones
leave is decided by scores, which a method reads off the two layers around the cut.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.top_k import top_k_mask
from ..reducers.base import TokenReducer
from .view import DecoderView


class DecoderReducer(TokenReducer):
    """
    Base class of reducers inside the decoder. Write `layer_counts`, `cuts` and `scores`; to merge tokens, `reduce`; to
    give each prompt a schedule of its own, `adapted_counts`.

    Attributes:
        adapts: whether the schedule is decided at the first cut, by what is seen there, in place of `layer_counts`.
    """

    stage: ClassVar[str] = "decoder"
    adapts: ClassVar[bool] = False

    def cuts(self, num_layers: int) -> list[int]:
        """The layers k, ascending and at least 1, before which tokens are scored anew."""
        raise NotImplementedError(f"{type(self).__name__} has to define cuts(num_layers).")

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        """
        How many visual tokens each layer sees.

        Args:
            num_visual: visual tokens that enter layer 0.
            num_keep: their mean number over layers, in [0, num_visual]; `None` for the method's own schedule.
            num_layers: of the decoder.

        Returns:
            `num_layers` counts that never rise, from `num_visual` on, all the same up to the first cut. With
            `num_keep` their sum is `num_keep * num_layers`.

        Raises:
            ValueError: if no such counts exist; the message says which budgets can be reached.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to define layer_counts(num_visual, num_keep, num_layers)."
        )

    def adapted_counts(
        self, view: DecoderView, num_visual: Sequence[int], num_keep: Sequence[int | None], num_layers: int
    ) -> list[list[int]]:
        """
        Of a reducer that `adapts`, what `layer_counts` says of each prompt, and what it has seen of it.

        Args:
            view: the sequence at the first cut.
            num_visual, num_keep: of each prompt, see [`layer_counts`].
            num_layers: of the decoder.

        Returns:
            Of each prompt as many counts, up to the first cut those of `layer_counts`.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define adapted_counts(view, ...).")

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        """
        Args:
            view: the sequence at the cut.
            cut: the cut's number, from 0.

        Returns:
            `[batch, n]`, larger for what should stay; only those of visual tokens count.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define scores(view, cut).")

    def reduce(
        self, view: DecoderView, scores: torch.Tensor, num_keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Drops the visual tokens with the lowest scores; of equal ones the later go.

        Args:
            view: the sequence at the cut.
            scores: `[batch, n]`.
            num_keep: `[batch]` int64, visual tokens that stay.

        Returns:
            Which columns stay, `[batch, n]` bool (text and padding always do), and the hidden states
            `[batch, n, hidden_size]`, changed where a column that stays stands for others too.
        """
        return best_visual(view.is_visual, scores, num_keep), view.hidden_states


class KeepsAllReducer(DecoderReducer):
    """Stands where no reducer acts inside the decoder, and something else does."""

    def cuts(self, num_layers: int) -> list[int]:
        return []

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        return [num_visual] * num_layers


def best_visual(is_visual: torch.Tensor, scores: torch.Tensor, num_keep: torch.Tensor) -> torch.Tensor:
    """
    Marks all columns but the visual tokens that are not among the `num_keep` best of their row.

    Args:
        is_visual: `[batch, n]` bool.
        scores: `[batch, n]`.
        num_keep: `[batch]` int64, 0 or more.
    """
    # A visual token that is worth nothing at all still comes before what is no visual token.
    ranked = scores.float().clamp(min=torch.finfo(torch.float32).min).masked_fill(~is_visual, -math.inf)
    return ~is_visual | (top_k_mask(ranked, num_keep) & is_visual)


def require_layer(parameter: str, layer: int, config: AdaVTPConfig) -> None:
    """
    Raises:
        ValueError: if tokens cannot leave before this layer of the configuration's decoder.
    """
    highest = config.text_config.num_hidden_layers - 1
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= highest:
        raise ValueError(
            f"`{parameter}` is {layer!r}; allowed are whole numbers from 1 to {highest}, the layers of this decoder "
            "before which tokens can leave."
        )
