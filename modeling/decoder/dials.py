"""The dials of the decoder, as a caller turns them: which of its units run, said outright or by budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from ...configuration.scheduler_settings import usual_mlp_groups
from ..budget.compute_budget import PROPORTIONAL, Dials, PrefillPrice, compute_shares, require_allocation, share_of
from ..budget.selection import Selection
from ..budget.token_budget import TokenBudget, num_tokens_to_keep
from ..budget.unit_budget import num_layers_to_run, num_units_to_choose, width_shares
from .compute_scheduler import ComputeScheduler, selection_statistics
from .compute_token import UnitSchedule
from .execution_plan import ExecutionPlan
from .planned_layers import PlannedLayers
from .policy import DecoderPolicy, NothingLeaves
from .pruned_cache import pruned_cache
from .reducer import DecoderReducer
from .unit_rules import UNIT_RULES, plan_by_rule

# The fields of `DecoderDials`, in their order, as a graph can read them.
DIALS = ("plan", "depth_budget", "width_budget", "scheduler", "compute_budget", "allocation")


@dataclass
class ReadPrompt:
    """
    What a choice of units has to know of a prompt.

    Attributes:
        is_prompt: `[batch, columns]` bool, what is no padding and stands before the answer.
        is_visual: `[batch, columns]` bool, visual tokens; `None` where there are none.
        ids: `[batch, columns]` int64, or `None`.
        selection: of the visual tokens, or `None`.
    """

    is_prompt: torch.Tensor
    is_visual: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    selection: Selection | None = None


@dataclass
class DecoderDials:
    """
    What a call says of the decoder; `None` where it says nothing.

    Attributes:
        plan, depth_budget, width_budget, scheduler, compute_budget, allocation: see
            [`AdaVTPForConditionalGeneration.forward`].
    """

    plan: ExecutionPlan | None = None
    depth_budget: TokenBudget | None = None
    width_budget: TokenBudget | None = None
    scheduler: str | None = None
    compute_budget: float | Sequence[float] | torch.Tensor | None = None
    allocation: str | Mapping[str, float] | None = None

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "DecoderDials":
        """The dials among the arguments of a call, which are taken out of them."""
        return cls(*[arguments.pop(name, None) for name in DIALS])

    @property
    def are_turned(self) -> bool:
        """Whether the call says anything."""
        return any(getattr(self, name) is not None for name in DIALS)


def under_dials(
    policy: DecoderPolicy | None,
    dials: DecoderDials,
    config: PreTrainedConfig,
    scheduler: ComputeScheduler | None,
    prompt: ReadPrompt,
    past_key_values: Cache | None,
) -> DecoderPolicy | None:
    """
    What decides inside the decoder, where units of it may be left out.

    Args:
        policy: what decides without.
        dials: of the call.
        config: the model's, whose budgets hold where a call names none.
        scheduler: the model's, if it has one.
        prompt: that is about to be read.
        past_key_values: which may have been filled under a plan already.

    Raises:
        ValueError: if a plan or a budget is not allowed, nothing can choose, or the cache was filled otherwise.
    """
    batch_size = len(prompt.is_prompt)
    if dials.plan is not None:
        return _under_plan(policy, dials, config, batch_size, past_key_values)
    rule = dials.scheduler
    require_rule(rule)
    text, prefix = config.get_text_config(), 1 if scheduler is None else scheduler.settings.num_prefix_layers
    depth = config.depth_budget if dials.depth_budget is None else dials.depth_budget
    width = config.width_budget if dials.width_budget is None else dials.width_budget
    num_layers = num_layers_to_run(depth, text.num_hidden_layers, prefix, batch_size)
    shares = width_shares(width, text.num_attention_heads, batch_size)
    is_filled = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
    if is_filled:
        if dials.are_turned:
            planned = pruned_cache(past_key_values).planned
            _check_filled(planned, config, scheduler, num_layers, shares)
        return policy
    is_full = bool((num_layers == text.num_hidden_layers).all()) and all(share == 1 for share in shares)
    learns = scheduler is not None and rule is None and scheduler.learns
    if is_full and not learns:
        # Where the configuration says otherwise, whoever runs the layers has to know that this is decided.
        return NothingLeaves() if policy is None and turns_by_itself(config) else policy
    policy = NothingLeaves() if policy is None else policy
    if rule is not None:
        num_groups = usual_mlp_groups(text) if scheduler is None else scheduler.settings.num_mlp_groups
        policy.plan_of_units = plan_by_rule(rule, config, num_layers, shares, prefix, num_groups, _seeds(prompt))
        return policy
    asked = {"depth": int(num_layers.min()) < text.num_hidden_layers, "width": min(shares) < 1}
    _check_scheduler(scheduler, config, {"depth": depth, "width": width}, asked, learns)
    sees = prompt.is_prompt
    if prompt.is_visual is not None and not scheduler.settings.sees_visual_tokens:
        sees = sees & ~prompt.is_visual
    of_selection = None
    if prompt.selection is not None:
        of_selection = selection_statistics(prompt.selection, batch_size)
    policy.schedule = UnitSchedule(
        scheduler, scheduler.counts(num_layers, shares), of_selection, prompt.is_prompt, sees
    )
    return policy


def turns_by_itself(config: PreTrainedConfig) -> bool:
    """Whether units are left out where a call says nothing, by the configuration's budgets."""
    return not config.depth_budget == config.width_budget == 1.0


