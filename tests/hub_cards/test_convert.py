"""A LLaVA checkpoint becomes an AdaVTP folder: nothing is lost, nothing changes at full budget, memory stays small."""

import contextlib
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from typer.testing import CliRunner

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.command_line import app
from adavtp.hub_cards.conversion.convert import Conversion, convert_checkpoint
from adavtp.hub_cards.conversion.llava_tokens import new_rows
from adavtp.hub_cards.published_folder import files_by_kind
from adavtp.trainer.data.chat_template import encode_conversation
from llava_folders import (
    Folder,
    next_folder,
    next_model,
    original_folder,
    stock_llava,
    transformers_folder,
    write_shards,
    written_folder,
)
from local_hub import local_hub
from stock_batches import pipeline_answers, stock_answers
from tiny_models import IMAGE_SIZE, NUM_PATCHES, tiny_vision_config
from without_package import run_elsewhere, run_without_package

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
QUESTION = "what colour is the 7 ?"
NEW = ("model.budget_token.", "model.controller.", "model.reducers.")


def image(width: int = 50, height: int = 40) -> Image.Image:
    """A picture that is no square, and nowhere plain."""
    pixels = [(5 * x % 256, 6 * y % 256, (x * y) % 256) for y in range(height) for x in range(width)]
    picture = Image.new("RGB", (width, height))
    picture.putdata(pixels)
    return picture


def batch(image_token_id: int, dtype: torch.dtype, vocab_size: int) -> dict[str, torch.Tensor]:
    """Two prompts with an image each, of words below the image token, and their pixels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, min(vocab_size, image_token_id), (2, 7), generator=generator)
    places = torch.full((2, NUM_PATCHES), image_token_id)
    input_ids = torch.cat([torch.ones(2, 1, dtype=torch.long), words[:, :2], places, words[:, 2:]], dim=1)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return model(**inputs, **kwargs).logits


FOLDERS: dict[str, Callable[[Path], Folder]] = {
    "llava-1.5-hf": transformers_folder,
    "llava-1.5-hf, one file": lambda path: transformers_folder(path, num_files=1, dtype=torch.float16),
    "llava-1.5-hf, names in memory": lambda path: transformers_folder(path, names={"": ""}, dtype=torch.bfloat16),
    "llava of today": written_folder,
    "llava-v1.6-mistral-hf": lambda path: next_folder(path, "mistral"),
    "llava-v1.5": original_folder,
    "llava-v1.5, one file": lambda path: original_folder(path, dtype=torch.float32, num_files=1),
    "llava-v1.6-mistral": lambda path: original_folder(path, "1.6", "mistral"),
}


class Made:
    """A source and what became of it."""

    def __init__(self, source: Folder, path: Path, done: Conversion) -> None:
        self.source, self.path, self.done = source, path, done
        self.text = json.loads((path / "config.json").read_text())["text_config"]["model_type"]
        self.model = AdaVTPForConditionalGeneration.from_pretrained(path)
        self.processor = AdaVTPProcessor.from_pretrained(path, trust_remote_code=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes a source and converts it, once."""
    known: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in known:
            path = tmp_path_factory.mktemp("convert")
            source = FOLDERS[kind](path / "source")
            done = convert_checkpoint(source.path, path / "converted", seed=5)
            known[kind] = Made(source, path / "converted", done)
        return known[kind]

    return make


def grown(tensors: dict[str, torch.Tensor], num_rows: int) -> dict[str, torch.Tensor]:
    """The same weights with rows of zeros for tokens that the source does not have."""
    more = {name: num_rows - len(tensors[name]) for name in (EMBEDDINGS, HEAD)}
    return tensors | {
        name: torch.cat([tensors[name], tensors[name].new_zeros(num, tensors[name].shape[1])])
        for name, num in more.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The model is the source's
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDERS)
def test_logits_at_full_budget_are_those_of_stock_llava_with_the_same_weights(
    kind: str, made: Callable[[str], Made]
) -> None:
    it = made(kind)
    vocab_size, image_token_id = it.source.vocab_size, it.model.config.image_token_id
    tensors = grown(it.source.tensors, it.model.config.text_config.vocab_size)
    # Computed in float32, whatever the weights are stored in, so that nothing is left to rounding.
    stock = stock_llava(tensors, image_token_id, it.text).float()
    ours = copy.deepcopy(it.model).float()
    inputs = batch(image_token_id, torch.float32, vocab_size)
    expected = logits_of(stock, inputs)[..., :vocab_size]
    assert torch.equal(logits_of(ours, inputs, token_budget=1.0)[..., :vocab_size], expected)
    # And not because everything is: fewer tokens change what is said.
    fewer = logits_of(ours, inputs, token_budget=0.25, reducer="random")
    assert fewer.shape[1] == inputs["input_ids"].shape[1] - (NUM_PATCHES - 4)
    assert not torch.equal(fewer[:, -1, :vocab_size], expected[:, -1])


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if "1.5-hf" in kind or kind == "llava of today"])
def test_logits_are_those_of_the_same_folder_in_stock_llava(kind: str, made: Callable[[str], Made]) -> None:
    it = made(kind)
    stock = LlavaForConditionalGeneration.from_pretrained(it.source.path).eval()
    inputs = batch(it.source.image_token_id, stock.dtype, it.source.vocab_size)
    assert stock.dtype == it.model.dtype
    ours, expected = logits_of(it.model, inputs, token_budget=1.0), logits_of(stock, inputs)
    # In half precision the two sum attention in another order.
    rounding = 0 if stock.dtype == torch.float32 else 4 * torch.finfo(stock.dtype).eps
    assert (ours - expected).abs().max() <= rounding * expected.abs().max()


