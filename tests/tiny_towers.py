"""Passes through vision towers small enough for a test, without the rest of the model."""

from typing import Any

import torch
from tiny_models import IMAGE_SIZE, tiny_config
from transformers import AutoModel

from adavtp.modeling.vision_adavtp import BudgetToken, TowerPass

TOWERS = ["clip", "siglip", "dinov2"]

# No budget token, and one that every token sees, behind the patches and in front of everything.
PASSES = [
    {"budget": False},
    {"budget": True, "budget_attention": "mutual"},
    {"budget": True, "budget_attention": "mutual", "budget_token_place": "first"},
]
PASS_IDS = ["no budget", "budget last", "budget first"]


def tiny_pass(
    vision: str = "clip", num_images: int = 2, budget: bool = False, dtype: torch.dtype = torch.float32, **fields: Any
) -> TowerPass:
    """
    A pass through a tower with random weights; the same tower makes the same weights, with and without a budget.

    Args:
        vision: `"clip"`, `"siglip"` (no CLS) or `"dinov2"`.
        num_images: images that will be passed.
        budget: whether a random budget token takes part, one for each image.
        dtype: of the tower.
        fields: of the configuration.
    """
    config = tiny_config(vision, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = AutoModel.from_config(config.vision_config).eval().to(dtype)
        budget_token = BudgetToken(config)
        token = torch.randn(64, config.vision_config.hidden_size)[:num_images]
    return TowerPass(tower, config, budget_token, token) if budget else TowerPass(tower, config)


def tiny_images(num_images: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images; the first ones of a larger batch are those of a smaller one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in range(num_images)])


def whole_run(tower: TowerPass, pixel_values: torch.Tensor) -> torch.Tensor:
    """The sequence at the feature layer when nothing is reduced, layer by layer and every layer whole."""
    sequence = tower.embed(pixel_values)
    for layer in range(len(tower.layers)):
        sequence = tower.run_layer(layer, sequence)
    return sequence


def alone(tower: TowerPass, image: int) -> TowerPass:
    """The same pass for one of its images."""
    token = None if tower.token is None else tower.token[image : image + 1]
    return TowerPass(tower.tower, tower.config, tower.budget_token, token)


def counts(num_keep: int, num_images: int = 2) -> torch.Tensor:
    """The same number of tokens for every image."""
    return torch.full((num_images,), num_keep)
