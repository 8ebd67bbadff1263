"""Conversations whose every turn may bring images: what a cache holds is what was pruned by hand, turn by turn."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pruned_by_hand import HandPruned, kept_of
from tiny_families import (
    FAMILIES,
    IN_DECODER,
    STATEFUL,
    VIDEO_FAMILIES,
    Batch,
    Prompt,
    Writer,
    batch_of,
    budgeted,
    close_to,
    stock_model,
)

NUM_NEW_TOKENS, NUM_LAYERS = 3, 4
AS_DICTIONARY = {
    "max_new_tokens": NUM_NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
HOW = {"reducer": "divprune"}
COLUMNS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
ONE, TWO, NONE = ((2, 3),), ((2, 2), (2, 2)), ()

every_family = pytest.mark.parametrize("name", FAMILIES)


class Conversation:
    """One conversation with a model, and by its side what was pruned of it by hand."""

    def __init__(self, name: str, seed: int = 1, whole: bool = True, reducer: str = "divprune") -> None:
        self.name, self.writer, self.whole, self.reducer = name, Writer(name, seed), whole, reducer
        self.cache = DynamicCache(config=stock_model(name).config.get_text_config())
        self.so_far, self.num_prefix = Prompt([]), None
        self.keep, self.depth = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long)

    def turn(self, images: tuple = NONE, videos: tuple = (), token_budget: Any = 0.4) -> None:
        """Says something, and compares answer and logits."""
        turn = self.writer.prompt(images=images, videos=videos, begins=not self.so_far.ids)
        num_old = int(self.cache.get_seq_length()) and len(self.so_far.ids) - 1
        self.so_far = self.so_far + turn
        self.num_prefix = self.num_prefix or len(turn.ids)
        how = {"token_budget": token_budget, "reducer": self.reducer}
        keep = kept_of(self.name, turn, **how)
        outputs = budgeted(self.name).generate(
            **self._inputs(turn, 0 if self.whole else num_old),
            past_key_values=self.cache,
            **AS_DICTIONARY,
            **how,
        )
        depth = torch.full((int(keep.sum()),), NUM_LAYERS)
        if outputs.selection is not None and outputs.selection.depth is not None:
            # What leaves inside the decoder depends on the turns before.
            depth = outputs.selection.depth[outputs.selection.is_token]
            assert int(depth.sum()) == int(token_budget * len(depth)) * NUM_LAYERS
        self.keep, self.depth = torch.cat([self.keep, keep]), torch.cat([self.depth, depth])
        answer = outputs.sequences[0, -NUM_NEW_TOKENS:].tolist()
        depth = self.depth if int(self.depth.sum()) < NUM_LAYERS * len(self.depth) else None
        reference = HandPruned(self.name, self.so_far, self.keep, num_prefix=self.num_prefix, depth=depth)
        logits = torch.cat(outputs.logits)[:NUM_NEW_TOKENS]
        torch.testing.assert_close(logits, reference.logits_along(answer).float(), **close_to(self.name))
        assert answer == reference.greedy(NUM_NEW_TOKENS)
        self.so_far, self.latest, self.logits = self.so_far + answer, turn, logits

    def _inputs(self, turn: Prompt, num_old: int) -> Batch:
        """What a caller passes: the ids of all turns or of the new columns, a mask for all, images of this turn."""
        inputs, whole = batch_of(self.name, [turn]), batch_of(self.name, [self.so_far])
        inputs |= {name: whole[name][:, num_old:] for name in COLUMNS & whole.keys()}
        return inputs | {"attention_mask": whole["attention_mask"]}


@pytest.mark.parametrize("whole", [True, False], ids=["whole conversation", "new columns"])
@every_family
def test_images_in_a_later_turn_are_pruned_and_read_behind_what_was_pruned_before(name: str, whole: bool) -> None:
    conversation = Conversation(name, whole=whole)
    conversation.turn(ONE)
    conversation.turn(TWO, token_budget=0.6)
    conversation.turn(NONE)
    conversation.turn(ONE, token_budget=0.2)


@pytest.mark.parametrize("name", IN_DECODER)
def test_what_left_inside_the_decoder_stays_away_in_later_turns(name: str) -> None:
    conversation = Conversation(name, reducer="fastv")
    conversation.turn(ONE, token_budget=0.75)
    conversation.turn(NONE, token_budget=0.75)
    conversation.turn(ONE, token_budget=0.5)
    # Behind layers that hold different columns, also an image of which nothing leaves.
    conversation.turn(ONE, token_budget=1.0)


@every_family
def test_a_conversation_that_begins_with_text_sees_images_later(name: str) -> None:
    conversation = Conversation(name)
    conversation.turn(NONE)
    conversation.turn(ONE)
    conversation.turn(NONE)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_video_may_come_in_a_later_turn(name: str) -> None:
    conversation = Conversation(name)
    # No stock GLM reads a conversation with images and videos as one prompt.
    conversation.turn(NONE if name == "glm4v" else ONE)
    conversation.turn(videos=((3, 2, 2),), token_budget=0.5)
    conversation.turn(NONE)


@every_family
def test_two_conversations_with_one_model_leave_each_other_alone(name: str) -> None:
    # Stock Qwen and GLM keep on the module where the positions of the last prompt went on.
    one, other = Conversation(name), Conversation(name, seed=2)
    one.turn(ONE)
    other.turn(TWO, token_budget=0.6)
    one.turn(NONE)
    other.turn(ONE)
    one.turn(TWO)


@torch.no_grad()
@every_family
def test_a_cache_goes_on_where_it_was_left_by_forward_and_by_generate(name: str) -> None:
    writer = Writer(name)
    first, text = writer.prompt(), Prompt(writer.words(3))
    model, how = budgeted(name), HOW | {"token_budget": 0.4}
    filled_by_forward = model(**batch_of(name, [first]), use_cache=True, **how).past_key_values
    # A conversation that `generate` left ends with a token that is in no cache yet.
    begun = model.generate(
        **batch_of(name, [first]), max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **how
    )
    said = begun.sequences[0, len(first.ids) :].tolist()
    for cache, unread in ((filled_by_forward, []), (begun.past_key_values, said)):
        reference = HandPruned(name, first + unread + text, kept_of(name, first, **how), num_prefix=len(first.ids))
        answer = reference.greedy(2)
        logits = model(input_ids=torch.tensor([unread + text.ids]), past_key_values=cache).logits[0, -1:]
        torch.testing.assert_close(logits, reference.logits_along(answer[:1]), **close_to(name))
        whole = torch.tensor([reference.prompt.ids + answer[:1]])
        written = model.generate(input_ids=whole, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert written[0, -1:].tolist() == answer[1:]


@every_family
def test_a_batch_of_conversations_is_what_each_is_alone(name: str) -> None:
    turns, budgets = [(ONE, NONE), (NONE, TWO), (ONE, ONE)], [[0.4, 1.0], [1.0, 0.6], [0.7, 0.2]]
    alone = [Conversation(name, seed) for seed in (1, 2)]
    cache = DynamicCache(config=stock_model(name).config.get_text_config())
    so_far: Batch = {}
    for images, token_budget in zip(turns, budgets, strict=True):
        for row, own, budget in zip(alone, images, token_budget, strict=True):
            row.turn(own, token_budget=budget)
        batch = batch_of(name, [row.latest for row in alone])
        columns = {
            key: torch.cat([so_far[key], batch[key]], dim=1) if so_far else batch[key]
            for key in COLUMNS & batch.keys()
        }
        call = {**batch, **columns, "past_key_values": cache, "token_budget": token_budget, **AS_DICTIONARY, **HOW}
        if so_far and name in STATEFUL:
            with pytest.raises(ValueError, match="different lengths.*linear attention moves its state on"):
                budgeted(name).generate(**call)
            return
        outputs = budgeted(name).generate(**call)
        logits = torch.stack(outputs.logits, dim=1)
        torch.testing.assert_close(logits, torch.stack([row.logits for row in alone]), **close_to(name))
        answers = outputs.sequences[:, -NUM_NEW_TOKENS:]
        behind = {key: torch.full_like(answers, int(key == "attention_mask")) for key in columns}
        so_far = {key: torch.cat([columns[key], behind[key]], dim=1) for key in columns} | {
            "input_ids": outputs.sequences
        }
