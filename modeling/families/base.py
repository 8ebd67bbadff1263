"""What is particular about a model family, where a token budget touches it.

Everything else is written once for all families: the family's own class sees an ordinary prompt with fewer
placeholders and as many visual features.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass
class Units:
    """
    The units (images, tiles, frames) that the visual tokens of a batch come in, in the order of their placeholders.

    Visual tokens are counted through all units: the first of unit u has the index `sizes[:u].sum()`.

    Attributes:
        sample: `[num_units]` int64 on the CPU, the prompt that shows each unit.
        sizes: `[num_units]` int64 on the CPU, visual tokens of each, N.
        grids: rows and columns in which the tokens of each unit stand.
        token: `[num_placeholders]` int64, the visual token that each placeholder shows; -1 for a separator (CLS, a
            newline between rows of tiles), which is no visual token and always stays.
    """

    sample: torch.Tensor
    sizes: torch.Tensor
    grids: list[tuple[int, int]]
    token: torch.Tensor

    @property
    def is_token(self) -> torch.Tensor:
        """`[num_units, largest N]` bool, false behind the last token of a unit that has fewer."""
        return torch.arange(int(self.sizes.max())) < self.sizes[:, None]


class Family(ABC):
    """The adapter of a family: a few dozen lines in a file of its own."""

    @abstractmethod
    def tokens_per_image(self, config: PreTrainedConfig) -> int:
        """Visual tokens of an image in its usual size: what counting costs ahead of any image goes by."""

    @abstractmethod
    def placeholders(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence]` bool, the columns that hold the place of visual tokens and separators."""

    @abstractmethod
    def units(self, config: PreTrainedConfig, placeholders: torch.Tensor, num_images: int) -> Units:
        """
        The units of a batch.

        Args:
            config: the model's configuration.
            placeholders: `[batch, sequence]` bool.
            num_images: images that were given, in the order of their placeholders.

        Raises:
            ValueError: if placeholders and images do not agree.
        """
