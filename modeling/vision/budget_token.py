"""The budget as a vector that meets the image: a token in the tower, or a query to what the tower made."""

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.budget_embedding import BudgetEmbedding


class BudgetToken(nn.Module):
    """The vector that carries the budget, and if the model is question-aware the question, to the image."""

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        hidden_size = config.budget_width
        self.budget_embedding = BudgetEmbedding(hidden_size)
        self.question_proj = nn.Linear(config.text_config.hidden_size, hidden_size) if config.question_aware else None
        self.question_norm = config.question_norm
        in_encoder = config.budget_fusion == "encoder" and config.budget_position == "learned"
        self.position_embedding = nn.Embedding(1, hidden_size) if in_encoder else None
        self.cross_attention = BudgetCrossAttention(config) if config.budget_fusion == "post" else None

    def forward(self, budget: torch.Tensor, question: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            budget: `[num_images]`, the kept fraction K / N.
            question: `[num_images, text_hidden_size]`, the mean embedding of the prompt that asks about each image.

        Returns:
            `[num_images, hidden_size]`, without a position.
        """
        token = self.budget_embedding(budget)
        if self.question_proj is None:
            return token
        if self.question_norm:
            question = nn.functional.layer_norm(question, question.shape[-1:])
        return token + self.question_proj(question)


class BudgetCrossAttention(nn.Module):
    """One cross-attention after the tower, the budget as query and the patches as keys and values ("Option B")."""

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        hidden_size, width = config.budget_width, config.visual_width
        self.num_heads = config.budget_heads
        self.query_norm = nn.LayerNorm(hidden_size)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(width, hidden_size)
        self.v_proj = nn.Linear(width, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, budget_token: torch.Tensor, patches: torch.Tensor, is_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Budget tokens `[num_images, hidden_size]`, each plus what it read from its image's patches; from those that
        are true in `is_token` `[num_images, num_patches]`, by default from all.
        """
        patches = self.patch_norm(patches)
        query = self.q_proj(self.query_norm(budget_token)[:, None])
        read = attended(query, self.k_proj(patches), self.v_proj(patches), self.num_heads, is_token)
        return budget_token + self.out_proj(read[:, 0])


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    is_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What queries read, `[batch, num_queries, width]`; all three are `[batch, tokens, width]`, heads side by side, and
    only what is true in `is_token` `[batch, tokens]` is read.
    """
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    mask = None if is_token is None else is_token[:, None, None]
    return nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
