"""What every registered reducer promises once it is in a model, whatever its stage and however it chooses.

The reference for generation is one forward pass over prompt and answer, without a cache. The answer's tokens are
marked by labels, so that they are no part of the question and nothing is dropped because of them.
"""

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.reducers.base import REDUCERS, reducer_parameters
from layered_reader import LayeredReader, as_conversation
from tiny_models import (
    GATE_IDS,
    GATES,
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    OF_LLAVA,
    WITH_WEIGHTS,
    alone,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_LAYERS, NUM_NEW_TOKENS = 4, 5
NAMES = sorted(OF_LLAVA)
INSIDE_THE_DECODER = [name for name in NAMES if REDUCERS[name].stage == "decoder"]
OWN_RULE = [name for name in NAMES if REDUCERS[name].has_own_rule]
TRAINED = [name for name in NAMES if REDUCERS[name].trained]
# Fewest of 16 tokens that a method can keep: two layers of the tower run and can halve them, or the decoder's first
# layer of four (its first two for methods that cut where it is half as deep) sees everything.
LEAST = {"tome": 4, "token_fusion": 4} | dict.fromkeys(INSIDE_THE_DECODER, 4)
LEAST |= {"aim_prune": 8, "apet_layer": 8, "random_layer": 8}
# What only the stage can change is tried with one of each kind before the decoder, and inside it with one that drops
# once, one that chooses by how many it keeps, one that recycles in several steps, and one that drops all.
KINDS = ["adaptive", "tome", "dynamicvit", "prumerge", "divprune", "aim", "fastv", "dart_layer", "sparsevlm", "vtw"]

# The ways to generate see merged tokens, tokens that leave at one layer and at several, and a stack of all stages.
# That sampling, beams and processors work on a pruned prompt and on a cache of uneven layers is said elsewhere.
STACK = ["tome", "adaptive", "divprune", "pyramiddrop"]
MODES = [("prumerge", "compact"), ("fastv", "compact"), ("sparsevlm", "original"), (STACK, "compact")]
READS_THE_QUESTION = [
    name for name in NAMES if REDUCERS[name].stage == "decoder" or name in ("adaptive", "aim", "cdpruner", "query")
]

every_reducer = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("name", KINDS)
every_mode = pytest.mark.parametrize(("reducer", "positions"), MODES, ids=str)

Model = AdaVTPForConditionalGeneration
Batch = dict[str, torch.Tensor]


def own_model(**fields: Any) -> Model:
    defaults = {"text_config": tiny_text_config(num_layers=NUM_LAYERS), "trained_reducers": WITH_WEIGHTS}
    return as_conversation(tiny_model(**(defaults | fields)))


@cache
def model_of(**fields: Any) -> Model:
    """A model whose configuration no test changes."""
    return own_model(**fields)


def generate(model: Model, batch: Batch, **options: Any) -> Any:
    return model.generate(**batch, **({"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS} | options))


def answers_of(model: Model, batch: Batch, **options: Any) -> list[list[int]]:
    return generate(model, batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def logits_along(model: Model, sample: Batch, answer: Sequence[int], **how: Any) -> torch.Tensor:
    """Logits `[len(answer), vocab_size]` that each token of an answer is chosen from, in one forward over all."""
    ids = torch.cat([sample["input_ids"], torch.tensor([list(answer)])], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -len(answer) :] = ids[:, -len(answer) :]
    output = model(ids, sample.get("pixel_values"), labels=labels, use_cache=False, **how)
    assert output.labels[output.labels != -100].tolist() == list(answer)
    return output.logits[0, -len(answer) - 1 : -1]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- batches


IMAGES, LENGTHS, BUDGETS = (1, 2, 0, 1), (7, 9, 6, 8), [0.6, 0.8, 0.5, 1.0]


@torch.no_grad()
@every_reducer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_batch_gives_what_its_samples_give_alone(name: str, dtype: torch.dtype) -> None:
    model = model_in(dtype)
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    if dtype == torch.bfloat16:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    outputs = [model(**padded, token_budget=BUDGETS, reducer=name) for padded in (batch, padded_on_the_right(batch))]
    choices = [output.selection.keep.split(IMAGES) for output in outputs]
    depths = [None if output.selection.depth is None else output.selection.depth.split(IMAGES) for output in outputs]
    for row, num_images in enumerate(IMAGES):
        own = model(**alone(batch, row, IMAGES), token_budget=[BUDGETS[row]], reducer=name)
        for output, choice, depth in zip(outputs, choices, depths, strict=True):
            logits, expected = output.logits[row, -own.logits.shape[1] :], own.logits[0]
            if dtype == torch.float32:
                close(logits, expected)
            else:
                assert logits.dtype == dtype
                spread = expected[-1].float().std()
                assert (logits[-1] - expected[-1]).float().abs().max() < 0.1 * spread
            if num_images:
                assert torch.equal(choice[row], own.selection.keep)
                assert depth is None or torch.equal(depth[row], own.selection.depth)


@cache
def model_in(dtype: torch.dtype) -> Model:
    return own_model().to(dtype)


# ------------------------------------------------------------------------------------------------------- budgets


@torch.no_grad()
@every_reducer
def test_exactly_as_many_tokens_are_kept_as_the_budget_says(name: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    numbers, least = random.Random(name), LEAST.get(name, 1)
    budgets = [numbers.uniform(least / NUM_PATCHES, 1.0) for _ in range(4)]
    budgets += [numbers.randint(max(2, least), NUM_PATCHES), least / NUM_PATCHES]
    for budget in budgets:
        num_keep = math.floor(budget * NUM_PATCHES) if isinstance(budget, float) else budget
        selection = model.select_tokens(**batch, token_budget=budget, reducer=name)
        if selection.depth is None:
            assert selection.num_keep.tolist() == [num_keep] * 3, budget
        else:
            sums = [int(images.sum()) for images in selection.depth.split((1, 2))]
            assert sums == [num_keep * NUM_LAYERS, 2 * num_keep * NUM_LAYERS], budget
            assert ((selection.depth > 0) == selection.keep).all()
    assert model(**batch, token_budget=least / NUM_PATCHES, reducer=name).logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(LEAST))
def test_what_is_below_the_smallest_budget_is_refused(name: str) -> None:
    model = model_of()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"budget"):
            call(**tiny_batch(model.config, (1,)), token_budget=LEAST[name] - 1, reducer=name)


@torch.no_grad()
@every_reducer
def test_the_whole_budget_is_the_model_without_reduction_to_the_bit(name: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2, 0))
    expected = reference_logits(model, batch)
    for budget in (NUM_PATCHES, [1.0, 1.0, 0.5]):
        output = model(**batch, token_budget=budget, reducer=name)
        assert torch.equal(output.logits, expected)
        assert output.selection.keep.all()
        assert output.selection.depth is None or (output.selection.depth == NUM_LAYERS).all()


def reference_logits(model: Model, batch: Batch) -> torch.Tensor:
    """What LLaVA says: the tower's features through the projector, in their places."""
    config = model.config
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    visual = model.model.multi_modal_projector(states[config.vision_feature_layer][:, 1:])
    is_image = (batch["input_ids"] == IMAGE_TOKEN_ID)[..., None]
    embeds = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(is_image, visual)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return model.lm_head(model.model.language_model(None, mask, positions, inputs_embeds=embeds).last_hidden_state)


# ----------------------------------------------------------------------------------------------------- own rules


# Tokens that each layer sees of 16, by hand from the published schedules for a decoder of four layers.
OWN_COUNTS = {
    "fastv": [16, 8, 8, 8],
    "vtw": [16, 16, 0, 0],
    "pyramiddrop": [16, 8, 4, 2],
    "depth": [16, 12, 8, 4],
    "aim_prune": [16, 16, 0, 0],
    "aim": [7, 7, 0, 0],
    "dart_layer": [16, 16, 16, 16],
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN_RULE)
def test_without_a_budget_the_own_rule_decides(name: str) -> None:
    # The configuration's budget is for reducers without one.
    model = model_of(token_budget=0.3)
    batch = tiny_batch(model.config, (1, 1, 0), (7, 9, 5))
    output = model(**batch, reducer=name)
    for row in (0, 1):
        own = model(**alone(batch, row, (1, 1, 0)), reducer=name)
        assert torch.equal(own.selection.keep[0], output.selection.keep[row])
        close(own.logits[0, -1], output.logits[row, -1])
        if name in OWN_COUNTS:
            depth = own.selection.depth
            assert [int((depth > layer).sum()) for layer in range(NUM_LAYERS)] == OWN_COUNTS[name]
        else:
            assert 0 < own.selection.num_keep < NUM_PATCHES or own.selection.depth is not None
    answer = answers_of(model, batch, reducer=name)
    sample = alone(batch, 1, (1, 1, 0))
    assert logits_along(model, sample, answer[1], reducer=name).argmax(dim=-1).tolist() == answer[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["adaptive", "tome", "divprune"])
def test_without_a_budget_and_a_rule_the_configuration_decides(name: str) -> None:
    model = model_of(token_budget=0.3)
    batch = tiny_batch(model.config, (1, 1))
    assert model.select_tokens(**batch, reducer=name).num_keep.tolist() == [4, 4]
    with pytest.raises(ValueError, match=f"`token_budget` is None for '{name}'"):
        model(**batch, reducer=name, token_budget={name: None})


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("name", "positions"),
    [(name, "original") for name in KINDS] + [(name, "compact") for name in ("prumerge", "fastv", "sparsevlm", "vtw")],
)
def test_every_token_is_chosen_from_what_one_forward_says(name: str, positions: str) -> None:
    model = model_of(visual_position_ids=positions)
    images, budgets = (1, 2, 0), [0.6, 0.7, 0.5]
    batch = tiny_batch(model.config, images, (7, 9, 6))
    outputs = generate(
        model, batch, token_budget=budgets, reducer=name, return_dict_in_generate=True, output_logits=True
    )
    for row in range(3):
        answer = outputs.sequences[row, -NUM_NEW_TOKENS:].tolist()
        logits = torch.stack([step[row] for step in outputs.logits])
        assert logits.argmax(dim=-1).tolist() == answer
        close(logits, logits_along(model, alone(batch, row, images), answer, token_budget=budgets[row], reducer=name))


@pytest.mark.parametrize("reducer", ["tome", "sparsevlm", ["downsample", "adaptive", "divprune", "vtw"]], ids=str)
@pytest.mark.parametrize(
    ("vision", "fields"),
    [
        ("clip", {"vision_feature_select_strategy": "full"}),
        ("siglip", {}),
        ("dinov2", {"budget_fusion": "post", "vision_feature_select_strategy": "full"}),
    ],
    ids=["clip with CLS", "siglip", "dinov2 with CLS"],
)
def test_cls_stays_in_every_layer_and_towers_without_it_work(
    vision: str, fields: dict[str, Any], reducer: Any
) -> None:
    model = model_of(vision=vision, **fields)
    images, how = (1, 2, 0), {"token_budget": 0.6, "reducer": reducer}
    batch = tiny_batch(model.config, images, (7, 9, 6))
    for row, answer in enumerate(answers_of(model, batch, **how)):
        logits = logits_along(model, alone(batch, row, images), answer, **how)
        assert logits.argmax(dim=-1).tolist() == answer
    output = model(**alone(batch, 0, images), **how, output_hidden_states=True)
    kept, depth = output.selection.keep, output.selection.depth
    seen = int((kept if depth is None else depth == NUM_LAYERS).sum())
    assert output.hidden_states[-1].shape[1] == 7 + seen + int(model.config.keep_cls)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "sparsevlm"])
