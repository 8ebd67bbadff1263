"""What `generate` promises with a token budget: in every mode, what the stock text model says of the pruned prompt.

The reference of these tests is built by hand: the stock tower and projector encode the images, the columns of the
patches that the model chose to drop are cut out of each prompt, one sample at a time and without padding, and the
stock text model reads the result anew for every token, without a cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer

from adavtp import AdaVTPForConditionalGeneration, BudgetProcessor, BudgetProcessorList, BudgetState
from tiny_models import (
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    PAD_TOKEN_ID,
    TEXT_CONFIGS,
    padded_on_the_right,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_NEW_TOKENS = 6

Model = AdaVTPForConditionalGeneration
Batch = dict[str, torch.Tensor]


def own_model(vision: str = "clip", text: str = "llama", **fields: Any) -> Model:
    """A model for one test. Without an end-of-sequence token, so that every answer has its full length."""
    model = tiny_model(vision, text, **fields)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # A trained model does not write image placeholders; among 64 random words, a score of 0 is never the best.
        model.lm_head.weight[IMAGE_TOKEN_ID] = 0.0
    return model


@cache
def model_of(vision: str = "clip", text: str = "llama", **fields: Any) -> Model:
    """A model that no test changes."""
    return own_model(vision, text, **fields)


def generate(model: Model, batch: Batch, **kwargs: Any) -> Any:
    """`model.generate`, greedy and of fixed length unless the test says otherwise."""
    defaults = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS}
    return model.generate(**batch, **(defaults | kwargs))


def new_tokens(sequences: torch.Tensor, batch: Batch) -> torch.Tensor:
    return sequences[:, batch["input_ids"].shape[1] :]


def stock_visual_embeds(model: Model, pixel_values: torch.Tensor) -> torch.Tensor:
    """What LLaVA puts in the places of an image's placeholders, `[num_images, num_image_tokens, hidden_size]`."""
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    return model.model.multi_modal_projector(features)


