"""LLaVA checkpoints as its own repository writes them, such as liuhaotian/llava-v1.5-7b and -v1.6-mistral-7b.

There the configuration is the text model's with LLaVA's fields among it, the vision tower is named and not described,
its weights are in the folder only where it was trained, the tokenizer knows no image, and the prompt's form is in the
code. What is missing is taken from the tower's own folder and from what that code does.
"""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ...modeling.processing_adavtp import AdaVTPProcessor
from .llava_adapters import ADAPTER_CONFIG, low_rank_changes, trained_files
from .llava_files import LAYOUTS, checkpoint_folder, read_json, tensors_of, weight_files
from .llava_names import TOWER, Dropped, Layout, target_name
from .llava_prompts import chat_template_of, llavas_conversation
from .llava_source import (
    OF_THE_FOLDER,
    TILES_LEFT_OUT,
    LlavaSource,
    adavtp_config,
    fit_processor,
    one_tile,
)
from .llava_tokens import IMAGE_TOKEN, add_image_and_pad_tokens, rows_for

_TEXT_CONFIGS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
ORIGINAL_MODEL_TYPES = tuple(_TEXT_CONFIGS)

_SELECT = {"patch": "default", "cls_patch": "full"}
_PROJECTOR = "mlp2x_gelu"
_SQUARES = (None, "square")

_TAKEN_OVER = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "image_aspect_ratio", "dtype", "torch_dtype")
_TAKEN_OVER += ("mm_vision_select_layer", "mm_vision_select_feature", "vocab_size", "pad_token_id", "version")
_OF_TILES = ("image_grid_pinpoints", "image_crop_resolution", "image_split_resolution", "mm_patch_merge_type")
_OF_VIDEOS = (
    *("add_faster_video", "add_time_instruction", "faster_token_stride", "force_sample", "frames_upbound"),
    *("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_out_channels", "mm_spatial_pool_stride"),
    *("num_frames", "video_fps"),
)
_OF_RUNNING = ("_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation", "delay_load")
_OF_TRAINING = (
    *("freeze_backbone", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "mm_projector_lr", "mm_tunable_parts"),
    *("mm_use_im_patch_token", "mm_vision_tower_lr", "pretrain_mm_mlp_adapter", "tokenizer_model_max_length"),
    *("tokenizer_padding_side", "tune_mm_mlp_adapter", "tune_mm_vision_resampler", "tune_mm_vision_tower"),
    *("mm_mask_drop_mode", "mm_mask_drop_ratio", "mm_mask_drop_ratio_lower", "mm_mask_drop_ratio_upper"),
    *("mm_mask_drop_skip_percentage", "pos_skipping_range", "unfreeze_language_model", "use_pos_skipping"),
    *("unfreeze_mm_vision_tower", "use_mm_proj", "vision_tower_pretrained"),
)
_DROPPED = (
    (_OF_TRAINING, "says how it was trained"),
    (_OF_RUNNING, "says how it was run"),
    (_OF_TILES, "tiles are not used"),
    (_OF_VIDEOS, "is for videos"),
)
_OF_ROTATION = ("rope_scaling", "rope_theta")
_GENERATION_FIELDS = set(vars(GenerationConfig())) - set(OF_THE_FOLDER)


class _Tower(NamedTuple):
    folder: Path
    config: CLIPVisionConfig
    image_processor: CLIPImageProcessorPil


