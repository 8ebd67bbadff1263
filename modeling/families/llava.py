"""LLaVA: an image is a unit, its patches are the visual tokens, and CLS may stand in front of them."""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from .base import Family, Units


class LlavaFamily(Family):
    """One tower for images of one size, so that all of them have equally many tokens."""

    def tokens_per_image(self, config: AdaVTPConfig) -> int:
        """Patches of an image, N."""
        return self._side(config) ** 2

    def placeholders(self, config: AdaVTPConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """See [`Family.placeholders`]."""
        return input_ids == config.image_token_id

    def units(self, config: AdaVTPConfig, placeholders: torch.Tensor, num_images: int) -> Units:
        """
        The units of a batch.

        Args:
            config: the model's configuration.
            placeholders: `[batch, sequence]` bool.
            num_images: images that were given, in the order of their placeholders.

        Raises:
            ValueError: if placeholders and images do not agree.
        """
        size, num_cls = self.tokens_per_image(config), int(config.keep_cls)
        of_prompt = placeholders.sum(dim=-1).cpu()
        if (of_prompt % (size + num_cls)).any() or int(of_prompt.sum()) != num_images * (size + num_cls):
            raise ValueError(
                # The first words are the stock class's, which programs look for.
                "Image features and image tokens do not match: `input_ids` (or `inputs_embeds`) has "
                f"{of_prompt.tolist()} image placeholder tokens (id {config.image_token_id}) per prompt and "
                f"`pixel_values` holds {num_images} image(s); every image needs exactly {size + num_cls} "
                "placeholders, which the processor writes for each '<image>' in the prompt."
            )
        token = torch.arange(num_images * size, device=placeholders.device).view(num_images, size)
        return Units(
            sample=torch.arange(len(of_prompt)).repeat_interleave(of_prompt // (size + num_cls)),
            sizes=torch.full((num_images,), size),
            grids=[(self._side(config), self._side(config))] * num_images,
            token=torch.nn.functional.pad(token, (num_cls, 0), value=-1).flatten(),
        )

    @staticmethod
    def _side(config: AdaVTPConfig) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size


LLAVA = LlavaFamily()