class Reader:
    """One sample as the stock text model reads it: the kept columns of all turns, no padding, no cache."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.embeds = torch.empty(0, model.config.text_config.hidden_size)
        self.positions = torch.empty(0, dtype=torch.long)
        self.num_read = 0

    @torch.no_grad()
    def read(self, ids: Sequence[int], pixel_values: torch.Tensor | None = None, token_budget: Any = 1.0) -> None:
        """Appends a turn, without the columns that the model drops from it."""
        config = self.model.config
        ids = torch.tensor(ids)
        embeds, keep = self.model.get_input_embeddings()(ids).clone(), torch.ones(len(ids), dtype=torch.bool)
        if pixel_values is not None and len(pixel_values):
            selection = self.model.select_tokens(ids[None], pixel_values, token_budget=token_budget)
            places = (ids == config.image_token_id).nonzero()[:, 0].view(len(pixel_values), -1)
            first_patch = config.num_image_tokens - config.num_patches
            visual_embeds = stock_visual_embeds(self.model, pixel_values)
            for place, visual, kept in zip(places, visual_embeds, selection.positions.tolist(), strict=True):
                embeds[place] = visual
                dropped = sorted(set(range(config.num_patches)) - set(kept))
                keep[place[first_patch:][dropped]] = False
        if config.visual_position_ids == "compact":
            positions = len(self.positions) + torch.arange(int(keep.sum()))
        else:
            positions = (self.num_read + torch.arange(len(ids)))[keep]
        self.embeds = torch.cat([self.embeds, embeds[keep]])
        self.positions = torch.cat([self.positions, positions])
        self.num_read += len(ids)

    @torch.no_grad()
    def logits(self, answer: Sequence[int] = ()) -> torch.Tensor:
        """Logits `[vocab_size]` of the token after what was read and `answer`."""
        answer = torch.tensor(answer, dtype=torch.long)
        embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(answer)])
        compact = self.model.config.visual_position_ids == "compact"
        begin = len(self.positions) if compact else self.num_read
        positions = torch.cat([self.positions, begin + torch.arange(len(answer))])
        outputs = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
        )
        return self.model.lm_head(outputs.last_hidden_state[0, -1])

    def logits_along(self, answer: Sequence[int]) -> torch.Tensor:
        """Logits `[len(answer), vocab_size]` that each token of `answer` was chosen from."""
        return torch.stack([self.logits(answer[:step]) for step in range(len(answer))])

    def choose(self, choose: Callable[[torch.Tensor, list[int]], int], num_tokens: int = NUM_NEW_TOKENS) -> list[int]:
        """An answer whose every token is `choose(logits, answer so far)`."""
        answer = []
        for _ in range(num_tokens):
            answer.append(choose(self.logits(answer), answer))
        return answer

    def greedy(self, num_tokens: int = NUM_NEW_TOKENS) -> list[int]:
        return self.choose(lambda logits, answer: int(logits.argmax()), num_tokens)

    def beams(self, num_beams: int, num_tokens: int = NUM_NEW_TOKENS) -> list[tuple[list[int], float]]:
        """The answers of beam search, best first, each with its mean log-probability."""
        beams = [([], 0.0)]
        for _ in range(num_tokens):
            grown = []
            for answer, score in beams:
                best = self.logits(answer).log_softmax(dim=-1).topk(num_beams)
                grown += [([*answer, int(i)], score + float(p)) for p, i in zip(*best, strict=True)]
            beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
        return [(answer, score / num_tokens) for answer, score in beams]


def samples(model: Model, batch: Batch) -> list[Batch]:
    """Each sample of a batch by itself, without padding."""
    num_images = (batch["input_ids"] == IMAGE_TOKEN_ID).sum(dim=-1) // model.config.num_image_tokens
    alone = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row][mask][None]
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if num_images[row]:
            first = int(num_images[:row].sum())
            sample["pixel_values"] = batch["pixel_values"][first : first + int(num_images[row])]
        alone.append(sample)
    return alone


def budget_of(token_budget: Any, row: int) -> Any:
    return token_budget[row] if isinstance(token_budget, list | torch.Tensor) else token_budget


def readers(model: Model, batch: Batch, token_budget: Any) -> list[Reader]:
    """A reader for each sample that has read its prompt."""
    result = []
    for row, sample in enumerate(samples(model, batch)):
        reader = Reader(model)
        reader.read(sample["input_ids"][0].tolist(), sample.get("pixel_values"), budget_of(token_budget, row))
        result.append(reader)
    return result


def greedy_answers(model: Model, batch: Batch, token_budget: Any) -> list[list[int]]:
    return [reader.greedy() for reader in readers(model, batch, token_budget)]


# Images of each sample, text tokens of each, budget.
PROMPTS = {
    "one sample": ((1,), (6,), 0.4),
    "padding": ((1, 1), (5, 9), 0.4),
    "several images": ((3,), (9,), 0.3),
    "different budgets": ((1, 1, 1), (6, 6, 6), [0.2, 1.0, 0.5]),
    "counts": ((1, 1), (6, 8), [2, 7]),
    "different numbers of images": ((1, 2, 0), (6, 8, 5), [0.4, 0.2, 0.7]),
    "text": ((0, 0), (5, 8), 0.4),
    "all tokens": ((1, 1), (5, 9), 1.0),
    "one token": ((1, 1), (5, 9), 0.0),
}
every_prompt = pytest.mark.parametrize("prompt", PROMPTS)
both_positions = pytest.mark.parametrize("positions", ["original", "compact"])


def prompt_of(model: Model, name: str) -> tuple[Batch, Any]:
    images, lengths, token_budget = PROMPTS[name]
    return tiny_batch(model.config, images, lengths, seed=len(name)), token_budget


# --------------------------------------------------------------------------------------------------------- the modes


@every_prompt
@both_positions
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_generation_is_the_stock_text_models_on_the_pruned_prompt(
    prompt: str, positions: str, attention: str
) -> None:
    model = model_of(attn_implementation=attention, visual_position_ids=positions)
    batch, token_budget = prompt_of(model, prompt)
    outputs = generate(
        model, batch, token_budget=token_budget, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    answers = new_tokens(outputs.sequences, batch).tolist()
    for row, reader in enumerate(readers(model, batch, token_budget)):
        assert answers[row] == reader.greedy()
        logits = torch.stack([step[row] for step in outputs.logits])
        torch.testing.assert_close(logits, reader.logits_along(answers[row]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack([step[row] for step in outputs.scores]), logits)
    assert torch.equal(outputs.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize(
    ("vision", "fields"),
    [
        ("clip", {}),
        ("clip", {"vision_feature_select_strategy": "full"}),
        ("siglip", {}),
        # A tower whose layers take no mask in the older of the supported versions of transformers.
        ("dinov2", {"budget_fusion": "post"}),
        ("dinov2", {"budget_fusion": "post", "vision_feature_select_strategy": "full"}),
    ],
    ids=["clip", "clip with CLS", "siglip", "dinov2", "dinov2 with CLS"],
)
def test_every_tower_and_every_decoder_generates_from_the_pruned_prompt(
    vision: str, fields: dict[str, Any], text: str
) -> None:
    model = model_of(vision, text, **fields)
    batch = tiny_batch(model.config, (1, 1), (5, 8))
    answers = new_tokens(generate(model, batch, token_budget=0.4), batch).tolist()
    assert answers == greedy_answers(model, batch, 0.4)


def test_dropping_visual_tokens_changes_the_answer() -> None:
    # Otherwise no comparison in this file would say anything.
    model = model_of()
    batch = tiny_batch(model.config, (1,) * 6, (6,) * 6)
    answers = {budget: greedy_answers(model, batch, budget) for budget in (0.0, 0.4, 1.0)}
    assert answers[0.0] != answers[0.4] != answers[1.0]


@every_prompt
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}], ids=str
)
def test_the_kind_of_cache_does_not_change_the_answer(prompt: str, options: dict[str, Any]) -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, prompt)
    answers = new_tokens(generate(model, batch, token_budget=token_budget, **options), batch).tolist()
    assert answers == greedy_answers(model, batch, token_budget)


@every_prompt
def test_a_batch_gives_what_its_samples_give_alone(prompt: str) -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, prompt)
    together = new_tokens(generate(model, batch, token_budget=token_budget), batch).tolist()
    for row, sample in enumerate(samples(model, batch)):
        alone = generate(model, sample, token_budget=budget_of(token_budget, row))
        assert new_tokens(alone, sample).tolist() == [together[row]]


def test_a_mask_that_is_not_passed_is_taken_from_the_padding() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (5, 9))
    expected = generate(model, batch, token_budget=0.4)
    batch.pop("attention_mask")
    assert torch.equal(generate(model, batch, token_budget=0.4), expected)


CHOICES = [{"token_budget": 1.0}, {"token_budget": 0.4}, {"token_budget": 0.8, "reducer": "fastv"}]


@pytest.mark.parametrize("images", [(1, 2, 1), (0, 0, 0)], ids=["images", "text"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@both_positions
def test_padding_on_the_right_gives_what_padding_on_the_left_gives(
    choice: dict[str, Any], positions: str, images: tuple[int, ...]
) -> None:
    model = model_of(visual_position_ids=positions)
    batch = tiny_batch(model.config, images, (5, 9, 7))
    on_the_right = padded_on_the_right(batch)
    assert not on_the_right["attention_mask"][:, -1].all()
    answers = new_tokens(generate(model, on_the_right, **choice), batch)
    assert torch.equal(answers, new_tokens(generate(model, batch, **choice), batch))


def test_ids_that_are_no_batch_are_refused() -> None:
    batch = tiny_batch(model_of().config, (1,))
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(22,\)"):
        generate(model_of(), batch | {"input_ids": batch["input_ids"][0]})


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_model_in_training_generates_what_it_does_in_evaluation(num_beams: int) -> None:
    model = own_model()
    batch = tiny_batch(model.config, (1, 2), (5, 9))
    for choice in CHOICES:
        expected = generate(model.eval(), batch, num_beams=num_beams, **choice)
        assert torch.equal(generate(model.train(), batch, num_beams=num_beams, **choice), expected)


def sample_from(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Scores `[vocab_size]` after temperature and top-k."""
    scores = logits / temperature
    return scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)


