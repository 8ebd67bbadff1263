"""What a training run can be told beside the arguments of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..modeling.budget_adavtp import num_tokens_to_keep

TRAIN_PARTS: dict[str, tuple[str, ...]] = {
    "controller": ("model.budget_token.", "model.controller.", "model.reducers."),
    "projector": ("model.multi_modal_projector.",),
    "vision": ("model.vision_tower.",),
    "decoder": ("model.language_model.", "lm_head."),
}


@dataclass
class AdaVTPTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with two more.

    Args:
        train_parts (`list[str]`): which parts of the model train, of `"controller"` (with the budget token),
            `"projector"`, `"vision"` and `"decoder"`; the others are frozen.
        eval_budgets (`list[float]`): token budgets at which `evaluate` measures; each gives metrics of its own, such
            as `eval_loss_b0.2`, and `eval_loss` is their mean.

    Raises:
        ValueError: if a part is not one of these, or none is named; or if there is no budget to evaluate at, or one
            that is not allowed.
    """

    train_parts: list[str] = field(
        default_factory=lambda: ["controller", "projector", "decoder"],
        metadata={"help": f"Parts of the model that train: {', '.join(TRAIN_PARTS)}."},
    )
    eval_budgets: list[float] = field(
        default_factory=lambda: [1.0, 0.6, 0.4, 0.2], metadata={"help": "Token budgets that evaluation runs at."}
    )
    # The collator needs columns that forward does not know, `messages` above all.
    remove_unused_columns: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.train_parts) - set(TRAIN_PARTS)
        if unknown or not self.train_parts:
            raise ValueError(f"`train_parts` is {self.train_parts}; allowed are one or more of {list(TRAIN_PARTS)}.")
        if not self.eval_budgets:
            raise ValueError("`eval_budgets` is empty; name at least one budget, such as 1.0.")
        for budget in self.eval_budgets:
            # Raises for a budget that is none, now and not after hours of training; the number of tokens is any.
            num_tokens_to_keep(budget, num_tokens=576, batch_size=1)
