"""The vision tower with a budget token, stopped at the feature layer.

CLIP, SigLIP and DINOv2 towers of transformers share a shape: embeddings, a list of layers that map hidden states to
hidden states, and a final norm that LLaVA does not use. We run that list ourselves, because the budget token has to
enter between embeddings and layers, and because the layers above the feature layer need not run at all.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_adavtp import VISION_TOWERS_WITH_CLS, AdaVTPConfig
from .budget_adavtp import BudgetEmbedding


@dataclass
class VisionFeatures:
    """
    What the tower sees in each image.

    Attributes:
        patches: `[num_images, num_patches, hidden_size]`; with several feature layers, their hidden states side by
            side.
        cls: `[num_images, 1, hidden_size]`, or `None` for a tower without a CLS token.
        budget: `[num_images, hidden_size of the tower]`, the budget as it came out of its meeting with the image, or
            `None` where no budget took part.
    """

    patches: torch.Tensor
    cls: torch.Tensor | None
    budget: torch.Tensor | None = None


class BudgetToken(nn.Module):
    """
    The vector that carries the budget, and if the model is question-aware the question, to the image.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        hidden_size = config.vision_config.hidden_size
        self.budget_embedding = BudgetEmbedding(hidden_size)
        self.question_proj = nn.Linear(config.text_config.hidden_size, hidden_size) if config.question_aware else None
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
        return token if self.question_proj is None else token + self.question_proj(question)


class BudgetCrossAttention(nn.Module):
    """
    One cross-attention after the tower, the budget as query and the patches as keys and values ("Option B").

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        hidden_size, width = config.vision_config.hidden_size, patch_width(config)
        self.num_heads = config.vision_config.num_attention_heads
        self.query_norm = nn.LayerNorm(hidden_size)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(width, hidden_size)
        self.v_proj = nn.Linear(width, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, budget_token: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """
        Args:
            budget_token: `[num_images, hidden_size]`.
            patches: `[num_images, num_patches, patch_width]`.

        Returns:
            `[num_images, hidden_size]`: the budget token plus what it read from the patches.
        """
        patches = self.patch_norm(patches)
        query = self._heads(self.q_proj(self.query_norm(budget_token)[:, None]))
        key, value = self._heads(self.k_proj(patches)), self._heads(self.v_proj(patches))
        read = nn.functional.scaled_dot_product_attention(query, key, value)
        return budget_token + self.out_proj(read.transpose(1, 2).flatten(1))

    def _heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, hidden_size]` -> `[batch, heads, tokens, head_dim]`."""
        return hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def patch_width(config: AdaVTPConfig) -> int:
    """Width of a patch feature: the tower's, times the number of feature layers."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def encode_image(
    tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    config: AdaVTPConfig,
    budget_token: BudgetToken | None = None,
    budget: torch.Tensor | None = None,
    question: torch.Tensor | None = None,
) -> VisionFeatures:
    """
    Runs the vision tower up to its feature layer, with the budget beside the patches or after them.

    Args:
        tower: a CLIP, SigLIP or DINOv2 vision model.
        pixel_values: `[num_images, channels, height, width]`.
        config: the model's configuration.
        budget_token: the module that makes the token; without it the tower runs alone.
        budget: `[num_images]`, kept fractions, with `budget_token`.
        question: `[num_images, text_hidden_size]` or `None`.

    Returns:
        `VisionFeatures`.

    Raises:
        ValueError: if the tower's attention cannot hide a read-only budget token.
    """
    hidden_states = _embed(tower, pixel_values)
    num_tokens = hidden_states.shape[1]
    token = None if budget_token is None else budget_token(budget, question)
    attention_mask, budget_index = None, None
    if token is not None and config.budget_fusion == "encoder":
        hidden_states, budget_index = _insert_budget(tower, hidden_states, token, budget_token, config)
        if config.budget_attention == "read_only":
            attention_mask = _read_only_mask(tower, hidden_states, budget_index)

    states = _run_layers(tower, hidden_states, attention_mask, config.vision_feature_layer)
    budget_state = None
    if budget_index is not None:
        # The budget is read where the tower's run ends, however many feature layers there are.
        budget_state = states[-1][:, budget_index]
        first = 1 if budget_index == 0 else 0
        states = [state[:, first : first + num_tokens] for state in states]
    features = torch.cat(states[:-1], dim=-1)

    has_cls = VISION_TOWERS_WITH_CLS[config.vision_config.model_type]
    cls, patches = (features[:, :1], features[:, 1:]) if has_cls else (None, features)
    if token is not None and config.budget_fusion == "post":
        budget_state = budget_token.cross_attention(token, patches)
    return VisionFeatures(patches, cls, budget_state)


def _embed(tower: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch embeddings with positions, and CLS where the tower has one: the input of its first layer."""
    weight = next(tower.parameters())
    hidden_states = tower.embeddings(pixel_values.to(weight.device, weight.dtype))
    # The misspelling is CLIP's own.
    return tower.pre_layrnorm(hidden_states) if hasattr(tower, "pre_layrnorm") else hidden_states


