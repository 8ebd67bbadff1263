"""A family's own dial as a control: the setting that is nearest to the budget is what the stock class makes of it."""

import math
from typing import Any

import pytest
import torch
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    convert_image_to_patches,
    get_aspect_ratio_preserving_size,
)

from adavtp.modeling.families.gemma4 import SOFT_TOKENS, Gemma4Family
from tiny_families import FAMILIES, IMAGE, Batch, Prompt, Writer, batch_of, budgeted, stock_model, with_budget
from tiny_models import tiny_batch, tiny_model

WITH_DIAL = ("gemma4", "minicpmv4_6")
WITHOUT_DIAL = [name for name in FAMILIES if name not in WITH_DIAL]


def given(name: str, sizes: list[tuple[int, int]]) -> tuple[list[Prompt], dict[str, Any]]:
    """A prompt with each image, whose dial is not at its lowest setting, and what says so to the model."""
    writer = Writer(name)
    prompts = [writer.prompt(images=[size]) for size in sizes]
    if name == "gemma4":
        return prompts, {}
    # Four times as many tokens as the prompts of its lowest setting.
    ids = [[id for token in prompt.ids for id in [token] * (4 if token == IMAGE else 1)] for prompt in prompts]
    finer = [Prompt(own, prompt.images) for own, prompt in zip(ids, prompts, strict=True)]
    return finer, {"downsample_mode": "4x"}


