"""What DivPrune promises: the greedy solution of the max-min diversity problem, whatever shares the batch."""

import math

import pytest
import torch

from adavtp.modeling.reducers.divprune import DivPruneReducer
from tiny_features import features_of
from tiny_models import tiny_config

CONFIG = tiny_config()


def kept(patches: torch.Tensor, num_keep: list[int]) -> torch.Tensor:
    return DivPruneReducer(CONFIG).eval()(features_of(patches), torch.tensor(num_keep)).keep


def random_tokens(num_images: int, num_tokens: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, num_tokens, width, generator=torch.Generator().manual_seed(seed))


def greedy_by_definition(tokens: list[list[float]], num_keep: int) -> list[int]:
    """One token after another, each distance worked out alone; of equal ones the first."""

    def distance(one: list[float], other: list[float]) -> float:
        product = sum(x * y for x, y in zip(one, other, strict=True))
        return 1 - product / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))

    everyone = range(len(tokens))
    lonely = [min(distance(tokens[i], tokens[j]) for i in everyone if i != j) for j in everyone]
    chosen = [lonely.index(max(lonely))]
    while len(chosen) < num_keep:
        gap = [-1.0 if j in chosen else min(distance(tokens[i], tokens[j]) for i in chosen) for j in everyone]
        chosen.append(gap.index(max(gap)))
    return sorted(chosen)


@pytest.mark.parametrize("num_keep", [1, 2, 5, 11, 16])
def test_it_is_the_greedy_solution_by_its_definition(num_keep: int) -> None:
    patches = random_tokens(3, 16)
    positions = DivPruneReducer(CONFIG)(features_of(patches), torch.full((3,), num_keep)).positions
    assert positions.tolist() == [greedy_by_definition(image.tolist(), num_keep) for image in patches]


def test_the_first_token_is_the_one_that_stands_most_alone() -> None:
    # Nearest neighbours by angle: 0 has 1 at 5 degrees, 2 has 1 at 35, 3 has 2 at 50; token 0 is farthest from 3.
    angles = torch.tensor([0.0, 5.0, 40.0, 90.0]).deg2rad()
    patches = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert kept(patches, [1]).tolist() == [[False, False, False, True]]
    assert kept(patches, [2]).tolist() == [[True, False, False, True]]
    assert kept(patches, [3]).tolist() == [[True, False, True, True]]


def test_length_does_not_matter_and_direction_does() -> None:
    patches = random_tokens(2, 16)
    lengths = torch.linspace(0.1, 50.0, 16)[:, None]
    assert torch.equal(kept(patches, [6, 9]), kept(patches * lengths, [6, 9]))
    assert not torch.equal(kept(patches, [6, 9]), kept(patches * torch.linspace(0.1, 50.0, 12), [6, 9]))


def test_equal_distances_go_to_the_earlier_token() -> None:
    for num_keep in range(1, 9):
        assert kept(torch.eye(8)[None], [num_keep])[0].tolist() == [True] * num_keep + [False] * (8 - num_keep)


def test_copies_are_kept_only_when_nothing_else_is_left() -> None:
    distinct = random_tokens(1, 5, width=4096)[0]
    copies = [0, 1, 0, 2, 1, 3, 3, 4, 0, 2]
    patches = torch.stack([distinct[index] * (1 + place) for place, index in enumerate(copies)])[None]
    assert kept(patches, [5])[0].nonzero()[:, 0].tolist() == [0, 1, 3, 5, 7]
    assert kept(patches, [7])[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_a_larger_budget_adds_to_a_smaller_one() -> None:
    patches = random_tokens(1, 20).expand(20, -1, -1)
    nested = kept(patches, list(range(1, 21)))
    assert (nested[1:] | ~nested[:-1]).all()
    assert nested.sum(dim=-1).tolist() == list(range(1, 21))


def test_half_precision_tokens_are_compared_in_float32() -> None:
    patches = random_tokens(4, 40, width=64).bfloat16()
    assert torch.equal(kept(patches, [13] * 4), kept(patches.float(), [13] * 4))


def test_tokens_of_no_length_do_no_harm() -> None:
    patches = random_tokens(1, 8)
    patches[0, 3:] = 0.0
    assert kept(patches, [6]).sum() == 6
