"""What a LLaVA checkpoint says about itself, put in AdaVTP's terms.

However a checkpoint was published, what conversion needs of it is the same: AdaVTP's configuration and processor, the
weight files and which layout names their tensors, and a list of what has no place in the target.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from ...configuration.configuration_adavtp import AdaVTPConfig
from ...modeling.processing_adavtp import AdaVTPProcessor
from .llava_names import Dropped, Layout

# Fields that say how a folder was written, which the target's folder says for itself.
OF_THE_FOLDER = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")


@dataclass
class LlavaSource:
    """
    A checkpoint, read but for its weights.

    Attributes:
        layout: how its tensors are named; see [`llava_names.target_name`].
        config: the target's; `text_config.vocab_size` is that of the target's embeddings.
        processor: the target's.
        files: weight files with the layout of each, those of the checkpoint first.
        vocab_size: rows of the source's embeddings; fewer than the target's where tokens were added.
        generation: fields of its `generation_config.json`; empty where there is none.
        vision_tower: the name of the tower's own checkpoint, where the source names one.
        dropped: fields of its configuration without a place in the target's.
        template_note: what a user should know of its chat template, or `None`.
        notes: what else a user should know, a sentence each.
    """

    layout: Layout
    config: AdaVTPConfig
    processor: AdaVTPProcessor
    files: list[tuple[Path, Layout]]
    vocab_size: int
    generation: dict[str, Any]
    vision_tower: str | None = None
    dropped: list[Dropped] = field(default_factory=list)
    template_note: str | None = None
    notes: list[str] = field(default_factory=list)


def adavtp_config(fields: dict[str, Any], adavtp_fields: dict[str, Any]) -> AdaVTPConfig:
    """
    A LLaVA configuration with AdaVTP's fields.

    Args:
        fields: of a LLaVA configuration.
        adavtp_fields: fields of [`AdaVTPConfig`] that LLaVA's does not have.

    Raises:
        ValueError: if a field is none of AdaVTP's own, or a value is not allowed.
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
    size = config.vision_config.image_size
    sides = _sides(processor.image_processor)
    if sides != (size, size):
        raise ValueError(
            f"The image processor makes images of {sides} pixels, and `vision_config.image_size` is {size}; expected "
            "are images of that size."
        )
    processor.count_placeholders_as(config)


def _sides(image_processor: Any) -> tuple[int | None, int | None]:
    fields = image_processor.to_dict()
    size = fields["crop_size" if fields.get("do_center_crop") else "size"]
    edge = size.get("shortest_edge")
    return size.get("height", edge), size.get("width", edge)
