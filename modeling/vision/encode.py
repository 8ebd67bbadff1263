"""The vision tower with a budget token, stopped at the feature layer.

CLIP, SigLIP and DINOv2 towers of transformers share a shape: embeddings, a list of layers that map hidden states to
hidden states, and a final norm that LLaVA does not use. We run that list ourselves, because the budget token has to
enter between embeddings and layers, and because the layers above the feature layer need not run at all.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..reducers.base import feature_layer_index, feature_layers, take_tokens
from .budget_token import BudgetToken
from .features import VisionFeatures
from .tower import TowerAttention, attention_half, input_device, mlp_half, takes_mask, tower_layers


class TowerPass:
    """
    One pass of images through the vision tower, up to the feature layer.

    The sequence is the tower's own, CLS (where there is one) and patches, with the budget token in front or behind if
    it takes part. Patches that are no tokens (padding, which is cut off behind the tower) stand behind those that are:
    layers do not read an order from the sequence, so that every token sees what it sees in the stock tower, while
    nobody chooses them or merges anything with them.

    Args:
        tower: a CLIP, SigLIP or DINOv2 vision model.
        config: the model's configuration.
        budget_token: the module that made `token`, if the budget goes through the tower.
        token: `[num_images, hidden_size]`, the budget token.
        is_token: `[num_images, num_patches]` bool, which patches are tokens, as many of every image; by default all.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        config: AdaVTPConfig,
        budget_token: BudgetToken | None = None,
        token: torch.Tensor | None = None,
        is_token: torch.Tensor | None = None,
    ) -> None:
        self.tower, self.config = tower, config
        self.layers = list(tower_layers(tower))[: feature_layer_index(config)]
        self.budget_token, self.token = budget_token, token
        self.budget_is_first = token is not None and config.budget_token_place == "first"
        self.num_before = int(config.has_cls) + int(self.budget_is_first)
        self.is_token = None if is_token is None or bool(is_token.all()) else is_token
        self._num_others = 0 if self.is_token is None else int((~self.is_token[0]).sum())
        self.num_after = self._num_others + int(token is not None and not self.budget_is_first)
        # The mask of every layer that has as many tokens.
        self._hiding: dict[int, torch.Tensor] = {}
        if token is not None and config.budget_attention == "read_only":
            _require_mask(tower)

    def embed(self, pixel_values: torch.Tensor, of_any_size: bool = False) -> torch.Tensor:
        """
        The input of the first layer, `[num_images, num_before + num_patches + num_after, hidden_size]`. For images of
        any size the tower's positions are interpolated.
        """
        pixel_values = pixel_values.to(input_device(self.tower, pixel_values), self.tower.dtype)
        # DINOv2 always interpolates and has no such argument.
        interpolates = of_any_size and self.config.vision_config.model_type != "dinov2"
        hidden_states = self.tower.embeddings(
            pixel_values, **({"interpolate_pos_encoding": True} if interpolates else {})
        )
        if hasattr(self.tower, "pre_layrnorm"):  # the misspelling is CLIP's own
            hidden_states = self.tower.pre_layrnorm(hidden_states)
        if self.is_token is not None:
            num_cls = int(self.config.has_cls)
            order = (~self.is_token).to(hidden_states.device, torch.int8).argsort(dim=1, stable=True)
            patches = take_tokens(hidden_states[:, num_cls:], order)
            hidden_states = torch.cat([hidden_states[:, :num_cls], patches], dim=1)
        if self.token is None:
            return hidden_states
        if self.budget_token.position_embedding is not None:
            position = self.budget_token.position_embedding(torch.tensor(0, device=hidden_states.device))
        else:
            position = _last_patch_position(self.tower, hidden_states.device)
        token = (self.token.to(position.device) + position).to(hidden_states)[:, None]
        parts = [token, hidden_states] if self.budget_is_first else [hidden_states, token]
        return torch.cat(parts, dim=1)

    def run_layer(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Layer `index`, whole."""
        mask = self._mask(hidden_states, None)
        return self.layers[index](hidden_states, *((mask,) if takes_mask(self.layers[index]) else ()))

    def attend(self, index: int, hidden_states: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
        """
        The attention half of layer `index`. `key_bias` `[num_images, num_tokens]` is added to every attention logit of
        the key it belongs to, or `[num_images, num_tokens, num_tokens]` to each row's own.
        """
        return attention_half(self.layers[index], hidden_states, self._mask(hidden_states, key_bias))

    def finish(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP half of layer `index`."""
        return mlp_half(self.layers[index], hidden_states)

    def patches(self, sequence: torch.Tensor) -> torch.Tensor:
        """The patches' part of `[num_images, num_before + num_patches + num_after, ...]`."""
        return sequence[:, self.num_before : sequence.shape[1] - self.num_after]

    def with_patches(self, sequence: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """`sequence` with other patches, of any number."""
        return torch.cat(
            [sequence[:, : self.num_before], patches, sequence[:, sequence.shape[1] - self.num_after :]], dim=1
        )

    def cls(self, sequence: torch.Tensor) -> torch.Tensor | None:
        """CLS `[num_images, 1, hidden_size]`, or `None`."""
        return sequence[:, self.num_before - 1 : self.num_before] if self.config.has_cls else None

    def budget(self, sequence: torch.Tensor) -> torch.Tensor | None:
        """The budget token `[num_images, hidden_size]`, or `None`."""
        return None if self.token is None else sequence[:, 0 if self.budget_is_first else -1]

    def without_budget(self, sequence: torch.Tensor) -> torch.Tensor:
        """CLS and all patches."""
        return sequence[:, int(self.budget_is_first) : sequence.shape[1] - self.num_after + self._num_others]

    def _mask(self, hidden_states: torch.Tensor, key_bias: torch.Tensor | None) -> torch.Tensor | None:
        """Additive mask: what `key_bias` says, and that no other token sees a read-only budget token."""
        bias = None
        if key_bias is not None:
            bias = (key_bias[:, None] if key_bias.dim() == 3 else key_bias[:, None, None]).to(hidden_states.dtype)
        if self.token is None or self.config.budget_attention == "mutual":
            return bias
        num_tokens = hidden_states.shape[1]
        if num_tokens not in self._hiding:
            index = 0 if self.budget_is_first else num_tokens - 1
            mask = hidden_states.new_zeros(1, 1, num_tokens, num_tokens)
            mask[..., index] = torch.finfo(mask.dtype).min
            mask[..., index, index] = 0.0
            self._hiding[num_tokens] = mask
        return self._hiding[num_tokens] if bias is None else bias + self._hiding[num_tokens]


def encode_image(
    tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    config: AdaVTPConfig,
    budget_token: BudgetToken | None = None,
    budget: torch.Tensor | None = None,
    question: torch.Tensor | None = None,
    attention_layers: Sequence[int] = (),
    received_layers: Sequence[int] = (),
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
        attention_layers: tower layers, from 0, whose queries and keys are wanted: any that runs, and the one above.
        received_layers: of these, those of which is wanted how much each token receives.

    Returns:
        `VisionFeatures` with patches, positions, CLS, attention and, with `budget_token`, budget.

    Raises:
        ValueError: if the tower's attention cannot hide a read-only budget token, or a layer is not there.
    """
    wanted, num_layers = feature_layers(config), config.vision_config.num_hidden_layers
    if not all(0 <= index <= num_layers for index in wanted):
        raise ValueError(
            f"`vision_feature_layer` is {config.vision_feature_layer}; a tower of {num_layers} layers has hidden "
            f"states {-num_layers - 1} to {num_layers}."
        )
    top = min(max(wanted), num_layers - 1)
    if any(not 0 <= layer <= top for layer in attention_layers):
        raise ValueError(f"`attention_layers` is {tuple(attention_layers)}; this tower's layers are 0 to {top}.")
    tower_pass, token = start_pass(tower, config, budget_token, budget, question)
    hidden_states = tower_pass.embed(pixel_values)
    states, attention = {}, {}
    for index in range(max(wanted) + 1):
        if index in wanted:
            states[index] = hidden_states
        if index in attention_layers:
            entering = tower_pass.without_budget(hidden_states)
            attention[index] = TowerAttention.of_layer(
                tower_layers(tower)[index], entering, config.has_cls, with_received=index in received_layers
            )
        if index < len(tower_pass.layers):
            hidden_states = tower_pass.run_layer(index, hidden_states)
    patches = torch.cat([tower_pass.patches(states[index]) for index in wanted], dim=-1)
    cls = torch.cat([tower_pass.cls(states[index]) for index in wanted], dim=-1) if config.has_cls else None
    # The budget is read where the tower's run ends, however many feature layers there are.
    budget_state = tower_pass.budget(hidden_states)
    if token is not None and config.budget_fusion == "post":
        budget_state = budget_token.cross_attention(token, patches)
    positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    return VisionFeatures(
        patches, positions, cls=cls, budget=budget_state, attention=attention, num_patches=patches.shape[1]
    )


def start_pass(
    tower: PreTrainedModel,
    config: AdaVTPConfig,
    budget_token: BudgetToken | None,
    budget: torch.Tensor | None,
    question: torch.Tensor | None,
    is_token: torch.Tensor | None = None,
) -> tuple[TowerPass, torch.Tensor | None]:
    """A pass through the tower, and the budget token `[num_images, hidden_size]` wherever it will meet the image."""
    token = None if budget_token is None else budget_token(budget, question)
    in_tower = token if config.budget_fusion == "encoder" else None
    return TowerPass(tower, config, budget_token, in_tower, is_token), token


def _last_patch_position(tower: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """Position vector of the tower's last patch, `[hidden_size]`."""
    embeddings = tower.embeddings
    if not hasattr(embeddings, "position_embedding"):
        return embeddings.position_embeddings[0, -1]
    table = embeddings.position_embedding
    # Called and not read: where parameters are sharded, a module's are whole only while it runs.
    return table(torch.tensor(table.num_embeddings - 1, device=device))


def _require_mask(tower: PreTrainedModel) -> None:
    implementation = tower.config._attn_implementation
    if implementation not in ("eager", "sdpa") or not takes_mask(tower_layers(tower)[0]):
        raise ValueError(
            f"`budget_attention` is 'read_only', which hides the budget token from the patches with an attention "
            f"mask, and the vision tower ({type(tower).__name__}, attention {implementation!r}) takes none here. Load "
            "the model with attn_implementation={'vision_config': 'sdpa'} and a newer transformers, or use "
            "budget_attention='mutual' or budget_fusion='post'."
        )
