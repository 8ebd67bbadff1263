"""How many tokens an image is in a prompt. The trainer asks here and nowhere else."""

from typing import NamedTuple

import torch
from PIL import Image

from ...modeling.processing_adavtp import AdaVTPProcessor


class ImageTokens(NamedTuple):
    """
    Placeholder tokens of one image: `num_visual` that a budget counts, N, and `num_other` that no budget takes away, 1
    where the tower's CLS is kept.
    """

    num_visual: int
    num_other: int

    @property
    def num_placeholders(self) -> int:
        """All of them, as a prompt has them at full budget."""
        return self.num_visual + self.num_other


def image_tokens(processor: AdaVTPProcessor, pixel_values: torch.Tensor) -> ImageTokens:
    """
    Tokens of one image of the size in `pixel_values` `[num_images, channels, height, width]`. The rule is
    `LlavaProcessor`'s: one per patch, and the tower's additional tokens unless its CLS is cut off.
    """
    height, width = pixel_values.shape[-2:]
    without_cls = processor.vision_feature_select_strategy == "default"
    num_visual = (height // processor.patch_size) * (width // processor.patch_size)
    return ImageTokens(num_visual, processor.num_additional_image_tokens - int(without_cls))


def tokens_of_any_image(processor: AdaVTPProcessor) -> ImageTokens:
    """
    The same, known from the processor alone, before there is an image.

    Raises:
        ValueError: if images of different shapes come out of the image processor in different sizes, so that there is
            no such number.
    """
    made = {}
    for size in ((64, 64), (97, 31), (31, 97)):
        made[size] = processor.image_processor([Image.new("RGB", size)], return_tensors="pt")["pixel_values"]
    sizes = {size: tuple(pixel_values.shape[-2:]) for size, pixel_values in made.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "`processor` makes images of different shapes into different sizes, so that the number of visual tokens "
            f"depends on the image: (width, height) -> (height, width) is {sizes}; use one that makes one size."
        )
    return image_tokens(processor, made[64, 64])
