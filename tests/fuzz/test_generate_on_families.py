"""Calls of `generate` on any family that nobody would think of, against the stock class on prompts pruned by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from adavtp.modeling.reducers.base import REDUCERS
from pruned_by_hand import HandPruned, language_inputs, visual_tokens
from tiny_families import FAMILIES, STATEFUL, VIDEO_FAMILIES, Prompt, Writer, batch_of, budgeted, stock_model

NUM_NEW_TOKENS = 3
COLUMNS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
SIZES = [(1, 1), (1, 2), (2, 2), (2, 3)]
VIDEO = (3, 2, 2)
# Version 1 of SparseVLM changes hidden states inside the decoder, which no pruning by hand can follow.
CHOICES: list[Any] = [None, *sorted({*REDUCERS} - {"sparsevlm"}), {"name": "sparsevlm", "version": "v2"}]
CHOICES += [{"name": name, "attention": "per_head"} for name in ("prumerge", "prumerge+")]

one_budget = st.one_of(st.sampled_from([0.0, 0.4, 0.75, 1.0]), st.floats(0, 1, allow_subnormal=False))


@dataclass
class Call:
    """
    A conversation with a family's model: in every turn the images, videos and words of each prompt of a batch, as
    `Writer` takes them, and a budget for all or for each.
    """

    name: str
    seed: int
    reducer: Any
    turns: list[tuple[list[tuple[Any, Any, tuple[int, int]]], Any]]
    side: str
    whole: bool
    options: dict[str, Any]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    name, batch_size = draw(st.sampled_from(FAMILIES)), draw(st.integers(1, 3))
    reducer = draw(st.sampled_from([choice for choice in CHOICES if budgeted(name).why_not(choice) is None]))
    options = [{}, {}, {"use_cache": False}, {"num_beams": 2}]
    # Stock PaliGemma 2 has no static cache.
    options += [{"cache_implementation": "static"}] * (name != "paligemma2")
    # Where a decoder keeps a state, nothing assists, and turns of unequal length are refused: test_contracts.py.
    keeps_state = name in STATEFUL
    options += [{"prompt_lookup_num_tokens": 2}] * (batch_size == 1 and not keeps_state)
    option = draw(st.sampled_from(options))
    # What leaves inside the decoder in a later turn depends on the turns before, and a prompt alone does not say it.
    name_of_reducer = reducer["name"] if isinstance(reducer, dict) else reducer or "adaptive"
    is_in_decoder = REDUCERS[name_of_reducer].stage == "decoder" or name_of_reducer == "aim"
    has_one_turn = option or is_in_decoder or (keeps_state and batch_size > 1)
    num_turns = 1 if has_one_turn else draw(st.integers(1, 3))
    # GLM does not take both in one call, nor reads them as one prompt.
    shows_videos = name in VIDEO_FAMILIES and draw(st.booleans())
    turns = []
    for _ in range(num_turns):
        prompts = []
        for _ in range(batch_size):
            # Stock Mistral 3 cannot encode an image of one token.
            size = draw(st.sampled_from(SIZES[name == "mistral3" :]))
            most = 0 if shows_videos and name == "glm4v" else 2
            images = [size] * draw(st.integers(0, most))
            videos = [VIDEO] * draw(st.integers(0, 1)) if shows_videos else []
            words = draw(st.integers(1, 5)), draw(st.integers(0, 5))
            prompts.append((images, videos, words))
        of_prompt = st.integers(2, 60).map(lambda count: {"prompt": count})
        each = st.lists(one_budget, min_size=batch_size, max_size=batch_size)
        turns.append((prompts, draw(st.one_of(one_budget, st.integers(2, 40), of_prompt, each))))
    seed, side, whole = draw(st.integers(0, 1000)), draw(st.sampled_from(["left", "right"])), draw(st.booleans())
    return Call(name, seed, reducer, turns, side, whole, option)


class Row:
    """One conversation of a batch, pruned by hand as the model says of each of its prompts alone."""

    def __init__(self, name: str) -> None:
        self.name, self.so_far, self.unread, self.num_prefix = name, Prompt([]), [], None
        self.keep, self.depth, self.embeds = [], [], []

    @torch.no_grad()
    def show(self, turn: Prompt, **how: Any) -> None:
        """Appends a turn; a `ValueError` if the model cannot keep what is asked for."""
        self.so_far = self.so_far + turn
        self.num_prefix = self.num_prefix or len(turn.ids)
        if not turn.images and not turn.videos:
            return
        selection = budgeted(self.name)(**batch_of(self.name, [Prompt(self.unread) + turn]), **how).selection
        keep = selection.keep[selection.is_token]
        embeds = language_inputs(stock_model(self.name), batch_of(self.name, [turn]))["inputs_embeds"][0]
        embeds = embeds[visual_tokens(self.name, turn)[keep]]
        self.keep.append(keep)
        self.depth.append(torch.full((len(embeds),), 4))
        if selection.depth is not None:
            self.depth[-1] = selection.depth[selection.is_token][keep]
        self.embeds.append(embeds if selection.features is None else selection.features[selection.positions >= 0])

    def by_hand(self) -> HandPruned:
        keep, depth, embeds = (torch.cat(p) if p else None for p in (self.keep, self.depth, self.embeds))
        if keep is None:
            return HandPruned(self.name, self.so_far, torch.zeros(0, dtype=torch.bool), None, self.num_prefix)
        # Layers are looked into by hand only where they differ.
        depth = None if bool((depth == 4).all()) else depth
        return HandPruned(self.name, self.so_far, keep, embeds, self.num_prefix, depth)


@settings(max_examples=settings().max_examples // 6)
@given(calls())
def test_every_call_on_a_family_gives_what_its_stock_class_makes_of_prompts_pruned_by_hand(call: Call) -> None:
    note(repr(call))
    model, how = budgeted(call.name), {} if call.reducer is None else {"reducer": call.reducer}
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "output_scores": True} | call.options
    if len(call.turns) > 1:
        options["past_key_values"] = DynamicCache(config=model.config.get_text_config())
    rows = [Row(call.name) for _ in call.turns[0][0]]
    writer, so_far = Writer(call.name, call.seed), {}
    for number, (shown, token_budget) in enumerate(call.turns):
        prompts = [writer.prompt(*parts, begins=number == 0) for parts in shown]
        batch = batch_of(call.name, prompts, call.side if number == 0 else "left")
        columns = {name: batch[name] for name in COLUMNS & batch.keys()}
        if so_far:
            columns = {name: torch.cat([so_far[name], columns[name]], dim=1) for name in columns}
        num_new = batch["input_ids"].shape[1] + len(rows[0].unread)
        begin = 0 if call.whole else columns["input_ids"].shape[1] - num_new
        inputs = batch | {name: value[:, begin:] for name, value in columns.items()}
        inputs |= {"attention_mask": columns["attention_mask"], "token_budget": token_budget} | how
        try:
            for row, (one, turn) in enumerate(zip(rows, prompts, strict=True)):
                own = token_budget[row] if isinstance(token_budget, list) else token_budget
                one.show(turn, token_budget=own, **how)
        except ValueError as error:
            with pytest.raises(ValueError, match="token_budget|reducer"):
                model.generate(**inputs, **options)
            return note(str(error))
        if _is_left_to_the_stock_class(call, prompts):
            return None
        outputs = model.generate(**inputs, **options)
        answers = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        for row, one in enumerate(rows):
            answer = answers[row].tolist()
            expected = one.by_hand().logits_along(answer)
            if "num_beams" in call.options:
                scores = expected.log_softmax(dim=-1)[torch.arange(len(answer)), answers[row]]
                torch.testing.assert_close(outputs.sequences_scores[row], scores.mean().float(), atol=1e-4, rtol=1e-3)
            else:
                logits = torch.cat(outputs.logits) if len(rows) == 1 else torch.stack([s[row] for s in outputs.logits])
                near = {"atol": 2e-3, "rtol": 1e-2} if call.name in STATEFUL else {"atol": 1e-4, "rtol": 1e-3}
                torch.testing.assert_close(logits[: len(answer)], expected.float(), **near)
            one.so_far, one.unread = one.so_far + answer, answer[-1:]
        behind = {name: torch.full_like(answers, int(name == "attention_mask")) for name in columns}
        so_far = {name: torch.cat([columns[name], behind[name]], dim=1) for name in columns}
        so_far["input_ids"][:, -NUM_NEW_TOKENS:] = answers
    return None


def _is_left_to_the_stock_class(call: Call, prompts: list[Prompt]) -> bool:
    """Text alone is; stock PaliGemma reads candidates as a part of its prefix."""
    is_text = not any(prompt.images or prompt.videos for prompt in prompts)
    return is_text and call.name.startswith("paligemma") and "prompt_lookup_num_tokens" in call.options