@pytest.mark.parametrize("prompt", ["one sample", "several images", "text"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampling_draws_what_the_stock_text_model_draws_with_the_same_seed(prompt: str, seed: int) -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, prompt)
    batch = samples(model, batch)[0]
    torch.manual_seed(seed)
    answer = new_tokens(
        generate(model, batch, token_budget=token_budget, do_sample=True, temperature=0.7, top_k=9), batch
    )
    torch.manual_seed(seed)

    def draw(logits: torch.Tensor, answer: list[int]) -> int:
        return int(torch.multinomial(sample_from(logits, 0.7, 9).softmax(dim=-1)[None], 1))

    assert answer[0].tolist() == readers(model, batch, token_budget)[0].choose(draw)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
@every_prompt
def test_sampling_has_the_stock_text_models_distributions(prompt: str, num_return_sequences: int) -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, prompt)
    torch.manual_seed(0)
    outputs = generate(
        model,
        batch,
        token_budget=token_budget,
        do_sample=True,
        temperature=0.7,
        top_k=9,
        num_return_sequences=num_return_sequences,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = new_tokens(outputs.sequences, batch).tolist()
    assert len(answers) == num_return_sequences * len(batch["input_ids"])
    for row, answer in enumerate(answers):
        reader = readers(model, batch, token_budget)[row // num_return_sequences]
        expected = torch.stack([sample_from(logits, 0.7, 9) for logits in reader.logits_along(answer)])
        scores = torch.stack([step[row] for step in outputs.scores])
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("num_return_sequences", [1, 2])
@every_prompt
def test_beam_search_finds_the_stock_text_models_beams(prompt: str, num_return_sequences: int) -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, prompt)
    outputs = generate(
        model,
        batch,
        token_budget=token_budget,
        num_beams=3,
        num_return_sequences=num_return_sequences,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = [beam for reader in readers(model, batch, token_budget) for beam in reader.beams(3)[:num_return_sequences]]
    assert new_tokens(outputs.sequences, batch).tolist() == [answer for answer, _ in beams]
    expected = torch.tensor([score for _, score in beams])
    torch.testing.assert_close(outputs.sequences_scores, expected, atol=1e-4, rtol=1e-4)


def test_beam_search_in_a_static_cache_finds_the_same_beams() -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, "different numbers of images")
    sequences = generate(model, batch, token_budget=token_budget, num_beams=3, cache_implementation="static")
    beams = [reader.beams(3)[0][0] for reader in readers(model, batch, token_budget)]
    assert new_tokens(sequences, batch).tolist() == beams


class Collector(BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.received: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.received.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_full_prompt_and_then_every_token() -> None:
    model = model_of()
    batch, token_budget = prompt_of(model, "one sample")
    streamer = Collector()
    sequences = generate(model, batch, token_budget=token_budget, streamer=streamer)
    assert streamer.received[0] == batch["input_ids"][0].tolist()
    assert sum(streamer.received, []) == sequences[0].tolist()
    assert streamer.ended


def test_hidden_states_and_attentions_are_those_of_the_pruned_prompt() -> None:
    model = model_of(attn_implementation="eager")
    batch = tiny_batch(model.config, (1,), (6,))
    outputs = generate(
        model,
        batch,
        token_budget=0.5,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    length = 6 + NUM_PATCHES // 2
    assert outputs.hidden_states[0][-1].shape[1] == length
    assert [step[0].shape[-1] for step in outputs.attentions] == [length + step for step in range(NUM_NEW_TOKENS)]


def test_a_row_that_ends_early_is_padded_and_leaves_the_others_alone() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1, 1), (5, 7, 9))
    answers = greedy_answers(model, batch, 0.4)
    end = answers[0][1]
    sequences = generate(model, batch, token_budget=0.4, eos_token_id=end)
    expected = []
    for answer in answers:
        stop = answer.index(end) + 1 if end in answer else len(answer)
        expected.append(answer[:stop] + [PAD_TOKEN_ID] * (NUM_NEW_TOKENS - stop))
    longest = new_tokens(sequences, batch).shape[1]
    assert new_tokens(sequences, batch).tolist() == [answer[:longest] for answer in expected]


# ------------------------------------------------------------------------------------------------ assisted decoding


def repetitive_batch(model: Model, pad: int = 0, seed: int = 0) -> Batch:
    """A prompt whose end is there before its image too, so that prompt lookup has candidates from the first step."""
    ids = [PAD_TOKEN_ID] * pad + [1, 5, 6, 7, 8, 9] + [IMAGE_TOKEN_ID] * model.config.num_image_tokens + [20, 5, 6]
    batch = tiny_batch(model.config, (1,), (6,), seed=seed)
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD_TOKEN_ID).long(),
        "pixel_values": batch["pixel_values"],
    }


