"""The processor: from images and text as people have them to what the model takes."""

import inspect
import io
import os
import re
from base64 import b64decode
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen

import torch
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import PIL, ImageInput, is_pil_image, is_valid_image, to_numpy_array
from transformers.processing_utils import ProcessorMixin

from ..configuration.configuration_adavtp import AdaVTPConfig
from .budget.token_budget import TokenBudget, budget_values, num_tokens_to_keep
from .hub.own_files import failures_in_words, require_own_files
from .hub.saving import AUTO_MAP, save_code, without_auto_class


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """
        Loads a processor. See [`ProcessorMixin.from_pretrained`]. What older folders leave to the model's
        configuration, how many placeholders an image has, is taken from there.

        Raises:
            ValueError: if a file is not what it should be, or names another outside of the folder.
            OSError: if one is not there.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            require_own_files(pretrained_model_name_or_path, weights=False, **kwargs)
        with failures_in_words("processor", pretrained_model_name_or_path):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.patch_size is None:
            of_hub = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in kwargs}
            fields, _ = AdaVTPConfig.get_config_dict(pretrained_model_name_or_path, **of_hub)
            if fields:
                processor.count_placeholders_as(AdaVTPConfig.from_dict(fields))
        return processor

    def count_placeholders_as(self, config: AdaVTPConfig) -> None:
        """Writes as many placeholders for an image as a model of this configuration has tokens."""
        self.patch_size = config.vision_config.patch_size
        self.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.num_additional_image_tokens = int(config.has_cls)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        text: str | Sequence[str] | None = None,
        token_budget: TokenBudget | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: images in the order of their placeholders, flat or one list per prompt: PIL images in any mode,
                paths, URLs, arrays or tensors with values from 0 to 255.
            text: prompts, with `<image>` where an image goes.
            token_budget: one budget or one per prompt; comes out as `token_budget` `[batch]`, checked.
            kwargs: as in [`LlavaProcessor`].

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask`, and where given `pixel_values` and `token_budget`.

        Raises:
            ValueError: if an image is empty, cannot be decoded or has a pixel format without a defined range, images
                and placeholders do not agree, or a budget is not allowed.
        """
        if images is not None:
            if self.patch_size is None:
                raise ValueError(
                    "`patch_size` is None, so it is not known how many placeholders an image has; pass the vision "
                    "tower's to the processor, or load it from a folder that has the model's config.json."
                )
            self._check_places(images, text)
            # Whoever switches scaling off has values of another range in mind.
            rescales = kwargs.get("do_rescale", getattr(self.image_processor, "do_rescale", True))
            images = readable_images(images, any_range=rescales is False)
        batch_size = 1 if isinstance(text, str) else len(images or [] if text is None else text)
        if token_budget is not None:
            # The count does not matter here, only that there is one: N belongs to the model.
            num_tokens_to_keep(token_budget, num_tokens=2, batch_size=batch_size)
        features = super().__call__(images=images, text=text, **kwargs)
        if token_budget is not None:
            features["token_budget"] = budget_values(token_budget, batch_size)
        return features

    def _check_places(self, images: Any, text: Any) -> None:
        """Images that come as one list per prompt have to fit their own prompts, not only in total."""
        grouped = isinstance(images, list | tuple) and any(isinstance(group, list | tuple) for group in images)
        if not grouped or text is None:
            return
        prompts = [text] if isinstance(text, str) else text
        if len(images) != len(prompts):
            raise ValueError(f"`images` has lists for {len(images)} prompt(s) and `text` has {len(prompts)}.")
        for number, (group, prompt) in enumerate(zip(images, prompts, strict=True)):
            given, places = len(group) if isinstance(group, list | tuple) else 1, prompt.count(self.image_token)
            if given != places:
                raise ValueError(
                    f"`images[{number}]` has {given} image(s) and `text[{number}]` has {places} {self.image_token!r}; "
                    "write the placeholder once for each image."
                )

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
            prompts: a question, or a list of questions and conversations. A text with the image placeholder in it is
                used as it is; others go into the chat template.

        Returns:
            `BatchFeature`, padded on the left.

        Raises:
            ValueError: if there are not as many images as prompts or as placeholders in a prompt, or there is no chat
                template to put a question in.
        """
        shown, prompts = images_of_prompts(images, prompts)
        text = [self._in_chat_form(prompt, len(group)) for prompt, group in zip(prompts, shown, strict=True)]
        self._check_places(shown, text)
        images = shown if any(shown) else None
        return self(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")

    def _in_chat_form(self, prompt: str | list[dict[str, Any]], num_images: int) -> str:
        if isinstance(prompt, str) and self.image_token in prompt:
            return prompt
        if self.chat_template is None:
            raise ValueError(
                f"`prompt` is {prompt!r} and this processor has no chat template to put it in; write the whole prompt "
                f"as the model was trained on it, with {self.image_token!r} where the image goes."
            )
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}] if isinstance(prompt, str) else prompt
        try:
            text = self.apply_chat_template(turns, add_generation_prompt=True)
        # Templates are code of the checkpoint's, and raise what they like.
        except Exception as error:
            raise ValueError(f"The processor's chat template cannot be used: {error}. Give it another.") from error
        bos = self.tokenizer.bos_token
        # Where the tokenizer begins every text with BOS, a template that writes it too would make it two.
        adds_bos = bos is not None and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds_bos else text

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """
        Saves the processor's files and its code. See [`ProcessorMixin.save_pretrained`].

        The folder says that prompts are padded on the left, whatever this tokenizer does: `generate` goes on from the
        last column. Training pads by itself.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_code(type(self), Path(save_directory))
        padding_side = self.tokenizer.padding_side
        # What a tokenizer was not built with is not written.
        init_kwargs = self.tokenizer.init_kwargs
        self.tokenizer.init_kwargs = {"padding_side": padding_side, **init_kwargs}
        self.tokenizer.padding_side = "left"
        # In the file and not on the processor, which a save leaves as it was.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        try:
            with without_auto_class(type(self)):
                # As a string: for an upload transformers takes the path apart as one.
                return super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)
        finally:
            self.tokenizer.padding_side, self.tokenizer.init_kwargs = padding_side, init_kwargs
            del self.auto_map

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads only what it sees change after it began.
        save_code(type(self), Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def inputs_of_questions(
    processor: ProcessorMixin,
    images: ImageInput | Sequence[ImageInput | Sequence[ImageInput] | None] | None,
    prompts: str | Sequence[str | list[dict[str, Any]]],
) -> BatchFeature:
    """
    Inputs for `generate` from images and questions, for any family.

    Args:
        processor: ours, or a family's own.
        images: see [`AdaVTPProcessor.of_questions`].
        prompts: a question, or a list of questions and conversations. Of a question the images stand before it, in the
            chat template; a conversation, turns as chat templates take them, says where each stands. Of a processor
            that [`takes_suffix`] it is one turn.

    Returns:
        `BatchFeature`, padded on the left.

    Raises:
        ValueError: if there are not as many images as prompts or as places for them, an image cannot be read, there
            is no chat template, or a prompt is none that the processor can write.
    """
    if hasattr(processor, "of_questions"):
        return processor.of_questions(images, prompts)
    shown, prompts = images_of_prompts(images, prompts)
    if takes_suffix(processor):
        text = [prefix_of(processor, _conversation(*pair)) for pair in zip(shown, prompts, strict=True)]
        images = [readable_images(group) for group in shown]
        inputs = processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")
        # Nothing of them is a target.
        inputs.pop("labels", None)
        return inputs
    if processor.chat_template is None:
        raise ValueError("This processor has no chat template to put questions in; give it one.")
    conversations = [_conversation(*pair) for pair in zip(shown, prompts, strict=True)]
    text = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    bos = processor.tokenizer.bos_token
    # As transformers decides it: where the template writes BOS the tokenizer adds none.
    special = {"add_special_tokens": False} if bos is not None and text[0].startswith(bos) else {}
    shown = [
        [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        for turns in conversations
    ]
    images = shown if any(shown) else None
    return processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt", **special)


def takes_suffix(processor: ProcessorMixin) -> bool:
    """Whether a processor writes no chats but a question, the prefix, and an answer, its suffix: PaliGemma's does."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


def prefix_of(processor: ProcessorMixin, turns: list[dict[str, Any]]) -> str:
    """
    What a processor that [`takes_suffix`] is given of a conversation up to its answer.

    Args:
        processor: which adds the beginning of the text and the line's end.
        turns: with lists of parts as their content.

    Raises:
        ValueError: if it is not one question of the user's behind one image or more.
    """
    parts = [part for turn in turns for part in turn["content"]]
    roles, kinds = [turn["role"] for turn in turns], [part["type"] for part in parts]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    num_images = kinds.count("image")
    if roles != ["user"] or num_images == 0 or "image" in kinds[num_images:] or processor.image_token in text:
        shown = f"turns of {', '.join(roles)} that show {', '.join(kinds)}"
        raise ValueError(
            f"A prompt has {shown[:200]}; a {type(processor).__name__} writes prompts of one turn of the user's: "
            f"images, one or more, and behind them a question, without {processor.image_token!r} in its text."
        )
    return processor.image_token * num_images + text


def _conversation(images: list[ImageInput], prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with their images in them."""
    pictures = [{"type": "image", "image": image} for image in (readable_images(images) if images else [])]
    if isinstance(prompt, str):
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    turns = [
        turn | {"content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn["content"], str) else turn
        for turn in prompt
    ]
    places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if places != len(pictures):
        raise ValueError(f"A conversation has places for {places} image(s), and {len(pictures)} were given.")
    rest = iter(pictures)
    return [
        turn | {"content": [next(rest) if part["type"] == "image" else part for part in turn["content"]]}
        for turn in turns
    ]


def images_of_prompts(
    images: ImageInput | Sequence[ImageInput | Sequence[ImageInput] | None] | None, prompts: str | Sequence[str]
) -> tuple[list[list[ImageInput]], list[str]]:
    """
    A list of images for each prompt, and the prompts; one prompt for several images is asked of each.

    Raises:
        ValueError: if there are not as many images as prompts.
    """
    shown = list(images) if isinstance(images, list | tuple) else [images]
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) == 1 and shown:
        prompts = prompts * len(shown)
    if images is None:
        shown = [None] * len(prompts)
    if len(shown) != len(prompts) or not prompts:
        raise ValueError(
            f"`inputs` has {len(shown)} image(s) and `prompt` has {len(prompts)} prompt(s); pass one image, or a list "
            "of images, for each prompt."
        )
    shown = [[] if image is None else list(image) if isinstance(image, list | tuple) else [image] for image in shown]
    return shown, prompts


def readable_images(images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]], any_range: bool = False) -> list:
    """
    Images ready for an image processor: loaded, with at least one pixel and three channels.

    Args:
        images: one image, a list, or a list of lists: PIL images in any mode, paths, URLs, arrays or tensors. An array
            or a tensor with four dimensions is a list of images.
        any_range: allow arrays with values outside 0 to 255, or of fractions only.

    Returns:
        The flat list of images, read alike whether they come as a path, a URL, base64 or a PIL object: upright as
        their EXIF orientation says; grey, palette, CMYK and transparent ones become RGB; 16-bit ones are scaled to 8
        bits. Arrays and tensors become arrays with three channels.

    Raises:
        ValueError: if an image is none, is empty, cannot be decoded, or has a pixel format without a defined range;
            the message says which image.
    """
    return [_readable_image(image, f"`images[{number}]`", any_range) for number, image in enumerate(_flat(images))]


