"""What a controller can learn from besides the language model's loss: its own model at full budget.

A model that sees every token knows two things that help to choose few. What it answers: the pruned model should answer
the same (`"distillation"`). And which patches its answer came from: the controller's scores should say the same
before any question is answered (`"relevance"`). Both need no labels beside those of the language model's loss, and
both need prompts with one question each: only then is what matters for the answer what the question asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling.evaluation_mode import evaluating
from ..modeling.reducers.adaptive import VisionTokenController
from .data.chat_template import IGNORED
from .trained_parts import adavtp_model_of

FULL_BUDGET = 1.0


@contextmanager
def recorded_scores(controller: VisionTokenController) -> Iterator[list[torch.Tensor]]:
    """
    Notes what the controller's `scores` returns, `[num_images, num_patches]` per call, with its gradient.

    Selections carry what was chosen and not by which scores.
    """
    if hasattr(controller, "modules_to_save"):
        # PEFT's wrapper, told to train the whole controller, calls its own copy.
        controller = controller.modules_to_save[controller.active_adapters[0]]
    recorded = []
    scores_of = controller.scores

    def scores(*args: Any, **kwargs: Any) -> torch.Tensor:
        recorded.append(scores_of(*args, **kwargs))
        return recorded[-1]

    controller.scores = scores
    try:
        yield recorded
    finally:
        del controller.scores


def target_logits(outputs: Any) -> torch.Tensor:
    """
    The logits of the model's outputs that predict a target, `[num_targets, vocab_size]` float32. The same prompts give
    the same targets in the same order whatever the budget dropped between them.
    """
    return outputs.logits[:, :-1][outputs.labels[:, 1:] != IGNORED].float()


@torch.no_grad()
def full_budget_logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What an unwrapped model would predict for targets if it saw every visual token, `[num_targets, vocab_size]`."""
    with evaluating(model):
        return target_logits(model(**inputs | {"token_budget": FULL_BUDGET}))


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the pruned model's predictions from the full-budget model's,
    sum_v p_teacher(v) log(p_teacher(v) / p_student(v)).

    Args:
        student: logits `[num_targets, vocab_size]` of the model at its budget.
        teacher: logits of the same shape at full budget, without gradient.
        num_items_in_batch: what the sum over targets is divided by; by default their number here.
    """
    divergence = nn.functional.kl_div(
        student.log_softmax(dim=-1), teacher.log_softmax(dim=-1), reduction="sum", log_target=True
    )
    return divergence / (max(len(student), 1) if num_items_in_batch is None else num_items_in_batch)


def visual_relevance(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """
    How much the full-budget model's answer depends on each patch.

    The relevance of a patch is |g . (x - m)|: x is its projected feature, as the decoder gets it, m the mean of the
    image's, and g the gradient of the targets' log-probability with respect to x. This is gradient times input
    (Shrikumar et al., arXiv 1605.01713) with the mean as baseline, which is to first order the effect of replacing
    the patch by one that tells nothing apart. Against a baseline of zero it would be the effect of an input that
    decoders, which normalise what they read, never see.

    Args:
        model: an [`AdaVTPForConditionalGeneration`], not wrapped. Its parameters get no gradient.
        inputs: its arguments, with `labels` and `pixel_values`; their `token_budget` is put aside.

    Returns:
        `[num_images, num_patches]` float32, each row non-negative with sum 1, or all 0 where nothing matters.
    """
    visual = []

    def as_leaf(_: nn.Module, __: Any, projected: torch.Tensor) -> torch.Tensor:
        visual.append(projected.detach().requires_grad_())
        return visual[0]

    adavtp_model = adavtp_model_of(model)
    hook = adavtp_model.multi_modal_projector.register_forward_hook(as_leaf)
    try:
        with evaluating(model), torch.enable_grad():
            outputs = model(**inputs | {"token_budget": FULL_BUDGET})
            targets = outputs.labels[:, 1:][outputs.labels[:, 1:] != IGNORED]
            log_probability = -nn.functional.cross_entropy(target_logits(outputs), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(log_probability, visual)
    finally:
        hook.remove()
    first = int(adavtp_model.config.keep_cls)
    patches, gradient = visual[0].detach()[:, first:].float(), gradient[:, first:].float()
    relevance = (gradient * (patches - patches.mean(dim=1, keepdim=True))).sum(dim=-1).abs()
    return relevance / relevance.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(relevance.dtype).tiny)


def targets_per_image(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """How many targets the prompt has that shows each image, `[num_images]`."""
    of_prompt = (inputs["labels"] != IGNORED).sum(dim=-1)
    sample = adavtp_model_of(model).units_of(inputs["input_ids"], len(inputs["pixel_values"])).sample
    return of_prompt[sample.to(of_prompt.device)]


def relevance_loss(
    scores: torch.Tensor,
    relevance: torch.Tensor,
    num_targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Cross-entropy of the controller's distribution over an image's patches against their relevance,
    -sum_i r_i log softmax(s)_i. Scores are log-probabilities of being drawn, so the best scores are log r_i on average
    over all images that look alike to the controller.

    Args:
        scores: `[num_images, num_patches]`.
        relevance: the same shape, rows with sum 1.
        num_targets: `[num_images]`, the weight of each image: every target counts the same, as in the language model's
            loss.
        num_items_in_batch: what the weighted sum is divided by; by default the sum of weights.
    """
    per_image = -(relevance * scores.float().log_softmax(dim=-1)).sum(dim=-1)
    weight = num_targets.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return (num_targets * per_image).sum() / weight