def assistant_of(model: Model) -> LlamaForCausalLM:
    """A text-only model with the decoder's own weights, so that some of what it proposes is right."""
    assistant = LlamaForCausalLM(tiny_text_config("llama")).eval()
    assistant.model.load_state_dict(model.model.language_model.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@contextmanager
def decoder_runs(model: Model) -> Iterator[list[int]]:
    """Columns of every run of the model's decoder inside the `with`."""
    lengths: list[int] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()


def lookup_or_assistant(model: Model, assistance: str) -> dict[str, Any]:
    if assistance == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    return {"assistant_model": assistant_of(model)}


both_assistances = pytest.mark.parametrize("assistance", ["prompt lookup", "assistant model"])


@both_positions
@pytest.mark.parametrize("pad", [0, 3], ids=["unpadded", "padded"])
@pytest.mark.parametrize("token_budget", [0.4, 1.0])
@both_assistances
def test_assisted_decoding_gives_the_greedy_answer_in_fewer_steps(
    positions: str, pad: int, token_budget: float, assistance: str
) -> None:
    model = model_of(visual_position_ids=positions)
    num_kept = max(1, int(token_budget * NUM_PATCHES))
    num_runs = 0
    for seed in range(3):
        batch = repetitive_batch(model, pad, seed)
        with decoder_runs(model) as runs:
            options = lookup_or_assistant(model, assistance)
            sequences = generate(model, batch, token_budget=token_budget, max_new_tokens=15, **options)
        assert new_tokens(sequences, batch)[0].tolist() == readers(model, batch, token_budget)[0].greedy(15)
        assert runs[0] > num_kept + 9, "no candidates at the first step"
        num_runs += len(runs)
    assert num_runs < 3 * 15, "no candidate was ever right"


def test_assisted_decoding_returns_the_logits_of_every_token() -> None:
    model = model_of()
    batch = repetitive_batch(model)
    outputs = generate(
        model,
        batch,
        token_budget=0.4,
        prompt_lookup_num_tokens=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answer = new_tokens(outputs.sequences, batch)[0].tolist()
    expected = readers(model, batch, 0.4)[0].logits_along(answer)
    torch.testing.assert_close(torch.cat(outputs.logits)[: len(answer)], expected, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- conversations


class Conversation:
    """Turns of `generate` with one cache, and of the readers beside it."""

    def __init__(self, model: Model, batch_size: int, whole: bool, cache: Any = None) -> None:
        self.model = model
        self.whole = whole
        self.cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
        self.ids = torch.empty(batch_size, 0, dtype=torch.long)
        self.mask = torch.empty(batch_size, 0, dtype=torch.long)
        self.readers = [Reader(model) for _ in range(batch_size)]
        # The last token of an answer is in no cache yet; it is read with the next turn.
        self.unread: list[list[int]] = [[] for _ in range(batch_size)]

    def turn(self, batch: Batch, token_budget: Any = 1.0, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Takes a turn. Returns the answers of `generate` and of the readers."""
        num_unread = len(self.unread[0])
        for row, sample in enumerate(samples(self.model, batch)):
            ids = self.unread[row] + sample["input_ids"][0].tolist()
            self.readers[row].read(ids, sample.get("pixel_values"), budget_of(token_budget, row))
        expected = [reader.greedy() for reader in self.readers]

        num_new = num_unread + batch["input_ids"].shape[1]
        self.ids = torch.cat([self.ids, batch["input_ids"]], dim=1)
        self.mask = torch.cat([self.mask, batch["attention_mask"]], dim=1)
        inputs = batch | {"input_ids": self.ids if self.whole else self.ids[:, -num_new:], "attention_mask": self.mask}
        sequences = generate(self.model, inputs, token_budget=token_budget, past_key_values=self.cache, **options)
        answers = new_tokens(sequences, inputs)
        self.ids = torch.cat([self.ids, answers], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(answers)], dim=1)
        for row, answer in enumerate(expected):
            self.readers[row].read(answer[:-1])
            self.unread[row] = answer[-1:]
        return answers.tolist(), expected


# For each turn the images of each sample, the text tokens of each, the budget.
CONVERSATIONS = {
    "image, text": [((1,), (6,), 0.4), ((0,), (5,), 1.0)],
    "image, image": [((1,), (6,), 0.4), ((1,), (5,), 0.2)],
    "text, image, text": [((0,), (6,), 0.4), ((1,), (5,), 0.4), ((0,), (3,), 0.4)],
    "all tokens, then few": [((1,), (6,), 1.0), ((1,), (4,), 0.2)],
    "ragged budgets": [((1, 1), (6, 9), [0.2, 0.7]), ((0, 0), (5, 5), 1.0), ((1, 1), (4, 4), [0.5, 0.1])],
    "ragged turns": [((1, 2, 0), (6, 8, 5), [0.4, 0.2, 1.0]), ((0, 1, 1), (3, 6, 4), [1.0, 0.3, 0.6])],
}
every_conversation = pytest.mark.parametrize("turns", CONVERSATIONS)
both_forms = pytest.mark.parametrize("whole", [True, False], ids=["whole conversation", "new tokens only"])


def conversation_batch(model: Model, conversation: str, turn: int) -> tuple[Batch, Any]:
    images, lengths, token_budget = CONVERSATIONS[conversation][turn]
    return tiny_batch(model.config, images, lengths, seed=10 * turn + len(conversation)), token_budget


@every_conversation
@both_positions
@both_forms
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_later_turn_continues_from_the_pruned_cache(turns: str, positions: str, whole: bool, cache: str) -> None:
    model = model_of(visual_position_ids=positions)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=128) if cache == "static" else None
    conversation = Conversation(model, len(CONVERSATIONS[turns][0][0]), whole, static)
    for turn in range(len(CONVERSATIONS[turns])):
        answers, expected = conversation.turn(*conversation_batch(model, turns, turn))
        assert answers == expected, f"turn {turn}"


@pytest.mark.parametrize("turns", [name for name, turns in CONVERSATIONS.items() if len(turns[0][0]) == 1])
@both_positions
@both_forms
@pytest.mark.parametrize("pad", [0, 2], ids=["unpadded", "padded"])
@both_assistances
def test_assisted_decoding_in_a_later_turn_gives_the_greedy_answer(
    turns: str, positions: str, whole: bool, pad: int, assistance: str
) -> None:
    model = model_of(visual_position_ids=positions)
    conversation = Conversation(model, 1, whole)
    for turn in range(len(CONVERSATIONS[turns])):
        batch, token_budget = conversation_batch(model, turns, turn)
        # The prompt ends as it begins, so that lookup finds candidates at once.
        batch["input_ids"][0, -2:] = torch.tensor([5, 6])
        padding = torch.tensor([[PAD_TOKEN_ID] * pad + [5, 6, 7]])
        batch["input_ids"] = torch.cat([padding, batch["input_ids"]], dim=1)
        batch["attention_mask"] = (batch["input_ids"] != PAD_TOKEN_ID).long()
        answers, expected = conversation.turn(batch, token_budget, **lookup_or_assistant(model, assistance))
        assert answers == expected, f"turn {turn}"


@both_positions
@both_forms
@pytest.mark.parametrize("pad", [0, 2], ids=["unpadded", "padded"])
@torch.no_grad()
def test_a_cache_that_forward_filled_is_continued_at_its_positions(positions: str, whole: bool, pad: int) -> None:
    model = model_of(visual_position_ids=positions)
    batch, token_budget = tiny_batch(model.config, (1, 1), (6, 6 + pad)), [0.4, 0.5]
    text, mask = torch.tensor([[5, 9], [7, 4]]), batch["attention_mask"]
    expected = readers(model, batch, token_budget)
    for row, reader in enumerate(expected):
        reader.read(text[row].tolist())

    output = model(**batch, token_budget=token_budget, use_cache=True)
    own_mask = {"attention_mask": torch.cat([mask, torch.ones_like(text)], dim=1)} if whole else {}
    logits = model(input_ids=text, past_key_values=output.past_key_values, **own_mask).logits[:, -1]
    torch.testing.assert_close(logits, torch.stack([r.logits() for r in expected]), atol=1e-4, rtol=1e-4)

    output = model(**batch, token_budget=token_budget, use_cache=True)
    ids, whole_mask = torch.cat([batch["input_ids"], text], dim=1), torch.cat([mask, torch.ones_like(text)], dim=1)
    inputs = {"input_ids": ids if whole else text, "attention_mask": whole_mask}
    sequences = generate(model, inputs, past_key_values=output.past_key_values)
    assert new_tokens(sequences, inputs).tolist() == [reader.greedy() for reader in expected]


@both_positions
@pytest.mark.parametrize("turns", [1, 2])
def test_an_answer_goes_on_behind_an_image_whether_its_last_patch_was_kept_or_not(positions: str, turns: int) -> None:
    model = model_of(visual_position_ids=positions, reducer="grid")
    conversation = Conversation(model, 1, whole=True)
    for seed in range(turns):
        batch = tiny_batch(model.config, (1,), (2,), seed=seed)
        assert batch["input_ids"][0, -1] == IMAGE_TOKEN_ID
        kept = model.select_tokens(**batch, token_budget=0.2).keep
        assert not kept[0, -1]
        answers, expected = conversation.turn(batch, 0.2)
        assert answers == expected


def test_without_a_cache_the_pruned_prompt_is_read_anew_at_every_step() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2), (6, 8))
    lengths = []
    handle = model.model.language_model.layers[0].register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    outputs = generate(model, batch, token_budget=5, use_cache=False, return_dict_in_generate=True)
    handle.remove()
    assert outputs.past_key_values is None
    assert lengths == [18 + step for step in range(NUM_NEW_TOKENS)]
    assert outputs.selection.num_keep.tolist() == [5, 5, 5]
    assert new_tokens(outputs.sequences, batch).tolist() == greedy_answers(model, batch, 5)


def test_a_cache_repeated_for_beams_continues_with_beam_search() -> None:
    model = model_of()
    conversation = Conversation(model, 2, whole=True)
    conversation.turn(tiny_batch(model.config, (1, 1), (6, 9)), [0.2, 0.7])
    conversation.cache.batch_repeat_interleave(3)
    answers, _ = conversation.turn(tiny_batch(model.config, (0, 0), (5, 5), seed=1), num_beams=3)
    fresh = Conversation(model, 2, whole=True)
    fresh.turn(tiny_batch(model.config, (1, 1), (6, 9)), [0.2, 0.7])
    for reader, last, sample in zip(
        fresh.readers, fresh.unread, samples(model, tiny_batch(model.config, (0, 0), (5, 5), seed=1)), strict=True
    ):
        reader.read(last + sample["input_ids"][0].tolist())
    assert answers == [reader.beams(3)[0][0] for reader in fresh.readers]


def test_several_sequences_per_prompt_can_each_be_continued() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (5, 8))
    torch.manual_seed(0)
    outputs = generate(
        model, batch, token_budget=0.4, do_sample=True, num_return_sequences=2, return_dict_in_generate=True
    )
    question = torch.tensor([[9, 8, 7]]).expand(4, -1)
    input_ids = torch.cat([outputs.sequences, question], dim=1)
    mask = torch.cat([batch["attention_mask"].repeat_interleave(2, dim=0), torch.ones(4, NUM_NEW_TOKENS + 3)], dim=1)
    second = {"input_ids": input_ids, "attention_mask": mask.long(), "past_key_values": outputs.past_key_values}
    answers = new_tokens(generate(model, second), second).tolist()
    for row, answer in enumerate(answers):
        reader = readers(model, batch, 0.4)[row // 2]
        reader.read(new_tokens(outputs.sequences, batch)[row].tolist() + [9, 8, 7])
        assert answer == reader.greedy()


def test_a_row_that_ended_early_is_continued_without_its_padding() -> None:
    model = model_of()
    # The first of a few batches in which the third token of one answer is not in the other.
    batches = (tiny_batch(model.config, (1, 1), (5, 8), seed=seed) for seed in range(20))
    candidates = ((batch, greedy_answers(model, batch, 0.4)) for batch in batches)
    batch, first = next((batch, first) for batch, first in candidates if first[0][2] not in first[0][:2] + first[1])
    end = first[0][2]
    outputs = generate(model, batch, token_budget=0.4, eos_token_id=end, return_dict_in_generate=True)
    answers = new_tokens(outputs.sequences, batch)
    answer_mask = torch.ones_like(answers)
    answer_mask[0, 3:] = 0
    second = {
        "input_ids": torch.cat([outputs.sequences, torch.tensor([[9, 8], [7, 6]])], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], answer_mask, torch.ones(2, 2).long()], dim=1),
        "past_key_values": outputs.past_key_values,
    }
    continued = generate(model, second, return_dict_in_generate=True, output_logits=True)
    expected = readers(model, batch, 0.4)
    expected[0].read(first[0][:3] + [9, 8])
    expected[1].read(first[1] + [7, 6])
    for row, answer in enumerate(new_tokens(continued.sequences, second).tolist()):
        logits = torch.stack([step[row] for step in continued.logits])
        torch.testing.assert_close(logits, expected[row].logits_along(answer), atol=1e-4, rtol=1e-4)


def test_padding_between_turns_is_refused_where_a_window_would_count_it() -> None:
    model = own_model(text="mistral", text_config=tiny_text_config("mistral", sliding_window=12))
    conversation = Conversation(model, 2, whole=True)
    for lengths in ((5, 9), (6, 6)):
        answers, expected = conversation.turn(tiny_batch(model.config, (1, 1), lengths), 0.4)
        assert answers == expected
    with pytest.raises(ValueError, match=r"different lengths.*12 columns.*Continue each by itself"):
        conversation.turn(tiny_batch(model.config, (0, 0), (5, 9)), 0.4)


# ----------------------------------------------------------------------------------------------- lengths and penalties


@pytest.mark.parametrize("token_budget", [0.0, 0.4, 7, 1.0, [0.2, 0.7]], ids=str)
def test_the_cache_holds_the_kept_columns_and_no_more(token_budget: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 6))
    outputs = generate(model, batch, token_budget=token_budget, return_dict_in_generate=True)
    kept = model.select_tokens(**batch, token_budget=token_budget).num_keep.max()
    assert outputs.past_key_values.get_seq_length() == 6 + int(kept) + NUM_NEW_TOKENS - 1


def test_a_static_cache_is_as_long_as_the_pruned_prompt_needs() -> None:
    # transformers never makes a model's static caches shorter than an earlier one, so this takes a model of its own.
    model = own_model()
    batch = tiny_batch(model.config, (1,), (6,))
    outputs = generate(model, batch, token_budget=0.5, cache_implementation="static", return_dict_in_generate=True)
    assert outputs.past_key_values.layers[0].keys.shape[2] == 6 + NUM_PATCHES // 2 + NUM_NEW_TOKENS - 1


def test_max_length_counts_the_full_prompt() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 8))
    length = batch["input_ids"].shape[1]
    sequences = generate(model, batch, token_budget=0.4, max_new_tokens=None, max_length=length + 3)
    assert sequences.shape[1] == length + 3
    with pytest.raises(ValueError, match="max_length"):
        generate(model, batch, token_budget=0.4, max_new_tokens=None, max_length=length)


@pytest.mark.parametrize("token_budget", [0.4, [0.0, 1.0]], ids=str)
@pytest.mark.parametrize("lengths", [(9, 9), (6, 12)], ids=["unpadded", "padded"])
def test_repetition_penalty_sees_the_full_prompt(lengths: tuple[int, int], token_budget: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), lengths)
    outputs = generate(
        model,
        batch,
        token_budget=token_budget,
        repetition_penalty=1.7,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = new_tokens(outputs.sequences, batch).tolist()
    for row, reader in enumerate(readers(model, batch, token_budget)):
        prompt = samples(model, batch)[row]["input_ids"][0].tolist()
        for step, logits in enumerate(reader.logits_along(answers[row])):
            seen = torch.tensor(sorted(set(prompt + answers[row][:step])))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.7, logits[seen] / 1.7)
            scores = outputs.scores[step][row].clone()
            # Whether padding is a repetition is for the version of transformers to say.
            scores[PAD_TOKEN_ID] = logits[PAD_TOKEN_ID]
            torch.testing.assert_close(scores, logits, atol=2e-4, rtol=1e-4)


def test_guidance_weighs_the_pruned_prompt_against_its_last_token() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1,), (6,))
    without_prompt = Reader(model)
    without_prompt.read(batch["input_ids"][0, -1:].tolist())

    def choose(logits: torch.Tensor, answer: list[int]) -> int:
        weak = without_prompt.logits(answer).log_softmax(dim=-1)
        return int((weak + 2.0 * (logits.log_softmax(dim=-1) - weak)).argmax())

    sequences = generate(model, batch, token_budget=0.4, guidance_scale=2.0)
    assert new_tokens(sequences, batch)[0].tolist() == readers(model, batch, 0.4)[0].choose(choose)


class Recorder(LogitsProcessor):
    """A logits processor that keeps the lengths of the ids it sees."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores


def test_logits_processors_see_the_full_prompt() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 8))
    recorder = Recorder()
    generate(model, batch, token_budget=0.4, logits_processor=[recorder])
    length = batch["input_ids"].shape[1]
    assert recorder.lengths == [length + step for step in range(NUM_NEW_TOKENS)]


# ------------------------------------------------------------------------------------------- where budgets come from


def test_the_configurations_budget_is_the_default() -> None:
    batch = tiny_batch(model_of().config, (1, 1), (5, 8))
    by_default = generate(model_of(token_budget=0.4), batch)
    assert torch.equal(by_default, generate(model_of(), batch, token_budget=0.4))


@pytest.mark.parametrize("where", ["argument", "of the model"])
def test_a_generation_configs_budget_is_used_and_the_argument_overrides_it(where: str) -> None:
    model = own_model()
    batch = tiny_batch(model.config, (1,) * 4, (6,) * 4)
    if where == "argument":
        options = {"generation_config": GenerationConfig(token_budget=0.4, max_new_tokens=NUM_NEW_TOKENS)}
    else:
        model.generation_config.token_budget = 0.4
        options = {"max_new_tokens": NUM_NEW_TOKENS}
    assert new_tokens(model.generate(**batch, **options), batch).tolist() == greedy_answers(model, batch, 0.4)
    overridden = model.generate(**batch, **options, token_budget=[0.1, 0.2, 0.3, 1.0])
    expected = greedy_answers(model, batch, [0.1, 0.2, 0.3, 1.0])
    assert new_tokens(overridden, batch).tolist() == expected


@pytest.mark.parametrize("as_what", [list, tuple, torch.tensor, lambda values: torch.tensor(values).bfloat16()])
def test_a_budget_per_sample_comes_in_any_sequence(as_what: Callable[[list[float]], Any]) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 8))
    sequences = generate(model, batch, token_budget=as_what([0.2, 0.6]))
    assert new_tokens(sequences, batch).tolist() == greedy_answers(model, batch, [0.2, 0.6])


