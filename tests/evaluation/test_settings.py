"""What is asked of a run: budgets and reducers as people write them, and the settings that they make."""

import math
from fractions import Fraction
from itertools import product
from typing import Any

import pytest

from adavtp.evaluation.settings import Setting, asked_settings, budget_of_text, reducer_label, reducer_of_text
from tiny_models import NUM_PATCHES

BUDGETS = {
    "0.4": 0.4,
    "57": 57,
    "1.0": 1.0,
    "1": 1,
    "1e-1": 0.1,
    "-3": -3,
    "115/576": Fraction(115, 576),
}


@pytest.mark.parametrize(("text", "budget"), BUDGETS.items())
def test_a_budget_is_what_python_would_read_or_an_exact_fraction(text: str, budget: Any) -> None:
    assert budget_of_text(text) == budget and type(budget_of_text(text)) is type(budget)


@pytest.mark.parametrize("text", ["", "half", "40%", "115/0", "a/b"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no budget; allowed are"):
        budget_of_text(text)


REDUCERS = {
    "tome": "tome",
    "prumerge+": "prumerge+",
    "fastv:layer=2": [{"name": "fastv", "layer": 2}],
    "fastv:layer=2:rows=last:ratio=0.25": [{"name": "fastv", "layer": 2, "rows": "last", "ratio": 0.25}],
    "tome, pyramiddrop:layers=[1,2]": ["tome", {"name": "pyramiddrop", "layers": [1, 2]}],
}


@pytest.mark.parametrize(("written", "meant"), REDUCERS.items())
def test_a_reducer_is_written_as_it_is_labelled(written: str, meant: Any) -> None:
    assert reducer_of_text(written) == meant
    assert Setting(meant, 0.5).label == reducer_label(meant) == written


@pytest.mark.parametrize("text", ["", "fastv:layer", "fastv:=2", "tome,"])
def test_what_is_no_reducer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no reducer"):
        reducer_of_text(text)


def test_full_runs_once_and_others_where_something_is_left_out() -> None:
    asked = asked_settings(NUM_PATCHES, ["adaptive", "full", "fastv"], [1.0, 0.25, 9, NUM_PATCHES, 0.0])
    assert [(*one.key, one.num_keep) for one in asked] == [
        ("full", 1.0, 16),
        *[(name, *budget) for name, budget in product(["adaptive", "fastv"], [(0.25, 4), (9, 9), (0.0, 1)])],
    ]
    assert [one.label for one in asked_settings(NUM_PATCHES, ["adaptive"], [1.0])] == ["full"]
    assert [one.label for one in asked_settings(NUM_PATCHES, ["full"], [])] == ["full"]


def test_an_exact_fraction_keeps_its_share_of_any_number_of_patches() -> None:
    for count, num_patches in product(range(1, 577), (576, 144, 100, 16)):
        (one,) = asked_settings(num_patches, ["adaptive"], [Fraction(count, 576)])
        expected = max(1, count * num_patches // 576)
        assert one.num_keep == expected
        if expected < num_patches:
            assert one.key == ("adaptive", count / 576)
            assert one.budget == (expected if expected > 1 else 0.0)
        else:
            assert one.label == "full"


@pytest.mark.parametrize("budgets", [[Fraction(3, 2)], [Fraction(-1, 2)], [1.5], [1], [-3], [math.nan], []])
def test_a_budget_that_is_none_is_refused(budgets: list[Any]) -> None:
    with pytest.raises(ValueError, match="budget"):
        asked_settings(NUM_PATCHES, ["adaptive"], budgets)
