"""What decides inside the decoder: before each layer the loop asks one policy, and the policy answers with a decision.
Which layers, heads and channels run, its plan or its schedule says.

Where a policy may decide is known before the loop begins, and how many columns leave is known on the host, so that
deciding never waits for the device. A new dial is a new policy and, where it turns something new, a new field of
[`Decision`].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .compute_token import UnitSchedule
from .execution_plan import ExecutionPlan
from .plan import DecoderPlan
from .reducer import DecoderReducer, best_visual
from .rescaling import rescaling_bias
from .view import DecoderView, LayerView

_SCORES = "scores of the last cut"


@dataclass
class Decision:
    """
    What changes from one layer on.

    Attributes:
        keep_columns: `[batch, n]` bool, the columns that stay in the sequence. Padding never does.
        num_leaving: for each row, how many columns that are no padding leave.
        hidden_states: `[batch, n, hidden_size]`, changed where a column that stays stands for others too.
    """

    keep_columns: torch.Tensor
    num_leaving: list[int]
    hidden_states: torch.Tensor


class DecoderPolicy:
    """
    The contract. A policy belongs to one pass over a prompt.

    Attributes:
        name: of what decides, for messages.
        layers: the layers, 1 or above, before which there may be something to decide; the loop asks at no other.
        plan_of_units: which layers, heads and channels run, with a row for each prompt; `None` for all.
        schedule: the choice of these that is made while the prompt is read, or `None`.
    """

    name: str
    layers: frozenset[int]
    plan_of_units: ExecutionPlan | None = None
    schedule: UnitSchedule | None = None

    @property
    def leaves_out_units(self) -> bool:
        """Whether not all of the decoder may run."""
        return self.plan_of_units is not None or self.schedule is not None

    def bias(self, position_embeddings: tuple[torch.Tensor, torch.Tensor], index: torch.Tensor) -> torch.Tensor | None:
        """
        What is added to the logits of attention among the columns `[batch, n]` that are in the sequence, which stood
        at `index` in the prompt: `[batch, 1, n, n]`, or `None` for nothing.
        """
        return None

    def decide(self, layer: int, view: LayerView) -> Decision | None:
        """
        Args:
            layer: the layer that runs next.
            view: what is known before it.

        Returns:
            What changes, or `None` if nothing does.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define decide(layer, view).")

    def expand(self, expand_size: int) -> "DecoderPolicy":
        """The policy for a prompt in which every row is repeated."""
        expanded = self.expand_columns(expand_size)
        if self.plan_of_units is not None:
            expanded.plan_of_units = self.plan_of_units.expand(expand_size)
        if self.schedule is not None:
            expanded.schedule = self.schedule.expand(expand_size)
        return expanded

    def expand_columns(self, expand_size: int) -> "DecoderPolicy":
        """A new policy that decides the same on columns where every row is repeated."""
        raise NotImplementedError(f"{type(self).__name__} has to define expand_columns(expand_size).")


class NothingLeaves(DecoderPolicy):
    """
    For plans and schedules of units, and for an image in a later turn behind layers that hold different columns: all
    columns stay, and the loop reads them as a prompt, whose columns may see each other in both directions or get
    something added behind the first layers.
    """

    name, layers = "plan", frozenset()

    def expand_columns(self, expand_size: int) -> "NothingLeaves":
        """See [`DecoderPolicy.expand_columns`]."""
        return NothingLeaves()

    def depth_of_tokens(self, is_token: torch.Tensor, depth: torch.Tensor) -> None:
        """Every layer sees every token, which a selection says by `None`."""


