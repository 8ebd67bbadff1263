"""Where a training run's token budgets come from: random, and known from the position in the run alone.

A budget is a function of (seed, number) and not of a state that moves on, so that a run that is stopped and resumed
sees the budgets that it would have seen, however many batches a data loader had fetched ahead, in whatever process.
Samples are numbered over all processes, so a batch has the same budgets however many processes share it.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch.utils.data import get_worker_info


class BudgetStream:
    """
    Uniformly distributed token budgets.

    Args:
        budget_range: lowest and highest budget, as fractions in [0, 1].
        per: `"batch"` draws one budget for all samples of a batch, `"sample"` one for each.
        seed: of the draws.
        name: of the range, for messages.

    Raises:
        ValueError: if the range is empty or leaves [0, 1], or `per` is neither.
    """

    def __init__(
        self,
        budget_range: tuple[float, float] = (0.2, 1.0),
        per: Literal["batch", "sample"] = "batch",
        seed: int = 0,
        name: str = "budget_range",
    ) -> None:
        is_pair = isinstance(budget_range, list | tuple) and len(budget_range) == 2
        is_pair = is_pair and all(isinstance(end, int | float) and not isinstance(end, bool) for end in budget_range)
        if not is_pair or not 0.0 <= budget_range[0] <= budget_range[1] <= 1.0:
            raise ValueError(f"`{name}` is {budget_range!r}; allowed are two fractions 0 <= low <= high <= 1.")
        if per not in ("batch", "sample"):
            raise ValueError(f"`per` is {per!r}; allowed are 'batch' and 'sample'.")
        if type(seed) is not int:
            raise ValueError(f"`seed` is {seed!r}; allowed are whole numbers.")
        self.budget_range, self.per, self.seed = tuple(map(float, budget_range)), per, seed
        self._num_batches = self._num_samples = 0

    def numbered(self, numbers: Iterable[int], *more: int) -> torch.Tensor:
        """
        The budgets with these numbers, which count batches or samples, as `per` says; `[len(numbers)]` float32. `more`
        numbers tell streams of one seed apart.
        """
        low, high = self.budget_range
        # 24 bits are as many as float32 tells apart.
        fractions = [(mixed(self.seed, number, *more) >> 39) / 2**24 for number in numbers]
        return torch.tensor([low + (high - low) * fraction for fraction in fractions], dtype=torch.float32)

    def of_batch(self, batch: int, first_sample: int, batch_size: int, *more: int) -> torch.Tensor:
        """
        The budgets of one process's part of a batch, `[batch_size]` float32.

        Args:
            batch: number of the batch in the run; the same in all processes that share it.
            first_sample: number in the run of the part's first sample, counted over all processes.
            batch_size: samples in the part.
        """
        if self.per == "batch":
            return self.numbered([batch], *more).expand(batch_size).clone()
        return self.numbered(range(first_sample, first_sample + batch_size), *more)

    def next(self, batch_size: int) -> torch.Tensor:
        """
        The budgets of the next batch, `[batch_size]` float32, where nobody counts positions.

        Every worker of a data loader has a copy of its own that begins anew in each epoch. What tells these copies
        apart is the seed that torch gives each worker in each epoch, which follows from torch's own.
        """
        worker = get_worker_info()
        of_worker = () if worker is None else (worker.seed,)
        budgets = self.of_batch(self._num_batches, self._num_samples, batch_size, *of_worker)
        self._num_batches += 1
        self._num_samples += batch_size
        return budgets


def mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers; neighbours differ in about half of the bits (splitmix64's mixing)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
