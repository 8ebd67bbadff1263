"""Every reducer on every family: what it leaves is what the stock class reads by hand, or it says why it cannot."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from adavtp.evaluation.family_table import family_table, support
from adavtp.modeling.reducers.base import REDUCERS
from pruned_by_hand import HandPruned, visual_tokens
from tiny_families import (
    FAMILIES,
    IN_DECODER,
    TILED,
    VIDEO_FAMILIES,
    Prompt,
    Writer,
    batch_of,
    budgeted,
    ragged_prompts,
    stock_model,
    with_budget,
)

NUM_NEW_TOKENS = 2
# Where the default cannot act, or changes hidden states inside the decoder, which cannot be done by hand.
OTHERWISE = {
    "apet_layer": {"merge": False},
    "prumerge": {"attention": "per_head"},
    "prumerge+": {"attention": "per_head"},
    "sparsevlm": {"version": "v2"},
}


@cache
def listed() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in family_table()}


def row_of(name: str) -> dict[str, Any]:
    """What `adavtp families` says of a family."""
    return listed()[stock_model(name).config.model_type]


def require_equal_to_what_is_done_by_hand(name: str, model: PreTrainedModel, prompt: Prompt, reducer: Any) -> None:
    batch = batch_of(name, [prompt])
    outputs = model.generate(
        **batch,
        token_budget=0.75,
        reducer=reducer,
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    selection = outputs.selection
    keep = selection.keep[selection.is_token]
    assert int(keep.sum()) < len(keep) or int(selection.depth[selection.is_token].min()) < 4
    merged = None if selection.features is None else selection.features[selection.positions >= 0]
    depth = None if selection.depth is None else selection.depth[selection.is_token][keep]
    by_hand = HandPruned(name, prompt, keep, merged, depth=depth)
    answer = outputs.sequences[0, -NUM_NEW_TOKENS:].tolist()
    torch.testing.assert_close(torch.cat(outputs.logits), by_hand.logits_along(answer).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reducer", sorted(REDUCERS))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_reducer_acts_as_by_hand_or_says_why_it_cannot(name: str, reducer: str) -> None:
    model, prompt, reason = budgeted(name), Writer(name).prompt(images=((2, 2),)), row_of(name)["refused"].get(reducer)
    if reason is not None:
        assert model.why_not(reducer) == reason
        for call in (model.forward, model.generate):
            with pytest.raises(ValueError) as refusal:
                call(**batch_of(name, [prompt]), token_budget=0.75, reducer=reducer)
            assert str(refusal.value) == reason
    if reducer in OTHERWISE:
        reducer = {"name": reducer, **OTHERWISE[reducer]}
        if model.why_not(reducer) is not None:
            return
    elif reason is not None or reducer == "native":
        # Dials have tests of their own: what they do to so small a picture is nothing.
        return
    elif REDUCERS[reducer].trained and reducer != "adaptive":
        model = with_budget(name, trained_reducers=[reducer]).eval()
    require_equal_to_what_is_done_by_hand(name, model, prompt, reducer)


def looked_at_least(name: str, prompt: Prompt, row_of_attention: torch.Tensor, count: int) -> set[int]:
    """The `count` columns of visual tokens that the column that asks looks at least, by its attention `[heads, n]`."""
    columns = visual_tokens(name, prompt)
    weights = row_of_attention.mean(dim=0)[columns]
    return set(columns[weights.argsort(descending=True)[len(columns) - count :]].tolist())


@pytest.mark.parametrize("name", IN_DECODER)
def test_inside_the_decoder_the_attention_that_ranks_is_the_stock_class_s(name: str) -> None:
    prompt = Writer(name).prompt(images=((2, 3),))
    batch, columns = batch_of(name, [prompt]), visual_tokens(name, prompt)
    eager = deepcopy(stock_model(name))
    eager.set_attn_implementation("eager")
    attentions = eager(**batch, output_attentions=True).attentions
    pyramid = {"name": "pyramiddrop", "layers": [2], "ratios": [0.5]}
    for reducer, layer in (({"name": "fastv", "layer": 2}, 1), (pyramid, 2)):
        selection = budgeted(name)(**batch, token_budget=0.75, reducer=reducer).selection
        dropped = set(columns[selection.depth[selection.is_token] < 4].tolist())
        assert dropped == looked_at_least(name, prompt, attentions[layer][0, :, -1], len(dropped)), reducer


@pytest.mark.parametrize("reducer", ["sparsevlm", "apet_layer"])
@pytest.mark.parametrize("name", IN_DECODER)
def test_what_is_merged_in_the_decoder_does_not_depend_on_the_batch(name: str, reducer: str) -> None:
    prompts = ragged_prompts(name)
    outputs = {
        number: budgeted(name)(**batch_of(name, own), token_budget=0.75, reducer=reducer).logits[:, -1]
        for number, own in enumerate([prompts, *([prompt] for prompt in prompts)])
    }
    torch.testing.assert_close(outputs.pop(0), torch.cat(list(outputs.values())), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_units_and_stages_are_those_that_are_listed(name: str) -> None:
    row, model = row_of(name), budgeted(name)
    assert support(model) == {key: row[key] for key in ("units", "stages", "refused")}
    # Two by two tiles, and one view of the whole.
    selection = model.select_tokens(**batch_of(name, [Writer(name).prompt(images=((2, 2),))]), token_budget=1.0)
    assert len(selection.sizes) == {"image": 1, "view": 5, "tile": 5}[row["units"][0]]
    assert bool({"video", "frame"} & set(row["units"])) == (name in (*VIDEO_FAMILIES, *TILED))
    assert ("decoder" in row["stages"]) == (name in IN_DECODER)