def _flat(images: Any) -> list[Any]:
    is_several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    return [image for item in images for image in _flat(item)] if is_several else [images]


def _readable_image(image: Any, name: str, any_range: bool) -> Any:
    if isinstance(image, str | Path):
        image = _load(str(image), name)
    if not is_valid_image(image):
        raise ValueError(f"{name} is a {type(image).__name__}; pass a PIL image, a path, an array or a tensor.")
    return _rgb_image(image, name) if is_pil_image(image) else _rgb_array(image, name, any_range)


def _load(place: str, name: str) -> "PIL.Image.Image":
    """The image at a path, a URL, or in base64, as a PIL object of it would be."""
    is_file = os.path.isfile(place)  # `Path.is_file` raises where base64 is no file name
    try:
        if is_file:
            return PIL.Image.open(place)
        if place.startswith(("http://", "https://")):
            # Some servers refuse what does not name itself.
            request = Request(place, headers={"User-Agent": "adavtp"})
            with urlopen(request, timeout=60) as answer:
                return PIL.Image.open(io.BytesIO(answer.read()))
        return PIL.Image.open(io.BytesIO(b64decode(re.sub(r"^data:image/[^,]*,", "", place), validate=True)))
    # Decoders raise what they like for a broken file: OSError, SyntaxError, ValueError, struct.error.
    except Exception as error:
        if is_file:
            raise ValueError(f"{name} cannot be decoded: {error}. Pass an intact image file.") from error
        shown = place if len(place) <= 100 else f"{place[:100]}..."
        raise ValueError(
            f"{name} is {shown!r}, from which no image can be loaded ({type(error).__name__}); pass the path of an "
            "image file, a URL or base64."
        ) from error


