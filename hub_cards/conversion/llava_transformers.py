"""LLaVA checkpoints as transformers writes them, such as llava-hf/llava-1.5-7b-hf; of LLaVA-NeXT's, one tile.

LLaVA's configuration is AdaVTP's already. LLaVA-NeXT has the same weights but for a vector between rows of tiles; it
shows the model the whole image first, squeezed into a square, and then tiles of it. Shown the first alone, it is a
LLaVA, and that is what becomes of it here: its image processor makes exactly that first image.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...modeling.processing_adavtp import AdaVTPProcessor
from .llava_files import weight_files
from .llava_names import Dropped
from .llava_source import LlavaSource, adavtp_config, fit_processor

TOWERS = ("clip_vision_model", "siglip_vision_model")
_OF_TILES = ("image_grid_pinpoints", "use_image_newline_parameter")


def read_transformers_checkpoint(folder: Path, adavtp_fields: dict[str, Any]) -> LlavaSource:
    """
    Reads a folder whose `model_type` is `"llava"` or `"llava_next"`.

    Args:
        folder: configuration, processor and weights.
        adavtp_fields: fields of [`AdaVTPConfig`] that LLaVA's does not have.

    Raises:
        ValueError: if a field has a value that AdaVTP cannot represent, or configuration and processor do not agree.
        OSError: if weights or processor are missing.
    """
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_next = fields["model_type"] == "llava_next"
    if fields.get("quantization_config"):
        raise ValueError(
            f"`quantization_config` is {fields['quantization_config']!r}; convert the checkpoint that this one "
            "was quantized from."
        )
    tower = fields.get("vision_config", {}).get("model_type", TOWERS[0])
    if tower not in TOWERS:
        raise ValueError(
            f"`vision_config.model_type` is {tower!r}; its tensors' names are not known here but for "
            f"{' and '.join(map(repr, TOWERS))}. Load the source with AdaVTPForConditionalGeneration.from_pretrained "
            "and save it."
        )
    dropped = [Dropped(name, "tiles are not used") for name in _OF_TILES if is_next and name in fields]
    kept = {name: value for name, value in fields.items() if name not in {field.name for field in dropped}}
    config = adavtp_config(kept, adavtp_fields)
    files = [(path, "llava_next" if is_next else "transformers") for path in weight_files(folder)]
    processor = _read_processor(folder, is_next, config.vision_config.image_size)
    fit_processor(processor, config)
    generation = folder / "generation_config.json"
    notes = ["LLaVA-NeXT's tiles are left out: the model sees the whole image in one square."] if is_next else []
    no_template = "The source has no chat template; give one to ask plain questions."
    return LlavaSource(
        layout="llava_next" if is_next else "transformers",
        config=config,
        processor=processor,
        files=files,
        vocab_size=config.text_config.vocab_size,
        generation=json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {},
        dropped=dropped,
        template_note=no_template if processor.chat_template is None else None,
        notes=notes,
    )


def _read_processor(folder: Path, is_next: bool, image_size: int) -> AdaVTPProcessor:
    processor = AutoProcessor.from_pretrained(folder)
    image_processor = processor.image_processor
    return AdaVTPProcessor(
        image_processor=one_tile(image_processor.to_dict(), image_size) if is_next else image_processor,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
    )


def one_tile(fields: dict[str, Any], image_size: int) -> CLIPImageProcessorPil:
    """
    The image processor whose image is LLaVA-NeXT's first: the whole picture, squeezed into a square.

    Args:
        fields: of LLaVA-NeXT's image processor, or of the CLIP tower's.
        image_size: pixels a side.
    """
    kept = ("resample", "rescale_factor", "image_mean", "image_std", "do_rescale", "do_normalize", "do_convert_rgb")
    return CLIPImageProcessorPil(
        **{name: fields[name] for name in kept if name in fields},
        do_resize=True,
        do_center_crop=False,
        size={"height": image_size, "width": image_size},
    )