@torch.no_grad()
def test_llava_next_sees_its_own_first_tile(made: Callable[[str], Made]) -> None:
    it = made("llava-v1.6-mistral-hf")
    stock = next_model(it.source)
    tiles = LlavaNextImageProcessorPil.from_pretrained(it.source.path)(image(), return_tensors="pt")["pixel_values"]
    inputs = it.processor.of_questions(image(), QUESTION)
    assert tiles.shape[1] > 1 and torch.equal(inputs["pixel_values"], tiles[:, 0])
    # The base image's way through LLaVA-NeXT's own parts, without the vector between rows.
    features = stock.model.vision_tower(tiles[:, 0], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    places = (inputs["input_ids"] == stock.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(places, stock.model.multi_modal_projector(features))
    hidden = stock.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])[0]
    assert torch.equal(logits_of(it.model, dict(inputs), token_budget=1.0), stock.lm_head(hidden))


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_weight_is_there_bit_for_bit_and_only_new_modules_beside(kind: str, made: Callable[[str], Made]) -> None:
    it = made(kind)
    written = weights_of(it.path)
    for name, value in it.source.tensors.items():
        kept = written.pop(name)
        assert kept.dtype == value.dtype and torch.equal(kept[: len(value)] if value.dim() else kept, value), name
        assert len(kept) == len(value) or name in (EMBEDDINGS, HEAD)
    assert written and all(name.startswith(NEW) and value.dtype == it.model.dtype for name, value in written.items())
    assert it.done.tensors == len(it.source.tensors)
    assert sum(it.done.new_parameters.values()) == sum(value.numel() for value in written.values())


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_budget_keeps_exactly_k_tokens_and_an_answer_comes(kind: str, made: Callable[[str], Made]) -> None:
    it = made(kind)
    inputs = it.processor.of_questions(image(), QUESTION)
    assert it.model.select_tokens(**inputs, token_budget=0.4, reducer="random").keep.sum().item() == 6  # of 16
    assert it.model.generate(image(), QUESTION, token_budget=0.4, reducer="random", max_new_tokens=4) is not None
    assert (inputs["input_ids"] == it.model.config.image_token_id).sum().item() == NUM_PATCHES


