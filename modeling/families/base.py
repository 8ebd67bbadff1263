"""What is particular about a model family, where a token budget touches it.

Everything else is written once for all families: the family's own class sees an ordinary prompt with fewer
placeholders and as many visual features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..reducers.base import TokenReducer


@dataclass
class Units:
    """
    The units (images, tiles, frames) that the visual tokens of a batch come in, in the order of their placeholders.

    Visual tokens are counted through all units: the first of unit u has the index `sizes[:u].sum()`.

    Attributes:
        sample: `[num_units]` int64 on the CPU, the prompt that shows each unit.
        sizes: `[num_units]` int64 on the CPU, visual tokens of each, N.
        grids: rows and columns in which the tokens of each unit stand; of a video those of all frames, one below the
            other.
        token: `[num_placeholders]` int64, the visual token that each placeholder shows; -1 for a separator (CLS, a
            newline between rows of tiles), which is no visual token and always stays.
        frames: frames of each unit, 1 of an image; by default all are images.
        parts: for each unit that shows a whole picture of which others are tiles, the number of the tile in which the
            centre of each of its tokens lies, `[N]` int64.
        order: `[num_units]` int64, the number of each unit when all images come before all videos; by default its own.
    """

    sample: torch.Tensor
    sizes: torch.Tensor
    grids: list[tuple[int, int]]
    token: torch.Tensor
    frames: list[int] | None = None
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    order: torch.Tensor | None = None

    @property
    def is_token(self) -> torch.Tensor:
        """`[num_units, largest N]` bool, false behind the last token of a unit that has fewer."""
        return torch.arange(int(self.sizes.max())) < self.sizes[:, None]


def has_recurrent_layers(config: PreTrainedConfig) -> bool:
    """Whether a decoder has layers that keep one state of all that they have read, and not keys and values of each."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return any(kind.startswith(("linear_attention", "conv", "mamba", "hybrid")) for kind in kinds)


class Family(ABC):
    """
    The adapter of a family: a few dozen lines in a file of its own.

    Attributes:
        has_dial: whether the model itself can make fewer tokens of the pixels that it is given.
        reads_videos: whether a unit may have several frames.
        takes_tensor: the kinds, `"image"` or `"video"`, whose features the family wants as one tensor, not in a list.
        token_type_of_answers: what the family's token types say of a token that was generated.
        units_differ: whether images, or their tiles, differ in how many tokens they are.
        unit_names: what the units of a prompt are.
    """

    has_dial: bool = False
    reads_videos: bool = False
    takes_tensor: tuple[str, ...] = ()
    token_type_of_answers: int = 0
    units_differ: bool = True
    unit_names: tuple[str, ...] = ("image",)

    def why_not(self, config: PreTrainedConfig, reducer: "TokenReducer | type[TokenReducer]") -> str | None:
        """Why a reducer, or all of a class, cannot act on this family; `None` if it can."""
        if "native" in reducer.needs and not self.has_dial:
            return (
                "it turns a family's own dial, and this family's model makes as many tokens as the pixels that it is "
                "given say. How many these are is the processor's to say, when it resizes and tiles."
            )
        if "frames" in reducer.needs and not self.reads_videos:
            return "it compares the frames of a video, and every unit of this family is an image."
        return None

    @abstractmethod
    def placeholders(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence]` bool, the columns that hold the place of visual tokens and separators."""

    def kinds(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence]` int64, whose placeholder each column is: 0 of an image, 1 of a video, -1 of neither."""
        return self.placeholders(config, input_ids).long() - 1

    def pictures(self, model: "PreTrainedModel", inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The pixels of each unit of a prompt's images as a picture, `[channels, height, width]`, in their order."""
        return list(inputs["pixel_values"])

    def blocks(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor | None:
        """
        `[batch, sequence]` int64, of columns that see each other in both directions the number of their block, -1 of
        all others; `None` where every column sees those before it.
        """
        return None

    def next_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """The first positions `[..., batch]` behind those of a prompt, `[..., batch, sequence]`."""
        return position_ids.amax(dim=-1) + 1