class Recording(BudgetProcessor):
    """A budget processor that keeps what it was given and returns what it was told to."""

    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        self.answer = answer
        self.calls: list[tuple[torch.Tensor, torch.Tensor, BudgetState]] = []

    def __call__(self, input_ids: torch.LongTensor, budget: torch.Tensor, state: BudgetState) -> Any:
        self.calls.append((input_ids, budget, state))
        return self.answer(budget)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_budget_processor_is_asked_once_with_prompts_budget_and_state(num_beams: int) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2, 0), (6, 8, 5))
    processor = Recording(lambda budget: budget)
    sequences = generate(model, batch, token_budget=0.4, budget_processor=[processor], num_beams=num_beams)
    assert torch.equal(sequences, generate(model, batch, token_budget=0.4, num_beams=num_beams))
    ((input_ids, budget, state),) = processor.calls
    assert torch.equal(input_ids, batch["input_ids"])
    assert budget.tolist() == [0.4, 0.4, 0.4]
    assert (state.step, state.num_visual_tokens) == (0, NUM_PATCHES)
    assert state.num_images.tolist() == [1, 2, 0]
    assert state.prompt_length.tolist() == batch["attention_mask"].sum(dim=-1).tolist()
    assert torch.equal(state.pixel_values, batch["pixel_values"])


