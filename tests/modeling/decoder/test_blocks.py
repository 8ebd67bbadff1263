"""Gemma 3 in our loop: images see all of themselves, windows bound what they see, and layers turn differently."""

from typing import Any

import pytest
import torch

from adavtp.modeling.decoder.view import AttentionRows
from pruned_by_hand import language_inputs, visual_tokens
from tiny_families import Prompt, Writer, batch_of, budgeted, stock_model

NAME = "gemma3"
NUM_LAYERS = 4


@torch.no_grad()
def hidden_by_hand(prompt: Prompt, answer: list[int], leaves_before: torch.Tensor) -> torch.Tensor:
    """
    Last hidden states of the stock layers, one after another, when columns leave before some of them: `leaves_before`
    `[columns]`, the layer before which each leaves. Masks are those of the stock class, cut.
    """
    stock = stock_model(NAME)
    given = language_inputs(stock, batch_of(NAME, [prompt + answer]))
    text, hidden = stock.get_decoder(), given["inputs_embeds"]
    positions = torch.arange(hidden.shape[1])[None]
    leaves_before = torch.cat([leaves_before, torch.full((len(answer),), NUM_LAYERS)])
    left = torch.arange(hidden.shape[1])
    for number, layer in enumerate(text.layers):
        stays = leaves_before[left] > number
        hidden, left = hidden[:, stays], left[stays]
        kind = text.config.layer_types[number]
        hidden = layer(
            hidden,
            attention_mask=given["attention_mask"][kind][:, :, left][..., left],
            position_embeddings=text.rotary_emb(hidden, positions[:, left], kind),
            position_ids=positions[:, left],
        )
    return text.norm(hidden)[0]


@pytest.mark.parametrize(
    "reducer",
    [
        {"name": "fastv", "layer": 1},
        {"name": "fastv", "layer": 2},
        {"name": "pyramiddrop", "layers": [1, 2, 3]},
        {"name": "vtw", "layer": 3},
        {"name": "head_threshold", "layer": 2},
    ],
    ids=str,
)
def test_what_leaves_between_layers_leaves_the_stock_layers_answer(reducer: dict[str, Any]) -> None:
    prompt = Writer(NAME).prompt(images=((1, 1), (1, 1)))
    model, batch = budgeted(NAME), batch_of(NAME, [prompt])
    call = {"token_budget": 0.75, "reducer": reducer}
    depth = model(**batch, **call).selection.depth
    assert int(depth.sum()) <= 0.75 * NUM_LAYERS * depth.numel() and int(depth.min()) < NUM_LAYERS
    leaves_before = torch.full((len(prompt.ids),), NUM_LAYERS)
    leaves_before[visual_tokens(NAME, prompt)] = depth.flatten()
    answer: list[int] = []
    for _ in range(4):
        logits = stock_model(NAME).lm_head(hidden_by_hand(prompt, answer, leaves_before)[-1])
        answer.append(int(logits.index_fill(0, torch.tensor([101, 102]), -torch.inf).argmax()))
    arguments = {**call, "max_new_tokens": 4, "do_sample": False}
    assert model.generate(**batch, **arguments)[0, -4:].tolist() == answer
    assert model.generate(**batch, **arguments, cache_implementation="static")[0, -4:].tolist() == answer
    expected = stock_model(NAME).lm_head(hidden_by_hand(prompt, [], leaves_before)[-1])
    torch.testing.assert_close(model(**batch, **call).logits[0, -1], expected)


def test_a_row_of_a_block_sees_all_of_it_and_no_other_row_does() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 1, 6, 4, generator=generator) for _ in range(2))
    block, real = torch.tensor([[-1, 0, 0, -1, 1, 1]]), torch.ones(1, 6, dtype=torch.bool)
    rows = torch.arange(6)[None]
    logits = AttentionRows(queries, keys, rows, real, 1.0, None, block).logits()[0, 0]
    seen = [(~row.isneginf()).nonzero()[:, 0].tolist() for row in logits]
    assert seen == [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
