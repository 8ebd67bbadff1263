"""The plainest use of the question: keep the tokens that point the way the prompt's text does.

A baseline for methods that read the question by attention: one cosine in the decoder's own embedding space, no layer
run, nothing learned.
"""

import math

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.features import VisionFeatures
from .base import ScoringReducer, register_reducer


@register_reducer("query")
class QueryReducer(ScoringReducer):
    """
    Scores a projected token by its cosine with the mean embedding of the prompt's text, over a temperature, so that
    the scores read as log-probabilities. The temperature changes what `config.min_token_entropy` sees, not the
    ranking.

    Args:
        temperature: above 0.
    """

    stage = "projector"
    needs = ("question",)

    def __init__(self, config: AdaVTPConfig, temperature: float = 0.07) -> None:
        super().__init__(config)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature}; it must be above 0 and finite.")
        self.temperature = temperature

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        return question_cosines(features.patches, features.question) / self.temperature


def question_cosines(tokens: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    """The cosine of each token `[num_images, num_tokens, width]` with its image's question `[num_images, width]`."""
    return nn.functional.cosine_similarity(tokens.float(), question.float()[:, None], dim=-1)
