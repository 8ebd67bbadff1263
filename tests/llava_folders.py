"""Folders of LLaVA checkpoints with the layout and the names that the published ones have, at tiny sizes.

The names are written out here, from the published files and the code that wrote them, and not taken from what this
package knows of them. Every folder comes with the tensors of the model it was made from, in stock LLaVA's names.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_conversations import llava_processor
from tiny_models import IMAGE_SIZE, PATCH_SIZE, tiny_text_config, tiny_vision_config
from tokenizers import Tokenizer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

Tensors = dict[str, torch.Tensor]
FEATURE_LAYER = -2
NUM_FEATURE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Of the published checkpoints, and inside these tiny vocabularies.
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0.dev0"}


@dataclass
class Folder:
    """
    A checkpoint's folder.

    Attributes:
        path: where it is.
        tensors: all its weights, in stock LLaVA's names and the dtype that they have there.
        image_token_id: of its placeholder, or `None` where the tokenizer has none.
        vocab_size: rows of its embeddings.
        tower: folder of the CLIP tower that it names.
    """

    path: Path
    tensors: Tensors
    image_token_id: int | None
    vocab_size: int
    tower: Path | None = None


def _tokenizer(with_image: bool) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer with Llama's first ids (`<unk> <s> </s>`), and the number of its tokens without `<image> <pad>`."""
    data = json.loads(llava_processor().tokenizer.backend_tokenizer.to_str())
    known = [token for token in data["model"]["vocab"] if token not in ("<pad>", "<s>", "</s>", "<unk>", "<image>")]
    data["model"]["vocab"] = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *known])}
    special = ["<unk>", "<s>", "</s>"] + (["<image>", "<pad>"] if with_image else [])
    num_words = len(data["model"]["vocab"])
    numbers = [0, 1, 2, num_words, num_words + 1]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] = [
        {"id": number, "content": token, "special": True, **flags}
        for number, token in zip(numbers, special, strict=False)
    ]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if with_image else "<unk>",
    )
    return tokenizer, num_words


def _image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def _fields(text: str, vocab_size: int, image_token_id: int, **fields: Any) -> dict[str, Any]:
    return {
        "vision_config": tiny_vision_config(),
        "text_config": tiny_text_config(text, vocab_size=vocab_size),
        "image_token_index": image_token_id,
        "image_seq_length": NUM_FEATURE_TOKENS,
        "vision_feature_layer": FEATURE_LAYER,
    } | fields


def stock_llava(tensors: Tensors, image_token_id: int, text: str = "llama") -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with these weights, in evaluation mode."""
    embeddings = tensors["model.language_model.embed_tokens.weight"]
    model = _fresh_llava(len(embeddings), image_token_id, text)
    # Weights alone: rotary frequencies stay float32, as they do where a checkpoint is loaded.
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _fresh_llava(vocab_size: int, image_token_id: int, text: str, seed: int = 0) -> LlavaForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(LlavaConfig(**_fields(text, vocab_size, image_token_id)))


def random_tensors(vocab_size: int, text: str = "llama", dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights of a LLaVA in stock names; no two tensors are alike."""
    model = _fresh_llava(vocab_size, 0, text)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, value in model.state_dict().items():
        noise = 0.1 * torch.randn(value.shape, generator=generator)
        tensors[name] = (value + noise).to(dtype)
    return tensors


