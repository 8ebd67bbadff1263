"""What a LLaVA checkpoint says about itself, put in AdaVTP's terms.

However a checkpoint was published, what conversion needs of it is the same: AdaVTP's configuration and processor, the
weight files and which layout names their tensors, and a list of what has no place in the target. Here that is read
from folders that transformers wrote, such as llava-hf/llava-1.5-7b-hf.

LLaVA's configuration is AdaVTP's already. LLaVA-NeXT has the same weights but for a vector between rows of tiles; it
shows the model the whole image first, squeezed into a square, and then tiles of it. Shown the first alone, it is a
LLaVA, and that is what becomes of it: its image processor makes exactly that first image.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...configuration.configuration_adavtp import AdaVTPConfig
from ...modeling.processing_adavtp import AdaVTPProcessor
from .llava_files import read_json, weight_files
from .llava_names import Dropped, Layout
from .llava_prompts import chat_template_of

# Fields that say how a folder was written, which the target's folder says for itself.
OF_THE_FOLDER = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")
TILES_LEFT_OUT = "LLaVA-NeXT's tiles are left out: the model sees the whole image in one square."
_NO_TEMPLATE = None, "The source has no chat template; give one to ask plain questions."
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OF_TILES = ("image_grid_pinpoints", "use_image_newline_parameter")


class LowRank(NamedTuple):
    """What is added to a weight: `scaling` times `b`, `[out, rank]`, times `a`, `[rank, in]`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum, computed in float32, in the dtype of `weight`."""
        return (weight.float() + self.scaling * (self.b.float() @ self.a.float())).to(weight.dtype)


@dataclass
class LlavaSource:
    """
    A checkpoint, read but for its weights.

    Attributes:
        layout: how its tensors are named; see [`llava_names.target_name`].
        config: the target's; `text_config.vocab_size` is that of the target's embeddings.
        processor: the target's.
        files: weight files with the layout of each; what an adapter's file has stands for what a later one has.
        vocab_size: rows of the source's embeddings; fewer than the target's where tokens were added.
        generation: fields of its `generation_config.json`; empty where there is none.
        changes: what is added to weights, by the target's names.
        vision_tower: the name of the tower's own checkpoint, where the source names one.
        dropped: fields of its configuration without a place in the target's.
        template_note: what a user should know of its chat template; `None` where one was given.
        notes: what else a user should know, a sentence each.
    """

    layout: Layout
    config: AdaVTPConfig
    processor: AdaVTPProcessor
    files: list[tuple[Path, Layout]]
    vocab_size: int
    generation: dict[str, Any]
    changes: dict[str, LowRank] = field(default_factory=dict)
    vision_tower: str | None = None
    dropped: list[Dropped] = field(default_factory=list)
    template_note: str | None = None
    notes: list[str] = field(default_factory=list)


def read_transformers_checkpoint(
    folder: Path, adavtp_fields: dict[str, Any], chat_template: str | None = None
) -> LlavaSource:
    """
    Reads a folder whose `model_type` is `"llava"` or `"llava_next"`: configuration, processor and weights.

    Args:
        adavtp_fields: fields of [`AdaVTPConfig`] that LLaVA's does not have.
        chat_template: in place of its own.

    Raises:
        ValueError: if a field has a value that AdaVTP cannot represent, or configuration and processor do not agree.
        OSError: if weights or processor are missing.
    """
    fields = read_json(folder / "config.json")
    layout: Layout = "llava_next" if fields["model_type"] == "llava_next" else "transformers"
    if fields.get("quantization_config"):
        raise ValueError(
            f"`quantization_config` is {fields['quantization_config']!r}; convert the checkpoint that this one "
            "was quantized from."
        )
    tower = fields.get("vision_config", {}).get("model_type", _TOWERS[0])
    if tower not in _TOWERS:
        raise ValueError(
            f"`vision_config.model_type` is {tower!r}; its tensors' names are not known here but for "
            f"{' and '.join(map(repr, _TOWERS))}. Load the source with AdaVTPForConditionalGeneration.from_pretrained "
            "and save it."
        )
    of_tiles = [name for name in _OF_TILES if layout == "llava_next" and name in fields]
    kept = {name: value for name, value in fields.items() if name not in of_tiles}
    config = adavtp_config(kept, adavtp_fields)
    there = AutoProcessor.from_pretrained(folder)
    image_processor = there.image_processor
    if layout == "llava_next":
        image_processor = one_tile(image_processor.to_dict(), config.vision_config.image_size)
    there.tokenizer.chat_template = there.chat_template or there.tokenizer.chat_template
    template, note = chat_template, None
    if template is None:
        template, note = chat_template_of(folder, there.tokenizer, there.image_token, otherwise=lambda: _NO_TEMPLATE)
    there.tokenizer.chat_template = template
    processor = AdaVTPProcessor(
        image_processor, there.tokenizer, chat_template=template, image_token=there.image_token
    )
    fit_processor(processor, config)
    return LlavaSource(
        layout=layout,
        config=config,
        processor=processor,
        files=[(path, layout) for path in weight_files(folder)],
        vocab_size=config.text_config.vocab_size,
        generation=read_json(folder / "generation_config.json"),
        dropped=[Dropped(name, "tiles are not used") for name in of_tiles],
        template_note=note,
        notes=[TILES_LEFT_OUT] if layout == "llava_next" else [],
    )


def adavtp_config(fields: dict[str, Any], adavtp_fields: dict[str, Any]) -> AdaVTPConfig:
    """
    A LLaVA configuration with AdaVTP's fields.

    Raises:
        ValueError: if one of `adavtp_fields` is none of AdaVTP's own, or a value is not allowed.
    """
    own = (set(AdaVTPConfig().to_dict()) | {"reducer"}) - set(LlavaConfig().to_dict()) - set(OF_THE_FOLDER)
    if unknown := sorted(set(adavtp_fields) - own):
        raise ValueError(
            f"`fields` has {', '.join(map(repr, unknown))}; allowed are AdaVTP's own: {', '.join(sorted(own))}. What "
            "LLaVA's configuration says is taken from the source."
        )
    kept = {name: value for name, value in fields.items() if name not in OF_THE_FOLDER}
    return AdaVTPConfig(**(kept | adavtp_fields))


def fit_processor(processor: AdaVTPProcessor, config: AdaVTPConfig) -> None:
    """
    Makes a processor write as many placeholders as the model fills. Older checkpoints leave that to the model.

    Raises:
        ValueError: if the two do not mean the same token by the placeholder, or the same size of image.
    """
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"`image_token_index` is {config.image_token_id} in the configuration, and the tokenizer writes "
            f"{processor.image_token!r} as {processor.image_token_id}; expected is the same id."
        )
    size, said = config.vision_config.image_size, processor.image_processor.to_dict()
    shown = said["crop_size" if said.get("do_center_crop") else "size"]
    edge = shown.get("shortest_edge")
    sides = shown.get("height", edge), shown.get("width", edge)
    if sides != (size, size):
        raise ValueError(
            f"The image processor makes images of {sides} pixels, and `vision_config.image_size` is {size}; expected "
            "are images of that size."
        )
    processor.count_placeholders_as(config)
    layers, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    for layer in chosen if isinstance(chosen, list | tuple) else [chosen]:
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"`vision_feature_layer` is {layer}, and the vision tower has {layers} layers.")
    try:
        processor(images=Image.new("RGB", (size, size)), text=processor.image_token)
    # Whatever its fields hold is only read when it is used.
    except Exception as error:
        raise ValueError(
            f"The source's processor cannot read an image ({error}); correct its files, or download them again."
        ) from error


def one_tile(fields: dict[str, Any], image_size: int) -> CLIPImageProcessorPil:
    """
    The image processor whose image, of so many pixels a side, is LLaVA-NeXT's first: the whole picture, squeezed into
    a square. `fields` are those of LLaVA-NeXT's image processor, or of the CLIP tower's.
    """
    kept = ("resample", "rescale_factor", "image_mean", "image_std", "do_rescale", "do_normalize", "do_convert_rgb")
    return CLIPImageProcessorPil(
        **{name: fields[name] for name in kept if name in fields},
        do_resize=True,
        do_center_crop=False,
        size={"height": image_size, "width": image_size},
    )