def dials_of_compute(
    dials: DecoderDials,
    config: PreTrainedConfig,
    scheduler: ComputeScheduler | None,
    num_others: Sequence[int],
    sizes: Sequence[Sequence[int]],
    reducer: DecoderReducer | None,
) -> tuple[list[float], DecoderDials]:
    """
    A compute budget as budgets of all dials.

    Args:
        dials: of the call.
        config: the model's.
        scheduler: the model's, if it has one.
        num_others: of each prompt, columns that are no visual tokens.
        sizes: of each prompt, visual tokens of its images.
        reducer: that acts inside the decoder, or `None`.

    Returns:
        The token budget of each prompt, and the dials.

    Raises:
        ValueError: if the budget, or how it is to be shared, is not allowed.
    """
    text, rule = config.get_text_config(), dials.scheduler
    require_rule(rule)
    settings = None if scheduler is None else scheduler.settings
    turns = frozenset(("depth", "width") if rule is not None else settings.dials if settings is not None else ())
    allocation = dials.allocation or config.compute_allocation or PROPORTIONAL
    require_allocation(allocation, turns)
    num_sets, num_groups = text.num_key_value_heads, usual_mlp_groups(text)
    if settings is not None and rule is None and settings.block_size:
        num_sets = num_groups = text.num_attention_heads // settings.block_size
    elif settings is not None:
        num_groups = settings.num_mlp_groups
    price = PrefillPrice.of_config(text, num_sets, num_groups)
    splits = []
    for share, others, own in zip(compute_shares(dials.compute_budget, len(sizes)), num_others, sizes, strict=True):
        columns = partial(_columns, others, torch.tensor(own), reducer, text.num_hidden_layers)
        largest = max(own, default=0)
        least = next((number for number in range(largest + 1) if columns(share_of(number, largest)) is not None), 0)
        splits.append(
            Dials(
                price,
                columns,
                largest,
                least,
                1 if settings is None else settings.num_prefix_layers,
                turns,
                bool(turns) and rule is None and allocation != "tokens",
            ).split(share, allocation)
        )
    depth, width = [split.depth for split in splits], [split.width for split in splits]
    return [split.tokens for split in splits], DecoderDials(None, depth, width, rule)


def _columns(
    num_others: int, sizes: torch.Tensor, reducer: DecoderReducer | None, num_layers: int, share: float
) -> list[int] | None:
    """The columns that each layer sees at a token budget; `None` if the reducer cannot keep so few."""
    keep, total = int(num_tokens_to_keep(share, sizes, len(sizes)).sum()), int(sizes.sum())
    if reducer is None or keep >= total:
        return [num_others + keep] * num_layers
    try:
        return [num_others + number for number in reducer.layer_counts(total, keep, num_layers)]
    except ValueError:
        return None


def require_rule(rule: str | None) -> None:
    """
    Raises:
        ValueError: if it is none that there is.
    """
    if rule is not None and rule not in UNIT_RULES:
        raise ValueError(
            f"`scheduler` is {rule!r}; allowed are {', '.join(map(repr, UNIT_RULES))}, and None for the model's own."
        )


