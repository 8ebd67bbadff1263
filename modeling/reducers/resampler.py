"""A learned resampler: a few queries read the image, and what they read replaces the patches.

Perceiver-style cross-attention as in Flamingo (arXiv 2204.14198), whose number of queries is fixed. As in the
Matryoshka Query Transformer (arXiv 2405.19315) there are as many queries as patches and a budget of K uses the first
K, so that one set of weights serves every budget and training at random budgets puts what matters most into the first
queries.
"""

from dataclasses import replace

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..vision.budget_token import attended
from ..vision.features import VisionFeatures
from .base import TokenReducer, register_reducer
from .controls import at_a_stride


@register_reducer("resampler")
class ResamplerReducer(TokenReducer):
    """
    The first K of N learned queries, each having read the image's patches in a few layers of cross-attention.

    Flamingo's queries also attend to each other. Here each reads the patches alone, so that a token is the same at
    every budget that has it: the tokens of a smaller budget are the first ones of a larger. They have no place in the
    image; they stand in the order of the queries at a uniform stride, token i at patch floor((i + 1/2) n / K).

    What leaves the last layer is normalised and then given the mean and the standard deviation that each channel has
    over the image's patches, so that from the first step on the projector sees the scale that it knows.

    Args:
        num_layers: 1 to 1000.
        num_heads: heads of the attention, a divisor of the width of a patch feature; the tower's number by default.
    """

    trained = True
    paper = "Perceiver resampler (arXiv 2204.14198) with nested queries (arXiv 2405.19315)"

    def __init__(self, config: AdaVTPConfig, num_layers: int = 2, num_heads: int | None = None) -> None:
        super().__init__(config)
        width, num_queries = config.visual_width, config.num_patches
        num_heads = config.budget_heads if num_heads is None else num_heads
        if not isinstance(num_layers, int) or isinstance(num_layers, bool) or not 1 <= num_layers <= 1000:
            raise ValueError(f"`num_layers` is {num_layers!r}; allowed are whole numbers from 1 to 1000.")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` is {num_heads}; it must divide {width}, the width of a patch feature.")
        self.queries = nn.Embedding(num_queries, width)
        # Whatever the embedding's initial scale, queries must differ as much as what they will read.
        self.query_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(ResamplerLayer(width, num_heads) for _ in range(num_layers))
        self.output_norm = nn.LayerNorm(width)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        patches, num_keep = features.patches, num_keep.to(features.patches.device)
        num_images, num_tokens, width = patches.shape
        step = torch.arange(int(num_keep.max()), device=patches.device)
        latents = self.query_norm(self.queries(step)).expand(num_images, -1, -1)
        places = grid_encoding(features.positions, features.grid, width).to(patches.dtype)
        for layer in self.layers:
            latents = layer(latents, patches, places)
        tokens = at_the_scale_of(patches, self.output_norm(latents))
        at_stride = at_a_stride(torch.full_like(num_keep, num_tokens), num_keep, num_tokens)
        return replace(Selection.from_keep(at_stride), features=tokens)


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention from queries to patches of the same width, then an MLP, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents: torch.Tensor, patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`[num_images, num_queries, width]`, none of which depends on another; `places` says where each patch is."""
        patches = self.patch_norm(patches) + places
        query = self.q_proj(self.latent_norm(latents))
        read = attended(query, self.k_proj(patches), self.v_proj(patches), self.num_heads)
        latents = latents + self.out_proj(read)
        return latents + self.mlp(latents)


def grid_encoding(positions: torch.Tensor, grid: tuple[int, int], width: int) -> torch.Tensor:
    """
    Sinusoidal encoding `[num_images, num_tokens, width]` float32 of where in the grid (rows and columns) each token
    stands: one half of the channels for its row, the other for its column, each as in the Transformer (arXiv
    1706.03762).
    """
    num_frequencies = -(-width // 4)
    frequency = 10_000.0 ** -(torch.arange(num_frequencies, device=positions.device) / num_frequencies)
    lines = torch.stack([positions // grid[1], positions % grid[1]], dim=-1)
    angle = lines[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


def at_the_scale_of(patches: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
    """
    Gives normalised tokens `[num_images, num_queries, width]` the mean and standard deviation that each channel has
    over the image's own patches `[num_images, num_tokens, width]`.
    """
    deviation, mean = torch.std_mean(patches.float(), dim=1, correction=0, keepdim=True)
    return (mean + deviation * normalised.float()).to(normalised.dtype)
