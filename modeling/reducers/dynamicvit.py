"""DynamicViT: small predictors inside the tower say which tokens the layers above can do without.

Before three of the layers a predictor looks at every token and at the mean of those still there, and says keep or
drop. In training the answer is sampled, nothing is removed, and dropped tokens are hidden from the others' attention;
because the hiding is a product with a gate, the gradient says what each of them would have been worth. In evaluation
the best tokens stay, as many as the budget allows, and the rest is gone from there on.
"""

import math
from typing import Any, Literal

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.top_k import gumbel_noise
from ..vision.encode import TowerPass
from ..vision.encoder_reducer import EncodedTokens, EncoderReducer
from .base import feature_layer_index, register_reducer, require_choice, take_tokens

# What is left of a dropped token's attention in training, as in official code: with none, its gradient would be 0.
_LEAST_POLICY = 1e-6

# sigmoid(4) = 0.982: three untrained predictors keep 95 of 100 tokens.
_FIRST_LOG_ODDS = 4.0


class KeepPredictor(nn.Module):
    """Scores tokens by themselves and by the mean of those that are still kept (DynamicViT, section 3.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.half = hidden_size // 2
        self.norm = nn.LayerNorm(hidden_size)
        self.embed = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Sequential(
            nn.Linear(hidden_size, self.half),
            nn.GELU(),
            nn.Linear(self.half, hidden_size // 4),
            nn.GELU(),
            nn.Linear(hidden_size // 4, 2),
        )

    def forward(self, patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patches: `[num_images, num_tokens, hidden_size]`.
            kept: `[num_images, num_tokens]`, 1 for tokens still there and 0 for those that were dropped before.

        Returns:
            `[num_images, num_tokens, 2]` float32, log-probabilities of keeping and of dropping.
        """
        embedded = nn.functional.gelu(self.embed(self.norm(patches.to(self.embed.weight.dtype))))
        local, others = embedded[..., : self.half], embedded[..., self.half :]
        kept = kept[..., None].to(embedded.dtype)
        mean = (others * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
        logits = self.score(torch.cat([local, mean.expand(-1, patches.shape[1], -1)], dim=-1)).float()
        return (logits + logits.new_tensor([_FIRST_LOG_ODDS, 0.0])).log_softmax(dim=-1)


def sampled_decision(log_probabilities: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """
    Samples keep or drop for every token, hard going forward and soft going backward; once dropped, always dropped.

    d = previous * (hard + soft - soft'), with soft = softmax(log p + Gumbel noise) of keeping and hard = [soft > 1/2].
    An image that would lose its last token keeps the one with the largest soft gate.

    Args:
        log_probabilities: `[num_images, num_tokens, 2]` float32, of keeping and of dropping.
        previous: `[num_images, num_tokens]` float32, exactly 0 or 1 as the result, with its gradient.
    """
    soft = (log_probabilities + gumbel_noise(log_probabilities)).softmax(dim=-1)[..., 0]
    was_kept = previous > 0.5
    hard = soft > 0.5
    best = soft.detach().masked_fill(~was_kept, -1.0).argmax(dim=-1, keepdim=True)
    loses_all = ~(hard & was_kept).any(dim=-1, keepdim=True)
    hard = hard.scatter(1, best, hard.gather(1, best) | loses_all)
    return previous * (hard.float() + (soft - soft.detach()))


def policy_bias(policy: torch.Tensor) -> torch.Tensor:
    """
    What multiplies attention by the policy: log M_ij with M_ij = p_j, and M_ii = 1, since a token always sees itself.

    softmax(logits + log M) = exp(logits) M / sum(exp(logits) M). A dropped token keeps the share 1e-6 of its
    attention, p <- p + 1e-6 (1 - p); official code instead mixes the result with 1e-6 of the mean of all values.
    `[num_images, num_tokens]` float32 -> `[num_images, num_tokens, num_tokens]`.
    """
    itself = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    bias = torch.log(policy + _LEAST_POLICY * (1 - policy))
    return bias[:, None].masked_fill(itself, 0.0)


def tokens_after_stages(num_patches: int, num_keep: int, num_stages: int) -> list[int]:
    """
    Tokens that are left behind each predictor: int(N rho^s), with rho = ((K + 1/2) / N)^(1 / S), so that the last
    leaves K. Rates at the lower end of those that leave K, (K / N)^(1 / S), would leave one token less at some stage
    than a published rate does: rho = 0.7 of 196 leaves 137, 96 and 67.

    Counted in whole numbers, as the largest c with 2^s c^S <= N^(S - s) (2 K + 1)^s: a float may fall just below one.
    """
    counts = []
    for stage in range(1, num_stages + 1):
        power = num_patches ** (num_stages - stage) * (2 * num_keep + 1) ** stage
        count = round((power / 2**stage) ** (1 / num_stages))
        counts.append(count if 2**stage * count**num_stages <= power else count - 1)
    return counts


@register_reducer("dynamicvit")
class DynamicViTReducer(EncoderReducer):
    """
    Drops tokens before some of the tower's layers by learned predictors (DynamicViT, section 3).

    CLS and the budget token always stay. An untrained predictor keeps 98 of 100 tokens in training (in official code
    half of them), so that a model starts from what its tower has learned.

    In training every token stays, with a gate, and the kept ones are only about as many as the budget says: the loss
    `ratio_loss_weight * mean_s (mean_i d_si - rho_s)^2` pulls each stage s towards the share rho_s = (K / N)^(s / S).
    The paper's two distillation losses need a teacher and are the trainer's.

    Args:
        cuts: layers, from 0, before which predictors stand; by default at 1/4, 1/2 and 3/4 of the layers that run, as
            [3, 6, 9] of DeiT's 12.
        ratio_loss_weight: of the loss, 2 in the paper.
        order: `"spatial"`, or `"official"`: by descending score of the last predictor.
    """

    paper = "DynamicViT (arXiv 2106.02034)"
    trained = True

    def __init__(
        self,
        config: AdaVTPConfig,
        cuts: list[int] | None = None,
        ratio_loss_weight: float = 2.0,
        order: Literal["spatial", "official"] = "spatial",
    ) -> None:
        super().__init__(config)
        num_layers = feature_layer_index(config)
        require_choice("order", order, ("spatial", "official"))
        is_number = isinstance(ratio_loss_weight, int | float) and not isinstance(ratio_loss_weight, bool)
        if not is_number or not 0 <= ratio_loss_weight < math.inf:
            raise ValueError(f"`ratio_loss_weight` is {ratio_loss_weight!r}; it must be 0 or above, and finite.")
        # A tower of one or two layers has no room for three.
        self.cuts = sorted({num_layers * part // 4 for part in (1, 2, 3)}) if cuts is None else cuts
        if not _are_ascending_layers(self.cuts, num_layers):
            raise ValueError(
                f"`cuts` is {self.cuts!r}; allowed is a list of ascending layers, from 0 to {num_layers - 1}, since "
                f"{num_layers} layers of the vision tower run."
            )
        self.ratio_loss_weight = ratio_loss_weight
        self.spatial_order = order == "spatial"
        self.predictors = nn.ModuleList(KeepPredictor(config.vision_config.hidden_size) for _ in self.cuts)

    @property
    def one_count(self) -> bool:
        """In training all tokens stay, whatever the budgets."""
        return not self.training

    def forward(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        if self.training:
            return self._gated(tower, pixel_values, num_keep)
        return self._pruned(tower, pixel_values, int(num_keep[0]))

    def _gated(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        """All tokens go through the tower, the dropped ones hidden from the others' attention."""
        sequence = tower.embed(pixel_values)
        num_images, num_patches, _ = tower.patches(sequence).shape
        ratio = num_keep.to(sequence.device).float() / num_patches
        decision = torch.ones(num_images, num_patches, device=sequence.device)
        bias, losses = None, []
        for layer in range(len(tower.layers)):
            if layer in self.cuts:
                log_probabilities = self.predictors[len(losses)](tower.patches(sequence), decision)
                decision = sampled_decision(log_probabilities.to(decision.device), decision)
                bias = policy_bias(nn.functional.pad(decision, (tower.num_before, tower.num_after), value=1.0))
                expected = ratio ** ((len(losses) + 1) / len(self.cuts))
                losses.append((decision.mean(dim=-1) - expected).square().mean())
            sequence = tower.finish(layer, tower.attend(layer, sequence, bias))
        positions = torch.arange(num_patches, device=sequence.device).expand(num_images, -1)
        loss = self.ratio_loss_weight * torch.stack(losses).mean()
        return EncodedTokens(sequence, positions, gates=decision, loss=loss)

    def _pruned(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: int) -> EncodedTokens:
        """Each predictor's best tokens go on, the others leave."""
        sequence = tower.embed(pixel_values)
        num_images, num_patches, _ = tower.patches(sequence).shape
        counts = tokens_after_stages(num_patches, num_keep, len(self.cuts))
        positions = torch.arange(num_patches, device=sequence.device).expand(num_images, -1)
        for layer in range(len(tower.layers)):
            if layer in self.cuts:
                stage = self.cuts.index(layer)
                patches = tower.patches(sequence)
                scores = self.predictors[stage](patches, torch.ones_like(positions))[..., 0].to(patches.device)
                index = scores.argsort(dim=-1, descending=True, stable=True)[:, : counts[stage]]
                # In spatial order up to the last, so that a tie falls to the earlier patch in either order.
                if self.spatial_order or stage < len(self.cuts) - 1:
                    index = index.sort(dim=-1).values
                sequence = tower.with_patches(sequence, take_tokens(patches, index))
                positions = positions.gather(1, index)
            sequence = tower.run_layer(layer, sequence)
        return EncodedTokens(sequence, positions)


def _are_ascending_layers(cuts: Any, num_layers: int) -> bool:
    if not isinstance(cuts, list | tuple) or not all(type(cut) is int and 0 <= cut < num_layers for cut in cuts):
        return False
    return len(cuts) > 0 and all(cut < later for cut, later in zip(cuts, cuts[1:], strict=False))
