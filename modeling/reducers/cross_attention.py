"""What each patch reads in the question: one cross-attention behind the tower, whose own patches stay as they are."""

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.budget_token import attended


class QuestionCrossAttention(nn.Module):
    """
    Multi-head attention with patches as queries and the question's tokens as keys and values. There is one more key
    and value, of zeros: a patch that nothing in the question is about, or a prompt without text, reads nothing.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        width, text_size = config.budget_width, config.get_text_config().hidden_size
        self.num_heads = config.budget_heads
        self.question_norm = nn.LayerNorm(text_size)
        self.q_proj = nn.Linear(config.visual_width, width)
        self.k_proj = nn.Linear(text_size, width)
        self.v_proj = nn.Linear(text_size, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches: torch.Tensor, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patches: `[num_images, num_patches, visual_width]`, normalised.
            tokens: `[num_images, longest question, text_hidden_size]`.
            is_token: `[num_images, longest question]` bool.

        Returns:
            `[num_images, num_patches, budget_width]`.
        """
        tokens = self.question_norm(tokens)
        key, value = (nn.functional.pad(proj(tokens), (0, 0, 1, 0)) for proj in (self.k_proj, self.v_proj))
        is_read = nn.functional.pad(is_token, (1, 0), value=True)
        return self.out_proj(attended(self.q_proj(patches), key, value, self.num_heads, is_read))
