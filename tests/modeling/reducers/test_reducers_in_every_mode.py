"""Every reducer in every way of generating: modes that only change how the greedy answer is found do not change it."""

from typing import Any

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.reducers.base import REDUCERS
from tiny_models import alone, tiny_batch, tiny_model, tiny_text_config

SETTINGS = {"token_budget": 0.75, "max_new_tokens": 5, "do_sample": False}
SAME_ANSWER = {
    "static cache": {"cache_implementation": "static"},
    "no cache asked for": {"use_cache": False},
    "one beam": {"num_beams": 1},
    "no penalty": {"repetition_penalty": 1.0},
}


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    return tiny_model(text_config=tiny_text_config(num_layers=4))


@pytest.mark.parametrize("reducer", sorted(REDUCERS))
def test_modes_that_search_for_the_greedy_answer_find_it(model: AdaVTPForConditionalGeneration, reducer: str) -> None:
    batch = tiny_batch(model.config, [1, 2])
    settings = SETTINGS | {"reducer": reducer}
    greedy = model.generate(**batch, **settings)
    for name, mode in SAME_ANSWER.items():
        assert torch.equal(model.generate(**batch, **settings, **mode), greedy), name
    output = model.generate(**batch, **settings, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, greedy)
    first = alone(batch, 0, [1, 2])
    looked_up = model.generate(**first, **settings, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, model.generate(**first, **settings))


@pytest.mark.parametrize("reducer", sorted(REDUCERS))
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_dictionary_output_says_what_was_kept(
    model: AdaVTPForConditionalGeneration, reducer: str, mode: dict[str, Any]
) -> None:
    batch = tiny_batch(model.config, [1, 2])
    settings = SETTINGS | {"reducer": reducer}
    output = model.generate(**batch, **settings | mode, return_dict_in_generate=True)
    chosen = model.select_tokens(**batch, token_budget=settings["token_budget"], reducer=reducer)
    assert torch.equal(output.selection.keep, chosen.keep)
    assert (output.selection.depth is None) == (chosen.depth is None)
    if chosen.depth is not None:
        assert torch.equal(output.selection.depth, chosen.depth)


@pytest.mark.parametrize("reducer", ["grid", "fastv"])
def test_a_dictionary_output_of_assisted_decoding_says_what_was_kept(
    model: AdaVTPForConditionalGeneration, reducer: str
) -> None:
    first = alone(tiny_batch(model.config, [1, 2]), 0, [1, 2])
    settings = SETTINGS | {"reducer": reducer, "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    output = model.generate(**first, **settings, return_dict_in_generate=True)
    chosen = model.select_tokens(**first, token_budget=settings["token_budget"], reducer=reducer)
    assert torch.equal(output.selection.keep, chosen.keep)
    assert chosen.depth is None or torch.equal(output.selection.depth, chosen.depth)


def test_without_images_a_dictionary_output_has_no_selection(model: AdaVTPForConditionalGeneration) -> None:
    batch = tiny_batch(model.config, [0, 0])
    output = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
    assert output.selection is None


@pytest.mark.parametrize("reducer", sorted(REDUCERS))
def test_modes_that_return_several_answers_return_them(model: AdaVTPForConditionalGeneration, reducer: str) -> None:
    batch = tiny_batch(model.config, [1, 2])
    settings = SETTINGS | {"reducer": reducer, "num_return_sequences": 2}
    beams = model.generate(**batch, **settings, num_beams=2, return_dict_in_generate=True, output_scores=True)
    assert beams.sequences.shape[0] == 4
    scores = beams.sequences_scores.view(2, 2)
    assert scores.isfinite().all()
    assert (scores[:, 0] >= scores[:, 1]).all()
    torch.manual_seed(0)
    drawn = model.generate(**batch, **settings | {"do_sample": True})
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch, **settings | {"do_sample": True}), drawn)
