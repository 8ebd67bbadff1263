"""What the decoder's loop promises when columns leave between layers: what the stock layers make of hand-cut prompts.

The reference, `LayeredReader`, runs the stock layers over one prompt at a time, without padding and without a cache,
and gives each layer only the columns that it sees. Which these are is worked out here, in plain Python.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, CompileConfig, DynamicCache, StaticCache, StoppingCriteria

from adavtp import AdaVTPForConditionalGeneration, register_reducer
from adavtp.modeling.decoder.reducer import DecoderReducer
from adavtp.modeling.decoder.view import DecoderView
from adavtp.modeling.reducers.base import REDUCERS
from layered_reader import LayeredReader, as_conversation
from tiny_models import (
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    TEXT_CONFIGS,
    alone,
    embedded,
    padded_on_the_right,
    prepared_inputs,
    targets,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_LAYERS, NUM_NEW_TOKENS = 4, 5
# Images of each prompt, and mean numbers of tokens for them: rows of different lengths in every layer.
IMAGES, LENGTHS, BUDGETS = (1, 2, 0), (6, 9, 5), [6, 10, 4]

Model = AdaVTPForConditionalGeneration
Batch = dict[str, torch.Tensor]


def known_score(number: int, cut: int) -> int:
    """The score of a prompt's visual token of that number: no two of the first 37 alike, another order at each cut."""
    return (number * (11 + 4 * cut) + 5) % 37


