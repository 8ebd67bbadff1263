"""Reducers that act inside the vision tower, where they save the tower's own work too."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..reducers.base import TokenReducer

if TYPE_CHECKING:
    from .encode import TowerPass


@dataclass
class EncodedTokens:
    """
    What is left of images at the feature layer.

    Attributes:
        sequence: `[num_images, num_before + K + num_after, hidden_size]`, with CLS and budget token as in
            [`TowerPass`].
        positions: `[num_images, K]` int64, for each token the patch in whose place it stands; in any order, no two
            alike.
        gates: `[num_images, K]` or `None`; in training, where every token stays and its gate says whether it is kept.
        loss: a term for the training loss, or `None`.
    """

    sequence: torch.Tensor
    positions: torch.Tensor
    gates: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class EncoderReducer(TokenReducer):
    """
    Base class of reducers inside the tower. `forward` runs the tower, layer by layer, and reduces on the way.

    Images that keep different numbers of tokens have sequences of different lengths in the tower, so they go through
    it in separate calls.

    Attributes:
        resizes: whether the tower is shown a smaller picture.
        spatial_order: of the instance; whether the tokens stand at their positions in the image, or in the order that
            `forward` gives them.
    """

    stage: ClassVar[str] = "encoder"
    one_count = True
    resizes: ClassVar[bool] = False
    spatial_order: bool = True

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        layers = getattr(config, "vision_feature_layer", -1)
        if not isinstance(layers, int) and len(set(layers)) > 1:
            raise ValueError(
                f"`vision_feature_layer` is {layers}; {type(self).__name__} reduces tokens between them, so their "
                "features cannot be put side by side. Use one feature layer, or a reducer behind the tower."
            )

    def forward(self, tower: "TowerPass", pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        """
        Runs a pass ([`TowerPass`] has its steps) that leaves `num_keep` tokens of each image, `[num_images]` and all
        the same in evaluation, or in training all tokens with gates.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward(tower, pixel_values, num_keep).")

    def selection(self, encoded: EncodedTokens, patches: torch.Tensor, num_patches: int) -> Selection:
        """The result as a selection of the image's patches, `patches` being their part of the sequence."""
        if encoded.gates is not None:
            keep = encoded.gates.detach() > 0.5
            kept = Selection.from_keep(keep, encoded.gates)
            kept.loss = encoded.loss
            return kept
        return Selection.from_tokens(patches, encoded.positions, num_patches, self.spatial_order, encoded.loss)
