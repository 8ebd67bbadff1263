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

    Raises:
        ValueError: if placeholders and images do not agree, or the budget or a reducer wants what is not known.
    """

    made: VisualEmbeddings

    def __init__(
        self,
        model: "PreTrainedModel",
        kinds: torch.Tensor | None,
        images: Mapping[str, Any],
        schedule: BudgetSchedule,
    ) -> None:
        family: EncodingFamily = model.family
        super().__init__(family.tower(model), None, model.budget_token, model.config, model.runs_everything)
        self.model, self.images = model, images
        self._found: dict[str, KindUnits] = {}
        outputs, rows = self._look(schedule)
        if kinds is None:
            places = len(self._found["image"].is_separator)
            kinds = torch.zeros(1, places, dtype=torch.long, device=images[KINDS["image"]].device)
        self.units: Units = units_of_kinds(kinds, self._found)
        # All of it is where the placeholders are, wherever the parts of the model are.
        self._kinds, self._is_token = kinds[kinds >= 0], self.units.is_token.to(kinds.device)
        if outputs:
            self.made = _in_the_order_of_columns(self._kinds, outputs)
            for _ in range(self._num_missing):
                blank = model.encoded("image", model.blank_image(self.made.features.device))
                zero = sum(0.0 * _rows(entries).sum() for entries in _layers(blank))
                self.made = replace(self.made, features=self.made.features + zero)
        # The rows of attention come kind by kind.
        order = _order_of_kinds(self._kinds)
        self._rows = {layer: torch.cat(parts).to(order.device)[order] for layer, parts in rows.items()}
        is_token = self.units.token >= 0
        place = torch.empty(int(is_token.sum()), dtype=torch.long, device=is_token.device)
        self._place = place.scatter(0, self.units.token[is_token], is_token.nonzero()[:, 0])

    def _look(self, schedule: BudgetSchedule) -> tuple[dict[str, ModelOutput], dict[int, list[torch.Tensor]]]:
        """What the family's encoder makes of each kind, and attention by layer, kind by kind; finds their units."""
        model, family, images = self.model, self.model.family, self.images
        shares_by_attention = schedule.is_shared and schedule.unit_weights == "attention"
        if shares_by_attention and not family.knows_tiles:
            raise ValueError(
                "`unit_weights` is 'attention', which shares among the tiles of a picture by what its whole view "
                f"looks at, and a call of a {self.config.model_type!r} model does not say which tile shows what; use "
                "'size' or 'novelty'."
            )
        layers = sorted({*wanted_layers(schedule.steps), *([FIRST_LAYER] if shares_by_attention else [])})
        modules = [family.attention_module(model, layer) for layer in layers]
        # Where there is no CLS, what tokens receive is what ranks them.
        self._with_received = wanted_layers(schedule.steps, "received") if self.config.has_cls else []
        outputs, rows = {}, {layer: [] for layer in layers}
        given = [kind for kind, pixels in KINDS.items() if images.get(pixels) is not None]
        self._num_missing = self._most_runs_of_the_tower(len(given)) - len(given)
        for kind in given:
            with noting_inputs(modules) as noted:
                outputs[kind] = model.encoded(kind, images)
            self._found[kind] = family.units(model, kind, outputs[kind], images)
            for layer, module, calls in zip(layers, modules, noted, strict=True):
                rows[layer].append(self._attention(module, calls, kind, layer in self._with_received))
        return outputs, rows

    def _most_runs_of_the_tower(self, num_runs: int) -> int:
        """
        Of all processes that share its parameters, how often the one runs the tower that does so most. Images and
        videos each take a run, and for the kind that is missing here a blank image will.
        """
        if not self.model.is_sharded or not hasattr(self.model.base_model, "get_video_features"):
            return num_runs
        most = torch.tensor(num_runs, device=self.model.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def embeddings(self, tokens: VisualTokens, units: Units, in_place: bool) -> tuple[VisualEmbeddings, torch.Tensor]:
        """See [`VisualModel.embeddings`]."""
        features = tokens.features
        is_left, stays = features.positions >= 0, tokens_left(features)
        start = (units.sizes.cumsum(0) - units.sizes).to(features.positions.device)
        place = self._place[(features.positions + start[:, None])[is_left]]
        # A separator stays; tokens are counted unit by unit, which need not be the order of columns.
        column_stays = (units.token < 0) | stays[self._is_token][units.token]
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
            attention = self._attention_of_units(FIRST_LAYER)
            weights = shares_of_tiles(cls_scores(attention).cpu(), units)
        elif schedule.is_shared and schedule.unit_weights == "novelty":
            weights = novelty_of_units(self._of_units(self.made.features), units)
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
            return [made[place].to(self._place.device) for place in asked]

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
        """The family's tokens, and what the budget read of them."""
        budget, told = None, self._told_of_budget(schedule, units, question, self._place.device)
        if told:
            token, patches = self.budget_token(told["budget"], told["question"]), self._of_units(self.made.features)
            budget = self.budget_token.cross_attention(token, patches, self._is_token)
        return self._whole(budget, {layer: self._attention_of_units(layer) for layer in self._rows})

    def _whole(
        self, budget: torch.Tensor | None, attention: dict[int, TowerAttention]
    ) -> tuple[VisionFeatures, Selection]:
        """All of what was made, padded to the largest unit."""
        patches, is_token = self._of_units(self.made.features), self._is_token
        positions = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
        positions = positions.masked_fill(~is_token, -1)
        features = VisionFeatures(
            patches, positions, budget=budget, attention=attention, num_patches=is_token.shape[1]
        )
        return features, Selection(is_token, positions)

    def _projected(self, features: VisionFeatures, with_tower_patches: bool) -> VisionFeatures:
        """The tokens are in the decoder's space already."""
        return features

    def _of_units(self, at_placeholders: torch.Tensor) -> torch.Tensor:
        """Values `[num_placeholders, ...]` as `[num_units, largest N, ...]`, zero behind the last of a unit."""
        tokens, is_token = at_placeholders[self._place], self._is_token
        padded = tokens.new_zeros(*is_token.shape, *tokens.shape[1:])
        return padded.masked_scatter(is_token.reshape(*is_token.shape, *[1] * (tokens.dim() - 1)), tokens)

    def _attention(
        self, module: nn.Module, calls: list[tuple[tuple, dict[str, Any]]], kind: str, with_received: bool
    ) -> torch.Tensor:
        """
        Attention (and what is received, where it is asked for and not the same) and key of every row of the encoder's
        output in every head, `[rows, heads, (1 or 2) + head_dim]`.
        """
        values, family = [], self.model.family
        first = int(self.config.has_cls)
        for query, key in queries_and_keys(module, calls):
            for own_query, own_key in family.images_of_attention(self.model, kind, query, key, self.images):
                rows = [row_of_cls(own_query, own_key) if first else received(own_query, own_key)]
                if with_received:
                    rows.append(received(own_query, own_key)[..., first:])
                joined = torch.cat([torch.stack(rows, dim=-1), own_key[:, :, first:]], dim=-1)
                values.append(joined.transpose(1, 2).flatten(0, 1))
        of_patches = torch.cat(values)
        pooled = family.pooled(self.model, kind, of_patches.flatten(1), self.images)
        return pooled.unflatten(1, of_patches.shape[1:])

    def _attention_of_units(self, layer: int) -> TowerAttention:
        padded = self._of_units(self._rows[layer]).transpose(1, 2)
        number = int(layer in self._with_received)
        row, received_by, keys = padded[..., 0], padded[..., number], padded[..., number + 1 :]
        return TowerAttention(None, None, keys, row.contiguous(), received_by.contiguous())


class OpenedVisual(FamilyVisual):
    """
    The visual half of a family whose tower we run ourselves, layer by layer: reducers and the budget act inside it.
    Behind it tokens are in the decoder's space, as they are of families that encode as a whole.
    """

    def _look(self, schedule: BudgetSchedule) -> tuple[dict[str, ModelOutput], dict[int, list[torch.Tensor]]]:
        """Nothing yet: what leaves in the tower is known when it is known how many tokens each unit has."""
        needs = {need for step in schedule.steps for need in step.reducer.needs}
        clash = None
        if "attention" in needs:
            clash = "something reads the attention of the whole tower; use one of them."
        elif "budget" in needs and self.config.budget_fusion == "post":
            clash = "something reads the budget behind it; let it meet the image inside with budget_fusion='encoder'."
        elif schedule.is_shared and schedule.unit_weights != "size":
            clash = f"`unit_weights` is {schedule.unit_weights!r}, which the whole tower's tokens say; use 'size'."
        if clash is not None:
            raise ValueError(f"`reducer` is {schedule.names}, where something acts inside the tower and {clash}")
        if self.images.get(KINDS["video"]) is not None:
            raise ValueError(
                f"`{KINDS['video']}` was given and `reducer` is {schedule.names}, where something acts inside the "
                "tower, behind which this family makes frames smaller; let all of it act behind, a budget with "
                "budget_fusion='post'."
            )
        self._found["image"] = self.model.family.units(self.model, "image", None, self.images)
        return {}, {}

    def _encode(
        self,
        images: Mapping[str, Any],
        schedule: BudgetSchedule,
        units: Units,
        num_keep: torch.Tensor | None,
        question: torch.Tensor | None,
    ) -> tuple[VisionFeatures, Selection]:
        """The tower's tokens, projected, reduced on the way if the first step acts there."""
        model, family = self.model, self.model.family
        pixels = torch.stack(family.pixels(model, "image", images, len(units.sizes)))
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        acts_inside = self._acts_in_tower(schedule, units, num_keep)
        is_token = torch.ones(len(pixels), side**2, dtype=torch.bool)
        if acts_inside:
            is_token = family.patches_of_units(model, images, is_token)
        features, selection = self._run_tower(pixels, is_token, schedule, units, num_keep, question)
        tokens, separator = family.projected(model, features.patches).to(self._place.device), family.separator(model)
        made = tokens.new_zeros(len(units.token), tokens.shape[-1])
        if not acts_inside:
            made = family.packed(model, tokens, images)
        if separator is not None:
            made = torch.where((units.token < 0)[:, None], separator.to(made), made)
        self.made = VisualEmbeddings(made, kinds=self._kinds)
        if not acts_inside:
            return self._whole(features.budget, {})
        if selection.features is not None:
            selection.features = tokens
        return replace(features, patches=tokens, cls=None), selection


def _order_of_kinds(kind: torch.Tensor) -> torch.Tensor:
    """For each placeholder, where its row is when the rows of all images come before those of all videos."""
    return kind.argsort(stable=True).argsort()


def _in_the_order_of_columns(kind: torch.Tensor, outputs: Mapping[str, ModelOutput]) -> VisualEmbeddings:
    """What encoders made, in the order of its placeholders, whose kinds are `kind` `[num_placeholders]`."""
    given = [outputs[name] for name in KINDS if name in outputs]
    features, *deepstack = (
        torch.cat([_rows(layer).to(kind.device) for layer in parts])
        for parts in zip(*map(_layers, given), strict=True)
    )
    if len(given) > 1:
        order = _order_of_kinds(kind)
        features, *deepstack = (rows[order] for rows in (features, *deepstack))
    return VisualEmbeddings(features, deepstack, kind)


def _layers(output: ModelOutput) -> list[torch.Tensor | list[torch.Tensor]]:
    """What an encoder made for the decoder's input, and for its first layers."""
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def _rows(entries: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The rows of an encoder's output, which may be a tensor or have one for each image."""
    return torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in entries])
