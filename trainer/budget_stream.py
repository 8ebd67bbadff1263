"""Where a training run's token budgets come from: random, and known from the position in the run alone.

A budget is a function of (seed, position) and not of a state that moves on, so that a run that is stopped and resumed
sees the budgets that it would have seen, however many batches a data loader had fetched ahead, in whatever process.
"""

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

    Raises:
        ValueError: if the range is empty or leaves [0, 1], or `per` is neither.
    """

    def __init__(
        self,
        budget_range: tuple[float, float] = (0.2, 1.0),
        per: Literal["batch", "sample"] = "batch",
        seed: int = 0,
    ) -> None:
        if len(budget_range) != 2 or not 0.0 <= budget_range[0] <= budget_range[1] <= 1.0:
            raise ValueError(f"`budget_range` is {budget_range!r}; allowed are two fractions 0 <= low <= high <= 1.")
        if per not in ("batch", "sample"):
            raise ValueError(f"`per` is {per!r}; allowed are 'batch' and 'sample'.")
        low, high = budget_range
        self.budget_range, self.per, self.seed = (float(low), float(high)), per, seed
        self._num_drawn = 0

    def at(self, position: tuple[int, ...], batch_size: int) -> torch.Tensor:
        """
        The budgets of the batch at a position.

        Args:
            position: what identifies the batch in the run, for example (step, micro-batch, process).
            batch_size: number of samples.

        Returns:
            `[batch]` float32.
        """
        generator = torch.Generator().manual_seed(_mixed(self.seed, *position))
        low, high = self.budget_range
        draw = torch.rand(1 if self.per == "batch" else batch_size, generator=generator)
        return (low + (high - low) * draw).expand(batch_size).clone()

    def next(self, batch_size: int) -> torch.Tensor:
        """
        The budgets of the next batch, `[batch]` float32, where nobody counts positions.

        Every worker of a data loader has a copy of its own that begins anew in each epoch. What tells these copies
        apart is the seed that torch gives each worker in each epoch, which follows from torch's own.
        """
        self._num_drawn += 1
        worker = get_worker_info()
        position = (self._num_drawn,) if worker is None else (self._num_drawn, worker.seed)
        return self.at(position, batch_size)


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, such that neighbours differ in about half of the bits (splitmix64's mixing)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
