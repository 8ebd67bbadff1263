"""The visual half of a family that encodes its images by itself: what it made is chosen from, and goes back to it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..budget.schedule import BudgetOfUnits, BudgetSchedule
from ..budget.selection import Selection
from ..families.base import Units
from ..families.encoded import KINDS, EncodingFamily, KindUnits, units_of_kinds
from ..prompt import VisualEmbeddings
from ..reducers.cls_attention import cls_scores
from ..reducers.hired import FIRST_LAYER, shares_of_tiles
from .attention_rows import noting_inputs, queries_and_keys, received, row_of_cls
from .features import NativeDial, VisionFeatures, fingerprint
from .novelty import novelty_of_units
from .tower import TowerAttention
from .visual_model import VisualModel, VisualTokens, tokens_left, wanted_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FamilyVisual(VisualModel):
    """
    The visual tokens that a family's encoder made of the images of one call.

    Args:
        model: the family's, with a head and a budget's modules.
        kinds: `[batch, sequence]`, whose placeholder each column is; `None` for a prompt of nothing but its images.
        images: pixels, grids and sizes, as the family's encoder takes them.
        schedule: the stack and its budget, for the attention that they read.

    Attributes:
        units: what the tokens come in.
        made: what stands at the placeholders of the whole prompt.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        kinds: torch.Tensor | None,
        images: Mapping[str, Any],
        schedule: BudgetSchedule,
    ) -> None:
        super().__init__(None, None, model.budget_token, model.config, model.training)
        self.model, self.images = model, images
        family: EncodingFamily = model.family
        shares_by_attention = schedule.is_shared and schedule.unit_weights == "attention"
        if shares_by_attention and not family.knows_tiles:
            raise ValueError(
                "`unit_weights` is 'attention', which shares among the tiles of a picture by what its whole view "
                f"looks at, and a call of a {self.config.model_type!r} model does not say which tile shows what; use "
                "'size' or 'novelty'."
            )
        layers = sorted({*wanted_layers(schedule.steps), *([FIRST_LAYER] if shares_by_attention else [])})
        modules = [family.attention_module(model, layer) for layer in layers]
        outputs, rows, self._found = {}, {layer: [] for layer in layers}, {}
        for kind, pixels in KINDS.items():
            if images.get(pixels) is None:
                continue
            with noting_inputs(modules) as noted:
                outputs[kind] = model.encoded(kind, images)
            self._found[kind] = family.units(model, kind, outputs[kind], images)
            for layer, module, calls in zip(layers, modules, noted, strict=True):
                rows[layer].append(self._attention(module, calls, kind))
        if kinds is None:
            places = len(self._found["image"].is_separator)
            kinds = torch.zeros(1, places, dtype=torch.long, device=images[KINDS["image"]].device)
        self.units: Units = units_of_kinds(kinds, self._found)
        self.made = _in_the_order_of_columns(kinds[kinds >= 0], outputs)
        # The rows of attention come kind by kind.
        order = _order_of_kinds(kinds[kinds >= 0])
        self._rows = {layer: torch.cat(parts)[order] for layer, parts in rows.items()}
        is_token = self.units.token >= 0
        place = torch.empty(int(is_token.sum()), dtype=torch.long, device=is_token.device)
        self._place = place.scatter(0, self.units.token[is_token], is_token.nonzero()[:, 0])

    def embeddings(self, tokens: VisualTokens, units: Units, in_place: bool) -> tuple[VisualEmbeddings, torch.Tensor]:
        """See [`VisualModel.embeddings`]."""
        features, is_token = tokens.features, units.is_token.to(tokens.features.positions.device)
        is_left, stays = features.positions >= 0, tokens_left(features)
        start = (units.sizes.cumsum(0) - units.sizes).to(features.positions.device)
        place = self._place[(features.positions + start[:, None])[is_left]]
        # A separator stays; tokens are counted unit by unit, which need not be the order of columns.
        column_stays = (units.token < 0) | stays[is_token][units.token]
        made = self.made.features
        if in_place:
            made = made.masked_fill(~column_stays[:, None], 0.0)
        placed = made.index_copy(0, place, features.patches[is_left].to(made.dtype))
        whole = replace(self.made, features=placed)
        return (whole if in_place else whole.at(column_stays)), column_stays

    def budget_of_units(self, schedule: BudgetSchedule, units: Units) -> BudgetOfUnits:
        """See [`VisualModel.budget_of_units`]."""
        weights = None
        if schedule.is_shared and schedule.unit_weights == "attention":
            attention = self._attention_of_units(self._rows[FIRST_LAYER], units.is_token.to(self._place.device))
            weights = shares_of_tiles(cls_scores(attention).cpu(), units)
        elif schedule.is_shared and schedule.unit_weights == "novelty":
            weights = novelty_of_units(
                self._of_units(self.made.features, units.is_token.to(self._place.device)), units
            )
        return schedule.of_units(units.sample, units.sizes, weights)

    def native_dial(self) -> NativeDial:
        """See [`VisualModel.native_dial`]."""
        family, of_kinds, grids = self.model.family, [], []
        for kind in self._found:
            settings = family.native_settings(self.model, kind, self.images)
            of_kinds += [(kind, number) for number in range(len(settings))]
            grids += [{name: (t * h, w) for name, (t, h, w) in own.items()} for own in settings]
        order = self.units.order.tolist()

        def encode(setting: str, units: list[int]) -> list[torch.Tensor]:
            asked = [of_kinds[order[unit]] for unit in units]
            made = {}
            for kind in dict(asked):
                own = [number for other, number in asked if other == kind]
                tokens = family.encoded_natively(self.model, kind, self.images, setting, own)
                made |= {(kind, number): rows for number, rows in zip(own, tokens, strict=True)}
            return [made[place] for place in asked]

        return NativeDial([grids[place] for place in order], encode)

    def fingerprints(self, images: Mapping[str, Any]) -> torch.Tensor:
        """See [`VisualModel.fingerprints`]."""
        family = self.model.family
        pixels = [
            own
            for kind, found in self._found.items()
            for own in family.pixels(self.model, kind, images, len(found.grids))
        ]
        return torch.tensor([fingerprint(own) for own in pixels])[self.units.order]

    def _encode(
        self,
        images: Mapping[str, Any],
        schedule: BudgetSchedule,
        units: Units,
        num_keep: torch.Tensor | None,
        question: torch.Tensor | None,
    ) -> tuple[VisionFeatures, Selection]:
        """The family's tokens, padded to the largest unit, and what the budget read of them."""
        is_token = units.is_token.to(self._place.device)
        patches = self._of_units(self.made.features, is_token)
        positions = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
        positions = positions.masked_fill(~is_token, -1)
        fraction, meets_budget = self._budget_fraction(schedule, units)
        budget = None
        if meets_budget:
            fraction = fraction.to(patches.device)
            if not self.config.question_aware:
                question = None
            elif question is None:
                question = patches.new_zeros(len(patches), self.config.get_text_config().hidden_size)
            token = self.budget_token(fraction, question)
            budget = self.budget_token.cross_attention(token, patches, is_token)
        attention = {layer: self._attention_of_units(rows, is_token) for layer, rows in self._rows.items()}
        features = VisionFeatures(
            patches, positions, budget=budget, attention=attention, num_patches=is_token.shape[1]
        )
        return features, Selection(is_token, positions)

    def _projected(self, features: VisionFeatures, with_tower_patches: bool) -> VisionFeatures:
        """The tokens are in the decoder's space already."""
        return features

    def _of_units(self, at_placeholders: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Values `[num_placeholders, ...]` as `[num_units, largest N, ...]`, zero behind the last of a unit."""
        tokens = at_placeholders[self._place]
        padded = tokens.new_zeros(*is_token.shape, *tokens.shape[1:])
        return padded.masked_scatter(is_token.reshape(*is_token.shape, *[1] * (tokens.dim() - 1)), tokens)

    def _attention(self, module: nn.Module, calls: list[tuple[tuple, dict[str, Any]]], kind: str) -> torch.Tensor:
        """Attention and key of every row of the encoder's output in every head, `[rows, heads, 1 + head_dim]`."""
        values, family = [], self.model.family
        first = int(self.config.has_cls)
        for query, key in queries_and_keys(module, calls):
            for own_query, own_key in family.images_of_attention(self.model, kind, query, key, self.images):
                row = row_of_cls(own_query, own_key) if first else received(own_query, own_key)
                joined = torch.cat([row[..., None], own_key[:, :, first:]], dim=-1)
                values.append(joined.transpose(1, 2).flatten(0, 1))
        of_patches = torch.cat(values)
        pooled = family.pooled(self.model, kind, of_patches.flatten(1), self.images)
        return pooled.unflatten(1, of_patches.shape[1:])

    def _attention_of_units(self, rows: torch.Tensor, is_token: torch.Tensor) -> TowerAttention:
        padded = self._of_units(rows, is_token).transpose(1, 2)
        return TowerAttention(None, None, padded[..., 1:], padded[..., 0].contiguous())


class OpenedVisual(VisualModel):
    """
    The visual half of a family whose tower we run ourselves, layer by layer: reducers and the budget act inside it.
    Behind it tokens are in the decoder's space, as they are of families that encode as a whole.

    Args:
        model: the family's, with a head and a budget's modules.
        kinds: `[batch, sequence]`, whose placeholder each column is; `None` for a prompt of nothing but its images.
        images: of one call.
        schedule: the stack and its budget.

    Attributes:
        units: what the tokens come in.

    Raises:
        ValueError: if a reducer of the stack needs what only the family's own run of the tower gives.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        kinds: torch.Tensor | None,
        images: Mapping[str, Any],
        schedule: BudgetSchedule,
    ) -> None:
        family: EncodingFamily = model.family
        super().__init__(family.tower(model), nn.Identity(), model.budget_token, model.config, model.training)
        self.model = model
        needs = {need for step in schedule.steps for need in step.reducer.needs}
        if "attention" in needs or ("budget" in needs and self.config.budget_fusion == "post"):
            missing = "the attention of the whole tower" if "attention" in needs else "the budget behind it"
            raise ValueError(
                f"`reducer` is {schedule.names}, where something acts inside the tower and something reads {missing}; "
                "use one of them, or let the budget meet the image inside with budget_fusion='encoder'."
            )
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        number = len(images[KINDS["image"]])
        grids, none = [(1, side, side)] * number, torch.zeros(number * side**2, dtype=torch.bool)
        if kinds is None:
            kinds = torch.zeros(1, len(none), dtype=torch.long, device=images[KINDS["image"]].device)
        self.units: Units = units_of_kinds(kinds, {"image": KindUnits(grids, none)})

    def encode_and_reduce(self, images: Mapping[str, Any], *args: Any, **kwargs: Any) -> VisualTokens:
        """See [`VisualModel.encode_and_reduce`]."""
        return super().encode_and_reduce(images[KINDS["image"]], *args, **kwargs)

    def _encode(self, *args: Any) -> tuple[VisionFeatures, Selection]:
        """See [`VisualModel._encode`]; projected."""
        features, selection = super()._encode(*args)
        patches = self.model.family.projected(self.model, features.patches)
        if selection.features is not None:
            selection.features = patches
        return replace(features, patches=patches), selection

    def _projected(self, features: VisionFeatures, with_tower_patches: bool) -> VisionFeatures:
        """The tokens are in the decoder's space already."""
        return features


def _order_of_kinds(kind: torch.Tensor) -> torch.Tensor:
    """For each placeholder, where its row is when the rows of all images come before those of all videos."""
    return kind.argsort(stable=True).argsort()


def _in_the_order_of_columns(kind: torch.Tensor, outputs: Mapping[str, ModelOutput]) -> VisualEmbeddings:
    """What encoders made, in the order of its placeholders, whose kinds are `kind` `[num_placeholders]`."""
    given = [outputs[name] for name in KINDS if name in outputs]
    features = torch.cat([_rows(output.pooler_output) for output in given])
    layers = [getattr(output, "deepstack_features", None) or [] for output in given]
    deepstack = [torch.cat([_rows(layer) for layer in parts]) for parts in zip(*layers, strict=True)]
    if len(given) == 1:
        return VisualEmbeddings(features, deepstack, kind)
    order = _order_of_kinds(kind).to(features.device)
    return VisualEmbeddings(features[order], [layer[order] for layer in deepstack], kind)


def _rows(entries: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The rows of an encoder's output, which may be a tensor or have one for each image."""
    return torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in entries])
