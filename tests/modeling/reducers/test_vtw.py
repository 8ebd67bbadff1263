"""VTW's promises: all visual tokens up to a layer and none from there on, and a layer found by calibration."""

import math
from functools import cache

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.reducers.vtw import VTWReducer, choose_withdrawal_layer
from tiny_decoder_views import deep_config, view_of
from tiny_models import alone, padded_on_the_right, tiny_batch, tiny_model, tiny_text_config


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


@cache
def model_and_batch() -> tuple[AdaVTPForConditionalGeneration, dict[str, torch.Tensor]]:
    model = tiny_model(text_config=tiny_text_config(num_layers=4), reducer="random", token_budget=0.5)
    return model, tiny_batch(model.config, [1, 1])


@cache
@torch.no_grad()
def divergences() -> dict[int, float]:
    """The mean of KL(withdrawn || full) over two prompts, of each layer."""
    model, batch = model_and_batch()
    full = model(**batch, reducer="vtw", token_budget=1.0).logits[:, -1].double().softmax(dim=-1)
    means = {}
    for layer in (1, 2, 3):
        withdrawal = {"name": "vtw", "layer": layer}
        withdrawn = model(**batch, reducer=withdrawal, token_budget=None).logits[:, -1].double().softmax(dim=-1)
        pairs = zip(withdrawn.flatten().tolist(), full.flatten().tolist(), strict=True)
        means[layer] = sum(p * math.log(p / q) for p, q in pairs) / 2
    return means


def test_the_first_layer_below_the_threshold_is_chosen() -> None:
    model, batch = model_and_batch()
    means = divergences()
    assert min(means.values()) > 1e-3
    prompts = [alone(batch, row, (1, 1)) for row in range(2)]
    for mean in means.values():
        expected = next(layer for layer in means if means[layer] <= mean * 1.001)
        assert choose_withdrawal_layer(model, [batch], mean * 1.001) == expected
        assert choose_withdrawal_layer(model, iter(prompts), mean * 1.001) == expected
    assert model.config.reducers == ["random"]


def test_candidates_may_be_said_and_are_tried_in_evaluation() -> None:
    model, batch = model_and_batch()
    modes = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    # 5 of 32 layers is 1 of 4.
    assert choose_withdrawal_layer(model.train(), [batch], math.inf) == 1
    assert choose_withdrawal_layer(model, [batch], math.inf, layers=[2, 3]) == 2
    handle.remove()
    # The whole prompt once, and once for the candidate that is chosen.
    assert modes == [False] * 4 and model.training
    model.eval()


def test_calibration_says_why_it_cannot_choose() -> None:
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match=r"`threshold` is 0.0, and no layer's mean divergence is as low: 1: \d.*, 2"):
        choose_withdrawal_layer(model, [batch], 0.0, layers=[1, 2])
    with pytest.raises(ValueError, match="`batches` is empty"):
        choose_withdrawal_layer(model, [])
    with pytest.raises(ValueError, match="padded on the right"):
        choose_withdrawal_layer(model, [padded_on_the_right(batch)])