VARIANTS: dict[str, dict[str, Any]] = {
    "of head and projector": {
        "tie_word_embeddings": True,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
    },
    "of the features": {"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "full"},
    "of another tower and decoder": {"vision": "siglip", "vision_feature_select_strategy": "full", "text": "qwen2"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fields_that_matter_are_kept(variant: str, tmp_path: Path) -> None:
    fields = VARIANTS[variant]
    source = written_folder(tmp_path / "source", **fields)
    convert_checkpoint(source.path, tmp_path / "out")
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(source.path).eval()
    for name in set(fields) - {"vision", "text"}:
        assert getattr(model.config, name) == fields[name]
    inputs = AdaVTPProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).of_questions(image(), QUESTION)
    assert torch.equal(logits_of(model, dict(inputs), token_budget=1.0), logits_of(stock, dict(inputs)))
    assert (HEAD in weights_of(tmp_path / "out")) == (not model.config.tie_word_embeddings)


def test_the_text_models_own_fields_are_kept(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    source = original_folder(tmp_path / "source", rope_scaling=scaling, rope_theta=1e6, rms_norm_eps=1e-5)
    convert_checkpoint(source.path, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["rope_theta"] == 1e6 and text["rope_parameters"]["factor"] == 2.0
    assert (text["rms_norm_eps"], text["num_key_value_heads"], text["max_position_embeddings"]) == (1e-5, 2, 512)


@pytest.mark.parametrize("kind", ["llava-1.5-hf", "llava-v1.5"])
def test_what_generation_starts_from_is_kept(kind: str, made: Callable[[str], Made]) -> None:
    it = made(kind)
    before, after = (json.loads((path / "generation_config.json").read_text()) for path in (it.source.path, it.path))
    pad = it.processor.tokenizer.convert_tokens_to_ids("<pad>")
    assert after["pad_token_id"] == pad == it.model.config.pad_token_id
    assert before.items() - {("pad_token_id", 0)} <= after.items()


def test_adavtps_own_fields_are_options(made: Callable[[str], Made], tmp_path: Path) -> None:
    fields = {"controller_head": "dot", "budget_attention": "mutual", "token_budget": 0.5, "reducer": "random"}
    convert_checkpoint(made("llava-1.5-hf").source.path, tmp_path / "out", fields=fields)
    config = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "out").config
    assert {name: getattr(config, name) for name in fields} == fields


# ---------------------------------------------------------------------------------------------------------------------
# What is new
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llava-1.5-hf", {}),
        (
            "llava-1.5-hf, names in memory",
            {"controller_head": "dot", "budget_fusion": "post", "reducer": "dynamicvit"},
        ),
    ],
)
def test_new_modules_are_what_from_pretrained_makes_of_the_source(
    kind: str, fields: dict[str, Any], made: Callable[[str], Made], tmp_path: Path
) -> None:
    source, written = made(kind).source.path, []
    for seed in (0, 1):
        state = torch.random.get_rng_state()
        convert_checkpoint(source, tmp_path / str(seed), fields=fields, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loaded = AdaVTPForConditionalGeneration.from_pretrained(source, **fields).state_dict()
        written.append(weights_of(tmp_path / str(seed)))
        assert written[-1].keys() == loaded.keys()
        assert all(torch.equal(written[-1][name], loaded[name]) for name in loaded)
    differ = [not torch.equal(value, written[0][name]) for name, value in written[1].items()]
    assert any(differ) and not all(differ)


@pytest.mark.parametrize("kind", ["llava-v1.5", "llava-v1.6-mistral"])
def test_an_original_tokenizer_gets_an_image_and_a_padding_token_as_llava_hf_has_them(
    kind: str, made: Callable[[str], Made]
) -> None:
    it = made(kind)
    before, after = AutoTokenizer.from_pretrained(it.source.path), it.processor.tokenizer
    assert "<image>" not in before.get_vocab()
    assert after.convert_tokens_to_ids(["<image>", "<pad>"]) == [len(before), len(before) + 1]
    assert (after.pad_token, before.pad_token) == ("<pad>", "<unk>")
    rows = it.model.config.text_config.vocab_size
    assert rows % 64 == 0 and 0 <= rows - (len(before) + 2) < 64
    assert it.done.new_rows == rows - len(before)
    assert it.model.get_input_embeddings().weight.shape[0] == it.model.lm_head.weight.shape[0] == rows
    assert after(QUESTION).input_ids == before(QUESTION).input_ids


def test_new_rows_are_distributed_as_the_published_conversion_draws_them() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator)
    embeddings = torch.randn(5000, 4, generator=generator) @ mixing + torch.tensor([1.0, -2.0, 0.0, 3.0])
    drawn = new_rows(embeddings, 8000, generator).double()
    covariance = (embeddings - embeddings.mean(0)).T.double() @ (embeddings - embeddings.mean(0)).double() / 5000
    assert torch.allclose(drawn.mean(0), embeddings.double().mean(0), atol=5e-4)
    scale = covariance.diagonal().sqrt()
    error = drawn.T.cov() / 1e-5 - covariance
    assert (error / (scale[:, None] * scale)).abs().max() < 0.08


def test_a_configuration_without_a_dtype_gets_that_of_the_weights(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path / "source", dtype=torch.bfloat16, torch_dtype=None)
    assert convert_checkpoint(source.path, tmp_path / "out").dtype == "bfloat16"
    assert {value.dtype for value in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava-1.5-hf", "llava-v1.5", "llava-v1.6-mistral"])
def test_a_file_of_the_source_is_a_file_of_the_target_and_the_index_knows_all(
    kind: str, made: Callable[[str], Made]
) -> None:
    it = made(kind)
    files = sorted(it.path.glob("*.safetensors"))
    count = len(list(it.source.path.glob("*.safetensors")) + list(it.source.path.glob("*.bin")))
    count += kind == "llava-v1.5"  # its tower's
    assert [path.name for path in files] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    index = json.loads((it.path / "model.safetensors.index.json").read_text())
    inside = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == inside
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights_of(it.path).values())
    # New modules stand in the last file alone; LLaVA's tensors stay together as they were.
    assert {file for name, file in inside.items() if name.startswith(NEW)} == {files[-1].name}
    sizes = [len([name for name in load_file(path) if not name.startswith(NEW)]) for path in files]
    if kind == "llava-1.5-hf":
        assert sizes == [len(load_file(path)) for path in sorted(it.source.path.glob("*.safetensors"))]


def test_one_file_stays_one_file(made: Callable[[str], Made]) -> None:
    path = made("llava-1.5-hf, one file").path
    assert [file.name for file in path.glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_folder_says_what_was_left_out_and_no_way_on_this_machine(made: Callable[[str], Made]) -> None:
    it = made("llava-v1.5")
    record = (it.path / "conversion.json").read_text()
    said = json.loads(record)
    clip = {name for name in torch.load(it.source.tower / "pytorch_model.bin") if "vision_model" not in name}
    tower_file = torch.load(it.source.tower / "pytorch_model.bin")
    position_ids = {name for name in tower_file if name.endswith("position_ids")}
    assert {item["name"] for item in said["dropped_tensors"]} == clip | position_ids
    assert said["converted"] == len(tower_file) - len(clip | position_ids)  # float32 in CLIP's folder
    assert "tune_mm_mlp_adapter" in {item["name"] for item in said["dropped_fields"]}
    texts = [path.read_text() for path in it.path.iterdir() if path.suffix in (".json", ".jinja")]
    assert not [text for text in texts if str(it.source.path.parent) in text]
    grid = made("llava-v1.6-mistral-hf").done
    assert {item.name for item in grid.dropped_tensors + grid.dropped_fields} == {
        *("image_newline", "image_grid_pinpoints", "use_image_newline_parameter")
    }


def test_a_checkpoint_converts_from_its_repository_and_downloads_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name = transformers_folder(tmp_path / "source"), "somebody/llava-tiny-hf"
    (source.path / "pytorch_model.bin").write_bytes(b"the same again")
    # Where the local Hub's downloads go, also once it is gone.
    cache = tmp_path / "home" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with local_hub(tmp_path / "home"):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=source.path)
        assert convert_checkpoint(name, tmp_path / "out").source == name
        downloaded = {path.name for path in cache.glob("models--*/snapshots/*/*")}
        assert downloaded == {path.name for path in source.path.iterdir()} - {"pytorch_model.bin"}
        with pytest.raises(OSError, match="'somebody/nothing' is neither a folder nor a repository"):
            convert_checkpoint("somebody/nothing", tmp_path / "none")
    # What was downloaded once does without the Hub, whether it is known to be out of reach or turns out to be.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    # huggingface_hub tries again, longer and longer apart.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="'runs/mistyped' is no folder here, and the Hub cannot be asked for it: "):
        convert_checkpoint("runs/mistyped", tmp_path / "none")
    convert_checkpoint(name, tmp_path / "out of reach")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert_checkpoint(name, tmp_path / "again")
    for folder in ("out", "out of reach", "again"):
        written = weights_of(tmp_path / folder)
        assert all(torch.equal(written[name], value) for name, value in source.tensors.items())


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and pictures
# ---------------------------------------------------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "is it ?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    {"role": "user", "content": [{"type": "text", "text": "why ?"}]},
]


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("llava-v1.5", SYSTEM + "USER: <image>\nis it ? ASSISTANT: yes</s>USER: why ? ASSISTANT:"),
        ("llava-v1.6-mistral", "[INST] <image>\nis it ? [/INST] yes </s>[INST] why ? [/INST]"),
    ],
)
def test_an_original_checkpoint_is_asked_as_llavas_code_asks_it(
    kind: str, prompt: str, made: Callable[[str], Made]
) -> None:
    processor = made(kind).processor
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == prompt
    encoded = encode_conversation(processor, TURNS[:2], num_image_tokens=NUM_PATCHES)
    targets = [label for label in encoded.labels if label != -100]
    assert processor.tokenizer.decode(targets).replace(" ", "") == "yes</s>"


