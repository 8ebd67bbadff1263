"""What DynamicViT promises: predictors that drop for good, attention that hides what was dropped, and exactly K."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn

from adavtp.modeling.reducers.dynamicvit import (
    DynamicViTReducer,
    KeepPredictor,
    policy_bias,
    sampled_decision,
    tokens_after_stages,
)
from layers_by_hand import gelu, linear, normalised
from tiny_models import NUM_PATCHES, tiny_config
from tiny_towers import PASS_IDS, PASSES, TOWERS, counts, tiny_images, tiny_pass, whole_run

CUTS = [0, 1, 2]


def with_random_predictors(reducer: DynamicViTReducer) -> DynamicViTReducer:
    """Predictors that tell patches apart, and keep and drop about as many."""
    generator = torch.Generator().manual_seed(0)
    for parameter in reducer.predictors.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    for predictor in reducer.predictors:
        predictor.score[-1].bias.data = torch.tensor([-4.0, 0.0])
    return reducer


def prediction_by_hand(predictor: KeepPredictor, patches: torch.Tensor, kept: list[int]) -> list[float]:
    """Log-probability of keeping each patch of one image, with the tokens at `kept` still there."""
    embedded = gelu(linear(normalised(patches, predictor.norm), predictor.embed))
    half = patches.shape[1] // 2
    others = sum(embedded[index, half:] for index in kept) / len(kept)
    scores = []
    for token in embedded:
        keep, drop = predictor.score(torch.cat([token[:half], others])).tolist()
        scores.append(-math.log1p(math.exp(drop - keep - 4.0)))
    return scores


def watched(reducer: DynamicViTReducer) -> list[torch.Tensor]:
    """A list that fills with what each predictor was told of earlier decisions."""
    told = []
    for predictor in reducer.predictors:
        predictor.register_forward_pre_hook(lambda _, args: told.append(args[1]))
    return told


# The predictor


@torch.no_grad()
def test_a_predictor_sees_each_token_and_the_mean_of_those_still_there() -> None:
    torch.manual_seed(0)
    predictor = KeepPredictor(8)
    for parameter in predictor.parameters():
        parameter.normal_()
    patches = torch.randn(2, 5, 8)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    log_probabilities = predictor(patches, kept)
    torch.testing.assert_close(log_probabilities.exp().sum(dim=-1), torch.ones(2, 5))
    for image, there in enumerate(([0, 2, 3], [4])):
        expected = torch.tensor(prediction_by_hand(predictor, patches[image], there))
        torch.testing.assert_close(log_probabilities[image, :, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_untrained_predictors_keep_nearly_everything() -> None:
    torch.manual_seed(0)
    tower = tiny_pass(num_images=64)
    encoded = DynamicViTReducer(tower.config).train()(tower, tiny_images(64), counts(4, 64))
    assert 0.9 < float(encoded.gates.mean()) < 1.0


# The schedule


def test_the_last_stage_keeps_k_and_the_ones_before_a_geometric_share() -> None:
    assert tokens_after_stages(576, 72, 3) == [288, 144, 72]
    assert tokens_after_stages(64, 27, 3) == [48, 36, 27]
    assert tokens_after_stages(1000, 343, 3) == [700, 490, 343]
    for num_patches, num_stages in ((16, 3), (64, 2), (50, 5), (9, 1)):
        for num_keep in range(1, num_patches + 1):
            left = tokens_after_stages(num_patches, num_keep, num_stages)
            for stage, count in enumerate(left, start=1):
                # The largest count whose share is no more than ((K + 1/2) / N)^(s / S).
                power = (Fraction(1, 2) + num_keep) ** stage * num_patches ** (num_stages - stage)
                assert count**num_stages <= power < (count + 1) ** num_stages
            assert num_patches >= left[0] and left == sorted(left, reverse=True) and left[-1] == num_keep


@pytest.mark.parametrize("rate", [0.9, 0.8, 0.7, 0.6, 0.5])
def test_counts_are_those_of_the_published_rates(rate: float) -> None:
    published = [int(196 * rate**stage) for stage in (1, 2, 3)]
    assert tokens_after_stages(196, published[-1], 3) == published


def test_predictors_stand_at_the_quarters_of_the_layers_that_run() -> None:
    config = tiny_config()
    for num_layers, feature_layer, cuts in ((12, -1, [3, 6, 9]), (24, -2, [5, 11, 17]), (3, -2, [0, 1]), (2, 1, [0])):
        config.vision_config.num_hidden_layers = num_layers
        config.vision_feature_layer = feature_layer
        assert DynamicViTReducer(config).cuts == cuts


# Evaluation


@torch.no_grad()
@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("vision", TOWERS)
def test_every_stage_keeps_its_best_tokens_and_the_others_are_gone(vision: str, order: str) -> None:
    tower = tiny_pass(vision, vision_feature_layer=-1)
    reducer = with_random_predictors(DynamicViTReducer(tower.config, cuts=CUTS, order=order)).eval()
    before = tower.num_before
    for num_keep, left in ((7, [12, 9, 7]), (1, [7, 3, 1])):
        encoded = reducer(tower, tiny_images(), counts(num_keep))
        for image in range(2):
            sequence = tower.embed(tiny_images()[image : image + 1])
            places = list(range(NUM_PATCHES))
            for stage, count in enumerate(left):
                patches = sequence[0, before:]
                scores = prediction_by_hand(reducer.predictors[stage], patches, list(range(len(places))))
                best = sorted(range(len(places)), key=lambda index: -scores[index])[:count]
                if order == "spatial" or stage < 2:
                    best = sorted(best)
                places = [places[index] for index in best]
                sequence = torch.cat([sequence[:, :before], patches[None, best]], dim=1)
                sequence = tower.run_layer(stage, sequence)
            assert encoded.positions[image].tolist() == places
            torch.testing.assert_close(encoded.sequence[image], sequence[0], atol=1e-5, rtol=1e-5)
        assert encoded.gates is None
        assert encoded.loss is None


@torch.no_grad()
@pytest.mark.parametrize("order", ["spatial", "official"])
def test_among_equal_scores_the_earlier_patch_stays(order: str) -> None:
    tower = tiny_pass(vision_feature_layer=-1)
    reducer = DynamicViTReducer(tower.config, cuts=CUTS, order=order).eval()
    for predictor in reducer.predictors:
        nn.init.zeros_(predictor.score[-1].weight)
    encoded = reducer(tower, tiny_images(), counts(5))
    assert encoded.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    # Also where an earlier stage ranked them otherwise.
    reducer = with_random_predictors(reducer)
    nn.init.zeros_(reducer.predictors[-1].score[-1].weight)
    for places in reducer(tower, tiny_images(), counts(5)).positions.tolist():
        assert places == sorted(places)
        assert places != [0, 1, 2, 3, 4]


# Training


def test_decisions_are_sampled_with_the_predicted_probabilities() -> None:
    torch.manual_seed(0)
    keep = torch.tensor([0.05, 0.3, 0.5, 0.9])
    log_probabilities = torch.stack([keep, 1 - keep], dim=-1).log().expand(20000, -1, -1)
    decision = sampled_decision(log_probabilities, torch.ones(20000, 4))
    # An image keeps one token in any case, so that 3 of 100 images here add one.
    loses_all = float((1 - keep).prod())
    assert ((decision.mean(dim=0) - keep).abs() < loses_all + 0.015).all()
    assert set(decision.unique().tolist()) == {0.0, 1.0}


def test_what_was_dropped_stays_dropped_and_the_last_token_stays() -> None:
    torch.manual_seed(0)
    keep = torch.tensor([0.5, 0.5, 0.5, 0.5])
    log_probabilities = torch.stack([keep, 1 - keep], dim=-1).log().expand(1000, -1, -1)
    previous = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1000, -1)
    decision = sampled_decision(log_probabilities, previous)
    assert not decision[:, [0, 2]].any()
    assert set(decision.sum(dim=1).tolist()) == {1.0, 2.0}
    never = torch.tensor([-50.0, -1e-20]).expand(1000, 4, 2)
    assert sampled_decision(never, previous).sum(dim=1).tolist() == [1.0] * 1000


def test_the_gradient_of_a_decision_is_that_of_its_soft_form() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, requires_grad=True)
    previous = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    seed = torch.random.get_rng_state()
    decision = sampled_decision(logits.log_softmax(dim=-1), previous)
    decision.sum().backward()
    torch.random.set_rng_state(seed)
    noise = -torch.log(-torch.log(torch.rand(1, 3, 2)))
    for index in range(3):
        log_odds = float((logits.detach() + noise)[0, index].diff().neg())
        soft = 1 / (1 + math.exp(-log_odds))
        slope = previous[0, index].item() * soft * (1 - soft)
        torch.testing.assert_close(logits.grad[0, index], torch.tensor([slope, -slope]), atol=1e-4, rtol=1e-3)
        assert float(previous.grad[0, index]) in (0.0, 1.0)
        if index < 2:
            assert decision[0, index].item() == float(previous.grad[0, index])


@torch.no_grad()
@pytest.mark.parametrize("fields", PASSES, ids=PASS_IDS)
@pytest.mark.parametrize("vision", TOWERS)
def test_attention_is_multiplied_by_the_policy_and_a_token_always_sees_itself(vision: str, fields: dict) -> None:
    """(exp(l_ij) M_ij) / sum_k exp(l_ik) M_ik with M_ij = p_j, M_ii = 1, against the stock layer on what is seen."""
    tower = tiny_pass(vision, **fields)
    sequence = tower.embed(tiny_images())
    length = sequence.shape[1]
    policy = (torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    policy[:, 0] = 1.0
    hidden = tower.attend(0, sequence, policy_bias(policy))
    for image in range(2):
        for row in range(length):
            seen = [column for column in range(length) if policy[image, column] or column == row]
            alone_with_seen = tower.attend(0, sequence[image : image + 1, seen])
            torch.testing.assert_close(hidden[image, row], alone_with_seen[0, seen.index(row)], atol=2e-4, rtol=1e-4)


def test_a_policy_of_one_hides_nothing_at_all() -> None:
    assert not policy_bias(torch.ones(2, 5)).any()
    bias = policy_bias(torch.tensor([[1.0, 0.0]]))
    assert bias[0].tolist() == [[0.0, pytest.approx(math.log(1e-6), rel=1e-5)], [0.0, 0.0]]


@pytest.mark.parametrize("fields", PASSES, ids=PASS_IDS)
@pytest.mark.parametrize("vision", TOWERS)
def test_training_keeps_all_tokens_and_tells_them_apart_by_gates(vision: str, fields: dict) -> None:
    torch.manual_seed(0)
    tower = tiny_pass(vision, vision_feature_layer=-1, **fields)
    reducer = with_random_predictors(DynamicViTReducer(tower.config, cuts=CUTS)).train()
    told = watched(reducer)
    biases = []
    attend = tower.attend
    tower.attend = lambda layer, sequence, bias: (biases.append(bias), attend(layer, sequence, bias))[1]
    encoded = reducer(tower, tiny_images(), torch.tensor([4, 12]))
    assert encoded.sequence.shape == whole_run(tower, tiny_images()).shape
    assert encoded.positions.tolist() == [list(range(NUM_PATCHES))] * 2
    assert set(encoded.gates.unique().tolist()) == {0.0, 1.0}

    decisions = [*told[1:], encoded.gates]
    assert all((later <= earlier).all() for earlier, later in pairwise(decisions))
    for decision, bias in zip(decisions, biases, strict=True):
        is_dropped = nn.functional.pad(decision == 0, (tower.num_before, tower.num_after))
        hidden = is_dropped[:, None] & ~torch.eye(encoded.sequence.shape[1], dtype=torch.bool)
        torch.testing.assert_close(bias, math.log(1e-6) * hidden)

    expected = 0.0
    for stage, decision in enumerate(decisions, start=1):
        for image, num_keep in enumerate((4, 12)):
            mean = decision[image].sum().item() / NUM_PATCHES
            expected += (mean - (num_keep / NUM_PATCHES) ** (stage / 3)) ** 2 / 2
    assert encoded.loss.item() == pytest.approx(2.0 * expected / 3, rel=1e-5)
    selection = reducer.selection(encoded, tower.patches(encoded.sequence), NUM_PATCHES)
    assert torch.equal(selection.keep, encoded.gates == 1)
    assert selection.loss is encoded.loss


@pytest.mark.parametrize("vision", TOWERS)
def test_predictors_learn_from_the_budget_and_from_what_tokens_are_worth(vision: str) -> None:
    torch.manual_seed(0)
    tower = tiny_pass(vision)
    tower.tower.requires_grad_(False)
    reducer = with_random_predictors(DynamicViTReducer(tower.config)).train()
    for objective in ("loss", "features"):
        reducer.zero_grad()
        encoded = reducer(tower, tiny_images(), counts(4))
        if objective == "loss":
            encoded.loss.backward()
        else:
            tower.patches(encoded.sequence)[..., 0].square().sum().backward()
        for name, parameter in reducer.named_parameters():
            assert parameter.grad.isfinite().all(), (objective, name)
            assert parameter.grad.any(), (objective, name)


def test_a_dropped_token_s_gate_knows_what_it_would_have_been_worth() -> None:
    tower = tiny_pass()
    sequence = tower.embed(tiny_images()).detach().double()
    tower.tower.double()
    policy = torch.ones(2, sequence.shape[1], dtype=torch.float64)
    policy[:, 5] = 0.0
    policy.requires_grad_()
    tower.attend(0, sequence, policy_bias(policy))[:, 0].pow(3).sum().backward()
    outcome = []
    for value in (0.0, 1e-6):
        changed = policy.detach().clone()
        changed[0, 5] = value
        outcome.append(tower.attend(0, sequence, policy_bias(changed))[:, 0].pow(3).sum().item())
    assert policy.grad[0, 5] != 0
    assert float(policy.grad[0, 5]) == pytest.approx((outcome[1] - outcome[0]) / 1e-6, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("vision", TOWERS)
def test_training_does_not_show_a_read_only_budget_to_the_image(vision: str, place: str) -> None:
    plain, tower = tiny_pass(vision), tiny_pass(vision, budget=True, budget_token_place=place)
    reducer = with_random_predictors(DynamicViTReducer(plain.config)).train()
    runs = []
    for one in (plain, tower):
        torch.manual_seed(0)
        runs.append(reducer(one, tiny_images(), counts(4)))
    assert torch.equal(runs[0].gates, runs[1].gates)
    assert not runs[0].gates.all()
    torch.testing.assert_close(tower.without_budget(runs[1].sequence), runs[0].sequence, atol=1e-5, rtol=1e-5)


def test_one_call_takes_all_budgets_in_training_and_one_in_evaluation() -> None:
    reducer = DynamicViTReducer(tiny_config())
    assert not reducer.train().one_count
    assert reducer.eval().one_count


def test_no_ratio_loss_without_a_weight() -> None:
    tower = tiny_pass()
    encoded = DynamicViTReducer(tower.config, ratio_loss_weight=0).train()(tower, tiny_images(), counts(4))
    assert encoded.loss.item() == 0.0


@torch.no_grad()
@pytest.mark.parametrize("reducer_dtype", [torch.bfloat16, torch.float32])
def test_in_training_too_bfloat16_stays_bfloat16(reducer_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tower = tiny_pass(dtype=torch.bfloat16, budget=True)
    reducer = DynamicViTReducer(tower.config).to(reducer_dtype).train()
    encoded = reducer(tower, tiny_images(), counts(7))
    assert encoded.sequence.dtype == torch.bfloat16
    assert encoded.sequence.isfinite().all()
    assert encoded.positions.shape == (2, NUM_PATCHES)
