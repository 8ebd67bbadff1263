"""FasterVLM: the patches that the vision tower's CLS token looks at most (arXiv 2412.01818, first version).

CLS has gathered what the tower knows of the image, and its attention says where from. One row of attention ranks the
patches, the K largest stay, and nothing is merged. Several later methods begin with this ranking and differ in what
they do with the rest, so the ranking is a function of its own.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.features import VisionFeatures
from ..vision.tower import TowerAttention
from .base import ScoringReducer, making_layer, register_reducer


def cls_scores(attention: TowerAttention) -> torch.Tensor:
    """
    The mean over heads of CLS's attention to each patch, s_i = 1/H sum_h softmax(q_h k_h^T / sqrt(d))_i.

    The softmax is over CLS and all patches that are there, and CLS's own column is left out:
    `[num_images, num_tokens]` float32, in [0, 1].
    """
    return attention.cls_row().mean(dim=1)


def cls_log_scores(attention: TowerAttention) -> torch.Tensor:
    """Logarithm of [`cls_scores`], finite: the same ranking, as the log-probabilities of a [`ScoringReducer`]."""
    scores = cls_scores(attention)
    # Peaked attention underflows to 0, and the entropy of scores of minus infinity is no number.
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


@register_reducer("cls_attention")
class CLSAttentionReducer(ScoringReducer):
    """
    Keeps the patches with the largest head-mean CLS attention, in spatial order.

    Without a floor on the entropy this is also HiRED's choice for a single image: a sum over heads ranks as their
    mean does.

    Args:
        layer: tower layer, from 0, whose attention ranks: any that runs, or the one above. By default the layer that
            made the features (22 of LLaVA-1.5).
    """

    needs = ("attention",)
    ranks_by_cls = True
    paper = "FasterVLM (arXiv 2412.01818)"

    def __init__(self, config: AdaVTPConfig, layer: int | None = None) -> None:
        super().__init__(config)
        making = making_layer(config)
        top = min(making + 1, config.num_tower_layers - 1)
        if layer is not None and layer not in range(top + 1):
            raise ValueError(f"`layer` is {layer!r}; allowed are 0 to {top}, or None for the layer of the features.")
        self.layer = layer

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return (making_layer(self.config) if self.layer is None else self.layer,)

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        return cls_log_scores(features.attention[self.attention_layers[0]])