class VisualTokenPolicy(DecoderPolicy):
    """
    Visual tokens leave as a plan says how many and a reducer says which.

    Args:
        name: of the reducer.
        reducer: what scores and chooses.
        plan: how many visual tokens each layer sees.
        wanted: of each row the mean number that the plan was made for, `None` for the reducer's own rule; for a
            reducer that decides at its first cut.
    """

    def __init__(
        self, name: str, reducer: DecoderReducer, plan: DecoderPlan, wanted: Sequence[int | None] = ()
    ) -> None:
        self.name, self.reducer, self.wanted = name, reducer, wanted
        num_layers = plan.counts.shape[1]
        self.cuts = [cut for cut in reducer.cuts(num_layers) if cut > 0]
        falls = self._follow(plan)
        if reducer.adapts and self.cuts:
            falls = range(self.cuts[0], num_layers)
        self.layers = frozenset(falls) | self._scored

    def _follow(self, plan: DecoderPlan) -> list[int]:
        """From here on tokens leave as a plan says; the layers before which some do."""
        self.plan, num_layers = plan, plan.counts.shape[1]
        falls = [layer for layer in range(1, num_layers) if bool((self._leaving(layer) > 0).any())]
        # Scores are for what leaves before the next cut, which makes its own.
        spans = pairwise([*self.cuts, num_layers])
        self._scored = {start for start, end in spans if any(start <= layer < end for layer in falls)}
        self._num_keep = plan.counts.to(plan.visual_index.device, non_blocking=True)
        return falls

    @classmethod
    def of_prompt(
        cls,
        name: str,
        reducer: DecoderReducer,
        visual_index: torch.Tensor,
        asks: torch.Tensor | None,
        num_keep: torch.Tensor | None,
        num_layers: int,
        always: bool = False,
        num_whole: torch.Tensor | None = None,
    ) -> "VisualTokenPolicy | None":
        """
        What a reducer does with the prompts of a batch.

        Args:
            name: of the reducer.
            reducer: which says how many leave where.
            visual_index: `[batch, columns]`, see [`DecoderPlan`].
            asks: `[batch, columns]` bool, what is no padding and stands before the answer; `None` where the attention
                mask is not `[batch, sequence]`.
            num_keep: `[batch]` int64, the mean number of visual tokens over layers; `None` for the reducer's own rule.
            num_layers: of the decoder.
            always: whether there is a policy even where nothing leaves, as in training, where every batch has to run
                the same modules.
            num_whole: see [`DecoderPlan`].

        Returns:
            The policy, or `None` if nothing leaves.

        Raises:
            ValueError: if the reducer cannot keep so few, or the attention mask is not `[batch, sequence]`.
        """
        num_visual = (visual_index >= 0).sum(dim=-1).tolist()
        wanted = [None] * len(num_visual) if num_keep is None else num_keep.tolist()
        counts = torch.tensor(
            [
                [visual] * num_layers if _keeps_all(visual, keep) else reducer.layer_counts(visual, keep, num_layers)
                for visual, keep in zip(num_visual, wanted, strict=True)
            ]
        )
        is_rescaled = num_whole is not None and num_whole.tolist() != num_visual
        if not always and not is_rescaled and bool((counts == counts[:, :1]).all()):
            return None
        if asks is None:
            raise ValueError(
                f"{name!r} acts inside the decoder, which needs an `attention_mask` of shape "
                "[batch, sequence] and no gates inside attention; use gradient_gates='features', or another reducer."
            )
        if num_whole is not None:
            num_whole = num_whole.to(visual_index.device)
        return cls(name, reducer, DecoderPlan(counts, visual_index, _last(asks), num_whole), wanted)

    def _leaving(self, layer: int) -> torch.Tensor:
        """`[batch]` int64 on the CPU, visual tokens that leave before a layer."""
        return self.plan.counts[:, layer - 1] - self.plan.counts[:, layer]

    def decide(self, layer: int, view: LayerView) -> Decision | None:
        """See [`DecoderPolicy.decide`]. At a cut the reducer scores anew; in between, the last scores decide."""
        seen = self._seen(view)
        if self.reducer.adapts and layer == self.cuts[0]:
            self._adapt(seen)
        num_leaving, num_keep = self._leaving(layer).tolist(), self._num_keep[:, layer]
        if layer in self._scored:
            with torch.no_grad():
                view.carried[_SCORES] = self.reducer.scores(seen, self.cuts.index(layer))
        if not any(num_leaving):
            return None
        if layer not in self._scored:
            keep = best_visual(seen.is_visual, view.carried[_SCORES], num_keep)
            return Decision(keep, num_leaving, view.hidden_states)
        keep, hidden_states = self.reducer.reduce(seen, view.carried[_SCORES], num_keep)
        return Decision(keep, num_leaving, hidden_states)

    def _adapt(self, seen: DecoderView) -> None:
        """Lets the reducer say how many leave where, now that it sees the prompts; the device is waited for."""
        num_visual, num_layers = self.plan.counts[:, 0].tolist(), self.plan.counts.shape[1]
        with torch.no_grad():
            adapted = self.reducer.adapted_counts(seen, num_visual, self.wanted, num_layers)
        pairs = zip(num_visual, self.wanted, strict=True)
        keeps_all = torch.tensor([_keeps_all(visual, keep) for visual, keep in pairs])
        counts = torch.where(keeps_all[:, None], self.plan.counts, torch.tensor(adapted))
        self._follow(replace(self.plan, counts=counts))

    def _seen(self, view: LayerView) -> DecoderView:
        # Where a prompt ends with an image, the column that asks may have left; the last before it asks then.
        may_ask = view.is_real & (view.index <= self.plan.last[:, None])
        return DecoderView(**vars(view), is_visual=self.plan.is_visual(view.index), last=_last(may_ask))

    def bias(self, position_embeddings: tuple[torch.Tensor, torch.Tensor], index: torch.Tensor) -> torch.Tensor | None:
        """See [`DecoderPolicy.bias`]."""
        if self.plan.num_whole is None:
            return None
        return rescaling_bias(position_embeddings, self.plan.is_visual(index), self.plan.num_whole)

    def depth_of_tokens(self, is_token: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """
        How many layers saw each visual token.

        Args:
            is_token: `[num_units, largest N]` bool, see [`Selection`].
            depth: `[batch, columns]` int64, how many layers saw each column of the prompt.

        Returns:
            `[num_units, largest N]` int64, 0 for tokens that did not enter the decoder.
        """
        visual_index, num_tokens = self.plan.visual_index, is_token.numel()
        # What is no visual token goes to one place more. Assisted decoding puts its candidates behind the prompt.
        place = torch.where(visual_index >= 0, visual_index, num_tokens).flatten()
        depth = depth[:, : visual_index.shape[1]].flatten()
        of_token = depth.new_zeros(num_tokens + 1).scatter(0, place, depth)
        return torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_token, of_token)

    def expand_columns(self, expand_size: int) -> "VisualTokenPolicy":
        """See [`DecoderPolicy.expand_columns`]."""
        wanted = [keep for keep in self.wanted for _ in range(expand_size)]
        return VisualTokenPolicy(self.name, self.reducer, self.plan.expand(expand_size), wanted)


def _keeps_all(num_visual: int, num_keep: int | None) -> bool:
    """Whether a prompt with so many visual tokens is to keep them all."""
    return num_visual == 0 or (num_keep is not None and num_keep >= num_visual)


def _last(marked: torch.Tensor) -> torch.Tensor:
    """The last marked column `[batch]` int64 of each row of `[batch, n]`; 0 where there is none."""
    column = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked, column, -1).amax(dim=-1).clamp(min=0)
