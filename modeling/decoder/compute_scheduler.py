"""The learned choice of what runs in the decoder: AdaLLaVA's scheduler (arXiv 2503.10905).

A compute token, made of the budgets, reads the prompt in the first layers. What it has become there says by one linear
layer which of the other layers, of their attention heads and of their groups of MLP channels are worth running. How
many is said by the budgets, exactly. Training draws them by Gumbel top-n and lets the gradient through; evaluation
takes the n best.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...configuration.scheduler_settings import SchedulerSettings
from ..budget.budget_embedding import BudgetEmbedding
from ..budget.selection import Selection
from ..budget.top_k import gumbel_noise, sample_top_k, top_k_mask
from ..budget.unit_budget import num_units_to_choose
from .execution_plan import ExecutionPlan

# What is told of a prompt's visual tokens, see `selection_statistics`.
NUM_STATISTICS = 3


@dataclass
class UnitCounts:
    """
    How much runs behind the prefix, each `[batch]` int64 on the CPU.

    Attributes:
        layers: layers.
        heads: sets of heads that share keys and values, over all those layers; where blocks are chosen, blocks.
        mlp_groups: groups of MLP channels over all those layers.
    """

    layers: torch.Tensor
    heads: torch.Tensor
    mlp_groups: torch.Tensor


@dataclass
class UnitChoice:
    """
    What a scheduler chose.

    Attributes:
        plan: what runs.
        gates: of layers `[batch, num_layers]`, heads `[batch, num_layers, num_heads]` and groups of MLP channels
            `[batch, num_layers, num_groups]`: as in the plan, and carrying the gradient of the choice. `None` where
            nothing learns.
    """

    plan: ExecutionPlan
    gates: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


class ComputeScheduler(nn.Module):
    """
    Args:
        config: the model's, with `scheduler`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        text = config.get_text_config()
        self.settings = SchedulerSettings.of_config(config.scheduler, text)
        hidden_size, self.num_layers = text.hidden_size, text.num_hidden_layers
        self.num_heads, self.num_sets = text.num_attention_heads, text.num_key_value_heads
        self.num_chosen_from = self.num_layers - self.settings.num_prefix_layers
        self.budget_embeddings = nn.ModuleDict({dial: BudgetEmbedding(hidden_size) for dial in self.settings.dials})
        hears = self.settings.hears_selection
        self.selection_proj = nn.Linear(NUM_STATISTICS, hidden_size, bias=False) if hears else None
        self.logits = nn.ModuleDict()
        for dial in self.settings.dials:
            per_layer = 1 if dial == "depth" else self.heads_per_layer + self.settings.num_mlp_groups
            self.logits[dial] = _head(self.settings.head, hidden_size, self.num_chosen_from * per_layer)

    @property
    def learns(self) -> bool:
        """Whether the choice is drawn, with a gradient. A frozen scheduler chooses in training as in evaluation."""
        return self.training and any(parameter.requires_grad for parameter in self.parameters())

    @property
    def heads_per_layer(self) -> int:
        """What is chosen of a layer's heads, one by one: all of them in blocks, otherwise those that share keys."""
        return self.num_heads if self.settings.block_size else self.num_sets

    def counts(self, num_layers: torch.Tensor, shares: list[Fraction]) -> UnitCounts:
        """
        How much runs behind the prefix.

        Args:
            num_layers: `[batch]` int64, layers that run, see [`num_layers_to_run`].
            shares: of their units, see [`width_shares`].
        """
        prefix, size = self.settings.num_prefix_layers, self.settings.block_size
        units = (self.num_heads // size,) * 2 if size else (self.heads_per_layer, self.settings.num_mlp_groups)
        return UnitCounts(
            num_layers - prefix, *(num_units_to_choose(shares, num_layers, prefix, number) for number in units)
        )

    def token(self, counts: UnitCounts, statistics: torch.Tensor | None) -> torch.Tensor:
        """
        The compute token `[batch, 1, hidden_size]` as it enters the first layer.

        Args:
            counts: how much is to run. Of n units that could, k are told as k / (n + 1), as AdaLLaVA does.
            statistics: `[batch, NUM_STATISTICS]` of the visual tokens, or `None` if there are none.
        """
        size = self.settings.block_size
        per_layer = self.num_heads // size if size else self.heads_per_layer
        shares = {
            "depth": counts.layers / (self.num_chosen_from + 1),
            "width": counts.heads / (self.num_chosen_from * per_layer + 1),
        }
        weight = next(self.parameters())
        token = sum(embed(shares[dial].to(weight.device)) for dial, embed in self.budget_embeddings.items())
        if self.selection_proj is not None and statistics is not None:
            token = token + self.selection_proj(statistics.to(weight))
        return token[:, None]

    def forward(self, token: torch.Tensor, counts: UnitCounts) -> UnitChoice:
        """
        Args:
            token: `[batch, hidden_size]`, the compute token behind the prefix.
            counts: how much is to run.
        """
        learns, device, batch_size, size = self.learns, token.device, len(token), self.settings.block_size
        layers = layer_gates = torch.ones(batch_size, self.num_chosen_from, dtype=torch.bool, device=device)
        if "depth" in self.settings.dials:
            layers, layer_gates = self._best(self.logits["depth"](token), counts.layers, learns)
        wide = (batch_size, self.num_chosen_from, self.heads_per_layer)
        heads = head_gates = torch.ones(wide, dtype=torch.bool, device=device)
        groups = group_gates = torch.ones(*wide[:2], self.settings.num_mlp_groups, dtype=torch.bool, device=device)
        if "width" in self.settings.dials:
            logits = self.logits["width"](token).unflatten(-1, (self.num_chosen_from, -1)).float()
            of_heads, of_groups = logits.split([self.heads_per_layer, self.settings.num_mlp_groups], dim=-1)
            if size:
                chosen = choose_blocks(
                    of_heads, of_groups, layers, counts.heads, size, self.settings.temperature, learns
                )
                (heads, groups), (head_gates, group_gates) = chosen
            else:
                heads, head_gates = self._best_of_layers(of_heads, layers, counts.heads, learns)
                groups, group_gates = self._best_of_layers(of_groups, layers, counts.mlp_groups, learns)
        # Heads that share keys and values run together.
        repeats = self.num_heads // self.heads_per_layer
        heads, head_gates = heads.repeat_interleave(repeats, dim=-1), head_gates.repeat_interleave(repeats, dim=-1)
        plan = ExecutionPlan(*(self._behind_prefix(table).cpu() for table in (layers, heads, groups)))
        if not learns:
            return UnitChoice(plan, None)
        # A layer that was not chosen would have run whole, for all that the gradient of its gate says.
        gates = (layer_gates, *(torch.where(layers[..., None], table, 1.0) for table in (head_gates, group_gates)))
        return UnitChoice(plan, tuple(self._behind_prefix(table.float()) for table in gates))

    def _best(self, logits: torch.Tensor, counts: torch.Tensor, learns: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice `[batch, n]` of so many, and its gates."""
        keep, gates = sample_top_k(logits, counts.clamp(min=1).to(logits.device), self.settings.temperature, learns)
        some = (counts > 0).to(keep.device)[:, None]
        keep = keep & some
        return keep, keep if gates is None else gates * some

    def _best_of_layers(
        self, logits: torch.Tensor, layers: torch.Tensor, counts: torch.Tensor, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice `[batch, num_layers, n]` among the units of layers that run, and its gates."""
        flat = logits.masked_fill(~layers[..., None], torch.finfo(logits.dtype).min).flatten(1)
        return tuple(table.view_as(logits) for table in self._best(flat, counts, learns))

    def _behind_prefix(self, table: torch.Tensor) -> torch.Tensor:
        """`[batch, num_layers, ...]`: ones for the prefix in front."""
        size = (len(table), self.settings.num_prefix_layers, *table.shape[2:])
        return torch.cat([torch.ones(size, dtype=table.dtype, device=table.device), table], dim=1)


def _head(kind: str, hidden_size: int, num_logits: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(hidden_size, num_logits)
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, num_logits))


def choose_blocks(
    of_heads: torch.Tensor,
    of_groups: torch.Tensor,
    layers: torch.Tensor,
    num_blocks: torch.Tensor,
    block_size: int,
    temperature: float,
    learns: bool,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    AdaLLaVA-H's choice. One after another, so many blocks are drawn: first one among all heads and groups that are
    left, which only says the layer; then of that layer, by logits of their own, `block_size` heads and as many groups.

    Args:
        of_heads, of_groups: logits `[batch, num_layers, num_heads]` float32, and as many of groups.
        layers: `[batch, num_layers]` bool, those that may be chosen from.
        num_blocks: `[batch]` int64.
        block_size: which divides `num_heads`.
        temperature: of the softmax that carries the gradient.
        learns: whether to draw, with gates, or to take the best.

    Returns:
        The choice of heads and of groups, bool; and their gates.
    """
    num_layers, left = of_heads.shape[1], [layers[..., None].expand_as(part) for part in (of_heads, of_groups)]
    gates = [torch.zeros_like(part) for part in left]
    for number in range(int(num_blocks.max())):
        active = (number < num_blocks).to(layers.device)[:, None]
        entries = torch.cat(_drawn((of_heads, of_groups), left, temperature, learns), dim=-1)
        soft_layer = entries.flatten(1).softmax(dim=-1).view_as(entries).sum(dim=-1)
        layer = entries.flatten(1).argmax(dim=-1) // entries.shape[-1]
        is_layer = (torch.arange(num_layers, device=layer.device) == layer[:, None]) & active
        layer_gate = is_layer + (soft_layer - soft_layer.detach()) * active
        for part, drawn in enumerate(_drawn((of_heads, of_groups), left, temperature, learns)):
            block = top_k_mask(drawn.detach().flatten(0, 1), block_size).view_as(drawn) & left[part]
            soft = drawn.softmax(dim=-1)
            gates[part] = gates[part] + layer_gate[..., None] * (block + (soft - soft.detach()))
            left[part] = left[part] & ~(is_layer[..., None] & block)
    chosen = tuple(part.detach() > 0.5 for part in gates)
    return chosen, tuple(gates) if learns else chosen


def _drawn(
    logits: tuple[torch.Tensor, ...], left: list[torch.Tensor], temperature: float, learns: bool
) -> list[torch.Tensor]:
    """Logits over the temperature, with noise where something learns, and as low as can be where nothing is left."""
    noisy = [part + gumbel_noise(part) if learns else part for part in logits]
    lowest = torch.finfo(torch.float32).min
    return [(part / temperature).masked_fill(~own, lowest) for part, own in zip(noisy, left, strict=True)]


def selection_statistics(selection: Selection, batch_size: int) -> torch.Tensor:
    """
    What became of the visual tokens of each prompt, `[batch, NUM_STATISTICS]` float32 on the CPU: the share that was
    kept; log(1 + number) / 10 of those; and the share of them behind which the next was kept, too, which is high where
    they lie together.

    Args:
        selection: of all images of the batch.
        batch_size: number of prompts.
    """
    keep, sample = selection.keep.cpu(), selection.sample
    num_keep = keep.sum(dim=-1)

    def of_prompts(of_images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(batch_size).index_add_(0, sample, of_images.float())

    kept, followed = of_prompts(num_keep), of_prompts((keep[:, 1:] & keep[:, :-1]).sum(dim=-1))
    share = kept / of_prompts(selection.sizes).clamp(min=1)
    return torch.stack([share, kept.log1p() / 10, followed / kept.clamp(min=1)], dim=-1)
