"""What a controller can learn from besides the language model's loss: its own model at full budget.

A model that sees every token knows two things that help to choose few. What it answers: the pruned model should answer
the same (`"distillation"`). And which patches its answer came from: the controller's scores should say the same
before any question is answered (`"relevance"`). Both need no labels beside those of the language model's loss, and
both need prompts with one question each: only then is what matters for the answer what the question asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modeling.evaluation_mode import evaluating
from ..modeling.prompt import PreparedInputs
from ..modeling.prompt_reduction import PromptReductionMixin
from ..modeling.reducers.adaptive import VisionTokenController
from ..modeling.vision.features import VisionFeatures
from .data.chat_template import IGNORED
from .trained_parts import adavtp_model_of

FULL_BUDGET = 1.0
# On every dial.
FULL_BUDGETS = dict.fromkeys(("token_budget", "depth_budget", "width_budget"), FULL_BUDGET)


def controller_in_use(model: nn.Module) -> VisionTokenController:
    """The controller that an AdaVTP model calls, whatever wraps it: PEFT, told to train all of it, calls a copy."""
    controller = adavtp_model_of(model).controller
    if hasattr(controller, "modules_to_save"):
        return controller.modules_to_save[controller.active_adapters[0]]
    return controller


@contextmanager
def recorded_scores(controller: VisionTokenController) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """
    Notes of each call of the controller's `scores` which images of the batch it is for, `[num_images]`, and what it
    returns, `[num_images, num_patches]`, with its gradient. Images that differ in size have calls of their own.

    Selections carry what was chosen and not by which scores.
    """
    recorded = []
    scores_of = controller.scores

    def scores(features: VisionFeatures) -> torch.Tensor:
        recorded.append((features.unit, scores_of(features)))
        return recorded[-1][1]

    controller.scores = scores
    try:
        yield recorded
    finally:
        del controller.scores


def scores_of_images(recorded: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """
    Recorded scores in the order of images, `[num_images, largest N]` float32; behind the last patch of a smaller image
    as low as a number can be.
    """
    widest, lowest = max(scores.shape[1] for _, scores in recorded), torch.finfo(torch.float32).min
    rows = [nn.functional.pad(own.float(), (0, widest - own.shape[1]), value=lowest) for _, own in recorded]
    return torch.cat(rows)[torch.cat([unit for unit, _ in recorded]).argsort()]


def target_logits(outputs: Any) -> torch.Tensor:
    """
    The logits of the model's outputs that predict a target, `[num_targets, vocab_size]` float32. The same prompts give
    the same targets in the same order whatever the budget dropped between them.
    """
    return outputs.logits[:, :-1][outputs.labels[:, 1:] != IGNORED].float()


@torch.no_grad()
def full_budget_logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What an unwrapped model would predict for targets if it saw and ran everything, `[num_targets, vocab_size]`."""
    with evaluating(model):
        return target_logits(model(**inputs | FULL_BUDGETS))


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


class Relevance(NamedTuple):
    """
    Attributes:
        of_patches: `[num_images, largest N]` float32, each row non-negative with sum 1, or all 0 where nothing
            matters; 0 behind the last patch of a smaller image.
        num_targets: `[num_images]`, targets of the prompt that shows each image.
    """

    of_patches: torch.Tensor
    num_targets: torch.Tensor


def visual_relevance(model: nn.Module, inputs: dict[str, Any]) -> Relevance:
    """
    How much the full-budget model's answer depends on each patch.

    The relevance of a patch is (g . (x - m))^2: x is its projected feature, as the decoder gets it, m the mean of the
    image's, and g the gradient of the targets' log-probability with respect to x. This is gradient times input
    (Shrikumar et al., arXiv 1605.01713) with the mean as baseline, which is to first order the effect of replacing
    the patch by one that tells nothing apart. Squared, because hundreds of patches that hardly matter would together
    have most of a sum of sizes. Against a baseline of zero it would be the effect of an input that
    decoders, which normalise what they read, never see.

    Args:
        model: an [`AdaVTPForConditionalGeneration`] of any family, not wrapped. Its parameters get no gradient.
        inputs: its arguments, with `labels` and images; their budgets are put aside.
    """
    inner = adavtp_model_of(model)
    with evaluating(model), torch.enable_grad(), _features_as_leaf(inner) as prepared:
        outputs = model(**inputs | FULL_BUDGETS)
        targets = outputs.labels[:, 1:][outputs.labels[:, 1:] != IGNORED]
        log_probability = -nn.functional.cross_entropy(target_logits(outputs), targets, reduction="sum")
        (of_prompt,) = prepared
        features = of_prompt.visual.features
        (gradient,) = torch.autograd.grad(log_probability, features)
    # Which visual token stands at each placeholder; -1 for one that is none, such as CLS.
    columns = inner.family.placeholders(inner.config, of_prompt.prompt.input_ids)
    token = of_prompt.prompt.visual_index[columns]
    order = token.argsort()[(token < 0).sum() :]
    is_token, sizes = of_prompt.selection.is_token, of_prompt.selection.sizes

    def by_image(at_placeholders: torch.Tensor) -> torch.Tensor:
        rows = at_placeholders.new_zeros(*is_token.shape, at_placeholders.shape[-1])
        return rows.masked_scatter(is_token[..., None], at_placeholders[order])

    patches, gradient = by_image(features.detach().float()), by_image(gradient.float())
    mean = patches.sum(dim=1, keepdim=True) / sizes.to(patches.device)[:, None, None]
    relevance = (gradient * (patches - mean)).sum(dim=-1).square()
    first = order[(sizes.cumsum(0) - sizes).to(order.device)]
    return Relevance(
        relevance / relevance.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(relevance.dtype).tiny),
        (outputs.labels != IGNORED).sum(dim=-1)[columns.nonzero()[first, 0]],
    )


@contextmanager
def _features_as_leaf(model: PromptReductionMixin) -> Iterator[list[PreparedInputs]]:
    """What the decoder gets of images comes from nowhere, and is noted."""
    prepare, noted = model.prepare_inputs, []

    def prepare_inputs(*args: Any, **kwargs: Any) -> PreparedInputs:
        prepared = prepare(*args, **kwargs)
        leaf = prepared.visual.features.detach().requires_grad_()
        noted.append(replace(prepared, visual=replace(prepared.visual, features=leaf)))
        return noted[0]

    model.prepare_inputs = prepare_inputs
    try:
        yield noted
    finally:
        del model.prepare_inputs


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