def _insert_budget(
    tower: PreTrainedModel,
    hidden_states: torch.Tensor,
    token: torch.Tensor,
    budget_token: BudgetToken,
    config: AdaVTPConfig,
) -> tuple[torch.Tensor, int]:
    """Puts the budget token beside the patches. Returns the sequence, and the token's index in it."""
    if budget_token.position_embedding is not None:
        position = budget_token.position_embedding.weight[0]
    else:
        position = _last_patch_position(tower)
    token = (token + position).to(hidden_states.dtype)[:, None]
    if config.budget_token_place == "first":
        return torch.cat([token, hidden_states], dim=1), 0
    return torch.cat([hidden_states, token], dim=1), hidden_states.shape[1]


def _last_patch_position(tower: PreTrainedModel) -> torch.Tensor:
    """Position vector of the tower's last patch, `[hidden_size]`."""
    embeddings = tower.embeddings
    table = embeddings.position_embedding.weight if hasattr(embeddings, "position_embedding") else None
    return embeddings.position_embeddings[0, -1] if table is None else table[-1]


def _read_only_mask(tower: PreTrainedModel, hidden_states: torch.Tensor, budget_index: int) -> torch.Tensor:
    """Additive mask `[1, 1, tokens, tokens]`: the budget token sees all tokens, no other token sees it."""
    implementation = tower.config._attn_implementation
    if implementation not in ("eager", "sdpa") or not _takes_mask(_layers(tower)[0]):
        raise ValueError(
            f"`budget_attention` is 'read_only', which hides the budget token from the patches with an attention "
            f"mask, and the vision tower ({type(tower).__name__}, attention {implementation!r}) takes none here. Load "
            "the model with attn_implementation={'vision_config': 'sdpa'} and a newer transformers, or use "
            "budget_attention='mutual' or budget_fusion='post'."
        )
    num_tokens = hidden_states.shape[1]
    mask = hidden_states.new_zeros(num_tokens, num_tokens)
    mask[:, budget_index] = torch.finfo(mask.dtype).min
    mask[budget_index, budget_index] = 0.0
    return mask[None, None]


def _takes_mask(layer: nn.Module) -> bool:
    # DINOv2's layers take no mask in the older of the supported versions of transformers.
    return "attention_mask" in inspect.signature(layer.forward).parameters


def _layers(tower: PreTrainedModel) -> nn.ModuleList:
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


def _run_layers(
    tower: PreTrainedModel,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    feature_layer: int | list[int],
) -> list[torch.Tensor]:
    """
    Runs the layers below the highest feature layer. Index 0 is the embeddings and -1 the last layer's output, as in
    `hidden_states` of transformers.

    Returns:
        The hidden states at each feature layer, in the order asked for, and behind them those where the run ended.
    """
    layers = _layers(tower)
    wanted = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    if any(not -len(layers) - 1 <= index <= len(layers) for index in wanted):
        raise ValueError(
            f"`vision_feature_layer` is {feature_layer}; a tower of {len(layers)} layers has hidden states "
            f"{-len(layers) - 1} to {len(layers)}."
        )
    wanted = [index if index >= 0 else len(layers) + 1 + index for index in wanted]
    mask = (attention_mask,) if _takes_mask(layers[0]) else ()
    states = {}
    for index in range(max(wanted) + 1):
        if index > 0:
            hidden_states = layers[index - 1](hidden_states, *mask)
        if index in wanted:
            states[index] = hidden_states
    return [states[index] for index in wanted] + [hidden_states]
