"""Conversations about videos train as those about images do, through every family's own processor."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ProcessorMixin

from adavtp import BudgetCollator
from adavtp.trainer.data.reader import ConversationReader
from pruned_by_hand import cut_inputs, language_inputs
from tiny_conversations import assistant, picture, target_texts, user
from tiny_families import close_to
from tiny_processors import WITH_VIDEOS, family_model, family_processor, stock_of

VIDEO = {"type": "video"}
FRAMES = 4
ROW_WITH_IMAGE = {"images": [picture(2, (50, 30))], "messages": [user("which ?", 1), assistant("red")]}
# One takes images beside videos for frames, the other gives the model one or the other.
APART = ("glm4v", "smolvlm")


def clip(seed: int = 0, num_frames: int = FRAMES, size: tuple[int, int] = (60, 40)) -> list[Image.Image]:
    """Frames of which each is a little other than the one before."""
    generator = np.random.default_rng(seed)
    first = np.asarray(picture(seed, size)).astype(int)
    moved = [first + generator.integers(-9, 9, first.shape) * number for number in range(num_frames)]
    return [Image.fromarray(frame.clip(0, 255).astype(np.uint8)) for frame in moved]


def watching(question: str, answer: str, videos: list[Any], images: list[Any] = ()) -> dict[str, Any]:
    """A row of one question about images and videos, in this order."""
    asked = user(question, len(images))
    asked["content"] = [VIDEO] * len(videos) + asked["content"]
    return {"videos": videos, "images": list(images), "messages": [asked, assistant(answer)]}


def rows_with_videos(name: str) -> list[dict[str, Any]]:
    """A video as images, and as an array with its times; an image and text alone, where the family takes them so."""
    array = np.stack([np.asarray(frame) for frame in clip(1, size=(40, 60))])
    rows = [
        watching("which digit is red ?", "7", [clip()]),
        watching("is there a 3 ?", "no", [{"frames": array, "fps": 2.0}]),
        {"messages": [user("which digit is blue ?"), assistant("2")]},
    ]
    return rows if name in APART else [*rows, ROW_WITH_IMAGE]


def row_alone(batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    return batch["input_ids"][number][batch["attention_mask"][number].bool()]


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_a_batch_with_videos_is_what_the_processor_writes_and_answers_are_its_targets(name: str) -> None:
    processor, rows = family_processor(name), rows_with_videos(name)
    batch = BudgetCollator(processor)(rows)
    for number, row in enumerate(rows):
        (said,) = target_texts(processor, batch["input_ids"][number].tolist(), batch["labels"][number].tolist())
        assert said.strip().startswith(row["messages"][1]["content"][0]["text"]), said
    frames = np.stack([np.asarray(frame) for frame in rows[0]["videos"][0]])
    text = processor.apply_chat_template(rows[0]["messages"])
    alone = processor(
        videos=[frames],
        text=[text],
        add_special_tokens=False,
        return_tensors="pt",
        videos_kwargs={"do_sample_frames": False},
    )
    written = row_alone(batch, 0)[: len(alone["input_ids"][0])]
    assert torch.equal(written, alone["input_ids"][0])
    pixels = batch["pixel_values" if name in ("internvl", "smolvlm") else "pixel_values_videos"]
    (own,) = [value for key, value in alone.items() if key.startswith("pixel_values")]
    if name == "minicpmv4_6":
        pixels, own = pixels.transpose(1, -1)[0], own.transpose(1, -1)[0]
    assert torch.equal(pixels.flatten(0, pixels.dim() - own[0].dim() - 1)[: len(own)], own)


def test_images_and_videos_that_the_processor_gives_one_name_are_refused_in_one_batch() -> None:
    collator = BudgetCollator(family_processor("smolvlm"))
    with pytest.raises(ValueError, match="SmolVLMProcessor gives the model one or the other"):
        collator([*rows_with_videos("smolvlm"), ROW_WITH_IMAGE])


def double_model(name: str, processor: ProcessorMixin) -> PreTrainedModel:
    """With weights at which losses depend on what is seen."""
    model = family_model(name, processor).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model


def in_double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: value.double() if key.startswith("pixel_values") else value
        for key, value in batch.items()
        if key != "token_budget"
    }


def loss_by_hand(
    stock: PreTrainedModel, batch: dict[str, torch.Tensor], keep: torch.Tensor, tokens: torch.Tensor
) -> Any:
    """Of a batch of one prompt, of whose visual tokens, in the columns `tokens`, those of `keep` are left."""
    labels = batch["labels"][0]
    is_left = torch.ones(len(labels), dtype=torch.bool)
    is_left[tokens[~keep]] = False
    left = is_left.nonzero()[:, 0]
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    hidden = stock.get_decoder()(**cut_inputs(language_inputs(stock, prompt), left)).last_hidden_state[0]
    return cross_entropy(stock.lm_head(hidden)[:-1].float(), labels[left][1:])


def visual_columns(stock: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Placeholders of a prompt that shows one video, without the newline behind it."""
    config = stock.config
    ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
    columns = torch.isin(batch["input_ids"][0], torch.tensor([id for id in ids if id is not None])).nonzero()[:, 0]
    return columns[:-1] if config.model_type == "llava_onevision" else columns


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_the_loss_of_videos_is_the_stock_class_s_and_of_fewer_tokens_that_of_prompts_pruned_by_hand(name: str) -> None:
    processor, rows = family_processor(name), rows_with_videos(name)[:2]
    model, collator = double_model(name, processor), BudgetCollator(processor)
    stock, batch = stock_of(name, model), in_double(collator(rows))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, token_budget=1.0).loss, stock(**batch).loss, **close_to(name))
        losses, weights = [], []
        for row, budget in zip(rows, (0.3, 0.6), strict=True):
            alone = in_double(collator([row]))
            inputs = {key: value for key, value in alone.items() if key != "labels"}
            selection = model.select_tokens(**inputs, token_budget=budget, reducer="divprune")
            tokens, keep = visual_columns(stock, alone), selection.keep[selection.is_token]
            assert keep.sum() == sum(max(1, int(budget * size)) for size in selection.sizes.tolist())
            losses.append(loss_by_hand(stock, alone, keep, tokens))
            weights.append((alone["labels"] >= 0).sum())
        expected = (torch.stack(losses) * torch.stack(weights)).sum() / sum(weights)
        pruned = model(**batch, token_budget=[0.3, 0.6], reducer="divprune").loss
        torch.testing.assert_close(pruned, expected, **close_to(name))
        assert (pruned - stock(**batch).loss).abs() > 1e-5


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_a_row_with_videos_is_read_in_the_length_that_it_has_in_a_batch(name: str) -> None:
    processor, rows = family_processor(name), rows_with_videos(name)
    reader, collator = ConversationReader(processor), BudgetCollator(processor)
    for number, row in enumerate(rows):
        row["id"] = f"row {number}"
        batch = collator([row])
        others, visual = reader.lengths(row)
        assert others + visual == batch["input_ids"].shape[1]
        assert (visual > 0) == bool(row.get("videos") or row.get("images"))
        read = collator([reader.read(row)])
        for key, value in batch.items():
            assert key == "token_budget" or torch.equal(read[key], value), key
