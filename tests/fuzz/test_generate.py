"""Calls of `generate` that nobody would think of, against the stock decoder on a prompt that was pruned by hand."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from transformers import DynamicCache

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.evaluation_mode import evaluating
from layered_reader import LayeredReader, as_conversation
from tiny_models import (
    OF_LLAVA,
    TEXT_CONFIGS,
    WITH_WEIGHTS,
    alone,
    padded_on_the_right,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_NEW_TOKENS = 4

# These change hidden states inside the decoder, which no pruning by hand can follow: a row is what it is alone.
MERGING = ("sparsevlm", "aim", "aim_merge")
STACKS = [["downsample", "fastv"], ["divprune", "pyramiddrop"], ["tome", "vtw"], ["visionzip", "cdpruner"]]

budgets = st.one_of(
    st.none(), st.sampled_from([0.0, 1.0, 0.2, 0.5]), st.floats(0, 1, allow_subnormal=False), st.integers(2, 40)
)


@dataclass
class Turn:
    """What is said in one turn: images and words of each prompt, and a budget for all or for each."""

    images: tuple[int, ...]
    lengths: tuple[int, ...]
    token_budget: Any

    def budget_of(self, row: int) -> Any:
        return self.token_budget[row] if isinstance(self.token_budget, list) else self.token_budget


@dataclass
class Call:
    """A conversation with a model."""

    text: str
    positions: str
    attention: str
    reducer: Any
    turns: list[Turn]
    pads_right: bool
    training: bool
    whole: bool
    options: dict[str, Any]
    seed: int


@st.composite
def turns(draw: st.DrawFn, batch_size: int) -> Turn:
    images = tuple(draw(st.integers(0, 3)) for _ in range(batch_size))
    lengths = tuple(draw(st.integers(2 + num_images, 9)) for num_images in images)
    kinds = [st.floats(0, 1), st.integers(2, 40)]
    each = st.one_of(*(st.lists(kind, min_size=batch_size, max_size=batch_size) for kind in kinds))
    return Turn(images, lengths, draw(st.one_of(budgets, each)))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch_size = draw(st.integers(1, 3))
    options = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}, {"min_new_tokens": 2}]
    if batch_size == 1:
        options.append({"prompt_lookup_num_tokens": 2})
    option = draw(st.sampled_from(options))
    # A cache is handed on from turn to turn, and only a growing one can be.
    num_turns = draw(st.integers(1, 3)) if option in ({}, {"min_new_tokens": 2}) else 1
    names = sorted(OF_LLAVA - set(WITH_WEIGHTS))
    return Call(
        text=draw(st.sampled_from(sorted(TEXT_CONFIGS))),
        positions=draw(st.sampled_from(["original", "compact"])),
        attention=draw(st.sampled_from(["eager", "sdpa"])),
        reducer=draw(st.one_of(st.none(), st.sampled_from(names), st.sampled_from(STACKS))),
        turns=[draw(turns(batch_size)) for _ in range(num_turns)],
        pads_right=draw(st.booleans()),
        training=draw(st.booleans()),
        whole=draw(st.booleans()),
        options=option,
        seed=draw(st.integers(0, 1000)),
    )


@cache
def model_of(text: str, positions: str, attention: str) -> AdaVTPForConditionalGeneration:
    fields = {"text_config": tiny_text_config(text, num_layers=4), "visual_position_ids": positions}
    return as_conversation(tiny_model("clip", text, attn_implementation=attention, **fields))


def answers(model: AdaVTPForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> Any:
    outputs = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    outputs.answers = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return outputs


def require_likely(expected: torch.Tensor, answer: list[int]) -> None:
    """Of the logits `[num_tokens, vocab_size]` each token of the answer is the largest, or as good as that."""
    chosen = expected[torch.arange(len(answer)), torch.tensor(answer)]
    assert (expected.amax(dim=-1) - chosen < 1e-3).all()


@given(calls())
def test_every_call_gives_what_the_stock_decoder_makes_of_a_prompt_pruned_by_hand(call: Call) -> None:
    note(repr(call))
    model = model_of(call.text, call.positions, call.attention).train(call.training)
    how = {"reducer": call.reducer}
    can_be_followed = not set(MERGING) & set(_names(call.reducer))
    rows = range(len(call.turns[0].images))
    readers = [LayeredReader(model) for _ in rows]
    unread: list[list[int]] = [[] for _ in rows]
    cache = DynamicCache(config=model.config.get_text_config())
    ids, mask = torch.empty(len(rows), 0, dtype=torch.long), torch.empty(len(rows), 0, dtype=torch.long)
    for number, turn in enumerate(call.turns):
        batch = tiny_batch(model.config, turn.images, turn.lengths, seed=call.seed + number)
        if call.pads_right and number == 0:
            batch = padded_on_the_right(batch)
        samples = [alone(batch, row, turn.images) for row in rows]
        num_new = len(unread[0]) + batch["input_ids"].shape[1]
        ids = torch.cat([ids, batch["input_ids"]], dim=1)
        mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        inputs = batch | {"input_ids": ids if call.whole else ids[:, -num_new:], "attention_mask": mask}
        options = call.options | how | {"token_budget": turn.token_budget}
        if len(call.turns) > 1:
            options["past_key_values"] = cache
        if (reason := _why_not(model, samples, turn, call.reducer)) is not None:
            with pytest.raises(ValueError, match="token_budget|reducer"):
                answers(model, inputs, **options)
            return note(reason)
        outputs = answers(model, inputs, **options)
        # What leaves inside the decoder in a later turn depends on the turns before: there the model says it.
        depth = None if number == 0 or outputs.selection is None else outputs.selection.depth
        for row, sample in enumerate(samples):
            answer = outputs.answers[row].tolist()
            if not can_be_followed:
                if number == 0:
                    own = how | {"token_budget": turn.budget_of(row)}
                    by_itself = answers(model, sample, **call.options | own)
                    first = outputs.logits[0].unflatten(0, (len(rows), -1))[row, 0]
                    torch.testing.assert_close(by_itself.logits[0][0], first, atol=1e-4, rtol=1e-4)
                continue
            shown = slice(sum(turn.images[:row]), sum(turn.images[: row + 1]))
            with evaluating(model):
                readers[row].show(
                    unread[row] + sample["input_ids"][0].tolist(),
                    sample.get("pixel_values"),
                    None if depth is None else depth[shown],
                    token_budget=turn.budget_of(row),
                    **how,
                )
            expected = readers[row].logits_along(answer)
            if "num_beams" in call.options:
                scores = expected.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]
                torch.testing.assert_close(outputs.sequences_scores[row], scores.mean(), atol=1e-3, rtol=1e-3)
            else:
                require_likely(expected, answer)
                logits = torch.cat(outputs.logits) if len(rows) == 1 else torch.stack([s[row] for s in outputs.logits])
                torch.testing.assert_close(logits[: len(answer)], expected, atol=1e-4, rtol=1e-4)
            readers[row].read(answer[:-1])
            unread[row] = answer[-1:]
        ids = torch.cat([ids, outputs.answers], dim=1)
        mask = torch.cat([mask, torch.ones_like(outputs.answers)], dim=1)
        if not can_be_followed:
            return None
    return None


def _names(reducer: Any) -> list[str]:
    return ["adaptive"] if reducer is None else [reducer] if isinstance(reducer, str) else reducer


def _why_not(
    model: AdaVTPForConditionalGeneration, samples: list[dict[str, torch.Tensor]], turn: Turn, reducer: Any
) -> str | None:
    """Why one of the prompts cannot be answered at its budget, or `None`."""
    reasons = (
        model.unreachable(**sample, token_budget=turn.budget_of(row), reducer=reducer)
        for row, sample in enumerate(samples)
        if "pixel_values" in sample
    )
    return next(filter(None, reasons), None)
