"""What the choice of tokens promises: exactly K, drawn as K draws without replacement, with a gradient."""

from itertools import combinations, permutations

import pytest
import torch
from scipy.stats import chi2

from adavtp.modeling.budget.top_k import sample_top_k, straight_through_gates, top_k_mask

NUM_SAMPLES = 100_000
LOGITS = torch.tensor([0.9, -0.4, 0.0, 1.6, -1.1])


def exact_subset_probabilities(num_keep: int) -> torch.Tensor:
    """Plackett-Luce: every order in which a set can be drawn, one softmax of what is left after another."""
    weights = LOGITS.double().exp().tolist()
    probabilities = []
    for subset in combinations(range(len(weights)), num_keep):
        total = 0.0
        for order in permutations(subset):
            probability, left = 1.0, sum(weights)
            for index in order:
                probability *= weights[index] / left
                left -= weights[index]
            total += probability
        probabilities.append(total)
    return torch.tensor(probabilities, dtype=torch.float64)


def subset_frequencies(keep: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Counts of each subset in the order of `combinations`."""
    code = (keep.long() * 2 ** torch.arange(keep.shape[-1])).sum(dim=-1).bincount(minlength=2 ** keep.shape[-1])
    return torch.stack(
        [code[sum(2**index for index in subset)] for subset in combinations(range(keep.shape[-1]), num_keep)]
    )


def draw_one_after_another(num_keep: int) -> torch.Tensor:
    """K successive categorical draws without replacement."""
    keep = torch.zeros(NUM_SAMPLES, len(LOGITS), dtype=torch.bool)
    for _ in range(num_keep):
        left = LOGITS.expand(NUM_SAMPLES, -1).masked_fill(keep, float("-inf")).softmax(dim=-1)
        keep.scatter_(1, torch.multinomial(left, 1), True)
    return keep


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["random", "all equal", "few values", "enormous"])
def test_exactly_k_tokens_are_kept_at_every_k(training: bool, kind: str) -> None:
    torch.manual_seed(0)
    scores = {
        "random": torch.randn(300, 37),
        "all equal": torch.zeros(300, 37),
        "few values": torch.randint(0, 3, (300, 37)).float(),
        "enormous": torch.randn(300, 37) * 1e6,
    }[kind]
    num_keep = torch.randint(1, 38, (300,))
    keep, gates = sample_top_k(scores, num_keep, 1.0, training=training)
    assert torch.equal(keep.sum(dim=-1), num_keep)
    assert (gates is None) == (not training)


def test_of_equal_scores_the_earlier_position_wins() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0, 2.0]])
    kept = top_k_mask(scores, torch.tensor([3, 2, 3])).tolist()
    assert [[i for i, is_kept in enumerate(row) if is_kept] for row in kept] == [[0, 1, 3], [0, 1], [0, 1, 4]]


def test_evaluation_keeps_the_largest_scores_and_draws_nothing() -> None:
    torch.manual_seed(0)
    scores = torch.randn(20, 12)
    state = torch.get_rng_state()
    keep, _ = sample_top_k(scores, torch.full((20,), 5), 1.0, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    for row, row_keep in zip(scores, keep, strict=True):
        assert set(row_keep.nonzero().flatten().tolist()) == set(row.topk(5).indices.tolist())


@pytest.mark.parametrize("num_keep", [2, 3])
@pytest.mark.parametrize("scheme", ["one shot", "one after another"])
def test_sets_are_drawn_as_by_successive_draws_without_replacement(scheme: str, num_keep: int) -> None:
    torch.manual_seed(num_keep)
    if scheme == "one shot":
        counts = torch.full((NUM_SAMPLES,), num_keep)
        keep, _ = sample_top_k(LOGITS.expand(NUM_SAMPLES, -1), counts, 1.0, training=True)
    else:
        keep = draw_one_after_another(num_keep)
    observed = subset_frequencies(keep, num_keep).double()
    assert observed.sum() == NUM_SAMPLES
    expected = exact_subset_probabilities(num_keep)
    torch.testing.assert_close(expected.sum(), torch.ones((), dtype=torch.float64))
    assert (observed / NUM_SAMPLES - expected).abs().sum() / 2 < 0.006
    statistic = ((observed - NUM_SAMPLES * expected).square() / (NUM_SAMPLES * expected)).sum().item()
    assert chi2.sf(statistic, df=len(expected) - 1) > 1e-4


def test_the_gradient_s_temperature_does_not_change_what_is_drawn() -> None:
    kept = []
    for temperature in (0.1, 10.0):
        torch.manual_seed(0)
        kept.append(sample_top_k(torch.randn(50, 9), torch.full((50,), 4), temperature, training=True)[0])
    assert torch.equal(*kept)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gates_are_the_choice_forward_and_a_sigmoid_with_a_fixed_sum_backward(temperature: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(40, 11, requires_grad=True)
    num_keep = torch.randint(1, 11, (40,))
    keep = top_k_mask(scores.detach(), num_keep)
    gates = straight_through_gates(scores, num_keep, keep, temperature)
    assert torch.equal(gates, keep.float())

    weights = torch.randn(40, 11)
    (gates * weights).sum().backward()
    for row in range(40):
        ranked = sorted(scores[row].tolist(), reverse=True)
        threshold = (ranked[num_keep[row] - 1] + ranked[num_keep[row]]) / 2
        soft = 1 / (1 + torch.exp(-(scores[row].detach() - threshold) / temperature))
        slope = soft * (1 - soft)
        expected = slope * (weights[row] - (slope * weights[row]).sum() / slope.sum()) / temperature
        torch.testing.assert_close(scores.grad[row], expected, atol=1e-6, rtol=1e-4)
    assert (scores.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_gates_are_exactly_zero_or_one_and_their_gradient_is_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = (10 * torch.randn(64, 23)).to(dtype).requires_grad_()
    keep, gates = sample_top_k(scores, torch.randint(1, 24, (64,)), 1.0, training=True)
    assert torch.equal(gates, keep.float())
    (gates * torch.randn(64, 23)).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().sum() > 0


def test_that_every_token_helps_says_nothing_about_which_to_keep() -> None:
    torch.manual_seed(0)
    scores = (3 * torch.randn(64, 23)).requires_grad_()
    _, gates = sample_top_k(scores, torch.randint(1, 23, (64,)), 1.0, training=True)
    gates.sum().backward()
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_row_that_keeps_everything_has_no_gradient_and_does_not_disturb_the_others(num_tokens: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, num_tokens, requires_grad=True)
    _, gates = sample_top_k(scores, torch.tensor([num_tokens, max(1, num_tokens // 2), num_tokens]), 1.0, True)
    (gates * torch.randn(3, num_tokens)).sum().backward()
    assert (scores.grad[[0, 2]] == 0).all()
    assert scores.grad.isfinite().all()
    assert (scores.grad[1] != 0).any() == (num_tokens > 1)


def test_scores_far_from_the_threshold_have_a_finite_gradient() -> None:
    scores = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    keep = top_k_mask(scores.detach(), torch.tensor([2]))
    gates = straight_through_gates(scores, torch.tensor([2]), keep, 1.0)
    assert gates.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    (gates * torch.arange(4.0)).sum().backward()
    assert scores.grad.isfinite().all()
