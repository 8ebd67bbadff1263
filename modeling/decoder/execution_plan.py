"""Which layers, attention heads and groups of MLP channels of the decoder run, prompt by prompt.

A plan is known on the host before the layers run that it is about, and stays the same from prefill to the last token:
what a layer did not write into the cache when it was left out, it could not read later.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ...configuration.scheduler_settings import usual_mlp_groups


@dataclass(frozen=True)
class UnitShares:
    """
    How much of each decoder layer runs: what a plan costs, whichever units it chose.

    Attributes:
        heads: for each layer the share of attention heads that run, in [0, 1]; a layer without any writes no keys.
        mlp: for each layer the share of MLP neurons that run, in [0, 1].
    """

    heads: tuple[float, ...]
    mlp: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.mlp) or not all(0 <= share <= 1 for share in (*self.heads, *self.mlp)):
            raise ValueError(f"`plan` is {self!r}; allowed are shares from 0 to 1, one of each kind for each layer.")


@dataclass(eq=False)
class ExecutionPlan:
    """
    What runs. Begin with [`ExecutionPlan.whole`] and take out what is to be left out:
    `plan.layers[:, 5] = False`, `plan.heads[0, 3, 2] = False`.

    What is left out acts as if it were not there: without a layer hidden states pass by it; without a head, or a group
    of MLP channels, its rows of the output projection get zeros. A row of the batch dimension belongs to a prompt; a
    plan of one row is every prompt's.

    Attributes:
        layers: `[batch, num_layers]` bool on the CPU. Layer 0 always runs: its cache counts the columns.
        heads: `[batch, num_layers, num_attention_heads]` bool on the CPU. Heads that share keys and values run
            together, because the keys are what a head costs in the cache.
        mlp_groups: `[batch, num_layers, num_groups]` bool on the CPU: groups of equally many channels that follow one
            another, between the MLP's projections.
    """

    layers: torch.Tensor
    heads: torch.Tensor
    mlp_groups: torch.Tensor

    @classmethod
    def whole(
        cls, config: PreTrainedConfig, batch_size: int = 1, num_mlp_groups: int | None = None
    ) -> "ExecutionPlan":
        """
        The plan by which everything runs.

        Args:
            config: the model's.
            batch_size: number of prompts; 1 for a plan that is every prompt's.
            num_mlp_groups: in how many groups the channels of an MLP are, see [`usual_mlp_groups`] for the default.
        """
        text = config.get_text_config()
        num_layers, num_heads = text.num_hidden_layers, text.num_attention_heads
        sizes = ((num_layers,), (num_layers, num_heads), (num_layers, num_mlp_groups or usual_mlp_groups(text)))
        return cls(*(torch.ones(batch_size, *size, dtype=torch.bool) for size in sizes))

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        """Whether another plan has the same tables."""
        if not isinstance(other, ExecutionPlan):
            return NotImplemented
        return all(
            torch.equal(own, of_other) for own, of_other in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    @property
    def runs(self) -> torch.Tensor:
        """`[batch, num_layers]` bool: of which layers anything runs."""
        return self.layers & (self.heads.any(dim=-1) | self.mlp_groups.any(dim=-1))

    @property
    def is_whole(self) -> bool:
        """Whether everything runs."""
        return bool(self.layers.all() and self.heads.all() and self.mlp_groups.all())

    def expand(self, repeats: int) -> "ExecutionPlan":
        """Repeats every row, for beams and for several sequences per prompt."""
        tables = (self.layers, self.heads, self.mlp_groups)
        return ExecutionPlan(*(table.repeat_interleave(repeats, dim=0) for table in tables))

    def of_batch(self, batch_size: int) -> "ExecutionPlan":
        """
        The plan with a row for each prompt.

        Raises:
            ValueError: if it has neither one row nor as many as there are prompts.
        """
        if len(self) not in (1, batch_size):
            raise ValueError(
                f"`plan` has {len(self)} rows for {batch_size} prompts; allowed are one for each, or one for all."
            )
        return self if len(self) == batch_size else self.expand(batch_size)

    def row(self, number: int) -> "ExecutionPlan":
        """The plan of one prompt."""
        return ExecutionPlan(self.layers[number, None], self.heads[number, None], self.mlp_groups[number, None])

    def shares(self, row: int) -> UnitShares:
        """What it costs a prompt."""
        runs = self.layers[row, :, None]
        heads, channels = ((runs & table[row]).double().mean(dim=-1) for table in (self.heads, self.mlp_groups))
        return UnitShares(tuple(heads.tolist()), tuple(channels.tolist()))

    def check(self, config: PreTrainedConfig) -> None:
        """
        Raises:
            ValueError: if the tables are not of this model, or leave out what cannot be left out.
        """
        text = config.get_text_config()
        num_layers, num_heads = text.num_hidden_layers, text.num_attention_heads
        num_shared = num_heads // text.num_key_value_heads
        for name, size in (("layers", ()), ("heads", (num_heads,)), ("mlp_groups", (None,))):
            table = getattr(self, name)
            expected = (len(self.layers), num_layers, *size)
            fits = table.dim() == len(expected) and all(
                wanted in (None, own) for own, wanted in zip(table.shape, expected, strict=True)
            )
            if table.dtype != torch.bool or table.device.type != "cpu" or not fits:
                shown = ", ".join("any" if wanted is None else str(wanted) for wanted in expected)
                raise ValueError(
                    f"`plan.{name}` is {table.dtype} {list(table.shape)} on {table.device.type!r}; this model has "
                    f"{num_layers} layers of {num_heads} heads, so allowed is torch.bool [{shown}] on 'cpu'."
                )
        num_groups = self.mlp_groups.shape[-1]
        if num_groups == 0 or text.intermediate_size % num_groups:
            raise ValueError(
                f"`plan.mlp_groups` has {num_groups} groups, and an MLP of this model {text.intermediate_size} "
                "channels; allowed are numbers of groups that divide it."
            )
        if not bool(self.runs[:, 0].all()) or not bool(self.heads[:, 0].any(dim=-1).all()):
            raise ValueError(
                "`plan` leaves out layer 0, or all of its heads; it has to run, because its cache counts the columns."
            )
        of_shared = self.heads.unflatten(-1, (-1, num_shared))
        if not torch.equal(of_shared.any(dim=-1), of_shared.all(dim=-1)):
            raise ValueError(
                f"`plan.heads` parts heads that share keys and values: of each {num_shared} that follow one another "
                "in this model all run or none does. Leaving one of them out would save none of the keys."
            )
