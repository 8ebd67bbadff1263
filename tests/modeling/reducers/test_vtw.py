"""VTW's promises: all visual tokens up to a layer and none from there on, and a layer found by calibration."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adavtp.modeling.reducers.vtw import VTWReducer, choose_withdrawal_layer
from tiny_decoder_views import deep_config, view_of
from tiny_models import tiny_batch, tiny_model, tiny_text_config


def order_of_leaving(num_visual: int, is_visual: torch.Tensor | None = None) -> list[list[int]]:
    """For K = 0, 1, ..., n the numbers of the visual tokens that stay."""
    is_visual = torch.ones(1, num_visual, dtype=torch.bool) if is_visual is None else is_visual
    view = view_of(torch.zeros(1, is_visual.shape[1], 2), is_visual)
    reducer = VTWReducer(deep_config(2))
    scores = reducer.scores(view, 0)
    kept = []
    for num_keep in range(num_visual + 1):
        stays, _ = reducer.reduce(view, scores, torch.tensor([num_keep]))
        kept.append(stays[is_visual].nonzero()[:, 0].tolist())
    return kept


def test_the_own_rule_withdraws_all_before_layer_15_of_32() -> None:
    assert VTWReducer(deep_config(32)).layer_counts(576, None, 32) == [576] * 15 + [0] * 17
    assert VTWReducer(deep_config(32), layer=20).layer_counts(576, None, 32) == [576] * 20 + [0] * 12
    assert VTWReducer(deep_config(2)).layer_counts(16, None, 2) == [16, 0]


def test_a_budget_is_spent_on_whole_layers_and_the_rest_on_one_more() -> None:
    reducer = VTWReducer(deep_config(4))
    assert reducer.layer_counts(16, 4, 4) == [16, 0, 0, 0]
    assert reducer.layer_counts(16, 5, 4) == [16, 4, 0, 0]
    assert reducer.layer_counts(16, 11, 4) == [16, 16, 12, 0]
    assert reducer.layer_counts(16, 16, 4) == [16] * 4
    assert reducer.layer_counts(0, 0, 4) == [0] * 4
    # Published: to keep a mean of 144, 64 and 32 of 576 tokens they leave before layers 8, 4 (3.6) and 2 (1.8).
    for num_keep, whole in ((144, 8), (64, 3), (32, 1)):
        counts = VTWReducer(deep_config(32)).layer_counts(576, num_keep, 32)
        assert counts.count(576) == whole
        assert sum(counts) == 32 * num_keep


def test_layer_0_sees_every_token() -> None:
    with pytest.raises(ValueError, match="a mean of 3 of 16 visual tokens .* cannot go below 4.00"):
        VTWReducer(deep_config(4)).layer_counts(16, 3, 4)


def test_what_stays_one_layer_longer_is_spread_evenly() -> None:
    kept = order_of_leaving(16)
    assert kept[1] == [0]
    assert kept[2] == [0, 8]
    assert kept[4] == [0, 4, 8, 12]
    assert kept[8] == list(range(0, 16, 2))
    assert kept[16] == list(range(16))
    for num_visual in (9, 24, 100):
        for num_keep, places in enumerate(order_of_leaving(num_visual)[2:], start=2):
            assert len(places) == num_keep
            gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
            # A gap is halved where a token more stays, so that none is more than twice another.
            assert max(gaps) <= 2 * min(gaps)


def test_words_between_images_do_not_count() -> None:
    is_visual = torch.tensor([[c == "#" for c in "..###.#####..."]])
    assert order_of_leaving(8, is_visual)[2] == [0, 4]


# Calibration


class Withdrawable(nn.Module):
    """A model of seven layers that says what distribution withdrawal leaves; the fuller, the later."""

    def __init__(self, full: list[list[float]], withdrawn: dict[int, list[list[float]]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=7))
        self.full, self.withdrawn = full, withdrawn
        self.asked: list[int | None] = []

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        reducer: dict[str, Any] | None = None,
        token_budget: float | None = None,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        assert not self.training
        assert logits_to_keep == 1
        assert (token_budget == 1.0) == (reducer is None)
        layer = None if reducer is None else reducer["layer"]
        assert reducer in (None, {"name": "vtw", "layer": layer})
        self.asked.append(layer)
        distributions = self.full if layer is None else self.withdrawn[layer]
        chosen = [distributions[int(prompt)] for prompt in input_ids[:, -1]]
        # Logits may be shifted by any constant.
        return SimpleNamespace(logits=torch.tensor(chosen).log()[:, None] + 3.0)


FULL = [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]
WITHDRAWN = {
    1: [[0.1, 0.1, 0.8], [0.2, 0.2, 0.6]],
    2: [[0.1, 0.3, 0.6], [0.3, 0.3, 0.4]],
    3: [[0.5, 0.2, 0.3], [0.2, 0.3, 0.5]],
    4: [[0.5, 0.25, 0.25], [0.21, 0.2, 0.59]],
    5: FULL,
    6: FULL,
}
PROMPTS = [{"input_ids": torch.tensor([[7, 0]])}, {"input_ids": torch.tensor([[9, 1], [7, 0]])}]


def divergence(layer: int) -> float:
    """The mean of KL(withdrawn || full) over the three prompts 0, 1 and 0."""
    total = 0.0
    for prompt in (0, 1, 0):
        for p, q in zip(WITHDRAWN[layer][prompt], FULL[prompt], strict=True):
            total += p * math.log(p / q)
    return total / 3


def test_the_first_layer_below_the_threshold_is_chosen() -> None:
    assert divergence(3) > divergence(4) > 0.0
    for layer in (2, 3, 4):
        model = Withdrawable(FULL, WITHDRAWN)
        assert choose_withdrawal_layer(model, PROMPTS, divergence(layer) + 1e-6) == layer
        assert choose_withdrawal_layer(model, PROMPTS, divergence(layer) - 1e-6) > layer
    # 5 of 32 layers is 1 of 7.
    assert choose_withdrawal_layer(Withdrawable(FULL, WITHDRAWN), PROMPTS, 10.0) == 1


def test_each_prompt_is_run_once_in_full() -> None:
    model = Withdrawable(FULL, WITHDRAWN).train()
    assert choose_withdrawal_layer(model, iter(PROMPTS), 1e-6) == 5
    assert model.asked == [None, None, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert model.training


def test_candidates_may_be_said() -> None:
    assert choose_withdrawal_layer(Withdrawable(FULL, WITHDRAWN), PROMPTS, layers=[2, 6]) == 6


def test_calibration_says_why_it_cannot_choose() -> None:
    model = Withdrawable(FULL, WITHDRAWN)
    with pytest.raises(
        ValueError, match=r"`threshold` is 0.003, and no layer's mean divergence is as low: 1: 0\.\d+, 2"
    ):
        choose_withdrawal_layer(model, PROMPTS, layers=[1, 2])
    with pytest.raises(ValueError, match="`batches` is empty"):
        choose_withdrawal_layer(model, [])
    with pytest.raises(ValueError, match="padded on the right"):
        choose_withdrawal_layer(model, [PROMPTS[1] | {"attention_mask": torch.tensor([[1, 1], [1, 0]])}])


@torch.no_grad()
def test_a_model_is_calibrated_through_its_own_forward() -> None:
    model = tiny_model(text_config=tiny_text_config(num_layers=4), reducer="random", token_budget=0.5)
    batch = tiny_batch(model.config, [1, 1])
    full = model(**batch, reducer="vtw", token_budget=1.0).logits[:, -1].double().softmax(dim=-1)
    means = {}
    for layer in (1, 2, 3):
        withdrawal = {"name": "vtw", "layer": layer}
        withdrawn = model(**batch, reducer=withdrawal, token_budget=None).logits[:, -1].double().softmax(dim=-1)
        pairs = zip(withdrawn.flatten().tolist(), full.flatten().tolist(), strict=True)
        means[layer] = sum(p * math.log(p / q) for p, q in pairs) / 2
    assert min(means.values()) > 1e-3
    assert model.config.reducers == ["random"]
    for mean in means.values():
        expected = next(candidate for candidate in means if means[candidate] <= mean * 1.001)
        assert choose_withdrawal_layer(model, [batch], mean * 1.001) == expected
