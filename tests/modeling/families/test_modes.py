"""Every mode of `generate` gives, below the full budget, what the stock language model says of hand-pruned prompts."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from adavtp import BudgetState
from pruned_by_hand import NUM_NEW_TOKENS, HandPruned, pruned_alike, said
from tiny_families import (
    FAMILIES,
    PAD,
    STATEFUL,
    VIDEO_FAMILIES,
    VOCAB_SIZE,
    Prompt,
    Writer,
    batch_of,
    budgeted,
    ragged_prompts,
    stock_model,
)

AS_DICTIONARY = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
BUDGETS = [0.7, 0.4, 1.0]
# Whose stock class cannot, whatever the budget.
WITHOUT_STATIC_CACHE = ("paligemma2",)

every_family = pytest.mark.parametrize("name", FAMILIES)
every_family_that_can_go_back = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in STATEFUL])


@cache
def by_hand(name: str) -> list[HandPruned]:
    """Prompts with one, two and no images, each at a budget of its own."""
    pairs = zip(ragged_prompts(name), BUDGETS, strict=True)
    return [pruned_alike(name, prompt, token_budget=budget, reducer="divprune") for prompt, budget in pairs]


@cache
def greedy(name: str) -> list[list[int]]:
    return [prompt.greedy() for prompt in by_hand(name)]


def generated(name: str, prompts: Sequence[Prompt], token_budget: Any = 0.4, **options: Any) -> Any:
    """Output of `generate` for prompts padded on the left; `answers` are the new tokens."""
    batch = batch_of(name, prompts)
    defaults = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS} | AS_DICTIONARY
    outputs = budgeted(name).generate(**batch, token_budget=token_budget, reducer="divprune", **defaults | options)
    outputs.answers = outputs.sequences[:, batch["input_ids"].shape[1] :].tolist()
    return outputs


@pytest.mark.parametrize("mode", ["dynamic", "static", "no cache"])
@every_family
def test_every_row_of_a_ragged_batch_has_its_own_greedy_answer_and_logits(name: str, mode: str) -> None:
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}[mode]
    if mode == "static" and name in WITHOUT_STATIC_CACHE:
        for model in (stock_model(name), budgeted(name)):
            with pytest.raises(AttributeError, match="'dict' object has no attribute 'ndim'"):
                model.generate(**batch_of(name, ragged_prompts(name)), max_new_tokens=4, **options)
        return
    outputs = generated(name, ragged_prompts(name), BUDGETS, **options)
    assert outputs.answers == greedy(name)
    for row, prompt in enumerate(by_hand(name)):
        logits = torch.stack([step[row] for step in outputs.logits])
        torch.testing.assert_close(logits, prompt.logits_along(greedy(name)[row]).float(), atol=1e-5, rtol=1e-4)


@every_family
def test_beam_search_finds_the_beams_of_every_row(name: str) -> None:
    outputs = generated(name, ragged_prompts(name), BUDGETS, num_beams=2, num_return_sequences=2)
    beams = [beam for prompt in by_hand(name) for beam in prompt.beams(2)]
    assert outputs.answers == [answer for answer, _ in beams]
    expected = torch.tensor([score for _, score in beams])
    torch.testing.assert_close(outputs.sequences_scores, expected, atol=1e-5, rtol=1e-4)


def test_stock_glm_searches_beams_of_a_prompt_with_two_images_on_images_that_changed_places() -> None:
    # It repeats the images [A, B] as [A, A, B, B] for two beams, which read [A, B] and [A, B].
    found = {}
    for prompt in ragged_prompts("glm4v")[:2]:
        batch, options = batch_of("glm4v", [prompt]), {"max_new_tokens": NUM_NEW_TOKENS, "num_beams": 2}
        best = pruned_alike("glm4v", prompt, token_budget=1.0).beams(2)[0][0]
        for model in (stock_model("glm4v"), budgeted("glm4v")):
            answer = model.generate(**batch, do_sample=False, **options)[0, -NUM_NEW_TOKENS:].tolist()
            found[len(prompt.images), type(model)] = answer == best
    assert list(found.values()) == [True, True, False, True]


def drawn_from(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities `[..., vocab_size]` at temperature 0.7, of the nine best."""
    scores = said(logits) / 0.7
    return scores.masked_fill(scores < scores.topk(9).values[..., -1:], -torch.inf).softmax(dim=-1)


SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 9}


