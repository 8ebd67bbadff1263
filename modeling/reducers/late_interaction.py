"""How well a patch matches the question, token by token, as ColBERT compares texts (arXiv 2004.12832).

There every token of a query looks for its best match in a document; here every patch looks for its best match in the
question. A best match is an "or": one token that fits is enough, and a key of two tokens would be found wherever one
of them stands. So the comparison is made by several heads, each of which projects patches and tokens in its own way
and so compares one aspect, and the sum of their best matches is an "and".
"""

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig


class LateInteraction(nn.Module):
    """
    Of head h, patch i and token j let m be the scaled dot product of projected patch and projected token. The patch
    scores sum_h log(1 + sum_j exp m), a smooth maximum over tokens and over nothing at all, which matches every patch
    by 0: a head that finds nothing in the question, or a prompt without text, adds nothing.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        self.num_heads = config.budget_heads
        text_size = config.get_text_config().hidden_size
        self.question_norm = nn.LayerNorm(text_size)
        self.patch_proj = nn.Linear(config.visual_width, config.budget_width)
        self.question_proj = nn.Linear(text_size, config.budget_width)

    def forward(self, patches: torch.Tensor, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patches: `[num_images, num_patches, visual_width]`, normalised.
            tokens: `[num_images, longest question, text_hidden_size]`.
            is_token: `[num_images, longest question]` bool.

        Returns:
            `[num_images, num_patches]` float32.
        """
        compared = self.patch_proj(patches), self.question_proj(self.question_norm(tokens))
        patches, tokens = (side.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for side in compared)
        matches = (patches @ tokens.transpose(2, 3) / patches.shape[-1] ** 0.5).float()
        matches = matches.masked_fill(~is_token[:, None, None], -torch.inf)
        return nn.functional.pad(matches, (1, 0)).logsumexp(dim=-1).sum(dim=1)
