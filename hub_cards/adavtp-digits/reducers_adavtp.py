"""Ways to choose visual tokens, each behind a name.

A reducer sees what the tower made of each image and a number of tokens to keep, and returns a [`Selection`]. It says
which inputs it needs, so that the model computes those and no others.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from .configuration_adavtp import AdaVTPConfig
from .sampling_adavtp import top_k_mask
from .selection_adavtp import Selection
from .vision_adavtp import VisionFeatures


class TokenReducer(nn.Module):
    """
    Base class of everything that chooses visual tokens. Subclass it, write `forward`, and register it by name.

    Attributes:
        stage: where it acts; `"vision"` is between the tower and the projector.
        needs: of the class or the instance, what it has to be given beside the patch features, of `"budget"` (the
            budget's meeting with the image, in `features.budget`) and `"pixel_values"`.

    Args:
        config: the model's configuration.
    """

    stage: ClassVar[str] = "vision"
    needs: tuple[str, ...] = ()

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, features: VisionFeatures, num_keep: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> Selection:
        """
        Args:
            features: patches `[num_images, num_patches, hidden_size]` and, where needed, CLS and budget.
            num_keep: `[num_images]` int64, tokens to keep of each image, in [1, num_patches].
            pixel_values: `[num_images, channels, height, width]` if it is in `needs`.

        Returns:
            `Selection` that keeps exactly `num_keep` tokens of each image.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward(features, num_keep, pixel_values).")


REDUCERS: dict[str, type[TokenReducer]] = {}


def register_reducer(name: str) -> Callable[[type[TokenReducer]], type[TokenReducer]]:
    """
    Class decorator that makes a reducer available as `config.reducer = name` and `model.set_reducer(name)`.

    Args:
        name: the reducer's name.

    Raises:
        TypeError: if the decorated class is not a [`TokenReducer`].
        ValueError: if another class holds the name.
    """

    def register(reducer_class: type[TokenReducer]) -> type[TokenReducer]:
        if not (isinstance(reducer_class, type) and issubclass(reducer_class, TokenReducer)):
            raise TypeError(f"`register_reducer` takes subclasses of TokenReducer, got {reducer_class!r}.")
        holder = REDUCERS.get(name, reducer_class)
        if holder.__qualname__ != reducer_class.__qualname__:
            raise ValueError(f"`name` is {name!r}, which {holder.__qualname__} holds already; choose another.")
        REDUCERS[name] = reducer_class
        return reducer_class

    return register


def build_reducer(name: str, config: AdaVTPConfig) -> TokenReducer:
    """
    Makes the reducer that is registered under `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in REDUCERS:
        raise ValueError(f"`reducer` is {name!r}; registered reducers: {', '.join(sorted(REDUCERS))}.")
    return REDUCERS[name](config)


@register_reducer("random")
class RandomReducer(TokenReducer):
    """
    Keeps a uniformly random set of tokens: the control that every comparison needs.

    In training every call draws anew. In evaluation the draw depends on the image's own pixels and `seed` alone, so
    that it is repeatable, differs between images, and does not change with what shares the batch.

    Attributes:
        seed: of the draw in evaluation.
    """

    needs = ("pixel_values",)
    seed: int = 0

    def forward(
        self, features: VisionFeatures, num_keep: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> Selection:
        num_images, num_patches, _ = features.patches.shape
        if self.training:
            scores = torch.rand(num_images, num_patches, device=features.patches.device)
        else:
            scores = torch.stack([self._scores_of(image, num_patches) for image in pixel_values])
        return Selection.from_keep(top_k_mask(scores.to(features.patches.device), num_keep))

    def _scores_of(self, image: torch.Tensor, num_patches: int) -> torch.Tensor:
        # The sum of the bit patterns is exact, so that it does not depend on the order of addition.
        fingerprint = int(image.float().contiguous().view(torch.int32).long().sum())
        generator = torch.Generator().manual_seed((fingerprint + self.seed * 1_000_003) % 2**63)
        return torch.rand(num_patches, generator=generator)