def write_shards(path: Path, tensors: Tensors, num_files: int, stem: str) -> list[Path]:
    """
    Weight files: one, or several with an index, as transformers wrote them.

    Args:
        path: the folder.
        tensors: what is written.
        num_files: how many.
        stem: `"model"` for safetensors, `"pytorch_model"` for pickles.
    """
    path.mkdir(parents=True, exist_ok=True)
    suffix = ".safetensors" if stem == "model" else ".bin"
    names = list(tensors)
    parts = [
        names[number * len(names) // num_files : (number + 1) * len(names) // num_files] for number in range(num_files)
    ]
    place, files = {}, []
    for number, part in enumerate(parts, start=1):
        own = f"{stem}{suffix}" if num_files == 1 else f"{stem}-{number:05}-of-{num_files:05}{suffix}"
        content = {name: tensors[name].contiguous() for name in part}
        if stem == "model":
            save_file(content, path / own, metadata={"format": "pt"})
        else:
            torch.save(content, path / own)
        place |= dict.fromkeys(part, own)
        files.append(path / own)
    if num_files > 1:
        index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": place}
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return files


# Stock names in memory -> names in the files of llava-hf/llava-1.5-7b-hf.
def _hub_name(name: str) -> str:
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


# Stock names in memory -> names in the files of liuhaotian/llava-v1.5-7b, and of v1.6, which has its tower.
def _original_name(name: str) -> str:
    for new, old in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    assert name == "lm_head.weight"
    return name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config_fields(config: Any, dropped: tuple[str, ...] = ()) -> dict[str, Any]:
    never = ("transformers_version", "dtype", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in never + dropped}


def transformers_folder(
    path: Path,
    num_files: int = 3,
    dtype: torch.dtype = torch.float32,
    rename: Callable[[str], str] = _hub_name,
    **fields: Any,
) -> Folder:
    """
    As llava-hf/llava-1.5-7b-hf: configuration without what was default, separate files of the processor's parts.

    Args:
        path: the folder.
        num_files: of the weights.
        dtype: of the weights.
        rename: stock names to the file's; by default the published ones.
        fields: of config.json.
    """
    tokenizer, num_words = _tokenizer(with_image=True)
    vocab_size = -(-(num_words + 2) // 64) * 64
    tensors = random_tensors(vocab_size, dtype=dtype)
    write_shards(path, {rename(name): value for name, value in tensors.items()}, num_files, "model")
    text = _config_fields(tiny_text_config(vocab_size=vocab_size))
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": num_words,
        "model_type": "llava",
        "pad_token_id": num_words + 1,
        "projector_hidden_act": "gelu",
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "torch_dtype": _dtype_name(dtype)} | text,
        "tie_word_embeddings": False,
        "torch_dtype": _dtype_name(dtype),
        "transformers_version": "4.36.0.dev0",
        "vision_config": _config_fields(tiny_vision_config()),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "vocab_size": vocab_size,
    }
    _write_json(path / "config.json", config | fields)
    _write_json(path / "generation_config.json", GENERATION | {"pad_token_id": num_words + 1})
    tokenizer.save_pretrained(path)
    _image_processor().save_pretrained(path)
    # Older checkpoints leave the number of placeholders to the model, and have the template in a file of JSON.
    _write_json(path / "processor_config.json", {"image_token": "<image>", "processor_class": "LlavaProcessor"})
    template = llava_processor().chat_template
    _write_json(path / "chat_template.json", {"chat_template": template})
    return Folder(path, tensors, num_words, vocab_size)


def written_folder(
    path: Path, max_shard_size: str = "80KB", vision: str = "clip", text: str = "llama", **fields: Any
) -> Folder:
    """
    As transformers 5 writes a LLaVA today, from a model with any towers and fields.

    Args:
        path: the folder.
        max_shard_size: of a weight file.
        vision, text: see `tiny_models`.
        fields: of `LlavaConfig`.
    """
    tokenizer, num_words = _tokenizer(with_image=True)
    vocab_size = -(-(num_words + 2) // 64) * 64
    config = _fields(text, vocab_size, num_words, vision_config=tiny_vision_config(vision)) | fields
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    LlavaProcessor(
        _image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=int(vision != "siglip"),
        chat_template=llava_processor().chat_template,
    ).save_pretrained(path)
    return Folder(path, dict(model.state_dict()), num_words, vocab_size)


def next_folder(path: Path, text: str = "llama", num_files: int = 2) -> Folder:
    """
    As llava-hf/llava-v1.6-vicuna-7b-hf and -mistral-7b-hf.

    Args:
        path: the folder.
        text: `"llama"` or `"mistral"`.
        num_files: of the weights.
    """
    tokenizer, num_words = _tokenizer(with_image=True)
    vocab_size = -(-(num_words + 2) // 64) * 64
    tensors = random_tensors(vocab_size, text)
    newline = {"image_newline": torch.randn(32, generator=torch.Generator().manual_seed(2))}
    files = {_hub_name(name): value for name, value in tensors.items()}
    write_shards(path, newline | files, num_files, "model")
    grid = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]]
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": grid,
        "image_token_index": num_words,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": _config_fields(tiny_text_config(text, vocab_size=vocab_size)),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_image_newline_parameter": True,
        "vision_config": _config_fields(tiny_vision_config()),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
    }
    _write_json(path / "config.json", config)
    tokenizer.save_pretrained(path)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=grid,
    ).save_pretrained(path)
    processor = {"image_token": "<image>", "processor_class": "LlavaNextProcessor", "patch_size": PATCH_SIZE}
    _write_json(path / "processor_config.json", processor | {"vision_feature_select_strategy": "default"})
    (path / "chat_template.jinja").write_text(llava_processor().chat_template)
    return Folder(path, tensors, num_words, vocab_size)


