"""What rescaled attention promises: RESTORE's bias while a prompt is read, whichever reducer chose, and no more."""

import math
from functools import cache
from typing import Any

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.decoder.cached_columns import CachedColumns, LayerAttention
from adavtp.modeling.decoder.rescaling import rescaling_bias
from counted_flops import assert_counted, uneven_model
from layered_reader import LayeredReader, as_conversation
from tiny_families import IN_DECODER, batch_of, budgeted, ragged_prompts, with_budget
from tiny_models import NUM_PATCHES, alone, tiny_batch, tiny_model, tiny_text_config

NUM_NEW_TOKENS = 3
IMAGES, LENGTHS, BUDGETS = (1, 2, 0, 1), (7, 9, 6, 8), [0.6, 0.8, 0.5, 1.0]
# Behind the tower, merging, behind the projector, and inside the decoder at one layer and at several.
REDUCERS = ["adaptive", "prumerge", "divprune", "fastv", "pyramiddrop"]


def own_model(text: str = "llama", attention: str = "sdpa", **fields: Any) -> AdaVTPForConditionalGeneration:
    fields = {"visual_attention": "rescaled", "text_config": tiny_text_config(text, 4)} | fields
    return as_conversation(tiny_model(text=text, attn_implementation=attention, **fields))


@cache
def model_of(text: str = "llama", attention: str = "sdpa", **fields: Any) -> AdaVTPForConditionalGeneration:
    """A model that no test changes."""
    return own_model(text, attention, **fields)


def bias_by_definition(positions: list[int], is_visual: list[bool], num_whole: int, head_dim: int) -> torch.Tensor:
    """One pair of columns after another, with the frequencies of plain rotary positions."""
    frequencies = [10_000 ** (-2 * number / head_dim) for number in range(head_dim // 2)]
    bias = torch.zeros(len(positions), len(positions))
    for i, row in enumerate(positions):
        for j, column in enumerate(positions):
            mean_cosine = sum(math.cos((row - column) * f) for f in frequencies) / len(frequencies)
            size = num_whole / sum(is_visual) if is_visual[j] else 1.0
            bias[i, j] = math.log(2 - mean_cosine) + math.log(size)
    return bias


class RescaledReader(LayeredReader):
    """Adds to a causal mask what the paper's code adds."""

    num_whole = 0

    def bias(self, positions: torch.Tensor, is_visual: torch.Tensor) -> torch.Tensor:
        if int(is_visual.sum()) == self.num_whole:
            return super().bias(positions, is_visual)
        return bias_by_definition(positions.tolist(), is_visual.tolist(), self.num_whole, head_dim=8)


@pytest.mark.parametrize(
    ("text", "attention", "positions", "reducer"),
    [("llama", "sdpa", "original", reducer) for reducer in REDUCERS]
    + [("llama", "eager", "compact", "divprune"), ("qwen3", "sdpa", "compact", "pyramiddrop")],
)
def test_prefill_and_every_step_are_the_stock_layers_with_the_paper_s_bias(
    text: str, attention: str, positions: str, reducer: str
) -> None:
    model = model_of(text, attention, visual_position_ids=positions)
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    with torch.no_grad():
        prefill = model(**batch, token_budget=BUDGETS, reducer=reducer).logits
    outputs = model.generate(
        **batch,
        token_budget=BUDGETS,
        reducer=reducer,
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = outputs.sequences[:, batch["input_ids"].shape[1] :].tolist()
    plain = tiny_batch(model.config, IMAGES, LENGTHS)
    for row, num_images in enumerate(IMAGES):
        reader, sample = RescaledReader(model), alone(plain, row, IMAGES)
        reader.num_whole = num_images * NUM_PATCHES
        how = {"token_budget": [BUDGETS[row]], "reducer": reducer}
        reader.show(sample["input_ids"][0].tolist(), sample.get("pixel_values"), **how)
        expected = reader.all_logits()
        torch.testing.assert_close(prefill[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        logits = torch.stack([step[row] for step in outputs.logits])
        torch.testing.assert_close(logits, reader.logits_along(answers[row]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_changes_what_a_reduced_prompt_says_and_not_what_a_whole_one_does() -> None:
    model, plain = model_of(), model_of(visual_attention="plain")
    batch = tiny_batch(model.config, (1, 1))
    how = {"token_budget": [0.5, 1.0], "reducer": "divprune"}
    changed, expected = model(**batch, **how).logits[:, -1], plain(**batch, **how).logits[:, -1]
    assert (changed[0] - expected[0]).abs().max() > 1e-2
    torch.testing.assert_close(changed[1], expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(**batch, token_budget=1.0).logits, plain(**batch, token_budget=1.0).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", IN_DECODER)
def test_in_every_family_a_batch_gives_what_its_prompts_give_alone(name: str) -> None:
    model, prompts = with_budget(name, visual_attention="rescaled").eval(), ragged_prompts(name)
    how = {"token_budget": 0.5, "reducer": "divprune"}
    together = model(**batch_of(name, prompts), **how).logits[:, -1]
    for row, prompt in enumerate(prompts):
        alone_ = model(**batch_of(name, [prompt]), **how).logits[0, -1]
        torch.testing.assert_close(together[row], alone_, atol=1e-5, rtol=1e-5)
    plain = budgeted(name)(**batch_of(name, prompts), **how).logits[:, -1]
    assert (together - plain).abs().max() > 1e-4


def test_distances_are_the_mean_cosine_over_whatever_turns_a_key() -> None:
    # Three axes share the frequencies, and a scaling makes cosines and sines longer.
    generator = torch.Generator().manual_seed(0)
    angles = 10 * torch.rand(1, 5, 4, generator=generator)
    tables = tuple(1.3 * torch.cat([wave, wave], dim=-1) for wave in (angles.cos(), angles.sin()))
    is_visual = torch.tensor([[False, True, True, False, False]])
    bias = rescaling_bias(tables, is_visual, torch.tensor([6]))
    for i in range(5):
        for j in range(5):
            cosine = sum(math.cos(float(angles[0, i, f] - angles[0, j, f])) for f in range(4)) / 4
            expected = math.log(2 - cosine) + (math.log(6 / 2) if is_visual[0, j] else 0.0)
            assert float(bias[0, 0, i, j]) == pytest.approx(expected, abs=1e-5)


def test_a_decoder_and_an_attention_that_cannot_are_refused_in_words() -> None:
    batch = batch_of("glm4v", ragged_prompts("glm4v")[:1])
    model = with_budget("glm4v", visual_attention="rescaled").eval()
    with pytest.raises(ValueError, match="`visual_attention` is 'rescaled': it acts inside the decoder"):
        model(**batch, token_budget=0.5, reducer="divprune")
    held = CachedColumns(torch.ones(1, 0, dtype=torch.bool), 0, False, torch.zeros(1, dtype=torch.long))
    flash, bias = LayerAttention("flash_attention_2", None), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="`visual_attention` is 'rescaled'.*'flash_attention_2' attention takes none"):
        held.mask(model_of().config.text_config, 0, flash, 4, None, torch.zeros(1, 4, 32), bias=bias)


@pytest.mark.parametrize("reducer", ["divprune", "fastv"])
def test_it_costs_what_torch_counts(reducer: str) -> None:
    model = uneven_model(visual_attention="rescaled")
    for text_tokens in (5, 9, 27, 61):
        assert_counted(model, reducer, 0.6, text_tokens=text_tokens)