@every_family
def test_sampling_draws_what_the_stock_language_model_draws_with_the_same_seed(name: str) -> None:
    prompt = by_hand(name)[1]
    torch.manual_seed(0)
    outputs = generated(name, [prompt.prompt], **SAMPLING)
    torch.manual_seed(0)
    drawn = prompt.choose(lambda logits: int(torch.multinomial(drawn_from(logits.float())[None], 1)))
    assert outputs.answers == [drawn]


@every_family
def test_sequences_returned_for_a_prompt_are_drawn_from_its_own_distributions(name: str) -> None:
    torch.manual_seed(0)
    outputs = generated(name, ragged_prompts(name), BUDGETS, num_return_sequences=2, **SAMPLING)
    assert len(outputs.answers) == 6 and outputs.answers[2] != outputs.answers[3]
    for row, answer in enumerate(outputs.answers):
        expected = drawn_from(by_hand(name)[row // 2].logits_along(answer).float())
        probabilities = torch.stack([step[row] for step in outputs.scores]).softmax(dim=-1)
        torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ assisted decoding


def assistant_that_says(answer: Sequence[int]) -> LlamaForCausalLM:
    """A text model that proposes, behind a token of an answer, the one that comes next in it."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=VOCAB_SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    assistant = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in assistant.model.layers.parameters():
            parameter.zero_()
        assistant.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        assistant.lm_head.weight.zero_()
        for token, following in zip(answer[:-1], answer[1:], strict=True):
            assistant.lm_head.weight[following, token] = 1.0
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@contextmanager
def decoder_runs(model: PreTrainedModel) -> Iterator[list[int]]:
    """Columns of every run of the model's decoder inside the `with`."""
    lengths: list[int] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()


def repetitive_prompt(name: str, num_images: int) -> Prompt:
    """A prompt that ends as it begins, so that lookup proposes what comes behind, placeholders among it."""
    prompt = Writer(name).prompt(images=((2, 2),) * num_images)
    prompt.ids[-2:] = prompt.ids[2:4]
    return prompt


@pytest.mark.parametrize("num_images", [1, 0])
@every_family_that_can_go_back
def test_assisted_decoding_gives_the_greedy_answer_in_fewer_steps(name: str, num_images: int) -> None:
    prompt = repetitive_prompt(name, num_images)
    reference = pruned_alike(name, prompt, token_budget=0.4, reducer="divprune")
    answer = reference.greedy(8)
    assistances = {
        "lookup": LOOKUP,
        "assistant": {"assistant_model": assistant_that_says(answer)},
    }
    for assistance, options in assistances.items():
        with decoder_runs(budgeted(name)) as runs:
            outputs = generated(name, [prompt], max_new_tokens=8, **options)
        if num_images == 0 and name.startswith("paligemma"):
            # Without images the prompt is left to the stock class, which reads candidates as part of the prefix, whose
            # tokens see those behind them.
            stock = stock_model(name).generate(
                **batch_of(name, [prompt]), max_new_tokens=8, do_sample=False, **LOOKUP, **AS_DICTIONARY
            )
            assert not torch.allclose(stock.logits[0], reference.logits_along(answer)[:1].float(), atol=1e-2)
            continue
        assert outputs.answers == [answer], assistance
        logits = torch.cat(outputs.logits)[: len(answer)]
        torch.testing.assert_close(logits, reference.logits_along(answer).float(), atol=1e-5, rtol=1e-4)
        if assistance == "lookup":
            assert runs[0] > int(reference.keep.sum()), "no candidates at the first step"
        else:
            assert len(runs) < 8, "no candidate was ever right"


@pytest.mark.parametrize("name", STATEFUL)
def test_where_a_state_cannot_go_back_nothing_assists(name: str) -> None:
    for assistance in (LOOKUP, {"assistant_model": assistant_that_says([5, 6, 7])}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generated(name, ragged_prompts(name)[:1], **assistance)


@every_family_that_can_go_back
def test_an_assistant_that_would_have_to_see_the_images_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="`assistant_model` is a .*, and an assistant does not get the prompt's images"
    ):
        generated(name, ragged_prompts(name)[:1], assistant_model=stock_model(name))


# ------------------------------------------------------------------------------------------ what looks at ids


class Collector(BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.received += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class NotedByProcessor(LogitsProcessor):
    """A logits processor that changes nothing and notes the ids that it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return scores


class StopsAt(StoppingCriteria):
    """Stops at a number of ids and notes those that it is shown."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("num_beams", [1, 2])
@every_family
def test_what_looks_at_ids_is_shown_the_caller_s(name: str, num_beams: int) -> None:
    prompts = ragged_prompts(name)[:2]
    given = batch_of(name, prompts)["input_ids"].tolist()
    length, allowed = len(given[0]), list(range(2, 90, 2))
    processor, criterion, seen = NotedByProcessor(), StopsAt(length + 3), []

    def even(row: int, ids: torch.Tensor) -> list[int]:
        seen.append(ids.tolist()[:length] == given[row])
        return allowed

    constraints = {"logits_processor": [processor], "stopping_criteria": [criterion], "prefix_allowed_tokens_fn": even}
    outputs = generated(name, prompts, num_beams=num_beams, **constraints)
    for ids in processor.seen + criterion.seen:
        assert [row[:length] for row in ids] == [row for row in given for _ in range(len(ids) // 2)]
    assert len(seen) == 3 * 2 * num_beams and all(seen)
    assert {len(answer) for answer in outputs.answers} == {3}
    if num_beams == 1:
        others = torch.tensor(sorted(set(range(VOCAB_SIZE)) - set(allowed)))
        for prompt, answer in zip(prompts, outputs.answers, strict=True):
            reference = pruned_alike(name, prompt, token_budget=0.4, reducer="divprune")
            assert answer == reference.choose(lambda logits: int(logits.index_fill(0, others, -torch.inf).argmax()), 3)


@every_family
def test_a_streamer_gets_the_full_prompt_and_then_every_token(name: str) -> None:
    streamer = Collector()
    outputs = generated(name, ragged_prompts(name)[:1], streamer=streamer)
    assert streamer.received == outputs.sequences[0].tolist() and streamer.ended


@every_family
def test_a_budget_processor_decides_for_each_prompt(name: str) -> None:
    states: list[BudgetState] = []

    def as_by_hand(input_ids: torch.Tensor, budget: torch.Tensor, state: BudgetState) -> list[float]:
        states.append(state)
        return BUDGETS

    prompts, batch = ragged_prompts(name), batch_of(name, ragged_prompts(name))
    expected, looks = greedy(name), []
    for budget, processors in ((BUDGETS, []), (1.0, [as_by_hand])):
        looks.append([])
        tower = budgeted(name).get_encoder(modality="image")
        handle = tower.register_forward_hook(lambda *_: looks[-1].append(1))
        assert generated(name, prompts, budget, budget_processor=processors).answers == expected
        handle.remove()
    assert looks[0] == looks[1] != [], "images are encoded again"
    (state,) = states
    assert state.num_visual_tokens == max(budgeted(name).select_tokens(**batch).sizes)
    assert torch.equal(state.pixel_values, batch["pixel_values"])
    assert state.prompt_length.tolist() == [len(prompt.ids) for prompt in prompts]
    units = [len(budgeted(name).select_tokens(**batch_of(name, [prompt])).sizes) for prompt in prompts[:2]]
    assert state.num_images.tolist() == [*units, 0]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_default_in_the_generation_config_is_for_videos_too(name: str) -> None:
    prompt, config = Writer(name).prompt(images=(), videos=((3, 2, 2),)), deepcopy(budgeted(name).generation_config)
    config.token_budget = 0.5
    outputs = generated(name, [prompt], None, generation_config=config)
    assert int(outputs.selection.num_keep.sum()) == 6
    assert outputs.answers == [pruned_alike(name, prompt, token_budget=0.5, reducer="divprune").greedy()]


@every_family
def test_images_that_are_encoded_already_are_answered_whole(name: str) -> None:
    model, batch = budgeted(name), batch_of(name, ragged_prompts(name)[:1])
    expected = generated(name, ragged_prompts(name)[:1], 1.0)
    encoder = model.base_model.get_image_features
    given = {key: value for key, value in batch.items() if key in inspect.signature(encoder).parameters}
    encoded = {"image": encoder(**given, return_dict=True)}
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="`pixel_values` and `mm_encoder_outputs` were both given"):
            call(**batch, mm_encoder_outputs=encoded)
    batch.pop("pixel_values")
    options = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS}
    answer = model.generate(**batch, mm_encoder_outputs=encoded, **options)
    assert torch.equal(answer, expected.sequences)
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="`token_budget` is 0.4 and `mm_encoder_outputs` was given"):
            call(**batch, mm_encoder_outputs=encoded, token_budget=0.4)
