"""What a token budget is: from what a caller writes to the number of visual tokens that are kept.

A budget is said in two ways. A float b in [0, 1] is a fraction of an image's N visual tokens and keeps
K = max(1, floor(b * N)) of them; an int K >= 2 is a number of tokens, and a K of N or more keeps all. K is computed
once, exactly, and travels as int64: a float product is off by one (0.29 * 100 = 28.999...), a bfloat16 one more so.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch

TokenBudget = float | int | Sequence[float] | Sequence[int] | torch.Tensor
# Of each dial, what a float is a fraction of, and what an int counts.
_COUNTED = {
    "token_budget": ("visual tokens that are kept", "tokens"),
    "depth_budget": ("the decoder's layers that run", "layers"),
    "compute_budget": ("what the full model computes when it reads the prompt", "nothing"),
    "width_budget": ("attention heads and MLP channels that run in a layer", "attention heads"),
}


@lru_cache
def _shortest_decimal(value: float, dtype: torch.dtype) -> Fraction:
    """The number as it was written: the shortest decimal that `dtype` rounds to `value` (0.6 for bfloat16 0.6016)."""
    for digits in range(1, 18):
        decimal = f"{value:.{digits}g}"
        if torch.tensor(float(decimal), dtype=dtype).item() == value:
            return Fraction(decimal)
    return Fraction(value)


def _num_keep_of_ratio(ratio: float, num_tokens: int, dtype: torch.dtype) -> int:
    return max(1, math.floor(fraction_as_written(ratio, dtype) * num_tokens))


def fraction_as_written(ratio: float, dtype: torch.dtype, name: str = "token_budget") -> Fraction:
    """
    A ratio that came in `dtype`, as the number that its caller wrote.

    Raises:
        ValueError: if it is NaN or outside [0, 1].
    """
    if math.isnan(ratio) or not 0.0 <= ratio <= 1.0:
        whole, counted = _COUNTED[name]
        raise ValueError(
            f"`{name}` has the value {ratio}; as a float it is the fraction of {whole}, from 0.0 to 1.0. For a number "
            f"of {counted} pass an int >= 2."
        )
    return _shortest_decimal(ratio, dtype)


def require_count(count: int, name: str = "token_budget") -> int:
    """
    A number of units as it is.

    Raises:
        ValueError: if it is below 2.
    """
    if count < 2:
        counted, fewest = _COUNTED[name][1], "one" if name == "token_budget" else "as few as can be"
        hint = f" The int 1 could mean one or everything: write 1.0 for all {counted}, 0.0 for {fewest}."
        raise ValueError(
            f"`{name}` has the value {count}; as an int it is a number of {counted}, 2 or more.{hint * (count == 1)}"
        )
    return count


def budget_values(token_budget: TokenBudget, batch_size: int, name: str = "token_budget") -> torch.Tensor:
    """
    A budget, or a list, tuple or 1-D tensor of one per sample, as `[batch]` values on the CPU: ratios in the dtype
    that they came in (float64 for Python floats), or int64 counts. `name` is the dial's, for messages.

    Raises:
        ValueError: for another type, booleans, a mixture of ratios and counts, or another number of values.
    """
    if isinstance(token_budget, torch.Tensor):
        if token_budget.is_meta or token_budget.layout is not torch.strided:
            kind = "on the meta device" if token_budget.is_meta else f"of layout {token_budget.layout}"
            raise ValueError(f"`{name}` is a tensor {kind}; expected is a dense one that has its values.")
        values = token_budget.detach().cpu()
    else:
        is_list = isinstance(token_budget, Sequence) and not isinstance(token_budget, str | bytes | bytearray)
        if is_list and len({type(value) for value in token_budget}) > 1:
            raise ValueError(f"`{name}` is {token_budget!r}; its values must be all floats or all ints.")
        first = next(iter(token_budget), None) if is_list else token_budget
        if isinstance(first, bool) or not isinstance(first, int | float):
            raise ValueError(
                f"`{name}` is {token_budget!r}; allowed are a float in [0, 1], an int >= 2, or a list, tuple or "
                "tensor of these with one value per sample."
            )
        try:
            values = torch.tensor(token_budget, dtype=torch.float64 if isinstance(first, float) else torch.int64)
        except (OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"`{name}` is {token_budget!r}; a number of {_COUNTED[name][1]} has to fit into 64 bits."
            ) from error
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"`{name}` is a tensor of {values.dtype}; floats in [0, 1] or ints >= 2 are allowed.")
    if values.dim() == 0:
        values = values.expand(batch_size)
    if values.dim() != 1 or len(values) != batch_size:
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)} for a batch of {batch_size}; pass one value, or one per sample."
        )
    return values if values.is_floating_point() else values.long()


def num_tokens_to_keep(token_budget: TokenBudget, num_tokens: int | torch.Tensor, batch_size: int) -> torch.Tensor:
    """
    Number of visual tokens K that a budget keeps of units with `num_tokens` of them.

    Args:
        token_budget: float in [0, 1] (a fraction), int >= 2 (a count), or one of these per sample.
        num_tokens: visual tokens before reduction, N; of all, or `[batch]` int64, of each.
        batch_size: number of samples.

    Returns:
        `torch.LongTensor` `[batch]`, values in [1, num_tokens], on the CPU.

    Raises:
        ValueError: for NaN, a float outside [0, 1], an int below 2, a boolean, a string, or a wrong number of values;
            the message names the value and what is allowed.
    """
    values = budget_values(token_budget, batch_size)
    sizes = num_tokens.tolist() if isinstance(num_tokens, torch.Tensor) else [num_tokens] * batch_size
    pairs = zip(values.tolist(), sizes, strict=True)
    if values.is_floating_point():
        keep = [_num_keep_of_ratio(value, size, values.dtype) for value, size in pairs]
    else:
        keep = [min(require_count(value), size) for value, size in pairs]
    return torch.tensor(keep, dtype=torch.int64)


def shared_by_units(
    total: torch.Tensor, sample: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Shares the tokens of each prompt among its units by Webster's method: unit i's j-th token has priority
    w_i / (j - 1/2), and every unit gets its first token before any gets a second. With a larger total no unit gets
    fewer.

    Args:
        total: `[batch]` int64, at most so many visual tokens of each prompt.
        sample: `[num_units]` int64, the prompt of each unit.
        sizes: `[num_units]` int64, visual tokens of each unit, N.
        weights: `[num_units]` float64, 0 or more; by default N.

    Returns:
        `[num_units]` int64, in [1, N].

    Raises:
        ValueError: if a prompt has more units than tokens.
    """
    counts, weights = torch.ones_like(sizes), sizes if weights is None else weights
    for prompt in sample.unique().tolist():
        units = (sample == prompt).nonzero()[:, 0]
        if len(units) > int(total[prompt]):
            raise ValueError(
                f"`token_budget` is {int(total[prompt])} tokens for a whole prompt, and prompt {prompt} shows "
                f"{len(units)} images; each needs one token or more."
            )
        counts[units] = shared_by_weight(int(total[prompt]), weights[units], sizes[units])
    return counts


def shared_by_weight(total: int, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """
    Shares as [`shared_by_units`] does. With fewer tokens than parts, those with the largest weights get one each.

    Args:
        total: tokens to share, 1 or more; those beyond the sum of all sizes are left.
        weights: `[num_parts]`, 0 or more.
        sizes: `[num_parts]`, the most that each can get, 1 or more.

    Returns:
        `[num_parts]` int64 on the CPU, in [0, size], in [1, size] where there are enough.
    """
    weights, sizes = weights.double().cpu(), sizes.long().cpu()
    slot = torch.arange(1, int(sizes.max()) + 1)
    priority = weights[:, None] / (slot - 0.5)
    # Every first token before any second.
    priority[:, 0] += 1 + 2 * weights.max()
    priority = priority.masked_fill(slot > sizes[:, None], -1.0).flatten()
    best = priority.sort(descending=True, stable=True).indices[: min(total, int(sizes.sum()))]
    return torch.bincount(best // len(slot), minlength=len(sizes))
