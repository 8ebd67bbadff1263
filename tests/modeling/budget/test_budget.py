"""What a token budget promises: the number as written, times N, rounded down, and nothing that is not a budget."""

import math
from decimal import Decimal
from typing import Any

import pytest
import torch

from adavtp import BudgetEmbedding
from adavtp.modeling.budget.token_budget import num_tokens_to_keep

FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def exact_num_keep(written: str, num_tokens: int) -> int:
    """The definition in decimal arithmetic, which knows no rounding error."""
    return max(1, int(Decimal(written) * num_tokens))


@pytest.mark.parametrize(
    ("written", "num_tokens", "num_keep"),
    [("0.2", 576, 115), ("0.6", 576, 345), ("0.4", 576, 230), ("0.29", 100, 29), ("0.0", 576, 1), ("1.0", 576, 576)],
)
def test_a_ratio_keeps_the_floor_of_the_number_as_written(written: str, num_tokens: int, num_keep: int) -> None:
    assert num_tokens_to_keep(float(written), num_tokens, 1).tolist() == [num_keep]
    for dtype in FLOAT_DTYPES:
        assert num_tokens_to_keep(torch.tensor(float(written), dtype=dtype), num_tokens, 1).tolist() == [num_keep]


@pytest.mark.parametrize("num_tokens", [1, 16, 100, 256, 576, 729])
@pytest.mark.parametrize("dtype", [None, *FLOAT_DTYPES])
def test_every_percentage_is_exact_in_every_dtype(dtype: torch.dtype | None, num_tokens: int) -> None:
    written = [f"{percent / 100:.2f}" for percent in range(101)]
    budget = [float(number) for number in written]
    kept = num_tokens_to_keep(budget if dtype is None else torch.tensor(budget, dtype=dtype), num_tokens, 101)
    assert kept.tolist() == [exact_num_keep(number, num_tokens) for number in written]


def test_budgets_of_four_digits_are_exact_in_float32() -> None:
    written = [f"{number / 10000:.4f}" for number in range(0, 10001, 7)]
    kept = num_tokens_to_keep(torch.tensor([float(number) for number in written]), 576, len(written))
    assert kept.tolist() == [exact_num_keep(number, 576) for number in written]


def test_no_budget_keeps_nothing() -> None:
    assert num_tokens_to_keep([0.0, -0.0, 1e-30, 0.001], 576, 4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("count", "num_keep"), [(2, 2), (575, 575), (576, 576), (577, 576), (2**62, 576)])
def test_a_count_keeps_that_many_or_all(count: int, num_keep: int) -> None:
    assert num_tokens_to_keep(count, 576, 2).tolist() == [num_keep, num_keep]


@pytest.mark.parametrize(
    "budget",
    [
        [0.2, 0.6, 1.0],
        (0.2, 0.6, 1.0),
        torch.tensor([0.2, 0.6, 1.0]),
        torch.tensor([0.2, 0.6, 1.0], dtype=torch.bfloat16, requires_grad=True),
        [115, 345, 576],
        torch.tensor([115, 345, 576]),
        torch.tensor([115, 345, 576], dtype=torch.int32),
    ],
)
def test_every_sample_may_have_its_own_budget(budget: Any) -> None:
    kept = num_tokens_to_keep(budget, 576, 3)
    assert kept.tolist() == [115, 345, 576]
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("budget", [0.4, 230, torch.tensor(0.4), torch.tensor(230)])
def test_one_budget_is_every_sample_s(budget: Any) -> None:
    assert num_tokens_to_keep(budget, 576, 4).tolist() == [230] * 4


