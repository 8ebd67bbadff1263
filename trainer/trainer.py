"""`transformers.Trainer` with a token budget in every batch."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import speed_metrics

from .adapter_folders import save_beside_adapter
from .data.collator import RELEVANCE
from .hub_push import HubPushMixin
from .losses import (
    Relevance,
    controller_in_use,
    distillation_loss,
    full_budget_logits,
    recorded_scores,
    relevance_loss,
    scores_of_images,
    target_logits,
    visual_relevance,
)
from .noted_relevance import with_relevance
from .sharded_models import layer_classes, require_same_modules
from .streamed_training import StreamedTraining
from .trained_parts import adavtp_model_of, choose_trained_parts
from .training_arguments import AdaVTPTrainingArguments
from .whole_checkpoints import WholeCheckpointsMixin

# What tells the draws of one dial from those of another.
_APART: dict[str, tuple[int, ...]] = {"token_budget": (), "depth_budget": (1,), "width_budget": (2,)}


class AdaVTPTrainer(WholeCheckpointsMixin, HubPushMixin, StreamedTraining):
    """
    Trains the parts of an AdaVTP model that `args.train_parts` names, and evaluates it at `args.eval_budgets`.
    `predict` runs at the configuration's budget.

    A training batch's budgets are drawn for its position in the run: the number of the batch, or of each sample over
    all processes. A run that is interrupted and resumed therefore continues with the budgets, and ends with the
    weights, of one that never stopped. The samples of a [`ConversationStream`] bring their budgets with them.

    Args:
        model: an [`AdaVTPForConditionalGeneration`] of any family.
        args: [`AdaVTPTrainingArguments`].
        data_collator: a [`BudgetCollator`], or another collator with a [`BudgetStream`] as `budgets`.
        kwargs: see `transformers.Trainer` and [`StreamedTraining`].

    Raises:
        ValueError: if `label_smoothing_factor` is set, for which `Trainer` would use labels that still have the
            columns of dropped tokens; or if `loss_weights` has `"relevance"` for a model whose reducer has no scores.
    """

    args: AdaVTPTrainingArguments

    def __init__(self, model: nn.Module, args: AdaVTPTrainingArguments, **kwargs: Any) -> None:
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}; only 0.0 is allowed, because Trainer "
                "smooths against labels from before tokens were dropped."
            )
        reducer = adavtp_model_of(model).config.reducer
        if "relevance" in args.loss_weights and reducer != "adaptive":
            raise ValueError(
                f"`loss_weights` is {args.loss_weights} and the model's reducer is {reducer!r}; 'relevance' is what "
                "the controller's scores learn, so it needs the reducer 'adaptive'."
            )
        super().__init__(model=model, args=args, **kwargs)
        choose_trained_parts(model, args.train_parts)
        self._eval_budget: float | None = None
        self._prepare_for_sharding(model)
        if args.relevance_once and self.train_dataset is not None:
            # One process computes what the others then find on the disk.
            with args.main_process_first(desc="noting relevance"):
                self.train_dataset = with_relevance(self.train_dataset, model, self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """See `Trainer`. Sets each micro-batch's budgets to those of its position in the run, of which the controller
        hears too."""
        controller_in_use(self.model).training_progress = self.state.global_step / max(self.state.max_steps, 1)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        drawn = self.args.dials()
        budgets = getattr(self.data_collator, "budgets", None)
        if budgets is not None and self.stream_progress is None:
            drawn["token_budget"] = budgets
        first_batch = self.state.global_step * self.args.gradient_accumulation_steps
        for number, batch in enumerate(batches, start=first_batch):
            first_sample = (number * self.args.world_size + self.args.process_index) * self._train_batch_size
            place = (number, first_sample, len(batch["input_ids"]))
            for dial, stream in drawn.items():
                # Of one seed, and none of them follows from another.
                batch[dial] = stream.of_batch(*place, *_APART[dial])
        return batches, num_items

    def _prepare_for_sharding(self, model: nn.Module) -> None:
        """Where parameters are spread over processes, says which layers are units, and that all run on all of them."""
        inner, state = adavtp_model_of(model), self.accelerator.state
        is_zero3 = self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
        inner.is_sharded = self.is_fsdp_enabled or is_zero3
        if inner.is_sharded and set(self.args.loss_weights) != {"lm"}:
            raise ValueError(
                f"`loss_weights` is {self.args.loss_weights}; 'distillation' and 'relevance' run the model once more "
                "for batches with images, which processes that share its parameters (FSDP, ZeRO-3) cannot. Use DDP or "
                "ZeRO-2."
            )
        if inner.is_sharded:
            require_same_modules(inner, self.is_fsdp_enabled)
        if self.is_fsdp_enabled and state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(inner)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """See `Trainer`. Budgets become plain numbers: sharded models get every tensor in bfloat16, where 0.4 is
        0.4004, and another number of tokens."""
        is_cast = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for dial in _APART if is_cast else ():
            budget = inputs.get(dial)
            if isinstance(budget, torch.Tensor) and budget.dtype == torch.float32:
                # The shortest decimals that stand for these float32: 0.7, and not 0.699999988.
                inputs = inputs | {dial: [float(str(value)) for value in budget.cpu().numpy()]}
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """See `Trainer`. The loss is the sum that `args.loss_weights` says."""
        noted = inputs.pop(RELEVANCE, None)
        if self.args.loss_weights == {"lm": 1.0}:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def model_with_weighted_loss(**inputs: Any) -> Any:
            return self._with_weighted_loss(model, inputs, noted)

        # In the model's place, so that Trainer scales the sum as it scales the model's own loss: for the number of
        # processes and of micro-batches, in whichever way its version does.
        return super().compute_loss(model_with_weighted_loss, inputs, return_outputs, num_items_in_batch)

    def _with_weighted_loss(
        self, model: nn.Module, inputs: dict[str, Any], noted: dict[str, torch.Tensor] | None
    ) -> Any:
        """The model's outputs, with the weighted sum of losses as their loss; `noted` is relevance that rows had."""
        weights = self.args.loss_weights
        inner = self.accelerator.unwrap_model(model)
        with recorded_scores(controller_in_use(inner)) as scores:
            outputs = model(**inputs)
        # A prompt without an image has nothing to choose. The zero keeps the loss a function of what trains.
        losses = {"lm": outputs.loss} | dict.fromkeys(("distillation", "relevance"), 0.0 * outputs.loss)
        if adavtp_model_of(inner).images_in(dict(inputs)) is not None:
            num_items = inputs.get("num_items_in_batch")
            if "distillation" in weights:
                teacher = full_budget_logits(inner, inputs)
                losses["distillation"] = distillation_loss(target_logits(outputs), teacher, num_items)
            if "relevance" in weights:
                relevance = visual_relevance(inner, inputs) if noted is None else Relevance(**noted)
                losses["relevance"] = relevance_loss(scores_of_images(scores), *relevance, num_items)
        outputs["loss"] = sum(weight * losses[name] for name, weight in weights.items())
        return outputs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """See `Trainer`. Beside an adapter it saves what the adapted model has and its base may not."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and hasattr(model, "get_base_model"):
            save_beside_adapter(model, output_dir or self.args.output_dir)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates at every budget of `args.eval_budgets`.

        Callbacks see one evaluation with all its metrics, not one per budget: early stopping counts them.

        Returns:
            The metrics of `Trainer.evaluate`, each under its name and the budget (`eval_loss_b0.2`), and those that
            are numbers also under the name alone (`eval_loss`), as their mean over budgets.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict):
            metrics = {}
            for name, dataset in datasets.items():
                # Of the trainer's own data sets Trainer wants the name, by which it keeps their data loaders.
                dataset = name if eval_dataset is None else dataset
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        self._memory_tracker.start()
        dataloader = self.get_eval_dataloader(eval_dataset)
        budgets = self.args.eval_budgets
        by_budget = [self._metrics_at(budget, dataloader, ignore_keys, metric_key_prefix) for budget in budgets]
        metrics = {
            f"{name}_b{budget}": value
            for budget, of_budget in zip(budgets, by_budget, strict=True)
            for name, value in of_budget.items()
        }
        for name, value in by_budget[0].items():
            if isinstance(value, int | float):
                metrics[name] = sum(of_budget[name] for of_budget in by_budget) / len(by_budget)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _metrics_at(
        self, budget: float, dataloader: DataLoader, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, Any]:
        start_time = time.time()
        self._eval_budget = budget
        try:
            output = self.evaluation_loop(
                dataloader,
                description=f"Evaluation at budget {budget}",
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self._eval_budget = None
        return output.metrics | speed_metrics(metric_key_prefix, start_time, num_samples=output.num_samples)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See `Trainer`. The labels it returns are the model's, which line up with the logits."""
        # The collator's budget is drawn for training. `None`, in `predict`, stands for the configuration's.
        inputs = self._prepare_inputs(inputs | {"token_budget": self._eval_budget})
        inputs.pop(RELEVANCE, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = None if outputs.loss is None else outputs.loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        labels = None if outputs.labels is None else outputs.labels.detach()
        return loss, outputs.logits.detach(), labels