@pytest.mark.parametrize("answer", [[0.2, 0.7], torch.tensor([3, 11]), 0.3, 5], ids=str)
def test_a_budget_processor_decides_the_budget_of_each_sample(answer: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 8))
    sequences = generate(model, batch, budget_processor=[lambda input_ids, budget, state: answer])
    expected = answer.tolist() if isinstance(answer, torch.Tensor) else answer
    assert new_tokens(sequences, batch).tolist() == greedy_answers(model, batch, expected)


def test_budget_processors_are_asked_one_after_another() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 8))
    first, second = Recording(lambda budget: budget / 2), Recording(lambda budget: budget + 0.25)
    processors = BudgetProcessorList([first, second])
    sequences = generate(model, batch, token_budget=[1.0, 0.5], budget_processor=processors)
    assert second.calls[0][1].tolist() == [0.5, 0.25]
    assert new_tokens(sequences, batch).tolist() == greedy_answers(model, batch, [0.75, 0.5])


def test_a_budget_processor_of_a_later_turn_gets_what_is_new() -> None:
    model = model_of()
    conversation = Conversation(model, 1, whole=True)
    conversation.turn(tiny_batch(model.config, (1,), (6,)), 0.4)
    processor = Recording(lambda budget: 0.2)
    # The reader gets the budget that the processor decides.
    batch = tiny_batch(model.config, (1,), (5,), seed=1)
    answers, expected = conversation.turn(batch, 0.2, budget_processor=[processor])
    assert answers == expected
    input_ids, _, state = processor.calls[0]
    assert input_ids[0, 1:].tolist() == batch["input_ids"][0].tolist()
    assert state.num_images.tolist() == [1]


