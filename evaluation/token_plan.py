"""How many tokens are where, before anything is computed.

The model's own rules are asked: what a stack does one after another, how a budget is divided, how many visual tokens
each decoder layer sees. Reducers are built without weights. Where only the image can say how many tokens stay (a
method's own rule, a floor on the entropy), a [`Selection`] of what really happened takes the rule's place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration.configuration_adavtp import AdaVTPConfig, reducer_entries
from ..modeling.budget.schedule import BudgetOfUnits, BudgetSchedule, StackBudget
from ..modeling.budget.selection import Selection
from ..modeling.decoder.reducer import DecoderReducer
from ..modeling.reducers.aim import merged_count
from ..modeling.reducers.bank import ReducerSpec, Step, named, stack_steps
from ..modeling.reducers.base import ScoringReducer, TokenReducer, build_reducer


@dataclass(frozen=True)
class StepTokens:
    """
    One reducer before the decoder.

    Attributes:
        step: the reducer.
        entering, leaving: tokens of each image.
    """

    step: Step
    entering: tuple[int, ...]
    leaving: tuple[int, ...]


@dataclass(frozen=True)
class TokenPlan:
    """
    The tokens of some prompts' images on their way.

    Attributes:
        steps: the reducers before the decoder.
        sample: for each image the prompt that shows it.
        meets_budget: whether the budget takes part.
        decoder: the reducer inside the decoder and its name, if there is one and tokens leave there.
        layer_counts: for each prompt, the visual tokens that each decoder layer sees.
    """

    steps: tuple[StepTokens, ...]
    sample: tuple[int, ...]
    meets_budget: bool
    decoder: tuple[str, DecoderReducer] | None
    layer_counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Happened:
    """
    What a [`Selection`] says about numbers, in plain ones.

    Attributes:
        num_keep: of each image.
        layer_counts: of each image, the tokens that each decoder layer saw; `None` where none left inside it.
    """

    num_keep: tuple[int, ...]
    layer_counts: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of(cls, selection: Selection, num_layers: int) -> "Happened":
        """Tokens never come back, so layer l saw those whose depth is more than l."""
        num_keep = tuple(selection.num_keep.tolist())
        if selection.depth is None:
            return cls(num_keep, None)
        depth = selection.depth.cpu()
        ends = torch.stack([torch.bincount(row, minlength=num_layers + 1) for row in depth])
        seen = depth.shape[1] - ends.cumsum(dim=-1)[:, :num_layers]
        return cls(num_keep, tuple(map(tuple, seen.tolist())))


def weightless_steps(config: AdaVTPConfig, reducer: ReducerSpec | None) -> list[Step]:
    """
    What a stack does one after another, its modules on the meta device, where weights take no memory.

    Args:
        config: the model's.
        reducer: as in `set_reducer`; `None` stands for the configuration's.
    """
    modules = {}
    with torch.device("meta"):
        for entry in config.reducers if reducer is None else reducer_entries(reducer):
            name, given = named(entry)
            modules[name] = build_reducer(name, config, **given).eval()
            modules[name].parameters_given = given
    return stack_steps(modules)


def plan_tokens(
    config: AdaVTPConfig,
    steps: list[Step],
    token_budget: StackBudget | None,
    num_images: Sequence[int],
    happened: Happened | None = None,
) -> TokenPlan:
    """
    Works out how many tokens each step gets and leaves.

    Args:
        config: the model's.
        steps: from [`weightless_steps`].
        token_budget: see [`AdaVTPForConditionalGeneration.forward`].
        num_images: of each prompt.
        happened: what was kept, which then need not follow from the budget.

    Raises:
        ValueError: if the budget is not allowed or cannot be reached, or only the image can say how many stay.
    """
    sample = torch.tensor([prompt for prompt, images in enumerate(num_images) for _ in range(images)]).long()
    before = [step for step in steps if step.reducer.stage != "decoder"]
    decoder = steps[-1] if steps[-1].reducer.stage == "decoder" else None
    if happened is not None and len(happened.num_keep) != len(sample):
        raise ValueError(f"`selection` is of {len(happened.num_keep)} images, and the prompts show {len(sample)}.")
    budget = None
    if happened is None or (token_budget is not None and len(before) > 1):
        budget = _budget(config, steps, token_budget, sample, len(num_images))
    elif len(before) > 1:
        raise ValueError(
            "`selection` says what a stack left, and not what its first reducers did; pass the `token_budget` too."
        )
    entering, left = torch.full((len(sample),), config.num_patches), []
    for step in before:
        is_last = step is before[-1]
        wanted = None if budget is None else budget.of_step(step, entering)
        if happened is not None and is_last:
            leaving = torch.tensor(happened.num_keep).long()
        else:
            leaving = _leaving(step, entering, wanted, sample)
        left.append(StepTokens(step, tuple(entering.tolist()), tuple(leaving.tolist())))
        entering = leaving
    if happened is None and decoder is not None:
        mean = budget.of_step(decoder, entering)
        counts = _decoder_counts(config, decoder, entering, mean, sample, len(num_images))
    else:
        counts = _counts_without_rule(config, happened, entering, sample, len(num_images))
    leaves = any(min(row) < row[0] for row in counts)
    return TokenPlan(
        steps=tuple(left),
        sample=tuple(sample.tolist()),
        meets_budget=_meets_budget(config, left),
        decoder=(decoder.name, decoder.reducer) if decoder is not None and leaves else None,
        layer_counts=tuple(map(tuple, counts)),
    )


def _budget(
    config: AdaVTPConfig, steps: list[Step], token_budget: StackBudget | None, sample: torch.Tensor, batch_size: int
) -> BudgetOfUnits:
    """As [`AdaVTPModel.resolve_budget`]."""
    own_rule = len({step.name for step in steps}) == 1 and (steps[0].divides or steps[0].reducer).has_own_rule
    if token_budget is None and not own_rule:
        token_budget = config.token_budget
    schedule = BudgetSchedule(token_budget, steps, batch_size, config.text_config.num_hidden_layers)
    return schedule.of_units(sample, torch.full_like(sample, config.num_patches))


def _leaving(step: Step, entering: torch.Tensor, wanted: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
    """How many tokens a step leaves of each image `[num_images]`."""
    reducer = step.reducer
    if wanted is None and hasattr(reducer, "share"):
        return torch.tensor([merged_count(tokens, reducer.share) for tokens in entering.tolist()]).long()
    reason = _left_to_the_image(reducer, wanted, entering, sample)
    if reason is not None:
        raise ValueError(
            f"How many tokens {step.name!r} keeps is not known before it has run: {reason}. Pass a "
            "`token_budget`, or the `selection` of what it kept."
        )
    return wanted


def _left_to_the_image(
    reducer: TokenReducer, wanted: torch.Tensor | None, entering: torch.Tensor, sample: torch.Tensor
) -> str | None:
    if wanted is None:
        return "`token_budget` is None, and its own rule looks at the image"
    reduces = bool((wanted < entering).any())
    if reduces and isinstance(reducer, ScoringReducer) and reducer.config.min_token_entropy > 0:
        return f"`min_token_entropy` is {reducer.config.min_token_entropy}, which may add some"
    if reduces and reducer.redistributes and len(sample.unique()) < len(sample):
        return "it moves tokens between the images of a prompt"
    return None


def _counts_without_rule(
    config: AdaVTPConfig, happened: Happened | None, entering: torch.Tensor, sample: torch.Tensor, num_prompts: int
) -> list[list[int]]:
    """For each prompt the sum over its images of what each layer saw, or else of what went in."""
    num_layers = config.text_config.num_hidden_layers
    of_image = entering[:, None].expand(-1, num_layers)
    if happened is not None and happened.layer_counts is not None:
        of_image = torch.tensor(happened.layer_counts).view(-1, num_layers)
    return torch.zeros(num_prompts, num_layers, dtype=torch.long).index_add(0, sample, of_image).tolist()


def _decoder_counts(
    config: AdaVTPConfig,
    decoder: Step,
    entering: torch.Tensor,
    mean: torch.Tensor | None,
    sample: torch.Tensor,
    num_prompts: int,
) -> list[list[int]]:
    """As the model's own plan: the reducer is asked about each prompt's visual tokens together."""
    num_layers, none = config.text_config.num_hidden_layers, torch.zeros(num_prompts, dtype=torch.long)
    visual = none.index_add(0, sample, entering).tolist()
    keep = [None] * num_prompts if mean is None else none.index_add(0, sample, mean).tolist()
    return [
        [tokens] * num_layers
        if tokens == 0 or (number is not None and number >= tokens)
        else list(decoder.reducer.layer_counts(tokens, number, num_layers))
        for tokens, number in zip(visual, keep, strict=True)
    ]


def _meets_budget(config: AdaVTPConfig, left: list[StepTokens]) -> bool:
    """Whether a reducer hears the budget: always if the patches do, else only where something leaves up to it."""
    asking = next((tokens for tokens in left if "budget" in tokens.step.reducer.needs), None)
    if asking is None:
        return False
    patches_see_budget = config.budget_fusion == "encoder" and config.budget_attention == "mutual"
    return patches_see_budget or any(tokens < config.num_patches for tokens in asking.leaving)
