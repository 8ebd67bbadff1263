"""The processor: from images and text as people have them to what the model takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import ImageInput, is_pil_image, is_valid_image, load_image

from .budget_adavtp import TokenBudget, budget_values
from .self_contained_adavtp import AUTO_MAP, save_code, without_auto_class


class AdaVTPProcessor(LlavaProcessor):
    """
    A [`LlavaProcessor`] that checks its images, passes a token budget on, and saves its code beside its files.

    Args:
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens: as in [`LlavaProcessor`].
    """

    # transformers reads which parts a processor has from the names in this signature.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        token_budget: TokenBudget | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: images in the order of their placeholders: PIL images in any mode, paths, URLs, arrays or tensors.
            text: prompts, with `<image>` where an image goes.
            token_budget: one budget or one per prompt; comes out as `token_budget` `[batch]`, checked.
            kwargs: as in [`LlavaProcessor`].

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask`, and where given `pixel_values` and `token_budget`.

        Raises:
            ValueError: if an image is empty, cannot be decoded or has a pixel format without a defined range, or a
                budget is not allowed.
        """
        if images is not None:
            images = readable_images(images)
        features = super().__call__(images=images, text=text, **kwargs)
        if token_budget is not None:
            batch_size = 1 if isinstance(text, str) else len(text)
            features["token_budget"] = budget_values(token_budget, batch_size)
        return features

    def of_questions(
        self,
        images: ImageInput | Sequence[ImageInput | Sequence[ImageInput] | None] | None,
        prompts: str | Sequence[str],
    ) -> BatchFeature:
        """
        Inputs for `generate` from images and questions.

        Args:
            images: an image, or for each prompt an image, a list of images, or `None`. One prompt for several images
                is asked of each; `None` asks without an image.
            prompts: a question or a list. One with the image placeholder in it is used as it is; others go into the
                chat template.

        Returns:
            `BatchFeature`, padded on the left.

        Raises:
            ValueError: if there are not as many images as prompts, or there is no chat template to put a question in.
        """
        shown = list(images) if isinstance(images, list | tuple) else [images]
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(prompts) == 1:
            prompts = prompts * len(shown)
        if images is None:
            shown = [None] * len(prompts)
        if len(shown) != len(prompts):
            raise ValueError(
                f"`inputs` has {len(shown)} image(s) and `prompt` has {len(prompts)} prompt(s); pass one image, or a "
                "list of images, for each prompt."
            )
        shown = [
            [] if image is None else list(image) if isinstance(image, list | tuple) else [image] for image in shown
        ]
        text = [self._in_chat_form(prompt, len(group)) for prompt, group in zip(prompts, shown, strict=True)]
        flat = [image for group in shown for image in group]
        return self(images=flat or None, text=text, padding=True, padding_side="left", return_tensors="pt")

    def _in_chat_form(self, prompt: str, num_images: int) -> str:
        if self.image_token in prompt:
            return prompt
        if self.chat_template is None:
            raise ValueError(
                f"`prompt` is {prompt!r} and this processor has no chat template to put it in; write the whole prompt "
                f"as the model was trained on it, with {self.image_token!r} where the image goes."
            )
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the processor's files and its code. See [`ProcessorMixin.save_pretrained`]."""
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_code(type(self), Path(save_directory))
        with without_auto_class(type(self)):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def readable_images(images: ImageInput | Sequence[ImageInput]) -> list[Any]:
    """
    Images ready for an image processor: loaded, with at least one pixel, and RGB if they are PIL images.

    Args:
        images: one image or a flat list: PIL images in any mode, paths, URLs, arrays or tensors.

    Returns:
        The list of images. Grey, palette, CMYK and transparent images become RGB; 16-bit ones are scaled to 8 bits.

    Raises:
        ValueError: if an image is none, is empty, cannot be decoded, or has a pixel format without a defined range;
            the message says which image.
    """
    if isinstance(images, list | tuple) and any(isinstance(image, list | tuple) for image in images):
        images = [image for group in images for image in (group if isinstance(group, list | tuple) else [group])]
    images = list(images) if isinstance(images, list | tuple) else [images]
    return [_readable_image(image, number) for number, image in enumerate(images)]


def _readable_image(image: Any, number: int) -> Any:
    name = f"`images[{number}]`"
    try:
        if isinstance(image, str | Path):
            image = load_image(str(image))
        if not is_valid_image(image):
            raise ValueError(f"{name} is a {type(image).__name__}; pass a PIL image, a path, an array or a tensor.")
        if not is_pil_image(image):
            if 0 in image.shape:
                raise ValueError(f"{name} has shape {tuple(image.shape)}; an image needs at least one pixel.")
            return image
        if 0 in image.size:
            raise ValueError(f"{name} has size {image.size}; an image needs at least one pixel.")
        image.load()
    except OSError as error:
        raise ValueError(f"{name} cannot be decoded: {error}. Pass an intact image file.") from error
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has pixel format {image.mode!r}, whose range is not defined; scale it to 8 bits and convert it "
            "to 'L' or 'RGB'."
        )
    if image.mode.startswith("I;16"):
        # Plain conversion would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


__all__ = ["AdaVTPProcessor"]