REFUSED = {
    "nan": (math.nan, ["nan", "0.0 to 1.0"]),
    "nan in a tensor": (torch.tensor([0.5, math.nan]), ["nan", "0.0 to 1.0"]),
    "infinity": (math.inf, ["inf", "0.0 to 1.0"]),
    "negative ratio": (-0.1, ["-0.1", "0.0 to 1.0"]),
    "ratio above 1": (1.5, ["1.5", "0.0 to 1.0", "int >= 2"]),
    "one bad ratio of two": ([0.5, 1.01], ["1.01", "0.0 to 1.0"]),
    "True": (True, ["True", "float in [0, 1]", "int >= 2"]),
    "False": (False, ["False", "float in [0, 1]"]),
    "list of bools": ([True, True], ["[True, True]", "float in [0, 1]"]),
    "the int 1": (1, ["value 1", "2 or more", "1.0 for all tokens", "0.0 for one"]),
    "the int 1 in a tensor": (torch.tensor([5, 1]), ["value 1", "2 or more", "1.0 for all tokens", "0.0 for one"]),
    "the int 0": (0, ["value 0", "2 or more"]),
    "negative count": (-3, ["value -3", "2 or more"]),
    "string": ("0.4", ["'0.4'", "float in [0, 1]"]),
    "bytes": (b"0.5", ["b'0.5'", "float in [0, 1]"]),
    "no values": (torch.tensor(0.5, device="meta"), ["on the meta device"]),
    "sparse": (torch.tensor([0.5, 0.4]).to_sparse(), ["torch.sparse_coo"]),
    "a count beyond 64 bits": (10**30, [str(10**30), "64 bits"]),
    "counts beyond 64 bits": ([2, 10**30], [str(10**30), "64 bits"]),
    "None": (None, ["None", "float in [0, 1]"]),
    "list of strings": (["0.4", "0.4"], ["['0.4', '0.4']", "float in [0, 1]"]),
    "list too long": ([0.1, 0.2, 0.3], ["(3,)", "batch of 2", "one per sample"]),
    "list too short": ([0.1], ["(1,)", "batch of 2", "one per sample"]),
    "tensor too long": (torch.tensor([0.1, 0.2, 0.3]), ["(3,)", "batch of 2", "one per sample"]),
    "two dimensions": (torch.tensor([[0.1, 0.2]]), ["(1, 2)", "batch of 2", "one per sample"]),
    "empty list": ([], ["[]", "float in [0, 1]"]),
    "mixture of ratio and count": ([0.5, 20], ["[0.5, 20]", "all floats or all ints"]),
    "mixture of count and bool": ([20, True], ["[20, True]", "all floats or all ints"]),
    "bool tensor": (torch.tensor([True, False]), ["torch.bool", "floats in [0, 1] or ints >= 2"]),
    "complex tensor": (torch.tensor([0.5j, 0.5j]), ["torch.complex64", "floats in [0, 1] or ints >= 2"]),
    "dict": ({"adaptive": 0.5}, ["'adaptive'", "float in [0, 1]"]),
}


@pytest.mark.parametrize(("budget", "fragments"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_budget_is_refused_with_its_value_and_what_is_allowed(budget: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        num_tokens_to_keep(budget, 576, 2)
    for fragment in ["`token_budget`", *fragments]:
        assert fragment in str(refusal.value)


def test_the_budget_embedding_is_its_formula() -> None:
    torch.manual_seed(0)
    embedding = BudgetEmbedding(24).double()
    budgets = [0.0, 0.05, 0.4, 1.0]
    encoded = torch.tensor(
        [
            [
                function(2 * math.pi * budget * 10000 ** (-i / 128))
                for function in (math.sin, math.cos)
                for i in range(128)
            ]
            for budget in budgets
        ],
        dtype=torch.float64,
    )
    assert encoded.shape == (4, 256)
    hidden = encoded @ embedding.linear_1.weight.T + embedding.linear_1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = hidden @ embedding.linear_2.weight.T + embedding.linear_2.bias
    torch.testing.assert_close(embedding(torch.tensor(budgets)), expected, atol=1e-6, rtol=0)


def test_different_budgets_have_different_embeddings() -> None:
    torch.manual_seed(0)
    embeddings = BudgetEmbedding(24)(torch.arange(1, 577) / 576)
    distances = torch.cdist(embeddings, embeddings) + torch.eye(576)
    assert distances.min() > 1e-4


def test_the_budget_embedding_learns() -> None:
    torch.manual_seed(0)
    embedding = BudgetEmbedding(24)
    embedding(torch.tensor([0.2, 0.7])).square().sum().backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_budget_embedding_has_the_dtype_of_its_weights() -> None:
    assert BudgetEmbedding(8).to(torch.bfloat16)(torch.tensor([0.4])).dtype == torch.bfloat16
