"""Choices of layers, heads and groups of MLP channels that need no scheduler: what a learned one has to beat."""

from collections.abc import Callable
from fractions import Fraction

import torch
from transformers import PreTrainedConfig

from ..budget.top_k import top_k_mask
from ..budget.unit_budget import num_units_to_choose
from .execution_plan import ExecutionPlan


def _even(num_available: int, num_run: int, generator: torch.Generator) -> torch.Tensor:
    """At a uniform stride, as [`GridReducer`] keeps tokens."""
    runs = torch.zeros(num_available, dtype=torch.bool)
    if num_run:
        runs[((torch.arange(num_run) + 0.5) * num_available / num_run).long()] = True
    return runs


def _first(num_available: int, num_run: int, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(num_available) < num_run


def _random(num_available: int, num_run: int, generator: torch.Generator) -> torch.Tensor:
    return top_k_mask(torch.rand(1, num_available, generator=generator), num_run)[0]


# "first" runs the first layers, and of every layer the first heads and groups; "even" spreads what is left out.
UNIT_RULES: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "even": _even,
    "first": _first,
    "random": _random,
}


def plan_by_rule(
    rule: str,
    config: PreTrainedConfig,
    num_layers: torch.Tensor,
    shares: list[Fraction],
    num_prefix_layers: int,
    num_mlp_groups: int,
    seeds: list[int],
) -> ExecutionPlan:
    """
    A plan with a row for each prompt.

    Args:
        rule: a key of `UNIT_RULES`.
        config: the model's.
        num_layers: `[batch]` int64, layers that run.
        shares: of the units of these, see [`width_shares`].
        num_prefix_layers: that run whole.
        num_mlp_groups: in how many groups the channels of an MLP are.
        seeds: of each prompt, for what is drawn.
    """
    text = config.get_text_config()
    num_sets = text.num_key_value_heads
    plan, choose = ExecutionPlan.whole(config, len(seeds), num_mlp_groups), UNIT_RULES[rule]
    behind = text.num_hidden_layers - num_prefix_layers
    num_heads, num_groups = (
        num_units_to_choose(shares, num_layers, num_prefix_layers, units).tolist()
        for units in (num_sets, num_mlp_groups)
    )
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        plan.layers[row, num_prefix_layers:] = choose(behind, int(num_layers[row]) - num_prefix_layers, generator)
        runs = plan.layers[row].nonzero()[num_prefix_layers:, 0]
        for table, units, number in ((plan.heads, num_sets, num_heads), (plan.mlp_groups, num_mlp_groups, num_groups)):
            # Unit by unit, each of all layers, so that those that follow one another are of different layers.
            chosen = choose(units * len(runs), number[row], generator).view(units, len(runs)).T
            table[row, runs] = chosen.repeat_interleave(table.shape[-1] // units, dim=-1)
    return plan
