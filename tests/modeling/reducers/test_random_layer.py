"""What random dropping inside the decoder promises: a draw that repeats itself, favours nobody and sees nothing."""

import torch

from adavtp.modeling.reducers.random_layer import RandomLayerReducer, scattered
from tiny_decoder_views import deep_config, tiny_view
from tiny_models import alone, tiny_batch, tiny_model, tiny_text_config


def chance(**parameters: float) -> RandomLayerReducer:
    return RandomLayerReducer(deep_config(32), **parameters).eval()


def test_a_draw_depends_on_the_token_s_number_and_the_seed_alone() -> None:
    one, _ = tiny_view(prompts=("...######....", "..#####..."), seed=0)
    other, _ = tiny_view(prompts=("....######", "#.####."), seed=1, side="right")
    scores, others = chance().scores(one, 0), chance().scores(other, 0)
    for row in range(2):
        assert torch.equal(scores[row][one.is_visual[row]], others[row][other.is_visual[row]])
    assert not torch.equal(chance(seed=1).scores(one, 0), scores)


def test_every_token_is_drawn_equally_often() -> None:
    seeds = torch.arange(4000) * 1_000_003
    scores = scattered(seeds[:, None] + torch.arange(1, 17))
    assert scores.min() >= 0 and scores.max() < 2**24
    share = (scores.argsort(dim=-1).argsort(dim=-1) < 4).float().mean(dim=0)
    # A share of 4000 draws with probability 1/4 has a standard deviation of 0.0068.
    assert (share - 0.25).abs().max() < 0.03
    # Nor does what happens to one token tell of the next.
    assert torch.corrcoef(scores.T).fill_diagonal_(0).abs().max() < 0.08


def test_training_draws_anew() -> None:
    view, _ = tiny_view()
    assert not torch.equal(chance().train().scores(view, 0), chance().train().scores(view, 0))


@torch.no_grad()
def test_in_the_model_a_prompt_loses_the_same_tokens_in_any_batch() -> None:
    model = tiny_model(text_config=tiny_text_config(num_layers=4), reducer="random_layer")
    batch = tiny_batch(model.config, [1, 2], lengths=[5, 9])
    depth = model(**batch, token_budget=[0.75, 0.9]).selection.depth
    # 12 of 16 tokens in the mean over four layers, and 14 of each of two images.
    assert [int(depth[0].sum()), int(depth[1:].sum())] == [4 * 12, 4 * 28]
    own = model(**alone(batch, 0, [1, 2]), token_budget=0.75).selection.depth
    assert torch.equal(own[0], depth[0])


def test_the_cut_lies_before_layer_20_of_32() -> None:
    assert chance().cuts(32) == [20]
    assert chance().layer_counts(576, 360, 32) == [576] * 20 + [0] * 12
    assert chance(ratio=0.75).layer_counts(576, None, 32) == [576] * 20 + [144] * 12