def next_model(folder: Folder) -> LlavaNextForConditionalGeneration:
    """transformers' own LLaVA-NeXT from such a folder."""
    config = LlavaNextConfig.from_pretrained(folder.path)
    return LlavaNextForConditionalGeneration.from_pretrained(folder.path, config=config).eval()


def clip_folder(path: Path, tensors: Tensors, dtype: torch.dtype = torch.float32) -> Path:
    """
    As openai/clip-vit-large-patch14-336: both sides of CLIP in one pickle, with position ids.

    Args:
        path: the folder.
        tensors: of a LLaVA, whose tower is taken.
        dtype: of the weights.
    """
    prefix = "model.vision_tower."
    own = {
        f"vision_model.{name.removeprefix(prefix)}": value.to(dtype)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    others = {
        "logit_scale": torch.tensor(4.6, dtype=dtype),
        "text_model.embeddings.token_embedding.weight": torch.randn(8, 16, dtype=dtype),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.randn(16, 16, dtype=dtype),
        "visual_projection.weight": torch.randn(16, 32, dtype=dtype),
        "vision_model.embeddings.position_ids": torch.arange(NUM_FEATURE_TOKENS + 1)[None],
    }
    write_shards(path, own | others, 1, "pytorch_model")
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 16},
        "torch_dtype": _dtype_name(dtype),
        "vision_config": _config_fields(tiny_vision_config(), ("projection_dim",)),
    }
    _write_json(path / "config.json", config)
    _image_processor().save_pretrained(path)
    return path


def original_folder(
    path: Path,
    version: str = "1.5",
    text: str = "llama",
    dtype: torch.dtype = torch.float16,
    num_files: int = 2,
    stem: str | None = None,
    vocab_size: int | None = None,
    **fields: Any,
) -> Folder:
    """
    As liuhaotian/llava-v1.5-7b (pickles, no tower) or -v1.6-vicuna-7b and -mistral-7b (safetensors, with tower).

    Args:
        path: the folder; the tower's is beside it.
        version: `"1.5"` or `"1.6"`.
        text: `"llama"` or `"mistral"`.
        dtype: of the weights.
        num_files: of the weights.
        stem: see [`write_shards`]; by default the version's.
        vocab_size: rows of the embeddings; by default as many as tokens.
        fields: of config.json.
    """
    tokenizer, num_words = _tokenizer(with_image=False)
    vocab_size = num_words if vocab_size is None else vocab_size
    tensors = random_tensors(vocab_size, text, dtype)
    tower = clip_folder(path.with_name(f"{path.name}-clip"), tensors)
    names = [name for name in tensors if version == "1.6" or not name.startswith("model.vision_tower.")]
    files = {_original_name(name): tensors[name] for name in names}
    newline = {"model.image_newline": torch.randn(32).to(dtype)} if version == "1.6" else {}
    write_shards(path, files | newline, num_files, stem or ("model" if version == "1.6" else "pytorch_model"))
    config = {
        **_config_fields(
            tiny_text_config(text, vocab_size=vocab_size), ("pad_token_id", "rope_parameters", "model_type")
        ),
        "architectures": ["LlavaLlamaForCausalLM" if text == "llama" else "LlavaMistralForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "image_aspect_ratio": "pad" if version == "1.5" else "anyres",
        "max_length": 4096,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": FEATURE_LAYER,
        "mm_vision_tower": str(tower),
        "model_type": {"llama": "llava" if version == "1.5" else "llava_llama", "mistral": "llava_mistral"}[text],
        "pad_token_id": 0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": _dtype_name(dtype),
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": version == "1.6",
        "use_mm_proj": True,
    }
    if version == "1.6":
        config |= {
            "image_crop_resolution": 224,
            "image_grid_pinpoints": [[IMAGE_SIZE, 2 * IMAGE_SIZE]],
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_tower_lr": 2e-06,
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        }
    _write_json(path / "config.json", config | fields)
    # As of vicuna-13b-v1.5: transformers 5 refuses to write a temperature where nothing is sampled.
    _write_json(path / "generation_config.json", GENERATION | {"pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    tokenizer.save_pretrained(path)
    return Folder(path, tensors, None, vocab_size, tower)