def read_original_checkpoint(
    folder: Path,
    adavtp_fields: dict[str, Any],
    vision_tower: str | None = None,
    base: Path | None = None,
    name: str = "",
    chat_template: str | None = None,
) -> LlavaSource:
    """
    Reads a folder of LLaVA's own code: configuration, tokenizer and weights.

    Args:
        adavtp_fields: fields of [`AdaVTPConfig`] that LLaVA's does not have.
        vision_tower: folder or repository of the CLIP tower; by default what `mm_vision_tower` names.
        base: folder of the language model, or the LLaVA, that a folder with an adapter or a projector alone was
            trained from; its tokenizer and all other weights are taken from there.
        name: of the checkpoint, by which LLaVA's code chooses how it is asked.
        chat_template: in place of the one that is found or chosen.

    Raises:
        ValueError: if a field has a value that AdaVTP cannot represent or that is not known, or tower and
            configuration do not agree.
        OSError: if weights, tokenizer or tower are missing.
    """
    fields = read_json(folder / "config.json")
    _check_fields(fields)
    whole, trained = folder if base is None else base, trained_files(folder)
    _check_base(folder, base, fields, trained)
    files: list[tuple[Path, Layout]] = [(path, "adapter") for path in trained if base is not None]
    files += [(path, "original") for path in weight_files(whole)]
    names = [target_name(name, layout) for path, layout in files for name in tensors_of(path)]
    has_tower = any(isinstance(name, str) and name.startswith(TOWER) for name in names)
    tower = _read_tower(vision_tower or fields["mm_vision_tower"], fields, weights=not has_tower)
    text_config, dropped = _text_config(fields)
    tokenizer = _read_tokenizer(whole, text_config)
    template, note = chat_template, None
    if template is None:
        template, note = chat_template_of(
            whole, tokenizer, IMAGE_TOKEN, otherwise=lambda: llavas_conversation(fields, name)
        )
    vocab_size, added = text_config.vocab_size, add_image_and_pad_tokens(tokenizer)
    text_config.vocab_size = rows_for(tokenizer, vocab_size)
    text_config.pad_token_id = tokenizer.pad_token_id
    translated = _translated(fields, text_config, tower, tokenizer)
    if base is not None:
        translated["dtype"] = None
    config = adavtp_config(translated, adavtp_fields)
    image_processor, of_images = _image_processor(fields, tower)
    tokenizer.chat_template = template
    processor = AdaVTPProcessor(image_processor, tokenizer, chat_template=template)
    fit_processor(processor, config)
    notes = [f"Tokens {' and '.join(added)} were added."] if added else []
    return LlavaSource(
        layout="original",
        config=config,
        processor=processor,
        files=files + [(path, "clip") for path in ([] if has_tower else weight_files(tower.folder))],
        vocab_size=vocab_size,
        # Older checkpoints say it in their configuration.
        generation={name: fields[name] for name in fields.keys() & _GENERATION_FIELDS}
        | read_json(whole / "generation_config.json")
        | read_json(folder / "generation_config.json")
        | {"pad_token_id": tokenizer.pad_token_id},
        changes={} if base is None else low_rank_changes(folder),
        vision_tower=vision_tower or fields["mm_vision_tower"],
        dropped=dropped,
        template_note=note,
        notes=notes + of_images,
    )


def _check_fields(fields: dict[str, Any]) -> None:
    """Refuses, by name, what the target cannot represent."""
    layer = fields.get("mm_vision_select_layer")
    allowed = {
        "mm_vision_tower": (isinstance(fields.get("mm_vision_tower"), str), "the name of a CLIP tower"),
        "mm_projector_type": (fields.get("mm_projector_type", "linear") == _PROJECTOR, repr(_PROJECTOR)),
        "mm_vision_select_layer": (isinstance(layer, int), "one layer's number"),
        "mm_vision_select_feature": (fields.get("mm_vision_select_feature", "patch") in _SELECT, list(_SELECT)),
        "mm_resampler_type": (fields.get("mm_resampler_type") is None, None),
        "mm_patch_merge_type": (
            "nobase" not in str(fields.get("mm_patch_merge_type")),
            "one that shows the whole image first",
        ),
        "mm_use_im_start_end": (not fields.get("mm_use_im_start_end"), False),
        "s2": (not fields.get("s2"), False),
        "quantization_config": (not fields.get("quantization_config"), None),
    }
    for name, (is_allowed, expected) in allowed.items():
        if not is_allowed:
            raise ValueError(f"`{name}` is {fields.get(name)!r} in the source's configuration; supported: {expected}.")


def _check_base(folder: Path, base: Path | None, fields: dict[str, Any], trained: list[Path]) -> None:
    """That a base is named where it is needed and nowhere else, and is the language model's or the LLaVA's own."""
    is_whole = any((folder / name).is_file() for layout in LAYOUTS for name in layout)
    if base is None:
        if trained and not is_whole:
            said = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise ValueError(
                f"`base` is None, and the source has {', '.join(path.name for path in trained)} without a language "
                f"model; name the checkpoint that it was trained from{f', as {said!r}' if said else ''}."
            )
        return
    if is_whole or not trained:
        raise ValueError(
            f"`base` is {str(base)!r}, and the source has {'its own weights' if is_whole else 'no weights'}; it is "
            "for an adapter (adapter_model, non_lora_trainables.bin) or a projector (mm_projector.bin) alone."
        )
    kind, text = read_json(base / "config.json").get("model_type"), _TEXT_CONFIGS[fields["model_type"]].model_type
    of_text = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}.get(kind, kind)
    is_original = "mm_vision_tower" in read_json(base / "config.json")
    if of_text != text or (kind == "llava" and not is_original):
        raise ValueError(
            f"`base` is {str(base)!r}, a {kind!r} model; expected is the {text!r} model, or the LLaVA in its own "
            "code's format, that the source was trained from."
        )