# Worked out by hand from `Conversation.get_prompt` of LLaVA's code, with an image and two questions.
OF_LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
OF_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
MISTRAL = "[INST] <image>\nis it ? [/INST] yes </s>[INST] why ? [/INST]"
LLAMA_2 = f"[INST] <<SYS>>\n{OF_LLAMA}\n<</SYS>>\n\n<image>\nis it ? [/INST] yes </s><s>[INST] why ? [/INST]"
LLAMA_3 = (
    f"<|start_header_id|>system<|end_header_id|>\n\n{OF_LLAMA}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nis it ?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhy ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_TURNS = (
    "<|im_end|>{0}<|im_start|>user\n<image>\nis it ?<|im_end|>{0}<|im_start|>assistant\nyes<|im_end|>{0}"
    "<|im_start|>user\nwhy ?<|im_end|>{0}<|im_start|>assistant\n"
)
CHATML = "<|im_start|>system\nAnswer the questions." + CHATML_TURNS.format("")
MPT = f"<|im_start|>system\n{OF_MPT}" + CHATML_TURNS.format("")
QWEN = "<|im_start|>system\nYou are a helpful assistant." + CHATML_TURNS.format("\n")
VICUNA = SYSTEM + "USER: <image>\nis it ? ASSISTANT: yes</s>USER: why ? ASSISTANT:"
ZEPHYR = (
    "<|system|>\nYou are a helpful AI assistant.</s><|user|>\n<image>\nis it ?</s><|assistant|>\nyes</s>"
    "<|user|>\nwhy ?</s><|assistant|>\n"
)


@pytest.mark.parametrize(
    ("version", "name", "prompt", "reason"),
    [
        ("v1", "llava-v1.6-34b", VICUNA, "'vicuna_v1' of LLaVA's code was written, as `version`"),
        ("llava_v1", "x", VICUNA.replace("user", "human"), "'llava_v1' of LLaVA's code was written, as `version`"),
        ("llava_llama_2", "x", LLAMA_2, "'llava_llama_2' of LLaVA's code"),
        ("llava_llama_3", "x", LLAMA_3, "'llava_llama_3' of LLaVA's code"),
        ("mistral_instruct", "x", MISTRAL, "'mistral_instruct' of LLaVA's code"),
        ("chatml_direct", "x", CHATML, "'chatml_direct' of LLaVA's code"),
        ("mpt", "x", MPT, "'mpt' of LLaVA's code"),
        ("mistral_zephyr", "x", ZEPHYR, "'mistral_zephyr' of LLaVA's code"),
        ("qwen_1_5", "x", QWEN, "'qwen_1_5' of LLaVA's code"),
        ("plain", "x", "<image>\nis it ?\nyes\nwhy ?\n", "'plain' of LLaVA's code"),
        (None, "llava-v1.6-34b", CHATML, "as the name 'llava-v1.6-34b' says"),
        (None, "llava-llama-2-13b-chat-lightning-preview", LLAMA_2, "as the name 'llava-llama-2-13b"),
        (None, "llama3-llava-next-8b", LLAMA_3, "as the name 'llama3-llava-next-8b' says"),
        (None, "llava-v1.5-7b-lora", VICUNA, "as the name 'llava-v1.5-7b-lora' says"),
        (None, "mine", VICUNA, "neither `version` nor its name says how it is asked; 'vicuna_v1'"),
    ],
)
def test_llavas_code_s_conversation_is_that_of_version_name_or_kind(
    version: str | None, name: str, prompt: str, reason: str, tmp_path: Path
) -> None:
    source = original_folder(tmp_path / name, **({} if version is None else {"version": "1.5"}))
    if version is not None:
        _field(version=version)(source)
    done = convert_checkpoint(source.path, tmp_path / "out")
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out")
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == prompt
    assert any(reason in note for note in done.notes), done.notes


OWN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As the template writes it for text, with LLaVA's place for an image.
IN_OWN = (
    "<|im_start|>user\n<image>\nis it ?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    "<|im_start|>user\nwhy ?<|im_end|>\n<|im_start|>assistant\n"
)