def _seeds(prompt: ReadPrompt) -> list[int]:
    """A number for each prompt that follows from what it says, not from its place in the batch."""
    ids = prompt.is_prompt.long() if prompt.ids is None else prompt.ids * prompt.is_prompt.to(prompt.ids.device)
    place = prompt.is_prompt.to(ids.device).cumsum(dim=-1)
    return (ids * (place * 31 + 7)).sum(dim=-1).remainder(2**31).tolist()


def _under_plan(
    policy: DecoderPolicy | None,
    dials: DecoderDials,
    config: PreTrainedConfig,
    batch_size: int,
    past_key_values: Cache | None,
) -> DecoderPolicy | None:
    plan, others = dials.plan, [name for name, value in vars(dials).items() if name != "plan" and value is not None]
    if others:
        raise ValueError(f"`plan` and `{others[0]}` were both given; a plan says itself what runs. Pass one of them.")
    tables = [getattr(plan, name, None) for name in ("layers", "heads", "mlp_groups")]
    if not all(isinstance(table, torch.Tensor) for table in tables):
        raise ValueError(f"`plan` is a {type(plan).__name__}; allowed is what `model.whole_plan()` returns.")
    # The Hub's loader may have given the caller another copy of the class.
    plan = ExecutionPlan(*tables)
    plan.check(config.get_text_config())
    plan = plan.of_batch(batch_size)
    if plan.is_whole and pruned_cache(past_key_values).planned is None:
        return NothingLeaves() if policy is None and turns_by_itself(config) else policy
    policy = NothingLeaves() if policy is None else policy
    policy.plan_of_units = plan
    return policy


def _check_filled(
    planned: PlannedLayers | None,
    config: PreTrainedConfig,
    scheduler: ComputeScheduler | None,
    num_layers: torch.Tensor,
    shares: list[Fraction],
) -> None:
    """A cache goes on under the plan that it was filled by, so that a call may only name the budgets of that."""
    batch_size, text = len(num_layers), config.get_text_config()
    plan = ExecutionPlan.whole(config, batch_size) if planned is None else planned.of_batch(batch_size).plan
    prefix, unit = 1, text.num_attention_heads // text.num_key_value_heads
    if scheduler is not None:
        prefix, unit = scheduler.settings.num_prefix_layers, scheduler.settings.block_size or unit
    units = text.num_attention_heads // unit
    num_heads = unit * (prefix * units + num_units_to_choose(shares, num_layers, prefix, units))
    ran = plan.layers.sum(dim=-1), (plan.heads & plan.layers[..., None]).sum(dim=(1, 2))
    if not torch.equal(ran[0], num_layers) or not torch.equal(ran[1], num_heads):
        raise ValueError(
            f"`past_key_values` was filled with {ran[0].tolist()} layers and {ran[1].tolist()} attention heads, and "
            f"the budgets of this call ask for {num_layers.tolist()} and {num_heads.tolist()}. What a layer was left "
            "out of, it cannot read later: leave `depth_budget` and `width_budget` out to go on with the same, or "
            "begin with a new cache."
        )


def _check_scheduler(
    scheduler: ComputeScheduler | None,
    config: PreTrainedConfig,
    budgets: Mapping[str, TokenBudget],
    asked: Mapping[str, bool],
    learns: bool,
) -> None:
    for dial, is_asked in asked.items():
        given = f"`{dial}_budget` is {budgets[dial]!r}"
        if is_asked and scheduler is None:
            raise ValueError(
                f"{given}, and this model has no scheduler that could choose what runs. Name a rule, "
                f"{' or '.join(f'scheduler={rule!r}' for rule in UNIT_RULES)}, or train a scheduler."
            )
        if is_asked and dial not in scheduler.settings.dials:
            raise ValueError(
                f"{given}, and this model's scheduler chooses {' and '.join(scheduler.settings.dials)} only; leave "
                "it out, or name a rule, such as scheduler='even'."
            )
    if learns:
        config.untrained_scheduler = False
    elif config.untrained_scheduler:
        raise ValueError(
            "This model's scheduler has random weights and would choose at random. Train it, or name a rule, such as "
            "scheduler='even'. To measure it nevertheless set `model.config.untrained_scheduler = False`."
        )
