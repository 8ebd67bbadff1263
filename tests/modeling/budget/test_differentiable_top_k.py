"""What the soft choice promises: gates between 0 and 1 that sum to exactly K, their gradient, hardness in the end."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit

from adavtp.modeling.budget.differentiable_top_k import differentiable_top_k, weight_of_indecision
from adavtp.modeling.budget.top_k import top_k_mask


def gates_by_root(scores: np.ndarray, num_keep: int, temperature: float) -> np.ndarray:
    """By their definition: the threshold is the root of a decreasing function, found by Brent's method."""
    far = 50 * temperature
    threshold = brentq(
        lambda t: expit((scores - t) / temperature).sum() - num_keep,
        scores.min() - far,
        scores.max() + far,
        xtol=1e-14,
    )
    return expit((scores - threshold) / temperature)


def soft(
    scores: torch.Tensor, num_keep: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = top_k_mask(scores.detach(), num_keep)
    return *differentiable_top_k(scores, num_keep, keep, temperature), keep


@pytest.mark.parametrize("kind", ["random", "all equal", "few values", "far apart", "far from zero"])
def test_gates_lie_between_0_and_1_and_sum_to_k_at_every_k(kind: str) -> None:
    torch.manual_seed(0)
    scores = {
        "random": torch.randn(300, 37),
        "all equal": torch.zeros(300, 37),
        "few values": torch.randint(0, 3, (300, 37)).float(),
        "far apart": torch.randn(300, 37) * 1e6,
        "far from zero": torch.randn(300, 37) + 1e5,
    }[kind]
    num_keep = torch.randint(1, 38, (300,))
    gates, _, _ = soft(scores, num_keep)
    assert (gates >= 0).all() and (gates <= 1).all()
    torch.testing.assert_close(gates.sum(dim=-1), num_keep.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_gates_and_their_cross_entropy_are_those_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    scores, num_keep = 2 * torch.randn(20, 11), torch.randint(1, 11, (20,))
    gates, indecision, keep = soft(scores, num_keep, temperature)
    for row in range(20):
        expected = gates_by_root(scores[row].double().numpy(), int(num_keep[row]), temperature)
        np.testing.assert_allclose(gates[row].numpy(), expected, atol=1e-5)
        entropy = -np.where(keep[row].numpy(), np.log(expected), np.log(1 - expected))
        np.testing.assert_allclose(indecision[row].numpy(), entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_gradient_is_the_slope_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 9, requires_grad=True)
    num_keep, weights, step = torch.tensor([1, 3, 5, 8]), torch.randn(4, 9), 1e-5
    gates, _, _ = soft(scores, num_keep, temperature)
    (gates * weights).sum().backward()
    for row, count in enumerate(num_keep.tolist()):
        values, weight = scores[row].detach().double().numpy(), weights[row].double().numpy()
        for token in range(9):
            above, below = (
                gates_by_root(values + sign * step * np.eye(9)[token], count, temperature) @ weight for sign in (1, -1)
            )
            assert scores.grad[row, token].item() == pytest.approx((above - below) / (2 * step), abs=1e-4)


def test_towards_temperature_0_the_gates_are_the_hard_choice() -> None:
    torch.manual_seed(0)
    scores, num_keep = torch.randn(50, 23), torch.randint(1, 24, (50,))
    distance = []
    for temperature in (1.0, 0.1, 0.01, 1e-5):
        gates, _, keep = soft(scores, num_keep, temperature)
        distance.append((gates - keep.float()).abs().mean().item())
    assert distance == sorted(distance, reverse=True)
    assert distance[0] > 0.1 and distance[-1] < 1e-5


def test_what_is_no_token_changes_nothing() -> None:
    torch.manual_seed(0)
    scores, num_keep = torch.randn(5, 8), torch.tensor([1, 4, 7, 8, 2])
    weights = torch.randn(5, 8)
    found = []
    for padding in (0, 6):
        own = torch.nn.functional.pad(scores, (0, padding), value=torch.finfo(torch.float32).min).requires_grad_()
        gates, indecision, _ = soft(own, num_keep, 0.5)
        ((gates + indecision)[:, :8] * weights).sum().backward()
        assert (gates[:, 8:] == 0).all() and (indecision[:, 8:] == 0).all() and (own.grad[:, 8:] == 0).all()
        found.append((gates[:, :8], indecision[:, :8], own.grad[:, :8]))
    for alone, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_row_that_keeps_everything_has_gates_of_1_and_no_gradient(num_tokens: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, num_tokens, requires_grad=True)
    gates, indecision, _ = soft(scores, torch.tensor([num_tokens, max(1, num_tokens // 2)]))
    assert (gates[0] == 1).all() and (indecision[0] == 0).all()
    ((gates + indecision) * torch.randn(2, num_tokens)).sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[0] == 0).all()
    assert (scores.grad[1] != 0).any() == (num_tokens > 1)


def test_less_indecision_is_a_wider_gap_between_the_last_kept_and_the_first_dropped() -> None:
    torch.manual_seed(0)
    scores, num_keep = (0.1 * torch.randn(8, 12)).requires_grad_(), torch.randint(1, 12, (8,))
    choice = top_k_mask(scores.detach(), num_keep)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(200):
        _, indecision, _ = soft(scores, num_keep)
        optimizer.zero_grad()
        indecision.sum().backward()
        optimizer.step()
    gates, _, keep = soft(scores, num_keep)
    assert torch.equal(keep, choice)
    assert (gates - keep.float()).abs().max() < 0.1


def test_the_weight_of_indecision_rises_evenly_as_in_the_authors_scripts() -> None:
    assert [weight_of_indecision(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 1.05, 2.0])
