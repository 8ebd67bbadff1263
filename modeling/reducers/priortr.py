"""PriorTR: what the question adds to where the model looks anyway (arXiv 2606.24156, ECCV 2026).

A language model looks at some visual tokens whatever it is asked. The first token behind the image cannot see the
question, and its attention says where: a prior Q. That of the question says P. A token is worth P log(P / Q), its part
of what P says beyond Q.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.view import DecoderView, attention_of_last, marked_columns
from .base import register_reducer, require_choice, require_count
from .one_cut import OneCutReducer

# Added to probabilities, as in the authors' code.
_LEAST = 1e-10


@register_reducer("priortr")
class PriorTRReducer(OneCutReducer):
    """
    Ranks visual tokens by P log(P / Q), by the attention of layer k - 1, and drops the lowest before layer k.

    P and Q are means over heads, then brought to the sum 1 over the visual tokens. Q is the row of the column right
    behind the last visual token (the line break of LLaVA's prompts). The authors have one image in a prompt; with
    several Q is the row behind the last of them. Original positions are kept.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 3 of 32, in
            proportion, as the authors have it for LLaVA. A budget below k / number of layers is refused.
        rows: `"question"`, P is the mean row of all prompt tokens behind the image, as in the authors' code for
            LLaVA-1.5; `"last"`, the last prompt token's, as for LLaVA-1.6.
        keep: visual tokens from that layer on, 0 or more, where no budget says otherwise.
    """

    name, published_layer = "priortr", 3
    paper = "PriorTR (arXiv 2606.24156)"

    def __init__(
        self, config: AdaVTPConfig, layer: int | None = None, rows: str = "question", keep: int = 192
    ) -> None:
        super().__init__(config, layer)
        require_choice("rows", rows, ("question", "last"))
        require_count("keep", keep, least=0)
        self.rows, self.keep = rows, keep

    def num_left(self, num_visual: int) -> int:
        return min(self.keep, num_visual)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        first = view.is_question.to(torch.int8).argmax(dim=-1)
        # A prompt that ends with its image has no question, and nothing to tell tokens apart by.
        first = torch.where(view.is_question.any(dim=-1), first, view.last)
        prior = view.attention_rows(first[:, None], "previous")[:, :, 0].mean(dim=1)
        asked = attention_of_last(view, "previous") if self.rows == "last" else attention_of_question(view)
        prior, asked = (_over_visual(attention, view.is_visual) for attention in (prior, asked))
        return asked * ((asked + _LEAST) / (prior + _LEAST)).log()


def attention_of_question(view: DecoderView) -> torch.Tensor:
    """The mean row of the question's columns, mean over heads, `[batch, n]` float32; 0 where there is no question."""
    rows, is_asking = marked_columns(view.is_question)
    weights = is_asking / is_asking.sum(dim=-1, keepdim=True).clamp(min=1)
    return view.attention(rows, "previous").received(weights[:, None]).mean(dim=1)


def _over_visual(attention: torch.Tensor, is_visual: torch.Tensor) -> torch.Tensor:
    attention = attention * is_visual
    return attention / (attention.sum(dim=-1, keepdim=True) + _LEAST)