def _in_tokenizer_config(template: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))

    return write


def _in_files(**files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write


NAMED = [{"name": "tool_use", "template": "{{ 'tools' }}" + OWN}, {"name": "default", "template": OWN}]
OWN_TEMPLATES: dict[str, Callable[[Path], None]] = {
    "in tokenizer_config.json": _in_tokenizer_config(OWN),
    "a list": _in_tokenizer_config(NAMED),
    "a list of one": _in_tokenizer_config([{"name": "chat", "template": OWN}]),
    "a file": _in_files(chat_template_dot_jinja=OWN),
    "a folder of files": _in_files(
        chat_template_dot_jinja=OWN, additional_chat_templates__tool_use_dot_jinja="{{ 'tools' }}" + OWN
    ),
    "a file of JSON with a folder": _in_files(
        chat_template_dot_json=json.dumps({"chat_template": OWN}),
        chat_templates__tool_use_dot_jinja="{{ 'tools' }}" + OWN,
    ),
    "a file of JSON": _in_files(chat_template_dot_json=json.dumps({"chat_template": OWN})),
}


@pytest.mark.parametrize("kind", ["llava-v1.5, one file", "llava-1.5-hf, one file"])
@pytest.mark.parametrize("place", OWN_TEMPLATES)
def test_a_checkpoint_keeps_its_own_template_and_can_show_it_images(
    place: str, kind: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    source = shutil.copytree(made(kind).source.path, tmp_path / "llava-v1.5")
    for file in source.glob("chat_template*"):
        file.unlink()
    OWN_TEMPLATES[place](source)
    done = convert_checkpoint(source, tmp_path / "out")
    assert any("own chat template was kept; images go before the words" in note for note in done.notes), done.notes
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out")
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == IN_OWN
    assert processor.tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == IN_OWN
    if place in ("a list", "a folder of files", "a file of JSON with a folder"):
        assert "tool_use.jinja" in [path.name for path in files_by_kind(tmp_path / "out")["processor"]]
        assert processor.apply_chat_template(
            TURNS, chat_template="tool_use"
        ) == "tools" + processor.apply_chat_template(TURNS)
    encoded = encode_conversation(processor, TURNS[:2], num_image_tokens=NUM_PATCHES)
    said = processor.tokenizer.decode([label for label in encoded.labels if label != -100]).replace(" ", "")
    assert said.startswith("yes<|im_end|>")


def test_a_template_that_can_show_images_is_kept_as_it_is(made: Callable[[str], Made]) -> None:
    it = made("llava-1.5-hf")
    assert (
        it.processor.chat_template == json.loads((it.source.path / "chat_template.json").read_text())["chat_template"]
    )
    assert "The source's own chat template was kept." in it.done.notes


def test_a_template_for_tools_or_documents_is_kept_beside_the_default(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    source = shutil.copytree(made("llava-v1.5, one file").source.path, tmp_path / "source")
    of_documents = "{{ documents[0]['text'] }}" + OWN
    _in_tokenizer_config([*NAMED, {"name": "rag", "template": of_documents}])(source)
    done = convert_checkpoint(source, tmp_path / "out")
    assert any("'rag' beside it cannot be asked a plain question" in note for note in done.notes), done.notes
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template["rag"] == of_documents
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == IN_OWN


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be used"),
        ("{{ raise_exception('no') }}", "cannot be used \\(no\\)"),
        ("{{ 'the same always' }}", "cannot be used"),
        ("{{ '<image>' }}" + OWN, "cannot place an image"),
        ([{"name": "default", "template": "{{ tools[0].name }}" + OWN}, NAMED[0]], "cannot be used"),
        ([{"name": "a", "template": OWN}, {"name": "b", "template": OWN}], "'a', 'b', and none is 'default'"),
    ],
)
def test_a_template_that_cannot_ask_is_refused(
    template: Any, message: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    source = shutil.copytree(made("llava-v1.5, one file").source.path, tmp_path / "source")
    _in_tokenizer_config(template)(source)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", chat_template=OWN)


OF_NEXT = {
    **{"add_faster_video": False, "add_time_instruction": True, "faster_token_stride": 10, "force_sample": True},
    **{"frames_upbound": 32, "image_crop_resolution": None, "image_split_resolution": 224, "num_frames": 16},
    **{
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
    },
    **{"mm_resampler_type": None, "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2},
    **{"mm_spatial_pool_out_channels": 1024, "mm_tunable_parts": "mm_mlp_adapter", "mm_vision_tower_lr": 2e-6},
    **{"pos_skipping_range": 4096, "use_pos_skipping": False, "vision_tower_pretrained": "x", "delay_load": True},
    **{"_attn_implementation_autoset": True, "mm_newline_position": "one_token", "mm_mask_drop_ratio": 0.25},
}


def test_fields_of_llava_next_s_training_and_videos_are_left_out_by_name(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    before = made("llava-v1.5, one file")
    source = shutil.copytree(before.source.path, tmp_path / "source")
    _field(**OF_NEXT)(Folder(source, {}, None, 0))
    done = convert_checkpoint(source, tmp_path / "out", seed=5)
    assert {item.name for item in done.dropped_fields} >= set(OF_NEXT) - {"mm_resampler_type"}
    written, plain = weights_of(tmp_path / "out"), weights_of(before.path)
    assert written.keys() == plain.keys() and all(torch.equal(written[name], plain[name]) for name in plain)


def test_a_chat_template_may_be_given(made: Callable[[str], Made], tmp_path: Path) -> None:
    done = convert_checkpoint(made("llava-v1.5").source.path, tmp_path / "out", chat_template="{{ 'mine' }}")
    assert any("chat template" in note for note in made("llava-v1.5").done.notes)
    assert not any("chat template" in note for note in done.notes)
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.apply_chat_template(TURNS) == "mine"


@pytest.mark.parametrize("kind", ["llava-1.5-hf", "llava-v1.5, one file"])
def test_a_batch_answers_as_its_questions_do_alone_in_stock_code(kind: str, made: Callable[[str], Made]) -> None:
    folder, questions = made(kind).path, ["yes ?", QUESTION, f"{QUESTION} {QUESTION}"]
    alone = [stock_answers(folder, image(), [question])[0] for question in questions]
    assert stock_answers(folder, image(), questions) == alone and len(set(alone)) > 1
    assert pipeline_answers(folder, image(), questions, 3) == pipeline_answers(folder, image(), questions, 1) == alone


def clip_pixels(picture: Image.Image) -> torch.Tensor:
    """What CLIP's processing makes of a picture, cut to a square."""
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
    return processor(picture, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("ratio", ["pad", "square", None, "anyres"])
def test_an_original_checkpoint_sees_pictures_as_llavas_code_shows_them(ratio: str | None, tmp_path: Path) -> None:
    source = original_folder(tmp_path / "source", "1.6", image_aspect_ratio=ratio)
    convert_checkpoint(source.path, tmp_path / "out")
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    shown = processor(image(), text="<image>", return_tensors="pt")["pixel_values"]
    mean = tuple(int(255 * value) for value in (0.48145466, 0.4578275, 0.40821073))
    padded = Image.new("RGB", (50, 50), mean)
    padded.paste(image(), (0, 5))
    expected = {
        "pad": clip_pixels(padded),
        "anyres": clip_pixels(image().resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)),
    }.get(ratio, clip_pixels(image()))
    assert torch.equal(shown, expected)


def test_a_tokenizer_model_of_sentencepiece_is_read(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    source = original_folder(tmp_path / "source", vocab_size=320)
    (source.path / "tokenizer.json").unlink()
    (tmp_path / "text").write_text(f"USER: {QUESTION} ASSISTANT: yes\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(source.path / "tokenizer"),
        vocab_size=source.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    (source.path / "tokenizer.vocab").unlink()
    (source.path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "legacy": false, "pad_token": "<unk>"}'
    )
    convert_checkpoint(source.path, tmp_path / "out")
    processor = AdaVTPProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(source.path / "tokenizer.model"))
    assert processor.tokenizer(QUESTION).input_ids == [1, *slow.encode(QUESTION)]
    assert processor.tokenizer("<image>").input_ids[-1] == processor.image_token_id


# ---------------------------------------------------------------------------------------------------------------------
# What does not agree is refused, by name
# ---------------------------------------------------------------------------------------------------------------------


def _field(**fields: Any) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        config = json.loads((folder.path / "config.json").read_text())
        (folder.path / "config.json").write_text(json.dumps(config | fields))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Folder], None]:
    """Changes a folder with one safetensors file."""

    def apply(folder: Folder) -> None:
        tensors = load_file(folder.path / "model.safetensors")
        change(tensors)
        save_file(tensors, folder.path / "model.safetensors", metadata={"format": "pt"})

    return apply


def _shard(change: Callable[[Path], Any], suffix: str = "safetensors") -> Callable[[Folder], None]:
    return lambda folder: change(sorted(folder.path.glob(f"*-of-*.{suffix}"))[1])


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


LLAVA, ONE_FILE, ORIGINAL = "llava-1.5-hf", "llava-1.5-hf, one file", "llava-v1.5"
NORM = "language_model.model.norm.weight"
REFUSED: dict[str, tuple[str, Callable[[Folder], Any], str]] = {
    "a linear projector": (ORIGINAL, _field(mm_projector_type="linear"), "`mm_projector_type` is 'linear'"),
    "a deeper projector": (ORIGINAL, _field(mm_projector_type="mlp3x_gelu"), "`mm_projector_type` is 'mlp3x_gelu'"),
    "a resampler": (ORIGINAL, _field(mm_resampler_type="perceiver"), "`mm_resampler_type` is 'perceiver'"),
    "several layers": (ORIGINAL, _field(mm_vision_select_layer=[-2, -1]), "`mm_vision_select_layer` is \\[-2, -1\\]"),
    "another selection": (ORIGINAL, _field(mm_vision_select_feature="cls"), "`mm_vision_select_feature` is 'cls'"),
    "start and end": (ORIGINAL, _field(mm_use_im_start_end=True), "`mm_use_im_start_end` is True"),
    "several scales": (ORIGINAL, _field(s2=True), "`s2` is True"),
    "tiles without the whole image": (
        ORIGINAL,
        _field(mm_patch_merge_type="spatial_nobase", image_aspect_ratio="anyres"),
        "`mm_patch_merge_type` is 'spatial_nobase'.*whole image first",
    ),
    "a pooling resampler": (
        ORIGINAL,
        _field(mm_resampler_type="spatial_pool"),
        "`mm_resampler_type` is 'spatial_pool'",
    ),
    "pictures cut up": (ORIGINAL, _field(image_aspect_ratio="crop_split"), "`image_aspect_ratio` is 'crop_split'"),
    "another conversation": (ORIGINAL, _field(version="v0_mmtag"), "`version` is 'v0_mmtag'.*'chatml_direct'"),
    "a vision tower that is a number": (LLAVA, _field(vision_config=3), "The checkpoint in .* cannot be read"),
    "a size in words": (ORIGINAL, _field(hidden_size="x"), "The checkpoint in .*hidden_size.*expected int"),
    "a selection in a list": (ORIGINAL, _field(mm_vision_select_feature=[1]), "The checkpoint in .* cannot be read"),
    "a layer that is not there": (ORIGINAL, _field(mm_vision_select_layer=99), "`vision_feature_layer` is 99"),
    "a processor that cannot process": (
        ONE_FILE,
        lambda folder: (folder.path / "preprocessor_config.json").write_text(
            (folder.path / "preprocessor_config.json")
            .read_text()
            .replace('"image_mean": [', '"image_mean": "x", "y": [')
        ),
        "The source's processor cannot read an image",
    ),
    "whole numbers as weights": (
        ONE_FILE,
        _tensors(lambda all_: all_.update({NORM: torch.ones(32, dtype=torch.int32)})),
        "norm.weight` of torch.int32",
    ),
    "weights that are NaN": (
        ONE_FILE,
        _tensors(lambda all_: all_[NORM][3:].fill_(torch.nan)),
        "'model.safetensors' of the source has 1 weight.s. with values that are NaN or infinite, .*norm.weight",
    ),
    "an unknown field": (ORIGINAL, _field(mm_spatial_pool=2), "`mm_spatial_pool` \\(2\\)"),
    "pictures in rows": (ORIGINAL, _field(image_aspect_ratio="highres"), "`image_aspect_ratio` is 'highres'"),
    "another tower's width": (ORIGINAL, _field(mm_hidden_size=64), "`mm_hidden_size` is 64.*have 32"),
    "no tower": (ORIGINAL, _field(mm_vision_tower=None), "`mm_vision_tower` is None"),
    "fewer rows than it says": (ORIGINAL, _field(vocab_size=100), "`model.embed_tokens.weight` of shape"),
    "another kind of tower": (
        ORIGINAL,
        lambda folder: (folder.tower / "config.json").write_text('{"model_type": "siglip"}'),
        "`model_type` 'siglip'; supported: 'clip'",
    ),
    "another kind of model": (LLAVA, _field(model_type="bert"), "`model_type` is 'bert'.*'llava', 'llava_next'"),
    "an AdaVTP checkpoint": (LLAVA, _field(model_type="adavtp"), "`model_type` is 'adavtp'"),
    "quantized weights": (LLAVA, _field(quantization_config={"bits": 4}), "`quantization_config`"),
    "a DINOv2 tower": (
        LLAVA,
        _field(vision_config={"model_type": "dinov2"}),
        "`vision_config.model_type` is 'dinov2'",
    ),
    "another image token": (LLAVA, _field(image_token_index=7), "`image_token_index` is 7"),
    "another size of images": (
        LLAVA,
        _field(vision_config=tiny_vision_config().to_dict() | {"image_size": 48}),
        "`vision_config.image_size` is 48",
    ),
    "a missing weight": (
        ONE_FILE,
        _tensors(lambda all_: all_.pop(NORM)),
        "lacks 1 tensor.*language_model.norm.weight",
    ),
    "an unknown weight": (
        ONE_FILE,
        _tensors(lambda all_: all_.update(memory=torch.ones(1))),
        "the tensor `memory`, for which",
    ),
    "a weight of a new module": (
        ONE_FILE,
        _tensors(lambda all_: all_.update({"model.controller.score.weight": torch.ones(1)})),
        "`model.controller.score.weight`, for which",
    ),
    "a weight twice": (
        ONE_FILE,
        _tensors(lambda all_: all_.update({"model.language_model.norm.weight": torch.ones(32)})),
        "is the same tensor",
    ),
    "a weight of another shape": (
        ONE_FILE,
        _tensors(lambda all_: all_.update({NORM: torch.ones(31)})),
        "norm.weight` of shape \\(31,\\); its configuration asks for \\(32,\\)",
    ),
    "a file that is gone": (LLAVA, _shard(Path.unlink), "model-00002-of-00003.safetensors"),
    "a file that was cut off": (LLAVA, _shard(_cut_off), "model-00002-of-00003.safetensors.*download it again"),
    "a pickle that was cut off": (
        ORIGINAL,
        _shard(_cut_off, "bin"),
        "pytorch_model-00002-of-00002.bin.*cannot be read",
    ),
    "a tokenizer that cannot be read": (
        ORIGINAL,
        lambda folder: (folder.path / "tokenizer.json").rename(folder.path / "tokenizer.model"),
        "tokenizer.*cannot be read.*sentencepiece and protobuf",
    ),
    "no weights": (ONE_FILE, lambda folder: (folder.path / "model.safetensors").unlink(), "has no weights"),
    "no configuration": (LLAVA, lambda folder: (folder.path / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_agree_is_refused_by_name_and_leaves_nothing(
    reason: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    kind, damage, message = REFUSED[reason]
    before = made(kind).source
    shutil.copytree(before.path, tmp_path / "source")
    folder = Folder(tmp_path / "source", before.tensors, before.image_token_id, before.vocab_size)
    if before.tower is not None:
        folder.tower = Path(shutil.copytree(before.tower, tmp_path / "tower"))
        _field(mm_vision_tower=str(folder.tower))(folder)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        convert_checkpoint(folder.path, tmp_path / "target" / "out")
    assert not (tmp_path / "target").exists() or not list((tmp_path / "target").iterdir())


def test_neither_a_folder_that_is_not_empty_nor_the_current_one_is_replaced(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    source = made("llava-1.5-hf").source.path
    (tmp_path / "empty").mkdir()
    with (
        contextlib.chdir(tmp_path / "empty"),
        pytest.raises(ValueError, match="current folder; allowed: another"),
    ):
        convert_checkpoint(source, ".")
    convert_checkpoint(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(ValueError, match="`output_dir`.*holds something else"):
        convert_checkpoint(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_interrupted_conversion_leaves_nothing(made: Callable[[str], Made], tmp_path: Path) -> None:
    def two_and_no_more(shards: list[Any]) -> Iterator[Any]:
        yield from shards[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(made("llava-1.5-hf").source.path, tmp_path / "out", progress=two_and_no_more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": {"hidden_size": 1}}, "`fields` has 'hidden_size'.*budget_attention"),
        ({"fields": {"vision_feature_layer": -1, "model_type": "llava"}}, "has 'model_type', 'vision_feature_layer'"),
        ({"vision_tower": "x"}, "`vision_tower` is 'x'"),
    ],
    ids=str,
)
def test_what_the_source_says_itself_cannot_be_given(
    arguments: dict[str, Any], message: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(made("llava-1.5-hf").source.path, tmp_path / "out", **arguments)


def test_another_folder_for_the_tower_may_be_named(made: Callable[[str], Made], tmp_path: Path) -> None:
    before = made("llava-v1.5").source
    shutil.copytree(before.path, tmp_path / "source")
    folder = Folder(tmp_path / "source", before.tensors, None, before.vocab_size)
    _field(mm_vision_tower="openai/clip-vit-large-patch14-336")(folder)
    convert_checkpoint(folder.path, tmp_path / "out", vision_tower=str(before.tower))
    assert weights_of(tmp_path / "out").keys() == weights_of(made("llava-v1.5").path).keys()


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path / "source", num_files=1)
    _field(tie_word_embeddings=True)(source)
    with pytest.raises(ValueError, match="`tie_word_embeddings` is True.*`language_model.lm_head.weight` differs"):
        convert_checkpoint(source.path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# The command, memory, and other machines
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(made: Callable[[str], Made], tmp_path: Path) -> None:
    source, out = made("llava-v1.5").source, tmp_path / "out"
    arguments = ["convert", str(source.path), str(out), "--set", "reducer=fastv:layer=1", "token_budget=0.5"]
    said = CliRunner().invoke(app, [*arguments, "--seed", "3"], env={"COLUMNS": "160"})
    assert said.exit_code == 0, said.output
    for words in ("80 tensors", "budget_token and controller", "logit_scale", "peak memory", "'vicuna_v1'", "seed 3"):
        assert words in said.output
    config = json.loads((out / "config.json").read_text())
    assert (config["reducers"], config["token_budget"]) == ([{"name": "fastv", "layer": 1}], 0.5)
    for wrong, message in ((["--set", "budget"], "NAME=VALUE"), ([], "holds something")):
        refused = CliRunner().invoke(app, ["convert", str(source.path), str(out), *wrong], env={"COLUMNS": "160"})
        assert refused.exit_code == 2 and message in refused.output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stem", ["pytorch_model", "model"])
def test_memory_stays_near_one_file_and_the_new_parts(stem: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    num_layers, width = 20, 32_768
    source = original_folder(tmp_path / "source", num_files=1)
    tensors = torch.load(source.path / "pytorch_model.bin")
    (source.path / "pytorch_model.bin").unlink()
    # As many layers as files, all weight in their MLPs.
    own = {
        name: value for name, value in tensors.items() if name.startswith("model.layers.0.") and ".mlp." not in name
    }
    for layer in range(num_layers):
        tensors |= {name.replace("layers.0.", f"layers.{layer}."): value.clone() for name, value in own.items()}
        for name, shape in {"gate": (width, 32), "up": (width, 32), "down": (32, width)}.items():
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = torch.zeros(shape, dtype=torch.float16)
    files = write_shards(source.path, dict(sorted(tensors.items())), num_layers, stem)
    _field(intermediate_size=width, num_hidden_layers=num_layers)(source)
    # The first conversion loads all code. ru_maxrss would not do: a process has it from the one that started it.
    code = f"""
from pathlib import Path
from adavtp.hub_cards.conversion.convert import convert_checkpoint

def resident(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))

convert_checkpoint({str(made("llava-v1.5").source.path)!r}, "small")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
done = convert_checkpoint({str(source.path)!r}, "large")
print(resident("VmHWM") - before, done.peak_memory, done.bytes)
"""
    grown, reported, size = map(int, run_elsewhere(code, tmp_path).split())
    one_file = max(path.stat().st_size for path in files)
    assert size > 100 * 2**20 > 8 * one_file
    assert grown < 2 * one_file
    assert abs(reported - grown) < 2**20


def test_the_folder_loads_and_answers_where_the_package_is_absent(made: Callable[[str], Made], tmp_path: Path) -> None:
    it = made("llava-v1.5, one file")
    image().save(tmp_path / "image.png")
    code = f"""
from PIL import Image
from transformers import AutoModel
model = AutoModel.from_pretrained({str(it.path)!r}, trust_remote_code=True)
print(model.generate(Image.open("image.png"), {QUESTION!r}, token_budget=0.4, reducer="random", max_new_tokens=6))
"""
    here = it.model.generate(image(), QUESTION, token_budget=0.4, reducer="random", max_new_tokens=6)
    assert run_without_package(code, tmp_path) == f"{here}\n" and here
