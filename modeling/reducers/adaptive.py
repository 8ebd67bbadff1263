"""The learned reducer: which patches are worth the budget.

How many tokens stay is said by the budget, exactly. Which ones is said here, by a score for every patch that may
depend on the patch, on the budget and, through the budget token or word by word, on the question. Training samples K
patches by Gumbel top-K and lets the gradient through, or weighs them all; evaluation keeps the K best.
"""

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.differentiable_top_k import differentiable_top_k, weight_of_indecision
from ..budget.selection import Selection
from ..budget.top_k import sample_top_k, top_k_mask
from ..vision.features import VisionFeatures
from .base import ScoringReducer, directions, register_reducer, take_tokens
from .cross_attention import QuestionCrossAttention
from .divprune import cosine_distances, farthest_first, first_picks
from .late_interaction import LateInteraction

# Heads that read the question word by word, and what they read it with.
QUESTION_HEADS = {"late_interaction": LateInteraction, "cross_attention": QuestionCrossAttention}


@register_reducer("adaptive")
class VisionTokenController(ScoringReducer):
    """
    Scores every patch and keeps the best K.

    The head is one of

    - `"budget_token"`: one linear map from the budget token's output to all N scores;
    - `"patch"`: a linear score of each patch alone;
    - `"patch_budget"`: a two-layer score of each patch beside the budget token's output. One linear layer would add
      the same number to every patch's score, and the budget and question could not change the choice;
    - `"dot"`: the scaled dot product of projected patch and projected budget token;
    - `"late_interaction"`: as `"patch_budget"`, and how well the patch matches the question's tokens, see
      [`LateInteraction`];
    - `"cross_attention"`: as `"patch_budget"`, of patch, budget and what the patch reads in the question, see
      [`QuestionCrossAttention`].

    Attributes:
        training_progress: how much of training is over, from 0 to 1, where a trainer says so; see
            [`weight_of_indecision`].
    """

    trained = True
    takes_padding = True
    training_progress: float = 0.0

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        hidden_size, width = config.budget_width, config.visual_width
        head = config.controller_head
        # A patch alone says nothing of the budget, except where the patches themselves have seen it.
        patches_see_budget = config.budget_fusion == "encoder" and config.budget_attention == "mutual"
        self.needs = ("budget",) if head != "patch" or patches_see_budget else ()
        if head in QUESTION_HEADS:
            self.needs += ("question_tokens",)
        self.patch_norm = nn.LayerNorm(width) if head != "budget_token" else None
        self.budget_norm = nn.LayerNorm(hidden_size) if head != "patch" else None
        if head == "budget_token":
            self.score = nn.Linear(hidden_size, config.num_patches)
        elif head == "patch":
            self.score = nn.Linear(width, 1)
        else:
            self.patch_proj = nn.Linear(width, hidden_size)
            self.budget_proj = nn.Linear(hidden_size, hidden_size)
            if head != "dot":
                self.score = nn.Linear(hidden_size, 1)
        self.question_head = QUESTION_HEADS[head](config) if head in QUESTION_HEADS else None

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        scores = self._scores(features)
        # Behind the last token of a smaller image as low as a number can be, here and in float32.
        lowest = max(torch.finfo(dtype).min for dtype in (scores.dtype, torch.float32))
        return scores.masked_fill(features.positions < 0, lowest)

    def _scores(self, features: VisionFeatures) -> torch.Tensor:
        head = self.config.controller_head
        if head == "budget_token":
            return self.score(self.budget_norm(features.budget)).gather(1, features.positions.clamp(min=0))
        patches = self.patch_norm(features.patches)
        if head == "patch":
            return self.score(patches)[..., 0]
        key, query = self.patch_proj(patches), self.budget_proj(self.budget_norm(features.budget))
        if head == "dot":
            return (key @ query[..., None])[..., 0] / query.shape[-1] ** 0.5
        # A linear layer of patch and budget side by side is the sum of one of each; the budget's is the same for all
        # patches.
        hidden, question = key + query[:, None], (features.question_tokens, features.is_question_token)
        if head == "cross_attention":
            hidden = hidden + self.question_head(patches, *question)
        scores = self.score(nn.functional.gelu(hidden))[..., 0]
        return scores if head != "late_interaction" else scores + self.question_head(patches, *question)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        """
        While the controller trains, the choice has gates. A frozen one chooses in training as it does in evaluation,
        so that what trains meets the choice it will get.
        """
        if self.training and any(parameter.requires_grad for parameter in self.parameters()):
            if self.config.controller_estimator == "differentiable_top_k":
                return self._soft_choice(features, num_keep)
            return Selection.from_keep(
                *sample_top_k(self.scores(features), num_keep, self.config.controller_temperature, training=True)
            )
        choice = self.config.controller_choice
        if choice == "best":
            return super().forward(features, num_keep)
        scores, num_tokens = self.scores(features).float(), (features.positions >= 0).sum(dim=-1)
        if choice == "spread":
            return Selection.from_keep(spread_choice(scores, features.patches, num_keep, num_tokens))
        mmr_lambda = self.config.controller_mmr_lambda
        return Selection.from_keep(mmr_choice(scores, features.patches, num_keep, num_tokens, mmr_lambda))

    def _soft_choice(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        """The K best, soft gates, and a loss of how far these are from deciding; see the estimator's file."""
        scores, num_tokens = self.scores(features).float(), (features.positions >= 0).sum(dim=-1)
        keep = top_k_mask(scores.detach(), num_keep)
        gates, indecision = differentiable_top_k(scores, num_keep, keep, self.config.controller_temperature)
        selection = Selection.from_keep(keep, gates)
        selection.is_soft = True
        selection.loss = weight_of_indecision(self.training_progress) * (indecision.sum(dim=-1) / num_tokens).mean()
        return selection


def spread_choice(
    scores: torch.Tensor, patches: torch.Tensor, num_keep: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """
    Tokens that are worth keeping and do not repeat each other.

    The K best scores often belong to neighbours that show the same thing. Here the sqrt(K N) best tokens (as many
    times more than K as N is more than they) are a pool; the best of them is kept, and then, one after another, the
    one that is farthest from those kept, by the cosine distance of their features: DivPrune's greedy choice
    (arXiv 2503.02175) among what the question is about. `[num_images, columns]` bool, `num_keep` true in each row, of
    whose columns the first `num_tokens` are tokens.
    """
    num_keep, num_tokens = num_keep.to(scores.device), num_tokens.to(scores.device)
    pool_size = (num_keep.double() * num_tokens).sqrt().ceil().long().minimum(num_tokens)
    order = farthest_first(
        cosine_distances(patches.detach()), int(num_keep.max()), top_k_mask(scores, pool_size), scores.argmax(dim=-1)
    )
    return first_picks(order, num_keep, scores.shape[-1])


def mmr_choice(
    scores: torch.Tensor,
    patches: torch.Tensor,
    num_keep: torch.Tensor,
    num_tokens: torch.Tensor,
    mmr_lambda: float,
) -> torch.Tensor:
    """
    Maximal marginal relevance, as IDPruner has it (arXiv 2602.13315): the best score is kept first, and then, one
    after another, the token with the largest lambda r_i - (1 - lambda) max_j cos(x_i, x_j), j among those kept and r
    the scores of an image brought into [0, 1]; of equal ones the earlier. `[num_images, columns]` bool, `num_keep`
    is true in each row, of whose columns the first `num_tokens` are tokens.
    """
    is_token = torch.arange(scores.shape[-1], device=scores.device) < num_tokens.to(scores.device)[:, None]
    highest = scores.amax(dim=-1, keepdim=True)
    lowest = torch.where(is_token, scores, highest).amin(dim=-1, keepdim=True)
    relevance = (scores.maximum(lowest) - lowest) / (highest - lowest + 1e-6)
    unit = directions(patches.detach())
    cosines = unit @ unit.transpose(1, 2)
    # What is no token comes last, so that a small image has columns left while others still choose.
    lowest_worth = torch.finfo(relevance.dtype).min
    picks = [relevance.argmax(dim=-1, keepdim=True)]
    joined, likeness = torch.zeros_like(scores, dtype=torch.bool), torch.full_like(scores, -torch.inf)
    for _ in range(int(num_keep.max()) - 1):
        joined = joined.scatter(1, picks[-1], True)
        likeness = torch.maximum(likeness, take_tokens(cosines, picks[-1])[:, 0])
        worth = (mmr_lambda * relevance - (1 - mmr_lambda) * likeness).masked_fill(~is_token, lowest_worth)
        picks.append(worth.masked_fill(joined, -torch.inf).argmax(dim=-1, keepdim=True))
    return first_picks(torch.cat(picks, dim=-1), num_keep, scores.shape[-1])
