"""A budget as a vector, for whatever is to know of it."""

import math

import torch
from torch import nn


class BudgetEmbedding(nn.Module):
    """
    A budget as a vector of width `hidden_size`: a sine and a cosine of 2 * pi * b at each of the frequencies
    10000^(-i / num_frequencies), as in AdaLLaVA's latency encoding (arXiv 2503.10905), then an MLP.
    """

    def __init__(self, hidden_size: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear_1 = nn.Linear(2 * num_frequencies, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, budget: torch.Tensor) -> torch.Tensor:
        """Kept fractions K / N in [0, 1] `[batch]` -> `[batch, hidden_size]` in the dtype of the weights."""
        exponent = torch.arange(self.num_frequencies, device=budget.device, dtype=torch.float32) / self.num_frequencies
        angles = 2 * math.pi * budget.float()[:, None] * 10000.0**-exponent
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.linear_2(self.act(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))