def natively(name: str, prompt: Prompt) -> tuple[Batch, dict[str, Any]]:
    """The same prompt at the dial's lowest setting, from the definition of the family's image processor."""
    image = prompt.images[0]
    if name == "minicpmv4_6":
        count, tensors, arguments = int(image["target_sizes"].prod()) // 16, image, {"downsample_mode": "16x"}
    else:
        columns, rows = (image["image_position_ids"].amax(dim=0) + 1).tolist()
        picture = image["pixel_values"].reshape(rows, columns, 4, 4, 3).permute(4, 0, 2, 1, 3)
        picture = picture.reshape(3, 4 * rows, 4 * columns)
        size = get_aspect_ratio_preserving_size(4 * rows, 4 * columns, 4, SOFT_TOKENS[0] * 4, 2)
        small = torch.nn.functional.interpolate(picture[None].float(), size=size, mode="bicubic", antialias=True)
        patches = torch.from_numpy(convert_image_to_patches(small[0].clamp(0, 1).numpy(), 4)).double()
        places = torch.tensor([[x, y] for y in range(size[0] // 4) for x in range(size[1] // 4)])
        count, tensors, arguments = len(patches) // 4, {"pixel_values": patches, "image_position_ids": places}, {}
    text = [token for token in prompt.ids if token != IMAGE]
    begin = prompt.ids.index(IMAGE)
    return batch_of(name, [Prompt(text[:begin] + [IMAGE] * count + text[begin:], [tensors])]), arguments


@pytest.mark.parametrize("name", WITH_DIAL)
def test_each_unit_gets_the_setting_that_is_nearest_to_its_budget_and_says_which(name: str) -> None:
    sizes, lowest = ([(9, 12), (12, 9), (2, 3)], "70 soft tokens") if name == "gemma4" else ([(2, 3)] * 3, "16x")
    prompts, arguments = given(name, sizes)
    batch = batch_of(name, prompts) | arguments
    selection = budgeted(name).select_tokens(**batch, token_budget=[0.4, 1.0, 0.9], reducer="native")
    assert selection.settings == [lowest, "as given", "as given"]
    # At its lowest setting 9 x 12 tokens are 7 x 9: as many as 70 have room for in this shape.
    kept = [63, 108, 6] if name == "gemma4" else [6, 24, 24]
    assert selection.num_keep.tolist() == kept
    halfway = (kept[0] + int(selection.sizes[0])) // 2
    for budget, setting in ((halfway - 1, lowest), (halfway + 1, "as given"), (2, lowest)):
        batch = batch_of(name, prompts[:1]) | arguments
        assert budgeted(name).select_tokens(**batch, token_budget=budget, reducer="native").settings == [setting]


@pytest.mark.parametrize("name", WITH_DIAL)
def test_without_gaps_the_answer_is_the_stock_class_s_at_that_setting(name: str) -> None:
    prompts, arguments = given(name, [(9, 12) if name == "gemma4" else (2, 3)])
    stock_batch, stock_arguments = natively(name, prompts[0])
    model = with_budget(name, visual_position_ids="compact")
    with torch.no_grad():
        expected = stock_model(name)(**stock_batch, **stock_arguments).logits[0, -3:]
        outputs = model(**batch_of(name, prompts), **arguments, token_budget=0.3, reducer="native")
    torch.testing.assert_close(outputs.logits[0, -3:], expected, atol=1e-6, rtol=0)
    call = {"token_budget": 0.3, "reducer": "native", "max_new_tokens": 4, "do_sample": False}
    written = model.generate(**batch_of(name, prompts), **arguments, **call)[0, len(prompts[0].ids) :]
    stock = stock_model(name).generate(**stock_batch, **stock_arguments, max_new_tokens=4, do_sample=False)
    assert written.tolist() == stock[0, -4:].tolist()


@pytest.mark.parametrize("name", WITH_DIAL)
def test_images_and_frames_of_a_batch_are_what_they_are_alone(name: str) -> None:
    model, writer = budgeted(name), Writer(name)
    size = (9, 12) if name == "gemma4" else (4, 6)
    prompts = [writer.prompt(images=[size, (2, 2)], videos=[(2, *size)]), writer.prompt(images=[size])]
    arguments = {"token_budget": 0.3, "reducer": ["native", "grid"], "max_new_tokens": 4, "do_sample": False}
    batch = batch_of(name, prompts)
    selection = model.select_tokens(**batch, token_budget=0.3, reducer="native")
    stacked = model.select_tokens(**batch, token_budget={"native": 0.5, "grid": 0.5}, reducer=["native", "grid"])
    assert stacked.num_keep.tolist() == [max(1, int(count) // 2) for count in selection.num_keep]
    assert stacked.settings == selection.settings
    together = model.generate(**batch, **arguments)[:, -4:].tolist()
    alone = [model.generate(**batch_of(name, [prompt]), **arguments)[0, -4:].tolist() for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("soft_tokens", SOFT_TOKENS)
def test_gemma_s_sizes_are_those_of_its_image_processor(soft_tokens: int) -> None:
    model = stock_model("gemma4")
    for height, width in [(18, 24), (24, 18), (2, 40), (40, 2), (20, 14), (66, 66), (2, 160), (34, 34)]:
        expected = get_aspect_ratio_preserving_size(4 * height, 4 * width, 4, soft_tokens * 4, 2)
        ours = Gemma4Family._resized(model, height, width, soft_tokens)
        assert [4 * size for size in ours] == list(expected) and math.prod(ours) <= 4 * soft_tokens


@pytest.mark.parametrize("name", WITHOUT_DIAL)
def test_a_family_without_a_dial_says_so(name: str) -> None:
    batch = batch_of(name, [Writer(name).prompt()])
    with pytest.raises(ValueError, match="'native' cannot act on a .* as many tokens as the pixels .* say"):
        budgeted(name)(**batch, token_budget=0.5, reducer="native")


def test_llava_has_no_dial_and_a_dial_comes_first_in_a_stack() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="'native' cannot act on a 'adavtp' model: it turns a family's own dial"):
        model(**tiny_batch(model.config, [1]), token_budget=0.5, reducer="native")
    with pytest.raises(ValueError, match="'native' needs the whole grid of 2 x 3 tokens and got 3 tokens"):
        batch = batch_of("gemma4", [Writer("gemma4").prompt()])
        budgeted("gemma4")(**batch, token_budget={"grid": 0.5, "native": 0.5}, reducer=["grid", "native"])