def test_every_token_is_what_the_stock_layers_say_of_the_tokens_left(name: str) -> None:
    # SparseVLM changes hidden states at its cuts, which this reference does not.
    model = model_of()
    batch = tiny_batch(model.config, (2,), (7,))
    reader = LayeredReader(model)
    reader.show(batch["input_ids"][0].tolist(), batch["pixel_values"], token_budget=0.7, reducer=name)
    assert answers_of(model, batch, token_budget=0.7, reducer=name) == [reader.greedy(NUM_NEW_TOKENS)]


class Collector(BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.received += value.flatten().tolist()

    def end(self) -> None:
        pass


def repetitive_batch(model: Model) -> Batch:
    """A prompt whose end is there before its image too, so that prompt lookup has candidates from the first step."""
    batch = tiny_batch(model.config, (1,), (9,))
    batch["input_ids"] = torch.tensor([[1, 5, 6, 7, 8, 9] + [IMAGE_TOKEN_ID] * NUM_PATCHES + [20, 5, 6]])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def assistant_of(model: Model) -> LlamaForCausalLM:
    """A text-only model with the decoder's own weights, so that some of what it proposes is right."""
    assistant = LlamaForCausalLM(tiny_text_config("llama", NUM_LAYERS)).eval()
    assistant.model.load_state_dict(model.model.language_model.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@every_mode
def test_every_way_to_be_greedy_gives_the_greedy_answer(reducer: Any, positions: str) -> None:
    model = model_of(visual_position_ids=positions)
    batch, how = repetitive_batch(model), {"token_budget": 0.6, "reducer": reducer, "max_new_tokens": 12}
    expected = generate(model, batch, **how)
    answer = expected[0, -12:].tolist()
    assert logits_along(model, batch, answer, token_budget=0.6, reducer=reducer).argmax(dim=-1).tolist() == answer
    streamer = Collector()
    for options in (
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
        {"assistant_model": assistant_of(model)},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 1},
        {"streamer": streamer},
    ):
        assert torch.equal(generate(model, batch, **how, **options), expected), options
    assert streamer.received == expected[0].tolist()
    outputs = generate(model, batch, **how, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, expected)


@pytest.mark.parametrize("reducer", ["prumerge", STACK], ids=str)
def test_a_dictionary_output_says_what_was_kept(reducer: Any) -> None:
    model = model_of()
    batch, how = tiny_batch(model.config, (1, 2)), {"token_budget": 0.75, "reducer": reducer}
    first, lookup = alone(batch, 0, (1, 2)), {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    sampling = {"do_sample": True, "num_return_sequences": 2}
    for shown, mode in ((batch, {}), (batch, {"num_beams": 2}), (batch, sampling), (first, lookup)):
        output = generate(model, shown, **how, **mode, return_dict_in_generate=True)
        chosen = model.select_tokens(**shown, **how)
        assert torch.equal(output.selection.keep, chosen.keep)
        assert (output.selection.depth is None) == (chosen.depth is None)
        assert chosen.depth is None or torch.equal(output.selection.depth, chosen.depth)


def test_without_images_a_dictionary_output_has_no_selection() -> None:
    batch = tiny_batch(model_of().config, (0, 0))
    assert generate(model_of(), batch, return_dict_in_generate=True).selection is None


class Conversation:
    """Turns of two conversations side by side, with one cache."""

    def __init__(self, model: Model, whole: bool, static: bool, **how: Any) -> None:
        self.model, self.whole, self.how = model, whole, how
        text_config = model.config.get_text_config()
        self.cache = StaticCache(config=text_config, max_cache_len=128) if static else DynamicCache(config=text_config)
        self.ids, self.mask = torch.empty(2, 0, dtype=torch.long), torch.empty(2, 0, dtype=torch.long)
        self.num_unread = 0

    def turn(self, batch: Batch) -> list[list[int]]:
        """Takes a turn and returns the answers."""
        num_new = self.num_unread + batch["input_ids"].shape[1]
        self.ids = torch.cat([self.ids, batch["input_ids"]], dim=1)
        self.mask = torch.cat([self.mask, batch["attention_mask"]], dim=1)
        inputs = batch | {"input_ids": self.ids if self.whole else self.ids[:, -num_new:], "attention_mask": self.mask}
        answers = answers_of(self.model, inputs, past_key_values=self.cache, **self.how)
        self.ids = torch.cat([self.ids, torch.tensor(answers)], dim=1)
        self.mask = torch.cat([self.mask, torch.ones(2, NUM_NEW_TOKENS, dtype=torch.long)], dim=1)
        self.num_unread = 1
        return answers


@every_mode
def test_a_conversation_goes_on_from_its_cache(reducer: Any, positions: str) -> None:
    """
    The second turn, of text, equals one forward over the whole conversation whose question is that of the first turn.
    The third, with an image, equals it where the choice does not depend on what came before the image; otherwise the
    ways to hold the conversation have to agree.
    """
    model, how = model_of(visual_position_ids=positions), {"token_budget": 0.6, "reducer": reducer}
    turns = [
        tiny_batch(model.config, images, (5, 8), seed=seed) for seed, images in enumerate([(1, 1), (0, 0), (1, 1)])
    ]
    held = []
    for whole, static in ((True, False), (False, False), (True, True), (False, True)):
        conversation = Conversation(model, whole, static, **how)
        held.append([conversation.turn(turn) for turn in turns])
    assert held[1:] == held[:1] * 3
    for row in range(2):
        first, second, third = (alone(turn, row, (1, 1) if "pixel_values" in turn else (0, 0)) for turn in turns)
        answers = [turn[row] for turn in held[0]]
        second_part = [*answers[0], *second["input_ids"][0].tolist(), *answers[1]]
        said = logits_along(model, first, second_part, **how).argmax(dim=-1)[-NUM_NEW_TOKENS:]
        assert said.tolist() == answers[1]
        if reducer == "prumerge":
            ids = [*first["input_ids"][0].tolist(), *second_part, *third["input_ids"][0].tolist()]
            pixels = torch.cat([first["pixel_values"], third["pixel_values"]])
            sample = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
            assert logits_along(model, sample, answers[2], **how).argmax(dim=-1).tolist() == answers[2]


# ------------------------------------------------------------------------------------------------------ training


IN_TRAINING = [(name, "feature gates, gather") for name in NAMES] + [
    (name, gates) for name in (*TRAINED, "divprune", "fastv") for gates in ("attention gates", "feature gates, mask")
]


@pytest.mark.parametrize(("name", "gates"), IN_TRAINING)
def test_every_reducer_trains_with_labels_in_their_places(name: str, gates: str) -> None:
    model = own_model(reducer=name, **GATES[GATE_IDS.index(gates)]).train()
    batch = tiny_batch(model.config, (1, 2, 0))
    labels = targets(batch, 2)
    torch.manual_seed(0)
    output = model(**batch, labels=labels, token_budget=[0.6, 0.8, 0.5])
    assert output.logits.shape[:2] == output.labels.shape
    for row, label in zip(output.labels, batch["input_ids"][:, -2:], strict=True):
        assert row[row != -100].tolist() == label.tolist()
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten())
    added = output.selection.loss
    torch.testing.assert_close(output.loss, expected if added is None else expected + added)
    output.loss.backward()
    assert output.loss.isfinite()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    gradients = [parameter.grad for parameter in reducer_module(model, name).parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert bool(gradients) == (name in TRAINED)
    assert name not in TRAINED or sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def reducer_module(model: Model, name: str) -> torch.nn.Module:
    return model.model.controller if name == "adaptive" else model.model.reducers[name]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "selection_output"),
    [(name, "gather") for name in KINDS] + [(name, "mask") for name in ("adaptive", "prumerge", "fastv", "sparsevlm")],
)
def test_a_label_is_predicted_where_generation_would_choose_it(name: str, selection_output: str) -> None:
    model = model_of()
    images, budgets = (1, 2, 0), [0.6, 0.8, 0.5]
    batch = tiny_batch(model.config, images, (7, 9, 6))
    labels = targets(batch, 2)
    output = model(**batch, labels=labels, token_budget=budgets, reducer=name, selection_output=selection_output)
    losses = []
    for row in range(3):
        sample = alone(batch, row, images)
        prompt = sample | {"input_ids": sample["input_ids"][:, :-2]}
        answer = sample["input_ids"][0, -2:].tolist()
        first = generate(
            model,
            {key: value for key, value in prompt.items() if key != "attention_mask"},
            token_budget=budgets[row],
            reducer=name,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[0][0]
        own = logits_along(model, prompt, answer, token_budget=budgets[row], reducer=name)
        close(own[0], first)
        losses.append(torch.nn.functional.cross_entropy(own, torch.tensor(answer)))
    close(output.loss, torch.stack(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize("reducer", [*READS_THE_QUESTION, {"name": "fastv", "rows": "all"}], ids=str)
def test_the_answer_has_no_say_in_what_is_kept(reducer: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2), (12, 12))
    labels = targets(batch, 6)
    other = batch | {"input_ids": torch.where(labels != -100, 40, batch["input_ids"])}
    first, second = (
        model(**inputs, labels=labels, token_budget=0.6, reducer=reducer).selection for inputs in (batch, other)
    )
    assert torch.equal(first.keep, second.keep)
    assert first.depth is None or torch.equal(first.depth, second.depth)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_batch_of_text_runs_what_a_batch_with_images_runs(name: str) -> None:
    model = own_model(reducer=name, gradient_gates="features", selection_output="mask").train()
    batch = tiny_batch(model.config, (0, 0))
    model(**batch, labels=targets(batch), token_budget=0.6).loss.backward()
    gradients = [parameter.grad for parameter in reducer_module(model, name).parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


# ------------------------------------------------------------------------------------- choosing, saving, loading


@torch.no_grad()
@pytest.mark.parametrize("name", ["adaptive", "tome", "dynamicvit", "divprune", "aim", "fastv"])
def test_a_reducer_can_be_set_configured_or_asked_for_in_a_call(name: str) -> None:
    model, batch = own_model(), tiny_batch(model_of().config, (1, 1))
    before = model(**batch, token_budget=0.6).logits
    in_call = model(**batch, token_budget=0.6, reducer=name).logits
    answers = answers_of(model, batch, token_budget=0.6, reducer=name)
    assert model.config.reducers == ["adaptive"]
    assert torch.equal(model(**batch, token_budget=0.6).logits, before)
    model.set_reducer(name)
    assert model.config.reducers == [name]
    assert torch.equal(model(**batch, token_budget=0.6).logits, in_call)
    assert answers_of(model, batch, token_budget=0.6) == answers
    if name not in TRAINED:
        configured = own_model(reducer={"name": name})
        configured.load_state_dict(model.state_dict())
        assert torch.equal(configured(**batch, token_budget=0.6).logits, in_call)
    defaults = {key: value for key, value in reducer_parameters(name).items() if isinstance(value, str | bool | int)}
    model.set_reducer(name, **defaults)
    assert torch.equal(model(**batch, token_budget=0.6).logits, in_call)


@torch.no_grad()
def test_parameters_of_a_call_are_for_that_call() -> None:
    model = own_model(reducer={"name": "fastv", "layer": 2})
    batch = tiny_batch(model.config, (1, 1))
    before = model(**batch, token_budget=0.7)
    other = model(**batch, token_budget=0.7, reducer={"name": "fastv", "layer": 1})
    assert set(before.selection.depth.unique().tolist()) != set(other.selection.depth.unique().tolist())
    after = model(**batch, token_budget=0.7)
    assert torch.equal(after.logits, before.logits)
    assert model.config.reducers == [{"name": "fastv", "layer": 2}]
    generate(model, batch, token_budget=0.7, reducer={"name": "fastv", "rows": "all"})
    assert model.config.reducers == [{"name": "fastv", "layer": 2}]


def test_parameters_of_a_call_leave_an_optimizer_its_weights() -> None:
    model = own_model(reducer="resampler").train()
    weights = dict(model.named_parameters())
    frozen = weights["model.reducers.resampler.queries.weight"].requires_grad_(False)
    batch = tiny_batch(model.config, (1, 1))
    model(**batch, token_budget=0.6, reducer={"name": "resampler", "num_heads": 2})
    model(**batch, labels=targets(batch), token_budget=0.6).loss.backward()
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert frozen.grad is None
    assert weights["model.reducers.resampler.output_norm.weight"].grad.abs().sum() > 0


SAVED = {
    "a name": "fastv",
    "a composite with a parameter": {"name": "aim", "share": 0.5},
    "a stack": ["token_fusion", {"name": "resampler", "num_heads": 2}, "adaptive", {"name": "vtw", "layer": 1}],
}


@torch.no_grad()
@pytest.mark.parametrize("reducers", SAVED)
def test_saving_and_loading_keeps_reducers_parameters_and_weights(reducers: str, tmp_path: Path) -> None:
    model = own_model()
    model.set_reducer(SAVED[reducers])
    for parameter in model.model.reducers.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = tiny_batch(model.config, (1, 1))
    expected = model(**batch, token_budget=0.6).logits
    beside_the_stack = model(**batch, token_budget=0.6, reducer="dynamicvit").logits
    model.save_pretrained(tmp_path)
    loaded, report = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.reducers == model.config.reducers
    assert torch.equal(loaded(**batch, token_budget=0.6).logits, expected)
    assert torch.equal(loaded(**batch, token_budget=0.6, reducer="dynamicvit").logits, beside_the_stack)
    other = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, reducer="fastv")
    assert other.config.reducers == ["fastv"]
    assert torch.equal(
        other(**batch, token_budget=0.6).logits, model(**batch, token_budget=0.6, reducer="fastv").logits
    )
    assert torch.equal(other(**batch, token_budget=0.6, reducer=SAVED[reducers]).logits, expected)


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = own_model(reducer={"name": "token_fusion", "order": "official"}, trained_reducers=["resampler"])
    model.save_pretrained(folder / "new")
    # Loading writes down the dtype.
    AdaVTPForConditionalGeneration.from_pretrained(folder / "new").save_pretrained(folder / "loaded")
    return folder / "loaded"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def test_asking_for_any_reducer_changes_nothing_that_is_saved(saved_folder: Path, tmp_path: Path) -> None:
    model = AdaVTPForConditionalGeneration.from_pretrained(saved_folder)
    batch = tiny_batch(model.config, (1, 1))
    answers = answers_of(model, batch, token_budget=0.6)
    modules, state = dict(model.named_modules()), torch.get_rng_state()
    asked = [*NAMES, {"name": "resampler", "num_heads": 2}, {"name": "token_fusion", "order": "spatial"}]
    for reducer in asked:
        if reducer == "dynamicvit":
            for ask in (model.generate, model, model.select_tokens):
                with pytest.raises(ValueError, match=r"model\.set_reducer\('dynamicvit'\)"):
                    ask(**batch, token_budget=0.6, reducer=reducer)
            continue
        generate(model, batch, token_budget=0.6, reducer=reducer, max_new_tokens=1)
        model(**batch, token_budget=0.6, reducer=reducer)
        model.select_tokens(**batch, token_budget=0.6, reducer=reducer)
    with pytest.raises(ValueError, match="made for the parameters"):
        model(**batch, token_budget=0.6, reducer={"name": "resampler", "num_layers": 3})
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(model.named_modules()) == modules
    assert answers_of(model, batch, token_budget=0.6) == answers
    model.save_pretrained(tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(saved_folder)


@torch.no_grad()
def test_calls_in_several_threads_have_their_own_parameters() -> None:
    model, batch = model_of(), tiny_batch(model_of().config, (1, 1))
    asked = [{"name": "fastv", "layer": 1}, {"name": "fastv", "layer": 3}, {"name": "resampler", "num_heads": 2}]
    expected = [model(**batch, token_budget=0.8, reducer=reducer).logits for reducer in asked]

    def answer(number: int) -> bool:
        which = number % len(asked)
        with torch.no_grad():
            return torch.equal(model(**batch, token_budget=0.8, reducer=asked[which]).logits, expected[which])

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(answer, range(24)))