def _rgb_image(image: "PIL.Image.Image", name: str) -> "PIL.Image.Image":
    """A PIL image as RGB, upright as its EXIF orientation says."""
    if 0 in image.size:
        raise ValueError(f"{name} has size {image.size}; an image needs at least one pixel.")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has pixel format {image.mode!r}, whose range is not defined; scale it to 8 bits and convert it "
            "to 'L' or 'RGB'."
        )
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith("I;16"):
            # Plain conversion would clip everything above 255 to white.
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded: {error}. Pass an intact image.") from error


def _upright(image: "PIL.Image.Image") -> "PIL.Image.Image":
    try:
        return PIL.ImageOps.exif_transpose(image)
    # Metadata that cannot be read, which raise what they like, do not say that the image stands otherwise.
    except Exception:
        return image


def _rgb_array(image: Any, name: str, any_range: bool) -> Any:
    """An array or tensor, `[height, width]` or with channels first or last, as an array with three channels."""
    if isinstance(image, torch.Tensor):
        # NumPy has no bfloat16.
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    pixels = to_numpy_array(image)
    if 0 in pixels.shape:
        raise ValueError(f"{name} has shape {pixels.shape}; an image needs at least one pixel.")
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or not {pixels.shape[0], pixels.shape[-1]} & {1, 3}:
        raise ValueError(
            f"{name} has shape {pixels.shape}; an array has the shape [height, width], [3, height, width] or "
            "[height, width, 3]."
        )
    if not any_range:
        _check_range(pixels, name)
    if 3 not in (pixels.shape[0], pixels.shape[-1]):
        pixels = pixels.repeat(3, axis=0 if pixels.shape[0] == 1 else -1)
    return pixels


def _check_range(pixels: Any, name: str) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    # Pictures of fractions are usual; scaled by 255 once more they would be black without a word. `not` is for NaN.
    are_fractions = pixels.dtype.kind in "bf" and 0 < high <= 1
    if are_fractions or not (low >= 0 and high <= 255):
        raise ValueError(
            f"{name} is an array of {pixels.dtype} with values from {low:g} to {high:g}; expected are values from 0 "
            "to 255, or `do_rescale=False` for values that are scaled already."
        )


__all__ = ["AdaVTPProcessor"]