def known_counts(num_visual: int, num_keep: int) -> list[int]:
    """How many visual tokens four layers see: some leave at layer 1, at layer 2 without new scores, and at layer 3."""
    left = num_keep * NUM_LAYERS - num_visual
    first = min(num_visual, -(-left // 2))
    second = min(first, -(-2 * (left - first) // 3))
    return [num_visual, first, second, left - first - second]


def known_depth(num_visual: int, num_keep: int) -> list[int]:
    """How many layers see each visual token."""
    depth, seen = [1] * num_visual, list(range(num_visual))
    if num_keep >= num_visual:
        return [NUM_LAYERS] * num_visual
    for layer, cut in ((1, 0), (2, 0), (3, 1)):
        count = known_counts(num_visual, num_keep)[layer]
        seen = sorted(sorted(seen, key=lambda number: -known_score(number, cut))[:count])
        for number in seen:
            depth[number] = layer + 1
    return depth


class KnownChoice(DecoderReducer):
    """Keeps tokens by numbers that a test knows beforehand."""

    asked: ClassVar[list[torch.Tensor]] = []

    def cuts(self, num_layers: int) -> list[int]:
        return [1, 3]

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        return known_counts(num_visual, num_keep)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        if cut == 0:
            view.carried["number"] = view.is_visual.long().cumsum(dim=-1) - 1
        self.asked.append(view.inputs_embeds[torch.arange(len(view.last)), view.last])
        return (view.carried["number"] * (11 + 4 * cut) + 5) % 37


@pytest.fixture(autouse=True)
def known_choice() -> Iterator[None]:
    """Registers the reducer of these tests, and takes it back."""
    before = dict(REDUCERS)
    register_reducer("known_choice")(KnownChoice)
    KnownChoice.asked.clear()
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


def own_model(text: str = "llama", positions: str = "original", attention: str = "sdpa", **text_fields: Any) -> Model:
    """A model for one test, whose decoder drops what the test knows."""
    model = tiny_model(
        text=text,
        text_config=tiny_text_config(text, NUM_LAYERS, **text_fields),
        visual_position_ids=positions,
        attn_implementation=attention,
        reducer="known_choice",
    )
    return as_conversation(model)


SLIDING = "sliding_attention"


@cache
def model_of(text: str = "llama", positions: str = "original", attention: str = "sdpa", **text_fields: Any) -> Model:
    """A model that no test changes."""
    return own_model(text, positions, attention, **text_fields)


def generate(model: Model, batch: Batch, **options: Any) -> Any:
    return model.generate(**batch, **({"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS} | options))


def show(reader: LayeredReader, sample: Batch, num_keep: int) -> None:
    """Lets a reader read a prompt, its layers what the test says."""
    num_images = len(sample.get("pixel_values", ()))
    depth = torch.tensor(known_depth(num_images * NUM_PATCHES, num_images * num_keep)).view(num_images, NUM_PATCHES)
    reader.show(sample["input_ids"][0].tolist(), sample.get("pixel_values"), depth, token_budget=num_keep)


def readers(model: Model, batch: Batch, images: tuple[int, ...] = IMAGES, budgets: Any = None) -> list[LayeredReader]:
    """A reader for each sample that has read its prompt."""
    result = []
    for row, num_keep in enumerate(budgets or BUDGETS):
        result.append(LayeredReader(model))
        show(result[-1], alone(batch, row, images), num_keep)
    return result


# ----------------------------------------------------------------------------------------- prefill and decoding steps


def test_the_known_choice_drops_different_tokens_at_every_layer() -> None:
    # Otherwise no comparison in this file would say much.
    for num_visual, num_keep in ((16, 6), (32, 20), (16, 10)):
        depth = known_depth(num_visual, num_keep)
        assert sum(depth) == num_keep * NUM_LAYERS
        assert set(depth) == {1, 2, 3, 4}


def require_what_the_reader_says(model: Model, batch: Batch) -> None:
    """Prefill logits of every column, and the logits of every token of a greedy answer."""
    with torch.no_grad():
        prefill = model(**batch, token_budget=BUDGETS).logits
    outputs = generate(model, batch, token_budget=BUDGETS, return_dict_in_generate=True, output_logits=True)
    answers = outputs.sequences[:, batch["input_ids"].shape[1] :].tolist()
    for row, reader in enumerate(readers(model, batch)):
        expected = reader.all_logits()
        torch.testing.assert_close(prefill[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert answers[row] == reader.greedy(NUM_NEW_TOKENS)
        logits = torch.stack([step[row] for step in outputs.logits])
        torch.testing.assert_close(logits, reader.logits_along(answers[row]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_prefill_and_every_step_are_the_stock_layers_on_their_own_columns(
    text: str, attention: str, positions: str
) -> None:
    model = model_of(text, positions, attention)
    require_what_the_reader_says(model, tiny_batch(model.config, IMAGES, LENGTHS))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", SLIDING] * 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, "full_attention"] * 2}),
    ],
)
def test_a_sliding_window_counts_the_columns_that_a_layer_sees(
    text: str, fields: dict[str, Any], attention: str
) -> None:
    model = own_model(text, "original", attention, **fields)
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    require_what_the_reader_says(model, batch)
    unlimited = own_model(text, "original", attention)
    unlimited.load_state_dict(model.state_dict())
    last = (own(**batch, token_budget=BUDGETS).logits[:, -1] for own in (model, unlimited))
    assert (next(last) - next(last)).abs().max() > 1e-2, "the window is never reached"


@torch.no_grad()
def test_every_layer_sees_and_caches_what_was_chosen() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 6))
    output = model(**batch, token_budget=[6, 10])
    assert output.selection.depth.tolist() == [known_depth(NUM_PATCHES, 6), known_depth(NUM_PATCHES, 10)]
    assert output.selection.keep.all(), "no patch is dropped before the decoder"
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(NUM_LAYERS)]
    assert lengths == [6 + count for count in known_counts(NUM_PATCHES, 10)]


@torch.no_grad()
def test_the_side_of_the_padding_does_not_matter() -> None:
    model = model_of()
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    left = model(**batch, token_budget=BUDGETS)
    right = model(**padded_on_the_right(batch), token_budget=BUDGETS)
    torch.testing.assert_close(left.logits[:, -5:], right.logits[:, -5:], atol=1e-4, rtol=1e-4)
    assert torch.equal(left.selection.depth, right.selection.depth)


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_the_loop_in_which_nothing_leaves_is_the_stock_model_s(text: str) -> None:
    model = model_of(text)
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    # What drops in one row sends the others through the loop as well.
    in_loop = model(**batch, token_budget=[16, 10, 16])
    stock = model(**batch, token_budget=1.0)
    torch.testing.assert_close(in_loop.logits[0, -5:], stock.logits[0, -5:], atol=1e-5, rtol=1e-5)
    assert (in_loop.logits[1, -1] - stock.logits[1, -1]).abs().max() > 1e-2
    assert (stock.selection.depth == NUM_LAYERS).all()


# ------------------------------------------------------------------------------------------------ caches afterwards


class Conversation:
    """Turns of `generate` with one cache, and of the readers beside it."""

    def __init__(self, model: Model, batch_size: int, whole: bool, static: bool = False) -> None:
        self.model, self.whole = model, whole
        text_config = model.config.get_text_config()
        self.cache = StaticCache(config=text_config, max_cache_len=128) if static else DynamicCache(config=text_config)
        self.ids = torch.empty(batch_size, 0, dtype=torch.long)
        self.mask = torch.empty(batch_size, 0, dtype=torch.long)
        self.readers = [LayeredReader(model) for _ in range(batch_size)]
        # The last token of an answer is in no cache yet; it is read with the next turn.
        self.num_unread = 0

    def turn(
        self, images: tuple[int, ...], lengths: tuple[int, ...], budgets: list[int], echo: bool = False, **options: Any
    ) -> None:
        """Takes a turn, which may end as it begins, and requires the readers' answers of `generate`."""
        batch = tiny_batch(self.model.config, images, lengths, seed=len(self.ids[0]))
        if echo:
            batch["input_ids"][:, -2:] = torch.tensor([5, 6])
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (3, 0), value=7)
            batch["input_ids"][:, :2] = torch.tensor([5, 6])
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
        for row, reader in enumerate(self.readers):
            show(reader, alone(batch, row, images), budgets[row])
        expected = [reader.greedy(NUM_NEW_TOKENS) for reader in self.readers]
        self.ids = torch.cat([self.ids, batch["input_ids"]], dim=1)
        self.mask = torch.cat([self.mask, batch["attention_mask"]], dim=1)
        num_new = self.num_unread + batch["input_ids"].shape[1]
        inputs = batch | {"input_ids": self.ids if self.whole else self.ids[:, -num_new:], "attention_mask": self.mask}
        sequences = generate(self.model, inputs, token_budget=budgets, past_key_values=self.cache, **options)
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        assert answers.tolist() == expected
        for reader, answer in zip(self.readers, expected, strict=True):
            reader.read(answer)
        self.ids = torch.cat([self.ids, answers], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(answers)], dim=1)
        self.num_unread = 1


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole conversation", "new tokens only"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_later_turns_go_on_from_what_each_layer_holds(positions: str, whole: bool, static: bool) -> None:
    conversation = Conversation(model_of("llama", positions), 2, whole, static)
    conversation.turn((1, 1), (6, 9), [6, 10])
    conversation.turn((0, 0), (5, 3), [6, 6])
    conversation.turn((1, 0), (4, 6), [7, 7])
    conversation.turn((1, 1), (4, 4), [16, 5])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_prompt_lookup_takes_its_candidates_back_from_every_layer(text: str, positions: str) -> None:
    model = own_model(text, positions, **({"sliding_window": 12} if text == "mistral" else {}))
    widths: list[int] = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    conversation = Conversation(model, 1, True)
    for budget in (6, 8):
        widths.clear()
        num_new = conversation.num_unread + 3 + 7 + NUM_PATCHES
        conversation.turn((1,), (7,), [budget], echo=True, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
        # The reader ran the layer first, once for every token.
        assert widths[NUM_NEW_TOKENS] == num_new + 3, "there were no candidates"


@pytest.mark.parametrize("num_images", [0, 1], ids=["text", "another image"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_padding_behind_an_answer_that_ended_early_stays_hidden(positions: str, num_images: int) -> None:
    model = model_of("llama", positions)
    images, budgets = (num_images,) * 2, [7, 9]
    batch = tiny_batch(model.config, (1, 1), (6, 9))
    outputs = generate(model, batch, token_budget=[6, 10], return_dict_in_generate=True)
    later = tiny_batch(model.config, images, (4, 6), seed=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NUM_NEW_TOKENS).long(), later["attention_mask"]], dim=1)
    num_answered = 2
    mask[0, batch["input_ids"].shape[1] + num_answered :][: NUM_NEW_TOKENS - num_answered] = 0
    inputs = later | {
        "input_ids": torch.cat([outputs.sequences, later["input_ids"]], dim=1),
        "attention_mask": mask,
        "past_key_values": outputs.past_key_values,
    }
    answers = generate(model, inputs, token_budget=budgets)[:, inputs["input_ids"].shape[1] :].tolist()
    for row, reader in enumerate(readers(model, batch, (1, 1), [6, 10])):
        answer = outputs.sequences[row, -NUM_NEW_TOKENS:].tolist()
        reader.read(answer[: num_answered if row == 0 else NUM_NEW_TOKENS])
        show(reader, alone(later, row, images), budgets[row])
        assert answers[row] == reader.greedy(NUM_NEW_TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_cache_of_a_forward_can_be_continued_by_hand(positions: str) -> None:
    model = model_of("llama", positions)
    batch = alone(tiny_batch(model.config, (1,), (6,)), 0, (1,))
    output = model(**batch, token_budget=6)
    (reader,) = readers(model, batch, (1,), [6])
    answer = []
    for _ in range(3):
        answer.append(int(output.logits[0, -1].argmax()))
        output = model(input_ids=torch.tensor([answer[-1:]]), past_key_values=output.past_key_values)
        torch.testing.assert_close(output.logits[0, -1], reader.all_logits(answer)[-1], atol=1e-4, rtol=1e-4)


def test_the_configuration_says_whether_there_is_a_cache() -> None:
    model = own_model()
    batch = tiny_batch(model.config, (1,), (6,))
    for token_budget in (6, 1.0):
        assert model(**batch, token_budget=token_budget).past_key_values is not None
        assert model(**batch, token_budget=token_budget, use_cache=False).past_key_values is None
        # As of stock LLaVA: hidden states, cache, image features; and the selection.
        assert len(model(**batch, token_budget=token_budget, return_dict=False)) == 4
    model.config.text_config.use_cache = False
    assert model(**batch, token_budget=6).past_key_values is None


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_are_the_stock_layers_beams(num_beams: int) -> None:
    model = model_of()
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    sequences = generate(model, batch, token_budget=BUDGETS, num_beams=num_beams)
    answers = sequences[:, batch["input_ids"].shape[1] :].tolist()
    assert answers == [reader.beams(num_beams, NUM_NEW_TOKENS)[0] for reader in readers(model, batch)]


def test_a_cache_repeated_for_beams_continues_with_beam_search() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (6, 9))
    outputs = generate(model, batch, token_budget=[6, 10], return_dict_in_generate=True)
    outputs.past_key_values.batch_repeat_interleave(3)
    question = torch.tensor([[9, 8, 7], [5, 6, 7]])
    ids = torch.cat([outputs.sequences, question], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NUM_NEW_TOKENS + 3).long()], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": outputs.past_key_values}
    answers = generate(model, inputs, num_beams=3)[:, ids.shape[1] :].tolist()
    for row, reader in enumerate(readers(model, batch, (1, 1), [6, 10])):
        reader.read([*outputs.sequences[row, -NUM_NEW_TOKENS:].tolist(), *question[row].tolist()])
        assert answers[row] == reader.beams(3, NUM_NEW_TOKENS)[0]


def test_a_cache_that_was_reset_starts_anew() -> None:
    model = model_of()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    first = generate(model, batch, token_budget=BUDGETS, past_key_values=cache)
    cache.reset()
    text = tiny_batch(model.config, (0, 0, 0), (9, 5, 7))
    assert torch.equal(generate(model, text, past_key_values=cache), generate(model, text))
    cache.reset()
    assert torch.equal(generate(model, batch, token_budget=BUDGETS, past_key_values=cache), first)


# ------------------------------------------------------------------------------------------------- what a step costs


class Operations(TorchDispatchMode, StoppingCriteria):
    """Counts the tensor operations of every step of a generation, and how many of them wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps[-1][function.name()] += 1
        return function(*args, **(kwargs or {}))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps.append(Counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def last_step(model: Model, batch: Batch, budget: float | int) -> tuple[int, int]:
    """Operations of the last decoding step, and waits."""
    with Operations() as operations:
        generate(model, batch, token_budget=budget, stopping_criteria=[operations])
    step = operations.steps[NUM_NEW_TOKENS - 1]
    return step.total(), step["aten::_local_scalar_dense"]


def test_a_step_behind_different_columns_runs_no_more_than_the_stock_forward() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1,), (6,))
    assert last_step(model, batch, 6) == last_step(model, batch, 1.0)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_step_of_a_padded_batch_waits_for_the_device_no_oftener_than_the_stock_forward(positions: str) -> None:
    model = model_of("llama", positions)
    batch = tiny_batch(model.config, (1, 1), (6, 9))
    operations, waits = last_step(model, batch, 6)
    stock_operations, stock_waits = last_step(model, batch, 1.0)
    assert waits == stock_waits
    assert operations < 1.1 * stock_operations


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("images", [(1,), (1, 1)], ids=["alone", "padded"])
def test_decoding_in_a_static_cache_compiles_in_one_piece(images: tuple[int, ...], positions: str) -> None:
    model = own_model("llama", positions)
    batch = tiny_batch(model.config, images, LENGTHS[: len(images)])
    compilation = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compilation._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": compilation}
    torch._dynamo.reset()
    counters.clear()
    answers = generate(model, batch, token_budget=6, **compiled)
    num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs <= 2
    assert torch.equal(answers, generate(model, batch, token_budget=6))
    assert torch.equal(answers, generate(model, batch, token_budget=6, **compiled))
    assert counters["stats"]["unique_graphs"] == num_graphs, "the same call compiled again"


# -------------------------------------------------------------------------------------------------- who asks, outputs


def embeds_of_askers(model: Model, batch: Batch, **options: Any) -> list[torch.Tensor]:
    """What entered layer 0 in the columns that asked at each cut, `[batch, hidden_size]` each."""
    KnownChoice.asked.clear()
    with torch.no_grad():
        model(**batch, token_budget=6, **options)
    return list(KnownChoice.asked)


def test_the_last_token_before_the_answer_asks() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1), (9, 12))
    embeds = model.get_input_embeddings()
    for asked in embeds_of_askers(model, batch):
        assert torch.equal(asked, embeds(batch["input_ids"][:, -1]))
    for asked in embeds_of_askers(model, batch, labels=targets(batch, 3)):
        assert torch.equal(asked, embeds(batch["input_ids"][:, -4]))


def test_where_a_prompt_ends_with_an_image_the_last_token_that_is_left_asks() -> None:
    model = model_of()
    images = [IMAGE_TOKEN_ID] * NUM_PATCHES
    ids = torch.tensor([[0, 0, 0, 1, 5, *images], [1, 5, 6, 7, 8, *images]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": torch.randn(2, 3, 32, 32)}
    depth = known_depth(NUM_PATCHES, 6)
    last_left = max(number for number in range(NUM_PATCHES) if depth[number] >= 3)
    assert depth[-1] < 3
    inputs_embeds = embedded(model, prepared_inputs(model, **batch, token_budget=6))
    first, second = embeds_of_askers(model, batch)
    torch.testing.assert_close(first, inputs_embeds[:, -1])
    torch.testing.assert_close(second, inputs_embeds[:, last_left - NUM_PATCHES])


@torch.no_grad()
def test_hidden_states_and_attentions_have_each_layer_s_length() -> None:
    model = model_of(attention="eager")
    batch = tiny_batch(model.config, (1,), (6,))
    output = model(**batch, token_budget=6, output_hidden_states=True, output_attentions=True)
    lengths = [6 + count for count in known_counts(NUM_PATCHES, 6)]
    assert [weights.shape[-2:] for weights in output.attentions] == [(length, length) for length in lengths]
    assert [states.shape[1] for states in output.hidden_states] == [lengths[0], *lengths]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["granite", "phi", "olmo2", "stablelm", "glm", "gemma2"])
def test_a_decoder_that_the_loop_would_run_wrongly_is_refused_by_name(kind: str) -> None:
    fields = tiny_text_config("llama", NUM_LAYERS).to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*sizes, "num_key_value_heads", "head_dim")
    text_config = AutoConfig.for_model(kind, **{name: fields[name] for name in names}, pad_token_id=0)
    model = tiny_model(text_config=text_config, reducer="known_choice")
    batch = tiny_batch(model.config, (1,), (6,))
    assert model(**batch, token_budget=1.0).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"'known_choice' acts inside .* llama, mistral, .* and .* '{kind}'"):
        model(**batch, token_budget=6)


def test_a_mask_of_four_dimensions_is_refused() -> None:
    model = model_of()
    sample = alone(tiny_batch(model.config, (1,), (6,)), 0, (1,))
    length = sample["input_ids"].shape[1]
    mask, positions = torch.ones(length, length).tril().bool()[None, None], torch.arange(length)[None]
    with pytest.raises(ValueError, match=r"'known_choice'.*attention_mask.*\[batch, sequence\]"):
        model(sample["input_ids"], sample["pixel_values"], mask, positions, token_budget=6)


# ---------------------------------------------------------------------------------------------------------- training


def hand_loss(model: Model, sample: Batch, num_keep: int, num_targets: int) -> torch.Tensor:
    """The mean cross entropy of the last tokens of a prompt, each at the column before it that layer 3 sees."""
    reader = LayeredReader(model)
    show(reader, sample, num_keep)
    logits = reader.all_logits()[-num_targets - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, sample["input_ids"][0, -num_targets:])


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_targets", [3, 4], ids=["answer behind text", "answer behind the image"])
def test_labels_stand_where_the_layers_left_their_columns(
    selection_output: str, training: bool, num_targets: int
) -> None:
    model = own_model().train(training)
    # BOS, a word, the image, and four words.
    batch = tiny_batch(model.config, (1, 1), (6, 6))
    labels = targets(batch, num_targets)
    output = model(**batch, labels=labels, token_budget=[6, 10], selection_output=selection_output)
    expected = [hand_loss(model, alone(batch, row, (1, 1)), (6, 10)[row], num_targets) for row in range(2)]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)
    assert output.labels.shape == output.logits.shape[:2]
    assert (output.labels != -100).sum(dim=-1).tolist() == [num_targets] * 2


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_a_label_behind_an_image_of_which_little_is_left_is_not_lost(selection_output: str) -> None:
    model = own_model()
    batch = tiny_batch(model.config, (1,), (6,))
    output = model(
        **batch,
        labels=targets(batch, 4),
        token_budget=[5],
        reducer=["grid", "known_choice"],
        selection_output=selection_output,
    )
    assert (output.labels != -100).sum() == 4


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_labels_follow_their_columns_from_the_side_of_the_padding(selection_output: str) -> None:
    model = own_model()
    batch = tiny_batch(model.config, IMAGES, LENGTHS)
    batch["labels"] = targets(batch, 2)
    how = {"token_budget": BUDGETS, "selection_output": selection_output}
    left, right = model(**batch, **how), model(**padded_on_the_right(batch), **how)
    torch.testing.assert_close(left.loss, right.loss, atol=1e-4, rtol=1e-4)
    assert (right.labels != -100).sum() == 6


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model = own_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = tiny_batch(model.config, IMAGES, LENGTHS)
        output = model(**batch, labels=targets(batch, 2), token_budget=BUDGETS)
        assert (output.past_key_values is None) == checkpointing
        output.loss.backward()
        results.append([output.loss.detach(), model.model.multi_modal_projector.linear_1.weight.grad])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
