"""What a training run can be told beside the arguments of `transformers.TrainingArguments`."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.parts import PARTS
from .data.budget_stream import BudgetStream

LOSSES: tuple[str, ...] = ("lm", "distillation", "relevance")


@dataclass
class AdaVTPTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with seven more.

    Args:
        train_parts (`list[str]`): which parts of the model train, of `"controller"` (with the budget token),
            `"scheduler"`, `"projector"`, `"vision"` and `"decoder"`; the others are frozen.
        depth_range, width_range (`list[float]`, *optional*): lowest and highest `depth_budget` and `width_budget`,
            fractions of which each sample of a training batch gets one; by default the configuration's for all.
        eval_budgets (`list[float]`): token budgets at which `evaluate` measures; each gives metrics of its own, such
            as `eval_loss_b0.2`, and `eval_loss` is their mean.
        loss_weights (`dict[str, float]`): what the training loss is a weighted sum of. `"lm"` is the language model's
            on the assistant's turns; `"distillation"` the divergence from what the same model predicts at full
            budget; `"relevance"` how badly the controller's scores tell which patches the full-budget model's answer
            depends on, which trains the controller alone. See `losses.py`. Each of the latter two costs a pass at full
            budget, and both are for data with one question in a prompt. Rows that have `patch_relevance` as a column
            need no pass for it, see [`BudgetCollator`].
        relevance_once (`bool`, *optional*, defaults to `False`): whether relevance is computed for every row of a
            `datasets.Dataset` before training, by the model as it is then. For several epochs; and for several
            controllers of one model, since it lies beside the rows where these lie on a disk.
        hub_license (`str`, *optional*): licence of what `push_to_hub` publishes, in the Hub's spelling, such as
            `"llama2"`; needed where that of the base model is not known.

    Raises:
        ValueError: if a part or a loss is not one of these, or none is named; if a weight is not above 0; if
            `"relevance"` alone is to train more than the controller, or is to be computed once and is no loss; if a
            range is empty or leaves [0, 1]; or if there is no budget to evaluate at, or one that is not allowed.
    """

    train_parts: list[str] = field(
        default_factory=lambda: ["controller", "projector", "decoder"],
        metadata={"help": f"Parts of the model that train: {', '.join(PARTS)}."},
    )
    depth_range: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest share of the decoder's layers that run in training."}
    )
    width_range: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest share of heads and MLP channels that run in training."}
    )
    eval_budgets: list[float] = field(
        default_factory=lambda: [1.0, 0.6, 0.4, 0.2], metadata={"help": "Token budgets that evaluation runs at."}
    )
    loss_weights: dict[str, float] | str = field(
        default_factory=lambda: {"lm": 1.0},
        metadata={"help": f"Weights of the losses that are added up, of {', '.join(LOSSES)}."},
    )
    relevance_once: bool = field(
        default=False, metadata={"help": "Compute the relevance of all rows before training, and keep it."}
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "Licence of what is pushed to the Hub, such as llama2."}
    )
    # The collator needs columns that forward does not know, `messages` above all.
    remove_unused_columns: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.train_parts) - set(PARTS)
        if unknown or not self.train_parts:
            raise ValueError(f"`train_parts` is {self.train_parts}; allowed are one or more of {list(PARTS)}.")
        if set(self.loss_weights) - set(LOSSES) or not self.loss_weights:
            raise ValueError(f"`loss_weights` is {self.loss_weights}; allowed are one or more of {list(LOSSES)}.")
        if not all(0 < weight < math.inf for weight in self.loss_weights.values()):
            raise ValueError(f"`loss_weights` is {self.loss_weights}; weights are above 0 and finite.")
        if set(self.loss_weights) == {"relevance"} and set(self.train_parts) != {"controller"}:
            raise ValueError(
                f"`loss_weights` is {self.loss_weights}, which trains the controller alone, and `train_parts` is "
                f"{self.train_parts}; use train_parts=['controller'], or add 'lm' or 'distillation'."
            )
        if self.relevance_once and "relevance" not in self.loss_weights:
            raise ValueError(
                f"`relevance_once` is True and `loss_weights` is {self.loss_weights}; it is for the loss 'relevance'."
            )
        self.dials()
        if not self.eval_budgets:
            raise ValueError("`eval_budgets` is empty; name at least one budget, such as 1.0.")
        for budget in self.eval_budgets:
            # Raises for a budget that is none, now and not after hours of training; the number of tokens is any.
            num_tokens_to_keep(budget, num_tokens=576, batch_size=1)

    def dials(self) -> dict[str, BudgetStream]:
        """The decoder's budgets that are drawn for every sample, by the argument that they are to a model."""
        ranges = {"depth_range": self.depth_range, "width_range": self.width_range}
        return {
            f"{name.removesuffix('range')}budget": BudgetStream(ends, "sample", self.seed, name)
            for name, ends in ranges.items()
            if ends is not None
        }
