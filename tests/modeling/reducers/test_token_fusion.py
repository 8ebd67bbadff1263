"""What token fusion promises: everything between pruning and ToMe, with a gate that learns where to stand."""

import math

import pytest
import torch

from adavtp.modeling.reducers.token_fusion import TokenFusionReducer
from adavtp.modeling.reducers.tome import Matching, MatchingReducer, ToMeReducer
from tiny_models import NUM_PATCHES, tiny_config
from tiny_towers import TOWERS, counts, tiny_images, tiny_pass, whole_run


class Pruning(MatchingReducer):
    """Tokens that ToMe would merge are dropped."""

    def take_in(self, tower, layer, entering, patches, sizes, matching):  # noqa: ANN001, ANN201
        return patches, sizes


def with_gates(reducer: TokenFusionReducer, logit: float) -> TokenFusionReducer:
    """Sets all gates to sigmoid(`logit`), but for the schedule's 3."""
    for gate in reducer.gates:
        torch.nn.init.constant_(gate.bias, logit)
    return reducer


def with_random_gates(reducer: TokenFusionReducer) -> TokenFusionReducer:
    generator = torch.Generator().manual_seed(0)
    for parameter in reducer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return reducer


def share_by_hand(reducer: TokenFusionReducer, layer: int, token: torch.Tensor, first_logit: float) -> float:
    mean, variance = token.mean(), token.var(unbiased=False)
    normed = (token - mean) / (variance + 1e-5).sqrt()
    gate = reducer.gates[layer]
    logit = float((gate.weight[0] * normed).sum() + gate.bias[0]) + first_logit
    return 1 / (1 + math.exp(-logit))


# The share


def test_at_first_the_lower_half_of_the_layers_prunes_and_the_upper_half_merges() -> None:
    tokens = torch.randn(2, 5, 32)
    for feature_layer, expected in ((-2, [0.0474, 0.9526]), (-1, [0.0474, 0.9526, 0.9526])):
        reducer = TokenFusionReducer(tiny_config(vision_feature_layer=feature_layer))
        assert len(reducer.gates) == len(expected)
        for layer, share in enumerate(expected):
            torch.testing.assert_close(reducer.shares(layer, tokens), torch.full((2, 5), share), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("norm_preserving", [True, False])
def test_a_token_and_what_is_given_to_it_become_their_weighted_mean(norm_preserving: bool) -> None:
    reducer = with_random_gates(TokenFusionReducer(tiny_config(), norm_preserving=norm_preserving))
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(1, 6, 32, generator=generator) * torch.tensor([1.0, 5.0, 2.0, 1.0, 0.5, 3.0])[:, None]
    sizes = torch.tensor([[1.0, 2.0, 3.5, 1.0, 4.0, 1.0]])
    pairs = [(1, 0), (3, 0), (5, 4)]
    matching = Matching(torch.tensor([[1, 3, 5]]), torch.tensor([[0, 0, 4]]), torch.tensor([[0, 2, 4]]))
    for layer, first_logit in ((0, -3.0), (1, 3.0)):
        fused, fused_sizes = reducer.take_in(None, layer, None, patches, sizes, matching)
        for target in (0, 2, 4):
            own = patches[0, target]
            parts, total, norm = own * sizes[0, target], float(sizes[0, target]), float(own.norm())
            for source in (one for one, other in pairs if other == target):
                share = share_by_hand(reducer, layer, patches[0, source], first_logit)
                parts = parts + share * sizes[0, source] * patches[0, source]
                total += share * float(sizes[0, source])
                reached = float(own.norm()) + share * max(0.0, float(patches[0, source].norm() - own.norm()))
                norm = max(norm, reached)
            mean = parts / total
            expected = mean / mean.norm() * norm if norm_preserving else mean
            torch.testing.assert_close(fused[0, target], expected, atol=1e-5, rtol=1e-5)
            assert float(fused_sizes[0, target]) == pytest.approx(total, rel=1e-5)
        assert torch.equal(fused[0, 2], patches[0, 2])


# The two ends


@torch.no_grad()
@pytest.mark.parametrize("vision", TOWERS)
def test_giving_everything_is_tome(vision: str) -> None:
    tower = tiny_pass(vision, vision_feature_layer=-1, budget=True)
    reducer = with_gates(TokenFusionReducer(tower.config, norm_preserving=False), 1e4)
    for num_keep in (2, 7, 13):
        ours = reducer(tower, tiny_images(), counts(num_keep))
        expected = ToMeReducer(tower.config)(tower, tiny_images(), counts(num_keep))
        assert torch.equal(ours.sequence, expected.sequence)
        assert torch.equal(ours.positions, expected.positions)


@torch.no_grad()
@pytest.mark.parametrize("norm_preserving", [True, False])
@pytest.mark.parametrize("vision", TOWERS)
def test_giving_nothing_is_pruning(vision: str, norm_preserving: bool) -> None:
    tower = tiny_pass(vision, vision_feature_layer=-1, budget=True)
    reducer = with_gates(TokenFusionReducer(tower.config, norm_preserving=norm_preserving), -1e4)
    pruning = Pruning(tower.config, proportional_attention=False, order="spatial")
    for num_keep in (2, 7, 13):
        ours = reducer(tower, tiny_images(), counts(num_keep))
        expected = pruning(tower, tiny_images(), counts(num_keep))
        torch.testing.assert_close(ours.sequence, expected.sequence, atol=1e-6, rtol=1e-6)
        assert torch.equal(ours.positions, expected.positions)


# In training


@pytest.mark.parametrize("norm_preserving", [True, False])
@pytest.mark.parametrize("vision", TOWERS)
def test_every_gate_learns(vision: str, norm_preserving: bool) -> None:
    tower = tiny_pass(vision)
    tower.tower.requires_grad_(False)
    reducer = TokenFusionReducer(tower.config, norm_preserving=norm_preserving).train()
    encoded = reducer(tower, tiny_images(), counts(5))
    tower.patches(encoded.sequence)[..., 0].square().sum().backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name


def test_a_gate_s_gradient_is_what_giving_more_would_change() -> None:
    tower = tiny_pass(vision_feature_layer=-1).tower.double()
    config = tiny_config(vision_feature_layer=-1)
    tower = type(tiny_pass())(tower, config)
    reducer = TokenFusionReducer(config).double().train()
    bias = reducer.gates[1].bias

    def outcome() -> torch.Tensor:
        return tower.patches(reducer(tower, tiny_images().double(), counts(6)).sequence)[..., 0].square().sum()

    outcome().backward()
    gradient = float(bias.grad)
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            bias += step
            values.append(float(outcome()))
            bias -= step
    assert gradient == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_gates_run_in_training_even_where_nothing_is_merged() -> None:
    tower = tiny_pass()
    reducer = TokenFusionReducer(tower.config).train()
    encoded = reducer(tower, tiny_images(), counts(NUM_PATCHES))
    assert torch.equal(encoded.sequence, whole_run(tower, tiny_images()))
    encoded.sequence.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in reducer.parameters())


# What every reducer in the tower promises
