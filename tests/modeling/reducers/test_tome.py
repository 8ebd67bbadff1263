"""What ToMe promises: the official matching, means and attention, and exactly K tokens at the end."""

import math

import pytest
import torch
from torch import nn

from adavtp.modeling.reducers.tome import Matching, ToMeReducer, absorbed, bipartite_matching, tokens_after_layers
from adavtp.modeling.vision.encode import TowerPass
from tiny_models import NUM_PATCHES, tiny_config
from tiny_towers import counts, tiny_images, tiny_pass

MEANS = ["weighted", "average", "importance"]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def official_matching(keys: torch.Tensor, num_merged: int, has_cls: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """
    ToMe's matching in one image, on the whole sequence: token 0 is CLS if there is one.

    Returns:
        The pairs (source, target), best first, and who stands where behind the matching.
    """
    in_a, in_b = range(0, len(keys), 2), range(1, len(keys), 2)
    found = []
    for one in in_a:
        best = max(in_b, key=lambda other, one=one: (cosine(keys[one], keys[other]), -other))
        similarity = -math.inf if has_cls and one == 0 else cosine(keys[one], keys[best])
        found.append((-similarity, one, best))
    found.sort()
    unmerged = [one for _, one, _ in found[num_merged:]]
    pairs = [(one, best) for _, one, best in found[:num_merged]]
    return pairs, (sorted(unmerged) if has_cls else unmerged) + list(in_b)


def official_run(
    tower: TowerPass, pixel_values: torch.Tensor, token_counts: list[int], merge: str, proportional: bool
) -> list[tuple[torch.Tensor, list[int]]]:
    """
    ToMe in plain Python on a CLIP or SigLIP tower without a budget token.

    Returns:
        For every image the sequence, and for every token of it the positions in the sequence that went into it.
    """
    has_cls = tower.config.has_cls
    results = []
    for image in pixel_values:
        tokens = tower.embed(image[None])[0]
        sources = [[index] for index in range(len(tokens))]
        for layer, count in zip(tower.layers, token_counts, strict=True):
            attention = layer.self_attn
            normed = layer.layer_norm1(tokens)
            heads = [
                projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            sizes = torch.tensor([len(source) for source in sources]).float()
            logits = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[-1])
            cls_attention = logits.softmax(dim=-1)[:, 0].mean(dim=0)
            logits = logits + sizes.log() if proportional else logits
            read = (logits.softmax(dim=-1) @ heads[2]).transpose(0, 1).flatten(1)
            tokens = tokens + attention.out_proj(read)

            if merge == "average":
                weights = torch.ones(len(tokens))
            elif merge == "importance":
                weights = sizes * (cls_attention if has_cls else tokens.norm(dim=-1))
            else:
                weights = sizes
            num_merged = len(tokens) - int(has_cls) - count
            pairs, order = official_matching(heads[1].mean(dim=0), num_merged, has_cls)
            merged, merged_sources = [], []
            for place in order:
                parts = [place] + [one for one, target in pairs if target == place]
                total = sum(float(weights[part]) for part in parts)
                merged.append(sum(float(weights[part]) / total * tokens[part] for part in parts))
                merged_sources.append([source for part in parts for source in sources[part]])
            tokens, sources = torch.stack(merged), merged_sources
            tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
        results.append((tokens, sources))
    return results


# The matching


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("num_tokens", [2, 3, 8, 13])
def test_the_matching_is_that_of_plain_loops(num_tokens: int, has_cls: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    keys = torch.randn(3, num_tokens, 4, generator=generator)
    for num_merged in range(1, num_tokens // 2 + 1):
        matching = bipartite_matching(keys, num_merged, has_cls)
        for image in range(3):
            sequence = torch.cat([torch.ones(1, 4), keys[image]]) if has_cls else keys[image]
            pairs, order = official_matching(sequence, num_merged, has_cls)
            shift = int(has_cls)
            ours = list(zip(matching.source[image].tolist(), matching.target[image].tolist(), strict=True))
            assert ours == [(one - shift, target - shift) for one, target in pairs]
            assert matching.stay[image].tolist() == [place - shift for place in order if place >= shift]


@pytest.mark.parametrize(
    ("has_cls", "sources", "target", "stay"),
    [(True, [1, 3], 0, [5, 0, 2, 4]), (False, [0, 2], 1, [4, 1, 3, 5])],
)
def test_among_equal_tokens_the_earlier_ones_merge_into_the_earliest(
    has_cls: bool, sources: list[int], target: int, stay: list[int]
) -> None:
    matching = bipartite_matching(torch.ones(1, 6, 4), 2, has_cls)
    assert matching.source.tolist() == [sources]
    assert matching.target.tolist() == [[target, target]]
    assert matching.stay.tolist() == [stay]


def test_with_nothing_to_merge_nothing_moves() -> None:
    for has_cls in (True, False):
        for num_tokens in (1, 5):
            matching = bipartite_matching(torch.randn(2, num_tokens, 4), 0, has_cls)
            assert matching.source.shape == matching.target.shape == (2, 0)
            assert matching.stay.tolist() == [list(range(num_tokens))] * 2


# The mean


def test_a_token_becomes_the_weighted_mean_with_all_that_it_takes_in() -> None:
    features = torch.tensor([[[1.0, 0.0], [4.0, 8.0], [0.3, 0.7], [10.0, 2.0]]])
    weights = torch.tensor([[2.0, 1.0, 3.0, 5.0]])
    matching = Matching(torch.tensor([[1, 3]]), torch.tensor([[0, 0]]), torch.tensor([[0, 2]]))
    merged = absorbed(features, weights, torch.tensor([[1.0, 5.0]]), matching)
    torch.testing.assert_close(merged[0, 0], torch.tensor([(2 + 4 + 50) / 8, (8 + 10) / 8]))
    assert torch.equal(merged[0, 2], features[0, 2])


def test_a_token_that_takes_nothing_in_stays_bit_for_bit() -> None:
    features = torch.randn(1, 5, 33) * 10
    matching = Matching(torch.tensor([[4]]), torch.tensor([[3]]), torch.tensor([[0, 1, 2, 3]]))
    merged = absorbed(features, torch.tensor([[3.0, 7.0, 11.0, 1.0, 1.0]]), torch.ones(1, 1), matching)
    assert torch.equal(merged[:, :3], features[:, :3])
    assert not torch.equal(merged[:, 3], features[:, 3])


# The schedule


@pytest.mark.parametrize(
    ("num_keep", "each", "more"),
    [(345, 10, 1), (288, 12, 12), (192, 16, 16), (144, 18, 18), (128, 19, 11), (64, 22, 6), (32, 23, 15)],
)
def test_llava_merges_the_same_number_in_each_of_23_layers(num_keep: int, each: int, more: int) -> None:
    after = [576, *tokens_after_layers(576, num_keep, 23)]
    merged = [before - behind for before, behind in zip(after, after[1:], strict=False)]
    assert merged == [each + 1] * more + [each] * (23 - more)


def test_every_budget_ends_with_exactly_k_and_no_layer_merges_more_than_half() -> None:
    for num_patches, num_layers in ((576, 23), (16, 2), (256, 12), (17, 3), (9, 6)):
        for num_keep in range(math.ceil(num_patches / 2**num_layers), num_patches + 1):
            after = [num_patches, *tokens_after_layers(num_patches, num_keep, num_layers)]
            assert after[-1] == num_keep
            assert all(0 <= one - next_ <= one // 2 for one, next_ in zip(after, after[1:], strict=False))


def test_what_the_last_layers_cannot_merge_goes_to_the_layers_before_them() -> None:
    assert tokens_after_layers(16, 2, 4) == [12, 8, 4, 2]
    assert tokens_after_layers(16, 1, 4) == [8, 4, 2, 1]
    assert tokens_after_layers(20, 2, 4) == [15, 8, 4, 2]


def test_a_budget_that_merging_cannot_reach_is_refused_with_the_smallest_that_it_can() -> None:
    with pytest.raises(ValueError, match="`token_budget` asks for 3 of 16.*the smallest budget is 4 tokens"):
        tokens_after_layers(16, 3, 2)
    with pytest.raises(ValueError, match="the smallest budget is 4 tokens"):
        ToMeReducer(tiny_config())(tiny_pass(), tiny_images(), counts(1))
    deeper = tiny_pass(vision_feature_layer=-1)
    assert ToMeReducer(deeper.config)(deeper, tiny_images(), counts(2)).positions.shape == (2, 2)


# In the tower


@torch.no_grad()
@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("merge", MEANS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_run_is_that_of_plain_loops(vision: str, merge: str, proportional: bool, order: str) -> None:
    tower = tiny_pass(vision, vision_feature_layer=-1)
    reducer = ToMeReducer(tower.config, merge=merge, proportional_attention=proportional, order=order).eval()
    for num_keep, token_counts in ((9, [13, 11, 9]), (2, [8, 4, 2])):
        encoded = reducer(tower, tiny_images(), counts(num_keep))
        expected = official_run(tower, tiny_images(), token_counts, merge, proportional)
        selection = reducer.selection(encoded, tower.patches(encoded.sequence), NUM_PATCHES)
        shift = int(tower.config.has_cls)
        for image, (tokens, sources) in enumerate(expected):
            torch.testing.assert_close(encoded.sequence[image], tokens, atol=2e-5, rtol=1e-5)
            places = [min(source) - shift for source in sources[shift:]]
            assert encoded.positions[image].tolist() == places
            ranked = sorted(range(num_keep), key=places.__getitem__) if order == "spatial" else range(num_keep)
            expected_tokens = torch.stack([tokens[shift + index] for index in ranked])
            torch.testing.assert_close(selection.features[image], expected_tokens, atol=2e-5, rtol=1e-5)
            assert selection.positions[image].tolist() == sorted(places)


def test_gradients_go_through_a_merge_to_all_patches() -> None:
    tower = tiny_pass(vision_feature_layer=-1)
    pixel_values = tiny_images().requires_grad_()
    encoded = ToMeReducer(tower.config).train()(tower, pixel_values, counts(4))
    tower.patches(encoded.sequence).square().sum().backward()
    patches = nn.functional.unfold(pixel_values.grad, kernel_size=8, stride=8)
    assert (patches.abs().sum(dim=1) > 0).all()
