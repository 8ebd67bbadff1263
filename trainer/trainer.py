"""`transformers.Trainer` with a token budget in every batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from .training_arguments import TRAIN_PARTS, AdaVTPTrainingArguments


class AdaVTPTrainer(Trainer):
    """
    Trains the parts of an AdaVTP model that `args.train_parts` names, and evaluates it at `args.eval_budgets`.

    A training batch's budgets are drawn for its position in the run: step, micro-batch and process. A run that is
    interrupted and resumed therefore continues with the budgets, and ends with the weights, of one that never stopped.

    Args:
        model: an [`AdaVTPForConditionalGeneration`].
        args: [`AdaVTPTrainingArguments`].
        data_collator: a [`BudgetCollator`], or another collator with a [`BudgetStream`] as `budgets`.
        kwargs: see `transformers.Trainer`.

    Raises:
        ValueError: if `label_smoothing_factor` is set, for which `Trainer` would use labels that still have the
            columns of dropped tokens.
    """

    args: AdaVTPTrainingArguments

    def __init__(self, model: nn.Module, args: AdaVTPTrainingArguments, **kwargs: Any) -> None:
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}; only 0.0 is allowed, because Trainer "
                "smooths against labels from before tokens were dropped."
            )
        super().__init__(model=model, args=args, **kwargs)
        choose_trained_parts(model, args.train_parts)
        self._eval_budget: float | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """See `Trainer`. Sets each micro-batch's budgets to those of its position in the run."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        budgets = getattr(self.data_collator, "budgets", None)
        if budgets is not None:
            for micro_batch, batch in enumerate(batches):
                position = (self.state.global_step, micro_batch, self.args.process_index)
                batch["token_budget"] = budgets.at(position, len(batch["input_ids"]))
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self._eval_budget is not None:
            inputs = inputs | {"token_budget": self._eval_budget}
        return super()._prepare_inputs(inputs)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates at every budget of `args.eval_budgets`.

        Returns:
            The metrics of `Trainer.evaluate`, each under its name and the budget (`eval_loss_b0.2`), and their mean
            over budgets under the name alone (`eval_loss`).
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        by_budget = {}
        for budget in self.args.eval_budgets:
            self._eval_budget = budget
            try:
                by_budget[budget] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            finally:
                self._eval_budget = None
        metrics = {_at_budget(key, budget): value for budget, of in by_budget.items() for key, value in of.items()}
        for key in next(iter(by_budget.values())):
            metrics[key] = sum(of[key] for of in by_budget.values()) / len(by_budget)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer`. What is logged while a budget is evaluated carries the budget in its name."""
        if self._eval_budget is not None:
            logs = {_at_budget(key, self._eval_budget): value for key, value in logs.items()}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See `Trainer`. The labels it returns are the model's, which line up with the logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = None if outputs.loss is None else outputs.loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        labels = None if outputs.labels is None else outputs.labels.detach()
        return loss, outputs.logits.detach(), labels


def _at_budget(metric: str, budget: float) -> str:
    return f"{metric}_b{budget}"


def choose_trained_parts(model: nn.Module, train_parts: list[str]) -> None:
    """
    Lets the named parts of a model train and freezes the rest.

    Of the vision tower only what runs can train: layers above the feature layer and the final norm never get a
    gradient, and distributed training would wait for one.

    Args:
        model: an [`AdaVTPForConditionalGeneration`].
        train_parts: names from `TRAIN_PARTS`.
    """
    never_run = _never_run(model)
    prefixes = tuple(prefix for part in train_parts for prefix in TRAIN_PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) and not name.startswith(never_run))


def _never_run(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the vision tower's parameters that no forward uses."""
    feature_layers = model.config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    num_layers = model.config.vision_config.num_hidden_layers
    num_run = max(layer if layer >= 0 else num_layers + 1 + layer for layer in feature_layers)
    tower = "model.vision_tower."
    after_the_layers = (f"{tower}post_layernorm.", f"{tower}layernorm.", f"{tower}head.")
    above = [f"{tower}encoder.{name}.{index}." for name in ("layers", "layer") for index in range(num_run, num_layers)]
    return (*after_the_layers, *above)