def _text_config(fields: dict[str, Any]) -> tuple[PreTrainedConfig, list[Dropped]]:
    """The text model's configuration, and the fields that found no place in it."""
    config_class = _TEXT_CONFIGS[fields["model_type"]]
    of_text = set(config_class().to_dict()) | set(_OF_ROTATION) | {"dtype", "torch_dtype"}
    dropped, unknown = [], []
    for name, value in fields.items():
        if name in of_text or name in _TAKEN_OVER or name in OF_THE_FOLDER:
            continue
        reason = next((reason for names, reason in _DROPPED if name in names), None)
        if reason is not None:
            dropped.append(Dropped(name, reason))
        elif name in _GENERATION_FIELDS:
            dropped.append(Dropped(name, "moved to generation_config.json"))
        elif not value:
            dropped.append(Dropped(name, "not in use"))
        else:
            unknown.append(f"`{name}` ({value!r})")
    if unknown:
        raise ValueError(
            f"The source's configuration has fields that are not known here: {', '.join(unknown)}. Take out of its "
            "config.json those that do not change what the model computes."
        )
    kept = {name: value for name, value in fields.items() if name in of_text and name not in OF_THE_FOLDER}
    return config_class(**kept), dropped


def _translated(
    fields: dict[str, Any], text_config: PreTrainedConfig, tower: _Tower, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """LLaVA's fields by the names that transformers has for them."""
    return {
        "text_config": _without_dtype(text_config),
        "vision_config": _without_dtype(tower.config),
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": (tower.config.image_size // tower.config.patch_size) ** 2,
        "vision_feature_layer": fields["mm_vision_select_layer"],
        "vision_feature_select_strategy": _SELECT[fields.get("mm_vision_select_feature", "patch")],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
    }


def _without_dtype(config: PreTrainedConfig) -> dict[str, Any]:
    # The tower's may differ from the checkpoint's, to which its weights are converted.
    return {name: value for name, value in config.to_dict().items() if name not in ("dtype", "torch_dtype")}


def _read_tower(name: str, fields: dict[str, Any], weights: bool) -> _Tower:
    folder = checkpoint_folder(name, weights=weights)
    said = read_json(folder / "config.json")
    if said.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"The vision tower {name!r} is of `model_type` {said.get('model_type')!r}; supported: 'clip' and "
            "'clip_vision_model'."
        )
    config = CLIPVisionConfig.from_pretrained(folder)
    if fields.get("mm_hidden_size", config.hidden_size) != config.hidden_size:
        raise ValueError(
            f"`mm_hidden_size` is {fields['mm_hidden_size']} in the source's configuration, and the features of "
            f"{name!r} have {config.hidden_size}; expected is the tower that it was trained with."
        )
    return _Tower(folder, config, CLIPImageProcessorPil.from_pretrained(folder))


def _read_tokenizer(folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    options = {}
    if not (folder / "tokenizer.json").is_file():
        # What LLaVA's code takes it for; transformers 5 adds nothing unless it is told.
        options["add_bos_token"] = read_json(folder / "tokenizer_config.json").get("add_bos_token", True)
    try:
        return AutoTokenizer.from_pretrained(folder, config=text_config, **options)
    except (ImportError, ValueError) as error:
        raise OSError(
            f"The tokenizer in {str(folder)!r} cannot be read: {error}. A tokenizer.model without a "
            "tokenizer.json needs the packages sentencepiece and protobuf."
        ) from error


def _image_processor(fields: dict[str, Any], tower: _Tower) -> tuple[Any, list[str]]:
    """The image processor that does what LLaVA's code does with an image, and what a user should know of it."""
    ratio, said = fields.get("image_aspect_ratio"), tower.image_processor.to_dict()
    if ratio in _SQUARES:
        return tower.image_processor, []
    if ratio == "pad":
        padded = {name: value for name, value in said.items() if not name.endswith(("processor_type", "class"))}
        note = "Images are padded to a square, as in the source."
        return LlavaImageProcessorPil(**(padded | {"do_pad": True})), [note]
    if str(ratio).startswith("anyres"):
        return one_tile(said, tower.config.image_size), [TILES_LEFT_OUT]
    raise ValueError(
        f"`image_aspect_ratio` is {ratio!r} in the source's configuration; supported: 'square', 'pad' and 'anyres'."
    )