# --------------------------------------------------------------------------------------------------- what cannot work


def error_of(model: Model, batch: Batch, **options: Any) -> str:
    """The message of the `ValueError` that `generate` raises. Afterwards the model has to work as before."""
    before = generate(model, batch, token_budget=0.4)
    with pytest.raises(ValueError) as error:
        generate(model, batch, **options)
    assert torch.equal(generate(model, batch, token_budget=0.4), before)
    return str(error.value)


@pytest.mark.parametrize("images", [(1, 1), (0, 0)], ids=["images", "text"])
@pytest.mark.parametrize("token_budget", [1.5, -0.1, float("nan"), True, 1, "0.4", [0.4], [0.4, 2]], ids=str)
def test_a_wrong_budget_is_named(images: tuple[int, ...], token_budget: Any) -> None:
    message = error_of(model_of(), tiny_batch(model_of().config, images), token_budget=token_budget)
    assert "`token_budget`" in message


def test_a_wrong_budget_is_named_in_a_later_turn_of_text() -> None:
    conversation = Conversation(model_of(), 1, whole=True)
    conversation.turn(tiny_batch(model_of().config, (1,), (6,)), 0.4)
    with pytest.raises(ValueError, match="`token_budget` has the value 1.5"):
        conversation.turn(tiny_batch(model_of().config, (0,), (6,)), 1.5)


@pytest.mark.parametrize("answer", [None, 1.5, True, [0.4], torch.tensor([[0.4, 0.4]]), torch.tensor([1, 3])], ids=str)
def test_a_budget_processor_that_returns_no_budget_is_named(answer: Any) -> None:
    batch = tiny_batch(model_of().config, (1, 1))
    message = error_of(model_of(), batch, budget_processor=[Recording(lambda budget: answer)])
    assert "Recording" in message
    assert "`token_budget`" in message


def test_a_budget_processor_that_is_not_in_a_list_is_refused() -> None:
    batch = tiny_batch(model_of().config, (1, 1))
    message = error_of(model_of(), batch, budget_processor=Recording(lambda budget: budget))
    assert "`budget_processor`" in message
    assert "[" in message


def test_a_misspelt_argument_is_refused() -> None:
    assert "token_bugdet" in error_of(model_of(), tiny_batch(model_of().config, (1, 1)), token_bugdet=0.4)


def test_prefill_in_chunks_is_refused_with_images_and_works_for_text() -> None:
    model = model_of()
    message = error_of(model, tiny_batch(model.config, (1, 1)), token_budget=0.4, prefill_chunk_size=4)
    assert "`prefill_chunk_size` is 4" in message
    assert "token_budget" in message
    text = tiny_batch(model.config, (0, 0), (9, 9))
    assert torch.equal(generate(model, text, prefill_chunk_size=4), generate(model, text))


def test_continuous_batching_is_refused_with_images() -> None:
    # transformers leaves images out of it without a word.
    model = model_of()
    batch = tiny_batch(model.config, (0, 1))
    assert "`inputs[1]` has image placeholders" in error_of(model, batch, cache_implementation="paged")
    with pytest.raises(ValueError, match=r"`inputs\[1\]` has image placeholders.*`generate`"):
        model.generate_batch(batch["input_ids"].tolist())


PROMPT_LEARNING = {
    "prompt tuning": PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=4
    ),
    "prefix tuning": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16, num_attention_heads=2
    ),
}


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning_answers_no_images_and_is_the_stock_models_for_text(kind: str) -> None:
    # PEFT finds the embeddings by their size, which nothing else may have.
    fields = {"text_config": tiny_text_config(vocab_size=70)}
    ours, model = own_model(**fields), own_model(**fields)
    stock = LlamaForCausalLM(model.config.text_config).eval()
    stock.model, stock.lm_head = model.model.language_model, model.lm_head
    stock.generation_config.eos_token_id = None
    tuned = []
    for each in (ours, stock):
        torch.manual_seed(0)
        tuned.append(get_peft_model(each, PROMPT_LEARNING[kind]).eval())
    text, batch = tiny_batch(ours.config, (0, 0), (9, 9)), tiny_batch(ours.config, (1, 1))
    assert torch.equal(generate(tuned[0], text), generate(tuned[1], text))
    with pytest.raises(ValueError, match="`input_ids` has image placeholders.*prompt learning.*LoRA"):
        generate(tuned[0], batch, token_budget=0.4)
    if kind == "prefix tuning":
        with pytest.raises(ValueError, match="`pixel_values`.*PEFT's .*LoRA"):
            tuned[0](**batch, token_budget=0.4)
    else:
        # Its tokens come as embeddings, from which a prompt with images is read: it trains.
        outputs = tuned[0](**batch, labels=batch["input_ids"], token_budget=0.4)
        outputs.loss.backward()
        assert outputs.selection.num_keep.tolist() == [NUM_PATCHES * 2 // 5] * 2
        learned = [tensor for name, tensor in tuned[0].named_parameters() if "prompt_encoder" in name]
        assert learned and all(tensor.grad.abs().sum() > 0 for tensor in learned)
    # Without PEFT before it, the model answers as ever.
    assert torch.equal(generate(ours, batch, token_budget=0.4), generate(own_model(**fields), batch, token_budget=0.4))


@pytest.mark.parametrize("assistance", ["early exit", "with images"])
def test_an_assistant_that_would_have_to_see_the_images_is_refused(assistance: str) -> None:
    model = model_of()
    if assistance == "early exit":
        options = {"assistant_early_exit": 1}
    else:
        options = {"assistant_model": tiny_model(seed=1)}
    message = error_of(model, tiny_batch(model.config, (1,)), **options)
    assert "assistant" in message
    assert "`prompt_lookup_num_tokens`" in message


def test_the_mask_form_is_refused() -> None:
    message = error_of(model_of(), tiny_batch(model_of().config, (1, 1)), selection_output="mask")
    assert "`selection_output` is 'mask'" in message


@pytest.mark.parametrize("token_budget", [1.0, 0.4, [0.25, 1.0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_embeddings_with_images_are_answered_as_their_ids_are(options: dict[str, Any], token_budget: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    expected = generate(model, batch, token_budget=token_budget, **options)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert torch.equal(generate(model, batch, inputs_embeds=embeds, token_budget=token_budget, **options), expected)
    answers = new_tokens(expected, batch)
    without_ids = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    assert torch.equal(generate(model, without_ids, token_budget=token_budget, **options), answers)


def test_embeddings_padded_on_the_right_are_answered_like_any_other() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    expected = new_tokens(generate(model, batch, token_budget=0.4), batch)
    moved = padded_on_the_right(batch)
    moved["inputs_embeds"] = model.get_input_embeddings()(moved.pop("input_ids")).detach()
    assert torch.equal(generate(model, moved, token_budget=0.4), expected)


def test_embeddings_that_hold_the_images_already_may_come_with_their_ids() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    expected = generate(model, batch)
    ids, embeds = batch["input_ids"], model.get_input_embeddings()(batch["input_ids"]).detach()
    visual = stock_visual_embeds(model, batch.pop("pixel_values")).detach()
    embeds = embeds.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], visual)
    assert torch.equal(generate(model, batch, inputs_embeds=embeds), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_images_that_are_encoded_already_are_answered_like_pixels(options: dict[str, Any]) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    expected = generate(model, batch, **options)
    encoded = {"image": model.get_image_features(batch["pixel_values"])}
    with pytest.raises(ValueError, match="`pixel_values` and `mm_encoder_outputs` were both given"):
        generate(model, batch, mm_encoder_outputs=encoded)
    batch.pop("pixel_values")
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="`token_budget` is 0.4 and `mm_encoder_outputs` was given"):
            call(**batch, mm_encoder_outputs=encoded, token_budget=0.4)
    assert torch.equal(generate(model, batch, mm_encoder_outputs=encoded, **options), expected)
    moved = padded_on_the_right(batch)
    again = generate(model, moved, mm_encoder_outputs=encoded, **options)
    assert torch.equal(new_tokens(again, batch), new_tokens(expected, batch))


def test_embeddings_of_a_later_turn_are_refused() -> None:
    model = model_of()
    _, outputs = finished_turn(model)
    embeds = model.get_input_embeddings()(outputs.sequences).detach()
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    with pytest.raises(ValueError, match="`inputs_embeds` was given with a `past_key_values`.*`input_ids`"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=outputs.past_key_values)


@pytest.mark.parametrize("num_images", [1, 3])
def test_images_that_do_not_match_their_placeholders_are_refused(num_images: int) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    wrong = batch | {"pixel_values": torch.randn(num_images, 3, 32, 32)}
    with pytest.raises(ValueError, match="placeholder") as error:
        generate(model, wrong)
    assert f"{num_images} image(s)" in str(error.value)


def finished_turn(model: Model) -> tuple[Batch, Any]:
    batch = tiny_batch(model.config, (1, 1), (6, 6))
    return batch, generate(model, batch, token_budget=0.4, return_dict_in_generate=True)


@pytest.mark.parametrize("wrong", ["the prompt again", "a mask for the new tokens only", "a cut cache", "fewer rows"])
def test_ids_that_do_not_continue_the_cache_are_refused(wrong: str) -> None:
    model = model_of()
    batch, outputs = finished_turn(model)
    cache = outputs.past_key_values
    ids = torch.cat([outputs.sequences, torch.tensor([[5, 6], [7, 8]])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    if wrong == "the prompt again":
        inputs |= {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    elif wrong == "a mask for the new tokens only":
        inputs |= {"input_ids": ids[:, -3:], "attention_mask": torch.ones(2, 3).long()}
    elif wrong == "a cut cache":
        cache.crop(-NUM_NEW_TOKENS)
    else:
        inputs |= {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
    with pytest.raises(ValueError, match="`past_key_values`") as error:
        generate(model, inputs)
    assert "`input_ids`" in str(error.value)
    assert torch.equal(generate(model, batch, token_budget=0.4), outputs.sequences)


def test_a_cache_that_was_reset_starts_a_new_conversation() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1,), (6,))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    first = generate(model, batch, token_budget=0.4, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, batch, token_budget=0.4, past_key_values=cache), first)


def test_a_cache_that_was_reset_has_no_part_in_a_new_conversation_of_text() -> None:
    model = model_of()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    generate(model, tiny_batch(model.config, (1, 1), (6, 9)), token_budget=0.4, past_key_values=cache)
    cache.reset()
    text = tiny_batch(model.config, (0, 0), (20, 8))
    expected = generate(model, text, repetition_penalty=1.7)
    assert torch.equal(generate(model, text, repetition_penalty=1.7, past_key_values=cache), expected)


def test_a_cache_cropped_within_the_answer_continues_from_there() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1,), (6,))
    outputs = generate(model, batch, token_budget=0.4, return_dict_in_generate=True)
    cache = outputs.past_key_values
    # Of the answer the cache holds all but the last token; three more go.
    cache.crop(-3)
    kept = new_tokens(outputs.sequences, batch)[0].tolist()[: NUM_NEW_TOKENS - 4]
    ids = torch.cat([batch["input_ids"], torch.tensor([[*kept, 9, 8, 7]])], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    (reader,) = readers(model, batch, 0.4)
    reader.read([*kept, 9, 8, 7])
    assert new_tokens(generate(model, second), second).tolist() == [reader.greedy()]


@torch.no_grad()
def test_an_image_in_a_direct_forward_with_a_filled_cache_is_refused() -> None:
    model = model_of()
    batch, outputs = finished_turn(model)
    with pytest.raises(ValueError, match="`pixel_values`") as error:
        model(**batch, past_key_values=outputs.past_key_values)
    assert "`generate`" in str(error.value)


def test_the_form_that_returns_text_refuses_a_dictionary() -> None:
    with pytest.raises(ValueError, match="`return_dict_in_generate` is True") as error:
        model_of().generate(torch.zeros(3, 32, 32), "What is it?", return_dict_in_generate=True)
    assert "model.processor" in str(error.value)
